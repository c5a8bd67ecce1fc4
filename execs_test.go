//go:build unix

package main

// execs_test.go runs background processes: the loop that keeps one running with short pauses, and child_execs_process
// as its parent does, over its pipes.

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

func TestLineSplitter(t *testing.T) {
	long := strings.Repeat("x", outputChunkBytes)
	for _, row := range []struct {
		chunks []string
		want   []string
	}{
		{nil, nil},
		{[]string{"a\nb\n"}, []string{"a", "b"}},
		{[]string{"a", "b", "\n\n", "c"}, []string{"ab", "", "c"}},
		{[]string{"a\r", "\nb\r\n"}, []string{"a", "b"}},
		{[]string{"\xff\xfe\n\xc3"}, []string{"\xff\xfe", "\xc3"}},
		{[]string{long, "\n", "y\n"}, []string{long, "y"}},
		{[]string{long, "\ny"}, []string{long, "y"}},
		{[]string{long + long + "z\n"}, []string{long, long, "z"}},
		{[]string{long[1:] + "ä\n"}, []string{long[1:], "ä"}},
		{[]string{long[1:], "\xc3", "\xa4", long[2:], "\n"}, []string{long[1:], "ä" + long[2:]}},
		{[]string{long, long, "\r\n\n"}, []string{long, long, ""}},
	} {
		var got []string
		s := lineSplitter{line: func(line []byte) { got = append(got, string(line)) }}
		for _, chunk := range row.chunks {
			s.write([]byte(chunk))
		}
		s.end()
		if !reflect.DeepEqual(got, row.want) {
			t.Errorf("lines of %.20q are %.200q; want %.200q", row.chunks, got, row.want)
		}
	}
}

// testExecs is an execSet with a folder and a log of its own.
type testExecs struct {
	*execSet
	t   *testing.T
	cfg *Config
	log *lockedBuffer
	dir string
}

func newTestExecs(t *testing.T, pauses execPauses, execs ...Exec) *testExecs {
	t.Helper()
	dir := t.TempDir()
	cfg := defaultConfig()
	cfg.Execs, cfg.Listen, cfg.KillAfter = execs, "127.0.0.1:1", 300*time.Millisecond
	for i := range execs {
		execs[i].WorkingDir = filepath.Join(dir, execs[i].WorkingDir)
	}
	e := &testExecs{t: t, cfg: cfg, log: &lockedBuffer{}, dir: dir}
	e.execSet = newExecSet(filepath.Join(dir, "data"), cfg.KillAfter, pauses, newLogger(e.log, cfg))
	stopped := sync.OnceFunc(e.execSet.stop)
	t.Cleanup(stopped)
	e.apply(cfg)
	return e
}

// health is one exec's, by its key.
func (e *testExecs) health(key string) execHealth {
	all, _ := e.report()
	for _, h := range all {
		if h.Key == key {
			return h
		}
	}
	return execHealth{}
}

// await waits until an exec is in a state.
func (e *testExecs) await(key, state string) execHealth {
	e.t.Helper()
	var h execHealth
	waitFor(e.t, 10*time.Second, func() string {
		if h = e.health(key); h.State != state {
			return fmt.Sprintf("exec %s is %+v; want %s\n%s", key, h, state, e.log)
		}
		return ""
	})
	return h
}

func (e *testExecs) file(name string) string {
	text, _ := os.ReadFile(filepath.Join(e.dir, name))
	return string(text)
}

var quickPauses = execPauses{first: 10 * time.Millisecond, longest: 25 * time.Millisecond, steady: time.Minute}

// TestExecEnds lets execs end in every way there is.
func TestExecEnds(t *testing.T) {
	e := newTestExecs(t, quickPauses,
		Exec{Key: "fail", Cmd: "echo run >> fail; printf half; exit 3", Attempt: 3},
		Exec{Key: "never", Cmd: "echo run >> never; exit 1", Attempt: 0},
		Exec{Key: "signal", Cmd: "kill -SEGV $$", Attempt: 1},
		Exec{Key: "lost", Cmd: "true", WorkingDir: "nowhere", Attempt: 1},
		Exec{Key: "good", Cmd: "echo run >> good; echo bad >&2", Attempt: 3},
		Exec{Key: "mended", Cmd: "echo run >> mended; test $(wc -l < mended) = 3", Attempt: 3},
	)
	for key, want := range map[string]execHealth{
		"fail": {State: execFailed, Restarts: 3}, "never": {State: execFailed}, "signal": {State: execFailed, Restarts: 1},
		"lost": {State: execFailed, Restarts: 1}, "good": {State: execFinished}, "mended": {State: execFinished, Restarts: 2},
	} {
		want.Key = key
		if got := e.await(key, want.State); got != want {
			t.Errorf("exec ended as %+v; want %+v", got, want)
		}
	}
	for name, want := range map[string]int{"fail": 4, "never": 1, "good": 1, "mended": 3} {
		if got := strings.Count(e.file(name), "run"); got != want {
			t.Errorf("%s ran %d times; want %d", name, got, want)
		}
	}
	log := e.log.String()
	for _, want := range []string{
		`msg="exec output" exec=fail data=half`, `msg="exec output" exec=good stream=stderr data=bad`,
		`exec=fail err="run exec \"fail\": exit code 3" code=ERR-26112300850 `, "pause=10ms attempt=1", "pause=20ms attempt=2",
		"pause=25ms attempt=3", `msg="exec is given up" exec=fail err="run exec \"fail\": exit code 3" code=ERR-26112300851`,
		`killed by SIGSEGV`, `exec=lost err="enter working folder: `, "code=ERR-303509T3200", `msg="exec has finished" exec=good`,
	} {
		if !strings.Contains(log, want) {
			t.Errorf("the log lacks %s\n%s", want, log)
		}
	}
	if _, over := e.report(); over.ended {
		t.Error("an exec without cascade_exit ends the worker")
	}
}

