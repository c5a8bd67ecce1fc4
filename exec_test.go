//go:build unix

package main

// exec_test.go runs real commands: the test binary in the roles below, or the system's sh.

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"
)

func init() {
	roles := map[string]func(args []string) int{
		"exit":             roleExit,
		"ready-then-hang":  roleReadyThenHang,
		"ignore-term":      roleIgnoreTerm,
		"die-by-signal":    roleDieBySignal,
		"spawn-grandchild": roleSpawnGrandchild,
		"leak-stdout":      roleLeakStdout,
		"spew":             roleSpew,
		"print-bytes":      rolePrintBytes,
		"chatter":          roleChatter,
		"split-utf8":       roleSplitUTF8,
		"list-fds":         roleListFDs,
		"copy-stdin":       roleCopyStdin,
	}
	for name, role := range roles {
		testRoles[name] = role
	}
}

func roleExit(args []string) int {
	code, _ := strconv.Atoi(args[0])
	return code
}

// roleReadyThenHang prints its pid and waits for ever.
func roleReadyThenHang([]string) int {
	fmt.Println(os.Getpid())
	return hang()
}

// hang waits for ever in a way that the runtime does not take for a deadlock.
func hang() int {
	for {
		time.Sleep(time.Hour)
	}
}

func roleIgnoreTerm([]string) int {
	signal.Ignore(syscall.SIGTERM)
	return roleReadyThenHang(nil)
}

func roleDieBySignal(args []string) int {
	// By way of sh, since Go ignores some signals.
	err := syscall.Exec("/bin/sh", []string{"sh", "-c", "kill -" + args[0] + " $$"}, nil)
	fmt.Fprintln(os.Stderr, err)
	return 1
}

// roleSpawnGrandchild starts another role in its group with the same stdout, waits for it to be ready, and exits.
func roleSpawnGrandchild(args []string) int { return spawnAndExit(&syscall.SysProcAttr{}, args) }

// roleLeakStdout does the same in a session of its own.
func roleLeakStdout(args []string) int { return spawnAndExit(&syscall.SysProcAttr{Setsid: true}, args) }

func spawnAndExit(attr *syscall.SysProcAttr, args []string) int {
	self, _ := os.Executable()
	ready, readyWrite, _ := os.Pipe()
	child := exec.Command(self, append([]string{"test-role"}, args...)...)
	child.Stdout, child.Stderr, child.SysProcAttr = readyWrite, os.Stdout, attr // its stderr holds our stdout open
	if err := child.Start(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	line, _ := bufio.NewReader(ready).ReadString('\n')
	fmt.Print(line)
	return 0
}

// roleSpew prints its pid and, once its parent has ended, writes to stderr without end.
func roleSpew([]string) int {
	parent := os.Getppid()
	fmt.Println(os.Getpid())
	for os.Getppid() == parent {
		time.Sleep(time.Millisecond)
	}
	for {
		if _, err := os.Stderr.Write(bytes.Repeat([]byte("x"), 1000)); err != nil {
			return 1
		}
	}
}

// rolePrintBytes writes that many bytes: 64-bit numbers, counting up.
func rolePrintBytes(args []string) int {
	total, _ := strconv.Atoi(args[0])
	out := bufio.NewWriterSize(os.Stdout, 100_000)
	var number [8]byte
	for i := 0; i < total/8; i++ {
		binary.BigEndian.PutUint64(number[:], uint64(i))
		out.Write(number[:])
	}
	if out.Flush() != nil {
		return 1
	}
	return 0
}

// roleChatter writes a line every millisecond.
func roleChatter(args []string) int {
	lines, _ := strconv.Atoi(args[0])
	for i := range lines {
		fmt.Println(i)
		time.Sleep(time.Millisecond)
	}
	return 0
}

// roleSplitUTF8 writes its argument byte by byte, slower than output is gathered.
func roleSplitUTF8(args []string) int {
	for _, b := range []byte(args[0]) {
		os.Stdout.Write([]byte{b})
		time.Sleep(outputGather + 30*time.Millisecond)
	}
	return 0
}

// roleListFDs prints what each open descriptor is.
func roleListFDs([]string) int {
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, entry := range entries {
		target, err := os.Readlink("/proc/self/fd/" + entry.Name())
		// Not inherited: what the runtime of this very process needs, and the folder just read.
		if err == nil && !strings.HasPrefix(target, "anon_inode:") && !strings.HasPrefix(target, "/proc/") {
			fmt.Println(entry.Name(), target)
		}
	}
	return 0
}

func roleCopyStdin([]string) int {
	if _, err := io.Copy(os.Stdout, os.Stdin); err != nil {
		return 1
	}
	return 0
}

// roleCommand is a command in one of these roles.
func roleCommand(t testing.TB, args ...string) *command {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return &command{
		argv:      append([]string{self, "test-role"}, args...),
		env:       os.Environ(),
		killAfter: 5 * time.Second,
	}
}

// collected is a command's output, safe to look at while it runs.
type collected struct {
	mu             sync.Mutex // guards all
	stdout, stderr bytes.Buffer
	calls          int
	longest        int
	cut            bool // a call held half a character
}

func (o *collected) take(stream outputStream, data []byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.calls++
	o.longest = max(o.longest, len(data))
	o.cut = o.cut || !utf8.Valid(data)
	if stream == streamStdout {
		o.stdout.Write(data)
	} else {
		o.stderr.Write(data)
	}
}

func (o *collected) text() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.stdout.String()
}

