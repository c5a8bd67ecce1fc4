package main

// execs_ledger.go keeps a note on disk of the processes that the execs lead. When child_execs_process is killed, the
// system ends at most the processes that it had started itself, not those that they had started in turn; whoever comes
// next finds them by this note and ends them, so that no exec runs twice.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// ledgerPause is how often a ledger that another process holds is asked for: nothing tells when it is free.
const ledgerPause = 50 * time.Millisecond

// An execLedger is the note and the right to run the execs of a data folder. A nil one notes nothing.
type execLedger struct {
	path string
	lock *os.File
	left []ledgerEntry // what was noted when it was opened

	mu      sync.Mutex // guards entries and the file
	entries map[string]ledgerEntry
}

// A ledgerEntry is one running exec.
type ledgerEntry struct {
	Key     string          `json:"key"`
	Process processIdentity `json:"process"` // leads the group
	Marks   []string        `json:"marks"`   // entries of the environment that all of its processes have
}

// openExecLedger waits until no other process runs the execs of dir, or ctx ends.
func openExecLedger(ctx context.Context, dir string, log *slog.Logger) (*execLedger, error) {
	op := fmt.Sprintf("open the note of execs in %q", dir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fail(codeExecLedger, op, err)
	}
	l := &execLedger{path: filepath.Join(dir, "execs.json"), entries: map[string]ledgerEntry{}}
	for told := false; ; told = true {
		var err error
		if l.lock, err = lockFile(filepath.Join(dir, "execs.lock")); err == nil {
			break
		}
		if !errors.Is(err, errJournalBusy) {
			return nil, fail(codeExecLedger, op, err)
		}
		if !told {
			log.Warn("another process still runs the execs, waiting until it has ended", "path", dir)
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(ledgerPause):
		}
	}
	text, err := os.ReadFile(l.path)
	if err == nil {
		err = json.Unmarshal(text, &l.left)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		log.Warn("what earlier execs have left running is not known", errAttrs(fail(codeExecLedger, op, err)))
	}
	return l, nil
}

// endLeft ends what was running when the last holder of the ledger was killed.
func (l *execLedger) endLeft(killAfter time.Duration) error {
	if err := endStaleExecs(l.left, killAfter); err != nil {
		return fail(codeExecLeft, "end what earlier execs have left running", err)
	}
	return nil
}

// note writes down that an exec runs. A computer that loses power needs no note afterwards, so nothing is synced.
func (l *execLedger) note(key string, p processIdentity, marks []string) error {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.entries[key] = ledgerEntry{key, p, marks}
	entries := []ledgerEntry{}
	for _, entry := range l.entries {
		entries = append(entries, entry)
	}
	text, err := json.Marshal(entries)
	if err == nil {
		err = os.WriteFile(l.path+".new", text, 0o600)
	}
	if err == nil {
		err = os.Rename(l.path+".new", l.path)
	}
	if err != nil {
		return fail(codeExecLedger, "note the process of an exec", err)
	}
	return nil
}

// forget drops an exec that does not run any more. On disk it may stay: a group that is gone is not mistaken for another.
func (l *execLedger) forget(key string) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.entries, key)
}

// close gives the ledger up; no exec may be running.
func (l *execLedger) close() {
	if l == nil {
		return
	}
	os.Remove(l.path)
	l.lock.Close()
}
