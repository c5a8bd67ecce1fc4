//go:build unix

package main

import (
	"testing"
	"time"
)

// The broker is told of many tasks at a time that their subjects are listened on no more, and of each once.
func TestEndedTasksAreHushedTogether(t *testing.T) {
	w, stop := openWorkerForTest(t, t.TempDir(), "jobs: [{event: a, cmd: 'true'}]\n")
	hushed := make(chan time.Time, 10)
	began := time.Now()
	for range 3 {
		w.hush(func() { hushed <- time.Now() })
	}
	var last time.Time
	for range 3 {
		last = <-hushed
	}
	if took := last.Sub(began); took < hushPause {
		t.Errorf("hushed after %v, before others could join", took)
	}
	w.hush(func() { hushed <- time.Now() }) // the next ones are not kept waiting for ever
	<-hushed
	if n := len(hushed); n != 0 {
		t.Errorf("%d hushed again", n)
	}

	ended := 0
	w.hush(func() { ended++ })
	stop()
	if ended != 1 {
		t.Error("closed before the listening has ended")
	}
}
