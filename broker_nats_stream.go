package main

// broker_nats_stream.go consumes a job's tasks from JetStream: a work-queue stream per subject, pulled for free slots
// only, with claims that are kept alive until the tasks are settled. The connection is broker_nats_link.go's.

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
)

const (
	// natsPullExpiry is how long a request for tasks waits at the server. One whose end was not heard of is given up
	// natsPullGrace later.
	natsPullExpiry = 20 * time.Second
	natsPullGrace  = 5 * time.Second

	// Requests that wait at the server for more tasks than there are slots are taken back, so that other workers get the
	// tasks: natsFullPause after there is no slot at all, natsLessPause after there are fewer. The pauses spare short
	// tasks the to and fro.
	natsFullPause = 25 * time.Millisecond
	natsLessPause = 250 * time.Millisecond

	// natsFewStreams may all look at the slots whenever a task has come. Of more, only the stream that it came through
	// does, and the others natsFullPause later; and they leave their requests for natsLessPause in any case.
	natsFewStreams = 16

	// natsRefusedPause is how long a consumer pulls nothing after a delivery was refused: it comes back at once, and
	// others shall have it.
	natsRefusedPause = 250 * time.Millisecond

	// natsRetryPause is how long, at least, what could not be made is left alone. A server that has just deleted a stream
	// may still be clearing its folder, and would clear a new one of that name with it.
	natsRetryPause = time.Second

	// natsLateAge is how long a message must have waited for its first delivery to be late: server 2.9.10 at least may,
	// once it was restarted, give a message that is being held to somebody else and call that the first time.
	natsLateAge = 100 * time.Millisecond

	natsAPILimit = 5 * time.Second // for one request to JetStream's management
	natsMaxName  = 200             // bytes of a stream's or consumer's name; servers allow 255
)

// A natsStream is this worker's share of the tasks that a stream keeps for a subject.
type natsStream struct {
	broker  *natsBroker
	subject string
	slots   Slots
	handle  func(Delivery)

	usable  chan struct{}   // closed once stream and consumer have been seen
	wake    chan struct{}   // something has changed
	freed   atomic.Bool     // a slot may have become free since it was looked at last
	ctx     context.Context // ends on Stop and with the broker
	quit    context.CancelFunc
	ended   chan struct{}  // closed when run has ended
	handles sync.WaitGroup // calls of handle

	// Only run uses these.
	on        *natsLink // the connection that the consumer has been seen on
	next      string    // subject of the requests for tasks
	warned    bool
	overSince time.Time // since when more is requested than there is room for, zero if it is not

	mu        sync.Mutex // guards what follows
	inbox     *natsInbox // nil: nothing is requested
	unsettled int        // deliveries that are neither settled nor refused
	handling  int        // of these, those that handle has not returned for
	missing   bool       // the server says that stream or consumer is gone
	notBefore time.Time  // nothing is pulled until then
	seen      natsSeen
}

// A natsInbox is where the answers to requests for tasks arrive: one subscription serves many requests, since each
// costs the server as much as a task does.
type natsInbox struct {
	*natsSubscription
	prefix string // of the subjects, each with a number of its own behind
	link   *natsLink

	pulls []natsPull // guarded by the stream's mu
	last  int        // number given, by run alone
}

// A natsPull is a request for tasks that waits at the server.
type natsPull struct {
	number   int
	left     int // tasks that it still waits for
	deadline time.Time
}

// natsSeen is how far stream and consumer had come when they were looked at on this connection. A message that the
// stream has got since is in the hands of nobody that this server could have forgotten.
type natsSeen struct {
	stream, consumer uint64 // last numbers
	always           bool   // there are several servers: another one may forget while this connection lasts
}

