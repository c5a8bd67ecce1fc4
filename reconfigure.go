package main

// reconfigure.go takes up a changed configuration in a worker that goes on working (PROTOCOL section 8). What the
// configuration makes is one value, the setup, replaced whole: a task that runs keeps the one it began with, and what
// has not changed is not touched.

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"time"
)

// A setup is a configuration and what is made of it. It never changes.
type setup struct {
	cfg  *Config
	jobs map[string]*jobRunner // by event; removed ones among them for as long as they have tasks
}

// config is the configuration in use.
func (w *worker) config() *Config { return w.setup.Load().cfg }

// runner is a job made ready to run, nil if it is not configured.
func (w *worker) runner(event string) *jobRunner { return w.setup.Load().jobs[event] }

// newSetup prepares the jobs of a configuration.
func newSetup(cfg *Config, baseURL string) (*setup, error) {
	s := &setup{cfg: cfg, jobs: map[string]*jobRunner{}}
	for i := range cfg.Jobs {
		runner, err := newJobRunner(cfg, &cfg.Jobs[i], baseURL)
		if err != nil {
			return nil, err
		}
		s.jobs[runner.job.Event] = runner
	}
	return s, nil
}

// reconfigure takes up cfg, all of it or, with an error, nothing. One call at a time; drain comes after the last. When ctx
// ends it waits for no broker any more.
func (w *worker) reconfigure(ctx context.Context, cfg *Config) error {
	next, err := newSetup(cfg, w.baseURL)
	if err != nil {
		return err
	}
	w.changing.Lock()
	defer w.changing.Unlock()
	w.mu.Lock()
	stays := w.link.serves(cfg) || w.pending != nil && w.pending.serves(cfg)
	w.mu.Unlock()
	var link *brokerLink
	if !stays {
		if link, err = w.openLink(cfg); err != nil {
			return err
		}
	}

	before := w.setup.Load()
	w.mu.Lock()
	for event, runner := range before.jobs {
		if next.jobs[event] == nil && w.perEvent[event] > 0 {
			gone := *runner
			gone.removed = true
			next.jobs[event] = &gone
		}
	}
	w.setup.Store(next)
	if link != nil {
		w.links = append(w.links, link)
	}
	w.mu.Unlock()
	setLogFormat(w.log, cfg.LogFormat)
	w.records.setRetain(cfg.Retain)
	w.queue.setSlots(cfg.Concurrency)
	for event, runner := range next.jobs {
		if !runner.removed {
			w.queue.setLimit(event, runner.job.Limit)
			w.setProblem("job "+event, "")
		}
	}
	for event := range before.jobs {
		w.release(event)
	}
	w.changeLinks(cfg, link)
	w.awaitConsumers(ctx, w.currentLink())
	w.log.Info("configuration taken up", changesOf(before, next)...)
	return nil
}

// awaitConsumers waits for the broker to take new subscriptions, within reason: who reads that the configuration has been
// taken up may send a task at once.
func (w *worker) awaitConsumers(ctx context.Context, l *brokerLink) {
	if !w.isConnected(l) {
		return
	}
	var consumers []Consumer
	w.mu.Lock()
	for _, c := range l.consumers {
		consumers = append(consumers, c)
	}
	w.mu.Unlock()
	patience := time.After(settleTimeout)
	for _, c := range consumers {
		select {
		case <-c.Ready():
		case <-patience:
			return
		case <-l.ctx.Done():
			return
		case <-ctx.Done():
			return
		}
	}
}

// changeLinks lets the worker consume by the new setup, and by a new link if there is one. w.changing is held.
func (w *worker) changeLinks(cfg *Config, link *brokerLink) {
	w.mu.Lock()
	if p := w.pending; p != nil && !p.serves(cfg) {
		w.pending = nil
		w.retire(p)
	}
	begun := w.state != stateStarting
	if link != nil {
		if w.pending = link; !begun || w.link.err != nil { // nothing is lost with the one before
			w.replaceLink(link)
		}
	}
	inUse, pending := w.link, w.pending
	links := append([]*brokerLink(nil), w.links...)
	w.mu.Unlock()
	if !begun {
		return // open begins with the link that it finds
	}
	for _, l := range links {
		switch l {
		case link:
			w.begin(l)
		case inUse, pending:
			w.consume(l)
		default: // it has been replaced
			w.stopRemoved(l)
		}
	}
}

// release forgets a removed job once its last task has ended.
func (w *worker) release(event string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.setup.Load()
	runner := s.jobs[event]
	if w.perEvent[event] > 0 || runner != nil && !runner.removed {
		return
	}
	w.queue.forgetLane(event)
	if runner != nil {
		rest := &setup{cfg: s.cfg, jobs: maps.Clone(s.jobs)}
		delete(rest.jobs, event)
		w.setup.Store(rest)
		w.log.Info("removed job released", "event", event)
	}
}

// changesOf describes what a new setup changes, for the log.
func changesOf(before, next *setup) []any {
	var added, removed, changed []string
	for event, runner := range next.jobs {
		old := before.jobs[event]
		switch {
		case runner.removed:
			removed = append(removed, event)
		case old == nil:
			added = append(added, event)
		case !old.same(runner):
			changed = append(changed, event)
		}
	}
	for event := range before.jobs {
		if next.jobs[event] == nil {
			removed = append(removed, event)
		}
	}
	var attrs []any
	for _, change := range []struct {
		name string
		jobs []string
	}{{"added", added}, {"changed", changed}, {"removed", removed}} {
		if slices.Sort(change.jobs); len(change.jobs) > 0 {
			attrs = append(attrs, slog.String("jobs_"+change.name, fmt.Sprint(change.jobs)))
		}
	}
	return attrs
}
