package main

// broker_redis.go connects to a Redis server (or Valkey, KeyDB, …) and publishes. One session is one life of the
// connection: a small pool for commands and one connection for channels, given up and made anew together as soon as
// either fails, so that nothing is ever half connected. What comes in over channels is in broker_redis_channel.go,
// what a durable broker keeps in streams in broker_redis_stream.go.
//
// A Redis Cluster is refused: tasks of several jobs are waited for in one call, and a cluster takes only keys of one
// node there. Several hosts are tried in turn until one is a master, which also follows a failover by Sentinel.

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/logging"
)

const (
	redisPort = 6379

	redisDialLimit    = 5 * time.Second
	redisCommandLimit = 5 * time.Second // for a reply, and for a write
	redisAnswerLimit  = 3 * time.Second // for a sign of life of a task's holder
	redisConnections  = 5               // for commands: one waits for tasks, the others settle and publish
	redisBufferBytes  = 16 << 10        // per connection and direction

	// Streams need XPENDING … IDLE and what came with it.
	redisStreamVersion = "6.2"
)

func init() {
	logging.Disable() // the library would print to stderr on its own; what it meets comes back as errors anyway
}

// A redisBroker is a connection to Redis that is made again for as long as the broker is open.
type redisBroker struct {
	brokerOptions

	// How long things take, see broker.go; tests shorten them.
	tripPause, tripLimit time.Duration
	renewal, lostAfter   time.Duration
	lookPause            time.Duration

	ctx  context.Context // ends on Close
	quit context.CancelFunc
	work sync.WaitGroup // every goroutine but those of a session

	woken   chan struct{} // the reader of streams should look around, cap 1
	offered chan struct{} // there are offers to claim, cap 1
	changes chan struct{} // channels have been wanted or left, cap 1
	handles chan struct{} // one for each offer that is being handled

	mu       sync.Mutex    // guards what follows
	session  *redisSession // nil while there is no connection
	came     chan struct{} // closed when session is set, then made anew
	away     error         // why there is no connection
	closed   bool
	channels map[string][]*redisSubscription
	stale    map[string]struct{} // channels whose subscription is not yet what channels says
	queued   int                 // bytes of messages that wait here
	room     sync.Cond           // queued has become less, or a session ended
	offers   []redisOffer
	streams  map[string]*redisStream // by subject
	sorted   []*redisStream          // those with a consumer, by subject; nil: they have changed
}

var _ Broker = (*redisBroker)(nil)

// openRedis begins to connect.
func openRedis(o brokerOptions) (Broker, error) {
	b := newRedisBroker(o)
	b.start()
	return b, nil
}

func newRedisBroker(o brokerOptions) *redisBroker {
	b := &redisBroker{
		brokerOptions: o,
		tripPause:     roundTripPause, tripLimit: roundTripLimit,
		renewal: claimRenewal, lostAfter: claimLost, lookPause: claimRenewal,
		woken: make(chan struct{}, 1), offered: make(chan struct{}, 1), changes: make(chan struct{}, 1),
		handles: make(chan struct{}, maxRedisHandles), came: make(chan struct{}),
		channels: map[string][]*redisSubscription{}, stale: map[string]struct{}{},
		streams: map[string]*redisStream{},
	}
	b.away = errors.New("not connected yet")
	b.room.L = &b.mu
	b.ctx, b.quit = context.WithCancel(context.Background())
	return b
}

func (b *redisBroker) start() {
	b.work.Add(2)
	go b.connect()     // ends on Close
	go b.claimOffers() // ends on Close
}

// probeRedis connects and logs in to the first of the servers that is fit for use, and says what stood in the way
// where there is none. It is the whole of what a session needs before it may begin.
func probeRedis(ctx context.Context, o brokerOptions) error {
	b := newRedisBroker(o)
	defer b.quit()
	var tried []error
	for _, addr := range b.config.servers(redisPort) {
		client := b.newClient(addr)
		err := b.greet(ctx, client, addr)
		client.Close()
		if err == nil {
			return nil
		}
		tried = append(tried, err)
	}
	return errors.Join(tried...)
}