func (b *natsBroker) consumeStream(subject string, slots Slots, handle func(Delivery)) *natsStream {
	c := &natsStream{
		broker: b, subject: subject, slots: slots, handle: handle,
		usable: make(chan struct{}), wake: make(chan struct{}, 1), ended: make(chan struct{}),
	}
	c.ctx, c.quit = context.WithCancel(b.ctx)
	b.mu.Lock()
	b.streams[c] = struct{}{}
	b.kept[subject] = true
	b.mu.Unlock()
	b.tasks.Add(1)
	go c.run() // ends on Stop or Close
	return c
}

// Wake lets run look at the free slots again.
func (c *natsStream) Ready() <-chan struct{} { return c.usable }

func (c *natsStream) Wake() {
	c.freed.Store(true)
	c.look()
}

// look lets run look again.
func (c *natsStream) look() {
	select {
	case c.wake <- struct{}{}:
	default: // it will look anyway
	}
}

// Stop takes the requests back and puts back what was on its way.
func (c *natsStream) Stop() {
	b := c.broker
	c.quit()
	<-c.ended
	b.mu.Lock()
	delete(b.streams, c)
	b.mu.Unlock()
	c.takeBack()
	c.handles.Wait()
	b.setProblem(c, nil)
}

// run keeps as many tasks requested as there are free slots.
func (c *natsStream) run() {
	defer c.broker.tasks.Done()
	defer close(c.ended)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		pause := natsPullExpiry
		if l := c.broker.current(); l != nil {
			if pause = c.ready(l); pause == 0 {
				pause = c.pull(l)
			}
		}
		timer.Reset(pause)
		select {
		case <-c.wake:
		case <-timer.C:
		case <-c.ctx.Done():
			return
		}
	}
}

// ready sees to the stream and the consumer on a new connection, and when they are gone. It is 0 when they are there,
// else how long to wait before the next try.
func (c *natsStream) ready(l *natsLink) time.Duration {
	c.mu.Lock()
	missing, wait := c.missing, time.Until(c.notBefore)
	c.mu.Unlock()
	switch {
	case l == c.on && !missing:
		return 0
	case wait > 0:
		return wait
	case l == c.on:
		c.takeBack()
	}
	if err := c.prepare(l); err != nil {
		if c.ctx.Err() == nil && l.nc.IsConnected() { // else that is what is wrong, and known
			c.broker.setProblem(c, err)
		}
		wait = natsRetryPause + rand.N(natsRetryPause)
		c.mu.Lock()
		defer c.mu.Unlock()
		c.notBefore = time.Now().Add(wait)
		return wait
	}
	c.broker.setProblem(c, nil)
	if c.on == nil {
		close(c.usable)
	}
	c.on = l
	c.mu.Lock()
	defer c.mu.Unlock()
	c.missing = false
	c.inbox = nil // it has gone with its connection
	return 0
}

// pull requests tasks for the free slots that no request stands for yet, and says when it wants to be called again if
// nothing happens before.
func (c *natsStream) pull(l *natsLink) (pause time.Duration) {
	now, freed := time.Now(), c.freed.Swap(false) && c.broker.manyStreams()
	c.mu.Lock()
	requested := 0
	pause = natsPullExpiry
	if c.inbox != nil {
		for _, p := range c.inbox.pulls {
			if now.After(p.deadline) {
				c.missing = true // a consumer that exists would have said that the time is over
				c.look()
			}
			requested += p.left
			pause = min(pause, max(p.deadline.Sub(now), 0))
		}
	}
	handling, room := c.handling, c.slots.Limit()-c.unsettled
	wait := c.notBefore.Sub(now)
	c.mu.Unlock()
	// Asked last: what is accepted meanwhile then counts twice, and not never. Without mu, since Free has its own locks.
	room = max(0, min(room, c.slots.Free()-handling))

	if requested > room {
		patience := natsLessPause
		if room == 0 && !c.broker.manyStreams() {
			patience = natsFullPause
		}
		if freed || c.overSince.IsZero() {
			c.overSince = now
		}
		if left := patience - now.Sub(c.overSince); left > 0 {
			return left
		}
		c.takeBack()
		c.look() // what arrived meanwhile counts
		return pause
	}
	c.overSince = time.Time{}
	if room > requested && wait > 0 {
		return wait
	}
	if room > requested {
		c.request(l, room-requested)
	}
	return pause
}

