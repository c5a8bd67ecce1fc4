package main

// process.go tells processes apart beyond their numbers, which are used again, and ends what a dead worker's tasks
// have left running, and only that. How a system names and finds processes is in process_linux.go, process_darwin.go,
// process_other.go and process_windows.go.

import "time"

// A processIdentity names one process for ever. A part that the system does not tell is empty, and then nobody is
// killed for bearing the number alone.
type processIdentity struct {
	PID   int    `json:"pid"`
	Start string `json:"start"` // the kernel's start time of that pid
	Boot  string `json:"boot"`  // the boot during which it ran
}

// identifyProcess describes a process that cannot vanish meanwhile, such as a child not yet waited for.
func identifyProcess(pid int) processIdentity {
	return processIdentity{PID: pid, Start: processStart(pid), Boot: bootID()}
}

// A staleTask is a task that a dead worker may have left running.
type staleTask struct {
	process processIdentity // its leader; zero if it was never recorded
	taskID  string

	// env are further entries ("NAME=value") of the task's environment that must be there besides its
	// JOB_ITEM_TASK_ID, to tell its processes from those of another worker on this host that runs the same task now.
	env []string
}

// endStaleGroup is endStaleGroups for one task.
func endStaleGroup(p processIdentity, taskID string, killAfter time.Duration) error {
	return endStaleGroups([]staleTask{{process: p, taskID: taskID}}, killAfter)
}
