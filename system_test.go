//go:build unix

package main

// system_test.go drives the whole program from outside: real parents and children, real jobs, the command line and the
// REST API, as a user would.

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// An agent is job_item running in a folder of its own.
type agent struct {
	t   testing.TB
	dir string
	env []string
	cmd *exec.Cmd

	program string              // other than the test binary itself; "" for that
	user    *syscall.Credential // other than the one that runs the tests; nil for that

	url  string
	log  *lockedBuffer
	gone chan struct{} // closed when the parent has ended
}

// A lockedBuffer is a log that is read while it is written.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// newAgent writes a configuration into a new folder. %SELF% in it is the test binary, which plays the jobs.
func newAgent(t testing.TB, config string) *agent {
	t.Helper()
	dir := t.TempDir()
	a := &agent{t: t, dir: dir}
	a.write("config.yaml", "listen: 127.0.0.1:"+freePort(t)+"\n"+config)
	return a
}

func (a *agent) write(name, content string) {
	a.t.Helper()
	self, err := os.Executable()
	if err != nil {
		a.t.Fatal(err)
	}
	content = strings.ReplaceAll(content, "%SELF%", self)
	if err := os.WriteFile(filepath.Join(a.dir, name), []byte(content), 0o600); err != nil {
		a.t.Fatal(err)
	}
}

// start starts the parent and waits until it is healthy.
func (a *agent) start() *agent {
	a.t.Helper()
	a.launch()
	waitFor(a.t, 20*time.Second, func() string {
		select {
		case <-a.gone:
			a.t.Fatalf("job_item ended early:\n%s", a.log)
		default:
		}
		if status := a.health().Status; status != "ok" && status != "degraded" {
			return "health is " + status + "\n" + a.log.String()
		}
		return ""
	})
	return a
}

// launch starts the parent and waits for nothing.
func (a *agent) launch() {
	a.t.Helper()
	content, err := os.ReadFile(filepath.Join(a.dir, "config.yaml"))
	if err != nil {
		a.t.Fatal(err)
	}
	a.url = "http://" + regexp.MustCompile(`listen: (\S+)`).FindStringSubmatch(string(content))[1]
	a.log = &lockedBuffer{}
	a.cmd = cliCommand(a.t, a.env, "--config", filepath.Join(a.dir, "config.yaml"))
	a.cmd.Stderr = a.log
	if a.program != "" {
		a.cmd.Path = a.program
	}
	a.cmd.SysProcAttr = &syscall.SysProcAttr{Credential: a.user}
	if err := a.cmd.Start(); err != nil {
		a.t.Fatal(err)
	}
	gone := make(chan struct{})
	a.gone = gone
	cmd := a.cmd
	go func() { cmd.Wait(); close(gone) }() // ends with the parent
	log := a.log
	a.t.Cleanup(func() {
		cmd.Process.Kill()
		<-gone
		if a.t.Failed() {
			a.t.Logf("the log of process %d:\n%s", cmd.Process.Pid, complaints(log.String()))
		}
	})
}

// complaints are the lines of a log that tell of something unusual, and its last ones.
func complaints(log string) string {
	lines := strings.SplitAfter(log, "\n")
	var kept []string
	for i, line := range lines {
		if !strings.Contains(line, `msg="task `) && !strings.Contains(line, "level=DEBUG") || i > len(lines)-20 {
			kept = append(kept, line)
		}
	}
	return strings.Join(kept[max(0, len(kept)-200):], "")
}

// stop asks the parent to end and waits for it.
func (a *agent) stop() {
	a.t.Helper()
	a.cmd.Process.Signal(syscall.SIGTERM)
	a.waitGone(30 * time.Second)
}

func (a *agent) waitGone(limit time.Duration) {
	a.t.Helper()
	select {
	case <-a.gone:
	case <-time.After(limit):
		a.t.Fatalf("job_item did not end within %v:\n%s", limit, a.log)
	}
}

// childPID finds the worker process in the log, which has it soon after the health is ok.
func (a *agent) childPID() int {
	a.t.Helper()
	waitFor(a.t, 20*time.Second, func() string { return unless(strings.Contains(a.log.String(), "msg=ready "), "no worker is ready") })
	lines := regexp.MustCompile(`msg=ready .*\bpid=(\d+)`).FindAllStringSubmatch(a.log.String(), -1)
	if len(lines) == 0 {
		return 0
	}
	pid, _ := strconv.Atoi(lines[len(lines)-1][1])
	return pid
}