// request asks for n tasks.
func (c *natsStream) request(l *natsLink, n int) {
	c.mu.Lock()
	inbox := c.inbox
	if inbox == nil {
		inbox = &natsInbox{prefix: nats.NewInbox() + ".", link: l}
		inbox.natsSubscription = &natsSubscription{
			subject: inbox.prefix + "*", handle: func(m *nats.Msg) { c.arrived(inbox, m) },
		}
		c.inbox = inbox
		l.subscribe(inbox.natsSubscription)
	}
	inbox.last++
	number := inbox.last
	inbox.pulls = append(inbox.pulls, natsPull{number, n, time.Now().Add(natsPullExpiry + natsPullGrace)})
	c.mu.Unlock()
	ask := fmt.Appendf(nil, `{"batch":%d,"expires":%d}`, n, natsPullExpiry)
	if err := l.nc.PublishRequest(c.next, inbox.prefix+strconv.Itoa(number), ask); err != nil {
		c.broker.log.Debug("no tasks requested", errAttrs(err), "subject", c.subject) // the connection is gone
	}
}

// takeBack ends all requests. What the server has answered already still arrives before it returns.
func (c *natsStream) takeBack() {
	c.mu.Lock()
	inbox := c.inbox
	c.mu.Unlock()
	if inbox == nil {
		return
	}
	inbox.link.drain(natsDrainLimit, inbox.natsSubscription)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.inbox = nil
}

// tookOne notes that a task has arrived, which does not say what request it answers: the server serves those that wait
// in turn, a task each, and so they are counted here. c.mu is held.
func (i *natsInbox) tookOne() {
	if len(i.pulls) == 0 {
		return // it was taken back meanwhile
	}
	first := i.pulls[0]
	i.pulls = append(i.pulls[:0], i.pulls[1:]...)
	if first.left--; first.left > 0 {
		i.pulls = append(i.pulls, first)
	}
}

// ended notes that the server has given a request up. c.mu is held.
func (i *natsInbox) ended(number int) {
	i.pulls = slices.DeleteFunc(i.pulls, func(p natsPull) bool { return p.number == number })
}

// arrived takes an answer to a request: a task, or why no more come.
func (c *natsStream) arrived(inbox *natsInbox, m *nats.Msg) {
	if m.Reply == "" { // a task has an address for its acknowledgement
		number, _ := strconv.Atoi(strings.TrimPrefix(m.Subject, inbox.prefix))
		c.answered(inbox, number, m.Header.Get("Status"), m.Header.Get("Description"))
		return
	}
	d := &natsDelivery{consumer: c, reply: m.Reply}
	about, err := m.Metadata()
	if err != nil {
		c.broker.log.Warn("answer without a task", errAttrs(err), "subject", c.subject)
		return
	}
	d.id = natsMessageID{about.Stream, about.Sequence.Stream, about.Timestamp.UnixNano()}

	stopped := c.ctx.Err() != nil
	// A task that runs here comes back to us when the claim on it was lost in an outage: then the claim is new, no more.
	taken := !stopped && c.broker.claims.add(d)
	c.mu.Lock() // in one go, so that what was requested is now being handled and never neither
	inbox.tookOne()
	if taken {
		c.unsettled++
		c.handling++
	}
	late := c.seen.mayBeForgotten(about.Sequence) && time.Since(about.Timestamp) > natsLateAge && c.broker.answersAtOnce()
	c.mu.Unlock()
	if !taken {
		verdict := "+WPI"
		if stopped {
			verdict = "-NAK" // for another worker
		}
		_ = inbox.link.nc.Publish(m.Reply, []byte(verdict)) // else the server does the same a little later
		c.look()
		return
	}
	c.handles.Add(1)
	c.broker.tasks.Add(1)
	go func() { // ends when the task is accepted; Stop and Close wait for it
		defer c.broker.tasks.Done()
		defer c.handles.Done()
		c.handle(Delivery{
			Subject: c.subject, Data: m.Data, Held: true, Attempt: int(min(about.NumDelivered, 1<<30)),
			Again: about.NumDelivered > 1, Late: late,
			Ack: d.ack, Nack: d.nack, Leave: d.leave, Settled: d.isSettled,
		})
		c.mu.Lock()
		d.handled = true
		c.handling--
		c.mu.Unlock()
		c.broker.lookAround(c) // there may be less room for other jobs now
	}()
}

