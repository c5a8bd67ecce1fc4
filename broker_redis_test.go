//go:build unix

package main

// broker_redis_test.go runs the Redis broker against private real servers: connecting, channels and plain tasks. Streams
// are in broker_redis_stream_test.go.

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
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

// A redisTaker is a worker's side of a consumer: it notes what it was handed.
type redisTaker struct {
	name       string
	mu         sync.Mutex
	deliveries []Delivery
	free       atomic.Int64
	limit      int
	refuse     atomic.Bool
}

func newTaker(name string, limit int) *redisTaker {
	k := &redisTaker{name: name, limit: limit}
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
		k.mu.Lock()
		defer k.mu.Unlock()
		k.deliveries = append(k.deliveries, d)
	})
}

func (k *redisTaker) got() []Delivery {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.deliveries)
}

// ids lists the tasks in the order of their arrival.
func (k *redisTaker) ids() []string {
	var ids []string
	for _, d := range k.got() {
		m, _ := parseTaskMessage(d.Data)
		ids = append(ids, m.TaskID)
	}
	return ids
}

func (k *redisTaker) waitFor(t testing.TB, n int) []Delivery {
	t.Helper()
	waitFor(t, 20*time.Second, func() string {
		if got := len(k.got()); got < n {
			return fmt.Sprintf("%s has %d deliveries, want %d", k.name, got, n)
		}
		return ""
	})
	return k.got()
}

func taskJSON(id string) string { return `{"task_id":"` + id + `","data":{"n":1}}` }

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
	k := newTaker("w1", 10)
	defer k.consume(b, "p.job").Stop()
	s.waitForReceivers(t, "p.job", 1)
	sent, err := b.Publish(context.Background(), Message{Subject: "p.job", Data: []byte(taskJSON("a")), Task: true},
		Message{Subject: "p.nobody", Data: []byte(taskJSON("b")), Task: true})
	if sent != 1 || codeOf(err) != codeRedisNoWorker {
		t.Errorf("publish of a task to nobody = %d, %v", sent, err)
	}
	if d := k.waitFor(t, 1)[0]; d.Held || string(d.Data) != taskJSON("a") || d.Subject != "p.job" {
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
		k := newTaker(fmt.Sprint("w", i), 1000)
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
			for _, d := range k.got() {
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
	for _, k := range takers {
		t.Logf("%s took %d", k.name, len(k.got()))
	}
	// A duplicate goes to the worker that has the task, and to nobody else.
	before := len(takers[0].got())
	if before == 0 {
		t.Skip("the first worker won nothing")
	}
	s.publish(t, "p.job", string(takers[0].got()[0].Data))
	takers[0].waitFor(t, before+1)
}

func TestRedisPlainRefused(t *testing.T) {
	s := newRedisServer(t)
	b := openForTest(t, s.config(), "p", "w1")
	defer b.Close()
	k := newTaker("w1", 10)
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
	k.waitFor(t, 1) // nobody else was there: it was offered here again

	other := openForTest(t, s.config(), "p", "w2")
	defer other.Close()
	k2 := newTaker("w2", 10)
	k.refuse.Store(true)
	defer k2.consume(other, "p.job").Stop()
	s.waitForReceivers(t, "p.job", 2)
	for i := range 50 {
		s.publish(t, "p.job", taskJSON(fmt.Sprint("both", i)))
	}
	k2.waitFor(t, 50)
	consumer.Stop()
	s.waitForReceivers(t, "p.job", 1)
}

// TestRedisClaimAcrossOutage checks that a message is still claimed when the connection breaks under the claim.
func TestRedisClaimAcrossOutage(t *testing.T) {
	s := newRedisServer(t)
	b := openForTest(t, s.config(), "p", "w1")
	defer b.Close()
	k := newTaker("w1", 10)
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
	k.waitFor(t, 1)
}

func TestRedisStoppedServerIsNoticed(t *testing.T) {
	s := newRedisServer(t)
	for _, config := range []BrokerConfig{s.config(), s.durable()} {
		b := openRedisForTest(t, config, "w1", func(b *redisBroker) {
			b.tripPause, b.tripLimit = 100*time.Millisecond, 500*time.Millisecond
		})
		k := newTaker("w1", 10)
		consumer := k.consume(b, "p.job")
		s.waitForReceivers(t, "p.job", 1)
		s.cmd.Process.Signal(syscall.SIGSTOP)
		select {
		case err := <-b.connected:
			if err == nil || !strings.Contains(err.Error(), s.addr()) {
				t.Errorf("changed(%v) by a server that does not answer", err)
			}
			t.Log(err)
		case <-time.After(10 * time.Second):
			t.Error("a server that does not answer was not noticed")
		}
		s.cmd.Process.Signal(syscall.SIGCONT)
		b.waitConnected(t)
		s.publish(t, "p.job", taskJSON(fmt.Sprint("again-", config.Durable)))
		k.waitFor(t, 1)
		consumer.Stop()
		b.Close()
	}
}

func TestRedisLogin(t *testing.T) {
	s := newRedisServer(t, "--requirepass", "open-sesame")
	admin := redis.NewClient(&redis.Options{Addr: s.addr(), Password: "open-sesame"})
	defer admin.Close()
	if err := admin.Do(context.Background(), "ACL", "SETUSER", "ada", "on", ">love-lace", "~*", "&*", "+@all").Err(); err != nil {
		t.Fatal(err)
	}
	if err := admin.Do(context.Background(), "ACL", "SETUSER", "mute", "on", ">love-lace", "~*", "resetchannels", "+@all").Err(); err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		user, password string
		db             int
		want           string // "" is success
	}{
		{"", "open-sesame", 0, ""},
		{"", "open-sesame", 3, ""},
		{"ada", "love-lace", 0, ""},
		{"", "", 0, "user and password"},
		{"", "wrong-secret", 0, "user and password"},
		{"ada", "wrong-secret", 0, "user and password"},
		{"nobody", "wrong-secret", 0, "user and password"},
		{"ada", "love-lace", 99, "check db"},
	} {
		config := s.config()
		config.User, config.Password, config.DB = row.user, secret(row.password), row.db
		ctx, stop := context.WithTimeout(context.Background(), 10*time.Second)
		err := probeRedis(ctx, brokerOptions{config: config})
		stop()
		if row.want == "" {
			if err != nil {
				t.Errorf("probe as %q, db %d = %v", row.user, row.db, err)
				continue
			}
			b := openForTest(t, config, "p", "w1")
			b.Close()
			continue
		}
		if err == nil || !strings.Contains(hintOf(err), row.want) || !strings.Contains(err.Error(), s.addr()) {
			t.Errorf("probe as %q, db %d = %v, hint %q; want %q", row.user, row.db, err, hintOf(err), row.want)
		}
		if row.password != "" && strings.Contains(fmt.Sprint(err, hintOf(err)), row.password) {
			t.Errorf("the password is in %v", err)
		}
	}
	// A user who may log in and not listen: told as what it is.
	config := s.config()
	config.User, config.Password = "mute", "love-lace"
	failures := make(chan error, 100)
	b := newRedisBroker(brokerOptions{config: config, project: "p", identity: "w", log: newLogger(testLog{t}, &Config{}),
		changed: func(err error) { failures <- err }})
	b.Subscribe("x", func([]byte) {})
	b.start()
	defer b.Close()
	select {
	case err := <-failures:
		if err == nil || !strings.Contains(err.Error(), "NOPERM") || !strings.Contains(hintOf(err), "permission") {
			t.Errorf("changed(%v), hint %q; want one of permission", err, hintOf(err))
		}
	case <-time.After(10 * time.Second):
		t.Error("nothing was said about the missing permission")
	}
}

