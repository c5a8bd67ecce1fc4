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

// filterEnded as a filter's status asks for the tasks that have ended, however they did.
const filterEnded taskStatus = "ended"

// matches reports whether a task with this status and event is wanted.
func (f recordFilter) matches(status taskStatus, event string) bool {
	return (f.status == "" || f.status == status || f.status == filterEnded && status.final()) &&
		(f.event == "" || f.event == event)
}

const (
	defaultListLimit = 100
	openLogFiles     = 64 // log files kept open, all tasks together; others are opened for each write
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
	ours     bool          // no other process writes here any more: see takeOver
	closed   bool

	filesMu sync.Mutex // guards what is counted, rotated or replaced in task folders
}

// openRecords opens the store in dir, the worker's data_dir, to be read: the worker before this one may still be ending
// its tasks. Whatever in it cannot be read as a record is left out.
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
	if err = r.openIndex(err); err != nil {
		return nil, err
	}
	r.tending.Add(1)
	go r.tend()
	return r, nil
}

// openIndex reads what there is, unless there is an err before.
func (r *records) openIndex(err error) error {
	r.index = recordIndex{}
	if err == nil {
		err = r.index.open(filepath.Join(r.dir, "records.jsonl"))
	}
	if err != nil {
		return fail(codeRecordsOpen, "open task records", err)
	}
	for _, id := range r.foldersOnDisk() {
		if e := r.index.byID[id]; e != nil {
			e.folder = true
		}
	}
	return nil
}

// takeOver makes the store this process's own, reads what the worker before has written meanwhile, and forgets what
// retain no longer covers. Whoever calls it holds the journal, so no other worker writes any more, and has started no
// task.
func (r *records) takeOver() error {
	r.mu.Lock()
	r.index.closeFile()
	err := r.openIndex(nil)
	r.ours = err == nil
	r.mu.Unlock()
	if err != nil {
		return err
	}
	r.prune()
	return nil
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

// count gives how many records of finished tasks are kept, and of how many others there is one.
func (r *records) count() (kept, live int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.index.order), len(r.live)
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
			rec.DurationMS = max(0, time.Since(*rec.StartedAt).Milliseconds())
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

// mend tries again after a failed write, and says why nothing can be written yet, "" if it can.
func (r *records) mend() string {
	if !r.failing.Load() {
		return ""
	}
	r.mu.Lock()
	err := r.index.flush()
	r.mu.Unlock()
	if err == nil {
		err = r.probe() // what failed may have been a log, which is written when its task prints again
	}
	r.wrote(err)
	if err != nil {
		_, err = r.failure()
		return codedText(err)
	}
	return ""
}

// probe reports whether a file of one block can be written.
func (r *records) probe() error {
	path := filepath.Join(r.dir, "tasks", "probe")
	defer os.Remove(path)
	return os.WriteFile(path, make([]byte, 4096), 0o600)
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
	if !r.ours {
		r.mu.Unlock()
		return
	}
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
