package main

// broker_redis_channel.go owns what Redis carries over channels: the subscriptions of a worker, all on one connection,
// and tasks that are published plainly, which every worker receives and one of them claims.
//
// A claim is a key, job_item:claim:{project}:{task id}. Without durable its value names the worker that won it by SET NX,
// and it is for claimKept: so much later than the others may a worker meet the message (a server cuts off whoever lags
// more than a few megabytes behind). The winner's journal answers for the task from then on; if it dies before that,
// the message is gone, as plain messages are. With durable the winner puts the message into the job's stream instead,
// together with the claim in one step, and everything else is the stream's affair.

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

const (
	claimKept = 10 * time.Minute // after it was made or last renewed

	maxRedisQueue     = 32 << 20 // bytes of messages received and not handled yet; beyond it nothing more is read
	messageOverhead   = 256      // bytes that a waiting message costs besides its own
	maxRedisChannels  = 500      // in one SUBSCRIBE
	maxRedisClaims    = 64       // in one round trip
	maxRedisHandles   = 64       // offers handled at once
	offerRetryPause   = time.Second
	offerGoodFor      = claimKept / 2 // when the claims of others may soon be forgotten, ours must not be tried any more
	refusedRemembered = time.Minute
	maxRefused        = 1000
)

// A redisSubscription is one handler of one channel. Its goroutine exists only while there are messages for it.
type redisSubscription struct {
	handle func(data []byte) // nil: the messages are offers to consumer
	offers *redisConsumer
	ready  chan struct{} // closed once the server has the channel

	// Guarded by the broker's mu.
	queue     []string
	busy      bool
	confirmed bool // ready is closed
	ended     bool
}

// Subscribe serves any number of quick calls: the server is told by one goroutine, many at once.
func (b *redisBroker) Subscribe(subject string, handle func(data []byte)) Subscription {
	return b.subscribe(subject, &redisSubscription{handle: handle})
}

// SubscribeAll is the same: every subscriber of a channel gets its messages.
func (b *redisBroker) SubscribeAll(subject string, handle func(data []byte)) Subscription {
	return b.Subscribe(subject, handle)
}

func (b *redisBroker) subscribe(channel string, added *redisSubscription) Subscription {
	added.ready = make(chan struct{})
	b.mu.Lock()
	defer b.mu.Unlock()
	b.channels[channel] = append(b.channels[channel], added)
	b.stale[channel] = struct{}{}
	rouse(b.changes)
	return Subscription{Ready: added.ready, Stop: func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		if added.ended {
			return
		}
		added.ended = true
		b.dequeue(added.queue...)
		added.queue = nil
		var rest []*redisSubscription // a copy: the old slice may be being read
		for _, other := range b.channels[channel] {
			if other != added {
				rest = append(rest, other)
			}
		}
		if b.channels[channel] = rest; rest == nil {
			delete(b.channels, channel)
		}
		b.stale[channel] = struct{}{}
		rouse(b.changes)
	}}
}

// subscribeAll asks for every channel that is wanted, on a new connection.
func (s *redisSession) subscribeAll() error {
	b := s.broker
	b.mu.Lock()
	for channel := range b.channels {
		b.stale[channel] = struct{}{}
	}
	b.mu.Unlock()
	return s.subscribeChanged()
}

// keepSubscribed passes on what has come and gone since.
func (s *redisSession) keepSubscribed() {
	for {
		if err := s.subscribeChanged(); err != nil {
			s.fail("subscribe", err)
			return
		}
		select {
		case <-s.broker.changes:
		case <-s.ctx.Done():
			return
		}
	}
}

func (s *redisSession) subscribeChanged() error {
	b := s.broker
	var come, gone []string
	b.mu.Lock()
	for channel := range b.stale {
		_, wanted := b.channels[channel]
		confirmed, asked := s.subscribed[channel]
		switch {
		case wanted && !asked:
			come = append(come, channel)
			s.subscribed[channel] = false
		case wanted && confirmed:
			b.confirm(channel) // to whoever has joined since
		case !wanted && asked:
			gone = append(gone, channel)
			delete(s.subscribed, channel)
		}
	}
	clear(b.stale)
	b.mu.Unlock()
	if err := inPieces(come, maxRedisChannels, func(some []string) error { return s.channels.Subscribe(s.ctx, some...) }); err != nil {
		return err
	}
	return inPieces(gone, maxRedisChannels, func(some []string) error { return s.channels.Unsubscribe(s.ctx, some...) })
}

