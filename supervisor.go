package main

// supervisor.go is the parent: it holds the listening socket and the configuration, starts the worker as its child and
// starts it again when it dies, and passes the signals on. It is small so that it is hard to break, and knows nothing
// of brokers, tasks or HTTP.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"
)

const (
	minRestartPause = 100 * time.Millisecond
	maxRestartPause = 30 * time.Second
	steadyAfter     = time.Minute // a child that lived so long is restarted without a long pause

	// stopMargin is what a child gets beyond drain timeout and kill grace, to report and to write.
	stopMargin = 15 * time.Second

	// killMargin is what a child gets to end its tasks' processes after a second signal.
	killMargin = 3 * time.Second

	// bindPatience is how long a taken port is waited for: a worker whose parent died closes it at once, but not sooner.
	bindPatience = 3 * time.Second
)

// runParent is job_item without a command.
func runParent(ctx context.Context, inv *invocation) int {
	cfg, err := loadConfig(inv.configFile(), os.LookupEnv)
	if err != nil {
		inv.printError(err)
		return exitUsage
	}
	if inv.dryRun {
		if !dryRun(ctx, cfg, inv.stdout) {
			return exitFailed
		}
		return exitOK
	}
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(signals)

	s := &supervisor{cfg: cfg, log: newLogger(inv.stderr, cfg), stderr: inv.stderr}
	for _, warning := range cfg.Warnings {
		s.log.Warn("configuration", "err", warning)
	}
	if len(cfg.Execs) > 0 {
		s.log.Warn("configuration", "err", "execs are configured, but this version does not start them")
	}
	if err := s.openSocket(); err != nil {
		inv.printError(err)
		return exitFailed
	}
	defer s.closeSocket()
	return s.supervise(ctx, signals)
}

// A supervisor keeps one worker process running.
type supervisor struct {
	cfg    *Config
	log    *slog.Logger
	stderr io.Writer
	socket *os.File // the listening socket that the children inherit; nil where that is impossible
}

// openSocket opens the port once for all children to come.
func (s *supervisor) openSocket() error {
	if !socketInherits {
		return nil
	}
	listener, err := listen(s.cfg.Listen)
	if err != nil {
		return err
	}
	defer listener.Close() // the duplicate stays open
	if s.socket, err = listener.File(); err != nil {
		return fail(codeSocket, fmt.Sprintf("keep socket on %s", s.cfg.Listen), err)
	}
	return nil
}

func (s *supervisor) closeSocket() {
	if s.socket != nil {
		s.socket.Close()
	}
}

// listen opens the REST API's port.
func listen(address string) (*net.TCPListener, error) {
	deadline := time.Now().Add(bindPatience)
	for {
		listener, err := net.Listen("tcp", address)
		if err == nil {
			return listener.(*net.TCPListener), nil
		}
		if !errors.Is(err, syscall.EADDRINUSE) || time.Now().After(deadline) {
			return nil, failHint(codeListen, fmt.Sprintf("listen on %s", address), err,
				"Is another worker running? Choose another address with listen: in the configuration.")
		}
		time.Sleep(50 * time.Millisecond) // another process closes it; there is nothing to wait on
	}
}

// supervise runs one worker after another until a signal comes or the manager wants this worker to stop. A changed
// configuration lets the worker drain, and the next one starts with it.
func (s *supervisor) supervise(ctx context.Context, signals <-chan os.Signal) int {
	ctx, stopAsking := context.WithCancel(ctx)
	defer stopAsking()
	config, complete := s.cfg, true
	var updates <-chan configUpdate
	askAgain := func() {}
	if s.cfg.EndPoint != "" {
		source := newConfigSource(s.cfg, os.LookupEnv, s.log)
		asked := make(chan struct{})
		go func() { // ends with ctx
			defer close(asked)
			source.run(ctx)
		}()
		defer func() {
			stopAsking()
			<-asked
		}()
		complete, updates, askAgain = false, source.updates, source.askAgain
	}

	problem := ""
	pause := minRestartPause
	for {
		began := time.Now()
		renewing := false
		child, err := s.startChild(config, complete)
		if err == nil && problem != "" {
			child.tell(order{Problems: map[string]string{"manager": problem}})
		}
		for err == nil {
			select {
			case <-child.exited:
				if err = child.err; renewing {
					err = errNewConfig
				}
			case sig := <-signals:
				return s.stop(child, sig.String(), signals)
			case <-child.shutdown:
				return s.stop(child, "asked for by the manager", signals)
			case <-child.reload:
				askAgain()
			case update := <-updates:
				problem = update.problems["manager"]
				child.tell(order{Problems: map[string]string{"manager": problem}})
				if update.config == nil {
					continue
				}
				config = update.config
				if !complete {
					complete = true
					child.tell(order{Config: config})
					continue
				}
				s.log.Info("configuration has changed, the worker starts anew with it")
				renewing = true
				child.tell(order{Drain: true})
			}
		}
		if errors.Is(err, errNewConfig) {
			continue
		}
		if time.Since(began) > steadyAfter {
			pause = minRestartPause
		}
		s.log.Error("worker process ended, starting it again",
			errAttrs(fail(codeChild, "worker process", err)), "pause", pause.String())
		select {
		case <-time.After(pause):
		case <-signals:
			return exitOK
		}
		pause = min(2*pause, maxRestartPause)
	}
}

