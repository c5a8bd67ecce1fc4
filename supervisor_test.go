//go:build unix

package main

// supervisor_test.go is about what parent and children do when one of them, or who reads their log, is gone.

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestParentKilled lets the worker of a killed parent end what runs, as it does when it is told to stop. It runs longer
// than the pause between two signs of life, which nobody reads any more.
func TestParentKilled(t *testing.T) {
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
