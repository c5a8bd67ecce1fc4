package main

import (
	"fmt"
	"sync"
	"testing"
	"time"
)

// TestFollowedTasksEndWhileListed lists the followed tasks again and again while they end: neither may wait for the other
// for ever.
func TestFollowedTasksEndWhileListed(t *testing.T) {
	recs := openTestRecords(t, t.TempDir(), testRetain)
	f := newFollower(newLocalBroker(), recs)
	const tasks = 500
	followed := make([]*followedTask, tasks)
	for i := range followed {
		id := fmt.Sprint("task-", i)
		f.follow(id, "e", "E")
		followed[i] = f.tasks[id]
	}
	done := make(chan struct{})
	go func() { // ends with both loops, or never
		defer close(done)
		var loops sync.WaitGroup
		loops.Add(2)
		go func() {
			defer loops.Done()
			for _, task := range followed {
				f.finished(task, statusFinish)
			}
		}()
		go func() {
			defer loops.Done()
			for f.busy() {
				f.waiting()
			}
		}()
		loops.Wait()
	}()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Fatal("listing and ending wait for each other")
	}
}
