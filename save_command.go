package main

// save_command.go is `save -- COMMAND ARG…`: it runs a command without a shell, copies its stdout and stderr to ours and
// both into the messages, and exits as the command does.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"
)

// Exit codes of a command that could not be run, as shells give them.
const (
	exitNotExecutable = 126
	exitNotFound      = 127
)

// savePipeBytes is the most that a pipe holds, and so the most that a command which has ended can have left in it.
const savePipeBytes = 1 << 20

// saveCommand runs the command to its end. Signals go on to the command; once it has ended, the second one ends the
// sending.
func (s *saver) saveCommand(ctx context.Context) int {
	catchBrokenPipe()
	signals := endSignals()
	defer signal.Stop(signals)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)

	c := &savedCommand{Cmd: exec.Command(s.inv.args[0], s.inv.args[1:]...)}
	c.Stdin = s.inv.stdin
	if err := c.start(s); err != nil {
		s.report(fail(codeSaveCommand, fmt.Sprintf("run %q", s.inv.args[0]), err))
		if errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist) {
			return exitNotFound
		}
		return exitNotExecutable
	}
	go s.send(ctx) // ends when outbox is closed; waited for in finish

	ended := make(chan error, 1)
	go func() { ended <- c.wait() }()
	var err error
	for running := true; running; {
		select {
		case err = <-ended:
			running = false
		case sig := <-signals:
			passSignal(c.Process, sig)
		}
	}

	_, sendErr := s.finish(signals, cancel, nil)
	s.report(err, sendErr)
	if code := commandExitCode(c.ProcessState); code != exitOK {
		return code
	}
	if err != nil || sendErr != nil {
		return exitFailed
	}
	return exitOK
}

// A savedCommand is a command whose outputs are saved.
type savedCommand struct {
	*exec.Cmd
	pipes  []*outputPipe
	copied chan error // one result for each pipe
}

// start starts the command and the copying of its two outputs.
func (c *savedCommand) start(s *saver) error {
	out, outEnd, err := os.Pipe()
	if err != nil {
		return err
	}
	errOut, errEnd, err := os.Pipe()
	if err != nil {
		out.Close()
		outEnd.Close()
		return err
	}
	c.Stdout, c.Stderr = outEnd, errEnd
	err = c.Start()
	outEnd.Close()
	errEnd.Close()
	if err != nil {
		out.Close()
		errOut.Close()
		return err
	}
	c.pipes = []*outputPipe{{file: out}, {file: errOut}}
	c.copied = make(chan error, len(c.pipes))
	streams := []*savedStream{s.stream(c.pipes[0], s.inv.stdout), s.stream(c.pipes[1], s.inv.stderr)}
	for _, stream := range streams {
		// Ends at the end of the pipe, or soon after the command's end; waited for in wait.
		go func() { c.copied <- stream.copy() }()
	}
	return nil
}

// wait waits for the command and for the rest of its output.
func (c *savedCommand) wait() error {
	var exit *exec.ExitError
	err := c.Wait()
	if errors.As(err, &exit) {
		err = nil // the exit code says it
	}
	for _, pipe := range c.pipes {
		pipe.endSoon()
	}
	for range c.pipes {
		err = errors.Join(err, <-c.copied)
	}
	for _, pipe := range c.pipes {
		pipe.file.Close()
	}
	return err
}

// An outputPipe is the reading end of a command's output. After the command's end it reads what the command has left
// there, and then ends, although a process that the command has started may hold it open. Time counts only while there
// is nothing to read: a receiver that holds us up must not cost the last lines.
type outputPipe struct {
	file  *os.File // not embedded: io.Copy would find its WriteTo and pass Read by
	ended atomic.Bool

	// Used by the reader alone, once ended.
	waited time.Duration
	read   int
}

// endSoon says that the command has ended.
func (p *outputPipe) endSoon() {
	p.ended.Store(true)
	if p.file.SetReadDeadline(time.Now().Add(saveLinger)) != nil {
		// This system cannot interrupt a read of a pipe (Windows): closing it does.
		time.AfterFunc(saveLinger, func() { p.file.Close() })
	}
}

func (p *outputPipe) Read(buf []byte) (int, error) {
	if p.ended.Load() {
		if p.waited >= saveLinger || p.read >= savePipeBytes {
			return 0, io.EOF
		}
		p.file.SetReadDeadline(time.Now().Add(saveLinger - p.waited))
		begin := time.Now()
		defer func() { p.waited += time.Since(begin) }()
	}
	n, err := p.file.Read(buf)
	if p.ended.Load() {
		p.read += n
		if err != nil {
			err = io.EOF
		}
	}
	return n, err
}

// commandExitCode is the exit code as a shell gives it: 128 + n for signal n.
func commandExitCode(state *os.ProcessState) int {
	if status, ok := state.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return exitCodeOfSignal(status.Signal())
	}
	return state.ExitCode()
}
