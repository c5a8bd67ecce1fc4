package main

// broker_local.go is the broker when there is none: a queue inside this process. It keeps nothing itself, since the
// worker journals a task before it accepts it; a message that nobody consumes here is nobody's and is dropped.

import (
	"context"
	"sync"
)

// A localBroker hands what is published on a consumed subject straight to its consumer.
type localBroker struct {
	mu            sync.RWMutex // guards what follows
	consumers     map[string]*localConsumer
	subscriptions map[string]map[*localSubscription]struct{}
}

type localSubscription struct {
	mu     sync.Mutex // one message at a time
	handle func(data []byte)
}

var _ Broker = (*localBroker)(nil)

func newLocalBroker() *localBroker {
	return &localBroker{consumers: map[string]*localConsumer{}, subscriptions: map[string]map[*localSubscription]struct{}{}}
}

// Publish returns once the consumers have accepted the messages, so their journal holds them, or with the reason for
// which one was refused.
func (b *localBroker) Publish(_ context.Context, messages ...Message) (sent int, err error) {
	for i, m := range messages {
		if err := b.publish(m.Subject, m.Data); err != nil {
			return i, err
		}
	}
	return len(messages), nil
}

func (b *localBroker) publish(subject string, data []byte) error {
	b.mu.RLock()
	consumer := b.consumers[subject]
	var subscriptions []*localSubscription
	for s := range b.subscriptions[subject] {
		subscriptions = append(subscriptions, s)
	}
	b.mu.RUnlock()

	for _, s := range subscriptions {
		s.mu.Lock()
		s.handle(data)
		s.mu.Unlock()
	}
	if consumer == nil {
		return nil
	}
	var refused error
	returned := false
	var mu sync.Mutex // Nack may also come much later, when it means nothing here: the journal has the task
	consumer.handle(Delivery{Subject: subject, Data: data, Nack: func(reason error) {
		mu.Lock()
		defer mu.Unlock()
		if !returned {
			refused = reason
		}
	}})
	mu.Lock()
	defer mu.Unlock()
	returned = true
	return refused
}

func (b *localBroker) Subscribe(subject string, handle func(data []byte)) Subscription {
	added := &localSubscription{handle: handle}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.subscriptions[subject] == nil {
		b.subscriptions[subject] = map[*localSubscription]struct{}{}
	}
	b.subscriptions[subject][added] = struct{}{}
	return Subscription{Stop: func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.subscriptions[subject], added)
		if len(b.subscriptions[subject]) == 0 {
			delete(b.subscriptions, subject)
		}
	}}
}

func (b *localBroker) SubscribeAll(subject string, handle func(data []byte)) Subscription {
	return b.Subscribe(subject, handle)
}

func (b *localBroker) Listens(_ context.Context, taskID string) (bool, error) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return len(b.subscriptions[taskID+listenSuffix]) > 0, nil
}

// Consume has no use for slots: what waits, waits in the journal.
func (b *localBroker) Consume(subject string, _ Slots, handle func(Delivery)) Consumer {
	b.mu.Lock()
	defer b.mu.Unlock()
	c := &localConsumer{b, subject, handle}
	b.consumers[subject] = c
	return c
}

func (b *localBroker) Close() error { return nil }

type localConsumer struct {
	broker  *localBroker
	subject string
	handle  func(Delivery)
}

func (c *localConsumer) Ready() <-chan struct{} {
	ready := make(chan struct{})
	close(ready)
	return ready
}

func (c *localConsumer) Wake() {}

func (c *localConsumer) Stop() {
	c.broker.mu.Lock()
	defer c.broker.mu.Unlock()
	if c.broker.consumers[c.subject] == c {
		delete(c.broker.consumers, c.subject)
	}
}
