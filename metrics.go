package main

// metrics.go is what metrics are made of: histograms of durations, and the text format in which Prometheus reads them
// (https://prometheus.io/docs/instrumenting/exposition_formats/). Counters are atomic integers where things happen.
// What is measured is told in metrics_worker.go.

import (
	"bytes"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// A histogram counts durations by size. Its methods may be called concurrently.
type histogram struct {
	bounds []time.Duration // rising; each counts what is no longer than it
	counts []atomic.Int64  // one per bound, and what is longer than all
	sum    atomic.Int64    // nanoseconds
}

func newHistogram(bounds []time.Duration) *histogram {
	return &histogram{bounds: bounds, counts: make([]atomic.Int64, len(bounds)+1)}
}

// taskBounds are for the waiting and running of tasks: 1 ms to 1 h.
func taskBounds() []time.Duration {
	const ms, s, m = time.Millisecond, time.Second, time.Minute
	return []time.Duration{
		ms, 5 * ms, 10 * ms, 50 * ms, 100 * ms, 500 * ms, s, 5 * s, 10 * s, 30 * s, m, 5 * m, 10 * m, 30 * m, 60 * m,
	}
}

// syncBounds are for the syncing of files: 100 µs to 10 s.
func syncBounds() []time.Duration {
	const us, ms, s = time.Microsecond, time.Millisecond, time.Second
	return []time.Duration{
		100 * us, 250 * us, 500 * us, ms, 5 * ms / 2, 5 * ms, 10 * ms, 25 * ms, 50 * ms, 100 * ms, 250 * ms, 500 * ms,
		s, 5 * s / 2, 5 * s, 10 * s,
	}
}

// observe counts a duration. One below zero comes from a clock that was set, and counts as none at all.
func (h *histogram) observe(d time.Duration) {
	d = max(0, d)
	i, _ := slices.BinarySearch(h.bounds, d)
	h.counts[i].Add(1)
	h.sum.Add(int64(d))
}

// A metricsText is metrics in the text format, one family of samples after the other.
type metricsText struct {
	buf  bytes.Buffer
	name string // of the family that has begun
}

// The kinds of metrics that there are.
const (
	kindCounter   = "counter"
	kindGauge     = "gauge"
	kindHistogram = "histogram"
	kindSummary   = "summary"
)

// family begins a metric; its samples follow.
func (x *metricsText) family(kind, name, help string) {
	x.name = name
	x.buf.WriteString("# HELP " + name + " " + help + "\n# TYPE " + name + " " + kind + "\n")
}

// value adds a sample; labels are names and values in turn.
func (x *metricsText) value(v float64, labels ...string) { x.sample("", v, labels, "", "") }

// single is a metric with one sample.
func (x *metricsText) single(kind, name, help string, v float64) {
	x.family(kind, name, help)
	x.value(v)
}

// histogram adds the samples of one histogram.
func (x *metricsText) histogram(h *histogram, labels ...string) {
	var sum = time.Duration(h.sum.Load())
	total := int64(0) // of the buckets that are shown, whatever is counted meanwhile
	for i, bound := range h.bounds {
		total += h.counts[i].Load()
		x.sample("_bucket", float64(total), labels, "le", number(bound.Seconds()))
	}
	total += h.counts[len(h.bounds)].Load()
	x.sample("_bucket", float64(total), labels, "le", "+Inf")
	x.sample("_sum", sum.Seconds(), labels, "", "")
	x.sample("_count", float64(total), labels, "", "")
}

// sample writes one line; extra is one more label, if it has a name.
func (x *metricsText) sample(suffix string, v float64, labels []string, extra, extraValue string) {
	x.buf.WriteString(x.name)
	x.buf.WriteString(suffix)
	separator := byte('{')
	label := func(name, value string) {
		x.buf.WriteByte(separator)
		separator = ','
		x.buf.WriteString(name)
		x.buf.WriteString(`="`)
		labelEscapes.WriteString(&x.buf, strings.ToValidUTF8(value, "\uFFFD"))
		x.buf.WriteByte('"')
	}
	for i := 0; i < len(labels); i += 2 {
		label(labels[i], labels[i+1])
	}
	if extra != "" {
		label(extra, extraValue)
	}
	if separator == ',' {
		x.buf.WriteByte('}')
	}
	x.buf.WriteByte(' ')
	x.buf.WriteString(number(v))
	x.buf.WriteByte('\n')
}

// labelEscapes are what the text format asks for in the value of a label. It never changes.
var labelEscapes = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

func number(v float64) string { return strconv.FormatFloat(v, 'g', -1, 64) }

// oneIf is a truth as a sample.
func oneIf(is bool) float64 {
	if is {
		return 1
	}
	return 0
}
