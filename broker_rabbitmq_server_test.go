//go:build unix

package main

// broker_rabbitmq_server_test.go starts one private RabbitMQ for the whole test run, with a virtual host for each test,
// and plays the Job Manager on it. The server starts with the first test that needs it. A shell holds it and waits for
// the end of its standard input, so it goes, with its data, when the test process does, however that ends.

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	cryptorand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// rabbitVHosts is how many virtual hosts are made at a time; each makes the server start a little later.
const rabbitVHosts = 48

// A rabbitNode is a RabbitMQ process with its data.
type rabbitNode struct {
	dir, sbin           string
	port, tlsPort, epmd string
	environment         []string
	authority           *rabbitAuthority
	clientCert          tls.Certificate

	mu       sync.Mutex // guards what follows
	vhosts   int
	shell    *exec.Cmd
	lifeline io.Closer
}

// sharedRabbit is the one of this test run.
var sharedRabbit struct {
	once sync.Once
	node *rabbitNode
}

// A rabbitTestServer is a virtual host of the shared node.
type rabbitTestServer struct {
	*rabbitNode
	vhost string

	publishing sync.Mutex       // guards what follows
	manager    *amqp.Connection // publish's own; nil: it has none now
	channel    *amqp.Channel
}

func startRabbitMQ(t testing.TB) testServer { return newRabbitVHost(t) }

func newRabbitVHost(t testing.TB) *rabbitTestServer {
	t.Helper()
	found, _ := filepath.Glob("/usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin")
	if len(found) == 0 {
		if os.Getenv("JOB_ITEM_TEST_COMPLETE") != "" {
			t.Fatal("rabbitmq-server is missing; install it (test.sh does)")
		}
		t.Skip("rabbitmq-server is missing; ./test.sh installs it")
	}
	sharedRabbit.once.Do(func() {
		node := &rabbitNode{sbin: found[0]}
		sharedRabbit.node = node
		node.prepare(t)
		node.start(t)
	})
	node := sharedRabbit.node
	node.mu.Lock()
	defer node.mu.Unlock()
	if node.shell == nil {
		t.Fatal("rabbitmq did not start for an earlier test")
	}
	if node.vhosts > 0 && node.vhosts%rabbitVHosts == 0 {
		node.ctl(t, "import_definitions", node.define(t, node.vhosts))
	}
	s := &rabbitTestServer{rabbitNode: node, vhost: fmt.Sprintf("v%d", node.vhosts)}
	t.Cleanup(s.forgetManager)
	node.vhosts++
	return s
}

// prepare lays out the node's folder.
func (n *rabbitNode) prepare(t testing.TB) {
	t.Helper()
	dir, err := os.MkdirTemp("", "job_item-rabbitmq-")
	if err != nil {
		t.Fatal(err)
	}
	n.dir, n.port, n.tlsPort, n.epmd = dir, freePort(t), freePort(t), freePort(t)
	n.authority = newRabbitAuthority(t, dir)
	n.authority.issue(t, "server", "localhost")
	n.clientCert = n.authority.issue(t, "client", "worker")
	n.write(t, "rabbitmq.conf", `load_definitions = `+n.define(t, 0)+`
ssl_options.cacertfile = `+dir+`/ca.crt
ssl_options.certfile = `+dir+`/server.crt
ssl_options.keyfile = `+dir+`/server.key
ssl_options.verify = verify_peer
ssl_options.fail_if_no_peer_cert = true
listeners.ssl.1 = 127.0.0.1:`+n.tlsPort+`
disk_free_limit.absolute = 1MB
log.file.level = warning
`)
	n.write(t, "plugins", "[].\n")
	n.write(t, "env.conf", "")
	n.environment = append(os.Environ(),
		"HOME="+dir, "RABBITMQ_NODENAME=job_item_test_"+n.port+"@localhost", "RABBITMQ_NODE_IP_ADDRESS=127.0.0.1",
		"RABBITMQ_NODE_PORT="+n.port, "RABBITMQ_DIST_PORT="+freePort(t), "ERL_EPMD_PORT="+n.epmd, "ERL_EPMD_ADDRESS=127.0.0.1",
		"RABBITMQ_MNESIA_BASE="+dir+"/data", "RABBITMQ_LOG_BASE="+dir+"/log", "RABBITMQ_PID_FILE="+dir+"/pid",
		"RABBITMQ_ENABLED_PLUGINS_FILE="+dir+"/plugins", "RABBITMQ_CONFIG_FILE="+dir+"/rabbitmq.conf",
		"RABBITMQ_CONF_ENV_FILE="+dir+"/env.conf", "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS=+S 2:2 +sbwt none",
	)
}

