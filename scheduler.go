package main

// scheduler.go decides which accepted task runs next: first come, first served among the jobs that are below their own
// limit, as long as a slot is free and nothing pauses the worker. It knows nothing of what running means.

import (
	"maps"
	"slices"
	"sync"
	"time"
)

// A scheduler holds the slots and, per job, a lane of waiting tasks.
type scheduler struct {
	start func(*task) // called with mu held when a task gets a slot; must not block

	mu      sync.Mutex // guards what follows
	slots   int        // tasks at once, all jobs together
	running int
	paused  map[string]bool // reasons why nothing is started, of those below
	lanes   map[string]*lane
	waiting []*lane // the lanes that hold a task, in no order
	arrived uint64
}

// A lane is the waiting tasks of one job, in order of arrival.
type lane struct {
	limit   int
	running int
	ending  int // tasks that have given their slot back for good and are not settled
	looks
	tasks  []waitingTask
	head   int // tasks before it have left
	queued bool
	held   bool // none of them may start for the moment
}

type waitingTask struct {
	task    *task
	arrival uint64
}

func newScheduler(slots int, start func(*task)) *scheduler {
	return &scheduler{start: start, slots: slots, paused: map[string]bool{}, lanes: map[string]*lane{}}
}

// setLimit changes how many tasks of one job run at once.
func (s *scheduler) setLimit(event string, limit int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lane(event).limit = limit
	s.fill()
}

// setSlots changes how many tasks run at once, all jobs together.
func (s *scheduler) setSlots(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.slots = n
	s.fill()
}

// forgetLane drops the lane of a job that is no longer configured, if it is not in use.
func (s *scheduler) forgetLane(event string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l := s.lanes[event]; l != nil {
		if l.limit = 0; l.running == 0 && l.ending == 0 && l.looking == 0 && !l.queued {
			delete(s.lanes, event)
		}
	}
}

// limit is how many tasks of one job run at once.
func (s *scheduler) limit(event string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l := s.lanes[event]; l != nil {
		return l.limit
	}
	return 0
}

// maxEnding bounds, per job, the deliveries that are unsettled only because their tasks' ends are being told. They should
// be few; where the broker takes acknowledgements or events no more, it ends there.
const maxEnding = 8

// mostUnsettled is how many deliveries of a job the worker may hold: as many as its limit, besides those of tasks that
// have ended, since what runs next need not wait for what is left to be told of them, and of tasks that are looked into.
func (s *scheduler) mostUnsettled(event string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l := s.lanes[event]; l != nil {
		return l.limit + min(l.ending, maxEnding) + min(l.looking, l.ahead)
	}
	return 0
}

// ended notes that a task whose slot is given back is only to be settled; settled, that it is.
func (s *scheduler) ended(event string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lane(event).ending++
}

func (s *scheduler) settled(event string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lane(event).ending--
}

// looks are the tasks of a job for whose holder is looked (redelivery.go). That takes a while, and a crashed RabbitMQ has
// every message that waited looked into, so some are looked into ahead of the slots: more where slots were found to be
// idle meanwhile, fewer where tasks were found waiting.
type looks struct {
	looking int
	ahead   int       // at most so many
	since   time.Time // when ahead was set
}

// maxLooksAhead bounds what of a job is held for no slot.
const maxLooksAhead = 256

// lookBegan notes that a task of a job is looked into; lookEnded, that it no longer is, and whether it is the worker's now.
func (s *scheduler) lookBegan(event string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lane(event).looking++
}

func (s *scheduler) lookEnded(event string, taken bool, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.lane(event)
	l.looking--
	age, free := now.Sub(l.since), s.freeFor(l)
	switch {
	case !taken || age < lookLimit:
		return
	case age > returnLimit: // that was another crash
		l.ahead = 0
	case free > 0:
		l.ahead = min(2*max(l.ahead, (l.limit+1)/2), maxLooksAhead)
	case free < 0:
		l.ahead /= 2
	}
	l.since = now
}

