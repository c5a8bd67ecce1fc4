package main

// process_darwin.go asks the kernel by sysctl.

import (
	"fmt"
	"syscall"
	"unsafe"
)

// bootID is different after each boot.
func bootID() string {
	id, err := syscall.Sysctl("kern.bootsessionuuid")
	if err != nil {
		return ""
	}
	return id
}

// processStart is in microseconds of wall time; "" if there is no such process.
func processStart(pid int) string {
	// sysctl kern.proc.pid.PID fills a struct kinfo_proc, which begins with the process's start as a struct timeval.
	const ctlKern, kernProc, kernProcPID = 1, 14, 1
	name := [4]int32{ctlKern, kernProc, kernProcPID, int32(pid)}
	var info [1024]byte
	size := uintptr(len(info))
	_, _, errno := syscall.Syscall6(syscall.SYS___SYSCTL, uintptr(unsafe.Pointer(&name)), uintptr(len(name)),
		uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0, 0)
	if errno != 0 || size < 16 {
		return ""
	}
	start := (*syscall.Timeval)(unsafe.Pointer(&info))
	return fmt.Sprintf("%d.%06d", start.Sec, start.Usec)
}
