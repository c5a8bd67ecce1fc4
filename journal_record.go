package main

// journal_record.go owns what the journal's records say: their encoding, and the replay that turns them back into the
// tasks that are not done. Replay takes nothing for granted: whatever the bytes are, it neither panics nor grows
// beyond the size of the file.

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"slices"
	"time"
)

// The kinds of records: the first byte of each payload.
const (
	recordTask     = 1 // a task with its whole state and data: on acceptance, and again when compaction moves it
	recordStarted  = 2
	recordReturned = 3
	recordRetrying = 4
	recordReleased = 5
	recordFinished = 6 // the taskFinished as JSON
	recordReported = 7
	recordOutcomes = 8 // everything the outcome memory held at this point
	recordAdopted  = 9
)

const (
	outcomesKept = 50_000
	outcomeBytes = 16 + 1 // hash of the id, status

	flagHeld = 1
)

// A runState is what has happened to a task since it was accepted.
type runState struct {
	attempts, crashes int
	failures          int // runs that failed and were to be followed by another
	due               time.Time
	process           processIdentity
	outcome           *taskFinished
	adopted           bool // the journal answers for it although its record says that the broker does
	unsynced          bool // the outcome is written but not known to be durable
}

func (r *runState) start(attempt int, p processIdentity) {
	r.attempts, r.process, r.due = attempt, p, time.Time{}
	r.crashes++
}

// end ends a start in an orderly way: it was no crash.
func (r *runState) end() {
	r.process, r.crashes = processIdentity{}, 0
}

// retry ends a start that failed and lets the task wait for the next.
func (r *runState) retry(due time.Time) {
	r.end()
	r.failures++
	r.due = due
}

// hasEnded reports whether the task of a state, which may be nil, has finished and is not reported yet.
func (r *runState) hasEnded() bool { return r != nil && r.outcome != nil }

func (r *runState) isAdopted() bool { return r != nil && r.adopted }

// newFrame begins a frame of a kind with room for size bytes of payload.
func newFrame(kind byte, size int) []byte {
	frame := make([]byte, frameHeaderBytes+1, frameHeaderBytes+1+size)
	frame[frameHeaderBytes] = kind
	return frame
}

func appendText[T string | []byte](b []byte, text T) []byte {
	return append(binary.AppendUvarint(b, uint64(len(text))), text...)
}

// taskFrame is a task with its whole state. order numbers tasks by acceptance.
func taskFrame(order uint64, t journalTask, data []byte) ([]byte, error) {
	var outcome []byte
	if t.Outcome != nil {
		var err error
		if outcome, err = json.Marshal(t.Outcome); err != nil {
			return nil, err
		}
	}
	b := newFrame(recordTask, 128+len(t.ID)+len(t.Subject)+len(t.Event)+len(outcome)+len(data))
	b = binary.AppendUvarint(b, order)
	var flags byte
	if t.Held {
		flags |= flagHeld
	}
	b = append(b, flags)
	b = appendText(b, t.ID)
	b = appendText(b, t.Subject)
	b = appendText(b, t.Event)
	b = binary.AppendVarint(b, nanos(t.CreatedAt))
	b = binary.AppendUvarint(b, uint64(t.Attempts))
	b = binary.AppendUvarint(b, uint64(t.Crashes))
	b = binary.AppendUvarint(b, uint64(t.Failures))
	b = binary.AppendVarint(b, nanos(t.Due))
	b = appendProcess(b, t.Process)
	b = appendText(b, outcome)
	return sealFrame(append(b, data...)), nil
}

// idFrame is a record that says no more than which task it is about.
func idFrame(kind byte, id string) []byte {
	return sealFrame(appendText(newFrame(kind, 4+len(id)), id))
}

func startedFrame(id string, attempt int, p processIdentity) []byte {
	b := appendText(newFrame(recordStarted, 32+len(id)+len(p.Start)+len(p.Boot)), id)
	b = binary.AppendUvarint(b, uint64(attempt))
	return sealFrame(appendProcess(b, p))
}

func retryingFrame(id string, due time.Time) []byte {
	b := appendText(newFrame(recordRetrying, 16+len(id)), id)
	return sealFrame(binary.AppendVarint(b, nanos(due)))
}

