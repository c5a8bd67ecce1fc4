package main

// processors.go owns how many processors the worker's own code runs on at once.

import (
	"runtime"
	"sync"
	"time"
)

const (
	// processorsPause is the least time between two looks at what the worker uses.
	processorsPause = 250 * time.Millisecond

	// A worker on two processors that uses less than lightUse of one, all in all, is left with one; above busyUse it
	// gets both again. That is the lower of the two, since the same work costs less on one: a third less where commands
	// are dear to start.
	lightUse = 0.5
	busyUse  = 0.45
)

// A processorLimit lets a worker on a host of two processors use one of them while it has little to do. Its threads then
// do not wake one another up for each step of a task, and do not start two commands at a time, which slows down those that
// run. Where commands are very short, or many clients create tasks, the second processor is worth more than that costs.
type processorLimit struct {
	set  func(int)            // nil: there is nothing to choose, or the user has chosen
	used func() time.Duration // processor time that this process has used
	now  func() time.Time

	mu     sync.Mutex
	one    bool
	looked time.Time
	spent  time.Duration // of processor time until then
}

func newProcessorLimit(lookupEnv func(string) (string, bool)) *processorLimit {
	l := &processorLimit{used: cpuTime, now: time.Now}
	// Only on Linux are commands started from whatever thread; and hosts with more processors were not measured.
	if chosen, _ := lookupEnv("GOMAXPROCS"); chosen == "" && runtime.GOOS == "linux" && runtime.NumCPU() == 2 {
		l.set = func(n int) { runtime.GOMAXPROCS(n) }
	}
	l.looked, l.spent = l.now(), l.used()
	return l
}

// handle looks when tasks come and end, so that a burst is noticed while it lasts; adjust is to be called now and then
// for all else.
func (l *processorLimit) handle(e event) {
	switch e.(type) {
	case taskQueued, taskFinished:
		l.adjust()
	}
}

// adjust follows what was used since the last look, if that is long enough ago.
func (l *processorLimit) adjust() {
	if l.set == nil || !l.mu.TryLock() {
		return
	}
	defer l.mu.Unlock()
	now := l.now()
	past := now.Sub(l.looked)
	if past < processorsPause {
		return
	}
	used := l.used()
	use := float64(used-l.spent) / float64(past)
	l.looked, l.spent = now, used
	switch {
	case l.one && use > busyUse:
		l.one = false
		l.set(2)
	case !l.one && use < lightUse:
		l.one = true
		l.set(1)
	}
}
