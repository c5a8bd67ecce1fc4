package main

// worker.go is the worker proper: what it is made of, how it begins, what it knows of tasks and whom it wakes for more. How
// a delivery becomes a task and is settled is in delivery.go, what happens to one task between slot and status in task.go.
// It does not know which broker it talks to, and nothing of HTTP.

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"
)

// A worker runs the tasks of one configuration, which may change meanwhile. It implements taskService for the REST API.
type worker struct {
	baseURL string // of its own REST API, as its jobs reach it
	log     *slog.Logger
	bus     *eventBus
	records *records
	queue   *scheduler
	spawner *spawner
	orders  workerOrders
	started time.Time

	journal *journal    // set by open, once it could be opened
	spares  *spareFiles // likewise

	setup    atomic.Pointer[setup] // replaced with mu held
	changing sync.Mutex            // held while consumers and links are changed

	ctx    context.Context // of every task; its end stops them all, for the cause it has
	cancel context.CancelCauseFunc
	tasks  sync.WaitGroup // running, finishing and pausing tasks

	draining   chan struct{}  // closed when drain begins
	background sync.WaitGroup // what links do besides tasks, until drained
	looking    sync.WaitGroup // for holders of tasks that were delivered again, until drained
	hushing    sync.WaitGroup // the end of listening for tasks that have ended, until closed

	opened    chan struct{} // closed once the journal is open and tells what is unfinished
	ready     chan struct{} // closed once the broker has taken every subscription for the first time
	connected chan struct{} // holds a value when another link has come into use or one was connected
	hurry     chan struct{} // closed when commands that are being stopped are to be killed
	hurryOnce sync.Once

	mu         sync.Mutex // guards what follows
	state      workerState
	known      map[string]*task      // accepted and not yet reported
	entering   map[string]*syncBatch // of them, those that the disk still makes sure of
	mostKnown  int                   // for shrunk
	perEvent   map[string]int        // how many of them a job has, and of those whose holder is looked for
	controlled int                   // tasks whose control subjects are listened on
	hushed     []func()              // end the listening for tasks that have ended lately
	link       *brokerLink           // in use
	pending    *brokerLink           // to be used once it is connected; nil: none
	links      []*brokerLink         // these and those that were replaced and are still needed
	wakesAll   bool                  // wakeConsumers will be called soon
	crashed    map[string]int        // of tasks left to their broker: starts that ended with an earlier life of this worker
	problems   map[string]string     // by what they are about: journal, resources, …

	counts       workerCounts
	runningTasks atomic.Int64
	ended        [4]atomic.Int64 // by finalIndex
}

// workerOrders is what messages to the whole worker ask for. Neither function may block.
type workerOrders struct {
	reload   func() // ask for the configuration again
	shutdown func() // stop gracefully
}

// A workerState is what /health calls status, but for what the problems make of it.
type workerState string

const (
	stateStarting  workerState = "starting"  // there is no journal yet
	stateConsuming workerState = "consuming" // the broker may not have taken every subscription yet
	stateRunning   workerState = "running"
	stateDraining  workerState = "draining"
)

// Why a task's command is stopped: the cause of its context.
var (
	errTimeLimit  = errors.New("time limit exceeded")
	errTerminated = errors.New("terminated on request")
	errTimedOut   = errors.New("timed out on request")
	errPutBack    = errors.New("the worker stops")
	errUnaccepted = errors.New("the journal could not accept it")
)

// newWorker prepares a worker that has no journal yet: it answers for its health and accepts nothing.
func newWorker(cfg *Config, baseURL string, recs *records, bus *eventBus, orders workerOrders, log *slog.Logger) (*worker, error) {
	w := &worker{
		baseURL: baseURL, log: log, bus: bus, records: recs, orders: orders, started: time.Now(), state: stateStarting,
		draining: make(chan struct{}), opened: make(chan struct{}), ready: make(chan struct{}), hurry: make(chan struct{}),
		connected: make(chan struct{}, 1), known: map[string]*task{}, entering: map[string]*syncBatch{}, perEvent: map[string]int{}, crashed: map[string]int{},
		problems: map[string]string{},
	}
	first, err := newSetup(cfg, baseURL)
	if err != nil {
		return nil, err
	}
	w.setup.Store(first)
	w.ctx, w.cancel = context.WithCancelCause(context.Background())
	w.queue = newScheduler(cfg.Concurrency, w.startTask)
	for event, runner := range first.jobs {
		w.queue.setLimit(event, runner.job.Limit)
	}
	if w.link, err = w.openLink(cfg); err != nil {
		return nil, err
	}
	w.links = []*brokerLink{w.link}
	reserveThreads(cfg.Concurrency + workerThreads)
	w.spawner = startSpawner()
	return w, nil
}