// waitForPID waits for the first line of output, a pid.
func (o *collected) waitForPID(t testing.TB) (pid int) {
	t.Helper()
	waitFor(t, 10*time.Second, func() string {
		line, _, complete := strings.Cut(o.text(), "\n")
		if pid, _ = strconv.Atoi(line); complete && pid > 0 {
			return ""
		}
		return fmt.Sprintf("no pid in output %q", o.text())
	})
	return pid
}

func mustRun(t testing.TB, ctx context.Context, c *command) exitStatus {
	t.Helper()
	status, err := c.run(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if status.left != "" {
		t.Errorf("left behind: %s", status.left)
	}
	return status
}

// endProcess kills a process that a test started; 0 and below would be the test itself and more.
func endProcess(t testing.TB, pid int) {
	t.Helper()
	if pid <= 1 {
		t.Errorf("there is no process %d to end", pid)
		return
	}
	syscall.Kill(pid, syscall.SIGKILL)
}

func alive(pid int) bool { return syscall.Kill(pid, 0) == nil }

// assertGone fails unless no process with that pid is there, or soon will be: whoever adopted it has to wait for it.
func assertGone(t testing.TB, pids ...int) {
	t.Helper()
	for _, pid := range pids {
		waitFor(t, 5*time.Second, func() string {
			if p, ok := processState(pid); !ok || p == 'Z' {
				return ""
			}
			return fmt.Sprintf("process %d is alive", pid)
		})
	}
}

// processState is the state of a process as ps shows it.
func processState(pid int) (state byte, ok bool) {
	out, err := exec.Command("ps", "-o", "stat=", "-p", strconv.Itoa(pid)).Output()
	if text := strings.TrimSpace(string(out)); err == nil && text != "" {
		return text[0], true
	}
	return 0, false
}

// eachWay runs a test for commands that the standard library starts, and for those that a spawner does.
func eachWay(t *testing.T, test func(t *testing.T, spawn *spawner)) {
	t.Run("library", func(t *testing.T) { test(t, nil) })
	t.Run("spawner", func(t *testing.T) {
		spawn := startSpawner()
		defer spawn.close()
		test(t, spawn)
	})
}

func spawning(c *command, spawn *spawner) *command {
	c.spawn = spawn
	return c
}

func TestRunStatus(t *testing.T) {
	eachWay(t, func(t *testing.T, spawn *spawner) {
		for _, row := range []struct {
			args   []string
			code   int
			signal string
		}{
			{[]string{"exit", "0"}, 0, ""},
			{[]string{"exit", "3"}, 3, ""},
			{[]string{"die-by-signal", "9"}, -1, "SIGKILL"},
			{[]string{"die-by-signal", "15"}, -1, "SIGTERM"},
			{[]string{"die-by-signal", strconv.Itoa(int(syscall.SIGXCPU))}, -1, "SIGXCPU"},
		} {
			status := mustRun(t, context.Background(), spawning(roleCommand(t, row.args...), spawn))
			if status.code != row.code || status.signal != row.signal || status.stopped || status.pid < 2 {
				t.Errorf("run %q = %+v; want code %d, signal %q", row.args, status, row.code, row.signal)
			}
			if status.cpu <= 0 || status.cpu > time.Minute || status.maxRSS < 1<<20 || status.maxRSS > 1<<40 {
				t.Errorf("run %q used cpu %v, %d bytes", row.args, status.cpu, status.maxRSS)
			}
		}
	})
}

// A command has the limit on open files that this process was started with, and not the one that Go has raised it to.
func TestRunKeepsLimitOfFiles(t *testing.T) {
	limit := func(spawn *spawner) string {
		var out collected
		mustRun(t, context.Background(), &command{line: "ulimit -Sn; ulimit -Hn", output: out.take, spawn: spawn})
		return out.text()
	}
	spawn := startSpawner()
	defer spawn.close()
	want := limit(nil)
	for i := range 3 {
		if got := limit(spawn); got != want {
			t.Errorf("command %d has the limits %q; want %q", i, got, want)
		}
	}
}

func TestRunLine(t *testing.T) {
	eachWay(t, func(t *testing.T, spawn *spawner) {
		var out collected
		c := &command{line: "echo \"$A-$B\"; pwd; echo err >&2; exit 7", dir: t.TempDir(), output: out.take,
			env: []string{"A=0", "B=2", "A=1", "PATH=/usr/bin:/bin"}, spawn: spawn}
		status := mustRun(t, context.Background(), c)
		want := "1-2\n" + c.dir + "\n"
		if status.code != 7 || out.text() != want || out.stderr.String() != "err\n" {
			t.Errorf("code %d, stdout %q, stderr %q; want 7, %q, \"err\\n\"", status.code, out.text(), out.stderr.String(), want)
		}

		status = mustRun(t, context.Background(), &command{line: "-x || exit 4", spawn: spawn})
		if status.code != 4 {
			t.Errorf("a line that looks like an option: code %d; want 4", status.code)
		}
	})
}

func TestRunStdin(t *testing.T) {
	path := filepath.Join(t.TempDir(), "in")
	if err := os.WriteFile(path, []byte("from a file"), 0o600); err != nil {
		t.Fatal(err)
	}
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for _, row := range []struct {
		stdin io.Reader
		want  string
	}{{nil, ""}, {strings.NewReader("from memory"), "from memory"}, {file, "from a file"}} {
		var out collected
		c := roleCommand(t, "copy-stdin")
		c.stdin, c.output = row.stdin, out.take
		if status := mustRun(t, context.Background(), c); status.code != 0 || out.text() != row.want {
			t.Errorf("stdin copied: %q, code %d; want %q", out.text(), status.code, row.want)
		}
	}
	unread := roleCommand(t, "exit", "0")
	unread.stdin = bytes.NewReader(make([]byte, 10<<20))
	mustRun(t, context.Background(), unread)
}

// Every byte arrives, in order, while memory stays flat.
func TestRunOutputWhole(t *testing.T) {
	total := 200 << 20
	if testing.Short() {
		total = 20 << 20
	}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)

	var next uint64 // the number expected next
	var partial []byte
	var received, longest int
	c := roleCommand(t, "print-bytes", strconv.Itoa(total))
	c.output = func(_ outputStream, data []byte) {
		received += len(data)
		longest = max(longest, len(data))
		for len(data) > 0 {
			if len(partial) > 0 || len(data) < 8 {
				n := min(8-len(partial), len(data))
				partial = append(partial, data[:n]...)
				data = data[n:]
				if len(partial) < 8 {
					continue
				}
			}
			number := partial
			if len(number) == 0 {
				number, data = data[:8], data[8:]
			}
			if got := binary.BigEndian.Uint64(number); got != next {
				t.Errorf("number %d arrived where %d was due", got, next)
				next = got
			}
			next++
			partial = partial[:0]
		}
	}
	status := mustRun(t, context.Background(), c)
	runtime.ReadMemStats(&after)
	if status.code != 0 || received != total || next != uint64(total/8) {
		t.Errorf("code %d, %d bytes, next number %d; want 0, %d, %d", status.code, received, next, total, total/8)
	}
	if longest > outputChunkBytes {
		t.Errorf("a call of %d bytes; want at most %d", longest, outputChunkBytes)
	}
	if allocated := after.TotalAlloc - before.TotalAlloc; allocated > 2<<20 {
		t.Errorf("%d bytes were allocated for the output; want a buffer per stream", allocated)
	}
}

