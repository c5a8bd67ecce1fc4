package main

// event_feed.go hands the events of the bus to the readers of /events. They are put into words once, in memory that all
// readers share: each only has a place in it. A reader that cannot keep up is dropped; it never slows who publishes.

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"
	"unicode/utf8"
)

const (
	maxEventReaders   = 256
	maxEventBacklog   = 4 << 20 // bytes that a reader may be behind
	eventSegmentBytes = 256 << 10
	eventTailBytes    = 1 << 10 // of each piece of output, for readers that want no more

	// The least time between two writes to one reader: readers must not slow the tasks down that they look at.
	minEventPace = 200 * time.Millisecond
	eventPace    = 5 * time.Millisecond // for each reader there is
)

// An eventFeed has a stream of whole events, and one with the tails of output only.
type eventFeed struct {
	unsubscribe func()

	mu          sync.Mutex // guards all below
	lastID      uint64     // of the last event, also when nobody read it: a gap shows that something was missed
	whole, tail eventStream
	readers     map[*eventReader]bool
	idle        map[*eventReader]bool // those that have read everything and want to be woken
	followers   int
	dropped     uint64 // readers that could not keep up
	closed      bool
}

// An eventStream is what its readers read, from the oldest one's place on. The feed's lock guards it.
type eventStream struct {
	readers int
	last    *eventSegment // nil while nobody reads
	written int64         // bytes, ever
}

// An eventSegment is a piece of a stream. What has been written into it never changes, so it is read without a lock.
type eventSegment struct {
	data []byte // grows within its capacity
	next *eventSegment
}

// append adds frames to the stream, and reports whether that took a new segment.
func (s *eventStream) append(frame []byte) (grown bool) {
	s.written += int64(len(frame))
	if len(s.last.data)+len(frame) > cap(s.last.data) {
		s.last.next = &eventSegment{data: make([]byte, 0, max(eventSegmentBytes, len(frame)))}
		s.last, grown = s.last.next, true
	}
	s.last.data = append(s.last.data, frame...)
	return grown
}

// An eventReader is one reader: its place in its stream. The feed's lock guards it.
type eventReader struct {
	feed    *eventFeed
	stream  *eventStream
	segment *eventSegment // nil when it was dropped
	offset  int           // in the segment
	read    int64         // bytes of the stream before its place
	ready   chan struct{} // holds a value when there is something to take
}

func newEventFeed(bus *eventBus) *eventFeed {
	f := &eventFeed{readers: map[*eventReader]bool{}, idle: map[*eventReader]bool{}}
	f.unsubscribe = bus.subscribe(f.handle)
	return f
}

