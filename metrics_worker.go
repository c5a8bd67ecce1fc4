package main

// metrics_worker.go is what a worker process measures (PROTOCOL section 7, GET /metrics). What happens to tasks it
// counts as a subscriber of the event bus; everything else is read where it is known, when somebody asks.

import (
	"context"
	"maps"
	"runtime"
	"slices"
	"sync/atomic"
	"time"
)

// otherJobs is the label of tasks whose job is not configured: the number of label values is bounded by the
// configuration.
const otherJobs = "other"

// A metrics holds what is counted from the start of a worker process on. Its methods may be called concurrently.
type metrics struct {
	service *serviceSlot
	started time.Time

	jobs           atomic.Pointer[map[string]*jobMetrics] // by event, otherJobs among them; replaced whole
	stdout, stderr atomic.Int64                           // bytes
	notifications  atomic.Int64
}

// A jobMetrics is what is counted of the tasks of one job.
type jobMetrics struct {
	accepted, started, retried atomic.Int64
	ended                      [4]atomic.Int64 // by finalIndex
	wait, run                  *histogram
}

// newMetrics begins to count. The caller subscribes handle to the event bus.
func newMetrics(service *serviceSlot, cfg *Config) *metrics {
	m := &metrics{service: service, started: time.Now()}
	m.reconfigure(cfg)
	return m
}

// reconfigure makes cfg's jobs those that have samples of their own. One call at a time.
func (m *metrics) reconfigure(cfg *Config) {
	before := map[string]*jobMetrics{}
	if jobs := m.jobs.Load(); jobs != nil {
		before = *jobs
	}
	next := map[string]*jobMetrics{}
	add := func(event string) {
		if next[event] = before[event]; next[event] == nil {
			next[event] = &jobMetrics{wait: newHistogram(taskBounds()), run: newHistogram(taskBounds())}
		}
	}
	for _, job := range cfg.Jobs {
		add(job.Event)
	}
	add(otherJobs)
	m.jobs.Store(&next)
}

// job is where the tasks of an event are counted.
func (m *metrics) job(event string) *jobMetrics {
	jobs := *m.jobs.Load()
	if job := jobs[event]; job != nil {
		return job
	}
	return jobs[otherJobs]
}

// handle takes an event of the bus. It never blocks.
func (m *metrics) handle(e event) {
	switch e := e.(type) {
	case taskQueued:
		m.job(e.Event).accepted.Add(1)
	case taskStarted:
		job := m.job(e.Event)
		job.started.Add(1)
		if e.Attempt == 1 { // of later ones it would tell how long the earlier ones ran
			job.wait.observe(e.At.Sub(e.CreatedAt))
		}
	case taskOutput:
		if e.Stream == streamStderr {
			m.stderr.Add(int64(len(e.Data)))
		} else {
			m.stdout.Add(int64(len(e.Data)))
		}
	case taskRetrying:
		m.job(e.Event).retried.Add(1)
	case taskNotified:
		m.notifications.Add(1)
	case taskFinished:
		if e.FinishedAt.Before(m.started) {
			return // the worker before this one has counted it, and could not report it
		}
		job := m.job(e.Event)
		job.ended[finalIndex(e.Status)].Add(1)
		if !e.StartedAt.IsZero() {
			job.run.observe(e.FinishedAt.Sub(e.StartedAt))
		}
	}
}

// workerCounts are the moments in a worker's life that no event tells of. The zero value is ready.
type workerCounts struct {
	refused     atomic.Int64 // messages that were no tasks
	duplicates  atomic.Int64 // deliveries of tasks that were known already
	unaccepted  atomic.Int64 // tasks that the journal could not take
	putBack     atomic.Int64
	postponed   atomic.Int64
	recovered   atomic.Int64 // unfinished tasks of an earlier worker
	interrupted atomic.Int64 // of them, and of those that their broker delivers again, those that were running

	disconnects, reconnects  atomic.Int64
	published, publishErrors atomic.Int64
}

// write gives everything that is known now; before the worker begins that is less.
func (m *metrics) write(x *metricsText) {
	w := m.service.filled.Load()
	health := m.service.health()
	m.writeHealth(x, health)
	m.writeTasks(x, w)
	m.writeTotals(x, w)
	writeBroker(x, w, health.Broker)
	if w != nil {
		writeStores(x, w)
	}
	writeExecs(x, health.Execs)
	writeProcess(x, m.started)
	writeRuntime(x)
}

func (m *metrics) writeHealth(x *metricsText, health healthReport) {
	x.family(kindGauge, "job_item_build_info", "The version of job_item that runs.")
	x.value(1, "version", version, "commit", commit, "goversion", runtime.Version())
	x.family(kindGauge, "job_item_health_state", "Whether the worker is in this state, as GET /health tells it.")
	for _, state := range []healthStatus{healthStarting, healthOK, healthDegraded, healthDraining, healthDown} {
		x.value(oneIf(health.Status == state), "state", string(state))
	}
	x.single(kindGauge, "job_item_problems", "Problems that GET /health names.", float64(len(health.Problems)))
}

