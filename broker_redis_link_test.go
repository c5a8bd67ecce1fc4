//go:build unix

package main

// broker_redis_link_test.go checks the connection to Redis: outages, logins, several servers, and certificates made on
// the spot.

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

func TestRedisStoppedServerIsNoticed(t *testing.T) {
	s := newRedisServer(t)
	for _, config := range []BrokerConfig{s.config(), s.durable()} {
		b := openRedisForTest(t, config, "w1", func(b *redisBroker) {
			b.tripPause, b.tripLimit = 100*time.Millisecond, 500*time.Millisecond
		})
		k := newTaker(10)
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
		k.wait(t, 1)
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
		k := newTaker(5)
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
