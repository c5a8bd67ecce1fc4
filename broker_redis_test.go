//go:build unix

package main

// broker_redis_test.go runs the Redis broker against private real servers: channels and plain tasks.

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func TestRedisPublish(t *testing.T) {
	s := newRedisServer(t)
	events := s.collect(t)
	b := openForTest(t, s.config(), "p", "w1")
	defer b.Close()
	var messages []Message
	for i := range 300 {
		messages = append(messages, Message{Subject: "t1_process", Data: []byte(strconv.Itoa(i))})
	}
	for range 3 {
		if sent, err := b.Publish(context.Background(), messages...); sent != len(messages) || err != nil {
			t.Fatalf("publish = %d, %v", sent, err)
		}
	}
	waitFor(t, 10*time.Second, func() string {
		if n := len(events.of("t1")); n != 900 {
			return fmt.Sprintf("%d of 900 events", n)
		}
		return ""
	})
	for i, e := range events.of("t1") {
		if e.data != strconv.Itoa(i%300) {
			t.Fatalf("event %d is %q", i, e.data)
		}
	}
	if sent, err := b.Publish(context.Background()); sent != 0 || err != nil {
		t.Errorf("publish of nothing = %d, %v", sent, err)
	}
	// A task that nobody gets is an error, and what came before it has arrived. (The collector would get it.)
	s = newRedisServer(t)
	b = openForTest(t, s.config(), "p", "w1")
	defer b.Close()
	k := newTaker(10)
	defer k.consume(b, "p.job").Stop()
	s.waitForReceivers(t, "p.job", 1)
	sent, err := b.Publish(context.Background(), Message{Subject: "p.job", Data: []byte(taskJSON("a")), Task: true},
		Message{Subject: "p.nobody", Data: []byte(taskJSON("b")), Task: true})
	if sent != 1 || codeOf(err) != codeRedisNoWorker {
		t.Errorf("publish of a task to nobody = %d, %v", sent, err)
	}
	if d := k.wait(t, 1)[0]; d.Held || string(d.Data) != taskJSON("a") || d.Subject != "p.job" {
		t.Errorf("delivery = %+v", d)
	}
}

func TestRedisSubscriptions(t *testing.T) {
	s := newRedisServer(t)
	b := openForTest(t, s.config(), "p", "w1")
	defer b.Close()
	var mu sync.Mutex
	var got []string
	end := b.Subscribe("mine", func(data []byte) {
		mu.Lock()
		defer mu.Unlock()
		got = append(got, string(data))
	})
	slow := make(chan struct{})
	endSlow := b.Subscribe("slow", func([]byte) { <-slow })
	var all atomic.Int64
	defer b.SubscribeAll("p.restart", func([]byte) { all.Add(1) }).Stop()
	defer b.SubscribeAll("p.restart", func([]byte) { all.Add(1) }).Stop()
	for _, channel := range []string{"mine", "slow", "p.restart"} {
		s.waitForReceivers(t, channel, 1)
	}
	for i := range 1000 {
		s.publish(t, "slow", "x") // its handler blocks
		s.publish(t, "mine", strconv.Itoa(i))
	}
	s.publish(t, "p.restart", "")
	waitFor(t, 10*time.Second, func() string {
		mu.Lock()
		defer mu.Unlock()
		if len(got) != 1000 || all.Load() != 2 {
			return fmt.Sprintf("%d of 1000 messages, %d of 2", len(got), all.Load())
		}
		return ""
	})
	for i, data := range got {
		if data != strconv.Itoa(i) {
			t.Fatalf("message %d is %q", i, data)
		}
	}
	close(slow)
	endSlow.Stop()

	// Thousands that come and go are cheap, and the one that stays survives a restart of the server.
	began := time.Now()
	for i := range 5000 {
		b.Subscribe(fmt.Sprintf("task-%d_worker", i), func([]byte) {}).Stop()
	}
	t.Logf("5,000 subscriptions made and ended in %v", time.Since(began))
	s.waitForReceivers(t, "slow", 0)
	s.stop(t)
	s.start(t)
	b.waitConnected(t)
	s.publish(t, "mine", "again")
	waitFor(t, 10*time.Second, func() string {
		mu.Lock()
		defer mu.Unlock()
		if len(got) != 1001 {
			return fmt.Sprintf("%d messages", len(got))
		}
		return ""
	})
	end.Stop()
	s.waitForReceivers(t, "mine", 0)
	channels, err := s.client.PubSubChannels(context.Background(), "*").Result()
	if err != nil || len(channels) != 1 {
		t.Errorf("channels left: %q, %v", channels, err)
	}
}