// mayBeForgotten reports whether a delivery may be of a message that somebody holds, although it is called the first. A
// consumer whose numbers begin anew was made again, and has forgotten all.
func (s *natsSeen) mayBeForgotten(is nats.SequencePair) bool {
	if is.Consumer <= s.consumer {
		s.stream = math.MaxUint64 // until it is looked at again
	}
	s.consumer = is.Consumer
	return s.always || is.Stream <= s.stream
}

// answered ends a request.
func (c *natsStream) answered(inbox *natsInbox, number int, status, description string) {
	defer c.look()
	c.mu.Lock()
	defer c.mu.Unlock()
	inbox.ended(number)
	switch status {
	case "404", "408": // it has waited long enough
		return
	case "503": // nobody listens where tasks are requested
		c.missing = true
	case "409": // many reasons, told apart by their text only
		c.missing = c.missing || strings.Contains(strings.ToLower(description), "deleted")
	}
	c.notBefore = time.Now().Add(natsRetryPause/2 + rand.N(natsRetryPause))
	c.broker.log.Debug("no tasks from NATS", "err", status+" "+description, "subject", c.subject)
}

// putBack notes that a delivery is given back: where it was not even accepted, the next ones had better go elsewhere.
func (c *natsStream) putBack(d *natsDelivery) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !d.handled {
		c.notBefore = time.Now().Add(natsRefusedPause)
	}
}

// prepare finds or makes the stream and the consumer.
func (c *natsStream) prepare(l *natsLink) error {
	ctx, stop := context.WithTimeout(c.ctx, 4*natsAPILimit)
	defer stop()
	js, err := l.nc.JetStream(nats.MaxWait(natsAPILimit))
	if err != nil {
		return l.streamError(c.subject, err)
	}
	name, err := c.stream(ctx, js)
	if err != nil {
		return l.streamError(c.subject, err)
	}
	durable, err := c.durable(ctx, l, js, name)
	if err != nil {
		return l.streamError(c.subject, err)
	}
	c.next = "$JS.API.CONSUMER.MSG.NEXT." + name + "." + durable
	return nil
}

// stream is the name of the stream that keeps the subject's tasks.
func (c *natsStream) stream(ctx context.Context, js nats.JetStreamContext) (string, error) {
	name, err := js.StreamNameBySubject(c.subject, nats.Context(ctx))
	if errors.Is(err, nats.ErrNoMatchingStream) {
		name = natsName(c.subject)
		_, err = js.AddStream(&nats.StreamConfig{
			Name: name, Subjects: []string{c.subject}, Retention: nats.WorkQueuePolicy, Storage: nats.FileStorage,
			Description: "tasks of a job, for job_item",
		}, nats.Context(ctx))
		if err != nil {
			return "", fmt.Errorf("make stream %q: %w", name, err)
		}
		return name, nil
	}
	return name, err
}

