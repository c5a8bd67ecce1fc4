package main

// httpapi_follow.go serves the answers that have no end of their own: the log of a running task, and /events. A reader
// that cannot keep up with events is dropped; it never slows who publishes them.

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"
	"unicode/utf8"
)

const (
	maxFollowers    = 256 // logs being followed at once
	maxEventReaders = 256
	maxEventBacklog = 4 << 20 // bytes that wait for one reader

	// eventPace is the least time between two writes to one reader: hundreds of them must not slow the tasks down that
	// they look at.
	eventPace      = 100 * time.Millisecond
	eventHeartbeat = 15 * time.Second
	eventTailBytes = 1 << 10          // of each piece of output, for readers that want no more
	followTimeout  = 10 * time.Minute // a reader of a log may pause that long
)

// showLog is GET /job/{task_id}/log.
func (a *apiServer) showLog(w http.ResponseWriter, r *http.Request) error {
	rec, err := a.recordOf(r)
	if err != nil {
		return err
	}
	follow := false
	switch r.URL.Query().Get("follow") {
	case "", "false", "0":
	case "true", "1":
		follow = r.Method != http.MethodHead
	default:
		return badRequest("show log", errors.New("follow must be true or false"))
	}
	reply := w.(*apiReply)
	if follow {
		if err := a.feed.enterFollow(); err != nil {
			return err
		}
		defer a.feed.leaveFollow()
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		reply.timeout = followTimeout
		reply.flush()
		return a.records.Load().followLog(r.Context(), rec.TaskID, reply, reply.flush)
	}
	log, err := a.records.Load().openLog(rec.TaskID)
	if errors.Is(err, errTaskUnknown) { // it has not started
		log, err = newLogReader("", nil, 0), nil
	}
	if err != nil {
		return err
	}
	defer log.Close()
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(http.StatusOK)
	if r.Method == http.MethodHead {
		return nil
	}
	_, err = io.Copy(reply, log)
	return err
}

// showEvents is GET /events: the events of the bus as server-sent events, numbered, from now on. With output=tail a
// piece of output comes as its last eventTailBytes only: enough to show what a task is at, however much it prints.
func (a *apiServer) showEvents(w http.ResponseWriter, r *http.Request) error {
	tail := false
	switch r.URL.Query().Get("output") {
	case "", "all":
	case "tail":
		tail = true
	default:
		return badRequest("read events", errors.New("output must be all or tail"))
	}
	reply := w.(*apiReply)
	w.Header().Set("Content-Type", "text/event-stream")
	if r.Method == http.MethodHead {
		w.WriteHeader(http.StatusOK)
		return nil
	}
	reader, err := a.feed.enter(tail)
	if err != nil {
		w.Header().Del("Content-Type")
		return err
	}
	defer a.feed.leave(reader)
	reply.flush()
	heartbeat := time.NewTicker(eventHeartbeat)
	defer heartbeat.Stop()
	for {
		frames, more := reader.take()
		if len(frames) > 0 {
			if _, err := reply.Write(bytes.Join(frames, nil)); err != nil {
				return err
			}
			reply.flush()
			select {
			case <-time.After(eventPace):
			case <-r.Context().Done():
				return nil
			}
			continue
		}
		if !more {
			return nil
		}
		select {
		case <-reader.ready:
		case <-r.Context().Done():
			return nil
		case <-heartbeat.C:
			if _, err := io.WriteString(reply, ":\n\n"); err != nil {
				return err
			}
			reply.flush()
		}
	}
}

// An eventFeed hands the events of the bus to the readers of /events.
type eventFeed struct {
	unsubscribe func()

	mu        sync.Mutex // guards all below
	lastID    uint64     // of the last event, also when nobody read it: a gap shows that something was missed
	readers   map[*eventReader]bool
	tails     int // readers that want the tail of output only
	followers int
	dropped   uint64 // readers that could not keep up
	closed    bool
}

// An eventReader is one reader: what waits for it. The feed's lock guards it.
type eventReader struct {
	feed    *eventFeed
	tail    bool // of each piece of output, its end is enough
	waiting [][]byte
	bytes   int
	dropped bool
	ready   chan struct{} // holds a value when there is something to take
}

func newEventFeed(bus *eventBus) *eventFeed {
	f := &eventFeed{readers: map[*eventReader]bool{}}
	f.unsubscribe = bus.subscribe(f.handle)
	return f
}

// handle takes an event of the bus. It returns at once, whatever the readers do.
func (f *eventFeed) handle(e event) {
	output, isOutput := e.(taskOutput)
	long := isOutput && len(output.Data) > eventTailBytes
	f.mu.Lock()
	whole, cut := len(f.readers) > 0, long && f.tails > 0
	if cut {
		whole = len(f.readers) > f.tails
	}
	if !whole && !cut {
		f.lastID++
		f.mu.Unlock()
		return
	}
	f.mu.Unlock()
	// Not under the lock, as it takes a while. Who enters meanwhile reads from the next event on.
	var wholeData, cutData []byte
	if whole {
		wholeData = marshalEvent(e)
	}
	if cut {
		output.Data = output.Data[len(output.Data)-eventTailBytes:]
		for len(output.Data) > 0 && !utf8.RuneStart(output.Data[0]) {
			output.Data = output.Data[1:]
		}
		cutData = marshalEvent(output)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lastID++
	wholeFrame, cutFrame := eventFrame(f.lastID, e, wholeData), eventFrame(f.lastID, e, cutData)
	for reader := range f.readers {
		frame := wholeFrame
		if long && reader.tail {
			frame = cutFrame
		}
		if frame == nil {
			continue
		}
		if reader.bytes+len(frame) > maxEventBacklog {
			reader.drop()
			f.dropped++
			continue
		}
		reader.waiting = append(reader.waiting, frame)
		reader.bytes += len(frame)
		reader.wake()
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

// eventFrame is an event as it is sent, nil without data.
func eventFrame(id uint64, e event, data []byte) []byte {
	if data == nil {
		return nil
	}
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
	reader := &eventReader{feed: f, tail: tail, ready: make(chan struct{}, 1)}
	f.readers[reader] = true
	if tail {
		f.tails++
	}
	return reader, nil
}

func (f *eventFeed) leave(reader *eventReader) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.remove(reader)
}

// remove takes a reader out, if it is still in. The lock is held.
func (f *eventFeed) remove(reader *eventReader) {
	if f.readers[reader] && reader.tail {
		f.tails--
	}
	delete(f.readers, reader)
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
		reader.drop()
	}
}

// take gives the frames that wait, and whether there may be more.
func (r *eventReader) take() (frames [][]byte, more bool) {
	r.feed.mu.Lock()
	defer r.feed.mu.Unlock()
	frames, r.waiting, r.bytes = r.waiting, nil, 0
	return frames, !r.dropped
}

// drop ends a reader and forgets what waits for it. The feed's lock is held.
func (r *eventReader) drop() {
	r.dropped = true
	r.waiting, r.bytes = nil, 0
	r.feed.remove(r)
	r.wake()
}

func (r *eventReader) wake() {
	select {
	case r.ready <- struct{}{}:
	default:
	}
}
