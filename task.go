package main

// task.go is one task from its slot to its status: the data file, the environment, the command, retries, and the entry
// in the journal that makes its end count. What comes before and after is in delivery.go.

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"
)

const (
	// exitBadData is the exit code with which a command says that running it again would not help (EX_DATAERR).
	exitBadData = 65

	// leastStrayGrace is the time from SIGTERM to SIGKILL that is left to what has left a group that would not end.
	leastStrayGrace = 100 * time.Millisecond

	stderrTailBytes = 4 << 10 // of a failed run, in {task_id}_failed
)

// A task is one accepted run of a job. Very many may wait, so it is kept small: its data stays in the journal, and what
// only few tasks have is in a taskRun.
type task struct {
	id      string
	event   string
	created int64 // Unix time in nanoseconds

	attempts int32 // starts, over all workers
	crashes  int32 // starts in a row that ended with their worker
	failures int32 // runs that failed, for the retries

	// Guarded by worker.mu.
	accepted  bool        // the journal has it
	unheard   bool        // too many control subjects are listened on; its own are once it runs
	givenBack bool        // its broker has it delivered again
	ending    bool        // its delivery is only to be settled, and takes nobody's place
	unsettled bool        // the journal answers, but its broker could not be told, and will deliver it again
	link      *brokerLink // where its story is told; nil once it is over
	delivery  *Delivery   // what to settle in the end; nil where the journal alone answers
	status    taskStatus
	*taskRun  // nil until begun is called
}

// A taskRun is what a task has besides once it does more than wait for its first slot. Guarded by worker.mu.
type taskRun struct {
	startedAt time.Time
	taken     bool                    // this worker has begun with it
	announced sync.Once               // and has said so
	ran       bool                    // this worker has started its command
	stop      context.CancelCauseFunc // of the running attempt
	stopped   error                   // errTerminated or errTimedOut, once asked for
	woken     chan struct{}           // closed to end a pause before a retry
	adoption  *time.Timer             // to when the journal answers in the broker's stead; nil: never
	uncontrol func()                  // ends the listening on its control subjects; nil: there is none
}

// begun gives a task its taskRun. worker.mu is held.
func (t *task) begun() {
	if t.taskRun == nil {
		t.taskRun = new(taskRun)
	}
}

// takeUncontrol gives uncontrol to whoever calls it first; nil: there is none. worker.mu is held.
func (r *taskRun) takeUncontrol() (uncontrol func()) {
	if r != nil {
		uncontrol, r.uncontrol = r.uncontrol, nil
	}
	return uncontrol
}

func (t *task) createdAt() time.Time { return fromNanos(t.created) }

// A jobRunner is a job made ready to run: what is the same for each of its tasks is done once.
type jobRunner struct {
	job      *Job
	template *commandTemplate
	env      *baseEnv
	removed  bool // no longer configured, and kept for its last tasks
}

// wasRemoved reports whether the job is kept only for its last tasks.
func (r *jobRunner) wasRemoved() bool { return r != nil && r.removed }

// same reports whether a task would run the same way in both.
func (r *jobRunner) same(other *jobRunner) bool {
	return reflect.DeepEqual(r.job, other.job) && slices.Equal(r.env.entries, other.env.entries)
}

func newJobRunner(cfg *Config, job *Job, baseURL string) (*jobRunner, error) {
	template, err := parseTemplate(job.Cmd, hostShell)
	if err != nil {
		return nil, err
	}
	env := map[string]string{}
	for _, entry := range withoutServiceVariables(os.Environ()) {
		if name, value, ok := strings.Cut(entry, "="); ok {
			env[name] = value
		}
	}
	maps.Copy(env, job.Env)
	host := cfg.EndPoint
	if host == "" {
		host = baseURL
	}
	maps.Copy(env, map[string]string{
		"JOB_MANAGER_HOST":     host,
		"JOB_ITEM_PROJECT_ID":  cfg.Credential.ProjectID,
		"JOB_ITEM_PROJECT_KEY": string(cfg.Credential.SecretKey),
		"JOB_ITEM_EVENT":       job.Event,
		"JOB_ITEM_BASE_URL":    baseURL,
		"JOB_ITEM_CREATE_URL":  baseURL + "/job/create",
		"JOB_ITEM_APP_ID":      cfg.Project,
	})
	for _, entry := range taskEntries("", "", "", 0) { // this worker may have been started by a task itself
		name, _, _ := strings.Cut(entry, "=")
		delete(env, name)
	}
	var entries []string
	for _, name := range slices.Sorted(maps.Keys(env)) {
		entries = append(entries, name+"="+env[name])
	}
	r := &jobRunner{job: job, template: template}
	r.env, err = newBaseEnv(entries, job.WorkingDir)
	return r, err
}