// connect keeps a session for as long as the broker is open, on the server that worked last or the next one in turn.
func (b *redisBroker) connect() {
	defer b.work.Done()
	servers := b.config.servers(redisPort)
	for server, failures := 0, 0; ; failures++ {
		served, err := b.serve(servers[server])
		if b.ctx.Err() != nil {
			return
		}
		b.mu.Lock()
		b.away = err
		b.mu.Unlock()
		b.changed(err)
		if served {
			failures = 0
		} else {
			server = (server + 1) % len(servers)
		}
		select {
		case <-time.After(reconnectPause(failures)):
		case <-b.ctx.Done():
			return
		}
	}
}

// serve connects to one server and returns when that connection is over, with why, and whether there was one.
func (b *redisBroker) serve(addr string) (served bool, err error) {
	s := &redisSession{
		broker: b, addr: addr, client: b.newClient(addr), began: time.Now(),
		pong: make(chan struct{}, 1), subscribed: map[string]bool{},
	}
	s.ctx, s.lost = context.WithCancelCause(b.ctx)
	defer s.lost(nil)
	defer s.client.Close()
	if err := b.greet(s.ctx, s.client, addr); err != nil {
		return false, err
	}
	s.channels = s.client.Subscribe(s.ctx)
	defer s.channels.Close()
	return s.run()
}

// newClient prepares connections to one server; the first command makes one.
func (b *redisBroker) newClient(addr string) *redis.Client {
	dialer := &net.Dialer{Timeout: redisDialLimit}
	dial := dialer.DialContext
	if b.tls != nil {
		// It takes the server's name from the address where the configuration names none.
		dial = (&tls.Dialer{NetDialer: dialer, Config: b.tls}).DialContext
	}
	return redis.NewClient(&redis.Options{
		Addr: addr, Username: b.config.User, Password: string(b.config.Password), DB: b.config.DB,
		Protocol: 2, // nothing of version 3 is used, and the library looks for its push messages at every command
		Dialer:   dial, DialTimeout: redisDialLimit, DialerRetries: 1,
		ReadTimeout: redisCommandLimit, WriteTimeout: redisCommandLimit, ContextTimeoutEnabled: true,
		MaxRetries: -1, // a command whose reply was lost would be done twice
		PoolSize:   redisConnections, ReadBufferSize: redisBufferBytes, WriteBufferSize: redisBufferBytes,
		ClientName: "job_item", DisableIdentity: true,
	})
}

// greet logs in and finds out whether the server is fit for use: a master, alone, new enough, done loading.
func (b *redisBroker) greet(ctx context.Context, client *redis.Client, addr string) error {
	ctx, stop := context.WithTimeout(ctx, b.tripLimit)
	defer stop()
	// PING first: it is what a server that still loads its data refuses.
	if err := client.Ping(ctx).Err(); err != nil {
		return b.connectError(addr, err)
	}
	hello := redis.NewMapStringInterfaceCmd(ctx, "HELLO", 2)
	var refused redis.Error
	if err := client.Process(ctx, hello); err != nil && !errors.As(err, &refused) {
		return b.connectError(addr, err)
	}
	about := hello.Val() // empty from before 6.0, or from something in between that does not know HELLO
	said := func(key string) string { text, _ := about[key].(string); return text }
	var unfit, hint string
	switch {
	case said("mode") == "cluster":
		unfit, hint = "it is part of a Redis Cluster, which this worker cannot use", "name a standalone server"
	case said("mode") == "sentinel":
		unfit, hint = "it is a Sentinel", "list the Redis servers that it watches as host, the master among them is found"
	case said("role") == "replica" || said("role") == "slave":
		unfit, hint = "it is a replica", "name the master as well, or instead"
	case b.config.Durable && !redisVersionAtLeast(said("version"), redisStreamVersion):
		version := said("version")
		if version == "" {
			version = "unknown"
		}
		unfit = fmt.Sprintf("durable needs version %s or later, its version is %s", redisStreamVersion, version)
		hint = "update the server, or set durable: false"
	default:
		return nil
	}
	return failHint(codeRedisServer, "use redis at "+addr, errors.New(unfit), hint)
}

