//go:build unix

package main

// broker_nats_stream_test.go checks the queue that holds the tasks, a JetStream work queue, and that its claims are
// never lost or doubled.

import (
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
)

// shortClaims makes the claims of durable consumers short, and so their renewals.
func shortClaims(b *natsBroker) { b.ackWait = time.Second }

func TestNATSDurableRedelivers(t *testing.T) {
	s := newNATSServer(t, "-js", "-sd", t.TempDir())
	first, _ := openNATSForTest(t, s.durable(), shortClaims)
	second, _ := openNATSForTest(t, s.durable(), shortClaims)
	var one, two taker
	first.Consume("P.job", freeSlots(1), one.take)
	waitListening(t, first, "P.job", &one)
	s.publish(t, "P.job", "plainly") // the stream keeps what a manager publishes without knowing of it
	d := one.wait(t, 1)[0]
	if !d.Held || d.Attempt != 1 || d.Subject != "P.job" || string(d.Data) != "plainly" || d.HeldFor != 0 {
		t.Errorf("delivery is %+v", d)
	}

	// The claim outlives its time while the worker lives.
	second.Consume("P.job", freeSlots(1), two.take)
	time.Sleep(3 * second.ackWait) // nothing is to happen
	if n := len(two.all()); n != 0 {
		t.Fatalf("%d deliveries of a task that another worker holds", n)
	}
	first.Close() // as if it had died
	d = two.wait(t, 1)[0]
	if d.Attempt != 2 || string(d.Data) != "plainly" {
		t.Errorf("redelivery is %+v; want attempt 2", d)
	}
	for range 3 { // only the first counts
		if err := d.Ack(t.Context()); err != nil {
			t.Error(err)
		}
		d.Nack(errors.New("too late"))
	}
	assertStreamEmpty(t, s, "P.job")
}

// assertStreamEmpty waits until a subject's stream holds nothing, neither waiting nor delivered.
func assertStreamEmpty(t testing.TB, s *natsServer, subject string) {
	t.Helper()
	held := s.inStream(t, subject)
	waitFor(t, 10*time.Second, func() string {
		if n, err := held(); n != 0 || err != nil {
			return fmt.Sprintf("%d messages in the stream, %v", n, err)
		}
		return ""
	})
}

// inStream tells how many messages a subject's stream holds, waiting or delivered.
func (s *natsServer) inStream(t testing.TB, subject string) func() (int, error) {
	t.Helper()
	js, err := s.client(t).JetStream()
	if err != nil {
		t.Fatal(err)
	}
	return func() (int, error) {
		name, err := js.StreamNameBySubject(subject)
		if err != nil {
			return 0, err
		}
		info, err := js.StreamInfo(name)
		if err != nil {
			return 0, err
		}
		return int(info.State.Msgs), nil
	}
}

func TestNATSDurableNackAndStop(t *testing.T) {
	s := newNATSServer(t, "-js", "-sd", t.TempDir())
	b, _ := openNATSForTest(t, s.durable())
	var k taker
	consumer := b.Consume("P.job", freeSlots(2), k.take)
	waitListening(t, b, "P.job", &k)
	s.publish(t, "P.job", "x")
	k.wait(t, 1)[0].Nack(errors.New("no"))
	d := k.wait(t, 2)[1]
	if d.Attempt != 2 {
		t.Errorf("attempt %d after Nack; want 2", d.Attempt)
	}
	consumer.Stop()
	s.publish(t, "P.job", "y")
	if err := d.Ack(t.Context()); err != nil { // what was handed out can still be settled
		t.Error(err)
	}
	other, _ := openNATSForTest(t, s.durable())
	var o taker
	other.Consume("P.job", freeSlots(2), o.take)
	if got := o.wait(t, 1)[0]; string(got.Data) != "y" || got.Attempt != 1 {
		t.Errorf("the next worker got %q, attempt %d; want y, 1", got.Data, got.Attempt)
	}
	if n := len(k.all()); n != 2 {
		t.Errorf("%d deliveries to the stopped consumer", n)
	}
}

