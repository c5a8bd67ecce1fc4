//go:build linux

package main

// chaos_tasks_test.go is the other half of the chaos test: what the tasks do, who creates and terminates them, and how
// they are accounted for in the end.

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// chaosUnfinished bounds the tasks that wait or run while the chaos lasts.
const chaosUnfinished = 40

// A chaosJob is a kind of task.
type chaosJob struct {
	event   string
	options string       // in the configuration
	ends    []taskStatus // how it may end
	weight  int
}

var chaosJobs = []chaosJob{
	{"quick", "", []taskStatus{statusFinish}, 8},
	{"some", "", []taskStatus{statusFinish}, 6},
	{"long", "", []taskStatus{statusFinish}, 1},
	{"print", "", []taskStatus{statusFinish}, 2},
	{"flaky", ", retry: {times: 5, pause: 50ms}", []taskStatus{statusFinish}, 3},
	{"fail", "", []taskStatus{statusError}, 2},
	{"family", "", []taskStatus{statusFinish}, 3},
	{"stubborn", "", []taskStatus{statusFinish}, 2},
	{"narrow", ", limit: 1", []taskStatus{statusFinish}, 2},
	{"slow", ", timeout: 300ms", []taskStatus{statusTimeout}, 2},
	{"endless", "", []taskStatus{statusTerminate}, 2},
	{"extra", "", []taskStatus{statusFinish}, 2}, // not always configured
}

// chaosScript is what every task runs: it holds a lock on the file of its notes for as long as it lives, and notes its
// begin and end, which is the last thing it does.
const chaosScript = `
notes=$CHAOS_NOTES/$JOB_ITEM_TASK_ID
note() { echo "$1 $CHAOS_WORKER $JOB_ITEM_ATTEMPT $$ $(date +%s%N)" >> "$notes"; }
exec 9>> "$notes"
flock -n 9 || { note overlap; exit 97; }
if [ "$CHAOS_LOCK_FAMILY" ]; then
	rest() { sleep "$1"; }
	beside() { sleep 60 & }
else
	rest() { sleep "$1" 9>&-; }
	beside() { sleep 60 9>&- & }
fi
[ "$1" = stubborn ] && trap '' TERM
note begin
case $1 in
some | stubborn) rest "$2" ;;
long) for i in $(seq "$CHAOS_LONG"); do rest "$2"; done ;;
print) seq 20000 ;;
flaky) test "$(grep -c ^end "$notes")" -ge 2 || { note end; exit 1; } ;;
fail) echo why >&2; note end; exit 3 ;;
family) beside; beside; rest "$2" ;;
narrow) exec 8>> "$CHAOS_NOTES/../narrow-$CHAOS_WORKER"; flock -n 8 || note crowd; rest "$2" 8>&- ;;
slow | endless) beside; wait ;;
esac
note end
`

// chaosDying is how long a killed process may go on.
const chaosDying = 300 * time.Millisecond

// chaosPrinted is what a print task writes: the numbers to 20,000, a line each.
const chaosPrinted = 9*2 + 90*3 + 900*4 + 9000*5 + 10001*6

// A chaosLedger is what is known of the tasks.
type chaosLedger struct {
	notes string // folder of the tasks' own notes, a file for each

	mu         sync.Mutex // guards what follows
	tasks      map[string]*chaosTask
	unfinished int
}

// A chaosTask is a task that was accepted, or reported by somebody.
type chaosTask struct {
	id       string
	job      *chaosJob // nil: its creation was not confirmed
	created  time.Time
	statuses []taskStatus // final ones, as reported
	taken    bool         // a worker has said so
	printed  int          // bytes that were reported
}

func newChaosLedger(dir string) *chaosLedger {
	l := &chaosLedger{notes: filepath.Join(dir, "notes"), tasks: map[string]*chaosTask{}}
	os.Mkdir(l.notes, 0o700)
	return l
}

// task gives a task, which comes into being if need be. l.mu is held.
func (l *chaosLedger) task(id string) *chaosTask {
	t := l.tasks[id]
	if t == nil {
		t = &chaosTask{id: id}
		l.tasks[id] = t
	}
	return t
}

// accepted notes a task whose creation was confirmed.
func (l *chaosLedger) accepted(id string, job *chaosJob) {
	l.mu.Lock()
	defer l.mu.Unlock()
	t := l.task(id)
	t.job, t.created = job, time.Now()
	if len(t.statuses) == 0 {
		l.unfinished++
	}
}

