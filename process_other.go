//go:build unix && !linux

package main

// process_other.go finds a dead worker's processes where environments of others cannot be read: by the leader only.
// A group whose leader has ended cannot be told from a later one with its number, and is left alone.

import "syscall"

// staleProcesses finds the recorded leaders that are there still.
func staleProcesses(tasks []staleTask, boot string) []staleProcess {
	var remaining []staleProcess
	for _, t := range tasks {
		if t.recordedLeader(boot) && processStart(t.process.PID) == t.process.Start && syscall.Kill(-t.process.PID, 0) == nil {
			remaining = append(remaining, staleProcess{t.process, true})
		}
	}
	return remaining
}
