//go:build !linux || !(amd64 || arm64)

package main

import (
	"errors"
	"os"
)

// A vforkFrame is Linux's.
type vforkFrame struct{}

// vforkProcess: errors.ErrUnsupported, processes are started by the standard library.
func (*spawner) vforkProcess(string, []string, string, commandEnv, [3]*os.File) (pid int, err error) {
	return 0, errors.ErrUnsupported
}

func (*spawner) canVfork() bool { return false }

func (*spawner) learnLimit(int) {}
