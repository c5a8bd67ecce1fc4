//go:build unix

package main

// execs_test.go runs background processes in the loop that keeps one running, with short pauses.

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"sync"
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
