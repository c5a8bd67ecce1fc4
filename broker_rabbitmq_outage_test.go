//go:build unix

package main

// broker_rabbitmq_outage_test.go takes things away from the broker: the server, its answers, queues, channels, memory.

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

func TestRabbitMQPublishGoesOnAfterTheExchangeWasDeleted(t *testing.T) {
	server := newRabbitVHost(t)
	config := server.config(t)
	config.Exchange = "jobs"
	b := connectedRabbit(t, config)
	if err := server.raw(t).ExchangeDelete("jobs", false, false); err != nil {
		t.Fatal(err)
	}
	waitFor(t, 10*time.Second, func() string {
		if sent, err := b.Publish(t.Context(), Message{Subject: "x"}); sent != 1 || err != nil {
			return fmt.Sprint(sent, err)
		}
		return ""
	})
}

func TestRabbitMQDeliversUnsettledAgain(t *testing.T) {
	server := newRabbitVHost(t)
	if _, err := server.raw(t).QueueDeclare("t1_finish", true, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
	var sink taker
	first := connectedRabbit(t, server.config(t))
	first.Consume("p1.again", slotsOf(4), sink.take)
	if err := server.publishTo("", "p1.again", "x", true); err != nil {
		t.Fatal(err)
	}
	stale := sink.remove(t, 1)[0]
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if err := stale.Ack(t.Context()); codeOf(err) != codeRabbitStale {
		t.Errorf("Ack after Close = %v", err)
	}
	second, connected := openRabbitForTest(t, server.config(t), nil)
	awaitRabbit(t, connected, true)
	second.Consume("p1.again", slotsOf(4), sink.take)
	d := sink.remove(t, 1)[0]
	if string(d.Data) != "x" || d.Attempt != 0 {
		t.Errorf("delivery = %q, attempt %d; want an unknown one", d.Data, d.Attempt)
	}

	// And after kill -9 of the broker, with events that a durable queue holds.
	if sent, err := second.Publish(t.Context(), Message{Subject: "t1_finish", Data: []byte("finish")}); sent != 1 {
		t.Fatal(err)
	}
	server.stop(t)
	lost := awaitRabbit(t, connected, false)
	if codeOf(lost) == "" || strings.Contains(lost.Error(), "guest:") {
		t.Errorf("lost: %v", lost)
	}
	waitFor(t, 5*time.Second, func() string {
		if second.consuming.current() != nil || second.publishing.current() != nil {
			return "one of the connections still looks open"
		}
		return ""
	})
	if sent, err := second.Publish(t.Context(), Message{Subject: "t1_finish"}); sent != 0 || err == nil {
		t.Errorf("Publish without a broker = %d, %v", sent, err)
	}
	if err := d.Ack(t.Context()); codeOf(err) != codeRabbitStale {
		t.Errorf("Ack without a broker = %v", err)
	}
	server.start(t)
	awaitRabbit(t, connected, true)
	ackAll(t, sink.remove(t, 1))
	if n := queueLength(t, server, "t1_finish"); n != 1 {
		t.Errorf("%d events survived; want 1", n)
	}
}

func TestRabbitMQComesBackWhenTheQueueIsDeleted(t *testing.T) {
	server := newRabbitVHost(t)
	b := connectedRabbit(t, server.config(t))
	var sink taker
	defer b.Consume("p1.deleted", slotsOf(2), sink.take).Stop()
	for range 2 {
		awaitQueue(t, server, "p1.deleted")
		if _, err := server.raw(t).QueueDelete("p1.deleted", false, false, false); err != nil {
			t.Fatal(err)
		}
	}
	awaitQueue(t, server, "p1.deleted")
	if err := server.publishTo("", "p1.deleted", "x", false); err != nil {
		t.Fatal(err)
	}
	ackAll(t, sink.remove(t, 1))
}

func TestRabbitMQComesBackAfterTheAcknowledgementTimeout(t *testing.T) {
	server := newRabbitVHost(t)
	// A channel reads these when it is opened.
	server.ctl(t, "eval", "application:set_env(rabbit, consumer_timeout, 1000), application:set_env(rabbit, channel_tick_interval, 300).")
	b := connectedRabbit(t, server.config(t))
	var sink taker
	defer b.Consume("p1.timeout", slotsOf(2), sink.take).Stop()
	if err := server.publishTo("", "p1.timeout", "x", true); err != nil {
		t.Fatal(err)
	}
	stale := sink.remove(t, 1)[0]
	d := sink.remove(t, 1)[0]
	ackAll(t, []Delivery{d})
	if err := stale.Ack(t.Context()); codeOf(err) != codeRabbitStale {
		t.Errorf("Ack on a channel that is gone = %v", err)
	}
	server.ctl(t, "eval", "application:set_env(rabbit, consumer_timeout, 1800000), application:set_env(rabbit, channel_tick_interval, 60000).")
}

func TestRabbitMQNoticesABrokerThatHangs(t *testing.T) {
	server := newRabbitVHost(t)
	b, connected := openRabbitForTest(t, server.config(t), func(b *rabbitBroker) {
		b.proveEvery, b.proveWithin = 100*time.Millisecond, time.Second
	})
	awaitRabbit(t, connected, true)
	var sink taker
	b.Consume("p1.hang", slotsOf(2), sink.take)
	awaitQueue(t, server, "p1.hang")
	if err := syscall.Kill(server.beam(t), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	defer syscall.Kill(server.beam(t), syscall.SIGCONT)
	began := time.Now()
	if err := awaitRabbit(t, connected, false); !strings.Contains(err.Error(), "no answer within 1s") {
		t.Errorf("lost: %v", err)
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("noticed after %v", took)
	}
	other, _ := openRabbitForTest(t, server.config(t), nil)
	began = time.Now()
	other.Consume("p1.hang", slotsOf(2), sink.take).Stop()
	if err := other.Close(); err != nil || time.Since(began) > 5*time.Second {
		t.Errorf("Close = %v after %v", err, time.Since(began))
	}
	if err := syscall.Kill(server.beam(t), syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	awaitRabbit(t, connected, true)
	if err := server.publishTo("", "p1.hang", "x", true); err != nil {
		t.Fatal(err)
	}
	ackAll(t, sink.remove(t, 1))
}

func TestRabbitMQAlarmHoldsEventsButNotTasks(t *testing.T) {
	server := newRabbitVHost(t)
	b, connected := openRabbitForTest(t, server.config(t), nil)
	awaitRabbit(t, connected, true)
	var sink taker
	defer b.Consume("p1.alarm", slotsOf(1), sink.take).Stop()
	for range 2 {
		if err := server.publishTo("", "p1.alarm", "x", true); err != nil {
			t.Fatal(err)
		}
	}
	first := sink.remove(t, 1)
	server.ctl(t, "set_vm_memory_high_watermark", "absolute", "1")
	restored := false
	restore := func() {
		if !restored {
			server.ctl(t, "set_vm_memory_high_watermark", "0.4")
			restored = true
		}
	}
	defer restore()
	// The first one tells the broker that this connection publishes; it is not confirmed until the alarm is over.
	waitFor(t, 10*time.Second, func() string {
		ctx, stop := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer stop()
		_, err := b.Publish(ctx, Message{Subject: "t_process"})
		if codeOf(err) != codeRabbitBlocked {
			return fmt.Sprintf("Publish = %v", err)
		}
		return ""
	})
	ackAll(t, first) // tasks come and go meanwhile
	ackAll(t, sink.remove(t, 1))
	restore()
	waitFor(t, 10*time.Second, func() string {
		if sent, err := b.Publish(t.Context(), Message{Subject: "t_process"}); sent != 1 {
			return fmt.Sprintf("Publish = %v", err)
		}
		return ""
	})
	select {
	case err := <-connected:
		t.Errorf("the alarm changed the connection: %v", err)
	default:
	}
}

func TestRabbitMQCloseLeavesNothing(t *testing.T) {
	server := newRabbitVHost(t)
	before := runtime.NumGoroutine()
	b, connected := openRabbitForTest(t, server.config(t), nil)
	awaitRabbit(t, connected, true)
	var sink taker
	b.Consume("p1.close", slotsOf(2), sink.take)
	b.Subscribe("t1_worker", func([]byte) {})
	b.SubscribeAll("p1.restart", func([]byte) {})
	if err := server.publishTo("", "p1.close", "x", true); err != nil {
		t.Fatal(err)
	}
	sink.remove(t, 1) // stays unsettled
	if err := syscall.Kill(server.beam(t), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	b.Close()
	took := time.Since(began)
	if err := syscall.Kill(server.beam(t), syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if took > 2*rabbitCloseLimit {
		t.Errorf("Close took %v while the broker hangs", took)
	}
	waitFor(t, 5*time.Second, func() string {
		if after := runtime.NumGoroutine(); after > before {
			stacks := make([]byte, 1<<20)
			return fmt.Sprintf("%d goroutines, %d before:\n%s", after, before, stacks[:runtime.Stack(stacks, true)])
		}
		return ""
	})
	if b.Subscribe("t2_worker", func([]byte) {}).Stop(); b.Consume("p1.x", slotsOf(1), sink.take) == nil {
		t.Error("no consumer after Close")
	}
	b.Consume("p1.y", slotsOf(1), sink.take).Stop()
	if sent, err := b.Publish(t.Context(), Message{Subject: "x"}); sent != 0 || err == nil {
		t.Errorf("Publish after Close = %d, %v", sent, err)
	}
}

func TestRabbitMQLearnsThatQueuesMustBeDurable(t *testing.T) {
	b := newRabbitBroker(brokerOptions{log: newLogger(testLog{t}, &Config{})})
	conn := &rabbitConn{addr: "a:1"}
	b.consuming.lost(conn, &amqp.Error{Code: amqp.InternalError, Reason: "INTERNAL_ERROR"})
	if b.noTransient.Load() {
		t.Error("learned from another error")
	}
	// As RabbitMQ 4.3 says it.
	b.consuming.lost(conn, &amqp.Error{Code: amqp.InternalError, Server: true,
		Reason: "INTERNAL_ERROR - Feature `transient_nonexcl_queues` is deprecated.\nBy default, this feature is not permitted anymore."})
	if !b.noTransient.Load() {
		t.Error("not learned")
	}
}

func TestRabbitMQTriesEveryServer(t *testing.T) {
	server := newRabbitVHost(t)
	config := server.config(t)
	config.Host = "127.0.0.1:" + freePort(t) + ", 127.0.0.1:" + server.port
	b := connectedRabbit(t, config)
	if sent, err := b.Publish(t.Context(), Message{Subject: "x"}); sent != 1 {
		t.Error(err)
	}
	if err := probeRabbitMQ(t.Context(), b.brokerOptions); err != nil {
		t.Errorf("probe = %v", err)
	}
}

func TestRabbitMQOverTLS(t *testing.T) {
	server := newRabbitVHost(t)
	config := server.config(t)
	config.Host = "127.0.0.1:" + server.tlsPort
	b, connected := openRabbitForTest(t, config, func(b *rabbitBroker) {
		b.tls = &tls.Config{RootCAs: server.authority.pool, Certificates: []tls.Certificate{server.clientCert}}
	})
	awaitRabbit(t, connected, true)
	if sent, err := b.Publish(t.Context(), Message{Subject: "x"}); sent != 1 {
		t.Error(err)
	}
}

func TestRabbitMQSaysWhyThereIsNoConnection(t *testing.T) {
	server := newRabbitVHost(t)
	tlsHost := "127.0.0.1:" + server.tlsPort
	trusted := &tls.Config{RootCAs: server.authority.pool}
	for _, test := range []struct {
		name   string
		change func(*BrokerConfig)
		tls    *tls.Config
		code   errCode
		says   string
	}{
		{"password", func(c *BrokerConfig) { c.Password = "hunter2" }, nil, codeRabbitLogin, `as user "guest"`},
		{"vhost", func(c *BrokerConfig) { c.VHost = "nowhere" }, nil, codeRabbitVHost, `virtual host "nowhere"`},
		{"refused", func(c *BrokerConfig) { c.Host = "127.0.0.1:" + freePort(t) }, nil, codeRabbitConnect, "connection refused"},
		{"tls to plain", func(*BrokerConfig) {}, trusted, codeRabbitTLS, "TLS"},
		{"plain to tls", func(c *BrokerConfig) { c.Host = tlsHost }, nil, codeRabbitHandshake, "greet"},
		{"unknown authority", func(c *BrokerConfig) { c.Host = tlsHost }, &tls.Config{}, codeRabbitTLS, "unknown authority"},
		{"no client certificate", func(c *BrokerConfig) { c.Host = tlsHost }, trusted, codeRabbitHandshake, "certificate"},
		{"no answer", func(c *BrokerConfig) { c.Host = silentServer(t) }, nil, codeRabbitHandshake, "deadline"},
		{"exchange", func(c *BrokerConfig) { c.Exchange = "amq.none" }, nil, "", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			config := server.config(t)
			test.change(&config)
			limit := 5 * time.Second // RabbitMQ takes 3 to refuse a password
			if test.name == "no answer" {
				limit = 200 * time.Millisecond
			}
			ctx, stop := context.WithTimeout(t.Context(), limit)
			defer stop()
			err := probeRabbitMQ(ctx, brokerOptions{config: config, identity: "w", tls: test.tls, log: newLogger(testLog{t}, &Config{})})
			if test.code == "" {
				if err != nil {
					t.Errorf("probe = %v", err)
				}
				return
			}
			if codeOf(err) != test.code || !strings.Contains(fmt.Sprint(err), test.says) || hintOf(err) == "" {
				t.Errorf("probe = %v (%s); want %s with %q", err, codeOf(err), test.code, test.says)
			}
			if text := fmt.Sprint(err, hintOf(err)); strings.Contains(text, "hunter2") || !strings.Contains(text, "127.0.0.1:") {
				t.Errorf("error = %q", text)
			}
		})
	}
}

// The library closes a connection on which a write fails, perhaps before it has read what the server said last.
func TestRabbitMQHearsTheLastWord(t *testing.T) {
	transport := &rabbitTransport{failed: make(chan struct{}), Conn: &endedConn{written: make(chan struct{}), closed: make(chan struct{})}}
	_, err := amqp.Open(transport, amqp.Config{SASL: []amqp.Authentication{&amqp.ExternalAuth{}}})
	if err == nil {
		t.Fatal("opened")
	}
	if err := transport.explain(err); !errors.Is(err, errLastWord) {
		t.Errorf("error = %v", err)
	}
}

var errLastWord = errors.New("certificate required")

// An endedConn is one that its peer has ended with errLastWord, which is still on its way when a write fails.
type endedConn struct {
	net.Conn
	writing, closing sync.Once
	written, closed  chan struct{}
}

func (c *endedConn) Write([]byte) (int, error) {
	c.writing.Do(func() { close(c.written) })
	return 0, syscall.EPIPE
}

func (c *endedConn) Read([]byte) (int, error) {
	<-c.written
	select {
	case <-c.closed:
		return 0, net.ErrClosed
	case <-time.After(20 * time.Millisecond): // its way
		return 0, errLastWord
	}
}

func (c *endedConn) Close() error {
	c.closing.Do(func() { close(c.closed) })
	return nil
}

// silentServer accepts connections and says nothing.
func silentServer(t testing.TB) string {
	t.Helper()
	listener, err := listen("127.0.0.1:0", bindPatience)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	return listener.Addr().String()
}
