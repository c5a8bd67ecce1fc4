package main

// broker_redis_stream.go reads the tasks that a durable Redis keeps: a stream per job (key = subject, field data), read
// by the consumer group named after the project, with the worker's identity as the consumer's name. An entry stays
// pending under that name until it is acknowledged; the worker renews it meanwhile, and what has not been renewed for
// long is another worker's to take. Consumers are never deleted, since that would lose their pending entries; those of
// workers long gone cost some hundred bytes each.

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

const (
	redisField = "data" // of an entry: the message

	maxRedisEntries = 32 // read at once: each may be 16 MiB
	maxRedisAsked   = 32 // streams, for what is new, in one round trip: where jobs are very many, few of them have any

	redisBlock      = 5 * time.Second
	redisShortBlock = time.Second // where the server does not let us interrupt it
	streamRetry     = 30 * time.Second
)

// A redisStream is one job's stream; its entries outlive the consumer that took them.
type redisStream struct {
	subject string

	// guarded by the broker's mu
	consumer *redisConsumer         // nil: nothing is read
	entries  map[string]*redisEntry // by id, until settled

	// The reader's.
	grouped bool      // the group exists
	retry   time.Time // until then it is left alone: something was wrong with it
	own     bool      // entries may be pending under our name that we do not know of
	backlog bool      // it may hold entries to be read; only one without is waited on
	busy    bool      // it held some when it was asked last
}

func (b *redisBroker) consumeStream(c *redisConsumer) {
	b.mu.Lock()
	defer b.mu.Unlock()
	stream := b.streams[c.subject]
	if stream == nil {
		stream = &redisStream{subject: c.subject, entries: map[string]*redisEntry{}, own: true, backlog: true}
		b.streams[c.subject] = stream
	}
	stream.consumer = c
	b.sorted = nil
	rouse(b.woken)
}

// resetStreams forgets what an earlier connection knew. No reader runs.
func (b *redisBroker) resetStreams() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, stream := range b.streams {
		stream.grouped, stream.own, stream.backlog, stream.retry = false, true, true, time.Time{}
	}
}

// A redisReader is a session's one reader of all streams.
type redisReader struct {
	*redisSession
	conn     *redis.Conn // the one that waits
	clientID int64
	looked   time.Time // for entries of others
	turn     int       // so that the same stream is not always the first
}

// readStreams reads as much as there are free slots for: first what is pending under our name, then what others have
// put back or left behind, then what is new.
func (s *redisSession) readStreams() {
	r := &redisReader{redisSession: s, conn: s.client.Conn()}
	defer r.conn.Close()
	var err error
	if r.clientID, err = r.conn.ClientID(s.ctx).Result(); err != nil {
		s.failed(err) // then the wait is short, see block
	}
	for s.ctx.Err() == nil {
		if err := r.read(); err != nil && s.ctx.Err() == nil {
			s.broker.log.Warn("streams not read, trying again",
				errAttrs(fail(codeRedisRead, "read the streams of redis at "+s.addr, s.failed(err))))
			select {
			case <-time.After(offerRetryPause):
			case <-s.ctx.Done():
			}
		}
	}
}

// read does one round: it looks for all there is to take, and waits if there is nothing.
func (r *redisReader) read() error {
	if err := r.createGroups(); err != nil {
		return err
	}
	if err := r.takeOwn(); err != nil {
		return err
	}
	if time.Since(r.looked) >= r.broker.lookPause {
		if err := r.takeOver(); err != nil {
			return err
		}
		r.looked = time.Now()
	}
	open := r.open()
	switch {
	case slices.ContainsFunc(open, func(o openStream) bool { return o.stream.backlog }):
		return r.takeNew(firstToAsk(open))
	case len(open) > 0:
		return r.block(open)
	}
	select {
	case <-r.broker.woken:
	case <-time.After(r.broker.lookPause):
	case <-r.ctx.Done():
	}
	return nil
}

// An openStream is one that may be read, and how many entries there is room for.
type openStream struct {
	stream *redisStream
	room   int
}

// open asks which streams there is room for just now. What has none may hold a backlog when it is asked again.
func (r *redisReader) open() []openStream {
	var open []openStream
	for _, stream := range r.streams() {
		if room := r.broker.roomFor(stream); room > 0 && stream.grouped {
			open = append(open, openStream{stream, room})
		} else {
			stream.backlog = true
		}
	}
	return open
}

