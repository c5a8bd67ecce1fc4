package main

// service.go is what the REST API asks of the worker: create, terminate, notify, look up, and how it is doing.

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

var _ taskService = (*worker)(nil)

// apiConfigOf is what a configuration says about the REST API.
func apiConfigOf(cfg *Config) apiConfig {
	return apiConfig{secretKey: cfg.Credential.SecretKey, projectID: cfg.Project, ownManager: cfg.EndPoint == ""}
}

// create sends a new task to the broker, or to the journal where there is none. It returns when the task is safe there.
func (w *worker) create(ctx context.Context, appID, event string, formBody json.RawMessage) (string, error) {
	w.mu.Lock()
	l, now := w.link, w.setup.Load()
	connected := l.err == nil
	l.creating++ // it stays, and consumes, until the task is known to it
	w.mu.Unlock()
	defer func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		l.creating--
	}()
	if appID == "" || appID == now.cfg.Credential.ProjectID { // the manager may give the project another id in subjects
		appID = l.project
	}
	if runner := now.jobs[event]; l.isLocal() && (appID != l.project || runner == nil || runner.removed) {
		return "", fmt.Errorf("create task: %w: app_id %.140q, event %.140q", errUnknownEvent, appID, event)
	}
	id := newTaskID()
	body, err := json.Marshal(taskMessage{TaskID: id, Data: formBody, Action: "execute"})
	if err != nil {
		return "", fail(codeCreateBody, "create task", err)
	}
	if len(body) > maxMessageBytes {
		return "", tooLarge("create task", maxMessageBytes)
	}
	away := errJournalAway
	if !l.isLocal() {
		away = errBrokerAway
		listening := l.follower.follow(id, event, w.nameOf(event))
		if connected { // else sending it is to fail at once
			awaitReady(ctx, listening)
		}
	}
	if _, err := l.broker.Publish(ctx, Message{Subject: appID + "." + event, Data: body, Task: true}); err != nil {
		l.follower.drop(id)
		return "", fmt.Errorf("create task: %w: %w", away, err)
	}
	return id, nil
}

// terminate stops a task that runs or waits here, and asks the other worker to do so where it runs elsewhere.
func (w *worker) terminate(ctx context.Context, id string) error {
	w.mu.Lock()
	t := w.known[id]
	ended := t != nil && t.status.final()
	w.mu.Unlock()
	if l := w.following(id); t == nil && l != nil {
		order := fmt.Appendf(nil, `{"task_id":%q,"action":"terminate"}`, id)
		if _, err := l.broker.Publish(ctx, Message{Subject: id + "_worker", Data: order}); err != nil {
			return fmt.Errorf("terminate task %q: %w: %w", id, errBrokerAway, err)
		}
		return nil
	}
	if t == nil {
		if _, kept := w.records.get(id); !kept {
			return fmt.Errorf("terminate task %q: %w", id, errTaskUnknown)
		}
		ended = true
	}
	if ended {
		return fmt.Errorf("terminate task %q: %w", id, errTaskEnded)
	}
	w.stopTask(t, errTerminated)
	return nil
}

// notify passes a job script's progress message on.
func (w *worker) notify(_ context.Context, id, msg string) error {
	w.mu.Lock()
	t := w.known[id]
	w.mu.Unlock()
	if t != nil {
		if err := w.assure(t); err != nil {
			return err
		}
	}
	w.bus.publish(taskNotified{TaskID: id, Msg: msg, At: time.Now()})
	return nil
}

// record is what is known of a task, from the moment it was accepted.
func (w *worker) record(id string) (record, bool) {
	if kept, ok := w.records.get(id); ok {
		return kept, true
	}
	w.mu.Lock()
	t := w.known[id]
	w.mu.Unlock()
	if t != nil {
		return w.queuedRecord(t), true
	}
	if l := w.following(id); l != nil {
		return l.follower.record(id)
	}
	return record{}, false
}

// following is the link that follows a task which runs elsewhere, nil if there is none.
func (w *worker) following(id string) *brokerLink {
	for _, l := range w.openLinks() {
		if l.follower.follows(id) {
			return l
		}
	}
	return nil
}

