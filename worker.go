package main

// worker.go is the worker proper: deliveries in, tasks accepted into the journal, slots given, and everything put back
// or settled at the end. What happens to one task between slot and status is in task.go. It does not know which broker
// it talks to, and nothing of HTTP.

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

// maxPutBacks is how many deliveries are put up with for each crash that a task may cause: a broker counts deliveries,
// also those that were put back unharmed when a worker stopped.
const maxPutBacks = 4

// takeBackPause lies between two looks at a task that is being taken back.
const takeBackPause = 10 * time.Millisecond

// settleTimeout bounds how long one delivery may take to be acknowledged, and the last reports of a stopping worker.
const settleTimeout = 5 * time.Second

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
	controlled int                   // of them, those whose control subjects are listened on
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

// take checks a delivery and accepts the task, where need be after another worker has been looked for that has it.
func (w *worker) take(l *brokerLink, event string, d Delivery) {
	m, err := parseTaskMessage(d.Data)
	if err != nil {
		w.counts.refused.Add(1)
		w.log.Warn("message refused", errAttrs(err), "subject", d.Subject)
		w.ack(d)
		return
	}
	if !w.mayBeHeld(d, m.TaskID) {
		w.accept(l, event, d, m)
		return
	}
	w.mu.Lock()
	l.tasks++ // link and job stay meanwhile
	w.perEvent[event]++
	w.mu.Unlock()
	w.queue.lookBegan(event)
	w.looking.Add(1)
	go w.takeIfUnheld(l, event, d, m) // ends when the task is accepted, left or put back, at the latest when drain begins
}

// accept is where a delivery becomes a task: it is told from what is known already, and journalled. What cannot be
// journalled is put back.
func (w *worker) accept(l *brokerLink, event string, d Delivery, m taskMessage) {
	t := &task{id: m.TaskID, event: event, created: time.Now().UnixNano(), status: statusQueued}
	if d.Held {
		t.delivery = &d
		t.attempts = int32(max(0, d.Attempt-1))
	}

	w.mu.Lock()
	if d.Held {
		t.crashes = int32(w.crashed[t.id])
		if int(t.attempts) >= maxPutBacks*w.config().MaxDeliveries {
			t.crashes = t.attempts // they were other workers' crashes, at least some of them
		}
	}
	if same := w.known[t.id]; same != nil {
		w.counts.duplicates.Add(1)
		// A broker that lost the connection delivers again what it held; the new delivery is the one to settle.
		if d.Held && same.delivery != nil && !same.status.final() {
			same.delivery = &d
			moved := same.link != l
			same.moveTo(l)
			w.mu.Unlock()
			if moved {
				w.control(same)
			}
			w.log.Info("task was delivered again while it is being done", "task_id", t.id)
			return
		}
		w.mu.Unlock()
		w.log.Info("duplicate of a task that is being done", "task_id", t.id)
		w.noteSettled(same, w.ack(d))
		return
	}
	if status, ended := w.journal.outcome(t.id); ended {
		w.mu.Unlock()
		w.counts.duplicates.Add(1)
		w.log.Info("duplicate of a finished task, reported again", "task_id", t.id, "status", status)
		l.reporter.enqueue(t.id+"_finish", []byte(status), "")
		w.ack(d)
		return
	}
	delete(w.crashed, t.id)
	t.moveTo(l)
	w.known[t.id] = t // before it is journalled, so that a duplicate meanwhile is seen
	w.perEvent[event]++
	w.mu.Unlock()

	durable, err := w.journal.enter(journalTask{
		ID: t.id, Subject: d.Subject, Event: event, Held: d.Held, CreatedAt: t.createdAt(),
		Attempts: int(t.attempts), Crashes: int(t.crashes),
	}, m.Data)
	if err != nil {
		w.forget(t.id)
		w.counts.unaccepted.Add(1)
		w.log.Error("task not accepted", errAttrs(err), "task_id", t.id)
		if d.Nack != nil {
			d.Nack(err)
		}
		return
	}
	w.mu.Lock()
	t.accepted = true
	if durable != nil {
		w.entering[t.id] = durable
	}
	if d.Held && d.HeldFor > 0 {
		t.begun()
		t.adoption = time.AfterFunc(d.HeldFor, func() { w.adopt(t) })
	}
	w.mu.Unlock()
	for _, other := range w.openLinks() {
		other.follower.drop(t.id) // it is right here
	}
	w.control(t)
	w.bus.publish(taskQueued{TaskID: t.id, Event: event, Name: w.nameOf(event), At: t.createdAt()})
	w.queue.add(t)
	// It may begin while the disk makes sure of it; whoever created it is told afterwards.
	err = durable.wait()
	w.mu.Lock()
	delete(w.entering, t.id)
	w.mu.Unlock()
	if err == nil {
		_ = w.assure(t) // tells that it has begun, where it has
	} else if !w.takeBack(t, err) {
		if d.Nack != nil {
			d.Nack(err)
		}
		return
	}
	if !d.Held && d.Ack != nil {
		w.ack(d) // the journal answers from here on
	}
}

