package main

// journal.go owns what was accepted, started, finished and reported, on disk: no accepted task is lost and no finished
// one forgotten, through any crash. It is an append-only log in numbered files (journal_segment.go); tasks' data stays
// there and only a line per task is in memory. What a task does, and when it may run, is the worker's affair.

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// errJournalBusy: another process holds the journal.
var errJournalBusy = errors.New("another process holds it")

// A journalTask is an unfinished task, or a finished one that has not been reported.
type journalTask struct {
	ID, Subject, Event string // Event: the job's event
	Held               bool   // the broker keeps it too, so accepting it is not synced
	CreatedAt          time.Time
	Attempts           int             // starts so far
	Crashes            int             // starts in a row that ended neither by finished, returned nor retrying
	Failures           int             // runs that failed and were followed by a retry
	Due                time.Time       // not before (retry pause); zero: now
	Process            processIdentity // of the last start that has no end; zero if none
	Outcome            *taskFinished   // set when finished but not reported
}

// A journal is open until close. All methods may be called concurrently; entries of one task are kept in call order.
type journal struct {
	dir   string
	sizes journalSizes
	lock  *os.File
	order atomic.Uint64  // of the next task
	wrap  func(*segment) // tests put failing files in; nil otherwise

	mu           sync.Mutex             // guards all below, and what the segments and the tasks hold
	segments     []*segment             // oldest first; the last is written to
	tasks        map[string]recordPlace // the live ones: where their records lie
	mostTasks    int                    // for shrunk
	runs         map[string]*runState   // what has happened to them since; most wait, and have none
	outcomes     outcomeMemory
	lastNumber   uint64 // of a segment
	liveBytes    int64  // of the live tasks' records
	batch        *syncBatch
	unsynced     []*segment
	folderDirty  bool     // a file was created since the last sync
	reserved     bool     // the reserve file is there
	cancelled    []string // accepted, but the sync failed: to be forgotten on disk too
	fault        error    // why the last write failed; nil when all is well
	closed       bool
	compactAfter time.Time
	counts       journalStats
	syncTimes    *histogram

	wake    chan struct{} // someone waits for a sync
	lazy    *time.Timer   // by then, what was written is to be synced
	retry   *time.Timer   // by then, a fault is to be looked after
	compact chan bool     // look for dead segments; true: the journal is idle
	stop    chan struct{} // closed to end compactLoop
	quit    chan struct{} // closed to end syncLoop
	loops   sync.WaitGroup
	syncing sync.WaitGroup
}

// journalSizes say when files are cut and thrown away, in bytes.
type journalSizes struct {
	segment     int64 // a segment longer than this is complete
	garbage     int64 // dead bytes above the live ones that are put up with
	idleGarbage int64 // the same when nothing is live and nothing happens
	reserve     int64 // kept free on disk, so that what is running can still finish when it is full
}

func defaultJournalSizes() journalSizes {
	return journalSizes{segment: 16 << 20, garbage: 24 << 20, idleGarbage: 1 << 20, reserve: 1 << 20}
}

const (
	maxTaskDataBytes = 16 << 20
	syncDelay        = time.Second
	tornKeptBytes    = 1 << 20
)

// journalStats is what there is to know about a journal from outside.
type journalStats struct {
	Bytes        int64 // on disk
	Segments     int
	Live         int    // tasks not reported yet
	Entries      uint64 // written since it was opened
	Syncs        uint64 // since it was opened
	SyncErrors   uint64 // since it was opened; likewise the next
	WriteErrors  uint64 // of any kind, syncs among them
	LastSyncAt   time.Time
	LastSyncTook time.Duration
	TornBytes    int64 // cut off at opening: a write that a crash interrupted, never acknowledged
	TornLost     bool  // no copy of them could be kept beside the journal
	DamagedBytes int64 // unreadable amid good records at opening: what they held is lost
}

// openJournal opens the journal in dir, or begins one, and gives the tasks it answers for in order of acceptance.
// errors.Is(err, errJournalBusy) when another process has it open.
func openJournal(dir string) (*journal, []journalTask, error) {
	return openJournalSized(dir, defaultJournalSizes())
}

