//go:build unix

package main

// system_test.go drives the whole program from outside: real jobs, the command line and the REST API, as a user
// would.

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestShippedConfigGreets(t *testing.T) {
	a := &agent{t: t, dir: t.TempDir()}
	shipped, err := os.ReadFile("config.yaml")
	if err != nil {
		t.Fatal(err)
	}
	a.write("config.yaml", "listen: 127.0.0.1:"+freePort(t)+"\n"+string(shipped))
	a.start()
	config := filepath.Join(a.dir, "config.yaml")
	got := runCLI(t, nil, "", "create", "hello", "--data", `{"name":"Ada"}`, "--wait", "--config", config)
	if got.code != 0 || !strings.Contains(got.stdout, "Ada") {
		t.Fatalf("create hello --wait = %+v\n%s", got, a.log)
	}
	got = runCLI(t, nil, "", "status", "--config", config)
	if got.code != 0 || !strings.Contains(got.stdout, "hello") {
		t.Fatalf("status = %+v", got)
	}
	a.stop()
	if got := runCLI(t, nil, "", "status", "--config", config); got.code != 1 {
		t.Fatalf("status without a worker = %+v; want 1", got)
	}
}

func TestRunOnce(t *testing.T) {
	a := newAgent(t, `
jobs:
  - {event: greet, cmd: 'printf "<%s>" {{name}}'}
  - {event: fail, cmd: 'echo why >&2; exit 3'}
  - {event: slow, cmd: sleep 60, timeout: 200ms}
`)
	config := filepath.Join(a.dir, "config.yaml")
	for _, row := range []struct {
		args   []string
		code   int
		stdout string
	}{
		{[]string{"run", "greet", "--data", `{"name":"a'b c"}`}, 0, "<a'b c>"},
		{[]string{"run", "fail"}, 1, "why\n"},
		{[]string{"run", "slow"}, 124, ""},
		{[]string{"run", "nosuch"}, 2, ""},
		{[]string{"run"}, 2, ""},
		{[]string{"run", "greet", "--data", "[1]"}, 2, ""},
		{[]string{"run", "greet"}, 1, ""}, // the variable is missing
	} {
		got := runCLI(t, nil, "", append(row.args, "-c", config)...)
		if got.code != row.code || got.stdout != row.stdout {
			t.Errorf("%q = %+v; want code %d, stdout %q", row.args, got, row.code, row.stdout)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(a.dir, "*.json")); len(left) > 0 {
		t.Errorf("data files left behind: %q", left)
	}
}

// TestOutcomes runs commands that end in every way there is.
func TestOutcomes(t *testing.T) {
	a := newAgent(t, `
kill_after: 300ms
jobs:
  - {event: ok, cmd: 'cat {{task_id}}.json'}
  - {event: fail, cmd: 'echo out; echo broken >&2; exit 7'}
  - {event: signal, cmd: 'kill -9 $$'}
  - {event: slow, cmd: 'trap "" TERM; sleep 60 & wait; sleep 60', timeout: 200ms}
  - {event: long, cmd: 'echo begun; sleep 60'}
  - {event: missing, cmd: /no/such/program}
  - {event: variable, cmd: 'echo {{nothing.here}}'}
  - {event: flaky, cmd: 'echo attempt $JOB_ITEM_ATTEMPT; test $JOB_ITEM_ATTEMPT = 3', retry: {times: 3, pause: 10ms}}
  - {event: never, cmd: 'exit 65', retry: {times: 3, pause: 10ms}}
  - {event: hopeless, cmd: 'exit 1', retry: {times: 2, pause: 10ms}}
  - {event: grandchild, cmd: 'sleep 60 & echo $!'}
`).start()

	if id := a.create("ok", `{"a":1.50}`); a.wait(id, statusFinish).OutputBytes != 10 || a.output(id) != `{"a":1.50}` {
		t.Errorf("data file read as %q", a.output(id))
	}
	v := a.wait(a.create("fail", "{}"), statusError)
	if v.ExitCode == nil || *v.ExitCode != 7 || v.Error != "broken" {
		t.Errorf("failed task = %+v", v)
	}
	if v := a.wait(a.create("signal", "{}"), statusError); v.Signal != "SIGKILL" || v.ExitCode != nil {
		t.Errorf("killed task = %+v", v)
	}
	if v := a.wait(a.create("slow", "{}"), statusTimeout); !strings.Contains(v.Error, "200ms") {
		t.Errorf("timed out task = %+v", v)
	}
	long := a.create("long", "{}")
	waitFor(t, 10*time.Second, func() string {
		if got := a.output(long); got != "begun\n" {
			return fmt.Sprintf("output is %q", got)
		}
		return ""
	})
	pid := a.task(long).PID
	if code, answer := a.post("/job/"+long+"/terminate", ""); code != 202 {
		t.Errorf("terminate = %d %s", code, answer)
	}
	a.wait(long, statusTerminate)
	assertGone(t, pid)
	if code, _ := a.post("/job/"+long+"/terminate", ""); code != 409 {
		t.Errorf("terminate of an ended task = %d; want 409", code)
	}
	if v := a.wait(a.create("missing", "{}"), statusError); !strings.Contains(v.Error, "/no/such/program") {
		t.Errorf("unstartable task = %+v", v)
	}
	if v := a.wait(a.create("variable", "{}"), statusError); !strings.Contains(v.Error, "nothing.here") {
		t.Errorf("task with a missing variable = %+v", v)
	}
	flaky := a.create("flaky", "{}")
	if v := a.wait(flaky, statusFinish); v.Attempt != 3 {
		t.Errorf("retried task = %+v", v)
	}
	if got := a.output(flaky); strings.Count(got, "attempt 1\n") != 1 || strings.Count(got, "attempt 3\n") != 1 {
		t.Errorf("joined log = %q", got)
	}
	if v := a.wait(a.create("never", "{}"), statusError); v.Attempt != 1 {
		t.Errorf("task with bad data ran %d times", v.Attempt)
	}
	if v := a.wait(a.create("hopeless", "{}"), statusError); v.Attempt != 3 {
		t.Errorf("hopeless task ran %d times; want 3", v.Attempt)
	}
	grandchild := a.create("grandchild", "{}")
	a.wait(grandchild, statusFinish)
	pid, _ = strconv.Atoi(strings.TrimSpace(a.output(grandchild)))
	assertGone(t, pid)
	if left, _ := filepath.Glob(filepath.Join(a.dir, "*.json")); len(left) > 0 {
		t.Errorf("data files left behind: %q", left)
	}
}

func TestTerminateWhileWaiting(t *testing.T) {
	a := newAgent(t, `
concurrency: 1
jobs:
  - {event: long, cmd: sleep 60}
  - {event: fail, cmd: 'false', retry: {times: 1, pause: 10m}}
`).start()
	failing := a.create("fail", "{}")
	waitFor(t, 10*time.Second, func() string {
		if v := a.task(failing); v.Attempt != 1 || v.Status != statusQueued {
			return fmt.Sprintf("task is %+v", v)
		}
		return ""
	})
	first := a.create("long", "{}")
	a.wait(first, statusRunning)
	second := a.create("long", "{}")
	for _, id := range []string{failing, second, first} {
		if code, answer := a.post("/job/"+id+"/terminate", ""); code != 202 {
			t.Errorf("terminate = %d %s", code, answer)
		}
		a.wait(id, statusTerminate)
	}
}

// TestJobRemoved lets tasks wait for a job that the configuration no longer has.
func TestJobRemoved(t *testing.T) {
	a := newAgent(t, "drain_timeout: 100ms\njobs:\n  - {event: gone, cmd: sleep 60}\n").start()
	ids := []string{a.create("gone", "{}"), a.create("gone", "{}")}
	a.wait(ids[0], statusRunning)
	a.stop()
	path := filepath.Join(a.dir, "config.yaml")
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	a.write("config.yaml", strings.Replace(string(before), "gone, cmd: sleep 60", "other, cmd: 'true'", 1))
	a.start()
	if h := a.health(); h.Status != "degraded" || !strings.Contains(fmt.Sprint(h.Problems), `"gone"`) {
		t.Errorf("health is %+v", h)
	}
	if v := a.task(ids[0]); v.Status != statusQueued {
		t.Errorf("task of the removed job is %+v", v)
	}
	if code, answer := a.post("/job/"+ids[0]+"/terminate", ""); code != 202 {
		t.Errorf("terminate = %d %s", code, answer)
	}
	a.wait(ids[0], statusTerminate)
	a.wait(a.create("other", "{}"), statusFinish)
	a.stop()
	a.write("config.yaml", strings.Replace(string(before), "sleep 60", "'true'", 1))
	a.start()
	a.wait(ids[1], statusFinish)
}

func TestLimits(t *testing.T) {
	a := newAgent(t, `
concurrency: 3
jobs:
  - {event: one, limit: 1, cmd: 'sh count.sh one'}
  - {event: any, cmd: 'sh count.sh any'}
`)
	// Each task notes how many are in the folder while it runs.
	a.write("count.sh", `mkdir -p in-$1 in; : > in-$1/$$; : > in/$$; ls in-$1 | wc -l >> most-$1; ls in | wc -l >> most
sleep 0.1; rm in-$1/$$ in/$$`)
	a.start()
	var ids []string
	for range 8 {
		ids = append(ids, a.create("one", "{}"), a.create("any", "{}"))
	}
	for _, id := range ids {
		a.wait(id, statusFinish)
	}
	most := func(name string) int {
		content, err := os.ReadFile(filepath.Join(a.dir, name))
		if err != nil {
			t.Fatal(err)
		}
		highest := 0
		for _, field := range strings.Fields(string(content)) {
			n, _ := strconv.Atoi(field)
			highest = max(highest, n)
		}
		return highest
	}
	if most("most-one") != 1 || most("most") != 3 {
		t.Errorf("at once: %d of limit 1, %d of concurrency 3", most("most-one"), most("most"))
	}
}

func TestTakeWhenDiskIsShort(t *testing.T) {
	a := newAgent(t, `
take_when: {disk_free: 1000000GiB}
jobs:
  - {event: ok, cmd: 'true'}
`).start()
	waitFor(t, 5*time.Second, func() string {
		if h := a.health(); h.Status != "degraded" || !strings.Contains(fmt.Sprint(h.Problems), "disk_free") {
			return fmt.Sprintf("health is %+v", h)
		}
		return ""
	})
	id := a.create("ok", "{}")
	if v := a.task(id); v.Status != statusQueued {
		t.Errorf("task is %+v; want it to wait", v)
	}
	a.stop()
	config, _ := os.ReadFile(filepath.Join(a.dir, "config.yaml"))
	a.write("config.yaml", strings.Replace(string(config), "1000000GiB", "1KiB", 1))
	a.start()
	a.wait(id, statusFinish)
}

// TestGracefulStop checks both ends of a drain: what may end in time, and what is put back.
func TestGracefulStop(t *testing.T) {
	a := newAgent(t, `
drain_timeout: 1s
kill_after: 300ms
jobs:
  - {event: short, cmd: 'echo begun; sleep 0.5; echo ended > short.done'}
  - {event: long, cmd: 'echo begun; sleep 60'}
`).start()
	short, long := a.create("short", "{}"), a.create("long", "{}")
	for _, id := range []string{short, long} {
		waitFor(t, 10*time.Second, func() string { return strings.TrimPrefix("begun\n", a.output(id)) })
	}
	pid := a.task(long).PID
	a.cmd.Process.Signal(syscall.SIGTERM)
	waitFor(t, 5*time.Second, func() string {
		if status := a.health().Status; status != "draining" {
			return "health is " + status
		}
		return ""
	})
	late := a.create("short", "{}") // still taken
	a.waitGone(10 * time.Second)
	if _, err := os.Stat(filepath.Join(a.dir, "short.done")); err != nil {
		t.Error("the short task was not waited for")
	}
	assertGone(t, pid)
	a.start()
	if v := a.wait(long, statusRunning); v.Attempt != 2 {
		t.Errorf("task that was put back = %+v", v)
	}
	if v := a.task(short); v.Status != statusFinish || v.Attempt != 1 {
		t.Errorf("task that ended in time = %+v", v)
	}
	a.wait(late, statusFinish)

	began := time.Now()
	a.cmd.Process.Signal(syscall.SIGTERM)
	waitFor(t, 5*time.Second, func() string { return strings.TrimPrefix("draining", a.health().Status) })
	a.cmd.Process.Signal(syscall.SIGTERM)
	a.waitGone(10 * time.Second)
	t.Logf("ended %v after the first of two signals", time.Since(began).Round(time.Millisecond))
}

func TestMaxDeliveries(t *testing.T) {
	a := newAgent(t, `
max_deliveries: 2
jobs:
  - {event: poison, cmd: 'echo begun; sleep 60'}
`).start()
	id := a.create("poison", "{}")
	for attempt := 1; attempt <= 2; attempt++ {
		waitFor(t, 20*time.Second, func() string {
			if v := a.task(id); v.Status != statusRunning || v.Attempt != attempt {
				return fmt.Sprintf("task is %+v, want attempt %d\n%s", v, attempt, a.log)
			}
			return ""
		})
		pid := a.childPID()
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatalf("kill worker %d: %v", pid, err)
		}
		waitFor(t, 20*time.Second, func() string {
			if a.childPID() == pid {
				return "no new worker process\n" + a.log.String()
			}
			return ""
		})
	}
	if v := a.wait(id, statusError); !strings.Contains(v.Error, "given up after 2 starts") {
		t.Errorf("task that kills its workers = %+v", v)
	}
}