// announce tells once that this worker has begun with a task. Whoever hears that counts on it, so it is for when the disk
// is sure of it.
func (w *worker) announce(t *task) {
	t.announced.Do(func() { w.bus.publish(taskTaken{TaskID: t.id, Event: t.event, At: time.Now()}) })
}

// assure returns when more of a task may be told: the disk is sure of it, and its beginning, if it has begun, was told. An
// error is that the disk could not be: then nothing is told of it.
func (w *worker) assure(t *task) error {
	w.mu.Lock()
	durable, taken := w.entering[t.id], t.taskRun != nil && t.taken
	w.mu.Unlock()
	if err := durable.wait(); err != nil {
		return err
	}
	if taken {
		w.announce(t)
	}
	return nil
}

// takeBack ends a task that the journal could not accept after all. It returns true if it has run to its end already:
// then its end counts.
func (w *worker) takeBack(t *task, reason error) (ended bool) {
	w.counts.unaccepted.Add(1)
	w.log.Error("task not accepted", errAttrs(reason), "task_id", t.id)
	for !w.queue.remove(t) {
		w.mu.Lock()
		ended, gone := t.status.final(), w.known[t.id] != t
		w.mu.Unlock()
		if ended || gone || w.ctx.Err() != nil { // a worker that stops ends it by itself
			return ended
		}
		w.stopTask(t, errUnaccepted)
		time.Sleep(takeBackPause) // the disk is failing, and its command is being stopped
	}
	w.dropUnaccepted(t)
	return false
}

// dropUnaccepted forgets a task as if it had never been there.
func (w *worker) dropUnaccepted(t *task) {
	w.records.release(t.id)
	w.forget(t.id)
}

// adopt makes the journal answer for a task before its broker's patience ends, and acknowledges it.
func (w *worker) adopt(t *task) {
	w.mu.Lock()
	adopting := w.known[t.id] == t && t.delivery != nil && !t.status.final() && w.ctx.Err() == nil
	w.mu.Unlock()
	if !adopting {
		return
	}
	if err := w.journal.adopt(t.id); err != nil {
		w.log.Error("task not taken over from the broker", errAttrs(err), "task_id", t.id)
		return
	}
	w.mu.Lock()
	d := t.delivery
	t.delivery = nil
	w.mu.Unlock()
	if d != nil {
		w.noteSettled(t, w.ack(*d))
		w.log.Info("the journal answers for a long task now", "task_id", t.id)
	}
}

// noteSettled notes whether the broker knows (nil) that the journal answers for a task in its stead.
func (w *worker) noteSettled(t *task, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	t.unsettled = err != nil
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
		uncontrol()
	}
	if released {
		w.release(t.event)
	}
	return t
}

// settle ends the story of a task whose _finish has arrived.
func (w *worker) settle(id string) {
	w.mu.Lock()
	t := w.known[id]
	var d *Delivery
	unsettled := false
	if t != nil {
		d, unsettled = t.delivery, t.unsettled
	}
	w.mu.Unlock()
	if d != nil {
		unsettled = w.ack(*d) != nil
	}
	if unsettled {
		w.linger(t)
	}
	// Last, since it ends the listening: whoever is given the task again finds either that or the task settled.
	w.forget(id)
	w.journalled("note task as reported", id, w.journal.reported(id))
}

// ack settles a delivery with its broker. A failure is the broker's to mend: it delivers again, and the journal knows.
func (w *worker) ack(d Delivery) error {
	if d.Ack == nil {
		return nil
	}
	// Not under the tasks' context: a draining worker still settles what has ended.
	ctx, stop := context.WithTimeout(context.WithoutCancel(w.ctx), settleTimeout)
	defer stop()
	err := d.Ack(ctx)
	if err != nil {
		w.log.Warn("delivery not acknowledged", errAttrs(err), "subject", d.Subject)
	}
	return err
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