func openJournalSized(dir string, sizes journalSizes) (j *journal, tasks []journalTask, err error) {
	failOpen := func(err error) error {
		switch op := "open journal " + strconv.Quote(dir); {
		case errors.Is(err, errJournalBusy):
			return fail(codeJournalBusy, op, err)
		case errors.Is(err, errSegmentVersion):
			return fail(codeJournalVersion, op, err)
		default:
			return fail(codeJournalOpen, op, err)
		}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, failOpen(err)
	}
	lock, err := lockFile(filepath.Join(dir, "lock"))
	if err != nil {
		return nil, nil, failOpen(err)
	}
	j = &journal{
		dir: dir, sizes: sizes, lock: lock,
		tasks: map[string]recordPlace{}, runs: map[string]*runState{}, syncTimes: newHistogram(syncBounds()),
		wake: make(chan struct{}, 1), compact: make(chan bool, 1),
		stop: make(chan struct{}), quit: make(chan struct{}),
		lazy: time.NewTimer(time.Hour), retry: time.NewTimer(time.Hour),
	}
	j.lazy.Stop()
	j.retry.Stop()
	if tasks, err = j.load(); err != nil {
		j.closeFiles()
		return nil, nil, failOpen(err)
	}
	if err := j.fillReserve(); err != nil {
		j.failed("reserve space for", err)
	}
	j.loops.Add(1)
	go func() { defer j.loops.Done(); j.compactLoop() }()
	j.syncing.Add(1)
	go func() { defer j.syncing.Done(); j.syncLoop() }()
	j.considerCompaction(true)
	return j, tasks, nil
}

// accept makes the journal answer for a task. It is durable on return, unless the broker holds it too: then it is only
// written. The process, outcome and counts of t are kept as they are.
func (j *journal) accept(t journalTask, data []byte) error {
	durable, err := j.enter(t, data)
	if err != nil {
		return err
	}
	return durable.wait()
}

// enter is accept that returns as soon as the task is written. It is accepted once durable has been waited for; should
// that fail, the journal has forgotten it.
func (j *journal) enter(t journalTask, data []byte) (durable *syncBatch, err error) {
	op := "accept task " + strconv.Quote(t.ID)
	if t.ID == "" {
		return nil, taskMisfit(op, errors.New("it has no id"))
	}
	if len(data) > maxTaskDataBytes {
		return nil, taskMisfit(op, fmt.Errorf("%d bytes of data, at most %d fit", len(data), maxTaskDataBytes))
	}
	frame, err := taskFrame(j.order.Add(1)-1, t, data)
	if err != nil {
		return nil, taskMisfit(op, err)
	}

	j.mu.Lock()
	if _, known := j.tasks[t.ID]; known {
		j.mu.Unlock()
		return nil, taskMisfit(op, errors.New("the journal holds it already"))
	}
	if !j.reserved && !j.closed {
		// What room is left belongs to the tasks that were accepted already.
		err := j.fault
		j.mu.Unlock()
		return nil, err
	}
	place, err := j.append(frame, false)
	if err != nil {
		j.mu.Unlock()
		return nil, err
	}
	run := runState{attempts: t.Attempts, crashes: t.Crashes, failures: t.Failures,
		due: t.Due, process: t.Process, outcome: t.Outcome}
	j.keep(t.ID, place)
	if run != (runState{}) {
		j.runs[t.ID] = &run
	}
	if t.Held {
		j.mu.Unlock()
		return nil, nil
	}
	batch := j.joinBatch()
	batch.accepted = append(batch.accepted, t.ID)
	j.mu.Unlock()
	return batch, nil
}

// adopt makes the journal answer for a task that until now the broker held. It is durable on return.
func (j *journal) adopt(id string) error {
	if err := j.change(id, "adopt", idFrame(recordAdopted, id), func(r *runState) { r.adopted = true }); err != nil {
		return err
	}
	j.mu.Lock()
	batch := j.joinBatch()
	j.mu.Unlock()
	return batch.wait()
}

// started notes the process of a task's start before it counts as started: written on return, so that it survives our
// own death, and synced within a second.
func (j *journal) started(id string, attempt int, p processIdentity) error {
	return j.change(id, "note start of", startedFrame(id, attempt, p), func(r *runState) { r.start(attempt, p) })
}

// returned puts a started task back through no fault of its own. Written on return.
func (j *journal) returned(id string) error {
	return j.change(id, "put back", idFrame(recordReturned, id), (*runState).end)
}

