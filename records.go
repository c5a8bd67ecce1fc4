package main

// records.go keeps what tasks leave on this host: running ones in memory, finished ones as a line of records.jsonl
// (records_index.go), and what only some tasks have (output, notifications, a result, files) in a folder per task
// (records_log.go, records_files.go). It follows the event bus and decides how long a record stays; it knows nothing
// of HTTP. A task that prints and sends nothing costs one write and no folder.

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// A record is what is known of one task, in the form that GET /job/{task_id} shows.
type record struct {
	TaskID        string          `json:"task_id"`
	Event         string          `json:"event"`
	Name          string          `json:"name"`
	Status        taskStatus      `json:"status"`
	Attempt       int             `json:"attempt"`
	ExitCode      *int            `json:"exit_code"`
	Signal        string          `json:"signal"`
	PID           int             `json:"pid"`
	CreatedAt     *time.Time      `json:"created_at"` // the times are nil where there is none yet
	StartedAt     *time.Time      `json:"started_at"`
	FinishedAt    *time.Time      `json:"finished_at"`
	DurationMS    int64           `json:"duration_ms"` // from the last start, to now while it runs
	CPUMS         int64           `json:"cpu_ms"`
	MaxRSS        int64           `json:"max_rss"` // bytes
	Error         string          `json:"error"`
	OutputBytes   int64           `json:"output_bytes"` // all that was printed, kept or not
	Notifications []notification  `json:"notifications"`
	Result        json.RawMessage `json:"result"`
	Files         []taskFile      `json:"files"`
}

// A notification is a progress message of a task.
type notification struct {
	Msg       string    `json:"msg"`
	CreatedAt time.Time `json:"created_at"`
}

// A taskFile is a file that a task uploaded.
type taskFile struct {
	Name string `json:"name"`
	Size int64  `json:"size"` // bytes
}

// A recordFilter says which records are wanted; its zero value asks for the newest 100.
type recordFilter struct {
	status taskStatus
	event  string
	limit  int
}

// matches reports whether a task with this status and event is wanted.
func (f recordFilter) matches(status taskStatus, event string) bool {
	return (f.status == "" || f.status == status) && (f.event == "" || f.event == event)
}

const (
	defaultListLimit = 100
	recordErrorBytes = 32 << 10 // of a record's error, the end is kept
	openLogFiles     = 64       // log files kept open, all tasks together; others are opened for each write
	tendPause        = 5 * time.Minute
)

// records is the store. Its methods may be called concurrently.
type records struct {
	dir      string        // holds records.jsonl and tasks/
	logSlots chan struct{} // holds one value per log file kept open
	stop     chan struct{}
	tending  sync.WaitGroup
	failing  atomic.Bool // writeErr != nil, without the lock

	// mu guards all below. A liveTask's own lock is taken before it, never while it is held.
	mu       sync.Mutex
	log      *slog.Logger
	retain   Retain
	live     map[string]*liveTask
	index    recordIndex
	appeared chan struct{} // closed at the next task that starts or ends; nil when nobody waits
	writeErr error         // why the last write failed
	failures int64         // writes that failed so far
	loggedAt time.Time     // when one was last logged
	closed   bool

	filesMu sync.Mutex // guards what is counted, rotated or replaced in task folders
}

// A liveTask is a task that has not finished.
type liveTask struct {
	id     string
	folder atomic.Bool // it has a folder

	mu        sync.Mutex // guards all below
	started   bool       // else only its data is known, and the worker still lists it as queued
	ended     bool
	record    record // without what lies in the folder
	data      []byte // nil when it is in the folder
	output    *taskLog
	announced int           // the attempt that the log says will follow
	changed   chan struct{} // closed at the next output or at the end; nil when nobody waits
}

// openRecords opens the store in dir, the worker's data_dir, and forgets what retain no longer covers. Whatever in it
// cannot be read as a record is left out.
func openRecords(dir string, retain Retain) (*records, error) {
	r := &records{
		dir:      dir,
		logSlots: make(chan struct{}, openLogFiles),
		stop:     make(chan struct{}),
		log:      slog.New(slog.DiscardHandler),
		retain:   retain,
		live:     map[string]*liveTask{},
	}
	err := os.MkdirAll(filepath.Join(dir, "tasks"), 0o700)
	if err == nil {
		err = r.index.open(filepath.Join(dir, "records.jsonl"))
	}
	if err != nil {
		return nil, fail(codeRecordsOpen, "open task records", err)
	}
	for _, id := range r.foldersOnDisk() {
		if e := r.index.byID[id]; e != nil {
			e.folder = true
		}
	}
	r.prune()
	r.tending.Add(1)
	go r.tend()
	return r, nil
}

// setLog says where write failures are logged; until then they are only counted.
func (r *records) setLog(log *slog.Logger) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.log = log
}

// setRetain changes how much is kept. A log being written keeps the bound it started with.
func (r *records) setRetain(retain Retain) {
	r.mu.Lock()
	r.retain = retain
	r.mu.Unlock()
	r.prune()
}

