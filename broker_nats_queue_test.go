//go:build unix

package main

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// A refusingWorker accepts tasks only when it can, as a worker whose journal cannot be written.
type refusingWorker struct {
	can atomic.Bool

	mu       sync.Mutex
	accepted map[string]int
	refused  int
}

func (w *refusingWorker) take(d Delivery) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.can.Load() {
		w.refused++
		d.Nack(errors.New("disk full"))
		return
	}
	if w.accepted == nil {
		w.accepted = map[string]int{}
	}
	w.accepted[string(d.Data)]++
}

// missing says what is not yet true of n tasks that were accepted once each.
func (w *refusingWorker) missing(n int) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	for task, times := range w.accepted {
		if times != 1 {
			return fmt.Sprintf("%s was accepted %d times", task, times)
		}
	}
	if len(w.accepted) != n {
		return fmt.Sprintf("%d tasks accepted, %d refusals; want %d", len(w.accepted), w.refused, n)
	}
	return ""
}

// TestNATSRefusedTasksAreKept lets the only worker refuse plain tasks for a while: it gets them again.
func TestNATSRefusedTasksAreKept(t *testing.T) {
	s := newNATSServer(t)
	b, changed := openNATSForTest(t, s.config())
	nextChange(t, changed, isConnected)
	w := &refusingWorker{}
	c := b.Consume("P.job", freeSlots(1), w.take)
	<-c.Ready()
	const tasks = 300
	for i := range tasks {
		s.publish(t, "P.job", fmt.Sprint("task-", i))
	}
	waitFor(t, 10*time.Second, func() string {
		q := c.(*natsQueue)
		q.mu.Lock()
		defer q.mu.Unlock()
		if q.running != 1 || !q.refusing || len(q.waiting) < tasks-1 {
			return fmt.Sprintf("%d waiting, %d goroutines, refusing %v", len(q.waiting), q.running, q.refusing)
		}
		return ""
	})
	w.can.Store(true)
	waitFor(t, 10*time.Second, func() string { return w.missing(tasks) })
	c.Stop()
}

// TestNATSRefusedTasksGoToOthers lets one of two workers refuse, and stop while it refuses: the other has them all.
func TestNATSRefusedTasksGoToOthers(t *testing.T) {
	s := newNATSServer(t)
	b, changed := openNATSForTest(t, s.config())
	nextChange(t, changed, isConnected)
	full, sound := &refusingWorker{}, &refusingWorker{}
	sound.can.Store(true)
	c := b.Consume("P.job", freeSlots(1), full.take)
	<-c.Ready()
	const tasks = 100
	for i := range tasks {
		s.publish(t, "P.job", fmt.Sprint("task-", i))
	}
	other, changed := openNATSForTest(t, s.config())
	nextChange(t, changed, isConnected)
	d := other.Consume("P.job", freeSlots(1), sound.take)
	<-d.Ready()
	waitFor(t, 10*time.Second, func() string {
		sound.mu.Lock()
		defer sound.mu.Unlock()
		if len(sound.accepted) < tasks/8 {
			return fmt.Sprintf("the other worker has %d tasks", len(sound.accepted))
		}
		return ""
	})
	c.Stop()
	waitFor(t, 10*time.Second, func() string { return sound.missing(tasks) })
	d.Stop()
}
