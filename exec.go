package main

// exec.go runs one command: its process group, its environment, its output and its end. When run returns, nothing that
// the command started in its group is left alive and everything it wrote has been handed over. What a command means to
// a task is the worker's affair; how its pipes are read is in exec_output.go, and what the systems do differently in
// exec_unix.go, exec_linux.go, exec_other.go and exec_windows.go.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"
)

// unkillableWait is how long a process may take to vanish after SIGKILL. One that the kernel will not let go of, as it
// waits for a dead disk or network share, is left behind with a note.
const unkillableWait = 10 * time.Second

// A command is one program or shell line to run. Its exported face is run; the zero value of a field means what is said
// beside it.
type command struct {
	argv      []string        // run directly; nil: line is run by the host's shell
	line      string          // for the shell
	dir       string          // working folder; "": the worker's own
	env       []string        // "NAME=value", of a repeated name the last; nil: the worker's own
	base      *baseEnv        // what env is added to, without repeating a name; nil: env is all there is
	killAfter time.Duration   // from SIGTERM to SIGKILL
	hurry     <-chan struct{} // closed: SIGKILL follows SIGTERM at once; nil: never

	// started is called once the process runs and before any output is handed over. An error kills the command and is
	// what run returns.
	started func(processIdentity) error

	// output takes what the command writes, at most outputChunkBytes at a time, whole UTF-8 characters wherever the
	// stream is UTF-8. It is called from one goroutine per stream and must not keep data. It may block, which slows the
	// command and not its end: stopping goes on beside it, but run returns only after it. nil: output is discarded.
	output func(stream outputStream, data []byte)

	// stdin is the command's standard input; nil: empty. An *os.File is handed over as it is; any other reader is
	// copied, and run returns only when a Read that is under way has returned.
	stdin io.Reader

	// spawn starts the process from a thread that lives as long as the worker, so that a process dies with its worker
	// where the system can do that. nil: it is started right here and may survive.
	spawn *spawner
}

// An exitStatus says how a command ended.
type exitStatus struct {
	code   int    // -1 if it did not exit by itself
	signal string // what killed it: "SIGKILL"
	pid    int
	cpu    time.Duration // user and system, of the process and of those it waited for

	// maxRSS is the largest resident set of one process, in bytes; 0 where the system does not tell. Linux counts the
	// moment between fork and exec too, so it is never below what the worker itself held then.
	maxRSS int64

	stopped  bool          // ctx ended it
	stopTook time.Duration // from ctx's end to when nothing of its group was left
	left     string        // what could not be ended, for the log; "" in every sane case
}

// run starts the command and returns when it has ended, its group is empty and its output handed over. When ctx ends,
// the group gets SIGTERM, and SIGKILL killAfter later. An error means that the command could not start (codeExec) or
// that started refused; a ctx that has already ended is no error but a stopped command without a pid.
func (c *command) run(ctx context.Context) (exitStatus, error) {
	r, err := c.start(ctx)
	if ctx.Err() != nil && r == nil {
		return exitStatus{code: -1, stopped: true}, nil
	}
	if err != nil {
		return exitStatus{code: -1}, err
	}

	var refused error
	if c.started != nil {
		// Before anybody waits for the process: its pid cannot be another's yet, even if it has ended already.
		if err := c.started(r.identity); err != nil {
			refused = fmt.Errorf("start command: %w", err)
			r.signal(processGroup.kill)
		}
	}
	over := r.endsSoon(c)
	if !over {
		for _, reader := range r.readers {
			go reader.copy(c.spawn, c.output) // ends at the end of its pipe, or some time after finish
		}
		go r.wait() // ends when the process has
	}

	stopped, killAt := r.await(ctx, c.killAfter, c.hurry)
	left := r.endGroup(c.killAfter, killAt, c.hurry)
	for _, reader := range r.readers {
		if over {
			reader.handOver(c.spawn, c.output)
		} else {
			reader.finish()
		}
	}
	for _, reader := range r.readers {
		<-reader.done
	}
	if r.stdinCopied != nil {
		r.stdinPipe.Close()
		<-r.stdinCopied
	}
	r.group.close()

	status := exitStatus{code: -1}
	if r.exitedWithin(0) { // else not even SIGKILL ended it
		status = r.end
	}
	status.pid, status.stopped, status.left = r.leader.pid, stopped, left
	if stopped {
		status.stopTook = time.Since(killAt.Add(-c.killAfter))
	}
	return status, refused
}

