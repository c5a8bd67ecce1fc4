package main

// manager_fake_test.go holds a Job Manager for tests.

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
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
