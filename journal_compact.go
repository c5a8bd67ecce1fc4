package main

// journal_compact.go owns how the journal is read when it is opened, and how it stays small: the oldest segment's live
// tasks are copied to the end and the segment is removed. Always the oldest, so that what says that a task is done
// never goes before what says that it was accepted.

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// compactPause is how long compaction that got stuck (a damaged record, a file that cannot be removed) is left alone.
const compactPause = 10 * time.Second

// load replays the segments and opens the last one for writing. Nothing is changed before all were looked at.
func (j *journal) load() ([]journalTask, error) {
	names, err := os.ReadDir(j.dir)
	if err != nil {
		return nil, err
	}
	var found []*segment
	for _, name := range names {
		number, ok := segmentNumber(name.Name())
		if !ok || !name.Type().IsRegular() {
			continue
		}
		s, err := loadSegment(filepath.Join(j.dir, name.Name()), number)
		if err != nil {
			return nil, fmt.Errorf("read %q: %w", name.Name(), err)
		}
		found = append(found, s)
	}
	slices.SortFunc(found, func(a, b *segment) int {
		if a.number < b.number {
			return -1
		}
		return 1
	})

	replay := journalReplay{tasks: map[string]*replayedTask{}, interned: map[string]string{}}
	for i, s := range found {
		j.lastNumber = s.number
		if s.size < 0 {
			if err := j.setAside(s); err != nil {
				return nil, err
			}
			continue
		}
		if err := j.replaySegment(s, i == len(found)-1, &replay); err != nil {
			return nil, err
		}
		j.segments = append(j.segments, s)
	}
	if last := len(found) - 1; last < 0 || found[last].file == nil {
		s, err := j.newSegment()
		if err != nil {
			return nil, err
		}
		j.segments = append(j.segments, s)
		j.soil(s)
		if err := syncFolder(filepath.Dir(j.dir)); err != nil { // the folder may be new itself
			return nil, err
		}
	}

	tasks := replay.list()
	for id, t := range replay.tasks {
		j.keep(id, t.place)
		if t.run != nil {
			j.runs[id] = t.run
		}
	}
	j.outcomes = replay.outcomes
	j.order.Store(replay.nextOrder)
	return tasks, nil
}

// loadSegment looks at a segment's header. size is -1 when that is damaged.
func loadSegment(path string, number uint64) (*segment, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	s := &segment{number: number, path: path}
	if s.salt, err = readSegmentHeader(f); errors.Is(err, errSegmentHeader) {
		s.size, err = -1, nil
	}
	return s, err
}

// setAside gets a segment without a header out of the way: nothing in it can be read. A crash leaves one that is
// shorter than its header, or one that was never synced.
func (j *journal) setAside(s *segment) error {
	info, err := os.Stat(s.path)
	if err != nil {
		return err
	}
	if info.Size() <= segmentHeaderBytes {
		return os.Remove(s.path)
	}
	j.counts.DamagedBytes += info.Size()
	return os.Rename(s.path, s.path+".damaged")
}

// replaySegment reads a segment's records. The last one is cut after its last whole record and stays open.
func (j *journal) replaySegment(s *segment, last bool, replay *journalReplay) error {
	f, err := os.OpenFile(s.path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	s.file = dataSyncedFile{f}
	defer func() {
		if !last || err != nil {
			f.Close()
			s.file = nil
		}
	}()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	scan := newSegmentScanner(f, s.salt, info.Size())
	for {
		offset, payload, ok := scan.next()
		if !ok {
			break
		}
		replay.apply(recordPlace{s, offset, uint32(len(payload))}, payload)
	}
	if err = scan.err; err != nil {
		return fmt.Errorf("read %q: %w", s.path, err)
	}

	s.size = info.Size()
	j.counts.DamagedBytes += scan.damaged
	tail := s.size - scan.good
	unused, err := onlyZeros(f, scan.good, s.size)
	if err != nil {
		return fmt.Errorf("read %q: %w", s.path, err)
	}
	switch {
	case unused && s.size > segmentHeaderBytes:
		s.size, s.filled = scan.good, s.size
	case !last:
		j.counts.DamagedBytes += tail
	case s.size < segmentHeaderBytes:
		s.size = segmentHeaderBytes
		_, err = f.WriteAt(segmentHeader(s.salt), 0)
	case tail > 0:
		j.counts.TornBytes = tail
		if err = j.keepTorn(s, f, scan.good, tail); err == nil {
			err = f.Truncate(scan.good)
		}
		s.size = scan.good
	}
	if err == nil {
		// What a killed process wrote may not be durable, and what follows from it must not be before it is.
		err = f.Sync()
	}
	return err
}

// keepTorn puts what is cut off into a file of its own, for inspection; there is never more than one.
func (j *journal) keepTorn(s *segment, f io.ReaderAt, offset, size int64) error {
	old, _ := filepath.Glob(filepath.Join(j.dir, "*.torn"))
	for _, path := range old {
		os.Remove(path)
	}
	torn := make([]byte, min(size, tornKeptBytes))
	if _, err := f.ReadAt(torn, offset); err != nil {
		return err
	}
	// On a full disk opening is worth more than the copy.
	if err := os.WriteFile(strings.TrimSuffix(s.path, segmentSuffix)+".torn", torn, 0o600); err != nil {
		j.counts.TornLost = true
	}
	return nil
}

// compactLoop ends when stop is closed.
func (j *journal) compactLoop() {
	for {
		select {
		case idle := <-j.compact:
			for j.worthCompacting(idle) {
				if !j.compactOldest() {
					j.mu.Lock()
					j.compactAfter = time.Now().Add(compactPause)
					j.mu.Unlock()
				}
			}
		case <-j.stop:
			return
		}
	}
}

// worthCompacting weighs what is dead against what would have to be copied to get rid of it.
func (j *journal) worthCompacting(idle bool) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.closed || j.fault != nil || time.Now().Before(j.compactAfter) {
		return false
	}
	garbage := j.bytes() - j.liveBytes - int64(len(j.outcomes.ring)*outcomeBytes)
	return garbage > j.liveBytes+j.sizes.garbage || idle && len(j.tasks) == 0 && garbage > j.sizes.idleGarbage
}