// inPieces calls do with at most so many of all at a time.
func inPieces[T any](all []T, most int, do func([]T) error) error {
	for len(all) > 0 {
		some := all[:min(most, len(all))]
		if err := do(some); err != nil {
			return err
		}
		all = all[len(some):]
	}
	return nil
}

// receive reads the channels' connection. It does not use the library's Go channel, which drops what is not taken in
// time, nor its reconnecting, which tells nobody: any error ends the session.
func (s *redisSession) receive() {
	for {
		received, err := s.channels.Receive(s.ctx)
		if err != nil {
			s.fail("receive", err)
			return
		}
		switch m := received.(type) {
		case *redis.Pong:
			rouse(s.pong)
		case *redis.Subscription:
			if m.Kind == "subscribe" {
				s.confirmed(m.Channel)
			}
		case *redis.Message:
			s.dispatch(m.Channel, m.Payload)
		}
	}
}

// confirmed notes that the server has subscribed this connection to a channel.
func (s *redisSession) confirmed(channel string) {
	s.broker.mu.Lock()
	defer s.broker.mu.Unlock()
	if _, asked := s.subscribed[channel]; asked {
		s.subscribed[channel] = true
		s.broker.confirm(channel)
	}
}

// confirm tells those who listen on a channel that the server knows. A stream's consumer needs no more: its group reads
// from the beginning. The caller holds mu.
func (b *redisBroker) confirm(channel string) {
	for _, s := range b.channels[channel] {
		if !s.confirmed {
			s.confirmed = true
			close(s.ready)
		}
	}
}

// dispatch queues a message for whoever wants it. While too much waits already it blocks, and with it all that comes
// after; the server keeps some of that for us and in the end cuts the connection, which is seen and told.
func (s *redisSession) dispatch(channel, payload string) {
	b := s.broker
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.queued > maxRedisQueue && s.ctx.Err() == nil {
		b.room.Wait()
	}
	for _, to := range b.channels[channel] {
		b.queued += len(payload) + messageOverhead
		if to.offers != nil {
			b.offers = append(b.offers, redisOffer{consumer: to.offers, data: payload, since: time.Now()})
			rouse(b.offered)
			continue
		}
		to.queue = append(to.queue, payload)
		if !to.busy {
			to.busy = b.spawn(func() { b.handleQueued(to) })
		}
	}
}

// handleQueued gives a subscription its messages, one at a time and in order, until none is left.
func (b *redisBroker) handleQueued(to *redisSubscription) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for len(to.queue) > 0 && !b.closed {
		next := to.queue[0]
		to.queue = to.queue[1:]
		b.mu.Unlock()
		to.handle([]byte(next))
		b.mu.Lock()
		b.dequeue(next)
	}
	to.queue, to.busy = nil, false
}

// dequeue makes room for more messages. The caller holds mu.
func (b *redisBroker) dequeue(messages ...string) {
	for _, m := range messages {
		b.queued -= len(m) + messageOverhead
	}
	b.room.Broadcast()
}

// overfull says that so much waits here that nothing more is read.
func (b *redisBroker) overfull() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.queued > maxRedisQueue
}

// A redisConsumer is a job's subject: its channel and, with durable, its stream.
type redisConsumer struct {
	broker  *redisBroker
	subject string
	slots   Slots
	handle  func(Delivery)
	offers  Subscription

	handling sync.WaitGroup // calls of handle; nothing is added once stopped
	gone     chan struct{}  // closed by Stop

	// guarded by the broker's mu
	stopped bool
	refused map[string]time.Time // claims of offers that handle refused and others may take
}

// Consume listens on the job's channel and, with durable, reads its stream.
func (b *redisBroker) Consume(subject string, slots Slots, handle func(Delivery)) Consumer {
	c := &redisConsumer{
		broker: b, subject: subject, slots: slots, handle: handle,
		gone: make(chan struct{}), refused: map[string]time.Time{},
	}
	c.offers = b.subscribe(subject, &redisSubscription{offers: c})
	if b.config.Durable {
		b.consumeStream(c)
	}
	return c
}

func (c *redisConsumer) Ready() <-chan struct{} { return c.offers.Ready }

// Wake lets the reader of streams ask again how much is free.
func (c *redisConsumer) Wake() { rouse(c.broker.woken) }