type healthView struct {
	Status     string   `json:"status"`
	Problems   []string `json:"problems"`
	IdentityID string   `json:"identity_id"`
	Jobs       map[string]int
	Execs      []execHealth `json:"execs"`
}

func (a *agent) health() healthView {
	var h healthView
	a.getJSON("/health", &h)
	return h
}

// awaitHealth waits for a status with a problem that says so.
func (a *agent) awaitHealth(status, problem string) healthView {
	a.t.Helper()
	var h healthView
	waitFor(a.t, 20*time.Second, func() string {
		h = a.health()
		if h.Status != status || !strings.Contains(fmt.Sprint(h.Problems), problem) {
			return fmt.Sprintf("health is %+v; want %s with %q\n%s", h, status, problem, a.log)
		}
		return ""
	})
	return h
}

// getJSON reads an answer, whatever its status; v stays as it is when the worker is away.
func (a *agent) getJSON(path string, v any) int {
	resp, err := http.Get(a.url + path)
	if err != nil {
		return 0
	}
	defer resp.Body.Close()
	json.NewDecoder(resp.Body).Decode(v)
	return resp.StatusCode
}

// post sends JSON and gives the answer.
func (a *agent) post(path, body string) (int, string) {
	a.t.Helper()
	resp, err := http.Post(a.url+path, "application/json", strings.NewReader(body))
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	answer, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, string(answer)
}

// create creates a task and gives its id.
func (a *agent) create(event, data string) string {
	a.t.Helper()
	code, answer := a.post("/job/create", fmt.Sprintf(`{"event":%q,"form_body":%s}`, event, data))
	var created struct {
		TaskID string `json:"task_id"`
	}
	if err := json.Unmarshal([]byte(answer), &created); err != nil || code != 200 || created.TaskID == "" {
		a.t.Fatalf("create %s = %d %s\n%s", event, code, answer, a.log)
	}
	return created.TaskID
}

type taskView struct {
	TaskID        string     `json:"task_id"`
	Status        taskStatus `json:"status"`
	Attempt       int        `json:"attempt"`
	ExitCode      *int       `json:"exit_code"`
	Signal        string     `json:"signal"`
	PID           int        `json:"pid"`
	Error         string     `json:"error"`
	OutputBytes   int64      `json:"output_bytes"`
	Notifications []struct {
		Msg string `json:"msg"`
	} `json:"notifications"`
	Result json.RawMessage `json:"result"`
	Files  []struct {
		Name string `json:"name"`
		Size int64  `json:"size"`
	} `json:"files"`
}

func (a *agent) task(id string) taskView {
	var v taskView
	a.getJSON("/job/"+id, &v)
	return v
}

// wait waits until a task is in a status.
func (a *agent) wait(id string, status taskStatus) taskView {
	a.t.Helper()
	var v taskView
	waitFor(a.t, 30*time.Second, func() string {
		if v = a.task(id); v.Status != status {
			return fmt.Sprintf("task %s is %q (%s), want %q\n%s", id, v.Status, v.Error, status, a.log)
		}
		return ""
	})
	return v
}