// taskEnv is what the environment of one attempt at one task has besides its job's (PROTOCOL section 6, item 4).
func (r *jobRunner) taskEnv(cfg *Config, baseURL, id string, attempt int) []string {
	host := cfg.EndPoint
	if host == "" {
		host = baseURL
	}
	return taskEntries(host, baseURL, id, attempt)
}

// taskEntries are those of the environment that differ between tasks.
func taskEntries(host, baseURL, id string, attempt int) []string {
	return []string{
		"JOB_ITEM_TASK_ID=" + id,
		"JOB_ITEM_ATTEMPT=" + strconv.Itoa(attempt),
		"JOB_MANAGER_RESULT_URL=" + host + "/api/worker/job_record/result/" + id,
		"JOB_MANAGER_UPLOAD_FILE=" + host + "/api/worker/job_record/file/" + id,
		"JOB_ITEM_MSG_NOTIF_HOST=" + baseURL + "/msg/notif/" + id,
	}
}

// An attempt is how one run of a task ended.
type attempt struct {
	status     taskStatus
	exit       exitStatus
	started    bool
	err        error // why status is error, where the command itself cannot say
	stderrTail string
	final      bool // running it again would not help
	hostFault  bool // neither the command nor its data is to blame: this host lacks something for the moment

	dataFile string     // to be removed; "": there is none
	spare    *spareFile // what it is, see writeDataFile
}

// startTask runs a task in a slot that the scheduler gave it.
func (w *worker) startTask(t *task) {
	w.runningTasks.Add(1)
	w.tasks.Add(1)
	go func() { // ends with the task's attempt
		a, putBack := w.attemptTask(t)
		w.runningTasks.Add(-1)
		if !putBack && a.status == statusFinish {
			w.leavePlace(t)
		}
		// The goroutine that was started last runs first: that of the next task, which done starts.
		go w.endAttempt(t, a, putBack) // ends when the task's end is on disk, or when it waits again
		w.queue.done(t.event)
		w.wakeSome(t.event)
	}()
}

// endAttempt does what is left to do when a task has given its slot back.
func (w *worker) endAttempt(t *task, a attempt, putBack bool) {
	defer w.tasks.Done()
	w.removeDataFile(t, a)
	switch {
	case putBack && w.isUnaccepted(t):
		w.dropUnaccepted(t)
	case putBack:
		w.putBack(t)
	case a.hostFault:
		w.postpone(t, a.err)
	default:
		w.conclude(t, a)
	}
}

// attemptTask runs a task once. putBack says that it did not end by itself and no one asked for its end: it is to run
// again, here or elsewhere.
func (w *worker) attemptTask(t *task) (a attempt, putBack bool) {
	with := w.setup.Load() // all through this attempt
	ctx, stop := context.WithCancelCause(w.ctx)
	defer stop(nil)
	w.mu.Lock()
	t.begun()
	t.stop = stop
	t.status = statusRunning
	t.startedAt = time.Time{}
	stopped, unheard, entering := t.stopped, t.unheard, w.entering[t.id] != nil
	t.taken = true
	w.mu.Unlock()
	if unheard {
		w.control(t)
	}
	if !entering { // else accept does so
		w.announce(t)
	}
	if stopped != nil {
		stop(stopped)
	}
	if int(t.crashes) >= with.cfg.MaxDeliveries {
		return attempt{status: statusError, final: true, err: fail(codeGivenUp, "run task", fmt.Errorf(
			"given up after %d starts, each of which ended with its worker", t.crashes))}, false
	}
	if ctx.Err() == nil {
		a = w.runCommand(ctx, t, with)
	}
	switch cause := context.Cause(ctx); {
	case ctx.Err() == nil, a.started && !a.exit.stopped: // it ended by itself, in time
	case errors.Is(cause, errTerminated):
		a.status, a.err = statusTerminate, cause
	case errors.Is(cause, errTimedOut), errors.Is(cause, errTimeLimit):
		a.status, a.err = statusTimeout, cause
	default:
		if a.started {
			// They have what is left of the time, so that a stop takes no longer than its bounds.
			w.endStrays(t, max(leastStrayGrace, with.cfg.KillAfter-a.exit.stopTook))
		}
		return a, true
	}
	return a, false
}

