//go:build unix

package main

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// A heldDelivery is a delivery of a durable broker that counts how it is settled.
type heldDelivery struct{ acks, nacks atomic.Int32 }

func (h *heldDelivery) deliver(w *worker, event, message string, heldFor time.Duration) {
	w.take(w.currentLink(), event, Delivery{
		Subject: "local." + event, Data: []byte(message), Held: true, Attempt: 1, HeldFor: heldFor,
		Ack:  func(context.Context) error { h.acks.Add(1); return nil },
		Nack: func(error) { h.nacks.Add(1) },
	})
}

// openWorkerForTest opens a worker in this process, on a folder that a test may open again.
func openWorkerForTest(t *testing.T, dir, jobs string) (w *worker, stop func()) {
	t.Helper()
	path := filepath.Join(dir, "config.yaml")
	config := "take_when: {disk_free: 0}\ndrain_timeout: 0s\nkill_after: 200ms\n" + jobs
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := loadConfig(path, os.LookupEnv)
	if err != nil {
		t.Fatal(err)
	}
	log := newLogger(testLog{t}, cfg)
	recs, err := openRecords(cfg.DataDir, cfg.Retain)
	if err != nil {
		t.Fatal(err)
	}
	bus := &eventBus{}
	bus.subscribe(recs.handle)
	w, err = newWorker(cfg, "http://127.0.0.1:1", recs, bus, workerOrders{}, log)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.open(t.Context()); err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	stop = func() {
		once.Do(func() {
			w.drain(context.Background())
			w.close(context.Background())
			recs.close()
		})
	}
	t.Cleanup(stop)
	return w, stop
}

func waitRuns(t *testing.T, w *worker, n int64) {
	t.Helper()
	waitFor(t, 10*time.Second, func() string {
		if w.runningTasks.Load() != n {
			return "the number of running tasks is another"
		}
		return ""
	})
}

