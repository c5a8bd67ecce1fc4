package main

// delivery.go is a delivery's way through the worker: checked, accepted into the journal, taken over from its broker where
// that loses patience, and acknowledged or put back in the end (PROTOCOL section 5).

import (
	"context"
	"time"
)

// maxPutBacks is how many deliveries are put up with for each crash that a task may cause: a broker counts deliveries,
// also those that were put back unharmed when a worker stopped.
const maxPutBacks = 4

// takeBackPause lies between two looks at a task that is being taken back.
const takeBackPause = 10 * time.Millisecond

// settleTimeout bounds how long one delivery may take to be acknowledged, and the last reports of a stopping worker.
const settleTimeout = 5 * time.Second

// take checks a delivery and accepts the task, where need be after another worker has been looked for that has it.
func (w *worker) take(l *brokerLink, event string, d Delivery) {
	m, err := parseTaskMessage(d.Data)
	if err != nil {
		w.counts.refused.Add(1)
		w.log.Warn("message refused", errAttrs(err), "subject", d.Subject)
		w.ack(d)
		return
	}
	if !w.mayBeHeld(d, m.TaskID) {
		w.accept(l, event, d, m)
		return
	}
	w.mu.Lock()
	l.tasks++ // link and job stay meanwhile
	w.perEvent[event]++
	w.mu.Unlock()
	w.queue.lookBegan(event)
	w.looking.Add(1)
	go w.takeIfUnheld(l, event, d, m) // ends when the task is accepted, left or put back, at the latest when drain begins
}

// accept is where a delivery becomes a task: it is told from what is known already, and journalled. What cannot be
// journalled is put back.
func (w *worker) accept(l *brokerLink, event string, d Delivery, m taskMessage) {
	t := &task{id: m.TaskID, event: event, created: time.Now().UnixNano(), status: statusQueued}
	if d.Held {
		t.delivery = &d
		t.attempts = int32(max(0, d.Attempt-1))
	}

	w.mu.Lock()
	if d.Held {
		t.crashes = int32(w.crashed[t.id])
		if int(t.attempts) >= maxPutBacks*w.config().MaxDeliveries {
			t.crashes = t.attempts // they were other workers' crashes, at least some of them
		}
	}
	if same := w.known[t.id]; same != nil {
		w.counts.duplicates.Add(1)
		// A broker that lost the connection delivers again what it held; the new delivery is the one to settle.
		if d.Held && same.delivery != nil && !same.status.final() {
			same.delivery = &d
			moved := same.link != l
			same.moveTo(l)
			w.mu.Unlock()
			if moved {
				w.control(same)
			}
			w.log.Info("task was delivered again while it is being done", "task_id", t.id)
			return
		}
		w.mu.Unlock()
		w.log.Info("duplicate of a task that is being done", "task_id", t.id)
		w.noteSettled(same, w.ack(d))
		return
	}
	if status, ended := w.journal.outcome(t.id); ended {
		w.mu.Unlock()
		w.counts.duplicates.Add(1)
		w.log.Info("duplicate of a finished task, reported again", "task_id", t.id, "status", status)
		l.reporter.enqueue(t.id+"_finish", []byte(status), "")
		w.ack(d)
		return
	}
	delete(w.crashed, t.id)
	t.moveTo(l)
	w.known[t.id] = t // before it is journalled, so that a duplicate meanwhile is seen
	w.perEvent[event]++
	w.mu.Unlock()

	durable, err := w.journal.enter(journalTask{
		ID: t.id, Subject: d.Subject, Event: event, Held: d.Held, CreatedAt: t.createdAt(),
		Attempts: int(t.attempts), Crashes: int(t.crashes),
	}, m.Data)
	if err != nil {
		w.forget(t.id)
		w.counts.unaccepted.Add(1)
		w.log.Error("task not accepted", errAttrs(err), "task_id", t.id)
		if d.Nack != nil {
			d.Nack(err)
		}
		return
	}
	w.mu.Lock()
	t.accepted = true
	if durable != nil {
		w.entering[t.id] = durable
	}
	if d.Held && d.HeldFor > 0 {
		t.begun()
		t.adoption = time.AfterFunc(d.HeldFor, func() { w.adopt(t) })
	}
	w.mu.Unlock()
	for _, other := range w.openLinks() {
		other.follower.drop(t.id) // it is right here
	}
	w.control(t)
	w.bus.publish(taskQueued{TaskID: t.id, Event: event, Name: w.nameOf(event), At: t.createdAt()})
	w.queue.add(t)
	// It may begin while the disk makes sure of it; whoever created it is told afterwards.
	err = durable.wait()
	w.mu.Lock()
	delete(w.entering, t.id)
	w.mu.Unlock()
	if err == nil {
		_ = w.assure(t) // tells that it has begun, where it has
	} else if !w.takeBack(t, err) {
		if d.Nack != nil {
			d.Nack(err)
		}
		return
	}
	if !d.Held && d.Ack != nil {
		w.ack(d) // the journal answers from here on
	}
}