// handle takes an event of the bus. Failing to write never stops a task: what is lost is marked and counted.
func (r *records) handle(e event) {
	switch e := e.(type) {
	case taskQueued:
		r.taskQueued(e)
	case taskStarted:
		r.taskStarted(e)
	case taskOutput:
		r.taskOutput(e)
	case taskRetrying:
		r.taskRetrying(e)
	case taskNotified:
		r.wrote(r.addNotification(e.TaskID, notification{Msg: e.Msg, CreatedAt: e.At}))
	case taskFinished:
		r.taskFinished(e)
	}
}

// keepData remembers a task's data for a replay. It is called before the task starts; data must not change after it.
// Large data is on disk on return, and an error then means that there can be no replay.
func (r *records) keepData(id string, data []byte) error {
	if !validTaskID(id) {
		return fail(codeRecordTaskID, "keep data of a task", errTaskID)
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
		t.end()
		t.mu.Unlock()
	}
}

// get gives the record of a task that has started, with all it left. Its notifications are the latest, about 1 MiB.
func (r *records) get(id string) (record, bool) {
	rec, folder, ok := r.find(id)
	if ok {
		r.addFolder(&rec, folder, detailFull)
	}
	return rec, ok
}

// list gives the records that match, newest first: running tasks, those waiting for a retry (status queued) and
// finished ones. A list shows at most the last few notifications of each, and null for a large result.
func (r *records) list(f recordFilter) []record {
	if f.limit <= 0 {
		f.limit = defaultListLimit
	}
	type candidate struct {
		id      string
		created int64
	}
	var found []candidate
	r.mu.Lock()
	live := make([]*liveTask, 0, len(r.live))
	for _, t := range r.live {
		live = append(live, t)
	}
	for _, e := range slices.Backward(r.index.order) {
		if r.live[e.id] == nil && f.matches(e.status, e.event) {
			found = append(found, candidate{e.id, e.created})
		}
	}
	r.mu.Unlock()
	for _, t := range live {
		t.mu.Lock()
		if t.started && f.matches(t.record.Status, t.record.Event) {
			found = append(found, candidate{t.id, unixNano(t.record.CreatedAt)})
		}
		t.mu.Unlock()
	}
	slices.SortStableFunc(found, func(a, b candidate) int {
		switch {
		case a.created > b.created:
			return -1
		case a.created < b.created:
			return 1
		}
		return 0
	})
	list := make([]record, 0, min(f.limit, len(found)))
	for _, c := range found {
		if len(list) == f.limit {
			break
		}
		// It may have gone, or changed its status, since.
		if rec, folder, ok := r.find(c.id); ok && f.matches(rec.Status, rec.Event) {
			r.addFolder(&rec, folder, detailList)
			list = append(list, rec)
		}
	}
	return list
}

// data gives what keepData kept.
func (r *records) data(id string) ([]byte, error) {
	r.mu.Lock()
	t, e := r.live[id], r.index.byID[id]
	var line []byte
	var err error
	if t == nil && e != nil {
		line, err = r.index.line(e)
	}
	r.mu.Unlock()
	switch {
	case t != nil:
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.data != nil {
			return t.data, nil
		}
	case e == nil:
		return nil, r.unknown(id)
	case err != nil:
		return nil, unreadable("read data of task "+id, err)
	default:
		var stored storedRecord
		if err := json.Unmarshal(line, &stored); err == nil && stored.Data != nil {
			return stored.Data, nil
		}
	}
	return r.readFolderFile(id, dataFile, maxDataBytes)
}

// openLog gives a task's output from its first byte, cut in the middle where it is longer than retain.log.
func (r *records) openLog(id string) (io.ReadCloser, error) {
	r.mu.Lock()
	t, e, limit := r.live[id], r.index.byID[id], r.retain.Log
	r.mu.Unlock()
	dir := r.folder(id)
	switch {
	case t != nil:
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.output == nil {
			return newLogReader(dir, nil, limit), nil
		}
		return newLogReader(dir, slices.Clone(t.output.segments), t.output.limit), nil
	case e == nil:
		return nil, r.unknown(id)
	case !e.folder:
		return newLogReader(dir, nil, limit), nil
	}
	segments, err := readLogSegments(dir)
	if err != nil {
		return nil, unreadable("read log of task "+id, err)
	}
	return newLogReader(dir, segments, limit), nil
}

// followLog copies a task's output to w from its first byte until the task has ended, waiting for a task that has not
// started. flush is called after each piece. A slow w does not slow the task: it finds a mark where what it was to get
// is no longer kept. The error is w's or ctx's.
func (r *records) followLog(ctx context.Context, id string, w io.Writer, flush func()) error {
	t, err := r.awaitTask(ctx, id)
	if err != nil {
		return err
	}
	if t != nil {
		return t.follow(ctx, r.folder(id), w, flush)
	}
	log, err := r.openLog(id)
	if err != nil {
		return err
	}
	defer log.Close()
	_, err = io.Copy(w, log)
	flush()
	return err
}

