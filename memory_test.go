package main

import (
	"maps"
	"runtime"
	"runtime/debug"
	"strconv"
	"testing"
)

func TestGCPercent(t *testing.T) {
	for needed, want := range map[uint64]int{
		0: 100, 1: 100, garbageBytes: 100, 2 * garbageBytes: 50, 4 * garbageBytes: 25, 1 << 40: minGCPercent,
	} {
		if got := gcPercent(needed); got != want {
			t.Errorf("gcPercent(%d) = %d; want %d", needed, got, want)
		}
	}
}

// The garbage that is put up with follows what is needed, unless the user has a say in it.
func TestGarbageLimit(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(100))
	inForce := func() int {
		percent := debug.SetGCPercent(100)
		debug.SetGCPercent(percent)
		return percent
	}
	with := func(name string) func(string) (string, bool) {
		return func(asked string) (string, bool) { return map[string]string{name: "100"}[asked], asked == name }
	}
	needed := make([]byte, 64<<20)
	runtime.GC()
	for _, name := range []string{"GOGC", "GOMEMLIMIT"} {
		if newGarbageLimit(with(name)).adjust(); inForce() != 100 {
			t.Errorf("%d percent although %s is set", inForce(), name)
		}
	}
	limit := newGarbageLimit(with(""))
	if limit.adjust(); inForce() != minGCPercent {
		t.Errorf("%d percent with 64 MiB in use; want %d", inForce(), minGCPercent)
	}
	runtime.KeepAlive(needed)
	runtime.GC()
	if limit.adjust(); inForce() <= minGCPercent {
		t.Errorf("%d percent still after 64 MiB have become garbage", inForce())
	}
}

// Garbage that Go would leave lying is given back once there is little to do.
func TestIdleGarbage(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(100))
	limit := newGarbageLimit(func(string) (string, bool) { return "", false })
	runtime.GC()
	leave := func() { runtime.KeepAlive(make([]byte, 2*idleGarbageBytes)) }
	for name, collect := range map[string]func(){
		"adjust": func() { limit.adjust(); limit.adjust() }, "freeGarbage": freeGarbage,
	} {
		leave()
		collect()
		heap := newHeapUse()
		if needed, held := heap.read(); held > needed+idleGarbageBytes {
			t.Errorf("%s: %d bytes are needed, %d still held", name, needed, held)
		}
	}
}

// A map that held very much gives its room back, and none of what it still holds.
func TestMapShrinks(t *testing.T) {
	inUse := func() uint64 {
		var stats runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&stats)
		return stats.HeapAlloc
	}
	before := inUse()
	const all, left = 100_000, 5_000
	m, most := map[string]int{}, 0
	for i := range all {
		m[strconv.Itoa(i)] = i
	}
	full := inUse() - before
	for i := range all - left {
		delete(m, strconv.Itoa(i))
		m = shrunk(m, &most)
	}
	if now := inUse(); now > before+full/4 {
		t.Errorf("%d entries took %d bytes, %d of them still take %d", all, full, left, now-before)
	}
	want := map[string]int{}
	for i := all - left; i < all; i++ {
		want[strconv.Itoa(i)] = i
	}
	if !maps.Equal(m, want) {
		t.Errorf("%d entries are left; want %d", len(m), left)
	}
}
