package main

// reaper_linux_test.go makes orphans of every kind and looks at what is left of them.

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

func init() {
	testRoles["reaper"] = roleReaper
	testRoles["reaper-worker"] = roleReaperWorker
	testRoles["reaper-load"] = roleReaperLoad
	testRoles["first-process"] = roleFirstProcess
}

// roleReaper is a parent that runs a command, tells how it ended, and stops at SIGTERM. With "late" before the command
// it waits for the command only after the end of its stdin.
func roleReaper(argv []string) int {
	late := argv[0] == "late"
	if late {
		argv = argv[1:]
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if os.Getpid() != 1 { // the first process needs not to become what it is
		if err := becomeSubreaper(); err != nil {
			fmt.Println(err)
			return 1
		}
	}
	r := newReaper(slog.New(slog.DiscardHandler))
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	started := make(chan error, 1)
	var running sync.WaitGroup
	running.Add(1)
	go func() { // ends with ctx
		defer running.Done()
		// The system shows the children of the thread that asks first: so this one is before all orphans.
		runtime.LockOSThread()
		started <- r.start(cmd)
		r.run(ctx)
	}()
	if err := <-started; err != nil {
		fmt.Println(err)
		return 1
	}
	if late {
		io.Copy(io.Discard, os.Stdin)
	}
	fmt.Println("ended:", r.wait(cmd))
	running.Wait()
	fmt.Println("stopped")
	return 0
}

// roleReaperWorker prints its pid and runs a task as the worker does; the task prints the pids of all its processes.
func roleReaperWorker([]string) int {
	fmt.Println(os.Getpid())
	c := &command{
		argv:   []string{"sh", "-c", "trap '' TERM; sleep 300 & echo $!; (sleep 300 & echo $!); echo $$; wait"},
		env:    os.Environ(),
		spawn:  startSpawner(), // ends with this process
		output: func(_ outputStream, data []byte) { os.Stdout.Write(data) },
	}
	c.run(context.Background())
	return 0
}

// roleReaperLoad starts many short children, each of which leaves orphans behind, and tells how many of them ended
// otherwise than they should.
func roleReaperLoad([]string) int {
	if err := becomeSubreaper(); err != nil {
		fmt.Println(err)
		return 1
	}
	const starters, rounds = 4, 50
	ctx, stop := context.WithCancel(context.Background())
	r := newReaper(slog.New(slog.DiscardHandler))
	var reaping sync.WaitGroup
	reaping.Add(1)
	go func() { // ends with ctx
		defer reaping.Done()
		r.run(ctx)
	}()
	wrong := make(chan string, starters*rounds)
	var started sync.WaitGroup
	for starter := range starters {
		started.Add(1)
		go func() { // ends after its rounds
			defer started.Done()
			for round := range rounds {
				want := (starter*rounds + round) % 100
				// One orphan ends by itself, and one is killed.
				cmd := exec.Command("sh", "-c", fmt.Sprintf("(true &); (kill -9 $(exec sh -c 'echo $PPID') &); exit %d", want))
				err := r.start(cmd)
				if err == nil {
					err = r.wait(cmd)
				}
				var exit *exec.ExitError
				if code := cmd.ProcessState.ExitCode(); code != want || err != nil && !errors.As(err, &exit) {
					wrong <- fmt.Sprintf("exit code %d, %v; want %d", code, err, want)
				}
			}
		}()
	}
	started.Wait()
	close(wrong)
	for line := range wrong {
		fmt.Println(line)
	}
	fmt.Println("all ended")
	io.Copy(io.Discard, os.Stdin)
	stop()
	reaping.Wait()
	return 0
}

// roleFirstProcess becomes the program as a container's first process, which sees the container's processes in /proc.
func roleFirstProcess(args []string) int {
	err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, "")
	if err == nil {
		err = syscall.Mount("proc", "/proc", "proc", 0, "")
	}
	if err == nil {
		var self string
		if self, err = os.Executable(); err == nil {
			err = syscall.Exec(self, append([]string{"job_item"}, args...), os.Environ())
		}
	}
	fmt.Fprintln(os.Stderr, "first process:", err)
	return 1
}

// ownNamespace makes a process the first of its own.
func ownNamespace() *syscall.SysProcAttr {
	attr := &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS}
	if os.Getuid() != 0 {
		attr.Cloneflags |= syscall.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	return attr
}

// A reaperRole is a running role and what it says.
type reaperRole struct {
	*exec.Cmd
	said  *bufio.Scanner
	stdin io.Closer
}

