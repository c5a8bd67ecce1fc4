package main

// events.go is the typed event bus: worker and brokers publish what happens to tasks, and the reporter, the records,
// the log and the readers of /events subscribe. It knows nothing of its subscribers. Calls are direct and in order, so
// a subscriber that must not lose anything may block, and that is how a slow broker slows the command whose output it
// carries; every other subscriber must return at once.

import (
	"sync"
	"time"
)

// A taskStatus is where a task stands. The last four are final and are what {task_id}_finish says.
type taskStatus string

const (
	statusQueued    taskStatus = "queued"
	statusRunning   taskStatus = "running"
	statusFinish    taskStatus = "finish"
	statusError     taskStatus = "error"
	statusTimeout   taskStatus = "timeout"
	statusTerminate taskStatus = "terminate"
)

// final reports whether a task in this status has ended for good.
func (s taskStatus) final() bool {
	return s == statusFinish || s == statusError || s == statusTimeout || s == statusTerminate
}

// An event is one of the types below.
type event interface{ eventName() string }

// A taskQueued event is published when a task has been accepted, or waits again for its next attempt.
type taskQueued struct {
	TaskID string    `json:"task_id"`
	Event  string    `json:"event"`
	Name   string    `json:"name"`
	At     time.Time `json:"at"`
}

// A taskTaken event is published when this worker has begun with a task and the disk is sure of it, before anything else
// that is heard of it outside.
type taskTaken struct {
	TaskID string    `json:"task_id"`
	Event  string    `json:"event"`
	At     time.Time `json:"at"`
}

// A taskStarted event is published when a task's command runs. Attempt counts from 1.
type taskStarted struct {
	TaskID    string    `json:"task_id"`
	Event     string    `json:"event"`
	Name      string    `json:"name"`
	PID       int       `json:"pid"`
	Attempt   int       `json:"attempt"`
	CreatedAt time.Time `json:"created_at"`
	At        time.Time `json:"at"`
}

// A taskOutput event carries a piece of a task's output, whole UTF-8 characters wherever the output is UTF-8, at most
// outputChunkBytes. Data must not be kept or changed once the subscriber has returned.
type taskOutput struct {
	TaskID string       `json:"task_id"`
	Stream outputStream `json:"stream"`
	Data   []byte       `json:"-"`
}

// An outputStream tells a command's two outputs apart.
type outputStream string

const (
	streamStdout outputStream = "stdout"
	streamStderr outputStream = "stderr"

	// outputChunkBytes bounds one piece of output (PROTOCOL section 4, {task_id}_process).
	outputChunkBytes = 32 << 10
)

// A taskRetrying event is published when a run has failed and another will follow at Due.
type taskRetrying struct {
	TaskID  string    `json:"task_id"`
	Event   string    `json:"event"`
	Attempt int       `json:"attempt"`
	Reason  string    `json:"reason"`
	Due     time.Time `json:"due"`
}

// A taskNotified event is a progress message that a job script sent.
type taskNotified struct {
	TaskID string    `json:"task_id"`
	Msg    string    `json:"msg"`
	At     time.Time `json:"created_at"`
}

// A taskFinished event is published when a task has ended for good and the journal says so.
type taskFinished struct {
	TaskID     string     `json:"task_id"`
	Event      string     `json:"event"`
	Name       string     `json:"name"`
	Status     taskStatus `json:"status"`
	Attempt    int        `json:"attempt"`
	ExitCode   *int       `json:"exit_code"` // nil when it did not exit by itself
	Signal     string     `json:"signal"`
	PID        int        `json:"pid"`
	CreatedAt  time.Time  `json:"created_at"`
	StartedAt  time.Time  `json:"started_at"` // zero when it never started
	FinishedAt time.Time  `json:"finished_at"`
	CPU        time.Duration
	MaxRSS     int64   `json:"max_rss"`        // bytes
	Error      string  `json:"error"`          // why it is not finish; for {task_id}_failed
	Code       errCode `json:"code,omitempty"` // of Error, where it is job_item's own
}

// A brokerChanged event is published when the connection to the broker comes or goes.
type brokerChanged struct {
	Type      string    `json:"type"`
	Connected bool      `json:"connected"`
	Err       string    `json:"err,omitempty"`
	Code      errCode   `json:"code,omitempty"`
	At        time.Time `json:"at"`
}

func (taskQueued) eventName() string    { return "task_queued" }
func (taskTaken) eventName() string     { return "task_taken" }
func (taskStarted) eventName() string   { return "task_started" }
func (taskOutput) eventName() string    { return "task_output" }
func (taskRetrying) eventName() string  { return "task_retrying" }
func (taskNotified) eventName() string  { return "task_notified" }
func (taskFinished) eventName() string  { return "task_finished" }
func (brokerChanged) eventName() string { return "broker_changed" }

// An eventBus hands every event to every subscriber, in the order of subscription. The zero value is ready.
type eventBus struct {
	mu          sync.RWMutex // guards subscribers
	subscribers []*subscriber
}

type subscriber struct{ handle func(event) }

// subscribe adds a subscriber until the returned function is called. handle may be called concurrently: events of one
// task come in order, those of different tasks do not wait for each other.
func (b *eventBus) subscribe(handle func(event)) (unsubscribe func()) {
	added := &subscriber{handle}
	b.mu.Lock()
	defer b.mu.Unlock()
	// A copy, since publish reads the old slice without the lock.
	b.subscribers = append(append([]*subscriber(nil), b.subscribers...), added)
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		rest := make([]*subscriber, 0, len(b.subscribers))
		for _, s := range b.subscribers {
			if s != added {
				rest = append(rest, s)
			}
		}
		b.subscribers = rest
	}
}

// publish returns when every subscriber has taken the event.
func (b *eventBus) publish(e event) {
	b.mu.RLock()
	subscribers := b.subscribers
	b.mu.RUnlock()
	for _, s := range subscribers {
		s.handle(e)
	}
}
