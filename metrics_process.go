package main

// metrics_process.go is what a process tells of itself, under the names that Prometheus' own libraries give it.

import (
	"runtime"
	"runtime/debug"
	runtimemetrics "runtime/metrics"
	"time"
)

// A processUse is what this process uses. Zero values are what the system does not tell.
type processUse struct {
	cpu                time.Duration
	resident, virtual  uint64 // bytes
	openFiles, maxOpen uint64 // descriptors; handles on Windows
}

func writeProcess(x *metricsText, started time.Time) {
	x.single(kindGauge, "process_start_time_seconds", "Start time of the worker process since unix epoch in seconds.",
		float64(started.UnixMilli())/1000)
	use := ownUse()
	for _, m := range []struct {
		kind, name, help string
		value            float64
	}{
		{kindCounter, "process_cpu_seconds_total", "Total user and system CPU time spent in seconds.", use.cpu.Seconds()},
		{kindGauge, "process_resident_memory_bytes", "Resident memory size in bytes.", float64(use.resident)},
		{kindGauge, "process_virtual_memory_bytes", "Virtual memory size in bytes.", float64(use.virtual)},
		{kindGauge, "process_open_fds", "Number of open file descriptors.", float64(use.openFiles)},
		{kindGauge, "process_max_fds", "Maximum number of open file descriptors.", float64(use.maxOpen)},
	} {
		if m.value > 0 {
			x.single(m.kind, m.name, m.help, m.value)
		}
	}
}

// writeRuntime is for the basics of the Go runtime. Reading them stops nothing.
func writeRuntime(x *metricsText) {
	x.family(kindGauge, "go_info", "Information about the Go environment.")
	x.value(1, "version", runtime.Version())
	described := []struct{ source, kind, name, help string }{
		{"/sched/goroutines:goroutines", kindGauge, "go_goroutines", "Number of goroutines that currently exist."},
		{"/sched/gomaxprocs:threads", kindGauge, "go_sched_gomaxprocs_threads", "The current GOMAXPROCS setting."},
		{"/memory/classes/heap/objects:bytes", kindGauge, "go_memstats_alloc_bytes",
			"Number of bytes allocated in heap and currently in use."},
		{"/gc/heap/allocs:bytes", kindCounter, "go_memstats_alloc_bytes_total",
			"Total number of bytes allocated in heap, even if freed."},
		{"/memory/classes/total:bytes", kindGauge, "go_memstats_sys_bytes", "Number of bytes obtained from system."},
	}
	samples := make([]runtimemetrics.Sample, len(described))
	for i, d := range described {
		samples[i].Name = d.source
	}
	runtimemetrics.Read(samples)
	for i, d := range described {
		if samples[i].Value.Kind() == runtimemetrics.KindUint64 {
			x.single(d.kind, d.name, d.help, float64(samples[i].Value.Uint64()))
		}
	}
	gc := debug.GCStats{PauseQuantiles: make([]time.Duration, 5)}
	debug.ReadGCStats(&gc)
	x.family(kindSummary, "go_gc_duration_seconds", "A summary of the pauses of garbage collection cycles.")
	for i, pause := range gc.PauseQuantiles {
		x.value(pause.Seconds(), "quantile", number(float64(i)/4))
	}
	x.sample("_sum", gc.PauseTotal.Seconds(), nil, "", "")
	x.sample("_count", float64(gc.NumGC), nil, "", "")
}