func TestRunOutputInFewCalls(t *testing.T) {
	var out collected
	c := roleCommand(t, "chatter", "500")
	c.output = out.take
	begin := time.Now()
	mustRun(t, context.Background(), c)
	if most := int(time.Since(begin)/outputGather) + 2; out.calls > most || out.calls < 5 {
		t.Errorf("500 lines in %v made %d calls; want 5 to %d", time.Since(begin), out.calls, most)
	}
	if lines := strings.Count(out.text(), "\n"); lines != 500 {
		t.Errorf("%d lines; want 500", lines)
	}
}

func TestRunOutputSoon(t *testing.T) {
	var out collected
	arrived := make(chan time.Time, 1)
	var first time.Time
	c := &command{line: "date +%s%N; exec sleep 100", killAfter: time.Second}
	c.output = func(stream outputStream, data []byte) {
		out.take(stream, data)
		select {
		case arrived <- time.Now():
		default:
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() { // ends at the first output, or with the test
		select {
		case first = <-arrived:
			cancel()
		case <-ctx.Done():
		}
	}()
	mustRun(t, ctx, c)
	nanos, err := strconv.ParseInt(strings.TrimSpace(out.text()), 10, 64)
	if err != nil {
		t.Skip("date has no %N here")
	}
	if delay := first.Sub(time.Unix(0, nanos)); delay > time.Second { // 200 ms, on a machine that has time
		t.Errorf("a lone line of a command that goes on took %v", delay)
	}
}

func TestRunKeepsCharactersWhole(t *testing.T) {
	var out collected
	c := roleCommand(t, "split-utf8", "aé€😀z")
	c.output = out.take
	mustRun(t, context.Background(), c)
	if out.text() != "aé€😀z" || out.cut || out.calls < 4 {
		t.Errorf("got %q in %d calls, cut: %v", out.text(), out.calls, out.cut)
	}

	var raw collected // what is not UTF-8 passes unchanged, an incomplete end too
	mustRun(t, context.Background(), &command{line: `printf '\377\376ok\351\360\237\230'`, output: raw.take})
	if raw.text() != "\xff\xfeok\xe9\xf0\x9f\x98" {
		t.Errorf("got %q", raw.text())
	}
}

func TestCutCharacter(t *testing.T) {
	for text, want := range map[string]int{
		"": 0, "a": 0, "é": 0, "a\xc3": 1, "\xe2\x82": 2, "x\xf0\x9f\x98": 3, "😀": 0, "\xff": 0, "\x80\x80\x80": 0,
		"\xe2\x28": 0, "é\xe2": 1, "\xf0": 1, "\xf8\x88": 0,
	} {
		if got := cutCharacter([]byte(text)); got != want {
			t.Errorf("cutCharacter(%q) = %d; want %d", text, got, want)
		}
	}
}

// startRole runs a role in the background and returns when it has printed its pid.
func startRole(t *testing.T, ctx context.Context, c *command) (pid int, end func() exitStatus) {
	t.Helper()
	var out collected
	c.output = out.take
	ended := make(chan struct{})
	var status exitStatus
	var err error
	go func() { // ends with the command
		defer close(ended)
		status, err = c.run(ctx)
	}()
	pid = out.waitForPID(t)
	return pid, func() exitStatus {
		<-ended
		if err != nil {
			t.Error(err)
		}
		return status
	}
}

func TestRunStopped(t *testing.T) {
	for role, signal := range map[string]string{"ready-then-hang": "SIGTERM", "ignore-term": "SIGKILL"} {
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		c := roleCommand(t, role)
		c.killAfter = 300 * time.Millisecond
		pid, end := startRole(t, ctx, c)
		cancel()
		if status := end(); !status.stopped || status.signal != signal || status.code != -1 || alive(pid) {
			t.Errorf("stop %s: %+v, alive %v; want %s", role, status, alive(pid), signal)
		}
	}
}

// A process that is stopped itself is ended all the same, without waiting for SIGKILL.
func TestRunStopsSuspended(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	c := roleCommand(t, "ready-then-hang")
	c.killAfter = time.Minute
	pid, end := startRole(t, ctx, c)
	syscall.Kill(pid, syscall.SIGSTOP)
	cancel()
	if status := end(); status.signal != "SIGTERM" {
		t.Errorf("%+v; want SIGTERM", status)
	}
}

func TestRunStopsBesideBlockedOutput(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	c := roleCommand(t, "print-bytes", strconv.Itoa(100<<20))
	c.killAfter = 100 * time.Millisecond
	pids := make(chan int, 1)
	c.started = func(p processIdentity) error { pids <- p.PID; return nil }
	blocked, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	c.output = func(outputStream, []byte) { once.Do(func() { close(blocked) }); <-release }
	ended := make(chan exitStatus, 1)
	go func() { // ends with the command
		status, err := c.run(ctx)
		if err != nil {
			t.Error(err)
		}
		ended <- status
	}()
	pid := <-pids
	<-blocked
	cancel()
	assertGone(t, pid)
	select {
	case <-ended:
		t.Error("run returned before the output callback did")
	default:
	}
	close(release)
	if status := <-ended; !status.stopped {
		t.Errorf("%+v; want stopped", status)
	}
}

// Hurry is for all of the group, also when its leader has ended already.
func TestRunHurriesWhatIsLeft(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	hurry := make(chan struct{})
	c := roleCommand(t, "spawn-grandchild", "ignore-term")
	c.killAfter, c.hurry = time.Minute, hurry
	pid, end := startRole(t, ctx, c)
	cancel()
	close(hurry)
	begin := time.Now()
	if status := end(); status.left != "" || time.Since(begin) > 5*time.Second {
		t.Errorf("%+v after %v", status, time.Since(begin))
	}
	assertGone(t, pid)
}

func TestRunEndsWhatIsLeft(t *testing.T) {
	within := 6 * time.Second
	for _, role := range []string{"ready-then-hang", "ignore-term"} {
		var out collected
		c := roleCommand(t, "spawn-grandchild", role)
		c.killAfter, c.output = 500*time.Millisecond, out.take
		begin := time.Now()
		status := mustRun(t, context.Background(), c)
		grandchild := out.waitForPID(t)
		if status.code != 0 || status.stopped || time.Since(begin) > within {
			t.Errorf("left %s: %+v after %v; want 0 within %v", role, status, time.Since(begin), within)
		}
		if state, there := processState(grandchild); there && state != 'Z' {
			t.Errorf("left %s: process %d is alive (%c) after run", role, grandchild, state)
		}
	}
}

// A process that has left the group lives on, and neither its silence nor its noise holds run up.
func TestRunLeakedStdout(t *testing.T) {
	for _, role := range []string{"ready-then-hang", "spew"} {
		var out collected
		c := roleCommand(t, "leak-stdout", role)
		c.output = func(stream outputStream, data []byte) {
			if out.text() == "" {
				out.take(stream, data)
			}
		}
		begin := time.Now()
		mustRun(t, context.Background(), c)
		took := time.Since(begin)
		pid := out.waitForPID(t)
		if !alive(pid) && role != "spew" { // that one dies of SIGPIPE
			t.Errorf("%s was ended", role)
		}
		endProcess(t, pid)
		assertGone(t, pid)
		if took > 5*time.Second {
			t.Errorf("%s held run for %v", role, took)
		}
	}
}

// What was in the pipe when the group ended is handed over, however slow the callback and whoever holds the pipe.
func TestRunLosesNothingAtTheEnd(t *testing.T) {
	var received int
	c := &command{output: func(_ outputStream, data []byte) {
		time.Sleep(600 * time.Millisecond) // this is the slow callback
		received += len(data)
	}}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c.line = fmt.Sprintf("'%s' test-role leak-stdout ready-then-hang; head -c 150000 /dev/zero", self)
	var pid int
	output := c.output
	c.output = func(stream outputStream, data []byte) {
		if pid == 0 {
			line, _, _ := strings.Cut(string(data), "\n")
			pid, _ = strconv.Atoi(line)
			received -= len(line) + 1
		}
		output(stream, data)
	}
	mustRun(t, context.Background(), c)
	endProcess(t, pid)
	if received != 150000 {
		t.Errorf("%d bytes arrived; want 150000", received)
	}
}

func TestRunStartedCallback(t *testing.T) {
	c := roleCommand(t, "ready-then-hang")
	refusal := errors.New("the disk is full")
	var pid int
	var out collected
	c.output = out.take
	c.started = func(p processIdentity) error {
		if out.text() != "" {
			t.Error("output came before started")
		}
		if pid = p.PID; !alive(pid) || p != identifyProcess(pid) {
			t.Errorf("started with %+v; want %+v", p, identifyProcess(pid))
		}
		if (runtime.GOOS == "linux" || runtime.GOOS == "darwin") && (p.Start == "" || p.Boot == "") {
			t.Errorf("%+v lacks a part", p)
		}
		return refusal
	}
	status, err := c.run(context.Background())
	if !errors.Is(err, refusal) || status.signal != "SIGKILL" || status.pid != pid || alive(pid) {
		t.Errorf("run = %+v, %v; want it killed for %v", status, err, refusal)
	}
}

func TestRunAlreadyStopped(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	c := roleCommand(t, "exit", "0")
	c.started = func(processIdentity) error { t.Error("it was started"); return nil }
	if status, err := c.run(ctx); err != nil || !status.stopped || status.pid != 0 || status.code != -1 {
		t.Errorf("run = %+v, %v; want stopped without a pid", status, err)
	}
}

func TestRunCannotStart(t *testing.T) {
	eachWay(t, func(t *testing.T, spawn *spawner) {
		dir := t.TempDir()
		write := func(name, text string, mode os.FileMode) string {
			path := filepath.Join(dir, name)
			if err := os.WriteFile(path, []byte(text), mode); err != nil {
				t.Fatal(err)
			}
			return path
		}
		plain := write("plain", "#!/bin/sh\n", 0o644)
		crlf := write("crlf", "#!/bin/sh\r\n", 0o755)
		lost := write("lost", "#! /no/such/interpreter -x\n", 0o755)
		foreign := write("foreign", "\x00\x01MZ\x00", 0o755)
		busy := write("busy", "#!/bin/sh\n", 0o755)
		if runtime.GOOS == "linux" {
			file, err := os.OpenFile(busy, os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
		}
		for _, row := range []struct {
			c    command
			want []string // parts of the error and its hint
		}{
			{command{argv: []string{}}, []string{"empty"}},
			{command{argv: []string{""}}, []string{"empty"}},
			{command{argv: []string{"no-such-program"}, env: []string{"PATH=/usr/bin:/nowhere"}},
				[]string{`"no-such-program"`, `PATH "/usr/bin:/nowhere"`, "install it"}},
			{command{argv: []string{"./none"}, dir: dir}, []string{`"./none"`, "no such file", "working folder"}},
			{command{argv: []string{"./plain"}, dir: dir}, []string{plain, "may not be executed", "chmod +x"}},
			{command{argv: []string{"plain"}, env: []string{"PATH=" + dir}}, []string{plain, "may not be executed", "chmod +x"}},
			{command{argv: []string{dir}}, []string{dir, "it is a folder"}},
			{command{argv: []string{crlf}}, []string{`/bin/sh\r`, "Windows editor"}},
			{command{argv: []string{lost}}, []string{`"/no/such/interpreter"`, "first line"}},
			{command{argv: []string{foreign}}, []string{runtime.GOARCH, "install the build"}},
			{command{argv: []string{"sh"}, dir: filepath.Join(dir, "none")}, []string{"working folder", "working_dir"}},
			{command{line: "true", dir: plain}, []string{"not a folder", "working_dir"}},
			{command{line: "true " + strings.Repeat("x", 4<<20)}, []string{"too long", "task_id"}},
			{command{argv: []string{"sh", "a\x00b"}}, []string{"NUL"}},
			{command{line: "true", env: []string{"A=a\x00b"}}, []string{"NUL"}},
			{command{argv: []string{busy}}, []string{busy, "busy", "open for writing"}},
		} {
			if strings.Contains(fmt.Sprint(row.want), "busy") && runtime.GOOS != "linux" {
				continue
			}
			row.c.output, row.c.spawn = func(outputStream, []byte) {}, spawn
			status, err := row.c.run(context.Background())
			if err == nil || codeOf(err) != codeExec || status.code != -1 || status.stopped {
				t.Errorf("run %q = %+v, %v [%s]; want %s", row.c.argv, status, err, codeOf(err), codeExec)
				continue
			}
			for _, want := range row.want {
				if text := err.Error() + "\n" + hintOf(err); !strings.Contains(text, want) {
					t.Errorf("run %q: %s; want %q in it", row.c.argv, text, want)
				}
			}
		}
	})
}

func TestRunScriptWithoutInterpreter(t *testing.T) {
	path := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(path, []byte("echo \"$1\"; exit 5\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	var out collected
	status := mustRun(t, context.Background(), &command{argv: []string{path, "a b"}, output: out.take})
	if status.code != 5 || out.text() != "a b\n" {
		t.Errorf("code %d, output %q; want 5, \"a b\\n\"", status.code, out.text())
	}
}

// What the system is short of for a moment only delays the start.
func TestRunStartsWhenItCan(t *testing.T) {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	restore := func() {
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
			t.Error(err)
		}
	}
	restore()                                                     // the runtime stops managing the limit from here on
	mustRun(t, context.Background(), roleCommand(t, "exit", "0")) // and has opened what it needs itself
	time.AfterFunc(time.Hour, func() {}).Stop()
	low := limit
	low.Cur = 3
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &low); err != nil {
		t.Fatal(err)
	}
	c := &command{line: "exit 6", output: func(outputStream, []byte) {}}
	_, err := c.run(context.Background())
	if codeOf(err) != codeExec || !strings.Contains(hintOf(err), "open files") {
		t.Errorf("run without descriptors: %v, hint %q", err, hintOf(err))
	}
	timer := time.AfterFunc(100*time.Millisecond, restore)
	defer timer.Stop()
	status, err := c.run(context.Background())
	if err != nil || status.code != 6 {
		restore()
		t.Fatalf("run = %+v, %v; want code 6 once there were descriptors", status, err)
	}
}

func TestLookProgram(t *testing.T) {
	dir := t.TempDir()
	for _, path := range []string{"bin/tool", "other/tool", "here", "blocked/tool", "folder/tool/x"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, path)), 0o755); err != nil {
			t.Fatal(err)
		}
		mode := os.FileMode(0o755)
		if strings.HasPrefix(path, "blocked") {
			mode = 0o644
		}
		if err := os.WriteFile(filepath.Join(dir, path), nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	for _, row := range []struct {
		name, path, want string
	}{
		{"tool", "/nowhere:" + dir + "/bin", "bin/tool"},
		{"tool", dir + "/other:" + dir + "/bin", "other/tool"},
		{"tool", "bin", "bin/tool"},
		{"tool", dir + "/blocked:" + dir + "/folder:" + dir + "/here:bin", "bin/tool"},
		{"here", ":/usr/bin", "here"},
		{"here", "", "here"},
		{"here", "/usr/bin:.", "here"},
		{"./here", "/usr/bin", "here"},
		{"bin/tool", "/usr/bin", "bin/tool"},
		{dir + "/bin/../here", "/usr/bin", "here"},
		{"here", "/usr/bin", ""},
		{"tool", dir + "/folder", ""},
		{"tool", dir + "/blocked", ""},
		{"bin", dir, ""},
	} {
		got, err := lookProgram(row.name, dir, []string{"PATH=/wrong", "PATH=" + row.path})
		if want := filepath.Join(dir, row.want); row.want != "" && (err != nil || got != want) {
			t.Errorf("lookProgram(%q) in PATH %q = %q, %v; want %q", row.name, row.path, got, err, want)
		} else if row.want == "" && codeOf(err) != codeExec {
			t.Errorf("lookProgram(%q) in PATH %q = %q, %v; want %s", row.name, row.path, got, err, codeExec)
		}
	}
	if got, err := lookProgram("sh", "", []string{"A=b"}); err != nil || !filepath.IsAbs(got) {
		t.Errorf("lookProgram without a PATH = %q, %v", got, err)
	}
	if !hasShell() {
		t.Error("hasShell() = false here")
	}
}

// Nothing is left over from many commands at once: no goroutine, no descriptor.
func TestRunLeavesNothing(t *testing.T) {
	mustRun(t, context.Background(), roleCommand(t, "exit", "0")) // the runtime opens what it needs for good
	goroutines, descriptors := runtime.NumGoroutine(), countDescriptors()
	spawn := startSpawner()
	var group sync.WaitGroup
	var wrong atomic.Int64
	for range 8 {
		group.Add(1)
		go func() { // ends after its share
			defer group.Done()
			for range 20 {
				var out collected
				c := &command{line: "echo out; echo err >&2; exit 2", spawn: spawn, output: out.take}
				c.stdin = strings.NewReader("x")
				status, err := c.run(context.Background())
				if err != nil || status.code != 2 || out.text() != "out\n" || out.stderr.String() != "err\n" {
					wrong.Add(1)
				}
			}
		}()
	}
	group.Wait()
	spawn.close()
	if wrong.Load() > 0 {
		t.Errorf("%d of 160 runs went wrong", wrong.Load())
	}
	waitFor(t, 5*time.Second, func() string {
		if now := runtime.NumGoroutine(); now > goroutines {
			return fmt.Sprintf("%d goroutines, %d before", now, goroutines)
		}
		return ""
	})
	if now := countDescriptors(); now > descriptors {
		t.Errorf("%d descriptors, %d before", now, descriptors)
	}
}

func countDescriptors() int {
	entries, _ := os.ReadDir("/dev/fd")
	return len(entries)
}

// BenchmarkRunTrue compares run with the bare os/exec loop that it replaces, in turns.
func BenchmarkRunTrue(b *testing.B) {
	path, err := exec.LookPath("true")
	if err != nil {
		b.Fatal(err)
	}
	spawn := startSpawner()
	defer spawn.close()
	discard := func(outputStream, []byte) {}
	started := func(processIdentity) error { return nil }
	variants := []struct {
		name string
		run  func() error
	}{
		{"raw", func() error {
			var out, errOut bytes.Buffer
			cmd := exec.Command(path)
			cmd.SysProcAttr, cmd.Stdout, cmd.Stderr = &syscall.SysProcAttr{Setpgid: true}, &out, &errOut
			return cmd.Run()
		}},
		{"run", func() error {
			_, err := (&command{argv: []string{path}, output: discard, started: started}).run(context.Background())
			return err
		}},
		{"spawner", func() error {
			_, err := (&command{argv: []string{path}, output: discard, started: started, spawn: spawn}).run(context.Background())
			return err
		}},
	}
	for _, concurrency := range []int{1, 8} {
		b.Run(fmt.Sprint("concurrency=", concurrency), func(b *testing.B) {
			var took [3]time.Duration
			for done := 0; done < b.N; {
				batch := min(b.N-done, 100)
				for i, variant := range variants {
					begin := time.Now()
					var group sync.WaitGroup
					var next atomic.Int64
					for range concurrency {
						group.Add(1)
						go func() { // ends when the batch is done
							defer group.Done()
							for next.Add(1) <= int64(batch) {
								if err := variant.run(); err != nil {
									b.Error(err)
								}
							}
						}()
					}
					group.Wait()
					took[i] += time.Since(begin)
				}
				done += batch
			}
			for i, variant := range variants {
				b.ReportMetric(float64(took[i].Microseconds())/float64(b.N), variant.name+"-µs/op")
			}
			b.ReportMetric(float64(took[1])/float64(took[0]), "run/raw")
			b.ReportMetric(float64(took[2])/float64(took[0]), "spawner/raw")
		})
	}
}
