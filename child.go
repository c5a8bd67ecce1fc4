package main

// child.go is the worker's process: where it has its configuration and socket from, in which order it starts, what
// makes it stop, and in which order it ends. The work itself is worker.go's.

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"
)

// runWorker is child_process: under a parent, or by hand.
func runWorker(ctx context.Context, inv *invocation) int {
	p := &workerProcess{stop: make(chan struct{}), kill: make(chan struct{}), configs: make(chan *Config, 1),
		supervised: inv.supervised}
	var err error
	if inv.supervised {
		err = p.adopt(inv)
	} else {
		err = p.standAlone(ctx, inv)
	}
	if err != nil {
		inv.printError(err)
		if codeOf(err) == codeConfig {
			return exitUsage
		}
		return exitFailed
	}
	if err := p.run(ctx); err != nil {
		p.log.Error("worker stopped", errAttrs(err))
		return exitFailed
	}
	return exitOK
}

// A workerProcess is the process around a worker.
type workerProcess struct {
	cfg      *Config
	listener net.Listener
	log      *slog.Logger
	notify   func(notice) // tells the parent, if there is one

	supervised bool
	configs    chan *Config // the complete configuration, once
	service    *serviceSlot

	stop     chan struct{} // closed when the worker is to drain
	kill     chan struct{} // closed when it is to end at once
	stopOnce sync.Once
	killOnce sync.Once
}

func (p *workerProcess) requestStop() { p.stopOnce.Do(func() { close(p.stop) }) }
func (p *workerProcess) requestKill() { p.killOnce.Do(func() { close(p.kill) }) }

// adopt takes configuration and socket from the parent and follows its orders from then on.
func (p *workerProcess) adopt(inv *invocation) error {
	// The parent reads notices from stdout; whatever else would print there goes to the log.
	notices := os.Stdout
	os.Stdout = os.Stderr
	p.notify = func(n notice) {
		if err := writeLine(notices, n); err != nil {
			p.log.Debug("parent does not listen", errAttrs(err))
		}
	}
	sealDescriptors() // of what this process inherited, commands inherit nothing
	orders := newLineReader(inv.stdin)
	var first order
	if err := orders.next(&first); err != nil {
		return fail(codeLifeline, "read the parent's first order", err)
	}
	if first.Config == nil {
		return fail(codeLifeline, "read the parent's first order", errors.New("it holds no configuration"))
	}
	p.cfg = first.Config
	if !first.Pending {
		p.configs <- first.Config
	}
	p.log = newLogger(inv.stderr, p.cfg)
	p.service = newServiceSlot(p.cfg)
	var err error
	if first.Listener {
		p.listener, err = inheritedSocket()
	} else {
		p.listener, err = listen(p.cfg.Listen)
	}
	if err != nil {
		return err
	}
	// A terminal sends its interrupt to the whole group; the parent passes on what is meant. It is not ignored, which
	// the commands of tasks would inherit, but delivered to nobody.
	signal.Notify(make(chan os.Signal, 1), os.Interrupt)
	terminated := make(chan os.Signal, 2)
	signal.Notify(terminated, syscall.SIGTERM)
	go p.followSignals(terminated) // ends with the process
	go p.followOrders(orders)      // ends with the parent
	return nil
}

// followOrders does what the parent says until it is gone.
func (p *workerProcess) followOrders(orders lineReader) {
	for {
		var o order
		if err := orders.next(&o); err != nil {
			if !p.stopping() {
				p.log.Warn("parent is gone, stopping")
				p.requestStop()
				// The next worker on this host needs the port, and no one else will close it.
				p.listener.Close()
			}
			return
		}
		if o.Config != nil {
			select {
			case p.configs <- o.Config:
			default: // it has one already
			}
		}
		if problem, said := o.Problems["manager"]; said {
			p.service.noteManager(problem)
		}
		if o.Drain {
			p.requestStop()
		}
		if o.Kill {
			p.requestKill()
		}
	}
}

// standAlone is for a worker without a parent.
func (p *workerProcess) standAlone(ctx context.Context, inv *invocation) error {
	var err error
	if p.cfg, err = loadConfig(inv.configFile(), os.LookupEnv); err != nil {
		return err
	}
	p.log = newLogger(inv.stderr, p.cfg)
	p.service = newServiceSlot(p.cfg)
	for _, warning := range p.cfg.Warnings {
		p.log.Warn("configuration", "err", warning)
	}
	p.notify = func(notice) {}
	if p.listener, err = listen(p.cfg.Listen); err != nil {
		return err
	}
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go p.followSignals(signals) // ends with the process
	if p.cfg.EndPoint == "" {
		p.configs <- p.cfg
		return nil
	}
	source := newConfigSource(p.cfg, os.LookupEnv, p.log)
	go source.run(ctx) // ends with the process
	go func() {        // ends with the process
		for taken := false; ; {
			update := <-source.updates
			p.service.noteManager(update.problems["manager"])
			switch {
			case update.config != nil && !taken:
				taken = true
				p.configs <- update.config
			case update.config != nil:
				p.log.Warn("configuration has changed; without a parent it is taken up at the next start")
			}
		}
	}()
	return nil
}

