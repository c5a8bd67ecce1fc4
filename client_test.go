package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// A fakeWorker answers as PROTOCOL section 7 says, from what the test puts into it.
type fakeWorker struct {
	*httptest.Server

	mu      sync.Mutex        // guards the rest
	replies map[string]string // by "GET /path"; "404" and the like are statuses, with a body after a space
	calls   []string          // "POST /job/create Bearer key body"
	log     func(w http.ResponseWriter, request int)
	logs    int
}

func newFakeWorker(t testing.TB, replies map[string]string) *fakeWorker {
	f := &fakeWorker{replies: replies}
	f.Server = httptest.NewServer(http.HandlerFunc(f.serve))
	t.Cleanup(f.Close)
	return f
}

func (f *fakeWorker) serve(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	f.mu.Lock()
	f.calls = append(f.calls, strings.TrimSpace(fmt.Sprintf("%s %s %s %s", r.Method, r.URL, r.Header.Get("Authorization"), body)))
	reply, known := f.replies[r.Method+" "+r.URL.Path]
	log := f.log
	if strings.HasSuffix(r.URL.Path, "/log") {
		f.logs++
	}
	request := f.logs
	f.mu.Unlock()
	if strings.HasSuffix(r.URL.Path, "/log") && log != nil {
		log(w, request)
		return
	}
	status := http.StatusOK
	if !known {
		status, reply = http.StatusNotFound, `{"status":"error","code":"ERR-77","message":"nothing here"}`
	} else if n, err := fmt.Sscanf(reply, "%d", &status); n == 1 && err == nil {
		_, reply, _ = strings.Cut(reply, " ")
	}
	if status/100 == 3 {
		w.Header().Set("Location", "http://127.0.0.1:1/elsewhere")
	}
	w.WriteHeader(status)
	io.WriteString(w, reply)
}

// setLog says how requests for a log are answered; they are counted from 1.
func (f *fakeWorker) setLog(log func(w http.ResponseWriter, request int)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.log = log
}

func (f *fakeWorker) set(call, reply string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.replies[call] = reply
}

// called gives the calls since the last time.
func (f *fakeWorker) called() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	defer func() { f.calls = nil }()
	return strings.Join(f.calls, "\n")
}

// noWorkerEnv makes sure that no worker of the environment is found.
var noWorkerEnv = []string{"JOB_ITEM_BASE_URL=", "JOB_ITEM_PROJECT_KEY=", "CONFIG_PATH=does-not-exist.yaml"}

const created = `{"status":"success","message":"","task_id":"task-9","app_id":"local","job":{}}`

