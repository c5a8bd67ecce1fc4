package main

// journal_segment_test.go damages the journal's files, in every way that a crash or a disk may, and looks at what is
// read of them.

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func readFolder(t testing.TB, dir string) map[string]string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	must(t, err)
	content := map[string]string{}
	for _, path := range files {
		content[filepath.Base(path)] = string(readFile(t, path))
	}
	return content
}

// aSmallJournal gives the bytes of a segment with some tasks, and where the record of each ends.
func aSmallJournal(t testing.TB) (file []byte, ends []int64, data map[string]string) {
	dir := t.TempDir()
	j, _ := mustOpenJournal(t, dir, smallJournal)
	data = map[string]string{}
	for i := range 4 {
		id := fmt.Sprintf("task-%d", i)
		data[id] = strings.Repeat(id, 5*i)
		mustAccept(t, j, id, data[id])
		ends = append(ends, j.stats().Bytes)
	}
	must(t, j.close())
	return readFile(t, segmentPath(dir, 1)), ends, data
}

// freshFolder holds one segment with these bytes.
func freshFolder(t testing.TB, file []byte) string {
	dir := t.TempDir()
	must(t, os.WriteFile(segmentPath(dir, 1), file, 0o600))
	return dir
}

func TestJournalTornAtEveryByte(t *testing.T) {
	file, ends, data := aSmallJournal(t)
	for size := range len(file) + 1 {
		dir := freshFolder(t, file[:size])
		want := map[string]string{}
		good := int64(segmentHeaderBytes)
		for i, end := range ends {
			if int64(size) >= end {
				id := fmt.Sprintf("task-%d", i)
				want[id], good = data[id], end
			}
		}
		j, tasks := mustOpenJournal(t, dir, smallJournal)
		assertTasks(t, j, tasks, want)
		if torn := max(0, int64(size)-good); j.stats().TornBytes != torn || j.stats().DamagedBytes != 0 {
			t.Fatalf("cut at %d: stats() = %+v; want %d torn", size, j.stats(), torn)
		} else if kept, _ := os.ReadFile(filepath.Join(dir, "0000000001.torn")); !bytes.Equal(kept, file[int64(size)-torn:size]) {
			t.Fatalf("cut at %d: kept %d bytes; want %d", size, len(kept), torn)
		}
		mustAccept(t, j, "after", "new")
		want["after"] = "new"
		must(t, j.close())
		j, tasks = mustOpenJournal(t, dir, smallJournal)
		assertTasks(t, j, tasks, want)
		if torn := j.stats().TornBytes; torn != 0 {
			t.Fatalf("cut at %d: %d bytes are torn again", size, torn)
		}
		must(t, j.close())
	}
}

func TestJournalBitFlips(t *testing.T) {
	file, ends, data := aSmallJournal(t)
	for at := range file {
		flipped := bytes.Clone(file)
		flipped[at] ^= 1 << (at % 8)
		dir := freshFolder(t, flipped)
		want := map[string]string{}
		from := int64(segmentHeaderBytes)
		for i, end := range ends {
			if hit := int64(at) >= from && int64(at) < end; !hit {
				id := fmt.Sprintf("task-%d", i)
				want[id] = data[id]
			}
			from = end
		}
		j, tasks := mustOpenJournal(t, dir, smallJournal)
		assertTasks(t, j, tasks, want)
		if stats := j.stats(); (stats.TornBytes+stats.DamagedBytes > 0) != (at >= segmentHeaderBytes) {
			t.Fatalf("flip at %d: stats() = %+v", at, stats)
		}
		mustAccept(t, j, "after", "new")
		want["after"] = "new"
		must(t, j.close())
		j, tasks = mustOpenJournal(t, dir, smallJournal)
		assertTasks(t, j, tasks, want)
		must(t, j.close())
	}
}

// The zeros ahead of the records are no damage, are used up before there are more, and go when a segment is complete.
func TestJournalFilledAhead(t *testing.T) {
	dir := t.TempDir()
	j, _ := mustOpenJournal(t, dir, defaultJournalSizes())
	mustAccept(t, j, "one", "1")
	first, oneTask := readFile(t, segmentPath(dir, 1)), j.stats().Bytes
	mustAccept(t, j, "two", "2")
	open := readFile(t, segmentPath(dir, 1))
	if len(first) != fillAheadBytes || len(open) != fillAheadBytes {
		t.Errorf("the file has %d bytes, then %d; want %d", len(first), len(open), fillAheadBytes)
	}
	size := j.stats().Bytes
	must(t, j.close())
	if closed := readFile(t, segmentPath(dir, 1)); int64(len(closed)) != size {
		t.Errorf("closed, it has %d bytes; want %d", len(closed), size)
	}

	torn := bytes.Clone(open)
	torn[size-1]++
	for _, row := range []struct {
		name  string
		file  []byte
		last  bool
		bytes int64 // of whole records and headers
		tasks map[string]string
	}{
		{"killed", open, true, size, map[string]string{"one": "1", "two": "2"}},
		{"killed as it became complete", open, false, size + segmentHeaderBytes, map[string]string{"one": "1", "two": "2"}},
		{"power cut", torn, true, oneTask, map[string]string{"one": "1"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			dir := freshFolder(t, row.file)
			if !row.last {
				must(t, os.WriteFile(segmentPath(dir, 2), segmentHeader(1), 0o600))
			}
			j, tasks := mustOpenJournal(t, dir, defaultJournalSizes())
			assertTasks(t, j, tasks, row.tasks)
			stats := j.stats()
			if torn := row.bytes == oneTask; stats.Bytes != row.bytes || stats.TornBytes > 0 != torn || stats.DamagedBytes > 0 {
				t.Errorf("stats() = %+v; want %d bytes", stats, row.bytes)
			}
			mustAccept(t, j, "three", "3")
			must(t, j.close())
			j, tasks = mustOpenJournal(t, dir, defaultJournalSizes())
			row.tasks["three"] = "3"
			assertTasks(t, j, tasks, row.tasks)
			if stats := j.stats(); stats.TornBytes > 0 {
				t.Errorf("opened again: %+v", stats)
			}
		})
	}
}