// errNewConfig is why a worker that did nothing wrong is started anew.
var errNewConfig = errors.New("the configuration has changed")

// stop lets the child drain; a second signal, or too long a wait, ends it.
func (s *supervisor) stop(child *childProcess, reason string, signals <-chan os.Signal) int {
	s.log.Info("stopping", "reason", reason)
	child.tell(order{Drain: true})
	patience := time.After(s.cfg.DrainTimeout + s.cfg.KillAfter + stopMargin)
	killed := false
	for {
		select {
		case <-child.exited:
			s.log.Info("stopped")
			return exitOK
		case sig := <-signals:
			if !killed {
				killed = true
				s.log.Warn("stopping at once", "reason", sig.String())
				child.tell(order{Kill: true})
				patience = time.After(killMargin)
			}
		case <-patience:
			s.log.Error("worker process did not end in time, killing it", "pid", child.cmd.Process.Pid)
			child.cmd.Process.Kill()
			<-child.exited
			return exitFailed
		}
	}
}

// A childProcess is a running child: its orders go down, and exited is closed once it is gone, with err set.
type childProcess struct {
	cmd    *exec.Cmd
	orders io.WriteCloser
	exited chan struct{}
	err    error
	log    *slog.Logger

	reload, shutdown chan struct{} // the manager's wishes, which reach the worker first
}

// startChild starts a worker process and gives it the configuration, complete or not, and the socket.
func (s *supervisor) startChild(config *Config, complete bool) (*childProcess, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find the program file: %w", err)
	}
	cmd := exec.Command(self, "child_process", "--config", s.cfg.File, "--supervised")
	cmd.Stderr = s.stderr
	if s.socket != nil {
		cmd.ExtraFiles = []*os.File{s.socket}
	}
	orders, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	notices, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start worker process: %w", err)
	}
	child := &childProcess{cmd: cmd, orders: orders, exited: make(chan struct{}), log: s.log,
		reload: make(chan struct{}, 1), shutdown: make(chan struct{}, 1)}
	go child.watch(notices) // ends when the child has
	child.tell(order{Config: config, Pending: !complete, Listener: s.socket != nil})
	return child, nil
}

// watch reads what the child says until it is gone.
func (c *childProcess) watch(notices io.Reader) {
	reader := newLineReader(notices)
	for {
		var said notice
		if reader.next(&said) != nil {
			break
		}
		if said.Ready {
			c.log.Debug("worker process is ready", "pid", c.cmd.Process.Pid)
		}
		if said.Reload {
			signalOnce(c.reload)
		}
		if said.Shutdown {
			signalOnce(c.shutdown)
		}
	}
	if c.err = c.cmd.Wait(); c.err == nil {
		c.err = errors.New("it ended by itself")
	}
	close(c.exited)
}

// signalOnce notes a wish that is open already if it is not taken yet.
func signalOnce(wish chan<- struct{}) {
	select {
	case wish <- struct{}{}:
	default:
	}
}

// tell gives the child an order. One that cannot be told is ending, which watch sees.
func (c *childProcess) tell(o order) {
	if err := writeLine(c.orders, o); err != nil {
		c.log.Debug("order not taken by worker process", errAttrs(err))
	}
}
