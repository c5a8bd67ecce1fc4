//go:build unix

package main

// broker_redis_stream_test.go holds what must be true of tasks that Redis keeps in streams.

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

// quick shortens the times after which claims are lost.
func quick(b *redisBroker) {
	b.renewal, b.lostAfter, b.lookPause = 200*time.Millisecond, time.Second, 200*time.Millisecond
}

// pending counts the group's unacknowledged entries.
func (s *redisServer) pending(t testing.TB, stream string) int64 {
	t.Helper()
	p, err := s.client.XPending(context.Background(), stream, "p").Result()
	if err != nil {
		t.Fatal(err)
	}
	return p.Count
}

func (s *redisServer) waitForStream(t testing.TB, stream string, length, pending int64) {
	t.Helper()
	waitFor(t, 20*time.Second, func() string {
		n, err := s.client.XLen(context.Background(), stream).Result()
		if p := s.pending(t, stream); err != nil || n != length || p != pending {
			return fmt.Sprintf("stream %s has %d entries, %d pending, %v; want %d and %d", stream, n, p, err, length, pending)
		}
		return ""
	})
}

func (s *redisServer) waitForGroup(t testing.TB, stream string) {
	t.Helper()
	waitFor(t, 20*time.Second, func() string {
		if groups, err := s.client.XInfoGroups(context.Background(), stream).Result(); err != nil || len(groups) == 0 {
			return fmt.Sprintf("no group yet: %v", err)
		}
		return ""
	})
}

func acknowledge(t testing.TB, deliveries ...Delivery) {
	t.Helper()
	for _, d := range deliveries {
		if err := d.Ack(context.Background()); err != nil {
			t.Errorf("ack: %v", err)
		}
	}
}

func TestRedisStreamShared(t *testing.T) {
	s := newRedisServer(t)
	const n = 300
	for i := range n / 3 { // from before any worker was there
		s.add(t, "p.job", taskJSON(fmt.Sprint("t", i)))
	}
	var takers []*redisTaker
	for i := range 3 {
		b := openRedisForTest(t, s.durable(), fmt.Sprint("w", i), nil)
		k := newTaker(5)
		takers = append(takers, k)
		consumer := b.Consume("p.job", Slots{Limit: atMost(5), Free: func() int { return int(k.free.Load()) }}, func(d Delivery) {
			if !d.Held || d.Attempt != 1 || d.HeldFor != 0 {
				t.Errorf("delivery = %+v", d)
			}
			k.take(d)
			acknowledge(t, d)
		})
		defer consumer.Stop()
	}
	publisher := openRedisForTest(t, s.durable(), "w9", nil)
	for i := n / 3; i < n; i++ {
		m := Message{Subject: "p.job", Data: []byte(taskJSON(fmt.Sprint("t", i))), Task: true}
		if sent, err := publisher.Publish(context.Background(), m); sent != 1 || err != nil {
			t.Fatalf("publish = %d, %v", sent, err)
		}
	}
	seen := map[string]int{}
	waitFor(t, 20*time.Second, func() string {
		clear(seen)
		for _, k := range takers {
			for _, id := range k.ids() {
				seen[id]++
			}
		}
		if len(seen) < n {
			return fmt.Sprintf("%d of %d tasks", len(seen), n)
		}
		return ""
	})
	for id, times := range seen {
		if times != 1 {
			t.Errorf("%s was delivered %d times", id, times)
		}
	}
	s.waitForStream(t, "p.job", 0, 0) // acknowledged is deleted
}

// An entry that comes to an idle worker is read by the wait that it ends, and the next thing is another wait.
func TestRedisStreamIdle(t *testing.T) {
	s := newRedisServer(t)
	b := openRedisForTest(t, s.durable(), "w1", nil)
	k := newTaker(5)
	defer k.consume(b, "p.job").Stop()
	waits := func() string {
		return unless(strings.Contains(s.info(t, "clients"), "\nblocked_clients:1\r"), "nobody waits for an entry")
	}
	reads := func() (n int) {
		_, stats, _ := strings.Cut(s.info(t, "commandstats"), "cmdstat_xreadgroup:calls=")
		fmt.Sscan(strings.NewReplacer(",", " ").Replace(stats), &n)
		return n
	}
	waitFor(t, 20*time.Second, waits)
	before := reads()
	const n = 5
	for i := range n {
		s.add(t, "p.job", taskJSON(fmt.Sprint("t", i)))
		waitFor(t, 20*time.Second, func() string { return unless(len(k.ids()) == i+1, "not delivered") })
		k.free.Add(1)
		acknowledge(t, k.all()[i])
		waitFor(t, 20*time.Second, waits)
	}
	if got := reads() - before; before == 0 || got < n || got > n+2 { // a wait may end by itself
		t.Errorf("%d reads for %d entries, and %d before", got, n, before)
	}
}

