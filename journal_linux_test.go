package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// On a disk that is really full no task is accepted, every accepted one can still start, finish and be reported, and
// all is well again once there is room.
func TestJournalFullDisk(t *testing.T) {
	disk := t.TempDir()
	if err := syscall.Mount("none", disk, "tmpfs", 0, "size=4m"); err != nil {
		t.Skipf("mount a small disk: %v", err)
	}
	t.Cleanup(func() { syscall.Unmount(disk, syscall.MNT_DETACH) })
	dir := filepath.Join(disk, "journal")
	j, _ := mustOpenJournal(t, dir, defaultJournalSizes())
	data := bytes.Repeat([]byte("d"), 20<<10)
	const count = 50
	for i := range count {
		mustAccept(t, j, fmt.Sprint(i), string(data))
	}

	filler := filepath.Join(disk, "filler")
	f, err := os.Create(filler)
	must(t, err)
	for err == nil {
		_, err = f.Write(data)
	}
	must(t, f.Close())
	for i := range count {
		id := fmt.Sprint(i)
		must(t, j.started(id, 1, processIdentity{PID: 1}))
		must(t, j.finished(outcomeOf(id)))
		must(t, j.reported(id))
	}
	if err := j.accept(journalTask{ID: "late"}, data); !errors.Is(err, syscall.ENOSPC) || codeOf(err) != codeJournalWrite {
		t.Fatalf("accept on a full disk: %v", err)
	}
	if err := j.writable(); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("writable() = %v", err)
	}
	if j.close() == nil {
		t.Error("close does not say that the disk is full")
	}

	// Also a worker that begins on a full disk answers for what it has.
	j, _ = mustOpenJournal(t, dir, defaultJournalSizes())
	if status, _ := j.outcome("0"); status != statusFinish {
		t.Error("an outcome is lost")
	}
	must(t, os.Remove(filler))
	waitFor(t, 5*time.Second, func() string { return fmtErr(j.writable()) })
	mustAccept(t, j, "after", "1")
}