// TestRedisSecretsStayInside has a server that repeats a command it does not know, password and all.
func TestRedisSecretsStayInside(t *testing.T) {
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
			buffer := make([]byte, 4096)
			for {
				n, err := conn.Read(buffer)
				if err != nil {
					break
				}
				said := strings.ReplaceAll(strings.ReplaceAll(string(buffer[:n]), "\r", " "), "\n", " ")
				fmt.Fprintf(conn, "-ERR unknown command %s\r\n", said)
			}
			conn.Close()
		}
	}()
	addr := listener.Addr().(*net.TCPAddr)
	config := BrokerConfig{Type: "redis", Host: "127.0.0.1", Port: addr.Port, User: "u", Password: "top-secret"}
	err = probeRedis(t.Context(), brokerOptions{config: config})
	if err == nil || strings.Contains(fmt.Sprintf("%+v %s", err, hintOf(err)), "top-secret") {
		t.Errorf("probe = %v", err)
	}
	t.Log(err)
}

func TestRedisSeveralServers(t *testing.T) {
	s := newRedisServer(t)
	replica := newRedisServer(t, "--replicaof", "127.0.0.1 "+s.port)
	config := s.config()
	config.Host = "127.0.0.1:" + freePort(t) + ", " + replica.addr() + ", " + s.addr()
	if err := probeRedis(t.Context(), brokerOptions{config: config}); err != nil {
		t.Error(err)
	}
	b := openForTest(t, config, "p", "w1")
	defer b.Close()
	if session, _ := b.Broker.(*redisBroker).current(); session == nil || session.addr != s.addr() {
		t.Errorf("session is %+v; want one with the master", session)
	}
	err := probeRedis(t.Context(), brokerOptions{config: replica.config()})
	if codeOf(err) != codeRedisServer || !strings.Contains(err.Error(), "replica") {
		t.Errorf("probe of a replica = %v", err)
	}
	config.Host = "127.0.0.1:" + freePort(t)
	if err := probeRedis(t.Context(), brokerOptions{config: config}); codeOf(err) != codeRedisConnect || !strings.Contains(err.Error(), config.Host) {
		t.Errorf("probe of nothing = %v", err)
	}
	cluster := newRedisServer(t, "--cluster-enabled", "yes")
	if err := probeRedis(t.Context(), brokerOptions{config: cluster.config()}); !strings.Contains(fmt.Sprint(err), "Cluster") {
		t.Errorf("probe of a cluster's node = %v", err)
	}
	// A failover: the master becomes a replica under the session.
	config.Host = s.addr() + "," + replica.addr()
	c := openRedisForTest(t, config, "w2", func(b *redisBroker) { b.tripPause = 50 * time.Millisecond })
	ctx := context.Background()
	if err := replica.client.Do(ctx, "REPLICAOF", "NO", "ONE").Err(); err != nil {
		t.Fatal(err)
	}
	if err := s.client.Do(ctx, "REPLICAOF", "127.0.0.1", replica.port).Err(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, 20*time.Second, func() string {
		if session, away := c.Broker.(*redisBroker).current(); session == nil || session.addr != replica.addr() {
			return fmt.Sprintf("not with the new master yet: %v", away)
		}
		return ""
	})
}

