//go:build unix

package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
)

// What the system says when a port is taken, and when nobody listens on it.
const (
	errAddressInUse      = syscall.EADDRINUSE
	errConnectionRefused = syscall.ECONNREFUSED
)

// socketInherits says that a child can be handed the open listening socket.
const socketInherits = true

// duplicateSocket gives the listener's socket a second descriptor. That of listener.File would put the socket into blocking
// mode each time a child is started with it, under the hands of the worker that listens.
func duplicateSocket(listener *net.TCPListener) (*os.File, error) {
	raw, err := listener.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fd int
	controlErr := raw.Control(func(original uintptr) {
		syscall.ForkLock.RLock()
		defer syscall.ForkLock.RUnlock()
		if fd, err = syscall.Dup(int(original)); err == nil {
			syscall.CloseOnExec(fd)
		}
	})
	if err = errors.Join(controlErr, err); err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "listening socket"), nil
}

// inheritedSocket is the socket that the parent passed as descriptor 3.
func inheritedSocket() (net.Listener, error) {
	f := os.NewFile(3, "listening socket")
	defer f.Close() // FileListener duplicates it
	listener, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("take over the listening socket: %w", err)
	}
	return listener, nil
}
