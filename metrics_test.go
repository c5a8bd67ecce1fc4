package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// samplesOf reads metrics in the text format: values as written, by name and labels.
func samplesOf(text string) map[string]string {
	samples := map[string]string{}
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line != "" && line[0] != '#' {
			cut := strings.LastIndexByte(line, ' ')
			samples[line[:cut]] = line[cut+1:]
		}
	}
	return samples
}

func assertSamples(t *testing.T, text string, want map[string]string) {
	t.Helper()
	samples := samplesOf(text)
	for name, value := range want {
		if got, ok := samples[name]; got != value {
			t.Errorf("%s = %q (there: %v); want %q", name, got, ok, value)
		}
	}
}

func TestMetricsText(t *testing.T) {
	h := newHistogram([]time.Duration{time.Millisecond, time.Second})
	for _, d := range []time.Duration{-time.Hour, time.Millisecond, time.Millisecond + 1, time.Second, time.Minute} {
		h.observe(d)
	}
	var x metricsText
	x.family(kindHistogram, "a_seconds", "What takes time.")
	x.histogram(h, "event", "x")
	x.family(kindGauge, "b", "What is.")
	x.value(0.25)
	x.value(1e9, "p", "a\\b\"c\nd\xff", "q", "")
	const want = `# HELP a_seconds What takes time.
# TYPE a_seconds histogram
a_seconds_bucket{event="x",le="0.001"} 2
a_seconds_bucket{event="x",le="1"} 4
a_seconds_bucket{event="x",le="+Inf"} 5
a_seconds_sum{event="x"} 61.002000001
a_seconds_count{event="x"} 5
# HELP b What is.
# TYPE b gauge
b 0.25
b{p="a\\b\"c\nd` + "\uFFFD" + `",q=""} 1e+09
`
	if got := x.buf.String(); got != want {
		t.Errorf("metrics are\n%s; want\n%s", got, want)
	}
}

// metricsFor makes metrics of a worker process that has not begun.
func metricsFor(jobs ...string) *metrics {
	cfg := &Config{Concurrency: 3, Broker: BrokerConfig{Type: "nats"}}
	for _, event := range jobs {
		cfg.Jobs = append(cfg.Jobs, Job{Event: event})
	}
	return newMetrics(newServiceSlot(cfg), cfg)
}

func (m *metrics) text() string {
	var x metricsText
	m.write(&x)
	return x.buf.String()
}

func TestMetricsCount(t *testing.T) {
	m := metricsFor("a", "b")
	now := time.Now()
	for _, e := range []event{
		taskQueued{Event: "a"}, taskQueued{Event: "not configured"},
		taskStarted{Event: "a", Attempt: 1, CreatedAt: now, At: now.Add(20 * time.Second)},
		taskStarted{Event: "a", Attempt: 2, CreatedAt: now, At: now.Add(40 * time.Second)},
		taskRetrying{Event: "a"},
		taskOutput{Stream: streamStdout, Data: []byte("four")}, taskOutput{Stream: streamStderr, Data: []byte("no")},
		taskNotified{},
		taskFinished{Event: "a", Status: statusTimeout, StartedAt: now, FinishedAt: now.Add(2 * time.Minute)},
		taskFinished{Event: "b", Status: statusTerminate, FinishedAt: now.Add(time.Second)},
		taskFinished{Event: "gone", Status: statusError, FinishedAt: now.Add(time.Second)},
		taskFinished{Event: "a", Status: statusError, StartedAt: now.Add(-time.Hour), FinishedAt: now.Add(-time.Minute)},
	} {
		m.handle(e)
	}
	assertSamples(t, m.text(), map[string]string{
		`job_item_tasks_accepted_total{event="a"}`:                                                  "1",
		`job_item_tasks_accepted_total{event="other"}`:                                              "1",
		`job_item_task_starts_total{event="a"}`:                                                     "2",
		`job_item_task_retries_total{event="a"}`:                                                    "1",
		`job_item_task_queue_wait_seconds_bucket{event="a",le="10"}`:                                "0",
		`job_item_task_queue_wait_seconds_bucket{event="a",le="30"}`:                                "1",
		`job_item_task_queue_wait_seconds_count{event="a"}`:                                         "1",
		`job_item_task_run_seconds_sum{event="a"}`:                                                  "120",
		`job_item_task_run_seconds_count{event="b"}`:                                                "0",
		`job_item_tasks_ended_total{event="a",status="timeout"}`:                                    "1",
		`job_item_tasks_ended_total{event="a",status="error"}`:                                      "0", // it was the worker's before
		`job_item_tasks_ended_total{event="b",status="terminate"}`:                                  "1",
		`job_item_tasks_ended_total{event="other",status="error"}`:                                  "1",
		`job_item_task_output_bytes_total{stream="stdout"}`:                                         "4",
		`job_item_task_output_bytes_total{stream="stderr"}`:                                         "2",
		`job_item_task_notifications_total`:                                                         "1",
		`job_item_slots`:                                                                            "3",
		`job_item_health_state{state="starting"}`:                                                   "1",
		`job_item_health_state{state="ok"}`:                                                         "0",
		`job_item_broker_connected{type="nats"}`:                                                    "0",
		`job_item_build_info{version="dev",commit="unknown",goversion="` + runtime.Version() + `"}`: "1",
	})

	// What goes with a job's configuration comes back from nothing; the others keep their counts.
	m.reconfigure(&Config{Jobs: []Job{{Event: "a"}, {Event: otherJobs}}})
	if text := m.text(); strings.Contains(text, `event="b"`) || strings.Count(text, `job_item_tasks_running{event="other"}`) != 1 {
		t.Errorf("after the change of configuration:\n%s", text)
	}
	assertSamples(t, m.text(), map[string]string{
		`job_item_task_starts_total{event="a"}`:        "2",
		`job_item_tasks_accepted_total{event="other"}`: "1",
	})
}

