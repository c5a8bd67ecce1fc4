package main

import (
	"errors"
	"net"
	"os"
	"syscall"
)

// What the system says when a port is taken, and when nobody listens on it: the numbers of Windows Sockets. The names
// that package syscall has for these are its own inventions, which no call returns.
const (
	errAddressInUse      = syscall.Errno(10048) // WSAEADDRINUSE
	errConnectionRefused = syscall.Errno(10061) // WSAECONNREFUSED
)

// socketInherits is false: Windows has no descriptors to pass this way, so each worker opens the port itself.
const socketInherits = false

func duplicateSocket(*net.TCPListener) (*os.File, error) { return nil, errors.ErrUnsupported }

func inheritedSocket() (net.Listener, error) {
	return nil, errors.ErrUnsupported
}