func redisClient(addr string) *redis.Client { return redis.NewClient(&redis.Options{Addr: addr}) }

func TestRedisTLS(t *testing.T) {
	t.Parallel() // it mostly waits
	authority, other := newTestAuthority(t), newTestAuthority(t)
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	putFiles(t, dir, map[string][]byte{"ca.crt": authority.pem})
	for name, until := range map[string]time.Time{
		"server": time.Now().Add(time.Hour), "expired": time.Now().Add(-time.Minute), "client": time.Now().Add(time.Hour),
	} {
		certificate, key := authority.issue(until.Add(-24*time.Hour), until)
		putFiles(t, dir, map[string][]byte{name + ".crt": certificate, name + ".key": key})
	}
	serve := func(cert string) *redisServer {
		port := freePort(t)
		s := &redisServer{dir: t.TempDir(), port: port, args: []string{
			"--port", "0", "--tls-port", port, "--tls-cert-file", file(cert + ".crt"),
			"--tls-key-file", file(cert + ".key"), "--tls-ca-cert-file", file("ca.crt"),
		}}
		s.client = redis.NewClient(&redis.Options{Addr: s.addr()})
		t.Cleanup(func() { s.client.Close(); s.stop(t) })
		s.start(t)
		return s
	}
	pool := func(a *testAuthority) *x509.CertPool {
		pool := x509.NewCertPool()
		pool.AddCert(a.certificate)
		return pool
	}
	client, err := tls.LoadX509KeyPair(file("client.crt"), file("client.key"))
	if err != nil {
		t.Fatal(err)
	}
	mutual := &tls.Config{RootCAs: pool(authority), Certificates: []tls.Certificate{client}}
	good, expired, plain := serve("server"), serve("expired"), newRedisServer(t)
	for _, row := range []struct {
		name   string
		server *redisServer
		tls    *tls.Config
		want   string // in the hint; "" is success
	}{
		{"mutual", good, mutual, ""},
		{"no client certificate", good, &tls.Config{RootCAs: pool(authority)}, "cert_file"},
		{"wrong authority", good, &tls.Config{RootCAs: pool(other), Certificates: mutual.Certificates}, "ca_file"},
		{"expired", expired, mutual, "expired"},
		{"plain to TLS", good, nil, "secure: true"},
		{"TLS to plain", plain, mutual, "secure: false"},
	} {
		ctx, stop := context.WithTimeout(context.Background(), 5*time.Second)
		err := probeRedis(ctx, brokerOptions{config: row.server.config(), tls: row.tls})
		stop()
		t.Logf("%s: %v (%s)", row.name, err, hintOf(err))
		if (err == nil) != (row.want == "") || !strings.Contains(hintOf(err), row.want) {
			t.Errorf("%s: %v, hint %q; want %q", row.name, err, hintOf(err), row.want)
		}
	}
	b := newRedisBroker(brokerOptions{config: good.config(), project: "p", identity: "w", tls: mutual,
		log: newLogger(testLog{t}, &Config{}), changed: func(error) {}})
	b.start()
	defer b.Close()
	waitFor(t, 10*time.Second, func() string {
		if _, err := b.Publish(t.Context(), Message{Subject: "x"}); err != nil {
			return err.Error()
		}
		return ""
	})
}

func TestRedisLeavesNoGoroutine(t *testing.T) {
	s := newRedisServer(t)
	s.client.Ping(context.Background())
	before := runtime.NumGoroutine()
	for range 5 {
		b := openForTest(t, s.durable(), "p", "w1")
		k := newTaker("w1", 5)
		consumer := k.consume(b, "p.job")
		b.Subscribe("x", func([]byte) {})
		s.publish(t, "p.job", taskJSON("t"))
		consumer.Stop()
		b.Close()
		if err := b.Close(); err != nil {
			t.Error(err)
		}
		if _, err := b.Publish(context.Background(), Message{Subject: "x"}); err == nil {
			t.Error("publish after Close")
		}
	}
	waitFor(t, 10*time.Second, func() string {
		if n := runtime.NumGoroutine(); n > before {
			stacks := make([]byte, 1<<20)
			return fmt.Sprintf("%d goroutines, %d before:\n%s", n, before, stacks[:runtime.Stack(stacks, true)])
		}
		return ""
	})
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