// TestMetricsWhileStarting asks a worker that has neither records nor a configuration.
func TestMetricsWhileStarting(t *testing.T) {
	m := metricsFor("a")
	api := newAPIServer(apiConfig{}, m.service, &eventBus{}, slog.New(slog.DiscardHandler))
	api.serveMetrics(m)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- api.serve(listener) }() // ends at api.shutdown
	defer func() {
		api.shutdown(context.Background())
		<-served
	}()
	for range 2 { // the first counts as a request of the second
		resp, err := http.Get("http://" + listener.Addr().String() + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != 200 {
			t.Fatalf("metrics = %d %v", resp.StatusCode, err)
		}
		if got := resp.Header.Get("Content-Type"); got != "text/plain; version=0.0.4; charset=utf-8" {
			t.Errorf("Content-Type = %q", got)
		}
		if !bytes.Contains(text, []byte(`job_item_health_state{state="starting"} 1`)) {
			t.Errorf("metrics are\n%s", text)
		}
	}
	assertSamples(t, m.text(), map[string]string{`job_item_tasks_running{event="a"}`: "0"})
}

// TestMetricsOfJournal looks at what a disk leaves in the journal's numbers that fails for a while.
func TestMetricsOfJournal(t *testing.T) {
	j, _ := mustOpenJournal(t, t.TempDir(), defaultJournalSizes())
	var writes, syncs, truncates atomic.Bool
	j.mu.Lock()
	j.wrap = func(s *segment) { s.file = failingFile{s.file, &writes, &syncs, &truncates} }
	j.wrap(j.tail())
	j.mu.Unlock()
	mustAccept(t, j, "a", "1")
	var x metricsText
	x.family(kindHistogram, "s", "")
	x.histogram(j.syncTimes)
	if got, stats := samplesOf(x.buf.String())["s_count"], j.stats(); got != fmt.Sprint(stats.Syncs) || stats.WriteErrors != 0 {
		t.Errorf("%s syncs measured, %+v", got, stats)
	}
	syncs.Store(true)
	if err := j.accept(journalTask{ID: "b"}, nil); err == nil {
		t.Error("accepted without a sync")
	}
	if stats := j.stats(); stats.SyncErrors != 1 || stats.WriteErrors == 0 {
		t.Errorf("after a failed sync: %+v", stats)
	}
	syncs.Store(false)
	waitFor(t, 5*time.Second, func() string { return fmtErr(j.writable()) })
}

