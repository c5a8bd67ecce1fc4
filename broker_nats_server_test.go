//go:build unix

package main

// broker_nats_server_test.go holds what the tests of the NATS broker run on: a private server, a broker connected to
// it, and a taker of deliveries.

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
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
		nats.MaxReconnects(-1), nats.ReconnectWait(5 * time.Millisecond), nats.Timeout(20 * time.Second), nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}),
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

// add puts a message into the stream that keeps its subject, and waits until it is there.
func (s *natsServer) add(t testing.TB, subject, data string) {
	t.Helper()
	nc := s.client(t)
	defer nc.Close()
	js, err := nc.JetStream(nats.MaxWait(5 * time.Second))
	if err != nil {
		t.Fatal(err)
	}
	once := nats.MsgId(nats.NewInbox()) // however often it is sent
	waitFor(t, 20*time.Second, func() string {
		if _, err := js.Publish(subject, []byte(data), once); err != nil {
			return fmt.Sprintf("publish %s: %v", subject, err)
		}
		return ""
	})
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
