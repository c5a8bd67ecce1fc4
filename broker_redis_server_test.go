//go:build unix

package main

// broker_redis_server_test.go holds what the tests of the Redis broker run on: a private server, a broker connected to
// it, and a taker of deliveries.

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

// A redisServer is a private redis-server with an append-only file.
type redisServer struct {
	dir, port string
	args      []string
	cmd       *exec.Cmd
	client    *redis.Client

	gate       *portGate // nil: workers connect to addr
	collectors int64
}

var _ testServer = (*redisServer)(nil)

// startRedis starts a server that ends with the test.
func startRedis(t testing.TB) testServer {
	s := newRedisServer(t)
	s.gate = openPortGate(t, s.addr())
	return s
}

func newRedisServer(t testing.TB, args ...string) *redisServer {
	t.Helper()
	needProgram(t, "redis-server")
	s := &redisServer{dir: t.TempDir(), port: freePort(t), args: args}
	s.client = redis.NewClient(&redis.Options{Addr: s.addr(), Protocol: 2})
	t.Cleanup(func() {
		s.client.Close()
		if s.cmd != nil {
			s.stop(t)
		}
	})
	s.start(t)
	return s
}

func (s *redisServer) addr() string { return "127.0.0.1:" + s.port }

func (s *redisServer) connection() string {
	if s.gate != nil {
		_, port, _ := net.SplitHostPort(s.gate.listener.Addr().String())
		return "{type: redis, host: 127.0.0.1, port: " + port + "}"
	}
	return "{type: redis, host: 127.0.0.1, port: " + s.port + "}"
}

func (s *redisServer) config() BrokerConfig {
	port, _ := strconv.Atoi(s.port)
	return BrokerConfig{Type: "redis", Host: "127.0.0.1", Port: port}
}

func (s *redisServer) durable() BrokerConfig {
	c := s.config()
	c.Durable = true
	return c
}

func (s *redisServer) start(t testing.TB) {
	t.Helper()
	args := append([]string{
		"--port", s.port, "--bind", "127.0.0.1", "--dir", s.dir, "--save", "", "--appendonly", "yes", "--appendfsync", "always",
	}, s.args...)
	s.cmd = exec.Command("redis-server", args...)
	log := &lockedBuffer{}
	s.cmd.Stdout, s.cmd.Stderr = log, log
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, 20*time.Second, func() string {
		_, err := s.client.Ping(context.Background()).Result()
		var answered redis.Error
		if err == nil || errors.As(err, &answered) && !strings.HasPrefix(err.Error(), "LOADING") {
			return ""
		}
		if slices.Contains(s.args, "--tls-port") {
			if conn, err := net.Dial("tcp", s.addr()); err == nil {
				conn.Close()
				return ""
			}
		}
		return err.Error() + "\n" + log.String()
	})
	if s.gate != nil {
		waitFor(t, 20*time.Second, func() string {
			if n, err := s.client.PubSubNumPat(context.Background()).Result(); n < s.collectors {
				return fmt.Sprintf("%d of %d collectors are back, %v", n, s.collectors, err)
			}
			return ""
		})
		s.gate.open.Store(true)
	}
}

func (s *redisServer) stop(t testing.TB) {
	t.Helper()
	if s.gate != nil {
		s.gate.open.Store(false)
	}
	s.cmd.Process.Kill()
	s.cmd.Wait()
	s.cmd = nil
}

func (s *redisServer) publish(t testing.TB, subject, data string) {
	t.Helper()
	// Whoever publishes plainly must know that somebody listens.
	waitFor(t, 30*time.Second, func() string {
		n, err := s.client.Publish(context.Background(), subject, data).Result()
		if err != nil || n == 0 {
			return fmt.Sprintf("publish %s: %d receivers, %v", subject, n, err)
		}
		return ""
	})
}

