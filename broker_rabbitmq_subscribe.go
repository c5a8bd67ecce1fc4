package main

// broker_rabbitmq_subscribe.go listens on subjects that are no jobs: those of this worker alone, each a queue that lives
// as long as somebody listens, and those of every worker, which a fanout exchange multiplies. One goroutine declares and
// cancels them all, on one channel and many at once, so that hundreds of them cost the broker little and their callers
// nothing.

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// A rabbitSubscription is a subject that somebody listens to.
type rabbitSubscription struct {
	subject string
	queue   rabbitQueue
	handle  func(data []byte)

	ended atomic.Bool   // handle is not called any more
	live  atomic.Int32  // above 0: messages arrive
	ready chan struct{} // closed once they do, or were refused

	// For keepSubscriptions alone.
	tries     int
	retryAt   time.Time
	complaint rabbitComplaint
	warned    bool
	told      bool // ready is closed
}

// maxRabbitTogether is how many subscriptions are made in one go.
const maxRabbitTogether = 200

// Subscribe listens on a queue named as the subject. What arrives is acknowledged by its arrival.
func (b *rabbitBroker) Subscribe(subject string, handle func(data []byte)) Subscription {
	s := b.subscribe(subject, b.workerQueue(subject), handle)
	return Subscription{Ready: s.ready, Stop: func() { b.unsubscribe(s) }}
}

// SubscribeAll listens on a queue of this worker's own behind the project's fanout exchange, and takes its share of the
// queue named as the subject, which all workers consume: whoever gets a message from that one passes it on to all.
func (b *rabbitBroker) SubscribeAll(subject string, handle func(data []byte)) Subscription {
	own := b.subscribe(subject, b.ownQueue(subject), handle)
	shared := b.workerQueue(subject)
	shared.fanout = b.broadcastExchange()
	stop := make(chan struct{})
	one := Slots{Limit: func() int { return 1 }, Free: func() int { return 1 }}
	relay := b.consume(shared, one, func(d Delivery) { b.passOn(own, d, stop) })
	stopRelay := sync.OnceFunc(func() { close(stop) })
	return Subscription{Ready: own.ready, Stop: func() {
		stopRelay()
		relay.Stop()
		b.unsubscribe(own)
	}}
}

// passOn gives a message to every worker, this one among them. It holds the message until that is done: put back, it
// would be lost with its queue if this is the only worker.
func (b *rabbitBroker) passOn(own *rabbitSubscription, d Delivery, stop <-chan struct{}) {
	err := errors.New("not listening yet")
	for n := 0; err != nil; n++ {
		if own.live.Load() > 0 {
			ctx, cancel := context.WithTimeout(b.ctx, b.proveWithin)
			_, err = b.publishTo(ctx, b.broadcastExchange(), []Message{{Subject: d.Subject, Data: d.Data}})
			cancel()
		}
		if err != nil && !b.pause(n, stop) {
			d.Nack(err)
			return
		}
	}
	if err := d.Ack(b.ctx); err != nil {
		b.log.Warn("message for all workers may be passed on twice", errAttrs(err), "subject", d.Subject)
	}
}

// Listens looks whether the queue is consumed. The broker drops a consumer with its connection, and gives nobody a task
// whose holder's connection it still takes for alive.
func (b *rabbitBroker) Listens(_ context.Context, taskID string) (bool, error) {
	conn := b.consuming.current()
	if conn == nil {
		return false, errors.New("look for the holder of a task: no connection to rabbitmq")
	}
	var queue amqp.Queue
	conn.mu.Lock()
	defer conn.mu.Unlock()
	err := conn.do(func(ch *amqp.Channel) (err error) {
		queue, err = ch.QueueDeclarePassive(taskID+listenSuffix, false, true, false, false, nil)
		return err
	})
	if rabbitCode(err) == amqp.NotFound {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look for the holder of a task: %w", err)
	}
	return queue.Consumers > 0, nil
}

