package main

// broker_redis_entry.go is what becomes of one entry of a stream that this worker has: its claim on the task, its
// acceptance, renewal while the task waits or runs, and its end. How entries are found is in broker_redis_stream.go.
//
// Why an event that was sent both ways, or twice, runs once: the claim of a task (broker_redis_channel.go) holds the id
// of the one entry that stands for it, and an entry that is read is acknowledged and dropped when the claim names another.
//   - Channel first: the message becomes an entry and claims in one step; the sender's own entry is dropped when read.
//   - Stream first, and read: the entry claims, and no worker makes one of the message. Not read yet: as above.
//   - The owner dies, at any point: the entry is still pending and the claim still names it, so whoever takes it over
//     runs it. Nothing was dropped for the sake of anything but an entry that is there: a claim that names an entry
//     which the stream has lost (a sender that trims) is taken over.
//   - The owner has finished: acknowledging turns the claim into "taken by": its journal knows the task, so that worker
//     reports a late duplicate again and the others drop it, for claimKept. A waiting or running task's claim is renewed
//     with its entry, and entries that were sent together are read together, so the time is enough.
//
// An acknowledged entry is deleted where the group is the stream's only one. With others, keeping the stream short is
// the affair of whoever set them up.

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

const (
	maxRenewals = 100 // in one round trip

	// putBackIdle marks an entry that was put back: idle for longer than any worker has been silent. It need not
	// be left alone until its owner must be dead.
	putBackIdle = 1000 * 24 * time.Hour
)

// A redisEntry is a delivery that is not settled.
type redisEntry struct {
	stream  *redisStream
	id      string
	data    string
	claim   string // key, "" when it is no task
	attempt int
	again   bool // another worker has had it

	// guarded by the broker's mu
	settled bool // Ack or Nack has been called
	ack     bool // and it is Ack, which the server has not been told yet
	lost    bool // it is not pending under our name any more
}

// claimEntry makes an entry the one that stands for its task, unless another does already. KEYS: claim, stream. ARGV:
// entry, seconds. The answer is the claim's value.
const claimEntry = `
local claim = redis.call('GET', KEYS[1])
if claim and claim ~= ARGV[1] and (string.sub(claim, 1, 6) == 'taken ' or #redis.call('XRANGE', KEYS[2], claim, claim) > 0) then
  return claim
end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
return ARGV[1]`

// hand gives entries that are ours to their consumers and returns when those have accepted them or not, so that the
// slots that are free then are free.
func (r *redisReader) hand(entries []*redisEntry) error {
	if len(entries) == 0 {
		return nil
	}
	b := r.broker
	pipe := r.client.Pipeline()
	for _, e := range entries {
		if key, isTask := b.claimKey(e.data); isTask {
			e.claim = key
			pipe.Eval(r.ctx, claimEntry, []string{key, e.stream.subject}, e.id, int(claimKept.Seconds()))
		} else {
			pipe.Echo(r.ctx, e.id) // the consumer refuses and counts it
		}
	}
	answers, _ := pipe.Exec(r.ctx)
	var work sync.WaitGroup
	defer work.Wait()
	for i, e := range entries {
		claim, err := "", answers[i].Err()
		switch answer := answers[i].(type) {
		case *redis.Cmd:
			claim, _ = answer.Val().(string)
		case *redis.StringCmd:
			claim = answer.Val()
		}
		switch {
		case err != nil: // pending, and not known here
			for _, e := range entries[i:] {
				e.stream.own = true
			}
			return err
		case claim != e.id && claim != takenBy(b.identity):
			b.log.Debug("duplicate of a task that another entry stands for", "subject", e.stream.subject)
			e.claim = ""
			if err := b.tellAck(r.ctx, e); err != nil {
				return err
			}
			continue
		case claim != e.id:
			e.claim = "" // our journal knows the task: it is reported again
		}
		b.mu.Lock()
		c := e.stream.consumer
		if c != nil {
			e.stream.entries[e.id] = e
		}
		b.mu.Unlock()
		if c == nil {
			b.tellPutBack(e)
			continue
		}
		work.Add(1)
		go func() { // ends when the consumer has accepted or refused it
			defer work.Done()
			data := []byte(e.data)
			e.data = ""
			taken := c.take(Delivery{
				Subject: e.stream.subject, Data: data, Held: true, Attempt: e.attempt, Again: e.again,
				Ack:     func(ctx context.Context) error { return b.ack(ctx, e) },
				Nack:    func(reason error) { b.putBack(e) },
				Settled: func(ctx context.Context) (bool, error) { return b.isSettled(ctx, e) },
			})
			if !taken {
				b.putBack(e)
			}
		}()
	}
	return nil
}

