//go:build unix

package main

// execs_unix.go ends what the execs of a killed process have left running.

import "time"

// endStaleExecs ends the groups of these execs and returns when none is left: SIGTERM first, SIGKILL after killAfter. A
// group whose leader is gone is ended only where the system tells that it is still the same.
func endStaleExecs(left []ledgerEntry, killAfter time.Duration) error {
	boot := bootID()
	var groups []staleProcess
	for _, entry := range left {
		p := entry.Process
		if p.PID <= 1 || p.Start == "" || boot == "" || p.Boot != boot {
			continue
		}
		start := processStart(p.PID)
		if start == p.Start || start == "" && len(entry.Marks) > 0 && groupCarries(p.PID, entry.Marks) {
			groups = append(groups, staleProcess{p, true})
		}
	}
	none := func() []staleProcess { return nil }
	return endStaleProcesses(groups, none, killAfter)
}
