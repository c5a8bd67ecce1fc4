package main

// execs_windows.go: what an exec has started is in a job object, which dies with the process that holds it.

import "time"

func endStaleExecs([]ledgerEntry, time.Duration) error { return nil }