// ended notes a final status.
func (l *chaosLedger) ended(id string, status taskStatus) {
	l.mu.Lock()
	defer l.mu.Unlock()
	t := l.task(id)
	if t.job != nil && len(t.statuses) == 0 {
		l.unfinished--
	}
	t.statuses = append(t.statuses, status)
}

// wrote notes that so much of a task's output has arrived, beyond what had before.
func (l *chaosLedger) wrote(id string, bytes int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	t := l.task(id)
	t.taken = true
	t.printed += bytes
}

// open gives the accepted tasks of which no end is known.
func (l *chaosLedger) open() (ids []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for id, t := range l.tasks {
		if t.job != nil && len(t.statuses) == 0 {
			ids = append(ids, id)
		}
	}
	return ids
}

// isFull reports whether enough tasks are on their way.
func (l *chaosLedger) isFull() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.unfinished >= chaosUnfinished
}

// createTasks creates tasks, through the REST API of any worker or like a manager, until ctx ends.
func (c *chaosRun) createTasks(ctx context.Context, random *rand.Rand) {
	weights := 0
	for _, job := range chaosJobs {
		weights += job.weight
	}
	for n := 0; pauseFor(ctx, upTo(random, 40*time.Millisecond)); n++ {
		for c.ledger.isFull() {
			if !pauseFor(ctx, 20*time.Millisecond) {
				return
			}
		}
		pick := random.IntN(weights)
		i := 0
		for ; pick >= chaosJobs[i].weight; i++ {
			pick -= chaosJobs[i].weight
		}
		job := &chaosJobs[i]
		data := fmt.Sprintf(`{"seconds":%.2f}`, 0.05+random.Float64()*0.45)
		for where := random.IntN(len(c.workers) + 1); ; where = (where + 1) % (len(c.workers) + 1) {
			if c.create(ctx, where, job, data, n) {
				break
			}
			c.count("creates refused", 1)
			if !pauseFor(ctx, 20*time.Millisecond) {
				return
			}
		}
	}
}

// create creates a task through a worker, or beyond their number through the manager, and reports whether that was
// confirmed. If not, the task may come into being all the same.
func (c *chaosRun) create(ctx context.Context, where int, job *chaosJob, data string, n int) bool {
	if where == len(c.workers) {
		if c.manager == nil {
			return false
		}
		id := fmt.Sprintf("m-%d-%d", n, time.Now().UnixNano())
		message := Message{Subject: "p1." + job.event, Task: true, Data: fmt.Appendf(nil, `{"task_id":%q,"data":%s}`, id, data)}
		ctx, stop := context.WithTimeout(ctx, 5*time.Second)
		defer stop()
		if _, err := c.manager.Publish(ctx, message); err != nil {
			return false
		}
		c.ledger.accepted(id, job)
		return true
	}
	code, answer := c.workers[where].post("/job/create", fmt.Sprintf(`{"event":%q,"form_body":%s}`, job.event, data))
	var created struct {
		TaskID string `json:"task_id"`
	}
	if code != http.StatusOK || json.Unmarshal([]byte(answer), &created) != nil || created.TaskID == "" {
		return false
	}
	c.ledger.accepted(created.TaskID, job)
	return true
}

// watch follows what is reported of the tasks, and terminates those that would not end, until ctx ends.
func (c *chaosRun) watch(ctx context.Context, random *rand.Rand) {
	for pauseFor(ctx, 200*time.Millisecond) {
		c.takeEvents()
		for _, w := range c.workers {
			if c.server == nil {
				for _, id := range c.ledger.open() {
					if v := w.task(id); v.TaskID == id && v.Status.final() {
						c.ledger.wrote(id, int(v.OutputBytes))
						c.ledger.ended(id, v.Status)
					}
				}
			}
			for _, v := range append(w.jobs("event=endless&status=running"), w.jobs("event=endless&status=queued")...) {
				if random.IntN(4) == 0 {
					w.post("/job/"+v.TaskID+"/terminate", "")
				}
			}
		}
	}
}

func (w *chaosWorker) jobs(query string) []taskView {
	var listed struct{ Jobs []taskView }
	w.getJSON("/jobs?"+query, &listed)
	return listed.Jobs
}

// takeEvents enters into the ledger what workers have published.
func (c *chaosRun) takeEvents() {
	if c.events == nil {
		return
	}
	c.events.mu.Lock()
	events := c.events.events
	c.events.events = nil
	c.events.mu.Unlock()
	for _, e := range events {
		id, what, ok := cutLast(e.subject, "_")
		if !ok {
			continue
		}
		switch what {
		case "finish":
			c.ledger.ended(id, taskStatus(e.data))
		case "who":
			c.ledger.wrote(id, 0)
		case "process":
			c.ledger.wrote(id, len(e.data))
		}
	}
}