// handle takes an event of the bus. It returns at once, whatever the readers do.
func (f *eventFeed) handle(e event) {
	output, isOutput := e.(taskOutput)
	long := isOutput && len(output.Data) > eventTailBytes
	f.mu.Lock()
	whole, tail := f.whole.readers > 0, f.tail.readers > 0
	if !whole && !tail {
		f.lastID++
		f.mu.Unlock()
		return
	}
	f.mu.Unlock()
	// Not under the lock, as it takes a while. Who enters meanwhile reads from the next event on.
	var wholeData, tailData []byte
	if whole || !long {
		wholeData = marshalEvent(e)
		tailData = wholeData
	}
	if tail && long {
		output.Data = output.Data[len(output.Data)-eventTailBytes:]
		for len(output.Data) > 0 && !utf8.RuneStart(output.Data[0]) {
			output.Data = output.Data[1:]
		}
		tailData = marshalEvent(output)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lastID++
	grown := false
	if whole && f.whole.readers > 0 && wholeData != nil {
		grown = f.whole.append(eventFrame(f.lastID, e, wholeData))
	}
	if tail && f.tail.readers > 0 && tailData != nil {
		grown = f.tail.append(eventFrame(f.lastID, e, tailData)) || grown
	}
	if grown {
		f.dropLaggards()
	}
	for reader := range f.idle {
		reader.wake()
	}
	clear(f.idle)
}

// dropLaggards drops the readers that are too far behind, so that what they have not read need not be kept.
func (f *eventFeed) dropLaggards() {
	for reader := range f.readers {
		if reader.stream.written-reader.read > maxEventBacklog {
			f.dropped++
			f.drop(reader)
		}
	}
}

// marshalEvent gives an event as JSON, nil if that is impossible.
func marshalEvent(e event) []byte {
	data, err := json.Marshal(eventData(e))
	if err != nil {
		return nil
	}
	return data
}

// eventFrame is an event as it is sent.
func eventFrame(id uint64, e event, data []byte) []byte {
	return fmt.Appendf(nil, "id: %d\nevent: %s\ndata: %s\n\n", id, e.eventName(), data)
}

// eventData is an event as readers see it: output with its text, times in milliseconds.
func eventData(e event) any {
	switch e := e.(type) {
	case taskOutput:
		return struct {
			taskOutput
			Data string `json:"data"`
		}{e, string(e.Data)}
	case taskFinished:
		return struct {
			taskFinished
			CPU   *int  `json:"CPU,omitempty"` // hides the duration
			CPUMS int64 `json:"cpu_ms"`
		}{e, nil, e.CPU.Milliseconds()}
	}
	return e
}

func (f *eventFeed) enter(tail bool) (*eventReader, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.readers) >= maxEventReaders || f.closed {
		return nil, tooManyReaders("read events")
	}
	stream := &f.whole
	if tail {
		stream = &f.tail
	}
	if stream.readers++; stream.last == nil {
		stream.last = &eventSegment{data: make([]byte, 0, eventSegmentBytes)}
	}
	reader := &eventReader{
		feed: f, stream: stream, segment: stream.last, offset: len(stream.last.data), read: stream.written,
		ready: make(chan struct{}, 1),
	}
	f.readers[reader] = true
	return reader, nil
}

// leave takes a reader out, if it is still in.
func (f *eventFeed) leave(reader *eventReader) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.drop(reader)
}

// drop ends a reader and lets go of what waits for it. The lock is held.
func (f *eventFeed) drop(reader *eventReader) {
	if !f.readers[reader] {
		return
	}
	delete(f.readers, reader)
	delete(f.idle, reader)
	reader.segment = nil
	if reader.stream.readers--; reader.stream.readers == 0 {
		reader.stream.last = nil
	}
	reader.wake()
}

func (f *eventFeed) enterFollow() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.followers >= maxFollowers || f.closed {
		return tooManyReaders("follow log")
	}
	f.followers++
	return nil
}

func (f *eventFeed) leaveFollow() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.followers--
}

// count gives how many read events and follow logs now, and how many readers of events have been dropped.
func (f *eventFeed) count() (readers, followers int, dropped uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.readers), f.followers, f.dropped
}

// pace is how long a reader waits after a write: the more readers there are, the longer, for what costs is not the bytes
// so much as the writes and the readers that wake up for them.
func (f *eventFeed) pace() time.Duration {
	readers, _, _ := f.count()
	return max(minEventPace, time.Duration(readers)*eventPace)
}

func tooManyReaders(op string) error {
	return httpError{http.StatusServiceUnavailable, fail(codeHTTPReaders, op, errors.New("too many readers already"))}
}

// close ends all readers.
func (f *eventFeed) close() {
	f.unsubscribe()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	for reader := range f.readers {
		f.drop(reader)
	}
}

// take gives the next of what waits, nothing if nothing does, and whether there may be more.
func (r *eventReader) take() (chunk []byte, more bool) {
	r.feed.mu.Lock()
	defer r.feed.mu.Unlock()
	if r.segment == nil {
		return nil, false
	}
	if r.offset == len(r.segment.data) && r.segment.next != nil {
		r.segment, r.offset = r.segment.next, 0
	}
	chunk = r.segment.data[r.offset:]
	r.offset += len(chunk)
	r.read += int64(len(chunk))
	if len(chunk) == 0 {
		r.feed.idle[r] = true
	}
	return chunk, true
}

func (r *eventReader) wake() {
	select {
	case r.ready <- struct{}{}:
	default:
	}
}