// ackEntry acknowledges an entry, deletes it where nobody else wants it, and notes that a journal knows its task. KEYS:
// stream, perhaps claim. ARGV: group, entry, the claim's new value, seconds.
const ackEntry = `
if redis.call('XACK', KEYS[1], ARGV[1], ARGV[2]) == 1 and #redis.call('XINFO', 'GROUPS', KEYS[1]) == 1 then
  redis.call('XDEL', KEYS[1], ARGV[2])
end
if KEYS[2] then
  local claim = redis.call('GET', KEYS[2])
  if not claim or claim == ARGV[2] then redis.call('SET', KEYS[2], ARGV[3], 'EX', ARGV[4]) end
end
return 'OK'`

// ack settles an entry. Where the server cannot be told now, it is told when it can be, unless this worker dies before.
func (b *redisBroker) ack(ctx context.Context, e *redisEntry) error {
	b.mu.Lock()
	settled := e.settled
	e.settled = true
	b.mu.Unlock()
	if settled {
		return nil
	}
	err := b.tellAck(ctx, e)
	if err != nil {
		b.mu.Lock()
		e.ack = true
		b.mu.Unlock()
		return fail(codeRedisSettle, fmt.Sprintf("acknowledge entry %s of %q", e.id, e.stream.subject), err)
	}
	return nil
}

func (b *redisBroker) tellAck(ctx context.Context, e *redisEntry) error {
	s, away := b.current()
	if s == nil {
		return away
	}
	keys := []string{e.stream.subject}
	if e.claim != "" {
		keys = append(keys, e.claim)
	}
	err := s.client.Eval(ctx, ackEntry, keys, b.project, e.id, takenBy(b.identity), int(claimKept.Seconds())).Err()
	if err != nil && !strings.Contains(err.Error(), "NOGROUP") {
		return s.failed(err)
	}
	b.forgetEntry(e)
	return nil
}

// forgetEntry drops a settled entry, which makes room for another.
func (b *redisBroker) forgetEntry(e *redisEntry) {
	b.mu.Lock()
	if e.stream.entries[e.id] == e {
		delete(e.stream.entries, e.id)
		if e.stream.consumer == nil {
			b.sorted = nil // it need not be known any more
		}
	}
	b.mu.Unlock()
	rouse(b.woken)
}

// putBackEntry lets the next worker that looks take an entry. KEYS: stream. ARGV: group, consumer, entry, milliseconds.
const putBackEntry = `
if #redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1, ARGV[2]) == 1 then
  redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3], 'IDLE', ARGV[4], 'JUSTID')
end
return 'OK'`

// putBack is Nack. Where the server cannot be told, the entry is taken over as if this worker had died.
func (b *redisBroker) putBack(e *redisEntry) {
	b.mu.Lock()
	settled := e.settled
	e.settled = true
	b.mu.Unlock()
	if settled {
		return
	}
	b.tellPutBack(e)
	b.forgetEntry(e)
}

// isSettled reports whether an entry is pending no more, under anybody's name.
func (b *redisBroker) isSettled(ctx context.Context, e *redisEntry) (bool, error) {
	s, away := b.current()
	if s == nil {
		return false, away
	}
	pending, err := s.client.XPendingExt(ctx, &redis.XPendingExtArgs{
		Stream: e.stream.subject, Group: b.project, Start: e.id, End: e.id, Count: 1,
	}).Result()
	return err == nil && len(pending) == 0, err
}

