//go:build unix

package main

// broker_rabbitmq_consume_test.go checks on a real server how tasks are taken from RabbitMQ's queues: shared, and no
// more than fit.

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

func TestRabbitMQConsumersShareTheTasks(t *testing.T) {
	server := newRabbitVHost(t)
	publisher := connectedRabbit(t, server.config(t))
	var mu sync.Mutex
	seen := map[string]int{}
	by := map[int]int{}
	for i := range 3 {
		b := connectedRabbit(t, server.config(t))
		c := b.Consume("p1.share", slotsOf(8), func(d Delivery) {
			mu.Lock()
			seen[string(d.Data)]++
			by[i]++
			mu.Unlock()
			if err := d.Ack(context.Background()); err != nil {
				t.Error(err)
			}
		})
		defer c.Stop()
	}
	awaitQueue(t, server, "p1.share")
	var tasks []Message
	for i := range 1000 {
		tasks = append(tasks, Message{Subject: "p1.share", Data: fmt.Append(nil, i), Task: true})
	}
	if sent, err := publisher.Publish(t.Context(), tasks...); sent != 1000 {
		t.Fatal(sent, err)
	}
	waitFor(t, 20*time.Second, func() string {
		mu.Lock()
		defer mu.Unlock()
		if len(seen) < 1000 {
			return fmt.Sprintf("%d of 1000", len(seen))
		}
		return ""
	})
	mu.Lock()
	defer mu.Unlock()
	for task, times := range seen {
		if times != 1 {
			t.Errorf("task %s came %d times", task, times)
		}
	}
	if len(by) != 3 {
		t.Errorf("tasks by consumer: %v", by)
	}
}

func TestRabbitMQTakesNoMoreThanFits(t *testing.T) {
	server := newRabbitVHost(t)
	b := connectedRabbit(t, server.config(t))
	for i := range 10 {
		if err := server.publishTo("", "p1.fit", fmt.Sprint(i), true); err != nil {
			t.Fatal(err)
		}
	}
	var sink taker
	var free atomic.Int32
	free.Store(2)
	// Of 5 that the job may have, other jobs leave room for 2.
	c := b.Consume("p1.fit", Slots{Limit: atMost(5), Free: func() int { return int(free.Load()) }}, func(d Delivery) {
		sink.take(d)
		free.Add(-1)
	})
	first := sink.remove(t, 2)
	waitFor(t, 5*time.Second, func() string {
		if n := queueLength(t, server, "p1.fit"); n != 8 {
			return fmt.Sprintf("%d are ready; want 8", n)
		}
		return ""
	})
	free.Store(100) // the limit is what counts
	c.Wake()
	more := sink.remove(t, 3)
	if n := queueLength(t, server, "p1.fit"); n != 5 {
		t.Errorf("%d are ready; want 5", n)
	}
	for _, d := range append(first, more...) {
		if !d.Held || d.Attempt != 1 || d.HeldFor != rabbitHeldFor || d.Subject != "p1.fit" {
			t.Errorf("delivery = %+v", d)
		}
	}
	// One that is put back comes again, here or elsewhere.
	first[0].Nack(errors.New("not now"))
	again := sink.remove(t, 1)
	ackAll(t, append(append(first[1:], more...), again...))
	rest := sink.remove(t, 5)
	c.Stop()
	ackAll(t, rest)
	waitFor(t, 5*time.Second, func() string {
		if n := queueLength(t, server, "p1.fit"); n != 0 {
			return fmt.Sprintf("%d are ready; want 0", n)
		}
		return ""
	})
}

// TestRabbitMQFetchesBesidesASubscription has room again while what the subscription brought is only to be acknowledged:
// the next task comes, and acknowledgements then let no other one in.
func TestRabbitMQFetchesBesidesASubscription(t *testing.T) {
	server := newRabbitVHost(t)
	channel := server.raw(t)
	for queue, arguments := range map[string]amqp.Table{
		"p1.plain":  nil,
		"p1.single": {"x-queue-type": "quorum", "x-single-active-consumer": true}, // of which the broker gives no single message
	} {
		if _, err := channel.QueueDeclare(queue, true, false, false, false, arguments); err != nil {
			t.Fatal(err)
		}
		b := connectedRabbit(t, server.config(t))
		var sink taker
		var free atomic.Int32
		free.Store(1)
		c := b.Consume(queue, Slots{Limit: atMost(3), Free: func() int { return int(free.Load()) }}, func(d Delivery) {
			free.Add(-1)
			sink.take(d)
		})
		<-c.Ready()
		for i := range 4 {
			if _, err := b.Publish(t.Context(), Message{Subject: queue, Data: fmt.Append(nil, i), Task: true}); err != nil {
				t.Fatal(err)
			}
		}
		first := sink.remove(t, 1)
		free.Store(1)
		c.Wake()
		second := sink.remove(t, 1)
		ackAll(t, first)
		time.Sleep(2 * rabbitFullPause) // nothing is to be taken
		if n := queueLength(t, server, queue); n != 2 && queue == "p1.plain" {
			t.Errorf("%d are ready while the slot is taken; want 2", n)
		}
		for range 2 {
			free.Store(1)
			c.Wake()
			second = append(second, sink.remove(t, 1)...)
		}
		c.Stop()
		ackAll(t, second)
		waitFor(t, 5*time.Second, func() string {
			if n := queueLength(t, server, queue); n != 0 {
				return fmt.Sprintf("%d are ready; want 0", n)
			}
			return ""
		})
	}
}