func finishedFrame(outcome taskFinished) ([]byte, error) {
	text, err := json.Marshal(outcome)
	if err != nil {
		return nil, err
	}
	return sealFrame(append(newFrame(recordFinished, len(text)), text...)), nil
}

func appendProcess(b []byte, p processIdentity) []byte {
	b = binary.AppendUvarint(b, uint64(p.PID))
	return appendText(appendText(b, p.Start), p.Boot)
}

// nanos is a time as nanoseconds since 1970; 0 is the zero time.
func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func fromNanos(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, n)
}

// A payloadReader takes a payload apart. After anything that is not there, bad is set and all else is zero.
type payloadReader struct {
	rest []byte
	bad  bool
}

func (r *payloadReader) uvarint() uint64 {
	v, n := binary.Uvarint(r.rest)
	return advance(r, v, n)
}

func (r *payloadReader) varint() int64 {
	v, n := binary.Varint(r.rest)
	return advance(r, v, n)
}

func advance[T uint64 | int64](r *payloadReader, v T, n int) T {
	if n <= 0 || r.bad {
		r.bad = true
		return 0
	}
	r.rest = r.rest[n:]
	return v
}

func (r *payloadReader) take(n uint64) []byte {
	if n > uint64(len(r.rest)) || r.bad {
		r.bad = true
		return nil
	}
	taken := r.rest[:n]
	r.rest = r.rest[n:]
	return taken
}

func (r *payloadReader) text() []byte { return r.take(r.uvarint()) }

// count is a small number.
func (r *payloadReader) count() int { return int(min(r.uvarint(), 1<<30)) }

func (r *payloadReader) process() processIdentity {
	return processIdentity{PID: r.count(), Start: string(r.text()), Boot: string(r.text())}
}

// A journalRecord is the payload of recordTask taken apart.
type journalRecord struct {
	order              uint64
	held               bool
	id, subject, event []byte
	created            int64
	run                *runState // nil when nothing has happened to it yet
	data               []byte
}

func readTaskRecord(payload []byte) (rec journalRecord, ok bool) {
	r := payloadReader{rest: payload, bad: len(payload) == 0}
	if kind := r.take(1); r.bad || kind[0] != recordTask {
		return rec, false
	}
	rec.order = r.uvarint()
	if flags := r.take(1); !r.bad {
		rec.held = flags[0]&flagHeld != 0
	}
	rec.id, rec.subject, rec.event = r.text(), r.text(), r.text()
	rec.created = r.varint()
	run := runState{attempts: r.count(), crashes: r.count(), failures: r.count(), due: fromNanos(r.varint()), process: r.process()}
	if outcome := r.text(); len(outcome) > 0 {
		run.outcome = new(taskFinished)
		if json.Unmarshal(outcome, run.outcome) != nil || !run.outcome.Status.final() {
			return rec, false
		}
	}
	if run != (runState{}) {
		rec.run = &run
	}
	rec.data = r.rest
	return rec, !r.bad && len(rec.id) > 0
}

// A replayedTask is what is kept of a task, and what the caller of openJournal wants to know besides.
type replayedTask struct {
	place          recordPlace
	run            *runState // nil when nothing has happened to it yet
	order          uint64
	subject, event string
	created        int64
	held           bool
}

// A journalReplay gathers what the records amount to.
type journalReplay struct {
	tasks     map[string]*replayedTask
	outcomes  outcomeMemory
	nextOrder uint64
	interned  map[string]string // subjects and events, which repeat
}

