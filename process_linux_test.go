package main

// process_linux_test.go checks what only Linux can do: find a dead worker's processes wherever they went, let children
// die with their worker, and see what is a zombie and what was inherited.

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

func init() {
	testRoles["without-shell"] = roleWithoutShell
}

// kill -9 of a worker: its children die with it, and what those left in any group or session is found and ended, for
// several tasks at once, and nothing else is.
func TestEndStaleGroupsAfterKill(t *testing.T) {
	sameID := startBystander(t, "JOB_ITEM_TASK_ID=stale-1", "JOB_ITEM_BASE_URL=http://127.0.0.1:2")
	otherID := startBystander(t, "JOB_ITEM_TASK_ID=stale-3", "JOB_ITEM_BASE_URL=http://127.0.0.1:1",
		"X=JOB_ITEM_TASK_ID=stale-1")
	worker, leaders, others := startWorkerRole(t, "stale-1", "stale-2")
	worker.Process.Kill()
	worker.Wait()
	for _, leader := range leaders {
		assertGone(t, leader.PID) // by its own worker's death
	}
	for _, pid := range others {
		assertUnharmed(t, pid)
	}

	env := []string{"JOB_ITEM_BASE_URL=http://127.0.0.1:1"}
	begin := time.Now()
	err := endStaleGroups([]staleTask{
		{process: leaders[0], taskID: "stale-1", env: env},
		{taskID: "stale-2", env: env}, // its start was never recorded
	}, 300*time.Millisecond)
	if err != nil || time.Since(begin) > 5*time.Second {
		t.Errorf("endStaleGroups: %v after %v", err, time.Since(begin))
	}
	for _, pid := range others {
		if state, there := processState(pid); there && state != 'Z' {
			t.Errorf("process %d is alive (%c)", pid, state)
		}
	}
	assertUnharmed(t, sameID)
	assertUnharmed(t, otherID)
}

// Whoever calls is spared, although it carries the task's id itself: it may be run by that very task.
func TestEndStaleGroupsSparesItself(t *testing.T) {
	cmd := cliCommand(t, []string{"JOB_ITEM_TASK_ID=stale-self", "JOB_ITEM_TEST_MAIN="},
		"-test.run=^TestSelfStale$", "-test.count=1")
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("PASS")) {
		t.Errorf("%v: %s", err, out)
	}
}

// TestSelfStale is the other half of TestEndStaleGroupsSparesItself.
func TestSelfStale(t *testing.T) {
	if os.Getenv("JOB_ITEM_TASK_ID") != "stale-self" {
		return
	}
	if err := endStaleGroup(processIdentity{}, "stale-self", 0); err != nil {
		t.Error(err)
	}
}

// A group of which only zombies are left is empty: whoever adopted them may never wait for them.
func TestRunDoesNotWaitForZombies(t *testing.T) {
	const setChildSubreaper = 36 // prctl(2)
	if _, _, errno := syscall.RawSyscall(syscall.SYS_PRCTL, setChildSubreaper, 1, 0); errno != 0 {
		t.Skip("prctl:", errno)
	}
	defer syscall.RawSyscall(syscall.SYS_PRCTL, setChildSubreaper, 0, 0)
	var out collected
	c := &command{line: "sleep 100 & echo $!", output: out.take, killAfter: time.Minute}
	begin := time.Now()
	mustRun(t, context.Background(), c)
	pid := out.waitForPID(t)
	if state, _ := processState(pid); state != 'Z' {
		t.Errorf("process %d is in state %c; want a zombie", pid, state)
	}
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("run waited %v for a zombie", took)
	}
	if _, err := syscall.Wait4(pid, nil, 0, nil); err != nil {
		t.Error(err)
	}
}

func TestGroupIsDescribed(t *testing.T) {
	pid := startBystander(t)
	if got := (processGroup{pid}).describe(); !strings.Contains(got, fmt.Sprintf("%d (\"", pid)) {
		t.Errorf("describe() = %s", got)
	}
}

// A group number that has become another's is left alone.
func TestGroupIsLost(t *testing.T) {
	pid := startBystander(t)
	group := processGroup{pid}
	if !group.lost(true) || group.lost(false) || !group.empty() {
		t.Error("a living process with a reaped leader's number was taken for its group")
	}
	r := &runningCommand{group: group, reaped: true}
	r.signal(processGroup.kill)
	assertUnharmed(t, pid)
}

