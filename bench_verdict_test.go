//go:build linux

package main

// bench_verdict_test.go holds the bounds that were set before job_item was measured.

import (
	"fmt"
	"math"
	"slices"
	"strings"
)

// A verdict is one bound, and where the figure stands.
type verdict struct {
	what         string
	value, bound float64
	atLeast      bool // the value is to be no less than the bound; else no more
	digits       int
}

func (v verdict) reached() bool {
	if v.atLeast {
		return v.value >= v.bound
	}
	return v.value <= v.bound
}

func (v verdict) String() string {
	relation := "at most"
	if v.atLeast {
		relation = "at least"
	}
	text := fmt.Sprintf("%s: %.*f, %s %.*f: ", v.what, v.digits, v.value, relation, v.digits, v.bound)
	if v.reached() {
		return text + "reached"
	}
	return text + fmt.Sprintf("**missed by %.*f**", max(v.digits, 2), math.Abs(v.value-v.bound))
}

// judge compares the medians with the bounds.
func (r *benchReport) judge() (all []verdict) {
	atLeast := func(what string, value, bound float64) { all = append(all, verdict{what, value, bound, true, 2}) }
	atMost := func(what string, value, bound float64, digits int) {
		all = append(all, verdict{what, value, bound, false, digits})
	}
	ours := []string{benchLocal}
	plain := map[string]bool{benchLocal: true}
	for i, broker := range r.b.brokers {
		name := workerName(&r.b.brokers[i])
		ours = append(ours, name)
		plain[name] = broker.name == "NATS"
	}
	short := func(name string) string { return strings.TrimPrefix(name, "job_item, ") }

	for _, name := range ours {
		bound := 0.90
		if plain[name] {
			bound = 0.95
		}
		atLeast(short(name)+", 8 at once, of the bare loop", r.perSlots[8].of(name, "ratio"), bound)
	}
	for _, name := range ours {
		atLeast(short(name)+", 1 at once, of the bare loop", r.perSlots[1].of(name, "ratio"), 0.90)
	}
	for _, name := range ours {
		atMost(short(name)+", CPU with the command's at 8, of the bare loop's", r.perSlots[8].of(name, "CPU ratio"), 1.10, 2)
	}
	for _, c := range r.b.contestants {
		our := map[string]string{peerNATS: "job_item, NATS", peerWebhook: benchLocal, peerCelery: "job_item, Redis"}[c.name]
		if our == "" {
			continue
		}
		for _, n := range benchConcurrencies {
			atLeast(fmt.Sprintf("%s at %d, of the bare loop, beside %s", short(our), n, c.name),
				r.perSlots[n].of(our, "ratio"), r.perSlots[n].of(c.name, "ratio"))
		}
		atMost(short(our)+", end heard of when idle (ms), beside "+c.name,
			r.latency.of(our, "ended p50"), r.latency.of(c.name, "ended p50"), 2)
		for _, slots := range []int{1, 8} {
			idle := fmt.Sprintf("idle %d", slots)
			atMost(fmt.Sprintf("%s, memory when idle (MB), slots: %d, beside %s", short(our), slots, c.name),
				r.memory.of(our, idle), r.memory.of(c.name, idle), 1)
		}
	}
	atLeast("cat directly, beside sh -c", r.rest.of(rowShell, "ratio"), 1.6)
	for _, name := range ours {
		atMost(short(name)+", end heard of when idle, beyond command and broker (ms)", r.latency.of(name, "beyond"), 0.5, 2)
	}
	for _, slots := range []int{8, 64} {
		atLeast(fmt.Sprintf("sleep 0.1 on %d slots, of the bare loop", slots), r.rest.of(rowSleep(slots), "ratio"), 0.95)
	}
	for _, name := range ours {
		atMost(short(name)+", memory when idle (MB)", r.memory.of(name, "idle 8"), 20, 1)
	}
	atMost(thousands(float64(r.b.waiting))+" tasks waiting, memory (MB)", r.memory.of(benchLocal, "waiting"), 60, 1)
	for _, name := range ours[:min(2, len(ours))] {
		atMost(short(name)+", start to ready (ms)", r.rest.of(rowReady(name), "job_item"), 60, 0)
	}
	atMost("binary (MB)", r.rest.of(rowBinary, "job_item"), 16, 1)
	for _, name := range ours {
		lost := math.NaN()
		for _, n := range benchConcurrencies {
			for _, v := range r.perSlots[n].values[[2]string{name, "lost"}] {
				if math.IsNaN(lost) {
					lost = 0
				}
				lost += v
			}
		}
		atMost(short(name)+", tasks lost in all rounds", lost, 0, 0)
	}
	return slices.DeleteFunc(all, func(v verdict) bool { return math.IsNaN(v.value) || math.IsNaN(v.bound) }) // not measured
}