func (c *redisConsumer) Stop() {
	c.offers.Stop()
	b := c.broker
	b.mu.Lock()
	if !c.stopped {
		c.stopped = true
		close(c.gone)
		if stream := b.streams[c.subject]; stream != nil && stream.consumer == c {
			stream.consumer, b.sorted = nil, nil
		}
	}
	b.mu.Unlock()
	rouse(b.woken) // so that no entry is read for nobody
	c.handling.Wait()
}

// take calls handle, unless the consumer has been stopped.
func (c *redisConsumer) take(d Delivery) bool {
	c.broker.mu.Lock()
	if c.stopped || c.broker.closed {
		c.broker.mu.Unlock()
		return false
	}
	c.handling.Add(1)
	c.broker.mu.Unlock()
	defer c.handling.Done()
	c.handle(d)
	return true
}

// A redisOffer is a task that came over a channel, to this worker as to every other.
type redisOffer struct {
	consumer *redisConsumer
	data     string
	since    time.Time
	claim    string // set when it is claimed
}

// claimKey names the claim on a task. A message that is no task has one too, so that one worker alone refuses it.
func (b *redisBroker) claimKey(data string) (key string, isTask bool) {
	m, err := parseTaskMessage([]byte(data))
	if err == nil {
		return "job_item:claim:" + b.project + ":" + m.TaskID, true
	}
	sum := sha256.Sum256([]byte(data))
	return "job_item:claim:" + b.project + ":/" + hex.EncodeToString(sum[:16]), false // no task id holds a slash
}

// takenBy is a claim's value when a journal answers for the task, or did.
func takenBy(identity string) string { return "taken " + identity }

// streamOffer puts a task into its stream, unless it is claimed. KEYS: claim, stream. ARGV: message, seconds. The answer
// is the value of the claim as it was, "" where there was none.
const streamOffer = `
local claim = redis.call('GET', KEYS[1])
if claim then return claim end
local id = redis.call('XADD', KEYS[2], '*', '` + redisField + `', ARGV[1])
redis.call('SET', KEYS[1], id, 'EX', ARGV[2])
return ''`

// claimOffers claims what is offered, many at once, and hands on what this worker won. While there is no connection it
// tries again: nobody else may have been connected to win.
func (b *redisBroker) claimOffers() {
	defer b.work.Done()
	for {
		batch := b.nextOffers()
		if batch == nil {
			return
		}
		won, err := b.claim(batch)
		for err != nil {
			b.log.Debug("offered tasks not claimed yet", errAttrs(err), "count", len(batch))
			b.mu.Lock()
			came := b.came
			b.mu.Unlock()
			select {
			case <-came:
			case <-time.After(offerRetryPause):
			case <-b.ctx.Done():
				return
			}
			if time.Since(batch[0].since) > offerGoodFor {
				for _, o := range batch {
					b.offerLost(o, err)
				}
				break
			}
			won, err = b.claim(batch)
		}
		for i, o := range batch {
			if err != nil || !won[i] {
				b.release(o)
				continue
			}
			select {
			case b.handles <- struct{}{}:
			case <-b.ctx.Done():
				return
			}
			b.mu.Lock()
			spawned := b.spawn(func() { b.handleOffer(o) })
			b.mu.Unlock()
			if !spawned {
				return
			}
		}
	}
}

// nextOffers waits for offers; nil when the broker is closed.
func (b *redisBroker) nextOffers() []redisOffer {
	for {
		b.mu.Lock()
		var batch []redisOffer
		for len(b.offers) > 0 && len(batch) < maxRedisClaims {
			next := b.offers[0]
			b.offers = b.offers[1:]
			if next.consumer.stopped {
				b.dequeue(next.data) // the other workers have it too
				continue
			}
			batch = append(batch, next)
		}
		if len(b.offers) == 0 {
			b.offers = nil
		}
		b.mu.Unlock()
		if len(batch) > 0 {
			return batch
		}
		select {
		case <-b.offered:
		case <-b.ctx.Done():
			return nil
		}
	}
}

