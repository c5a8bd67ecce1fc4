package main

// records_index.go owns records.jsonl, one line per finished task, and the index that finds a line. Lines are appended
// with one write each and not synced: what must survive a power cut is the journal's. A line that the disk had no room
// for waits in memory for the next write. The caller's lock guards it all.

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"
)

const (
	inlineDataBytes   = 64 << 10 // larger data of a task has a file of its own
	maxRecordLine     = 1 << 20  // a longer line is no record of ours
	compactBytes      = 4 << 20  // a smaller file is left as it is
	maxUnsavedRecords = 1000
)

// A storedRecord is a line of records.jsonl.
type storedRecord struct {
	record
	Data json.RawMessage `json:"data,omitempty"`
}

// An indexEntry finds one finished task.
type indexEntry struct {
	id, event         string
	status            taskStatus
	created, finished int64 // Unix time in nanoseconds
	offset            int64 // of its line in the file
	length            int   // of its line with the newline
	line              []byte
	folder            bool // there is a folder for it
	gone              bool // replaced or forgotten
}

// A recordIndex holds the finished tasks. Its zero value is to be opened.
type recordIndex struct {
	path    string
	file    *os.File // nil after a failure, opened again when needed
	size    int64    // where the next line goes; what lies behind it is what a failed write left
	kept    int64    // bytes of the lines that still count
	retryAt int64    // no compaction below this size, since the last one failed
	byID    map[string]*indexEntry
	order   []*indexEntry // as they finished, oldest first
	unsaved []*indexEntry // whose line is not yet in the file, oldest first
}

// open reads the file at path, which may not exist. A line cut short by a crash is dropped.
func (x *recordIndex) open(path string) error {
	x.path, x.byID = path, map[string]*indexEntry{}
	if err := x.openFile(); err != nil {
		return err
	}
	reader := bufio.NewReaderSize(x.file, 64<<10)
	events := map[string]string{} // one string for all tasks of a job
	now := time.Now().UnixNano()
	for {
		line, length, err := readLine(reader, maxRecordLine)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return errors.Join(err, x.close())
		}
		var stored storedRecord
		if json.Unmarshal(line, &stored) == nil && validTaskID(stored.TaskID) && stored.Status.final() {
			if _, ok := events[stored.Event]; !ok {
				events[stored.Event] = stored.Event
			}
			x.insert(&indexEntry{
				id: stored.TaskID, event: events[stored.Event], status: stored.Status, offset: x.size, length: length,
				// A clock that was ahead when the task finished must not keep its record, and those after it, for ever.
				created: unixNano(stored.CreatedAt), finished: min(unixNano(stored.FinishedAt), now),
			})
			x.kept += int64(length)
		}
		x.size += int64(length)
	}
}

// add takes a finished task, in place of an earlier one of that id. The entry counts even when there is an error: then
// its line is still to be written.
func (x *recordIndex) add(e *indexEntry) error {
	x.insert(e)
	x.unsaved = append(x.unsaved, e)
	err := x.flush()
	if len(x.unsaved) > maxUnsavedRecords {
		x.remove(x.unsaved[0])
		x.unsaved = x.unsaved[1:]
	}
	return err
}

// flush writes the lines that wait.
func (x *recordIndex) flush() error {
	for len(x.unsaved) > 0 {
		e := x.unsaved[0]
		if !e.gone {
			if err := x.write(e); err != nil {
				return err
			}
		}
		x.unsaved[0] = nil
		x.unsaved = x.unsaved[1:]
	}
	return nil
}

func (x *recordIndex) write(e *indexEntry) error {
	if err := x.openFile(); err != nil {
		return err
	}
	if _, err := x.file.WriteAt(e.line, x.size); err != nil {
		return err
	}
	e.offset, e.length, e.line = x.size, len(e.line), nil
	x.size += int64(e.length)
	x.kept += int64(e.length)
	return nil
}

// line gives the JSON of an entry.
func (x *recordIndex) line(e *indexEntry) ([]byte, error) {
	if e.line != nil {
		return e.line, nil
	}
	if err := x.openFile(); err != nil {
		return nil, err
	}
	line := make([]byte, e.length)
	_, err := x.file.ReadAt(line, e.offset)
	return line, err
}