// A runningCommand is a command between its start and its end.
type runningCommand struct {
	leader      leader
	identity    processIdentity
	group       processGroup
	readers     []*outputReader
	stdinPipe   *os.File      // our end of it, when stdin is copied
	stdinCopied chan struct{} // closed when nothing is copied any more

	exited chan struct{} // closed when the process has been waited for
	mu     sync.Mutex    // guards reaped and end, and the group's number while it is used
	reaped bool
	end    exitStatus // how the process ended, without what belongs to the command as a whole
}

// A leader is the process that a command begins with, and that its group is named by.
type leader struct {
	pid     int
	process *os.Process // nil: it is known by its number alone, which is no other's until wait has returned
}

// start finds the program and starts it, patiently when the system is short of something that will come back.
func (c *command) start(ctx context.Context) (*runningCommand, error) {
	path, argv, err := c.program()
	if err != nil {
		return nil, err
	}
	env := commandEnv{c.base, c.env}
	if c.base == nil {
		if env.own, err = completeEnv(c.env, c.dir); err != nil {
			return nil, err
		}
	}
	for pause := 20 * time.Millisecond; ; pause *= 2 {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		r, err := c.startOnce(path, argv, env)
		if errors.Is(err, syscall.ENOEXEC) && c.argv != nil {
			// As execvp does: a script without a #! line is the shell's.
			if path, argv, err = scriptCommand(path, argv, c.dir, env.list()); err == nil {
				r, err = c.startOnce(path, argv, env)
			}
		}
		if err == nil {
			return r, nil
		}
		if !isTransient(err) || pause > 500*time.Millisecond {
			return nil, c.startError(path, argv, err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}

// program is the file to execute and its arguments.
func (c *command) program() (path string, argv []string, err error) {
	if c.argv == nil {
		return shellCommand(c.line, c.dir, c.searchedEnv())
	}
	if len(c.argv) == 0 {
		return "", nil, execError("start command", errors.New("it is empty"), "")
	}
	if path, err = c.spawn.lookProgram(c.argv[0], c.dir, c.searchedEnv()); err == nil {
		err = checkArguments(path, c.argv[1:])
	}
	return path, c.argv, err
}

// searchedEnv is the environment whose PATH counts.
func (c *command) searchedEnv() []string {
	if c.base != nil {
		return c.base.entries
	}
	return c.env
}

// startOnce opens the pipes and starts the process in a group of its own.
func (c *command) startOnce(path string, argv []string, env commandEnv) (r *runningCommand, err error) {
	r = &runningCommand{exited: make(chan struct{})}
	var childEnds []*os.File
	defer func() {
		for _, file := range childEnds {
			file.Close()
		}
		if err != nil {
			r.abandon()
			r = nil
		}
	}()

	null, err := c.spawn.devNull()
	if err != nil {
		return r, err
	}
	if c.spawn == nil {
		childEnds = append(childEnds, null)
	}
	files := [3]*os.File{null, null, null}

	if file, ok := c.stdin.(*os.File); ok {
		files[0] = file
	} else if c.stdin != nil {
		read, write, err := os.Pipe()
		if err != nil {
			return r, err
		}
		childEnds = append(childEnds, read)
		files[0], r.stdinPipe = read, write
	}
	if c.output != nil {
		for i, stream := range []outputStream{streamStdout, streamStderr} {
			read, write, err := commandPipe()
			if err != nil {
				return r, err
			}
			childEnds = append(childEnds, write)
			files[i+1] = write
			r.readers = append(r.readers, newOutputReader(stream, read))
		}
	}

	r.leader, r.identity, err = c.spawn.startProcess(path, argv, c.dir, env, files, groupAttributes(c))
	if err != nil {
		return r, err
	}
	if r.group, err = openGroup(r.leader.pid); err != nil {
		r.leader.process.Kill()
		r.leader.process.Wait()
		return r, err
	}
	if r.stdinPipe != nil {
		r.stdinCopied = make(chan struct{})
		go r.copyStdin(c.stdin) // ends with stdin, or when the command does not read it any more
	}
	return r, nil
}

// abandon closes our pipe ends of a command that did not start.
func (r *runningCommand) abandon() {
	for _, reader := range r.readers {
		reader.pipe.Close()
	}
	if r.stdinPipe != nil {
		r.stdinPipe.Close()
	}
}

func (r *runningCommand) copyStdin(stdin io.Reader) {
	defer close(r.stdinCopied)
	defer r.stdinPipe.Close()
	io.Copy(r.stdinPipe, stdin) // an error here is a command that stopped reading, which is its own business
}

// soon is how long a command may run before others wait for its output and its end.
const soon = 5 * time.Millisecond

// endsSoon reads the output of a command that is over soon, as most are, and reaps it, all without another goroutine or
// a thread that stands still for it. It returns false, with its readers as far as they have come, when the command is
// not over.
func (r *runningCommand) endsSoon(c *command) bool {
	if len(r.readers) == 0 {
		return false
	}
	until := time.Now().Add(soon)
	for _, reader := range r.readers {
		if !reader.endsBy(until, c.spawn) {
			return false
		}
	}
	// It has closed its output, and if it was by ending, it is as good as gone.
	for range 4 {
		r.mu.Lock()
		r.end, r.reaped = r.leader.reapEnded()
		r.mu.Unlock()
		if r.reaped {
			close(r.exited)
			return true
		}
		yieldProcessor()
	}
	return false
}

// wait reaps the process. From then on its number may become another's, so that happens where nobody signals it.
func (r *runningCommand) wait() {
	defer close(r.exited)
	if awaitExit(r.leader.pid) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.end, r.reaped = r.leader.reap(), true
		return
	}
	end := r.leader.reap() // the system could not say it beforehand, and this may last
	r.mu.Lock()
	defer r.mu.Unlock()
	r.end, r.reaped = end, true
}

// signal does something to the group, unless its number may have become another's.
func (r *runningCommand) signal(do func(processGroup)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.group.lost(r.reaped) {
		do(r.group)
	}
}

// await returns when the process has ended or cannot be ended. killAt is when those that remain in its group get
// SIGKILL; it is zero if nobody has asked the group to end.
func (r *runningCommand) await(ctx context.Context, killAfter time.Duration, hurry <-chan struct{}) (stopped bool, killAt time.Time) {
	select {
	case <-r.exited:
		return false, time.Time{}
	case <-ctx.Done():
	}
	if r.exitedWithin(0) {
		return false, time.Time{}
	}
	r.signal(processGroup.terminate)
	killAt = time.Now().Add(killAfter)
	grace := time.NewTimer(killAfter)
	defer grace.Stop()
	select {
	case <-r.exited:
		return true, killAt
	case <-grace.C:
	case <-hurry:
		killAt = time.Now()
	}
	r.signal(processGroup.kill)
	r.exitedWithin(unkillableWait)
	return true, killAt
}

func (r *runningCommand) exitedWithin(limit time.Duration) bool {
	select {
	case <-r.exited:
		return true
	default:
	}
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-r.exited:
		return true
	case <-timer.C:
		return false
	}
}

// endGroup ends what the process has left in its group and says what would not end. Usually nothing is left, and
// finding that out is one system call.
func (r *runningCommand) endGroup(killAfter time.Duration, killAt time.Time, hurry <-chan struct{}) (left string) {
	if !r.exitedWithin(0) {
		return r.group.describe()
	}
	if r.group.empty() {
		return ""
	}
	if killAt.IsZero() {
		r.signal(processGroup.terminate)
		killAt = time.Now().Add(killAfter)
	}
	giveUpAt := killAt.Add(unkillableWait)
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		select {
		case <-time.After(pause): // no system tells when a group has become empty
		case <-hurry:
			hurry = nil
			killAt = time.Now()
			giveUpAt = killAt.Add(unkillableWait)
		}
		if r.group.empty() || pause > 4*time.Millisecond && r.group.dead() {
			return ""
		}
		if now := time.Now(); now.After(giveUpAt) {
			return r.group.describe()
		} else if !now.Before(killAt) {
			r.signal(processGroup.kill)
		}
	}
}

// startError explains why the system did not start the program. Arguments are not quoted: they may hold secrets.
func (c *command) startError(path string, argv []string, err error) error {
	if codeOf(err) != "" {
		return err
	}
	var pathErr *os.PathError
	if errors.As(err, &pathErr) {
		err = pathErr.Err
	}
	if c.dir != "" {
		if info, dirErr := os.Stat(c.dir); dirErr != nil {
			return execError("enter working folder", dirErr, "create the folder, or correct working_dir")
		} else if !info.IsDir() {
			return execError("enter working folder", fmt.Errorf("%q is not a folder", c.dir), "correct working_dir")
		}
	}
	hint, cause := explainStart(path, argv, err)
	return execError(fmt.Sprintf("start program %q", path), cause, hint)
}

// execError is every error of a command that could not start.
func execError(op string, err error, hint string) error {
	return failHint(codeExec, op, err, hint)
}
