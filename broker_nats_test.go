//go:build unix

package main

// broker_nats_test.go checks the NATS broker against private real servers, with certificates made on the spot.

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
)

// A natsServer is a private nats-server.
type natsServer struct {
	addr string // host:port
	args []string
	cmd  *exec.Cmd
	gone chan struct{}

	gate       *portGate // nil: workers connect to addr
	collectors []*nats.Conn
}

// startNATS starts a server for the suites that run over every broker.
func startNATS(t testing.TB) testServer {
	s := newNATSServer(t, "-js", "-sd", t.TempDir())
	s.gate = openPortGate(t, s.addr)
	return s
}

func newNATSServer(t testing.TB, args ...string) *natsServer {
	t.Helper()
	needProgram(t, "nats-server")
	port := freePort(t)
	s := &natsServer{addr: "127.0.0.1:" + port, args: append([]string{"-a", "127.0.0.1", "-p", port}, args...)}
	s.start(t)
	t.Cleanup(func() { s.stop(t) })
	return s
}

// natsServerWith starts a server with a configuration file.
func natsServerWith(t testing.TB, config string) *natsServer {
	t.Helper()
	file := filepath.Join(t.TempDir(), "nats.conf")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	return newNATSServer(t, "-c", file)
}

func (s *natsServer) connection() string {
	addr := s.addr
	if s.gate != nil {
		addr = s.gate.listener.Addr().String()
	}
	host, port, _ := net.SplitHostPort(addr)
	return fmt.Sprintf("{type: nats, host: %s, port: %s}", host, port)
}

func (s *natsServer) config() BrokerConfig { return BrokerConfig{Type: "nats", Host: s.addr} }

func (s *natsServer) durable() BrokerConfig {
	return BrokerConfig{Type: "nats", Host: s.addr, Durable: true}
}

func (s *natsServer) stop(t testing.TB) {
	if s.gate != nil {
		s.gate.open.Store(false)
		// What the server has confirmed to a worker and not passed on yet would die with it, and no worker could know.
		s.gate.cut()
		for _, nc := range s.collectors {
			if err := nc.FlushTimeout(5 * time.Second); err != nil && !nc.IsClosed() { // as after the test
				t.Errorf("collector before the server is killed: %v", err)
			}
		}
	}
	s.cmd.Process.Kill()
	<-s.gone
}

// start waits until those who collect are connected again, and lets workers in after that: events are not kept for
// who is late.
func (s *natsServer) start(t testing.TB) {
	t.Helper()
	s.cmd = exec.Command("nats-server", s.args...)
	if testing.Verbose() && os.Getenv("NATS_LOG") != "" {
		s.cmd.Stderr = os.Stderr
	}
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	gone, cmd := make(chan struct{}), s.cmd
	s.gone = gone
	go func() { cmd.Wait(); close(gone) }() // ends with the server
	waitForPort(t, s.addr)
	for _, nc := range s.collectors {
		waitFor(t, 20*time.Second, func() string {
			if err := nc.FlushTimeout(time.Second); err != nil || !nc.IsConnected() {
				return fmt.Sprintf("collector is away: %v", err)
			}
			return ""
		})
	}
	if s.gate != nil {
		s.gate.open.Store(true)
	}
}

func (s *natsServer) client(t testing.TB, options ...nats.Option) *nats.Conn {
	t.Helper()
	options = append([]nats.Option{
		nats.MaxReconnects(-1), nats.ReconnectWait(5 * time.Millisecond), nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}),
	}, options...)
	nc, err := nats.Connect("nats://"+s.addr, options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	return nc
}

func (s *natsServer) publish(t testing.TB, subject, data string) {
	t.Helper()
	nc := s.client(t)
	defer nc.Close()
	if err := nc.Publish(subject, []byte(data)); err != nil {
		t.Fatal(err)
	}
	if err := nc.FlushTimeout(5 * time.Second); err != nil {
		t.Fatal(err)
	}
}