func startReaperRole(t *testing.T, attr *syscall.SysProcAttr, args ...string) *reaperRole {
	t.Helper()
	cmd := cliCommand(t, nil, append([]string{"test-role"}, args...)...)
	cmd.SysProcAttr = attr
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	must(t, err)
	in, err := cmd.StdinPipe()
	must(t, err)
	if err := cmd.Start(); err != nil {
		skipWithoutNamespaces(t, err)
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, child := range childrenOf(cmd.Process.Pid) {
			syscall.Kill(child.pid, syscall.SIGKILL)
		}
		cmd.Process.Kill()
		cmd.Wait()
	})
	return &reaperRole{cmd, bufio.NewScanner(out), in}
}

// skipWithoutNamespaces skips the test if err says that the kernel gives us none.
func skipWithoutNamespaces(t *testing.T, err error) {
	t.Helper()
	for _, refusal := range []error{syscall.EPERM, syscall.EACCES, syscall.ENOSPC, syscall.EINVAL} {
		if errors.Is(err, refusal) {
			t.Skipf("the kernel gives this user no namespace for processes: %v", err)
		}
	}
}

// line is the next line of the role.
func (r *reaperRole) line(t *testing.T) string {
	t.Helper()
	if !r.said.Scan() {
		t.Fatalf("the role ended: %v", r.said.Err())
	}
	return r.said.Text()
}

func childrenOf(pid int) (children []procStat) {
	eachProcess(func(p procStat) {
		if p.parent == pid {
			children = append(children, p)
		}
	})
	return children
}

// assertChildren waits until the children of pid have these names, and none is a zombie.
func assertChildren(t *testing.T, pid int, names ...string) {
	t.Helper()
	waitFor(t, 10*time.Second, func() string {
		children := childrenOf(pid)
		same := len(children) == len(names)
		for i, child := range children {
			same = same && child.name == names[i] && !child.dead()
		}
		if same {
			return ""
		}
		return fmt.Sprintf("the children of process %d are %+v; want %q", pid, children, names)
	})
}

// kill -9 of a worker: its task's group is ended at once, though only the leader hears of the death, and the parent
// learns how the worker ended.
func TestReaperEndsGroupOfKilledWorker(t *testing.T) {
	self, err := os.Executable()
	must(t, err)
	role := startReaperRole(t, nil, "reaper", self, "test-role", "reaper-worker")
	var pids [4]int // of the worker and its task's processes
	for i := range pids {
		if pids[i], err = strconv.Atoi(role.line(t)); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		for _, pid := range pids[1:] {
			endProcess(t, pid)
		}
	})
	must(t, syscall.Kill(pids[0], syscall.SIGKILL))
	if got := role.line(t); got != "ended: signal: killed" {
		t.Errorf("the worker ended otherwise: %s", got)
	}
	waitFor(t, 5*time.Second, func() string {
		for _, pid := range pids {
			if p, ok := readProcess(pid); ok {
				return fmt.Sprintf("process %d is still there: %+v", pid, p)
			}
		}
		return ""
	})
	assertChildren(t, role.Process.Pid)
}

// Orphans are waited for, those that live are left alone, and SIGTERM is obeyed: by a parent as any process, and by one
// that is the first in its container.
func TestReaperWaitsForOrphans(t *testing.T) {
	for _, row := range []struct {
		name string
		attr *syscall.SysProcAttr
	}{{"subreaper", nil}, {"first process", ownNamespace()}} {
		t.Run(row.name, func(t *testing.T) {
			role := startReaperRole(t, row.attr, "reaper",
				"sh", "-c", "for i in 1 2 3 4 5 6 7 8 9; do (sleep 0.0$i &); done; (sleep 300 &); exit 7")
			if got := role.line(t); got != "ended: exit status 7" {
				t.Errorf("the command ended otherwise: %s", got)
			}
			assertChildren(t, role.Process.Pid, "sleep")
			survivor := childrenOf(role.Process.Pid)[0].pid
			defer endProcess(t, survivor)
			must(t, role.Process.Signal(syscall.SIGTERM))
			if got := role.line(t); got != "stopped" {
				t.Errorf("the role said %q", got)
			}
			if err := role.Wait(); err != nil {
				t.Errorf("the role: %v", err)
			}
		})
	}
}

// However many orphans end at the same time, each child of our own ends for whoever waits for it.
func TestReaperSparesOwnChildren(t *testing.T) {
	role := startReaperRole(t, nil, "reaper-load")
	for {
		line := role.line(t)
		if line == "all ended" {
			break
		}
		t.Error(line)
	}
	assertChildren(t, role.Process.Pid)
	role.stdin.Close()
	if err := role.Wait(); err != nil {
		t.Error(err)
	}
}

// An own child that has ended hides the orphans behind it until it is waited for, and no longer.
func TestReaperAfterLateWait(t *testing.T) {
	role := startReaperRole(t, nil, "reaper", "late", "sh", "-c", "(sleep 0.05 &); exit 3")
	waitFor(t, 5*time.Second, func() string {
		children := childrenOf(role.Process.Pid)
		if slices.ContainsFunc(children, func(p procStat) bool { return !p.dead() }) || len(children) == 0 {
			return fmt.Sprintf("not all have ended: %+v", children)
		}
		return ""
	})
	role.stdin.Close()
	if got := role.line(t); got != "ended: exit status 3" {
		t.Errorf("the command ended otherwise: %s", got)
	}
	assertChildren(t, role.Process.Pid)
}