// compactOldest copies what lives in the oldest segment to the end of the journal and removes it, and those after it
// in which nothing lives. It holds mu for one record at a time. False means that it could not, for now.
func (j *journal) compactOldest() bool {
	j.mu.Lock()
	oldest := j.segments[0]
	if oldest == j.tail() && j.rotate() != nil {
		j.mu.Unlock()
		return false
	}
	live := oldest.live
	j.mu.Unlock()
	if live > 0 && j.copyForward(oldest) != nil {
		return false
	}

	j.mu.Lock()
	dead := 0
	for dead < len(j.segments)-1 && j.segments[dead].live == 0 && !j.segments[dead].suspect {
		dead++
	}
	if dead == 0 { // damaged: what cannot be copied stays until its task is done
		j.mu.Unlock()
		return false
	}
	victims := slices.Clone(j.segments[:dead])
	if len(j.outcomes.ring) > 0 {
		if _, err := j.append(j.outcomes.frame(), false); err != nil {
			j.mu.Unlock()
			return false
		}
	}
	batch := j.joinBatch()
	j.mu.Unlock()
	if batch.wait() != nil {
		return false
	}

	for _, s := range victims {
		// Windows removes no file that someone is reading; it is tried again next time.
		if err := os.Remove(s.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return false
		}
		// One after the other: a later segment must not be gone while an earlier one is back.
		if syncFolder(j.dir) != nil {
			return false
		}
		j.mu.Lock()
		j.segments = slices.Delete(j.segments, 0, 1)
		j.mu.Unlock()
	}
	return true
}

// copyForward appends the tasks that live in a complete segment to the journal, each with its state of that moment.
func (j *journal) copyForward(s *segment) error {
	f, err := os.Open(s.path)
	if err != nil {
		return err
	}
	defer f.Close()
	scan := newSegmentScanner(f, s.salt, s.size)
	for {
		offset, payload, ok := scan.next()
		if !ok {
			return scan.err
		}
		if payload[0] != recordTask {
			continue
		}
		if err := j.copyTask(recordPlace{s, offset, uint32(len(payload))}, payload); err != nil {
			return err
		}
	}
}

func (j *journal) copyTask(place recordPlace, payload []byte) error {
	rec, ok := readTaskRecord(payload)
	if !ok {
		return nil
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if now, live := j.tasks[string(rec.id)]; !live || now != place {
		return nil
	}
	frame, err := rec.frame(j.runs[string(rec.id)])
	if err != nil {
		return err
	}
	moved, err := j.append(frame, false)
	if err == nil {
		j.move(string(rec.id), moved)
	}
	return err
}

// frameToMove reads a task back and makes a record of its present state.
func frameToMove(place recordPlace, run *runState) ([]byte, error) {
	payload, err := readRecord(place, nil)
	if err != nil {
		return nil, err
	}
	rec, ok := readTaskRecord(payload)
	if !ok {
		return nil, errRecordDamaged
	}
	return rec.frame(run)
}

func (rec *journalRecord) frame(run *runState) ([]byte, error) {
	t := journalTask{ID: string(rec.id), Subject: string(rec.subject), Event: string(rec.event),
		Held: rec.held && !run.isAdopted(), CreatedAt: fromNanos(rec.created)}
	t.setRun(run)
	return taskFrame(rec.order, t, rec.data)
}
