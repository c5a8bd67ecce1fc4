package main

// memory.go owns how much memory a process holds on to besides what it needs: garbage that is not collected yet, and
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

	// idleGarbageBytes is the garbage that a process may hold while it has little to do. Go would let it be some 4 MB.
	idleGarbageBytes = 1 << 20

	// idleBytes is what a worker that has little to do allocates at most from one look to the next.
	idleBytes = 64 << 10

	// minGCPercent is the least garbage, in percent of what is needed: collecting takes time by what is needed.
	minGCPercent = 25

	// parentGCPercent is also of the 4 MB that Go collects no garbage below. With less, it would collect at the start.
	parentGCPercent = 50
)

// A garbageLimit keeps the garbage within its bounds as what is needed grows and shrinks.
type garbageLimit struct {
	percent int // in force; 0: the user has set limits of his own
	heap    heapUse
	most    uint64 // bytes that were needed since room was last given back
	held    uint64 // bytes in the heap at the last look
}

func newGarbageLimit(lookupEnv func(string) (string, bool)) *garbageLimit {
	g := &garbageLimit{percent: 100, heap: newHeapUse()}
	if hasMemoryLimits(lookupEnv) {
		g.percent = 0
	}
	return g
}

// hasMemoryLimits reports whether the user has set limits of his own.
func hasMemoryLimits(lookupEnv func(string) (string, bool)) bool {
	for _, name := range []string{"GOGC", "GOMEMLIMIT"} {
		if value, _ := lookupEnv(name); value != "" {
			return true
		}
	}
	return false
}

// limitParentGarbage is for a process that only looks after others: it has time to collect its garbage early.
func limitParentGarbage(lookupEnv func(string) (string, bool)) {
	if !hasMemoryLimits(lookupEnv) {
		debug.SetGCPercent(parentGCPercent)
	}
}

// adjust follows what is needed now. It is to be called every few seconds.
func (g *garbageLimit) adjust() {
	if g.percent == 0 {
		return
	}
	needed, held := g.heap.read()
	// A small change is not worth the stop that it takes.
	if percent := gcPercent(needed); percent < g.percent*4/5 || percent > g.percent*5/4 {
		g.percent = percent
		debug.SetGCPercent(percent)
	}
	// Go gives room back slowly, and not at all while nothing happens.
	g.most = max(g.most, needed)
	shrunk := g.most > garbageBytes && needed < g.most/2
	idle := held < g.held+idleBytes
	if g.held = held; shrunk || idle && held > needed+idleGarbageBytes {
		g.most = needed
		debug.FreeOSMemory()
	}
}

// freeGarbage gives back what has been left behind since the last collection, if that is worth one: what Go keeps for
// collecting takes half a megabyte, from the first time on.
func freeGarbage() {
	heap := newHeapUse()
	if needed, held := heap.read(); held > needed+idleGarbageBytes {
		debug.FreeOSMemory()
	}
}

// A heapUse reads how full the heap is.
type heapUse [2]runtimemetrics.Sample

func newHeapUse() heapUse {
	return heapUse{{Name: "/gc/heap/live:bytes"}, {Name: "/memory/classes/heap/objects:bytes"}}
}

// read gives the bytes that the last collection found in use, 0 before the first one, and those that are held by now.
func (u *heapUse) read() (needed, held uint64) {
	runtimemetrics.Read(u[:])
	return u[0].Value.Uint64(), u[1].Value.Uint64()
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
