package main

// broker_rabbitmq_subscribe.go listens on subjects that are no jobs: those of this worker alone, each a queue that lives
// as long as somebody listens, and those of every worker, which a fanout exchange multiplies. One goroutine declares and
// cancels them all, on one channel, so that hundreds of them cost the broker little and their callers nothing.

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

	ended atomic.Bool  // handle is not called any more
	ready atomic.Int32 // above 0: messages arrive

	// For keepSubscriptions alone.
	tries     int
	retryAt   time.Time
	complaint rabbitComplaint
	warned    bool
}

// Subscribe listens on a queue named as the subject. What arrives is acknowledged by its arrival.
func (b *rabbitBroker) Subscribe(subject string, handle func(data []byte)) (unsubscribe func()) {
	s := b.subscribe(subject, b.workerQueue(subject), handle)
	return func() { b.unsubscribe(s) }
}

// SubscribeAll listens on a queue of this worker's own behind the project's fanout exchange, and takes its share of the
// queue named as the subject, which all workers consume: whoever gets a message from that one passes it on to all.
func (b *rabbitBroker) SubscribeAll(subject string, handle func(data []byte)) (unsubscribe func()) {
	own := b.subscribe(subject, b.ownQueue(subject), handle)
	shared := b.workerQueue(subject)
	shared.fanout = b.broadcastExchange()
	stop := make(chan struct{})
	one := Slots{Limit: func() int { return 1 }, Free: func() int { return 1 }}
	relay := b.consume(shared, one, func(d Delivery) { b.passOn(own, d, stop) })
	stopRelay := sync.OnceFunc(func() { close(stop) })
	return func() {
		stopRelay()
		relay.Stop()
		b.unsubscribe(own)
	}
}

// passOn gives a message to every worker, this one among them. It holds the message until that is done: put back, it
// would be lost with its queue if this is the only worker.
func (b *rabbitBroker) passOn(own *rabbitSubscription, d Delivery, stop <-chan struct{}) {
	err := errors.New("not listening yet")
	for n := 0; err != nil; n++ {
		if own.ready.Load() > 0 {
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
	s := &rabbitSubscription{subject: subject, queue: queue, handle: handle, complaint: rabbitComplaint{log: b.log}}
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

// A rabbitListener is a subscription on the current channel.
type rabbitListener struct {
	tag   string
	ended chan struct{} // closed when nothing arrives any more
}

// serveSubscriptions returns when the channel has ended.
func (b *rabbitBroker) serveSubscriptions(conn *rabbitConn, channel *amqp.Channel) error {
	closing := channel.NotifyClose(make(chan *amqp.Error, 1))
	listeners := map[*rabbitSubscription]rabbitListener{}
	tags := 0
	for {
		b.mu.Lock()
		wanted := slices.Clone(b.subscriptions)
		b.mu.Unlock()
		for s, l := range listeners {
			select {
			case <-l.ended:
				delete(listeners, s) // the queue was deleted
				continue
			default:
			}
			if s.ended.Load() {
				if err := conn.call(func() error { return channel.Cancel(l.tag, false) }); err != nil {
					return fail(codeRabbitUnsubscribe, fmt.Sprintf("stop listening on %q", s.subject), err)
				}
				delete(listeners, s)
			}
		}
		again := time.Hour
		for _, s := range wanted {
			if _, listening := listeners[s]; listening || s.ended.Load() {
				continue
			}
			wait := time.Until(s.retryAt)
			if wait <= 0 {
				tags++
				tag := consumerTag(b.identity, tags)
				deliveries, err := b.listen(conn, channel, s, tag)
				if err == nil {
					l := rabbitListener{tag: tag, ended: make(chan struct{})}
					if b.own(func() { b.follow(s, deliveries, l.ended) }) {
						listeners[s] = l
					}
					continue
				}
				wait = reconnectPause(s.tries)
				s.tries++
				s.retryAt = time.Now().Add(wait)
				if conn.IsClosed() || channel.IsClosed() {
					return err
				}
				s.complaint.about(err, s.subject)
			}
			again = min(again, wait)
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

// listen declares the queue of a subscription and consumes it.
func (b *rabbitBroker) listen(conn *rabbitConn, channel *amqp.Channel, s *rabbitSubscription, tag string) (<-chan amqp.Delivery, error) {
	name, asItIs, err := conn.declare(s.queue, b.noTransient.Load())
	if asItIs != nil && err == nil && !s.warned {
		s.warned = true
		b.log.Warn("queue is used as it is", errAttrs(asItIs), "subject", s.subject)
	}
	var deliveries <-chan amqp.Delivery
	if err == nil {
		err = conn.call(func() error {
			deliveries, err = channel.Consume(name, tag, true, false, false, false, nil)
			return err
		})
	}
	if err != nil {
		return nil, failHint(codeRabbitSubscribe, fmt.Sprintf("listen on %q of rabbitmq at %s", s.subject, conn.addr), err,
			"give the user configure, write and read permission on that queue")
	}
	return deliveries, nil
}

// follow hands a subscription its messages, in order, until there are no more.
func (b *rabbitBroker) follow(s *rabbitSubscription, deliveries <-chan amqp.Delivery, ended chan<- struct{}) {
	s.ready.Add(1)
	for d := range deliveries {
		if s.ended.Load() {
			continue
		}
		if s.queue.fanout != "" && d.RoutingKey != s.subject {
			continue // another subject for all workers
		}
		s.handle(d.Body)
	}
	s.ready.Add(-1)
	close(ended)
	poke(b.resubscribe)
}
