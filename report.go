package main

// report.go tells the outside what becomes of the tasks: it turns events into messages on their subjects (PROTOCOL
// section 4) and sends them one after another, in the order in which they occurred, across outages of the broker. It
// knows nothing of commands.

import (
	"context"
	"encoding/json"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"
)

const (
	// maxUnsentBytes bounds the output that waits to be sent. Beyond it a command that prints is slowed down.
	maxUnsentBytes = 4 << 20

	// takenPause is how long word that a task is taken waits for what else there is to say: of a short task all goes at once.
	takenPause = 3 * time.Millisecond

	maxBatch       = 64 // messages sent before the broker is asked whether it has them
	minReportPause = 100 * time.Millisecond
	maxReportPause = 5 * time.Second
)

// A reporter is a subscriber of the event bus with one sender.
type reporter struct {
	broker Broker
	back   <-chan struct{} // has a value when the broker is connected again
	hostID string
	log    *slog.Logger

	// settled is called when a task's _finish has been taken by the broker. It may take its time: what is sent next does
	// not wait for it.
	settled  func(taskID string)
	settling sync.WaitGroup // calls of settled; close and handOver wait for them

	mu     sync.Mutex // guards what follows
	room   sync.Cond  // unsent bytes have become fewer
	unsent []outgoing
	ripe   bool // something of it is to be sent now, and not only with more
	timed  bool // soon will make it so
	bytes  int
	count  int // messages, those that are being sent among them
	closed bool
	heir   *reporter // sends what comes from now on; nil: this one does

	soon *time.Timer
	wake chan struct{} // something is to be sent
	done chan struct{} // closed when the sender has ended
	quit context.CancelFunc
}

// An outgoing message waits to be sent; the last one of a task settles it.
type outgoing struct {
	Message
	settles string // task id, or ""
}

func newReporter(broker Broker, back <-chan struct{}, hostID string, log *slog.Logger, settled func(taskID string)) *reporter {
	ctx, quit := context.WithCancel(context.Background())
	r := &reporter{
		broker: broker, back: back, hostID: hostID, log: log, settled: settled,
		wake: make(chan struct{}, 1), done: make(chan struct{}), quit: quit,
	}
	r.room.L = &r.mu
	r.soon = time.AfterFunc(time.Hour, r.ripen)
	r.soon.Stop()
	go r.send(ctx) // ends on close
	return r
}

// handle subscribes to the event bus. It blocks while too much output is unsent.
func (r *reporter) handle(e event) {
	switch e := e.(type) {
	case taskTaken:
		r.enqueueSoon(e.TaskID+"_who", []byte(r.hostID))
	case taskOutput:
		r.mu.Lock()
		for r.bytes > maxUnsentBytes && !r.closed && r.heir == nil {
			r.room.Wait()
		}
		r.mu.Unlock()
		r.enqueue(e.TaskID+"_process", append([]byte(nil), e.Data...), "")
	case taskNotified:
		data, err := json.Marshal(map[string]string{
			"msg": e.Msg, "created_at": e.At.Format(time.RFC3339Nano), "status": "process",
		})
		if err == nil { // strings always marshal
			r.enqueue(e.TaskID+".notif_add", data, "")
		}
	case taskFinished:
		if e.Status != statusFinish {
			r.enqueue(e.TaskID+"_failed", []byte(e.Error), "")
		}
		r.enqueue(e.TaskID+"_finish", []byte(e.Status), e.TaskID)
	}
}

// enqueue lets a message be sent; settles is the task that it settles, if any.
func (r *reporter) enqueue(subject string, data []byte, settles string) {
	r.mu.Lock()
	if heir := r.heir; heir != nil {
		r.mu.Unlock()
		heir.enqueue(subject, data, settles)
		return
	}
	r.put(outgoing{Message{Subject: subject, Data: data}, settles})
	r.ripe = true
	r.mu.Unlock()
	r.wakeUp()
}

// enqueueSoon lets a message be sent with the next one, or after takenPause.
func (r *reporter) enqueueSoon(subject string, data []byte) {
	r.mu.Lock()
	if heir := r.heir; heir != nil {
		r.mu.Unlock()
		heir.enqueueSoon(subject, data)
		return
	}
	r.put(outgoing{Message: Message{Subject: subject, Data: data}})
	if !r.timed {
		r.timed = true
		r.soon.Reset(takenPause)
	}
	r.mu.Unlock()
}

