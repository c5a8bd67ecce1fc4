package main

// manager_test.go holds a Job Manager for tests, and what must be true of talking to one.

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Who the workers of a fakeManager have to be.
const (
	fakeProjectID = "7bd0c868-87a0-4c90-8d27-559677763bb6"
	fakeSecretKey = "do-not-print-me-4711"
)

// A fakeManager is a Job Manager of one project. Its fields are set by change.
type fakeManager struct {
	t       testing.TB
	address string

	mu         sync.Mutex // guards what follows
	uuid       string
	connection map[string]any // broker_connection; nil: there is none in the reply
	jobs       []any          // project.job_datas, see fakeJob
	release    map[string]any // the job_item_… fields
	zip        []byte         // what tls/download gives; nil: 404
	status     int            // of every answer that is not 200 by itself; 0: 200
	body       string         // instead of every answer, with status; "": as it should be
	delay      time.Duration  // before every answer
	requests   []managerRequest
	server     *httptest.Server // nil while it is stopped
}

// A managerRequest is what a worker has sent.
type managerRequest struct {
	path string
	body map[string]any
	at   time.Time
}

// newFakeManager starts a manager that gives the project this id in subjects. It stops with the test.
func newFakeManager(t testing.TB, projectUUID string) *fakeManager {
	t.Helper()
	f := &fakeManager{t: t, address: "127.0.0.1:0", uuid: projectUUID}
	f.start()
	t.Cleanup(f.stop)
	return f
}

// fakeJob is one entry of job_datas. limit and timeout may be of any type; nested are entries made by fakeNestedJob.
func fakeJob(event string, limit, timeout any, nested ...any) map[string]any {
	return map[string]any{"event": event, "name": "The job " + event, "nested_jobs": nested,
		"data": map[string]any{"limit_process": limit, "timeout": timeout}}
}

func fakeNestedJob(event string, limit, timeout any) map[string]any {
	return map[string]any{"event": event, "name": "The job " + event, "limit": limit, "timeout": timeout}
}

func (f *fakeManager) url() string { return "http://" + f.address }

// config is end_point and credential for a configuration file.
func (f *fakeManager) config() string {
	return fmt.Sprintf("end_point: %s/api/worker/config\ncredential: {project_id: %s, secret_key: %s}\n",
		f.url(), fakeProjectID, fakeSecretKey)
}

// change sets fields while workers may be asking.
func (f *fakeManager) change(edit func(*fakeManager)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	edit(f)
}

// received gives the requests to a path so far, oldest first.
func (f *fakeManager) received(path string) []managerRequest {
	f.mu.Lock()
	defer f.mu.Unlock()
	var found []managerRequest
	for _, r := range f.requests {
		if r.path == path {
			found = append(found, r)
		}
	}
	return found
}

// stop refuses connections until start.
func (f *fakeManager) stop() {
	f.mu.Lock()
	server := f.server
	f.server = nil
	f.mu.Unlock()
	if server != nil {
		server.CloseClientConnections()
		server.Close()
	}
}

// start listens, on the port of the first time.
func (f *fakeManager) start() {
	f.t.Helper()
	listener, err := net.Listen("tcp", f.address)
	if err != nil {
		f.t.Fatal(err)
	}
	if strings.HasSuffix(f.address, ":0") { // written once: others read it without the lock
		f.address = listener.Addr().String()
	}
	server := httptest.NewUnstartedServer(f)
	server.Listener.Close()
	server.Listener = listener
	server.Start()
	f.change(func(f *fakeManager) { f.server = server })
}

