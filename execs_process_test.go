//go:build unix

package main

// execs_process_test.go runs child_execs_process as its parent does, over its pipes, and by hand.

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// An execsChild is child_execs_process and its parent's ends of the pipes.
type execsChild struct {
	t       *testing.T
	cmd     *exec.Cmd
	orders  io.WriteCloser
	notices *os.File
	log     *lockedBuffer
	gone    chan struct{}

	mu    sync.Mutex // guards what the notices said last
	said  notice
	alive int
}

func startExecsChild(t *testing.T, cfg *Config, env ...string) *execsChild {
	t.Helper()
	c := &execsChild{t: t, log: &lockedBuffer{}, gone: make(chan struct{})}
	c.cmd = cliCommand(t, env, "child_execs_process", "--config", cfg.File, "--supervised")
	c.cmd.Stderr = c.log
	return c.start(cfg)
}

// start starts the program as the parent does.
func (c *execsChild) start(cfg *Config) *execsChild {
	t := c.t
	t.Helper()
	var err error
	if c.orders, err = c.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	c.cmd.Stdout, c.notices = write, read
	leak, err := os.Open(os.DevNull) // as the listening socket would be
	if err != nil {
		t.Fatal(err)
	}
	c.cmd.ExtraFiles = []*os.File{leak}
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	write.Close()
	leak.Close()
	go c.follow() // ends with the child, or when notices is closed
	go func() {   // ends with the child
		c.cmd.Wait()
		close(c.gone)
	}()
	t.Cleanup(func() {
		c.cmd.Process.Kill()
		<-c.gone
		read.Close()
	})
	c.tell(order{Config: cfg})
	return c
}

func (c *execsChild) follow() {
	for reader := newLineReader(c.notices); ; {
		var n notice
		if reader.next(&n) != nil {
			return
		}
		c.mu.Lock()
		if n.Execs != nil {
			c.said.Execs = n.Execs
		}
		c.said.Shutdown = c.said.Shutdown || n.Shutdown
		c.said.Failed = c.said.Failed || n.Failed
		if n.Alive {
			c.alive++
		}
		c.mu.Unlock()
	}
}

func (c *execsChild) tell(o order) {
	c.t.Helper()
	if err := writeLine(c.orders, o); err != nil {
		c.t.Fatal(err)
	}
}

// await waits until the notices have said what is wanted.
func (c *execsChild) await(want func(n notice) bool) notice {
	c.t.Helper()
	var n notice
	waitFor(c.t, 10*time.Second, func() string {
		c.mu.Lock()
		defer c.mu.Unlock()
		if n = c.said; !want(n) {
			return fmt.Sprintf("said %+v\n%s", n, c.log)
		}
		return ""
	})
	return n
}

// awaitGone waits for the end and gives the exit code.
func (c *execsChild) awaitGone() int {
	c.t.Helper()
	select {
	case <-c.gone:
	case <-time.After(10 * time.Second):
		c.t.Fatalf("child_execs_process did not end\n%s", c.log)
	}
	return c.cmd.ProcessState.ExitCode()
}

// allRunning wants every exec to run.
func allRunning(n notice) bool {
	for _, h := range n.Execs {
		if h.State != execRunning || h.PID == 0 {
			return false
		}
	}
	return len(n.Execs) > 0
}