func init() {
	// once-at-a-time FOLDER ID: notes its start and end, and every overlap with another run of the same task.
	testRoles["once-at-a-time"] = func(args []string) int {
		folder, id := args[0], args[1]
		note := func(word string) {
			f, err := os.OpenFile(filepath.Join(folder, "runs"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
			if err != nil {
				os.Exit(98)
			}
			fmt.Fprintf(f, "%s %s %d\n", word, id, os.Getpid())
			f.Close()
		}
		lock, err := os.OpenFile(filepath.Join(folder, "lock-"+id), os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return 98
		}
		if syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) != nil {
			note("overlap")
			return 97
		}
		note("start")
		time.Sleep(time.Duration(rand.IntN(60)) * time.Millisecond) // the work
		note("end")
		return 0
	}
}

// TestKilledAtRandom kills worker, parent or both at random moments while tasks run, and counts afterwards.
func TestKilledAtRandom(t *testing.T) {
	t.Parallel() // beside those that wait
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	a := newAgent(t, `
concurrency: 8
drain_timeout: 100ms
kill_after: 500ms
max_deliveries: 1000
retain: {tasks: 5000}
jobs:
  - {event: work, cmd: '%SELF% test-role once-at-a-time runs.d {{task_id}}'}
`)
	if err := os.Mkdir(filepath.Join(a.dir, "runs.d"), 0o700); err != nil {
		t.Fatal(err)
	}
	a.start()
	tasks, rounds := 200, 12
	if testing.Short() {
		tasks, rounds = 60, 4
	}
	var ids []string
	for range tasks {
		ids = append(ids, a.create("work", "{}"))
	}
	ended := map[string]bool{} // by what the worker said
	runs := func() string {
		content, _ := os.ReadFile(filepath.Join(a.dir, "runs.d", "runs"))
		return string(content)
	}
	noteEnded := func() {
		var listed struct{ Jobs []taskView }
		a.getJSON("/jobs?status=finish&limit=1000", &listed)
		for _, v := range listed.Jobs {
			ended[v.TaskID] = true
		}
	}
	for range rounds {
		time.Sleep(time.Duration(random.IntN(400)) * time.Millisecond) // a random moment is what is wanted here
		noteEnded()
		before := len(runs())
		kinds := random.IntN(3)
		child := a.childPID()
		if kinds != 0 {
			a.cmd.Process.Kill()
			<-a.gone
		}
		if kinds != 1 {
			syscall.Kill(child, syscall.SIGKILL)
		}
		if kinds == 0 {
			waitFor(t, 20*time.Second, func() string {
				if pid := a.childPID(); pid == child {
					return "no new worker process\n" + a.log.String()
				}
				return ""
			})
		} else {
			a.start()
		}
		for _, line := range strings.Split(runs()[before:], "\n") {
			if fields := strings.Fields(line); len(fields) == 3 && fields[0] == "start" && ended[fields[1]] {
				t.Errorf("finished task %s was started again", fields[1])
			}
		}
	}
	for _, id := range ids {
		a.wait(id, statusFinish)
	}
	text := runs()
	if strings.Contains(text, "overlap") {
		t.Errorf("a task ran twice at once:\n%s", text)
	}
	again := 0
	for _, id := range ids {
		n := strings.Count(text, "end "+id+" ")
		if n == 0 {
			t.Errorf("task %s is said to have finished, but never did", id)
		}
		again += n - 1
	}
	t.Logf("%d tasks, %d rounds of kills, %d starts, %d completed again because the kill came before the journal",
		tasks, rounds, strings.Count(text, "start "), again)
}

func init() {
	// count-up BYTES prints numbered lines until it has printed so many bytes.
	testRoles["count-up"] = func(args []string) int {
		want, _ := strconv.Atoi(args[0])
		var line []byte
		chunk := make([]byte, 0, 1<<16)
		for n, printed := 0, 0; printed < want; n++ {
			line = append(strconv.AppendInt(line[:0], int64(n), 10), '\n')
			chunk = append(chunk, line...)
			printed += len(line)
			if len(chunk) > 1<<16-64 || printed >= want {
				os.Stdout.Write(chunk)
				chunk = chunk[:0]
			}
		}
		return 0
	}
}

func TestHugeOutput(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("memory is read from /proc")
	}
	const size = 200 << 20
	a := newAgent(t, `
retain: {log: 1MiB}
jobs:
  - {event: print, cmd: '%SELF% test-role count-up `+strconv.Itoa(size)+`', timeout: 5m}
`).start()
	id := a.create("print", "{}")
	var v taskView
	waitFor(t, 3*time.Minute, func() string {
		if v = a.task(id); v.Status != statusFinish {
			return fmt.Sprintf("task is %+v", v)
		}
		return ""
	})
	if v.OutputBytes < size || v.OutputBytes > size+16 {
		t.Errorf("output_bytes = %d; want %d", v.OutputBytes, size)
	}
	kept := a.output(id)
	if !strings.HasPrefix(kept, "0\n1\n2\n") || len(kept) > 1<<20+200 {
		t.Errorf("kept log of %d bytes begins with %.20q", len(kept), kept)
	}
	// Its last half is what was printed last, without a gap.
	lines := strings.Split(strings.TrimSuffix(kept, "\n"), "\n")
	last, err := strconv.Atoi(lines[len(lines)-1])
	if printed := countUpBytes(last + 1); err != nil || printed != v.OutputBytes {
		t.Errorf("the log ends with line %d, after %d bytes of %d: %v", last, printed, v.OutputBytes, err)
	}
	for i := len(lines) - 1; i > len(lines)-50_000; i-- {
		if lines[i] != strconv.Itoa(last-(len(lines)-1-i)) {
			t.Fatalf("line %q stands where %d belongs", lines[i], last-(len(lines)-1-i))
		}
	}
	peak := peakMemory(t, a.childPID())
	t.Logf("worker's peak memory: %d MiB", peak>>20)
	if !raceEnabled && peak > 40<<20 {
		t.Errorf("peak memory %d bytes; want at most 40 MiB", peak)
	}
}

// countUpBytes is how long the lines 0 to n-1 are.
func countUpBytes(n int) int64 {
	total := int64(0)
	for digits, from := 1, 0; from < n; digits++ {
		to := 10
		for range digits - 1 {
			to *= 10
		}
		total += int64(min(n, to)-from) * int64(digits+1)
		from = to
	}
	return total
}

// peakMemory is the most that a process ever held resident, in bytes.
func peakMemory(t testing.TB, pid int) int64 {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	match := regexp.MustCompile(`VmHWM:\s+(\d+) kB`).FindSubmatch(status)
	if match == nil {
		t.Fatalf("no VmHWM in %s", status)
	}
	kb, _ := strconv.ParseInt(string(match[1]), 10, 64)
	return kb << 10
}
