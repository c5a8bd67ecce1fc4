package main

// exec_env.go is the environment of commands: what all commands of a job have in common is put into the form that the
// kernel takes once, and each brings the few entries that are its own.

import (
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"sync"
)

// A baseEnv is an environment that is complete and does not change. A nil one is empty.
type baseEnv struct {
	entries    []string // "NAME=value", each name once
	searchPath string   // its PATH
	pointers   func() []*byte
}

// newBaseEnv gives the environment that commands in the folder dir are started with: of a repeated name the last, and
// what the system must have.
func newBaseEnv(env []string, dir string) (*baseEnv, error) {
	entries, err := completeEnv(env, dir)
	if err != nil {
		return nil, err
	}
	return &baseEnv{entries: entries, searchPath: searchPathOf(entries), pointers: sync.OnceValue(func() []*byte {
		text := []byte(strings.Join(entries, "\x00") + "\x00")
		pointers, at := make([]*byte, len(entries)), 0
		for i, entry := range entries {
			pointers[i] = &text[at]
			at += len(entry) + 1
		}
		return pointers
	})}, nil
}

// block is the entries as the kernel takes them.
func (e *baseEnv) block() []*byte {
	if e == nil {
		return nil
	}
	return e.pointers()
}

// list is the entries.
func (e *baseEnv) list() []string {
	if e == nil {
		return nil
	}
	return e.entries
}

// A commandEnv is a command's environment: its base and its own entries, which repeat no name.
type commandEnv struct {
	base *baseEnv
	own  []string
}

func (e commandEnv) list() []string { return append(slices.Clip(e.base.list()), e.own...) }

// completeEnv gives the environment that a command in the folder dir is started with: each name once, and no NUL.
func completeEnv(env []string, dir string) ([]string, error) {
	for _, entry := range env {
		if strings.IndexByte(entry, 0) >= 0 {
			name, _, _ := strings.Cut(entry, "=")
			return nil, execError("start command", fmt.Errorf("%q in its environment holds a NUL byte", name), "")
		}
	}
	// os/exec knows how to drop what a later entry overrides, by each system's rules, and what Windows must have.
	return (&exec.Cmd{Env: env, Dir: dir}).Environ(), nil
}
