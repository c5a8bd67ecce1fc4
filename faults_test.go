//go:build linux

package main

// faults_test.go takes things away from a running worker that a host may run out of, and gives them back: descriptors,
// processes, the right time, and room for clients. Each time the worker says what is wrong, loses nothing, and goes on by
// itself afterwards.

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"
)

// quote shows what a user sees, to whoever runs the tests with -v.
func (a *agent) quote(what string) {
	h := a.health()
	a.t.Logf("%s: /health says %s %q", what, h.Status, h.Problems)
}

// limit changes a soft limit of a running process of this user.
func limit(pid, resource int, soft uint64) error {
	var both syscall.Rlimit
	prlimit := func(set, get *syscall.Rlimit) error {
		if _, _, errno := syscall.RawSyscall6(syscall.SYS_PRLIMIT64, uintptr(pid), uintptr(resource),
			uintptr(unsafe.Pointer(set)), uintptr(unsafe.Pointer(get)), 0, 0); errno != 0 {
			return fmt.Errorf("limit %d of process %d: %w", resource, pid, errno)
		}
		return nil
	}
	err := prlimit(nil, &both)
	both.Cur = min(soft, both.Max)
	return errors.Join(err, prlimit(&both, nil))
}

func init() {
	// limit RESOURCE SOFT PID… changes a soft limit of processes.
	testRoles["limit"] = func(args []string) int {
		var err error
		resource, _ := strconv.Atoi(args[0])
		soft, _ := strconv.ParseUint(args[1], 10, 64)
		for _, arg := range args[2:] {
			pid, _ := strconv.Atoi(arg)
			err = errors.Join(err, limit(pid, resource, soft))
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return 0
	}
}

// limit changes a soft limit of the agent's processes; pids that are 0 are left out.
func (a *agent) limit(resource int, soft uint64, pids ...int) {
	a.t.Helper()
	args := []string{"test-role", "limit", strconv.Itoa(resource), strconv.FormatUint(soft, 10)}
	for _, pid := range pids {
		if pid != 0 {
			args = append(args, strconv.Itoa(pid))
		}
	}
	cmd := exec.Command(a.cmd.Path, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: a.user} // only a user's own processes, where root may not do all
	if out, err := cmd.CombinedOutput(); err != nil {
		a.t.Fatalf("%v: %s", err, out)
	}
}

// openFiles is how many descriptors a process has.
func openFiles(t testing.TB, pid int) uint64 {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return uint64(len(entries))
}

// TestNoDescriptors takes the descriptors away from a worker with a running task and waiting ones.
func TestNoDescriptors(t *testing.T) {
	t.Parallel() // it mostly waits
	a := newAgent(t, `
concurrency: 2
jobs:
  - {event: long, cmd: 'until test -e go; do sleep 0.05; done; echo ended'}
  - {event: quick, cmd: 'echo $JOB_ITEM_TASK_ID >> quick.runs'}
`).start()
	long := a.create("long", "{}")
	a.wait(long, statusRunning)
	quick := a.create("quick", "{}")
	a.wait(quick, statusFinish)
	pid := a.childPID()
	// What is there may be used on, one connection more is accepted, and then there is none left for a command's pipes. A
	// descriptor that was counted and is closed afterwards is taken away as well.
	files := openFiles(t, pid) + 1
	a.limit(syscall.RLIMIT_NOFILE, files, pid)
	var ids []string
	for range 5 {
		ids = append(ids, a.create("quick", "{}"))
	}
	lowered := time.Now()
	waitFor(t, 20*time.Second, func() string {
		h := a.health()
		if h.Status == "degraded" && strings.Contains(strings.Join(h.Problems, " "), "too many open files") {
			return ""
		}
		if time.Since(lowered) > time.Second && h.Jobs["queued"] == 0 {
			files--
			a.limit(syscall.RLIMIT_NOFILE, files, pid)
			ids = append(ids, a.create("quick", "{}"))
			lowered = time.Now()
		}
		return fmt.Sprintf("with %d descriptors health is %+v", files, h)
	})
	a.quote("out of descriptors")
	a.write("go", "")
	a.wait(long, statusFinish)
	a.limit(syscall.RLIMIT_NOFILE, 3, pid) // now no connection is accepted either
	http.DefaultClient.CloseIdleConnections()
	client := http.Client{Timeout: 300 * time.Millisecond, Transport: &http.Transport{DisableKeepAlives: true}}
	if resp, err := client.Get(a.url + "/health"); err == nil {
		resp.Body.Close()
		t.Log("a connection was still accepted")
	} else {
		t.Logf("no descriptor at all: /health: %v", err)
	}
	a.limit(syscall.RLIMIT_NOFILE, 1000, pid)
	a.awaitHealth("ok", "")
	for _, id := range ids {
		if v := a.wait(id, statusFinish); v.Attempt != 1 {
			t.Errorf("task = %+v", v)
		}
	}
	if a.childPID() != pid {
		t.Error("the worker was replaced")
	}
	if testing.Verbose() {
		t.Logf("\n%s", a.log)
	}
}

// freeUser is a user id that no process of this host has.
const freeUser = 61_234

// asFreeUser lets an agent run as a user of its own, whom limits on processes apply to, unlike root.
func (a *agent) asFreeUser() {
	a.t.Helper()
	if os.Getuid() != 0 {
		a.t.Skip("only root can run a worker as a user of its own")
	}
	self, err := os.Executable()
	if err != nil {
		a.t.Fatal(err)
	}
	// A folder of go test's is closed to others.
	binary, err := os.ReadFile(self)
	if err == nil {
		a.program = filepath.Join(a.dir, "job_item.test")
		err = os.WriteFile(a.program, binary, 0o755)
	}
	err = errors.Join(err, os.Chmod(filepath.Dir(a.dir), 0o755))
	for _, path := range []string{a.dir, filepath.Join(a.dir, "config.yaml")} {
		err = errors.Join(err, os.Chown(path, freeUser, freeUser))
	}
	if err != nil {
		a.t.Fatal(err)
	}
	a.user = &syscall.Credential{Uid: freeUser, Gid: freeUser}
}

const rlimitProcesses = 6 // RLIMIT_NPROC, which package syscall does not have

// threadsOf counts the threads of a user, which is what the limit on processes counts.
func threadsOf(t testing.TB, uid int) (threads uint64) {
	t.Helper()
	tasks, err := filepath.Glob("/proc/[0-9]*/task/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		if info, err := os.Stat(task); err == nil && int(info.Sys().(*syscall.Stat_t).Uid) == uid {
			threads++
		}
	}
	return threads
}