func (f *fakeManager) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	text, _ := io.ReadAll(io.LimitReader(r.Body, 1<<20))
	request := managerRequest{path: r.URL.Path, at: time.Now()}
	err := json.Unmarshal(text, &request.body)

	f.mu.Lock()
	f.requests = append(f.requests, request)
	delay, status, body, archive := f.delay, f.status, f.body, f.zip
	reply := map[string]any{"uuid": f.uuid, "project": map[string]any{"job_datas": f.jobs}}
	if f.connection != nil {
		reply["broker_connection"] = f.connection
	}
	maps.Copy(reply, f.release)
	good, _ := json.Marshal(map[string]any{"return": reply})
	f.mu.Unlock()

	select {
	case <-time.After(delay):
	case <-r.Context().Done():
		return
	}
	id, key := request.body["project_id"], request.body["secret_key"]
	if r.URL.Path == managerTLSPath {
		id, key = request.body["app_id"], request.body["app_secret"]
	}
	switch {
	case err != nil || r.Method != http.MethodPost || r.Header.Get("Content-Type") != "application/json":
		http.Error(w, "want JSON by POST", http.StatusBadRequest)
	case status != 0 || body != "":
		w.WriteHeader(max(status, http.StatusOK))
		io.WriteString(w, body)
	case id != fakeProjectID || key != fakeSecretKey:
		w.WriteHeader(http.StatusUnauthorized)
		// As a careless manager does it.
		json.NewEncoder(w).Encode(map[string]any{"message": fmt.Sprintf("no project %v with key %v", id, key)})
	case r.URL.Path == managerConfigPath:
		w.Header().Set("Content-Type", "application/json")
		w.Write(good)
	case r.URL.Path == managerTLSPath && archive != nil:
		w.Header().Set("Content-Type", "application/zip")
		w.Write(archive)
	default:
		http.NotFound(w, r)
	}
}