func (a *agent) output(id string) string {
	a.t.Helper()
	resp, err := http.Get(a.url + "/job/" + id + "/log")
	if err != nil {
		a.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(resp.Body)
	return string(text)
}

func freePort(t testing.TB) string {
	t.Helper()
	listener, err := listen("127.0.0.1:0", bindPatience)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return strings.TrimPrefix(listener.Addr().String(), "127.0.0.1:")
}

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

// TestScriptsOfTheSystem runs job scripts in three languages that use the environment as such scripts always have.
func TestScriptsOfTheSystem(t *testing.T) {
	for _, script := range []struct{ program, name, text string }{
		{"sh", "job.sh", scriptSh}, {"python3", "job.py", scriptPython}, {"node", "job.js", scriptNode},
	} {
		t.Run(script.program, func(t *testing.T) {
			needProgram(t, script.program)
			a := newAgent(t, `
credential: {project_id: p1, secret_key: top-secret}
jobs:
  - {event: script, cmd: '`+script.program+` `+script.name+` %SELF%'}
`)
			a.write(script.name, script.text)
			a.env = []string{"JOB_ITEM_TEST_MAIN=1"}
			a.start()
			id := a.create("script", `{"answer":42}`)
			v := a.wait(id, statusFinish)
			if len(v.Notifications) != 1 || v.Notifications[0].Msg != "working on 42" {
				t.Errorf("notifications = %+v", v.Notifications)
			}
			var result struct{ Doubled int }
			if err := json.Unmarshal(v.Result, &result); err != nil || result.Doubled != 84 {
				t.Errorf("result = %s, %v", v.Result, err)
			}
			if len(v.Files) != 1 || v.Files[0].Name != "report.txt" || v.Files[0].Size != 6 {
				t.Errorf("files = %+v", v.Files)
			}
			if got := a.output(id); !strings.Contains(got, "read 42\n") {
				t.Errorf("log = %q", got)
			}
			resp, err := http.Get(a.url + "/job/" + id + "/files/report.txt")
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			if content, _ := io.ReadAll(resp.Body); string(content) != "answer" {
				t.Errorf("file = %q", content)
			}
			if strings.Contains(a.log.String(), "top-secret") {
				t.Error("the log shows the secret key")
			}
		})
	}
}

func needProgram(t testing.TB, program string) {
	t.Helper()
	if _, err := exec.LookPath(program); err == nil {
		return
	}
	if os.Getenv("JOB_ITEM_TEST_COMPLETE") != "" {
		t.Fatalf("%s is missing; install it (test.sh does)", program)
	}
	t.Skipf("%s is missing; ./test.sh installs it", program)
}

const scriptSh = `set -e
answer=$(sed 's/.*"answer":\([0-9]*\).*/\1/' "$JOB_ITEM_TASK_ID.json")
echo "read $answer"
printf 'working on %s' "$answer" | "$1" save >/dev/null
printf answer > report.txt
"$1" upload report.txt
"$1" result "{\"doubled\":$((answer * 2))}"
`

const scriptPython = `import json, os, urllib.request
env = os.environ
task = json.load(open(env["JOB_ITEM_TASK_ID"] + ".json"))
print("read", task["answer"])
def post(url, body, **headers):
    urllib.request.urlopen(urllib.request.Request(url, data=body, headers=headers)).read()
auth = "Bearer " + env["JOB_ITEM_PROJECT_KEY"]
post(env["JOB_ITEM_MSG_NOTIF_HOST"], json.dumps({"msg": "working on %d" % task["answer"]}).encode(),
     **{"Content-Type": "application/json"})
body = (b'--b\r\nContent-Disposition: form-data; name="file"; filename="report.txt"\r\n'
        b'Content-Type: text/plain\r\n\r\nanswer\r\n--b--\r\n')
post(env["JOB_MANAGER_UPLOAD_FILE"], body, **{"Content-Type": "multipart/form-data; boundary=b", "Authorization": auth})
post(env["JOB_MANAGER_RESULT_URL"], json.dumps({"doubled": 2 * task["answer"]}).encode(),
     **{"Content-Type": "application/json", "Authorization": auth})
`

const scriptNode = `const fs = require('fs')
const env = process.env
const task = JSON.parse(fs.readFileSync(env.JOB_ITEM_TASK_ID + '.json', 'utf8'))
console.log('read', task.answer)
const auth = { Authorization: 'Bearer ' + env.JOB_ITEM_PROJECT_KEY }
const post = async (url, body, headers) => {
  const answer = await fetch(url, { method: 'POST', body, headers })
  if (!answer.ok) throw new Error(url + ': ' + answer.status + ' ' + await answer.text())
}
const main = async () => {
  await post(env.JOB_ITEM_MSG_NOTIF_HOST, JSON.stringify({ msg: 'working on ' + task.answer }),
    { 'Content-Type': 'application/json' })
  const form = new FormData()
  form.append('file', new Blob(['answer']), 'report.txt')
  await post(env.JOB_MANAGER_UPLOAD_FILE, form, auth)
  await post(env.JOB_MANAGER_RESULT_URL, JSON.stringify({ doubled: 2 * task.answer }),
    { 'Content-Type': 'application/json', ...auth })
}
main().catch(err => { console.error(err); process.exit(1) })
`

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
