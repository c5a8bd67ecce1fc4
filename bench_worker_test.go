//go:build linux

package main

// bench_worker_test.go has job_item itself measured: bursts of waiting tasks, single ones, and what else it does.

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

const benchLocal = "job_item, embedded queue"

// A benchWorker is a job_item whose slots can be held until enough tasks wait for them.
type benchWorker struct {
	*agent
	manager     benchManager
	concurrency int
	keeps       bool     // tasks wait here and not at the broker
	gate        *os.File // what its holding tasks read from
	bursts      int
	own         []int
}

// burstJobs are the jobs of a burst. A hold takes a slot until there is a byte for it in the gate.
const burstJobs = `
  - {event: nothing, cmd: 'true'}
  - {event: hold, cmd: dd if=gate of=/dev/null bs=1 count=1 status=none}
`

const benchJobs = burstJobs + `
  - {event: date, cmd: date +%s.%N}
  - {event: sleep, cmd: sleep 0.1}
  - {event: direct, cmd: 'cat {{task_id}}.json'}
  - {event: shell, cmd: sh -c 'cat "$JOB_ITEM_TASK_ID.json"'}
`

// workerOn is job_item on a broker, nil for its own queue.
func (b *bench) workerOn(broker *benchBroker) contestant {
	return contestant{name: workerName(broker), ours: true, start: func(t *testing.T, concurrency int) benchRunner {
		return b.startWorker(t, broker, concurrency)
	}}
}

func workerName(broker *benchBroker) string {
	if broker == nil {
		return benchLocal
	}
	return "job_item, " + broker.name
}

// prepareWorker is job_item that has not been started.
func (b *bench) prepareWorker(t *testing.T, broker *benchBroker, settings, jobs string) *agent {
	t.Helper()
	connection := "{type: local}"
	if broker != nil {
		connection = broker.connection
	}
	a := newAgent(t, fmt.Sprintf("credential: {project_id: p1}\nbroker_connection: %s\ndrain_timeout: 0s\n%sjobs:\n%s",
		connection, settings, jobs))
	a.program, a.env = b.binary, []string{"LOG_LEVEL=WARN"}
	return a
}

// startWorker starts job_item with so many slots.
func (b *bench) startWorker(t *testing.T, broker *benchBroker, concurrency int) *benchWorker {
	t.Helper()
	return b.startPrepared(t, b.prepareWorker(t, broker, fmt.Sprintf("concurrency: %d\n", concurrency), benchJobs+b.floodJob()), broker, concurrency)
}

// startPrepared starts what prepareWorker has prepared.
func (b *bench) startPrepared(t *testing.T, a *agent, broker *benchBroker, concurrency int) *benchWorker {
	t.Helper()
	w := &benchWorker{agent: a, concurrency: concurrency}
	gate := filepath.Join(a.dir, "gate")
	if err := syscall.Mkfifo(gate, 0o600); err != nil {
		t.Fatal(err)
	}
	var err error
	if w.gate, err = os.OpenFile(gate, os.O_RDWR, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.gate.Close() })
	a.start()
	t.Cleanup(a.stop)
	a.awaitHealth("ok", "")
	for _, pid := range a.processes() {
		w.own = append(w.own, pid)
	}
	if broker == nil {
		w.manager, w.keeps = &localManager{t: t, a: a}, true
		return w
	}
	w.manager, w.keeps = &brokerManager{t: t, wire: broker.open(t)}, !broker.holds
	return w
}

func (w *benchWorker) processes() []int { return w.own }

func (w *benchWorker) burst(n int) benchBurst { return w.burstOf(benchEvent, n) }

// burstOf has n tasks of a job wait, lets them run, and waits for the end of the last.
func (w *benchWorker) burstOf(event string, n int) benchBurst {
	w.t.Helper()
	w.hold(event, n)
	before, began := usedBy(w.t, w.own), time.Now()
	lost := w.release(n)
	return benchBurst{time.Since(began), usedBy(w.t, w.own).since(before), lost}
}

// hold takes every slot and has n tasks wait behind.
func (w *benchWorker) hold(event string, n int) {
	w.t.Helper()
	w.bursts++
	w.manager.send("hold", w.prefix("hold"), w.concurrency)
	w.awaitCounts(0, w.concurrency)
	w.manager.send(event, w.prefix("task"), n)
	if w.keeps {
		w.awaitCounts(n, w.concurrency)
	}
}

// awaitCounts waits until so many tasks wait and run.
func (w *benchWorker) awaitCounts(queued, running int) {
	w.t.Helper()
	waitFor(w.t, benchPatience, func() string {
		jobs := w.health().Jobs
		return unless(jobs["queued"] == queued && jobs["running"] == running,
			fmt.Sprintf("%d tasks wait and %d run; want %d and %d\n%s", jobs["queued"], jobs["running"], queued, running, w.log))
	})
}

