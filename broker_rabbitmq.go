package main

// broker_rabbitmq.go is RabbitMQ as a Broker: what it is made of, what it says of its connections, and its end. The
// parts are in files of their own: broker_rabbitmq_link.go keeps a connection, _dial.go makes one, _publish.go sends,
// _consume.go takes tasks, _subscribe.go listens, and _declare.go says what the queues and exchanges are.

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// rabbitHeldFor is how long a delivery may stay unacknowledged. RabbitMQ closes the channel after 30 minutes, unless its
// consumer_timeout says otherwise, and there is no way to ask for more
// (https://www.rabbitmq.com/docs/consumers#acknowledgement-timeout); the rest is for the worker to journal the task.
const rabbitHeldFor = 20 * time.Minute

// A rabbitBroker publishes and consumes on connections of their own, since a broker that is short of memory or disk
// stops reading from whoever publishes: acknowledgements would be stuck behind the events.
type rabbitBroker struct {
	brokerOptions
	heldFor     time.Duration // 0: as long as it takes
	proveEvery  time.Duration // how often a connection must prove that its broker answers
	proveWithin time.Duration // and how long any answer may take

	publishing *rabbitLink
	consuming  *rabbitLink

	ctx    context.Context // ends on Close
	cancel context.CancelFunc
	tasks  sync.WaitGroup // every goroutine of this broker

	noTransient atomic.Bool // this RabbitMQ refuses queues that are shared and not durable

	reporting sync.Mutex // guards what follows and the state of both links; apart, since changed may subscribe
	reported  *string    // what changed was called with last; "" is connected, nil never

	mu            sync.Mutex // guards what follows
	closed        bool
	publisher     *rabbitPublisher
	consumers     map[*rabbitConsumer]struct{}
	wakesAll      bool                  // all consumers will be woken soon
	subscriptions []*rabbitSubscription // those that have not ended, in order

	resubscribe chan struct{} // subscriptions have come or gone
}

var _ Broker = (*rabbitBroker)(nil)

func openRabbitMQ(o brokerOptions) (Broker, error) {
	b := newRabbitBroker(o)
	b.start()
	return b, nil
}

// newRabbitBroker prepares a broker that does nothing yet.
func newRabbitBroker(o brokerOptions) *rabbitBroker {
	b := &rabbitBroker{
		brokerOptions: o, heldFor: rabbitHeldFor, proveEvery: roundTripPause, proveWithin: roundTripLimit,
		consumers: map[*rabbitConsumer]struct{}{}, resubscribe: make(chan struct{}, 1),
	}
	b.ctx, b.cancel = context.WithCancel(context.Background())
	b.consuming = newRabbitLink(b, "consume", func(conn *rabbitConn) error { return conn.declareExchange(o.config.Exchange) })
	b.publishing = newRabbitLink(b, "publish", func(conn *rabbitConn) error {
		_, err := b.openPublisher(conn)
		return err
	})
	return b
}

func (b *rabbitBroker) start() {
	b.own(b.consuming.keep)
	b.own(b.publishing.keep)
	b.own(b.keepSubscriptions)
}

// own runs f in a goroutine that Close waits for; false after Close, when it does not.
func (b *rabbitBroker) own(f func()) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return false
	}
	b.tasks.Add(1)
	go func() { // ends with f, which b.ctx ends
		defer b.tasks.Done()
		f()
	}()
	return true
}

// Close lets go of both connections, within a few seconds even when the broker does not answer. RabbitMQ delivers again
// what is unsettled then.
func (b *rabbitBroker) Close() error {
	b.mu.Lock()
	b.closed = true
	b.mu.Unlock()
	b.cancel()
	b.tasks.Wait()
	return nil
}

// errRabbitConnecting is the state of a link before its first attempt has ended.
var errRabbitConnecting = errors.New("connecting")

// linkChanged reports what both connections make of the broker: it is there when both are.
func (b *rabbitBroker) linkChanged(l *rabbitLink, err error) {
	b.reporting.Lock()
	defer b.reporting.Unlock()
	l.state = err
	if b.ctx.Err() != nil {
		return
	}
	worst := b.consuming.state
	if worst == nil || errors.Is(worst, errRabbitConnecting) && b.publishing.state != nil {
		worst = b.publishing.state
	}
	if errors.Is(worst, errRabbitConnecting) {
		return
	}
	text := ""
	if worst != nil {
		text = worst.Error()
	}
	if b.reported != nil && text == *b.reported {
		return
	}
	b.reported = &text
	b.changed(worst)
}

// pause waits before the n-th try in a row; false when the broker is closed or stop is.
func (b *rabbitBroker) pause(n int, stop <-chan struct{}) bool {
	timer := time.NewTimer(reconnectPause(n))
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-stop:
	case <-b.ctx.Done():
	}
	return false
}

// probeRabbitMQ connects, logs in and looks at the exchange, on the first server that lets it, and changes nothing. The
// error says what is wrong with each server.
func probeRabbitMQ(ctx context.Context, o brokerOptions) error {
	b := newRabbitBroker(o)
	defer b.Close()
	var failed []error
	for _, addr := range b.addresses() {
		conn, err := b.dial(ctx, addr, "probe")
		if err != nil {
			failed = append(failed, err)
			continue
		}
		err = conn.lookAtExchange(o.config.Exchange)
		if rabbitCode(err) == amqp.NotFound {
			err = nil // it will be declared
		}
		conn.close()
		return err
	}
	return errors.Join(failed...)
}

// rabbitCode gives the AMQP reply code in err, 0 if there is none.
func rabbitCode(err error) int {
	var refused *amqp.Error
	if errors.As(err, &refused) {
		return refused.Code
	}
	return 0
}

// poke wakes whoever waits on a channel of capacity one.
func poke(wake chan<- struct{}) {
	select {
	case wake <- struct{}{}:
	default: // it has not looked since the last time
	}
}

// A rabbitComplaint logs why something does not work, once per reason, since it is tried again and again.
type rabbitComplaint struct {
	log  *slog.Logger
	text string
}

func (c *rabbitComplaint) about(err error, subject string) {
	if err == nil || err.Error() == c.text {
		return
	}
	c.text = err.Error()
	c.log.Warn("queue not consumed, tried again", errAttrs(err), "subject", subject)
}
