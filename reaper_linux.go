package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
	"unsafe"
)

// becomeSubreaper makes this process the parent of all orphans that descend from it. It stays so across execve.
func becomeSubreaper() error {
	const setChildSubreaper = 36 // PR_SET_CHILD_SUBREAPER, see prctl(2)
	_, _, errno := syscall.Syscall6(syscall.SYS_PRCTL, setChildSubreaper, 1, 0, 0, 0, 0)
	if errno != 0 {
		return fail(codeSubreaper, "become the parent of orphaned processes", errno)
	}
	return nil
}

// run waits for orphans until ctx ends.
func (r *reaper) run(ctx context.Context) {
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGCHLD)
	defer signal.Stop(ended)
	for {
		for r.reapOrphan() {
		}
		select {
		case <-ctx.Done():
			return
		case <-ended:
		case <-r.waited: // what was behind that child can be seen now
		}
	}
}

// reapOrphan waits for one orphan that has ended. It reports false when there is none, or none to be seen: the system
// shows the ended children one after another, and the first is the parent's own, which is waited for elsewhere.
func (r *reaper) reapOrphan() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	orphan, ok := endedChild()
	if !ok || r.isOwn(orphan.pid) {
		return false
	}
	pid := int(orphan.pid)
	if orphan.killed() {
		r.log.Debug("an orphan was killed, so its process group is ended", "pid", pid)
		// Until the leader is waited for, its number can be no other group's.
		syscall.Kill(-pid, syscall.SIGKILL)
	}
	_, err := syscall.Wait4(pid, nil, syscall.WNOHANG, nil)
	return err == nil
}

func (r *reaper) isOwn(pid int32) bool {
	for cmd := range r.own {
		if cmd.Process.Pid == int(pid) {
			return true
		}
	}
	return false
}

// A childInfo is the kernel's siginfo_t for SIGCHLD. What follows the code is aligned like a pointer.
type childInfo struct {
	signo, errno, code int32
	_                  [0]uintptr
	pid                int32
	uid                uint32
	status             int32
	_                  [104]byte
}

// killed reports an end by SIGKILL.
func (c *childInfo) killed() bool {
	const exited = 1 // CLD_EXITED: status is an exit code
	return c.code != exited && c.status == int32(syscall.SIGKILL)
}

// endedChild looks at a child that has ended, and leaves it to be waited for.
func endedChild() (info childInfo, ok bool) {
	const (
		anyChild = 0          // P_ALL
		noHang   = 0x00000001 // WNOHANG
		exited   = 0x00000004 // WEXITED
		noWait   = 0x01000000 // WNOWAIT
	)
	_, _, errno := syscall.Syscall6(syscall.SYS_WAITID,
		anyChild, 0, uintptr(unsafe.Pointer(&info)), exited|noHang|noWait, 0, 0)
	return info, errno == 0 && info.pid > 1
}
