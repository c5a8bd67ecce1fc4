package main

import (
	"runtime"
	"strconv"
	"testing"
	"time"
)

// A worker with nothing to do has one processor of two, unless the user has said how many it is to have.
func TestIdleWorkerHasOneProcessor(t *testing.T) {
	t.Parallel()
	start := func(env ...string) (processors func() string) {
		a := newAgent(t, "jobs: []\n")
		a.env = append(a.env, env...)
		a.start()
		return func() string { return samplesOf(a.metrics())["go_sched_gomaxprocs_threads"] }
	}
	all := strconv.Itoa(runtime.NumCPU())
	want := all
	if all == "2" {
		want = "1"
	}
	// It starts first, so by the time that the other one has found that it has little to do, it would have found it too.
	chosen := start("GOMAXPROCS=" + all)
	unbidden := start()
	waitFor(t, 20*time.Second, func() string {
		if got := unbidden(); got != want {
			return "an idle worker has " + got + " processors, not " + want
		}
		return ""
	})
	if got := chosen(); got != all {
		t.Errorf("an idle worker with GOMAXPROCS=%s has %s", all, got)
	}
}
