package main

// broker_nats_queue.go is the tasks of plain NATS from their arrival until the worker has accepted them. NATS has
// forgotten what it sent, so what the worker cannot accept just now, because its disk is full or read-only, waits here
// and is offered to the other workers of the group as well.

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
)

const (
	// natsHandlesAtOnce bounds the deliveries that are being accepted at once: enough for the journal to write many in
	// one go.
	natsHandlesAtOnce = 64

	// natsMaxWaiting bounds, in bytes, the tasks of one plain subject that have arrived and are not accepted yet.
	natsMaxWaiting = 64 << 20

	// natsMessageBytes is what a waiting message takes besides its data.
	natsMessageBytes = 512

	// natsQueuePause is how long the worker is left alone after it has refused a task.
	natsQueuePause = time.Second

	// natsOffersAtOnce bounds how many refused tasks are offered to the others after each pause.
	natsOffersAtOnce = 64
)

// A natsQueue is this worker's share of a plain subject. A command's slot is no matter of this consumer.
type natsQueue struct {
	broker       *natsBroker
	subscription *natsSubscription
	handle       func(Delivery)
	ready        chan struct{}
	stopping     chan struct{} // closed by Stop, when the group has been left
	stopOnce     sync.Once

	mu       sync.Mutex // guards what follows
	idle     sync.Cond  // running has become 0
	waiting  []*nats.Msg
	bytes    int  // of what waits
	running  int  // goroutines that call handle
	refusing bool // the worker has refused the last task; one goroutine tries again
	dropped  int
}

// arrived lets a task wait for handle.
func (q *natsQueue) arrived(m *nats.Msg) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.bytes+len(m.Data)+natsMessageBytes > natsMaxWaiting {
		q.dropped++
		if q.dropped&(q.dropped-1) == 0 { // 1, 2, 4, … so that a flood is not logged line by line
			q.broker.log.Error("tasks lost", "subject", m.Subject, "lost", q.dropped, errAttrs(lostOnNATS(m.Subject,
				fmt.Errorf("%d MiB of tasks wait for the journal already", natsMaxWaiting>>20))))
		}
		return
	}
	q.put(m)
	q.employ()
}

// employ lets as many goroutines hand tasks out as there is work for. It needs mu.
func (q *natsQueue) employ() {
	for q.running < min(natsHandlesAtOnce, len(q.waiting)) && !(q.refusing && q.running > 0) {
		q.running++
		q.broker.tasks.Add(1)
		go q.work() // ends when nothing waits; Stop and Close wait for it
	}
}

func (q *natsQueue) work() {
	defer q.broker.tasks.Done()
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.waiting) > 0 {
		m := q.take()
		q.mu.Unlock()
		reason := q.hand(m)
		q.mu.Lock()
		if reason == nil {
			q.refusing = false
			q.employ()
			continue
		}
		if q.isStopping() {
			q.mu.Unlock()
			q.leaveToOthers(m, reason)
			q.mu.Lock()
			continue
		}
		q.put(m)
		if q.refusing && q.running > 1 {
			break // another one tries again
		}
		q.refusing = true
		q.mu.Unlock()
		select {
		case <-time.After(natsQueuePause):
			q.offer()
		case <-q.stopping:
		case <-q.broker.ctx.Done():
		}
		q.mu.Lock()
	}
	if len(q.waiting) == 0 {
		q.waiting, q.refusing = nil, false
	}
	if q.running--; q.running == 0 {
		q.idle.Broadcast()
	}
}

// put lets a task wait. It needs mu.
func (q *natsQueue) put(m *nats.Msg) {
	q.waiting = append(q.waiting, m)
	q.bytes += len(m.Data) + natsMessageBytes
}

// take takes the first task off the waiting ones. It needs mu.
func (q *natsQueue) take() *nats.Msg {
	m := q.waiting[0]
	q.waiting[0] = nil
	q.waiting = q.waiting[1:]
	q.bytes -= len(m.Data) + natsMessageBytes
	return m
}

// hand gives a task to the worker, and says why that refused it.
func (q *natsQueue) hand(m *nats.Msg) (refused error) {
	q.handle(Delivery{Subject: m.Subject, Data: m.Data, Nack: func(reason error) {
		if refused = reason; refused == nil {
			refused = errors.New("refused")
		}
	}})
	return refused
}

// offer gives some of the tasks that this worker refuses back to the group: the server hands each to any member. This
// worker stays one of them, since it may be the only one, and then has them back.
func (q *natsQueue) offer() {
	q.mu.Lock()
	var offered []*nats.Msg
	for len(q.waiting) > 1 && len(offered) < natsOffersAtOnce { // one is for the next try here
		offered = append(offered, q.take())
	}
	q.mu.Unlock()
	for i, m := range offered {
		if q.publish(m) != nil {
			q.mu.Lock()
			for _, m := range offered[i:] {
				q.put(m)
			}
			q.mu.Unlock()
			return
		}
	}
}

// leaveToOthers gives the group a task that this worker can neither accept nor keep.
func (q *natsQueue) leaveToOthers(m *nats.Msg, reason error) {
	if err := q.publish(m); err != nil {
		q.broker.log.Error("task lost", "subject", m.Subject, errAttrs(lostOnNATS(m.Subject, errors.Join(reason, err))))
		return
	}
	q.broker.log.Info("task not accepted, left to another worker", "subject", m.Subject)
}

// publish sends a task once more. An error says that nobody has it.
func (q *natsQueue) publish(m *nats.Msg) error {
	_, err := q.broker.Publish(q.broker.ctx, Message{Subject: m.Subject, Data: m.Data, Task: true})
	return err
}

func lostOnNATS(subject string, err error) error {
	return fail(codeNATSTaskLost, fmt.Sprintf("accept task from %q", subject), err)
}

func (q *natsQueue) isStopping() bool {
	select {
	case <-q.stopping:
		return true
	case <-q.broker.ctx.Done():
		return true
	default:
		return false
	}
}

// Wake has no meaning here: the journal has room when no slot is free.
func (q *natsQueue) Ready() <-chan struct{} { return q.ready }

func (q *natsQueue) Wake() {}

// Stop leaves the group, lets what the server has sent meanwhile arrive, and hands it out; what the worker refuses is
// left to the others.
func (q *natsQueue) Stop() {
	b := q.broker
	b.mu.Lock()
	delete(b.subscriptions, q.subscription)
	l := b.link
	b.mu.Unlock()
	if l != nil {
		l.drain(natsDrainLimit, q.subscription)
	}
	q.stopOnce.Do(func() { close(q.stopping) })
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.running > 0 {
		q.idle.Wait()
	}
}