// managedConfig loads a configuration file for that manager, in a folder of its own.
func managedConfig(t testing.TB, f *fakeManager, more string) *Config {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(path, []byte(f.config()+more), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := loadConfig(path, func(string) (string, bool) { return "", false })
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

func silentLog() *slog.Logger { return slog.New(slog.DiscardHandler) }

// wantError checks an error's code and a part of its text and hint, and that no key is in them.
func wantError(t testing.TB, err error, code errCode, part string) {
	t.Helper()
	switch {
	case err == nil:
		t.Errorf("no error; want %s with %q", code, part)
	case codeOf(err) != code || !strings.Contains(err.Error()+"\n"+hintOf(err), part):
		t.Errorf("error [%s] %v (%s); want [%s] with %q", codeOf(err), err, hintOf(err), code, part)
	case hintOf(err) == "":
		t.Errorf("error %v does not say what to do", err)
	}
	if text := fmt.Sprintf("%v %+v %s", err, err, hintOf(err)); strings.Contains(text, fakeSecretKey) {
		t.Errorf("the key is in the error %s", text)
	}
}

func TestManagerRequest(t *testing.T) {
	f := newFakeManager(t, "project-1")
	m := newManagerClient(managedConfig(t, f, minimalConfig), silentLog())
	if _, err := m.ask(t.Context()); err != nil {
		t.Fatal(err)
	}
	got := f.received(managerConfigPath)
	if len(got) != 1 {
		t.Fatalf("%d requests; want 1", len(got))
	}
	body := got[0].body
	information, ok := body["host"].(map[string]any)
	delete(body, "host")
	want := map[string]any{
		"project_id": fakeProjectID, "secret_key": fakeSecretKey, "os": runtime.GOOS, "arch": runtime.GOARCH,
	}
	if !reflect.DeepEqual(body, want) {
		t.Errorf("request %v; want %v", body, want)
	}
	if name, _ := os.Hostname(); !ok || information["hostname"] != name {
		t.Errorf("host %v; want that of %s", information, name)
	}
}

func TestManagerReply(t *testing.T) {
	f := newFakeManager(t, "project-1")
	f.change(func(f *fakeManager) {
		f.connection = map[string]any{
			"key": "k", "name": "Main", "type": "NATS", "host": "a.example:4222, b.example", "port": "4222", "secure": "1",
			"ca_file": "tls/ca.crt", "user": "u", "password": " p ", "unknown": []int{1}, "db": "x", "cert_file": nil,
		}
		f.jobs = []any{
			fakeJob("a", "3", "90"), fakeJob("b", 0, nil, fakeNestedJob("c", 2, 1.5), fakeNestedJob("d.e", "", "1e3")),
			nil, "nonsense", fakeJob("no good", 1, 1), fakeJob("a", 1, 1),
			map[string]any{"event": "plain", "data": []any{}, "nested_jobs": nil}, fakeJob("minus", -1, "-2"),
			fakeJob("huge", 1e300, 1e300), fakeJob("odd", "many", []int{1, 2}), fakeJob(fakeSecretKey+" ", true, false),
			fakeJob("key "+fakeSecretKey, 1, 1),
		}
		f.release = map[string]any{
			"job_item_version_number": "12", "job_item_version": "v4.1.0", "job_item_link": "https://x.example/job_item",
			"job_item_sha256": "ab", "job_item_signature": map[string]any{"no": "text"},
		}
	})
	reply, err := newManagerClient(managedConfig(t, f, minimalConfig), silentLog()).ask(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	wantBroker := &BrokerConfig{
		Key: "k", Name: "Main", Type: "nats", Host: "a.example:4222,b.example", Port: 4222, Secure: true,
		CAFile: "tls/ca.crt", AuthType: "user_password", User: "u", Password: " p ",
	}
	if !reflect.DeepEqual(reply.Broker, wantBroker) {
		t.Errorf("broker %+v; want %+v", reply.Broker, wantBroker)
	}
	wantJobs := map[string]jobBounds{
		"a": {3, 90 * time.Second}, "b": {}, "b.c": {2, 1500 * time.Millisecond}, "b.d.e": {0, 1000 * time.Second},
		"plain": {}, "minus": {}, "huge": {maxConcurrency, maxTimeout}, "odd": {}, fakeSecretKey: {},
	}
	if !reflect.DeepEqual(reply.Jobs, wantJobs) {
		t.Errorf("jobs %v; want %v", reply.Jobs, wantJobs)
	}
	wantVersion := offeredVersion{Number: 12, Name: "v4.1.0", Link: "https://x.example/job_item", SHA256: "ab"}
	if reply.Project != "project-1" || reply.Version != wantVersion {
		t.Errorf("project %q, version %+v; want %+v", reply.Project, reply.Version, wantVersion)
	}
	warnings := strings.Join(reply.Warnings, "\n")
	for _, part := range []string{"job_datas[3]", "job_datas[4].event", "listed twice", `got "many"`, "job_item_signature",
		"timeout of project.job_datas[9]", `got "key redacted"`, `got "true"`} {
		if !strings.Contains(warnings, part) {
			t.Errorf("no %q among the warnings\n%s", part, warnings)
		}
	}
	if strings.Contains(warnings, fakeSecretKey) {
		t.Errorf("the key is in the warnings\n%s", warnings)
	}
}

func TestManagerFailures(t *testing.T) {
	f := newFakeManager(t, "project-1")
	for _, row := range []struct {
		status int
		body   string
		code   errCode
		part   string
	}{
		{401, "", codeManagerStatus, "credential.secret_key"},
		{403, `{"message":"the key ` + fakeSecretKey + ` is wrong"}`, codeManagerStatus, "the key redacted is wrong"},
		{404, "", codeManagerStatus, "check end_point"},
		{407, "", codeManagerStatus, "HTTP_PROXY"},
		{418, "", codeManagerStatus, "Check end_point"},
		{307, "", codeManagerStatus, "Redirects"},
		{500, `{"error":"x` + strings.Repeat("y", 10_000) + `"}`, codeManagerStatus, "xyyy"},
		{503, `{"error":{"deep":"` + fakeSecretKey + `"}}`, codeManagerStatus, "answered 503 Service Unavailable"},
		{204, "", codeManagerStatus, "204"},
		{200, "<html>", codeManagerReply, "not JSON"},
		{200, `{"return":{"uuid":"u"}} trailing`, codeManagerReply, "not JSON"},
		{200, `[]`, codeManagerReply, `want an object with "return" in it`},
		{200, `{}`, codeManagerReply, `"return" is missing`},
		{200, `{"return":null,"message":"project of ` + fakeSecretKey + ` is closed"}`, codeManagerReply,
			"the manager says: project of redacted is closed"},
		{200, `{"return": [ ]}`, codeManagerReply, `"return" is missing`},
		{200, `{"return":"text"}`, codeManagerReply, "return: want an object"},
		{200, `{"return":{"uuid":"a.b"}}`, codeManagerReply, "uuid: want"},
		{200, `{"return":{"uuid":"a b >*"}}`, codeManagerReply, "uuid: want"},
		{200, `{"return":{"uuid":["a"]}}`, codeManagerReply, "uuid: want a single value"},
		{200, `{"return":{"project":7}}`, codeManagerReply, "project: want an object"},
		{200, `{"return":{"project":{"job_datas":{"0":{}}}}}`, codeManagerReply, "job_datas: want a list"},
		{200, `{"return":{"project":{"job_datas":[` + strings.Repeat("{},", 10_000) + `{}]}}}`, codeManagerReply,
			"more than 10000 jobs"},
		{200, `{"return":{"project":{"job_datas":[{"event":"a","nested_jobs":[` + strings.Repeat("0,", 10_000) + `0]}]}}}`,
			codeManagerReply, "more than 10000 jobs"},
		{200, strings.Repeat("[", 100_000), codeManagerReply, "not JSON"},
		{200, `{"return":{"x":"` + strings.Repeat("x", maxManagerReplyBytes) + `"}}`, codeManagerAway, "larger than 8 MiB"},
	} {
		f.change(func(f *fakeManager) { f.status, f.body = row.status, row.body })
		reply, err := newManagerClient(managedConfig(t, f, minimalConfig), silentLog()).ask(t.Context())
		wantError(t, err, row.code, row.part)
		if err != nil && (!strings.Contains(err.Error(), f.url()+managerConfigPath) || len(err.Error()) > 2000) {
			t.Errorf("error %.3000v; want one with the URL, not long", err)
		}
		if reply != nil {
			t.Errorf("reply beside the error %v", err)
		}
	}
}

func TestManagerBadConnections(t *testing.T) {
	for _, row := range [][2]string{
		{`7`, "broker_connection: want an object"},
		{`{"type":"nats"}`, "host: want a host"},
		{`{"host":"h"}`, "type: want one of nats, rabbitmq, redis"},
		{`{"type":"local","host":"h"}`, `got "local"`},
		{`{"type":"kafka","host":"h"}`, `got "kafka"`},
		{`{"type":"kafka` + fakeSecretKey + `","host":"h"}`, `got "kafkaredacted"`},
		{`{"type":"nats","host":"nats://h"}`, "host: want a host"},
		{`{"type":"nats","host":"u:` + fakeSecretKey + `@h"}`, "something with @ in it"},
		{`{"type":"nats","host":"a,,b"}`, "host: want a host"},
		{`{"type":"nats","host":"a:0"}`, "host: want a host"},
		{`{"type":"nats","host":"a\nb"}`, "control characters"},
		{`{"type":"nats","host":"h","port":65536}`, "port: want a whole number from 0 to 65535"},
		{`{"type":"nats","host":"h","port":-1}`, "port: want"},
		{`{"type":"nats","host":"h","port":"4222x"}`, "port: want"},
		{`{"type":"nats","host":"h","port":42.5}`, "port: want"},
		{`{"type":"nats","host":"h","port":{"a":1}}`, "port: want a single value"},
		{`{"type":"nats","host":"h","secure":"maybe"}`, "secure: want true or false"},
		{`{"type":"nats","host":"h","secure":2}`, "secure: want true or false"},
		{`{"type":"nats","host":"h","auth_type":"magic"}`, "auth_type: want one of"},
		{`{"type":"nats","host":"h","auth_type":"token"}`, "there is no token"},
		{`{"type":"nats","host":"h","auth_type":"user_password_bcrypt"}`, "there is no user"},
		{`{"type":"nats","host":"h","password":"a\u0000b"}`, "password: want text on one line"},
		{`{"type":"nats","host":"h","ca_file":"a\u001bb"}`, "ca_file: want text on one line"},
		{`{"type":"nats","host":"h","user":"` + strings.Repeat("u", 5000) + `"}`, "user: want at most 4096 bytes"},
		{`{"type":"redis","host":"h","db":-1}`, "db: want"},
		{`{"type":"rabbitmq","host":"h","exchange":"` + strings.Repeat("e", 256) + `"}`, "exchange: want at most 255"},
	} {
		_, err := parseManagerReply([]byte(`{"return":{"uuid":"u","broker_connection":`+row[0]+`}}`), fakeSecretKey)
		if err == nil || !strings.Contains(err.Error(), row[1]) || strings.Contains(err.Error(), fakeSecretKey) {
			t.Errorf("broker_connection %s: %v; want %q", row[0], err, row[1])
		}
	}
}

func TestManagerTruths(t *testing.T) {
	for text, want := range map[string]bool{
		`true`: true, `"true"`: true, `1`: true, `"1"`: true, `"YES"`: true, `" on "`: true,
		`false`: false, `"false"`: false, `0`: false, `"0"`: false, `null`: false, `""`: false, `"no"`: false,
	} {
		reply, err := parseManagerReply([]byte(
			`{"return":{"uuid":"u","broker_connection":{"type":"redis","host":"h","port":6379.0,"secure":`+text+`}}}`), "")
		if err != nil || reply.Broker.Secure != want || reply.Broker.Port != 6379 {
			t.Errorf("secure: %s gives %+v, %v; want %v", text, reply, err, want)
		}
	}
}

// TestManagerAway is about connections that fail before there is an answer.
func TestManagerAway(t *testing.T) {
	f := newFakeManager(t, "project-1")
	cfg := managedConfig(t, f, minimalConfig)
	ask := func(endPoint string) error {
		changed := *cfg
		changed.EndPoint = endPoint
		m := newManagerClient(&changed, silentLog())
		m.askLimit = 2 * time.Second
		_, err := m.ask(t.Context())
		return err
	}
	secure := httptest.NewTLSServer(f)
	defer secure.Close()
	secure.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	wantError(t, ask(secure.URL), codeManagerAway, "SSL_CERT_FILE")
	wantError(t, ask("https"+strings.TrimPrefix(f.url(), "http")), codeManagerAway, "no TLS at that port")
	wantError(t, ask(strings.Replace(secure.URL, "https", "http", 1)), codeManagerStatus, "HTTP request to an HTTPS server")

	moved := httptest.NewServer(http.RedirectHandler(f.url()+managerConfigPath, http.StatusPermanentRedirect))
	defer moved.Close()
	wantError(t, ask(moved.URL), codeManagerStatus, f.url())
	if n := len(f.received(managerConfigPath)); n != 0 {
		t.Errorf("%d requests, with the key, after a redirect; want none", n)
	}

	broken := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "100")
		io.WriteString(w, `{"return"`)
	}))
	defer broken.Close()
	wantError(t, ask(broken.URL), codeManagerAway, "broke off")

	f.change(func(f *fakeManager) { f.delay = time.Minute })
	wantError(t, ask(f.url()), codeManagerAway, "does not answer in time")
	f.stop()
	part := "connection refused"
	if runtime.GOOS == "windows" {
		part = "ask " + f.url()
	}
	wantError(t, ask(f.url()), codeManagerAway, part)

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := newManagerClient(cfg, silentLog()).ask(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("with a cancelled context: %v; want that it was cancelled", err)
	}
}

