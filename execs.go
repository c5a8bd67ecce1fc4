package main

// execs.go runs the background processes of the configuration and starts again those that fail (PROTOCOL section 9).
// What it takes to run one command is in exec.go, the program around this in execs_process.go, and what a killed one
// has left running in execs_ledger.go.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"reflect"
	"slices"
	"sync"
	"time"
)

// The states of an exec in GET /health.
const (
	execStarting = "starting"
	execRunning  = "running"
	execPausing  = "pausing"  // it has failed and is started again in a while
	execFinished = "finished" // for good, by success
	execFailed   = "failed"   // for good: given up
	execStopped  = "stopped"  // with the worker
)

// execPauses says when an exec that has failed is started again.
type execPauses struct {
	first, longest time.Duration // doubling between them
	steady         time.Duration // a longer run resets pause and count
}

// standardExecPauses are those of PROTOCOL section 9.
func standardExecPauses() execPauses {
	return execPauses{first: time.Second, longest: 30 * time.Second, steady: time.Minute}
}

// An execSet is the execs of a configuration. Its methods are for one goroutine; what goes on in it is told by changed.
type execSet struct {
	log     *slog.Logger
	pauses  execPauses
	dataDir string
	spawn   *spawner
	hurry   chan struct{}  // closed when those being stopped are to be killed
	running sync.WaitGroup // a goroutine per runner, and prepare
	changed chan struct{}  // holds a value when report has something new to say

	ctx      context.Context // ends with stop
	cancel   context.CancelFunc
	prepared chan struct{} // closed when nothing that an earlier set has left is running
	ledger   *execLedger   // set by then; nil if there is none

	mu        sync.Mutex // guards what follows, and the runners' states
	killAfter time.Duration
	runners   []*execRunner          // in the configuration's order
	leaving   map[string]*execRunner // the last one of a key that was removed, while it is being stopped
	over      execsOver
}

// execsOver says whether an exec with cascade_exit has ended for good, and whether that was a failure.
type execsOver struct{ ended, failed bool }

// newExecSet prepares for running execs: what an earlier set with this data folder runs is waited for, and what a
// killed one has left running is ended.
func newExecSet(dataDir string, killAfter time.Duration, pauses execPauses, log *slog.Logger) *execSet {
	ctx, cancel := context.WithCancel(context.Background())
	s := &execSet{
		log: log, pauses: pauses, dataDir: dataDir, spawn: startSpawner(), hurry: make(chan struct{}),
		changed: make(chan struct{}, 1), ctx: ctx, cancel: cancel, prepared: make(chan struct{}),
		killAfter: killAfter, leaving: map[string]*execRunner{},
	}
	s.running.Add(1)
	go s.prepare(killAfter) // ends when there is nothing to wait for, or with stop
	return s
}

func (s *execSet) prepare(killAfter time.Duration) {
	defer s.running.Done()
	defer close(s.prepared)
	ledger, err := openExecLedger(s.ctx, s.dataDir, s.log)
	if err != nil {
		if s.ctx.Err() == nil {
			s.log.Error("execs run without a note of their processes", errAttrs(err))
		}
		return
	}
	s.ledger = ledger
	if err := ledger.endLeft(killAfter); err != nil {
		s.log.Error("processes of earlier execs could not be ended", errAttrs(err))
	}
}

// apply takes up a configuration: execs that are new or differ are started, those that are gone or differed are
// stopped, and the others are left alone, whatever state they are in. It does not wait for any of this.
func (s *execSet) apply(cfg *Config) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.killAfter = cfg.KillAfter
	former := map[string]*execRunner{}
	for _, r := range s.runners {
		former[r.exec.Key] = r
	}
	s.runners = nil
	for _, exec := range cfg.Execs {
		marks := execMarks(cfg)
		before := former[exec.Key]
		delete(former, exec.Key)
		if before != nil && reflect.DeepEqual(before.exec, exec) && slices.Equal(before.marks, marks) {
			s.runners = append(s.runners, before)
			continue
		}
		if before == nil {
			before = s.leaving[exec.Key]
		} else {
			before.log.Info("exec has changed, it is stopped and started anew")
			before.cancel()
		}
		s.runners = append(s.runners, s.start(exec, marks, before))
	}
	for key, r := range former {
		r.log.Info("exec was removed, it is stopped")
		r.cancel()
		s.leaving[key] = r
	}
	maps.DeleteFunc(s.leaving, func(_ string, r *execRunner) bool { return r.isDone() })
	signalOnce(s.changed)
}