// followSignals drains at the first signal and ends at once at the second.
func (p *workerProcess) followSignals(signals <-chan os.Signal) {
	<-signals
	p.requestStop()
	<-signals
	p.requestKill()
}

// run serves and works until it is told to stop. The REST API answers from the first moment; the worker begins when the
// configuration is complete.
func (p *workerProcess) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	bus := &eventBus{}
	recs, err := openRecords(p.cfg.DataDir, p.cfg.Retain)
	if err != nil {
		return err
	}
	defer recs.close()
	recs.setLog(p.log)
	bus.subscribe(recs.handle)
	bus.subscribe(logEvents(p.log))

	service := p.service
	api := newAPIServer(apiConfigOf(p.cfg), service, recs, bus, p.log)
	served := make(chan error, 1)
	go func() { served <- api.serve(p.listener) }() // ends at api.shutdown

	var w *worker
	opened := make(chan error, 1)
	watched := make(chan struct{})
	baseURL := reachableURL(p.listener.Addr())
	var complete *Config
	var again <-chan time.Time // when to try with the same configuration: a file that it names may have been mended
	pause := minRestartPause
	for running := true; running; {
		select {
		case complete = <-p.configs:
		case <-again:
		case err := <-opened:
			if err != nil {
				return err
			}
			opened = nil
			w.listenForOrders(func() { p.notify(notice{Reload: true}) }, p.askForShutdown)
			p.log.Info("ready", "addr", baseURL, "jobs", len(p.cfg.Jobs), "pid", os.Getpid(), "try", p.suggestion())
			p.notify(notice{Ready: true})
		case err := <-served:
			if !p.stopping() {
				return err
			}
			running = false
		case <-p.stop:
			running = false
		}
		if complete != nil && w == nil && running {
			again = nil
			if w, err = newWorker(complete, baseURL, recs, bus, p.log); err != nil {
				p.log.Error("worker cannot start yet", errAttrs(err), "pause", pause.String())
				service.explain(err)
				again = time.After(pause)
				pause = min(2*pause, maxRestartPause)
				continue
			}
			p.cfg = complete
			api.reconfigure(apiConfigOf(complete))
			service.fill(w)
			go func() { opened <- w.open(ctx) }() // ends at the latest with ctx
			go func() {                           // ends with ctx
				defer close(watched)
				w.watchResources(ctx)
			}()
		}
	}
	cancel()
	if w != nil {
		<-watched
		if opened != nil {
			<-opened
		}
	}

	urgent, hurry := context.WithCancel(context.Background())
	defer hurry()
	go func() { // ends with a kill order, or with the process
		<-p.kill
		hurry()
	}()
	if w != nil {
		w.drain(urgent)
	}
	grace, stop := context.WithTimeout(urgent, settleTimeout)
	defer stop()
	if err := api.shutdown(grace); err != nil {
		p.log.Warn("REST API not closed in time", errAttrs(err))
	}
	if w != nil {
		w.close()
	}
	p.log.Info("worker stopped")
	return nil
}

// askForShutdown lets the parent stop everything; without one this process is everything.
func (p *workerProcess) askForShutdown() {
	if p.supervised {
		p.notify(notice{Shutdown: true})
	} else {
		p.requestStop()
	}
}

// suggestion is a first thing to try for somebody who reads the log.
func (p *workerProcess) suggestion() string {
	if len(p.cfg.Jobs) == 0 {
		return "add a job to " + p.cfg.File
	}
	return fmt.Sprintf("job_item create %s --wait", p.cfg.Jobs[0].Event)
}

func (p *workerProcess) stopping() bool {
	select {
	case <-p.stop:
		return true
	default:
		return false
	}
}

// reachableURL is how a job on this host reaches the REST API that listens on addr.
func reachableURL(addr net.Addr) string {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok {
		return "http://" + addr.String()
	}
	host := tcp.IP.String()
	if tcp.IP == nil || tcp.IP.IsUnspecified() {
		host = "127.0.0.1"
	}
	return "http://" + net.JoinHostPort(host, fmt.Sprint(tcp.Port))
}