// TestManagerEndless is about answers that do not end, or not in time.
func TestManagerEndless(t *testing.T) {
	cfg := managedConfig(t, newFakeManager(t, "project-1"), minimalConfig)
	var hang atomic.Bool
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		part, pause := strings.Repeat("x", 1<<20), time.Duration(0)
		if hang.Load() {
			part, pause = "x", 20*time.Millisecond
		}
		for {
			if _, err := io.WriteString(w, part); err != nil {
				return
			}
			w.(http.Flusher).Flush()
			select {
			case <-time.After(pause):
			case <-r.Context().Done():
				return
			}
		}
	}))
	defer server.Close()
	var bomb bytes.Buffer
	packer, _ := gzip.NewWriterLevel(&bomb, gzip.BestSpeed)
	packer.Write(make([]byte, maxManagerReplyBytes+1))
	packer.Close()
	packed := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		w.Write(bomb.Bytes())
	}))
	defer packed.Close()
	ask := func(endPoint string, limit time.Duration) error {
		changed := *cfg
		changed.EndPoint = endPoint
		m := newManagerClient(&changed, silentLog())
		m.askLimit = limit
		_, err := m.ask(t.Context())
		return err
	}
	wantError(t, ask(server.URL, time.Minute), codeManagerAway, "larger than 8 MiB")
	wantError(t, ask(packed.URL, time.Minute), codeManagerAway, "larger than 8 MiB")
	hang.Store(true)
	wantError(t, ask(server.URL, 300*time.Millisecond), codeManagerAway, "the reply broke off: no answer")
}

