//go:build linux

package main

// chaos_test.go runs workers on a broker of choice while everything around them is killed, stopped and reconfigured at
// random, and accounts for every task afterwards. What the tasks do and how they are accounted for is in
// chaos_tasks_test.go. Processes are found in /proc, hence Linux only.

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const (
	chaosDrain     = time.Second
	chaosKillAfter = 300 * time.Millisecond

	// chaosStopLimit bounds a graceful stop: what the configuration grants, and the time to report and to write.
	chaosStopLimit = chaosDrain + chaosKillAfter + settleTimeout + 5*time.Second
)

// TestChaos is for anybody to run for as long as they like:
//
//	CHAOS_TIME=10m CHAOS_BROKER=nats-durable CHAOS_SEED=123 go test -count=1 -run 'TestChaos$' -timeout 0 -v .
//
// CHAOS_BROKER is local or a name in brokerKinds, CHAOS_WORKERS how many workers share the broker. Without variables it
// is short. CHAOS_KEEP is a folder for logs and notes. The same seed gives each victim the same sequence of attacks; when they come depends on the machine, too.
func TestChaos(t *testing.T) {
	duration, err := time.ParseDuration(os.Getenv("CHAOS_TIME"))
	if err == nil {
		name := os.Getenv("CHAOS_BROKER")
		if name == "" {
			name = "local"
		}
		t.Run(name, func(t *testing.T) { runChaos(t, name, duration, 3) })
		return
	}
	t.Run("local", func(t *testing.T) { runChaos(t, "local", 5*time.Second, 1) })
	t.Run("redis-durable", func(t *testing.T) { runChaos(t, "redis-durable", 6*time.Second, 2) })
}

// A chaosRun is one run: the workers, what was done to them, and the tasks.
type chaosRun struct {
	t        *testing.T
	kind     brokerKind
	duration time.Duration
	server   testServer // nil on the embedded queue, like the next two
	manager  Broker     // creates tasks beside the REST API, as a Job Manager does
	events   *collector
	workers  []*chaosWorker
	ledger   *chaosLedger

	mu     sync.Mutex // guards what follows
	blows  []chaosBlow
	counts map[string]int
}

// A chaosBlow is something that was done to a worker, or to the broker ("").
type chaosBlow struct {
	from, to     time.Time
	worker, what string
}

func (b chaosBlow) String() string {
	return fmt.Sprintf("%s %s %s", b.from.Format("15:04:05.000"), b.what, b.worker)
}

// excuses reports whether it may be why a task that had ended is run again.
func (b chaosBlow) excuses() bool {
	return b.what != "workers halted" && b.what != "exec children killed"
}

