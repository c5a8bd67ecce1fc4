package main

// broker_nats_claims.go keeps the claims on tasks that JetStream has delivered to this worker, from delivery until
// they are settled, whichever consumer they came through and however often the connection is made anew.

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
)

// natsClaims are the unsettled deliveries of a broker.
type natsClaims struct {
	mu   sync.Mutex // guards what follows
	held map[natsMessageID]*natsDelivery
}

// A natsMessageID is the same for every delivery of a message. The time tells it from one with the same number in a
// stream that was deleted and made anew.
type natsMessageID struct {
	stream   string
	sequence uint64
	stored   int64 // nanoseconds of Unix time
}

// A natsDelivery is a message that this worker answers for.
type natsDelivery struct {
	id       natsMessageID
	consumer *natsStream
	handled  bool // handle has returned; guarded by consumer.mu

	reply    string // where it is settled; guarded by claims.mu like what follows
	settling bool
}

// add takes a delivery, unless its message is held already: then it only gives that one the newer address.
func (s *natsClaims) add(d *natsDelivery) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if held := s.held[d.id]; held != nil {
		held.reply = d.reply
		return false
	}
	s.held[d.id] = d
	return true
}

// remove lets go of a delivery.
func (s *natsClaims) remove(d *natsDelivery) {
	s.mu.Lock()
	delete(s.held, d.id)
	s.mu.Unlock()
	c := d.consumer
	c.mu.Lock()
	c.unsettled--
	c.mu.Unlock()
	c.look()
}

// renew tells the server that all tasks held are still being worked on.
func (s *natsClaims) renew(l *natsLink) {
	s.mu.Lock()
	replies := make([]string, 0, len(s.held))
	for _, d := range s.held {
		replies = append(replies, d.reply)
	}
	s.mu.Unlock()
	for _, reply := range replies {
		if l.nc.Publish(reply, []byte("+WPI")) != nil {
			return // the connection is gone; the next one renews first of all
		}
	}
}

// renewClaims renews until Close, also for consumers that are stopped.
func (b *natsBroker) renewClaims() {
	defer b.tasks.Done()
	pause := claimRenewal
	ticker := time.NewTicker(pause)
	defer ticker.Stop()
	for {
		select {
		case shorter := <-b.renewEvery:
			if shorter > 0 && shorter < pause { // a consumer whose claims are lost sooner than ours
				pause = shorter
				ticker.Reset(pause)
			}
			continue
		case <-ticker.C:
		case <-b.ctx.Done():
			return
		}
		if l := b.current(); l != nil {
			b.claims.renew(l)
		}
	}
}

// ack settles for good and returns when the server has said so. The claim is kept until then.
func (d *natsDelivery) ack(ctx context.Context) error {
	claims := &d.consumer.broker.claims
	if !claims.settle(d) {
		return nil
	}
	defer claims.remove(d)
	return d.tell(ctx, "+ACK", "acknowledge")
}

// nack puts the message back, to be delivered again at once. It is let go of before, since it may come back here.
func (d *natsDelivery) nack(reason error) {
	c := d.consumer
	if !c.broker.claims.settle(d) {
		return
	}
	c.putBack(d)
	c.broker.claims.remove(d)
	ctx, stop := context.WithTimeout(c.broker.ctx, settleTimeout)
	defer stop()
	if err := d.tell(ctx, "-NAK", "put back"); err != nil {
		c.broker.log.Warn("delivery not put back; it is delivered again later", errAttrs(err), "subject", c.subject,
			"reason", fmt.Sprint(reason))
	}
}

// leave lets go of the message without a word. The claims of all who have it are one: whoever still renews it keeps it.
func (d *natsDelivery) leave() {
	if claims := &d.consumer.broker.claims; claims.settle(d) {
		claims.remove(d)
	}
}

// isSettled reports whether the stream has deleted the message, as one for work does once it is acknowledged.
func (d *natsDelivery) isSettled(ctx context.Context) (bool, error) {
	l := d.consumer.broker.current()
	if l == nil {
		return false, d.consumer.broker.errAway("look for a task in its stream")
	}
	js, err := l.nc.JetStream(nats.MaxWait(natsAPILimit))
	if err == nil {
		_, err = js.GetMsg(d.id.stream, d.id.sequence, nats.Context(ctx))
	}
	if errors.Is(err, nats.ErrMsgNotFound) {
		return true, nil
	}
	return false, err
}

// settle reports whether this is the first verdict on a delivery.
func (s *natsClaims) settle(d *natsDelivery) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	first := !d.settling
	d.settling = true
	return first
}

// tell sends a verdict and returns when the server has it, over the next connection if need be, or when ctx ends.
func (d *natsDelivery) tell(ctx context.Context, verdict, op string) error {
	b := d.consumer.broker
	ctx, stop := context.WithTimeout(ctx, b.roundTripLimit)
	defer stop()
	failed := errors.New("no connection to NATS")
	for {
		l := b.await(ctx)
		if l == nil {
			return fail(codeNATSSettle, fmt.Sprintf("%s a task of %q", op, d.consumer.subject), failed)
		}
		b.claims.mu.Lock()
		reply := d.reply
		b.claims.mu.Unlock()
		if _, failed = l.nc.RequestWithContext(ctx, reply, []byte(verdict)); failed == nil {
			return nil
		}
		select { // the stream may not be up again yet
		case <-time.After(minReconnectPause):
		case <-ctx.Done():
		}
	}
}
