//go:build unix

package main

import (
	"errors"
	"os"
	"syscall"
	"unsafe"
)

// isBrokenPipe reports whether a write failed because nobody reads any more.
func isBrokenPipe(err error) bool { return errors.Is(err, syscall.EPIPE) }

// passSignal hands a signal on to the command, which is in our own process group so that what ends a task's group ends
// the command too. A key pressed on the terminal has reached the whole group already, and twice is often "at once".
func passSignal(process *os.Process, sig os.Signal) {
	if sig == syscall.SIGINT && inForeground() {
		return
	}
	process.Signal(sig) // fails only when the process has ended
}

// inForeground reports whether our group is the one that the terminal's keys signal.
func inForeground() bool {
	terminal, err := os.OpenFile("/dev/tty", os.O_RDONLY|syscall.O_NOCTTY, 0)
	if err != nil {
		return false
	}
	defer terminal.Close()
	var group int32
	_, _, errno := syscall.Syscall(syscall.SYS_IOCTL, terminal.Fd(), syscall.TIOCGPGRP, uintptr(unsafe.Pointer(&group)))
	return errno == 0 && int(group) == syscall.Getpgrp()
}
