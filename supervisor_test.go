//go:build unix

package main

// supervisor_test.go is about what parent and children do when one of them, or who reads their log, is gone.

import (
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestParentKilled lets the worker of a killed parent end what runs, as it does when it is told to stop. It runs longer
// than the pause between two signs of life, which nobody reads any more.
func TestParentKilled(t *testing.T) {
	t.Parallel() // it mostly waits
	a := newAgent(t, `
concurrency: 1
jobs:
  - {event: a, cmd: 'echo begin >> ran; sleep 2.5; echo end >> ran'}
execs:
  - {key: side, cmd: 'sleep 1000'}
`)
	a.start()
	running, waiting := a.create("a", "{}"), a.create("a", "{}")
	a.wait(running, statusRunning)
	worker, side := a.childPID(), a.execPIDs()["side"]
	a.cmd.Process.Kill()
	<-a.gone
	for _, pid := range []int{worker, side} {
		waitFor(t, 20*time.Second, func() string {
			if syscall.Kill(pid, 0) == nil {
				return "a process is still there\n" + a.log.String()
			}
			return ""
		})
	}
	if ran := a.ran(); !slices.Equal(ran, []string{"begin", "end"}) {
		t.Errorf("the running task did %q before the worker ended\n%s", ran, a.log)
	}
	a.start()
	a.wait(running, statusFinish)
	a.wait(waiting, statusFinish)
	if ran := a.ran(); !slices.Equal(ran, []string{"begin", "end", "begin", "end"}) {
		t.Errorf("in the end the tasks have done %q", ran)
	}
}

// TestLogReaderGone takes the reader of the log away.
func TestLogReaderGone(t *testing.T) {
	a := newAgent(t, "jobs:\n  - {event: a, cmd: 'echo fine'}\nexecs:\n  - {key: chatty, cmd: 'while sleep 0.1; do echo line; done'}\n")
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	a.url = "http://" + configuredListen(t, a)
	a.cmd = cliCommand(t, nil, "--config", filepath.Join(a.dir, "config.yaml"))
	a.cmd.Stderr = write
	if err := a.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	write.Close()
	t.Cleanup(func() { a.cmd.Process.Kill(); a.cmd.Wait() })
	waitFor(t, 20*time.Second, func() string { return unless(a.health().Status == "ok", "not healthy") })
	read.Close()
	execs := a.execPIDs()
	for range 3 { // each writes to the log
		a.wait(a.create("a", "{}"), statusFinish)
	}
	if now := a.execPIDs(); now["chatty"] != execs["chatty"] {
		t.Error("the background process was started anew")
	}
	a.cmd.Process.Signal(syscall.SIGTERM)
	if err := a.cmd.Wait(); err != nil {
		t.Errorf("job_item ended with %v", err)
	}
}

func unless(there bool, what string) string {
	if there {
		return ""
	}
	return what
}

func configuredListen(t *testing.T, a *agent) string {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(a.dir, "config.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(content), "listen: ")
	address, _, _ := strings.Cut(rest, "\n")
	return address
}

// TestServiceManager plays systemd: it is told when the worker is ready, reloads and stops, and hears of it as long as
// the worker makes progress. A worker that hangs is killed and started again by the parent.
func TestServiceManager(t *testing.T) {
	t.Parallel() // it mostly waits
	socket := filepath.Join(t.TempDir(), "notify")
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	// heard waits for a message that holds a line.
	heard := func(line string) {
		t.Helper()
		manager.SetReadDeadline(time.Now().Add(20 * time.Second))
		buf := make([]byte, 4096)
		for {
			n, err := manager.Read(buf)
			if err != nil {
				t.Fatalf("%s is not told: %v", line, err)
			}
			if slices.ContainsFunc(strings.Split(string(buf[:n]), "\n"), func(l string) bool { return strings.HasPrefix(l, line) }) {
				return
			}
		}
	}
	a := newAgent(t, "jobs:\n  - {event: a, cmd: 'env | grep -c NOTIFY_SOCKET; test $JOB_ITEM_ATTEMPT = {{long}} && sleep 60; echo {{task_id}} >> ran'}\nexecs:\n  - {key: side, cmd: 'sleep 1000'}\n")
	a.env = []string{"NOTIFY_SOCKET=" + socket, "WATCHDOG_USEC=20000000"}
	a.start()
	heard("READY=1")
	heard("WATCHDOG=1")
	a.cmd.Process.Signal(syscall.SIGHUP)
	heard("RELOADING=1")
	heard("READY=1")
	id := a.create("a", `{"long":0}`)
	if a.wait(id, statusFinish); a.output(id) != "0\n" {
		t.Errorf("the task sees the service manager's socket: %q", a.output(id))
	}

	hanging := a.childPID()
	id = a.create("a", `{"long":1}`)
	a.wait(id, statusRunning)
	syscall.Kill(hanging, syscall.SIGSTOP)
	a.awaitLog("found hanging", func() bool { return strings.Contains(a.log.String(), string(codeChildSilent)) })
	a.awaitLog("started again", func() bool { return a.childPID() != hanging })
	a.wait(id, statusFinish)
	if ran := a.ran(); !slices.Equal(ran[1:], []string{id}) {
		t.Errorf("ran %q, want %s once", ran, id)
	}
	heard("WATCHDOG=1")
	a.cmd.Process.Signal(syscall.SIGTERM)
	heard("STOPPING=1")
	a.waitGone(20 * time.Second)
}

// TestStopInBounds stops job_item while everything ignores SIGTERM: it ends within drain_timeout and kill_after, and at
// once at a second signal. The task runs again after the next start.
func TestStopInBounds(t *testing.T) {
	t.Parallel() // it mostly waits
	a := newAgent(t, `
drain_timeout: 1s
kill_after: 1s
jobs:
  - {event: stubborn, cmd: 'trap "" TERM; setsid sleep 600 & echo $! > gone; echo begin >> ran; if test -e go; then exit; fi; while :; do sleep 0.1; done'}
execs:
  - {key: stubborn, cmd: 'trap "" TERM; while :; do sleep 0.1; done'}
`)
	for _, signals := range []int{1, 2} {
		a.start()
		pid := a.execPIDs()["stubborn"]
		if signals == 1 {
			a.wait(a.create("stubborn", "{}"), statusRunning)
		} else {
			waitFor(t, 10*time.Second, func() string { return unless(a.health().Jobs["running"] == 1, "the task does not run again") })
		}
		began := time.Now()
		a.cmd.Process.Signal(syscall.SIGTERM)
		a.awaitLog("stopping", func() bool { return strings.Contains(a.log.String(), "msg=stopping") })
		if signals == 2 {
			a.cmd.Process.Signal(syscall.SIGTERM)
		}
		a.waitGone(20 * time.Second)
		// A margin for a busy machine; what must not happen is that one bound is waited for after another.
		if took := time.Since(began); took > time.Duration(3-signals)*time.Second+1500*time.Millisecond {
			t.Errorf("%d signals: it took %v to stop\n%s", signals, took, a.log)
		}
		if code := a.cmd.ProcessState.ExitCode(); code != 0 {
			t.Errorf("%d signals: exit code %d", signals, code)
		}
		if err := syscall.Kill(pid, 0); err != syscall.ESRCH {
			t.Errorf("the background process: %v", err)
		}
		content, _ := os.ReadFile(filepath.Join(a.dir, "gone"))
		stray, _ := strconv.Atoi(strings.TrimSpace(string(content)))
		waitFor(t, 5*time.Second, func() string {
			return unless(stray > 0 && syscall.Kill(stray, 0) == syscall.ESRCH, "what the task has started in a session of its own is still there")
		})
	}
	a.write("go", "")
	a.start()
	waitFor(t, 10*time.Second, func() string { return unless(a.health().Jobs["finish"] == 1, "the task has not finished") })
}