func runChaos(t *testing.T, broker string, duration time.Duration, workers int) {
	seed, err := strconv.ParseUint(os.Getenv("CHAOS_SEED"), 10, 64)
	if err != nil {
		seed = rand.Uint64N(1_000_000)
	}
	t.Logf("CHAOS_SEED=%d", seed)
	if n, err := strconv.Atoi(os.Getenv("CHAOS_WORKERS")); err == nil {
		workers = n
	}
	c := &chaosRun{t: t, duration: duration, counts: map[string]int{}}
	c.ledger = newChaosLedger(t.TempDir())
	if broker == "local" {
		c.kind, workers = brokerKind{name: broker, durable: true}, 1
	} else {
		i := slices.IndexFunc(brokerKinds, func(k brokerKind) bool { return k.name == broker })
		if i < 0 {
			t.Fatalf("there is no broker %q", broker)
		}
		c.kind = brokerKinds[i]
		c.server = c.kind.start(t)
		c.events = c.server.collect(t)
	}
	for i := range workers {
		c.workers = append(c.workers, c.newWorker(fmt.Sprintf("w%d", i+1)))
	}
	defer func() {
		if t.Failed() {
			c.dump()
		}
		if dir := os.Getenv("CHAOS_KEEP"); dir != "" {
			c.keep(dir)
		}
	}()
	for _, w := range c.workers {
		w.launch()
	}
	c.awaitHealthy()
	if c.server != nil {
		cfg, err := loadConfig(filepath.Join(c.workers[0].dir, "config.yaml"), os.LookupEnv)
		if err != nil {
			t.Fatal(err)
		}
		c.manager = openForTest(t, cfg.Broker, "p1", "manager")
	}

	began := time.Now()
	ctx, stop := context.WithTimeout(context.Background(), duration)
	defer stop()
	var attacks, watching sync.WaitGroup
	actor := uint64(0)
	start := func(wg *sync.WaitGroup, act func(context.Context, *rand.Rand), ctx context.Context) {
		actor++
		random := rand.New(rand.NewPCG(seed, actor)) // its own, so that its choices depend on nobody else
		wg.Add(1)
		go func() { // ends with ctx
			defer wg.Done()
			act(ctx, random)
		}()
	}
	for _, w := range c.workers {
		start(&attacks, w.suffer, ctx)
	}
	start(&attacks, c.createTasks, ctx)
	if c.server != nil {
		start(&attacks, c.restartBroker, ctx)
	}
	watched, endWatch := context.WithCancel(context.Background())
	start(&watching, c.watch, watched)
	defer func() { endWatch(); watching.Wait() }()
	attacks.Wait()
	if t.Failed() {
		return
	}
	for _, w := range c.workers {
		w.configure(w.config(nil), 0)
		if w.hasEnded() {
			w.launch()
		}
	}
	c.awaitHealthy()
	c.awaitQuiet()
	c.awaitSettled()
	endWatch()
	watching.Wait()
	strays := c.processes("JOB_ITEM_TASK_ID=")
	for _, w := range c.workers {
		w.terminate()
	}
	for _, left := range append(strays, c.processes("JOB_ITEM_BASE_URL=")...) {
		t.Errorf("left running: %s", left)
	}
	c.account()
	c.readLogs()
	t.Logf("%s: CHAOS_SEED=%d, %v, %s", broker, seed, time.Since(began).Round(time.Second), c.figures())
}

// figures tells in one line what was counted.
func (c *chaosRun) figures() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var list []string
	for _, name := range slices.Sorted(maps.Keys(c.counts)) {
		list = append(list, fmt.Sprintf("%d %s", c.counts[name], name))
	}
	return strings.Join(list, ", ")
}

func (c *chaosRun) count(what string, n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.counts[what] += n
}

// struck notes a blow that began at a time and is over now.
func (c *chaosRun) struck(from time.Time, worker, what string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.counts[what]++
	c.blows = append(c.blows, chaosBlow{from, time.Now(), worker, what})
}

// awaitHealthy waits until every worker works.
func (c *chaosRun) awaitHealthy() {
	c.t.Helper()
	for _, w := range c.workers {
		waitFor(c.t, time.Minute, func() string {
			if w.hasEnded() {
				w.launch() // the port may have been another's for a moment
			}
			if h := w.health(); h.Status != "ok" && h.Status != "degraded" {
				return fmt.Sprintf("health of %s is %+v\n%s", w.name, h, w.lastLines(30))
			}
			return ""
		})
	}
}

// awaitSettled waits until every worker is well and runs what its last configuration says.
func (c *chaosRun) awaitSettled() {
	c.t.Helper()
	for _, w := range c.workers {
		exec := fmt.Sprintf("CHAOS_GENERATION=%d", w.generation)
		waitFor(c.t, 20*time.Second, func() string {
			if h := w.health(); h.Status != "ok" {
				return fmt.Sprintf("health of %s is %+v\n%s", w.name, h, w.lastLines(30))
			}
			if got := w.execs(); len(got) != 1 || got[0] != exec {
				return fmt.Sprintf("execs of %s are %q; want %s\n%s", w.name, got, exec, w.lastLines(30))
			}
			return ""
		})
	}
}

// execs gives the generation of each background process of the worker.
func (w *chaosWorker) execs() (found []string) {
	eachProcess(func(p procStat) {
		environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", p.pid))
		generation := regexp.MustCompile(`CHAOS_GENERATION=\d+`).Find(environ)
		if err == nil && !p.dead() && generation != nil && holdsEntries(environ, []string{"JOB_ITEM_BASE_URL=" + w.url}) {
			found = append(found, string(generation))
		}
	})
	return found
}

