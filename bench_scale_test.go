//go:build linux

package main

// bench_scale_test.go measures how cost grows: with the jobs configured, with the tasks that wait, and with the workers
// on one NATS server. ./bench.sh scale runs it; docs/scale.md says what follows.

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// A scaleReport is three tables.
type scaleReport struct{ jobs, waiting, workers *benchSheet }

func TestScale(t *testing.T) {
	if os.Getenv("BENCH_BINARY") == "" {
		t.Skip("./bench.sh scale runs it")
	}
	b := newBench(t)
	b.rounds = 1
	r := &scaleReport{
		jobs: newSheet("Jobs configured",
			benchColumn{"first", "first start to ready, ms", 0, true}, benchColumn{"again", "later starts, ms", 0, true},
			benchColumn{"memory", "memory, MB", 1, true}, benchColumn{"server", "more at the server, MB", 1, true},
			benchColumn{"CPU", "idle CPU, ms/s", 2, true}, benchColumn{"server CPU", "server's, ms/s", 2, true},
			benchColumn{"ratio", "tasks/s, of the bare loop", 2, true}),
		waiting: newSheet("Tasks waiting in the embedded queue, 1 KiB each",
			benchColumn{"create", "creates/s", 0, true}, benchColumn{"memory", "memory, MB", 1, true},
			benchColumn{"disk", "on disk, MB", 1, true}, benchColumn{"again", "start to ready with them, ms", 0, true},
			benchColumn{"health", "GET /health, ms", 2, true}, benchColumn{"list", "GET /jobs, ms", 2, true},
			benchColumn{"ratio", "tasks/s, of the bare loop", 2, true}),
		workers: newSheet("Workers on one NATS server, 2 slots each",
			benchColumn{"connections", "connections", 0, true}, benchColumn{"subscriptions", "subscriptions", 0, true},
			benchColumn{"server", "server's memory, MB", 1, true}, benchColumn{"server CPU", "its idle CPU, ms/s", 1, true},
			benchColumn{"messages", "messages in and out, idle, 1/s", 1, true}, benchColumn{"memory", "memory of the workers, MB", 0, true},
			benchColumn{"CPU", "idle CPU of the workers, ms/s", 1, true}, benchColumn{"ended p50", "one task, end heard of, p50, ms", 2, true},
			benchColumn{"tasks/s", "tasks/s", 0, true}),
	}
	for _, jobs := range noMoreThan(envNumber(t, "JOBS", 1000), 1, 10, 100, 1000) {
		b.measure(t, 0, fmt.Sprintf("jobs %d, embedded queue", jobs), func(t *testing.T) { b.scaleJobs(t, r.jobs, jobs, nil) })
		for _, server := range benchServers {
			if server.installed() {
				b.measure(t, 0, fmt.Sprintf("jobs %d, %s", jobs, server.program), func(t *testing.T) {
					broker := server.start(t)
					b.scaleJobs(t, r.jobs, jobs, &broker)
				})
			}
		}
	}
	for _, tasks := range noMoreThan(b.waiting, 1, 100, 1000, 10_000, 100_000) {
		b.measure(t, 0, fmt.Sprintf("tasks %d", tasks), func(t *testing.T) { b.scaleWaiting(t, r.waiting, tasks) })
	}
	for _, durable := range []bool{false, true} {
		name := map[bool]string{false: "NATS", true: "NATS durable"}[durable]
		b.measure(t, 0, "workers, "+name, func(t *testing.T) { b.scaleWorkers(t, r.workers, name, durable) })
	}
	if err := r.write(b, os.Stdout, os.Getenv("BENCH_OUT")); err != nil {
		t.Error(err)
	}
}

// noMoreThan is those of the counts that are no more than a bound.
func noMoreThan(most int, counts ...int) []int {
	return slices.DeleteFunc(counts, func(n int) bool { return n > most })
}

// idleTime is for how long those who have nothing to do are watched: reports of the host go out once a minute.
func idleTime(t *testing.T) time.Duration {
	return time.Duration(envNumber(t, "IDLE_SECONDS", 60)) * time.Second
}