// What Nack gives back before handle returns comes back too, without a storm.
func TestNATSDurableRefused(t *testing.T) {
	s := newNATSServer(t, "-js", "-sd", t.TempDir())
	b, _ := openNATSForTest(t, s.durable())
	var refusals atomic.Int32
	var k taker
	b.Consume("P.job", freeSlots(5), func(d Delivery) {
		if string(d.Data) == "x" && refusals.Add(1) <= 3 {
			d.Nack(errors.New("disk full"))
			return
		}
		k.take(d)
	})
	waitListening(t, b, "P.job", &k)
	s.publish(t, "P.job", "x")
	if d := k.wait(t, 1)[0]; d.Attempt != 4 {
		t.Errorf("attempt %d; want 4", d.Attempt)
	}
}

func TestNATSDurablePullsForFreeSlots(t *testing.T) {
	s := newNATSServer(t, "-js", "-sd", t.TempDir())
	b, _ := openNATSForTest(t, s.durable())
	var k taker
	var free atomic.Int32
	consumer := b.Consume("P.job", Slots{Limit: atMost(4), Free: func() int { return int(free.Load()) }}, func(d Delivery) {
		free.Add(-1)
		k.take(d)
	})
	waitFor(t, 20*time.Second, func() string {
		if _, err := b.Publish(t.Context(), Message{"P.job", []byte("0"), true}); err != nil {
			return err.Error()
		}
		return ""
	})
	for i := 1; i < 20; i++ {
		if _, err := b.Publish(t.Context(), Message{"P.job", fmt.Append(nil, i), true}); err != nil {
			t.Fatal(err)
		}
	}
	settled := 0
	for _, now := range []int{0, 1, 3, 2, 4, 4, 4, 2} {
		free.Store(int32(now))
		consumer.Wake()
		settled += now
		k.wait(t, settled)
		time.Sleep(20 * time.Millisecond) // one too many would come by now
		all := k.all()
		if len(all) != settled {
			t.Fatalf("%d deliveries with %d free slots; want %d in all", len(all), now, settled)
		}
		for _, d := range all[settled-now:] {
			if err := d.Ack(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	assertStreamEmpty(t, s, "P.job")

	// A slot that is taken otherwise takes its request back, so that another worker gets the task.
	free.Store(2)
	consumer.Wake()
	waitFor(t, 5*time.Second, requested(s, "P.job", 1))
	free.Store(0)
	consumer.Wake()
	other, _ := openNATSForTest(t, s.durable())
	waitFor(t, 5*time.Second, func() string {
		c := onlyStream(b)
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.inbox != nil && len(c.inbox.pulls) > 0 {
			return "requests still wait without a slot"
		}
		return ""
	})
	s.publish(t, "P.job", "elsewhere")
	var o taker
	other.Consume("P.job", freeSlots(1), o.take)
	o.wait(t, 1)
	if n := len(k.all()); n != settled {
		t.Error("a task was taken without a slot")
	}
}

// TestNATSRequestsAreServedInTurn follows the server's order, one task for each request that waits.
func TestNATSRequestsAreServedInTurn(t *testing.T) {
	i := natsInbox{pulls: []natsPull{{number: 1, left: 3}, {number: 2, left: 1}, {number: 3, left: 2}}}
	left := func(want string) {
		t.Helper()
		got := ""
		for _, p := range i.pulls {
			got += fmt.Sprintf("%d:%d ", p.number, p.left)
		}
		if got != want {
			t.Errorf("requests wait as %q; want %q", got, want)
		}
	}
	i.tookOne()
	left("2:1 3:2 1:2 ")
	i.tookOne()
	left("3:2 1:2 ")
	i.ended(2) // it has been
	i.ended(3)
	left("1:2 ")
	i.tookOne()
	i.tookOne()
	left("")
	i.tookOne() // of a request that was taken back
	left("")
}

// TestNATSLate checks which first deliveries may be of tasks that the server has forgotten to be held: those of messages
// that were there before this connection, and all of a consumer that was made again, or of a cluster.
func TestNATSLate(t *testing.T) {
	s := newNATSServer(t, "-js", "-sd", t.TempDir())
	b, _ := openNATSForTest(t, s.durable())
	b.Consume("P.job", freeSlots(0), func(Delivery) {}) // makes the stream
	waitFor(t, 20*time.Second, requested(s, "P.job", 0))
	s.publish(t, "P.job", "before")
	next, _ := openNATSForTest(t, s.durable())
	var k taker
	var free atomic.Int32
	consumer := next.Consume("P.job", Slots{Limit: atMost(2), Free: func() int { return int(free.Load()) }}, k.take)
	<-consumer.Ready()
	s.publish(t, "P.job", "since")
	time.Sleep(2 * natsLateAge) // both are old by then, but only one was there before
	free.Store(2)
	consumer.Wake()
	for _, d := range k.wait(t, 2) {
		if want := string(d.Data) == "before"; d.Late != want || d.Again {
			t.Errorf("%s: late is %v, again %v; want %v, false", d.Data, d.Late, d.Again, want)
		}
		if err := d.Ack(t.Context()); err != nil {
			t.Error(err)
		}
	}

	seen := natsSeen{stream: 10, consumer: 20}
	for _, at := range []struct {
		stream, consumer uint64
		want             bool
	}{{10, 21, true}, {11, 22, false}, {12, 25, false}, {13, 25, true}, {14, 26, true}} {
		if got := seen.mayBeForgotten(nats.SequencePair{Stream: at.stream, Consumer: at.consumer}); got != at.want {
			t.Errorf("message %d as the consumer's %d may be forgotten: %v; want %v", at.stream, at.consumer, got, at.want)
		}
	}
	if cluster := (natsSeen{always: true}); !cluster.mayBeForgotten(nats.SequencePair{Stream: 1, Consumer: 1}) {
		t.Error("in a cluster every message may be forgotten")
	}
}

func onlyStream(b *natsBroker) *natsStream {
	b.mu.Lock()
	defer b.mu.Unlock()
	for c := range b.streams {
		return c
	}
	return nil
}

// requested checks that as many requests wait at the server.
func requested(s *natsServer, subject string, n int) func() string {
	return func() string {
		nc, err := nats.Connect("nats://" + s.addr)
		if err != nil {
			return err.Error()
		}
		defer nc.Close()
		js, _ := nc.JetStream()
		info, err := js.ConsumerInfo(natsName(subject), natsName(subject))
		if err != nil {
			return err.Error()
		}
		if info.NumWaiting != n {
			return fmt.Sprintf("%d requests wait; want %d", info.NumWaiting, n)
		}
		return ""
	}
}

// A claim that was lost in an outage and comes back to the same worker is the same task, not a second one.
func TestNATSDurableOwnRedelivery(t *testing.T) {
	s := newNATSServer(t, "-js", "-sd", t.TempDir())
	b, _ := openNATSForTest(t, s.durable())
	var k taker
	b.Consume("P.job", freeSlots(5), k.take)
	waitListening(t, b, "P.job", &k)
	s.publish(t, "P.job", "x")
	d := k.wait(t, 1)[0]
	reply := func() string {
		b.claims.mu.Lock()
		defer b.claims.mu.Unlock()
		for _, held := range b.claims.held {
			return held.reply
		}
		return ""
	}
	first := reply()
	if err := s.client(t).Publish(first, []byte("-NAK")); err != nil { // the server takes the claim for lost
		t.Fatal(err)
	}
	waitFor(t, 10*time.Second, func() string {
		if reply() == first {
			return "not redelivered"
		}
		return ""
	})
	if err := d.Ack(t.Context()); err != nil {
		t.Error(err)
	}
	assertStreamEmpty(t, s, "P.job")
	if n := len(k.all()); n != 1 {
		t.Errorf("%d deliveries of 1 task", n)
	}
}

func TestNATSDurableExistingStream(t *testing.T) {
	s := newNATSServer(t, "-js", "-sd", t.TempDir())
	js, _ := s.client(t).JetStream()
	for _, config := range []nats.StreamConfig{
		{Name: "jobs", Subjects: []string{"A.>"}, Storage: nats.MemoryStorage, Retention: nats.WorkQueuePolicy},
		{Name: "audit", Subjects: []string{"B.*"}, Storage: nats.FileStorage}, // keeps what is done
	} {
		if _, err := js.AddStream(&config); err != nil {
			t.Fatal(err)
		}
	}
	s.publish(t, "A.job", "waiting")
	s.publish(t, "B.job", "done long ago")

	b, _ := openNATSForTest(t, s.durable())
	var a, k taker
	b.Consume("A.job", freeSlots(1), a.take)
	if d := a.wait(t, 1)[0]; string(d.Data) != "waiting" {
		t.Errorf("got %q", d.Data)
	} else if err := d.Ack(t.Context()); err != nil {
		t.Error(err)
	}
	b.Consume("B.job", freeSlots(1), k.take)
	waitFor(t, 10*time.Second, func() string {
		_, err := js.ConsumerInfo("audit", "B=job")
		return errText(err)
	})
	s.publish(t, "B.job", "new")
	if d := k.wait(t, 1)[0]; string(d.Data) != "new" {
		t.Errorf("got %q", d.Data)
	} else if err := d.Ack(t.Context()); err != nil {
		t.Error(err)
	}
	var other taker
	b.Consume("B.other", freeSlots(1), other.take)
	waitFor(t, 10*time.Second, func() string {
		_, err := js.ConsumerInfo("audit", "B=other")
		return errText(err)
	})
	s.publish(t, "B.other", "of another job")
	if d := other.wait(t, 1)[0]; string(d.Data) != "of another job" {
		t.Errorf("got %q", d.Data)
	}
}

func errText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func TestNATSDurableConsumerGone(t *testing.T) {
	s := newNATSServer(t, "-js", "-sd", t.TempDir())
	b, _ := openNATSForTest(t, s.durable())
	var k taker
	b.Consume("P.job", freeSlots(1), k.take)
	waitListening(t, b, "P.job", &k)
	js, _ := s.client(t).JetStream()
	waitFor(t, 5*time.Second, requested(s, "P.job", 1))
	if err := js.DeleteStream("P=job"); err != nil {
		t.Fatal(err)
	}
	waitFor(t, 10*time.Second, func() string {
		_, err := b.Publish(t.Context(), Message{"P.job", []byte("x"), true})
		return errText(err)
	})
	k.wait(t, 1)
}

func TestNATSDurableStreamFull(t *testing.T) {
	s := newNATSServer(t, "-js", "-sd", t.TempDir())
	js, _ := s.client(t).JetStream()
	if _, err := js.AddStream(&nats.StreamConfig{
		Name: "s", Subjects: []string{"P.job"}, Retention: nats.WorkQueuePolicy, MaxMsgs: 1, Discard: nats.DiscardNew,
	}); err != nil {
		t.Fatal(err)
	}
	b, _ := openNATSForTest(t, s.durable())
	b.Consume("P.job", Slots{Limit: atMost(1), Free: func() int { return 0 }}, func(Delivery) {})
	waitFor(t, 10*time.Second, func() string {
		_, err := b.Publish(t.Context(), Message{"P.job", nil, true})
		return errText(err)
	})
	if sent, err := b.Publish(t.Context(), Message{"P.job", nil, true}); sent != 0 || codeOf(err) != codeNATSTask {
		t.Errorf("Publish to a full stream = %d, %v; want %s", sent, err, codeNATSTask)
	}
}

func TestNATSWithoutJetStream(t *testing.T) {
	s := newNATSServer(t)
	b, changed := openNATSForTest(t, s.durable())
	c := b.Consume("P.job", freeSlots(1), func(Delivery) {})
	err := nextChange(t, changed, isAway)
	for err != nil && codeOf(err) != codeNATSJetStream {
		err = nextChange(t, changed, isAway)
	}
	if !strings.Contains(err.Error(), "durable needs JetStream enabled on the server") {
		t.Errorf("changed(%v); want what durable needs", err)
	}
	if _, err := b.Publish(t.Context(), Message{Subject: "x"}); err != nil {
		t.Errorf("Publish without JetStream = %v", err)
	}
	c.Stop()
	nextChange(t, changed, isConnected)
	if err := probeNATS(t.Context(), b.brokerOptions); codeOf(err) != codeNATSJetStream {
		t.Errorf("probeNATS = %v; want %s", err, codeNATSJetStream)
	}
	plain := b.brokerOptions
	plain.config.Durable = false
	if err := probeNATS(t.Context(), plain); err != nil {
		t.Errorf("probeNATS = %v", err)
	}
}
