package main

// exec_linux.go is what only Linux offers for running commands.

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"syscall"
	"unsafe"
)

// dieWithStarter has the process killed when the thread that starts it ends, and reports whether the system can.
func dieWithStarter(attr *syscall.SysProcAttr) bool {
	attr.Pdeathsig = syscall.SIGKILL
	return true
}

// awaitExit returns true when a child has ended and leaves it to be waited for: until then its number stays its own.
func awaitExit(pid int) bool {
	const (
		idIsPID = 1          // P_PID
		exited  = 0x00000004 // WEXITED
		noWait  = 0x01000000 // WNOWAIT
	)
	var info [128]byte // siginfo_t
	for {
		_, _, errno := syscall.Syscall6(syscall.SYS_WAITID,
			idIsPID, uintptr(pid), uintptr(unsafe.Pointer(&info)), exited|noWait, 0, 0)
		if errno != syscall.EINTR {
			return errno == 0
		}
	}
}

// groupMembers describes the processes of a group that are alive. known is false where /proc cannot be read.
func groupMembers(pgid int) (members []string, known bool) {
	known = eachProcess(func(p procStat) {
		if p.pgrp == pgid && !p.dead() {
			members = append(members, fmt.Sprintf("%d (%q, state %c)", p.pid, p.name, p.state))
		}
	})
	return members, known
}

// groupCarries reports whether a process of the group is alive that was started with all of these entries in its
// environment.
func groupCarries(pgid int, entries []string) bool {
	found := false
	eachProcess(func(p procStat) {
		if found || p.pgrp != pgid || p.dead() {
			return
		}
		file, err := os.Open("/proc/" + strconv.Itoa(p.pid) + "/environ")
		if err != nil {
			return
		}
		defer file.Close()
		environ, err := io.ReadAll(io.LimitReader(file, maxEnvironBytes))
		found = err == nil && holdsEntries(environ, entries)
	})
	return found
}

// commandPipe is os.Pipe without the writing end in the care of Go's poller, which the child alone uses: in blocking mode.
func commandPipe() (read, write *os.File, err error) {
	var ends [2]int
	if err := syscall.Pipe2(ends[:], syscall.O_CLOEXEC); err != nil {
		return nil, nil, os.NewSyscallError("pipe2", err)
	}
	write = os.NewFile(uintptr(ends[1]), "output")
	if err := syscall.SetNonblock(ends[0], true); err != nil {
		write.Close()
		syscall.Close(ends[0])
		return nil, nil, os.NewSyscallError("fcntl", err)
	}
	return os.NewFile(uintptr(ends[0]), "output"), write, nil
}
