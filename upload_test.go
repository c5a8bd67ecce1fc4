package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

// A handOverServer takes files and results, after as many refusals as it was given.
type handOverServer struct {
	*httptest.Server

	mu       sync.Mutex // guards the rest
	statuses []int
	auth     []string
	lengths  []int64
	bodies   map[string]string // by file name; a result by ""
}

func newHandOverServer(t testing.TB, statuses ...int) *handOverServer {
	m := &handOverServer{statuses: statuses, bodies: map[string]string{}}
	m.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.auth = append(m.auth, r.Header.Get("Authorization"))
		m.lengths = append(m.lengths, r.ContentLength)
		if len(m.statuses) > 0 {
			status := m.statuses[0]
			m.statuses = m.statuses[1:]
			w.WriteHeader(status)
			fmt.Fprintf(w, `{"status":"error","code":"ERR-5","message":"status %d"}`, status)
			return
		}
		if r.Header.Get("Content-Type") == "application/json" {
			body, _ := io.ReadAll(r.Body)
			m.bodies[""] = string(body)
			return
		}
		file, header, err := r.FormFile("file")
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		body, _ := io.ReadAll(file)
		m.bodies[header.Filename] = string(body)
	}))
	t.Cleanup(m.Close)
	return m
}

func (m *handOverServer) env() []string {
	return []string{"JOB_MANAGER_UPLOAD_FILE=" + m.URL + "/file/t", "JOB_MANAGER_RESULT_URL=" + m.URL + "/result/t",
		"JOB_ITEM_PROJECT_KEY=the-key"}
}

func TestUpload(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	big := strings.Repeat("0123456789abcdef", 1<<18)
	name := `a "quoted" é.txt`
	if runtime.GOOS == "windows" {
		name = "a é.txt" // a quote is not allowed there
	}
	a, b, empty := write(name, "text\x00"), write("b.bin", big), write("empty", "")

	m := newHandOverServer(t, 503, 429) // and then well
	got := runCLI(t, m.env(), "", "upload", a, b, empty)
	if got != (cliResult{"", "", 0}) {
		t.Errorf("upload gives %+v", got)
	}
	if m.bodies[filepath.Base(a)] != "text\x00" || m.bodies["b.bin"] != big || m.bodies["empty"] != "" || len(m.bodies) != 3 {
		t.Errorf("the manager has %d files", len(m.bodies))
	}
	for i := range m.auth {
		if m.auth[i] != "Bearer the-key" || m.lengths[i] <= 0 {
			t.Errorf("request %d: Authorization %q, length %d", i, m.auth[i], m.lengths[i])
		}
	}

	// All are tried, and each failure is named.
	m = newHandOverServer(t, 413)
	got = runCLI(t, m.env(), "", "upload", a, filepath.Join(dir, "missing"), dir, b)
	if got.code != 1 || m.bodies["b.bin"] != big || len(m.bodies) != 1 {
		t.Errorf("upload with failures: exit %d, %d files", got.code, len(m.bodies))
	}
	for _, want := range []string{"status 413 [ERR-5]", "missing", "not a regular file"} {
		if !strings.Contains(got.stderr, want) {
			t.Errorf("stderr lacks %q: %s", want, got.stderr)
		}
	}
	if strings.Contains(got.stderr, "the-key") {
		t.Errorf("stderr shows the key: %s", got.stderr)
	}
}

// The key goes to the host that was named, not to where that sends us.
func TestUploadFollowsNoRedirect(t *testing.T) {
	thief := newHandOverServer(t)
	redirecting := httptest.NewServer(http.RedirectHandler(thief.URL, http.StatusTemporaryRedirect))
	defer redirecting.Close()
	got := runCLI(t, []string{"JOB_MANAGER_RESULT_URL=" + redirecting.URL, "JOB_ITEM_PROJECT_KEY=the-key"}, "", "result", "{}")
	if got.code != 1 || !strings.Contains(got.stderr, "redirects are not followed") || len(thief.auth) != 0 {
		t.Errorf("result gives %+v, %d requests went elsewhere", got, len(thief.auth))
	}
}

