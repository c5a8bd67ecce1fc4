package main

// httpapi_server_test.go holds what the tests of the REST API run on: a server with a service of the tests behind it.

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"mime/multipart"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

// A fakeService is a worker with one job, "hello", and one queued task, "waiting".
type fakeService struct {
	records *records
	bus     *eventBus

	mu      sync.Mutex // guards all below
	status  healthStatus
	failing error
	created []string
}

func (s *fakeService) create(_ context.Context, appID, event string, formBody json.RawMessage) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.failing != nil:
		return "", s.failing
	case event != "hello":
		return "", fmt.Errorf("create task of %q: %w", event, errUnknownEvent)
	}
	s.created = append(s.created, appID+" "+event+" "+string(formBody))
	return "0197c1de-7c7c-7e7e-8888-1234567890ab", nil
}

func (s *fakeService) terminate(_ context.Context, id string) error {
	rec, ok := s.record(id)
	switch {
	case !ok:
		return errTaskUnknown
	case rec.Status.final():
		return errTaskEnded
	}
	return nil
}

func (s *fakeService) notify(_ context.Context, id, msg string) error {
	s.bus.publish(taskNotified{TaskID: id, Msg: msg, At: time.Now()})
	return nil
}

func (s *fakeService) record(id string) (record, bool) {
	if id == "waiting" {
		return record{TaskID: id, Event: "hello", Status: statusQueued}, true
	}
	return s.records.get(id)
}

func (s *fakeService) list(f recordFilter) []record { return s.records.list(f) }

func (s *fakeService) health() healthReport {
	s.mu.Lock()
	defer s.mu.Unlock()
	return healthReport{Status: s.status, IdentityID: "me"}
}

func (s *fakeService) set(status healthStatus, failing error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.status, s.failing = status, failing
}

// An apiTest is a server on a real port, and what is behind it.
type apiTest struct {
	t       *testing.T
	api     *apiServer
	records *records
	bus     *eventBus
	service *fakeService
	base    string
}

func startAPI(t *testing.T, listen string, config apiConfig, adjust ...func(*apiServer)) *apiTest {
	t.Helper()
	a := &apiTest{t: t, bus: &eventBus{}}
	a.records = openTestRecords(t, t.TempDir(), testRetain)
	a.bus.subscribe(a.records.handle)
	a.service = &fakeService{records: a.records, bus: a.bus, status: healthOK}
	a.api = newAPIServer(config, a.service, a.bus, slog.New(slog.DiscardHandler))
	a.api.serveRecords(a.records)
	for _, change := range adjust {
		change(a.api)
	}
	listener, err := net.Listen("tcp", listen)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- a.api.serve(listener) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := a.api.shutdown(ctx); err != nil {
			t.Errorf("shutdown: %v", err)
		}
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	a.base = "http://" + listener.Addr().String()
	return a
}

// An apiReplyText is what came back.
type apiReplyText struct {
	status int
	body   string
	header http.Header
}

// call sends a request; headers are "Name: value". A body gets the type application/json unless they say otherwise.
func (a *apiTest) call(method, path, body string, headers ...string) apiReplyText {
	a.t.Helper()
	r, err := http.NewRequest(method, a.base+path, strings.NewReader(body))
	if err != nil {
		a.t.Fatal(err)
	}
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	for _, header := range headers {
		name, value, _ := strings.Cut(header, ": ")
		if name == "Host" {
			r.Host = value
			continue
		}
		r.Header.Set(name, value)
	}
	response, err := http.DefaultTransport.RoundTrip(r)
	if err != nil {
		a.t.Fatalf("%s %s: %v", method, path, err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		a.t.Fatalf("%s %s: %v", method, path, err)
	}
	return apiReplyText{response.StatusCode, string(text), response.Header}
}

// form is a multipart body with one file.
func form(field, name, content string) (body, header string) {
	var text bytes.Buffer
	w := multipart.NewWriter(&text)
	part, _ := w.CreateFormFile(field, name)
	io.WriteString(part, content)
	w.Close()
	return text.String(), "Content-Type: " + w.FormDataContentType()
}

func (a *apiTest) finishedTask(id string) {
	startTask(a.records, id, 1)
	printTask(a.records, id, "out "+id+"\n")
	finishTask(a.records, id, statusFinish)
}

// refused fails unless the call is answered with that error.
func (a *apiTest) refused(method, path, body string, headers []string, status int, code errCode) {
	a.t.Helper()
	got := a.call(method, path, body, headers...)
	var answer struct{ Status, Code, Message string }
	if err := json.Unmarshal([]byte(got.body), &answer); err != nil && method != "HEAD" {
		a.t.Errorf("%s %s: %v in %.100q", method, path, err, got.body)
		return
	}
	if got.status != status || answer.Status != "error" || answer.Code != string(code) || answer.Message == "" {
		a.t.Errorf("%s %s %.60s %q = %d %s; want %d %s", method, path, body, headers, got.status, got.body, status, code)
	}
	if status == 405 && got.header.Get("Allow") == "" || status == 401 && got.header.Get("WWW-Authenticate") == "" {
		a.t.Errorf("%s %s = %d with the headers %v", method, path, status, got.header)
	}
}
