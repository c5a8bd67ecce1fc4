package main

// reaper.go is the parent's care for orphans, the processes that have lost the one that started them. On Linux they
// become the parent's children when it has called becomeSubreaper, or is the first process of a container. The reaper
// waits for them, so that no zombie is left, and ends what a killed worker's tasks have left running (PROTOCOL section
// 8). It never takes the exit status of a child that the parent has started itself.
//
// It ends a process group at once when it sees that the group's leader was killed by SIGKILL: so ends the leader of a
// task or of an exec with its worker, by its parent-death signal. Everything else that a dead worker's tasks have left
// is found by the next worker: endStaleGroups.

import (
	"log/slog"
	"os/exec"
	"sync"
)

// A reaper also starts the parent's own children, and is to start all of them: those it does not know are orphans, and
// whoever waits for one may find that it has been waited for. (So may gopsutil with lsb_release, which it asks for the
// name of some systems and can do without.) Its methods may be called concurrently.
type reaper struct {
	log    *slog.Logger
	waited chan struct{} // an own child has been waited for

	mu  sync.Mutex // guards own, and is held while a child is started or an orphan is waited for
	own map[*exec.Cmd]bool
}

func newReaper(log *slog.Logger) *reaper {
	return &reaper{log: log, waited: make(chan struct{}, 1), own: map[*exec.Cmd]bool{}}
}

// start is cmd.Start. Each child that was started is waited for with wait, and soon after its end: until then no orphan
// is.
func (r *reaper) start(cmd *exec.Cmd) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := cmd.Start(); err != nil {
		return err
	}
	r.own[cmd] = true
	return nil
}

// wait is cmd.Wait.
func (r *reaper) wait(cmd *exec.Cmd) error {
	err := cmd.Wait()
	r.mu.Lock()
	delete(r.own, cmd)
	r.mu.Unlock()
	select {
	case r.waited <- struct{}{}:
	default: // run has not looked since the last one
	}
	return err
}
