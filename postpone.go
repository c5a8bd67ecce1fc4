package main

// postpone.go holds the tasks of a job back for a moment when one of them could not be started because this host lacks
// something: room in its working folder, descriptors, processes, memory. Without that a long queue would be gone through
// again and again, each task with its lines in log and journal.

import (
	"fmt"
	"time"
)

// postponePause is how long a job is left alone before the next try.
const postponePause = time.Second

// holdJob lets no task of t's job start for a moment, for reason. The log says it once for as long as it lasts.
func (w *worker) holdJob(t *task, reason error) {
	about := "postponed " + t.event
	w.mu.Lock()
	_, known := w.problems[about]
	w.problems[about] = fmt.Sprintf("tasks of job %q are postponed: %s", t.event, codedText(reason))
	w.mu.Unlock()
	if !known {
		w.log.Error("task postponed; its job is tried again every second", errAttrs(reason), "task", t.id, "job", t.event)
	}
	if w.queue.hold(t.event) {
		time.AfterFunc(postponePause, func() {
			w.queue.unhold(t.event)
			w.wakeConsumers()
		})
	}
}

// jobRuns notes that a task of a job could be started.
func (w *worker) jobRuns(event string) {
	about := "postponed " + event
	w.mu.Lock()
	_, postponed := w.problems[about]
	delete(w.problems, about)
	w.mu.Unlock()
	if postponed {
		w.log.Info("tasks of the job are started again", "job", event)
	}
}
