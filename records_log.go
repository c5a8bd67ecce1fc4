package main

// records_log.go keeps a task's output within a bound: its first half and its last half, in files of the task's folder
// that are named by the offset of their first byte (log.0, log.8388608, …). Sizes and names say everything, so a log
// goes on after a crash, and a hole is where bytes are missing: old ones that were let go, or ones that the disk had no
// room for. It knows nothing of tasks.

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

const (
	logFilePrefix   = "log."
	maxLogSegments  = 64 // files of one log; a disk that keeps failing makes many small ones
	minSegmentBytes = 4 << 10
)

// A logSegment is one file of a log.
type logSegment struct{ start, size int64 }

func (s logSegment) end() int64   { return s.start + s.size }
func (s logSegment) name() string { return logFilePrefix + strconv.FormatInt(s.start, 10) }

// A taskLog is a log being written.
type taskLog struct {
	dir      string
	limit    int64         // bytes kept
	slots    chan struct{} // shared by all logs: a value in it allows to keep a file open
	segments []logSegment  // on disk; the last one grows
	total    int64         // bytes so far, kept or not
	lastByte byte          // 0 when not known
	file     *os.File      // of the last segment, nil when closed
	torn     bool          // the last write failed, so the next one begins a new segment
}

func newTaskLog(dir string, limit int64, slots chan struct{}) *taskLog {
	return &taskLog{dir: dir, limit: max(0, limit), slots: slots}
}

// resume goes on with what an earlier process wrote.
func (l *taskLog) resume(segments []logSegment) {
	l.segments, l.total = segments, logEnd(segments)
}

func (l *taskLog) headBytes() int64 { return l.limit / 2 }
func (l *taskLog) tailBytes() int64 { return l.limit - l.limit/2 }

// capacity is how many bytes a segment may hold. The tail is cut into eight or so, each let go as a whole.
func (l *taskLog) capacity(start int64) int64 {
	if start < l.headBytes() {
		return l.headBytes() - start
	}
	return max(minSegmentBytes, l.tailBytes()/8)
}

// write appends data. After an error what was not written counts as missing, and the next write tries anew.
func (l *taskLog) write(data []byte) error {
	for len(data) > 0 {
		n := len(l.segments)
		if n == 0 || l.torn || l.segments[n-1].size >= l.capacity(l.segments[n-1].start) {
			if err := l.nextSegment(); err != nil {
				l.skip(len(data))
				return err
			}
		}
		segment := &l.segments[len(l.segments)-1]
		piece := data[:min(int64(len(data)), l.capacity(segment.start)-segment.size)]
		written, err := l.append(segment, piece)
		segment.size += int64(written)
		l.total += int64(written)
		data = data[written:]
		if err != nil {
			l.skip(len(data))
			return err
		}
		l.lastByte = piece[len(piece)-1]
	}
	return nil
}

// skip counts bytes that could not be written.
func (l *taskLog) skip(n int) {
	l.closeFile()
	l.total += int64(n)
	l.lastByte = 0
	l.torn = true
}

