//go:build linux

package main

// wine_test.go runs the Windows build under Wine, with everything around it on Linux: the tests look at Wine's processes
// in /proc and kill them. It needs JOB_ITEM_TEST_WINE=1 and Debian's package wine64 (seen with Wine 8.0), and a minute
// at first, to build and to make Wine's folder in the user's cache folder.
//
// What Wine 8 cannot show: Ctrl+Break to a process group (commands are killed at once instead), symbolic links, and
// os.RemoveAll of Go 1.25 and later. For the other tests that are not for Unix only, build with an older Go:
//
//	GOTOOLCHAIN=go1.24.1 GOOS=windows go test -c -o /tmp/test.exe . && wine64 /tmp/test.exe -test.short

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A wine runs Windows programs in a folder of its own.
type wine struct {
	loader string
	env    []string
}

func newWine(t *testing.T) *wine {
	t.Helper()
	if os.Getenv("JOB_ITEM_TEST_WINE") != "1" {
		t.Skip("JOB_ITEM_TEST_WINE is not 1")
	}
	w := &wine{}
	for _, name := range []string{"wine64", "/usr/lib/wine/wine64"} {
		if path, err := exec.LookPath(name); err == nil {
			w.loader = path
			break
		}
	}
	if w.loader == "" {
		t.Skip("there is no wine64")
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Skip(err)
	}
	prefix := filepath.Join(cache, "job_item-wine")
	if err := os.MkdirAll(prefix, 0o700); err != nil {
		t.Fatal(err)
	}
	w.env = append(os.Environ(), "WINEPREFIX="+prefix, "WINEDEBUG=-all", "JOB_ITEM_TEST_MAIN=1")
	system := filepath.Join(prefix, "drive_c", "windows", "system32")
	if _, err := os.Stat(system); err != nil {
		if out, err := w.command("cmd.exe", "/C", "ver").CombinedOutput(); err != nil {
			t.Fatalf("make Wine's folder: %v\n%s", err, out)
		}
	}
	library := filepath.Join(system, "bcryptprimitives.dll")
	if _, err := os.Stat(library); err != nil {
		if err := os.WriteFile(library, randomDLL(), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

func (w *wine) command(args ...string) *exec.Cmd {
	cmd := exec.Command(w.loader, args...)
	cmd.Env = w.env
	return cmd
}

// buildForWindows builds the test binary, which is the program and its tests.
func buildForWindows(t *testing.T) string {
	t.Helper()
	exe := filepath.Join(t.TempDir(), "job_item.exe")
	build := exec.Command("go", "test", "-c", "-o", exe, ".")
	build.Env = append(os.Environ(), "GOOS=windows", "GOARCH=amd64", "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build for Windows: %v\n%s", err, out)
	}
	return exe
}

// randomDLL is the library that programs of Go 1.22 and later take their random numbers from, and that older Wines
// lack: its only function is another name of one that they have.
func randomDLL() []byte {
	const (
		base     = 0x1000 // where the one section is mapped
		library  = "bcryptprimitives.dll\x00"
		function = "ProcessPrng\x00"
		forward  = "advapi32.SystemFunction036\x00"

		addresses = base + 40 // after the export directory: addresses, names and ordinals of one function
		names     = addresses + 4
		ordinals  = names + 4
		texts     = ordinals + 2
	)
	var b bytes.Buffer
	put := func(fields ...any) {
		for _, field := range fields {
			if text, ok := field.(string); ok {
				field = []byte(text)
			}
			binary.Write(&b, binary.LittleEndian, field)
		}
	}
	fill := func(size int) { b.Write(make([]byte, size-b.Len())) }

	put("MZ")
	fill(60)
	put(uint32(64), "PE\x00\x00")
	put(uint16(0x8664), uint16(1), [3]uint32{}, uint16(240), uint16(0x2022)) // amd64, a section, a library
	put(uint16(0x20b), [2]byte{}, [3]uint32{0, 0x200}, [2]uint32{0, base})
	put(uint64(0x180000000), uint32(0x1000), uint32(0x200), [6]uint16{6, 0, 0, 0, 6}, uint32(0))
	put(uint32(2*base), uint32(0x200), uint32(0), uint16(3), uint16(0x160))
	put([4]uint64{1 << 20, 1 << 12, 1 << 20, 1 << 12}, uint32(0), uint32(16))
	size := uint32(texts - base + len(library+function+forward))
	put(uint32(base), size, [30]uint32{}) // of the 16 directories only the first, the exports
	put(".edata\x00\x00", size, uint32(base), uint32(0x200), uint32(0x200), [3]uint32{}, uint32(0x40000040))
	fill(0x200)
	put([3]uint32{}, uint32(texts), uint32(1), uint32(1), uint32(1), uint32(addresses), uint32(names), uint32(ordinals))
	put(uint32(texts+len(library+function)), uint32(texts+len(library)), uint16(0), library+function+forward)
	fill(0x400)
	return b.Bytes()
}

// processesWith gives the processes that have all of these texts in their command line.
func processesWith(texts ...string) []int {
	var pids []int
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range lines {
		line, _ := os.ReadFile(path)
		line = bytes.ReplaceAll(line, []byte{0}, []byte(" "))
		if !slices.ContainsFunc(texts, func(text string) bool { return !bytes.Contains(line, []byte(text)) }) {
			pid, _ := strconv.Atoi(strings.Split(path, "/")[2])
			pids = append(pids, pid)
		}
	}
	return pids
}

// What differs on Windows, as the tests of this package know it.
func TestWineUnits(t *testing.T) {
	w := newWine(t)
	cmd := w.command(buildForWindows(t), "-test.timeout", "60s", "-test.v", "-test.run",
		"^(TestStaleLeaderEnded|TestCommandBoundFromItsCreation|TestHostFaultsOfWindows|TestDataFileIsNoDevice|"+
			"TestListenWaits|TestConnectionRefusedHints|TestMetricsOfProcess)$")
	cmd.Env = append(slices.Clone(cmd.Env), "JOB_ITEM_TEST_MAIN=")
	out, err := cmd.CombinedOutput()
	if passed := bytes.Count(out, []byte("--- PASS")); err != nil || passed != 7 {
		t.Errorf("%d tests have passed, %v\n%s", passed, err, out)
	}
}

// The whole program: its tasks, their limits and ends, and the death of each of its processes.
func TestWineSystem(t *testing.T) {
	w := newWine(t)
	exe := buildForWindows(t)
	mark := strconv.Itoa(100_000 + os.Getpid()) // tells our pings from others
	a := newAgent(t, `
drain_timeout: 500ms
kill_after: 500ms
jobs:
  - {event: hello, cmd: "echo [{{name}}] %JOB_ITEM_EVENT%"}
  - {event: code, cmd: "exit {{n}}"}
  - {event: data, cmd: "type {{task_id}}.json"}
  - {event: family, cmd: "start /b ping -n `+mark+` 127.0.0.1 & ping -n `+mark+` 127.0.0.1", timeout: 1s}
  - {event: wait, cmd: "ping -n `+mark+` 127.0.0.1"}
`)
	config := filepath.Join(a.dir, "config.yaml")
	text, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	a.url = "http://" + regexp.MustCompile(`listen: (\S+)`).FindStringSubmatch(string(text))[1]
	start := func() {
		a.log = &lockedBuffer{}
		a.cmd = w.command(exe, "--config", config)
		a.cmd.Stderr = a.log
		if err := a.cmd.Start(); err != nil {
			t.Fatal(err)
		}
		cmd, gone := a.cmd, make(chan struct{})
		a.gone = gone
		go func() { cmd.Wait(); close(gone) }() // ends with the parent
		t.Cleanup(func() {
			cmd.Process.Kill()
			<-gone
		})
		a.awaitHealth("ok", "")
	}
	pings := func(want bool) {
		t.Helper()
		waitFor(t, 10*time.Second, func() string {
			if pids := processesWith("ping", mark); (len(pids) > 0) != want {
				return fmt.Sprintf("the tasks' processes are %v; want some: %v\n%s", pids, want, a.log)
			}
			return ""
		})
	}
	workers := func() []int {
		return processesWith("child_process", strings.ReplaceAll(a.dir, "/", `\`))
	}
	start()

	version, err := w.command(exe, "version").Output()
	if err != nil || !strings.Contains(string(version), "windows/amd64") {
		t.Errorf("version: %q, %v", version, err)
	}
	status, err := w.command(exe, "status", "--config", config).CombinedOutput()
	if err != nil || !strings.Contains(string(status), "broker   local, connected") {
		t.Errorf("status: %v\n%s", err, status)
	}

	id := a.create("hello", `{"name":"Ada"}`)
	a.wait(id, statusFinish)
	if got := a.output(id); got != "[\"Ada\"] hello\r\n" {
		t.Errorf("hello says %q", got)
	}
	for _, name := range []string{"%PATH%", "a & b", `"`, "^", "a\nb"} {
		refused := a.wait(a.create("hello", `{"name":`+strconv.Quote(name)+`}`), statusError)
		if !strings.Contains(refused.Error, "cmd.exe would interpret") {
			t.Errorf("the name %q: %q", name, refused.Error)
		}
	}
	if code := a.wait(a.create("code", `{"n":7}`), statusError).ExitCode; code == nil || *code != 7 {
		t.Errorf("exit code %v; want 7", code)
	}
	id = a.create("data", `{"name":"%PATH% & more"}`)
	a.wait(id, statusFinish)
	if got := a.output(id); !strings.Contains(got, `{"name":"%PATH% \u0026 more"}`) && !strings.Contains(got, `{"name":"%PATH% & more"}`) {
		t.Errorf("the data file is %q", got)
	}

	a.wait(a.create("family", `{}`), statusTimeout)
	pings(false)
	id = a.create("wait", `{}`)
	pings(true)
	a.post("/job/"+id+"/terminate", "{}")
	a.wait(id, statusTerminate)
	pings(false)

	// A killed worker: its task's processes go with it, and the task runs again.
	id = a.create("wait", `{}`)
	a.wait(id, statusRunning)
	pings(true)
	killed := processesWith("ping", mark)
	if pids := workers(); len(pids) != 1 || syscall.Kill(pids[0], syscall.SIGKILL) != nil {
		t.Fatalf("the workers are %v; want one to kill", pids)
	}
	waitFor(t, 20*time.Second, func() string {
		if v := a.task(id); v.Attempt != 2 || v.Status != statusRunning {
			return "the task does not run again\n" + a.log.String()
		}
		return ""
	})
	for _, pid := range processesWith("ping", mark) {
		if slices.Contains(killed, pid) {
			t.Error("a task's process has survived its worker")
		}
	}

	// A killed parent: everything ends, and the next one goes on.
	a.cmd.Process.Kill()
	<-a.gone
	waitFor(t, 20*time.Second, func() string {
		if len(workers()) > 0 {
			return "the worker survives its parent\n" + a.log.String()
		}
		return ""
	})
	pings(false)
	start()
	a.wait(id, statusRunning)
	pings(true)

	// An interrupt, as Ctrl+C on a console.
	a.cmd.Process.Signal(syscall.SIGINT)
	a.waitGone(20 * time.Second)
	if code := a.cmd.ProcessState.ExitCode(); code != 0 || len(workers()) > 0 {
		t.Errorf("an interrupt ends the program with %d\n%s", code, a.log)
	}
	pings(false)
}
