package main

// exec_spawner.go owns what the commands of one worker share: the thread that starts their processes and the buffers
// that their output passes through.

import (
	"os"
	"runtime"
	"sync"
)

// A spawner starts processes from one thread that ends only with the worker. Linux can kill a child when the thread
// that started it ends; Go's threads come and go, this one stays. A nil spawner starts processes on the spot.
type spawner struct {
	requests chan func()
	stopped  chan struct{}
	unbind   func()
	buffers  sync.Pool // of *[]byte, outputChunkBytes long
}

// startSpawner starts the thread.
func startSpawner() *spawner {
	s := &spawner{requests: make(chan func()), stopped: make(chan struct{}), unbind: bindCommands()}
	go s.serve() // ends at close
	return s
}

// serve never unlocks its thread, which therefore ends with it.
func (s *spawner) serve() {
	defer close(s.stopped)
	runtime.LockOSThread()
	for do := range s.requests {
		do()
	}
}

// close ends the thread. Where the system binds children to it, those still running are killed: no command may be
// running, and none may be started.
func (s *spawner) close() {
	close(s.requests)
	<-s.stopped
	s.unbind()
}

// startProcess is os.StartProcess on the spawner's thread.
func (s *spawner) startProcess(path string, argv []string, attr *os.ProcAttr) (process *os.Process, err error) {
	if s == nil || !dieWithStarter(attr.Sys) {
		return os.StartProcess(path, argv, attr)
	}
	started := make(chan struct{})
	s.requests <- func() {
		process, err = os.StartProcess(path, argv, attr)
		close(started)
	}
	<-started
	return process, err
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
