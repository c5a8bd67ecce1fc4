package main

// process_windows.go names processes and ends those of a dead worker's tasks that are there still. A task's processes
// are in a job object that the system ends with its worker, but it does so in its own time.

import (
	"fmt"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// bootID is not needed: start times are absolute.
func bootID() string { return "" }

// processStart is in units of 100 ns of wall time; "" if there is no such process.
func processStart(pid int) string {
	process, err := openProcess(pid, 0)
	if err != nil {
		return ""
	}
	defer syscall.CloseHandle(process)
	return startOf(process)
}

// openProcess opens a process to ask when it started, and for what else access allows.
func openProcess(pid int, access uint32) (syscall.Handle, error) {
	const queryLimitedInformation = 0x1000
	return syscall.OpenProcess(queryLimitedInformation|access, false, uint32(pid))
}

func startOf(process syscall.Handle) string {
	var created, exited, kernel, user syscall.Filetime
	if err := syscall.GetProcessTimes(process, &created, &exited, &kernel, &user); err != nil {
		return ""
	}
	return strconv.FormatInt(created.Nanoseconds()/100, 10)
}

// endStaleGroups ends the recorded leaders that are there still and returns when they are gone. Nothing is asked
// first: the job object has not asked them either. An error (codeStaleGroup) names what could not be ended.
func endStaleGroups(tasks []staleTask, _ time.Duration) error {
	var leaders []processIdentity
	for _, t := range tasks {
		leaders = append(leaders, t.process)
	}
	return endStaleLeaders(leaders)
}

func endStaleLeaders(leaders []processIdentity) error {
	var ending []syscall.Handle
	var pids []int
	for _, p := range leaders {
		if p.PID == 0 || p.Start == "" {
			continue
		}
		process, err := openProcess(p.PID, syscall.PROCESS_TERMINATE|syscall.SYNCHRONIZE)
		if err != nil {
			continue // it is gone, or another user's and then no task of ours
		}
		defer syscall.CloseHandle(process)
		if startOf(process) != p.Start {
			continue
		}
		_ = syscall.TerminateProcess(process, 1) // an error says that it is ending already, or shows in the wait
		ending, pids = append(ending, process), append(pids, p.PID)
	}
	var remaining []string
	giveUpAt := time.Now().Add(unkillableWait)
	for i, process := range ending {
		patience := uint32(max(0, time.Until(giveUpAt).Milliseconds()))
		if event, _ := syscall.WaitForSingleObject(process, patience); event != syscall.WAIT_OBJECT_0 {
			remaining = append(remaining, fmt.Sprintf("process %d", pids[i]))
		}
	}
	if len(remaining) == 0 {
		return nil
	}
	return failHint(codeStaleGroup, "end the processes of a dead worker",
		fmt.Errorf("still there: %s", strings.Join(remaining[:min(len(remaining), 5)], "; ")),
		"look at them in the Task Manager, and end them by hand")
}