// endStrays ends what has left the group of a command that was stopped, since its task will run again, perhaps elsewhere.
func (w *worker) endStrays(t *task, killAfter time.Duration) {
	select {
	case <-w.hurry:
		killAfter = 0
	default:
	}
	if err := endStaleGroups([]staleTask{w.staleTask(t.id, processIdentity{})}, killAfter); err != nil {
		w.log.Error("processes of a task could not be ended", errAttrs(err), "task_id", t.id)
	}
}

// staleTask names what a task may have left running. The base URL tells our processes from those of another worker on
// this host, which may run the task now.
func (w *worker) staleTask(id string, leader processIdentity) staleTask {
	return staleTask{process: leader, taskID: id, env: []string{"JOB_ITEM_BASE_URL=" + w.baseURL}}
}

// runCommand writes the data file and runs the command. The file is to be removed.
func (w *worker) runCommand(ctx context.Context, t *task, with *setup) (a attempt) {
	a.status = statusError
	runner := with.jobs[t.event]
	data, err := w.journal.data(t.id)
	if err != nil {
		a.err, a.hostFault = err, isHostFault(err)
		return a
	}
	rendered, err := runner.template.render(t.id, data)
	if err != nil {
		a.err, a.final = err, true
		return a
	}
	file := filepath.Join(runner.job.WorkingDir, t.id+".json")
	a.spare, err = w.spares.writeDataFile(file, data, t.ran || t.crashes > 0 || t.failures > 0)
	if err != nil {
		a.err, a.hostFault = err, isHostFault(err)
		return a
	}
	a.dataFile = file
	w.records.keepData(t.id, data)

	if runner.job.Timeout > 0 {
		cause := fmt.Errorf("%w: %v", errTimeLimit, runner.job.Timeout)
		limit := time.AfterFunc(runner.job.Timeout, func() { w.stopTask(t, cause) })
		defer limit.Stop()
	}
	tail := &tailBuffer{limit: stderrTailBytes}
	c := command{
		argv: rendered.argv, line: rendered.line, dir: runner.job.WorkingDir,
		base: runner.env, env: runner.taskEnv(with.cfg, w.baseURL, t.id, int(t.attempts)+1),
		killAfter: with.cfg.KillAfter, hurry: w.hurry, spawn: w.spawner,
		started: func(p processIdentity) error {
			if err := w.taskRuns(t, p); err != nil {
				a.hostFault = true
				return err
			}
			a.started = true
			return nil
		},
		output: func(stream outputStream, data []byte) {
			if stream == streamStderr {
				tail.Write(data)
			}
			if w.assure(t) == nil {
				w.bus.publish(taskOutput{TaskID: t.id, Stream: stream, Data: data})
			}
		},
	}
	a.exit, a.err = c.run(ctx)
	a.hostFault = a.hostFault || isHostFault(a.err)
	if a.exit.left != "" {
		w.log.Error("processes of a task could not be ended", "task_id", t.id, "err", a.exit.left)
	}
	a.stderrTail = tail.text()
	if a.err == nil && a.exit.code == 0 {
		a.status = statusFinish
	}
	a.final = a.exit.code == exitBadData
	return a
}

// removeDataFile removes what runCommand has written.
func (w *worker) removeDataFile(t *task, a attempt) {
	if a.dataFile == "" {
		return
	}
	if err := os.Remove(a.dataFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
		w.log.Warn("data file not removed", errAttrs(err), "task_id", t.id)
	}
	w.spares.rest(a.spare)
}

