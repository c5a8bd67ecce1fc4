//go:build unix

package main

// redelivery_test.go has brokers deliver tasks again that are still being done, and checks that nobody else begins with
// them, and that somebody does once their worker is gone.

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
)

// A heldTask is a task that runs on one of two workers until it is released, each behind a gate of its own.
type heldTask struct {
	t            *testing.T
	kind         brokerKind
	server       testServer
	events       *collector
	holder, heir *agent
	gate         *portGate // of the holder
	dir          string    // notes of the runs
}

const heldTaskID = "held-1"

func startHeldTask(t *testing.T, kind brokerKind, server testServer) *heldTask {
	t.Helper()
	h := &heldTask{t: t, kind: kind, server: server, events: server.collect(t), dir: t.TempDir()}
	h.holder, h.gate = h.worker("holder")
	kind.publish(t, server, "hold", heldTaskID, "{}")
	h.awaitNote("holder begin")
	h.awaitHeld()
	h.heir, _ = h.worker("heir")
	return h
}

// worker starts a worker behind a gate.
func (h *heldTask) worker(name string) (*agent, *portGate) {
	h.t.Helper()
	connection := h.kind.connection(h.server)
	port := regexp.MustCompile(`port: (\d+)`)
	gate := openPortGate(h.t, "127.0.0.1:"+port.FindStringSubmatch(connection)[1])
	_, to, _ := strings.Cut(gate.listener.Addr().String(), ":")
	a := newAgent(h.t, fmt.Sprintf(`identity_id: %s
credential: {project_id: p1}
broker_connection: %s
concurrency: 1
drain_timeout: 0s
kill_after: 200ms
jobs:
  - event: hold
    cmd: 'echo %[1]s begin >> %[3]s/notes; until test -e %[3]s/enough; do sleep 0.05; done; echo %[1]s end >> %[3]s/notes'
`, name, port.ReplaceAllString(connection, "port: "+to), h.dir))
	return a.start(), gate
}

func (h *heldTask) notes() []string {
	content, _ := os.ReadFile(filepath.Join(h.dir, "notes"))
	return strings.Split(strings.TrimSpace(string(content)), "\n")
}

func (h *heldTask) awaitNote(note string) {
	h.t.Helper()
	waitFor(h.t, 20*time.Second, func() string {
		if notes := h.notes(); !slices.Contains(notes, note) {
			return fmt.Sprintf("notes are %q; want %q", notes, note)
		}
		return ""
	})
}

// awaitHeld waits until it can be known who has the task.
func (h *heldTask) awaitHeld() {
	h.t.Helper()
	waitFor(h.t, 10*time.Second, func() string {
		h.server.publish(h.t, heldTaskID+"_listen", "?")
		if countOf(h.events.of(heldTaskID), "_listen.callback") == 0 {
			return "no sign of life"
		}
		return ""
	})
}

func (h *heldTask) awaitHealthy() {
	h.t.Helper()
	for _, a := range []*agent{h.holder, h.heir} {
		a.awaitHealth("ok", "")
	}
}

func (h *heldTask) awaitLog(a *agent, text string) {
	h.t.Helper()
	waitFor(h.t, 30*time.Second, func() string {
		if !strings.Contains(a.log.String(), text) {
			return fmt.Sprintf("nothing of %q in the log:\n%s", text, a.log)
		}
		return ""
	})
}

// release lets the task end, and checks that it has run once, on its holder.
func (h *heldTask) release() {
	h.t.Helper()
	if err := os.WriteFile(filepath.Join(h.dir, "enough"), nil, 0o600); err != nil {
		h.t.Fatal(err)
	}
	h.events.finish(h.t, heldTaskID)
	for _, a := range []*agent{h.holder, h.heir} {
		waitFor(h.t, 20*time.Second, func() string {
			if jobs := a.health().Jobs; jobs["running"]+jobs["queued"] > 0 {
				return fmt.Sprintf("jobs are %v", jobs)
			}
			return ""
		})
	}
	if got := h.notes(); !slices.Equal(got, []string{"holder begin", "holder end"}) {
		h.t.Errorf("the task noted %q; want one run of the holder\nholder: %s\nheir: %s", got, h.holder.log, h.heir.log)
	}
	if n := countOf(h.events.of(heldTaskID), "_finish"); n != 1 {
		h.t.Errorf("%d finish events", n)
	}
}

