//go:build unix

package main

// agent_test.go holds a whole job_item, parent and children, as the tests start it and ask it over its REST API.

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// An agent is job_item running in a folder of its own.
type agent struct {
	t   testing.TB
	dir string
	env []string
	cmd *exec.Cmd

	program string              // other than the test binary itself; "" for that
	user    *syscall.Credential // other than the one that runs the tests; nil for that

	url  string
	log  *lockedBuffer
	gone chan struct{} // closed when the parent has ended
}

// A lockedBuffer is a log that is read while it is written.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// newAgent writes a configuration into a new folder. %SELF% in it is the test binary, which plays the jobs.
func newAgent(t testing.TB, config string) *agent {
	t.Helper()
	dir := t.TempDir()
	a := &agent{t: t, dir: dir}
	a.write("config.yaml", "listen: 127.0.0.1:"+freePort(t)+"\n"+config)
	return a
}

func (a *agent) write(name, content string) {
	a.t.Helper()
	self, err := os.Executable()
	if err != nil {
		a.t.Fatal(err)
	}
	content = strings.ReplaceAll(content, "%SELF%", self)
	if err := os.WriteFile(filepath.Join(a.dir, name), []byte(content), 0o600); err != nil {
		a.t.Fatal(err)
	}
}

// start starts the parent and waits until it is healthy.
func (a *agent) start() *agent {
	a.t.Helper()
	a.launch()
	waitFor(a.t, 20*time.Second, func() string {
		select {
		case <-a.gone:
			a.t.Fatalf("job_item ended early:\n%s", a.log)
		default:
		}
		if status := a.health().Status; status != "ok" && status != "degraded" {
			return "health is " + status + "\n" + a.log.String()
		}
		return ""
	})
	return a
}

// launch starts the parent and waits for nothing.
func (a *agent) launch() {
	a.t.Helper()
	content, err := os.ReadFile(filepath.Join(a.dir, "config.yaml"))
	if err != nil {
		a.t.Fatal(err)
	}
	a.url = "http://" + regexp.MustCompile(`listen: (\S+)`).FindStringSubmatch(string(content))[1]
	a.log = &lockedBuffer{}
	a.cmd = cliCommand(a.t, a.env, "--config", filepath.Join(a.dir, "config.yaml"))
	a.cmd.Stderr = a.log
	if a.program != "" {
		a.cmd.Path = a.program
	}
	a.cmd.SysProcAttr = &syscall.SysProcAttr{Credential: a.user}
	if err := a.cmd.Start(); err != nil {
		a.t.Fatal(err)
	}
	gone := make(chan struct{})
	a.gone = gone
	cmd := a.cmd
	go func() { cmd.Wait(); close(gone) }() // ends with the parent
	log := a.log
	a.t.Cleanup(func() {
		cmd.Process.Kill()
		<-gone
		if a.t.Failed() {
			a.t.Logf("the log of process %d:\n%s", cmd.Process.Pid, complaints(log.String()))
		}
	})
}

// complaints are the lines of a log that tell of something unusual, and its last ones.
func complaints(log string) string {
	lines := strings.SplitAfter(log, "\n")
	var kept []string
	for i, line := range lines {
		if !strings.Contains(line, `msg="task `) && !strings.Contains(line, "level=DEBUG") || i > len(lines)-20 {
			kept = append(kept, line)
		}
	}
	return strings.Join(kept[max(0, len(kept)-200):], "")
}

// stop asks the parent to end and waits for it.
func (a *agent) stop() {
	a.t.Helper()
	a.cmd.Process.Signal(syscall.SIGTERM)
	a.waitGone(30 * time.Second)
}

func (a *agent) waitGone(limit time.Duration) {
	a.t.Helper()
	select {
	case <-a.gone:
	case <-time.After(limit):
		a.t.Fatalf("job_item did not end within %v:\n%s", limit, a.log)
	}
}

// childPID finds the worker process in the log, which has it soon after the health is ok.
func (a *agent) childPID() int {
	a.t.Helper()
	waitFor(a.t, 20*time.Second, func() string { return unless(strings.Contains(a.log.String(), "msg=ready "), "no worker is ready") })
	lines := regexp.MustCompile(`msg=ready .*\bpid=(\d+)`).FindAllStringSubmatch(a.log.String(), -1)
	if len(lines) == 0 {
		return 0
	}
	pid, _ := strconv.Atoi(lines[len(lines)-1][1])
	return pid
}

type healthView struct {
	Status     string   `json:"status"`
	Problems   []string `json:"problems"`
	IdentityID string   `json:"identity_id"`
	Jobs       map[string]int
	Execs      []execHealth `json:"execs"`
}

func (a *agent) health() healthView {
	var h healthView
	a.getJSON("/health", &h)
	return h
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

// getJSON reads an answer, whatever its status; v stays as it is when the worker is away.
func (a *agent) getJSON(path string, v any) int {
	resp, err := http.Get(a.url + path)
	if err != nil {
		return 0
	}
	defer resp.Body.Close()
	json.NewDecoder(resp.Body).Decode(v)
	return resp.StatusCode
}

// post sends JSON and gives the answer.
func (a *agent) post(path, body string) (int, string) {
	a.t.Helper()
	resp, err := http.Post(a.url+path, "application/json", strings.NewReader(body))
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	answer, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, string(answer)
}

// create creates a task and gives its id.
func (a *agent) create(event, data string) string {
	a.t.Helper()
	code, answer := a.post("/job/create", fmt.Sprintf(`{"event":%q,"form_body":%s}`, event, data))
	var created struct {
		TaskID string `json:"task_id"`
	}
	if err := json.Unmarshal([]byte(answer), &created); err != nil || code != 200 || created.TaskID == "" {
		a.t.Fatalf("create %s = %d %s\n%s", event, code, answer, a.log)
	}
	return created.TaskID
}

type taskView struct {
	TaskID        string     `json:"task_id"`
	Status        taskStatus `json:"status"`
	Attempt       int        `json:"attempt"`
	ExitCode      *int       `json:"exit_code"`
	Signal        string     `json:"signal"`
	PID           int        `json:"pid"`
	Error         string     `json:"error"`
	OutputBytes   int64      `json:"output_bytes"`
	Notifications []struct {
		Msg string `json:"msg"`
	} `json:"notifications"`
	Result json.RawMessage `json:"result"`
	Files  []struct {
		Name string `json:"name"`
		Size int64  `json:"size"`
	} `json:"files"`
}

func (a *agent) task(id string) taskView {
	var v taskView
	a.getJSON("/job/"+id, &v)
	return v
}

// wait waits until a task is in a status.
func (a *agent) wait(id string, status taskStatus) taskView {
	a.t.Helper()
	var v taskView
	waitFor(a.t, 30*time.Second, func() string {
		if v = a.task(id); v.Status != status {
			return fmt.Sprintf("task %s is %q (%s), want %q\n%s", id, v.Status, v.Error, status, a.log)
		}
		return ""
	})
	return v
}

func (a *agent) output(id string) string {
	a.t.Helper()
	resp, err := http.Get(a.url + "/job/" + id + "/log")
	if err != nil {
		a.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(resp.Body)
	return string(text)
}

func freePort(t testing.TB) string {
	t.Helper()
	listener, err := listen("127.0.0.1:0", bindPatience)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return strings.TrimPrefix(listener.Addr().String(), "127.0.0.1:")
}
