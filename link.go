package main

// link.go is the worker's connections to its broker. There is one, but for the time after a change of broker or login:
// then the new one is made first, and the old one stays until the tasks that came from it are settled, so that no
// request is refused and no task changes its story half way.

import (
	"context"
	"errors"
	"time"
)

const (
	// handOverAfter is how long a connection that has been replaced may be away before what is left of its tasks'
	// stories is told over the new one.
	handOverAfter = 10 * time.Second

	retirePause = 100 * time.Millisecond // between two looks at whether a replaced connection is still needed
	readyPause  = 200 * time.Millisecond // between two looks at which consumers are to be waited for
)

var errNotConnected = errors.New("not connected to the broker yet")

// A brokerLink is one connection to a broker, and what belongs to it.
type brokerLink struct {
	config            BrokerConfig
	project, identity string

	broker   Broker
	reporter *reporter
	follower *follower

	ctx  context.Context // ends when the link is replaced or the worker stops
	quit context.CancelFunc
	back chan struct{} // holds a value when a connection has been made

	// Guarded by worker.mu.
	consumers map[string]Consumer // by event
	tasks     int                 // known tasks whose story is told here, and those being settled here
	creating  int                 // tasks that are being created through it
	err       error               // why there is no connection; errNotConnected before the first
	since     time.Time           // of err
	lost      bool                // the connection, once at least
	outage    time.Duration       // how long it was away the last time
}

// openLink opens a connection as cfg says. It returns before there is one.
func (w *worker) openLink(cfg *Config) (*brokerLink, error) {
	tls, err := brokerTLS(cfg.Broker, cfg.Dir)
	if err != nil {
		return nil, err
	}
	l := &brokerLink{
		config: cfg.Broker, project: cfg.Project, identity: cfg.IdentityID,
		consumers: map[string]Consumer{}, err: errNotConnected, since: time.Now(), back: make(chan struct{}, 1),
	}
	l.ctx, l.quit = context.WithCancel(w.ctx)
	l.broker, err = openBroker(brokerOptions{
		config: cfg.Broker, project: cfg.Project, identity: cfg.IdentityID, tls: tls, log: w.log,
		changed: func(err error) { w.linkChanged(l, err) },
	})
	if err != nil {
		l.quit()
		return nil, err
	}
	l.broker = meteredBroker{l.broker, &w.counts}
	l.reporter = newReporter(l.broker, l.back, hostID(), w.log, w.settle)
	l.follower = newFollower(l.broker, w.records)
	return l, nil
}

// serves reports whether the link is the one that cfg asks for.
func (l *brokerLink) serves(cfg *Config) bool {
	return l.config == cfg.Broker && l.project == cfg.Project && l.identity == cfg.IdentityID
}

// isLocal reports whether there is no broker but the journal.
func (l *brokerLink) isLocal() bool { return l.config.Type == "local" }

// subject is where a job's tasks arrive.
func (l *brokerLink) subject(event string) string { return l.project + "." + event }

// linkChanged notes whether there is a connection to the broker (nil), or why not.
func (w *worker) linkChanged(l *brokerLink, err error) {
	now := time.Now()
	w.mu.Lock()
	if (err == nil) != (l.err == nil) {
		if err == nil {
			l.outage = now.Sub(l.since)
		}
		l.since = now
		switch {
		case l.ctx.Err() != nil: // it has been replaced
		case err != nil:
			l.lost = true
			w.counts.disconnects.Add(1)
		case l.lost:
			w.counts.reconnects.Add(1)
		}
	}
	l.err = err
	w.mu.Unlock()
	if err == nil {
		signalOnce(w.connected)
	}
	if err == nil {
		signalOnce(l.back)
	}
	if l.ctx.Err() != nil {
		return // it has been replaced, and its coming and going matters to nobody
	}
	changed := brokerChanged{Type: l.config.Type, Connected: err == nil, At: now}
	if err != nil {
		changed.Err, changed.Code = err.Error(), codeOf(err)
	}
	w.bus.publish(changed)
}

// currentLink is where new tasks are published and the worker's own messages go.
func (w *worker) currentLink() *brokerLink {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.link
}

