package main

// journal_compact_test.go looks at the room that the journal takes, on disk and in memory.

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"
)

func TestJournalIdleIsSmall(t *testing.T) {
	dir := t.TempDir()
	j, _ := mustOpenJournal(t, dir, smallJournal)
	for i := range 30 {
		id := fmt.Sprint(i)
		mustAccept(t, j, id, strings.Repeat("x", 1000))
		must(t, j.finished(outcomeOf(id)))
		must(t, j.reported(id))
	}
	waitFor(t, 10*time.Second, func() string {
		if n := j.stats().Bytes; n > smallJournal.idleGarbage+30*outcomeBytes {
			return fmt.Sprintf("still %d bytes", n)
		}
		return ""
	})
	must(t, j.close())
	j, _ = mustOpenJournal(t, dir, smallJournal)
	if status, _ := j.outcome("0"); status != statusFinish {
		t.Error("compaction forgot an outcome")
	}
}

// A task whose record is damaged on disk neither stops compaction for ever nor takes others with it.
func TestJournalCompactsAroundDamage(t *testing.T) {
	dir := t.TempDir()
	j, _ := mustOpenJournal(t, dir, smallJournal)
	mustAccept(t, j, "damaged", "some data")
	place := j.tasks["damaged"]
	f, err := os.OpenFile(place.segment.path, os.O_RDWR, 0)
	must(t, err)
	_, err = f.WriteAt([]byte("X"), place.offset+place.bytes()-1)
	must(t, errors.Join(err, f.Close()))
	if _, err := j.data("damaged"); codeOf(err) != codeJournalRead {
		t.Fatalf("data of a damaged task: %v", err)
	}
	mustAccept(t, j, "good", "other data")
	for i := range 30 {
		mustAccept(t, j, fmt.Sprint(i), strings.Repeat("x", 1000))
		must(t, j.finished(outcomeOf(fmt.Sprint(i))))
		must(t, j.reported(fmt.Sprint(i)))
	}
	must(t, j.finished(outcomeOf("damaged")))
	must(t, j.reported("damaged"))
	j.mu.Lock()
	j.compactAfter = time.Time{}
	j.mu.Unlock()
	mustAccept(t, j, "wakes compaction", "")
	waitFor(t, 10*time.Second, func() string {
		if _, err := os.Stat(place.segment.path); err == nil {
			return "the damaged segment is still there"
		}
		return ""
	})
	assertData(t, j, "good", "other data")
}

func TestJournalOutcomeMemory(t *testing.T) {
	var m outcomeMemory
	statuses := []taskStatus{statusFinish, statusError, statusTimeout, statusTerminate}
	for i := range outcomesKept + 100 {
		m.remember(fmt.Sprint(i), statuses[i%4])
	}
	dir := t.TempDir()
	j, _ := mustOpenJournal(t, dir, defaultJournalSizes())
	j.mu.Lock()
	j.outcomes = m
	_, err := j.append(m.frame(), true)
	j.mu.Unlock()
	must(t, err)
	must(t, j.close())
	j, _ = mustOpenJournal(t, dir, defaultJournalSizes())
	must(t, j.finished(outcomeOf("new")))
	for i, want := range map[int]taskStatus{0: "", 99: "", 100: "", 101: statusError, 102: statusTimeout, 103: statusTerminate,
		outcomesKept + 96: statusFinish} {
		if got, _ := j.outcome(fmt.Sprint(i)); got != want {
			t.Errorf("outcome(%d) = %q; want %q", i, got, want)
		}
	}
}

func TestJournalHundredThousandTasks(t *testing.T) {
	const count = 100_000
	dir := t.TempDir()
	j, _ := mustOpenJournal(t, dir, defaultJournalSizes())
	data := bytes.Repeat([]byte("d"), 1024)
	for i := range count {
		err := j.accept(journalTask{ID: fmt.Sprintf("018f0000-0000-7000-8000-%012d", i), Subject: "local.hello", Event: "hello",
			Held: true, CreatedAt: time.Now()}, data)
		must(t, err)
	}
	must(t, j.close())
	j = nil
	before := heapInUse()
	begun := time.Now()
	j, tasks, err := openJournal(dir)
	must(t, err)
	defer j.close()
	took := time.Since(begun)
	if len(tasks) != count || tasks[count-1].Event != "hello" {
		t.Fatalf("%d tasks", len(tasks))
	}
	for i := 1; i < count; i++ {
		if tasks[i].ID <= tasks[i-1].ID {
			t.Fatalf("task %d is out of order", i)
		}
	}
	tasks = nil
	used := heapInUse() - before
	t.Logf("opened in %v, %d KiB of memory", took, used>>10)
	if used > 25<<20 {
		t.Errorf("%d tasks take %d bytes of memory", count, used)
	}
	if took > 10*time.Second {
		t.Errorf("opening took %v", took)
	}
	runtime.KeepAlive(j)
}

func heapInUse() int64 {
	runtime.GC()
	runtime.GC()
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	return int64(stats.HeapAlloc)
}
