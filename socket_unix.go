//go:build unix

package main

import (
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