// queuedRecord describes a task that has not been started here.
func (w *worker) queuedRecord(t *task) record {
	created := t.createdAt()
	return record{
		TaskID: t.id, Event: t.event, Name: w.nameOf(t.event), Status: statusQueued, CreatedAt: &created,
	}
}

// list merges the waiting tasks with those that left a record.
func (w *worker) list(f recordFilter) []record {
	found := w.records.list(f)
	if f.status != "" && f.status != statusQueued {
		return found
	}
	listed := map[string]bool{}
	for _, r := range found {
		listed[r.TaskID] = true
	}
	for _, t := range w.newestWaiting(f, listed) {
		found = append(found, w.queuedRecord(t))
	}
	for _, l := range w.openLinks() {
		for _, r := range l.follower.waiting() {
			if !listed[r.TaskID] && (f.event == "" || f.event == r.Event) {
				found = append(found, r)
			}
		}
	}
	slices.SortStableFunc(found, func(a, b record) int { return b.CreatedAt.Compare(*a.CreatedAt) })
	return found[:min(len(found), f.limit)]
}

// newestWaiting gives the last f.limit tasks that wait for their first start, without those that are listed already.
// Very many may wait: only few of them are looked at twice.
func (w *worker) newestWaiting(f recordFilter, listed map[string]bool) []*task {
	newest := make([]*task, 0, 2*f.limit)
	newestFirst := func(a, b *task) int { return cmp.Compare(b.created, a.created) }
	var oldest int64 // of those that are sure to be wanted, once there are enough
	w.mu.Lock()
	defer w.mu.Unlock()
	for id, t := range w.known {
		if t.status != statusQueued || t.attempts > 0 || t.created <= oldest || listed[id] ||
			f.event != "" && f.event != t.event {
			continue
		}
		if newest = append(newest, t); len(newest) == 2*f.limit {
			slices.SortFunc(newest, newestFirst)
			newest = newest[:f.limit]
			oldest = newest[f.limit-1].created
		}
	}
	slices.SortFunc(newest, newestFirst)
	return newest[:min(len(newest), f.limit)]
}

// setProblem notes a problem for the health, about what; an empty text takes it back.
func (w *worker) setProblem(about, text string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if text == "" {
		delete(w.problems, about)
	} else {
		w.problems[about] = text
	}
}

// startPatience is how long starting may take before it counts as down.
const startPatience = 30 * time.Second

// health tells how the worker is doing (PROTOCOL section 7, /health).
func (w *worker) health() healthReport {
	w.mu.Lock()
	state := w.state
	problems := maps.Clone(w.problems)
	l := w.link
	brokerErr, brokerSince := l.err, l.since
	if p := w.pending; p != nil && p.err != nil {
		problems["new broker"] = "the new broker is not used yet: " + codedText(p.err)
	} else if p != nil && time.Since(p.since) > settleTimeout {
		problems["new broker"] = "the new broker is not used yet: it has not taken every subscription"
	}
	queued := 0
	for _, t := range w.known {
		if t.status == statusQueued {
			queued++
		}
	}
	w.mu.Unlock()

	status := healthOK
	if len(problems) > 0 {
		status = healthDegraded
	}
	if brokerErr != nil {
		problems["broker"] = codedText(brokerErr)
	}
	switch {
	case state == stateDraining:
		status = healthDraining
	case state != stateRunning:
		status = healthStarting
		if time.Since(w.started) > startPatience {
			status = healthDown
		}
	case brokerErr != nil:
		status = healthDown
	default:
		if err := w.journal.writable(); err != nil {
			problems["journal"] = codedText(err)
			status = healthDown
		}
	}
	report := healthReport{
		Status: status, Problems: []string{}, IdentityID: l.identity, Version: version,
		UptimeS: int64(time.Since(w.started).Seconds()),
		Broker:  brokerHealth{Type: l.config.Type, Connected: brokerErr == nil, Since: &brokerSince},
		Jobs: jobCounts{
			Running: w.runningTasks.Load(), Queued: int64(queued),
			Finish: w.ended[0].Load(), Error: w.ended[1].Load(), Timeout: w.ended[2].Load(), Terminate: w.ended[3].Load(),
		},
		Execs: []execHealth{},
	}
	for _, about := range slices.Sorted(maps.Keys(problems)) {
		report.Problems = append(report.Problems, strings.TrimSpace(problems[about]))
	}
	return report
}