// TestNoProcesses leaves a worker and its parent no process more, and then only few. A start fails, the task waits, and
// nobody dies of it: Go ends a process that cannot make a thread, with all its tasks.
func TestNoProcesses(t *testing.T) {
	t.Parallel() // it mostly waits
	a := newAgent(t, `
concurrency: 4
jobs:
  - {event: long, cmd: 'until test -e go; do sleep 0.05; done; echo ended'}
  - {event: quick, cmd: 'echo $JOB_ITEM_TASK_ID >> quick.runs'}
`)
	a.asFreeUser()
	a.start()
	a.wait(a.create("quick", "{}"), statusFinish)
	parent, worker := a.cmd.Process.Pid, a.childPID()
	a.limit(rlimitProcesses, threadsOf(t, freeUser), parent, worker)
	var ids []string
	for range 40 {
		ids = append(ids, a.create("quick", "{}"))
	}
	a.awaitHealth("degraded", "resource temporarily unavailable")
	a.quote("no process more")
	a.limit(rlimitProcesses, threadsOf(t, freeUser)+2, parent, worker)
	for _, id := range ids[:20] {
		a.wait(id, statusFinish)
	}
	a.limit(rlimitProcesses, 10_000, parent, worker)
	for _, id := range ids {
		if v := a.wait(id, statusFinish); v.Attempt != 1 {
			t.Errorf("task = %+v", v)
		}
	}
	a.awaitHealth("ok", "")
	if a.childPID() != worker {
		t.Errorf("the worker has died:\n%s", a.log)
	}
	if testing.Verbose() {
		t.Logf("\n%s", a.log)
	}
}

func TestClockJumps(t *testing.T) {
	farFuture, farPast := time.Now().AddDate(200, 0, 0), time.Unix(-1e9, 0)
	for _, row := range []struct {
		due  time.Time
		want time.Duration
	}{{time.Time{}, 0}, {farPast, 0}, {farFuture, maxRetryPause}} {
		if got := pauseUntil(row.due); got != row.want {
			t.Errorf("pauseUntil(%v) = %v; want %v", row.due, got, row.want)
		}
	}
	if got := pauseUntil(laterOf(farPast, time.Minute)); got < 50*time.Second || got > time.Minute {
		t.Errorf("a pause of a minute lasts %v", got)
	}

	// A journal written under other clocks is taken up whole.
	dir := t.TempDir()
	j, _, err := openJournal(dir)
	if err != nil {
		t.Fatal(err)
	}
	for i, at := range []time.Time{farPast, farFuture} {
		task := journalTask{ID: fmt.Sprint("task-", i), Event: "job", CreatedAt: at, Due: at, Failures: 1}
		if err := j.accept(task, []byte("{}")); err != nil {
			t.Fatal(err)
		}
		outcome := taskFinished{TaskID: fmt.Sprint("ended-", i), Event: "job", Status: statusFinish,
			CreatedAt: farFuture, StartedAt: farFuture, FinishedAt: at}
		if err := j.accept(journalTask{ID: outcome.TaskID, Event: "job", CreatedAt: at}, []byte("{}")); err != nil {
			t.Fatal(err)
		}
		if err := j.finished(outcome); err != nil {
			t.Fatal(err)
		}
	}
	if err := j.close(); err != nil {
		t.Fatal(err)
	}
	j, found, err := openJournal(dir)
	if err != nil || len(found) != 4 {
		t.Fatalf("%d tasks, %v", len(found), err)
	}
	defer j.close()

	// Records that finished "later" than now count from now, so that they are forgotten in their time; one from the far
	// past is forgotten at once. A task never lasts less than nothing.
	dir = t.TempDir()
	r, err := openRecords(dir, Retain{Tasks: 100, Log: 1000})
	if err == nil {
		err = r.takeOver()
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range found {
		if task.Outcome != nil {
			r.handle(*task.Outcome)
		}
	}
	for _, rec := range r.list(recordFilter{}) {
		if rec.DurationMS < 0 {
			t.Errorf("%s lasted %d ms", rec.TaskID, rec.DurationMS)
		}
	}
	if err := r.close(); err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		age  time.Duration
		want int
	}{{time.Hour, 1}, {time.Nanosecond, 0}} {
		r, err := openRecords(dir, Retain{Tasks: 100, Log: 1000, Age: row.age})
		if err == nil {
			err = r.takeOver()
		}
		if err != nil {
			t.Fatal(err)
		}
		if got := r.list(recordFilter{}); len(got) != row.want {
			t.Errorf("%d records are kept for %v; want %d", len(got), row.age, row.want)
		}
		r.close()
	}
}