// start begins to run an exec, once the one that had its key before is gone.
func (s *execSet) start(exec Exec, marks []string, before *execRunner) *execRunner {
	ctx, cancel := context.WithCancel(s.ctx)
	r := &execRunner{
		set: s, exec: exec, marks: marks, log: s.log.With("exec", exec.Key), before: before, cancel: cancel,
		done: make(chan struct{}), state: execStarting,
	}
	s.running.Add(1)
	go func() { // ends when the exec has ended for good
		defer s.running.Done()
		defer close(r.done)
		defer cancel()
		r.keepRunning(ctx)
	}()
	return r
}

// report is how the execs are doing.
func (s *execSet) report() ([]execHealth, execsOver) {
	s.mu.Lock()
	defer s.mu.Unlock()
	health := []execHealth{}
	for _, r := range s.runners {
		health = append(health, execHealth{Key: r.exec.Key, State: r.state, PID: r.pid, Restarts: r.restarts})
	}
	return health, s.over
}

// stop ends all processes, with SIGTERM and kill_after later with SIGKILL, and returns when they are gone.
func (s *execSet) stop() {
	s.cancel()
	s.running.Wait()
	s.spawn.close()
	s.ledger.close()
}

// kill makes stop end them at once. It may be called from anywhere, once.
func (s *execSet) kill() { close(s.hurry) }

// execMarks are the variables that the worker sets for its execs. They also tell an exec's processes from others.
func execMarks(cfg *Config) []string {
	url := baseURL(cfg.Listen)
	return []string{"JOB_ITEM_APP_ID=" + cfg.Project, "JOB_ITEM_BASE_URL=" + url, "JOB_ITEM_CREATE_URL=" + url + "/job/create"}
}

// execEnvironment is what an exec finds in its environment (PROTOCOL section 9).
func execEnvironment(own map[string]string, marks []string) []string {
	env := withoutServiceVariables(os.Environ())
	for _, name := range slices.Sorted(maps.Keys(own)) {
		env = append(env, name+"="+own[name])
	}
	return append(env, marks...)
}

// An execRunner keeps one exec running. An exec that is changed gets another.
type execRunner struct {
	set    *execSet
	exec   Exec
	marks  []string
	log    *slog.Logger
	before *execRunner // whose process has to be gone first; nil: nobody's
	cancel context.CancelFunc
	done   chan struct{} // closed when nothing of it runs or will

	// Guarded by set.mu.
	state    string
	pid      int
	restarts int // in all
}

func (r *execRunner) isDone() bool {
	select {
	case <-r.done:
		return true
	default:
		return false
	}
}

// note changes the state and has it told.
func (r *execRunner) note(state string, pid int) {
	r.set.mu.Lock()
	r.state, r.pid = state, pid
	if state == execPausing {
		r.restarts++
	}
	r.set.mu.Unlock()
	signalOnce(r.set.changed)
}

// keepRunning runs the exec until it has ended for good, or ctx ends.
func (r *execRunner) keepRunning(ctx context.Context) {
	if r.before != nil {
		<-r.before.done
		r.before = nil
	}
	<-r.set.prepared
	pause, restarts := r.set.pauses.first, 0
	for ctx.Err() == nil {
		began := time.Now()
		cause := r.runOnce(ctx)
		ran := time.Since(began)
		if ctx.Err() != nil {
			break
		}
		if cause == nil {
			r.log.Info("exec has finished", "dur", ran.Round(time.Millisecond).String())
			r.end(execFinished)
			return
		}
		if ran > r.set.pauses.steady {
			pause, restarts = r.set.pauses.first, 0
		}
		op := fmt.Sprintf("run exec %q", r.exec.Key)
		if restarts >= r.exec.Attempt {
			r.log.Error("exec is given up", errAttrs(fail(codeExecGivenUp, op, cause)), "attempt", restarts)
			r.end(execFailed)
			return
		}
		if !isHostFault(cause) {
			restarts++ // what the host lacks for a while is not the exec's failure
		}
		if codeOf(cause) == "" { // it could be started
			cause = fail(codeExecFailed, op, cause)
		}
		r.log.Warn("exec has failed, it is started again", errAttrs(cause),
			"dur", ran.Round(time.Millisecond).String(), "pause", pause.String(), "attempt", restarts)
		r.note(execPausing, 0)
		select {
		case <-ctx.Done():
		case <-time.After(pause):
			r.note(execStarting, 0)
		}
		pause = min(2*pause, r.set.pauses.longest)
	}
	r.note(execStopped, 0)
}

