//go:build unix

package main

// metrics_unix.go asks the system what this process uses.

import (
	"bytes"
	"os"
	"runtime"
	"strconv"
	"syscall"
	"time"
)

// cpuTime is the processor time that this process has used, without the commands that it has started.
func cpuTime() time.Duration {
	var spent syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &spent) != nil {
		return 0
	}
	return time.Duration(spent.Utime.Nano() + spent.Stime.Nano())
}

func ownUse() (use processUse) {
	use.cpu = cpuTime()
	// Only Linux has it. See proc(5).
	if statm, err := os.ReadFile("/proc/self/statm"); err == nil {
		if pages := bytes.Fields(statm); len(pages) > 1 {
			page := uint64(os.Getpagesize())
			size, _ := strconv.ParseUint(string(pages[0]), 10, 64)
			resident, _ := strconv.ParseUint(string(pages[1]), 10, 64)
			use.virtual, use.resident = size*page, resident*page
		}
	}
	if runtime.GOOS == "linux" || runtime.GOOS == "darwin" { // elsewhere the folder may show the first three only
		if dir, err := os.Open("/dev/fd"); err == nil {
			names, _ := dir.Readdirnames(-1)
			dir.Close()
			use.openFiles = uint64(max(0, len(names)-1)) // without the folder itself
		}
	}
	var limit syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit) == nil {
		use.maxOpen = uint64(limit.Cur)
	}
	return use
}
