//go:build unix

package main

// exec_roles_test.go holds what the tests of exec.go run: the test binary in the roles below, and how it is started and
// looked at.

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"sync"
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