func TestRedisStreamFree(t *testing.T) {
	s := newRedisServer(t)
	for i := range 20 {
		s.add(t, "p.a", taskJSON(fmt.Sprint("a", i)))
		s.add(t, "p.b", taskJSON(fmt.Sprint("b", i)))
	}
	b := openRedisForTest(t, s.durable(), "w1", nil)
	// Two jobs share three slots; the second has a limit of its own.
	var slots atomic.Int64
	slots.Store(3)
	free := func() int { return int(slots.Load()) }
	got := make(chan Delivery, 100)
	take := func(d Delivery) {
		slots.Add(-1)
		got <- d
	}
	ca := b.Consume("p.a", Slots{Limit: atMost(3), Free: free}, take)
	cb := b.Consume("p.b", Slots{Limit: atMost(1), Free: free}, take)
	defer ca.Stop()
	defer cb.Stop()
	first := []Delivery{<-got, <-got, <-got}
	for range 20 {
		if n := s.pending(t, "p.a") + s.pending(t, "p.b"); n != 3 {
			t.Fatalf("%d entries taken for 3 slots", n)
		}
		time.Sleep(10 * time.Millisecond) // nothing is to happen
	}
	// A slot that becomes free is used at once, though the reader may be waiting for something else.
	for i := range 16 { // so long there are entries of a
		if n := s.pending(t, "p.b"); n > 1 {
			t.Fatalf("%d entries of b taken; its limit is 1", n)
		}
		began := time.Now()
		acknowledge(t, first[i])
		slots.Add(1)
		ca.Wake()
		select {
		case d := <-got:
			first = append(first, d)
		case <-time.After(10 * time.Second):
			t.Fatalf("nothing came for the free slot, after %d", i)
		}
		if took := time.Since(began); took > 2*time.Second {
			t.Errorf("a free slot waited %v", took)
		}
	}
	for _, d := range first[16:] {
		acknowledge(t, d)
		slots.Add(1)
	}
	ca.Wake()
	for range 40 - len(first) {
		select {
		case d := <-got:
			acknowledge(t, d)
			slots.Add(1)
			cb.Wake()
		case <-time.After(10 * time.Second):
			t.Fatal("not all entries came")
		}
	}
	s.waitForStream(t, "p.a", 0, 0)
	s.waitForStream(t, "p.b", 0, 0)
}

// TestRedisStreamWake has the reader wait for one job while room comes for another.
func TestRedisStreamWake(t *testing.T) {
	s := newRedisServer(t)
	b := openRedisForTest(t, s.durable(), "w1", nil)
	idle, full := newTaker(1), newTaker(1)
	defer idle.consume(b, "p.idle").Stop()
	consumer := full.consume(b, "p.full")
	defer consumer.Stop()
	s.waitForGroup(t, "p.full")
	s.add(t, "p.full", taskJSON("x0"))
	for i := range 20 {
		acknowledged := full.wait(t, i+1)[i]
		s.add(t, "p.full", taskJSON(fmt.Sprint("x", i+1)))
		began := time.Now()
		acknowledge(t, acknowledged)
		full.free.Add(1)
		consumer.Wake()
		full.wait(t, i+2)
		if took := time.Since(began); took > 2*time.Second {
			t.Fatalf("room for a job was noticed after %v", took)
		}
	}
	// And new jobs are read at once too.
	late := newTaker(1)
	began := time.Now()
	s.add(t, "p.late", taskJSON("l"))
	c := late.consume(b, "p.late")
	late.wait(t, 1)
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("a new job was read after %v", took)
	}
	began = time.Now()
	c.Stop()
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("stop took %v", took)
	}
	acknowledge(t, late.all()...) // after Stop
	s.waitForStream(t, "p.late", 0, 0)
}

