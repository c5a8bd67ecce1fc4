package main

// broker_rabbitmq_dial.go makes one connection to RabbitMQ and says in plain words why there is none. A connection here
// is bounded where the library's is not: its calls wait for an answer for ever, so whoever calls closes the socket when
// the time is over, which ends every call on it.

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

const (
	// rabbitHeartbeat is what is asked of the broker; the library gives a silent one up after 1.5 times that.
	rabbitHeartbeat = 10 * time.Second

	// rabbitCloseLimit bounds the goodbye, which a broker that hangs never answers.
	rabbitCloseLimit = 2 * time.Second

	// rabbitLastWord is how long a server that takes nothing any more may need for saying why.
	rabbitLastWord = 200 * time.Millisecond
)

// A rabbitConn is one connection, from the login to its end.
type rabbitConn struct {
	*amqp.Connection
	addr   string
	vhost  string
	socket net.Conn      // below TLS: closing it waits for nothing
	limit  time.Duration // of any answer

	closeOnce sync.Once

	gone chan struct{} // closed when the connection has ended
	why  error         // to be read after gone

	blocked atomic.Pointer[string] // why the broker does not read what is published, nil while it does

	mu        sync.Mutex    // guards declaring, and lets one declare at a time
	declaring *amqp.Channel // for declarations, whose failure closes the channel; nil: none open
}

// addresses lists the servers of the configuration.
func (b *rabbitBroker) addresses() []string {
	if b.tls != nil {
		return b.config.servers(5671)
	}
	return b.config.servers(5672)
}

// dial connects to a server and logs in. ctx bounds all of it, besides the limit of its own.
func (b *rabbitBroker) dial(ctx context.Context, addr, purpose string) (*rabbitConn, error) {
	ctx, stop := context.WithTimeout(ctx, b.proveWithin)
	defer stop()
	socket, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, failHint(codeRabbitConnect, "connect to rabbitmq at "+addr, err, connectHint(err))
	}
	interrupt := context.AfterFunc(ctx, func() { socket.Close() })
	defer interrupt()
	transport := &rabbitTransport{Conn: socket, failed: make(chan struct{})}
	if b.tls != nil {
		if transport.Conn, err = secureRabbit(ctx, socket, addr, b.tls); err != nil {
			return nil, err
		}
	}
	vhost := b.config.VHost
	if vhost == "" {
		vhost = "/"
	}
	conn := &rabbitConn{addr: addr, vhost: vhost, socket: socket, limit: b.proveWithin, gone: make(chan struct{})}
	conn.Connection, err = amqp.Open(transport, amqp.Config{
		SASL: b.login(), Vhost: vhost, Heartbeat: rabbitHeartbeat, Locale: "en_US", FrameSize: 128 << 10,
		Properties: amqp.Table{
			"product": "job_item", "version": version, "connection_name": "job_item " + b.identity + " " + purpose,
		},
	})
	if err != nil {
		err = transport.explain(err)
		socket.Close()
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, conn.refusal(err, b.config.User, b.tls != nil)
	}
	if !interrupt() {
		conn.close()
		return nil, conn.refusal(ctx.Err(), b.config.User, b.tls != nil)
	}
	conn.watch(b)
	return conn, nil
}

// A rabbitTransport keeps the first error of reading, which the library may lose to that of a write before or after it:
// with TLS 1.3 it is there that a server asks for a client certificate.
type rabbitTransport struct {
	net.Conn
	once   sync.Once
	err    error         // to be read after failed
	failed chan struct{} // closed at the first error
}

func (t *rabbitTransport) Read(p []byte) (int, error) {
	n, err := t.Conn.Read(p)
	if err != nil {
		t.once.Do(func() {
			t.err = err
			close(t.failed)
		})
	}
	return n, err
}

// Write lets the reader hear the server's last word before it says that it failed, since the library closes the
// connection then.
func (t *rabbitTransport) Write(p []byte) (int, error) {
	n, err := t.Conn.Write(p)
	if err != nil {
		select {
		case <-t.failed:
		case <-time.After(rabbitLastWord):
		}
	}
	return n, err
}

// explain finds what an error of the library is due to.
func (t *rabbitTransport) explain(err error) error {
	var refused *amqp.Error
	if errors.As(err, &refused) && (refused.Server || refused.Code == amqp.AccessRefused) {
		return err
	}
	select {
	case <-t.failed:
		return t.err
	default:
		return err
	}
}

// login offers the user and password; without a user, a client certificate is who we are, else RabbitMQ's own default.
func (b *rabbitBroker) login() []amqp.Authentication {
	user, password := b.config.User, string(b.config.Password)
	if user != "" {
		return []amqp.Authentication{&amqp.PlainAuth{Username: user, Password: password}}
	}
	guest := &amqp.PlainAuth{Username: "guest", Password: "guest"}
	if b.tls != nil && (len(b.tls.Certificates) > 0 || b.tls.GetClientCertificate != nil) {
		return []amqp.Authentication{&amqp.ExternalAuth{}, guest}
	}
	return []amqp.Authentication{guest}
}

