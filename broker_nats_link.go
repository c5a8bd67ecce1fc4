package main

// broker_nats_link.go is one connection to one NATS server: login, what arrives, what is sent and proved to have
// arrived, and the loss of it. It is never repaired; broker_nats.go makes the next one.

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
)

const (
	natsConnectLimit = 5 * time.Second // for one server: its address, the connection, TLS and the login

	// natsArrivals is how many messages may have been read from the connection and not yet been given to their
	// subscription, whose handle does not block.
	natsArrivals = 1 << 16
)

// A natsLink is one connection.
type natsLink struct {
	broker *natsBroker
	server string // host:port
	nc     *nats.Conn
	stop   context.CancelFunc // closes the socket, whatever hangs on it
	closed chan struct{}      // closed when the connection is

	arrived    chan *nats.Msg // of all subscriptions, in order
	dispatched chan struct{}  // closed when the connection is, and all that arrived has been handled

	mu       sync.Mutex // guards what follows
	handlers map[*nats.Subscription]*natsSubscription
	marks    map[*nats.Msg]chan struct{} // to be closed when dispatch comes to the message, which is none
}

// connect tries the servers in their order until one takes the login.
func (b *natsBroker) connect(ctx context.Context) (*natsLink, error) {
	var failed error
	for _, server := range b.servers {
		l, err := b.connectTo(ctx, server)
		switch {
		case err == nil:
			return l, nil
		case failed == nil:
			failed = err
		default:
			failed = fmt.Errorf("%w; %w", failed, err)
		}
	}
	return nil, failed
}

func (b *natsBroker) connectTo(ctx context.Context, server string) (*natsLink, error) {
	l := &natsLink{
		broker: b, server: server, closed: make(chan struct{}), arrived: make(chan *nats.Msg, natsArrivals), dispatched: make(chan struct{}),
		handlers: map[*nats.Subscription]*natsSubscription{}, marks: map[*nats.Msg]chan struct{}{},
	}
	ctx, l.stop = context.WithCancel(ctx)
	dialer := &natsDialer{ctx: ctx}
	options := []nats.Option{
		nats.Name("job_item/" + b.identity), nats.Timeout(natsConnectLimit),
		nats.SetCustomDialer(dialer), nats.SkipHostLookup(), nats.NoReconnect(),
		nats.PingInterval(0), nats.FlusherTimeout(b.roundTripLimit), // round trips are made by watch
		nats.ClosedHandler(func(*nats.Conn) { close(l.closed) }), nats.ErrorHandler(l.noted),
	}
	how := "no login"
	switch c := b.config; c.AuthType {
	case "token":
		how = "login by token"
		options = append(options, nats.Token(string(c.Token)))
	case "user_password", "user_password_bcrypt": // the hash is the server's: it wants to see the password
		how = "login by user and password"
		options = append(options, nats.UserInfo(c.User, string(c.Password)))
	}
	if b.tls != nil {
		how += ", TLS"
		options = append(options, nats.Secure(b.tls))
	}
	var err error
	if l.nc, err = nats.Connect("nats://"+server, options...); err == nil {
		return l, nil
	}
	l.stop()
	return nil, connectError(fmt.Sprintf("connect to NATS server %s (%s)", server, how), b.tls != nil, err, dialer.err)
}

// connectError tells what kind of failure it was, and what to do about it.
func connectError(op string, secure bool, err, dialErr error) error {
	var unverified *tls.CertificateVerificationError
	var broken *net.OpError
	switch {
	case dialErr != nil:
		return fail(codeNATSConnect, op, fmt.Errorf("%w; check host and port, and that the server runs", withoutAddress(dialErr)))
	case errors.Is(err, nats.ErrAuthorization), errors.Is(err, nats.ErrAuthExpired), errors.Is(err, nats.ErrAuthRevoked),
		errors.Is(err, nats.ErrAccountAuthExpired):
		return fail(codeNATSLogin, op, fmt.Errorf(
			"login refused (%w); check auth_type, user, password and token in broker_connection", err))
	case errors.As(err, &unverified), strings.Contains(err.Error(), "tls: "), errors.Is(err, nats.ErrSecureConnWanted),
		// The server hangs up when it does not like the client's certificate, often before one could read why.
		secure && errors.As(err, &broken) && !broken.Timeout():
		return fail(codeNATSTLS, op, fmt.Errorf(
			"%w; check secure, ca_file, cert_file and key_file in broker_connection", withoutAddress(err)))
	default:
		return fail(codeNATSAnswer, op, fmt.Errorf("%w; check that this is a NATS server's port, and the server's log",
			withoutAddress(err)))
	}
}

// withoutAddress takes the addresses out of a network error, which the text around it names already.
func withoutAddress(err error) error {
	var op *net.OpError
	if errors.As(err, &op) && op.Op != "remote error" {
		return op.Err
	}
	return err
}