// add lets a task wait for its slot.
func (s *scheduler) add(t *task) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.lane(t.event)
	s.arrived++
	l.tasks = append(l.tasks, waitingTask{t, s.arrived})
	if !l.queued {
		l.queued = true
		s.waiting = append(s.waiting, l)
	}
	s.fill()
}

// remove takes a waiting task out again; false if it does not wait here.
func (s *scheduler) remove(t *task) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.lane(t.event)
	for i := l.head; i < len(l.tasks); i++ {
		if l.tasks[i].task == t {
			l.tasks = append(l.tasks[:i], l.tasks[i+1:]...)
			s.leave(l)
			return true
		}
	}
	return false
}

// done gives the slot of a task back that start was called with.
func (s *scheduler) done(event string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.running--
	s.lane(event).running--
	s.fill()
}

// free is how many more tasks of a job could start now, besides those that wait already; negative where more wait than
// there are slots for.
func (s *scheduler) free(event string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.freeFor(s.lane(event))
}

// freeFor needs mu.
func (s *scheduler) freeFor(l *lane) int {
	if len(s.paused) > 0 || l.held {
		return 0
	}
	waiting := 0
	for _, l := range s.waiting {
		waiting += len(l.tasks) - l.head
	}
	return min(s.slots-s.running-waiting, l.limit-l.running-(len(l.tasks)-l.head))
}

// Why the worker starts no task.
const (
	pausedByDisk    = "disk"
	pausedByMemory  = "memory"
	pausedByJournal = "journal"
	pausedByDrain   = "draining"
)

func pauseReasons() []string {
	return []string{pausedByDisk, pausedByMemory, pausedByJournal, pausedByDrain}
}

// pauses gives the reasons for which nothing is started.
func (s *scheduler) pauses() map[string]bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.paused)
}

// pause stops new tasks from being started for a reason; resume takes that reason back.
func (s *scheduler) pause(reason string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.paused[reason] = true
}

func (s *scheduler) resume(reason string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.paused, reason)
	s.fill()
}

// hold stops the tasks of one job from being started; false if they are held already. unhold ends it.
func (s *scheduler) hold(event string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.lane(event)
	begins := !l.held
	l.held = true
	return begins
}

func (s *scheduler) unhold(event string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lane(event).held = false
	s.fill()
}

// lane finds a job's lane. One that no limit was set for never gets a slot: its job is not configured.
func (s *scheduler) lane(event string) *lane {
	l := s.lanes[event]
	if l == nil {
		l = &lane{}
		s.lanes[event] = l
	}
	return l
}

// fill starts waiting tasks while there are slots.
func (s *scheduler) fill() {
	for s.running < s.slots && len(s.paused) == 0 {
		next := -1
		for i, l := range s.waiting {
			if !l.held && l.running < l.limit && (next < 0 || l.tasks[l.head].arrival < s.waiting[next].tasks[s.waiting[next].head].arrival) {
				next = i
			}
		}
		if next < 0 {
			return
		}
		l := s.waiting[next]
		t := l.pop()
		s.leave(l)
		s.running++
		l.running++
		s.start(t)
	}
}

// leave takes a lane that has become empty off the waiting ones.
func (s *scheduler) leave(l *lane) {
	if l.head < len(l.tasks) {
		return
	}
	l.tasks, l.head, l.queued = nil, 0, false
	s.waiting = slices.DeleteFunc(s.waiting, func(other *lane) bool { return other == l })
}

// pop takes the first task out and, now and then, the room that gone ones leave.
func (l *lane) pop() *task {
	t := l.tasks[l.head].task
	l.tasks[l.head] = waitingTask{}
	l.head++
	if l.head > 1024 && l.head > len(l.tasks)/2 {
		l.tasks = append([]waitingTask(nil), l.tasks[l.head:]...)
		l.head = 0
	}
	return t
}