func TestRedisStreamTakenOver(t *testing.T) {
	s := newRedisServer(t)
	dead := openRedisForTest(t, s.durable(), "dead", quick)
	k1 := newTaker(2)
	k1.consume(dead, "p.job")
	s.add(t, "p.job", taskJSON("a"))
	s.add(t, "p.job", taskJSON("b"))
	k1.wait(t, 2)

	alive := openRedisForTest(t, s.durable(), "alive", quick)
	k2 := newTaker(5)
	defer k2.consume(alive, "p.job").Stop()
	s.waitForReceivers(t, "p.job", 2)
	time.Sleep(2 * time.Second) // longer than lostAfter: renewing keeps them
	if got := k2.ids(); len(got) > 0 {
		t.Fatalf("taken over from a living worker: %q", got)
	}
	began := time.Now()
	dead.Close() // as if it had crashed: nothing is settled
	got := k2.wait(t, 2)
	if took := time.Since(began); took < 500*time.Millisecond {
		t.Errorf("taken over after %v", took)
	}
	if got[0].Attempt != 2 || !got[0].Held {
		t.Errorf("delivery = %+v; want attempt 2", got[0])
	}
	acknowledge(t, got...)
	s.waitForStream(t, "p.job", 0, 0)
}

// TestRedisStreamSameIdentity restarts a worker: it gets back what it had, at once.
func TestRedisStreamSameIdentity(t *testing.T) {
	s := newRedisServer(t)
	first := openRedisForTest(t, s.durable(), "w1", nil)
	k1 := newTaker(3)
	k1.consume(first, "p.job")
	for i := range 5 {
		s.add(t, "p.job", taskJSON(fmt.Sprint("t", i)))
	}
	k1.wait(t, 3)
	first.Close()

	second := openRedisForTest(t, s.durable(), "w1", nil)
	k2 := newTaker(2) // less room than it had
	consumer := k2.consume(second, "p.job")
	defer consumer.Stop()
	began := time.Now()
	got := k2.wait(t, 2)
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("own entries came after %v", took)
	}
	// Those of one read are handed over at once, so in any order.
	if ids := slices.Sorted(slices.Values(k2.ids())); !slices.Equal(ids, []string{"t0", "t1"}) || got[0].Attempt != 2 {
		t.Errorf("got %q, attempt %d; want the first two again", ids, got[0].Attempt)
	}
	for i := range 5 {
		acknowledge(t, k2.wait(t, i+1)[i])
		k2.free.Add(1)
		consumer.Wake()
	}
	if ids := slices.Sorted(slices.Values(k2.ids())); !slices.Equal(ids, []string{"t0", "t1", "t2", "t3", "t4"}) {
		t.Errorf("got %q", ids)
	}
	s.waitForStream(t, "p.job", 0, 0)
}

func TestRedisStreamNack(t *testing.T) {
	s := newRedisServer(t)
	one := openRedisForTest(t, s.durable(), "w1", nil) // with the usual times: nothing is lost for 30 s
	k1 := newTaker(1)
	consumer := k1.consume(one, "p.job")
	s.add(t, "p.job", taskJSON("a"))
	d := k1.wait(t, 1)[0]
	two := openRedisForTest(t, s.durable(), "w2", func(b *redisBroker) { b.lookPause = 100 * time.Millisecond })
	k2 := newTaker(1)
	defer k2.consume(two, "p.job").Stop()
	consumer.Stop()
	began := time.Now()
	d.Nack(errors.New("draining"))
	if err := d.Ack(context.Background()); err != nil { // only the first counts
		t.Error(err)
	}
	got := k2.wait(t, 1)
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("put back, it was taken after %v", took)
	}
	if got[0].Attempt != 2 {
		t.Errorf("attempt %d; want 2", got[0].Attempt)
	}
	acknowledge(t, got...)
	s.waitForStream(t, "p.job", 0, 0)
}