// removeOldest forgets the task that finished first. There must be one.
func (x *recordIndex) removeOldest() {
	e := x.order[0]
	x.order[0] = nil
	x.order = x.order[1:]
	x.forget(e)
}

// compact writes the file anew when more than half of it no longer counts.
func (x *recordIndex) compact() error {
	if x.size < compactBytes || x.size < x.retryAt || x.size <= 2*x.kept {
		return nil
	}
	offsets, size, err := x.rewrite(x.path + ".new")
	if err != nil {
		x.retryAt = x.size + compactBytes
		os.Remove(x.path + ".new")
		return err
	}
	// Closed first, since Windows renames nothing onto an open file.
	x.closeFile()
	if err := os.Rename(x.path+".new", x.path); err != nil {
		x.retryAt = x.size + compactBytes
		return err
	}
	for i, e := range x.order {
		if e.line == nil {
			e.offset = offsets[i]
		}
	}
	x.size, x.kept, x.retryAt = size, size, 0
	return nil
}

// rewrite copies the lines that count to a new file, and gives where each entry of order is in there.
func (x *recordIndex) rewrite(path string) (offsets []int64, size int64, err error) {
	if err := x.openFile(); err != nil {
		return nil, 0, err
	}
	file, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, 0, err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	w := bufio.NewWriterSize(file, 64<<10)
	offsets = make([]int64, len(x.order))
	for i, e := range x.order {
		if e.line != nil {
			continue
		}
		offsets[i] = size
		n, err := io.Copy(w, io.NewSectionReader(x.file, e.offset, int64(e.length)))
		if err != nil {
			return nil, 0, err
		}
		if n != int64(e.length) {
			return nil, 0, io.ErrUnexpectedEOF
		}
		size += n
	}
	// Synced, unlike single lines: a power cut must not take all records at once.
	return offsets, size, errors.Join(w.Flush(), file.Sync())
}

// close writes what waits and lets go of the file.
func (x *recordIndex) close() error {
	err := x.flush()
	x.closeFile()
	return err
}

func (x *recordIndex) openFile() (err error) {
	if x.file == nil {
		x.file, err = os.OpenFile(x.path, os.O_CREATE|os.O_RDWR, 0o600)
	}
	return err
}

func (x *recordIndex) closeFile() {
	if x.file != nil {
		x.file.Close()
		x.file = nil
	}
}

func (x *recordIndex) insert(e *indexEntry) {
	if old := x.byID[e.id]; old != nil {
		e.folder = e.folder || old.folder
		x.remove(old)
	}
	x.byID[e.id] = e
	x.order = append(x.order, e)
}

func (x *recordIndex) remove(e *indexEntry) {
	if i := slices.Index(x.order, e); i >= 0 {
		x.order = slices.Delete(x.order, i, i+1)
	}
	x.forget(e)
}

func (x *recordIndex) forget(e *indexEntry) {
	e.gone = true
	if e.line == nil {
		x.kept -= int64(e.length)
	}
	if x.byID[e.id] == e {
		delete(x.byID, e.id)
	}
}

// storedLine is a finished task as a line of the file.
func storedLine(rec record, data []byte) ([]byte, error) {
	stored := storedRecord{record: rec, Data: data}
	apart := len(data) > 0 && bytes.IndexByte(data, '\n') < 0 // it is JSON in one line, and need not be looked at again
	if apart {
		stored.Data = nil
	}
	var line bytes.Buffer
	encoder := json.NewEncoder(&line)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(stored); err != nil {
		return nil, fmt.Errorf("encode record of task %s: %w", rec.TaskID, err)
	}
	if apart {
		line.Truncate(line.Len() - len("}\n"))
		line.WriteString(`,"data":`)
		line.Write(data)
		line.WriteString("}\n")
	}
	return line.Bytes(), nil
}

// readLine reads one line and gives it with the bytes it took, the newline among them; nil for one longer than limit.
// A last line without a newline counts as none.
func readLine(r *bufio.Reader, limit int) (line []byte, length int, err error) {
	for {
		piece, err := r.ReadSlice('\n')
		length += len(piece)
		if length <= limit {
			line = append(line, piece...)
		} else {
			line = nil
		}
		switch {
		case err == nil:
			return line, length, nil
		case err != bufio.ErrBufferFull:
			return nil, length, err
		}
	}
}
