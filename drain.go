package main

// drain.go is the end of a worker: what runs may end, the rest is put back, and what is known is reported.

import (
	"context"
	"sync"
	"time"
)

// drain is the graceful stop: nothing new is started, running tasks may end within the drain timeout, the rest is
// stopped and put back, and what is known is reported. ctx's end (a second signal) stops the rest at once.
func (w *worker) drain(ctx context.Context) {
	close(w.draining)
	w.background.Wait()
	var consumers []Consumer
	w.mu.Lock()
	w.state = stateDraining
	for _, l := range w.links {
		if !l.isLocal() { // what is created meanwhile waits in the journal
			for _, c := range l.consumers {
				consumers = append(consumers, c)
			}
		}
	}
	w.mu.Unlock()
	w.queue.pause(pausedByDrain)
	for _, c := range consumers {
		c.Stop()
	}
	w.looking.Wait()
	w.putBackWaiting()
	if n := w.runningTasks.Load(); n > 0 {
		w.log.Info("waiting for running tasks", "count", n, "limit", w.config().DrainTimeout.String())
	}
	patience, stop := context.WithTimeout(ctx, w.config().DrainTimeout)
	defer stop()
	for w.runningTasks.Load() > 0 && patience.Err() == nil {
		select {
		case <-patience.Done():
		case <-time.After(20 * time.Millisecond):
		}
	}
	w.cancel(errPutBack)
	everyTaskEnded := make(chan struct{})
	go func() { // ends when the last task has
		w.tasks.Wait()
		close(everyTaskEnded)
	}()
	select {
	case <-everyTaskEnded:
	case <-ctx.Done():
		w.killRunning()
		<-everyTaskEnded
	}
}

// putBackWaiting gives back what a durable broker can have delivered elsewhere while this worker drains.
func (w *worker) putBackWaiting() {
	var waiting []*task
	w.mu.Lock()
	for _, t := range w.known {
		if t.delivery != nil && t.status == statusQueued {
			waiting = append(waiting, t)
		}
	}
	w.mu.Unlock()
	for _, t := range waiting {
		if w.queue.remove(t) { // else it has got its slot just now
			w.putBack(t)
		}
	}
}

// close reports and writes what is left, after drain. What keeps claims alive and reports has gone on until here, and
// every task's last process is gone. When ctx ends, what is unsent is left to the journal.
func (w *worker) close(ctx context.Context) {
	w.spawner.close()
	var closing sync.WaitGroup
	for _, l := range w.openLinks() {
		l.quit()
		closing.Add(1)
		go func() { // ends within settleTimeout and what closing takes
			defer closing.Done()
			w.closeLink(ctx, l)
		}()
	}
	closing.Wait()
	w.hushing.Wait() // at most hushPause: no more tasks end
	if w.journal == nil {
		return
	}
	w.spares.close()
	if err := w.journal.close(); err != nil {
		w.log.Error("journal not closed", errAttrs(err))
	}
}

// killRunning shortens the grace of commands that are being stopped to nothing.
func (w *worker) killRunning() { w.hurryOnce.Do(func() { close(w.hurry) }) }