// TestRedisBothWays sends tasks over the channel and into the stream, in both orders and twice.
func TestRedisBothWays(t *testing.T) {
	s := newRedisServer(t)
	var takers []*redisTaker
	for i := range 2 {
		b := openRedisForTest(t, s.durable(), fmt.Sprint("w", i), quick)
		k := newTaker(1000)
		takers = append(takers, k)
		defer k.consume(b, "p.job").Stop()
	}
	s.waitForReceivers(t, "p.job", 2)
	s.waitForGroup(t, "p.job")
	const n = 100
	for i := range n {
		data := taskJSON(fmt.Sprint("t", i))
		switch i % 4 {
		case 0:
			s.add(t, "p.job", data)
			s.publish(t, "p.job", data)
		case 1:
			s.publish(t, "p.job", data)
			s.add(t, "p.job", data)
		case 2:
			s.publish(t, "p.job", data) // a plain publisher alone
		case 3:
			s.add(t, "p.job", data)
			s.add(t, "p.job", data)
		}
	}
	s.publish(t, "p.job", "no task")
	all := func() []string { return append(takers[0].ids(), takers[1].ids()...) }
	waitFor(t, 20*time.Second, func() string {
		if got := len(all()); got < n+1 {
			return fmt.Sprintf("%d of %d tasks", got, n+1)
		}
		return ""
	})
	s.waitForStream(t, "p.job", n+1, n+1) // duplicates are gone
	ids := all()
	slices.Sort(ids)
	if len(slices.Compact(slices.Clone(ids))) != n+1 || len(ids) != n+1 {
		t.Errorf("%d deliveries of %d tasks: %q", len(ids), n+1, ids)
	}
	for _, k := range takers {
		acknowledge(t, k.all()...)
	}
	s.waitForStream(t, "p.job", 0, 0)
	// A late duplicate goes to whoever ran the task, which reports it again, over either way.
	before := len(takers[0].all())
	if before == 0 || takers[0].ids()[0] == "" {
		t.Skip("the first worker had nothing")
	}
	again := string(takers[0].all()[0].Data)
	s.publish(t, "p.job", again)
	takers[0].wait(t, before+1)
	s.add(t, "p.job", again)
	waitFor(t, 10*time.Second, func() string {
		if n, _ := s.client.XLen(context.Background(), "p.job").Result(); n == 0 || s.pending(t, "p.job") == 1 {
			return ""
		}
		return "the duplicate was not read"
	})
}

// TestRedisBothWaysOwnerDies kills the owner of a task that was sent both ways: it runs elsewhere, once.
func TestRedisBothWaysOwnerDies(t *testing.T) {
	s := newRedisServer(t)
	dead := openRedisForTest(t, s.durable(), "dead", quick)
	k1 := newTaker(1) // room for one of the two
	k1.consume(dead, "p.job")
	s.waitForReceivers(t, "p.job", 1)
	s.waitForGroup(t, "p.job")
	s.add(t, "p.job", taskJSON("a"))
	s.publish(t, "p.job", taskJSON("a"))
	k1.wait(t, 1)
	dead.Close()
	alive := openRedisForTest(t, s.durable(), "alive", quick)
	k2 := newTaker(5)
	defer k2.consume(alive, "p.job").Stop()
	acknowledge(t, k2.wait(t, 1)...)
	s.waitForStream(t, "p.job", 0, 0)
	if ids := k2.ids(); !slices.Equal(ids, []string{"a"}) {
		t.Errorf("got %q", ids)
	}
}

// TestRedisStreamClaimOfLostEntry has a claim that names an entry which its sender has trimmed.
func TestRedisStreamClaimOfLostEntry(t *testing.T) {
	s := newRedisServer(t)
	ctx := context.Background()
	first := s.add(t, "p.job", taskJSON("a"))
	s.client.Set(ctx, "job_item:claim:p:a", first, time.Hour)
	s.add(t, "p.job", taskJSON("a"))
	if err := s.client.XDel(ctx, "p.job", first).Err(); err != nil {
		t.Fatal(err)
	}
	b := openRedisForTest(t, s.durable(), "w1", nil)
	k := newTaker(5)
	defer k.consume(b, "p.job").Stop()
	acknowledge(t, k.wait(t, 1)...)
	s.waitForStream(t, "p.job", 0, 0)
}

func TestRedisStreamGroupGone(t *testing.T) {
	s := newRedisServer(t)
	b := openRedisForTest(t, s.durable(), "w1", quick)
	k := newTaker(50)
	defer k.consume(b, "p.job").Stop()
	for i := range 3 {
		s.waitForGroup(t, "p.job")
		s.add(t, "p.job", taskJSON(fmt.Sprint("a", i)))
		d := k.wait(t, i+1)[i]
		if i == 0 {
			s.client.FlushAll(context.Background())
		} else {
			s.client.XGroupDestroy(context.Background(), "p.job", "p")
		}
		acknowledge(t, d)
	}
	// Something else in the place of one stream does not disturb the others.
	s.client.Set(context.Background(), "p.wrong", "text", 0)
	wrong := newTaker(1)
	defer wrong.consume(b, "p.wrong").Stop()
	before := len(k.all())
	s.waitForGroup(t, "p.job")
	s.add(t, "p.job", taskJSON("last"))
	k.wait(t, before+1)
}