// release gives the slots back and waits until the tasks behind have ended.
func (w *benchWorker) release(n int) (lost int) {
	w.t.Helper()
	if _, err := w.gate.Write(make([]byte, w.concurrency)); err != nil {
		w.t.Fatal(err)
	}
	return w.manager.await(w.prefix("task"), n)
}

// once is a message there and back, a task that tells when it began, and one that ends at once.
func (w *benchWorker) once(id string) (l benchLatency) {
	w.t.Helper()
	l.trip = w.manager.trip(id + "-trip")
	triggered, _, output := w.manager.once("date", id+"-date")
	l.started = dateIn(w.t, output).Sub(triggered)
	triggered, ended, _ := w.manager.once(benchEvent, id)
	l.ended = ended.Sub(triggered)
	return l
}

func (w *benchWorker) prefix(of string) string {
	return fmt.Sprintf("%s-%d-%d", of, w.cmd.Process.Pid, w.bursts)
}

// floodJob prints very much text.
func (b *bench) floodJob() string {
	return fmt.Sprintf("  - event: flood\n    cmd: sh -c '%s'\n", b.floodCommand())
}

func (b *bench) floodCommand() string {
	return fmt.Sprintf("yes \"A line of text as commands print it while they work on something long.\" | head -c %d", b.flood)
}

// Rows that have bounds.
const (
	rowShell  = "cat {{task_id}}.json directly, beside sh -c, tasks/s"
	rowBinary = "binary, MB"
)

func rowSleep(slots int) string     { return fmt.Sprintf("sleep 0.1 on %d slots, tasks/s", slots) }
func rowReady(worker string) string { return worker + ", start to ready, ms" }

// benchRest is what is measured once a round besides bursts and single tasks.
var benchRest = []struct {
	name string
	run  func(b *bench, t *testing.T)
}{
	{"memory under load", (*bench).loadedMemory},
	{"sleep 0.1", (*bench).sleeping},
	{"with a shell and without", (*bench).shell},
	{"output", (*bench).output},
	{"save", (*bench).save},
	{"creates", (*bench).creates},
	{"start to ready", (*bench).startToReady},
	{"journal", (*bench).journal},
}

// loadedMemory looks at the memory while tasks run.
func (b *bench) loadedMemory(t *testing.T) {
	w := b.startWorker(t, nil, 8)
	w.hold(benchEvent, b.tasks)
	most, watched, stop := 0.0, make(chan error, 1), make(chan struct{})
	go func() { // ends with the tasks
		for {
			select {
			case <-stop:
				watched <- nil
				return
			case <-time.After(50 * time.Millisecond):
				now, err := memoryOfAll(w.own)
				if err != nil {
					watched <- err
					return
				}
				most = max(most, now)
			}
		}
	}()
	w.release(b.tasks)
	close(stop)
	if err := <-watched; err != nil {
		t.Fatal(err)
	}
	b.report.memory.add(benchLocal, "loaded", most)
}

// settlingTime is what memory is given after very much was allocated at once.
const settlingTime = 10 * time.Second

// waitingMemory has very many tasks wait, without any that runs.
func (b *bench) waitingMemory(t *testing.T) {
	w := b.startWorker(t, nil, 8)
	w.hold(benchEvent, b.waiting)
	b.report.memory.add(benchLocal, "waiting", leastWithin(t, settlingTime, w.own))
}

// sleeping runs a command that only waits: what the slots lose between two tasks.
func (b *bench) sleeping(t *testing.T) {
	for _, slots := range []int{8, 64} {
		w := b.startWorker(t, nil, slots)
		n := slots * max(2, b.tasks/100)
		raw := b.rawLoop(t, n, slots, "sleep", "0.1")
		got := w.burstOf("sleep", n)
		b.report.rest.pair(rowSleep(slots), float64(n)/raw.took.Seconds(), float64(n)/got.took.Seconds())
	}
}

// shell runs the same command directly and through sh -c.
func (b *bench) shell(t *testing.T) {
	w := b.startWorker(t, nil, 8)
	shell := w.burstOf("shell", b.tasks/2)
	direct := w.burstOf("direct", b.tasks/2)
	b.report.rest.pair(rowShell, float64(b.tasks/2)/shell.took.Seconds(), float64(b.tasks/2)/direct.took.Seconds())
}

// output has a task print very much.
func (b *bench) output(t *testing.T) {
	w := b.startWorker(t, nil, 8)
	began := time.Now()
	if out, err := exec.Command("sh", "-c", b.floodCommand()+" | cat >/dev/null").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	bare := time.Since(began)
	got := w.burstOf("flood", 1)
	rate := func(d time.Duration) float64 { return float64(b.flood) / 1e6 / d.Seconds() }
	b.report.rest.pair("a task's output, beside cat >/dev/null, MB/s", rate(bare), rate(got.took))
}