// TestMetricsOfLink loses a connection twice, and lets messages wait.
func TestMetricsOfLink(t *testing.T) {
	w := &worker{bus: &eventBus{}}
	l := &brokerLink{err: errNotConnected, ctx: t.Context()}
	away := errors.New("away")
	for _, err := range []error{away, away, nil, nil, away, away, nil, away} {
		w.linkChanged(l, err)
	}
	if lost, again := w.counts.disconnects.Load(), w.counts.reconnects.Load(); lost != 2 || again != 1 {
		t.Errorf("%d connections lost, %d made again; want 2 and 1", lost, again)
	}

	broker := &fewBroker{limit: 2}
	r := newReporter(meteredBroker{broker, &w.counts}, nil, "host", slog.New(slog.DiscardHandler), func(string) {})
	for range 5 {
		r.enqueue("s", []byte("1234"), "")
	}
	waitFor(t, 5*time.Second, func() string {
		if messages, bytes := r.backlog(); messages != 3 || bytes != 12 || w.counts.publishErrors.Load() == 0 {
			return fmt.Sprintf("%d messages, %d bytes, %d errors", messages, bytes, w.counts.publishErrors.Load())
		}
		return ""
	})
	heir := newReporter(&fewBroker{limit: 100}, nil, "host", slog.New(slog.DiscardHandler), func(string) {})
	r.handOver(heir)
	waitFor(t, 5*time.Second, func() string {
		messages, _ := r.backlog()
		if others, bytes := heir.backlog(); messages != 0 || others != 0 || bytes != 0 {
			return fmt.Sprintf("%d messages wait, %d with the heir", messages, others)
		}
		return ""
	})
	heir.close(t.Context())
	if sent := w.counts.published.Load(); sent != 2 {
		t.Errorf("%d messages published; want 2", sent)
	}
}

// A fewBroker takes so many messages and no more.
type fewBroker struct {
	Broker
	limit int
}

func (b *fewBroker) Publish(_ context.Context, messages ...Message) (int, error) {
	taken := min(b.limit, len(messages))
	b.limit -= taken
	if taken < len(messages) {
		return taken, errors.New("full")
	}
	return taken, nil
}

// BenchmarkMetrics is what metrics add to the life of a task: its events, with nobody and with metrics listening.
func BenchmarkMetrics(b *testing.B) {
	for _, subscribed := range []bool{false, true} {
		b.Run(fmt.Sprintf("subscribed=%v", subscribed), func(b *testing.B) {
			bus := &eventBus{}
			if subscribed {
				bus.subscribe(metricsFor("a", "b", "c").handle)
			}
			now := time.Now().Add(time.Minute)
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					bus.publish(taskQueued{Event: "b"})
					bus.publish(taskStarted{Event: "b", Attempt: 1, CreatedAt: now, At: now.Add(time.Second)})
					bus.publish(taskFinished{Event: "b", Status: statusFinish, StartedAt: now, FinishedAt: now.Add(time.Second)})
				}
			})
		})
	}
}

// BenchmarkMetricsScrape is one request's text, with 20 jobs.
func BenchmarkMetricsScrape(b *testing.B) {
	var jobs []string
	for i := range 20 {
		jobs = append(jobs, fmt.Sprint("job", i))
	}
	m := metricsFor(jobs...)
	b.ReportAllocs()
	for b.Loop() {
		m.text()
	}
}

// TestMetricsOfProcess asks the system what this very process uses.
func TestMetricsOfProcess(t *testing.T) {
	ballast := bytes.Repeat([]byte("x"), 32<<20)
	file, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	before := ownUse()
	file.Close()
	var use processUse
	waitFor(t, 10*time.Second, func() string { // the clock of CPU time is coarse
		if use = ownUse(); use.cpu <= before.cpu && bytes.Count(ballast, []byte("x")) > 0 {
			return fmt.Sprintf("no CPU time used: %v", use.cpu)
		}
		return ""
	})
	counted := runtime.GOOS == "linux" || runtime.GOOS == "darwin" // Wine tells of no handles
	if counted && use.openFiles == 0 || use.openFiles >= before.openFiles+5 {
		t.Errorf("%d open files, %d before one was closed", use.openFiles, before.openFiles)
	}
	if told := runtime.GOOS == "linux" || runtime.GOOS == "windows"; told && use.resident < uint64(len(ballast)) {
		t.Errorf("%d bytes resident, with %d in use", use.resident, len(ballast))
	}
	runtime.KeepAlive(ballast)
}