// TestRedisStreamServerKilled kills the server again and again while tasks come and go.
func TestRedisStreamServerKilled(t *testing.T) {
	s := newRedisServer(t)
	var done atomic.Int64
	var takers []*redisTaker
	for i := range 2 {
		b := openRedisForTest(t, s.durable(), fmt.Sprint("w", i), func(b *redisBroker) {
			b.renewal, b.lookPause = time.Second, time.Second
		})
		k := newTaker(8)
		takers = append(takers, k)
		consumer := b.Consume("p.job", Slots{Limit: atMost(8), Free: func() int { return 8 }}, func(d Delivery) {
			k.take(d)
			go func() { // ends when it has been acknowledged, or not
				time.Sleep(5 * time.Millisecond) // the work
				d.Ack(context.Background())      // an error is mended by the broker
				done.Add(1)
			}()
		})
		defer consumer.Stop()
	}
	var sent []string
	for round := range 4 {
		for i := range 100 {
			id := fmt.Sprintf("t%d-%d", round, i)
			if _, err := s.client.XAdd(context.Background(), &redis.XAddArgs{Stream: "p.job", Values: []any{"data", taskJSON(id)}}).Result(); err != nil {
				t.Fatal(err)
			}
			sent = append(sent, id)
		}
		s.stop(t)
		s.start(t)
	}
	s.waitForStream(t, "p.job", 0, 0)
	times := map[string]int{}
	for _, k := range takers {
		for _, id := range k.ids() {
			times[id]++
		}
	}
	again := 0
	for _, id := range sent {
		if times[id] == 0 {
			t.Errorf("task %s was lost", id)
		}
		again += times[id] - 1
	}
	t.Logf("%d tasks, %d delivered again to the worker whose acknowledgement was lost", len(sent), again)
}

// TestRedisAckWhileAway acknowledges while there is no connection: the caller is told, and it is done later.
func TestRedisAckWhileAway(t *testing.T) {
	s := newRedisServer(t)
	b := openRedisForTest(t, s.durable(), "w1", nil)
	k := newTaker(1)
	defer k.consume(b, "p.job").Stop()
	s.add(t, "p.job", taskJSON("a"))
	d := k.wait(t, 1)[0]
	s.stop(t)
	if err := d.Ack(context.Background()); codeOf(err) != codeRedisSettle {
		t.Errorf("ack without a server = %v", err)
	}
	s.start(t)
	b.waitConnected(t)
	s.waitForStream(t, "p.job", 0, 0)
	if n := len(k.all()); n != 1 {
		t.Errorf("%d deliveries; want 1", n)
	}
}

// TestRedisFirstToAsk asks some streams that had entries the last time, and then those that may have some, each in its
// turn, so that busy ones let the others have theirs.
func TestRedisFirstToAsk(t *testing.T) {
	var open []openStream
	for i := range 4 * maxRedisAsked {
		open = append(open, openStream{&redisStream{subject: fmt.Sprint(i), backlog: true, busy: i >= 3*maxRedisAsked}, 1})
	}
	asked := map[*redisStream]bool{}
	for range 6 {
		first := firstToAsk(open)
		if len(first) != maxRedisAsked || first[0].stream.busy || !first[len(first)-1].stream.busy {
			t.Fatalf("%d streams are asked, the first is busy: %v, the last: %v; want %d, false, true",
				len(first), first[0].stream.busy, first[len(first)-1].stream.busy, maxRedisAsked)
		}
		for _, o := range first {
			asked[o.stream] = true
			o.stream.backlog = o.stream.busy // the others are asked in vain
		}
	}
	for _, o := range open[:3*maxRedisAsked] {
		if !asked[o.stream] {
			t.Errorf("stream %q may have entries and is not asked", o.stream.subject)
		}
	}
	if few := open[:maxRedisAsked]; len(firstToAsk(few)) != len(few) {
		t.Error("of few streams not all are asked")
	}
}