// redisVersionAtLeast compares major and minor version.
func redisVersionAtLeast(version, least string) bool {
	numbers := func(v string) [2]int {
		var n [2]int
		for i, part := range strings.SplitN(v, ".", 3) {
			if i < 2 {
				n[i], _ = strconv.Atoi(part)
			}
		}
		return n
	}
	v, l := numbers(version), numbers(least)
	return v[0] > l[0] || v[0] == l[0] && v[1] >= l[1]
}

// connectError says that no connection could be made to a server, what was tried and what to do.
func (b *redisBroker) connectError(addr string, err error) error {
	user := b.config.User
	if user == "" {
		user = "default"
	}
	tried := fmt.Sprintf("connect to redis at %s as user %q, db %d", addr, user, b.config.DB)
	if b.config.Password == "" {
		tried += ", without password"
	}
	if b.tls != nil {
		tried += ", with TLS"
	}
	return failHint(codeRedisConnect, tried, b.withoutSecrets(err), b.connectHint(err))
}

func (b *redisBroker) connectHint(err error) string {
	var authority x509.UnknownAuthorityError
	var invalid x509.CertificateInvalidError
	var hostname x509.HostnameError
	var noTLS tls.RecordHeaderError
	text := err.Error()
	switch {
	case errors.As(err, &authority):
		return "the server's certificate is not from an authority that is trusted here: check ca_file"
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return "the server's certificate has expired, or is not valid yet: renew it, and check this host's clock"
	case errors.As(err, &invalid), errors.As(err, &hostname):
		return "the server's certificate is not for this host and purpose: check host and the certificate"
	case errors.As(err, &noTLS):
		return "the server does not speak TLS at this port: check port, or set secure: false"
	case strings.Contains(text, "tls: "):
		return "the server refused the TLS connection: check cert_file and key_file"
	case strings.Contains(text, "WRONGPASS"), strings.Contains(text, "invalid password"), strings.Contains(text, "NOAUTH"):
		return "check user and password of broker_connection"
	case strings.Contains(text, "NOPERM"):
		return "the user lacks a permission on the server: check its ACL"
	case strings.Contains(text, "DB index"):
		return "check db of broker_connection"
	case strings.Contains(text, "LOADING"):
		return "the server is loading its data: wait"
	}
	var refused redis.Error
	var timeout net.Error
	var op *net.OpError
	switch {
	case errors.As(err, &refused), errors.As(err, &op) && op.Op == "dial":
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		if b.tls != nil {
			return "the server does not answer: check that it speaks TLS at this port, else set secure: false"
		}
		return "the server does not answer: check host and port of broker_connection, and the server's load"
	case b.tls == nil:
		return "the server closed the connection: if it wants TLS, set secure: true"
	default:
		return "the server closed the connection: if it wants a certificate of ours, set cert_file and key_file"
	}
	return "check host and port of broker_connection, and that the server is running"
}

// withoutSecrets makes sure that an error does not show the password: some servers repeat the command that they did
// not understand. The cause is kept where it is clean.
func (b *redisBroker) withoutSecrets(err error) error {
	password := string(b.config.Password)
	if password == "" || !strings.Contains(err.Error(), password) {
		return err
	}
	return errors.New(strings.ReplaceAll(err.Error(), password, b.config.Password.String()))
}

