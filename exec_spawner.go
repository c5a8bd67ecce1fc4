package main

// exec_spawner.go owns what the commands of one worker share: how their processes are started, the buffers that their
// output passes through, and what is found out once for all of them.

import (
	"errors"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// A spawner starts processes, each of which ends with the worker where the system can see to that. A nil spawner starts
// them too, and they may survive.
type spawner struct {
	pid     int
	unbind  func()
	buffers sync.Pool   // of *[]byte, outputChunkBytes long
	frames  sync.Pool   // of *vforkFrame
	noVfork atomic.Bool // the system has refused it

	openFiles atomic.Pointer[fileLimit] // that processes are started with; nil: not known yet
	boot      string                    // see bootID
	clock     bootClock

	// Linux kills a child when the thread that started it ends. The standard library starts processes from threads that
	// end only with the worker. There are some, since a thread stands still from the fork of a process to its exec.
	engage   sync.Once
	requests chan func()
	threads  sync.WaitGroup

	mu       sync.Mutex // guards what follows
	null     *os.File   // os.DevNull; nil: not needed yet
	programs map[programQuestion]programAnswer
}

// A fileLimit is the kernel's struct rlimit64, for open files.
type fileLimit struct{ soft, hard uint64 }

// A program that was found is taken for the right one for a while: looking it up asks the system for it in each folder of
// the PATH.
const programFreshness = time.Second

const maxPrograms = 1000 // that are remembered

type programQuestion struct{ name, dir, searchPath string }

type programAnswer struct {
	path  string
	until time.Time
}

// startSpawner prepares for commands.
func startSpawner() *spawner {
	return &spawner{
		pid: os.Getpid(), unbind: bindCommands(), requests: make(chan func()), boot: bootID(),
		programs: map[programQuestion]programAnswer{},
	}
}

// startThreads has processes started from threads.
func (s *spawner) startThreads() {
	for range max(2, runtime.NumCPU()) {
		s.threads.Add(1)
		go s.serve() // ends at close
	}
}

// serve never unlocks its thread, which therefore ends with it.
func (s *spawner) serve() {
	defer s.threads.Done()
	runtime.LockOSThread()
	for do := range s.requests {
		do()
	}
}

// close ends the threads. Where the system binds children to them, those still running are killed: no command may be
// running, and none may be started.
func (s *spawner) close() {
	close(s.requests)
	s.threads.Wait()
	s.unbind()
	if s.null != nil {
		s.null.Close()
	}
}

// devNull is os.DevNull, for each command that a nil spawner starts anew.
func (s *spawner) devNull() (null *os.File, err error) {
	if s == nil {
		return os.OpenFile(os.DevNull, os.O_RDWR, 0)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.null == nil {
		s.null, err = os.OpenFile(os.DevNull, os.O_RDWR, 0)
	}
	return s.null, err
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

// startProcess starts a process with these three files, and identifies it.
func (s *spawner) startProcess(path string, argv []string, dir string, env commandEnv, files [3]*os.File,
	sys *syscall.SysProcAttr) (l leader, id processIdentity, err error) {
	before := int64(-1)
	if s != nil {
		before = s.clock.now()
	}
	if l.pid, err = s.vforkProcess(path, argv, dir, env, files); !errors.Is(err, errors.ErrUnsupported) {
		return l, s.identify(l.pid, before), err
	}
	attr := &os.ProcAttr{Dir: dir, Env: env.list(), Files: files[:], Sys: sys}
	start := func() {
		if l.process, err = os.StartProcess(path, argv, attr); err == nil {
			l.pid = l.process.Pid
			id = s.identify(l.pid, before)
			if s != nil {
				s.learnLimit(l.pid)
			}
		}
	}
	if s == nil || !dieWithStarter(attr.Sys) || s.canVfork() {
		start()
		return l, id, err
	}
	s.engage.Do(s.startThreads)
	started := make(chan struct{})
	s.requests <- func() {
		before = s.clock.now()
		start()
		close(started)
	}
	<-started
	return l, id, err
}

// identify is identifyProcess for one that was started since before.
func (s *spawner) identify(pid int, before int64) processIdentity {
	switch {
	case pid == 0:
		return processIdentity{}
	case s == nil:
		return identifyProcess(pid)
	}
	return processIdentity{PID: pid, Start: s.clock.born(pid, before), Boot: s.boot}
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