// An eventTasks is how many tasks of one job are unfinished.
type eventTasks struct{ queued, running int }

// unfinished counts the tasks that wait and run by event, and those that have ended and are not reported yet.
func (w *worker) unfinished() (byEvent map[string]eventTasks, unreported int) {
	byEvent = map[string]eventTasks{}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, t := range w.known {
		switch count := byEvent[t.event]; {
		case t.status == statusQueued:
			count.queued++
			byEvent[t.event] = count
		case t.status == statusRunning:
			count.running++
			byEvent[t.event] = count
		default:
			unreported++
		}
	}
	return byEvent, unreported
}

func (m *metrics) writeTasks(x *metricsText, w *worker) {
	jobs := *m.jobs.Load()
	unfinished, unreported, slots := map[string]eventTasks{}, 0, m.service.cfg.Concurrency
	if w != nil {
		var all map[string]eventTasks
		all, unreported = w.unfinished()
		for event, count := range all {
			if jobs[event] == nil {
				event = otherJobs
			}
			sum := unfinished[event]
			unfinished[event] = eventTasks{sum.queued + count.queued, sum.running + count.running}
		}
		slots = w.config().Concurrency
	}
	events := slices.Sorted(maps.Keys(jobs))
	perEvent := func(kind, name, help string, of func(event string, job *jobMetrics) float64) {
		x.family(kind, name, help)
		for _, event := range events {
			x.value(of(event, jobs[event]), "event", event)
		}
	}
	x.single(kindGauge, "job_item_slots", "Tasks that may run at once (concurrency).", float64(slots))
	perEvent(kindGauge, "job_item_tasks_queued", "Tasks that wait here, for a slot or for their next attempt.",
		func(event string, _ *jobMetrics) float64 { return float64(unfinished[event].queued) })
	perEvent(kindGauge, "job_item_tasks_running", "Tasks that run here.",
		func(event string, _ *jobMetrics) float64 { return float64(unfinished[event].running) })
	x.single(kindGauge, "job_item_tasks_unreported", "Tasks that have ended and whose end the broker does not know yet.",
		float64(unreported))
	perEvent(kindCounter, "job_item_tasks_accepted_total", "Tasks that were accepted.",
		func(_ string, job *jobMetrics) float64 { return float64(job.accepted.Load()) })
	perEvent(kindCounter, "job_item_task_starts_total", "Commands of tasks that were started, each attempt counting.",
		func(_ string, job *jobMetrics) float64 { return float64(job.started.Load()) })
	perEvent(kindCounter, "job_item_task_retries_total", "Failed runs of tasks after which another one followed.",
		func(_ string, job *jobMetrics) float64 { return float64(job.retried.Load()) })
	x.family(kindCounter, "job_item_tasks_ended_total", "Tasks that have ended for good, by how they ended.")
	for _, event := range events {
		for _, status := range []taskStatus{statusFinish, statusError, statusTimeout, statusTerminate} {
			x.value(float64(jobs[event].ended[finalIndex(status)].Load()), "event", event, "status", string(status))
		}
	}
	x.family(kindHistogram, "job_item_task_queue_wait_seconds", "Time from the acceptance of tasks to their first start.")
	for _, event := range events {
		x.histogram(jobs[event].wait, "event", event)
	}
	x.family(kindHistogram, "job_item_task_run_seconds", "Time that the last runs of tasks took that have ended.")
	for _, event := range events {
		x.histogram(jobs[event].run, "event", event)
	}
}

func (m *metrics) writeTotals(x *metricsText, w *worker) {
	counts := &workerCounts{}
	var paused map[string]bool
	if w != nil {
		counts, paused = &w.counts, w.queue.pauses()
	}
	x.family(kindCounter, "job_item_task_output_bytes_total", "What the commands of tasks have printed.")
	x.value(float64(m.stdout.Load()), "stream", string(streamStdout))
	x.value(float64(m.stderr.Load()), "stream", string(streamStderr))
	for _, c := range []struct {
		kind, name, help string
		count            *atomic.Int64
	}{
		{kindCounter, "job_item_task_notifications_total", "Progress messages that tasks have sent.", &m.notifications},
		{kindCounter, "job_item_messages_refused_total", "Messages on the jobs' subjects that were no tasks.", &counts.refused},
		{kindCounter, "job_item_duplicate_deliveries_total", "Deliveries of tasks that were known already.", &counts.duplicates},
		{kindCounter, "job_item_tasks_not_accepted_total", "Deliveries that the journal could not take.", &counts.unaccepted},
		{kindCounter, "job_item_tasks_put_back_total", "Tasks that were given back unfinished, to run again.", &counts.putBack},
		{kindCounter, "job_item_tasks_postponed_total",
			"Starts of tasks that were put off because this host lacked something.", &counts.postponed},
		{kindGauge, "job_item_tasks_recovered", "Unfinished tasks that this worker process took up when it started.", &counts.recovered},
		{kindGauge, "job_item_tasks_interrupted",
			"Tasks that were running when the worker process before this one died.", &counts.interrupted},
	} {
		x.single(c.kind, c.name, c.help, float64(c.count.Load()))
	}
	x.family(kindGauge, "job_item_paused", "Whether no task is started, for this reason.")
	for _, reason := range pauseReasons() {
		x.value(oneIf(paused[reason]), "reason", reason)
	}
}

