//go:build unix

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// metrics is what GET /metrics answers.
func (a *agent) metrics() string {
	a.t.Helper()
	resp, err := http.Get(a.url + "/metrics")
	if err != nil {
		a.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != 200 {
		a.t.Fatalf("metrics = %d %v", resp.StatusCode, err)
	}
	return string(text)
}

// TestMetrics runs tasks of every kind and looks at the metrics of a real worker, also with Prometheus' eyes.
func TestMetrics(t *testing.T) {
	a := newAgent(t, `take_when: {disk_free: 0}
concurrency: 3
drain_timeout: 0s
jobs:
  - {event: good, cmd: 'echo out; echo error >&2'}
  - {event: bad, cmd: 'false', retry: {times: 1, pause: 10ms}}
  - {event: long, cmd: sleep 60, limit: 1}
execs:
  - {key: steady, cmd: sleep 60}
  - {key: broken, cmd: 'false', attempt: 0}
`).start()
	a.create("good", "{}")
	a.create("bad", "{}")
	running := a.create("long", "{}")
	waiting := a.create("long", "{}")
	if code, answer := a.post("/msg/notif/"+running, `{"msg":"hello"}`); code != 200 {
		t.Fatalf("notif = %d %s", code, answer)
	}
	if code, _ := a.post("/job/"+waiting+"/terminate", ""); code != 202 {
		t.Fatalf("terminate = %d", code)
	}
	waitFor(t, 10*time.Second, func() string {
		samples := samplesOf(a.metrics())
		for name, want := range map[string]string{
			`job_item_tasks_running{event="long"}`: "1", `job_item_exec_state{exec="broken",state="failed"}`: "1",
			`job_item_exec_state{exec="steady",state="running"}`: "1", `job_item_tasks_unreported`: "0",
			`job_item_tasks_ended_total{event="bad",status="error"}`: "1", `job_item_journal_tasks`: "1",
		} {
			if got := samples[name]; got != want {
				return name + " is " + got
			}
		}
		return ""
	})
	text := a.metrics()
	assertSamples(t, text, map[string]string{
		`job_item_health_state{state="degraded"}`:                         "1",
		`job_item_health_state{state="ok"}`:                               "0",
		`job_item_slots`:                                                  "3",
		`job_item_tasks_queued{event="long"}`:                             "0",
		`job_item_tasks_accepted_total{event="long"}`:                     "2",
		`job_item_tasks_ended_total{event="good",status="finish"}`:        "1",
		`job_item_tasks_ended_total{event="long",status="terminate"}`:     "1",
		`job_item_tasks_ended_total{event="bad",status="error"}`:          "1",
		`job_item_task_starts_total{event="bad"}`:                         "2",
		`job_item_task_retries_total{event="bad"}`:                        "1",
		`job_item_task_run_seconds_count{event="good"}`:                   "1",
		`job_item_task_queue_wait_seconds_bucket{event="long",le="+Inf"}`: "1",
		`job_item_task_output_bytes_total{stream="stdout"}`:               "4",
		`job_item_task_output_bytes_total{stream="stderr"}`:               "6",
		`job_item_task_notifications_total`:                               "1",
		`job_item_broker_connected{type="local"}`:                         "1",
		`job_item_journal_tasks`:                                          "1",
		`job_item_records`:                                                "3",
		`job_item_exec_restarts_total{exec="broken"}`:                     "0",
		`job_item_paused{reason="disk"}`:                                  "0",
		`job_item_tasks_interrupted`:                                      "0",
	})
	samples := samplesOf(text)
	for _, name := range []string{
		"job_item_journal_sync_seconds_count", "job_item_journal_bytes", "job_item_broker_messages_published_total",
		`job_item_http_requests_total{code="2xx"}`, "process_start_time_seconds", "process_cpu_seconds_total",
		"process_open_fds", "go_goroutines", "go_memstats_alloc_bytes",
	} {
		if value := samples[name]; value == "" || value == "0" {
			t.Errorf("%s = %q", name, value)
		}
	}
	t.Run("dashboard and alerts", func(t *testing.T) { assertQueriesKnown(t, samples) })
	t.Run("promtool", func(t *testing.T) {
		needProgram(t, "promtool")
		promtool(t, text, "check", "metrics")
		promtool(t, "", "check", "rules", filepath.Join("deploy", "prometheus-alerts.yml"))
	})

	// The worker dies with the long task, and the next one says so.
	before := a.childPID()
	if err := syscall.Kill(before, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	waitFor(t, 15*time.Second, func() string {
		if pid := a.childPID(); pid == before {
			return "there is no other worker yet"
		}
		return ""
	})
	assertSamples(t, a.metrics(), map[string]string{
		`job_item_tasks_interrupted`:                             "1",
		`job_item_tasks_recovered`:                               "1",
		`job_item_tasks_ended_total{event="bad",status="error"}`: "0",
	})
}

// TestMetricsPaused tells why no task is started, and that several reasons follow each other.
func TestMetricsPaused(t *testing.T) {
	w, _ := openWorkerForTest(t, t.TempDir(), "jobs: [{event: a, cmd: 'true'}]\n")
	before := w.setup.Load()
	for _, c := range []struct {
		need TakeWhen
		want []string
	}{
		{TakeWhen{DiskFree: 1 << 60}, []string{pausedByDisk}},
		{TakeWhen{DiskFree: 1 << 60, MemoryFree: 1 << 60}, []string{pausedByDisk, pausedByMemory}},
		{TakeWhen{}, nil},
	} {
		cfg := *before.cfg
		cfg.TakeWhen = c.need
		w.setup.Store(&setup{cfg: &cfg, jobs: before.jobs})
		ctx, stop := context.WithCancel(t.Context())
		watched := make(chan struct{})
		go func() { w.watchResources(ctx); close(watched) }() // ends with ctx
		waitFor(t, 5*time.Second, func() string {
			pauses := w.queue.pauses()
			if got := slices.Sorted(maps.Keys(pauses)); !slices.Equal(got, c.want) {
				return fmt.Sprintf("paused by %v; want %v", got, c.want)
			}
			return ""
		})
		stop()
		<-watched
	}
}

// promtool is Prometheus' own judgement; it says something on stderr or fails when it finds fault.
func promtool(t *testing.T, stdin string, args ...string) {
	t.Helper()
	cmd := exec.Command("promtool", args...)
	cmd.Stdin = strings.NewReader(stdin)
	var complaints strings.Builder
	cmd.Stderr = &complaints
	if out, err := cmd.Output(); err != nil || complaints.Len() > 0 {
		t.Errorf("promtool %v: %v\n%s%s", args, err, out, &complaints)
	}
}

// assertQueriesKnown looks for every metric that the shipped dashboard and alerts ask for.
func assertQueriesKnown(t *testing.T, samples map[string]string) {
	known := map[string]bool{"up": true} // Prometheus' own
	for sample := range samples {
		name, _, _ := strings.Cut(sample, "{")
		known[name] = true
	}
	var queries []string
	dashboard, err := os.ReadFile(filepath.Join("deploy", "grafana-dashboard.json"))
	if err != nil {
		t.Fatal(err)
	}
	var parsed any
	if err := json.Unmarshal(dashboard, &parsed); err != nil {
		t.Fatalf("grafana-dashboard.json: %v", err)
	}
	collectQueries(parsed, &queries)
	alerts, err := os.ReadFile(filepath.Join("deploy", "prometheus-alerts.yml"))
	if err != nil {
		t.Fatal(err)
	}
	queries = append(queries, string(alerts))
	asked := 0
	for _, query := range queries {
		for _, name := range regexp.MustCompile(`\b(job_item|process|go)_[a-z0-9_]+`).FindAllString(query, -1) {
			asked++
			if !known[name] {
				t.Errorf("%s is asked for and not there:\n%s", name, query)
			}
		}
	}
	if asked < 40 {
		t.Errorf("%d metrics asked for; the test has lost sight of the queries", asked)
	}
}

// collectQueries finds the texts of "expr", "query" and "definition" in a dashboard.
func collectQueries(node any, queries *[]string) {
	switch node := node.(type) {
	case []any:
		for _, part := range node {
			collectQueries(part, queries)
		}
	case map[string]any:
		for key, part := range node {
			if text, is := part.(string); is && (key == "expr" || key == "query" || key == "definition") {
				*queries = append(*queries, text)
			}
			collectQueries(part, queries)
		}
	}
}
