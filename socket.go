package main

// socket.go is the parent's care for the REST API's port: it is opened once for all workers to come, moved when the
// configuration names another, and left to the version that follows.

import (
	"errors"
	"fmt"
	"net"
	"time"
)

const (
	// bindPatience is how long a taken port is waited for: a worker whose parent died closes it at once, but not sooner.
	bindPatience = 3 * time.Second

	// bindAgain is how often a changed port is tried.
	bindAgain = 10 * time.Second
)

// openSocket opens the port once for all workers to come.
func (s *supervisor) openSocket(address string, patience time.Duration) error {
	if !socketInherits {
		return nil
	}
	listener, err := listen(address, patience)
	if err != nil {
		return err
	}
	defer listener.Close() // the duplicate stays open
	socket, err := duplicateSocket(listener)
	if err != nil {
		return fail(codeSocket, fmt.Sprintf("keep socket on %s", address), err)
	}
	s.closeSocket()
	s.socket = socket
	return nil
}

// takeOverSocket keeps the port open that the version before has left, if this process is one that has followed it.
func (s *supervisor) takeOverSocket() bool {
	socket, address := takenOver()
	if socket == nil {
		return false
	}
	s.source.followed = true
	if address != s.cfg.Listen {
		socket.Close()
		return false
	}
	s.socket = socket
	return true
}

func (s *supervisor) closeSocket() {
	if s.socket != nil {
		s.socket.Close()
	}
}

// listen opens the REST API's port. One that is taken is waited for.
func listen(address string, patience time.Duration) (*net.TCPListener, error) {
	deadline := time.Now().Add(patience)
	for {
		listener, err := net.Listen("tcp", address)
		if err == nil {
			return listener.(*net.TCPListener), nil
		}
		if !errors.Is(err, errAddressInUse) || time.Now().After(deadline) {
			return nil, failHint(codeListen, fmt.Sprintf("listen on %s", address), err,
				"Is another worker running? Choose another address with listen: in the configuration.")
		}
		time.Sleep(50 * time.Millisecond) // another process closes it; there is nothing to wait on
	}
}

// moveSocket opens another port, if it is another. It returns false when that cannot be done now.
func (s *supervisor) moveSocket(cfg *Config) bool {
	if cfg.Listen == s.cfg.Listen {
		return true
	}
	err := s.openSocket(cfg.Listen, 0)
	if err == nil {
		return true
	}
	s.log.Error("configuration not taken up, the one before stays", errAttrs(err), "pause", bindAgain.String())
	s.ownProblems["listen"] = codedText(err)
	s.refused, s.again = cfg, time.After(bindAgain)
	return false
}