// retrying puts a started task back until due. Written on return.
func (j *journal) retrying(id string, due time.Time) error {
	return j.change(id, "put off", retryingFrame(id, due), func(r *runState) { r.retry(due) })
}

// change writes an entry about an unfinished task and changes its state accordingly.
func (j *journal) change(id, what string, frame []byte, apply func(*runState)) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if _, live := j.tasks[id]; !live || j.runs[id].hasEnded() {
		return taskMisfit(what+" task "+strconv.Quote(id), errors.New("the journal holds no such unfinished task"))
	}
	if _, err := j.append(frame, true); err != nil {
		return err
	}
	apply(j.run(id))
	return nil
}

// finished notes how a task ended. It is durable on return. After an error it may be called again.
func (j *journal) finished(outcome taskFinished) error {
	op := "finish task " + strconv.Quote(outcome.TaskID)
	if !outcome.Status.final() {
		return taskMisfit(op, fmt.Errorf("status %q is not final", outcome.Status))
	}
	frame, err := finishedFrame(outcome)
	if err != nil {
		return taskMisfit(op, err)
	}

	j.mu.Lock()
	if _, err := j.append(frame, true); err != nil {
		j.mu.Unlock()
		return err
	}
	// In file order, before the sync, so that a copy of the outcomes written next has it.
	j.outcomes.remember(outcome.TaskID, outcome.Status)
	var run *runState // nil: the task is not live
	if _, live := j.tasks[outcome.TaskID]; live {
		run = j.run(outcome.TaskID)
		run.end()
		run.outcome, run.unsynced = &outcome, true
	}
	batch := j.joinBatch()
	j.mu.Unlock()

	if err := batch.wait(); err != nil {
		return err
	}
	if run != nil {
		j.mu.Lock()
		run.unsynced = false
		j.mu.Unlock()
	}
	return nil
}

// reported says that everybody knows how the task ended; the journal keeps only its status. Written on return.
func (j *journal) reported(id string) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if _, live := j.tasks[id]; !live {
		return nil
	}
	if !j.runs[id].hasEnded() {
		return taskMisfit("settle task "+strconv.Quote(id), errors.New("it has not finished"))
	}
	return j.forget(id, recordReported)
}

// released forgets a task that is no longer ours: its broker delivers it again. Written on return.
func (j *journal) released(id string) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if _, ok := j.tasks[id]; !ok {
		return nil
	}
	return j.forget(id, recordReleased)
}

// forget needs mu.
func (j *journal) forget(id string, kind byte) error {
	if _, err := j.append(idFrame(kind, id), true); err != nil {
		return err
	}
	j.drop(id)
	return nil
}

// data reads an unreported task's data back; it stays on disk alone.
func (j *journal) data(id string) ([]byte, error) {
	op := "read data of task " + strconv.Quote(id)
	for {
		place, file, live := j.place(id)
		if !live {
			return nil, taskMisfit(op, errors.New("the journal holds no such task"))
		}
		payload, err := readRecord(place, file)
		if err == nil {
			if rec, ok := readTaskRecord(payload); ok && string(rec.id) == id {
				return rec.data, nil
			}
			err = errRecordDamaged
		}
		// Compaction may have moved it meanwhile.
		if again, _, live := j.place(id); !live || again == place {
			return nil, fail(codeJournalRead, op, err)
		}
	}
}

// place is where a task's record lies, and the file if it is open.
func (j *journal) place(id string) (place recordPlace, file journalFile, live bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if place, live = j.tasks[id]; live {
		file = place.segment.file
	}
	return place, file, live
}

// outcome is how a task ended, of the last 50,000, once that is durable.
func (j *journal) outcome(id string) (taskStatus, bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if _, live := j.tasks[id]; live && (!j.runs[id].hasEnded() || j.runs[id].unsynced) {
		return "", false
	}
	return j.outcomes.of(id)
}

// writable is nil, or why the last write failed. It becomes nil by itself, within a second of the cause going.
func (j *journal) writable() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.fault
}

func (j *journal) stats() journalStats {
	j.mu.Lock()
	defer j.mu.Unlock()
	stats := j.counts
	stats.Bytes, stats.Segments, stats.Live = j.bytes(), len(j.segments), len(j.tasks)
	return stats
}

