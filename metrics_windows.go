package main

// metrics_windows.go asks the system what this process uses.

import (
	"syscall"
	"time"
	"unsafe"
)

// Entry points of system libraries, found when first called and never changed.
var (
	getProcessMemoryInfo  = kernel32.NewProc("K32GetProcessMemoryInfo")
	getProcessHandleCount = kernel32.NewProc("GetProcessHandleCount")
)

// A memoryCounters is PROCESS_MEMORY_COUNTERS_EX.
type memoryCounters struct {
	size                                 uint32
	pageFaults                           uint32
	peakWorkingSet, workingSet           uintptr
	peakPagedPool, pagedPool             uintptr
	peakNonPagedPool, nonPagedPool       uintptr
	pagefile, peakPagefile, privateUsage uintptr
}

// cpuTime is the processor time that this process has used.
func cpuTime() time.Duration {
	self, err := syscall.GetCurrentProcess()
	if err != nil {
		return 0
	}
	var created, exited, kernel, user syscall.Filetime
	if syscall.GetProcessTimes(self, &created, &exited, &kernel, &user) != nil {
		return 0
	}
	return spent(kernel) + spent(user)
}

func ownUse() (use processUse) {
	self, err := syscall.GetCurrentProcess()
	if err != nil {
		return use
	}
	use.cpu = cpuTime()
	memory := memoryCounters{size: uint32(unsafe.Sizeof(memoryCounters{}))}
	if getProcessMemoryInfo.Find() == nil {
		if ok, _, _ := getProcessMemoryInfo.Call(uintptr(self), uintptr(unsafe.Pointer(&memory)), uintptr(memory.size)); ok != 0 {
			use.resident, use.virtual = uint64(memory.workingSet), uint64(memory.privateUsage)
		}
	}
	var handles uint32
	if ok, _, _ := getProcessHandleCount.Call(uintptr(self), uintptr(unsafe.Pointer(&handles))); ok != 0 {
		use.openFiles = uint64(handles)
	}
	return use
}

// spent is a Filetime that counts from zero: in units of 100 ns.
func spent(t syscall.Filetime) time.Duration {
	return time.Duration(int64(t.HighDateTime)<<32|int64(t.LowDateTime)) * 100
}
