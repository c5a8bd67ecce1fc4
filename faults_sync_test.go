//go:build linux

package main

// faults_sync_test.go is about workers whose disk does not do what it is told: what they must not say of a task, and
// must take back.

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// A brokenDisk refuses every write while it is broken.
type brokenDisk struct {
	journalFile
	broken *atomic.Bool
}

func (d brokenDisk) WriteAt(p []byte, off int64) (int, error) {
	if d.broken.Load() {
		return 0, syscall.EROFS
	}
	return d.journalFile.WriteAt(p, off)
}

// TestStopWhileJournalIsBroken stops a worker that cannot note how its tasks end: it stops in time, and they run again.
func TestStopWhileJournalIsBroken(t *testing.T) {
	dir := t.TempDir()
	jobs := "jobs: [{event: job, cmd: 'echo run >> runs; until test -e go; do sleep 0.02; done'}]\n"
	w, stop := openWorkerForTest(t, dir, jobs)
	var broken atomic.Bool
	w.journal.mu.Lock()
	w.journal.wrap = func(s *segment) { s.file = brokenDisk{s.file, &broken} }
	w.journal.wrap(w.journal.tail())
	w.journal.mu.Unlock()
	for range 3 {
		if _, err := w.create(t.Context(), "", "job", nil); err != nil {
			t.Fatal(err)
		}
	}
	running := int64(min(3, w.config().Concurrency))
	waitRuns(t, w, running)
	broken.Store(true)
	if _, err := w.create(t.Context(), "", "job", nil); codeOf(err) != codeJournalWrite {
		t.Errorf("create = %v; want %s", err, codeJournalWrite)
	}
	if err := os.WriteFile(filepath.Join(dir, "go"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	waitRuns(t, w, 0) // their ends wait for the journal
	if h := w.health(); h.Status != healthDown || !strings.Contains(fmt.Sprint(h.Problems), string(codeJournalWrite)) {
		t.Errorf("health is %+v", h)
	}
	began := time.Now()
	stop()
	if took := time.Since(began); took > settleTimeout {
		t.Errorf("stopping took %v", took)
	}
	broken.Store(false)

	w, stop = openWorkerForTest(t, dir, jobs)
	waitFor(t, 10*time.Second, func() string {
		if h := w.health(); h.Jobs.Finish != 3 {
			return fmt.Sprintf("health is %+v", h)
		}
		return ""
	})
	stop()
}

// TestToldWhenSure has a task run while the disk makes sure of it: nothing of it is told before.
func TestToldWhenSure(t *testing.T) {
	dir := t.TempDir()
	w, stop := openWorkerForTest(t, dir, "jobs: [{event: speaks, cmd: 'echo words; touch ran'}]\n")
	defer stop()
	var mu sync.Mutex
	var told []string
	w.bus.subscribe(func(e event) {
		mu.Lock()
		defer mu.Unlock()
		switch e.(type) {
		case taskTaken, taskOutput, taskNotified, taskFinished:
			told = append(told, e.eventName())
		}
	})
	w.journal.mu.Lock()
	gate := gatedFile{w.journal.tail().file, make(chan bool), make(chan error), make(chan bool)}
	w.journal.tail().file = gate
	w.journal.mu.Unlock()
	created := make(chan string, 1)
	go func() { // ends when the task is accepted
		id, err := w.create(t.Context(), "", "speaks", nil)
		if err != nil {
			t.Error(err)
		}
		created <- id
	}()
	<-gate.begun
	waitFor(t, 10*time.Second, func() string {
		_, err := os.Stat(filepath.Join(dir, "ran"))
		return unless(err == nil, "the command does not run")
	})
	mu.Lock()
	if len(told) > 0 {
		t.Errorf("%v were told before the disk was sure", told)
	}
	mu.Unlock()
	gate.end <- nil
	close(gate.open)
	<-created
	waitFor(t, 10*time.Second, func() string {
		mu.Lock()
		defer mu.Unlock()
		return unless(slices.Equal(told, []string{"task_taken", "task_output", "task_finished"}), fmt.Sprint("told: ", told))
	})
}

// TestFailedSyncTakesTaskBack has a task begin while the disk makes sure of it, which fails: whoever created it hears so,
// its command is ended, and nothing of it is left. One that has run to its end by then counts.
func TestFailedSyncTakesTaskBack(t *testing.T) {
	dir := t.TempDir()
	w, stop := openWorkerForTest(t, dir, `jobs:
  - {event: long, cmd: 'echo run >> runs; sleep 60'}
  - {event: short, cmd: 'echo run >> runs'}
`)
	runs := func() int {
		content, _ := os.ReadFile(filepath.Join(dir, "runs"))
		return strings.Count(string(content), "\n")
	}
	for n, row := range []struct {
		event string
		begun func() string // that it has come as far as it is to
		code  errCode
	}{
		{"long", func() string { return unless(runs() == 1 && w.runningTasks.Load() == 1, "it has not begun") }, codeJournalWrite},
		{"short", func() string { return unless(runs() == 2 && w.runningTasks.Load() == 0, "it has not ended") }, ""},
	} {
		w.journal.mu.Lock()
		gate := gatedFile{w.journal.tail().file, make(chan bool), make(chan error), make(chan bool)}
		w.journal.tail().file = gate
		w.journal.mu.Unlock()
		created := make(chan error, 1)
		go func() { // ends when the task is accepted, or not
			_, err := w.create(t.Context(), "", row.event, nil)
			created <- err
		}()
		<-gate.begun
		waitFor(t, 10*time.Second, row.begun)
		gate.end <- syscall.EIO
		close(gate.open)
		if err := <-created; codeOf(err) != row.code {
			t.Errorf("%s: create = %v; want %s", row.event, err, row.code)
		}
		waitFor(t, 10*time.Second, func() string {
			h := w.health()
			return unless(h.Status == healthOK && h.Jobs.Running+h.Jobs.Queued == 0 && h.Jobs.Finish == int64(n), fmt.Sprintf("health is %+v", h))
		})
	}
	if live := len(w.records.live); live > 0 {
		t.Errorf("%d records are left of it", live)
	}
	stop()
	w, _ = openWorkerForTest(t, dir, "jobs: [{event: long, cmd: 'echo run >> runs; sleep 60'}]\n")
	if h := w.health(); h.Jobs.Running+h.Jobs.Queued > 0 || runs() != 2 {
		t.Errorf("after a restart: %+v, %d runs", h, runs())
	}
}

// TestFailedSyncWhileStopping has that happen to a task that a stopping worker has put back already.
func TestFailedSyncWhileStopping(t *testing.T) {
	w, stop := openWorkerForTest(t, t.TempDir(), "jobs: [{event: long, cmd: 'sleep 60'}]\n")
	w.journal.mu.Lock()
	gate := gatedFile{w.journal.tail().file, make(chan bool), make(chan error), make(chan bool)}
	w.journal.tail().file = gate
	w.journal.mu.Unlock()
	created := make(chan error, 1)
	go func() { // ends when the task is accepted, or not
		_, err := w.create(t.Context(), "", "long", nil)
		created <- err
	}()
	<-gate.begun
	waitRuns(t, w, 1)
	stopped := make(chan struct{})
	go func() { // ends when the worker has
		stop()
		close(stopped)
	}()
	waitFor(t, 10*time.Second, func() string { return unless(w.counts.putBack.Load() == 1, "the task is not put back") })
	gate.end <- syscall.EIO
	close(gate.open)
	for what, ended := range map[string]func() error{
		"create": func() error { return <-created },
		"stop":   func() error { <-stopped; return nil },
	} {
		done := make(chan error, 1)
		go func() { done <- ended() }() // ends with it
		select {
		case err := <-done:
			if what == "create" && codeOf(err) != codeJournalWrite {
				t.Errorf("create = %v; want %s", err, codeJournalWrite)
			}
		case <-time.After(10 * time.Second):
			t.Errorf("%s does not end", what)
		}
	}
}