// times is a sample of how long something took.
type times []time.Duration

func (d times) String() string {
	slices.Sort(d)
	return fmt.Sprintf("median %v, p99 %v, longest %v", d[len(d)/2].Round(time.Microsecond),
		d[len(d)*99/100].Round(time.Microsecond), d[len(d)-1].Round(time.Microsecond))
}

// timed asks for something a few times.
func (a *agent) timed(path string, n int) (took times) {
	for range n {
		began := time.Now()
		a.getJSON(path, &struct{}{})
		took = append(took, time.Since(began))
	}
	return took
}

// memoryOf is what a process holds in memory, shared pages counted in part, in MiB.
func memoryOf(t testing.TB, pid int) float64 {
	t.Helper()
	rollup, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(rollup), "Pss:")
	kb, _ := strconv.ParseFloat(strings.Fields(rest)[0], 64)
	return kb / 1024
}

// TestFlood lets very many tasks wait, through a crash, and then run. JOB_ITEM_TEST_FLOOD=100000 makes it a real flood,
// of about three minutes; -v shows the figures.
func TestFlood(t *testing.T) {
	t.Parallel() // it mostly waits
	tasks := 200
	if n, err := strconv.Atoi(os.Getenv("JOB_ITEM_TEST_FLOOD")); err == nil {
		tasks = n
	}
	a := newAgent(t, `
concurrency: 4
take_when: {disk_free: 1000000GiB}
jobs:
  - {event: quick, cmd: 'true'}
`).start()
	a.awaitHealth("degraded", "take_when.disk_free")
	t.Logf("idle: parent %.1f MiB, worker %.1f MiB", memoryOf(t, a.cmd.Process.Pid), memoryOf(t, a.childPID()))

	began := time.Now()
	var took times
	var mu sync.Mutex
	var clients sync.WaitGroup
	client := http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 16}}
	defer client.CloseIdleConnections()
	for c := range 16 {
		clients.Add(1)
		go func() {
			defer clients.Done()
			for i := c; i < tasks; i += 16 {
				began := time.Now()
				resp, err := client.Post(a.url+"/job/create", "application/json",
					strings.NewReader(`{"event":"quick","form_body":{"number":`+strconv.Itoa(i)+`,"text":"some data of a task"}}`))
				if err != nil || resp.StatusCode != 200 {
					t.Errorf("create = %v, %v", resp, err)
					return
				}
				io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
				mu.Lock()
				took = append(took, time.Since(began))
				mu.Unlock()
			}
		}()
	}
	clients.Wait()
	t.Logf("%d tasks created in %v: %v", tasks, time.Since(began).Round(time.Millisecond), took)
	figures := func(when string) {
		t.Helper()
		t.Logf("%s: parent %.1f MiB, worker %.1f MiB", when, memoryOf(t, a.cmd.Process.Pid), memoryOf(t, a.childPID()))
		t.Logf("%s: /health %v", when, a.timed("/health", 100))
		t.Logf("%s: /jobs %v", when, a.timed("/jobs", 100))
	}
	figures("waiting")

	worker := a.childPID()
	began = time.Now()
	syscall.Kill(worker, syscall.SIGKILL)
	waitFor(t, 60*time.Second, func() string {
		if h := a.health(); a.childPID() == worker || h.Jobs["queued"] != tasks {
			return fmt.Sprintf("health is %+v; want %d queued", h, tasks)
		}
		return ""
	})
	t.Logf("%d tasks are there again %v after the worker was killed", tasks, time.Since(began).Round(time.Millisecond))
	figures("taken up")

	config, err := os.ReadFile(filepath.Join(a.dir, "config.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	began = time.Now()
	a.write("config.yaml", strings.Replace(string(config), "1000000GiB", "1KiB", 1))
	waitFor(t, 10*time.Minute, func() string {
		if h := a.health(); h.Status != "ok" || h.Jobs["finish"] != tasks {
			return fmt.Sprintf("health is %+v; want %d finished", h, tasks)
		}
		return ""
	})
	t.Logf("all have run %v after they were let", time.Since(began).Round(time.Millisecond))
	figures("afterwards")
}
