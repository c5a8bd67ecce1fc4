package main

// exec_output.go carries a command's output from its pipes to the output callback: in few calls, soon, in order, and
// with one buffer per stream however much there is.

import (
	"errors"
	"os"
	"sync"
	"time"
	"unicode/utf8"
)

const (
	// outputGather is how long the first bytes of a chunk wait for more, so that a chatty command makes few calls.
	outputGather = 50 * time.Millisecond
	// outputSilence without data from a process outside the group means that no more is to be expected from it.
	outputSilence = 100 * time.Millisecond
	// outputStragglers is how long such a process is listened to at most.
	outputStragglers = time.Second
)

// An outputReader reads one stream of a command.
type outputReader struct {
	stream outputStream
	pipe   *os.File
	done   chan struct{} // closed when everything has been handed over

	waits bool // whether the pipe's reads can be given a deadline

	// Of whoever reads: endsBy, and then copy or handOver.
	buffer *[]byte
	held   int       // bytes of buffer that have not been handed over
	gather time.Time // until when the chunk waits for more; zero: it has not begun
	ended  bool      // the stream has

	mu       sync.Mutex // guards what follows and the pipe's deadline
	deadline time.Time  // set on the pipe; zero: none
	groupEnd time.Time  // when the group was gone; zero while it lives
}

func newOutputReader(stream outputStream, pipe *os.File) *outputReader {
	waits := pipe.SetReadDeadline(time.Time{}) == nil
	return &outputReader{stream: stream, pipe: pipe, done: make(chan struct{}), waits: waits}
}

// endsBy reads until a time and reports whether the stream has ended by then, with what it said in the buffer. Neither
// more than that nor a longer stream is read.
func (r *outputReader) endsBy(until time.Time, shared *spawner) bool {
	if !r.waits || r.pipe.SetReadDeadline(until) != nil {
		return false
	}
	r.deadline = until
	r.buffer = shared.buffer()
	for r.held < len(*r.buffer) {
		n, err := r.pipe.Read((*r.buffer)[r.held:])
		r.took(n)
		if err != nil {
			r.ended = !errors.Is(err, os.ErrDeadlineExceeded)
			return r.ended
		}
	}
	return false
}

// took counts what was read. The chunk waits for more from its first byte on.
func (r *outputReader) took(n int) {
	if r.held += n; n > 0 && r.gather.IsZero() {
		r.gather = time.Now().Add(outputGather)
	}
}

// handOver ends the reading of a stream that has ended.
func (r *outputReader) handOver(shared *spawner, output func(outputStream, []byte)) {
	if r.held > 0 {
		output(r.stream, (*r.buffer)[:r.held])
	}
	shared.putBuffer(r.buffer)
	r.pipe.Close()
	close(r.done)
}

// copy hands over the stream until its end. When the group is gone but something outside it keeps the pipe open, the
// end is reached once everything that was in the pipe has been read and no more follows, or follows for too long.
func (r *outputReader) copy(shared *spawner, output func(outputStream, []byte)) {
	defer r.handOver(shared, output)
	if r.buffer == nil {
		r.buffer = shared.buffer()
	}
	buf := *r.buffer

	caughtUp := false // whether all that was written while the group lived has been read
	for !r.ended {
		groupEnd := r.setDeadline(r.gather)
		space := len(buf) - r.held
		n, err := r.pipe.Read(buf[r.held:])
		timedOut := errors.Is(err, os.ErrDeadlineExceeded)
		if timedOut && !groupEnd.IsZero() {
			// The deadline may have passed before the system was asked at all, on a busy machine: ask it once more.
			if n = readReady(r.pipe, buf[r.held:]); n > 0 {
				timedOut, err = false, nil
			}
		}
		r.took(n)

		r.ended = err != nil && !timedOut
		if !groupEnd.IsZero() {
			caughtUp = caughtUp || n < space
			r.ended = r.ended || timedOut || caughtUp && time.Since(groupEnd) > outputStragglers
		}
		if r.ended || !timedOut && r.held < len(buf) && r.waits {
			continue
		}
		if whole := r.held - cutCharacter(buf[:r.held]); whole > 0 {
			output(r.stream, buf[:whole])
			r.held = copy(buf, buf[whole:r.held])
		}
		r.gather = time.Time{}
	}
}

// setDeadline prepares the next read: until gather while the group lives, for a short silence when it is gone.
func (r *outputReader) setDeadline(gather time.Time) (groupEnd time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.waits {
		return r.groupEnd
	}
	if !r.groupEnd.IsZero() {
		r.pipe.SetReadDeadline(time.Now().Add(outputSilence))
	} else if !gather.Equal(r.deadline) {
		r.deadline = gather
		r.pipe.SetReadDeadline(gather)
	}
	return r.groupEnd
}

// finish tells the reader that the group is gone. It does not wait.
func (r *outputReader) finish() {
	select {
	case <-r.done:
		return
	default:
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.groupEnd = time.Now()
	if r.waits {
		r.pipe.SetReadDeadline(r.groupEnd.Add(outputSilence))
	} else {
		time.AfterFunc(outputStragglers, func() { r.pipe.Close() })
	}
}

// cutCharacter counts the bytes at the end of data that begin a UTF-8 character without completing it.
func cutCharacter(data []byte) int {
	for n := 1; n < utf8.UTFMax && n <= len(data); n++ {
		tail := data[len(data)-n:]
		if utf8.RuneStart(tail[0]) {
			if utf8.FullRune(tail) {
				return 0
			}
			return n
		}
	}
	return 0
}
