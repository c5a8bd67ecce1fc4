package main

// broker.go is what the worker knows of message brokers: something that carries deliveries in and events out. Each
// broker has a file of its own beside this one; nothing in here belongs to any one of them.

import "context"

// A Broker connects the worker to a Job Manager. All methods may be called concurrently.
type Broker interface {
	// Publish sends messages in order and returns when the broker has them, or with how many of them, from the first
	// on, it is known to have. It does not retry: the others may or may not have arrived, and the caller decides.
	Publish(ctx context.Context, messages ...Message) (sent int, err error)

	// Subscribe calls handle with every message on a subject from now on. Messages of one subscription come one at a
	// time, in order; handle must not block. The returned function ends the subscription.
	Subscribe(subject string, handle func(data []byte)) (unsubscribe func(), err error)

	// Consume takes this worker's share of the deliveries on a subject, at most limit of them unsettled at once, and
	// hands each to handle, which may be called concurrently. What handle has not accepted when it returns was refused
	// with Delivery.Nack.
	Consume(subject string, limit int, handle func(Delivery)) (Consumer, error)

	// Close lets go of the connection. Consumers must have been stopped before.
	Close() error
}

// A Message is something to be published.
type Message struct {
	Subject string
	Data    []byte
}

// A Consumer is one subject being consumed.
type Consumer interface {
	// SetLimit changes how many deliveries may be unsettled at once.
	SetLimit(limit int)
	// Stop takes no new delivery. Those that were handed out can still be settled.
	Stop()
}

// A Delivery is one message for this worker, and the means to settle it.
type Delivery struct {
	Subject string
	Data    []byte

	// Held says that the broker keeps the message until Ack and will deliver it again if this worker dies: then the
	// journal need not answer for it.
	Held bool

	// Attempt is how often the broker has delivered it, from 1; 0 where the broker does not count.
	Attempt int

	// Ack settles the delivery for good. InProgress renews the claim on it. Nack puts it back, for reason; before
	// handle returns it means that the delivery was never accepted. Each may be nil where the broker has no such thing.
	Ack        func(ctx context.Context) error
	InProgress func(ctx context.Context) error
	Nack       func(reason error)
}