// A natsDialer opens the socket, remembers why it could not, and closes it when ctx ends.
type natsDialer struct {
	ctx context.Context
	err error
}

func (d *natsDialer) Dial(network, addr string) (net.Conn, error) {
	conn, err := (&net.Dialer{Timeout: natsConnectLimit}).DialContext(d.ctx, network, addr)
	if d.err = err; err != nil {
		return nil, err
	}
	context.AfterFunc(d.ctx, func() { conn.Close() })
	return &natsSocket{conn}, nil
}

// A natsSocket closes when something could not be written: the library would go on, and a later round trip would
// confirm what has been lost.
type natsSocket struct{ net.Conn }

func (s *natsSocket) Write(p []byte) (int, error) {
	n, err := s.Conn.Write(p)
	if err != nil {
		s.Conn.Close()
	}
	return n, err
}

// noted logs what the library reports besides the results of calls.
func (l *natsLink) noted(_ *nats.Conn, s *nats.Subscription, err error) {
	if errors.Is(err, nats.ErrSlowConsumer) && s != nil {
		dropped, _ := s.Dropped()
		l.broker.log.Error("messages lost: they arrive faster than they can be taken", "subject", s.Subject, "lost", dropped)
		return
	}
	l.broker.log.Warn("NATS server reports", errAttrs(err), "addr", l.server)
}

// close ends the connection, at once.
func (l *natsLink) close() {
	l.stop()
	l.nc.Close()
}

// roundTrip returns when the server has answered, and so has taken everything that was written before.
func (l *natsLink) roundTrip(ctx context.Context, limit time.Duration) error {
	ctx, stop := context.WithTimeout(ctx, limit)
	defer stop()
	err := l.nc.FlushWithContext(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("no answer within %v", limit)
	}
	return err
}

// watch proves every pause that the server still answers, until it does not, the connection is lost or ctx ends, and
// says which.
func (l *natsLink) watch(ctx context.Context, pause, limit time.Duration) error {
	ticker := time.NewTicker(pause)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			// A call into the library can hang on a write; the socket's end frees it.
			hung := time.AfterFunc(limit+time.Second, l.stop)
			err := l.roundTrip(ctx, limit)
			hung.Stop()
			if err != nil {
				return err
			}
		case <-l.closed:
			if err := l.nc.LastError(); err != nil {
				return withoutAddress(err)
			}
			return errors.New("the server closed it")
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// dispatch gives what arrives to its subscription, until the connection is closed and nothing is left.
func (l *natsLink) dispatch() {
	defer close(l.dispatched)
	for {
		select {
		case m := <-l.arrived:
			l.give(m)
		case <-l.closed:
			for {
				select {
				case m := <-l.arrived:
					l.give(m)
				default:
					return
				}
			}
		}
	}
}

func (l *natsLink) give(m *nats.Msg) {
	l.mu.Lock()
	s := l.handlers[m.Sub]
	if marked := l.marks[m]; marked != nil {
		delete(l.marks, m)
		close(marked)
	}
	l.mu.Unlock()
	if s != nil {
		s.handle(m)
	}
}

// subscribe may fail only because the connection is gone, and the next one subscribes again.
func (l *natsLink) subscribe(s *natsSubscription) {
	l.mu.Lock() // what arrives at once waits for its handler
	defer l.mu.Unlock()
	var err error
	if s.group == "" {
		s.sub, err = l.nc.ChanSubscribe(s.subject, l.arrived)
	} else {
		s.sub, err = l.nc.ChanQueueSubscribe(s.subject, s.group, l.arrived)
	}
	if err != nil {
		l.broker.log.Debug("not subscribed", errAttrs(err), "subject", s.subject)
		return
	}
	l.handlers[s.sub] = s
}

func (l *natsLink) unsubscribe(s *natsSubscription) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s.sub == nil || l.handlers[s.sub] == nil {
		return // it belongs to an earlier connection
	}
	delete(l.handlers, s.sub)
	_ = s.sub.Unsubscribe() // fails only without a connection, where nothing is subscribed
}

// drain unsubscribes and returns when what the server had sent before has been handled, or after limit.
func (l *natsLink) drain(limit time.Duration, subscriptions ...*natsSubscription) {
	l.mu.Lock()
	for _, s := range subscriptions {
		if s.sub != nil && l.handlers[s.sub] != nil {
			_ = s.sub.Drain() // as in unsubscribe
		}
	}
	l.mu.Unlock()
	ctx, stop := context.WithTimeout(context.Background(), limit)
	defer stop()
	mark, marked := new(nats.Msg), make(chan struct{})
	if err := l.roundTrip(ctx, limit); err == nil {
		l.mu.Lock()
		l.marks[mark] = marked
		l.mu.Unlock()
		select {
		case l.arrived <- mark: // behind all that the server had sent
		case <-ctx.Done():
		case <-l.dispatched:
		}
	}
	select {
	case <-marked:
	case <-ctx.Done():
	case <-l.dispatched:
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.marks, mark)
	for _, s := range subscriptions {
		delete(l.handlers, s.sub)
	}
}