// execsConfig loads a configuration as the parent would.
func execsConfig(t *testing.T, text string) *Config {
	t.Helper()
	a := &agent{t: t, dir: t.TempDir()}
	a.write("config.yaml", text)
	cfg, err := loadConfig(filepath.Join(a.dir, "config.yaml"), os.LookupEnv)
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// lines are the data of an exec's lines in the log.
func (c *execsChild) lines(key string) (lines []string) {
	for _, line := range strings.Split(c.log.String(), "\n") {
		var record struct{ Msg, Exec, Data string }
		if json.Unmarshal([]byte(line), &record) == nil && record.Msg == "exec output" && record.Exec == key {
			lines = append(lines, record.Data)
		}
	}
	return lines
}

// TestExecsChild shows what an exec sees, what the parent hears, and the orders.
func TestExecsChild(t *testing.T) {
	cfg := execsConfig(t, `
log_format: json
credential: {project_id: p, secret_key: hush}
execs:
  - {key: env, cmd: 'env; echo "dir $(pwd)"; cat; echo "end of stdin"', working_dir: sub, env: {OWN: "a b", HOME: /x}}
  - {key: files, cmd: 'for i in 3 4 5 6 7 8 9 10 11 12 13 14 15; do test -e /dev/fd/$i && echo $i $(readlink /dev/fd/$i); done; echo end'}
  - {key: long, cmd: "head -c 100000 /dev/zero | tr '\\0' x; printf 'a\\377b\\n\\nend' >&2"}
  - {key: stubborn, cmd: 'trap "" TERM; sleep 600 & echo $!; wait; sleep 600'}
kill_after: 1m
`)
	if err := os.Mkdir(filepath.Join(cfg.Dir, "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	c := startExecsChild(t, cfg, "NOTIFY_SOCKET=/nowhere", "WATCHDOG_USEC=1", "INHERITED=yes")
	n := c.await(func(n notice) bool {
		return len(n.Execs) == 4 && n.Execs[0].State == execFinished && n.Execs[1].State == execFinished &&
			n.Execs[2].State == execFinished && n.Execs[3].State == execRunning
	})
	waitFor(t, 5*time.Second, func() string { // the log comes by a way of its own
		if log := c.log.String(); strings.Count(log, "exec has finished") < 3 || len(c.lines("stubborn")) < 1 {
			return log
		}
		return ""
	})
	env := "\n" + strings.Join(c.lines("env"), "\n") + "\n"
	for _, want := range []string{
		"OWN=a b", "HOME=/x", "INHERITED=yes", "JOB_ITEM_APP_ID=p", "JOB_ITEM_BASE_URL=http://127.0.0.1:8080",
		"JOB_ITEM_CREATE_URL=http://127.0.0.1:8080/job/create", "end of stdin",
	} {
		if !strings.Contains(env, "\n"+want+"\n") {
			t.Errorf("an exec lacks %s:%s", want, env)
		}
	}
	for _, unwanted := range []string{"NOTIFY_SOCKET", "WATCHDOG", "hush"} {
		if strings.Contains(env, unwanted) {
			t.Errorf("an exec finds %s:%s", unwanted, env)
		}
	}
	if real, _ := filepath.EvalSymlinks(filepath.Join(cfg.Dir, "sub")); !strings.Contains(env, "dir "+real+"\n") {
		t.Errorf("an exec ran elsewhere:%s", env)
	}
	files := slices.DeleteFunc(c.lines("files"), func(line string) bool {
		return raceEnabled && strings.Contains(line, "/proc/") // the race detector itself opens these, now and then
	})
	if !reflect.DeepEqual(files, []string{"end"}) {
		t.Errorf("an exec inherited the files %q", files)
	}
	long := map[string]int{}
	for _, line := range c.lines("long") {
		long[line]++
	}
	piece := strings.Repeat("x", outputChunkBytes)
	if long[piece] != 3 || long[piece[:100000-3*len(piece)]] != 1 || long["a\ufffdb"] != 1 || long[""] != 1 || long["end"] != 1 {
		t.Errorf("a long line came as %.300q", c.lines("long"))
	}

	waitFor(t, 5*time.Second, func() string {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.alive == 0 {
			return "no sign of life"
		}
		return ""
	})
	sleeper, _ := strconv.Atoi(c.lines("stubborn")[0])
	c.tell(order{Drain: true})
	c.tell(order{Kill: true})
	if code := c.awaitGone(); code != 0 {
		t.Errorf("ended with %d\n%s", code, c.log)
	}
	assertGone(t, n.Execs[3].PID, sleeper)
	if last := c.await(func(n notice) bool { return n.Execs[3].State == execStopped }); last.Shutdown {
		t.Errorf("said %+v", last)
	}
}

// The parent is gone with its ends of all pipes: the execs are stopped all the same, and gracefully.
func TestExecsChildWithoutParent(t *testing.T) {
	cfg := execsConfig(t, `
execs:
  - {key: a, cmd: 'trap "sleep 0.1; echo bye; echo ended > ended; exit" TERM; echo ready > ready; while :; do sleep 0.02; done'}
`)
	stderr, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	c := &execsChild{t: t, log: &lockedBuffer{}, gone: make(chan struct{})}
	c.cmd = cliCommand(t, nil, "child_execs_process", "--config", cfg.File, "--supervised")
	c.cmd.Stderr = write
	c.start(cfg)
	write.Close()
	n := c.await(allRunning)
	waitFor(t, 5*time.Second, func() string {
		if _, err := os.Stat(filepath.Join(cfg.Dir, "ready")); err != nil {
			return err.Error()
		}
		return ""
	})
	c.notices.Close()
	stderr.Close()
	c.orders.Close()
	if code := c.awaitGone(); code != 0 {
		t.Errorf("ended with %d\n%s", code, c.log)
	}
	assertGone(t, n.Execs[0].PID)
	if _, err := os.Stat(filepath.Join(cfg.Dir, "ended")); err != nil {
		t.Errorf("the exec did not end by itself: %v\n%s", err, c.log)
	}
}

// TestExecsChildReload hands changed configurations down, to no execs at all and back.
func TestExecsChildReload(t *testing.T) {
	cfg := execsConfig(t, "execs: [{key: a, cmd: sleep 600}, {key: b, cmd: sleep 600}]")
	c := startExecsChild(t, cfg)
	before := c.await(allRunning)
	next := *cfg
	next.Execs = cfg.Execs[:1]
	c.tell(order{Config: &next})
	after := c.await(func(n notice) bool { return len(n.Execs) == 1 })
	if after.Execs[0] != before.Execs[0] {
		t.Errorf("the one left alone is %+v, and was %+v", after.Execs[0], before.Execs[0])
	}
	assertGone(t, before.Execs[1].PID)
	next.Execs = nil
	c.tell(order{Config: &next})
	c.await(func(n notice) bool { return n.Execs != nil && len(n.Execs) == 0 })
	assertGone(t, before.Execs[0].PID)
	c.tell(order{Config: cfg, Pending: true}) // not to be taken up
	c.tell(order{Config: &Config{Execs: []Exec{{Key: "c", Cmd: "exit 3", WorkingDir: cfg.Dir, CascadeExit: true}}}})
	if n := c.await(func(n notice) bool { return n.Shutdown }); !n.Failed || n.Execs[0].State != execFailed {
		t.Errorf("the end of a cascade is said as %+v", n)
	}
	c.tell(order{Drain: true})
	if code := c.awaitGone(); code != 0 {
		t.Errorf("ended with %d\n%s", code, c.log)
	}
}

// What a killed child_execs_process leaves running is ended by the next before it starts the same again.
func TestExecsChildKilled(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("the leader survives, and nothing else is to be shown")
	}
	cfg := execsConfig(t, "execs: [{key: a, cmd: 'sleep 600 & sleep 600; true'}]\nkill_after: 1s")
	c := startExecsChild(t, cfg)
	first := c.await(allRunning)
	leader := first.Execs[0].PID
	waitFor(t, 5*time.Second, func() string {
		if members, _ := groupMembers(leader); len(members) < 3 {
			return fmt.Sprintf("the group is %q", members)
		}
		return ""
	})
	c.cmd.Process.Kill()
	c.awaitGone()
	assertGone(t, leader)
	if members, _ := groupMembers(leader); len(members) != 2 {
		t.Fatalf("of the killed one remain %q", members)
	}

	c = startExecsChild(t, cfg)
	c.await(allRunning)
	if members, _ := groupMembers(leader); len(members) > 0 {
		t.Errorf("of the killed one remain %q", members)
	}

	// A third finds the execs running and waits until the second has ended.
	third := startExecsChild(t, cfg)
	waitFor(t, 5*time.Second, func() string {
		if !strings.Contains(third.log.String(), "another process still runs the execs") {
			return third.log.String()
		}
		return ""
	})
	if n := third.await(func(n notice) bool { return n.Execs != nil }); n.Execs[0].State != execStarting {
		t.Errorf("beside another process the exec is %+v", n.Execs[0])
	}
	c.cmd.Process.Signal(syscall.SIGTERM)
	if code := c.awaitGone(); code != 0 {
		t.Errorf("ended with %d\n%s", code, c.log)
	}
	third.await(allRunning)
	third.orders.Close()
	third.awaitGone()
}

// By hand the manager is asked for the project, too.
func TestExecsByHandWithManager(t *testing.T) {
	manager := newFakeManager(t, "uuid-of-project")
	a := newAgent(t, manager.config()+"execs: [{key: a, cmd: 'echo I am $JOB_ITEM_APP_ID', cascade_exit: true}]")
	got := runCLI(t, nil, "", "child_execs_process", "-c", filepath.Join(a.dir, "config.yaml"))
	if got.code != 0 || strings.Count(got.stderr, `data="I am uuid-of-project"`) != 1 {
		t.Errorf("ended as %+v", got)
	}
}

// TestExecsByHand runs child_execs_process without a parent.
func TestExecsByHand(t *testing.T) {
	for _, row := range []struct {
		config string
		code   int
		log    string
	}{
		{"execs: [{key: a, cmd: 'true', cascade_exit: true}, {key: b, cmd: sleep 600}]", 0, `msg="exec stopped" exec=b`},
		{"execs: [{key: a, cmd: 'exit 7', attempt: 0, cascade_exit: true}]\ndata_dir: config.yaml", 1, "code=ERR-26112300852"},
		{"execs: [{key: a}]", 2, "execs[0].cmd"},
	} {
		a := &agent{t: t, dir: t.TempDir()}
		a.write("config.yaml", row.config)
		got := runCLI(t, nil, "", "child_execs_process", "-c", filepath.Join(a.dir, "config.yaml"))
		if got.code != row.code || got.stdout != "" || !strings.Contains(got.stderr, row.log) {
			t.Errorf("%s ended as %+v; want %d and %q", row.config, got, row.code, row.log)
		}
	}
	if got := runCLI(t, nil, "", "child_execs_process", "--supervised"); got.code != 1 || !strings.Contains(got.stderr, "ERR-26112300803") {
		t.Errorf("without a parent, --supervised ended as %+v", got)
	}
}
