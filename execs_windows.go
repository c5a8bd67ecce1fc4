package main

// execs_windows.go: what an exec has started is in a job object, which the system ends with the process that holds it.

import "time"

// endStaleExecs ends the leaders that are there still and returns when they are gone.
func endStaleExecs(left []ledgerEntry, _ time.Duration) error {
	var leaders []processIdentity
	for _, entry := range left {
		leaders = append(leaders, entry.Process)
	}
	return endStaleLeaders(leaders)
}
