package main

// journal_sync_test.go lets the disk fail, or be slow, while entries are written and synced.

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// failingFile fails as a disk does.
type failingFile struct {
	journalFile
	writes, syncs, truncates *atomic.Bool // fail
}

func (f failingFile) WriteAt(p []byte, off int64) (int, error) {
	if f.writes.Load() {
		n, _ := f.journalFile.WriteAt(p[:len(p)/2], off)
		return n, syscall.ENOSPC
	}
	return f.journalFile.WriteAt(p, off)
}

func (f failingFile) Sync() error {
	if f.syncs.Load() {
		return syscall.EIO
	}
	return f.journalFile.Sync()
}

func (f failingFile) Truncate(size int64) error {
	if f.truncates.Load() {
		return syscall.EIO
	}
	return f.journalFile.Truncate(size)
}

func TestJournalFailingDisk(t *testing.T) {
	for _, kind := range []string{"write", "write and truncate", "sync"} {
		t.Run(kind, func(t *testing.T) {
			dir := t.TempDir()
			j, _ := mustOpenJournal(t, dir, defaultJournalSizes())
			var writes, syncs, truncates atomic.Bool
			j.mu.Lock()
			j.wrap = func(s *segment) { s.file = failingFile{s.file, &writes, &syncs, &truncates} }
			j.wrap(j.tail())
			j.mu.Unlock()
			mustAccept(t, j, "before", "1")
			mustAccept(t, j, "running", "2")
			must(t, j.started("running", 1, processIdentity{PID: 9}))
			err := j.accept(journalTask{ID: "held", Held: true}, []byte("4"))
			must(t, err)

			writes.Store(strings.HasPrefix(kind, "write"))
			syncs.Store(kind == "sync")
			truncates.Store(kind != "write")
			if err := j.accept(journalTask{ID: "failing"}, bytes.Repeat([]byte("z"), 5000)); codeOf(err) != codeJournalWrite {
				t.Fatalf("accept: %v", err)
			}
			if _, err := j.data("failing"); codeOf(err) != codeJournalTask {
				t.Errorf("a task whose acceptance failed is still there: %v", err)
			}
			if err := j.finished(outcomeOf("running")); codeOf(err) != codeJournalWrite {
				t.Fatalf("finished: %v", err)
			}
			if _, known := j.outcome("running"); known || j.writable() == nil {
				t.Errorf("outcome known: %v, writable() = %v", known, j.writable())
			}

			writes.Store(false)
			syncs.Store(false)
			truncates.Store(false)
			waitFor(t, 5*time.Second, func() string { return fmtErr(j.writable()) })
			must(t, j.finished(outcomeOf("running")))
			mustAccept(t, j, "failing", "3")
			want := map[string]string{"before": "1", "running": "2", "failing": "3", "held": "4"}
			assertTasks(t, j, map[string]journalTask{"before": {}, "running": {}, "failing": {}, "held": {}}, want)
			must(t, j.close())
			j, tasks := mustOpenJournal(t, dir, defaultJournalSizes())
			assertTasks(t, j, tasks, want)
			if tasks["running"].Outcome == nil || tasks["running"].Attempts != 1 {
				t.Errorf("running = %+v", tasks["running"])
			}
		})
	}
}

// gatedFile's syncs wait to be told how they end.
type gatedFile struct {
	journalFile
	begun chan bool
	end   chan error
	open  chan bool // closed: let all pass
}

func (f gatedFile) Sync() error {
	select {
	case f.begun <- true:
		return <-f.end
	case <-f.open:
		return f.journalFile.Sync()
	}
}

// Tasks that were not accepted because the sync failed do not come back, although their records reached the file; nor
// does the one that was written while that sync ran, whose own sync would wrongly have gone well.
func TestJournalFailedSyncIsNoAcceptance(t *testing.T) {
	dir := t.TempDir()
	j, _ := mustOpenJournal(t, dir, defaultJournalSizes())
	gate := gatedFile{j.tail().file, make(chan bool), make(chan error), make(chan bool)}
	j.mu.Lock()
	j.tail().file = gate
	j.mu.Unlock()
	failed := make(chan error, 2)
	accept := func(id string) {
		err := j.accept(journalTask{ID: id}, nil)
		failed <- err
	}
	go accept("first")
	<-gate.begun
	go accept("meanwhile")
	waitFor(t, 5*time.Second, func() string {
		j.mu.Lock()
		defer j.mu.Unlock()
		if j.batch == nil {
			return "the second task does not wait"
		}
		return ""
	})
	gate.end <- syscall.EIO
	for range 2 {
		if err := <-failed; !errors.Is(err, syscall.EIO) || codeOf(err) != codeJournalWrite {
			t.Errorf("accept: %v", err)
		}
	}
	waitFor(t, 5*time.Second, func() string { return fmtErr(j.writable()) })
	mustAccept(t, j, "after", "1")
	must(t, j.close())
	j, tasks := mustOpenJournal(t, dir, defaultJournalSizes())
	assertTasks(t, j, tasks, map[string]string{"after": "1"})
}

// Nobody hears of an outcome that a crash could still take back.
func TestJournalOutcomeOnceDurable(t *testing.T) {
	j, _ := mustOpenJournal(t, t.TempDir(), defaultJournalSizes())
	mustAccept(t, j, "a", "")
	gate := gatedFile{j.tail().file, make(chan bool), make(chan error), make(chan bool)}
	j.mu.Lock()
	j.tail().file = gate
	j.mu.Unlock()
	done := make(chan error)
	go func() { done <- j.finished(outcomeOf("a")) }()
	<-gate.begun
	if status, known := j.outcome("a"); known {
		t.Errorf("outcome before the sync: %q", status)
	}
	gate.end <- nil
	must(t, <-done)
	if status, _ := j.outcome("a"); status != statusFinish {
		t.Errorf("outcome after the sync: %q", status)
	}
	close(gate.open)
}

// However many wait, they share syncs.
func TestJournalGroupCommit(t *testing.T) {
	j, _ := mustOpenJournal(t, t.TempDir(), defaultJournalSizes())
	gate := gatedFile{j.tail().file, make(chan bool), make(chan error), make(chan bool)}
	j.mu.Lock()
	j.tail().file = gate
	j.mu.Unlock()
	const callers = 50
	var all sync.WaitGroup
	for i := range callers {
		all.Add(1)
		go func() {
			defer all.Done()
			mustAccept(t, j, fmt.Sprint(i), "data")
		}()
	}
	<-gate.begun
	waitFor(t, 5*time.Second, func() string {
		if n := j.stats().Entries; n < callers {
			return fmt.Sprintf("%d entries", n)
		}
		return ""
	})
	before := j.stats().Syncs
	gate.end <- nil
	<-gate.begun
	// What survives our own death does not wait for the disk.
	must(t, j.started("0", 1, processIdentity{PID: 1}))
	gate.end <- nil
	all.Wait()
	if n := j.stats().Syncs - before; n != 2 {
		t.Errorf("%d syncs; want 2", n)
	}
	close(gate.open)
}

func fmtErr(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
