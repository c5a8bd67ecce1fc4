package main

import (
	"errors"
	"os"
	"strings"
	"syscall"
)

// errForeignProgram is ERROR_BAD_EXE_FORMAT: a program for another kind of machine.
const errForeignProgram = syscall.Errno(193)

// beside keeps the ending that makes a file a program.
func beside(program, ending string) string {
	if name, ok := strings.CutSuffix(program, ".exe"); ok {
		return name + ending + ".exe"
	}
	return program + ending
}

// setAside renames the program, which may run meanwhile: it can be renamed then, but not replaced.
func setAside(program, aside string) error {
	if err := removeIfThere(aside); err != nil {
		// It still runs: the parent of two versions ago. It goes with the next start.
		if err := os.Rename(aside, beside(aside, ".older")); err != nil {
			return err
		}
	}
	return os.Rename(program, aside)
}

// putBack undoes setAside.
func putBack(aside, program string) error { return os.Rename(aside, program) }

// parentFollows is false: Windows cannot put another program into a running process. The parent follows when it is
// started the next time.
const parentFollows = false

func takeOver(string, *os.File, string) error { return errors.ErrUnsupported }

func takenOver() (*os.File, string) { return nil, "" }
