//go:build amd64 || arm64

package main

// exec_vfork_linux.go starts processes with clone3(2) itself. os.StartProcess lets one process be started at a time, has
// each child reset some sixty signal handlers, and hears by a pipe how it went; here the kernel resets the handlers,
// any thread may start a process while others do, and the child leaves an error in our memory, which it shares until
// it becomes the program. That memory is shared is also why the child runs no Go: vfork's assembler makes a list of
// system calls, of which the last is execve.

import (
	"errors"
	"os"
	"runtime"
	"strings"
	"syscall"
	"unsafe"
)

// cloneArguments is the kernel's struct clone_args in its first version. Without a stack of its own the child has ours.
type cloneArguments struct {
	flags      uint64
	_          [3]uint64 // pidfd, child_tid, parent_tid
	exitSignal uint64
	_          [3]uint64 // stack, stack_size, tls
}

// A vforkStep is a system call of the child. It must not fail, and return want if that is not 0.
type vforkStep struct{ number, a, b, c, want uintptr }

// vfork is clone3; the child then makes the steps. It returns when the child has become another program or has ended,
// with a negative error number if there was no child; failed holds what the kernel answered to a step that went wrong.
//
//go:noescape
func vfork(how *cloneArguments, size uintptr, steps *vforkStep, failed *uintptr) (pid uintptr)

// A vforkFrame is all that the kernel reads and writes while a process is started. It is on the heap, where nothing moves.
type vforkFrame struct {
	how     cloneArguments
	steps   [9]vforkStep
	failed  uintptr
	text    []byte  // path, folder, arguments and what the environment has besides its base
	vectors []*byte // the arguments, nil, the environment, nil
}

// canVfork reports whether processes may be started by vforkProcess, now or once the limit on their open files is known.
func (s *spawner) canVfork() bool { return !s.noVfork.Load() }

// learnLimit has later processes begin with the limit on open files that the standard library has given this one: the
// one that this process was started with, and has raised for itself.
func (s *spawner) learnLimit(pid int) {
	var limit fileLimit
	_, _, errno := syscall.RawSyscall6(syscall.SYS_PRLIMIT64, uintptr(pid), syscall.RLIMIT_NOFILE, 0, uintptr(unsafe.Pointer(&limit)), 0, 0)
	if errno == 0 { // else the next one may tell: this one has another user by now
		s.openFiles.CompareAndSwap(nil, &limit)
	}
}

const maxPooledText = 64 << 10 // a frame that has grown further is not kept

// vforkProcess starts a process in a group of its own that is killed when the thread that starts it ends; Go ends one
// only with a goroutine that is locked to it, and none of ours is when it ends. errors.ErrUnsupported: not here.
func (s *spawner) vforkProcess(path string, argv []string, dir string, env commandEnv, files [3]*os.File) (pid int, err error) {
	if s == nil || !s.canVfork() {
		return 0, errors.ErrUnsupported
	}
	limit := s.openFiles.Load()
	if limit == nil {
		return 0, errors.ErrUnsupported // this once
	}
	for _, file := range files {
		if file.Fd() < uintptr(len(files)) {
			return 0, errors.ErrUnsupported // it could not just be put into another's place
		}
	}
	f, ok := s.frames.Get().(*vforkFrame)
	if !ok {
		f = new(vforkFrame)
	}
	pathAt, dirAt, argvAt, envAt, err := f.take(path, dir, argv, env)
	if err != nil {
		return 0, err
	}
	const clearHandlers = 0x1_0000_0000 // CLONE_CLEAR_SIGHAND
	f.how = cloneArguments{flags: syscall.CLONE_VM | syscall.CLONE_VFORK | clearHandlers, exitSignal: uint64(syscall.SIGCHLD)}
	f.failed = 0
	steps := append(f.steps[:0],
		vforkStep{number: syscall.SYS_SETPGID},
		vforkStep{number: syscall.SYS_PRCTL, a: syscall.PR_SET_PDEATHSIG, b: uintptr(syscall.SIGKILL)},
		// This process may have ended before the child could ask for that.
		vforkStep{number: syscall.SYS_GETPPID, want: uintptr(s.pid)},
		vforkStep{number: syscall.SYS_PRLIMIT64, b: syscall.RLIMIT_NOFILE, c: address(limit)},
	)
	if dir != "" {
		steps = append(steps, vforkStep{number: syscall.SYS_CHDIR, a: address(dirAt)})
	}
	for i, file := range files {
		steps = append(steps, vforkStep{number: syscall.SYS_DUP3, a: file.Fd(), b: uintptr(i)})
	}
	steps = append(steps, vforkStep{number: syscall.SYS_EXECVE, a: address(pathAt), b: address(argvAt), c: address(envAt)})

	result := vfork(&f.how, unsafe.Sizeof(f.how), &steps[0], &f.failed)
	runtime.KeepAlive(files)
	runtime.KeepAlive(limit)
	failed := f.failed
	if len(f.text) <= maxPooledText {
		s.frames.Put(f)
	}
	if no := errorNumber(result); no != 0 {
		if no == syscall.ENOSYS || no == syscall.EINVAL || no == syscall.EPERM { // an old kernel, or a container's filter
			s.noVfork.Store(true)
			return 0, errors.ErrUnsupported
		}
		return 0, no
	}
	if failed != 0 {
		syscall.Wait4(int(result), nil, 0, nil)
		if no := errorNumber(failed); no != 0 {
			return 0, no
		}
		return 0, syscall.ESRCH // of getppid: nobody is left to hear it
	}
	return int(result), nil
}

// take fills the frame with text as the kernel wants it.
func (f *vforkFrame) take(path, dir string, argv []string, env commandEnv) (pathAt, dirAt *byte, argvAt, envAt **byte, err error) {
	size := len(path) + len(dir) + 2
	for _, list := range [][]string{argv, env.own} {
		for _, text := range list {
			size += len(text) + 1
		}
	}
	if cap(f.text) < size { // before anything points into it
		f.text = make([]byte, 0, size)
	}
	f.text = f.text[:0]
	add := func(text string) *byte {
		if strings.IndexByte(text, 0) >= 0 {
			err = syscall.EINVAL
		}
		at := len(f.text)
		f.text = append(append(f.text, text...), 0)
		return &f.text[at]
	}
	pathAt, dirAt = add(path), add(dir)
	f.vectors = f.vectors[:0]
	for _, text := range argv {
		f.vectors = append(f.vectors, add(text))
	}
	f.vectors = append(f.vectors, nil)
	environ := len(f.vectors)
	f.vectors = append(f.vectors, env.base.block()...)
	for _, text := range env.own {
		f.vectors = append(f.vectors, add(text))
	}
	f.vectors = append(f.vectors, nil)
	return pathAt, dirAt, &f.vectors[0], &f.vectors[environ], err
}

func address[T any](p *T) uintptr { return uintptr(unsafe.Pointer(p)) }

// errorNumber is what the kernel means by a result, 0 if it is no error.
func errorNumber(result uintptr) syscall.Errno {
	if n := -int(result); n > 0 && n < 4096 {
		return syscall.Errno(n)
	}
	return 0
}
