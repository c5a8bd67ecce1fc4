package main

// follow.go follows the tasks that were created through this worker's REST API and may run anywhere: what the worker
// that takes one publishes about it goes into the records here, so that its record, its log and `create --wait` work.

import (
	"context"
	"slices"
	"sync"
	"time"
)

const (
	maxFollowed = 10_000 // tasks at once; of more the oldest is given up

	// followLimit is how long the creation of a task waits for the broker to listen for what becomes of it.
	followLimit = 2 * time.Second

	// lastOutputPause is what a task's last output may come later than its _finish: they are different subjects, and
	// only within one does a broker promise order.
	lastOutputPause = 150 * time.Millisecond
)

// A follower holds the tasks of other workers that are of interest here.
type follower struct {
	broker  Broker
	records *records

	mu    sync.Mutex // guards what follows
	tasks map[string]*followedTask
	order []string // by age; may name tasks that are gone
}

// A followedTask is what is known of one of them.
type followedTask struct {
	id, event, name string
	createdAt       time.Time

	mu      sync.Mutex // guards what follows; events come from several subscriptions
	begun   bool
	started time.Time
	failed  string
	ended   bool

	listening []Subscription // guarded by the follower's mu
}

func newFollower(broker Broker, recs *records) *follower {
	return &follower{broker: broker, records: recs, tasks: map[string]*followedTask{}}
}

// follow begins to follow a task; it comes before the task is published, and so does awaitReady for what it listens on.
func (f *follower) follow(id, event, name string) (listening []Subscription) {
	return f.add(&followedTask{id: id, event: event, name: name, createdAt: time.Now()})
}

// awaitReady returns when nothing that is published from now on will be missed, or when ctx or followLimit is over: a task
// is worth more than its story.
func awaitReady(ctx context.Context, listening []Subscription) {
	limit := time.NewTimer(followLimit)
	defer limit.Stop()
	for _, s := range listening {
		if s.Ready == nil {
			continue
		}
		select {
		case <-s.Ready:
		case <-limit.C:
			return
		case <-ctx.Done():
			return
		}
	}
}

// add listens for what becomes of a task.
func (f *follower) add(t *followedTask) (listening []Subscription) {
	id := t.id
	on := func(suffix string, handle func(data []byte)) {
		listening = append(listening, f.broker.Subscribe(id+suffix, handle))
	}
	on("_who", func([]byte) { f.began(t) })
	on("_process", func(data []byte) {
		f.began(t)
		for piece := range slices.Chunk(data, outputChunkBytes) {
			f.records.handle(taskOutput{TaskID: id, Stream: streamStdout, Data: piece})
		}
	})
	on("_failed", func(data []byte) {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.failed = string(data[:min(len(data), stderrTailBytes)])
	})
	on("_finish", func(data []byte) {
		status := taskStatus(data)
		time.AfterFunc(lastOutputPause, func() { f.finished(t, status) })
	})

	f.mu.Lock()
	t.listening = listening
	f.tasks[id] = t
	f.order = append(f.order, id)
	var oldest string
	if len(f.tasks) > maxFollowed {
		oldest, f.order = f.order[0], f.order[1:]
	}
	f.mu.Unlock()
	f.drop(oldest)
	return listening
}

// drop stops following a task: it has ended, was never sent, or runs right here.
func (f *follower) drop(id string) { f.leave(id) }

// leave is drop, and gives the task.
func (f *follower) leave(id string) *followedTask {
	f.mu.Lock()
	t := f.tasks[id]
	var listening []Subscription
	if t != nil {
		listening = t.listening
	}
	delete(f.tasks, id)
	f.order = slices.DeleteFunc(f.order, func(other string) bool { return other == id })
	f.mu.Unlock()
	for _, s := range listening {
		s.Stop()
	}
	return t
}

// handOver lets another follower follow the tasks, since this one's connection is lost.
func (f *follower) handOver(heir *follower) {
	f.mu.Lock()
	order := slices.Clone(f.order)
	f.mu.Unlock()
	for _, id := range order {
		if t := f.leave(id); t != nil {
			heir.add(t)
		}
	}
}

// began notes the first sign of life of a task.
func (f *follower) began(t *followedTask) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.begun || t.ended {
		return
	}
	t.begun, t.started = true, time.Now()
	f.records.handle(taskStarted{
		TaskID: t.id, Event: t.event, Name: t.name, Attempt: 1, CreatedAt: t.createdAt, At: t.started,
	})
}

func (f *follower) finished(t *followedTask, status taskStatus) {
	if !status.final() {
		return
	}
	f.began(t)
	f.end(t, status)
	f.drop(t.id) // without t.mu: who holds f.mu may wait for it
}

// end notes the end of a task, once.
func (f *follower) end(t *followedTask, status taskStatus) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ended {
		return
	}
	t.ended = true
	f.records.handle(taskFinished{
		TaskID: t.id, Event: t.event, Name: t.name, Status: status, Attempt: 1, Error: t.failed,
		CreatedAt: t.createdAt, StartedAt: t.started, FinishedAt: time.Now(),
	})
}

// waiting gives the followed tasks that nobody has taken yet, as records.
func (f *follower) waiting() []record {
	f.mu.Lock()
	defer f.mu.Unlock()
	var found []record
	for _, t := range f.tasks {
		if r, ok := t.record(); ok {
			found = append(found, r)
		}
	}
	return found
}

// record describes a followed task that nobody has taken yet.
func (f *follower) record(id string) (record, bool) {
	f.mu.Lock()
	t := f.tasks[id]
	f.mu.Unlock()
	if t == nil {
		return record{}, false
	}
	return t.record()
}

func (t *followedTask) record() (record, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.begun {
		return record{}, false // the records have it
	}
	return record{TaskID: t.id, Event: t.event, Name: t.name, Status: statusQueued, CreatedAt: &t.createdAt}, true
}

// follows reports whether a task is followed.
func (f *follower) follows(id string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.tasks[id] != nil
}

// busy reports whether any task is followed.
func (f *follower) busy() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.tasks) > 0
}