// end notes that the exec has ended for good.
func (r *execRunner) end(state string) {
	if r.exec.CascadeExit {
		r.set.mu.Lock()
		r.set.over.ended = true
		r.set.over.failed = r.set.over.failed || state == execFailed
		r.set.mu.Unlock()
	}
	r.note(state, 0)
}

// runOnce runs the command to its end and says why it failed, nil if it did not.
func (r *execRunner) runOnce(ctx context.Context) error {
	stdout := lineSplitter{line: func(line []byte) { r.log.Info("exec output", "data", string(line)) }}
	stderr := lineSplitter{line: func(line []byte) {
		r.log.Info("exec output", "stream", streamStderr, "data", string(line))
	}}
	r.set.mu.Lock()
	killAfter := r.set.killAfter
	r.set.mu.Unlock()
	c := command{
		line: r.exec.Cmd, dir: r.exec.WorkingDir, env: execEnvironment(r.exec.Env, r.marks),
		killAfter: killAfter, hurry: r.set.hurry, spawn: r.set.spawn,
		started: func(p processIdentity) error {
			if err := r.set.ledger.note(r.exec.Key, p, r.marks); err != nil {
				r.log.Warn("process of exec not noted", errAttrs(err), "pid", p.PID)
			}
			r.log.Info("exec started", "pid", p.PID)
			r.note(execRunning, p.PID)
			return nil
		},
		output: func(stream outputStream, data []byte) {
			if stream == streamStderr {
				stderr.write(data)
			} else {
				stdout.write(data)
			}
		},
	}
	exit, err := c.run(ctx)
	stdout.end()
	stderr.end()
	r.set.ledger.forget(r.exec.Key)
	if exit.left != "" {
		r.log.Error("processes of an exec could not be ended", "err", exit.left)
	}
	switch {
	case exit.stopped:
		r.log.Info("exec stopped", "pid", exit.pid)
		return nil
	case err != nil:
		return err
	case exit.signal != "":
		return fmt.Errorf("killed by %s", exit.signal)
	case exit.code > 0:
		return fmt.Errorf("exit code %d", exit.code)
	case exit.code < 0:
		return errors.New("it ended in an unknown way")
	}
	return nil
}

// A lineSplitter cuts a stream into its lines, and lines longer than outputChunkBytes into pieces.
type lineSplitter struct {
	line func([]byte)
	held []byte // of the line that has begun
	cut  bool   // pieces of it have been handed over
}

func (s *lineSplitter) write(data []byte) {
	for {
		line, rest, ended := bytes.Cut(data, []byte("\n"))
		s.hold(line)
		if !ended {
			return
		}
		if line = bytes.TrimSuffix(s.held, []byte("\r")); len(line) > 0 || !s.cut {
			s.line(line)
		}
		s.held, s.cut = s.held[:0], false
		data = rest
	}
}

// hold adds to the line that has begun.
func (s *lineSplitter) hold(part []byte) {
	for len(s.held)+len(part) > outputChunkBytes {
		n := outputChunkBytes - len(s.held)
		s.held = append(s.held, part[:n]...)
		part = part[n:]
		whole := len(s.held) - cutCharacter(s.held)
		s.line(s.held[:whole])
		s.held = append(s.held[:0], s.held[whole:]...)
		s.cut = true
	}
	s.held = append(s.held, part...)
}

// end hands over a last line that was not ended.
func (s *lineSplitter) end() {
	if len(s.held) > 0 {
		s.line(s.held)
	}
	s.held, s.cut = nil, false
}