// put needs mu.
func (r *reporter) put(m outgoing) {
	r.unsent = append(r.unsent, m)
	r.bytes += len(m.Data)
	r.count++
}

// ripen has what waits sent now.
func (r *reporter) ripen() {
	r.mu.Lock()
	r.timed = false
	r.ripe = r.ripe || len(r.unsent) > 0
	ripe := r.ripe
	r.mu.Unlock()
	if ripe {
		r.wakeUp()
	}
}

func (r *reporter) wakeUp() {
	select {
	case r.wake <- struct{}{}:
	default: // it is awake
	}
}

// send is the sender: it takes what is unsent, a batch at a time, and sends it in order until the broker has it.
func (r *reporter) send(ctx context.Context) {
	defer close(r.done)
	for {
		r.mu.Lock()
		batch := r.unsent
		r.unsent, r.ripe = nil, false
		ended := r.closed
		r.mu.Unlock()
		for len(batch) > 0 {
			next := batch[:min(len(batch), maxBatch)]
			sent := r.deliver(ctx, next)
			batch = batch[sent:]
			if sent < len(next) {
				r.mu.Lock()
				r.unsent = append(batch, r.unsent...)
				r.mu.Unlock()
				return
			}
		}
		if r.idle() {
			if ended {
				return
			}
			select {
			case <-r.wake:
			case <-ctx.Done():
				return
			}
		}
	}
}

func (r *reporter) idle() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return !r.ripe && (!r.closed || len(r.unsent) == 0)
}

// deliver sends a batch, what has not arrived again and again with jittered pauses of up to 5 s. It returns how many
// have arrived: fewer than all only when ctx ended before.
func (r *reporter) deliver(ctx context.Context, batch []outgoing) (arrived int) {
	pause := minReportPause
	for {
		messages := make([]Message, len(batch))
		for i, m := range batch {
			messages[i] = m.Message
		}
		sent, err := r.broker.Publish(ctx, messages...)
		r.arrived(batch[:sent])
		arrived += sent
		if batch = batch[sent:]; len(batch) == 0 {
			return arrived
		}
		if sent > 0 {
			pause = minReportPause
		}
		r.log.Debug("event not sent yet", errAttrs(err), "subject", batch[0].Subject)
		select {
		case <-time.After(pause/2 + rand.N(pause/2)):
			pause = min(2*pause, maxReportPause)
		case <-r.back:
			pause = minReportPause
		case <-ctx.Done():
			return arrived
		}
	}
}

// arrived has the tasks settled whose last message the broker has, all at once, and makes room for more output.
func (r *reporter) arrived(sent []outgoing) {
	bytes := 0
	for _, m := range sent {
		bytes += len(m.Data)
		if m.settles != "" {
			r.settling.Add(1)
			go func() { // ends when the delivery is acknowledged, or is known not to be
				defer r.settling.Done()
				r.settled(m.settles)
			}()
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.bytes -= bytes
	r.count -= len(sent)
	r.room.Broadcast()
}

// backlog is what waits to be sent, and what is being sent.
func (r *reporter) backlog() (messages, bytes int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.count, r.bytes
}

// handOver lets another reporter send what is unsent here, and all that comes from now on.
func (r *reporter) handOver(heir *reporter) {
	r.quit()
	r.wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, m := range r.unsent {
		heir.enqueue(m.Subject, m.Data, m.settles)
	}
	r.unsent, r.bytes, r.count, r.heir = nil, 0, 0, heir
	r.room.Broadcast()
}

// close sends what is unsent until ctx ends. What is left then is reported after the next start, from the journal.
func (r *reporter) close(ctx context.Context) {
	r.mu.Lock()
	r.closed = true
	r.room.Broadcast()
	r.mu.Unlock()
	r.wakeUp()
	select {
	case <-r.done:
	case <-ctx.Done():
	}
	r.quit()
	r.wait()
}

// wait returns when nothing is sent any more, and what was sent is settled.
func (r *reporter) wait() {
	<-r.done
	r.soon.Stop()
	r.settling.Wait() // only the sender adds to it
}