// scaleJobs starts a worker with so many jobs, and one that holds slots, on a new server, nil for the embedded queue.
func (b *bench) scaleJobs(t *testing.T, sheet *benchSheet, jobs int, broker *benchBroker) {
	serverMemory := func() float64 { return 0 }
	if broker != nil {
		serverMemory = func() float64 { return leastMemory(t, []int{broker.pid}) }
	}
	var more strings.Builder
	for i := range jobs - 1 {
		fmt.Fprintf(&more, "  - {event: job-%d, cmd: 'echo {{text}}'}\n", i)
	}
	row := fmt.Sprintf("%s, %s", strings.TrimPrefix(workerName(broker), "job_item, "), thousands(float64(jobs)))
	before := serverMemory()
	a := b.prepareWorker(t, broker, "concurrency: 8\n", burstJobs+more.String())
	sheet.add(row, "first", b.timeToReady(t, a).Seconds()*1000)
	sheet.add(row, "again", b.timeToReady(t, a).Seconds()*1000)
	w := b.startPrepared(t, a, broker, 8)
	sheet.add(row, "memory", leastMemory(t, w.own))
	if broker != nil {
		sheet.add(row, "server", serverMemory()-before)
	}
	pids, window := slices.Clone(w.own), 5*time.Second
	if broker != nil {
		pids = append(pids, broker.pid)
	}
	use := idleUse(t, pids, window)
	own := time.Duration(0)
	for _, pid := range w.own {
		own += use[pid]
	}
	sheet.add(row, "CPU", perSecond(own, window))
	if broker != nil {
		sheet.add(row, "server CPU", perSecond(use[broker.pid], window))
	}
	w.burst(b.tasks / 20)
	raw := b.rawLoop(t, b.tasks, 8, "true")
	got := w.burst(b.tasks)
	if got.lost > 0 {
		t.Errorf("%d tasks were lost", got.lost)
	}
	sheet.add(row, "ratio", raw.took.Seconds()/got.took.Seconds())
}

// idleUse is the CPU time that each process uses meanwhile.
func idleUse(t *testing.T, pids []int, window time.Duration) map[int]time.Duration {
	t.Helper()
	before := map[int]processorUse{}
	for _, pid := range pids {
		before[pid] = usedBy(t, []int{pid})
	}
	time.Sleep(window) // what is used in it is what is measured
	use := map[int]time.Duration{}
	for _, pid := range pids {
		use[pid] = usedBy(t, []int{pid}).since(before[pid]).all()
	}
	return use
}

// perSecond is CPU time in milliseconds for each second of a window.
func perSecond(use, window time.Duration) float64 {
	return use.Seconds() * 1000 / window.Seconds()
}

// scaleWaiting has so many tasks wait in a worker that starts none, restarts it, and then lets it begin.
func (b *bench) scaleWaiting(t *testing.T, sheet *benchSheet, tasks int) {
	const paused = "take_when: {disk_free: 1000000GiB}\n"
	row := thousands(float64(tasks))
	a := b.prepareWorker(t, nil, "concurrency: 8\n"+paused, burstJobs)
	a.start()
	took := a.createAll(t, benchEvent, tasks, 64)
	sheet.add(row, "create", float64(tasks)/took.Seconds())
	var own []int
	for _, pid := range a.processes() {
		own = append(own, pid)
	}
	sheet.add(row, "memory", leastWithin(t, settlingTime, own))
	sheet.add(row, "disk", folderMegabytes(t, filepath.Join(a.dir, "data")))
	sheet.add(row, "health", median(a.askedFor("/health")))
	sheet.add(row, "list", median(a.askedFor("/jobs")))
	a.stop()
	sheet.add(row, "again", b.timeToReady(t, a).Seconds()*1000)

	a.start()
	if queued := a.health().Jobs["queued"]; queued != tasks {
		t.Errorf("%d of %d tasks wait after the restart", queued, tasks)
	}
	a.change(paused, "")
	measured := min(tasks, b.tasks)
	if measured < b.tasks { // too few for a rate
		a.stop()
		return
	}
	reach := func(n int) time.Time {
		waitFor(t, benchPatience, func() string {
			done := a.finished()
			return unless(done >= n, fmt.Sprintf("%d of %d tasks have finished", done, n))
		})
		return time.Now()
	}
	first := measured / 10
	began := reach(first)
	counted := a.finished()
	ended := reach(min(tasks, counted+measured-first))
	rate := float64(a.finished()-counted) / ended.Sub(began).Seconds()
	a.stop()
	raw := b.rawLoop(t, b.tasks, 8, "true")
	sheet.add(row, "ratio", rate/(float64(b.tasks)/raw.took.Seconds()))
}

// askedFor is what some answers took, in milliseconds.
func (a *agent) askedFor(path string) (took []float64) {
	for _, d := range a.timed(path, 20) {
		took = append(took, d.Seconds()*1000)
	}
	return took
}

func folderMegabytes(t *testing.T, dir string) float64 {
	t.Helper()
	out, err := exec.Command("du", "-sk", dir).Output()
	var kilobytes float64
	if err == nil {
		_, err = fmt.Sscan(string(out), &kilobytes)
	}
	if err != nil {
		t.Fatal(err)
	}
	return kilobytes * 1024 / 1e6
}

