package main

// journal_sync.go owns what makes the journal durable: the one goroutine that syncs, for all callers that wait at
// once, and what happens when the disk refuses.

import (
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"
)

// syncPace is the least time from one sync to the next when several wait at once: each sync costs the disk, and the host,
// much the same however many it serves.
const syncPace = 2 * time.Millisecond

// A syncBatch is everything that one sync makes durable, and those who wait for it.
type syncBatch struct {
	done     chan struct{}
	waiting  int
	err      error    // once done is closed
	accepted []string // tasks to be forgotten if it fails
}

// wait returns when the sync has been, with how it went. What nil stands for waits for none.
func (b *syncBatch) wait() error {
	if b == nil {
		return nil
	}
	<-b.done
	return b.err
}

// joinBatch gives the batch that the next sync settles. It needs mu.
func (j *journal) joinBatch() *syncBatch {
	if j.batch == nil {
		j.batch = &syncBatch{done: make(chan struct{})}
		select {
		case j.wake <- struct{}{}:
		default: // it is awake
		}
	}
	j.batch.waiting++
	return j.batch
}

// syncLoop ends, after a last sync, when quit is closed.
func (j *journal) syncLoop() {
	var last time.Time // when the last sync began
	crowded := false   // several waited for it
	for {
		idle := false
		select {
		case <-j.wake:
			if crowded {
				j.awaitCrowd(last.Add(syncPace))
			}
		case <-j.lazy.C:
			idle = true // under load, syncs for those who wait push this ahead of them
		case <-j.retry.C:
			j.recover()
			continue
		case <-j.quit:
			j.sync()
			return
		}
		last = time.Now()
		waited, err := j.sync()
		if crowded = waited > 1; err != nil {
			j.recover()
		} else {
			j.considerCompaction(idle)
		}
	}
}

// awaitCrowd waits until then, unless the journal is closed.
func (j *journal) awaitCrowd(until time.Time) {
	pause := time.Until(until)
	if pause <= 0 {
		return
	}
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-j.quit:
	}
}

// considerCompaction wakes compactLoop if there is something for it to do.
func (j *journal) considerCompaction(idle bool) {
	if j.worthCompacting(idle) {
		select {
		case j.compact <- idle:
		default:
		}
	}
}

// sync makes durable all that has been written until now, and gives how many waited for it. Only syncLoop calls it.
func (j *journal) sync() (waited int, err error) {
	j.mu.Lock()
	batch, segments, folder := j.batch, j.unsynced, j.folderDirty
	j.batch, j.unsynced, j.folderDirty = nil, nil, false
	for _, s := range segments {
		s.dirty = false
	}
	j.mu.Unlock()

	begun := time.Now()
	for _, s := range segments {
		if err == nil {
			err = s.file.Sync()
		}
	}
	if folder && err == nil {
		err = syncFolder(j.dir)
	}

	j.mu.Lock()
	defer j.mu.Unlock()
	if err != nil {
		j.distrust(segments, err)
		j.folderDirty = folder
	} else if len(segments) > 0 {
		j.counts.Syncs++
		j.counts.LastSyncAt, j.counts.LastSyncTook = time.Now(), time.Since(begun)
		j.syncTimes.observe(j.counts.LastSyncTook)
		for _, s := range segments {
			if s != j.tail() && !s.dirty {
				s.file.Close()
				s.file = nil
			}
		}
	}
	if batch != nil {
		waited = batch.waiting
		j.settle(batch, err)
	}
	return waited, err
}

// settle tells those who wait how the sync went. It needs mu.
func (j *journal) settle(batch *syncBatch, err error) {
	if err != nil {
		batch.err = j.fault
		for _, id := range batch.accepted {
			j.drop(id)
			j.cancelled = append(j.cancelled, id)
		}
	}
	close(batch.done)
}

// distrust is for a failed sync: the operating system may have thrown away what was written since the last good one,
// and the next sync of the same file would not say so. Nothing more goes there, and recover writes anew what these
// segments hold. It needs mu.
func (j *journal) distrust(segments []*segment, err error) {
	j.failed("sync", err)
	j.counts.SyncErrors++
	j.tail().suspect = true
	for _, s := range append(segments, j.unsynced...) {
		s.suspect, s.dirty = true, false
	}
	j.unsynced = nil
	if j.batch != nil { // written while the sync ran
		j.settle(j.batch, err)
		j.batch = nil
	}
}

// recover tries to get over a fault; if it cannot, the timer brings us here again. Only syncLoop calls it.
func (j *journal) recover() {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.tail().suspect {
		if err := j.replaceTail(); err != nil {
			j.failed("repair", err)
			j.retry.Reset(syncDelay)
			return
		}
	}
	if !j.reserved {
		if err := j.fillReserve(); err != nil {
			j.failed("reserve space for", err)
			j.retry.Reset(syncDelay)
			return
		}
	}
	j.fault = nil
}

// replaceTail begins a new segment with everything that only suspect ones hold, and syncs it. It needs mu.
func (j *journal) replaceTail() error {
	s, err := j.newSegment()
	if err != nil {
		return err
	}
	moved := map[string]recordPlace{}
	for _, id := range j.cancelled {
		if err == nil {
			_, err = s.write(idFrame(recordReleased, id))
		}
	}
	if len(j.outcomes.ring) > 0 && err == nil {
		_, err = s.write(j.outcomes.frame())
	}
	for id, place := range j.tasks {
		run := j.runs[id]
		if run == nil && !place.segment.suspect || err != nil {
			continue
		}
		if frame, damaged := frameToMove(place, run); damaged == nil {
			moved[id], err = s.write(frame)
		}
	}
	if err == nil {
		err = s.file.Sync()
	}
	if err == nil {
		err = syncFolder(j.dir)
	}
	if err != nil {
		s.file.Close()
		os.Remove(s.path)
		return err
	}

	for _, old := range j.segments {
		if old.suspect {
			old.file.Close()
			old.file, old.suspect = nil, false
		}
	}
	j.segments = append(j.segments, s)
	for id, place := range moved {
		j.move(id, place)
		if run := j.runs[id]; run != nil {
			run.unsynced = false
		}
	}
	j.cancelled = nil
	return nil
}

func (j *journal) reservePath() string { return filepath.Join(j.dir, "reserve") }

// fillReserve makes sure that the reserve is there, on disk. It needs mu.
func (j *journal) fillReserve() error {
	if info, err := os.Stat(j.reservePath()); err == nil && info.Size() == j.sizes.reserve {
		j.reserved = true
		return nil
	}
	f, err := os.OpenFile(j.reservePath(), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	// Noise, since zeros would take no room where files are compressed.
	_, err = io.CopyN(f, rand.NewChaCha8([32]byte{}), j.sizes.reserve)
	if err == nil {
		err = f.Sync()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		os.Remove(j.reservePath())
		return err
	}
	j.reserved = true
	return nil
}

// dropReserve gives the reserved room back; false if it is gone already. It needs mu.
func (j *journal) dropReserve() bool {
	if !j.reserved {
		return false
	}
	j.reserved = false
	return os.Remove(j.reservePath()) == nil
}
