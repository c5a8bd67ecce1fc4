package main

// exec_spawner.go owns what the commands of one worker share: the threads that start their processes, the buffers that
// their output passes through, and what is found out once for all of them.

import (
	"os"
	"runtime"
	"sync"
	"time"
)

// A spawner starts processes from threads that end only with the worker. Linux can kill a child when the thread that
// started it ends; Go's threads come and go, these stay. There are some, since a thread stands still from the fork of a
// process to its exec. A nil spawner starts processes on the spot.
type spawner struct {
	requests chan func()
	threads  sync.WaitGroup
	unbind   func()
	buffers  sync.Pool // of *[]byte, outputChunkBytes long
	boot     string    // see bootID
	clock    bootClock

	mu       sync.Mutex // guards programs
	programs map[programQuestion]programAnswer
}

// A program that was found is taken for the right one for a while: looking it up asks the system for it in each folder of
// the PATH.
const programFreshness = time.Second

const maxPrograms = 1000 // that are remembered

type programQuestion struct{ name, dir, searchPath string }

type programAnswer struct {
	path  string
	until time.Time
}

// startSpawner starts the threads.
func startSpawner() *spawner {
	s := &spawner{
		requests: make(chan func()), unbind: bindCommands(), boot: bootID(), programs: map[programQuestion]programAnswer{},
	}
	for range max(2, runtime.NumCPU()) {
		s.threads.Add(1)
		go s.serve() // ends at close
	}
	return s
}

// serve never unlocks its thread, which therefore ends with it.
func (s *spawner) serve() {
	defer s.threads.Done()
	runtime.LockOSThread()
	for do := range s.requests {
		do()
	}
}

// close ends the threads. Where the system binds children to it, those still running are killed: no command may be
// running, and none may be started.
func (s *spawner) close() {
	close(s.requests)
	s.threads.Wait()
	s.unbind()
}

// lookProgram is lookProgram, with a short memory.
func (s *spawner) lookProgram(name, dir string, env []string) (string, error) {
	if s == nil {
		return lookProgram(name, dir, env)
	}
	question, now := programQuestion{name, dir, searchPathOf(env)}, time.Now()
	s.mu.Lock()
	known, ok := s.programs[question]
	s.mu.Unlock()
	if ok && now.Before(known.until) {
		return known.path, nil
	}
	path, err := lookProgram(name, dir, env)
	if err == nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		if len(s.programs) >= maxPrograms {
			clear(s.programs)
		}
		s.programs[question] = programAnswer{path, now.Add(programFreshness)}
	}
	return path, err
}

// startProcess is os.StartProcess and identifyProcess on one of the spawner's threads.
func (s *spawner) startProcess(path string, argv []string, attr *os.ProcAttr) (process *os.Process, id processIdentity, err error) {
	if s == nil {
		if process, err = os.StartProcess(path, argv, attr); err == nil {
			id = identifyProcess(process.Pid)
		}
		return process, id, err
	}
	if !dieWithStarter(attr.Sys) {
		return s.startHere(path, argv, attr)
	}
	started := make(chan struct{})
	s.requests <- func() {
		process, id, err = s.startHere(path, argv, attr)
		close(started)
	}
	<-started
	return process, id, err
}

func (s *spawner) startHere(path string, argv []string, attr *os.ProcAttr) (*os.Process, processIdentity, error) {
	before := s.clock.now()
	process, err := os.StartProcess(path, argv, attr)
	if err != nil {
		return nil, processIdentity{}, err
	}
	return process, processIdentity{PID: process.Pid, Start: s.clock.born(process.Pid, before), Boot: s.boot}, nil
}

// buffer takes a buffer of outputChunkBytes for one stream.
func (s *spawner) buffer() *[]byte {
	if s != nil {
		if buf, ok := s.buffers.Get().(*[]byte); ok {
			return buf
		}
	}
	buf := make([]byte, outputChunkBytes)
	return &buf
}

func (s *spawner) putBuffer(buf *[]byte) {
	if s != nil {
		s.buffers.Put(buf)
	}
}