// secureRabbit puts TLS on a fresh socket, which it closes when that fails.
func secureRabbit(ctx context.Context, socket net.Conn, addr string, config *tls.Config) (net.Conn, error) {
	if config.ServerName == "" {
		host, _, err := net.SplitHostPort(addr)
		if err != nil {
			host = addr
		}
		config = config.Clone()
		config.ServerName = host
	}
	secured := tls.Client(socket, config)
	if err := secured.HandshakeContext(ctx); err != nil {
		socket.Close()
		return nil, failHint(codeRabbitTLS, "agree on TLS with rabbitmq at "+addr, err, tlsHint(err))
	}
	return secured, nil
}

func connectHint(err error) string {
	switch {
	case errors.Is(err, errConnectionRefused):
		return "start RabbitMQ there, or correct host and port"
	case errors.Is(err, context.DeadlineExceeded):
		return "nothing answers there: check host, port and firewall"
	}
	return "check host and port"
}

func tlsHint(err error) string {
	var noTLS tls.RecordHeaderError
	var unknown x509.UnknownAuthorityError
	var host x509.HostnameError
	switch {
	case errors.As(err, &noTLS):
		return "that port does not speak TLS: give the TLS port (usually 5671), or turn secure off"
	case errors.As(err, &unknown):
		return "name the authority that signed the server's certificate in ca_file"
	case errors.As(err, &host):
		return "give host as the name that the server's certificate carries"
	case strings.Contains(err.Error(), "remote error"):
		return "the server refuses the client certificate: check cert_file and key_file"
	}
	return "check the TLS settings of both sides"
}

// refusal says why a server that was reached is of no use.
func (c *rabbitConn) refusal(err error, user string, secure bool) error {
	if user == "" {
		user = "guest"
	}
	var refused *amqp.Error
	errors.As(err, &refused)
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		// The library calls that a refusal as well.
	case errors.Is(err, amqp.ErrSASL), errors.Is(err, amqp.ErrCredentials), refused != nil && refused.Server && refused.Code == amqp.AccessRefused:
		return failHint(codeRabbitLogin, fmt.Sprintf("log in to rabbitmq at %s as user %q", c.addr, user), err,
			"check user and password; guest may log in from the broker's own host only")
	case errors.Is(err, amqp.ErrVhost), refused != nil && refused.Server && refused.Code == amqp.NotAllowed:
		return failHint(codeRabbitVHost, fmt.Sprintf("open virtual host %q of rabbitmq at %s as user %q", c.vhost, c.addr, user), err,
			"create the virtual host, give the user permissions on it, or correct vhost")
	}
	hint := "something answers there, but not as RabbitMQ does: check host and port, and whether the port expects TLS (secure)"
	if secure {
		hint = "if the server asks for a client certificate, check cert_file and key_file; else check host and port"
	}
	return failHint(codeRabbitHandshake, fmt.Sprintf("greet rabbitmq at %s", c.addr), err, hint)
}

// watch follows what the library says of the connection, which it must always be able to say: it waits for its
// listeners.
func (c *rabbitConn) watch(b *rabbitBroker) {
	closing := c.NotifyClose(make(chan *amqp.Error, 1))
	blocking := c.NotifyBlocked(make(chan amqp.Blocking, 1))
	b.tasks.Add(2)
	go func() { // ends with the connection
		defer b.tasks.Done()
		for change := range blocking {
			if !change.Active {
				c.blocked.Store(nil)
				b.log.Info("broker takes events again")
				continue
			}
			c.blocked.Store(&change.Reason)
			b.log.Warn("broker takes no events until it has memory or disk again", "err", change.Reason, "addr", c.addr)
		}
	}()
	go func() { // ends with the connection
		defer b.tasks.Done()
		defer close(c.gone)
		select {
		case err := <-closing:
			if err != nil {
				c.why = err
			}
		case <-b.ctx.Done(): // whoever waits for an answer now, waits no longer than the goodbye
			c.close()
		}
	}()
}

// call makes a call that waits for an answer. When none comes in time the connection is closed, since that is the only
// way out of the call.
func (c *rabbitConn) call(f func() error) error {
	late := time.AfterFunc(c.limit, func() { c.socket.Close() })
	err := f()
	if !late.Stop() && err != nil {
		return fmt.Errorf("no answer within %v: %w", c.limit, err)
	}
	return err
}

// write does something that may wait for the broker to read; ctx's end closes the connection then, because half a frame
// may have been written.
func (c *rabbitConn) write(ctx context.Context, f func() error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { c.socket.Close() })
	defer stop()
	return f()
}

// open opens a channel.
func (c *rabbitConn) open() (channel *amqp.Channel, err error) {
	err = c.call(func() error {
		channel, err = c.Channel()
		return err
	})
	return channel, err
}

// answers is a round trip through a channel, which needs no permission and changes nothing.
func (c *rabbitConn) answers(channel *amqp.Channel) error {
	late := time.AfterFunc(c.limit, func() {
		if c.blocked.Load() == nil { // else it does not read; its heartbeats tell whether it lives
			c.socket.Close()
		}
	})
	err := channel.Qos(1, 0, false) // basic.qos for this channel, which never consumes
	if !late.Stop() && err != nil {
		return fmt.Errorf("no answer within %v: %w", c.limit, err)
	}
	return err
}

// close says goodbye, within a bound.
func (c *rabbitConn) close() {
	c.closeOnce.Do(func() {
		late := time.AfterFunc(rabbitCloseLimit, func() { c.socket.Close() })
		defer late.Stop()
		_ = c.CloseDeadline(time.Now().Add(rabbitCloseLimit)) // it is gone either way
		c.socket.Close()
	})
}