// nextSegment begins a file and lets go of those that neither half needs any more.
func (l *taskLog) nextSegment() error {
	l.closeFile()
	segment := logSegment{start: l.total}
	file, err := os.OpenFile(filepath.Join(l.dir, segment.name()), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	l.keepOpen(file)
	l.segments = append(l.segments, segment)
	l.torn = false
	l.segments = slices.DeleteFunc(l.segments, func(s logSegment) bool {
		if s.start < l.headBytes() || s.start == segment.start || l.total-s.end() < l.tailBytes() {
			return false
		}
		return l.remove(s)
	})
	if len(l.segments) > maxLogSegments && l.remove(l.segments[1]) {
		l.segments = slices.Delete(l.segments, 1, 2)
	}
	return nil
}

// remove reports whether the segment is gone. Windows keeps one that is being read; it is tried again next time.
func (l *taskLog) remove(s logSegment) bool {
	err := os.Remove(filepath.Join(l.dir, s.name()))
	return err == nil || errors.Is(err, fs.ErrNotExist)
}

func (l *taskLog) append(s *logSegment, data []byte) (int, error) {
	if l.file != nil {
		return l.file.Write(data)
	}
	file, err := os.OpenFile(filepath.Join(l.dir, s.name()), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return 0, err
	}
	n, err := file.Write(data)
	l.keepOpen(file)
	return n, err
}

// keepOpen keeps the file for the next write if there is a slot for it, and closes it otherwise.
func (l *taskLog) keepOpen(file *os.File) {
	select {
	case l.slots <- struct{}{}:
		l.file = file
	default:
		file.Close()
	}
}

func (l *taskLog) closeFile() {
	if l.file != nil {
		l.file.Close()
		l.file = nil
		<-l.slots
	}
}

// close ends the log. An empty last file says that bytes before it are missing.
func (l *taskLog) close() {
	if l.torn {
		l.nextSegment() // no room for it either: then the end is missing without a mark
	}
	l.closeFile()
}

// readLogSegments lists the files of a log in their order.
func readLogSegments(dir string) ([]logSegment, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var segments []logSegment
	for _, entry := range entries {
		digits, ok := strings.CutPrefix(entry.Name(), logFilePrefix)
		start, err := strconv.ParseInt(digits, 10, 64)
		if !ok || err != nil || start < 0 || strconv.FormatInt(start, 10) != digits || !entry.Type().IsRegular() {
			continue
		}
		if info, err := entry.Info(); err == nil && start+info.Size() >= start {
			segments = append(segments, logSegment{start, info.Size()})
		}
	}
	slices.SortFunc(segments, func(a, b logSegment) int {
		if a.start < b.start {
			return -1
		}
		return 1
	})
	return segments, nil
}

// logEnd is the number of bytes a log has had.
func logEnd(segments []logSegment) int64 {
	var end int64
	for _, s := range segments {
		end = max(end, s.end())
	}
	return end
}

// missing is what a reader finds in place of n bytes.
func missing(n int64) string {
	return fmt.Sprintf("\n[… %d bytes of output are not kept …]\n", n)
}

func attemptFailed(attempt int, reason string) string {
	reason = strings.Join(strings.Fields(reason), " ")
	return fmt.Sprintf("--- attempt %d failed (%s); attempt %d follows ---\n", attempt, reason, attempt+1)
}

func attemptResumes(attempt int) string {
	return fmt.Sprintf("--- attempt %d follows; the one before it was cut off ---\n", attempt)
}

// A logPart is a stretch of a log: bytes of a file, or missing ones.
type logPart struct {
	segment  logSegment
	from, to int64 // in the whole log
	missing  bool
}

// logParts says what of a log is shown when it is longer than limit: its first and last half.
func logParts(segments []logSegment, limit int64) []logPart {
	total := logEnd(segments)
	shown := [][2]int64{{0, total}}
	if total > limit {
		shown = [][2]int64{{0, limit / 2}, {total - (limit - limit/2), total}}
	}
	var parts []logPart
	var at int64
	add := func(part logPart) {
		if part.from > at {
			parts = append(parts, logPart{from: at, to: part.from, missing: true})
		}
		if part.to > part.from {
			parts = append(parts, part)
		}
		at = max(at, part.to)
	}
	for _, s := range segments {
		for _, span := range shown {
			from, to := max(s.start, span[0], at), min(s.end(), span[1])
			if from < to {
				add(logPart{segment: s, from: from, to: to})
			}
		}
	}
	add(logPart{from: total, to: total})
	return parts
}

// A logReader reads a log part by part.
type logReader struct {
	dir     string
	parts   []logPart
	current io.Reader // of the part that is being read
	file    *os.File  // behind current, nil for missing bytes
}

func newLogReader(dir string, segments []logSegment, limit int64) *logReader {
	l := &logReader{dir: dir, parts: logParts(segments, max(0, limit))}
	l.keepCharactersWhole()
	return l
}

func (l *logReader) Read(p []byte) (int, error) {
	for {
		if l.current == nil {
			if len(l.parts) == 0 {
				return 0, io.EOF
			}
			l.next()
		}
		n, err := l.current.Read(p)
		if n > 0 || len(p) == 0 {
			return n, nil
		}
		if err != nil {
			l.Close()
			if err != io.EOF {
				return 0, err
			}
		}
	}
}

// next begins the next part. A file that has been let go meanwhile is a hole.
func (l *logReader) next() {
	part := l.parts[0]
	l.parts = l.parts[1:]
	if !part.missing {
		file, err := os.Open(filepath.Join(l.dir, part.segment.name()))
		if err == nil {
			l.file = file
			l.current = io.NewSectionReader(file, part.from-part.segment.start, part.to-part.from)
			return
		}
	}
	l.current = strings.NewReader(missing(part.to - part.from))
}

// Close lets go of the file that is being read.
func (l *logReader) Close() error {
	l.current = nil
	if l.file == nil {
		return nil
	}
	err := l.file.Close()
	l.file = nil
	return err
}

// keepCharactersWhole widens each hole by the pieces of UTF-8 characters at its edges.
func (l *logReader) keepCharactersWhole() {
	for i := range l.parts {
		hole := &l.parts[i]
		if !hole.missing {
			continue
		}
		if i > 0 && !l.parts[i-1].missing {
			before := &l.parts[i-1]
			before.to -= brokenEnd(l.peek(*before, max(before.from, before.to-utf8.UTFMax), before.to))
			hole.from = before.to
		}
		if i+1 < len(l.parts) && !l.parts[i+1].missing {
			after := &l.parts[i+1]
			after.from += brokenStart(l.peek(*after, after.from, min(after.to, after.from+utf8.UTFMax)))
			hole.to = after.from
		}
	}
}

func (l *logReader) peek(part logPart, from, to int64) []byte {
	file, err := os.Open(filepath.Join(l.dir, part.segment.name()))
	if err != nil {
		return nil
	}
	defer file.Close()
	data := make([]byte, to-from)
	n, _ := file.ReadAt(data, from-part.segment.start)
	return data[:n]
}

// brokenEnd is how many bytes at the end of data begin a character that is not all there.
func brokenEnd(data []byte) int64 {
	for n := 1; n <= min(len(data), utf8.UTFMax); n++ {
		if tail := data[len(data)-n:]; utf8.RuneStart(tail[0]) {
			if utf8.FullRune(tail) {
				return 0
			}
			return int64(n)
		}
	}
	return 0
}

// brokenStart is how many bytes at the start of data end a character whose beginning is missing.
func brokenStart(data []byte) int64 {
	for n, b := range data[:min(len(data), utf8.UTFMax)] {
		if utf8.RuneStart(b) {
			return int64(n)
		}
	}
	return 0
}
