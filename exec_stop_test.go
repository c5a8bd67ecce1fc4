//go:build unix

package main

// exec_stop_test.go ends commands that do not want to, and what they have started.

import (
	"context"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"
)

// startRole runs a role in the background and returns when it has printed its pid.
func startRole(t *testing.T, ctx context.Context, c *command) (pid int, end func() exitStatus) {
	t.Helper()
	var out collected
	c.output = out.take
	ended := make(chan struct{})
	var status exitStatus
	var err error
	go func() { // ends with the command
		defer close(ended)
		status, err = c.run(ctx)
	}()
	pid = out.waitForPID(t)
	return pid, func() exitStatus {
		<-ended
		if err != nil {
			t.Error(err)
		}
		return status
	}
}

func TestRunStopped(t *testing.T) {
	for role, signal := range map[string]string{"ready-then-hang": "SIGTERM", "ignore-term": "SIGKILL"} {
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		c := roleCommand(t, role)
		c.killAfter = 300 * time.Millisecond
		pid, end := startRole(t, ctx, c)
		cancel()
		if status := end(); !status.stopped || status.signal != signal || status.code != -1 || alive(pid) {
			t.Errorf("stop %s: %+v, alive %v; want %s", role, status, alive(pid), signal)
		}
	}
}

// A process that is stopped itself is ended all the same, without waiting for SIGKILL.
func TestRunStopsSuspended(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	c := roleCommand(t, "ready-then-hang")
	c.killAfter = time.Minute
	pid, end := startRole(t, ctx, c)
	syscall.Kill(pid, syscall.SIGSTOP)
	cancel()
	if status := end(); status.signal != "SIGTERM" {
		t.Errorf("%+v; want SIGTERM", status)
	}
}

func TestRunStopsBesideBlockedOutput(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	c := roleCommand(t, "print-bytes", strconv.Itoa(100<<20))
	c.killAfter = 100 * time.Millisecond
	pids := make(chan int, 1)
	c.started = func(p processIdentity) error { pids <- p.PID; return nil }
	blocked, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	c.output = func(outputStream, []byte) { once.Do(func() { close(blocked) }); <-release }
	ended := make(chan exitStatus, 1)
	go func() { // ends with the command
		status, err := c.run(ctx)
		if err != nil {
			t.Error(err)
		}
		ended <- status
	}()
	pid := <-pids
	<-blocked
	cancel()
	assertGone(t, pid)
	select {
	case <-ended:
		t.Error("run returned before the output callback did")
	default:
	}
	close(release)
	if status := <-ended; !status.stopped {
		t.Errorf("%+v; want stopped", status)
	}
}

// Hurry is for all of the group, also when its leader has ended already.
func TestRunHurriesWhatIsLeft(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	hurry := make(chan struct{})
	c := roleCommand(t, "spawn-grandchild", "ignore-term")
	c.killAfter, c.hurry = time.Minute, hurry
	pid, end := startRole(t, ctx, c)
	cancel()
	close(hurry)
	begin := time.Now()
	if status := end(); status.left != "" || time.Since(begin) > 5*time.Second {
		t.Errorf("%+v after %v", status, time.Since(begin))
	}
	assertGone(t, pid)
}

func TestRunEndsWhatIsLeft(t *testing.T) {
	within := 6 * time.Second
	for _, role := range []string{"ready-then-hang", "ignore-term"} {
		var out collected
		c := roleCommand(t, "spawn-grandchild", role)
		c.killAfter, c.output = 500*time.Millisecond, out.take
		begin := time.Now()
		status := mustRun(t, context.Background(), c)
		grandchild := out.waitForPID(t)
		if status.code != 0 || status.stopped || time.Since(begin) > within {
			t.Errorf("left %s: %+v after %v; want 0 within %v", role, status, time.Since(begin), within)
		}
		if state, there := processState(grandchild); there && state != 'Z' {
			t.Errorf("left %s: process %d is alive (%c) after run", role, grandchild, state)
		}
	}
}

func TestRunAlreadyStopped(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	c := roleCommand(t, "exit", "0")
	c.started = func(processIdentity) error { t.Error("it was started"); return nil }
	if status, err := c.run(ctx); err != nil || !status.stopped || status.pid != 0 || status.code != -1 {
		t.Errorf("run = %+v, %v; want stopped without a pid", status, err)
	}
}