func (b *rabbitBroker) subscribe(subject string, queue rabbitQueue, handle func(data []byte)) *rabbitSubscription {
	s := &rabbitSubscription{subject: subject, queue: queue, handle: handle, ready: make(chan struct{}), complaint: rabbitComplaint{log: b.log}}
	b.mu.Lock()
	b.subscriptions = append(b.subscriptions, s)
	b.mu.Unlock()
	poke(b.resubscribe)
	return s
}

func (b *rabbitBroker) unsubscribe(s *rabbitSubscription) {
	s.ended.Store(true)
	b.mu.Lock()
	if i := slices.Index(b.subscriptions, s); i >= 0 {
		b.subscriptions = slices.Delete(b.subscriptions, i, i+1)
	}
	b.mu.Unlock()
	poke(b.resubscribe)
}

// keepSubscriptions makes what the broker has of them what they should be, after each change and each reconnect.
func (b *rabbitBroker) keepSubscriptions() {
	complaint := rabbitComplaint{log: b.log}
	for n := 0; ; n++ {
		conn := b.consuming.wait(nil)
		if conn == nil {
			return
		}
		channel, err := conn.open()
		if err == nil {
			began := time.Now()
			err = b.serveSubscriptions(conn, channel)
			if time.Since(began) > maxReconnectPause {
				n = 0
			}
		}
		if !conn.IsClosed() {
			complaint.about(err, "")
		}
		if !b.pause(n, nil) {
			return
		}
	}
}

// rabbitListeners are the subscriptions on one channel.
type rabbitListeners struct {
	broker  *rabbitBroker
	conn    *rabbitConn
	channel *amqp.Channel
	tags    int
	live    map[*rabbitSubscription]rabbitListener
}

// A rabbitListener is one of them.
type rabbitListener struct {
	tag   string
	ended chan struct{} // closed when nothing arrives any more
}

// serveSubscriptions returns when the channel has ended.
func (b *rabbitBroker) serveSubscriptions(conn *rabbitConn, channel *amqp.Channel) error {
	closing := channel.NotifyClose(make(chan *amqp.Error, 1))
	l := &rabbitListeners{broker: b, conn: conn, channel: channel, live: map[*rabbitSubscription]rabbitListener{}}
	for {
		b.mu.Lock()
		wanted := slices.Clone(b.subscriptions)
		b.mu.Unlock()
		if err := l.cancelEnded(); err != nil {
			return err
		}
		again, err := l.listenTo(wanted)
		if err != nil {
			return err
		}
		select {
		case <-b.resubscribe:
		case <-time.After(again):
		case err := <-closing:
			if err == nil {
				return nil
			}
			return fail(codeRabbitSubscriptions, "keep the channel for subscriptions", err)
		case <-b.ctx.Done():
			return nil
		}
	}
}

// cancelEnded tells the broker which subscriptions have ended, and forgets those that it has ended itself. It waits for no
// answer: what still arrives is acknowledged by its arrival and handed to nobody.
func (l *rabbitListeners) cancelEnded() error {
	for s, listener := range l.live {
		select {
		case <-listener.ended:
			delete(l.live, s) // the queue was deleted
			continue
		default:
		}
		if !s.ended.Load() {
			continue
		}
		if err := l.conn.call(func() error { return l.channel.Cancel(listener.tag, true) }); err != nil {
			return fail(codeRabbitUnsubscribe, fmt.Sprintf("stop listening on %q", s.subject), err)
		}
		delete(l.live, s)
	}
	return nil
}