func TestUploadRefusals(t *testing.T) {
	dir := t.TempDir()
	control := filepath.Join(dir, "a\nb")
	os.WriteFile(control, []byte("x"), 0o600) // fails where such names do not exist, and so does the upload
	m := newHandOverServer(t)
	for _, c := range []struct {
		env  []string
		args []string
		code int
		want string
	}{
		{m.env(), []string{"upload"}, 2, "takes at least one FILE"},
		{m.env(), []string{"upload", "x/same", "y/same"}, 2, "under the same name"},
		{[]string{"JOB_MANAGER_UPLOAD_FILE="}, []string{"upload", "x"}, 2, "not set: JOB_MANAGER_UPLOAD_FILE"},
		{[]string{"JOB_MANAGER_UPLOAD_FILE=nonsense"}, []string{"upload", "x"}, 2, "bad URL in JOB_MANAGER_UPLOAD_FILE"},
		{m.env(), []string{"upload", control}, 1, "[ERR-26112300718]"},
		{[]string{"JOB_MANAGER_RESULT_URL="}, []string{"result", "{}"}, 2, "not set: JOB_MANAGER_RESULT_URL"},
		{m.env(), []string{"result", "{"}, 2, "not JSON"},
		{m.env(), []string{"result"}, 2, "it is empty"},
		{m.env(), []string{"result", "{}", "{}"}, 2, "takes one JSON value"},
		{m.env(), []string{"result", "{} {}"}, 2, "not JSON"},
	} {
		got := runCLI(t, c.env, "", c.args...)
		if got.code != c.code || !strings.Contains(got.stderr, c.want) {
			t.Errorf("%q: %+v; want exit %d and %q", c.args, got, c.code, c.want)
		}
	}
	if len(m.auth) > 0 {
		t.Errorf("%d requests were made", len(m.auth))
	}
}

func TestResult(t *testing.T) {
	file := filepath.Join(t.TempDir(), "result.json")
	if err := os.WriteFile(file, []byte(`{"from":"file"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args        []string
		stdin, want string
	}{
		{[]string{`{"status":"completed","n":1.50}`}, "", `{"status":"completed","n":1.50}`},
		{[]string{`"text"`}, "", `"text"`},
		{[]string{"@" + file}, "", `{"from":"file"}`},
		{[]string{"-"}, "[1, 2]\n", `[1, 2]`},
		{nil, `{"from":"pipe"}`, `{"from":"pipe"}`},
	} {
		m := newHandOverServer(t, 500)
		got := runCLI(t, m.env(), c.stdin, append([]string{"result"}, c.args...)...)
		if got != (cliResult{"", "", 0}) || m.bodies[""] != c.want || m.auth[1] != "Bearer the-key" {
			t.Errorf("result %q gives %+v, the manager has %q", c.args, got, m.bodies[""])
		}
	}
	m := newHandOverServer(t, 403)
	if got := runCLI(t, m.env(), "", "result", "{}"); got.code != 1 || !strings.Contains(got.stderr, "status 403 [ERR-5]") {
		t.Errorf("a refused result: %+v", got)
	}
	stdin, err := os.Open(os.DevNull) // a device, as a terminal is
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	cmd := cliCommand(t, m.env(), "result")
	cmd.Stdin = stdin
	if out, _ := errorOutput(cmd); cmd.ProcessState.ExitCode() != 2 || !strings.Contains(out, "takes a JSON value") {
		t.Errorf("result without input says %q", out)
	}
}

// An upload may take longer than any limit, as long as it moves; one that no longer moves is given up.
func TestUploadSlow(t *testing.T) {
	t.Parallel()          // beside others that wait
	const size = 24 << 20 // more than the sockets hold
	path := filepath.Join(t.TempDir(), "big")
	if err := os.WriteFile(path, bytes.Repeat([]byte("x"), size), 0o600); err != nil {
		t.Fatal(err)
	}
	received := 0
	slow := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		buf := make([]byte, 1<<20)
		for {
			n, err := io.ReadFull(r.Body, buf)
			received += n
			if err != nil {
				return
			}
			time.Sleep(100 * time.Millisecond) // all of it takes longer than stallFor
		}
	}))
	defer slow.Close()
	target, err := parseHTTPURL(slow.URL)
	if err != nil {
		t.Fatal(err)
	}
	p := &poster{client: newHTTPClient(), retryFor: time.Millisecond, stallFor: 2 * time.Second, pause: time.Millisecond}
	if err := p.upload(context.Background(), target, path); err != nil || received < size {
		t.Errorf("slow upload ends with %v after %d of %d bytes", err, received, size)
	}

	release := make(chan struct{})
	hang := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-release }))
	defer hang.Close()
	defer close(release)
	if target, err = parseHTTPURL(hang.URL); err != nil {
		t.Fatal(err)
	}
	p.stallFor = 100 * time.Millisecond
	if err := p.upload(context.Background(), target, path); !errors.Is(err, errNoProgress) {
		t.Errorf("upload that hangs ends with %v, want %v", err, errNoProgress)
	}
}