func TestManagerWrongKey(t *testing.T) {
	f := newFakeManager(t, "project-1")
	cfg := managedConfig(t, f, minimalConfig)
	cfg.Credential.SecretKey = fakeSecretKey + "-but-not-quite"
	_, err := newManagerClient(cfg, silentLog()).ask(t.Context())
	wantError(t, err, codeManagerStatus, "with key redacted")
	if strings.Contains(err.Error(), "not-quite") {
		t.Errorf("the key is in the error %v", err)
	}
}

func TestManagerMerge(t *testing.T) {
	f := newFakeManager(t, "project-1")
	cfg := managedConfig(t, f, `
concurrency: 8
broker_connection: {type: nats, host: from.file, password: theirs, durable: true}
jobs:
  - {event: neither, cmd: x}
  - {event: manager, cmd: x}
  - {event: file, cmd: x, limit: 2, timeout: 20s}
  - {event: both, cmd: x, limit: 3, timeout: 30s}
  - {event: less, cmd: x, limit: 3, timeout: 30s}
  - {event: parent.nested, cmd: x, limit: 5}
  - {event: unlisted, cmd: x}
  - {event: nested, cmd: x}
`)
	f.change(func(f *fakeManager) {
		f.connection = map[string]any{"type": "nats", "host": "from.manager"}
		f.jobs = []any{
			fakeJob("neither", nil, nil), fakeJob("manager", 4, 40), fakeJob("file", "", 0), fakeJob("both", "5", "50"),
			fakeJob("less", 1, 10), fakeJob("parent", 1, 1, fakeNestedJob("nested", "4", "40")), fakeJob("not_ours", 1, 1),
		}
	})
	before, _ := json.Marshal(cfg)
	reply, err := newManagerClient(cfg, silentLog()).ask(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	merged, warnings, err := reply.merge(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if after, _ := json.Marshal(cfg); !bytes.Equal(before, after) {
		t.Errorf("the file's configuration was changed: %s; want %s", after, before)
	}
	want := []jobBounds{{8, 0}, {4, 40 * time.Second}, {2, 20 * time.Second}, {3, 30 * time.Second}, {1, 10 * time.Second},
		{4, 40 * time.Second}}
	events := []string{"neither", "manager", "file", "both", "less", "parent.nested"}
	var got []jobBounds
	var gotEvents []string
	for _, job := range merged.Jobs {
		got, gotEvents = append(got, jobBounds{job.Limit, job.Timeout}), append(gotEvents, job.Event)
	}
	if !reflect.DeepEqual(got, want) || !slices.Equal(gotEvents, events) {
		t.Errorf("jobs %v %v; want %v %v", gotEvents, got, events, want)
	}
	if len(warnings) != 2 || !strings.Contains(warnings[0], "unlisted is not subscribed") ||
		!strings.Contains(warnings[1], "job nested is not subscribed") {
		t.Errorf("warnings %q; want that unlisted and nested are not subscribed", warnings)
	}
	wantBroker := BrokerConfig{Type: "nats", Host: "from.manager", AuthType: "none", Durable: true}
	if merged.Broker != wantBroker {
		t.Errorf("broker %+v; want %+v: the manager's, durable from the file", merged.Broker, wantBroker)
	}
	if merged.Project != "project-1" || merged.Credential.ProjectID != fakeProjectID {
		t.Errorf("project %q, credential %q; want the manager's and the file's", merged.Project, merged.Credential.ProjectID)
	}

	// The manager's own word on durable counts, and another type of broker takes nothing from the file.
	for _, connection := range []string{`{"type":"nats","host":"h","durable":"0"}`, `{"type":"redis","host":"h"}`} {
		reply, err := parseManagerReply([]byte(`{"return":{"uuid":"u","broker_connection":`+connection+`}}`), "")
		if err != nil {
			t.Fatal(err)
		}
		if merged, _, _ := reply.merge(cfg); merged.Broker.Durable {
			t.Errorf("%s is durable after the merge; want not", connection)
		}
	}
}

func TestManagerMergeSaysNothing(t *testing.T) {
	f := newFakeManager(t, "")
	cfg := managedConfig(t, f, minimalConfig)
	reply, err := parseManagerReply([]byte(`{"return":{"project":null,"other":1}}`), "")
	if err != nil {
		t.Fatal(err)
	}
	merged, warnings, err := reply.merge(cfg)
	if err != nil || merged.Project != fakeProjectID || merged.Broker.Type != "local" || len(merged.Jobs) != 0 {
		t.Errorf("merged %+v, %v; want the file's project and broker, and no jobs", merged, err)
	}
	text := strings.Join(warnings, "\n")
	for _, part := range []string{"uuid: missing", "names a broker", "job a is not subscribed"} {
		if !strings.Contains(text, part) {
			t.Errorf("no %q among the warnings\n%s", part, text)
		}
	}
}

func TestManagerPaths(t *testing.T) {
	root := t.TempDir()
	cfg := &Config{Dir: filepath.Join(root, "etc"), DataDir: filepath.Join(root, "var", "data"),
		Credential: Credential{SecretKey: fakeSecretKey}}
	ours := filepath.Join(root, "pki", "ca.crt")
	for _, row := range []struct{ path, want string }{
		{"ca.crt", filepath.Join(root, "etc", "ca.crt")},
		{"./tls//nats/ca.crt", filepath.Join(root, "etc", "tls", "nats", "ca.crt")},
		{`tls\nats\ca.crt`, filepath.Join(root, "etc", "tls", "nats", "ca.crt")},
		{"tls/../ca.crt", filepath.Join(root, "etc", "ca.crt")},
		{filepath.Join(root, "etc", "x", "ca.crt"), filepath.Join(root, "etc", "x", "ca.crt")},
		{"../var/data/tls/ca.crt", filepath.Join(root, "var", "data", "tls", "ca.crt")},
		{ours, ours},
		{"../pki/ca.crt", ours},
		{filepath.Join(root, "pki", "other.crt"), ""},
		{filepath.Join(root, "pki", "ca.crt", "x"), ""},
		{filepath.Join(root, "etcetera", "ca.crt"), ""},
		{filepath.Join(root, "etc"), ""},
		{".", ""}, {"..", ""}, {"../ca.crt", ""}, {`..\..\ca.crt`, ""}, {"tls/../../ca.crt", ""},
		{"/etc/ssl/ca.crt", ""}, {"//server/share/ca.crt", ""}, {`\\server\share\ca.crt`, ""}, {`C:\certs\ca.crt`, ""},
		{"C:ca.crt", ""}, {"/" + fakeSecretKey, ""},
	} {
		got, err := managerPath(cfg, "ca_file", row.path, ours)
		if got != row.want {
			t.Errorf("managerPath(%q) = %q, %v; want %q", row.path, got, err, row.want)
		}
		if row.want == "" {
			wantError(t, err, codeManagerPath, "broker_connection.ca_file")
		}
	}
	atRoot := filepath.VolumeName(root) + string(filepath.Separator)
	if liesBelow(atRoot, root) || !liesBelow(atRoot, filepath.Join(atRoot, "tls", "ca.crt")) {
		t.Error("for a configuration in the root folder everything, or not even tls, is inside")
	}
	reply := &managerReply{Broker: &BrokerConfig{Type: "nats", Host: "h", KeyFile: "/etc/ssl/private/host.key"}}
	_, _, err := reply.merge(cfg)
	wantError(t, err, codeManagerPath, "key_file")
}

func TestManagerRemembers(t *testing.T) {
	f := newFakeManager(t, "project-1")
	f.change(func(f *fakeManager) {
		f.connection = map[string]any{"type": "nats", "host": "h", "user": "<&>\u2028", "password": "p", "ca_file": "ca.crt"}
		f.jobs = []any{fakeJob("a", 1, 2)}
	})
	cfg := managedConfig(t, f, minimalConfig)
	m := newManagerClient(cfg, silentLog())
	_, _, err := m.remembered()
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a kept answer: %v; want that it does not exist", err)
	}
	wantError(t, err, codeManagerRemembered, "manager.json")

	reply, err := m.ask(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second replaces the first
		if err := m.remember(reply); err != nil {
			t.Fatal(err)
		}
	}
	got, at, err := m.remembered()
	if err != nil || !reflect.DeepEqual(got, reply) || time.Since(at) > time.Minute {
		t.Errorf("remembered %+v of %v, %v; want %+v", got, at, err, reply)
	}
	path := filepath.Join(cfg.DataDir, "manager.json")
	info, err := os.Stat(path)
	if err != nil || runtime.GOOS != "windows" && info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v; want mode 0600", info.Mode(), err)
	}
	if entries, _ := os.ReadDir(cfg.DataDir); len(entries) != 1 {
		t.Errorf("%v in data_dir; want manager.json alone", entries)
	}

	whole, _ := os.ReadFile(path)
	for what, text := range map[string]string{
		"empty": "", "torn": string(whole[:len(whole)/2]), "array": "[]",
		"changed": strings.Replace(string(whole), `"h"`, `"evil"`, 1),
		"unsound": `{"end_point":"` + cfg.EndPoint + `","project_id":"` + fakeProjectID + `","return":7}`,
		"large":   string(whole) + strings.Repeat(" ", maxManagerReplyBytes+4096),
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, _, err := m.remembered(); err == nil {
			t.Errorf("%s file gives %+v", what, got)
		} else {
			wantError(t, err, codeManagerRemembered, "manager.json")
		}
	}
	if err := m.remember(reply); err != nil {
		t.Fatal(err)
	}
	other := *cfg
	other.EndPoint = "http://other.example"
	_, _, err = newManagerClient(&other, silentLog()).remembered()
	wantError(t, err, codeManagerRemembered, "another end_point")

	other = *cfg
	other.DataDir = path // a file
	wantError(t, newManagerClient(&other, silentLog()).remember(reply), codeManagerRemember, "data_dir")
}