// publish sends messages in order. What is not a task is confirmed by a round trip for all together.
func (l *natsLink) publish(ctx context.Context, keeps func(subject string) bool, messages []Message) (sent int, err error) {
	before := l.nc.LastError()
	for i, m := range messages {
		if m.Task {
			if n, err := l.confirm(ctx, before, messages[sent:i]); err != nil {
				return sent + n, err
			}
			sent = i
			err = l.publishTask(ctx, m, keeps(m.Subject))
		} else {
			err = l.nc.Publish(m.Subject, m.Data)
		}
		if err != nil {
			if n, confirmErr := l.confirm(ctx, before, messages[sent:i]); confirmErr != nil {
				return sent + n, confirmErr
			}
			return i, l.publishError(m, err)
		}
		if m.Task {
			sent = i + 1
		}
	}
	n, err := l.confirm(ctx, before, messages[sent:])
	return sent + n, err
}

// confirm says how many of the messages just written have arrived: all, unless the connection is gone or the server
// refuses a subject. before is what the library had to say before they were written.
func (l *natsLink) confirm(ctx context.Context, before error, written []Message) (int, error) {
	if len(written) == 0 {
		return 0, nil
	}
	if err := l.nc.FlushWithContext(ctx); err != nil {
		return 0, fail(codeNATSUnconfirmed, fmt.Sprintf("publish %q", written[0].Subject),
			fmt.Errorf("NATS server %s did not confirm: %w", l.server, err))
	}
	refused := l.nc.LastError() // the server says it before it answers the round trip
	if refused == before || !errors.Is(refused, nats.ErrPermissionViolation) {
		return len(written), nil
	}
	for i, m := range written {
		if strings.Contains(refused.Error(), fmt.Sprintf("Publish to %q", m.Subject)) {
			return i, fail(codeNATSPermission, fmt.Sprintf("publish %q", m.Subject),
				fmt.Errorf("NATS server %s does not permit it to this login", l.server))
		}
	}
	return len(written), nil
}

// Why a task could not be published.
var (
	errNobodyListens = errors.New("no worker consumes it, and no stream keeps it")
	errNotStored     = errors.New("the stream did not store it")
)

// publishError is why a message could not be published, with its code.
func (l *natsLink) publishError(m Message, err error) error {
	op := fmt.Sprintf("publish %q", m.Subject)
	switch {
	case errors.Is(err, nats.ErrMaxPayload):
		return fail(codeNATSTooLarge, op, fmt.Errorf("%d bytes are more than the %d that NATS server %s takes",
			len(m.Data), l.nc.MaxPayload(), l.server))
	case errors.Is(err, errNobodyListens), errors.Is(err, errNotStored):
		return fail(codeNATSTask, op, err)
	case errors.Is(err, nats.ErrConnectionClosed):
		return l.broker.errAway(op)
	default:
		return fail(codeNATSPublish, op, err)
	}
}

// publishTask sends a task to whoever consumes it and returns when it has arrived: when the stream says so where a
// stream keeps it, else when the server has taken it without saying that nobody listens.
func (l *natsLink) publishTask(ctx context.Context, m Message, kept bool) error {
	answers, err := l.nc.SubscribeSync(nats.NewInbox())
	if err != nil {
		return err
	}
	defer func() { _ = answers.Unsubscribe() }() // fails only without a connection
	if err := l.nc.PublishRequest(m.Subject, answers.Subject, m.Data); err != nil {
		return err
	}
	if err := l.nc.FlushWithContext(ctx); err != nil {
		return err
	}
	for {
		if arrived, _, _ := answers.Pending(); arrived == 0 && !kept {
			return nil // that nobody listens would have come before the answer to the round trip
		}
		answer, err := answers.NextMsgWithContext(ctx)
		if errors.Is(err, nats.ErrNoResponders) {
			return errNobodyListens
		}
		if err != nil {
			return err
		}
		var stored struct {
			Stream string `json:"stream"`
			Error  *struct {
				Description string `json:"description"`
			} `json:"error"`
		}
		switch err := json.Unmarshal(answer.Data, &stored); {
		case err != nil: // somebody else answers as well
		case stored.Error != nil:
			return fmt.Errorf("%w: %s", errNotStored, stored.Error.Description)
		case stored.Stream != "":
			return nil
		}
	}
}