func cutLast(s, separator string) (before, after string, found bool) {
	i := strings.LastIndex(s, separator)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(separator):], true
}

// awaitQuiet waits until every accepted task has ended and no worker has anything left.
func (c *chaosRun) awaitQuiet() {
	// A dead worker's claims take up to 40 s to be given to others, and the tasks that take long have piled up.
	const limit = 2 * time.Minute
	began := time.Now()
	deadline := began.Add(limit)
	for {
		if time.Since(began) > 5*time.Second {
			c.findDrowned()
		}
		missing := c.unfinished()
		if missing == "" {
			return
		}
		if time.Now().After(deadline) {
			c.t.Errorf("after %v: %s", limit, missing)
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// findDrowned looks for tasks whose _finish a broker confirmed and took down with it before it had passed it on: those
// brokers keep no events for who listens. The worker's own record must say that the task had ended just then.
func (c *chaosRun) findDrowned() {
	if c.server == nil || strings.HasPrefix(c.kind.name, "rabbitmq") {
		return
	}
	for _, id := range c.ledger.open() {
		for _, w := range c.workers {
			var kept record
			w.getJSON("/job/"+id, &kept)
			if kept.TaskID != id || !kept.Status.final() || kept.FinishedAt == nil {
				continue
			}
			c.mu.Lock()
			drowned := slices.ContainsFunc(c.blows, func(b chaosBlow) bool {
				return b.worker == "" && b.from.After(kept.FinishedAt.Add(-chaosDying)) && b.from.Before(kept.FinishedAt.Add(chaosDying))
			})
			c.mu.Unlock()
			if drowned {
				c.count("reports that went down with the broker", 1)
				c.ledger.ended(id, kept.Status)
				break
			}
		}
	}
}

// unfinished says what is still to come.
func (c *chaosRun) unfinished() string {
	for _, w := range c.workers {
		if h := w.health(); h.Jobs["running"]+h.Jobs["queued"] > 0 || h.Jobs == nil {
			return fmt.Sprintf("%s has %v", w.name, h.Jobs)
		}
	}
	c.ledger.mu.Lock()
	defer c.ledger.mu.Unlock()
	var open []string
	for _, t := range c.ledger.tasks {
		if t.job != nil && len(t.statuses) == 0 && (c.kind.durable || t.taken || len(c.ledger.read(t.id)) > 0) {
			open = append(open, t.id)
		}
	}
	if len(open) == 0 {
		return ""
	}
	return fmt.Sprintf("%d tasks are not reported, among them %q", len(open), open[:min(len(open), 5)])
}

// A chaosNote is what a task has noted.
type chaosNote struct {
	word, worker string
	attempt, pid int
	at           time.Time
}

// read gives a task's notes in their order.
func (l *chaosLedger) read(id string) (notes []chaosNote) {
	content, _ := os.ReadFile(filepath.Join(l.notes, id))
	for _, line := range strings.Split(string(content), "\n") {
		fields := strings.Fields(line)
		if len(fields) != 5 {
			continue
		}
		n := chaosNote{word: fields[0], worker: fields[1]}
		n.attempt, _ = strconv.Atoi(fields[2])
		n.pid, _ = strconv.Atoi(fields[3])
		nanos, _ := strconv.ParseInt(fields[4], 10, 64)
		n.at = time.Unix(0, nanos)
		notes = append(notes, n)
	}
	return notes
}

// account checks every task: run to completion once, never twice at once, and reported as what it was.
func (c *chaosRun) account() {
	files, err := os.ReadDir(c.ledger.notes)
	if err != nil {
		c.t.Fatal(err)
	}
	c.takeEvents()
	c.ledger.mu.Lock()
	defer c.ledger.mu.Unlock()
	for _, file := range files {
		c.ledger.task(file.Name())
	}
	complaints := 0
	for _, t := range c.ledger.tasks {
		notes := c.ledger.read(t.id)
		complaint := c.check(t, notes)
		if complaint == "" {
			continue
		}
		if complaints++; complaints <= 5 {
			c.t.Errorf("task %s: %s%s", t.id, complaint, c.story(t, notes))
		}
	}
	if complaints > 5 {
		c.t.Errorf("%d tasks in all are not as they should be", complaints)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	blows := 0
	for _, b := range c.blows {
		if b.excuses() {
			blows++
		}
	}
	if n := c.counts["completed again"]; n > blows {
		c.t.Errorf("%d tasks ran to their end again, with %d kills and stops", n, blows)
	}
}

// check says what is wrong with a task, "" if nothing.
func (c *chaosRun) check(t *chaosTask, notes []chaosNote) string {
	begun := 0
	var ends []chaosNote
	for _, n := range notes {
		switch n.word {
		case "begin":
			begun++
		case "end":
			ends = append(ends, n)
		case "overlap":
			return "it ran twice at once"
		case "crowd":
			return "more tasks of the job ran at once than its limit allows"
		}
	}
	c.count("runs", begun)
	if t.job == nil {
		c.count("creates without an answer that ran", min(begun, 1))
		return ""
	}
	if !c.kind.durable && len(t.statuses) == 0 && !t.taken && begun == 0 {
		c.count("lost before they were accepted", 1)
		return ""
	}
	c.count("tasks", 1)
	if len(t.statuses) == 0 {
		return "it was accepted and is not reported"
	}
	for _, status := range t.statuses {
		if !slices.Contains(t.job.ends, status) {
			return fmt.Sprintf("a task of job %s is reported as %q", t.job.event, t.statuses)
		}
	}
	once := 1
	switch t.job.event {
	case "flaky":
		once = 3 // the first two are the runs that fail
	case "slow", "endless":
		once = 0
	}
	if len(ends) < once {
		return fmt.Sprintf("it is reported, but has ended %d times of %d", len(ends), once)
	}
	// A kill that comes after a command's end and before its entry in the journal has it run again: nobody can know.
	// Where a broker holds the task that holds until the broker knows, too.
	for i := once; i < len(ends); i++ {
		c.count("completed again", 1)
		blow, struck := c.struckBetween(ends[i-1].worker, ends[i-1].at, lastBegin(notes, ends[i].at))
		if !struck {
			return "it ran to its end again, and nothing was killed in between"
		}
		c.t.Logf("task %s (%s) was completed again: it had ended at %s, then %s (%s)",
			t.id, t.job.event, ends[i-1].at.Format("15:04:05.000"), blow.what, blow.from.Sub(ends[i-1].at))
	}
	if t.job.event == "print" && begun == 1 && t.printed != chaosPrinted {
		// Output that is on its way to a broker dies with the worker.
		_, struck := c.struckBetween(ends[0].worker, notes[0].at, ends[0].at.Add(5*time.Second))
		if c.server == nil || !struck {
			return fmt.Sprintf("of its output of %d bytes %d arrived", chaosPrinted, t.printed)
		}
	}
	return ""
}

// lastBegin is when the run began that was under way at a time.
func lastBegin(notes []chaosNote, at time.Time) time.Time {
	var last time.Time
	for _, n := range notes {
		if n.word == "begin" && n.at.Before(at) {
			last = n.at
		}
	}
	return last
}

// struckBetween gives the first blow to the worker or the broker that fell between two moments, if there was one.
func (c *chaosRun) struckBetween(worker string, from, to time.Time) (first chaosBlow, struck bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, b := range c.blows {
		if b.excuses() && (b.worker == worker || b.worker == "") && b.to.Add(chaosDying).After(from) && b.from.Before(to) && (!struck || b.from.Before(first.from)) {
			first, struck = b, true
		}
	}
	return first, struck
}

// story is all that is known of a task, for a complaint.
func (c *chaosRun) story(t *chaosTask, notes []chaosNote) string {
	var lines []string
	event := "unknown"
	if t.job != nil {
		event = t.job.event
	}
	lines = append(lines, fmt.Sprintf("\n  job %s, created %s, reported %q", event, t.created.Format("15:04:05.000"), t.statuses))
	from, to := t.created.Add(-time.Second), t.created.Add(time.Second)
	for _, n := range notes {
		lines = append(lines, fmt.Sprintf("  %s %s on %s, attempt %d, pid %d", n.at.Format("15:04:05.000"), n.word, n.worker, n.attempt, n.pid))
		to = n.at.Add(3 * time.Second)
	}
	c.mu.Lock()
	for _, b := range c.blows {
		if b.to.After(from) && b.from.Before(to) {
			lines = append(lines, "  "+b.String()+" until "+b.to.Format("15:04:05.000"))
		}
	}
	c.mu.Unlock()
	for _, w := range c.workers {
		content, _ := os.ReadFile(w.logFile)
		for _, line := range strings.Split(string(content), "\n") {
			if strings.Contains(line, t.id) {
				lines = append(lines, "  "+w.name+": "+line)
			}
		}
	}
	return strings.Join(lines, "\n")
}
