//go:build unix

package main

// broker_nats_test.go checks on a real server what is published on NATS, subscribed to, and shared by a queue group.

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// openConnected is openForTest, and closes the broker in the end.
func openConnected(t testing.TB, config BrokerConfig, project, identity string) *brokerUnderTest {
	t.Helper()
	b := openForTest(t, config, project, identity)
	t.Cleanup(func() { b.Close() })
	return b
}

func freeSlots(n int) Slots { return Slots{Limit: atMost(n), Free: func() int { return n }} }

func TestNATSPublishesInOrder(t *testing.T) {
	s := newNATSServer(t)
	c := s.collect(t)
	b := openConnected(t, s.config(), "P", "host")
	const total, batch = 10_000, 50
	for i := 0; i < total; i += batch {
		var messages []Message
		for j := range batch {
			messages = append(messages, Message{Subject: "t_process", Data: fmt.Append(nil, i+j)})
		}
		if sent, err := b.Publish(t.Context(), messages...); sent != batch || err != nil {
			t.Fatalf("Publish = %d, %v; want %d", sent, err, batch)
		}
	}
	waitFor(t, 10*time.Second, func() string {
		if n := len(c.of("t")); n < total {
			return fmt.Sprintf("%d messages; want %d", n, total)
		}
		return ""
	})
	for i, e := range c.of("t") {
		if e.data != fmt.Sprint(i) {
			t.Fatalf("message %d is %q", i, e.data)
		}
	}
}

func TestNATSPublishRefused(t *testing.T) {
	s := natsServerWith(t, `authorization { users: [ {user: w, password: pw, permissions: {publish: {deny: "no.*"}}} ] }
max_payload: 100000`)
	config := s.config()
	config.AuthType, config.User, config.Password = "user_password", "w", "pw"
	b := openConnected(t, config, "P", "host")
	large := make([]byte, 100_001)
	for _, row := range []struct {
		messages []Message
		sent     int
		code     errCode
		text     string
	}{
		{[]Message{{"yes", nil, false}, {"x", large, false}, {"yes", nil, false}}, 1, codeNATSTooLarge, "100001 bytes are more than the 100000"},
		{[]Message{{"yes", nil, false}, {"no.1", nil, false}, {"yes", nil, false}}, 1, codeNATSPermission, "does not permit"},
		{[]Message{{"yes", nil, false}, {"P.job", nil, true}}, 1, codeNATSTask, "no worker consumes it"},
		{[]Message{{"P.job", large, true}}, 0, codeNATSTooLarge, "100001"},
		{[]Message{{"not a subject", nil, false}}, 0, codeNATSPublish, "subject"},
		{[]Message{{"yes", nil, false}}, 1, "", ""},
	} {
		sent, err := b.Publish(t.Context(), row.messages...)
		if sent != row.sent || codeOf(err) != row.code || (err != nil && !strings.Contains(err.Error(), row.text)) {
			t.Errorf("Publish(%q, …) = %d, %v; want %d, %s … %s", row.messages[0].Subject, sent, err, row.sent, row.code, row.text)
		}
	}
	s.stop(t)
	nextChange(t, b.connected, isAway)
	if sent, err := b.Publish(t.Context(), Message{Subject: "yes"}); sent != 0 || codeOf(err) != codeNATSAway {
		t.Errorf("Publish without a server = %d, %v; want 0, %s", sent, err, codeNATSAway)
	}
}

func TestNATSQueueGroupShares(t *testing.T) {
	s := newNATSServer(t)
	var takers [3]taker
	var consumers []Consumer
	for i := range takers {
		b := openConnected(t, s.config(), "P", fmt.Sprint("host", i))
		consumers = append(consumers, b.Consume("P.job", freeSlots(1), func(d Delivery) {
			time.Sleep(time.Millisecond) // as a journal does
			takers[i].take(d)
		}))
		// What was asked of the broker before the round trip of this has taken effect after it.
		if _, err := b.Publish(t.Context(), Message{Subject: "x"}); err != nil {
			t.Fatal(err)
		}
	}
	manager := s.client(t)
	const total = 6000
	for i := range total {
		if err := manager.Publish("P.job", fmt.Append(nil, i)); err != nil {
			t.Fatal(err)
		}
		if i == total/2 {
			manager.Flush()
			consumers[0].Stop() // loses nothing that it was sent
		}
	}
	manager.Flush()
	seen := map[string]int{}
	waitFor(t, 20*time.Second, func() string {
		clear(seen)
		n := 0
		for i := range takers {
			for _, d := range takers[i].all() {
				seen[string(d.Data)]++
				n++
			}
		}
		if n < total {
			return fmt.Sprintf("%d deliveries; want %d", n, total)
		}
		return ""
	})
	if len(seen) != total {
		t.Errorf("%d different tasks; want %d, each once", len(seen), total)
	}
	for i := range takers {
		if n := len(takers[i].all()); n < total/10 {
			t.Errorf("worker %d got %d of %d tasks", i, n, total)
		}
	}
	after := len(takers[0].all())
	s.publish(t, "P.job", "late")
	if n := len(takers[0].all()); n != after {
		t.Error("a stopped consumer took a task")
	}
}