// Publish sends the messages over one connection in one go, so they arrive in order or not at all from some point on.
func (b *redisBroker) Publish(ctx context.Context, messages ...Message) (sent int, err error) {
	s, away := b.current()
	if s == nil {
		return 0, fail(codeRedisAway, "publish to redis", away)
	}
	pipe := s.client.Pipeline()
	replies := make([]*redis.Cmd, len(messages))
	for i, m := range messages {
		if m.Task && b.config.Durable {
			// Not trimmed: that could lose tasks that nobody has read. Acknowledging deletes.
			replies[i] = pipe.Do(ctx, "XADD", m.Subject, "*", redisField, m.Data)
		} else {
			replies[i] = pipe.Do(ctx, "PUBLISH", m.Subject, m.Data)
		}
	}
	if len(messages) > 0 {
		_, err = pipe.Exec(ctx)
	}
	for i, reply := range replies {
		// What was answered has a value, even where the library has put a later failure of the connection beside it.
		switch receivers := reply.Val().(type) {
		case nil:
			if reply.Err() != nil {
				err = reply.Err()
			}
			return i, fail(codeRedisPublish, fmt.Sprintf("publish %q to redis at %s", messages[i].Subject, s.addr), s.failed(err))
		case int64:
			if messages[i].Task && receivers == 0 {
				return i, fail(codeRedisNoWorker, fmt.Sprintf("publish %q to redis at %s", messages[i].Subject, s.addr),
					errors.New("no worker listens there, and the server keeps nothing without durable"))
			}
		}
	}
	return len(messages), nil
}

// Listens asks for a sign of life where there is a subscriber: the connection of a host that has just died stays for long.
func (b *redisBroker) Listens(ctx context.Context, taskID string) (bool, error) {
	s, away := b.current()
	if s == nil {
		return false, away
	}
	channel := taskID + listenSuffix
	listeners, err := s.client.PubSubNumSub(ctx, channel).Result()
	if err != nil || listeners[channel] == 0 {
		return false, err
	}
	answered := make(chan struct{}, 1)
	defer b.Subscribe(channel+".callback", func([]byte) { rouse(answered) }).Stop()
	limit := time.After(redisAnswerLimit)
	for {
		if err := s.client.Publish(ctx, channel, "").Err(); err != nil {
			return false, err
		}
		select {
		case <-answered:
			return true, nil
		case <-time.After(redisAnswerLimit / 10): // the subscription may not be there yet
		case <-limit:
			return false, nil
		case <-ctx.Done():
			return false, context.Cause(ctx)
		}
	}
}

// Close ends the session and every goroutine. What is unsettled then is delivered again.
func (b *redisBroker) Close() error {
	b.mu.Lock()
	b.closed = true
	b.away = errors.New("the connection has been closed")
	b.room.Broadcast()
	b.mu.Unlock()
	b.quit()
	b.work.Wait()
	return nil
}

// current is the session, or why there is none.
func (b *redisBroker) current() (*redisSession, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.session, b.away
}

// spawn starts a goroutine that Close waits for; false when it is too late. The caller holds mu.
func (b *redisBroker) spawn(run func()) bool {
	if b.closed {
		return false
	}
	b.work.Add(1)
	go func() { // ends by itself, soon
		defer b.work.Done()
		run()
	}()
	return true
}

// rouse wakes the one reader of a channel of capacity 1.
func rouse(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default: // it will look anyway
	}
}

// A redisSession is one life of the connection, to one server.
type redisSession struct {
	broker   *redisBroker
	addr     string
	client   *redis.Client
	channels *redis.PubSub
	began    time.Time

	ctx  context.Context         // ends with the session
	lost context.CancelCauseFunc // ends it, with why
	work sync.WaitGroup

	pong       chan struct{}   // an answer to a PING on the channels' connection, cap 1
	subscribed map[string]bool // the channels asked for, and whether the server has confirmed them; guarded by broker.mu
}