// open opens journal and records, takes up the unfinished tasks and begins to consume. It returns once the broker has
// taken every subscription.
func (w *worker) open(ctx context.Context) error {
	if err := w.openStores(ctx); err != nil {
		return err
	}
	w.changing.Lock()
	w.mu.Lock()
	w.state = stateConsuming
	link := w.link
	w.mu.Unlock()
	w.begin(link)
	w.changing.Unlock()
	close(w.opened)
	freeGarbage() // reading many tasks takes far more than what is kept of them
	select {
	case <-w.ready:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// awaitReady returns when open has, at the latest after patience.
func (w *worker) awaitReady(ctx context.Context, patience time.Duration) {
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-w.ready:
	case <-timer.C:
	case <-ctx.Done():
	}
}

// openStores opens the journal, ends what a dead worker left running and takes up its unfinished tasks. While the journal
// or the records cannot be opened it says why in the health and tries again, until ctx ends.
func (w *worker) openStores(ctx context.Context) error {
	var found []journalTask
	err := w.patiently(ctx, "journal", func() (err error) {
		w.journal, found, err = openJournal(filepath.Join(w.config().DataDir, "journal"))
		return err
	})
	if err != nil {
		return err
	}
	if found := w.journal.stats(); found.TornBytes > 0 || found.DamagedBytes > 0 {
		w.log.Warn("journal was not whole: a last write was interrupted, or the disk is unsound",
			"torn_bytes", found.TornBytes, "damaged_bytes", found.DamagedBytes)
	}
	if err := w.patiently(ctx, "records", w.records.takeOver); err != nil {
		return err
	}
	w.spares = openSpareFiles(w.config().DataDir)
	w.bus.subscribe(w.report)
	w.recover(found)
	return nil
}

// patiently opens something that the disk may not give just now. An error is ctx's end.
func (w *worker) patiently(ctx context.Context, what string, open func() error) error {
	for pause := 100 * time.Millisecond; ; pause = min(2*pause, 5*time.Second) {
		err := open()
		if err == nil {
			w.setProblem(what, "")
			return nil
		}
		w.setProblem(what, codedText(err))
		level := slog.LevelError
		if errors.Is(err, errJournalBusy) {
			level = slog.LevelInfo // the worker before this one is still draining
		}
		w.log.Log(ctx, level, what+" not available yet", errAttrs(err))
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// recover takes up what the journal answers for: stale processes are ended before their tasks run again, and what had
// finished is reported.
func (w *worker) recover(found []journalTask) {
	stale := make([]staleTask, 0, len(found))
	for _, t := range found {
		if t.Outcome == nil {
			stale = append(stale, w.staleTask(t.ID, t.Process))
		}
	}
	if err := endStaleGroups(stale, w.config().KillAfter); err != nil {
		w.log.Error("processes of a dead worker could not be ended", errAttrs(err))
	}
	waiting := 0
	for _, t := range found {
		if t.Outcome == nil && t.Process != (processIdentity{}) {
			w.counts.interrupted.Add(1)
		}
		switch {
		case t.Outcome != nil:
			w.know(&task{id: t.ID, event: t.Event, created: nanos(t.CreatedAt), status: t.Outcome.Status})
			w.bus.publish(*t.Outcome)
		case t.Held:
			// The broker delivers it again, here or elsewhere.
			w.mu.Lock()
			w.crashed[t.ID] = t.Crashes
			w.mu.Unlock()
			w.journalled("release task", t.ID, w.journal.released(t.ID))
		default:
			waiting++
			w.counts.recovered.Add(1)
			recovered := &task{
				id: t.ID, event: t.Event, created: nanos(t.CreatedAt), status: statusQueued,
				attempts: int32(t.Attempts), crashes: int32(t.Crashes), failures: int32(t.Failures),
			}
			w.know(recovered)
			if w.runner(t.Event) == nil {
				w.setProblem("job "+t.Event, fmt.Sprintf("tasks wait for job %q, which is not configured", t.Event))
			}
			w.control(recovered)
			w.enqueueAt(recovered, laterOf(t.Due, crashPause(t.Crashes)))
		}
	}
	if waiting > 0 {
		w.log.Info("unfinished tasks taken up", "count", waiting)
	}
}

func (w *worker) nameOf(event string) string {
	if runner := w.runner(event); runner != nil {
		return runner.job.Name
	}
	return event
}

// enqueueAt lets a task wait for a slot from due on (zero: now).
func (w *worker) enqueueAt(t *task, due time.Time) {
	pause := pauseUntil(due)
	if pause == 0 {
		w.queue.add(t)
		return
	}
	w.tasks.Add(1)
	go func() { // ends when the pause is over, the task is terminated, or the worker stops
		defer w.tasks.Done()
		timer := time.NewTimer(pause)
		defer timer.Stop()
		select {
		case <-timer.C:
			w.queue.add(t)
		case <-w.wokenUp(t):
			w.concludeUnstarted(t)
		case <-w.ctx.Done():
		}
	}()
}

// leavePlace lets another task have the place among the unsettled deliveries of one that has ended for good.
func (w *worker) leavePlace(t *task) {
	w.mu.Lock()
	t.ending = t.delivery != nil
	ending := t.ending
	w.mu.Unlock()
	if ending {
		w.queue.ended(t.event)
	}
}

const (
	// wokenAtOnce is how many consumers are told at once, besides the job's own, that a slot has become free: each may
	// ask its broker, and of very many only one will get the slot. The others are told wakePause later.
	wokenAtOnce = 16
	wakePause   = 50 * time.Millisecond
)

// wakeSome tells consumers that a task of a job has given its slot back: that job's, some others, and soon all.
func (w *worker) wakeSome(event string) {
	var consumers []Consumer
	w.mu.Lock()
	for _, l := range w.links {
		if c := l.consumers[event]; c != nil {
			consumers = append(consumers, c)
		}
		n := 0
		for other, c := range l.consumers { // begins anywhere, so that all have their turn
			if n++; n > wokenAtOnce {
				if !w.wakesAll {
					w.wakesAll = true
					time.AfterFunc(wakePause, w.wakeConsumers)
				}
				break
			}
			if other != event {
				consumers = append(consumers, c)
			}
		}
	}
	w.mu.Unlock()
	for _, c := range consumers {
		c.Wake()
	}
}

// wakeConsumers tells every consumer that a slot has become free.
func (w *worker) wakeConsumers() {
	var consumers []Consumer
	w.mu.Lock()
	w.wakesAll = false
	for _, l := range w.links {
		for _, c := range l.consumers {
			consumers = append(consumers, c)
		}
	}
	w.mu.Unlock()
	for _, c := range consumers {
		c.Wake()
	}
}

// know adds a task that the journal answers for to what is known.
func (w *worker) know(t *task) {
	w.mu.Lock()
	defer w.mu.Unlock()
	t.moveTo(w.link)
	w.known[t.id] = t
	w.perEvent[t.event]++
}

// oneLess notes that a job has lost a task, and reports whether it can be released. w.mu is held.
func (w *worker) oneLess(event string) (released bool) {
	if w.perEvent[event]--; w.perEvent[event] > 0 {
		return false
	}
	delete(w.perEvent, event)
	return w.setup.Load().jobs[event].wasRemoved()
}

// forget drops a task from what is known, and what is kept up for its sake.
func (w *worker) forget(id string) *task {
	w.mu.Lock()
	t := w.known[id]
	delete(w.known, id)
	w.known = shrunk(w.known, &w.mostKnown)
	var uncontrol func()
	released := false
	if t != nil {
		t.moveTo(nil)
		if t.ending {
			w.queue.settled(t.event)
		}
		released = w.oneLess(t.event)
		if t.taskRun != nil && t.adoption != nil {
			t.adoption.Stop() // else the task would be kept for as long as the broker is patient
		}
		uncontrol = t.takeUncontrol()
	}
	w.mu.Unlock()
	if uncontrol != nil {
		w.hush(uncontrol)
	}
	if released {
		w.release(t.event)
	}
	return t
}

// journalled logs a journal entry that could not be written and whose loss costs no more than a repetition.
func (w *worker) journalled(op, id string, err error) {
	if err != nil {
		w.log.Error(op, errAttrs(err), "task_id", id)
	}
}

// makesProgress returns once it has got hold of what everything that a task goes through needs: never, if that is stuck.
func (w *worker) makesProgress() {
	w.currentLink().follower.busy()
	w.queue.limit("")
	w.bus.subscribe(func(event) {})()
}