func TestNATSSubscriptions(t *testing.T) {
	s := newNATSServer(t)
	b := openConnected(t, s.config(), "P", "host")
	var got taker
	end := b.Subscribe("t_worker", func(data []byte) { got.take(Delivery{Data: data}) })
	b.SubscribeAll("P.restart", func(data []byte) { got.take(Delivery{Data: data}) })
	b.Publish(t.Context(), Message{Subject: "x"}) // the subscriptions were sent before it
	for i := range 1000 {
		if _, err := b.Publish(t.Context(), Message{Subject: "t_worker", Data: fmt.Append(nil, i)}); err != nil {
			t.Fatal(err)
		}
	}
	for i, d := range got.wait(t, 1000) {
		if string(d.Data) != fmt.Sprint(i) {
			t.Fatalf("message %d is %q", i, d.Data)
		}
	}
	s.stop(t)
	nextChange(t, b.connected, isAway)
	s.start(t)
	nextChange(t, b.connected, isConnected)
	s.publish(t, "P.restart", "all")
	s.publish(t, "t_worker", "one")
	got.wait(t, 1002)
	end.Stop()
	b.Publish(t.Context(), Message{Subject: "t_worker", Data: []byte("late")}, Message{Subject: "P.restart", Data: []byte("end")})
	if all := got.wait(t, 1003); string(all[1002].Data) != "end" {
		t.Errorf("after unsubscribe came %q", all[1002].Data)
	}
}

const bcryptOfSecretPassword = "$2a$04$dGmD/96C6cNwznXOU6JvE.hzUQmiF4XVFDoZuV/as69HCMATWFIdS"

func TestNATSNames(t *testing.T) {
	seen := map[string]string{}
	long := strings.Repeat("x", 300)
	for _, subject := range []string{"P.a", "P.a.b", "P.a_b", "P.a-b", "P_a.b", "P." + long, "P." + long + "y"} {
		name := natsName(subject)
		if before, taken := seen[name]; taken || len(name) > natsMaxName || strings.ContainsAny(name, ". *>/\\") {
			t.Errorf("natsName(%.20q…) = %q, as of %.20q…", subject, name, before)
		}
		seen[name] = subject
	}
}

func BenchmarkNATSPublish(b *testing.B) {
	s := newNATSServer(b)
	broker := openConnected(b, s.config(), "P", "host")
	data := make([]byte, 1024)
	took := make([]time.Duration, 0, b.N)
	for b.Loop() {
		began := time.Now()
		if _, err := broker.Publish(b.Context(), Message{Subject: "t_process", Data: data}); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
}

func BenchmarkNATSDeliveries(b *testing.B) {
	for _, durable := range []bool{false, true} {
		b.Run(fmt.Sprintf("durable=%v", durable), func(b *testing.B) {
			s := newNATSServer(b, "-js", "-sd", b.TempDir())
			config := s.config()
			config.Durable = durable
			broker := openConnected(b, config, "P", "host")
			var done atomic.Int64
			broker.Consume("P.job", freeSlots(8), func(d Delivery) {
				if d.Ack != nil {
					if err := d.Ack(context.Background()); err != nil {
						b.Error(err)
					}
				}
				done.Add(1)
			})
			waitFor(b, 10*time.Second, func() string {
				_, err := broker.Publish(b.Context(), Message{"P.job", nil, true})
				return errText(err)
			})
			waitFor(b, 10*time.Second, func() string {
				if done.Load() == 0 {
					return "not consuming"
				}
				return ""
			})
			manager := s.client(b)
			done.Store(0)
			data := make([]byte, 1024)
			n := 0
			began := time.Now()
			for b.Loop() {
				manager.Publish("P.job", data)
				n++
			}
			manager.Flush()
			waitFor(b, 60*time.Second, func() string {
				if got := done.Load(); got < int64(n) {
					return fmt.Sprintf("%d of %d", got, n)
				}
				return ""
			})
			b.ReportMetric(float64(n)/time.Since(began).Seconds(), "deliveries/s")
		})
	}
}
