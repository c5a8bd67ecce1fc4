package main

import (
	"slices"
	"testing"
	"time"
)

func TestProcessorLimit(t *testing.T) {
	var now time.Time
	var used time.Duration
	var in []int
	l := &processorLimit{
		set: func(n int) { in = append(in, n) }, used: func() time.Duration { return used }, now: func() time.Time { return now },
	}
	const light, busy = time.Duration(lightUse * 1e9), time.Duration(busyUse * 1e9) // of a second
	for _, step := range []struct {
		what       string
		past, used time.Duration
		want       []int
	}{
		{"works", time.Second, time.Second, nil},
		{"has little to do", time.Second, light - 1, []int{1}},
		{"still has", time.Second, busy, nil},
		{"works for a moment", processorsPause - 1, processorsPause, nil},
		{"works for a moment more", 1, 0, []int{2}},
		{"works as before", time.Second, light, nil},
		{"does nothing", time.Hour, 0, []int{1}},
	} {
		now, used, in = now.Add(step.past), used+step.used, nil
		l.handle(taskStarted{})
		if in != nil {
			t.Errorf("%s: it looks at what says nothing of the load", step.what)
		}
		if l.handle(taskQueued{}); !slices.Equal(in, step.want) {
			t.Errorf("%s: set to %v; want %v", step.what, in, step.want)
		}
	}
}
