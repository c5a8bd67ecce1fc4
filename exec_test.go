//go:build unix

package main

// exec_test.go runs real commands, the test binary in its roles or the system's sh: how they start, and how they end.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

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
