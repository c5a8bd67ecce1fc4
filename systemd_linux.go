package main

import (
	"syscall"
	"unsafe"
)

// monotonicMicros is CLOCK_MONOTONIC, which systemd compares with its own; 0 if it cannot be read.
func monotonicMicros() int64 {
	const clockMonotonic = 1
	var now syscall.Timespec
	_, _, errno := syscall.Syscall(syscall.SYS_CLOCK_GETTIME, clockMonotonic, uintptr(unsafe.Pointer(&now)), 0)
	if errno != 0 {
		return 0
	}
	return now.Nano() / 1000
}