// define writes the next virtual hosts, from a number on, and the users into a file and names it.
func (n *rabbitNode) define(t testing.TB, from int) string {
	t.Helper()
	var vhosts, permissions []string
	for i := from; i < from+rabbitVHosts; i++ {
		vhosts = append(vhosts, fmt.Sprintf(`{"name":"v%d"}`, i))
		permissions = append(permissions,
			fmt.Sprintf(`{"user":"guest","vhost":"v%d","configure":".*","write":".*","read":".*"}`, i),
			fmt.Sprintf(`{"user":"reader","vhost":"v%d","configure":"^$","write":".*","read":".*"}`, i))
	}
	name := fmt.Sprintf("definitions-%d.json", from)
	n.write(t, name, `{
"users":[{"name":"guest","password":"guest","tags":"administrator"},{"name":"reader","password":"se cret/%2f?#@:","tags":""}],
"vhosts":[`+strings.Join(vhosts, ",")+`],
"permissions":[`+strings.Join(permissions, ",")+`]}`)
	return filepath.Join(n.dir, name)
}

func (n *rabbitNode) write(t testing.TB, name, content string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(n.dir, name), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// rabbitShell runs epmd and the server and ends both, with the data, at the end of its input.
const rabbitShell = `
epmd -port "$ERL_EPMD_PORT" -address 127.0.0.1 &
"$1/rabbitmq-server" &
read line
kill -9 $(cat "$2/pid"); sleep 0.2; rm -rf "$2"
kill -9 0
`

func (n *rabbitNode) start(t testing.TB) {
	t.Helper()
	cmd := exec.Command("sh", "-c", rabbitShell, "sh", n.sbin, n.dir)
	cmd.Env = n.environment
	cmd.Dir = n.dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	output, err := os.OpenFile(filepath.Join(n.dir, "output"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer output.Close()
	cmd.Stdout, cmd.Stderr = output, output
	lifeline, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	n.mu.Lock()
	n.shell, n.lifeline = cmd, lifeline
	n.mu.Unlock()
	waitFor(t, 90*time.Second, func() string {
		conn, err := amqp.DialConfig("amqp://guest:guest@127.0.0.1:"+n.port, amqp.Config{Vhost: fmt.Sprintf("v%d", rabbitVHosts-1)})
		if err != nil {
			said, _ := os.ReadFile(filepath.Join(n.dir, "output"))
			return fmt.Sprintf("rabbitmq: %v\n%s", err, said)
		}
		conn.Close()
		return ""
	})
}

// stop is kill -9 for everything of the node. RabbitMQ 3.10 answers a declaration before its own log says that it is
// decided, and forgets the queue, with all it has confirmed since, when it is killed then. No client can know that, so
// one more declaration takes the others to disk.
func (n *rabbitNode) stop(t testing.TB) {
	t.Helper()
	s := &rabbitTestServer{rabbitNode: n, vhost: "v0"}
	conn, channel, err := s.dial()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := channel.QueueDeclare("", true, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.shell == nil {
		return
	}
	syscall.Kill(n.beam(t), syscall.SIGKILL)
	syscall.Kill(-n.shell.Process.Pid, syscall.SIGKILL)
	n.shell.Wait()
	n.lifeline.Close()
	os.Remove(filepath.Join(n.dir, "pid"))
}

// beam is the process id of the server itself.
func (n *rabbitNode) beam(t testing.TB) int {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(n.dir, "pid"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// ctl runs rabbitmqctl, which takes seconds.
func (n *rabbitNode) ctl(t testing.TB, args ...string) {
	t.Helper()
	cmd := exec.Command(filepath.Join(n.sbin, "rabbitmqctl"), args...)
	cmd.Env = n.environment
	if output, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("rabbitmqctl %q: %v\n%s", args, err, output)
	}
}

func (s *rabbitTestServer) connection() string {
	return fmt.Sprintf("{type: rabbitmq, host: 127.0.0.1, port: %s, user: guest, password: guest, vhost: %s, exchange: jobs}", s.port, s.vhost)
}

// config is the same without an exchange.
func (s *rabbitTestServer) config(t testing.TB) BrokerConfig {
	t.Helper()
	port, err := strconv.Atoi(s.port)
	if err != nil {
		t.Fatal(err)
	}
	return BrokerConfig{Type: "rabbitmq", Host: "127.0.0.1", Port: port, User: "guest", Password: "guest", VHost: s.vhost}
}

func (s *rabbitTestServer) dial() (*amqp.Connection, *amqp.Channel, error) {
	conn, err := amqp.DialConfig("amqp://guest:guest@127.0.0.1:"+s.port, amqp.Config{Vhost: s.vhost, Heartbeat: 2 * time.Second})
	if err != nil {
		return nil, nil, err
	}
	channel, err := conn.Channel()
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	return conn, channel, nil
}

// raw is a client's channel for the length of a test.
func (s *rabbitTestServer) raw(t testing.TB) *amqp.Channel {
	t.Helper()
	conn, channel, err := s.dial()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return channel
}

// publish sends like a manager: the queue of a job is declared before, those of a worker are the worker's.
func (s *rabbitTestServer) publish(t testing.TB, subject, data string) {
	t.Helper()
	job := strings.Contains(subject, ".") && !strings.HasSuffix(subject, ".restart") && !strings.HasSuffix(subject, ".shutdown") &&
		!strings.HasSuffix(subject, "_worker") && !strings.HasSuffix(subject, "_listen")
	s.publishing.Lock()
	defer s.publishing.Unlock()
	waitFor(t, 60*time.Second, func() string {
		var err error
		if s.manager == nil {
			if s.manager, s.channel, err = s.dial(); err != nil {
				return err.Error()
			}
		}
		if err = publishOn(s.channel, "jobs", subject, data, job); err != nil {
			s.manager.Close()
			s.manager = nil
			return err.Error()
		}
		return ""
	})
}

// forgetManager closes publish's connection; the next one opens another.
func (s *rabbitTestServer) forgetManager() {
	s.publishing.Lock()
	defer s.publishing.Unlock()
	if s.manager != nil {
		s.manager.Close()
		s.manager = nil
	}
}

// publishTo publishes on a connection of its own.
func (s *rabbitTestServer) publishTo(exchange, subject, data string, declare bool) error {
	conn, channel, err := s.dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	return publishOn(channel, exchange, subject, data, declare)
}

// publishOn returns when the broker has confirmed.
func publishOn(channel *amqp.Channel, exchange, subject, data string, declare bool) error {
	if exchange != "" {
		if err := channel.ExchangeDeclare(exchange, "topic", true, false, false, false, nil); err != nil {
			return err
		}
	}
	if declare {
		if _, err := channel.QueueDeclare(subject, true, false, false, false, nil); err != nil {
			return err
		}
		if exchange != "" {
			if err := channel.QueueBind(subject, subject, exchange, false, nil); err != nil {
				return err
			}
		}
	}
	if err := channel.Confirm(false); err != nil {
		return err
	}
	confirm, err := channel.PublishWithDeferredConfirm(exchange, subject, false, false,
		amqp.Publishing{DeliveryMode: amqp.Persistent, Body: []byte(data)})
	if err != nil {
		return err
	}
	ctx, stop := context.WithTimeout(context.Background(), 10*time.Second)
	defer stop()
	if ok, err := confirm.WaitContext(ctx); err != nil || !ok {
		return fmt.Errorf("not confirmed: %v", err)
	}
	return nil
}

// collect begins with what is published after it returns.
func (s *rabbitTestServer) collect(t testing.TB) *collector {
	t.Helper()
	c := &collector{}
	ctx, stop := context.WithCancel(context.Background())
	bound, done := make(chan struct{}), make(chan struct{})
	sayBound := sync.OnceFunc(func() { close(bound) })
	go func() { // ends with the test
		defer close(done)
		for ctx.Err() == nil {
			s.collectOnce(ctx, c, sayBound)
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
		}
	}()
	t.Cleanup(func() { stop(); <-done })
	select {
	case <-bound:
	case <-time.After(30 * time.Second):
		t.Fatal("the collector's queue was not bound within 30 s")
	}
	return c
}

// collectOnce collects until the connection is lost. The queue stays, so nothing is missed meanwhile.
func (s *rabbitTestServer) collectOnce(ctx context.Context, c *collector, bound func()) {
	conn, channel, err := s.dial()
	if err != nil {
		return
	}
	defer conn.Close()
	const queue = "collector"
	if err := channel.ExchangeDeclare("jobs", "topic", true, false, false, false, nil); err != nil {
		return
	}
	if _, err := channel.QueueDeclare(queue, true, false, false, false, nil); err != nil {
		return
	}
	if err := channel.QueueBind(queue, "#", "jobs", false, nil); err != nil {
		return
	}
	deliveries, err := channel.Consume(queue, "", false, true, false, false, nil)
	if err != nil {
		return
	}
	bound()
	for {
		select {
		case <-ctx.Done():
			return
		case d, open := <-deliveries:
			if !open {
				return
			}
			c.add(d.RoutingKey, string(d.Body))
			d.Ack(false)
		}
	}
}

// A rabbitAuthority signs certificates, whose files it writes to its folder.
type rabbitAuthority struct {
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

func newRabbitAuthority(t testing.TB, dir string) *rabbitAuthority {
	t.Helper()
	a := &rabbitAuthority{dir: dir, pool: x509.NewCertPool()}
	a.key, a.cert = a.sign(t, "ca", &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"}, IsCA: true,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	})
	a.pool.AddCert(a.cert)
	return a
}

// issue gives a certificate for a server of that name on loopback, or a client.
func (a *rabbitAuthority) issue(t testing.TB, file, name string) tls.Certificate {
	t.Helper()
	key, cert := a.sign(t, file, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	})
	return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}
}

func (a *rabbitAuthority) sign(t testing.TB, file string, c *x509.Certificate) (*ecdsa.PrivateKey, *x509.Certificate) {
	t.Helper()
	c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour)
	key, err := ecdsa.GenerateKey(elliptic.P256(), cryptorand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = c, key
	}
	der, err := x509.CreateCertificate(cryptorand.Reader, c, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{
		file + ".crt": {Type: "CERTIFICATE", Bytes: der}, file + ".key": {Type: "EC PRIVATE KEY", Bytes: keyDER},
	} {
		if err := os.WriteFile(filepath.Join(a.dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return key, signed
}
