//go:build unix && !linux

package main

// exec_other.go says what Unix systems besides Linux cannot do for commands.

import (
	"os"
	"syscall"
)

// dieWithStarter: a command outlives a worker that is killed, and is found by its journal entry.
func dieWithStarter(*syscall.SysProcAttr) bool { return false }

// hasEnded: false, the process has to be waited for to know.
func hasEnded(int) bool { return false }

// awaitExit: false, the process has to be waited for without notice.
func awaitExit(int) bool { return false }

func yieldProcessor() {}

func hearOfNoChildren() {}

func groupMembers(int) (members []string, known bool) { return nil, false }

// groupCarries: other systems do not show a process's environment.
func groupCarries(int, []string) bool { return false }

func commandPipe() (read, write *os.File, err error) { return os.Pipe() }

// A bootClock is Linux's.
type bootClock struct{}

func (*bootClock) now() int64 { return 0 }

func (*bootClock) born(pid int, _ int64) string { return processStart(pid) }
