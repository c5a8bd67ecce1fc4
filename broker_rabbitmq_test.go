//go:build unix

package main

// broker_rabbitmq_test.go checks on a real server what RabbitMQ does with what is published and subscribed to,
// and with queues and rights that are there already.

import (
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// openRabbitForTest opens a broker whose answers are awaited for a second only.
func openRabbitForTest(t testing.TB, config BrokerConfig, change func(*rabbitBroker)) (*rabbitBroker, chan error) {
	t.Helper()
	connected := make(chan error, 1000)
	b := newRabbitBroker(brokerOptions{
		config: config, project: "p1", identity: fmt.Sprintf("w%d", rabbitTestBrokers.Add(1)),
		log: newLogger(testLog{t}, &Config{LogLevel: -4}), changed: func(err error) { connected <- err },
	})
	b.proveEvery, b.proveWithin = 300*time.Millisecond, 3*time.Second
	if change != nil {
		change(b)
	}
	b.start()
	t.Cleanup(func() { b.Close() })
	return b, connected
}

var rabbitTestBrokers atomic.Int32

func awaitRabbit(t testing.TB, connected chan error, up bool) error {
	t.Helper()
	deadline := time.After(40 * time.Second)
	for {
		select {
		case err := <-connected:
			if up == (err == nil) {
				return err
			}
		case <-deadline:
			t.Fatalf("connected did not become %v within 40 s", up)
		}
	}
}

func connectedRabbit(t testing.TB, config BrokerConfig) *rabbitBroker {
	t.Helper()
	b, connected := openRabbitForTest(t, config, nil)
	awaitRabbit(t, connected, true)
	return b
}

func slotsOf(n int) Slots { return Slots{Limit: atMost(n), Free: func() int { return n }} }

func ackAll(t testing.TB, deliveries []Delivery) {
	t.Helper()
	for _, d := range deliveries {
		if err := d.Ack(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

// queueLength counts the messages that are ready.
func queueLength(t testing.TB, s *rabbitTestServer, queue string) int {
	t.Helper()
	conn, channel, err := s.dial()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	q, err := channel.QueueDeclarePassive(queue, true, false, false, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	return q.Messages
}

func awaitQueue(t testing.TB, s *rabbitTestServer, queue string) {
	t.Helper()
	waitFor(t, 20*time.Second, func() string {
		conn, channel, err := s.dial()
		if err != nil {
			return err.Error()
		}
		defer conn.Close()
		q, err := channel.QueueDeclarePassive(queue, true, false, false, false, nil)
		if err != nil {
			return err.Error()
		}
		if q.Consumers == 0 {
			return queue + " has no consumer"
		}
		return ""
	})
}

func TestRabbitMQPublishesConfirmedInOrder(t *testing.T) {
	server := newRabbitVHost(t)
	for _, exchange := range []string{"", "jobs"} {
		config := server.config(t)
		config.Exchange = exchange
		b := connectedRabbit(t, config)
		channel := server.raw(t)
		queue := "t_process" + exchange
		if _, err := channel.QueueDeclare(queue, true, false, false, false, nil); err != nil {
			t.Fatal(err)
		}
		if exchange != "" {
			if err := channel.QueueBind(queue, queue, exchange, false, nil); err != nil {
				t.Fatal(err)
			}
		}
		var messages []Message
		for i := range 300 {
			messages = append(messages, Message{Subject: queue, Data: fmt.Append(nil, i)})
		}
		if sent, err := b.Publish(t.Context(), messages...); sent != 300 || err != nil {
			t.Fatalf("Publish = %d, %v", sent, err)
		}
		deliveries, err := channel.Consume(queue, "", true, false, false, false, nil)
		if err != nil {
			t.Fatal(err)
		}
		for i := range 300 {
			d := <-deliveries
			if string(d.Body) != fmt.Sprint(i) || d.DeliveryMode != amqp.Persistent {
				t.Fatalf("message %d = %q, mode %d", i, d.Body, d.DeliveryMode)
			}
		}
		// An event that nobody listens for is no error, a task is, and what stood before it has arrived.
		sent, err := b.Publish(t.Context(), Message{Subject: "nobody_who"}, Message{Subject: "p1.none", Task: true}, Message{Subject: "x"})
		if sent != 1 || codeOf(errors.Unwrap(err)) != codeRabbitUnrouted {
			t.Errorf("Publish of a task without a queue = %d, %v", sent, err)
		}
		if sent, err := b.Publish(t.Context(), Message{Subject: strings.Repeat("x", 300)}); sent != 0 || codeOf(err) != codeRabbitSend {
			t.Errorf("Publish on an overlong subject = %d, %v", sent, err)
		}
		if sent, err := b.Publish(t.Context(), Message{Subject: queue, Task: true}); sent != 1 || err != nil {
			t.Errorf("Publish of a task = %d, %v", sent, err)
		}
	}
}

func TestRabbitMQUsesQueuesAsTheyAre(t *testing.T) {
	server := newRabbitVHost(t)
	channel := server.raw(t)
	for queue, arguments := range map[string]amqp.Table{
		"p1.ttl":    {"x-message-ttl": int32(600_000)},
		"p1.quorum": {"x-queue-type": "quorum"},
	} {
		if _, err := channel.QueueDeclare(queue, true, false, false, false, arguments); err != nil {
			t.Fatal(err)
		}
		b := connectedRabbit(t, server.config(t))
		var sink taker
		c := b.Consume(queue, slotsOf(2), sink.take)
		if sent, err := b.Publish(t.Context(), Message{Subject: queue, Data: []byte("x"), Task: true}); sent != 1 {
			t.Fatal(err)
		}
		d := sink.remove(t, 1)[0]
		d.Nack(errors.New("again"))
		d = sink.remove(t, 1)[0]
		if want := map[string]int{"p1.ttl": 0, "p1.quorum": 2}[queue]; d.Attempt != want {
			t.Errorf("%s: attempt = %d; want %d", queue, d.Attempt, want)
		}
		ackAll(t, []Delivery{d})
		c.Stop()
	}
}

func TestRabbitMQWithoutConfigurePermission(t *testing.T) {
	server := newRabbitVHost(t)
	if _, err := server.raw(t).QueueDeclare("p1.reader", true, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
	config := server.config(t)
	config.User, config.Password = "reader", "se cret/%2f?#@:"
	b := connectedRabbit(t, config)
	var sink taker
	c := b.Consume("p1.reader", slotsOf(2), sink.take)
	none := b.Consume("p1.nowhere", slotsOf(2), sink.take)
	if err := server.publishTo("", "p1.reader", "x", false); err != nil {
		t.Fatal(err)
	}
	ackAll(t, sink.remove(t, 1))
	c.Stop()
	none.Stop()
}

func TestRabbitMQUsesTheExchangeAsItIs(t *testing.T) {
	server := newRabbitVHost(t)
	if err := server.raw(t).ExchangeDeclare("given", "direct", false, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
	config := server.config(t)
	config.Exchange = "given"
	b := connectedRabbit(t, config)
	var sink taker
	defer b.Consume("p1.ex", slotsOf(2), sink.take).Stop()
	awaitQueue(t, server, "p1.ex")
	if err := server.raw(t).Publish("given", "p1.ex", true, false, amqp.Publishing{Body: []byte("x")}); err != nil {
		t.Fatal(err)
	}
	ackAll(t, sink.remove(t, 1))
}

func TestRabbitMQSubscriptions(t *testing.T) {
	server := newRabbitVHost(t)
	b, connected := openRabbitForTest(t, server.config(t), nil)
	awaitRabbit(t, connected, true)
	var got [200]atomic.Int32
	var subscriptions []Subscription
	began := time.Now()
	for i := range got {
		next := int32(0)
		subscriptions = append(subscriptions, b.Subscribe(fmt.Sprintf("t%d_worker", i), func(data []byte) {
			if string(data) == fmt.Sprint(next) { // in order
				next++
				got[i].Add(1)
			}
		}))
		if i%2 == 1 {
			subscriptions[i].Stop()
		}
	}
	if took := time.Since(began); took > time.Second {
		t.Errorf("subscribing took %v", took)
	}
	channel := server.raw(t)
	waitFor(t, 10*time.Second, func() string {
		q, err := channel.QueueDeclarePassive("t198_worker", false, true, false, false, nil)
		if err != nil {
			channel = server.raw(t)
			return err.Error()
		}
		if q.Consumers != 1 {
			return "no consumer yet"
		}
		return ""
	})
	for i := range got {
		for n := range 5 {
			if err := channel.Publish("", fmt.Sprintf("t%d_worker", i), false, false, amqp.Publishing{Body: fmt.Append(nil, n)}); err != nil {
				t.Fatal(err)
			}
		}
	}
	waitFor(t, 10*time.Second, func() string {
		for i := range got {
			if want := int32(5 * (1 - i%2)); got[i].Load() != want {
				return fmt.Sprintf("subscription %d got %d of %d", i, got[i].Load(), want)
			}
		}
		return ""
	})
	for _, s := range subscriptions {
		s.Stop()
	}
	waitFor(t, 10*time.Second, func() string {
		for _, i := range []int{0, 100, 198} {
			c := server.raw(t)
			if _, err := c.QueueDeclarePassive(fmt.Sprintf("t%d_worker", i), false, true, false, false, nil); err == nil {
				return fmt.Sprintf("the queue of subscription %d is still there", i)
			}
		}
		return ""
	})
}

func TestRabbitMQRestartReachesEveryWorkerOnce(t *testing.T) {
	server := newRabbitVHost(t)
	for _, exchange := range []string{"", "jobs"} {
		config := server.config(t)
		config.Exchange = exchange
		var got [3]atomic.Int32
		var brokers []*rabbitBroker
		for i := range got {
			b := connectedRabbit(t, config)
			brokers = append(brokers, b)
			b.SubscribeAll("p1.restart", func([]byte) { got[i].Add(1) })
		}
		waitFor(t, 10*time.Second, func() string {
			for _, b := range brokers {
				b.mu.Lock()
				live := b.subscriptions[0].live.Load()
				b.mu.Unlock()
				if live == 0 {
					return "not every worker listens yet"
				}
			}
			return ""
		})
		awaitTransient(t, server, "p1.restart", 3)
		for n := range 4 {
			if err := server.publishTo(exchange, "p1.restart", "{}", false); err != nil {
				t.Fatal(err)
			}
			waitFor(t, 10*time.Second, func() string {
				for i := range got {
					if got[i].Load() != int32(n+1) {
						return fmt.Sprintf("worker %d got %d of %d", i, got[i].Load(), n+1)
					}
				}
				return ""
			})
		}
		for _, b := range brokers {
			b.Close()
		}
	}
}

// awaitTransient waits until a queue that goes with its consumers has so many.
func awaitTransient(t testing.TB, server *rabbitTestServer, queue string, consumers int) {
	t.Helper()
	waitFor(t, 10*time.Second, func() string {
		q, err := server.raw(t).QueueDeclarePassive(queue, false, true, false, false, nil)
		if err != nil || q.Consumers != consumers {
			return fmt.Sprintf("%d consumers, %v", q.Consumers, err)
		}
		return ""
	})
}

func TestRabbitMQCollectorSeesEvents(t *testing.T) {
	server := startRabbitMQ(t)
	c := server.collect(t)
	server.publish(t, "t1_finish", "finish")
	if events := c.finish(t, "t1"); len(events) != 1 || events[0] != (publishedEvent{"_finish", "finish"}) {
		t.Errorf("events = %v", events)
	}
}

func BenchmarkRabbitMQPublish(b *testing.B) {
	server := newRabbitVHost(b)
	broker := connectedRabbit(b, server.config(b))
	if _, err := server.raw(b).QueueDeclare("bench", true, false, false, false, nil); err != nil {
		b.Fatal(err)
	}
	for _, batch := range []int{1, 64} {
		b.Run(fmt.Sprintf("batch=%d", batch), func(b *testing.B) {
			messages := make([]Message, batch)
			for i := range messages {
				messages[i] = Message{Subject: "bench", Data: make([]byte, 1024)}
			}
			for b.Loop() {
				if sent, err := broker.Publish(b.Context(), messages...); sent != batch {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.N*batch)/b.Elapsed().Seconds(), "messages/s")
		})
	}
}