// run serves until the connection fails or the broker is closed.
func (s *redisSession) run() (served bool, err error) {
	b := s.broker
	err = s.subscribeAll()
	if err == nil {
		s.begin(s.receive)
		// Its answer comes after those to the subscriptions: from then on nothing is missed.
		err = s.roundTrip()
	}
	if err != nil {
		s.end()
		return false, b.connectError(s.addr, err)
	}
	b.resetStreams()
	b.mu.Lock()
	b.session = s
	close(b.came)
	b.came = make(chan struct{})
	b.mu.Unlock()
	b.changed(nil)

	s.begin(s.keepSubscribed)
	s.begin(s.roundTrips)
	if b.config.Durable {
		s.begin(s.readStreams)
		s.begin(s.renewClaims)
	}
	<-s.ctx.Done()
	err = context.Cause(s.ctx)
	b.mu.Lock()
	b.session, b.away = nil, err
	b.mu.Unlock()
	s.end()
	return true, err
}

// begin starts a goroutine of the session, which ends with it.
func (s *redisSession) begin(run func()) {
	s.work.Add(1)
	go func() { // ends with the session
		defer s.work.Done()
		run()
	}()
}

// end closes the connections, which is what ends reads that wait, and waits for the goroutines.
func (s *redisSession) end() {
	s.lost(errors.New("the connection has been closed"))
	s.client.Close()
	s.broker.mu.Lock()
	s.broker.room.Broadcast()
	s.broker.mu.Unlock()
	s.work.Wait()
}

// fail ends the session because of an error.
func (s *redisSession) fail(doing string, err error) {
	s.lost(failHint(codeRedisLost, "connection to redis at "+s.addr+" lost, "+doing, s.broker.withoutSecrets(err),
		s.broker.connectHint(err)))
}

// failed looks at the error of a command: one that says that this server is of no more use to us ends the session. It
// returns the error in a form that may be shown.
func (s *redisSession) failed(err error) error {
	if err == nil {
		err = errors.New("no answer")
	}
	if s.ctx.Err() != nil {
		return context.Cause(s.ctx) // closed under the command: this is why
	}
	if s.useless(err) {
		s.fail("a command was refused", err)
	}
	return s.broker.withoutSecrets(err)
}

// useless says that an answer is one of a server that is of no more use to us, at least for now.
func (s *redisSession) useless(err error) bool {
	var refused redis.Error
	return errors.As(err, &refused) && slices.Contains(
		[]string{"READONLY", "NOPERM", "NOAUTH", "LOADING", "MASTERDOWN", "MOVED"}, strings.SplitN(refused.Error(), " ", 2)[0])
}

// roundTrips proves at intervals that the server answers on both kinds of connection and is still a master.
func (s *redisSession) roundTrips() {
	for {
		select {
		case <-time.After(s.broker.tripPause):
		case <-s.ctx.Done():
			return
		}
		err := s.broker.greet(s.ctx, s.client, s.addr)
		if err == nil {
			err = s.roundTrip()
		}
		if err != nil {
			s.fail("round trip", err)
			return
		}
	}
}

// roundTrip is one on the channels' connection.
func (s *redisSession) roundTrip() error {
	ctx, stop := context.WithTimeout(s.ctx, s.broker.tripLimit)
	defer stop()
	select {
	case <-s.pong: // of an earlier try
	default:
	}
	if err := s.channels.Ping(ctx); err != nil {
		return err
	}
	for {
		select {
		case <-s.pong:
			return nil
		case <-s.ctx.Done():
			return context.Cause(s.ctx)
		case <-ctx.Done():
			if s.ctx.Err() != nil { // which ends ctx, too
				return context.Cause(s.ctx)
			}
			if !s.broker.overfull() {
				return fmt.Errorf("no answer for %v on the connection for channels", s.broker.tripLimit)
			}
			// It is we who do not read.
			select {
			case <-s.pong:
				return nil
			case <-time.After(s.broker.tripLimit):
			case <-s.ctx.Done():
			}
		}
	}
}
