package main

// broker_rabbitmq_consume.go takes tasks from a durable queue, no more than the worker has free slots for, and settles
// them on the channel they came by: a delivery tag means nothing on any other.

import (
	"context"
	"crypto/sha256"
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

const (
	// rabbitFullPause is how long the slots must have been taken by other jobs before a subscription ends for that: two
	// round trips for every short task would cost more than a task too many.
	rabbitFullPause = 100 * time.Millisecond

	// rabbitAckPause is how long a subscription that is used up may wait for acknowledgements to open it again, while
	// nothing waits in the queue, before it is replaced.
	rabbitAckPause = 20 * time.Millisecond

	// rabbitManyFree slots are worth a subscription, which takes three round trips, rather than one round trip for each
	// message: under load the messages then come together, and so do what is written and told of them.
	rabbitManyFree = 4

	// rabbitFewConsumers may all look at the slots whenever one has a task more or less.
	rabbitFewConsumers = 16

	// rabbitIdlePause is how often a consumer looks for free slots when nobody wakes it.
	rabbitIdlePause = time.Second
)

// A rabbitConsumer consumes one queue, over any number of channels, one after another.
type rabbitConsumer struct {
	broker *rabbitBroker
	queue  rabbitQueue
	slots  Slots
	handle func(Delivery)

	ready    chan struct{} // closed once the queue has been seen
	wake     chan struct{}
	freed    atomic.Bool   // a slot may have become free since it was looked at last
	stopping chan struct{} // closed by Stop
	stopOnce sync.Once
	quiet    chan struct{}  // closed when handle is not called any more
	handling sync.WaitGroup // calls of handle
	inHandle atomic.Int32   // their number: Slots.Free does not count them yet

	warned    bool
	noGet     bool // the broker gives no single messages of such a queue, or would delete it without a consumer
	complaint rabbitComplaint

	refusals atomic.Int32 // in a row, by handle
	resumeAt atomic.Int64 // Unix nanoseconds; after a refusal nothing is taken before

	staleMu sync.Mutex // guards what follows
	stale   map[rabbitMessage]struct{}
}

// A rabbitMessage is the same for every delivery of a message, by its body's sum: nothing else of it need be its own.
type rabbitMessage [sha256.Size]byte

// outlive notes a delivery that is unsettled at the end of its channel. The broker delivers the message again, and this
// worker is the one that should have it, although its task still takes a slot: it is room for one more.
func (c *rabbitConsumer) outlive(m rabbitMessage) {
	c.staleMu.Lock()
	defer c.staleMu.Unlock()
	c.stale[m] = struct{}{}
}

// back notes that a message is here again, or that its task has ended.
func (c *rabbitConsumer) back(m rabbitMessage) {
	c.staleMu.Lock()
	defer c.staleMu.Unlock()
	delete(c.stale, m)
}

// awaited is how many messages are to come back.
func (c *rabbitConsumer) awaited() int {
	c.staleMu.Lock()
	defer c.staleMu.Unlock()
	return len(c.stale)
}

// Consume takes tasks from the durable queue of the subject, which it declares and binds where that is missing.
func (b *rabbitBroker) Consume(subject string, slots Slots, handle func(Delivery)) Consumer {
	return b.consume(b.jobQueue(subject), slots, handle)
}

func (b *rabbitBroker) consume(queue rabbitQueue, slots Slots, handle func(Delivery)) *rabbitConsumer {
	c := &rabbitConsumer{
		broker: b, queue: queue, slots: slots, handle: handle, ready: make(chan struct{}), wake: make(chan struct{}, 1),
		stopping: make(chan struct{}), quiet: make(chan struct{}), complaint: rabbitComplaint{log: b.log},
		stale: map[rabbitMessage]struct{}{}, noGet: !queue.durable,
	}
	b.mu.Lock()
	b.consumers[c] = struct{}{}
	b.mu.Unlock()
	if !b.own(c.run) {
		close(c.quiet)
	}
	return c
}

func (c *rabbitConsumer) Ready() <-chan struct{} { return c.ready }

func (c *rabbitConsumer) Wake() {
	c.freed.Store(true)
	poke(c.wake)
}

// Stop returns when the broker delivers no more, or is away.
func (c *rabbitConsumer) Stop() {
	c.stopOnce.Do(func() { close(c.stopping) })
	<-c.quiet
}

func (c *rabbitConsumer) stopped() bool {
	select {
	case <-c.stopping:
		return true
	default:
		return false
	}
}

// run consumes on one channel after another. It ends when it is stopped and everything is settled.
func (c *rabbitConsumer) run() {
	b := c.broker
	defer func() {
		b.mu.Lock()
		delete(b.consumers, c)
		b.mu.Unlock()
	}()
	for n := 0; ; n++ {
		conn := b.consuming.wait(c.stopping)
		if conn == nil {
			break
		}
		s, err := c.openSession(conn)
		if err == nil {
			began := time.Now()
			if err = s.run(); time.Since(began) > maxReconnectPause {
				n = 0
			}
		}
		if c.stopped() {
			break
		}
		if !conn.IsClosed() {
			c.complaint.about(err, c.queue.name)
		}
		if !b.pause(n, c.stopping) {
			break
		}
	}
	c.handling.Wait()
	select {
	case <-c.quiet: // a session that was stopped has said so
	default:
		close(c.quiet)
	}
}

// A rabbitSession is a consumer's time on one channel.
type rabbitSession struct {
	*rabbitConsumer
	conn    *rabbitConn
	channel *amqp.Channel
	closing chan *amqp.Error

	name       string // of the queue
	tag        string // of the current subscription, "" while there is none
	tags       int    // given so far
	window     int    // prefetch of the current subscription
	deliveries <-chan amqp.Delivery
	fullSince  time.Time // zero: there is room
	emptySince time.Time // the subscription is used up and nothing waits in the queue; zero: that is not known

	missing bool // the queue was deleted and is to be declared again
	tries   int
	retryAt time.Time

	mu        sync.Mutex // guards what follows
	unsettled int
	inWindow  map[string]int // unsettled, by the subscription they came by
	messages  map[rabbitMessage]struct{}
	over      bool // the channel is
}

func (c *rabbitConsumer) openSession(conn *rabbitConn) (*rabbitSession, error) {
	s := &rabbitSession{rabbitConsumer: c, conn: conn, inWindow: map[string]int{}, messages: map[rabbitMessage]struct{}{}}
	if err := s.declare(); err != nil {
		return nil, err
	}
	channel, err := conn.open()
	if err != nil {
		return nil, fail(codeRabbitChannel, fmt.Sprintf("open a channel for queue %q", c.queue.name), err)
	}
	s.channel = channel
	s.closing = channel.NotifyClose(make(chan *amqp.Error, 1))
	return s, nil
}

// declare makes sure that the queue is there, and warns once when it is not as it should be.
func (s *rabbitSession) declare() error {
	name, asItIs, err := s.conn.declare(s.queue, s.broker.noTransient.Load())
	if err != nil {
		return failHint(codeRabbitQueue,
			fmt.Sprintf("declare queue %q in virtual host %q of rabbitmq at %s", s.queue.name, s.conn.vhost, s.conn.addr), err,
			"give the user configure, write and read permission on it, or declare and bind it by hand")
	}
	if asItIs != nil && !s.warned {
		s.warned = true
		s.broker.log.Warn("queue is used as it is", errAttrs(asItIs), "subject", s.queue.name)
	}
	s.name, s.missing, s.tries = name, false, 0
	select {
	case <-s.ready:
	default:
		close(s.ready)
	}
	return nil
}

// run consumes until the channel ends, or until the consumer is stopped and what it was given is settled.
func (s *rabbitSession) run() error {
	defer s.close()
	for {
		again, err := s.adjust()
		if err != nil {
			return err
		}
		select {
		case d, open := <-s.deliveries:
			if open {
				s.hand(d)
				continue
			}
			// Either the channel is about to say that it is closed, or this is basic.cancel: the queue was deleted or has
			// moved. Then the channel stays, since tasks that came by it may still run.
			s.tag, s.deliveries, s.missing = "", nil, true
			s.retryAt = time.Now().Add(reconnectPause(0))
		case <-s.wake:
		case <-time.After(again):
		case err := <-s.closing:
			return s.ended(err)
		case <-s.broker.ctx.Done():
			return s.broker.ctx.Err()
		case <-s.stopping:
			s.unsubscribe(s.requeue)
			s.handling.Wait()
			close(s.quiet)
			s.awaitSettled()
			return nil
		}
	}
}

// adjust makes what the broker may deliver fit what the worker has room for, and says when to look again. A subscription
// lets in as many as there was room for when it began. It is used up when there is room again before acknowledgements
// have opened it, which under load is for every task: then fetch goes on. It ends when the slots stay taken by other
// jobs, or more tasks wait for one than there are. A burst may still bring a few too many; they wait in the worker.
func (s *rabbitSession) adjust() (again time.Duration, err error) {
	if s.missing {
		return s.declareAgain()
	}
	freed := s.freed.Swap(false)
	s.mu.Lock()
	unsettled, open := s.unsettled, s.window-s.inWindow[s.tag]
	s.mu.Unlock()
	if s.tag == "" {
		open = 0
	}
	if s.tag == "" || open > 0 {
		s.emptySince = time.Time{}
	}
	if wait := time.Until(time.Unix(0, s.resumeAt.Load())); wait > 0 {
		s.unsubscribe(s.hand)
		return wait, nil
	}
	free := s.slots.Free() - int(s.inHandle.Load()) + s.awaited()
	room := min(s.slots.Limit()-unsettled, free)
	switch {
	case room > 0 && open > 0:
		s.fullSince = time.Time{}
	case room > 0:
		s.fullSince = time.Time{}
		return s.fetch(room)
	case s.tag == "" || open == 0 && free >= 0: // it has brought what there is room for
		s.fullSince = time.Time{}
	case s.fullSince.IsZero() || freed && s.broker.manyConsumers(): // else very many come and go at each slot
		s.fullSince = time.Now()
		return rabbitFullPause, nil
	default:
		if wait := rabbitFullPause - time.Since(s.fullSince); wait > 0 {
			return wait, nil
		}
		s.unsubscribe(s.hand)
	}
	return rabbitIdlePause, nil
}

// fetch takes what the subscription does not let in, whose window cannot be changed: one message, for as long as the
// queue has some, or with a new subscription as many as there is room for. Where none waits, there is to be a
// subscription.
func (s *rabbitSession) fetch(room int) (again time.Duration, err error) {
	oneByOne := !s.noGet && room < rabbitManyFree
	if oneByOne && s.emptySince.IsZero() {
		found, err := s.get()
		if found || err != nil {
			return 0, err
		}
		s.emptySince = time.Now()
	}
	if s.tag != "" && oneByOne {
		if wait := rabbitAckPause - time.Since(s.emptySince); wait > 0 {
			return wait, nil
		}
	}
	s.unsubscribe(s.hand)
	return rabbitIdlePause, s.subscribe(min(room, math.MaxUint16))
}

// get takes one message from the queue; false if there is none. A subscription ends then, which would let one in for
// each that is acknowledged, besides those that are taken here.
func (s *rabbitSession) get() (found bool, err error) {
	var d amqp.Delivery
	err = s.conn.call(func() error {
		d, found, err = s.channel.Get(s.name, false)
		return err
	})
	switch code := rabbitCode(err); {
	case err != nil:
		// Such as of a stream, or where there is to be a single consumer.
		s.noGet = !s.conn.IsClosed() && code != 0 && code != amqp.NotFound
		return false, s.consumeError(err)
	case found:
		s.hand(d)
		s.unsubscribe(s.hand)
	}
	return found, nil
}

// declareAgain brings back a queue that was deleted, with growing pauses.
func (s *rabbitSession) declareAgain() (again time.Duration, err error) {
	if wait := time.Until(s.retryAt); wait > 0 {
		return wait, nil
	}
	if err := s.declare(); err != nil {
		if s.conn.IsClosed() {
			return 0, err
		}
		s.complaint.about(err, s.queue.name)
		s.tries++
		wait := reconnectPause(s.tries)
		s.retryAt = time.Now().Add(wait)
		return wait, nil
	}
	s.broker.log.Warn("queue was deleted, declared again", "subject", s.name)
	return 0, nil
}

// subscribe lets the broker deliver, with so many unsettled at a time.
func (s *rabbitSession) subscribe(window int) error {
	s.tags++
	tag := consumerTag(s.broker.identity, s.tags)
	err := s.conn.call(func() error {
		// Per consumer: quorum queues know no other.
		if err := s.channel.Qos(window, 0, false); err != nil {
			return err
		}
		var err error
		s.deliveries, err = s.channel.Consume(s.name, tag, false, false, false, false, nil)
		return err
	})
	if err != nil {
		return s.consumeError(err)
	}
	s.tag, s.window = tag, window
	return nil
}

func (s *rabbitSession) consumeError(err error) error {
	return fail(codeRabbitConsume, fmt.Sprintf("consume queue %q of rabbitmq at %s", s.name, s.conn.addr), err)
}

// consumerTag is what the broker's own tools show of a consumer.
func consumerTag(identity string, n int) string { return fmt.Sprintf("%.200s-%d", identity, n) }

// unsubscribe ends the subscription, if there is one, and gives what has arrived meanwhile to rest.
func (s *rabbitSession) unsubscribe(rest func(amqp.Delivery)) {
	if s.tag == "" {
		return
	}
	err := s.conn.call(func() error { return s.channel.Cancel(s.tag, false) })
	if err != nil && !s.channel.IsClosed() {
		s.conn.socket.Close() // it answers nonsense
	}
	for d := range s.deliveries {
		rest(d)
	}
	s.tag, s.deliveries, s.fullSince, s.emptySince = "", nil, time.Time{}, time.Time{}
}

// requeue puts a delivery back that nobody has seen.
func (s *rabbitSession) requeue(d amqp.Delivery) {
	_ = s.conn.call(func() error { return d.Nack(false, true) }) // if not now, then when the channel ends
}

// hand gives a delivery to the worker.
func (s *rabbitSession) hand(d amqp.Delivery) {
	if s.channel.IsClosed() {
		return // the broker delivers it again
	}
	tag, message := d.ConsumerTag, rabbitMessage(sha256.Sum256(d.Body))
	s.back(message)
	s.mu.Lock()
	s.unsettled++
	s.inWindow[tag]++
	s.messages[message] = struct{}{}
	s.mu.Unlock()
	s.inHandle.Add(1)
	s.handling.Add(1)
	go func() { // ends when the worker has accepted the delivery
		defer s.handling.Done()
		var settled, returned, refused atomic.Bool
		s.handle(Delivery{
			Subject: s.queue.name, Data: d.Body, Held: true, Attempt: attemptOf(d), HeldFor: s.broker.heldFor,
			Again: d.Redelivered,
			Ack: func(ctx context.Context) error {
				if settled.Swap(true) {
					return nil
				}
				return s.settle(ctx, tag, message, func() error { return d.Ack(false) })
			},
			Nack: func(reason error) {
				if settled.Swap(true) {
					return
				}
				if !returned.Load() {
					// It would come back at once, so nothing is taken for a while, and before the broker may deliver it.
					refused.Store(true)
					pause := reconnectPause(int(s.refusals.Add(1)))
					s.resumeAt.Store(time.Now().Add(pause).UnixNano())
				}
				ctx, stop := context.WithTimeout(context.Background(), s.conn.limit)
				defer stop()
				if err := s.settle(ctx, tag, message, func() error { return d.Nack(false, true) }); err != nil {
					s.broker.log.Debug("delivery not put back, the broker does that itself", errAttrs(err), "subject", s.queue.name)
				}
			},
		})
		returned.Store(true)
		if !refused.Load() {
			s.refusals.Store(0)
		}
		s.inHandle.Add(-1)
		s.broker.wakeOthers(s.rabbitConsumer)
	}()
}

// settle tells the broker what became of a delivery. RabbitMQ does not answer that; what is lost on the way is delivered
// again, and the worker's journal knows it. After the channel's end, by a lost connection or the broker's timeout, it is
// an error: the tag means nothing any more.
func (s *rabbitSession) settle(ctx context.Context, tag string, message rabbitMessage, tell func() error) error {
	err := s.conn.write(ctx, tell)
	s.mu.Lock()
	s.unsettled--
	if s.inWindow[tag]--; s.inWindow[tag] == 0 {
		delete(s.inWindow, tag)
	}
	delete(s.messages, message)
	over := s.over
	s.mu.Unlock()
	if over {
		s.back(message)
	}
	s.broker.wakeOthers(s.rabbitConsumer)
	if err != nil {
		return fail(codeRabbitStale, fmt.Sprintf("settle a delivery of queue %q", s.queue.name), err)
	}
	return nil
}

// awaitSettled waits until nothing that was handed out needs the channel any more.
func (s *rabbitSession) awaitSettled() {
	for {
		s.mu.Lock()
		unsettled := s.unsettled
		s.mu.Unlock()
		if unsettled == 0 {
			return
		}
		select {
		case <-s.wake:
		case <-s.closing:
			return
		case <-s.broker.ctx.Done():
			return
		}
	}
}

// ended says why the broker has closed the channel, such as for a delivery that was not acknowledged in its time.
func (s *rabbitSession) ended(err *amqp.Error) error {
	if err == nil {
		return nil // the connection has ended, which is not this queue's story
	}
	return failHint(codeRabbitChannelLost, fmt.Sprintf("keep the channel of queue %q", s.queue.name), err,
		"if it speaks of a timeout, raise consumer_timeout of the broker, which should be 30 min")
}

func (s *rabbitSession) close() {
	s.mu.Lock()
	s.over = true
	for message := range s.messages {
		s.outlive(message)
	}
	s.mu.Unlock()
	if !s.channel.IsClosed() {
		_ = s.conn.call(s.channel.Close) // it ends with the connection otherwise
	}
}

// attemptOf is how often a delivery was made: a quorum queue counts, a classic one only knows the first.
func attemptOf(d amqp.Delivery) int {
	switch count := d.Headers["x-delivery-count"].(type) {
	case int64:
		return int(max(0, min(count, math.MaxInt32-1))) + 1
	case int32:
		return int(max(0, min(count, math.MaxInt32-1))) + 1
	}
	if d.Redelivered {
		return 0
	}
	return 1
}

// wakeOthers lets every consumer look at its slots: what one job takes, the others have not. Where they are many, only
// c looks at once.
func (b *rabbitBroker) wakeOthers(c *rabbitConsumer) {
	poke(c.wake)
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.consumers) <= rabbitFewConsumers {
		b.wakeAll()
	} else if !b.wakesAll {
		b.wakesAll = true
		time.AfterFunc(rabbitFullPause, func() {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.wakesAll = false
			b.wakeAll()
		})
	}
}

// wakeAll needs mu.
func (b *rabbitBroker) wakeAll() {
	for c := range b.consumers {
		poke(c.wake)
	}
}

func (b *rabbitBroker) manyConsumers() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.consumers) > rabbitFewConsumers
}