// restartBroker kills the broker and starts it again, now and then.
func (c *chaosRun) restartBroker(ctx context.Context, random *rand.Rand) {
	often, away := 8*time.Second, 2*time.Second
	if c.server != nil && strings.HasPrefix(c.kind.name, "rabbitmq") {
		often, away = 25*time.Second, time.Second // it takes long to start
	}
	often = min(often, c.duration/2)
	for pauseFor(ctx, often/2+upTo(random, often)) {
		from := time.Now()
		c.server.stop(c.t)
		time.Sleep(upTo(random, away)) // the outage is what is wanted here
		c.server.start(c.t)
		c.struck(from, "", "broker restarts")
	}
}

// pauseFor is false when ctx has ended before.
func pauseFor(ctx context.Context, pause time.Duration) bool {
	select {
	case <-time.After(pause):
		return true
	case <-ctx.Done():
		return false
	}
}

// A chaosWorker is a worker with its own identity and folder.
type chaosWorker struct {
	*agent
	run        *chaosRun
	name       string
	port       string
	logFile    string // of all its processes
	generation int    // of its configuration
	wanted     bool   // it is meant to run
}

func (c *chaosRun) newWorker(name string) *chaosWorker {
	dir := c.t.TempDir()
	w := &chaosWorker{agent: &agent{t: c.t, dir: dir}, run: c, name: name, port: freePort(c.t), logFile: filepath.Join(dir, "log")}
	w.url = "http://127.0.0.1:" + w.port
	long := min(16, 3+int(c.duration/(5*time.Second))) // up to 8 s, so that some outlast a broker's restart
	w.env = []string{"CHAOS_NOTES=" + c.ledger.notes, "CHAOS_WORKER=" + name, fmt.Sprintf("CHAOS_LONG=%d", long)}
	if c.server == nil {
		w.env = append(w.env, "CHAOS_LOCK_FAMILY=1") // nobody else can run the task while the family lives
	}
	w.write("task.sh", chaosScript)
	w.write("config.yaml", w.config(nil))
	gone := make(chan struct{})
	close(gone)
	w.gone = gone
	return w
}

// config is a configuration of the worker, altered at random, or as it is in the end (nil).
func (w *chaosWorker) config(random *rand.Rand) string {
	w.generation++
	concurrency, limit, extra, exec := 4, 2, true, w.generation
	if random != nil {
		concurrency, limit, extra, exec = 2+random.IntN(5), 1+random.IntN(4), random.IntN(2) == 0, random.IntN(3)
	}
	text := fmt.Sprintf(`listen: 127.0.0.1:%s
identity_id: %s
credential: {project_id: p1}
concurrency: %d
drain_timeout: %v
kill_after: %v
max_deliveries: 1000 # its tasks are not to blame
retain: {tasks: 200000}
execs:
  - {key: beside, cmd: 'exec sleep 1000', attempt: 1000, env: {CHAOS_GENERATION: "%d"}}
`, w.port, w.name, concurrency, chaosDrain, chaosKillAfter, exec)
	if w.run.server != nil {
		text += "broker_connection: " + w.run.kind.connection(w.run.server) + "\n"
	}
	text += "jobs:\n"
	for _, job := range chaosJobs {
		if job.event == "extra" && !extra {
			continue
		}
		options := job.options
		if job.event == "some" {
			options += fmt.Sprintf(`, limit: %d, env: {GENERATION: "%d"}`, limit, w.generation)
		}
		text += fmt.Sprintf("  - {event: %s, cmd: 'sh task.sh %s {{seconds}}'%s}\n", job.event, job.event, options)
	}
	return text
}

// configure puts a configuration in place in one of the ways in which editors do it.
func (w *chaosWorker) configure(text string, way int) {
	name := "config.yaml"
	if way != 0 {
		w.write(name, text)
		return
	}
	w.write(name+".new", text)
	if err := os.Rename(filepath.Join(w.dir, name+".new"), filepath.Join(w.dir, name)); err != nil {
		w.t.Error(err)
	}
}