func (b *redisBroker) tellPutBack(e *redisEntry) {
	s, err := b.current()
	if s != nil {
		ctx, stop := context.WithTimeout(s.ctx, redisCommandLimit)
		defer stop()
		err = s.client.Eval(ctx, putBackEntry, []string{e.stream.subject},
			b.project, b.identity, e.id, putBackIdle.Milliseconds()).Err()
		if err != nil {
			err = s.failed(err)
		}
	}
	if err != nil {
		b.log.Warn("entry not put back, others take it when it has been idle for long", "subject", e.stream.subject,
			"err", err.Error())
	}
}

// renewEntries keeps entries, and the claims on their tasks, ours: those that still are. Counters stay. KEYS: stream,
// then a claim for each entry, the stream again for none. ARGV: group, consumer, seconds, entries. The answer is how often
// each has been delivered, 0 for one that is not ours any more.
const renewEntries = `
local answer = {}
for i = 4, #ARGV do
  local entry, claim = ARGV[i], KEYS[i - 2]
  local pending = redis.call('XPENDING', KEYS[1], ARGV[1], entry, entry, 1, ARGV[2])
  if #pending == 1 then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, entry, 'JUSTID')
    if claim ~= KEYS[1] and redis.call('EXPIRE', claim, ARGV[3]) == 0 then
      redis.call('SET', claim, entry, 'EX', ARGV[3])
    end
    answer[#answer + 1] = pending[1][4]
  else
    answer[#answer + 1] = 0
  end
end
return answer`

// renewClaims renews what is unsettled at intervals, and first of all on a new connection. It also acknowledges what
// could not be when it ought to.
func (s *redisSession) renewClaims() {
	b := s.broker
	for {
		kept := map[*redisStream][]*redisEntry{}
		var toAck []*redisEntry
		b.mu.Lock()
		for _, stream := range b.streams {
			for _, e := range stream.entries {
				if e.ack {
					toAck = append(toAck, e)
				}
				if !e.lost && (e.ack || !e.settled) {
					kept[stream] = append(kept[stream], e)
				}
			}
		}
		b.mu.Unlock()
		for stream, entries := range kept {
			err := inPieces(entries, maxRenewals, func(some []*redisEntry) error { return s.renew(stream, some) })
			if err != nil && s.ctx.Err() == nil {
				b.log.Warn("claims not renewed, trying again", "subject", stream.subject, "err", s.failed(err).Error())
			}
		}
		for _, e := range toAck {
			if b.tellAck(s.ctx, e) != nil {
				break // the next time
			}
		}
		select {
		case <-time.After(b.renewal):
		case <-s.ctx.Done():
			return
		}
	}
}

func (s *redisSession) renew(stream *redisStream, entries []*redisEntry) error {
	b := s.broker
	keys, args := []string{stream.subject}, []any{b.project, b.identity, int(claimKept.Seconds())}
	for _, e := range entries {
		args = append(args, e.id)
		if e.claim != "" {
			keys = append(keys, e.claim)
		} else {
			keys = append(keys, stream.subject)
		}
	}
	deliveries, err := s.client.Eval(s.ctx, renewEntries, keys, args...).Int64Slice()
	if err != nil {
		return err
	}
	for i, n := range deliveries[:min(len(deliveries), len(entries))] {
		e := entries[i]
		b.mu.Lock()
		present := stream.entries[e.id] == e && !e.settled
		taken := present && n == 0
		twice := present && n > int64(e.attempt)
		e.lost = e.lost || taken
		e.attempt = max(e.attempt, int(n))
		b.mu.Unlock()
		switch {
		case taken:
			err = errors.New("another worker has taken it over, or the server has lost it: it may run twice")
		case twice:
			err = fmt.Errorf("it was delivered again to the same name: another worker seems to have the identity %q", b.identity)
		default:
			continue
		}
		b.log.Warn("claim on an entry lost", "subject", stream.subject, errAttrs(failHint(codeRedisClaim,
			fmt.Sprintf("renew entry %s of %q", e.id, stream.subject), err, "each worker needs an identity_id of its own")))
	}
	return nil
}