// close syncs what was written and lets go of the folder. Closing twice is harmless.
func (j *journal) close() error {
	j.mu.Lock()
	if j.closed {
		j.mu.Unlock()
		return nil
	}
	j.closed = true
	j.mu.Unlock()

	close(j.stop)
	j.loops.Wait()
	close(j.quit) // after compaction, which may wait for a sync
	j.syncing.Wait()

	j.mu.Lock()
	defer j.mu.Unlock()
	j.closeFiles()
	return j.fault
}

// closeFiles needs mu.
func (j *journal) closeFiles() {
	for _, s := range j.segments {
		if s.file != nil {
			s.trim()
			s.file.Close()
		}
	}
	j.lock.Close()
}

func taskMisfit(op string, err error) error { return fail(codeJournalTask, op, err) }

// append writes one record: it is in the operating system's hands on return. needed entries may use up the reserve.
// After an error nothing has been written, as far as a reader can tell. It needs mu.
func (j *journal) append(frame []byte, needed bool) (recordPlace, error) {
	if j.closed {
		return recordPlace{}, j.writeError("write", os.ErrClosed)
	}
	if len(frame)-frameHeaderBytes > maxPayloadBytes {
		return recordPlace{}, taskMisfit("write journal "+strconv.Quote(j.dir), fmt.Errorf("an entry of %d bytes", len(frame)))
	}
	tail := j.tail()
	if tail.suspect {
		return recordPlace{}, j.fault
	}
	if tail.size > segmentHeaderBytes && tail.size+int64(len(frame)) > j.sizes.segment {
		// Where no new file can be made the old one grows on.
		if j.rotate() == nil {
			tail = j.tail()
		}
	}

	place, err := tail.write(frame)
	if err != nil && j.dropReserve() && needed {
		j.failed("write", err) // what has eaten the space is still there
		place, err = tail.write(frame)
	}
	if err != nil {
		j.failed("write", err)
		return recordPlace{}, j.fault
	}
	j.counts.Entries++
	j.soil(tail)
	return place, nil
}

// failed notes why a write failed; syncLoop looks after it. It needs mu.
func (j *journal) failed(what string, err error) {
	if j.fault == nil {
		j.retry.Reset(syncDelay)
	}
	j.fault = j.writeError(what, err)
	j.counts.WriteErrors++
}

func (j *journal) writeError(what string, err error) error {
	return fail(codeJournalWrite, what+" journal "+strconv.Quote(j.dir), err)
}

// soil says that a segment has to be synced. It needs mu.
func (j *journal) soil(s *segment) {
	if !s.dirty {
		s.dirty = true
		j.unsynced = append(j.unsynced, s)
		j.lazy.Reset(syncDelay)
	}
}

// rotate completes the newest segment and begins another. It needs mu.
func (j *journal) rotate() error {
	s, err := j.newSegment()
	if err != nil {
		return err
	}
	j.tail().trim()
	j.soil(j.tail()) // the sync that follows closes it
	j.segments = append(j.segments, s)
	return nil
}

// newSegment needs mu.
func (j *journal) newSegment() (*segment, error) {
	j.lastNumber++ // also if it fails: what is left of it may be in the way
	s, err := createSegment(j.dir, j.lastNumber)
	if err != nil {
		return nil, err
	}
	if j.wrap != nil {
		j.wrap(s)
	}
	j.folderDirty = true
	return s, nil
}

func (j *journal) tail() *segment { return j.segments[len(j.segments)-1] }

func (j *journal) bytes() (n int64) {
	for _, s := range j.segments {
		n += s.size
	}
	return n
}

// run is what has happened to a live task, to be changed. It needs mu.
func (j *journal) run(id string) *runState {
	run := j.runs[id]
	if run == nil {
		run = new(runState)
		j.runs[id] = run
	}
	return run
}

// keep, move and drop need mu.
func (j *journal) keep(id string, place recordPlace) {
	j.tasks[id] = place
	place.segment.live++
	j.liveBytes += place.bytes()
}

// move has the record of a live task lie elsewhere.
func (j *journal) move(id string, place recordPlace) {
	j.leave(j.tasks[id])
	j.keep(id, place)
}

func (j *journal) drop(id string) {
	if place, live := j.tasks[id]; live {
		j.leave(place)
		delete(j.tasks, id)
		delete(j.runs, id)
		j.tasks = shrunk(j.tasks, &j.mostTasks)
	}
}

func (j *journal) leave(place recordPlace) {
	place.segment.live--
	j.liveBytes -= place.bytes()
}