func (s *natsServer) collect(t testing.TB) *collector {
	t.Helper()
	c := &collector{}
	nc := s.client(t)
	// Not ">": interest in every subject would make the server answer requests for tasks whose worker has gone.
	for _, subject := range []string{"*", "*.notif_add", "*.callback"} {
		sub, err := nc.Subscribe(subject, func(m *nats.Msg) { c.add(m.Subject, string(m.Data)) })
		if err == nil {
			err = sub.SetPendingLimits(-1, -1)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := nc.FlushTimeout(5 * time.Second); err != nil {
		t.Fatal(err)
	}
	s.collectors = append(s.collectors, nc)
	return c
}

// openNATSForTest opens a broker that changes may alter first, waits until it is connected and closes it in the end.
func openNATSForTest(t testing.TB, config BrokerConfig, changes ...func(*natsBroker)) (*natsBroker, chan error) {
	t.Helper()
	changed := make(chan error, 1000)
	b, err := newNATS(brokerOptions{
		config: config, project: "P", identity: "host", log: newLogger(testLog{t}, &Config{LogLevel: -4}),
		changed: func(err error) { changed <- err },
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, change := range changes {
		change(b)
	}
	b.start()
	t.Cleanup(func() { b.Close() })
	return b, changed
}

// openConnected is openForTest, and closes the broker in the end.
func openConnected(t testing.TB, config BrokerConfig, project, identity string) *brokerUnderTest {
	t.Helper()
	b := openForTest(t, config, project, identity)
	t.Cleanup(func() { b.Close() })
	return b
}

// nextChange waits for a change of the connection that fits.
func nextChange(t testing.TB, changed chan error, fits func(error) bool) error {
	t.Helper()
	var last error
	for limit := time.After(20 * time.Second); ; {
		select {
		case last = <-changed:
			if fits(last) {
				return last
			}
		case <-limit:
			t.Fatalf("no such change of the connection within 20 s; the last was %v", last)
		}
	}
}

func isConnected(err error) bool { return err == nil }
func isAway(err error) bool      { return err != nil }

// shortClaims makes the claims of durable consumers short, and so their renewals.
func shortClaims(b *natsBroker) { b.ackWait = time.Second }

// A taker is a consumer's handle that keeps what it gets.
type taker struct {
	mu  sync.Mutex
	got []Delivery
}

func (k *taker) take(d Delivery) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.got = append(k.got, d)
}

func (k *taker) all() []Delivery {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.got)
}

// wait returns the deliveries when there are n.
func (k *taker) wait(t testing.TB, n int) []Delivery {
	t.Helper()
	waitFor(t, 20*time.Second, func() string {
		if got := len(k.all()); got < n {
			return fmt.Sprintf("%d deliveries; want %d", got, n)
		}
		return ""
	})
	return k.all()
}

func freeSlots(n int) Slots { return Slots{Limit: atMost(n), Free: func() int { return n }} }

// waitListening waits until tasks on a subject are taken, and takes the one that was sent to find out.
func waitListening(t testing.TB, b Broker, subject string, k *taker) {
	t.Helper()
	waitFor(t, 20*time.Second, func() string {
		if _, err := b.Publish(t.Context(), Message{subject, []byte("first"), true}); err != nil {
			return err.Error()
		}
		return ""
	})
	d := k.wait(t, 1)[0]
	if d.Ack != nil {
		if err := d.Ack(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	k.mu.Lock()
	k.got = k.got[1:]
	k.mu.Unlock()
}

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

func TestNATSServerRestarts(t *testing.T) {
	s := newNATSServer(t, "-js", "-sd", t.TempDir())
	collected := s.collect(t)
	durable, durableChanged := openNATSForTest(t, s.durable(), shortClaims)
	plain, plainChanged := openNATSForTest(t, s.config())
	var kept, plainly taker
	durable.Consume("P.kept", freeSlots(3), kept.take)
	waitListening(t, durable, "P.kept", &kept)
	plain.Consume("P.plain", freeSlots(3), plainly.take)
	waitListening(t, plain, "P.plain", &plainly)

	s.publish(t, "P.kept", "held")
	s.publish(t, "P.kept", "to be acknowledged meanwhile")
	d := kept.wait(t, 2)
	s.stop(t)
	nextChange(t, durableChanged, isAway)
	nextChange(t, plainChanged, isAway)
	acked := make(chan error)
	bounded, stop := context.WithTimeout(t.Context(), 30*time.Second)
	defer stop()
	go func() { acked <- d[1].Ack(bounded) }()
	s.start(t)
	nextChange(t, durableChanged, isConnected)
	nextChange(t, plainChanged, isConnected)
	if err := <-acked; err != nil {
		t.Errorf("Ack across a restart = %v", err)
	}

	s.publish(t, "P.plain", "after")
	if got := plainly.wait(t, 1)[0]; string(got.Data) != "after" {
		t.Errorf("got %q", got.Data)
	}
	s.publish(t, "P.kept", "after")
	if got := kept.wait(t, 3)[2]; string(got.Data) != "after" {
		t.Errorf("got %q", got.Data)
	}
	if _, err := plain.Publish(t.Context(), Message{Subject: "x_finish", Data: []byte("finish")}); err != nil {
		t.Error(err)
	}
	collected.finish(t, "x")

	durable.Close() // with "held" and "after" unsettled
	next, _ := openNATSForTest(t, s.durable(), shortClaims)
	var again taker
	next.Consume("P.kept", freeSlots(3), again.take)
	var data []string
	for _, d := range again.wait(t, 2) {
		data = append(data, string(d.Data))
		if err := d.Ack(t.Context()); err != nil {
			t.Error(err)
		}
	}
	slices.Sort(data)
	if want := []string{"after", "held"}; !slices.Equal(data, want) {
		t.Errorf("redelivered %q; want %q", data, want)
	}
	assertStreamEmpty(t, s, "P.kept")
}

// Publish confirms nothing that is lost: the server is killed again and again while messages are sent.
func TestNATSPublishThroughCrashes(t *testing.T) {
	s := startNATS(t).(*natsServer)
	c := s.collect(t)
	config := s.config()
	config.Host = s.gate.listener.Addr().String()
	b, changed := openNATSForTest(t, config)
	nextChange(t, changed, isConnected)
	ended := make(chan int)
	ctx, stop := context.WithCancel(t.Context())
	go func() {
		n := 0
		for ctx.Err() == nil {
			var batch []Message
			for i := range 20 {
				batch = append(batch, Message{Subject: "t_process", Data: fmt.Append(nil, n+i)})
			}
			sent, err := b.Publish(ctx, batch...)
			if n += sent; err != nil {
				time.Sleep(time.Millisecond) // the server is away
			}
		}
		ended <- n
	}()
	for range 5 {
		before := len(c.of("t"))
		waitFor(t, 20*time.Second, func() string {
			if len(c.of("t")) < before+500 {
				return "no messages"
			}
			return ""
		})
		s.stop(t)
		s.start(t)
	}
	stop()
	n := <-ended
	seen := map[string]bool{}
	for _, e := range c.of("t") {
		seen[e.data] = true
	}
	// A collector that was cut off before it had read what the server had passed on shows nothing about Publish, so
	// a few at each crash may be missing there: those of the batches under way.
	missing := 0
	for i := range n {
		if !seen[fmt.Sprint(i)] {
			missing++
		}
	}
	t.Logf("%d confirmed, %d missing", n, missing)
	if missing > 5*20 {
		t.Errorf("%d of %d confirmed messages are missing", missing, n)
	}
}

func TestNATSStoppedServerIsNoticed(t *testing.T) {
	s := newNATSServer(t)
	b, changed := openNATSForTest(t, s.config(), func(b *natsBroker) {
		b.roundTripPause, b.roundTripLimit = 100*time.Millisecond, 300*time.Millisecond
	})
	nextChange(t, changed, isConnected)
	s.cmd.Process.Signal(syscall.SIGSTOP)
	err := nextChange(t, changed, isAway)
	s.cmd.Process.Signal(syscall.SIGCONT)
	if codeOf(err) != codeNATSLost || !strings.Contains(err.Error(), "no answer within 300ms") {
		t.Errorf("changed(%v); want %s", err, codeNATSLost)
	}
	nextChange(t, changed, isConnected)
	if _, err := b.Publish(t.Context(), Message{Subject: "x"}); err != nil {
		t.Error(err)
	}

	// A writer that hangs with the server does not hide it.
	s.cmd.Process.Signal(syscall.SIGSTOP)
	defer s.cmd.Process.Signal(syscall.SIGCONT)
	began := time.Now()
	data := make([]byte, 1<<20)
	for range 20 {
		if _, err = b.Publish(t.Context(), Message{Subject: "x", Data: data}); err != nil {
			break
		}
	}
	if err == nil || time.Since(began) > 10*time.Second {
		t.Errorf("Publish to a stopped server = %v after %v", err, time.Since(began))
	}
	nextChange(t, changed, isAway)
	began = time.Now()
	b.Close()
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("Close took %v", took)
	}
}

func TestNATSLogins(t *testing.T) {
	open := newNATSServer(t)
	token := natsServerWith(t, `authorization { token: "secret-token" }`)
	user := natsServerWith(t, `authorization { users: [ {user: w, password: "secret-password"} ] }`)
	// Of "secret-password".
	bcrypted := natsServerWith(t, `authorization { users: [ {user: w, password: "`+bcryptOfSecretPassword+`"} ] }`)
	for _, row := range []struct {
		server *natsServer
		config BrokerConfig
		code   errCode
	}{
		{open, BrokerConfig{AuthType: "none"}, ""},
		{token, BrokerConfig{AuthType: "token", Token: "secret-token"}, ""},
		{token, BrokerConfig{AuthType: "token", Token: "secret-tokem"}, codeNATSLogin},
		{token, BrokerConfig{AuthType: "none"}, codeNATSLogin},
		{user, BrokerConfig{AuthType: "user_password", User: "w", Password: "secret-password"}, ""},
		{user, BrokerConfig{AuthType: "user_password", User: "w", Password: "secret-passwort"}, codeNATSLogin},
		{user, BrokerConfig{AuthType: "user_password", User: "v", Password: "secret-password"}, codeNATSLogin},
		{bcrypted, BrokerConfig{AuthType: "user_password_bcrypt", User: "w", Password: "secret-password"}, ""},
		{bcrypted, BrokerConfig{AuthType: "user_password_bcrypt", User: "w", Password: "secret-passwort"}, codeNATSLogin},
	} {
		row.config.Type, row.config.Host = "nats", row.server.addr
		err := probeNATS(t.Context(), brokerOptions{config: row.config, log: newLogger(testLog{t}, &Config{})})
		if codeOf(err) != row.code {
			t.Errorf("%s as %s: %v; want %s", row.config.AuthType, row.config.User, err, row.code)
		}
		if err != nil && (strings.Contains(err.Error(), "secret") || !strings.Contains(err.Error(), row.server.addr)) {
			t.Errorf("%v; want the server in it and no secret", err)
		}
	}

	// A refused login is tried again for ever: the server may be the one to be mended.
	config := user.config()
	config.AuthType, config.User, config.Password = "user_password", "w", "wrong"
	b, changed := openNATSForTest(t, config)
	if err := nextChange(t, changed, isAway); codeOf(err) != codeNATSLogin {
		t.Errorf("changed(%v); want %s", err, codeNATSLogin)
	}
	time.Sleep(500 * time.Millisecond) // several tries
	user.stop(t)
	nextChange(t, changed, isAway)
	user.args = user.args[:4] // without the file
	user.start(t)
	nextChange(t, changed, isConnected)
	b.Close()
}

const bcryptOfSecretPassword = "$2a$04$dGmD/96C6cNwznXOU6JvE.hzUQmiF4XVFDoZuV/as69HCMATWFIdS"

func TestNATSServerAddresses(t *testing.T) {
	s := newNATSServer(t)
	o := brokerOptions{config: s.config(), log: newLogger(testLog{t}, &Config{})}
	dead := "127.0.0.1:" + freePort(t)
	o.config.Host = dead + ", " + s.addr
	if err := probeNATS(t.Context(), o); err != nil {
		t.Errorf("with a dead first server: %v", err)
	}
	o.config.Host = dead
	if err := probeNATS(t.Context(), o); codeOf(err) != codeNATSConnect || !strings.Contains(err.Error(), "refused") {
		t.Errorf("with a dead server: %v; want %s", err, codeNATSConnect)
	}
	o.config.Host = dead + "," + dead
	if err := probeNATS(t.Context(), o); codeOf(err) != codeNATSConnect || strings.Count(err.Error(), dead) != 2 {
		t.Errorf("with two dead servers: %v; want both named", err)
	}
	o.config.Host = "nats://w:secret@127.0.0.1"
	if err := probeNATS(t.Context(), o); codeOf(err) != codeNATSServer || strings.Contains(err.Error(), "secret") {
		t.Errorf("with a URL: %v; want %s", err, codeNATSServer)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	go func() { // ends with the listener
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			io.WriteString(conn, "HTTP/1.1 400 Bad Request\r\n\r\n")
			conn.Close()
		}
	}()
	o.config.Host = listener.Addr().String()
	if err := probeNATS(t.Context(), o); codeOf(err) != codeNATSAnswer {
		t.Errorf("with a web server: %v; want %s", err, codeNATSAnswer)
	}
}

func TestNATSTLS(t *testing.T) {
	ca, otherCA := newTestAuthority(t), newTestAuthority(t)
	hour := time.Now().Add(time.Hour)
	serverWith := func(end time.Time, verify bool) *natsServer {
		dir := t.TempDir()
		certPEM, keyPEM := ca.issue(end.Add(-24*time.Hour), end)
		for name, content := range map[string][]byte{"ca.crt": ca.pem, "s.crt": certPEM, "s.key": keyPEM} {
			if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return natsServerWith(t, fmt.Sprintf(`tls { cert_file: %q, key_file: %q, ca_file: %q, verify: %v }`,
			dir+"/s.crt", dir+"/s.key", dir+"/ca.crt", verify))
	}
	client := func(trusted, own *testAuthority, end time.Time) *tls.Config {
		c := &tls.Config{RootCAs: x509.NewCertPool()}
		c.RootCAs.AppendCertsFromPEM(trusted.pem)
		if own != nil {
			pair, err := tls.X509KeyPair(own.issue(end.Add(-24*time.Hour), end))
			if err != nil {
				t.Fatal(err)
			}
			c.Certificates = []tls.Certificate{pair}
		}
		return c
	}
	one, mutual, expired := serverWith(hour, false), serverWith(hour, true), serverWith(time.Now().Add(-time.Hour), false)
	plain := newNATSServer(t)
	for _, row := range []struct {
		name   string
		server *natsServer
		tls    *tls.Config
		code   errCode
		text   string
	}{
		{"TLS", one, client(ca, nil, hour), "", ""},
		{"unknown CA", one, client(otherCA, nil, hour), codeNATSTLS, "unknown authority"},
		{"not secure", one, nil, codeNATSTLS, "unknown authority"},
		{"server expired", expired, client(ca, nil, hour), codeNATSTLS, "expired"},
		{"server without TLS", plain, client(ca, nil, hour), codeNATSTLS, "secure connection not available"},
		{"mutual", mutual, client(ca, ca, hour), "", ""},
		{"mutual without certificate", mutual, client(ca, nil, hour), codeNATSTLS, "cert_file"},
		{"mutual with another CA's", mutual, client(ca, otherCA, hour), codeNATSTLS, "cert_file"},
		{"mutual expired", mutual, client(ca, ca, time.Now().Add(-time.Hour)), codeNATSTLS, "cert_file"},
	} {
		o := brokerOptions{config: row.server.config(), tls: row.tls, log: newLogger(testLog{t}, &Config{})}
		err := probeNATS(t.Context(), o)
		if codeOf(err) != row.code || err != nil && !strings.Contains(err.Error(), row.text) {
			t.Errorf("%s: %v; want %s with %q", row.name, err, row.code, row.text)
		}
	}
}

func TestNATSLeavesNothingBehind(t *testing.T) {
	s := newNATSServer(t, "-js", "-sd", t.TempDir())
	for _, config := range []BrokerConfig{s.config(), s.durable(), {Type: "nats", Host: "127.0.0.1:" + freePort(t), Durable: true}} {
		b, _ := openNATSForTest(t, config)
		var k taker
		consumer := b.Consume("P.job", freeSlots(2), k.take)
		end := b.Subscribe("t_worker", func([]byte) {})
		if config.Host == s.addr {
			waitListening(t, b, "P.job", &k)
			s.publish(t, "P.job", "x")
			if d := k.wait(t, 1)[0]; d.Ack != nil {
				d.Ack(t.Context())
			}
		}
		end.Stop()
		consumer.Stop()
		consumer.Stop()
		b.Close()
		b.Close()
		waitFor(t, 5*time.Second, func() string {
			stacks := make([]byte, 1<<20)
			stacks = stacks[:runtime.Stack(stacks, true)]
			for _, stack := range strings.Split(string(stacks), "\n\n") {
				if strings.Contains(stack, "nats") && !strings.Contains(stack, "testing.tRunner") &&
					!strings.Contains(stack, "newNATSServer") && !strings.Contains(stack, "natsServer).start") {
					return "a goroutine is left:\n" + stack
				}
			}
			return ""
		})
	}
}

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
