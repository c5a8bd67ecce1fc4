package main

// broker.go is what the worker knows of message brokers: something that carries deliveries in and events out. Each
// broker has a file of its own beside this one; nothing in here belongs to any one of them.

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"strconv"
	"strings"
	"time"
)

// A Broker connects the worker to a Job Manager. It connects and reconnects by itself for as long as it is open, and
// what was subscribed and consumed survives that. All methods may be called concurrently.
type Broker interface {
	// Publish sends messages in order and returns when the broker has them, or with how many of them, from the first
	// on, it is known to have. It does not retry, and fails at once while there is no connection: the others may or may
	// not have arrived, and the caller decides.
	Publish(ctx context.Context, messages ...Message) (sent int, err error)

	// Subscribe listens on a subject that is this worker's alone, such as {task_id}_worker. handle gets every message
	// from when the subscription is ready, one at a time, in order, and must not block. The call does not wait for the
	// broker: it takes effect soon, or after the next reconnect.
	Subscribe(subject string, handle func(data []byte)) Subscription

	// SubscribeAll is Subscribe for a subject whose messages are for every worker of the project.
	SubscribeAll(subject string, handle func(data []byte)) Subscription

	// Listens reports whether another worker, on any connection, has called Subscribe for {task_id}_listen, as one does
	// that has the task. That may take some seconds.
	Listens(ctx context.Context, taskID string) (bool, error)

	// Consume takes this worker's share of the tasks on a job's subject and hands each to handle, which may be called
	// concurrently and returns when the worker has accepted the delivery or refused it with Nack. It does not wait for
	// the broker either.
	Consume(subject string, slots Slots, handle func(Delivery)) Consumer

	// Close lets go of the connection. Consumers must have been stopped and their deliveries settled before; a durable
	// broker delivers the others again.
	Close() error
}

// A Subscription is a subject that is listened on.
type Subscription struct {
	// Ready is closed once the broker has taken the subscription for the first time, or has refused it for now; nil: it
	// takes it before anything that is published from now on.
	Ready <-chan struct{}
	// Stop ends it, and waits for nothing.
	Stop func()
	// Asked is, for {task_id}_listen, when a worker has last called Listens for the task; nil: the broker cannot tell.
	Asked func() time.Time
}

// stopAfter stops it in a while, counted anew from each time that somebody asks.
func (s Subscription) stopAfter(limit time.Duration) {
	var look func()
	look = func() {
		if s.Asked != nil {
			if left := limit - time.Since(s.Asked()); left > 0 {
				time.AfterFunc(left, look)
				return
			}
		}
		s.Stop()
	}
	time.AfterFunc(limit, look)
}

// A Message is something to be published.
type Message struct {
	Subject string
	Data    []byte
	Task    bool // it is a task on a job's subject: kept by a durable broker, an error where nobody would get it
}

// Slots bound the deliveries that one consumer may have unsettled. Both may change; Consumer.Wake tells of it.
type Slots struct {
	Limit func() int // at most
	Free  func() int // how many more the worker has room for just now; negative: so many wait for a slot already
}

// A Consumer is one subject being consumed.
type Consumer interface {
	// Ready is closed once the broker has taken the subscription for the first time: tasks that are published from then
	// on arrive.
	Ready() <-chan struct{}
	// Wake says that Slots may have changed.
	Wake()
	// Stop takes no new delivery and returns when handle is not called any more. What was handed out can still be
	// settled, and its claim is kept alive until then.
	Stop()
}