// listenTo makes the subscriptions that are not there yet, and says when to try those again that were refused. An error
// is the end of the channel.
func (l *rabbitListeners) listenTo(wanted []*rabbitSubscription) (again time.Duration, err error) {
	var together, apart []*rabbitSubscription
	again = time.Hour
	for _, s := range wanted {
		if _, live := l.live[s]; live || s.ended.Load() {
			continue
		}
		wait := time.Until(s.retryAt)
		switch {
		case wait > 0:
			again = min(again, wait)
		case s.tries == 0 && s.queue.plain():
			together = append(together, s)
		default:
			apart = append(apart, s)
		}
	}
	for some := range slices.Chunk(together, maxRabbitTogether) {
		if err := l.listenTogether(some); err != nil {
			if l.closed() {
				return 0, err
			}
			apart = append(apart, some...) // each for itself, to see which is refused
		}
	}
	for _, s := range apart {
		err := l.listenApart(s)
		if err == nil {
			continue
		}
		if l.closed() {
			return 0, err
		}
		s.complaint.about(err, s.subject)
		again = min(again, time.Until(s.retryAt))
	}
	return again, nil
}

func (l *rabbitListeners) closed() bool { return l.conn.IsClosed() || l.channel.IsClosed() }

// listenTogether makes subscriptions that are likely to be had, with two waits for the broker however many they are.
func (l *rabbitListeners) listenTogether(some []*rabbitSubscription) error {
	queues := make([]rabbitQueue, len(some))
	for i, s := range some {
		queues[i] = s.queue
	}
	if err := l.conn.declareTogether(queues, l.broker.noTransient.Load()); err != nil {
		return err
	}
	for i, s := range some {
		if err := l.consume(s, s.queue.name, i < len(some)-1); err != nil {
			for _, s := range some {
				s.tries++ // so that the next time it is seen which is refused
			}
			return err
		}
	}
	for _, s := range some {
		s.tell()
	}
	return nil
}

// listenApart declares the queue of a subscription and consumes it.
func (l *rabbitListeners) listenApart(s *rabbitSubscription) error {
	name, asItIs, err := l.conn.declare(s.queue, l.broker.noTransient.Load())
	if asItIs != nil && err == nil && !s.warned {
		s.warned = true
		l.broker.log.Warn("queue is used as it is", errAttrs(asItIs), "subject", s.subject)
	}
	if err == nil {
		err = l.consume(s, name, false)
	}
	if err == nil {
		s.tell()
		return nil
	}
	s.retryAt = time.Now().Add(reconnectPause(s.tries))
	s.tries++
	if !l.conn.IsClosed() {
		s.tell() // that it was refused
	}
	return failHint(codeRabbitSubscribe, fmt.Sprintf("listen on %q of rabbitmq at %s", s.subject, l.conn.addr), err,
		"give the user configure, write and read permission on that queue")
}

// consume lets a subscription's messages arrive. With noWait a refusal ends the channel later.
func (l *rabbitListeners) consume(s *rabbitSubscription, queue string, noWait bool) error {
	l.tags++
	tag := consumerTag(l.broker.identity, l.tags)
	var deliveries <-chan amqp.Delivery
	err := l.conn.call(func() (err error) {
		deliveries, err = l.channel.Consume(queue, tag, true, false, false, noWait, nil)
		return err
	})
	if err != nil {
		return err
	}
	listener := rabbitListener{tag: tag, ended: make(chan struct{})}
	if l.broker.own(func() { l.broker.follow(s, deliveries, listener.ended) }) {
		l.live[s] = listener
	}
	return nil
}

// tell closes ready.
func (s *rabbitSubscription) tell() {
	if !s.told {
		s.told = true
		close(s.ready)
	}
}

// follow hands a subscription its messages, in order, until there are no more.
func (b *rabbitBroker) follow(s *rabbitSubscription, deliveries <-chan amqp.Delivery, ended chan<- struct{}) {
	s.live.Add(1)
	for d := range deliveries {
		if s.ended.Load() {
			continue
		}
		if s.queue.fanout != "" && d.RoutingKey != s.subject {
			continue // another subject for all workers
		}
		s.handle(d.Body)
	}
	s.live.Add(-1)
	close(ended)
	poke(b.resubscribe)
}