// announce tells once that this worker has begun with a task. Whoever hears that counts on it, so it is for when the disk
// is sure of it.
func (w *worker) announce(t *task) {
	t.announced.Do(func() { w.bus.publish(taskTaken{TaskID: t.id, Event: t.event, At: time.Now()}) })
}

// assure returns when more of a task may be told: the disk is sure of it, and its beginning, if it has begun, was told. An
// error is that the disk could not be: then nothing is told of it.
func (w *worker) assure(t *task) error {
	w.mu.Lock()
	durable, taken := w.entering[t.id], t.taskRun != nil && t.taken
	w.mu.Unlock()
	if err := durable.wait(); err != nil {
		return err
	}
	if taken {
		w.announce(t)
	}
	return nil
}

// takeBack ends a task that the journal could not accept after all. It returns true if it has run to its end already:
// then its end counts.
func (w *worker) takeBack(t *task, reason error) (ended bool) {
	w.counts.unaccepted.Add(1)
	w.log.Error("task not accepted", errAttrs(reason), "task_id", t.id)
	for !w.queue.remove(t) {
		w.mu.Lock()
		ended, gone := t.status.final(), w.known[t.id] != t
		w.mu.Unlock()
		if ended || gone || w.ctx.Err() != nil { // a worker that stops ends it by itself
			return ended
		}
		w.stopTask(t, errUnaccepted)
		time.Sleep(takeBackPause) // the disk is failing, and its command is being stopped
	}
	w.dropUnaccepted(t)
	return false
}

// dropUnaccepted forgets a task as if it had never been there.
func (w *worker) dropUnaccepted(t *task) {
	w.records.release(t.id)
	w.forget(t.id)
}

// adopt makes the journal answer for a task before its broker's patience ends, and acknowledges it.
func (w *worker) adopt(t *task) {
	w.mu.Lock()
	adopting := w.known[t.id] == t && t.delivery != nil && !t.status.final() && w.ctx.Err() == nil
	w.mu.Unlock()
	if !adopting {
		return
	}
	if err := w.journal.adopt(t.id); err != nil {
		w.log.Error("task not taken over from the broker", errAttrs(err), "task_id", t.id)
		return
	}
	w.mu.Lock()
	d := t.delivery
	t.delivery = nil
	w.mu.Unlock()
	if d != nil {
		w.noteSettled(t, w.ack(*d))
		w.log.Info("the journal answers for a long task now", "task_id", t.id)
	}
}

// noteSettled notes whether the broker knows (nil) that the journal answers for a task in its stead.
func (w *worker) noteSettled(t *task, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	t.unsettled = err != nil
}

// settle ends the story of a task whose _finish has arrived.
func (w *worker) settle(id string) {
	w.mu.Lock()
	t := w.known[id]
	var d *Delivery
	unsettled := false
	if t != nil {
		d, unsettled = t.delivery, t.unsettled
	}
	w.mu.Unlock()
	if d != nil {
		unsettled = w.ack(*d) != nil
	}
	if unsettled {
		w.linger(t)
	}
	// Last, since it ends the listening: whoever is given the task again finds either that or the task settled.
	w.forget(id)
	w.journalled("note task as reported", id, w.journal.reported(id))
}

// ack settles a delivery with its broker. A failure is the broker's to mend: it delivers again, and the journal knows.
func (w *worker) ack(d Delivery) error {
	if d.Ack == nil {
		return nil
	}
	// Not under the tasks' context: a draining worker still settles what has ended.
	ctx, stop := context.WithTimeout(context.WithoutCancel(w.ctx), settleTimeout)
	defer stop()
	err := d.Ack(ctx)
	if err != nil {
		w.log.Warn("delivery not acknowledged", errAttrs(err), "subject", d.Subject)
	}
	return err
}