// taskRuns notes that a task's command has been started, first of all where a worker after this one finds it.
func (w *worker) taskRuns(t *task, p processIdentity) error {
	if err := w.journal.started(t.id, int(t.attempts)+1, p); err != nil {
		return err
	}
	t.attempts++
	t.crashes++ // until it ends otherwise
	w.jobRuns(t.event)
	w.mu.Lock()
	t.ran = true
	t.startedAt = time.Now()
	startedAt := t.startedAt
	w.mu.Unlock()
	w.bus.publish(taskStarted{
		TaskID: t.id, Event: t.event, Name: w.nameOf(t.event), PID: p.PID, Attempt: int(t.attempts),
		CreatedAt: t.createdAt(), At: startedAt,
	})
	return nil
}

// postpone lets a task wait until this host may have again what running it takes.
func (w *worker) postpone(t *task, reason error) {
	t.crashes = 0
	w.counts.postponed.Add(1)
	w.wait(t)
	w.journalled("put task back", t.id, w.journal.returned(t.id))
	w.holdJob(t, reason)
	w.queue.add(t)
}

// isHostFault reports whether err comes from a lack of disk, memory, processes or descriptors, which passes.
func isHostFault(err error) bool {
	for _, lack := range hostLacks() {
		if errors.Is(err, lack) {
			return true
		}
	}
	return false
}

// wait notes that a task waits again.
func (w *worker) wait(t *task) {
	w.mu.Lock()
	defer w.mu.Unlock()
	t.begun()
	t.status = statusQueued
	t.stop = nil
	t.woken = make(chan struct{})
	if t.stopped != nil {
		close(t.woken)
	}
}

// stopRequest is the status that was asked for while a task was not running, "" if none was.
func (w *worker) stopRequest(t *task) taskStatus {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case errors.Is(t.stopped, errTerminated):
		return statusTerminate
	case errors.Is(t.stopped, errTimedOut):
		return statusTimeout
	case errors.Is(t.stopped, errUnaccepted): // while it waited for another attempt
		return statusTerminate
	}
	return ""
}

// isUnaccepted reports whether a task was stopped since the journal could not accept it.
func (w *worker) isUnaccepted(t *task) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return errors.Is(t.stopped, errUnaccepted)
}

// concludeUnstarted ends a task that was stopped while it waited.
func (w *worker) concludeUnstarted(t *task) {
	w.mu.Lock()
	cause := t.stopped
	delete(w.problems, "postponed "+t.event) // the next that cannot be started says so again
	w.mu.Unlock()
	w.conclude(t, attempt{status: w.stopRequest(t), err: cause, final: true, exit: exitStatus{code: -1}})
}

// conclude decides what follows an attempt: another one, or the end.
func (w *worker) conclude(t *task, a attempt) {
	t.crashes = 0
	var retry Retry
	if runner := w.runner(t.event); runner != nil { // else its job is no longer configured
		retry = runner.job.Retry
	}
	failed := a.status == statusError || a.status == statusTimeout && !errors.Is(a.err, errTimedOut)
	if failed && !a.final && int(t.failures) < retry.Times && w.stopRequest(t) == "" {
		pause := min(retry.Pause<<min(t.failures, 30), maxRetryPause)
		if pause < 0 { // shifted out of range
			pause = maxRetryPause
		}
		t.failures++
		w.retry(t, a.reason(), time.Now().Add(pause))
		return
	}
	outcome := taskFinished{
		TaskID: t.id, Event: t.event, Name: w.nameOf(t.event), Status: a.status, Attempt: int(t.attempts),
		Signal: a.exit.signal, PID: a.exit.pid, CPU: a.exit.cpu, MaxRSS: a.exit.maxRSS,
		CreatedAt: t.createdAt(), FinishedAt: time.Now(),
	}
	if a.started && a.exit.code >= 0 {
		outcome.ExitCode = &a.exit.code
	}
	if a.status != statusFinish {
		outcome.Error, outcome.Code = a.reason(), codeOf(a.err)
	}
	w.finish(t, outcome)
}

// retry lets a failed task wait for its next attempt.
func (w *worker) retry(t *task, reason string, due time.Time) {
	w.wait(t)
	w.journalled("note retry of task", t.id, w.journal.retrying(t.id, due))
	w.bus.publish(taskRetrying{TaskID: t.id, Event: t.event, Attempt: int(t.attempts), Reason: reason, Due: due})
	w.enqueueAt(t, due)
}

