package main

// broker_nats.go is the broker NATS: it keeps one connection alive for ever, publishes with a round trip as proof, and
// holds the subscriptions of plain NATS. broker_nats_link.go is one connection, from login to loss, broker_nats_queue.go
// consumes plain subjects, and broker_nats_stream.go consumes durably from JetStream.

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
)

const (
	natsPort = 4222

	// natsDrainLimit bounds how long a consumer that stops waits for what the server has sent it already.
	natsDrainLimit = 3 * time.Second

	// natsHolderSuffix, behind {task_id}_listen, is where workers ask each other whether one has the task, which has
	// natsAnswerLimit to say so: its host may be busy, and whoever takes silence for nobody runs the task a second time. It
	// is waited out where a host has just died, or somebody reads along on every subject.
	natsHolderSuffix = ".held"
	natsAnswerLimit  = 5 * time.Second
	natsSilencePause = time.Minute
)

// A natsBroker has at most one connection at a time, a natsLink, and makes the next one when it is lost. The library's
// own reconnecting is not used: a round trip over the next connection would confirm what was lost with the one before.
type natsBroker struct {
	brokerOptions
	servers []string

	// Intervals, shortened by tests.
	roundTripPause, roundTripLimit time.Duration
	ackWait                        time.Duration // of the durable consumers that are created

	ctx   context.Context // of everything below
	quit  context.CancelFunc
	tasks sync.WaitGroup // serve, renewClaims and the consumers' own

	silence    atomic.Int64 // Unix nanoseconds, when a question of Listens was left without an answer last
	claims     natsClaims
	renewEvery chan time.Duration // to renewClaims: at least so often

	mu            sync.Mutex // guards what follows
	link          *natsLink  // nil while there is no connection
	subscriptions map[*natsSubscription]struct{}
	streams       map[*natsStream]struct{} // durable consumers that are not stopped
	looks         bool                     // wakeStreams will be called soon
	kept          map[string]bool          // subjects whose tasks go into a stream, also when nothing is taken any more

	stateMu  sync.Mutex // guards what follows, and keeps the calls of changed in order
	away     error      // why there is no connection
	problems map[*natsStream]error
	reported bool
	told     string // what changed was called with last
}

var _ Broker = (*natsBroker)(nil)

// A natsSubscription outlives the connections: each new one subscribes it again.
type natsSubscription struct {
	subject, group string
	handle         func(*nats.Msg)    // one at a time; must not block
	sub            *nats.Subscription // on the current connection, nil without one
}

// openNATS starts a connection in the background.
func openNATS(o brokerOptions) (Broker, error) {
	b, err := newNATS(o)
	if err != nil {
		return nil, err
	}
	b.start()
	return b, nil
}

// newNATS is a broker that does not connect before start.
func newNATS(o brokerOptions) (*natsBroker, error) {
	b := &natsBroker{
		brokerOptions: o, servers: o.config.servers(natsPort),
		roundTripPause: roundTripPause, roundTripLimit: roundTripLimit, ackWait: claimLost,
		subscriptions: map[*natsSubscription]struct{}{}, streams: map[*natsStream]struct{}{}, kept: map[string]bool{},
		renewEvery: make(chan time.Duration), away: errors.New("not connected yet"), problems: map[*natsStream]error{},
	}
	for _, server := range b.servers {
		if strings.ContainsAny(server, "@/?# ") {
			return nil, fail(codeNATSServer, "open NATS broker", errors.New(
				"host has to be host or host:port; logins belong into user, password and token"))
		}
	}
	b.claims.held = map[natsMessageID]*natsDelivery{}
	b.ctx, b.quit = context.WithCancel(context.Background())
	return b, nil
}

func (b *natsBroker) start() {
	b.tasks.Add(1)
	go b.serve() // ends on Close
	if b.config.Durable {
		b.tasks.Add(1)
		go b.renewClaims() // ends on Close
	}
}

// serve connects, again and again, until Close.
func (b *natsBroker) serve() {
	defer b.tasks.Done()
	for try := 0; ; try++ {
		l, err := b.connect(b.ctx)
		if err == nil {
			began := time.Now()
			err = b.use(l)
			if time.Since(began) > maxReconnectPause {
				try = 0
			}
		}
		if b.ctx.Err() != nil {
			return
		}
		b.setAway(err)
		select {
		case <-time.After(reconnectPause(try)):
		case <-b.ctx.Done():
			return
		}
	}
}