// apply adds a record; of two records of one task the later wins. What makes no sense is stepped over.
func (j *journalReplay) apply(place recordPlace, payload []byte) {
	if payload[0] == recordTask {
		rec, ok := readTaskRecord(payload)
		if !ok {
			return
		}
		j.tasks[string(rec.id)] = &replayedTask{
			place: place, run: rec.run, order: rec.order, created: rec.created, held: rec.held,
			subject: j.intern(rec.subject), event: j.intern(rec.event),
		}
		if rec.order < 1<<62 {
			j.nextOrder = max(j.nextOrder, rec.order+1)
		}
		return
	}

	r := payloadReader{rest: payload[1:]}
	switch payload[0] {
	case recordOutcomes:
		j.outcomes = outcomeMemory{}
		for len(r.rest) >= outcomeBytes {
			entry := r.take(outcomeBytes)
			j.outcomes.add([16]byte(entry), entry[16])
		}
		return
	case recordFinished:
		outcome := new(taskFinished)
		if json.Unmarshal(r.rest, outcome) != nil || !outcome.Status.final() {
			return
		}
		j.outcomes.remember(outcome.TaskID, outcome.Status)
		if t := j.tasks[outcome.TaskID]; t != nil {
			run := t.changed()
			run.end()
			run.outcome = outcome
		}
		return
	}

	id := r.text()
	t := j.tasks[string(id)]
	if r.bad || t == nil {
		return
	}
	switch payload[0] {
	case recordStarted:
		if attempt, p := r.count(), r.process(); !r.bad {
			p.Boot = j.intern([]byte(p.Boot))
			t.changed().start(attempt, p)
		}
	case recordReturned:
		t.changed().end()
	case recordRetrying:
		if due := r.varint(); !r.bad {
			t.changed().retry(fromNanos(due))
		}
	case recordAdopted:
		t.changed().adopted = true
	case recordReleased, recordReported:
		delete(j.tasks, string(id))
	}
}

// changed is the task's state, to be changed.
func (t *replayedTask) changed() *runState {
	if t.run == nil {
		t.run = new(runState)
	}
	return t.run
}

func (j *journalReplay) intern(text []byte) string {
	if known, ok := j.interned[string(text)]; ok {
		return known
	}
	fresh := string(text)
	if len(j.interned) < 1000 {
		j.interned[fresh] = fresh
	}
	return fresh
}

// list is the tasks in order of acceptance.
func (j *journalReplay) list() []journalTask {
	ids := make([]string, 0, len(j.tasks))
	for id := range j.tasks {
		ids = append(ids, id)
	}
	slices.SortFunc(ids, func(a, b string) int {
		if x, y := j.tasks[a].order, j.tasks[b].order; x < y {
			return -1
		} else if x > y {
			return 1
		}
		return 0
	})
	tasks := make([]journalTask, len(ids))
	for i, id := range ids {
		t := j.tasks[id]
		tasks[i] = journalTask{ID: id, Subject: t.subject, Event: t.event, Held: t.held && !t.run.isAdopted(),
			CreatedAt: fromNanos(t.created)}
		tasks[i].setRun(t.run)
	}
	return tasks
}

func (t *journalTask) setRun(run *runState) {
	if run != nil {
		t.Attempts, t.Crashes, t.Failures = run.attempts, run.crashes, run.failures
		t.Due, t.Process, t.Outcome = run.due, run.process, run.outcome
	}
}

// An outcomeMemory knows how the last tasks ended, by a hash of their ids. The zero value is ready.
type outcomeMemory struct {
	status map[[16]byte]byte
	ring   [][16]byte // in order of finishing, from next on once it is full
	next   int
}

// outcomeStatuses gives each final status its byte on disk, by position.
var outcomeStatuses = [...]taskStatus{"", statusFinish, statusError, statusTimeout, statusTerminate}

func hashID(id string) [16]byte {
	sum := sha256.Sum256([]byte(id))
	return [16]byte(sum[:16])
}

func (m *outcomeMemory) remember(id string, status taskStatus) {
	m.add(hashID(id), byte(slices.Index(outcomeStatuses[:], status)))
}

func (m *outcomeMemory) add(hash [16]byte, status byte) {
	if status == 0 || int(status) >= len(outcomeStatuses) {
		return
	}
	if m.status == nil {
		m.status = make(map[[16]byte]byte)
	}
	if _, known := m.status[hash]; !known {
		if len(m.ring) < outcomesKept {
			m.ring = append(m.ring, hash)
		} else {
			delete(m.status, m.ring[m.next])
			m.ring[m.next] = hash
			m.next = (m.next + 1) % outcomesKept
		}
	}
	m.status[hash] = status
}

func (m *outcomeMemory) of(id string) (taskStatus, bool) {
	status, ok := m.status[hashID(id)]
	return outcomeStatuses[status], ok
}

// frame is the whole memory, oldest first.
func (m *outcomeMemory) frame() []byte {
	b := newFrame(recordOutcomes, len(m.ring)*outcomeBytes)
	for i := range m.ring {
		hash := m.ring[(m.next+i)%len(m.ring)]
		b = append(append(b, hash[:]...), m.status[hash])
	}
	return sealFrame(b)
}
