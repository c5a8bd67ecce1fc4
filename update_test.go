//go:build unix

package main

// update_test.go has whole workers update themselves to versions of every kind, and kills them meanwhile.

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// A download is a server that has one build.
type download struct {
	*httptest.Server
	mu       sync.Mutex // guards what follows
	build    build
	requests []*http.Request
	slow     chan struct{} // not nil: half of the build is sent before it is closed
	cut      int           // bytes after which a connection breaks; 0: none does
}

func newDownload(t testing.TB) *download {
	d := &download{}
	d.Server = httptest.NewServer(d)
	t.Cleanup(d.Close)
	return d
}

func (d *download) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	d.mu.Lock()
	d.requests = append(d.requests, r)
	content, slow, cut := d.build.content, d.slow, d.cut
	d.mu.Unlock()
	switch {
	case slow != nil:
		w.Header().Set("Content-Length", fmt.Sprint(len(content)))
		w.Write(content[:len(content)/2])
		w.(http.Flusher).Flush()
		select {
		case <-slow:
		case <-r.Context().Done():
		}
		w.Write(content[len(content)/2:])
	case cut > 0:
		var from int
		fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from)
		if from > 0 {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(content)-1, len(content)))
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(content)-from))
		if from > 0 {
			w.WriteHeader(http.StatusPartialContent)
		}
		w.Write(content[from:min(from+cut, len(content))])
	default:
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(content))
	}
}

func (d *download) served() []*http.Request {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]*http.Request(nil), d.requests...)
}

// offer has the manager offer the build.
func (d *download) offer(manager *fakeManager, number int, b build, more ...string) {
	d.mu.Lock()
	d.build = b
	d.mu.Unlock()
	manager.change(func(f *fakeManager) {
		f.release = map[string]any{
			"job_item_version_number": number, "job_item_version": fmt.Sprintf("v%d.0.0", number),
			"job_item_link": d.URL + "/job_item", "job_item_sha256": b.sum,
		}
		for i := 0; i+1 < len(more); i += 2 {
			f.release[more[i]] = more[i+1]
		}
	})
}

// newUpdatingAgent is version 4 of the program, whose manager is asked with SIGHUP.
func newUpdatingAgent(t *testing.T, config string) (*agent, *fakeManager, *download) {
	manager := newFakeManager(t, "p1")
	manager.change(func(f *fakeManager) {
		f.jobs = []any{fakeJob("quick", 0, 0), fakeJob("slow", 0, 0)}
	})
	a := newAgent(t, manager.config()+config)
	a.program = makeBuild(t, 4, "").install(t)
	return a, manager, newDownload(t)
}

