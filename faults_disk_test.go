//go:build linux

package main

// faults_disk_test.go takes the disk away from a running worker, or the right to write to it, and gives it back. The
// worker says what is wrong, loses nothing, and goes on by itself afterwards.

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
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