// A Delivery is one message for this worker, and the means to settle it. Until it is settled the broker's file keeps
// the claim on it alive, whatever that takes.
type Delivery struct {
	Subject string
	Data    []byte

	// Held says that the broker keeps the message until Ack and delivers it again if this worker dies: then the journal
	// need not answer for it. Where it is false, Ack and Nack may be nil.
	Held bool

	// Attempt is how often the broker has delivered it, from 1; 0 where the broker does not count.
	Attempt int

	// Again says that the message has been delivered before, perhaps to a worker that has it still. Late says that it has
	// waited for its first delivery, which is the first as far as the broker knows.
	Again, Late bool

	// HeldFor is how long the broker keeps an unsettled delivery at most; 0: as long as it takes. Before it is over the
	// worker makes the journal answer for the task, and acknowledges.
	HeldFor time.Duration

	// Ack settles the delivery for good. Nack puts it back, for reason; before handle returns, Nack means that the
	// delivery was never accepted. Only the first of these calls, and of
	// Leave, counts; both return when the broker has been told, or
	// with why it was not: then it delivers again.
	Ack  func(ctx context.Context) error
	Nack func(reason error)

	// Leave settles the delivery in favour of another worker that has the message still, and keeps its claim alive. Where
	// it is nil such a worker has to be given the message to have it.
	Leave func()

	// Settled asks the broker whether the message has been acknowledged meanwhile, by another worker; nil: it cannot tell.
	Settled func(ctx context.Context) (bool, error)
}

// A brokerOptions is what opening a broker takes.
type brokerOptions struct {
	config   BrokerConfig
	project  string      // first token of the job subjects, and the name of the group that shares the tasks
	identity string      // of this worker, unique among the workers of the project
	tls      *tls.Config // nil: no TLS
	log      *slog.Logger

	// changed is called when the connection comes (nil) or goes, or could not be made (why, naming the server and what
	// was tried, without secrets). It must not block.
	changed func(err error)
}

// openBroker opens a connection of the configured type. It returns before the connection is made; an error is one of
// configuration.
func openBroker(o brokerOptions) (Broker, error) {
	switch o.config.Type {
	case "local":
		o.changed(nil)
		return newLocalBroker(), nil
	case "nats":
		return openNATS(o)
	case "rabbitmq":
		return openRabbitMQ(o)
	case "redis":
		return openRedis(o)
	}
	return nil, unknownBroker(o.config.Type)
}

// probeBroker connects once, logs in, sees that the broker answers, and leaves: for --dry-run.
func probeBroker(ctx context.Context, o brokerOptions) error {
	switch o.config.Type {
	case "local":
		return nil
	case "nats":
		return probeNATS(ctx, o)
	case "rabbitmq":
		return probeRabbitMQ(ctx, o)
	case "redis":
		return probeRedis(ctx, o)
	}
	return unknownBroker(o.config.Type)
}

func unknownBroker(kind string) error {
	return fail(codeBrokerType, "open broker", fmt.Errorf("there is no type %q", kind))
}

// servers lists the addresses of a broker, host:port, from a host that may name several.
func (c BrokerConfig) servers(defaultPort int) []string {
	port := c.Port
	if port == 0 {
		port = defaultPort
	}
	var list []string
	for _, host := range strings.Split(c.Host, ",") {
		host = strings.TrimSpace(host)
		if host == "" {
			host = "127.0.0.1"
		}
		if _, _, err := net.SplitHostPort(host); err != nil {
			host = net.JoinHostPort(strings.Trim(host, "[]"), strconv.Itoa(port))
		}
		list = append(list, host)
	}
	return list
}

const (
	minReconnectPause = 100 * time.Millisecond
	maxReconnectPause = 5 * time.Second

	// roundTripPause is how often a connection must prove that its broker still answers, and roundTripLimit how long
	// that may take.
	roundTripPause = 15 * time.Second
	roundTripLimit = 10 * time.Second

	// A claim that has not been renewed for claimLost is another worker's to take; it is renewed every claimRenewal.
	claimRenewal = 10 * time.Second
	claimLost    = 30 * time.Second
)

// reconnectPause is how long to wait before the n-th try in a row, from 0: growing, jittered, 5 s at most.
func reconnectPause(n int) time.Duration {
	pause := min(minReconnectPause<<min(n, 10), maxReconnectPause)
	return pause/2 + rand.N(pause/2)
}