// firstToAsk picks as many streams as are asked at once, in the order in which they have their turn: some that had entries
// the last time, then such as may have some, then any. What is asked in vain has no backlog then.
func firstToAsk(open []openStream) []openStream {
	if len(open) <= maxRedisAsked {
		return open
	}
	picked := make(map[*redisStream]bool, maxRedisAsked)
	pick := func(most int, fits func(*redisStream) bool) {
		for _, o := range open {
			if len(picked) < most && fits(o.stream) {
				picked[o.stream] = true
			}
		}
	}
	pick(maxRedisAsked/2, func(s *redisStream) bool { return s.busy })
	pick(maxRedisAsked, func(s *redisStream) bool { return s.backlog })
	pick(maxRedisAsked, func(*redisStream) bool { return true })
	var first []openStream
	for _, o := range open {
		if picked[o.stream] {
			first = append(first, o)
		}
	}
	return first
}

// streams lists those with a consumer, another one first each time.
func (r *redisReader) streams() []*redisStream {
	b := r.broker
	b.mu.Lock()
	if b.sorted == nil {
		for _, stream := range b.streams {
			if stream.consumer != nil {
				b.sorted = append(b.sorted, stream)
			} else if len(stream.entries) == 0 {
				delete(b.streams, stream.subject)
			}
		}
		slices.SortFunc(b.sorted, func(a, b *redisStream) int { return strings.Compare(a.subject, b.subject) })
	}
	list := b.sorted
	b.mu.Unlock()
	if len(list) < 2 {
		return list
	}
	r.turn++
	first := r.turn % len(list)
	return append(list[first:len(list):len(list)], list[:first]...)
}

// roomFor is how many entries may be read from a stream now.
func (b *redisBroker) roomFor(stream *redisStream) int {
	b.mu.Lock()
	c, unsettled := stream.consumer, len(stream.entries)
	b.mu.Unlock()
	if c == nil {
		return 0
	}
	return max(0, min(c.slots.Free(), c.slots.Limit()-unsettled, maxRedisEntries))
}

// createGroups makes sure that each stream exists with our group, which begins with the oldest entry.
func (r *redisReader) createGroups() error {
	pipe := r.client.Pipeline()
	var missing []*redisStream
	for _, stream := range r.streams() {
		if !stream.grouped && time.Now().After(stream.retry) {
			missing = append(missing, stream)
			pipe.XGroupCreateMkStream(r.ctx, stream.subject, r.broker.project, "0")
		}
	}
	if len(missing) == 0 {
		return nil
	}
	replies, err := pipe.Exec(r.ctx)
	for i, stream := range missing {
		refused := replies[i].Err()
		var answer redis.Error
		switch {
		case refused == nil || strings.HasPrefix(refused.Error(), "BUSYGROUP"):
			stream.grouped, stream.backlog, stream.own = true, true, true
		case !errors.As(refused, &answer) || r.useless(refused):
			return err
		default:
			r.giveUp(stream, refused)
		}
	}
	return nil
}

// giveUp leaves a stream alone for a while.
func (r *redisReader) giveUp(stream *redisStream, err error) {
	stream.grouped, stream.retry = false, time.Now().Add(streamRetry)
	r.broker.log.Error("stream cannot be read, trying again in "+streamRetry.String(), "subject", stream.subject,
		errAttrs(failHint(codeRedisStream, fmt.Sprintf("read stream %q of redis at %s", stream.subject, r.addr), r.failed(err),
			"the key must be a stream: delete or rename what stands in its place")))
}

// refused deals with a server's refusal that concerns one stream: its group, and perhaps the stream, may have gone with
// the server's data.
func (r *redisReader) refused(stream *redisStream, err error) error {
	var answer redis.Error
	switch {
	case !errors.As(err, &answer) || r.useless(err):
		return err
	case strings.Contains(err.Error(), "NOGROUP"):
		stream.grouped = false
	default:
		r.giveUp(stream, err)
	}
	return nil
}

// takeOwn takes what is pending under our name and not known here: read before a crash, or in a reply that got lost.
func (r *redisReader) takeOwn() error {
	var streams []openStream
	for _, stream := range r.streams() {
		if !stream.own || !stream.grouped {
			continue
		}
		if room := r.broker.roomFor(stream); room > 0 {
			streams = append(streams, openStream{stream, room})
		}
	}
	return r.takePending(streams, true, 0)
}

// takeOver takes what others have put back, and what they have not renewed for so long that they must be gone. For the
// latter it waits until this connection is as old: after an outage of the server every worker has been silent, and those
// that live need the time to come back.
func (r *redisReader) takeOver() error {
	idle := putBackIdle / 2
	if time.Since(r.began) > r.broker.lostAfter {
		idle = r.broker.lostAfter
	}
	return r.takePending(r.open(), false, idle)
}

