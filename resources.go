package main

// resources.go keeps the worker from starting tasks while this host has too little disk or memory for them (take_when
// in PROTOCOL section 2), and says so.

import (
	"context"
	"fmt"
	"time"

	"github.com/shirou/gopsutil/v3/disk"
	"github.com/shirou/gopsutil/v3/mem"
)

// resourcePause is how often the resources are looked at; nothing tells of their changes.
const resourcePause = 2 * time.Second

// watchResources pauses and resumes the starting of tasks until ctx ends.
func (w *worker) watchResources(ctx context.Context) {
	ticker := time.NewTicker(resourcePause)
	defer ticker.Stop()
	for paused := false; ; {
		cfg := w.config()
		lack := map[string]string{
			pausedByDisk: diskShortage(cfg.TakeWhen, cfg.DataDir), pausedByMemory: memoryShortage(cfg.TakeWhen),
			pausedByJournal: w.journalFault(),
		}
		short := ""
		for _, text := range []string{lack[pausedByDisk], lack[pausedByMemory]} {
			if text != "" && short == "" {
				short = "tasks are not taken: " + text
			} else if text != "" {
				short += "; " + text
			}
		}
		w.setProblem("resources", short)
		w.setProblem("record writes", w.records.mend())
		if short == "" {
			short = lack[pausedByJournal]
		}
		for reason, text := range lack {
			if text != "" {
				w.queue.pause(reason)
			}
		}
		for reason, text := range lack { // afterwards, so that one reason follows another without a gap
			if text == "" {
				w.queue.resume(reason)
			}
		}
		switch {
		case short != "" && !paused:
			w.log.Warn("no new task is started", "err", short)
		case short == "" && paused:
			w.log.Info("tasks are started again")
			w.wakeConsumers()
		}
		paused = short != ""
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
	}
}

// journalFault says why the journal cannot be written, "" if it can: a task could be started, but its start not be
// noted where the next worker would find its processes.
func (w *worker) journalFault() string {
	w.mu.Lock()
	starting := w.state == stateStarting
	w.mu.Unlock()
	if starting { // there is no journal yet, and no task either
		return ""
	}
	if err := w.journal.writable(); err != nil {
		return codedText(err)
	}
	return ""
}

// diskShortage says what there is too little of on the disk of the data, "" if nothing. What cannot be measured is taken
// as enough.
func diskShortage(need TakeWhen, dataDir string) string {
	if need.DiskFree > 0 {
		if usage, err := disk.Usage(dataDir); err == nil && usage.Free < uint64(need.DiskFree) {
			return fmt.Sprintf("%d bytes free on the disk of %s, fewer than take_when.disk_free %d",
				usage.Free, dataDir, need.DiskFree)
		}
	}
	return ""
}

// memoryShortage is the same of memory.
func memoryShortage(need TakeWhen) string {
	if need.MemoryFree > 0 {
		if memory, err := mem.VirtualMemory(); err == nil && memory.Available < uint64(need.MemoryFree) {
			return fmt.Sprintf("%d bytes of memory available, fewer than take_when.memory_free %d",
				memory.Available, need.MemoryFree)
		}
	}
	return ""
}