func TestCreate(t *testing.T) {
	f := newFakeWorker(t, map[string]string{"POST /job/create": created})
	dataFile := filepath.Join(t.TempDir(), "data.json")
	if err := os.WriteFile(dataFile, []byte("\xef\xbb\xbf{\"from\":\"file\"}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args  []string
		stdin string
		data  string
	}{
		{nil, "", `{}`},
		{[]string{"--data", `{"n":12345678901234567890.10}`}, "", `{"n":12345678901234567890.10}`},
		{[]string{"--data", "@" + dataFile}, "", `{"from":"file"}`},
		{[]string{"--data", "-"}, ` {"from":"stdin"} `, `{"from":"stdin"}`},
	} {
		got := runCLI(t, noWorkerEnv, c.stdin, append([]string{"create", "send_email", "--url", f.URL}, c.args...)...)
		if got != (cliResult{"task-9\n", "", 0}) {
			t.Errorf("create %q gives %+v", c.args, got)
		}
		asked := f.called()
		if want := `POST /job/create  {"event":"send_email","form_body":` + c.data + `}`; asked != want {
			t.Errorf("create %q asks %s, want %s", c.args, asked, want)
		}
	}
}

func TestCreateRefusals(t *testing.T) {
	f := newFakeWorker(t, map[string]string{})
	big := filepath.Join(t.TempDir(), "big.json")
	if err := os.WriteFile(big, []byte(`{"x":"`+strings.Repeat("x", maxClientDataBytes)+`"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	url := []string{"--url", f.URL}
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{append(url, "create"), 2, "takes one EVENT"},
		{append(url, "create", "a", "b"), 2, "takes one EVENT"},
		{append(url, "create", "a", "--data", "[]"), 2, "not an object [ERR-26112300708]"},
		{append(url, "create", "a", "--data", `{"x":}`), 2, "at byte 6"},
		{append(url, "create", "a", "--data", ""), 2, "it is empty"},
		{append(url, "create", "a", "--data", "@no-such-file"), 2, `read "no-such-file"`},
		{append(url, "create", "a", "--data", "@"+big), 2, "larger than 16 MiB"},
		{[]string{"create", "a", "--url", "ftp://x/"}, 2, "bad URL in --url"},
		{[]string{"create", "a", "--url", ""}, 2, "bad URL in --url"},
		{[]string{"create", "a"}, 2, "where the worker listens is unknown"},
		{[]string{"create", "a", "--url", "http://127.0.0.1:1"}, 1, "no worker answers at http://127.0.0.1:1: dial"},
		{append(url, "create", "a"), 1, "nothing here [ERR-77]"},
		{append(url, "replay"), 2, "takes one TASK_ID"},
		{append(url, "replay", "../x"), 2, "is no task id"},
		{append(url, "status", "x"), 2, "takes no argument"},
	} {
		got := runCLI(t, noWorkerEnv, "", c.args...)
		if got.code != c.code || !strings.Contains(got.stderr, c.want) || got.stdout != "" {
			t.Errorf("%q: exit %d, stdout %q, stderr %q; want %d and %q", c.args, got.code, got.stdout, got.stderr, c.code, c.want)
		}
	}
	if calls := f.called(); calls != `POST /job/create  {"event":"a","form_body":{}}` {
		t.Errorf("the worker was asked %s, want only the last create", calls)
	}
	for reply, want := range map[string]string{
		`{"task_id":"../evil"}`:  "is not a worker's",
		`<html>`:                 "is not a worker's",
		`503 upstream`:           "answered 503 Service Unavailable",
		`307 `:                   "redirects are not followed",
		`401 {"message":"no"}`:   "JOB_ITEM_PROJECT_KEY",
		`400 {"message":"a\nb"}`: "answered 400 Bad Request: a b [ERR-26112300713]",
	} {
		f.set("POST /job/create", reply)
		if got := runCLI(t, noWorkerEnv, "", append(url, "create", "a")...); got.code != 1 || !strings.Contains(got.stderr, want) {
			t.Errorf("reply %q: exit %d, stderr %q; want 1 and %q", reply, got.code, got.stderr, want)
		}
	}
}

// The key goes to the worker that was named, from the place that fits.
func TestFindWorker(t *testing.T) {
	f := newFakeWorker(t, map[string]string{"POST /job/create": created})
	dir := t.TempDir()
	config := func(listen string) string {
		path := filepath.Join(dir, "config.yaml")
		text := "credential:\n  secret_key: config-key\nlisten: \"" + listen + "\"\njobs:\n  - name: A\n    event: a\n    cmd: \"true\"\n"
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	_, port, _ := strings.Cut(strings.TrimPrefix(f.URL, "http://"), ":")
	for _, c := range []struct {
		listen string
		env    []string
		args   []string
		want   string
	}{
		{"127.0.0.1:" + port, nil, nil, "Bearer config-key"},
		{"0.0.0.0:" + port, []string{"JOB_ITEM_PROJECT_KEY=env-key"}, nil, "Bearer config-key"},
		{"127.0.0.1:1", []string{"JOB_ITEM_BASE_URL=" + f.URL}, nil, "Bearer config-key"},
		{"127.0.0.1:1", []string{"JOB_ITEM_BASE_URL=" + f.URL + "/", "JOB_ITEM_PROJECT_KEY=env-key"}, nil, "Bearer env-key"},
		{"127.0.0.1:1", []string{"JOB_ITEM_BASE_URL=http://127.0.0.1:1"}, []string{"--url", f.URL}, "Bearer config-key"},
	} {
		args := append([]string{"create", "a", "--config", config(c.listen)}, c.args...)
		got := runCLI(t, append(noWorkerEnv[:2:2], c.env...), "", args...)
		if asked := f.called(); got.code != 0 || !strings.Contains(asked, " /job/create "+c.want+" ") {
			t.Errorf("listen %s, %q, %q: exit %d %s, asked %q; want %q", c.listen, c.env, c.args, got.code, got.stderr, asked, c.want)
		}
	}
	for listen, want := range map[string]string{
		":80": "http://127.0.0.1:80", "0.0.0.0:80": "http://127.0.0.1:80", "[::]:80": "http://[::1]:80",
		"10.0.0.1:80": "http://10.0.0.1:80", "localhost:80": "http://localhost:80",
	} {
		if got := baseURL(listen); got != want {
			t.Errorf("baseURL(%q) = %q; want %q", listen, got, want)
		}
	}
}

// shows answers a log request with text and ends it well.
func shows(text string) func(http.ResponseWriter, int) {
	return func(w http.ResponseWriter, _ int) { io.WriteString(w, text) }
}

func TestCreateWait(t *testing.T) {
	for _, c := range []struct {
		record string
		code   int
		want   string
	}{
		{`{"status":"finish"}`, 0, "job_item: task task-9\n"},
		{`{"status":"error","exit_code":3}`, 1, "task task-9: error: exit code 3\n"},
		{`{"status":"error","exit_code":3,"error":"no \u001bsuch file"}`, 1, "task task-9: error: no  such file\n"},
		{`{"status":"timeout","signal":"terminated"}`, 124, "task task-9: timeout: terminated\n"},
		{`{"status":"terminate"}`, 143, "task task-9: terminate\n"},
	} {
		f := newFakeWorker(t, map[string]string{"POST /job/create": created, "GET /job/task-9": c.record})
		f.setLog(shows("the output\n"))
		got := runCLI(t, noWorkerEnv, "", "create", "a", "--wait", "--url", f.URL)
		if got.code != c.code || got.stdout != "the output\n" || !strings.HasSuffix(got.stderr, c.want) {
			t.Errorf("%s: %+v; want exit %d and %q", c.record, got, c.code, c.want)
		}
		if asked := f.called(); !strings.Contains(asked, "GET /job/task-9/log?follow=true") {
			t.Errorf("asked %s", asked)
		}
	}
}

// The worker restarts while the task runs: the log breaks, some calls fail, and the log goes on where it was.
func TestCreateWaitAcrossRestart(t *testing.T) {
	f := newFakeWorker(t, map[string]string{"POST /job/create": created, "GET /job/task-9": `503 {"status":"error","message":"starting"}`})
	f.setLog(func(w http.ResponseWriter, request int) {
		switch request {
		case 1: // breaks within the log
			io.WriteString(w, "one\ntw")
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		case 2: // ends well, but early: the worker drains
			io.WriteString(w, "one\ntwo\n")
		case 3:
			f.set("GET /job/task-9", `404 {"status":"error","message":"not yet"}`)
			w.WriteHeader(http.StatusServiceUnavailable)
		default:
			f.set("GET /job/task-9", `{"status":"finish"}`)
			io.WriteString(w, "one\ntwo\nthree\n")
		}
	})
	got := runCLI(t, noWorkerEnv, "", "create", "a", "--wait", "--url", f.URL)
	if got.code != 0 || got.stdout != "one\ntwo\nthree\n" {
		t.Errorf("create --wait gives %+v", got)
	}
}

// A worker that stays away is given up, and so is a task that it does not know.
func TestWaitGivesUp(t *testing.T) {
	gone := newFakeWorker(t, nil)
	gone.Close()
	for name, f := range map[string]*fakeWorker{
		"no worker answers": gone,
		"nothing here":      newFakeWorker(t, nil),
		"answered 401":      newFakeWorker(t, map[string]string{"GET /job/task-9": "401 "}),
	} {
		base, err := parseHTTPURL(f.URL)
		if err != nil {
			t.Fatal(err)
		}
		c := &workerClient{base: base, http: newHTTPClient(), patience: 50 * time.Millisecond}
		var out, errOut bytes.Buffer
		code := c.wait(context.Background(), &invocation{stdout: &out, stderr: &errOut}, "task-9")
		if code != 1 || !strings.Contains(errOut.String(), name) || !strings.Contains(errOut.String(), "task goes on: task-9") {
			t.Errorf("%s: exit %d, stderr %q", name, code, errOut.String())
		}
	}
}

// A full disk ends the waiting, the worker is not asked again and again.
func TestWaitBrokenOutput(t *testing.T) {
	f := newFakeWorker(t, map[string]string{"GET /job/task-9": `{"status":"running"}`})
	f.setLog(shows("output"))
	base, err := parseHTTPURL(f.URL)
	if err != nil {
		t.Fatal(err)
	}
	c := &workerClient{base: base, http: newHTTPClient(), patience: time.Minute}
	var errOut bytes.Buffer
	code := c.wait(context.Background(), &invocation{stdout: saveBrokenWriter{}, stderr: &errOut}, "task-9")
	if code != 1 || !strings.Contains(errOut.String(), "disk full") {
		t.Errorf("exit %d, stderr %q", code, errOut.String())
	}
}

func TestCreateWaitStopped(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("signals cannot be sent")
	}
	for sig, code := range map[syscall.Signal]int{syscall.SIGTERM: 143, syscall.SIGINT: 130} {
		release := make(chan struct{})
		f := newFakeWorker(t, map[string]string{"POST /job/create": created, "GET /job/task-9": `{"status":"running"}`})
		f.setLog(func(w http.ResponseWriter, _ int) {
			io.WriteString(w, "ready\n")
			w.(http.Flusher).Flush()
			<-release
		})
		cmd := cliCommand(t, noWorkerEnv, "create", "a", "--wait", "--url", f.URL)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		var errOut bytes.Buffer
		cmd.Stderr = &errOut
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		io.ReadFull(out, make([]byte, len("ready\n")))
		cmd.Process.Signal(sig)
		cmd.Wait()
		close(release)
		if cmd.ProcessState.ExitCode() != code || !strings.Contains(errOut.String(), "the task goes on: task-9") {
			t.Errorf("%v: exit %d, stderr %q", sig, cmd.ProcessState.ExitCode(), errOut.String())
		}
	}
}

func TestReplay(t *testing.T) {
	f := newFakeWorker(t, map[string]string{
		"POST /job/create":     created,
		"GET /job/task-1":      `{"task_id":"task-1","event":"send_email","status":"error"}`,
		"GET /job/task-1/data": `{"to":"ada","n":1.50}`,
	})
	got := runCLI(t, noWorkerEnv, "", "replay", "task-1", "--url", f.URL)
	if got != (cliResult{"task-9\n", "", 0}) {
		t.Errorf("replay gives %+v", got)
	}
	asked := f.called()
	if want := `POST /job/create  {"event":"send_email","form_body":{"to":"ada","n":1.50}}`; !strings.HasSuffix(asked, want) {
		t.Errorf("replay asks %s, want %s", asked, want)
	}

	f.set("GET /job/task-9", `{"status":"timeout"}`)
	f.setLog(shows("again\n"))
	if got := runCLI(t, noWorkerEnv, "", "replay", "task-1", "--wait", "--url", f.URL); got.code != 124 || got.stdout != "again\n" {
		t.Errorf("replay --wait gives %+v", got)
	}

	f.set("GET /job/task-2", `{"event":"a","status":"running"}`)
	f.set("GET /job/task-3", `{"event":"a","status":"finish"}`)
	f.set("GET /job/task-4", `{"event":"a","status":"finish"}`)
	f.set("GET /job/task-4/data", `[1]`)
	f.called()
	for id, want := range map[string]string{
		"task-2": "task task-2 has not ended: it is running [ERR-26112300715]",
		"task-3": "the data of task task-3 is no longer kept",
		"task-4": "not an object",
		"task-5": "nothing here [ERR-77]",
	} {
		got := runCLI(t, noWorkerEnv, "", "replay", id, "--url", f.URL)
		if got.code != 1 || !strings.Contains(got.stderr, want) || got.stdout != "" {
			t.Errorf("replay %s: %+v; want exit 1 and %q", id, got, want)
		}
	}
	if asked := f.called(); strings.Contains(asked, "POST") {
		t.Errorf("something was created: %s", asked)
	}
}

const healthy = `{"status":"degraded","problems":["exec watch\u001b[31m given up"],"identity_id":"web-1","version":"v4.0.0",
	"uptime_s":3661,"broker":{"type":"nats","connected":true,"since":"2026-11-23T10:00:00Z"},
	"jobs":{"running":1,"queued":12,"finish":5,"error":1,"timeout":0,"terminate":0},
	"execs":[{"key":"watch","state":"given up","pid":0,"restarts":3}]}`

func TestStatus(t *testing.T) {
	f := newFakeWorker(t, map[string]string{
		"GET /health": healthy,
		"GET /jobs": `{"jobs":[{"task_id":"t-run","event":"a","status":"running","attempt":2,"started_at":"2026-11-23T10:00:00Z"},
			{"task_id":"t-end","event":"b","status":"error","error":"first\nsecond","started_at":"2026-11-23T10:00:00Z",
			"finished_at":"2026-11-23T10:00:02.5Z"}]}`,
	})
	got := runCLI(t, noWorkerEnv, "", "status", "--url", f.URL)
	if got.code != 0 || got.stderr != "" {
		t.Errorf("status: %+v", got)
	}
	for _, want := range []string{
		"web-1 v4.0.0: degraded, up 1h1m1s", "nats, connected since", "1 running, 12 queued, 5 finish",
		"exec watch [31m given up", "t-run", "and 10 more", "2.5s", "first second", "given up",
	} {
		if !strings.Contains(got.stdout, want) {
			t.Errorf("status lacks %q:\n%s", want, got.stdout)
		}
	}
	asked := f.called()
	for _, want := range []string{"GET /jobs?limit=10&status=running", "GET /jobs?limit=10&status=queued"} {
		if !strings.Contains(asked, want) {
			t.Errorf("status asked %s", asked)
		}
	}

	got = runCLI(t, noWorkerEnv, "", "status", "--json", "--url", f.URL)
	var both struct {
		Health healthReply
		Jobs   []taskReply
	}
	if err := json.Unmarshal([]byte(got.stdout), &both); err != nil || got.code != 0 ||
		both.Health.IdentityID != "web-1" || len(both.Jobs) != 2 {
		t.Errorf("status --json: %v, %+v", err, got)
	}

	f.set("GET /health", "503 "+healthy)
	for _, args := range [][]string{{"status"}, {"status", "--json"}} {
		got := runCLI(t, noWorkerEnv, "", append(args, "--url", f.URL)...)
		if got.code != 1 || !strings.Contains(got.stdout, "web-1") {
			t.Errorf("%q of an unhealthy worker: %+v", args, got)
		}
	}
	for reply, want := range map[string]string{
		"404 page not found": "answered 404", "hello": "is not a worker's", "{}": "is not a worker's",
	} {
		f.set("GET /health", reply)
		if got := runCLI(t, noWorkerEnv, "", "status", "--url", f.URL); got.code != 1 || !strings.Contains(got.stderr, want) {
			t.Errorf("health %q: %+v; want exit 1 and %q", reply, got, want)
		}
	}
	f.set("GET /health", healthy)
	f.set("GET /jobs", `401 {"message":"key wanted"}`)
	if got := runCLI(t, noWorkerEnv, "", "status", "--url", f.URL); got.code != 1 || !strings.Contains(got.stderr, "key wanted") {
		t.Errorf("status without the key: %+v", got)
	}
}
