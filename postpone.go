package main

// postpone.go is what a task waits for besides a slot. It holds the tasks of a job back for a moment when one of them
// could not be started because this host lacks something: room in its working folder, descriptors, processes, memory.
// Without that a long queue would be gone through again and again, each task with its lines in log and journal.

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
		w.log.Error("task postponed; its job is tried again every second", errAttrs(reason), "task_id", t.id, "event", t.event)
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
		w.log.Info("tasks of the job are started again", "event", event)
	}
}

// maxCrashPause is the longest pause before a task is started again whose worker has died with it.
const maxCrashPause = 10 * time.Second

// crashPause is how long a task waits that has been running when its worker died, so many times in a row. It may have
// been the reason, or the host was short of memory for all of them: then the starts that it is allowed must not be used
// up within a second.
func crashPause(crashes int) time.Duration {
	if crashes < 2 {
		return 0
	}
	return min(time.Second<<min(crashes-2, 10), maxCrashPause)
}

// laterOf is due, or the end of a pause that begins now, whichever is later.
func laterOf(due time.Time, pause time.Duration) time.Time {
	if end := time.Now().Add(pause); pause > 0 && end.After(due) {
		return end
	}
	return due
}

// pauseUntil is how long to wait for due. It may have been written before this host's clock was set, so it is never
// longer than any pause that is asked for.
func pauseUntil(due time.Time) time.Duration {
	if due.IsZero() {
		return 0
	}
	return max(0, min(time.Until(due), maxRetryPause))
}
