package main

import (
	"errors"
	"net"
)

// socketInherits is false: Windows has no descriptors to pass this way, so each worker opens the port itself.
const socketInherits = false

func inheritedSocket() (net.Listener, error) {
	return nil, errors.ErrUnsupported
}
