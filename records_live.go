package main

// records_live.go is the records' part for tasks that have not finished: what the bus says of them, the log that grows
// and those who follow it, up to the line that a finished task becomes.

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	recordErrorBytes = 32 << 10 // of a task's error, the end is kept
	followBytes      = 64 << 10 // read at once for a follower
)

// errReleased ends a follower of a task that was given back to its broker: it will go on elsewhere or later.
var errReleased = errors.New("the task was given back unfinished")

// A liveTask is a task that has not finished.
type liveTask struct {
	id     string
	folder atomic.Bool // it has a folder

	mu        sync.Mutex // guards all below
	started   bool       // else only its data is known, and the worker still lists it as queued
	ended     bool
	released  bool   // ended here without having finished
	record    record // without what lies in the folder
	data      []byte // nil when it is in the folder
	output    *taskLog
	announced int           // the attempt that the log says will follow
	changed   chan struct{} // closed at the next output or at the end; nil when nobody waits
}

// keepData remembers a task's data for a replay. It is called before the task starts; data must not change after it.
// Large data is on disk on return, and an error then means that there can be no replay.
func (r *records) keepData(id string, data []byte) error {
	if !validTaskID(id) {
		return fail(codeRecordTaskID, "keep data of a task", errTaskID)
	}
	if len(data) == 0 {
		return nil
	}
	t := r.liveTask(id)
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(data) <= inlineDataBytes && json.Valid(data) {
		t.data = data
		return nil
	}
	t.data = nil
	return r.writeFolderFile(id, dataFile, data)
}

// release forgets a live task that was given back to its broker and will end elsewhere or later; what it left on disk
// stays for its next start here.
func (r *records) release(id string) {
	r.mu.Lock()
	t := r.live[id]
	delete(r.live, id)
	r.mu.Unlock()
	if t != nil {
		t.mu.Lock()
		t.released = true
		t.end()
		t.mu.Unlock()
	}
}

func (r *records) taskQueued(e taskQueued) {
	t := r.lookLive(e.TaskID)
	if t != nil {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.record.Status = statusQueued
	}
}

func (r *records) taskStarted(e taskStarted) {
	if !validTaskID(e.TaskID) {
		return
	}
	t := r.liveTask(e.TaskID)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.started = true
	rec := &t.record
	rec.TaskID, rec.Event, rec.Name, rec.Status = e.TaskID, e.Event, e.Name, statusRunning
	rec.Attempt, rec.PID, rec.CreatedAt, rec.StartedAt = e.Attempt, e.PID, timeOrNil(e.CreatedAt), timeOrNil(e.At)
	if e.Attempt > 1 && t.announced != e.Attempt {
		r.separate(t, e.Attempt, attemptResumes(e.Attempt))
	}
}

func (r *records) taskOutput(e taskOutput) {
	t := r.lookLive(e.TaskID)
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ended {
		return
	}
	t.record.OutputBytes += int64(len(e.Data))
	r.wrote(r.appendLog(t, e.Data))
}

func (r *records) taskRetrying(e taskRetrying) {
	t := r.lookLive(e.TaskID)
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ended {
		return
	}
	t.record.Status = statusQueued
	r.separate(t, e.Attempt+1, attemptFailed(e.Attempt, e.Reason))
}

// separate writes a line between two attempts into t's log. t.mu is held.
func (r *records) separate(t *liveTask, next int, line string) {
	t.announced = next
	if t.output != nil && t.output.total > 0 && t.output.lastByte != '\n' {
		line = "\n" + line
	}
	r.wrote(r.appendLog(t, []byte(line)))
}

// appendLog writes to t's log, which comes into being with the first output. t.mu is held.
func (r *records) appendLog(t *liveTask, data []byte) error {
	if t.output == nil {
		r.mu.Lock()
		limit := r.retain.Log
		r.mu.Unlock()
		t.output = newTaskLog(r.folder(t.id), limit, r.logSlots)
	}
	if !t.folder.Load() {
		if err := r.makeFolder(t.id); err != nil {
			t.output.skip(len(data))
			return err
		}
	}
	err := t.output.write(data)
	t.wake()
	return err
}

func (r *records) taskFinished(e taskFinished) {
	if !validTaskID(e.TaskID) || !e.Status.final() {
		return
	}
	t := r.lookLive(e.TaskID)
	rec := record{
		TaskID: e.TaskID, Event: e.Event, Name: e.Name, Status: e.Status, Attempt: e.Attempt, ExitCode: e.ExitCode,
		Signal: e.Signal, PID: e.PID, CreatedAt: timeOrNil(e.CreatedAt), StartedAt: timeOrNil(e.StartedAt),
		FinishedAt: timeOrNil(e.FinishedAt), CPUMS: e.CPU.Milliseconds(), MaxRSS: e.MaxRSS, Error: lastBytes(e.Error),
	}
	rec.DurationMS = durationMS(rec.StartedAt, rec.FinishedAt)
	var data []byte
	var hasFolder bool
	if t != nil {
		t.mu.Lock()
		t.end()
		rec.OutputBytes, data = t.record.OutputBytes, t.data
		t.mu.Unlock()
	} else if r.folderExists(e.TaskID) { // left by a worker that died between the journal's word and ours
		hasFolder = true
		if segments, err := readLogSegments(r.folder(e.TaskID)); err == nil {
			rec.OutputBytes = logEnd(segments)
		}
	}
	line, err := storedLine(rec, data)
	if err != nil { // a time that JSON cannot hold
		r.wrote(err)
		r.release(e.TaskID)
		return
	}
	entry := &indexEntry{
		id: e.TaskID, event: e.Event, status: e.Status, line: line, folder: hasFolder,
		created: unixNano(rec.CreatedAt), finished: unixNano(rec.FinishedAt),
	}
	r.mu.Lock()
	if t := r.live[e.TaskID]; t != nil && t.folder.Load() {
		entry.folder = true
	}
	err = r.index.add(entry)
	delete(r.live, e.TaskID)
	r.announce()
	r.mu.Unlock()
	r.wrote(err)
	r.prune()
}