// connection is the broker in use and the project there, nil while it is away or where there is none but the journal.
func (w *worker) connection() (broker Broker, project string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.link.isLocal() || w.link.err != nil {
		return nil, ""
	}
	return w.link.broker, w.link.project
}

// openLinks are all links that are not closed yet.
func (w *worker) openLinks() []*brokerLink {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]*brokerLink(nil), w.links...)
}

// linkOf is where a task's story is told.
func (w *worker) linkOf(id string) *brokerLink {
	w.mu.Lock()
	defer w.mu.Unlock()
	if t := w.known[id]; t != nil {
		return t.link
	}
	return w.link
}

// moveTo makes a link the one where t's story is told. w.mu is held.
func (t *task) moveTo(l *brokerLink) {
	if t.link != nil {
		t.link.tasks--
	}
	if t.link = l; l != nil {
		l.tasks++
	}
}

// report is the reporter of all links as a subscriber of the event bus.
func (w *worker) report(e event) {
	var id string
	switch e := e.(type) {
	case taskTaken:
		id = e.TaskID
	case taskOutput:
		id = e.TaskID
	case taskNotified:
		id = e.TaskID
	case taskFinished:
		id = e.TaskID
	default:
		return
	}
	w.linkOf(id).reporter.handle(e)
}

// begin takes tasks and orders from a link. w.changing is held.
func (w *worker) begin(l *brokerLink) {
	l.broker.SubscribeAll(l.project+".restart", func([]byte) {
		w.log.Info("the configuration is to be asked for again")
		w.orders.reload()
	})
	l.broker.Subscribe(l.identity+".shutdown", func([]byte) {
		w.log.Info("shutdown is asked for")
		w.orders.shutdown()
	})
	w.consume(l)
	w.background.Add(1)
	go func() { // ends when the broker has taken the subscriptions, or with the link
		defer w.background.Done()
		w.establish(l)
	}()
}

// stopRemoved ends a link's consumers of jobs that are no longer configured. w.changing is held.
func (w *worker) stopRemoved(l *brokerLink) {
	jobs := w.setup.Load().jobs
	w.stopConsumers(l, func(event string) bool { return jobs[event] == nil || jobs[event].removed })
}

// stopConsumers ends some of a link's consumers.
func (w *worker) stopConsumers(l *brokerLink, which func(event string) bool) {
	var gone []Consumer
	w.mu.Lock()
	for event, c := range l.consumers {
		if which(event) {
			delete(l.consumers, event)
			gone = append(gone, c)
		}
	}
	w.mu.Unlock()
	// The broker is never called with mu held: it has locks of its own, and calls us back.
	for _, c := range gone {
		c.Stop()
	}
}

// consume makes a link consume what the configured jobs ask for. w.changing is held.
func (w *worker) consume(l *brokerLink) {
	w.stopRemoved(l)
	jobs := w.setup.Load().jobs
	for event, runner := range jobs {
		w.mu.Lock()
		c := l.consumers[event]
		w.mu.Unlock()
		switch {
		case c != nil:
			c.Wake() // its limit may be another one
		case !runner.removed:
			c = l.broker.Consume(l.subject(event), Slots{
				Limit: func() int { return w.queue.mostUnsettled(event) },
				Free:  func() int { return w.queue.free(event) },
			}, func(d Delivery) { w.take(l, event, d) })
			w.mu.Lock()
			l.consumers[event] = c
			w.mu.Unlock()
		}
	}
}

