//go:build unix

package main

// process_unix.go ends what a dead worker's tasks have left running.

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"
)

// A staleProcess is one process to end, or the whole group that it leads.
type staleProcess struct {
	processIdentity
	group bool
}

// endStaleGroups ends the processes of these tasks and returns when none is left: SIGTERM first, SIGKILL after
// killAfter. A task's processes are the group of its recorded leader, if that very process is there still, and on Linux
// every process that carries the task's id in its environment, in whatever group or session it is. The calling process
// and those it descends from are never touched. An error (codeStaleGroup) names what could not be ended.
func endStaleGroups(tasks []staleTask, killAfter time.Duration) error {
	boot := bootID()
	killAt := time.Now().Add(killAfter)
	giveUpAt := killAt.Add(unkillableWait)
	asked := map[staleProcess]bool{}
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		remaining := staleProcesses(tasks, boot)
		if len(remaining) == 0 {
			return nil
		}
		now := time.Now()
		if now.After(giveUpAt) {
			return staleError(remaining)
		}
		for _, p := range remaining {
			if !now.Before(killAt) {
				p.signal(syscall.SIGKILL)
			} else if !asked[p] {
				asked[p] = true
				p.signal(syscall.SIGTERM, syscall.SIGCONT)
			}
		}
		time.Sleep(pause) // no system tells when a stranger's process has ended
	}
}

func staleError(remaining []staleProcess) error {
	var names []string
	for _, p := range remaining[:min(len(remaining), 5)] {
		if p.group {
			names = append(names, processGroup{p.PID}.describe())
		} else {
			names = append(names, fmt.Sprintf("process %d", p.PID))
		}
	}
	return failHint(codeStaleGroup, "end the processes of a dead worker",
		fmt.Errorf("still there after SIGKILL: %s", strings.Join(names, "; ")),
		"look at them with ps, and end them by hand")
}

// signal sends to that very process and no later bearer of its number.
func (p staleProcess) signal(signals ...syscall.Signal) {
	// Where the system has handles on processes, this one is opened first and then found to be the right one.
	process, err := os.FindProcess(p.PID)
	if err != nil {
		return
	}
	defer process.Release()
	if processStart(p.PID) != p.Start {
		return
	}
	for _, signal := range signals {
		if p.group {
			syscall.Kill(-p.PID, signal)
		} else {
			process.Signal(signal)
		}
	}
}

// recordedLeader reports whether t names a process of this boot beyond doubt.
func (t staleTask) recordedLeader(boot string) bool {
	return t.process.PID > 1 && t.process.Start != "" && boot != "" && t.process.Boot == boot
}