const (
	logLeft  = "left to that one"
	logAway  = "no connection to the broker"
	logAgain = "delivered again while it is being done"
)

// TestRedeliveryOnNATS gives a held task to somebody else, as a server does that has forgotten who holds it. Claims are
// lost after 3 s here.
func TestRedeliveryOnNATS(t *testing.T) {
	t.Parallel() // it waits
	kind := brokerKinds[slices.IndexFunc(brokerKinds, func(k brokerKind) bool { return k.name == "nats-durable" })]
	start := func(t *testing.T) (*heldTask, *nats.Conn) {
		server := startNATS(t).(*natsServer)
		nc := server.client(t)
		js, err := nc.JetStream()
		if err != nil {
			t.Fatal(err)
		}
		name := natsName("p1.hold")
		if _, err := js.AddStream(&nats.StreamConfig{Name: name, Subjects: []string{"p1.hold"}, Retention: nats.WorkQueuePolicy}); err != nil {
			t.Fatal(err)
		}
		_, err = js.AddConsumer(name, &nats.ConsumerConfig{
			Durable: name, FilterSubject: "p1.hold", AckPolicy: nats.AckExplicitPolicy, AckWait: 3 * time.Second, MaxAckPending: -1,
		})
		if err != nil {
			t.Fatal(err)
		}
		return startHeldTask(t, kind, server), nc
	}
	// forget puts the task back behind its holder's back, as a server does that has forgotten who has it.
	forget := func(t *testing.T, nc *nats.Conn) {
		t.Helper()
		name := natsName("p1.hold")
		reply := fmt.Sprintf("$JS.ACK.%s.%s.1.1.1.%d.0", name, name, time.Now().UnixNano())
		if err := nc.Publish(reply, []byte("-NAK")); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("forgotten", func(t *testing.T) {
		t.Parallel()
		h, nc := start(t)
		forget(t, nc)
		h.awaitLog(h.heir, logLeft)
		// The holder's claim is good again: nobody is given the task for longer than a claim lasts.
		time.Sleep(4 * time.Second) // it is about what does not happen
		if n := strings.Count(h.heir.log.String(), logLeft); n != 1 {
			t.Errorf("the heir was given the task %d times", n)
		}
		h.release()
	})
	t.Run("restarted", func(t *testing.T) {
		t.Parallel()
		h, _ := start(t)
		h.server.stop(t)
		h.server.start(t)
		h.awaitLog(h.heir, logAway)
		h.awaitHealthy()
		h.release()
	})
	t.Run("cut", func(t *testing.T) {
		t.Parallel()
		h, nc := start(t)
		h.gate.open.Store(false)
		h.gate.cut()
		forget(t, nc)
		h.awaitLog(h.holder, logAway)
		h.gate.open.Store(true)
		h.awaitLog(h.heir, logLeft)
		h.release()
	})
	t.Run("halted", func(t *testing.T) {
		t.Parallel()
		h, nc := start(t)
		pid := h.holder.childPID()
		if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		forget(t, nc)
		time.Sleep(3 * time.Second) // a host may be that slow to answer
		if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
		h.awaitLog(h.heir, logLeft)
		h.release()
	})
	t.Run("killed", func(t *testing.T) {
		t.Parallel()
		h, _ := start(t)
		h.killHolder()
		h.expectHeir(8 * time.Second)
	})
	t.Run("drained", func(t *testing.T) {
		t.Parallel()
		h, _ := start(t)
		h.holder.cmd.Process.Signal(syscall.SIGTERM)
		h.expectHeir(5 * time.Second)
	})
}

// TestRedeliveryOnRabbitMQ loses the holder's connection, on which the broker gives its task to the next.
func TestRedeliveryOnRabbitMQ(t *testing.T) {
	kind := brokerKinds[slices.IndexFunc(brokerKinds, func(k brokerKind) bool { return k.name == "rabbitmq" })]
	t.Run("restarted", func(t *testing.T) {
		h := startHeldTask(t, kind, startRabbitMQ(t))
		h.server.stop(t)
		h.server.start(t)
		h.awaitLog(h.holder, logAgain)
		h.release()
	})
	t.Run("cut", func(t *testing.T) {
		t.Parallel()
		h := startHeldTask(t, kind, startRabbitMQ(t))
		h.gate.cut()
		h.awaitLog(h.holder, logAgain)
		h.release()
	})
	t.Run("killed", func(t *testing.T) {
		t.Parallel()
		h := startHeldTask(t, kind, startRabbitMQ(t))
		h.killHolder()
		h.expectHeir(6 * time.Second)
	})
	t.Run("drained", func(t *testing.T) {
		t.Parallel()
		h := startHeldTask(t, kind, startRabbitMQ(t))
		h.holder.cmd.Process.Signal(syscall.SIGTERM)
		h.expectHeir(5 * time.Second)
	})
}

func (h *heldTask) killHolder() {
	pid := h.holder.childPID()
	h.holder.cmd.Process.Kill()
	syscall.Kill(pid, syscall.SIGKILL)
	<-h.holder.gone
}

// expectHeir waits until the heir has begun with the task.
func (h *heldTask) expectHeir(limit time.Duration) {
	h.t.Helper()
	began := time.Now()
	h.awaitNote("heir begin")
	h.t.Logf("the heir began after %v", time.Since(began).Round(10*time.Millisecond))
	if took := time.Since(began); took > limit {
		h.t.Errorf("the heir began after %v; want at most %v\n%s", took, limit, h.heir.log)
	}
}

// TestListens asks every broker whether somebody has a task.
func TestListens(t *testing.T) {
	onEveryBroker(t, func(t *testing.T, kind brokerKind, server testServer) {
		if !kind.durable {
			t.Skip("it delivers nothing again")
		}
		t.Parallel()
		a := newAgent(t, "credential: {project_id: p1}\nbroker_connection: "+kind.connection(server)+"\njobs: [{event: e, cmd: 'true'}]\n")
		cfg, err := loadConfig(filepath.Join(a.dir, "config.yaml"), os.LookupEnv)
		if err != nil {
			t.Fatal(err)
		}
		asks, has := openForTest(t, cfg.Broker, "p1", "asks"), openForTest(t, cfg.Broker, "p1", "has")
		await := func(id string, want bool) {
			t.Helper()
			waitFor(t, 10*time.Second, func() string {
				if got, err := asks.Listens(context.Background(), id); got != want || err != nil {
					return fmt.Sprintf("Listens(%q) = %v, %v; want %v", id, got, err, want)
				}
				return ""
			})
		}
		await("a.1", false)
		answer := func([]byte) {
			has.Publish(context.Background(), Message{Subject: "a.1_listen.callback", Data: []byte("world")})
		}
		listening := has.Subscribe("a.1_listen", func(data []byte) { go answer(data) })
		before := time.Now()
		await("a.1", true)
		await("a.2", false)
		if listening.Asked != nil && listening.Asked().Before(before) {
			t.Errorf("asked %v before it was", before.Sub(listening.Asked()))
		}
		listening.Stop()
		await("a.1", false)
		// A subscriber that does not answer is no worker that lives.
		switch server := server.(type) {
		case *natsServer:
			along := server.client(t)
			if _, err := along.SubscribeSync(">"); err != nil {
				t.Fatal(err)
			}
			if err := along.Flush(); err != nil { // else the question may come first
				t.Fatal(err)
			}
			await("a.3", false)
			if asks.Broker.(*natsBroker).answersAtOnce() {
				t.Error("the server is expected to tell at once although somebody reads along")
			}
		case *redisServer:
			pubsub := server.client.Subscribe(context.Background(), "a.3_listen")
			defer pubsub.Close()
			if _, err := pubsub.Receive(context.Background()); err != nil {
				t.Fatal(err)
			}
			await("a.3", false)
		}
	})
}

// TestRedeliveryIsLookedInto checks what a worker does with deliveries that another one may have, by what their broker can
// do about them.
func TestRedeliveryIsLookedInto(t *testing.T) {
	t.Parallel() // it waits
	dir := t.TempDir()
	w, stop := openWorkerForTest(t, dir, "jobs: [{event: note, cmd: 'echo {{task_id}} >> ran'}]\n")
	broker := w.currentLink().broker
	var settled atomic.Bool
	type outcome struct {
		heldDelivery
		left atomic.Int32
	}
	deliver := func(id string, leaves, tells bool) *outcome {
		o := &outcome{}
		d := Delivery{
			Subject: "local.note", Data: []byte(`{"task_id":"` + id + `"}`), Held: true, Attempt: 2, Again: true,
			Ack:  func(context.Context) error { o.acks.Add(1); return nil },
			Nack: func(error) { o.nacks.Add(1) },
		}
		if leaves {
			d.Leave = func() { o.left.Add(1) }
		}
		if tells {
			d.Settled = func(context.Context) (bool, error) { return settled.Load(), nil }
		}
		w.take(w.currentLink(), "note", d)
		return o
	}
	await := func(what string, o *outcome, acks, nacks, left int32) {
		t.Helper()
		waitFor(t, 10*time.Second, func() string {
			if a, n, l := o.acks.Load(), o.nacks.Load(), o.left.Load(); a != acks || n != nacks || l != left {
				return fmt.Sprintf("%s: %d acks, %d nacks, left %d times; want %d, %d, %d", what, a, n, l, acks, nacks, left)
			}
			return ""
		})
	}
	unsubscribe := map[string]func(){}
	for _, id := range []string{"shared", "passed", "kept", "drained"} {
		unsubscribe[id] = broker.Subscribe(id+"_listen", func([]byte) {}).Stop
	}
	await("held, where claims are shared", deliver("shared", true, true), 0, 0, 1)
	passed, kept, drained := deliver("passed", false, false), deliver("kept", false, true), deliver("drained", false, true)
	await("nobody's", deliver("free", true, true), 1, 0, 0)
	await("held, to be given to its holder", passed, 0, 1, 0)
	await("held, with a claim that is kept meanwhile", kept, 0, 0, 0)
	settled.Store(true)
	unsubscribe["kept"]()
	await("settled by its holder", kept, 0, 1, 0)
	stop()
	await("held, when the worker stops", drained, 0, 1, 0)
	if ran, _ := os.ReadFile(filepath.Join(dir, "ran")); string(ran) != "free\n" {
		t.Errorf("ran %q; want the free one", ran)
	}
}

// TestUnsettledIsListenedFor ends tasks whose broker could not be told, in the end or while they ran: it delivers them
// again, and whoever gets them has to find that this worker knows them.
func TestUnsettledIsListenedFor(t *testing.T) {
	server := newNATSServer(t, "-js", "-sd", t.TempDir())
	dir := t.TempDir()
	w, _ := openWorkerForTest(t, dir, `
credential: {project_id: p1}
broker_connection: `+withLogin(server.connection(), "durable: true")+`
jobs:
  - {event: quick, cmd: 'true'}
  - {event: long, cmd: 'until test -e go; do sleep 0.02; done'}
`)
	asks := openForTest(t, BrokerConfig{Type: "nats", Host: server.addr, Durable: true}, "p1", "asks")
	lost := errors.New("connection lost")
	deliver := func(event, id string, heldFor time.Duration, ack error) {
		w.take(w.currentLink(), event, Delivery{
			Subject: "p1." + event, Data: []byte(`{"task_id":"` + id + `"}`), Held: true, Attempt: 1, HeldFor: heldFor,
			Ack: func(context.Context) error { return ack }, Nack: func(error) {},
		})
	}
	deliver("quick", "settled", 0, nil)
	deliver("quick", "unsettled", 0, lost)
	deliver("long", "adopted", time.Millisecond, nil)
	deliver("long", "unsettled-long", time.Millisecond, lost)
	waitFor(t, 10*time.Second, func() string {
		w.mu.Lock()
		defer w.mu.Unlock()
		for _, id := range []string{"adopted", "unsettled-long"} {
			if held := w.known[id]; held != nil && held.delivery != nil {
				return "the journal does not answer for " + id
			}
		}
		return ""
	})
	if err := os.WriteFile(filepath.Join(dir, "go"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for id, want := range map[string]bool{"settled": false, "unsettled": true, "adopted": false, "unsettled-long": true} {
		waitFor(t, 10*time.Second, func() string {
			w.mu.Lock()
			_, ended := w.journal.outcome(id)
			known := w.known[id] != nil
			w.mu.Unlock()
			if !ended || known {
				return id + " has not been settled"
			}
			if got, err := asks.Listens(t.Context(), id); got != want || err != nil {
				return fmt.Sprintf("Listens(%q) = %v, %v; want %v", id, got, err, want)
			}
			return ""
		})
	}
}

// TestSubscriptionIsKeptWhileAsked stops subscriptions in a while: at once then, or when nobody has asked for as long.
func TestSubscriptionIsKeptWhileAsked(t *testing.T) {
	const limit = 50 * time.Millisecond
	began := time.Now()
	for name, asked := range map[string]func() time.Time{
		"cannot tell":   nil,
		"nobody asks":   func() time.Time { return time.Unix(0, 0) },
		"somebody does": func() time.Time { return began.Add(3 * limit) },
	} {
		stopped := make(chan time.Duration, 2)
		Subscription{Asked: asked, Stop: func() { stopped <- time.Since(began) }}.stopAfter(limit)
		least := limit
		if name == "somebody does" {
			least = 4 * limit
		}
		if after := <-stopped; after < least {
			t.Errorf("%s: stopped after %v", name, after)
		}
	}
}

// TestLooksAhead has tasks looked into beside those that have slots, by what the looks found the slots to be doing.
func TestLooksAhead(t *testing.T) {
	var started []*task
	s := newScheduler(4, func(x *task) { started = append(started, x) })
	s.setLimit("a", 4)
	now := time.Now()
	round := func(taken bool) {
		now = now.Add(lookLimit)
		s.lookEnded("a", taken, now)
		s.lookEnded("a", taken, now) // others of the same moment find what the first has found
		for range 2 {
			s.lookBegan("a")
		}
	}
	expect := func(what string, ahead int) {
		t.Helper()
		if n := s.mostUnsettled("a"); n != 4+ahead {
			t.Errorf("%s: %d deliveries may be held; want %d", what, n, 4+ahead)
		}
	}
	for range 2 * maxLooksAhead {
		s.lookBegan("a")
	}
	expect("before a look has ended", 0)
	round(true)
	expect("after the first", 0)
	round(false)
	expect("when a task was another worker's", 0)
	for _, ahead := range []int{4, 8, 16, 32, 64, 128, 256, 256} {
		round(true)
		expect("while slots are idle", ahead)
	}
	for range 4 {
		s.add(&task{event: "a"})
	}
	round(true)
	expect("when the slots are taken", 256)
	s.add(&task{event: "a"})
	round(true)
	expect("when a task waits", 128)
	now = now.Add(returnLimit)
	round(true)
	expect("when the next crash is looked into", 0)
	if len(started) != 4 {
		t.Errorf("%d started; want 4", len(started))
	}
}
