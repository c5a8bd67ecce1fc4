//go:build unix

package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// errForeignProgram is what the system says of a program for another kind of machine.
const errForeignProgram = syscall.ENOEXEC

func beside(program, ending string) string { return program + ending }

// setAside gives the program a second name. The first one stays.
func setAside(program, aside string) error {
	if err := removeIfThere(aside); err != nil {
		return err
	}
	if err := os.Link(program, aside); err == nil {
		return nil
	}
	return copyProgram(program, aside)
}

// putBack has nothing to do: the program has kept its name.
func putBack(string, string) error { return nil }

// handoverVariable tells the program that takes this process over which descriptor is the listening socket, and what was
// configured when it was opened: "PID DESCRIPTOR ADDRESS".
const handoverVariable = "JOB_ITEM_HANDOVER"

// parentFollows says that the parent can become the new version without being started again.
const parentFollows = true

// takeOver turns this process into the program's file as it is now, with the listening socket. It returns only with an
// error.
func takeOver(program string, socket *os.File, address string) error {
	fd, err := syscall.Dup(int(socket.Fd())) // a duplicate survives: it is not closed on exec
	if err != nil {
		return fmt.Errorf("keep the listening socket: %w", err)
	}
	env := append(os.Environ(), fmt.Sprintf("%s=%d %d %s", handoverVariable, os.Getpid(), fd, address))
	err = syscall.Exec(program, os.Args, env)
	return errors.Join(fmt.Errorf("run %s: %w", program, err), syscall.Close(fd))
}

// takenOver gives the socket that the version before has left in this process, and the address it was opened for; nil if
// there was none.
func takenOver() (socket *os.File, address string) {
	text, there := os.LookupEnv(handoverVariable)
	if !there {
		return nil, ""
	}
	os.Unsetenv(handoverVariable)
	words := strings.SplitN(text, " ", 3)
	if len(words) != 3 || words[0] != strconv.Itoa(os.Getpid()) {
		return nil, ""
	}
	fd, err := strconv.Atoi(words[1])
	if err != nil || fd < 3 {
		return nil, ""
	}
	syscall.CloseOnExec(fd)
	socket = os.NewFile(uintptr(fd), "listening socket")
	listener, err := net.FileListener(socket)
	if err != nil {
		socket.Close()
		return nil, ""
	}
	listener.Close() // only its duplicate
	return socket, words[2]
}
