package main

// redelivery.go is about tasks that a broker delivers again although a worker may still run them: a broker that was
// killed forgets who holds what, and some give a task to the next worker as soon as the holder's connection is lost. A
// holder listens on its task's subjects for as long as it knows the task (control.go), so whoever is given such a task
// first finds out whether somebody does (PROTOCOL section 5: a task is never run twice at once).

import (
	"context"
	"errors"
	"time"
)

var errHeldElsewhere = errors.New("another worker has the task")

const (
	// lookPause lies between two looks for a task's holder. Where a task is given to the next worker as soon as its
	// holder's connection is lost, nobody is believed to hold it before lookLimit, in which the next one can be made.
	lookPause = 250 * time.Millisecond
	lookLimit = time.Second

	// returnLimit is how long after an outage holders may take to be back: their pauses between two tries grow to
	// maxReconnectPause, and each has to connect and to subscribe.
	returnLimit = 2 * maxReconnectPause

	// leavePause is how long a delivery is kept that the holder has to be given, and as often as it has been made where
	// the broker counts, since some give a message up that comes back too often.
	leavePause = 2 * time.Second

	// lingerLimit is how long a finished task is listened for whose delivery could not be settled, and after each time that
	// another worker has asked for it: it is on its way to one, which leaves it to this one. It is more than claimLost.
	lingerLimit = time.Minute
)

// mayBeHeld reports whether a task that is not known here may be another worker's.
func (w *worker) mayBeHeld(d Delivery, id string) bool {
	if !d.Held || !d.Again && !d.Late {
		return false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	_, ended := w.journal.outcome(id)
	return w.known[id] == nil && !ended
}

// takeIfUnheld takes a delivery unless another worker holds its task, which it is left to then.
func (w *worker) takeIfUnheld(l *brokerLink, event string, d Delivery, m taskMessage) {
	defer func() {
		w.mu.Lock()
		l.tasks--
		released := w.oneLess(event)
		w.mu.Unlock()
		if released {
			w.release(event)
		}
		w.looking.Done()
	}()
	ctx, stop := context.WithCancel(w.ctx) // a link that was replaced goes on consuming for a while
	defer stop()
	go func() { // ends with the function around it
		select {
		case <-w.draining:
			stop()
		case <-ctx.Done():
		}
	}()
	held, err := w.findHolder(ctx, l, d, m.TaskID)
	w.queue.lookEnded(event, err == nil && !held, time.Now())
	switch {
	case err != nil:
		d.Nack(err)
	case !held:
		w.accept(l, event, d, m)
	default:
		w.counts.duplicates.Add(1)
		w.log.Info("task was delivered again while another worker has it, left to that one", "task_id", m.TaskID)
		if d.Leave != nil {
			d.Leave()
		} else {
			d.Nack(errHeldElsewhere) // for the holder to get it
		}
	}
}

// findHolder reports whether another worker holds a task, or has settled it meanwhile. It returns when that is sure and
// there is something to do about it; an error is the end of ctx or of the link.
func (w *worker) findHolder(ctx context.Context, l *brokerLink, d Delivery, id string) (bool, error) {
	// Where the holder has to be given the message, it may be putting it back just now.
	patience := time.Now().Add(min(leavePause*time.Duration(max(1, d.Attempt)), lingerLimit/2))
	alone, answered := time.Now(), time.Now()
	for {
		listens, err := l.broker.Listens(ctx, id)
		settled, nobody := false, false
		switch {
		case err != nil:
		case listens && (d.Leave != nil || d.Settled == nil && time.Now().After(patience)):
			return true, nil
		case listens: // or the claim is this worker's now, and is kept until the holder has settled the message or is gone
			alone = time.Now()
		case time.Since(alone) >= w.lookLimit(l, d) && w.othersAreBack(l, d):
			if nobody = true; d.Again && d.Settled != nil { // a holder listens until it has settled its delivery, so this comes last
				settled, err = d.Settled(ctx)
			}
		}
		switch {
		case ctx.Err() != nil:
			return false, context.Cause(ctx)
		case err == nil && nobody:
			return settled, nil
		case l.ctx.Err() != nil && !w.isConnected(l): // it was replaced and is lost
			return false, errNotConnected
		case err == nil || !w.isConnected(l):
			answered = time.Now()
		case time.Since(answered) > returnLimit: // this login may not ask
			w.log.Warn("task was delivered again, and whether another worker has it cannot be told", errAttrs(err), "task_id", id)
			return false, nil
		}
		waitOut(ctx, lookPause)
	}
}

// waitOut returns after a pause, or when ctx ends.
func waitOut(ctx context.Context, pause time.Duration) {
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// lookLimit is how long a holder must not be found for there to be none.
func (w *worker) lookLimit(l *brokerLink, d Delivery) time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	// The broker that has just been connected to may have begun just now itself.
	if d.Again && (d.Settled == nil || time.Since(l.since) < returnLimit) {
		return lookLimit
	}
	return 0
}

// othersAreBack reports whether a link's connection is there, and the last outage so long ago that every worker has
// its own again. What is only late waits for most of them: their pauses are about as long as the outage was before.
func (w *worker) othersAreBack(l *brokerLink, d Delivery) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	limit := returnLimit
	if !d.Again {
		limit = min(max(l.outage, lookLimit), returnLimit)
	}
	return l.err == nil && (!l.lost || time.Since(l.since) > limit)
}

func (w *worker) isConnected(l *brokerLink) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return l.err == nil
}
