package main

// client_wait.go follows a task to its end: its output on stdout as it comes, across restarts of the worker, and an exit
// code that says how it ended.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os/signal"
	"time"
)

// wait is --wait.
func (c *workerClient) wait(ctx context.Context, inv *invocation, id string) int {
	fmt.Fprintf(inv.stderr, "job_item: task %s\n", id)
	ctx, stop := untilSignal(ctx)
	defer stop()

	record, err := c.follow(ctx, id, inv.stdout)
	var stopped stoppedBy
	switch {
	case errors.As(context.Cause(ctx), &stopped):
		fmt.Fprintf(inv.stderr, "job_item: %v, the task goes on: %s\n", stopped, id)
		return exitCodeOfSignal(stopped.sig)
	case err != nil:
		inv.printError(err)
		fmt.Fprintf(inv.stderr, "  the task goes on: %s\n", id)
		return exitFailed
	case record.Status == statusFinish:
		return exitOK
	}
	fmt.Fprintf(inv.stderr, "job_item: task %s: %s\n", id, record.ending())
	switch record.Status {
	case statusTimeout:
		return exitTimeout
	case statusTerminate:
		return exitTerminate
	}
	return exitFailed
}

// ending says in words how a task ended.
func (r taskReply) ending() string {
	text := oneLine(string(r.Status), 20)
	switch {
	case r.Error != "":
		text += ": " + oneLine(r.Error, 2000)
	case r.Signal != "":
		text += ": " + oneLine(r.Signal, 40)
	case r.ExitCode != nil:
		text += fmt.Sprintf(": exit code %d", *r.ExitCode)
	}
	return text
}

// untilSignal gives a context that a signal ends, with stoppedBy as its cause.
func untilSignal(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	signals := endSignals()
	done := make(chan struct{})
	go func() { // ends with ctx
		defer close(done)
		select {
		case sig := <-signals:
			cancel(stoppedBy{sig})
		case <-ctx.Done():
		}
	}()
	return ctx, func() {
		signal.Stop(signals)
		cancel(nil)
		<-done
	}
}

// follow copies a task's log to out until the task has ended, and gives its record. A worker that is away for longer
// than patience is given up, and so is the log of an ended task that keeps breaking.
func (c *workerClient) follow(ctx context.Context, id string, out io.Writer) (taskReply, error) {
	var printed int64
	answered, pause := time.Now(), 100*time.Millisecond
	for {
		n, logErr := c.copyLog(ctx, id, printed, out)
		printed += n
		var broken outputError
		if errors.As(logErr, &broken) {
			return taskReply{}, fail(codeWaitOutput, "write the task's output", broken.error)
		}
		record, err := c.task(ctx, id)
		var refused *refusal
		switch isRefusal := errors.As(err, &refused); {
		case ctx.Err() != nil:
			return record, ctx.Err()
		case err == nil && record.Status.final() && (logErr == nil || errors.As(logErr, &refused) && !mayPass(logErr)):
			return record, nil
		case err == nil && !record.Status.final():
			answered = time.Now()
		case isRefusal && !mayPass(err) && refused.status != http.StatusNotFound:
			return record, err
		case time.Since(answered) > c.patience:
			return record, err
		}
		if n > 0 {
			pause = 100 * time.Millisecond
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
		pause = min(2*pause, 2*time.Second)
	}
}

// An outputError is a failure of our own stdout, not of the worker.
type outputError struct{ error }

// copyLog copies what follows the first skip bytes of a task's log, until the worker ends it (nil) or it breaks.
func (c *workerClient) copyLog(ctx context.Context, id string, skip int64, out io.Writer) (copied int64, err error) {
	resp, err := c.do(ctx, http.MethodGet, nil, url.Values{"follow": {"true"}}, "job", id, "log")
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return 0, c.refused(resp)
	}
	if _, err := io.CopyN(io.Discard, resp.Body, skip); err == io.EOF {
		return 0, nil
	} else if err != nil {
		return 0, err
	}
	buf := make([]byte, 32<<10)
	for {
		n, err := resp.Body.Read(buf)
		if n > 0 {
			if _, err := out.Write(buf[:n]); err != nil {
				return copied, outputError{err}
			}
			copied += int64(n)
		}
		if err == io.EOF {
			return copied, nil
		}
		if err != nil {
			return copied, err
		}
	}
}
