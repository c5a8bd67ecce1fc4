package main

// memory.go owns how much memory a worker holds on to besides what it needs: garbage that is not collected yet, and
// maps that were larger once.

import (
	"maps"
	"runtime/debug"
	runtimemetrics "runtime/metrics"
)

const (
	// garbageBytes is the garbage that a worker may gather however little it needs. Go would let it be as much as is
	// needed (GOGC=100), so that a long queue would take its room twice; but garbage comes from tasks that run, not from
	// those that wait, and is the same for either.
	garbageBytes = 6 << 20

	// minGCPercent is the least garbage, in percent of what is needed: collecting takes time by what is needed.
	minGCPercent = 25
)

// A garbageLimit keeps the garbage within its bounds as what is needed grows and shrinks.
type garbageLimit struct {
	percent int // in force; 0: the user has set limits of his own
	needed  [1]runtimemetrics.Sample
	most    uint64 // bytes that were needed since room was last given back
}

func newGarbageLimit(lookupEnv func(string) (string, bool)) *garbageLimit {
	g := &garbageLimit{percent: 100}
	for _, name := range []string{"GOGC", "GOMEMLIMIT"} {
		if value, _ := lookupEnv(name); value != "" {
			g.percent = 0
		}
	}
	g.needed[0].Name = "/gc/heap/live:bytes"
	return g
}

// adjust follows what is needed now. It is to be called every few seconds.
func (g *garbageLimit) adjust() {
	if g.percent == 0 {
		return
	}
	runtimemetrics.Read(g.needed[:])
	needed := g.needed[0].Value.Uint64()
	// A small change is not worth the stop that it takes.
	if percent := gcPercent(needed); percent < g.percent*4/5 || percent > g.percent*5/4 {
		g.percent = percent
		debug.SetGCPercent(percent)
	}
	// Go gives room back slowly, and not at all while nothing happens.
	if g.most = max(g.most, needed); g.most > garbageBytes && needed < g.most/2 {
		g.most = needed
		debug.FreeOSMemory()
	}
}

// gcPercent is the garbage that is put up with, in percent of the bytes that are needed.
func gcPercent(needed uint64) int {
	return int(min(100, max(minGCPercent, 100*garbageBytes/max(needed, 1))))
}

// largeMap is how many entries take enough room to matter.
const largeMap = 1000

// shrunk gives a map from which something was deleted, or a copy once it holds far fewer entries than the most it has
// held: a map itself never gives any room back. Each map has a most of its own.
func shrunk[K comparable, V any](m map[K]V, most *int) map[K]V {
	*most = max(*most, len(m)+1)
	if *most < largeMap || len(m) > *most/8 {
		return m
	}
	*most = len(m)
	smaller := make(map[K]V, len(m)) // maps.Clone would keep the room
	maps.Copy(smaller, m)
	return smaller
}
