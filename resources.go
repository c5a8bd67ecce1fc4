package main

// resources.go keeps the worker from starting tasks while this host has too little disk or memory for them (take_when
// in PROTOCOL section 2), and says so.

import (
	"context"
	"fmt"
	"strings"
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
		short := shortage(cfg.TakeWhen, cfg.DataDir)
		w.setProblem("resources", short)
		w.setProblem("record writes", w.records.mend())
		if short == "" {
			short = w.journalFault()
		}
		switch {
		case short != "" && !paused:
			w.queue.pause("resources")
			w.log.Warn("no new task is started", "err", short)
		case short == "" && paused:
			w.log.Info("tasks are started again")
			w.queue.resume("resources")
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

// shortage says what there is too little of, "" if nothing. What cannot be measured is taken as enough.
func shortage(need TakeWhen, dataDir string) string {
	var short []string
	if need.DiskFree > 0 {
		if usage, err := disk.Usage(dataDir); err == nil && usage.Free < uint64(need.DiskFree) {
			short = append(short, fmt.Sprintf("%d bytes free on the disk of %s, fewer than take_when.disk_free %d",
				usage.Free, dataDir, need.DiskFree))
		}
	}
	if need.MemoryFree > 0 {
		if memory, err := mem.VirtualMemory(); err == nil && memory.Available < uint64(need.MemoryFree) {
			short = append(short, fmt.Sprintf("%d bytes of memory available, fewer than take_when.memory_free %d",
				memory.Available, need.MemoryFree))
		}
	}
	if len(short) == 0 {
		return ""
	}
	return "tasks are not taken: " + strings.Join(short, "; ")
}