func TestManagerPauses(t *testing.T) {
	for range 1000 {
		for n := range 20 {
			if p := managerPause(n); p < minManagerPause || p > maxManagerPause || n > 6 && p < maxManagerPause/2 {
				t.Fatalf("managerPause(%d) = %v", n, p)
			}
		}
		if p := refreshPause(10 * time.Minute); p < 9*time.Minute || p > 11*time.Minute {
			t.Fatalf("refreshPause(10m) = %v", p)
		}
		refreshPause(0)
	}
}

// TestManagerBackSoon is a manager that is stopped and started again, changed while it is asked.
func TestManagerBackSoon(t *testing.T) {
	f := newFakeManager(t, "project-1")
	m := newManagerClient(managedConfig(t, f, minimalConfig), silentLog())
	f.stop()
	if _, err := m.ask(t.Context()); err == nil {
		t.Error("a stopped manager answered")
	}
	f.start()
	var asking sync.WaitGroup
	for i := range 8 {
		asking.Add(1)
		go func() {
			defer asking.Done()
			f.change(func(f *fakeManager) { f.jobs = append(f.jobs, fakeJob(fmt.Sprint("job", i), i, i)) })
			if _, err := m.ask(t.Context()); err != nil {
				t.Error(err)
			}
		}()
	}
	asking.Wait()
	if n := len(f.received(managerConfigPath)); n != 8 {
		t.Errorf("%d requests; want 8", n)
	}
}