// TestLongTaskIsAdopted lets a task outlast its broker's patience: it is acknowledged while it runs, once, and from
// then on the journal has it run again.
func TestLongTaskIsAdopted(t *testing.T) {
	dir := t.TempDir()
	jobs := "jobs: [{event: long, cmd: 'echo run >> runs; test -e enough || sleep 60'}]\n"
	w, stop := openWorkerForTest(t, dir, jobs)
	var d heldDelivery
	d.deliver(w, "long", `{"task_id":"a","data":{}}`, 100*time.Millisecond)
	waitRuns(t, w, 1)
	waitFor(t, 5*time.Second, func() string {
		if d.acks.Load() != 1 {
			return "not acknowledged"
		}
		return ""
	})
	stop()
	if d.acks.Load() != 1 || d.nacks.Load() != 0 {
		t.Errorf("%d acks, %d nacks; want the one of the adoption", d.acks.Load(), d.nacks.Load())
	}
	if err := os.WriteFile(filepath.Join(dir, "enough"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	w, _ = openWorkerForTest(t, dir, jobs)
	waitFor(t, 10*time.Second, func() string {
		if r, _ := w.record("a"); r.Status != statusFinish {
			return "the adopted task is " + string(r.Status)
		}
		return ""
	})
	if runs, _ := os.ReadFile(filepath.Join(dir, "runs")); strings.Count(string(runs), "run") != 2 {
		t.Errorf("runs: %q; want two", runs)
	}
}

// TestHeldTaskIsSettled checks the broker's side of tasks that end, come twice, or are put back.
func TestHeldTaskIsSettled(t *testing.T) {
	dir := t.TempDir()
	jobs := "concurrency: 1\njobs: [{event: quick, cmd: 'true'}, {event: long, cmd: sleep 60}]\n"
	w, stop := openWorkerForTest(t, dir, jobs)
	var quick, again, running, redelivered, waiting heldDelivery
	settled := func(what string, d *heldDelivery, acks, nacks int32) {
		t.Helper()
		waitFor(t, 5*time.Second, func() string {
			if d.acks.Load() != acks || d.nacks.Load() != nacks {
				return what + " is not settled as it should be"
			}
			return ""
		})
	}
	quick.deliver(w, "quick", `{"task_id":"q"}`, time.Hour)
	settled("a finished task", &quick, 1, 0)
	again.deliver(w, "quick", `{"task_id":"q"}`, time.Hour)
	settled("a duplicate of a finished task", &again, 1, 0)

	var refused heldDelivery
	refused.deliver(w, "quick", `{"task_id":"../q"}`, 0)
	settled("a message that is no task", &refused, 1, 0)

	running.deliver(w, "long", `{"task_id":"r"}`, 0)
	waitRuns(t, w, 1)
	redelivered.deliver(w, "long", `{"task_id":"r"}`, 0)
	waiting.deliver(w, "long", `{"task_id":"w"}`, 0)
	stop()
	settled("a delivery that a later one has replaced", &running, 0, 0)
	settled("a task that was stopped", &redelivered, 0, 1)
	settled("a task that waited", &waiting, 0, 1)

	// The broker delivers them again, so the journal has nothing to run.
	w, _ = openWorkerForTest(t, dir, jobs)
	if len(w.known) != 0 || w.runningTasks.Load() != 0 {
		t.Errorf("%d tasks are known after the restart", len(w.known))
	}
}

// TestEndedTaskTakesNoPlace lets acknowledgements hang: neither the tasks that follow wait for them, nor the events of
// those; and a task that will run once more keeps its place.
func TestEndedTaskTakesNoPlace(t *testing.T) {
	jobs := "concurrency: 1\njobs: [{event: quick, cmd: 'true'}, {event: again, cmd: 'false', retry: {times: 1, pause: 10m}}]\n"
	w, stop := openWorkerForTest(t, t.TempDir(), jobs)
	hangs := make(chan struct{})
	var acks atomic.Int32
	run := func(event, id string, ended func() bool) {
		t.Helper()
		w.take(w.currentLink(), event, Delivery{
			Subject: "local." + event, Data: []byte(`{"task_id":"` + id + `"}`), Held: true, Attempt: 1,
			Ack:  func(context.Context) error { acks.Add(1); <-hangs; return nil },
			Nack: func(error) {},
		})
		waitFor(t, 5*time.Second, func() string {
			if !ended() {
				return "the end of " + id + " is not told"
			}
			return ""
		})
	}
	for n := 1; n <= 3; n++ {
		run("quick", string(rune('a'+n)), func() bool { return acks.Load() == int32(n) })
		if most := w.queue.mostUnsettled("quick"); most != 1+n {
			t.Errorf("%d deliveries may be unsettled after %d tasks; want %d", most, n, 1+n)
		}
	}
	run("again", "r", func() bool { return w.queue.free("again") == 1 })
	if most := w.queue.mostUnsettled("again"); most != 1 {
		t.Errorf("%d deliveries may be unsettled while one waits to run again; want 1", most)
	}
	stopped := make(chan struct{})
	go func() { stop(); close(stopped) }()
	select {
	case <-stopped:
		t.Error("the worker has left before its deliveries were acknowledged")
	case <-time.After(100 * time.Millisecond):
	}
	close(hangs)
	<-stopped
	if most := w.queue.mostUnsettled("quick"); most != 1 {
		t.Errorf("%d deliveries may be unsettled in the end; want 1", most)
	}
}

// A wokenConsumer counts how often it is woken.
type wokenConsumer struct {
	Consumer
	woken atomic.Int32
}

func (c *wokenConsumer) Wake() { c.woken.Add(1) }

// TestFreedSlotWakes wakes all consumers where they are few. Of many it wakes the job's own and some others, and all soon.
func TestFreedSlotWakes(t *testing.T) {
	for _, jobs := range []int{wokenAtOnce, 10 * wokenAtOnce} {
		l := &brokerLink{consumers: map[string]Consumer{}}
		w := &worker{links: []*brokerLink{l}}
		var all []*wokenConsumer
		for i := range jobs {
			c := &wokenConsumer{}
			l.consumers[strconv.Itoa(i)] = c
			all = append(all, c)
		}
		asleep := func() (n int) {
			for _, c := range all {
				if c.woken.Load() == 0 {
					n++
				}
			}
			return n
		}
		w.wakeSome("3")
		if all[3].woken.Load() == 0 || asleep() > max(0, jobs-wokenAtOnce) {
			t.Errorf("of %d consumers %d sleep on, the job's own was woken %d times", jobs, asleep(), all[3].woken.Load())
		}
		waitFor(t, 5*time.Second, func() string {
			if n := asleep(); n > 0 {
				return strconv.Itoa(n) + " consumers sleep on"
			}
			return ""
		})
	}
}