// A command inherits its three streams and nothing else, not even what this process inherited without close-on-exec.
func TestRunInheritsNothing(t *testing.T) {
	file, err := os.Create(filepath.Join(t.TempDir(), "held"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	defer write.Close()
	bare, err := syscall.Dup(int(file.Fd())) // as if inherited
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(bare)

	list := func() []string {
		var out collected
		c := roleCommand(t, "list-fds")
		c.output = out.take
		mustRun(t, context.Background(), c)
		return strings.Split(strings.TrimSpace(out.text()), "\n")
	}
	if before := list(); !strings.Contains(strings.Join(before, "\n"), "held") {
		t.Errorf("the check sees nothing: %q", before)
	}
	sealDescriptors()
	after := list()
	if len(after) != 3 {
		t.Errorf("inherited: %q; want 0, 1 and 2 alone", after)
	}
	for i, line := range after {
		if want := []string{"0 /dev/null", "1 pipe:", "2 pipe:"}[min(i, 2)]; !strings.HasPrefix(line, want) {
			t.Errorf("inherited %q; want %q", line, want)
		}
	}
}

// roleWithoutShell hides the shell in a file system view of its own and runs commands there.
func roleWithoutShell([]string) int {
	shell, err := filepath.EvalSymlinks("/bin/sh")
	if err == nil {
		err = syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, "")
	}
	if err == nil {
		err = syscall.Mount("/dev/null", shell, "", syscall.MS_BIND, "")
	}
	if err != nil {
		fmt.Println("cannot hide the shell:", err)
		return 77
	}
	self, _ := os.Executable()
	script := filepath.Join(os.TempDir(), fmt.Sprint("script-", os.Getpid()))
	os.WriteFile(script, []byte("echo\n"), 0o755)
	defer os.Remove(script)
	env := []string{"PATH=/nowhere"}
	fmt.Println(hasShell())
	for _, c := range []command{
		{line: "true | true", env: env},
		{argv: []string{script}, env: env},
		{argv: []string{self, "test-role", "exit", "5"}, env: env},
	} {
		status, err := c.run(context.Background())
		fmt.Println(status.code, codeOf(err), err, hintOf(err))
	}
	return 0
}

func TestRunWithoutShell(t *testing.T) {
	cmd := cliCommand(t, []string{"PATH=/nowhere"}, "test-role", "without-shell")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	if uid := os.Getuid(); uid != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: uid, Size: 1}}
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Skipf("no file system view of its own here: %v: %s", err, out)
	}
	lines := strings.Split(string(out), "\n")
	if len(lines) < 4 {
		t.Fatalf("output %q", out)
	}
	for i, want := range [][]string{
		{"false"},
		{"-1 " + string(codeExec), "it needs a shell, and this host has no sh", "plain arguments runs without"},
		{"-1 " + string(codeExec), "is a script for sh", "#!/path"},
		{"5 "},
	} {
		for _, part := range want {
			if !strings.Contains(lines[i], part) {
				t.Errorf("without a shell: %q; want %q in it", lines[i], part)
			}
		}
	}
}

// A child dies with its worker although the goroutine that started it is long gone from its thread: where processes are
// started by the standard library.
func TestSpawnerSurvivesThreads(t *testing.T) {
	spawn := startSpawner()
	spawn.noVfork.Store(true)
	defer spawn.close()
	ctx, cancel := context.WithCancel(context.Background())
	c := roleCommand(t, "ready-then-hang")
	c.spawn = spawn
	pid, end := startRole(t, ctx, c)
	var locked, ended sync.WaitGroup
	const threads = 50
	locked.Add(threads)
	ended.Add(threads)
	for range threads { // takes every thread that is idle, and each ends with its goroutine
		go func() {
			defer ended.Done()
			runtime.LockOSThread()
			locked.Done()
			locked.Wait()
			runtime.Gosched()
		}()
	}
	ended.Wait()
	mustRun(t, context.Background(), &command{argv: []string{"true"}, spawn: spawn})
	assertUnharmed(t, pid)
	cancel()
	if status := end(); status.signal != "SIGTERM" {
		t.Errorf("%+v; want SIGTERM", status)
	}
}

// Where they are started by vfork any thread may do it, since none ends: neither ours nor those of the libraries.
func TestWorkerKeepsItsThreads(t *testing.T) {
	a := newAgent(t, "concurrency: 4\njobs: [{event: quick, cmd: 'true'}, {event: shell, cmd: 'echo a; sleep 0.01; echo b >&2'}]\n")
	a.start()
	defer a.stop()
	a.awaitHealth("ok", "")
	worker := a.childPID()
	threads := func() (ids []string) {
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", worker))
		if err != nil {
			t.Fatal(err)
		}
		for _, entry := range entries {
			ids = append(ids, entry.Name())
		}
		return ids
	}
	before := threads()
	for range 3 {
		a.createAll(t, "quick", 50, 8)
		a.createAll(t, "shell", 50, 8)
	}
	waitFor(t, 30*time.Second, func() string { return unless(a.finished() == 300, fmt.Sprintf("%d have ended", a.finished())) })
	after := threads()
	for _, id := range before {
		if !slices.Contains(after, id) {
			t.Errorf("thread %s of %v has ended", id, before)
		}
	}
}

func BenchmarkEndStaleGroups(b *testing.B) {
	tasks := []staleTask{{taskID: "none"}}
	for range b.N {
		if err := endStaleGroups(tasks, 0); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkIdentifyProcess(b *testing.B) {
	for range b.N {
		if identifyProcess(os.Getpid()).Start == "" {
			b.Fatal("no start")
		}
	}
}