// lookLive gives the live task of that id, nil if there is none.
func (r *records) lookLive(id string) *liveTask {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.live[id]
}

// liveTask gives the live task of that id, which comes into being if need be.
func (r *records) liveTask(id string) *liveTask {
	r.mu.Lock()
	defer r.mu.Unlock()
	if t := r.live[id]; t != nil {
		return t
	}
	t := &liveTask{id: id}
	if r.folderExists(id) { // an earlier attempt's, before a crash
		t.folder.Store(true)
		if segments, err := readLogSegments(r.folder(id)); err == nil && len(segments) > 0 {
			t.output = newTaskLog(r.folder(id), r.retain.Log, r.logSlots)
			t.output.resume(segments)
			t.record.OutputBytes = t.output.total
		}
	}
	r.live[id] = t
	r.announce()
	return t
}

// announce wakes who waits for a task to become known. r.mu is held.
func (r *records) announce() {
	if r.appeared != nil {
		close(r.appeared)
		r.appeared = nil
	}
}

// awaitTask waits until a task of that id is live or has finished; a finished one gives nil.
func (r *records) awaitTask(ctx context.Context, id string) (*liveTask, error) {
	for {
		r.mu.Lock()
		t, finished := r.live[id], r.index.byID[id] != nil
		if t != nil || finished {
			r.mu.Unlock()
			return t, nil
		}
		if r.appeared == nil {
			r.appeared = make(chan struct{})
		}
		appeared := r.appeared
		r.mu.Unlock()
		select {
		case <-appeared:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// end closes the log and wakes the followers for the last time. t.mu is held.
func (t *liveTask) end() {
	t.ended = true
	if t.output != nil {
		t.output.close()
	}
	t.wake()
}

// wake tells the followers that there is something new. t.mu is held.
func (t *liveTask) wake() {
	if t.changed != nil {
		close(t.changed)
		t.changed = nil
	}
}

// follow copies the log to w as it grows, until the task has ended.
func (t *liveTask) follow(ctx context.Context, dir string, w io.Writer, flush func()) error {
	buffer := make([]byte, followBytes)
	var at int64            // how far it has come
	unreadable := int64(-1) // where reading failed once
	for {
		segment, total, wait := t.logAt(at)
		switch {
		case at == total && wait == nil:
			return t.howEnded()
		case at == total:
			select {
			case <-wait:
			case <-ctx.Done():
				return ctx.Err()
			}
		case segment.start <= at && unreadable != at:
			n := readAt(filepath.Join(dir, segment.name()), buffer[:min(int64(len(buffer)), segment.end()-at)], at-segment.start)
			if n == 0 { // let go between the look and the read, or lost: another look tells
				unreadable = at
				continue
			}
			if _, err := w.Write(buffer[:n]); err != nil {
				return err
			}
			at += int64(n)
			flush()
		default:
			next := segment.start
			if next <= at {
				next = segment.end()
			}
			if _, err := io.WriteString(w, missing(next-at)); err != nil {
				return err
			}
			at = next
			flush()
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}

// howEnded is nil for a task that has finished here.
func (t *liveTask) howEnded() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.released {
		return errReleased
	}
	return nil
}

// logAt looks at the log for a follower that has come as far as at: the segment that holds the next byte, or else the
// one after the hole; how long the log is; and, when there is nothing new, a channel that is closed when there may be,
// nil when the task has ended.
func (t *liveTask) logAt(at int64) (segment logSegment, total int64, wait <-chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.output != nil {
		total = t.output.total
		segment = logSegment{start: total}
		for _, s := range t.output.segments {
			if s.end() > at {
				segment = s
				break
			}
		}
	}
	if at == total && !t.ended {
		if t.changed == nil {
			t.changed = make(chan struct{})
		}
		wait = t.changed
	}
	return segment, total, wait
}

// readAt gives how many bytes it could read.
func readAt(path string, data []byte, offset int64) int {
	file, err := os.Open(path)
	if err != nil {
		return 0
	}
	defer file.Close()
	n, _ := file.ReadAt(data, offset)
	return n
}

func durationMS(from, to *time.Time) int64 {
	if from == nil || to == nil {
		return 0
	}
	return max(0, to.Sub(*from).Milliseconds())
}

// lastBytes gives the end of a task's error, in whole characters.
func lastBytes(text string) string {
	if len(text) > recordErrorBytes {
		text = text[len(text)-recordErrorBytes:]
	}
	return strings.ToValidUTF8(text, "")
}