// finish makes a task's end count: it is in the journal before anybody hears of it. While the journal cannot be
// written the task waits here, unreported; a worker that is stopped meanwhile runs it again.
func (w *worker) finish(t *task, outcome taskFinished) {
	w.mu.Lock()
	outcome.StartedAt = t.startedAt
	w.mu.Unlock()
	pause := 100 * time.Millisecond
	for {
		err := w.journal.finished(outcome)
		if err == nil {
			break
		}
		w.log.Error("end of task not journalled yet", errAttrs(err), "task_id", t.id)
		select {
		case <-time.After(pause):
		case <-w.ctx.Done():
			return
		}
		pause = min(2*pause, 5*time.Second)
	}
	w.mu.Lock()
	t.status = outcome.Status
	t.stop = nil
	w.mu.Unlock()
	w.ended[finalIndex(outcome.Status)].Add(1)
	_ = w.assure(t) // where its end is sure and its acceptance was not, only its end is told
	w.bus.publish(outcome)
}

// putBack gives an unfinished task up: the journal or the broker has it run again.
func (w *worker) putBack(t *task) {
	w.wait(t)
	w.mu.Lock()
	d := t.delivery
	t.delivery = nil
	t.givenBack = d != nil
	w.mu.Unlock()
	if d == nil {
		w.journalled("put task back", t.id, w.journal.returned(t.id))
	} else {
		w.journalled("give task back", t.id, w.journal.released(t.id))
		if uncontrol := w.takeControl(t); uncontrol != nil {
			uncontrol() // before, so that whoever is given it does not find it held
		}
		d.Nack(errPutBack)
	}
	w.records.release(t.id)
	w.counts.putBack.Add(1)
	w.log.Info("task put back", "task_id", t.id, "event", t.event)
}

// stopTask ends a task for a cause: its command if it runs, its wait if it waits.
func (w *worker) stopTask(t *task, cause error) {
	w.mu.Lock()
	t.begun()
	if t.stopped == nil && !errors.Is(cause, errTimeLimit) {
		t.stopped = cause
		if t.woken != nil {
			close(t.woken)
		}
	}
	stop := t.stop
	w.mu.Unlock()
	if stop != nil {
		stop(cause)
	} else if w.queue.remove(t) {
		w.concludeUnstarted(t)
	}
}

// wokenUp is closed when a pause of the task is to end early; nil, which never is, when it is in no pause.
func (w *worker) wokenUp(t *task) <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	t.begun()
	return t.woken
}

// reason says why an attempt did not finish well: what the command wrote last on stderr, else what is known.
func (a attempt) reason() string {
	switch {
	case a.err != nil:
		return a.err.Error()
	case a.stderrTail != "":
		return a.stderrTail
	case a.exit.signal != "":
		return "killed by " + a.exit.signal
	default:
		return "exit code " + strconv.Itoa(a.exit.code)
	}
}

// A tailBuffer keeps the last bytes of what is written to it.
type tailBuffer struct {
	limit int
	data  []byte
	cut   bool
}

// Write never fails.
func (b *tailBuffer) Write(data []byte) (int, error) {
	n := len(data)
	if over := len(b.data) + len(data) - b.limit; over > 0 {
		b.cut = true
		if over >= len(b.data) {
			b.data, data = b.data[:0], data[max(0, len(data)-b.limit):]
		} else {
			b.data = append(b.data[:0], b.data[over:]...)
		}
	}
	b.data = append(b.data, data...)
	return n, nil
}

// text is the tail without a broken character in front and without white space at its end.
func (b *tailBuffer) text() string {
	data := b.data
	for b.cut && len(data) > 0 && !utf8.RuneStart(data[0]) {
		data = data[1:]
	}
	return strings.TrimSpace(strings.ToValidUTF8(string(data), "\uFFFD"))
}

// finalIndex numbers the final statuses.
func finalIndex(s taskStatus) int {
	return slices.Index([]taskStatus{statusFinish, statusError, statusTimeout, statusTerminate}, s)
}
