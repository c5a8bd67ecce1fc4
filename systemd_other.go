//go:build !linux

package main

// monotonicMicros is not needed: there is no systemd here.
func monotonicMicros() int64 { return 0 }
