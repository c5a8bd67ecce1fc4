//go:build linux

package main

// faults_test.go takes things away from a running worker that a host may run out of, and gives them back: disk, a
// writable folder, descriptors, processes. Each time the worker says what is wrong, loses nothing, and goes on by
// itself afterwards.

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

// quote shows what a user sees, for the closing note of whoever runs the tests with -v.
func (a *agent) quote(what string) {
	h := a.health()
	a.t.Logf("%s: /health says %s %q", what, h.Status, h.Problems)
}

// TestDiskFull fills the disk of data_dir while a task runs, kills the worker while it is full, and empties it again.
func TestDiskFull(t *testing.T) {
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
	disk := smallDisk(t, "2m")
	a := newAgent(t, `
jobs:
  - {event: quick, cmd: 'cat {{task_id}}.json | wc -c', working_dir: `+disk+`, retry: {times: 1, pause: 10ms}}
`).start()
	empty := fill(t, disk, 0)
	id := a.create("quick", `{"padding":"`+strings.Repeat("x", 10<<10)+`"}`)
	waitFor(t, 10*time.Second, func() string {
		if !strings.Contains(a.log.String(), "task postponed") {
			return a.log.String()
		}
		return ""
	})
	if v := a.task(id); v.Status.final() {
		t.Errorf("task ended as %+v", v)
	}
	a.awaitHealth("degraded", "ERR-26112300905")
	a.quote("working folder full")
	empty()
	if v := a.wait(id, statusFinish); v.Attempt != 1 {
		t.Errorf("task = %+v", v)
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
