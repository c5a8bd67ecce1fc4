//go:build unix

package main

// brokers_test.go holds what must be true of every broker, run against private real servers.

import (
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// A testServer is a private broker server, and what a Job Manager does with it.
type testServer interface {
	connection() string // the value of broker_connection as one YAML flow mapping, without durable
	stop(t testing.TB)  // kill -9
	start(t testing.TB) // again, on the same port, with the same data
	publish(t testing.TB, subject, data string)
	collect(t testing.TB) *collector // of every event that workers publish from now on
}

// A collector holds events in the order of their arrival.
type collector struct {
	mu     sync.Mutex
	events []publishedEvent
}

type publishedEvent struct{ subject, data string }

func (c *collector) add(subject, data string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.events = append(c.events, publishedEvent{subject, data})
}

// of gives a task's events, without the task's id in front.
func (c *collector) of(taskID string) []publishedEvent {
	c.mu.Lock()
	defer c.mu.Unlock()
	var found []publishedEvent
	for _, e := range c.events {
		if rest, ok := strings.CutPrefix(e.subject, taskID); ok && strings.ContainsAny(rest[:min(len(rest), 1)], "_.") {
			found = append(found, publishedEvent{rest, e.data})
		}
	}
	return found
}

// finish waits for a task's _finish and gives its events.
func (c *collector) finish(t testing.TB, taskID string) []publishedEvent {
	t.Helper()
	var events []publishedEvent
	waitFor(t, 60*time.Second, func() string {
		events = c.of(taskID)
		if !slices.ContainsFunc(events, func(e publishedEvent) bool { return e.subject == "_finish" }) {
			return fmt.Sprintf("no _finish of %s among %q", taskID, events)
		}
		return ""
	})
	return events
}

// A portGate is a port in front of a server that lets nobody through while it is not open: after a restart those who
// collect must be back before the workers, since events are not kept for who is late.
type portGate struct {
	listener net.Listener
	open     atomic.Bool

	mu  sync.Mutex // guards what follows
	ins []net.Conn
}

// cut ends every connection through the gate.
func (g *portGate) cut() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, in := range g.ins {
		in.Close()
	}
	g.ins = nil
}

func openPortGate(t testing.TB, to string) *portGate {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := &portGate{listener: listener}
	g.open.Store(true)
	t.Cleanup(func() { listener.Close() })
	go func() { // ends with the listener
		for {
			in, err := listener.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", to)
			if err != nil || !g.open.Load() {
				in.Close()
				if err == nil {
					out.Close()
				}
				continue
			}
			g.mu.Lock()
			g.ins = append(g.ins, in)
			g.mu.Unlock()
			for _, pair := range [][2]net.Conn{{in, out}, {out, in}} {
				go func() { // ends with either connection
					io.Copy(pair[0], pair[1])
					in.Close()
					out.Close()
				}()
			}
		}
	}()
	return g
}

// A collector's deliveries, and what a broker's test may use to look at one broker alone.
type brokerUnderTest struct {
	Broker
	connected chan error // what changed was called with
}

// openForTest opens a broker by its connection, waits until it is connected and closes it in the end.
func openForTest(t testing.TB, config BrokerConfig, project, identity string) *brokerUnderTest {
	t.Helper()
	b := &brokerUnderTest{connected: make(chan error, 1000)}
	opened, err := openBroker(brokerOptions{
		config: config, project: project, identity: identity, log: newLogger(testLog{t}, &Config{LogLevel: -4}),
		changed: func(err error) { b.connected <- err },
	})
	if err != nil {
		t.Fatal(err)
	}
	b.Broker = opened
	t.Cleanup(func() { b.Close() })
	for {
		select {
		case err := <-b.connected:
			if err == nil {
				return b
			}
			t.Logf("not connected yet: %v", err)
		case <-time.After(20 * time.Second):
			t.Fatal("no connection within 20 s")
		}
	}
}

// testLog is a test's log as a writer, silent once the test is over.
type testLog struct{ t testing.TB }

func (l testLog) Write(p []byte) (int, error) {
	if l.t.Context().Err() == nil {
		l.t.Log(strings.TrimRight(string(p), "\n"))
	}
	return len(p), nil
}

// waitForPort waits until something accepts connections there.
func waitForPort(t testing.TB, addr string) {
	t.Helper()
	waitFor(t, 60*time.Second, func() string {
		conn, err := net.DialTimeout("tcp", addr, time.Second)
		if err != nil {
			return err.Error()
		}
		conn.Close()
		return ""
	})
}

// atMost is a limit that does not change.
func atMost(n int) func() int { return func() int { return n } }

// A taker is a consumer's handle that keeps what it gets, unsettled.
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

// remove waits for n deliveries and takes them out, with all others.
func (k *taker) remove(t testing.TB, n int) []Delivery {
	t.Helper()
	k.wait(t, n)
	k.mu.Lock()
	defer k.mu.Unlock()
	got := k.got
	k.got = nil
	return got
}