func writeBroker(x *metricsText, w *worker, health brokerHealth) {
	counts := &workerCounts{}
	messages, bytes := 0, 0
	if w != nil {
		counts = &w.counts
		for _, l := range w.openLinks() {
			m, b := l.reporter.backlog()
			messages += m
			bytes += b
		}
	}
	x.family(kindGauge, "job_item_broker_connected", "Whether there is a connection to the broker.")
	x.value(oneIf(health.Connected), "type", health.Type)
	x.single(kindCounter, "job_item_broker_disconnects_total", "Connections to the broker that were lost.",
		float64(counts.disconnects.Load()))
	x.single(kindCounter, "job_item_broker_reconnects_total", "Lost connections to the broker that were made again.",
		float64(counts.reconnects.Load()))
	x.single(kindCounter, "job_item_broker_messages_published_total", "Messages that the broker has taken.",
		float64(counts.published.Load()))
	x.single(kindCounter, "job_item_broker_publish_errors_total",
		"Attempts to publish that the broker did not confirm; events are sent again.", float64(counts.publishErrors.Load()))
	x.single(kindGauge, "job_item_outbox_messages", "Events that wait to be sent to the broker.", float64(messages))
	x.single(kindGauge, "job_item_outbox_bytes", "Size of the events that wait to be sent to the broker.", float64(bytes))
}

// A meteredBroker counts what is published.
type meteredBroker struct {
	Broker
	counts *workerCounts
}

func (b meteredBroker) Publish(ctx context.Context, messages ...Message) (sent int, err error) {
	sent, err = b.Broker.Publish(ctx, messages...)
	b.counts.published.Add(int64(sent))
	if err != nil {
		b.counts.publishErrors.Add(1)
	}
	return sent, err
}

// writeStores is for what lies on disk.
func writeStores(x *metricsText, w *worker) {
	select {
	case <-w.opened:
		stats := w.journal.stats()
		x.single(kindGauge, "job_item_journal_bytes", "Size of the journal on disk.", float64(stats.Bytes))
		x.single(kindGauge, "job_item_journal_segments", "Files of the journal.", float64(stats.Segments))
		x.single(kindGauge, "job_item_journal_tasks", "Tasks that the journal answers for.", float64(stats.Live))
		x.single(kindGauge, "job_item_journal_damaged_bytes",
			"Bytes of the journal that could not be read when it was opened.", float64(stats.DamagedBytes))
		x.single(kindCounter, "job_item_journal_entries_total", "Entries that were written to the journal.", float64(stats.Entries))
		x.single(kindCounter, "job_item_journal_sync_errors_total", "Failed syncs of the journal.", float64(stats.SyncErrors))
		x.single(kindCounter, "job_item_journal_write_errors_total",
			"Failures to write, sync or repair the journal.", float64(stats.WriteErrors))
		x.family(kindHistogram, "job_item_journal_sync_seconds", "Time that syncs of the journal took.")
		x.histogram(w.journal.syncTimes)
	default: // it is being opened
	}
	kept, running := w.records.count()
	x.single(kindGauge, "job_item_records", "Records of finished tasks that are kept.", float64(kept))
	x.single(kindGauge, "job_item_records_open", "Records of tasks that are not finished.", float64(running))
	failures, _ := w.records.failure()
	x.single(kindCounter, "job_item_record_write_errors_total", "Failed writes of task records.", float64(failures))
}

func writeExecs(x *metricsText, execs []execHealth) {
	x.family(kindGauge, "job_item_exec_state", "Whether the background process is in this state.")
	for _, e := range execs {
		for _, state := range []string{execStarting, execRunning, execPausing, execFinished, execFailed, execStopped} {
			x.value(oneIf(e.State == state), "exec", e.Key, "state", state)
		}
	}
	x.family(kindCounter, "job_item_exec_restarts_total", "Times that the background process was started again.")
	for _, e := range execs {
		x.value(float64(e.Restarts), "exec", e.Key)
	}
}