// serverView is what NATS tells of itself.
type serverView struct {
	Connections, Subscriptions float64
	InMsgs                     float64 `json:"in_msgs"`
	OutMsgs                    float64 `json:"out_msgs"`
}

// scaleWorkers starts more and more workers on one server.
func (b *bench) scaleWorkers(t *testing.T, sheet *benchSheet, name string, durable bool) {
	monitor := freePort(t)
	args := []string{"-m", monitor}
	if durable {
		args = append(args, "-js", "-sd", t.TempDir())
	}
	broker := onNATS(newNATSServer(t, args...), name, durable)
	view := func() (v serverView) {
		resp, err := http.Get("http://127.0.0.1:" + monitor + "/varz")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if err := json.NewDecoder(resp.Body).Decode(&v); err != nil {
			t.Fatal(err)
		}
		return v
	}
	manager := &brokerManager{t: t, wire: broker.open(t)}
	var workers []*agent
	var own []int
	var measured []string
	counts := noMoreThan(envNumber(t, "WORKERS", 200), 1, 10, 50, 100, 200, 500, 1000)
	for _, count := range counts {
		for len(workers) < count {
			a := b.prepareWorker(t, &broker, fmt.Sprintf("concurrency: 2\nidentity_id: w%d\n", len(workers)), burstJobs).start()
			t.Cleanup(a.stop)
			for _, pid := range a.processes() {
				own = append(own, pid)
			}
			workers = append(workers, a)
		}
		row := fmt.Sprintf("%s, %s", name, thousands(float64(count)))
		measured = append(measured, row)
		window := idleTime(t)
		before := view()
		use := idleUse(t, append(slices.Clone(own), broker.pid), window)
		after := view()
		total := time.Duration(0)
		for _, pid := range own {
			total += use[pid]
		}
		sheet.add(row, "connections", after.Connections)
		sheet.add(row, "subscriptions", after.Subscriptions)
		sheet.add(row, "server", leastMemory(t, []int{broker.pid}))
		sheet.add(row, "server CPU", perSecond(use[broker.pid], window))
		sheet.add(row, "messages", (after.InMsgs-before.InMsgs+after.OutMsgs-before.OutMsgs)/window.Seconds())
		sheet.add(row, "memory", leastMemory(t, own))
		sheet.add(row, "CPU", perSecond(total, window))
		var ended []float64
		for i := range b.idleTasks / 5 {
			began, end, _ := manager.once(benchEvent, fmt.Sprintf("one-%d-%d", count, i))
			ended = append(ended, end.Sub(began).Seconds()*1000)
		}
		sheet.add(row, "ended p50", median(ended))
		began := time.Now()
		prefix := fmt.Sprintf("many-%d", count)
		manager.send(benchEvent, prefix, b.tasks)
		if lost := manager.await(prefix, b.tasks); lost > 0 {
			t.Errorf("%d of %d tasks were lost", lost, b.tasks)
		}
		sheet.add(row, "tasks/s", float64(b.tasks)/time.Since(began).Seconds())
	}
	if last := len(counts) - 1; last > 0 && counts[last] < 1000 { // a straight line through the last two
		row := name + ", 1,000, extrapolated"
		for _, column := range []string{"connections", "subscriptions", "server", "server CPU", "messages", "memory", "CPU"} {
			from, to := sheet.of(measured[last-1], column), sheet.of(measured[last], column)
			sheet.add(row, column, to+(to-from)/float64(counts[last]-counts[last-1])*float64(1000-counts[last]))
		}
	}
}

const scaleFigures = "## Figures\n" // what follows it in docs/scale.md is measured

// write prints the tables and puts them below the text of docs/scale.md.
func (r *scaleReport) write(b *bench, out io.Writer, folder string) error {
	var text strings.Builder
	fmt.Fprintf(&text, "%s\n%s In bursts: %s tasks.\n", scaleFigures, machine(b.binary), thousands(float64(b.tasks)))
	for _, sheet := range []*benchSheet{r.jobs, r.waiting, r.workers} {
		if len(sheet.rows) > 0 {
			text.WriteString("\n#" + sheet.text())
		}
	}
	if _, err := io.WriteString(out, text.String()); err != nil || folder == "" {
		return err
	}
	page := filepath.Join(folder, "docs", "scale.md")
	content, err := os.ReadFile(page)
	if err != nil {
		return err
	}
	above, _, _ := strings.Cut(string(content), scaleFigures)
	return os.WriteFile(page, []byte(above+text.String()), 0o644)
}