// What stands in a task's data must never be taken for a record, not even a copy of the journal itself.
func TestJournalGarbage(t *testing.T) {
	file, _, data := aSmallJournal(t)
	for name, garbage := range map[string][]byte{
		"ones":    bytes.Repeat([]byte{0xff}, 5000),
		"markers": bytes.Repeat([]byte(frameMarker), 200_000),
		"itself":  file,
		"records": file[segmentHeaderBytes:],
	} {
		for _, last := range []bool{true, false} {
			dir := freshFolder(t, append(bytes.Clone(file), garbage...))
			if !last {
				must(t, os.WriteFile(segmentPath(dir, 2), segmentHeader(1), 0o600))
			}
			j, tasks := mustOpenJournal(t, dir, smallJournal)
			assertTasks(t, j, tasks, data)
			if stats := j.stats(); stats.TornBytes+stats.DamagedBytes != int64(len(garbage)) {
				t.Errorf("%s: stats() = %+v; want %d bytes", name, stats, len(garbage))
			}
			must(t, j.close())
		}
	}
}

func TestJournalDamagedHeader(t *testing.T) {
	file, _, data := aSmallJournal(t)
	dir := freshFolder(t, file)
	damaged := append(make([]byte, segmentHeaderBytes), file[segmentHeaderBytes:]...)
	for _, number := range []uint64{2, 3} {
		must(t, os.WriteFile(segmentPath(dir, number), damaged, 0o600))
	}
	j, tasks := mustOpenJournal(t, dir, smallJournal)
	assertTasks(t, j, tasks, data)
	if got := j.stats().DamagedBytes; got != 2*int64(len(damaged)) {
		t.Errorf("DamagedBytes = %d; want %d", got, 2*len(damaged))
	}
	if !bytes.Equal(readFile(t, segmentPath(dir, 3)+".damaged"), damaged) {
		t.Error("the damaged segment was not kept")
	}
}

// FuzzJournal opens whatever bytes: raw as the file, and payload, cut at its newlines, as whole records after it.
func FuzzJournal(f *testing.F) {
	file, _, _ := aSmallJournal(f)
	f.Add(file, []byte{})
	f.Add(file[:100], []byte("\x01\x00\x00\x01a\n\x02\x01a\x01\x01\x00\x00"))
	f.Add(file, []byte("\x06{\"task_id\":\"task-1\",\"status\":\"finish\"}\n\x07\x06task-1\n\x08"+strings.Repeat("\x01", 34)))
	f.Add(segmentHeader(1), []byte("\x04\x06task-2\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"))
	f.Fuzz(func(t *testing.T, raw, payloads []byte) {
		if salt, err := readSegmentHeader(bytes.NewReader(raw)); err == nil && len(raw) >= segmentHeaderBytes {
			for payload := range bytes.SplitSeq(payloads, []byte("\n")) {
				if len(payload) > 0 {
					frame := sealFrame(append(newFrame(payload[0], len(payload)), payload[1:]...))
					placeFrame(frame, salt, int64(len(raw)))
					raw = append(raw, frame...)
				}
			}
		}
		dir := freshFolder(t, raw)
		j, tasks, err := openJournalSized(dir, smallJournal)
		if err != nil {
			if codeOf(err) != codeJournalVersion {
				t.Fatal(err)
			}
			return
		}
		for _, task := range tasks {
			if _, err := j.data(task.ID); err != nil {
				t.Fatal(err)
			}
		}
		_, _, known := j.place("after")
		if !known {
			mustAccept(t, j, "after", "new")
		}
		must(t, j.close())
		j, again, err := openJournalSized(dir, smallJournal)
		must(t, err)
		defer j.close()
		if stats := j.stats(); len(again) != len(tasks) && len(again) != len(tasks)+1 || stats.TornBytes > 0 {
			t.Fatalf("reopened: %d tasks; had %d; %+v", len(again), len(tasks), stats)
		}
		if !known {
			assertData(t, j, "after", "new")
		}
	})
}
