//go:build linux

package main

// faults_test.go takes things away from a running worker that a host may run out of, and gives them back: disk, a
// writable folder, descriptors, processes. Each time the worker says what is wrong, loses nothing, and goes on by
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
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"
)

// smallDisk mounts a file system of its own in a new folder.
func smallDisk(t testing.TB, size string) string {
	t.Helper()
	dir := t.TempDir()
	if err := syscall.Mount("job_item_test", dir, "tmpfs", 0, "size="+size); err != nil {
		if errors.Is(err, syscall.EPERM) {
			t.Skip("only root can mount a small disk")
		}
		t.Fatalf("mount a small disk: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return dir
}

// setReadOnly makes a small disk read-only, or writable again; it must not be written to at that moment.
func setReadOnly(t testing.TB, dir string, readOnly bool) {
	t.Helper()
	flags := uintptr(syscall.MS_REMOUNT)
	if readOnly {
		flags |= syscall.MS_RDONLY
	}
	waitFor(t, 5*time.Second, func() string { // a killed process lets go of its files a little later
		if err := syscall.Mount("", dir, "", flags, ""); err != nil {
			return "remount: " + err.Error()
		}
		return ""
	})
}

// fill leaves nothing of a disk but free bytes, in the way that a log file of somebody else does.
func fill(t testing.TB, dir string, free int) (empty func()) {
	t.Helper()
	path := filepath.Join(dir, "filler")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	page := make([]byte, 4096)
	size := 0
	for ; err == nil; size += len(page) {
		_, err = f.Write(page)
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	if free > 0 {
		if err := f.Truncate(int64(max(0, size-len(page)-free))); err != nil {
			t.Fatal(err)
		}
	}
	return func() { os.Remove(path) }
}

// quote shows what a user sees, for the closing note of whoever runs the tests with -v.
func (a *agent) quote(what string) {
	h := a.health()
	a.t.Logf("%s: /health says %s %q", what, h.Status, h.Problems)
}

// TestDiskFull fills the disk of data_dir while a task runs, kills the worker while it is full, and empties it again.
func TestDiskFull(t *testing.T) {
	t.Parallel() // it mostly waits
	disk := smallDisk(t, "8m")
	a := newAgent(t, `
data_dir: `+disk+`/data
take_when: {disk_free: 2MiB}
concurrency: 2
jobs:
  - {event: long, cmd: 'echo begun; until test -e go; do sleep 0.05; done; echo ended; echo ran >> long.runs'}
  - {event: quick, cmd: 'echo $JOB_ITEM_TASK_ID >> quick.runs'}
`).start()
	long := a.create("long", "{}")
	a.wait(long, statusRunning)
	waitFor(t, 10*time.Second, func() string { return strings.TrimPrefix("begun\n", a.output(long)) })

	empty := fill(t, disk, 1<<20)
	a.awaitHealth("degraded", "take_when.disk_free")
	a.quote("disk short")
	queued := a.create("quick", "{}")
	empty()
	fill(t, disk, 0)
	padding := strings.Repeat("x", 64<<10)
	code, answer := 0, ""
	waitFor(t, 10*time.Second, func() string {
		code, answer = a.post("/job/create", `{"event":"quick","form_body":{"padding":"`+padding+`"}}`)
		if code != 503 || !strings.Contains(answer, "ERR-26112300204") {
			return fmt.Sprintf("create = %d %s", code, answer)
		}
		return ""
	})
	t.Logf("disk full: create answers %d %s", code, answer)
	a.quote("disk full")
	a.write("go", "")
	if v := a.wait(long, statusFinish); v.Attempt != 1 {
		t.Errorf("the running task ended as %+v", v)
	}
	a.quote("disk full, task ended")
	if v := a.task(queued); v.Status != statusQueued {
		t.Errorf("task %+v was started while the disk is full", v)
	}

	killed := a.childPID()
	syscall.Kill(killed, syscall.SIGKILL)
	waitFor(t, 20*time.Second, func() string {
		if a.childPID() == killed {
			return "no new worker\n" + a.log.String()
		}
		return ""
	})
	a.quote("killed while full")
	empty()
	a.awaitHealth("ok", "")
	a.quote("space again")
	a.wait(queued, statusFinish)
	a.wait(a.create("quick", "{}"), statusFinish)
	if v := a.task(long); v.Status != statusFinish {
		t.Errorf("the task that ended while the disk was full is now %+v", v)
	}
	runs, _ := os.ReadFile(filepath.Join(a.dir, "long.runs"))
	if string(runs) != "ran\n" {
		t.Errorf("the long task ran %q", runs)
	}
	if testing.Verbose() {
		t.Logf("\n%s", a.log)
	}
}

// TestWorkingFolderFull gives a job a working folder without room for its data, and a log without room for its output.
func TestWorkingFolderFull(t *testing.T) {
	t.Parallel() // it mostly waits
	disk := smallDisk(t, "2m")
	a := newAgent(t, `
jobs:
  - {event: quick, cmd: 'cat {{task_id}}.json | wc -c', working_dir: `+disk+`, retry: {times: 1, pause: 10ms}}
`).start()
	empty := fill(t, disk, 0)
	var ids []string
	for range 20 {
		ids = append(ids, a.create("quick", `{"padding":"`+strings.Repeat("x", 10<<10)+`"}`))
	}
	waitFor(t, 10*time.Second, func() string {
		if !strings.Contains(a.log.String(), "task postponed") {
			return a.log.String()
		}
		return ""
	})
	a.awaitHealth("degraded", "ERR-26112300905")
	if n := strings.Count(a.log.String(), "task postponed"); n != 1 {
		t.Errorf("the log says it %d times", n)
	}
	a.quote("working folder full")
	empty()
	for _, id := range ids {
		if v := a.wait(id, statusFinish); v.Attempt != 1 {
			t.Errorf("task = %+v", v)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(disk, "*")); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	if testing.Verbose() {
		t.Logf("\n%s", a.log)
	}
}

func init() {
	// print-when FILE prints a line each time FILE grows by one byte, until it holds an x.
	testRoles["print-when"] = func(args []string) int {
		for printed := 0; ; time.Sleep(5 * time.Millisecond) {
			content, _ := os.ReadFile(args[0])
			for ; printed < len(content); printed++ {
				fmt.Printf("line %d %s\n", printed, strings.Repeat("-", 8000))
				if content[printed] == 'x' {
					return 0
				}
			}
		}
	}
}

// TestLogWhileDiskIsFull lets a task print before, while and after there is room for its log: what is missing is marked.
func TestLogWhileDiskIsFull(t *testing.T) {
	t.Parallel() // it mostly waits
	disk := smallDisk(t, "8m")
	a := newAgent(t, `
data_dir: `+disk+`/data
take_when: {disk_free: 0}
jobs:
  - {event: print, cmd: '%SELF% test-role print-when cue'}
`).start()
	id := a.create("print", "{}")
	printed := func(cue string, n int64) {
		t.Helper()
		a.write("cue", cue)
		waitFor(t, 10*time.Second, func() string {
			if v := a.task(id); v.OutputBytes < n*8000 {
				return fmt.Sprintf("task is %+v\n%s", v, a.log)
			}
			return ""
		})
	}
	printed(".", 1)
	empty := fill(t, disk, 0)
	printed("...", 3)
	a.awaitHealth("degraded", "ERR-26112300602")
	a.quote("no room for logs")
	empty()
	a.awaitHealth("ok", "")
	a.write("cue", "...x")
	a.wait(id, statusFinish)
	text := a.output(id)
	if !strings.HasPrefix(text, "line 0 ") || !strings.Contains(text, "bytes of output are not kept") || !strings.Contains(text, "line 3 ") {
		t.Errorf("log is %q", strings.ReplaceAll(text, strings.Repeat("-", 8000), "---"))
	}
	if testing.Verbose() {
		t.Logf("log: %s\n%s", strings.ReplaceAll(text, strings.Repeat("-", 8000), "---"), a.log)
	}
}

// TestDataDirReadOnly starts a worker on a read-only data_dir, lets it run when that is mended, and has the disk become
// read-only while its worker is dead, with a task to be taken up.
func TestDataDirReadOnly(t *testing.T) {
	t.Parallel() // it mostly waits
	disk := smallDisk(t, "8m")
	setReadOnly(t, disk, true)
	a := newAgent(t, `
data_dir: `+disk+`/data
take_when: {disk_free: 0}
jobs:
  - {event: long, cmd: 'echo run >> runs; test -e go || sleep 60'}
`)
	a.launch()
	waitFor(t, 10*time.Second, func() string {
		if h := a.health(); h.Status != "starting" || !strings.Contains(fmt.Sprint(h.Problems), "read-only file system") {
			return fmt.Sprintf("health is %+v\n%s", h, a.log)
		}
		return ""
	})
	a.quote("read-only at start")
	code, answer := a.post("/job/create", `{"event":"long"}`)
	if code != 503 {
		t.Errorf("create = %d %s", code, answer)
	}
	t.Logf("create answers %d %s", code, answer)
	setReadOnly(t, disk, false)
	a.awaitHealth("ok", "")
	id := a.create("long", "{}")
	waitFor(t, 10*time.Second, func() string {
		if runs, _ := os.ReadFile(filepath.Join(a.dir, "runs")); string(runs) != "run\n" {
			return "the task does not run"
		}
		return ""
	})

	// The parent stands still, so that no worker opens the journal again before the disk is read-only.
	worker := a.childPID()
	a.cmd.Process.Signal(syscall.SIGSTOP)
	syscall.Kill(worker, syscall.SIGKILL)
	setReadOnly(t, disk, true)
	a.cmd.Process.Signal(syscall.SIGCONT)
	waitFor(t, 10*time.Second, func() string {
		if h := a.health(); !strings.Contains(fmt.Sprint(h.Problems), "read-only file system") {
			return fmt.Sprintf("health is %+v\n%s", h, a.log)
		}
		return ""
	})
	a.quote("read-only after a crash")
	a.write("go", "")
	setReadOnly(t, disk, false)
	if v := a.wait(id, statusFinish); v.Attempt != 2 {
		t.Errorf("task = %+v", v)
	}
	if runs, _ := os.ReadFile(filepath.Join(a.dir, "runs")); string(runs) != "run\nrun\n" {
		t.Errorf("the task ran %q", runs)
	}
	if testing.Verbose() {
		t.Logf("\n%s", a.log)
	}
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

// A brokenDisk refuses every write while it is broken.
type brokenDisk struct {
	journalFile
	broken *atomic.Bool
}

func (d brokenDisk) WriteAt(p []byte, off int64) (int, error) {
	if d.broken.Load() {
		return 0, syscall.EROFS
	}
	return d.journalFile.WriteAt(p, off)
}

// TestStopWhileJournalIsBroken stops a worker that cannot note how its tasks end: it stops in time, and they run again.
func TestStopWhileJournalIsBroken(t *testing.T) {
	dir := t.TempDir()
	jobs := "jobs: [{event: job, cmd: 'echo run >> runs; until test -e go; do sleep 0.02; done'}]\n"
	w, stop := openWorkerForTest(t, dir, jobs)
	var broken atomic.Bool
	w.journal.mu.Lock()
	w.journal.wrap = func(s *segment) { s.file = brokenDisk{s.file, &broken} }
	w.journal.wrap(w.journal.tail())
	w.journal.mu.Unlock()
	for range 3 {
		if _, err := w.create(t.Context(), "", "job", nil); err != nil {
			t.Fatal(err)
		}
	}
	running := int64(min(3, w.config().Concurrency))
	waitRuns(t, w, running)
	broken.Store(true)
	if _, err := w.create(t.Context(), "", "job", nil); codeOf(err) != codeJournalWrite {
		t.Errorf("create = %v; want %s", err, codeJournalWrite)
	}
	if err := os.WriteFile(filepath.Join(dir, "go"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	waitRuns(t, w, 0) // their ends wait for the journal
	if h := w.health(); h.Status != healthDown || !strings.Contains(fmt.Sprint(h.Problems), string(codeJournalWrite)) {
		t.Errorf("health is %+v", h)
	}
	began := time.Now()
	stop()
	if took := time.Since(began); took > settleTimeout {
		t.Errorf("stopping took %v", took)
	}
	broken.Store(false)

	w, stop = openWorkerForTest(t, dir, jobs)
	waitFor(t, 10*time.Second, func() string {
		if h := w.health(); h.Jobs.Finish != 3 {
			return fmt.Sprintf("health is %+v", h)
		}
		return ""
	})
	stop()
}

// TestToldWhenSure has a task run while the disk makes sure of it: nothing of it is told before.
func TestToldWhenSure(t *testing.T) {
	dir := t.TempDir()
	w, stop := openWorkerForTest(t, dir, "jobs: [{event: speaks, cmd: 'echo words; touch ran'}]\n")
	defer stop()
	var mu sync.Mutex
	var told []string
	w.bus.subscribe(func(e event) {
		mu.Lock()
		defer mu.Unlock()
		switch e.(type) {
		case taskTaken, taskOutput, taskNotified, taskFinished:
			told = append(told, e.eventName())
		}
	})
	w.journal.mu.Lock()
	gate := gatedFile{w.journal.tail().file, make(chan bool), make(chan error), make(chan bool)}
	w.journal.tail().file = gate
	w.journal.mu.Unlock()
	created := make(chan string, 1)
	go func() { // ends when the task is accepted
		id, err := w.create(t.Context(), "", "speaks", nil)
		if err != nil {
			t.Error(err)
		}
		created <- id
	}()
	<-gate.begun
	waitFor(t, 10*time.Second, func() string {
		_, err := os.Stat(filepath.Join(dir, "ran"))
		return unless(err == nil, "the command does not run")
	})
	mu.Lock()
	if len(told) > 0 {
		t.Errorf("%v were told before the disk was sure", told)
	}
	mu.Unlock()
	gate.end <- nil
	close(gate.open)
	<-created
	waitFor(t, 10*time.Second, func() string {
		mu.Lock()
		defer mu.Unlock()
		return unless(slices.Equal(told, []string{"task_taken", "task_output", "task_finished"}), fmt.Sprint("told: ", told))
	})
}

// TestFailedSyncTakesTaskBack has a task begin while the disk makes sure of it, which fails: whoever created it hears so,
// its command is ended, and nothing of it is left. One that has run to its end by then counts.
func TestFailedSyncTakesTaskBack(t *testing.T) {
	dir := t.TempDir()
	w, stop := openWorkerForTest(t, dir, `jobs:
  - {event: long, cmd: 'echo run >> runs; sleep 60'}
  - {event: short, cmd: 'echo run >> runs'}
`)
	runs := func() int {
		content, _ := os.ReadFile(filepath.Join(dir, "runs"))
		return strings.Count(string(content), "\n")
	}
	for n, row := range []struct {
		event string
		begun func() string // that it has come as far as it is to
		code  errCode
	}{
		{"long", func() string { return unless(runs() == 1 && w.runningTasks.Load() == 1, "it has not begun") }, codeJournalWrite},
		{"short", func() string { return unless(runs() == 2 && w.runningTasks.Load() == 0, "it has not ended") }, ""},
	} {
		w.journal.mu.Lock()
		gate := gatedFile{w.journal.tail().file, make(chan bool), make(chan error), make(chan bool)}
		w.journal.tail().file = gate
		w.journal.mu.Unlock()
		created := make(chan error, 1)
		go func() { // ends when the task is accepted, or not
			_, err := w.create(t.Context(), "", row.event, nil)
			created <- err
		}()
		<-gate.begun
		waitFor(t, 10*time.Second, row.begun)
		gate.end <- syscall.EIO
		close(gate.open)
		if err := <-created; codeOf(err) != row.code {
			t.Errorf("%s: create = %v; want %s", row.event, err, row.code)
		}
		waitFor(t, 10*time.Second, func() string {
			h := w.health()
			return unless(h.Status == healthOK && h.Jobs.Running+h.Jobs.Queued == 0 && h.Jobs.Finish == int64(n), fmt.Sprintf("health is %+v", h))
		})
	}
	if live := len(w.records.live); live > 0 {
		t.Errorf("%d records are left of it", live)
	}
	stop()
	w, _ = openWorkerForTest(t, dir, "jobs: [{event: long, cmd: 'echo run >> runs; sleep 60'}]\n")
	if h := w.health(); h.Jobs.Running+h.Jobs.Queued > 0 || runs() != 2 {
		t.Errorf("after a restart: %+v, %d runs", h, runs())
	}
}

// TestFailedSyncWhileStopping has that happen to a task that a stopping worker has put back already.
func TestFailedSyncWhileStopping(t *testing.T) {
	w, stop := openWorkerForTest(t, t.TempDir(), "jobs: [{event: long, cmd: 'sleep 60'}]\n")
	w.journal.mu.Lock()
	gate := gatedFile{w.journal.tail().file, make(chan bool), make(chan error), make(chan bool)}
	w.journal.tail().file = gate
	w.journal.mu.Unlock()
	created := make(chan error, 1)
	go func() { // ends when the task is accepted, or not
		_, err := w.create(t.Context(), "", "long", nil)
		created <- err
	}()
	<-gate.begun
	waitRuns(t, w, 1)
	stopped := make(chan struct{})
	go func() { // ends when the worker has
		stop()
		close(stopped)
	}()
	waitFor(t, 10*time.Second, func() string { return unless(w.counts.putBack.Load() == 1, "the task is not put back") })
	gate.end <- syscall.EIO
	close(gate.open)
	for what, ended := range map[string]func() error{
		"create": func() error { return <-created },
		"stop":   func() error { <-stopped; return nil },
	} {
		done := make(chan error, 1)
		go func() { done <- ended() }() // ends with it
		select {
		case err := <-done:
			if what == "create" && codeOf(err) != codeJournalWrite {
				t.Errorf("create = %v; want %s", err, codeJournalWrite)
			}
		case <-time.After(10 * time.Second):
			t.Errorf("%s does not end", what)
		}
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

// TestPlainTasksWhileDiskIsFull publishes tasks that no broker keeps to the only worker, whose journal cannot take them:
// they run when it can.
func TestPlainTasksWhileDiskIsFull(t *testing.T) {
	for _, kind := range brokerKinds {
		if kind.durable {
			continue
		}
		t.Run(kind.name, func(t *testing.T) {
			disk := smallDisk(t, "8m")
			server := kind.start(t)
			a := workerOn(t, kind, server, "w", `
data_dir: `+disk+`/data
take_when: {disk_free: 0}
jobs:
  - {event: quick, cmd: 'echo ran {{task_id}} >> runs'}
`)
			empty := fill(t, disk, 0)
			data := `{"padding":"` + strings.Repeat("x", 64<<10) + `"}`
			const tasks = 10
			for i := range tasks {
				kind.publish(t, server, "quick", fmt.Sprint("task-", i), data)
			}
			a.awaitHealth("down", "ERR-26112300204")
			a.quote("tasks arrive while the disk is full")
			empty()
			for i := range tasks {
				if v := a.wait(fmt.Sprint("task-", i), statusFinish); v.Attempt != 1 {
					t.Errorf("task = %+v", v)
				}
			}
			if runs, _ := os.ReadFile(filepath.Join(a.dir, "runs")); strings.Count(string(runs), "ran ") != tasks {
				t.Errorf("ran:\n%s", runs)
			}
			a.awaitHealth("ok", "")
			if testing.Verbose() {
				t.Logf("\n%s", a.log)
			}
		})
	}
}