// failure gives why the last write failed, nil if it did not, and how many have failed so far.
func (r *records) failure() (int64, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.failures, r.writeErr
}

// close stops the store. Followers must have been stopped before.
func (r *records) close() error {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return nil
	}
	r.closed = true
	live := make([]*liveTask, 0, len(r.live))
	for _, t := range r.live {
		live = append(live, t)
	}
	close(r.stop)
	r.mu.Unlock()
	r.tending.Wait()
	for _, t := range live {
		t.mu.Lock()
		t.end()
		t.mu.Unlock()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.index.close()
}

func (r *records) taskQueued(e taskQueued) {
	r.mu.Lock()
	t := r.live[e.TaskID]
	r.mu.Unlock()
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
	r.mu.Lock()
	t := r.live[e.TaskID]
	r.mu.Unlock()
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
	r.mu.Lock()
	t := r.live[e.TaskID]
	r.mu.Unlock()
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
	r.mu.Lock()
	t := r.live[e.TaskID]
	r.mu.Unlock()
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
	if err != nil {
		r.wrote(err)
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

// find gives a record without what lies in the task's folder, and whether there is one.
func (r *records) find(id string) (rec record, folder, ok bool) {
	r.mu.Lock()
	t, e := r.live[id], r.index.byID[id]
	var line []byte
	var err error
	if t == nil && e != nil {
		folder = e.folder
		line, err = r.index.line(e)
	}
	r.mu.Unlock()
	switch {
	case t != nil:
		t.mu.Lock()
		defer t.mu.Unlock()
		rec = t.record
		if rec.Status == statusRunning && rec.StartedAt != nil {
			rec.DurationMS = time.Since(*rec.StartedAt).Milliseconds()
		}
		return rec, t.folder.Load(), t.started
	case e == nil || err != nil:
		return record{}, false, false
	}
	var stored storedRecord
	if err := json.Unmarshal(line, &stored); err != nil || stored.TaskID != id {
		return record{}, false, false
	}
	return stored.record, folder, true
}

// known reports whether the store holds anything of the task.
func (r *records) known(id string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.live[id] != nil || r.index.byID[id] != nil
}

func (r *records) unknown(id string) error {
	return fail(codeRecordUnknown, "look up task "+id, errTaskUnknown)
}

// wrote notes how a write went. A failure is logged when writing begins to fail, at most once a minute.
func (r *records) wrote(err error) {
	if errors.Is(err, errTaskUnknown) || (err == nil && !r.failing.Load()) {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failing.Store(err != nil)
	if err == nil {
		r.writeErr = nil
		return
	}
	r.failures++
	begins := r.writeErr == nil
	r.writeErr = fail(codeRecordWrite, "write task records", err)
	if begins && time.Since(r.loggedAt) > time.Minute {
		r.loggedAt = time.Now()
		r.log.Error("task records cannot be written; tasks go on", errAttrs(r.writeErr))
	}
}

// tend forgets what has grown too old. It ends with close.
func (r *records) tend() {
	defer r.tending.Done()
	ticker := time.NewTicker(tendPause)
	defer ticker.Stop()
	for {
		select {
		case <-r.stop:
			return
		case <-ticker.C:
			r.mu.Lock()
			err := r.index.flush()
			r.mu.Unlock()
			r.wrote(err)
			r.prune()
			r.removeOrphans()
		}
	}
}

// prune forgets the finished tasks that retain no longer covers, oldest first, and removes their folders.
func (r *records) prune() {
	var folders []string
	r.mu.Lock()
	var oldest int64
	if r.retain.Age > 0 {
		oldest = time.Now().Add(-r.retain.Age).UnixNano()
	}
	for len(r.index.order) > 0 {
		e := r.index.order[0]
		if len(r.index.order) <= r.retain.Tasks && e.finished >= oldest {
			break
		}
		r.index.removeOldest()
		if e.folder && r.live[e.id] == nil { // it may be running once more
			folders = append(folders, e.id)
		}
	}
	err := r.index.compact()
	r.mu.Unlock()
	if err != nil {
		r.wrote(err)
	}
	for _, id := range folders {
		os.RemoveAll(r.folder(id)) // what is in use on Windows is left to removeOrphans
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

func durationMS(from, to *time.Time) int64 {
	if from == nil || to == nil {
		return 0
	}
	return max(0, to.Sub(*from).Milliseconds())
}

func timeOrNil(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

func unixNano(t *time.Time) int64 {
	if t == nil {
		return 0
	}
	return t.UnixNano()
}

// lastBytes gives the end of a task's error, in whole characters.
func lastBytes(text string) string {
	if len(text) > recordErrorBytes {
		text = text[len(text)-recordErrorBytes:]
	}
	return strings.ToValidUTF8(text, "")
}