// claim tries to win each offer. It may be repeated when its outcome is unknown: what was won is still won.
func (b *redisBroker) claim(batch []redisOffer) (won []bool, err error) {
	s, away := b.current()
	if s == nil {
		return nil, away
	}
	pipe := s.client.Pipeline()
	values := make([]*redis.Cmd, len(batch))
	for i := range batch {
		o := &batch[i]
		o.claim, _ = b.claimKey(o.data)
		switch {
		case b.refusedBefore(*o):
		case b.config.Durable:
			values[i] = pipe.Eval(s.ctx, streamOffer, []string{o.claim, o.consumer.subject}, o.data, int(claimKept.Seconds()))
		default:
			pipe.SetNX(s.ctx, o.claim, takenBy(b.identity), claimKept)
			values[i] = pipe.Do(s.ctx, "GET", o.claim)
		}
	}
	if pipe.Len() > 0 {
		cmds, _ := pipe.Exec(s.ctx)
		for _, cmd := range cmds {
			var refused redis.Error
			err := cmd.Err()
			if err == nil || errors.Is(err, redis.Nil) || errors.As(err, &refused) && !redis.IsOOMError(err) && !s.useless(err) {
				continue // a refusal of one offer alone is told below
			}
			return nil, s.failed(err)
		}
	}
	won = make([]bool, len(batch))
	for i, value := range values {
		if value == nil {
			continue
		}
		// Also what was taken here before: our journal knows, and a task that has ended is reported again.
		won[i] = value.Val() == takenBy(b.identity)
		if err := value.Err(); err != nil {
			b.offerLost(batch[i], s.failed(err))
		}
	}
	return won, nil
}

// handleOffer gives a task that this worker has won to its consumer.
func (b *redisBroker) handleOffer(o redisOffer) {
	defer func() { <-b.handles }()
	defer b.release(o)
	for {
		var refused error
		taken := o.consumer.take(Delivery{Subject: o.consumer.subject, Data: []byte(o.data), Nack: func(reason error) {
			if refused = reason; refused == nil {
				refused = errors.New("refused")
			}
		}})
		if taken && refused == nil {
			return
		}
		given, err := b.giveBack(o)
		if given {
			return
		}
		if !taken || time.Since(o.since) > offerGoodFor {
			b.offerLost(o, errors.Join(refused, err))
			return
		}
		select { // nobody else is there to take it
		case <-time.After(offerRetryPause):
		case <-o.consumer.gone:
		case <-b.ctx.Done():
		}
	}
}

// giveOffer takes a claim back and publishes its message again, if anybody else listens. KEYS: claim. ARGV: the claim's
// value, channel, message, how many of the listeners are this worker. The answer is how many workers got it, 0: it is still ours.
const giveOffer = `
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return -1 end
if redis.call('PUBSUB', 'NUMSUB', ARGV[2])[2] <= tonumber(ARGV[4]) then return 0 end
redis.call('DEL', KEYS[1])
return redis.call('PUBLISH', ARGV[2], ARGV[3])`

// giveBack offers a task to the other workers again. This one leaves it to them for a while; where all of them refuse
// it, it is lost: each has said so in its log.
func (b *redisBroker) giveBack(o redisOffer) (given bool, err error) {
	s, away := b.current()
	if s == nil {
		return false, away
	}
	b.mu.Lock()
	refused := o.consumer.refused
	for claim, at := range refused {
		if len(refused) >= maxRefused || time.Since(at) > refusedRemembered {
			delete(refused, claim)
		}
	}
	refused[o.claim] = time.Now() // before, since the message comes here too
	self := 1
	if o.consumer.stopped {
		self = 0 // or soon: in between it may go to nobody, so it is told below
	}
	b.mu.Unlock()
	ctx, stop := context.WithTimeout(s.ctx, redisCommandLimit)
	defer stop()
	workers, err := s.client.Eval(ctx, giveOffer, []string{o.claim},
		takenBy(b.identity), o.consumer.subject, o.data, self).Int()
	if err == nil && workers != 0 {
		if self == 0 {
			b.log.Warn("plain task offered again as this worker stops; lost if no other is there", "subject", o.consumer.subject)
		}
		return true, nil
	}
	b.mu.Lock()
	delete(refused, o.claim)
	b.mu.Unlock()
	if err != nil {
		err = s.failed(err)
	}
	return false, err
}

func (b *redisBroker) refusedBefore(o redisOffer) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	at, found := o.consumer.refused[o.claim]
	return found && time.Since(at) < refusedRemembered
}

// offerLost says that a plain message is gone. With the claim it holds, no other worker would have run it.
func (b *redisBroker) offerLost(o redisOffer, err error) {
	if b.ctx.Err() != nil {
		return
	}
	b.log.Error("task lost before it was accepted", "subject", o.consumer.subject,
		errAttrs(fail(codeRedisTaskLost, fmt.Sprintf("claim %q", o.claim), err)))
}

// release makes room for other messages.
func (b *redisBroker) release(o redisOffer) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.dequeue(o.data)
}
