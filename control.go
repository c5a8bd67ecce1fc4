package main

// control.go is what a Job Manager can say to this worker besides new tasks: stop one, prove that it is alive, ask for
// the configuration again, shut down (PROTOCOL section 4).

import (
	"encoding/json"
	"errors"
	"time"
)

const (
	// controlDelay is how long a task must live before its control subjects are listened on: a short one is over
	// before anybody could mean it, and should not pay for it.
	controlDelay = 50 * time.Millisecond

	// listenSuffix makes the subject of a sign of life of a task's id.
	listenSuffix = "_listen"

	// hushPause is how long the subjects of a task that has ended may still be listened on, so that the broker is told of
	// many at a time.
	hushPause = 50 * time.Millisecond

	// maxControlled bounds the waiting tasks whose control subjects are listened on, since very many may wait.
	maxControlled = 10_000
)

// control listens on a task's own subjects soon, for as long as the task is known, and on no other link than its own.
func (w *worker) control(t *task) {
	w.mu.Lock()
	l := t.link
	w.mu.Unlock()
	if before := w.takeControl(t); before != nil {
		before()
	}
	if l == nil || l.isLocal() {
		return // it has ended, or nobody could say anything
	}
	time.AfterFunc(controlDelay, func() {
		w.mu.Lock()
		mine := t.link == l && !t.givenBack
		wanted := mine && (t.status == statusRunning || w.controlled < maxControlled)
		t.unheard = mine && !wanted
		if wanted {
			t.begun()
			w.controlled++
		}
		w.mu.Unlock()
		if !wanted {
			return
		}
		listening := w.listen(t, l, func() bool { return w.knows(t) })
		stop := func() {
			listening.Stop()
			w.mu.Lock()
			defer w.mu.Unlock()
			w.controlled--
		}
		w.mu.Lock()
		wanted = t.link == l && !t.givenBack && t.uncontrol == nil
		if wanted {
			t.uncontrol = stop
		}
		w.mu.Unlock()
		if !wanted { // it has ended, moved, or is listened on already
			stop()
		}
	})
}

// knows reports whether a task is unfinished, or its end untold.
func (w *worker) knows(t *task) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.known[t.id] == t
}

// hush ends the listening on the control subjects of a task that has ended, soon.
func (w *worker) hush(uncontrol func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.hushed = append(w.hushed, uncontrol); len(w.hushed) > 1 {
		return
	}
	w.hushing.Add(1)
	time.AfterFunc(hushPause, func() { // close waits for it
		defer w.hushing.Done()
		w.mu.Lock()
		hushed := w.hushed
		w.hushed = nil
		w.mu.Unlock()
		for _, uncontrol := range hushed {
			uncontrol()
		}
	})
}

// listen listens on a task's control subjects on a link. It gives signs of life as long as answers is true.
func (w *worker) listen(t *task, l *brokerLink, answers func() bool) Subscription {
	// The broker is never called with mu held: it has locks of its own, and calls us back.
	orders := l.broker.Subscribe(t.id+"_worker", func(data []byte) { w.obey(t, data) })
	looks := l.broker.Subscribe(t.id+listenSuffix, func([]byte) {
		if answers() {
			l.reporter.enqueue(t.id+listenSuffix+".callback", []byte("world"), "")
		}
	})
	stopLooks := looks.Stop
	looks.Stop = func() {
		orders.Stop()
		stopLooks()
	}
	return looks
}

// takeControl gives the end of the listening on a task's control subjects to whoever calls it; nil: there is none.
func (w *worker) takeControl(t *task) (uncontrol func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return t.takeUncontrol()
}

// linger listens on for a finished task whose delivery could not be settled: the broker will deliver it again, and whoever
// gets it is to leave it to this worker, which knows that it has ended.
func (w *worker) linger(t *task) {
	w.mu.Lock()
	l := t.link
	w.mu.Unlock()
	if l == nil || l.isLocal() {
		return
	}
	w.listen(t, l, func() bool { return true }).stopAfter(lingerLimit)
}

// obey does what a message on {task_id}_worker says.
func (w *worker) obey(t *task, data []byte) {
	var said struct {
		TaskID string `json:"task_id"`
		Action string `json:"action"`
	}
	err := json.Unmarshal(data, &said)
	if err == nil && said.TaskID != "" && said.TaskID != t.id {
		err = errors.New("it is about another task")
	}
	switch {
	case err == nil && said.Action == "terminate":
		w.log.Info("task is to be terminated", "task_id", t.id)
		go w.stopTask(t, errTerminated) // ends when the stop is noted; the broker's messages must not wait for it
	case err == nil && said.Action == "timeout":
		w.log.Info("task is to time out", "task_id", t.id)
		go w.stopTask(t, errTimedOut) // the same
	default:
		if err == nil {
			err = errors.New("its action is neither timeout nor terminate")
		}
		w.log.Warn("control message refused", errAttrs(fail(codeControl, "read control message", err)), "task_id", t.id)
	}
}