// durable is the name of the stream's consumer that the workers of the project share.
func (c *natsStream) durable(ctx context.Context, l *natsLink, js nats.JetStreamContext, stream string) (string, error) {
	info, err := js.StreamInfo(stream, nats.Context(ctx))
	if err != nil {
		return "", fmt.Errorf("look at stream %q: %w", stream, err)
	}
	has := info.Config
	own := has.Retention == nats.WorkQueuePolicy
	if (!own || has.Storage != nats.FileStorage || len(has.Subjects) != 1 || has.Subjects[0] != c.subject) && !c.warned {
		c.broker.log.Warn("stream exists with other properties and is used as it is", "subject", c.subject,
			"stream", stream, "retention", has.Retention.String(), "storage", has.Storage.String(), "subjects", has.Subjects)
	}

	name := natsName(c.subject)
	found, err := js.ConsumerInfo(stream, name, nats.Context(ctx))
	if errors.Is(err, nats.ErrConsumerNotFound) {
		wanted := &nats.ConsumerConfig{
			Durable: name, FilterSubject: c.subject, AckPolicy: nats.AckExplicitPolicy, AckWait: c.broker.ackWait,
			MaxDeliver: -1, MaxAckPending: -1, MaxWaiting: 4096, Description: "workers of project " + c.broker.project,
		}
		if !own {
			// What such a stream holds may have been done long ago, by workers that did not use it.
			wanted.DeliverPolicy = nats.DeliverNewPolicy
			c.broker.log.Warn("tasks that the stream holds already are not run: it keeps what is done",
				"subject", c.subject, "stream", stream)
		}
		found, err = js.AddConsumer(stream, wanted, nats.Context(ctx))
	}
	if err != nil {
		return "", fmt.Errorf("consumer %q of stream %q: %w", name, stream, err)
	}
	if has := found.Config; has.DeliverSubject != "" || has.AckPolicy != nats.AckExplicitPolicy || has.FilterSubject != c.subject {
		return "", fmt.Errorf("consumer %q of stream %q is not one to pull %q from with explicit acknowledgements",
			name, stream, c.subject)
	}
	if found.Config.MaxDeliver > 0 && !c.warned {
		c.broker.log.Warn("consumer gives a task up after some deliveries and is used as it is",
			"subject", c.subject, "stream", stream, "max_deliver", found.Config.MaxDeliver)
	}
	c.warned = true
	c.mu.Lock()
	c.seen = natsSeen{
		stream: info.State.LastSeq, consumer: found.Delivered.Consumer, always: l.nc.ConnectedClusterName() != "",
	}
	c.mu.Unlock()
	select {
	case c.broker.renewEvery <- found.Config.AckWait / 3:
	case <-ctx.Done():
	}
	return name, nil
}

// streamError is why a subject cannot be consumed durably.
func (l *natsLink) streamError(subject string, err error) error {
	op := fmt.Sprintf("consume %q durably from NATS server %s", subject, l.server)
	if errors.Is(err, nats.ErrJetStreamNotEnabled) || errors.Is(err, nats.ErrJetStreamNotEnabledForAccount) ||
		errors.Is(err, context.DeadlineExceeded) || errors.Is(err, nats.ErrTimeout) {
		return fail(codeNATSJetStream, op, fmt.Errorf("%w; durable needs JetStream enabled on the server", err))
	}
	return fail(codeNATSStream, op, err)
}

// probeJetStream asks whether this login may use JetStream.
func (l *natsLink) probeJetStream(ctx context.Context) error {
	ctx, stop := context.WithTimeout(ctx, natsAPILimit)
	defer stop()
	js, err := l.nc.JetStream()
	if err == nil {
		_, err = js.AccountInfo(nats.Context(ctx))
	}
	if err != nil {
		return l.streamError(">", err)
	}
	return nil
}

// natsName is the name of a subject's stream and consumer: the subject, with a sign for the dot, which names must not
// have and subjects of jobs do not have.
func natsName(subject string) string {
	name := strings.ReplaceAll(subject, ".", "=")
	if len(name) > natsMaxName {
		sum := sha256.Sum256([]byte(subject))
		name = fmt.Sprintf("%s=%x", name[:natsMaxName-33], sum[:16])
	}
	return name
}
