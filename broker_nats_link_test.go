//go:build unix

package main

// broker_nats_link_test.go checks the connection to NATS: outages, logins, addresses, and certificates made on the
// spot.

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

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