func FuzzManagerReply(f *testing.F) {
	f.Add([]byte(`{"return":{"uuid":"u","project":{"job_datas":[{"event":"a","data":{"limit_process":"1","timeout":2},` +
		`"nested_jobs":[{"event":"b","limit":1,"timeout":"x"}]}]},"broker_connection":{"type":"nats","host":"a:1,b",` +
		`"port":"4222","secure":"1","ca_file":"tls\\ca.crt","auth_type":"none","durable":true},"job_item_version_number":3}}`))
	f.Add([]byte(`{"return":{"uuid":1e400,"broker_connection":{"type":"redis","host":"[::1]","db":"1","ca_file":"/x"}}}`))
	f.Add([]byte(`{"return":[],"message":["x"]}`))
	f.Add([]byte("\xef\xbb\xbf" + ` {"return":{"project":{"job_datas":[null,{},[],{"event":{}},{"data":[]}]}}} `))
	dir := f.TempDir()
	cfg := &Config{Dir: dir, DataDir: filepath.Join(dir, "data"), Broker: BrokerConfig{Type: "local"},
		Jobs: []Job{{Event: "a", Limit: 4}, {Event: "a.b", Limit: 4, Timeout: time.Minute}}}
	f.Fuzz(func(t *testing.T, body []byte) {
		reply, err := parseManagerReply(body, "fuzzed-key")
		if err != nil {
			if len(err.Error()) > 20_000 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
			return
		}
		for event, bounds := range reply.Jobs {
			if !legalSubject(event) || bounds.Limit < 0 || bounds.Timeout < 0 || bounds.Timeout > maxTimeout {
				t.Errorf("job %q with %v", event, bounds)
			}
		}
		again, err := parseReturn(reply.received, "fuzzed-key")
		if err != nil || !reflect.DeepEqual(again, reply) {
			t.Errorf("read again: %+v, %v; want %+v", again, err, reply)
		}
		merged, _, err := reply.merge(cfg)
		if err != nil {
			return
		}
		for _, job := range merged.Jobs {
			if job.Limit < 1 || job.Limit > 4 || job.Timeout < 0 {
				t.Errorf("job %+v", job)
			}
		}
		b := merged.Broker
		for _, path := range []string{b.CAFile, b.CertFile, b.KeyFile} {
			if path != "" && !liesBelow(dir, path) {
				t.Errorf("the manager may name %q", path)
			}
		}
		if b.Port < 0 || b.Port > 65535 || strings.ContainsFunc(b.Host+b.User+b.Exchange+b.VHost, isControl) {
			t.Errorf("broker %+v", b)
		}
	})
}