func TestRedisPlainClaims(t *testing.T) {
	s := newRedisServer(t)
	var takers []*redisTaker
	for i := range 3 {
		b := openForTest(t, s.config(), "p", fmt.Sprint("w", i))
		defer b.Close()
		k := newTaker(1000)
		takers = append(takers, k)
		defer k.consume(b, "p.job").Stop()
	}
	s.waitForReceivers(t, "p.job", 3)
	const n = 1000
	pipe := s.client.Pipeline()
	for i := range n {
		pipe.Publish(context.Background(), "p.job", taskJSON(fmt.Sprint("t", i)))
	}
	pipe.Publish(context.Background(), "p.job", "no task at all")
	if _, err := pipe.Exec(context.Background()); err != nil {
		t.Fatal(err)
	}
	seen := map[string]int{}
	waitFor(t, 20*time.Second, func() string {
		clear(seen)
		for _, k := range takers {
			for _, d := range k.all() {
				seen[string(d.Data)]++
			}
		}
		if len(seen) < n+1 {
			return fmt.Sprintf("%d of %d messages", len(seen), n+1)
		}
		return ""
	})
	for data, times := range seen {
		if times != 1 {
			t.Errorf("%s was handled %d times", data, times)
		}
	}
	for i, k := range takers {
		t.Logf("w%d took %d", i, len(k.all()))
	}
	// A duplicate goes to the worker that has the task, and to nobody else.
	before := len(takers[0].all())
	if before == 0 {
		t.Skip("the first worker won nothing")
	}
	s.publish(t, "p.job", string(takers[0].all()[0].Data))
	takers[0].wait(t, before+1)
}

func TestRedisPlainRefused(t *testing.T) {
	s := newRedisServer(t)
	b := openForTest(t, s.config(), "p", "w1")
	defer b.Close()
	k := newTaker(10)
	k.refuse.Store(true)
	consumer := k.consume(b, "p.job")
	s.waitForReceivers(t, "p.job", 1)
	s.publish(t, "p.job", taskJSON("alone"))
	waitFor(t, 10*time.Second, func() string {
		if n, err := s.client.Exists(context.Background(), "job_item:claim:p:alone").Result(); n != 1 {
			return fmt.Sprintf("no claim, %v", err)
		}
		return ""
	})
	k.refuse.Store(false)
	k.wait(t, 1) // nobody else was there: it was offered here again

	other := openForTest(t, s.config(), "p", "w2")
	defer other.Close()
	k2 := newTaker(10)
	k.refuse.Store(true)
	defer k2.consume(other, "p.job").Stop()
	s.waitForReceivers(t, "p.job", 2)
	for i := range 50 {
		s.publish(t, "p.job", taskJSON(fmt.Sprint("both", i)))
	}
	k2.wait(t, 50)
	consumer.Stop()
	s.waitForReceivers(t, "p.job", 1)
}

// TestRedisClaimAcrossOutage checks that a message is still claimed when the connection breaks under the claim.
func TestRedisClaimAcrossOutage(t *testing.T) {
	s := newRedisServer(t)
	b := openForTest(t, s.config(), "p", "w1")
	defer b.Close()
	k := newTaker(10)
	k.consume(b, "p.job")
	s.waitForReceivers(t, "p.job", 1)
	inner := b.Broker.(*redisBroker)
	s.stop(t)
	waitFor(t, 10*time.Second, func() string {
		if session, _ := inner.current(); session != nil {
			return "still connected"
		}
		return ""
	})
	if _, err := b.Publish(context.Background(), Message{Subject: "x"}); codeOf(err) != codeRedisAway {
		t.Errorf("publish while away = %v", err)
	}
	inner.mu.Lock()
	for _, to := range inner.channels["p.job"] {
		inner.queued += len(taskJSON("late")) + messageOverhead
		inner.offers = append(inner.offers, redisOffer{consumer: to.offers, data: taskJSON("late"), since: time.Now()})
	}
	inner.mu.Unlock()
	rouse(inner.offered)
	s.start(t)
	k.wait(t, 1)
}

func BenchmarkRedis(b *testing.B) {
	s := newRedisServer(b)
	b.Run("publish", func(b *testing.B) {
		broker := openForTest(b, s.config(), "p", "w1")
		defer broker.Close()
		data := make([]byte, 1024)
		var took []time.Duration
		for b.Loop() {
			began := time.Now()
			if _, err := broker.Publish(context.Background(), Message{Subject: "t_process", Data: data}); err != nil {
				b.Fatal(err)
			}
			took = append(took, time.Since(began))
		}
		slices.Sort(took)
		b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
	})
	for _, durable := range []bool{false, true} {
		b.Run(fmt.Sprint("deliver/durable=", durable), func(b *testing.B) {
			config := s.config()
			config.Durable = durable
			broker := openForTest(b, config, "p", "w1")
			defer broker.Close()
			var n atomic.Int64
			subject := fmt.Sprint("p.bench", durable)
			consumer := broker.Consume(subject, Slots{Limit: atMost(100), Free: func() int { return 100 }}, func(d Delivery) {
				if d.Ack != nil {
					d.Ack(context.Background())
				}
				n.Add(1)
			})
			defer consumer.Stop()
			s.waitForReceivers(b, subject, 1)
			began := time.Now()
			for i := 0; i < b.N; i += 64 {
				var messages []Message
				for j := i; j < min(i+64, b.N); j++ {
					id := fmt.Sprintf("b%d-%d-%d", b.N, j, time.Now().UnixNano())
					messages = append(messages, Message{Subject: subject, Data: []byte(taskJSON(id)), Task: true})
				}
				if _, err := broker.Publish(context.Background(), messages...); err != nil {
					b.Fatal(err)
				}
			}
			for n.Load() < int64(b.N) {
				time.Sleep(100 * time.Microsecond)
			}
			b.ReportMetric(float64(b.N)/time.Since(began).Seconds(), "deliveries/s")
		})
	}
}