// TestUpdateUnderLoad replaces a version that works, and then the parent.
func TestUpdateUnderLoad(t *testing.T) {
	t.Parallel() // it mostly waits
	public, private, err := ed25519.GenerateKey(nil)
	must(t, err)
	a, manager, server := newUpdatingAgent(t, `
concurrency: 4
retain: {tasks: 5000}
update: {public_key: `+base64.StdEncoding.EncodeToString(public)+`}
jobs:
  - {event: quick, cmd: 'echo {{task_id}} >> ran'}
  - {event: slow, cmd: 'sleep 0.3; echo {{task_id}} >> ran'}
execs:
  - {key: side, cmd: 'sleep 1000'}
`)
	a.start()
	created := a.createAlong(4, func(n int) string {
		if n%8 == 0 {
			return "slow"
		}
		return "quick"
	})
	next := makeBuild(t, 5, "")
	server.mu.Lock()
	server.cut = len(next.content)/3 + 1
	server.mu.Unlock()
	server.offer(manager, 5, next,
		"job_item_signature", base64.StdEncoding.EncodeToString(ed25519.Sign(private, next.content)))
	a.cmd.Process.Signal(syscall.SIGHUP)
	a.awaitLine("the new version is installed")
	tasks := created()

	// Without tasks the parent follows; requests are answered meanwhile.
	stop, asked := make(chan struct{}), make(chan int)
	go func() { // ends at stop
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
		for n := 0; ; n++ {
			select {
			case <-stop:
				asked <- n
				return
			default:
			}
			answer, err := client.Get(a.url + "/jobs?limit=1")
			if err != nil {
				t.Errorf("while the parent follows: %v", err)
				continue
			}
			answer.Body.Close()
			if answer.StatusCode != 200 {
				t.Errorf("while the parent follows: %s", answer.Status)
			}
		}
	}()
	a.awaitLine("the parent is the new version now")
	a.awaitHealth("ok", "")
	close(stop)
	t.Logf("%d tasks, %d requests, %d downloads", tasks, <-asked, len(server.served()))
	if v := a.version(); v != "v5.0.0" {
		t.Errorf("the worker is version %s", v)
	}
	if exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", a.cmd.Process.Pid)); runtime.GOOS == "linux" && exe != a.program {
		t.Errorf("the parent, process %d, is %s", a.cmd.Process.Pid, exe)
	}
	if len(server.served()) < 3 {
		t.Errorf("a download that broke off twice was gone on with in %d requests", len(server.served()))
	}
	a.wait(a.create("slow", "{}"), statusFinish)
	if len(a.execPIDs()) != 1 {
		t.Errorf("background processes: %v", a.execPIDs())
	}
	a.stop()
	if a.cmd.ProcessState.ExitCode() != 0 {
		t.Errorf("exit code %d\n%s", a.cmd.ProcessState.ExitCode(), a.log)
	}
	must(t, holds(a.program, next.content))
	must(t, holds(previousFile(a.program), makeBuild(t, 4, "").content))

	// Put back by hand, the version before stays, although the manager offers the other one.
	must(t, os.Rename(previousFile(a.program), a.program))
	a.start()
	a.awaitLine("taken back")
	if v := a.version(); v != "v4.0.0" || a.health().Status != "ok" {
		t.Errorf("the worker is version %s, health %+v", v, a.health())
	}
}

// TestUpdateRolledBack has the manager offer versions that do not work. The one that runs goes on.
func TestUpdateRolledBack(t *testing.T) {
	for behaviour, want := range map[string]string{
		"crashes":          "its process ended: exit status 3",
		"hangs":            "start the new version: it did not end in time",
		"hangs-at-version": "run the new version: it did not end in time",
		"dies":             "its worker has died 2 times",
		"never-well":       "it is not healthy after 1m0s",
	} {
		t.Run(behaviour, func(t *testing.T) {
			t.Parallel() // it mostly waits
			if behaviour == "never-well" && os.Getenv("JOB_ITEM_TEST_LONG") == "" {
				t.Skip("takes more than a minute: JOB_ITEM_TEST_LONG=1 runs it")
			}
			if behaviour == "dies" && runtime.GOOS != "linux" {
				t.Skip("its moment is found in /proc")
			}
			a, manager, server := newUpdatingAgent(t, `
jobs:
  - {event: quick, cmd: 'echo {{task_id}} >> ran'}
`)
			a.start()
			pid := a.childPID()
			created := func() int { return 0 }
			// A minute is longer than a request waits, and what a worker does when it dies may be done again.
			if behaviour != "never-well" && behaviour != "dies" {
				created = a.createAlong(2, func(int) string { return "quick" })
			}
			server.offer(manager, 5, makeBuild(t, 5, behaviour))
			a.cmd.Process.Signal(syscall.SIGHUP)
			a.awaitTrial("degraded", want)
			if !strings.Contains(fmt.Sprint(a.health().Problems), string(codeUpdate)) {
				t.Errorf("health without the code: %+v", a.health())
			}
			if v := a.version(); v != "v4.0.0" {
				t.Errorf("the worker is version %s", v)
			}
			created()
			if before := behaviour == "crashes" || strings.HasPrefix(behaviour, "hangs"); before && a.childPID() != pid {
				t.Errorf("the worker was stopped for a version that does not even start")
			}
			if _, err := os.Stat(updateFile(a.program)); err == nil {
				t.Error("the refused version was left on the disk")
			}
			// It is remembered, and another answer is tried.
			a.stop()
			a.start()
			a.awaitHealth("degraded", want)
			if n := len(server.served()); n != 1 {
				t.Errorf("it was downloaded %d times", n)
			}
			if behaviour == "crashes" {
				server.offer(manager, 6, makeBuild(t, 6, ""))
				a.cmd.Process.Signal(syscall.SIGHUP)
				a.awaitLine("the new version is installed")
				a.awaitHealth("ok", "")
			}
		})
	}
}