// add is publish for a durable broker.
func (s *redisServer) add(t testing.TB, subject, data string) string {
	t.Helper()
	id, err := s.client.XAdd(context.Background(), &redis.XAddArgs{Stream: subject, Values: []any{"data", data}}).Result()
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func (s *redisServer) collect(t testing.TB) *collector {
	t.Helper()
	c := &collector{}
	client := redis.NewClient(&redis.Options{Addr: s.addr(), Protocol: 2, DialerRetries: 1})
	pubsub := client.PSubscribe(context.Background(), "*")
	if _, err := pubsub.Receive(context.Background()); err != nil {
		t.Fatal(err)
	}
	s.collectors++
	done := make(chan struct{})
	go func() { // ends with the test
		defer close(done)
		for {
			received, err := pubsub.Receive(context.Background())
			if errors.Is(err, redis.ErrClosed) {
				return
			}
			if m, ok := received.(*redis.Message); ok {
				c.add(m.Channel, m.Payload)
			} else if err != nil {
				time.Sleep(10 * time.Millisecond) // the server is away
			}
		}
	}()
	t.Cleanup(func() {
		pubsub.Close()
		client.Close()
		<-done
	})
	return c
}

// openRedisForTest opens a broker whose times are set before it starts.
func openRedisForTest(t testing.TB, config BrokerConfig, identity string, set func(*redisBroker)) *brokerUnderTest {
	t.Helper()
	under := &brokerUnderTest{connected: make(chan error, 1000)}
	b := newRedisBroker(brokerOptions{
		config: config, project: "p", identity: identity, log: newLogger(testLog{t}, &Config{LogLevel: -4}),
		changed: func(err error) { under.connected <- err },
	})
	if set != nil {
		set(b)
	}
	under.Broker = b
	b.start()
	t.Cleanup(func() { b.Close() })
	under.waitConnected(t)
	return under
}

func (b *brokerUnderTest) waitConnected(t testing.TB) {
	t.Helper()
	for {
		select {
		case err := <-b.connected:
			if err == nil {
				return
			}
			t.Logf("not connected: %v", err)
		case <-time.After(30 * time.Second):
			t.Fatal("no connection within 30 s")
		}
	}
}

// A redisTaker is a worker's side of a consumer: what it is handed takes its slots.
type redisTaker struct {
	taker
	free   atomic.Int64
	limit  int
	refuse atomic.Bool
}

func newTaker(limit int) *redisTaker {
	k := &redisTaker{limit: limit}
	k.free.Store(int64(limit))
	return k
}

func (k *redisTaker) consume(b Broker, subject string) Consumer {
	return b.Consume(subject, Slots{Limit: atMost(k.limit), Free: func() int { return int(k.free.Load()) }}, func(d Delivery) {
		if k.refuse.Load() {
			d.Nack(errors.New("the journal cannot be written"))
			return
		}
		k.free.Add(-1)
		k.take(d)
	})
}

// ids lists the tasks in the order of their arrival.
func (k *redisTaker) ids() []string {
	var ids []string
	for _, d := range k.all() {
		m, _ := parseTaskMessage(d.Data)
		ids = append(ids, m.TaskID)
	}
	return ids
}

func taskJSON(id string) string { return `{"task_id":"` + id + `","data":{"n":1}}` }

// info is a section of what the server says of itself.
func (s *redisServer) info(t testing.TB, section string) string {
	t.Helper()
	text, err := s.client.Info(context.Background(), section).Result()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// waitForReceivers waits until so many connections listen on a channel.
func (s *redisServer) waitForReceivers(t testing.TB, channel string, n int64) {
	t.Helper()
	waitFor(t, 20*time.Second, func() string {
		got, err := s.client.PubSubNumSub(context.Background(), channel).Result()
		if err != nil || got[channel] != n {
			return fmt.Sprintf("%d listen on %s, want %d (%v)", got[channel], channel, n, err)
		}
		return ""
	})
}
