package main

// exec_linux.go is what only Linux offers for running commands.

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"
)

// dieWithStarter has the process killed when the thread that starts it ends, and reports whether the system can.
func dieWithStarter(attr *syscall.SysProcAttr) bool {
	attr.Pdeathsig = syscall.SIGKILL
	return true
}

// hasEnded reports whether a child has ended, and leaves it to be waited for.
func hasEnded(pid int) bool { return waitID(pid, syscall.WNOHANG) }

// yieldProcessor lets another process go on that waits for this processor, such as one that is just ending.
func yieldProcessor() { syscall.RawSyscall(syscall.SYS_SCHED_YIELD, 0, 0, 0) }

// hearOfNoChildren has the kernel keep it to itself when a child of this process ends or stops: nobody here listens, and
// Go's own handler, which is there for every signal, would take a thread out of its sleep each time.
func hearOfNoChildren() {
	var standard [4]uintptr // the kernel's struct sigaction: handler SIG_DFL, and neither flags nor restorer nor mask
	syscall.RawSyscall6(syscall.SYS_RT_SIGACTION, uintptr(syscall.SIGCHLD), uintptr(unsafe.Pointer(&standard)), 0, 8, 0, 0)
}

// awaitExit returns true when a child has ended and leaves it to be waited for: until then its number stays its own.
func awaitExit(pid int) bool { return waitID(pid, 0) }

// waitID is waitid(2) for the end of a child, which is left as it is. It reports whether the child has ended.
func waitID(pid int, options uintptr) bool {
	const (
		idIsPID = 1 // P_PID
		exited  = syscall.WEXITED
		noWait  = syscall.WNOWAIT
	)
	for {
		var info childInfo
		_, _, errno := syscall.Syscall6(syscall.SYS_WAITID,
			idIsPID, uintptr(pid), uintptr(unsafe.Pointer(&info)), exited|noWait|options, 0, 0)
		if errno != syscall.EINTR {
			return errno == 0 && info.pid != 0
		}
	}
}

// A bootClock tells when a process was born without asking /proc: in the ticks since boot that /proc has, from before and
// after its start.
type bootClock struct {
	trusted atomic.Bool // it has agreed with /proc once
	failed  atomic.Bool // it has not
}

const bootTick = 10 * time.Millisecond // 1/USER_HZ

// now is in ticks since boot.
func (*bootClock) now() int64 {
	const sinceBoot = 7 // CLOCK_BOOTTIME
	var at syscall.Timespec
	_, _, errno := syscall.RawSyscall(syscall.SYS_CLOCK_GETTIME, sinceBoot, uintptr(unsafe.Pointer(&at)), 0)
	if errno != 0 {
		return -1
	}
	return at.Nano() / int64(bootTick)
}

// born is the birth of a process that was started since before.
func (b *bootClock) born(pid int, before int64) string {
	after := b.now()
	if before < 0 || before != after || b.failed.Load() {
		return processStart(pid)
	}
	tick := strconv.FormatInt(before, 10)
	if b.trusted.Load() {
		return tick
	}
	start := processStart(pid)
	if start == tick {
		b.trusted.Store(true)
	} else {
		b.failed.Store(true)
	}
	return start
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