func TestRabbitMQPausesWhileOtherJobsHaveTheSlots(t *testing.T) {
	server := newRabbitVHost(t)
	b := connectedRabbit(t, server.config(t))
	var sink taker
	var free atomic.Int32
	free.Store(3)
	c := b.Consume("p1.busy", Slots{Limit: atMost(3), Free: func() int { return int(free.Load()) }}, sink.take)
	defer c.Stop()
	awaitQueue(t, server, "p1.busy")
	free.Store(0)
	c.Wake()
	waitFor(t, 5*time.Second, func() string {
		q, err := server.raw(t).QueueDeclarePassive("p1.busy", true, false, false, false, nil)
		if err != nil || q.Consumers != 0 {
			return fmt.Sprintf("%d consumers, %v", q.Consumers, err)
		}
		return ""
	})
	if err := server.publishTo("", "p1.busy", "x", false); err != nil {
		t.Fatal(err)
	}
	if n := queueLength(t, server, "p1.busy"); n != 1 || len(sink.all()) != 0 {
		t.Errorf("%d are ready, %d were taken", n, len(sink.all()))
	}
	free.Store(1)
	c.Wake()
	ackAll(t, sink.remove(t, 1))
}

// TestRabbitMQEndsASubscriptionThatOverfillsTheSlots has more of a job in the worker than there are slots, as when two
// jobs were subscribed for the same ones: what is acknowledged then lets no more in.
func TestRabbitMQEndsASubscriptionThatOverfillsTheSlots(t *testing.T) {
	server := newRabbitVHost(t)
	b := connectedRabbit(t, server.config(t))
	var sink taker
	var free atomic.Int32
	free.Store(2)
	c := b.Consume("p1.over", Slots{Limit: atMost(2), Free: func() int { return int(free.Load()) }}, sink.take)
	defer c.Stop()
	awaitQueue(t, server, "p1.over")
	for range 6 {
		if err := server.publishTo("", "p1.over", "x", true); err != nil {
			t.Fatal(err)
		}
	}
	held := sink.remove(t, 2)
	free.Store(-2) // two of another job wait too
	c.Wake()
	waitFor(t, 5*time.Second, func() string {
		q, err := server.raw(t).QueueDeclarePassive("p1.over", true, false, false, false, nil)
		if err != nil || q.Consumers != 0 {
			return fmt.Sprintf("%d consumers, %v", q.Consumers, err)
		}
		return ""
	})
	ackAll(t, held)
	c.Wake()
	time.Sleep(2 * rabbitFullPause) // nothing is to be taken
	if n := queueLength(t, server, "p1.over"); n != 4 || len(sink.all()) != 0 {
		t.Errorf("%d are ready, %d were taken; want 4 and 0", n, len(sink.all()))
	}
	free.Store(2)
	c.Wake()
	ackAll(t, sink.remove(t, 2))
}

func TestRabbitMQRefusedDeliveriesPause(t *testing.T) {
	server := newRabbitVHost(t)
	b := connectedRabbit(t, server.config(t))
	var refused atomic.Int32
	var sink taker
	c := b.Consume("p1.refuse", slotsOf(1), func(d Delivery) {
		if refused.Add(1) < 4 {
			d.Nack(errors.New("journal not writable"))
			return
		}
		sink.take(d)
	})
	defer c.Stop()
	if err := server.publishTo("", "p1.refuse", "x", true); err != nil {
		t.Fatal(err)
	}
	ackAll(t, sink.remove(t, 1))
	if n := refused.Load(); n != 4 {
		t.Errorf("handed out %d times; want 4", n)
	}
}

func BenchmarkRabbitMQConsume(b *testing.B) {
	server := newRabbitVHost(b)
	broker := connectedRabbit(b, server.config(b))
	done := make(chan struct{}, 1)
	var left atomic.Int64
	c := broker.Consume("p1.bench", slotsOf(32), func(d Delivery) {
		if err := d.Ack(context.Background()); err != nil {
			b.Error(err)
		}
		if left.Add(-1) == 0 {
			done <- struct{}{}
		}
	})
	defer c.Stop()
	awaitQueue(b, server, "p1.bench")
	messages := make([]Message, 64)
	for i := range messages {
		messages[i] = Message{Subject: "p1.bench", Data: make([]byte, 1024), Task: true}
	}
	for b.Loop() {
		left.Add(64)
		if sent, err := broker.Publish(b.Context(), messages...); sent != 64 {
			b.Fatal(err)
		}
		<-done
	}
	b.ReportMetric(float64(b.N*64)/b.Elapsed().Seconds(), "deliveries/s")
}
