package main

// childprocess.go is a child of the parent: how it is started, told, heard and ended, and when it is started again. What
// becomes of what it says is decided in supervisor.go.

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"time"
)

const (
	minRestartPause = 100 * time.Millisecond
	maxRestartPause = 30 * time.Second
	steadyAfter     = time.Minute // a child that lived so long is restarted without a long pause
)

// maxOrders bounds the orders that wait for a child to read them.
const maxOrders = 100

// A childProcess is one running process. Its orders go down its stdin; what it says, and last of all its end, comes as
// childEvents.
type childProcess struct {
	cmd    *exec.Cmd
	orders chan<- order
	began  time.Time
}

// A childEvent is something that a child said, or its end.
type childEvent struct {
	from   *childProcess
	notice notice
	ended  bool
	err    error // with ended: how
}

// A keptChild is started again when it ends, with growing pauses.
type keptChild struct {
	name    string // for the log
	command string // of the command line
	program string // the program's file; "": the one that is installed

	process *childProcess    // nil: it does not run
	due     <-chan time.Time // when it is started again; nil: it runs, or is not to run
	pause   time.Duration
	ending  bool             // it has been told to drain, and will not be missed
	endBy   <-chan time.Time // when it is killed if it has not ended
	silent  time.Duration    // since it last said that it makes progress
}

// runs reports whether there is a process.
func (k *keptChild) runs() bool { return k.process != nil }

// tell gives the child an order, if there is one. It never waits: the child may be stuck.
func (k *keptChild) tell(s *supervisor, o order) {
	if k.process == nil {
		return
	}
	select {
	case k.process.orders <- o:
	default:
		s.log.Error(k.name+" does not take its orders", "pid", k.process.cmd.Process.Pid)
	}
}

// drain tells the child to end gracefully, and to be killed when that takes longer than limit.
func (k *keptChild) drain(s *supervisor, limit time.Duration) {
	if k.process == nil || k.ending {
		return
	}
	k.ending = true
	k.endBy = time.After(limit)
	k.tell(s, order{Drain: true})
}

// kill ends the process at once; its event follows.
func (k *keptChild) kill() {
	k.endBy = nil
	k.process.cmd.Process.Kill()
}

// start starts the process and gives it its first order. An error is retried like an early end.
func (k *keptChild) start(s *supervisor, first order) {
	k.due, k.ending, k.endBy, k.silent = nil, false, nil, 0
	var err error
	program := k.program
	if program == "" {
		program = s.program
	}
	if k.process, err = s.startProcess(program, k.command, first); err != nil {
		k.process = nil
		s.log.Error(k.name+" cannot be started", errAttrs(fail(codeChild, "start "+k.name, err)), "pause", k.pause.String())
		k.restartLater()
	}
}

// adopt takes a process that was started already.
func (k *keptChild) adopt(process *childProcess) {
	k.process, k.due, k.ending, k.endBy, k.silent = process, nil, false, nil, 0
	process.began = time.Now()
}

// ended notes the end of the process, and has it started again if it is missed.
func (k *keptChild) ended(s *supervisor, err error) {
	lived := time.Since(k.process.began)
	missed := !k.ending && !s.stopping
	k.process, k.ending, k.endBy = nil, false, nil
	if !missed {
		return
	}
	if lived > steadyAfter {
		k.pause = minRestartPause
	}
	s.log.Error(k.name+" ended, starting it again", errAttrs(fail(codeChild, k.name, err)), "pause", k.pause.String())
	k.restartLater()
}

func (k *keptChild) restartLater() {
	k.due = time.After(k.pause)
	k.pause = min(2*k.pause, maxRestartPause)
}

// startProcess starts a child of the parent. It inherits the listening socket, and nothing of the service manager's.
func (s *supervisor) startProcess(program, command string, first order) (*childProcess, error) {
	cmd := exec.Command(program, command, "--config", s.cfg.File, "--supervised")
	cmd.Env = withoutServiceVariables(os.Environ())
	cmd.Stderr = s.stderr
	if first.Listener {
		cmd.ExtraFiles = []*os.File{s.socket}
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	notices, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := s.reaper.start(cmd); err != nil {
		return nil, err
	}
	orders := make(chan order, maxOrders)
	orders <- first
	p := &childProcess{cmd: cmd, orders: orders, began: time.Now()}
	gone := make(chan struct{})
	s.watching.Add(2)
	go func() { // ends when the child has
		defer s.watching.Done()
		defer close(gone)
		s.watch(p, notices)
	}()
	go func() { // ends when the child has
		defer s.watching.Done()
		defer stdin.Close()
		for {
			select {
			case o := <-orders:
				if err := writeLine(stdin, o); err != nil { // it is ending, which its event tells
					s.log.Debug("order not taken by "+command, errAttrs(err))
				}
			case <-gone:
				return
			}
		}
	}()
	return p, nil
}

// watch passes on what a child says until it is gone.
func (s *supervisor) watch(p *childProcess, notices io.Reader) {
	reader := newLineReader(notices)
	for {
		var said notice
		if reader.next(&said) != nil {
			break
		}
		s.events <- childEvent{from: p, notice: said}
	}
	err := s.reaper.wait(p.cmd)
	if err == nil {
		err = errors.New("it ended by itself")
	}
	s.events <- childEvent{from: p, ended: true, err: err}
}