// launch starts the parent and waits for nothing.
func (w *chaosWorker) launch() {
	log, err := os.OpenFile(w.logFile, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		w.t.Error(err)
		return
	}
	defer log.Close()
	cmd := cliCommand(w.t, w.env, "--config", filepath.Join(w.dir, "config.yaml"))
	cmd.Stderr = log
	gone := make(chan struct{})
	if err := cmd.Start(); err != nil {
		w.t.Errorf("start %s: %v", w.name, err)
		return
	}
	w.cmd, w.gone, w.wanted = cmd, gone, true
	go func() { cmd.Wait(); close(gone) }() // ends with the parent
	w.t.Cleanup(func() {
		cmd.Process.Kill()
		<-gone
	})
}

func (w *chaosWorker) hasEnded() bool {
	select {
	case <-w.gone:
		return true
	default:
		return false
	}
}

// child finds the parent's child of that kind; 0 if there is none.
func (w *chaosWorker) child(command string) int {
	found := 0
	eachProcess(func(p procStat) {
		if p.parent != w.cmd.Process.Pid || p.dead() {
			return
		}
		line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.pid))
		if bytes.Contains(line, []byte("\x00"+command+"\x00")) {
			found = p.pid
		}
	})
	return found
}

// suffer is what is done to one worker.
func (w *chaosWorker) suffer(ctx context.Context, random *rand.Rand) {
	for pauseFor(ctx, 100*time.Millisecond+upTo(random, min(2500*time.Millisecond, w.run.duration/8))) {
		if w.hasEnded() { // like an init system
			if w.wanted && !strings.Contains(w.lastLines(5), "address already in use") {
				w.t.Errorf("%s has ended by itself:\n%s", w.name, w.lastLines(40))
			}
			w.relaunch()
		}
		// All that is random is drawn before anything depends on the machine.
		attack, pause, variant := random.IntN(20), upTo(random, 400*time.Millisecond), random.IntN(4)
		config := w.config(random)
		from := time.Now()
		switch {
		case attack < 4:
			if w.kill("child_process", syscall.SIGKILL) {
				w.run.struck(from, w.name, "workers killed")
			}
		case attack < 7:
			w.endParent(syscall.SIGKILL)
			time.Sleep(pause)
			w.relaunch()
			w.run.struck(from, w.name, "parents killed")
		case attack < 10:
			worker, execs := w.child("child_process"), w.child("child_execs_process")
			w.endParent(syscall.SIGKILL)
			for _, pid := range []int{worker, execs}[:1+variant%2] {
				if pid != 0 {
					syscall.Kill(pid, syscall.SIGKILL)
				}
			}
			time.Sleep(pause)
			w.relaunch()
			w.run.struck(from, w.name, "parents and workers killed")
		case attack < 11:
			if w.kill("child_execs_process", syscall.SIGKILL) {
				w.run.struck(from, w.name, "exec children killed")
			}
		case attack < 13:
			if pid := w.child("child_process"); pid != 0 {
				syscall.Kill(pid, syscall.SIGSTOP)
				time.Sleep(3 * pause)
				syscall.Kill(pid, syscall.SIGCONT)
				w.run.struck(from, w.name, "workers halted")
			}
		case attack < 15:
			what := "stops"
			w.cmd.Process.Signal(syscall.SIGTERM)
			if variant == 0 {
				what = "stops at once"
				time.Sleep(pause)
				w.cmd.Process.Signal(syscall.SIGTERM)
			}
			select {
			case <-w.gone:
			case <-time.After(chaosStopLimit):
				w.t.Errorf("%s did not stop within %v:\n%s", w.name, chaosStopLimit, w.lastLines(40))
				return
			}
			w.relaunch()
			w.run.struck(from, w.name, what)
		default:
			starting := w.child("child_process") == 0 // a bad configuration or a hang-up would be the end of it now
			if variant == 0 && !starting {
				config = strings.Replace(config, "concurrency: ", "concurrency: none of ", 1)
			}
			w.configure(config, variant%2)
			if variant > 1 && !starting {
				w.cmd.Process.Signal(syscall.SIGHUP)
			}
			w.run.count("reloads", 1)
		}
	}
}