// save copies very much text in a task, and sends it to this process.
func (b *bench) save(t *testing.T) {
	sink := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { io.Copy(io.Discard, r.Body) }))
	defer sink.Close()
	copied := func(through string) float64 {
		t.Helper()
		cmd := exec.Command("sh", "-c", b.floodCommand()+" | "+through+" >/dev/null")
		cmd.Env = append(os.Environ(), "JOB_ITEM_MSG_NOTIF_HOST="+sink.URL+"/msg/notif/t-1", "JOB_ITEM_TASK_ID=t-1")
		began := time.Now()
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return float64(b.flood) / 1e6 / time.Since(began).Seconds()
	}
	b.report.rest.pair("save, beside tee, MB/s", copied("tee /dev/null"), copied(b.binary+" save"))
}

// creates has tasks created while none is started.
func (b *bench) creates(t *testing.T) {
	w := b.startWorker(t, nil, 8)
	w.hold(benchEvent, 1)
	n := 5 * b.tasks
	took := w.createAll(t, benchEvent, n, 64)
	b.report.rest.single("creates over HTTP, 64 clients, each on disk, tasks/s", float64(n)/took.Seconds())
}

// startToReady starts job_item and waits for its word.
func (b *bench) startToReady(t *testing.T) {
	measured := []*benchBroker{nil}
	if len(b.brokers) > 0 {
		measured = append(measured, &b.brokers[0])
	}
	for _, broker := range measured {
		var all []float64
		for range 5 {
			all = append(all, b.timeToReady(t, b.prepareWorker(t, broker, "", benchJobs)).Seconds()*1000)
		}
		b.report.rest.single(rowReady(workerName(broker)), median(all))
	}
	info, err := os.Stat(b.binary)
	if err != nil {
		t.Fatal(err)
	}
	b.report.rest.single(rowBinary, float64(info.Size())/1e6)
}

// timeToReady starts what prepareWorker has prepared, waits for its word, and stops it.
func (b *bench) timeToReady(t *testing.T, a *agent) time.Duration {
	t.Helper()
	cmd := exec.Command(b.binary, "--config", filepath.Join(a.dir, "config.yaml"))
	log, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(log)
	for lines.Scan() && !strings.Contains(lines.Text(), "msg=ready") {
	}
	took := time.Since(began)
	cmd.Process.Signal(syscall.SIGTERM)
	io.Copy(io.Discard, log)
	if err := cmd.Wait(); err != nil {
		t.Errorf("job_item: %v: %s", err, lines.Text())
	}
	return took
}

// journal counts what the journal does for each task, from its acceptance to its end.
func (b *bench) journal(t *testing.T) {
	on := func(name string, broker *benchBroker) {
		t.Run(name, func(t *testing.T) {
			w := b.startWorker(t, broker, 8)
			before := w.journalCounts()
			w.burst(b.tasks)
			used := w.journalCounts()
			tasks := float64(b.tasks + w.concurrency) // with those that have held the slots
			b.report.journal.add(name, "syncs", (used.syncs-before.syncs)/tasks)
			b.report.journal.add(name, "entries", (used.entries-before.entries)/tasks)
			b.report.journal.add(name, "bytes", (used.bytes-before.bytes)/tasks)
		})
	}
	on(benchLocal, nil)
	for i := range b.brokers {
		on(workerName(&b.brokers[i]), &b.brokers[i])
	}
}

// journalCounts is what the journal has done so far.
type journalCounts struct{ syncs, entries, bytes float64 }

func (w *benchWorker) journalCounts() journalCounts {
	w.t.Helper()
	text := w.metrics()
	value := func(name string) float64 {
		match := regexp.MustCompile(`(?m)^` + name + ` (\S+)$`).FindStringSubmatch(text)
		if match == nil {
			w.t.Fatalf("there is no metric %s", name)
		}
		v, err := strconv.ParseFloat(match[1], 64)
		if err != nil {
			w.t.Fatal(err)
		}
		return v
	}
	return journalCounts{
		value("job_item_journal_sync_seconds_count"), value("job_item_journal_entries_total"), value("job_item_journal_bytes"),
	}
}

// createAll creates n tasks by so many clients and gives how long that took.
func (a *agent) createAll(t testing.TB, event string, n, clients int) time.Duration {
	t.Helper()
	body := fmt.Sprintf(`{"event":%q,"form_body":%s}`, event, benchData)
	transport := &http.Transport{MaxIdleConnsPerHost: clients}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport}
	began := time.Now()
	var next atomic.Int64
	var wg sync.WaitGroup
	for range clients {
		wg.Add(1)
		go func() { // ends when n are done
			defer wg.Done()
			for next.Add(1) <= int64(n) {
				resp, err := client.Post(a.url+"/job/create", "application/json", strings.NewReader(body))
				if err != nil {
					t.Error(err)
					return
				}
				io.Copy(io.Discard, resp.Body) // or the connection is not used again
				if resp.Body.Close(); resp.StatusCode != 200 {
					t.Errorf("create = %d", resp.StatusCode)
					return
				}
			}
		}()
	}
	wg.Wait()
	return time.Since(began)
}

func (a *agent) finished() int { return a.health().Jobs["finish"] }