// takePending lists entries of all these streams in one round trip, our own or those idle for so long, and takes as many
// as there is room for. (XAUTOCLAIM would do both at once, but tells neither how often an entry has been delivered, nor
// may a stream be asked for more than there is room for.)
func (r *redisReader) takePending(streams []openStream, own bool, idle time.Duration) error {
	if len(streams) == 0 {
		return nil
	}
	b := r.broker
	pipe := r.client.Pipeline()
	for _, o := range streams {
		args := &redis.XPendingExtArgs{
			Stream: o.stream.subject, Group: b.project, Start: "-", End: "+", Count: int64(o.room), Idle: idle,
		}
		if own {
			b.mu.Lock()
			args.Count += int64(len(o.stream.entries) + maxRedisEntries)
			b.mu.Unlock()
			args.Consumer = b.identity
		}
		pipe.XPendingExt(r.ctx, args)
	}
	replies, _ := pipe.Exec(r.ctx)
	for i, o := range streams {
		pending, err := replies[i].(*redis.XPendingExtCmd).Result()
		if err != nil {
			if err := r.refused(o.stream, err); err != nil {
				return err
			}
			continue
		}
		b.mu.Lock()
		unknown := slices.DeleteFunc(pending, func(p redis.XPendingExt) bool {
			// What we have put back ourselves is not ours any more; it waits for a takeOver.
			return o.stream.entries[p.ID] != nil || own && p.Idle > putBackIdle/2
		})
		b.mu.Unlock()
		if own {
			o.stream.own = len(unknown) > 0 // until a round finds none
		}
		if err := r.claimPending(o.stream, unknown[:min(len(unknown), b.roomFor(o.stream))]); err != nil {
			return err
		}
	}
	return nil
}

// claimPending makes entries ours, unless somebody else has been faster.
func (r *redisReader) claimPending(stream *redisStream, pending []redis.XPendingExt) error {
	if len(pending) == 0 {
		return nil
	}
	pipe := r.client.Pipeline()
	for _, p := range pending {
		pipe.XClaim(r.ctx, &redis.XClaimArgs{
			Stream: stream.subject, Group: r.broker.project, Consumer: r.broker.identity,
			MinIdle: p.Idle, Messages: []string{p.ID}, // whoever has claimed or renewed it since made it less idle
		})
	}
	replies, _ := pipe.Exec(r.ctx)
	var entries []*redisEntry
	for i, p := range pending {
		messages, err := replies[i].(*redis.XMessageSliceCmd).Result()
		switch {
		case errors.Is(err, redis.Nil):
			// The stream does not hold it any more; versions before 7 leave it pending.
			if err := r.client.XAck(r.ctx, stream.subject, r.broker.project, p.ID).Err(); err != nil {
				return err
			}
		case err != nil:
			if err := r.refused(stream, err); err != nil {
				return err
			}
		}
		for _, m := range messages {
			data, _ := m.Values[redisField].(string)
			entries = append(entries, &redisEntry{stream: stream, id: m.ID, data: data, attempt: int(p.RetryCount) + 1,
				again: p.Consumer != r.broker.identity})
		}
	}
	return r.hand(entries)
}

// readNew reads new entries, so many of each stream and so many altogether. KEYS: streams. ARGV: group, consumer, how many
// altogether, how many of each. The answer has, for each stream that was asked, its index and the entries or an error.
const readNew = `
local left, answer = tonumber(ARGV[3]), {}
for i, key in ipairs(KEYS) do
  local count = math.min(left, tonumber(ARGV[3 + i]))
  if count > 0 then
    local read = redis.pcall('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', count, 'STREAMS', key, '>')
    if not read then
      answer[#answer + 1] = {i, {}}
    elseif read.err then
      answer[#answer + 1] = {i, read.err}
    else
      left = left - #read[1][2]
      answer[#answer + 1] = {i, read[1][2]}
    end
  end
end
return answer`

// takeNew reads what is new without waiting. Jobs share the worker's slots, so no more is read altogether than the
// largest number that one of them may have.
func (r *redisReader) takeNew(open []openStream) error {
	var keys []string
	most := 0
	args := []any{r.broker.project, r.broker.identity, 0}
	for _, o := range open {
		keys = append(keys, o.stream.subject)
		args = append(args, o.room)
		most = max(most, o.room)
	}
	args[2] = most
	answer, err := r.client.Eval(r.ctx, readNew, keys, args...).Slice()
	if err != nil {
		return err
	}
	var entries []*redisEntry
	for _, a := range answer {
		pair, _ := a.([]any)
		if len(pair) != 2 {
			return errors.New("an answer that does not fit the question")
		}
		index, _ := pair[0].(int64)
		if index < 1 || int(index) > len(open) {
			return errors.New("an answer that does not fit the question")
		}
		o := open[index-1]
		switch read := pair[1].(type) {
		case string:
			if err := r.refused(o.stream, serverError(read)); err != nil {
				return err
			}
		case []any:
			for _, entry := range read {
				if e := parseRedisEntry(o.stream, entry); e != nil {
					entries = append(entries, e)
				}
			}
			o.stream.backlog = len(read) >= min(o.room, most)
			o.stream.busy = len(read) > 0
		}
	}
	return r.hand(entries)
}