// A run of more than the steady time resets count and pause.
func TestExecSteady(t *testing.T) {
	pauses := execPauses{first: time.Millisecond, longest: time.Hour, steady: 10 * time.Millisecond}
	e := newTestExecs(t, pauses, Exec{Key: "k", Cmd: "echo run >> k; sleep 0.05; test $(wc -l < k) = 5", Attempt: 1})
	if got := e.await("k", execFinished); got.Restarts != 4 {
		t.Errorf("exec ended as %+v; want 4 restarts", got)
	}
}

func TestExecCascade(t *testing.T) {
	for _, row := range []struct {
		cmd  string
		want execsOver
	}{{"true", execsOver{ended: true}}, {"false", execsOver{ended: true, failed: true}}} {
		e := newTestExecs(t, quickPauses, Exec{Key: "k", Cmd: row.cmd, Attempt: 1, CascadeExit: true})
		waitFor(t, 5*time.Second, func() string {
			if _, over := e.report(); over != row.want {
				return fmt.Sprintf("%s: cascade is %+v; want %+v", row.cmd, over, row.want)
			}
			return ""
		})
	}
}

// TestExecSetApply changes the configuration while execs run. Each holds a folder as its lock, so that two of a kind
// would be noticed.
func TestExecSetApply(t *testing.T) {
	const alone = `trap 'rmdir alone.$0; exit' TERM; mkdir alone.$0 || { echo $0 >> twice; exit 1; }
while :; do sleep 0.02; done`
	cmd := func(key string) string { return "sh -c '" + strings.ReplaceAll(alone, "'", `'\''`) + "' " + key }
	e := newTestExecs(t, quickPauses,
		Exec{Key: "same", Cmd: cmd("same"), Env: map[string]string{"A": "1"}},
		Exec{Key: "changed", Cmd: cmd("changed")},
		Exec{Key: "removed", Cmd: cmd("removed")},
		Exec{Key: "done", Cmd: "echo run >> done"},
	)
	ready := func(key string) execHealth {
		t.Helper()
		h := e.await(key, execRunning)
		waitFor(t, 5*time.Second, func() string {
			if _, err := os.Stat(filepath.Join(e.dir, "alone."+key)); err != nil {
				return err.Error()
			}
			return ""
		})
		return h
	}
	same, changed, removed := ready("same"), ready("changed"), ready("removed")
	e.await("done", execFinished)

	next := *e.cfg
	next.Execs = []Exec{e.cfg.Execs[3], e.cfg.Execs[0], e.cfg.Execs[1], {Key: "new", Cmd: "sleep 600"}}
	next.Execs[1].Env = map[string]string{"A": "1"}
	next.Execs[2].Env = map[string]string{"B": "2"}
	next.KillAfter = time.Second
	e.apply(&next)
	e.await("new", execRunning)
	assertGone(t, changed.PID, removed.PID)
	waitFor(t, 5*time.Second, func() string {
		if got := e.health("changed"); got.State != execRunning || got.PID == changed.PID {
			return fmt.Sprintf("the changed one is %+v, and was %+v", got, changed)
		}
		return ""
	})
	ready("changed")
	if got := e.health("same"); got != same {
		t.Errorf("an unchanged exec is %+v, and was %+v", got, same)
	}
	if got := e.health("removed"); got != (execHealth{}) {
		t.Errorf("a removed exec is reported: %+v", got)
	}

	// Removed and added and changed in quick succession, each before the last one has been taken up.
	for i := range 5 {
		gone := next
		gone.Execs = next.Execs[:1]
		e.apply(&gone)
		again := next
		again.Execs = append([]Exec(nil), next.Execs...)
		again.Execs[1].Env = map[string]string{"A": strconv.Itoa(i)}
		e.apply(&again)
		next = again
	}
	ready("same")
	ready("changed")
	before := e.health("same")
	next.Project = "other"
	e.apply(&next)
	waitFor(t, 5*time.Second, func() string {
		if got := e.health("same"); got.State != execRunning || got.PID == before.PID {
			return fmt.Sprintf("after a change of the project the exec is %+v, and was %+v", got, before)
		}
		return ""
	})
	ready("same")
	if got := e.file("done"); got != "run\nrun\n" { // for the change of the project
		t.Errorf("the exec that had finished ran %q", got)
	}
	if got := e.file("twice"); got != "" {
		t.Errorf("ran twice at once: %q", got)
	}
	last := []int{e.health("same").PID, e.health("changed").PID}
	e.execSet.cancel()
	assertGone(t, last...)
	e.await("same", execStopped)
}

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