// use works with a connection until it is lost, and says why it was.
func (b *natsBroker) use(l *natsLink) error {
	go l.dispatch() // ends when the connection is closed and what had arrived is handled
	b.mu.Lock()
	b.link = l
	for s := range b.subscriptions {
		l.subscribe(s)
	}
	b.mu.Unlock()
	b.claims.renew(l) // after an outage they may be short of being lost

	err := l.roundTrip(b.ctx, b.roundTripLimit) // then the subscriptions are in effect
	if err == nil {
		b.setAway(nil)
		b.wakeStreams()
		err = l.watch(b.ctx, b.roundTripPause, b.roundTripLimit)
	}
	l.close()
	b.mu.Lock()
	b.link = nil
	b.mu.Unlock()
	<-l.dispatched // the next connection's messages come after this one's
	b.wakeStreams()
	return fail(codeNATSLost, "keep connection to NATS server "+l.server, err)
}

// wakeStreams has all durable consumers look at their slots.
func (b *natsBroker) wakeStreams() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.looks = false
	for c := range b.streams {
		c.look()
	}
}

// lookAround has the durable consumers look at their slots, of which c has taken one: at once where they are few.
func (b *natsBroker) lookAround(c *natsStream) {
	if !b.manyStreams() {
		b.wakeStreams()
		return
	}
	c.look()
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.looks {
		b.looks = true
		time.AfterFunc(natsLessPause, b.wakeStreams)
	}
}

func (b *natsBroker) manyStreams() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.streams) > natsFewStreams
}

// current is the connection, nil while there is none.
func (b *natsBroker) current() *natsLink {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.link
}

// await is the connection, or the next one; nil when ctx or the broker ends before there is one.
func (b *natsBroker) await(ctx context.Context) *natsLink {
	for {
		if l := b.current(); l != nil && l.nc.IsConnected() {
			return l
		}
		select {
		case <-time.After(20 * time.Millisecond): // of an outage: nobody waits for so little
		case <-ctx.Done():
			return nil
		case <-b.ctx.Done():
			return nil
		}
	}
}

// setAway notes that the connection has come (nil) or why there is none.
func (b *natsBroker) setAway(err error) {
	b.stateMu.Lock()
	defer b.stateMu.Unlock()
	b.away = err
	b.tell()
}

// setProblem notes what keeps a durable consumer from working although there is a connection, nil when nothing does.
func (b *natsBroker) setProblem(c *natsStream, err error) {
	b.stateMu.Lock()
	defer b.stateMu.Unlock()
	if err == nil {
		delete(b.problems, c)
	} else {
		b.problems[c] = err
	}
	b.tell()
}

// tell calls changed when the state is another than it was, with stateMu held.
func (b *natsBroker) tell() {
	state, text := b.away, ""
	if state != nil {
		text = state.Error()
	} else {
		for _, err := range b.problems { // of several always the same, so that it is told once
			if state == nil || err.Error() < text {
				state, text = err, err.Error()
			}
		}
	}
	if !b.reported || text != b.told {
		b.reported, b.told = true, text
		b.changed(state)
	}
}

// errAway is why nothing can be sent just now.
func (b *natsBroker) errAway(op string) error {
	b.stateMu.Lock()
	defer b.stateMu.Unlock()
	why := b.away
	if why == nil {
		why = errors.New("the connection was lost just now")
	}
	return fail(codeNATSAway, op, fmt.Errorf("no connection to NATS: %w", why))
}

// Publish writes all messages and confirms them with one round trip; tasks are confirmed one by one.
func (b *natsBroker) Publish(ctx context.Context, messages ...Message) (sent int, err error) {
	l := b.current()
	if l == nil {
		return 0, b.errAway("publish")
	}
	ctx, stop := context.WithTimeout(ctx, b.roundTripLimit)
	defer stop()
	return l.publish(ctx, b.keeps, messages)
}

// keeps reports whether tasks on a subject go into a stream of ours, whose answer says that they are safe.
func (b *natsBroker) keeps(subject string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.kept[subject]
}