// serverError is a refusal that came inside an answer.
type serverError string

func (e serverError) Error() string { return string(e) }
func (serverError) RedisError()     {}

// parseRedisEntry reads [id, [name, value, …]].
func parseRedisEntry(stream *redisStream, entry any) *redisEntry {
	pair, _ := entry.([]any)
	if len(pair) != 2 {
		return nil
	}
	e := &redisEntry{stream: stream, attempt: 1}
	e.id, _ = pair[0].(string)
	fields, _ := pair[1].([]any)
	for i := 0; i+1 < len(fields); i += 2 {
		if fields[i] == redisField {
			e.data, _ = fields[i+1].(string)
		}
	}
	return e
}

// block waits until one of the streams, all read to their ends, has an entry, and takes it. Where there is room it asks
// for two: what brings one was read to its end again. It is interrupted when there is room for a stream that it does not
// wait for, or no consumer for one that it does.
func (r *redisReader) block(open []openStream) error {
	b := r.broker
	wait := min(redisBlock, max(b.lookPause-time.Since(r.looked), time.Millisecond))
	if r.clientID == 0 {
		wait = min(wait, redisShortBlock)
	}
	args := &redis.XReadGroupArgs{Group: b.project, Consumer: b.identity, Count: 2, Block: wait}
	awaited := map[*redisStream]bool{}
	for _, o := range open {
		args.Streams = append(args.Streams, o.stream.subject)
		awaited[o.stream] = true
		if o.room < 2*len(open) {
			args.Count = 1
		}
	}
	for range open {
		args.Streams = append(args.Streams, ">")
	}
	type answer struct {
		read []redis.XStream
		err  error
	}
	answers := make(chan answer, 1)
	go func() { // ends with the wait, and is waited for below
		read, err := r.conn.XReadGroup(r.ctx, args).Result()
		answers <- answer{read, err}
	}()
	interrupt := false
	for {
		var again <-chan time.Time
		if interrupt {
			interrupt = r.interrupt()
			again = time.After(5 * time.Millisecond) // it may not have been waiting yet
		}
		select {
		case a := <-answers:
			return r.took(open, int(args.Count), a.read, a.err)
		case <-b.woken:
			interrupt = r.clientID != 0 && !r.stillRight(awaited)
		case <-again:
		}
	}
}

// stillRight says that there is room for no other streams than those that are waited for.
func (r *redisReader) stillRight(awaited map[*redisStream]bool) bool {
	found := 0
	for _, stream := range r.streams() {
		switch {
		case awaited[stream]:
			found++
		case stream.grouped && r.broker.roomFor(stream) > 0, !stream.grouped && time.Now().After(stream.retry):
			return false
		}
	}
	return found == len(awaited)
}

// interrupt ends the wait early; false where the user may not.
func (r *redisReader) interrupt() bool {
	err := r.client.ClientUnblock(r.ctx, r.clientID).Err()
	var refused redis.Error
	if errors.As(err, &refused) {
		r.broker.log.Info("streams are waited on for a second at a time: the user may not CLIENT UNBLOCK", "err", err.Error())
		r.clientID = 0
		return false
	}
	return true
}

// took deals with what a wait has brought.
func (r *redisReader) took(open []openStream, count int, read []redis.XStream, err error) error {
	var refused redis.Error
	switch {
	case errors.Is(err, redis.Nil): // time is up, or it was interrupted
		return nil
	case errors.As(err, &refused) && !r.useless(err):
		// It does not say which of them has gone.
		for _, o := range open {
			o.stream.grouped = false
		}
		if strings.Contains(err.Error(), "NOGROUP") || strings.HasPrefix(err.Error(), "UNBLOCKED") {
			return nil
		}
		return err // told, and tried again after a pause
	case err != nil:
		return err
	}
	var entries []*redisEntry
	for _, of := range read {
		i := slices.IndexFunc(open, func(o openStream) bool { return o.stream.subject == of.Stream })
		if i < 0 {
			continue
		}
		stream := open[i].stream
		stream.backlog = len(of.Messages) == count
		for _, m := range of.Messages {
			data, _ := m.Values[redisField].(string)
			entries = append(entries, &redisEntry{stream: stream, id: m.ID, data: data, attempt: 1})
		}
	}
	return r.hand(entries)
}