// TestUpdateKilled kills everything at each step; the next start goes on.
func TestUpdateKilled(t *testing.T) {
	t.Parallel() // it mostly waits
	a, manager, server := newUpdatingAgent(t, `
jobs:
  - {event: quick, cmd: 'echo {{task_id}} >> ran'}
`)
	next := makeBuild(t, 5, "")
	server.slow = make(chan struct{})
	server.offer(manager, 5, next)
	a.start()
	killAt := func(line string) {
		t.Helper()
		a.awaitLine(line)
		id := a.create("quick", "{}")
		a.cmd.Process.Kill()
		<-a.gone
		a.start()
		a.wait(id, statusFinish)
	}
	waitFor(t, 20*time.Second, func() string {
		if info, err := os.Stat(updateFile(a.program)); err != nil || info.Size() < int64(len(next.content)/2) {
			return "half of the new version is not there"
		}
		return ""
	})
	server.mu.Lock()
	close(server.slow)
	server.slow = nil
	server.mu.Unlock()
	killAt("the manager offers")
	killAt("goes on trial")
	if r := server.served(); len(r) != 2 || r[1].Header.Get("Range") == "" {
		t.Errorf("%d downloads", len(r))
	}
	killAt("worker stopped") // the old one, in the middle of the trial
	killAt("the new version is installed")
	if v := a.version(); v != "v5.0.0" {
		t.Errorf("after the swap, version %s was started", v)
	}
	server.offer(manager, 6, makeBuild(t, 6, ""))
	a.cmd.Process.Signal(syscall.SIGHUP)
	a.awaitLine("the parent follows")
	a.cmd.Process.Kill()
	<-a.gone
	a.start()
	if v := a.version(); v != "v6.0.0" {
		t.Errorf("after the parent was killed on its way, version %s was started", v)
	}
	a.wait(a.create("quick", "{}"), statusFinish)
}