// Subscribe needs no wait: the server gets it on the connection that everything is published on, in order.
func (b *natsBroker) Subscribe(subject string, handle func(data []byte)) Subscription {
	s := &natsSubscription{subject: subject, handle: func(m *nats.Msg) { handle(m.Data) }}
	b.subscribe(s)
	if !b.config.Durable || !strings.HasSuffix(subject, listenSuffix) {
		return Subscription{Stop: func() { b.unsubscribe(s) }}
	}
	var last atomic.Int64 // Unix nanoseconds
	asked := &natsSubscription{subject: subject + natsHolderSuffix, handle: func(m *nats.Msg) {
		last.Store(time.Now().UnixNano())
		_ = m.Respond(nil)
	}}
	b.subscribe(asked)
	return Subscription{
		Stop: func() {
			b.unsubscribe(s)
			b.unsubscribe(asked)
		},
		Asked: func() time.Time { return time.Unix(0, last.Load()) },
	}
}

// Listens asks on a subject of its own, whose answers tell a worker that lives from one that has just lost its host, and
// from somebody who reads along on every subject.
func (b *natsBroker) Listens(ctx context.Context, taskID string) (bool, error) {
	l := b.current()
	if l == nil {
		return false, b.errAway("look for the holder of a task")
	}
	ctx, stop := context.WithTimeout(ctx, natsAnswerLimit)
	defer stop()
	_, err := l.nc.RequestWithContext(ctx, taskID+listenSuffix+natsHolderSuffix, nil)
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, nats.ErrNoResponders):
		return false, nil
	case !errors.Is(err, context.DeadlineExceeded):
		return false, fmt.Errorf("look for the holder of a task: %w", err)
	}
	// Silence means that nobody lives there, if the server does.
	if err := l.roundTrip(b.ctx, b.roundTripLimit); err != nil {
		return false, fmt.Errorf("look for the holder of a task: %w", err)
	}
	b.silence.Store(time.Now().UnixNano())
	return false, nil
}

// answersAtOnce reports whether the server has lately said by itself when nobody listens: it does not where somebody reads
// along on every subject or this login may not ask, and then each question takes natsAnswerLimit.
func (b *natsBroker) answersAtOnce() bool {
	return time.Since(time.Unix(0, b.silence.Load())) > natsSilencePause
}

func (b *natsBroker) SubscribeAll(subject string, handle func(data []byte)) Subscription {
	return b.Subscribe(subject, handle)
}

func (b *natsBroker) subscribe(s *natsSubscription) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.subscriptions[s] = struct{}{}
	if b.link != nil {
		b.link.subscribe(s)
	}
}

func (b *natsBroker) unsubscribe(s *natsSubscription) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.subscriptions, s)
	if b.link != nil {
		b.link.unsubscribe(s)
	}
}

// Consume shares the tasks of a subject with the other workers of the project: through a stream if the connection is
// configured as durable, else through a queue group, at most once as far as the journal.
func (b *natsBroker) Consume(subject string, slots Slots, handle func(Delivery)) Consumer {
	if b.config.Durable {
		return b.consumeStream(subject, slots, handle)
	}
	q := &natsQueue{broker: b, handle: handle, ready: make(chan struct{}), stopping: make(chan struct{})}
	q.idle.L = &q.mu
	q.subscription = &natsSubscription{subject: subject, group: b.project, handle: q.arrived}
	b.subscribe(q.subscription)
	b.tasks.Add(1)
	go func() { // ends when the server has the subscription, or on Close
		defer b.tasks.Done()
		b.confirm(q.ready)
	}()
	return q
}

// confirm closes subscribed once the server has what was subscribed before: it has answered since.
func (b *natsBroker) confirm(subscribed chan<- struct{}) {
	for n := 0; ; n++ {
		if l := b.current(); l != nil {
			ctx, stop := context.WithTimeout(b.ctx, b.roundTripLimit)
			err := l.nc.FlushWithContext(ctx)
			stop()
			if err == nil {
				close(subscribed)
				return
			}
		}
		select {
		case <-time.After(reconnectPause(n)):
		case <-b.ctx.Done():
			return
		}
	}
}

func (b *natsBroker) Close() error {
	b.quit()
	b.tasks.Wait()
	return nil
}

// probeNATS connects once, as --dry-run wants it: login, a round trip and, for durable, JetStream.
func probeNATS(ctx context.Context, o brokerOptions) error {
	b, err := newNATS(o)
	if err != nil {
		return err
	}
	defer b.quit()
	l, err := b.connect(ctx)
	if err != nil {
		return err
	}
	defer l.close()
	if err := l.roundTrip(ctx, b.roundTripLimit); err != nil {
		return fail(codeNATSProbe, "ask NATS server "+l.server, err)
	}
	if o.config.Durable {
		return l.probeJetStream(ctx)
	}
	return nil
}