// A group loses what is left of it when its leader was killed by SIGKILL, and not when it ended in another way, were it
// with an exit code of the signal's number.
func TestReaperTellsEnds(t *testing.T) {
	const group = "setsid sh -c 'sleep 300 & echo %s $!; sleep 0.05; %s' & "
	role := startReaperRole(t, nil, "reaper", "sh", "-c", fmt.Sprintf(group, "code", "exit 9")+
		fmt.Sprintf(group, "term", "kill -TERM $$")+fmt.Sprintf(group, "kill", "kill -KILL $$"))
	pids := map[string]int{}
	for len(pids) < 3 {
		name, text, _ := strings.Cut(role.line(t), " ")
		if pid, err := strconv.Atoi(text); err == nil {
			pids[name] = pid
		} else if name != "ended:" {
			t.Errorf("the role said %q", name+" "+text)
		}
	}
	assertChildren(t, role.Process.Pid, "sleep", "sleep")
	if !alive(pids["code"]) || !alive(pids["term"]) || alive(pids["kill"]) {
		t.Errorf("of %v others are left: %+v", pids, childrenOf(role.Process.Pid))
	}
}

// TestFirstProcess has the program as the first process of a container: a task's orphans and those of a killed worker
// leave no zombie, the task is run again, and SIGTERM stops everything.
func TestFirstProcess(t *testing.T) {
	a := newAgent(t, `
drain_timeout: 100ms
kill_after: 100ms
jobs:
  - {event: orphans, cmd: 'for i in 1 2 3; do (sleep 0.0$i &); (setsid sleep 0.0$i &); done'}
  - {event: long, cmd: 'sleep 300 & (sleep 300 &); (setsid sleep 300 &); sleep 300'}
`)
	a.url = "http://" + configuredListen(t, a)
	a.log = &lockedBuffer{}
	a.cmd = cliCommand(t, nil, "test-role", "first-process", "--config", filepath.Join(a.dir, "config.yaml"))
	a.cmd.Stderr = a.log
	a.cmd.SysProcAttr = ownNamespace()
	if err := a.cmd.Start(); err != nil {
		skipWithoutNamespaces(t, err)
		t.Fatal(err)
	}
	gone := make(chan struct{})
	a.gone = gone
	go func() { a.cmd.Wait(); close(gone) }() // ends with the parent
	t.Cleanup(func() {
		a.cmd.Process.Kill()
		<-gone
	})
	healthy := func() string {
		select {
		case <-gone:
			if strings.Contains(a.log.String(), "first process: operation not permitted") {
				t.Skip("the kernel lets this user mount no /proc")
			}
			t.Fatalf("job_item ended early:\n%s", a.log)
		default:
		}
		if status := a.health().Status; status != "ok" {
			return "health is " + status + "\n" + a.log.String()
		}
		return ""
	}
	waitFor(t, 20*time.Second, healthy)
	a.wait(a.create("orphans", "{}"), statusFinish)
	children := func() (names []string) {
		for _, child := range childrenOf(a.cmd.Process.Pid) {
			if child.dead() {
				names = append(names, "a zombie of")
			}
			names = append(names, child.name)
		}
		return names
	}
	waitFor(t, 5*time.Second, func() string {
		if now := children(); len(now) != 1 || now[0] == "sleep" {
			return fmt.Sprintf("the first process's children are %q; want the worker alone", now)
		}
		return ""
	})
	worker := childrenOf(a.cmd.Process.Pid)[0].pid
	long := a.create("long", "{}")
	a.wait(long, statusRunning)
	waitFor(t, 5*time.Second, func() string {
		if now := children(); len(now) != 3 {
			return fmt.Sprintf("the first process's children are %q; want the worker and two sleeps", now)
		}
		return ""
	})
	must(t, syscall.Kill(worker, syscall.SIGKILL))
	waitFor(t, 10*time.Second, func() string {
		if v := a.task(long); v.Attempt != 2 || v.Status != statusRunning {
			return fmt.Sprintf("the task is %s at attempt %d", v.Status, v.Attempt)
		}
		if now := children(); len(now) != 3 || slices.Contains(now, "a zombie of") {
			return fmt.Sprintf("the first process's children are %q; want the worker and two sleeps", now)
		}
		return ""
	})
	a.stop()
	if code := a.cmd.ProcessState.ExitCode(); code != exitOK {
		t.Errorf("exit code %d after SIGTERM\n%s", code, a.log)
	}
}