// establish waits until a link's broker has taken every subscription, and then puts it in the place of the one before.
func (w *worker) establish(l *brokerLink) {
	for {
		w.mu.Lock()
		var unready <-chan struct{}
		for _, c := range l.consumers {
			select {
			case <-c.Ready():
			default:
				unready = c.Ready()
			}
		}
		if unready == nil && (l.err == nil || w.pending != l) {
			w.mu.Unlock()
			break
		}
		w.mu.Unlock()
		select {
		case <-unready:
		case <-time.After(readyPause): // its job may have been removed
		case <-l.ctx.Done():
			return
		case <-w.draining:
			return
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if l.ctx.Err() != nil {
		return
	}
	if w.pending == l {
		w.replaceLink(l)
	}
	if w.state == stateConsuming {
		w.state = stateRunning
		close(w.ready)
	}
}

// replaceLink makes l the link in use and lets the one before end. w.mu is held.
func (w *worker) replaceLink(l *brokerLink) {
	old := w.link
	w.link, w.pending = l, nil
	signalOnce(w.connected)
	w.log.Info("broker connection replaced", "broker", l.config.Type)
	w.retire(old)
}

// retire lets a link end that has been replaced, or never came into use. w.mu is held.
func (w *worker) retire(l *brokerLink) {
	l.quit()
	w.background.Add(1)
	go func() { // ends when the link is not needed any more, or the worker drains
		defer w.background.Done()
		w.adoptTasks(l)
		if !w.await(l, func() bool { return l.creating == 0 && !w.awaitsOwn(l) }) {
			return // it is closed with the others
		}
		w.stopConsumers(l, func(string) bool { return true })
		if w.await(l, func() bool { return l.tasks == 0 && l.creating == 0 && !l.follower.busy() }) {
			w.handOver(l)
			w.closeLink(context.Background(), l)
			w.log.Info("replaced broker connection closed", "broker", l.config.Type)
		}
	}()
}

// awaitsOwn reports whether a task that was created here waits at the link's broker for a consumer such as ours: nobody
// else may be left there to take it. w.mu is held.
func (w *worker) awaitsOwn(l *brokerLink) bool {
	for _, r := range l.follower.waiting() {
		if l.consumers[r.Event] != nil {
			return true
		}
	}
	return false
}

// await waits until something holds that is looked at with w.mu held, or until a replaced link is lost; false when the
// worker drains before.
func (w *worker) await(l *brokerLink, holds func() bool) bool {
	for {
		w.mu.Lock()
		done := holds() || l.err != nil && time.Since(l.since) > handOverAfter
		w.mu.Unlock()
		if done {
			return true
		}
		w.adoptTasks(l)
		select {
		case <-time.After(retirePause):
		case <-w.draining:
			return false
		}
	}
}

// adoptTasks makes the journal answer for what a replaced link's broker still holds: that login may be taken away, or
// that server switched off, and the broker would then have it run once more elsewhere.
func (w *worker) adoptTasks(l *brokerLink) {
	var held []*task
	w.mu.Lock()
	for _, t := range w.known {
		if t.link == l && t.delivery != nil && t.accepted {
			held = append(held, t)
		}
	}
	w.mu.Unlock()
	for _, t := range held {
		w.mu.Lock()
		away := l.err != nil
		w.mu.Unlock()
		if away || w.journal.writable() != nil {
			return // the next time, if there is one: else it is as if the connection had been lost without a change
		}
		w.adopt(t)
	}
}

// handOver tells the rest of the stories of a replaced link's tasks, where there are any left, over the link in use.
func (w *worker) handOver(l *brokerLink) {
	w.mu.Lock()
	if l.tasks == 0 && !l.follower.busy() {
		w.mu.Unlock()
		return
	}
	heir := w.link
	heir.tasks++ // so that it stays meanwhile
	w.mu.Unlock()
	// The reporter first: what it has not sent comes before what the tasks say from now on.
	l.reporter.handOver(heir.reporter)
	l.follower.handOver(heir.follower)
	var moved []*task
	w.mu.Lock()
	for _, t := range w.known {
		if t.link == l {
			t.moveTo(heir)
			moved = append(moved, t)
		}
	}
	heir.tasks--
	w.mu.Unlock()
	w.log.Warn("the connection before is lost, its tasks are reported over the new one", "count", len(moved))
	for _, t := range moved {
		w.control(t)
	}
}

// closeLink sends what is unsent until ctx ends, at most settleTimeout, and closes the connection.
func (w *worker) closeLink(ctx context.Context, l *brokerLink) {
	ctx, stop := context.WithTimeout(ctx, settleTimeout)
	defer stop()
	l.reporter.close(ctx)
	if err := l.broker.Close(); err != nil {
		w.log.Warn("broker not closed", errAttrs(err))
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, other := range w.links {
		if other == l {
			w.links = append(w.links[:i], w.links[i+1:]...)
			break
		}
	}
}
