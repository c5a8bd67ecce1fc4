package main

import (
	"os"
	"syscall"
)

// A dataSyncedFile's syncs leave out what only says when the file was written.
type dataSyncedFile struct{ *os.File }

func (f dataSyncedFile) Sync() error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	failed := conn.Control(func(fd uintptr) {
		for {
			if err = syscall.Fdatasync(int(fd)); err != syscall.EINTR {
				return
			}
		}
	})
	if failed != nil {
		return failed
	}
	return os.NewSyscallError("fdatasync", err)
}