// kill signals the parent's child of that kind, and reports whether there was one.
func (w *chaosWorker) kill(command string, signal syscall.Signal) bool {
	pid := w.child(command)
	return pid != 0 && syscall.Kill(pid, signal) == nil
}

// endParent sends a signal that ends the parent, and waits for that.
func (w *chaosWorker) endParent(signal syscall.Signal) {
	w.cmd.Process.Signal(signal)
	<-w.gone
}

// relaunch starts the parent again with a good configuration: a bad one would be refused, as it should be.
func (w *chaosWorker) relaunch() {
	w.configure(w.config(nil), 0)
	w.launch()
}

// terminate stops the worker for good.
func (w *chaosWorker) terminate() {
	w.wanted = false
	w.cmd.Process.Signal(syscall.SIGTERM)
	w.waitGone(chaosStopLimit)
}

// processes describes the living processes in whose environment is an entry that begins so, and one of our workers.
func (c *chaosRun) processes(entry string) (found []string) {
	eachProcess(func(p procStat) {
		environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", p.pid))
		if err != nil || p.dead() || !bytes.Contains(append([]byte{0}, environ...), []byte("\x00"+entry)) {
			return
		}
		for _, w := range c.workers {
			if holdsEntries(environ, []string{"JOB_ITEM_BASE_URL=" + w.url}) {
				found = append(found, fmt.Sprintf("%d (%s) of %s: %s", p.pid, p.name, w.name,
					regexp.MustCompile(`JOB_ITEM_TASK_ID=[^\x00]*`).Find(environ)))
			}
		}
	})
	return found
}

func (w *chaosWorker) lastLines(n int) string {
	content, _ := os.ReadFile(w.logFile)
	lines := strings.SplitAfter(string(content), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "")
}

// readLogs counts connections and looks for what must never be in a log.
func (c *chaosRun) readLogs() {
	problems := map[string]int{}
	for _, w := range c.workers {
		content, err := os.ReadFile(w.logFile)
		if err != nil {
			c.t.Error(err)
			continue
		}
		for _, line := range strings.Split(string(content), "\n") {
			switch {
			case strings.Contains(line, `msg="broker connected"`):
				c.count("connections", 1)
			case strings.Contains(line, "level=ERROR"):
				problems[regexp.MustCompile(`msg=("[^"]*"|\S+)`).FindString(line)]++
			case strings.HasPrefix(line, "panic:"), strings.HasPrefix(line, "fatal error:"), strings.Contains(line, "DATA RACE"):
				c.t.Errorf("log of %s: %s", w.name, line)
			}
		}
	}
	for _, line := range slices.Sorted(maps.Keys(problems)) {
		c.t.Logf("%6d times %s", problems[line], line)
	}
}

// dump has every process that is still there write into its log what its goroutines do.
func (c *chaosRun) dump() {
	dumped := 0
	eachProcess(func(p procStat) {
		line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.pid))
		for _, w := range c.workers {
			if bytes.Contains(line, []byte("\x00"+filepath.Join(w.dir, "config.yaml")+"\x00")) {
				syscall.Kill(p.pid, syscall.SIGCONT)
				syscall.Kill(p.pid, syscall.SIGQUIT)
				dumped++
			}
		}
	})
	if dumped > 0 {
		time.Sleep(time.Second) // nobody says when they have written
	}
}

// keep copies logs and notes to a folder that outlives the test.
func (c *chaosRun) keep(dir string) {
	for _, w := range c.workers {
		content, _ := os.ReadFile(w.logFile)
		if err := os.WriteFile(filepath.Join(dir, w.name+".log"), content, 0o600); err != nil {
			c.t.Error(err)
		}
	}
	if err := os.CopyFS(filepath.Join(dir, "notes"), os.DirFS(c.ledger.notes)); err != nil {
		c.t.Error(err)
	}
}

// upTo is a random duration below d.
func upTo(random *rand.Rand, d time.Duration) time.Duration {
	return time.Duration(random.Int64N(int64(d)))
}