// TestSwapInterrupted has the swap find what a kill in its middle leaves.
func TestSwapInterrupted(t *testing.T) {
	for name, left := range map[string]map[string]string{
		"nothing":  {"job_item": "now", "job_item.new": "next"},
		"aside":    {"job_item": "now", "job_item.new": "next", "job_item.old": "now"},
		"older":    {"job_item": "now", "job_item.new": "next", "job_item.old": "before"},
		"new gone": {"job_item": "now"},
	} {
		dir := t.TempDir()
		program := filepath.Join(dir, "job_item")
		for file, content := range left {
			must(t, os.WriteFile(filepath.Join(dir, file), []byte(content), 0o755))
		}
		err := swapBinary(program)
		if name == "new gone" {
			if codeOf(err) != codeUpdate || holds(program, []byte("now")) != nil {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		must(t, err)
		must(t, holds(program, []byte("next")))
		must(t, holds(program+".old", []byte("now")))
	}
}

// TestUpdateRefused looks at every way in which an offer is not what it says.
func TestUpdateRefused(t *testing.T) {
	public, private, err := ed25519.GenerateKey(nil)
	must(t, err)
	key := base64.StdEncoding.EncodeToString(public)
	good := makeBuild(t, 5, "")
	sign := func(b build) string { return base64.StdEncoding.EncodeToString(ed25519.Sign(private, b.content)) }
	foreign := bytes.Clone(good.content)
	if foreign[18] ^= 0xff; runtime.GOOS != "linux" { // the machine in an ELF header
		copy(foreign, "not a program")
	}
	server := newDownload(t)
	program := makeBuild(t, 4, "").install(t)
	for _, row := range []struct {
		name   string
		build  build
		offer  offeredVersion
		config UpdateConfig
		want   string // part of the error; "": none
		passes bool   // it may be better another time
	}{
		{name: "good sum", build: good, offer: offeredVersion{SHA256: good.sum}},
		{name: "good sum in capitals", build: good, offer: offeredVersion{SHA256: strings.ToUpper(good.sum)}},
		{name: "good signature", build: good, offer: offeredVersion{Signature: sign(good)}, config: UpdateConfig{PublicKey: key}},
		{name: "insecure", build: good, config: UpdateConfig{AllowInsecure: true}},
		{name: "plain http", build: good, want: "plain http"},
		{name: "bad sum", build: good, offer: offeredVersion{SHA256: strings.Repeat("ab", 32)}, want: "its SHA-256 is " + good.sum},
		{name: "no sum", build: good, offer: offeredVersion{SHA256: "abc"}, want: "not 64 hex digits"},
		{name: "signature of another", build: good, offer: offeredVersion{Signature: sign(buildOf([]byte("x"))), SHA256: good.sum},
			config: UpdateConfig{PublicKey: key}, want: "not that of update.public_key"},
		{name: "signature of another key", build: good, offer: offeredVersion{Signature: sign(good)},
			config: UpdateConfig{PublicKey: base64.StdEncoding.EncodeToString(make([]byte, 32))}, want: "not that of update.public_key"},
		{name: "no signature", build: good, offer: offeredVersion{SHA256: good.sum}, config: UpdateConfig{PublicKey: key},
			want: "the manager gives none"},
		{name: "insecure is no way around the key", build: good, config: UpdateConfig{PublicKey: key, AllowInsecure: true},
			want: "the manager gives none"},
		{name: "truncated", build: buildOf(good.content[:len(good.content)/2]), offer: offeredVersion{SHA256: good.sum},
			want: "its SHA-256 is"},
		{name: "empty", build: buildOf(nil), config: UpdateConfig{AllowInsecure: true}, want: "it is empty"},
		{name: "another number", build: makeBuild(t, 6, ""), config: UpdateConfig{AllowInsecure: true}, want: "offers number 5"},
		{name: "no program", build: buildOf([]byte("<html>")), config: UpdateConfig{AllowInsecure: true}, want: "exec format error"},
		{name: "another machine", build: buildOf(foreign), config: UpdateConfig{AllowInsecure: true}, want: "exec format error"},
		{name: "dry run", build: makeBuild(t, 5, "fails-dry-run"), config: UpdateConfig{AllowInsecure: true},
			want: "FAIL that is missing", passes: true},
		{name: "a file", build: good, offer: offeredVersion{Link: "file:///etc/passwd"}, want: "no http or https address"},
		{name: "no host", build: good, offer: offeredVersion{Link: "https:"}, want: "no http or https address"},
		{name: "no address", build: good, offer: offeredVersion{Link: server.URL + "/..%zz"}, want: "no http or https address"},
	} {
		t.Run(row.name, func(t *testing.T) {
			server.mu.Lock()
			server.build = row.build
			server.mu.Unlock()
			offer := row.offer
			if offer.Number = 5; offer.Link == "" {
				offer.Link = server.URL
			}
			a := newAgent(t, "jobs: [{event: e, cmd: 'true'}]\n")
			cfg, err := loadConfig(filepath.Join(a.dir, "config.yaml"), os.LookupEnv)
			must(t, err)
			cfg.Update = row.config
			log := slog.New(slog.DiscardHandler)
			f := updateFetch{offer: offer, cfg: cfg, file: updateFile(program), like: program, log: log, reaper: newReaper(log)}
			t.Setenv("JOB_ITEM_TEST_MAIN", "1")
			err = f.run(t.Context())
			var refused *versionRefused
			isRefused := errors.As(err, &refused)
			switch {
			case row.want == "" && err != nil:
				t.Errorf("refused: %v", err)
			case row.want != "" && (err == nil || !strings.Contains(err.Error(), row.want) || codeOf(err) != codeUpdate):
				t.Errorf("error %v; want %q", err, row.want)
			case row.want != "" && isRefused == row.passes:
				t.Errorf("refused for good: %v (%v)", isRefused, err)
			}
		})
	}
}

// TestUpdateImpossible is about what this host lacks; it may be better another time.
func TestUpdateImpossible(t *testing.T) {
	server := newDownload(t)
	good := makeBuild(t, 5, "")
	server.build = good
	log := slog.New(slog.DiscardHandler)
	fetch := func(file, link string, need int64) error {
		f := updateFetch{
			offer: offeredVersion{Number: 5, Link: link, SHA256: good.sum}, cfg: &Config{TakeWhen: TakeWhen{DiskFree: need}},
			file: file, like: file, log: log, reaper: newReaper(log),
		}
		return f.run(t.Context())
	}
	for name, row := range map[string]struct {
		file, link string
		need       int64
		want       string
	}{
		"folder away":      {"/proc/job_item", server.URL, 0, "write /proc/job_item"},
		"disk full":        {filepath.Join(t.TempDir(), "x"), server.URL, 1 << 60, "too little room"},
		"no server":        {filepath.Join(t.TempDir(), "x"), "http://user:hush@127.0.0.1:1/x?hush", 0, "connection refused"},
		"not found":        {filepath.Join(t.TempDir(), "x"), server.URL + "/404", 0, "404"},
		"https to nowhere": {filepath.Join(t.TempDir(), "x"), "https" + strings.TrimPrefix(server.URL, "http"), 0, "HTTP response to HTTPS"},
	} {
		t.Run(name, func(t *testing.T) {
			if name == "not found" {
				missing := httptest.NewServer(http.NotFoundHandler())
				defer missing.Close()
				row.link = missing.URL
			}
			if name == "no server" || name == "https to nowhere" {
				t.Parallel() // it waits between its attempts
			}
			err := fetch(row.file, row.link, row.need)
			var refused *versionRefused
			if err == nil || errors.As(err, &refused) || codeOf(err) != codeUpdate || !strings.Contains(err.Error(), row.want) {
				t.Errorf("error %v; want %q", err, row.want)
			}
			if strings.Contains(fmt.Sprint(err), "hush") {
				t.Errorf("the error gives a password away: %v", err)
			}
		})
	}
}

// TestUpdateRedirect follows links, but never from https to http.
func TestUpdateRedirect(t *testing.T) {
	var f updateFetch
	request := func(address string) *http.Request {
		u, err := url.Parse(address)
		must(t, err)
		return &http.Request{URL: u}
	}
	if err := f.checkRedirect(request("http://b"), []*http.Request{request("http://a")}); err != nil {
		t.Error(err)
	}
	if err := f.checkRedirect(request("https://b"), []*http.Request{request("https://a")}); err != nil {
		t.Error(err)
	}
	if f.checkRedirect(request("http://b"), []*http.Request{request("https://a"), request("https://c")}) == nil {
		t.Error("from https to http")
	}
	if f.checkRedirect(request("https://b"), make([]*http.Request, updateRedirects+1)) == nil {
		t.Error("redirected for ever")
	}
}

// holds is an error where the file holds something else.
func holds(path string, want []byte) error {
	got, err := os.ReadFile(path)
	if err == nil && !bytes.Equal(got, want) {
		err = fmt.Errorf("%s is another file", path)
	}
	return err
}

// version is what the worker says it is.
func (a *agent) version() string {
	var health struct{ Version string }
	a.getJSON("/health", &health)
	return health.Version
}

// trialTime is what a trial may take: a minute, and what comes before and after it, on a busy machine.
const trialTime = 100 * time.Second

// awaitLine waits for a message in the log.
func (a *agent) awaitLine(message string) {
	a.t.Helper()
	waitFor(a.t, trialTime, func() string {
		if !strings.Contains(a.log.String(), message) {
			return "no line: " + message + "\n" + a.log.String()
		}
		return ""
	})
}

// awaitTrial waits until /health tells how an update went.
func (a *agent) awaitTrial(status, problem string) {
	a.t.Helper()
	waitFor(a.t, trialTime, func() string {
		if h := a.health(); h.Status != status || !strings.Contains(fmt.Sprint(h.Problems), problem) {
			return fmt.Sprintf("health is %+v; want %s with %q\n%s", h, status, problem, a.log)
		}
		return ""
	})
}
