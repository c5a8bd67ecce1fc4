//go:build unix

package main

// process_unix.go ends what a dead worker's tasks have left running.

import (
	"fmt"
	"os"
	"runtime"
	"slices"
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
	if len(tasks) == 0 {
		return nil // looking at every process of the host would find none
	}
	boot := bootID()
	var groups []staleProcess
	for _, t := range tasks {
		if t.hasLeader(boot) {
			groups = append(groups, staleProcess{t.process, true})
		}
	}
	strays := func() []staleProcess { return strayProcesses(tasks, boot) }
	return endStaleProcesses(groups, strays, killAfter)
}

// endStaleProcesses ends these groups, and the strays as they are found, until there are none.
func endStaleProcesses(groups []staleProcess, strays func() []staleProcess, killAfter time.Duration) error {
	killAt := time.Now().Add(killAfter)
	giveUpAt := killAt.Add(unkillableWait)
	asked := map[staleProcess]bool{}
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		groups = slices.DeleteFunc(groups, staleProcess.groupGone)
		remaining := append(strays(), groups...)
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

// hasLeader reports whether the process that was recorded for t is there still, beyond doubt.
func (t staleTask) hasLeader(boot string) bool {
	p := t.process
	return p.PID > 1 && p.Start != "" && boot != "" && p.Boot == boot && processStart(p.PID) == p.Start
}

// groupGone reports that nothing of a group is alive. The group may outlive its leader, whose number then stays taken.
func (p staleProcess) groupGone() bool {
	if !p.unchanged() {
		return true
	}
	err := syscall.Kill(-p.PID, 0)
	return err == syscall.ESRCH || err == syscall.EPERM && runtime.GOOS != "linux" || processGroup{p.PID}.dead()
}

// unchanged reports that the number is not another process's by now.
func (p staleProcess) unchanged() bool {
	start := processStart(p.PID)
	return start == p.Start || start == "" && p.group
}

// signal sends to that very process or group and no later bearer of its number.
func (p staleProcess) signal(signals ...syscall.Signal) {
	// Where the system has handles on processes, this one is opened first and then found to be the right one.
	process, err := os.FindProcess(p.PID)
	if err != nil {
		return
	}
	defer process.Release()
	if !p.unchanged() {
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
