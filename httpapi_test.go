package main

// httpapi_test.go: every call of the REST API, every refusal, and who gets in, over real connections.

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime/multipart"
	"net"
	"net/http"
	"net/netip"
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

func TestAPICalls(t *testing.T) {
	a := startAPI(t, "127.0.0.1:0", apiConfig{ownManager: true, projectID: "local"})
	a.records.keepData("done", []byte(`{"k":"<v>"}`))
	a.finishedTask("done")
	startTask(a.records, "busy", 1)
	upload, formType := form("file", "re port.txt", "content")

	for _, c := range []struct {
		method, path, body string
		headers            []string
		status             int
		want               string // in the body
	}{
		{"POST", "/job/create", `{"event":"hello"}`, nil, 200, `"app_id":"local"`},
		{"POST", "/job/create", `{"app_id":"p","event":"hello","form_body":{"a":1},"more":[]}`, nil, 200,
			`"job":{"app_id":"p","event":"hello","form_body":{"a":1},"more":[]}`},
		{"POST", "/job/create", `{"event":"hello","form_body":null}`, nil, 200, `"status":"success"`},
		{"POST", "/msg/notif/done", `{"msg":"späte <Nachricht>"}`, nil, 200,
			`{"return":{"msg":"späte <Nachricht>"},"status":"success"}`},
		{"POST", "/msg/notif/cron-job", `{"msg":""}`, nil, 200, `"msg":""`},
		{"POST", "/msg/notif/done", `{"msg":"` + strings.Repeat(`\u0041`, maxNotifBytes) + `"}`, nil, 200, "AAA"},
		{"GET", "/jobs", "", nil, 200, `"task_id":"busy"`},
		{"GET", "/jobs?status=finish&event=e&limit=1&other=x", "", nil, 200, `"task_id":"done"`},
		{"GET", "/jobs?status=ended", "", nil, 200, `{"jobs":[{"task_id":"done"`},
		{"GET", "/jobs?event=nothing", "", nil, 200, `{"jobs":[]}`},
		{"GET", "/job/done", "", nil, 200, `"msg":"späte <Nachricht>"`},
		{"GET", "/job/waiting", "", nil, 200, `"created_at":null`},
		{"GET", "/job/done/log", "", nil, 200, "out done\n"},
		{"GET", "/job/done/log?follow=true", "", nil, 200, "out done\n"},
		{"GET", "/job/waiting/log", "", nil, 200, ""},
		{"GET", "/job/done/data", "", nil, 200, `{"k":"<v>"}`},
		{"POST", "/job/busy/terminate", "", nil, 202, `"task_id":"busy"`},
		{"POST", "/job/busy/terminate", "{}", nil, 202, `"task_id":"busy"`},
		{"GET", "/health", "", nil, 200, `"problems":[]`},
		{"HEAD", "/health", "", nil, 200, ""},
		{"HEAD", "/events", "", nil, 200, ""},
		{"HEAD", "/job/busy/log?follow=true", "", nil, 200, ""},
		{"POST", "/api/worker/job_record/result/done", `[1,2]`, nil, 200, "success"},
		{"GET", "/job/done", "", nil, 200, `"result":[1,2]`},
		{"POST", "/api/worker/job_record/file/done", upload, []string{formType}, 200, `{"name":"re port.txt","size":7}`},
		{"GET", "/job/done/files/re%20port.txt", "", nil, 200, "content"},
		{"HEAD", "/job/done/files/re%20port.txt", "", nil, 200, ""},
	} {
		got := a.call(c.method, c.path, c.body, c.headers...)
		if got.status != c.status || !strings.Contains(got.body, c.want) || c.want == "" && got.body != "" {
			t.Errorf("%s %s %.60s = %d %.300s; want %d, %s", c.method, c.path, c.body, got.status, got.body, c.status, c.want)
		}
		if got.header.Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("%s %s may be sniffed", c.method, c.path)
		}
	}
	wantCreated := []string{"local hello {}", `p hello {"a":1}`, "local hello {}"}
	if fmt.Sprint(a.service.created) != fmt.Sprint(wantCreated) {
		t.Errorf("created %q; want %q", a.service.created, wantCreated)
	}
	got := a.call("GET", "/job/done/files/re%20port.txt", "").header
	if got.Get("Content-Disposition") != `attachment; filename="re port.txt"` ||
		got.Get("Content-Type") != "application/octet-stream" || got.Get("Content-Length") != "7" {
		t.Errorf("file with the headers %v", got)
	}
}

func TestAPIRefusals(t *testing.T) {
	a := startAPI(t, "127.0.0.1:0", apiConfig{ownManager: true, projectID: "local"})
	a.finishedTask("done")
	upload, formType := form("file", "bad:name", "x")
	other, otherType := form("other", "f", "x")
	deep := strings.Repeat("[", 20_000) + strings.Repeat("]", 20_000)
	for _, c := range []struct {
		method, path, body string
		headers            []string
		status             int
		code               errCode
	}{
		{"GET", "/nothing", "", nil, 404, codeHTTPPath},
		{"GET", "//job//done", "", nil, 404, codeHTTPPath},
		{"GET", "/jobs/", "", nil, 404, codeHTTPPath},
		{"DELETE", "/job/done", "", nil, 405, codeHTTPMethod},
		{"OPTIONS", "/job/create", "", nil, 405, codeHTTPMethod},
		{"POST", "/jobs", "", nil, 405, codeHTTPMethod},
		{"POST", "/job/create", "", nil, 400, codeHTTPBadRequest},
		{"POST", "/job/create", "{", nil, 400, codeHTTPBadRequest},
		{"POST", "/job/create", "[]", nil, 400, codeHTTPBadRequest},
		{"POST", "/job/create", `{"event":"hello"} x`, nil, 400, codeHTTPBadRequest},
		{"POST", "/job/create", `{"event":"hello"}{}`, nil, 400, codeHTTPBadRequest},
		{"POST", "/job/create", `{}`, nil, 400, codeHTTPBadRequest},
		{"POST", "/job/create", `{"event":7}`, nil, 400, codeHTTPBadRequest},
		{"POST", "/job/create", `{"event":"a b"}`, nil, 400, codeHTTPBadRequest},
		{"POST", "/job/create", `{"event":"a\r\nPUB"}`, nil, 400, codeHTTPBadRequest},
		{"POST", "/job/create", `{"event":"a.>"}`, nil, 400, codeHTTPBadRequest},
		{"POST", "/job/create", `{"event":"hello","app_id":"*"}`, nil, 400, codeHTTPBadRequest},
		{"POST", "/job/create", `{"event":"hello","app_id":"` + strings.Repeat("p", 251) + `"}`, nil,
			400, codeHTTPBadRequest},
		{"POST", "/job/create", `{"event":"hello","form_body":[]}`, nil, 400, codeHTTPBadRequest},
		{"POST", "/job/create", `{"event":"hello","form_body":"x"}`, nil, 400, codeHTTPBadRequest},
		{"POST", "/job/create", `{"event":"hello","form_body":{"d":` + deep + `}}`, nil, 400, codeHTTPBadRequest},
		{"POST", "/job/create", `{"event":"unknown"}`, nil, 404, codeHTTPEvent},
		{"POST", "/job/create", `"` + strings.Repeat("x", maxCreateBytes) + `"`, nil, 413, codeHTTPTooLarge},
		{"POST", "/msg/notif/done", `{}`, nil, 400, codeHTTPBadRequest},
		{"POST", "/msg/notif/done", `{"msg":null}`, nil, 400, codeHTTPBadRequest},
		{"POST", "/msg/notif/done", `{"msg":["x"]}`, nil, 400, codeHTTPBadRequest},
		{"POST", "/msg/notif/.x", `{"msg":"x"}`, nil, 400, codeHTTPBadRequest},
		{"POST", "/msg/notif/a%20b", `{"msg":"x"}`, nil, 400, codeHTTPBadRequest},
		{"POST", "/msg/notif/..%2fx", `{"msg":"x"}`, nil, 400, codeHTTPBadRequest},
		{"POST", "/msg/notif/" + strings.Repeat("i", 129), `{"msg":"x"}`, nil, 400, codeHTTPBadRequest},
		{"POST", "/msg/notif/done", `{"msg":"` + strings.Repeat("x", maxNotifBytes+1) + `"}`, nil, 413, codeHTTPTooLarge},
		{"POST", "/msg/notif/done", `{"msg":"` + strings.Repeat("x", maxNotifBodyBytes) + `"}`, nil, 413, codeHTTPTooLarge},
		{"GET", "/jobs?status=gone", "", nil, 400, codeHTTPBadRequest},
		{"GET", "/events?output=some", "", nil, 400, codeHTTPBadRequest},
		{"GET", "/jobs?limit=0", "", nil, 400, codeHTTPBadRequest},
		{"GET", "/jobs?limit=1001", "", nil, 400, codeHTTPBadRequest},
		{"GET", "/jobs?limit=", "", nil, 400, codeHTTPBadRequest},
		{"GET", "/jobs?limit=%zz", "", nil, 400, codeHTTPBadRequest},
		{"GET", "/job/unknown", "", nil, 404, codeRecordUnknown},
		{"GET", "/job/..%2f..", "", nil, 400, codeHTTPBadRequest},
		{"GET", "/job/unknown/log?follow=true", "", nil, 404, codeRecordUnknown},
		{"GET", "/job/done/log?follow=maybe", "", nil, 400, codeHTTPBadRequest},
		{"GET", "/job/unknown/data", "", nil, 404, codeRecordUnknown},
		{"GET", "/job/done/data", "", nil, 404, codeRecordNotKept},
		{"GET", "/job/done/files/none", "", nil, 404, codeRecordNotKept},
		{"GET", "/job/done/files/..%2flog.0", "", nil, 404, codeRecordNotKept},
		{"POST", "/job/unknown/terminate", "", nil, 404, codeRecordUnknown},
		{"POST", "/job/done/terminate", "", nil, 409, codeHTTPEnded},
		{"POST", "/api/worker/job_record/result/done", "{", nil, 400, codeHTTPBadRequest},
		{"POST", "/api/worker/job_record/result/unknown", "{}", nil, 404, codeRecordUnknown},
		{"POST", "/api/worker/job_record/file/done", "{}", nil, 415, codeHTTPContentType},
		{"POST", "/api/worker/job_record/file/done", "", nil, 415, codeHTTPContentType},
		{"POST", "/api/worker/job_record/file/done", upload, []string{formType}, 400, codeRecordFileName},
		{"POST", "/api/worker/job_record/file/done", other, []string{otherType}, 400, codeHTTPBadRequest},
		{"POST", "/api/worker/job_record/file/done", upload[:len(upload)-30], []string{formType}, 400, codeRecordFileName},
		{"POST", "/api/worker/job_record/file/done", other[:40], []string{otherType}, 400, codeHTTPBadRequest},
		{"POST", "/api/worker/job_record/file/unknown", upload, []string{formType}, 404, codeRecordUnknown},
	} {
		a.refused(c.method, c.path, c.body, c.headers, c.status, c.code)
	}
	for _, c := range []struct {
		err    error
		status int
		code   errCode
	}{
		{errStarting, 503, codeHTTPAway}, {fmt.Errorf("publish: %w", errBrokerAway), 503, codeHTTPAway},
		{fail(codeExec, "write", errJournalAway), 503, codeExec}, {errors.New("secret path /x"), 500, codeHTTPInternal},
	} {
		a.service.set(healthStarting, c.err)
		a.refused("POST", "/job/create", `{"event":"hello"}`, nil, c.status, c.code)
	}
	if got := a.call("POST", "/job/create", `{"event":"hello"}`); strings.Contains(got.body, "secret") {
		t.Errorf("the cause of an internal error got out: %s", got.body)
	}
	for status, want := range map[healthStatus]int{
		healthStarting: 503, healthOK: 200, healthDegraded: 200, healthDraining: 503, healthDown: 503,
	} {
		a.service.set(status, nil)
		if got := a.call("GET", "/health", ""); got.status != want || !strings.Contains(got.body, string(status)) {
			t.Errorf("health %s = %d %s", status, got.status, got.body)
		}
	}
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

func TestAPIOnLoopbackKeepsWebPagesOut(t *testing.T) {
	a := startAPI(t, "127.0.0.1:0", apiConfig{secretKey: "k", ownManager: true, projectID: "local"})
	a.finishedTask("done")
	const job = `{"event":"hello"}`
	own := strings.TrimPrefix(a.base, "http://")
	for _, c := range []struct {
		method, path, body string
		headers            []string
		status             int
		code               errCode // "" when it is admitted
	}{
		{"GET", "/health", "", []string{"Host: localhost"}, 200, ""},
		{"GET", "/health", "", []string{"Host: LOCALHOST:99"}, 200, ""},
		{"GET", "/health", "", []string{"Host: 127.9.9.9:80"}, 200, ""},
		{"GET", "/health", "", []string{"Host: [::1]"}, 200, ""},
		{"GET", "/health", "", []string{"Host: [::1]:8080"}, 200, ""},
		{"GET", "/health", "", []string{"Host: evil.example"}, 403, codeHTTPHost},
		{"GET", "/jobs", "", []string{"Host: localhost.evil.example:8080"}, 403, codeHTTPHost},
		{"GET", "/jobs", "", []string{"Host: 127.0.0.1.evil.example"}, 403, codeHTTPHost},
		{"GET", "/jobs", "", []string{"Host: 10.0.0.1:8080"}, 403, codeHTTPHost},
		{"GET", "/jobs", "", []string{"Host: 0.0.0.0:8080"}, 403, codeHTTPHost},
		{"POST", "/job/create", job, nil, 200, ""},
		{"POST", "/job/create", job, []string{"Content-Type: Application/JSON; charset=utf-8"}, 200, ""},
		{"POST", "/job/create", job, []string{"Content-Type: text/plain"}, 415, codeHTTPContentType},
		{"POST", "/job/create", job, []string{"Content-Type: application/x-www-form-urlencoded"}, 415, codeHTTPContentType},
		{"POST", "/job/create", job, []string{"Content-Type: application/json, text/plain"}, 415, codeHTTPContentType},
		{"POST", "/job/create", job, []string{"Content-Type: multipart/form-data; boundary=x"}, 415, codeHTTPContentType},
		{"POST", "/job/create", job, []string{"Content-Type: "}, 415, codeHTTPContentType},
		{"POST", "/job/done/terminate", "", []string{"Content-Type: text/plain"}, 415, codeHTTPContentType},
		{"POST", "/job/create", job, []string{"Origin: " + a.base}, 200, ""},
		{"POST", "/job/create", job, []string{"Origin: https://evil.example"}, 403, codeHTTPOrigin},
		{"POST", "/job/create", job, []string{"Origin: null"}, 403, codeHTTPOrigin},
		{"POST", "/job/create", job, []string{"Origin: http://127.0.0.1:1"}, 403, codeHTTPOrigin},
		{"POST", "/job/done/terminate", "", []string{"Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate"},
			403, codeHTTPOrigin},
		{"GET", "/jobs", "", []string{"Sec-Fetch-Site: same-site", "Sec-Fetch-Mode: no-cors"}, 403, codeHTTPOrigin},
		{"GET", "/jobs", "", []string{"Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate"}, 200, ""},
		{"GET", "/jobs", "", []string{"Sec-Fetch-Site: same-origin", "Origin: http://" + own}, 200, ""},
		{"POST", "/api/worker/job_record/result/done", "{}", nil, 401, codeHTTPKey},
		{"POST", "/api/worker/job_record/result/done", "{}", []string{"Authorization: Bearer wrong"}, 401, codeHTTPKey},
		{"POST", "/api/worker/job_record/result/done", "{}", []string{"Authorization: Basic k"}, 401, codeHTTPKey},
		{"POST", "/api/worker/job_record/result/done", "{}", []string{"Authorization: bearer k"}, 200, ""},
	} {
		if c.code != "" {
			a.refused(c.method, c.path, c.body, c.headers, c.status, c.code)
		} else if got := a.call(c.method, c.path, c.body, c.headers...); got.status != c.status {
			t.Errorf("%s %s %q = %d %s; want %d", c.method, c.path, c.headers, got.status, got.body, c.status)
		}
	}
	upload, formType := form("file", "f", "x")
	a.refused("POST", "/api/worker/job_record/file/done", upload, []string{formType}, 401, codeHTTPKey)
	a.api.reconfigure(apiConfig{secretKey: "k", projectID: "local"})
	a.refused("POST", "/api/worker/job_record/file/done", upload, []string{formType}, 404, codeHTTPNotOurs)
	a.refused("POST", "/api/worker/job_record/result/done", "{}", nil, 404, codeHTTPNotOurs)
}

func TestAPIElsewhereNeedsTheKey(t *testing.T) {
	a := startAPI(t, "0.0.0.0:0", apiConfig{secretKey: "k", projectID: "local"})
	_, port, _ := net.SplitHostPort(strings.TrimPrefix(a.base, "http://"))
	hosts := []string{"127.0.0.1"}
	if own := ownAddress(); own != "" {
		hosts = append(hosts, own)
	}
	const msg = `{"msg":"m"}`
	for _, host := range hosts {
		a.base = "http://" + net.JoinHostPort(host, port)
		for _, path := range []string{"/jobs", "/events", "/nothing", "/job/x/log"} {
			a.refused("GET", path, "", nil, 401, codeHTTPKey)
		}
		a.refused("POST", "/job/create", `{"event":"hello"}`, []string{"Authorization: Bearer wrong"}, 401, codeHTTPKey)
		for _, c := range []struct {
			method, path, body string
			headers            []string
			status             int
		}{
			{"GET", "/health", "", []string{"Host: any.example"}, 200},
			{"GET", "/jobs", "", []string{"Authorization: Bearer k", "Host: any.example"}, 200},
			{"POST", "/job/create", `{"event":"hello"}`, []string{"Authorization: Bearer k", "Content-Type: text/plain"}, 200},
			{"POST", "/msg/notif/x", msg, nil, 200},
			{"POST", "/msg/notif/x", msg, []string{"Origin: http://evil.example"}, 403},
			{"GET", "/msg/notif/x", "", nil, 401},
		} {
			if got := a.call(c.method, c.path, c.body, c.headers...); got.status != c.status {
				t.Errorf("%s %s%s %q = %d %s; want %d", c.method, a.base, c.path, c.headers, got.status, got.body, c.status)
			}
		}
		a.api.reconfigure(apiConfig{projectID: "local"})
		a.refused("GET", "/jobs", "", []string{"Authorization: Bearer "}, 403, codeHTTPNoKey)
		a.refused("POST", "/job/create", `{"event":"hello"}`, nil, 403, codeHTTPNoKey)
		for path, body := range map[string]string{"/health": "", "/msg/notif/x": msg} {
			method := map[bool]string{true: "GET", false: "POST"}[body == ""]
			if got := a.call(method, path, body); got.status != 200 {
				t.Errorf("%s without a key configured = %d %s", path, got.status, got.body)
			}
		}
		a.api.reconfigure(apiConfig{secretKey: "k", projectID: "local"})
	}
}

// ownAddress is an address of this host that is not loopback, "" if there is none.
func ownAddress() string {
	addrs, _ := net.InterfaceAddrs()
	for _, a := range addrs {
		if ip, ok := a.(*net.IPNet); ok && !ip.IP.IsLoopback() && ip.IP.To4() != nil {
			return ip.IP.String()
		}
	}
	return ""
}

func TestAdmitFromOtherHosts(t *testing.T) {
	addr := netip.MustParseAddr
	for _, c := range []struct {
		caller caller
		key    secret
		method string
		path   string
		want   errCode
	}{
		{caller{addr("0.0.0.0"), addr("10.0.0.1"), addr("10.0.0.2")}, "k", "POST", "/msg/notif/x", codeHTTPKey},
		{caller{addr("0.0.0.0"), addr("10.0.0.1"), addr("10.0.0.2")}, "", "POST", "/msg/notif/x", codeHTTPNoKey},
		{caller{addr("10.0.0.1"), addr("10.0.0.1"), addr("10.0.0.1")}, "k", "POST", "/msg/notif/x", ""},
		{caller{addr("10.0.0.1"), addr("10.0.0.1"), addr("10.0.0.1")}, "k", "POST", "/job/create", codeHTTPKey},
		{caller{addr("::"), addr("::1"), addr("::1")}, "", "POST", "/msg/notif/x", ""},
		{caller{addr("::"), addr("fe80::1"), addr("fe80::2")}, "k", "GET", "/health", ""},
		{caller{}, "k", "POST", "/msg/notif/x", codeHTTPKey}, // neither end is known
		{caller{addr("::1"), addr("::1"), addr("::1")}, "k", "GET", "/jobs", ""},
	} {
		r, err := http.NewRequest(c.method, "http://localhost"+c.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if got := codeOf(admit(c.caller, &apiConfig{secretKey: c.key}, r)); got != c.want {
			t.Errorf("admit(%v, %s %s) = %q; want %q", c.caller, c.method, c.path, got, c.want)
		}
	}
}

func TestAPIBoundsHeadersAndTime(t *testing.T) {
	a := startAPI(t, "127.0.0.1:0", apiConfig{ownManager: true, projectID: "local"}, func(api *apiServer) {
		api.server.ReadHeaderTimeout = 100 * time.Millisecond
		api.bodyTimeout = 100 * time.Millisecond
	})
	a.finishedTask("done")
	if got := a.call("GET", "/health", "", "X-Long: "+strings.Repeat("x", 2*maxHeaderBytes)); got.status != 431 {
		t.Errorf("a long header = %d", got.status)
	}
	const (
		head = " HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999\r\nContent-Type: "
		text = head + "application/json\r\n\r\n{"
		file = head + "multipart/form-data; boundary=b\r\n\r\n" +
			"--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"f\"\r\n\r\nhalf"
	)
	for slow, want := range map[string]string{
		"GET /health HTTP/1.1\r\nHost: loc":            "",
		"POST /job/create" + text:                      " 408 ",
		"POST /nothing" + text:                         " 404 ",
		"POST /api/worker/job_record/file/done" + file: " 408 ",
	} {
		connection, err := net.Dial("tcp", strings.TrimPrefix(a.base, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(connection, slow)
		connection.SetReadDeadline(time.Now().Add(5 * time.Second))
		answer, err := io.ReadAll(connection) // until the server has had enough
		if err != nil || !strings.Contains(string(answer), want) {
			t.Errorf("%.30q and then nothing: %.40q, %v; want%s", slow, answer, err, want)
		}
		connection.Close()
	}
	if rec := mustGet(t, a.records, "done"); len(rec.Files) != 0 {
		t.Errorf("half a file was kept: %v", rec.Files)
	}
}

func TestAPIFollowsALog(t *testing.T) {
	a := startAPI(t, "127.0.0.1:0", apiConfig{projectID: "local"})
	response, err := http.Get(a.base + "/job/waiting/log?follow=true")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	lines := bufio.NewReader(response.Body)
	startTask(a.records, "waiting", 1)
	for i := range 3 {
		printTask(a.records, "waiting", fmt.Sprintln("line", i))
		if line, err := lines.ReadString('\n'); line != fmt.Sprintln("line", i) {
			t.Fatalf("read %q, %v", line, err)
		}
	}
	finishTask(a.records, "waiting", statusFinish)
	if rest, err := io.ReadAll(lines); len(rest) != 0 || err != nil {
		t.Errorf("at the end: %q, %v", rest, err)
	}

	startTask(a.records, "waiting", 2)
	cut, err := http.Get(a.base + "/job/waiting/log?follow=true")
	if err != nil {
		t.Fatal(err)
	}
	defer cut.Body.Close()
	if err := a.api.shutdown(t.Context()); err != nil {
		t.Errorf("shutdown with a follower: %v", err)
	}
	if _, err := io.ReadAll(cut.Body); err == nil {
		t.Error("a log that was cut off looks complete")
	}
}

// readEvent reads one server-sent event, skipping comments.
func readEvent(t *testing.T, lines *bufio.Reader) map[string]string {
	t.Helper()
	fields := map[string]string{}
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			t.Fatalf("read event: %v", err)
		}
		if line == "\n" && len(fields) > 0 {
			return fields
		}
		if name, value, ok := strings.Cut(strings.TrimSuffix(line, "\n"), ": "); ok {
			fields[name] = value
		}
	}
}

func TestAPIEvents(t *testing.T) {
	a := startAPI(t, "127.0.0.1:0", apiConfig{projectID: "local"})
	a.bus.publish(taskQueued{TaskID: "before"})
	response, err := http.Get(a.base + "/events")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if got := response.Header.Get("Content-Type"); got != "text/event-stream" {
		t.Errorf("Content-Type = %q", got)
	}
	lines := bufio.NewReader(response.Body)
	a.bus.publish(taskOutput{TaskID: "t", Stream: streamStderr, Data: []byte("two\nlines")})
	a.bus.publish(taskFinished{TaskID: "t", Status: statusFinish, CPU: 3 * time.Millisecond})
	a.bus.publish(brokerChanged{Type: "local", Connected: true})
	for i, want := range []struct{ name, data string }{
		{"task_output", `{"task_id":"t","stream":"stderr","data":"two\nlines"}`},
		{"task_finished", `"cpu_ms":3`},
		{"broker_changed", `"connected":true`},
	} {
		got := readEvent(t, lines)
		if got["event"] != want.name || !strings.Contains(got["data"], want.data) || got["id"] != fmt.Sprint(i+2) {
			t.Errorf("event %d = %q; want %s with %s", i+2, got, want.name, want.data)
		}
	}
}

// TestAPIEventsTail reads the same output in both sizes. The cut falls into the middle of a character.
func TestAPIEventsTail(t *testing.T) {
	a := startAPI(t, "127.0.0.1:0", apiConfig{projectID: "local"})
	read := func(query string) *bufio.Reader {
		response, err := http.Get(a.base + "/events" + query)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { response.Body.Close() })
		return bufio.NewReader(response.Body)
	}
	all, tail := read("?output=all"), read("?output=tail")
	long := strings.Repeat("x", 5000) + "é" + strings.Repeat("y", eventTailBytes-1)
	a.bus.publish(taskOutput{TaskID: "t", Data: []byte(long)})
	a.bus.publish(taskOutput{TaskID: "t", Data: []byte("short")})
	for _, want := range []struct {
		reader *bufio.Reader
		texts  []string
	}{{all, []string{long, "short"}}, {tail, []string{long[len(long)-eventTailBytes+1:], "short"}}} {
		for i, text := range want.texts {
			got := readEvent(t, want.reader)
			if got["id"] != fmt.Sprint(i+1) || !strings.Contains(got["data"], `"`+text+`"`) {
				t.Errorf("event %s is %d bytes; want %d of text", got["id"], len(got["data"]), len(text))
			}
		}
	}
}

func TestAPISlowEventReaderIsDropped(t *testing.T) {
	a := startAPI(t, "127.0.0.1:0", apiConfig{projectID: "local"})
	slow, err := http.Get(a.base + "/events") // never read
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Body.Close()
	fast, err := http.Get(a.base + "/events")
	if err != nil {
		t.Fatal(err)
	}
	defer fast.Body.Close()
	lines := bufio.NewReaderSize(fast.Body, 1<<20)
	output := taskOutput{TaskID: "t", Stream: streamStdout, Data: bytes.Repeat([]byte("x"), outputChunkBytes)}
	readers := func() int {
		a.api.feed.mu.Lock()
		defer a.api.feed.mu.Unlock()
		return len(a.api.feed.readers)
	}
	const atOnce = 40 // far below what a reader may be behind
	for sent := 0; readers() == 2; sent++ {
		if sent > 5000/atOnce {
			t.Fatal("a reader that reads nothing is still served")
		}
		for range atOnce {
			a.bus.publish(output)
		}
		for range atOnce {
			readEvent(t, lines)
		}
	}
	a.bus.publish(taskQueued{TaskID: "after"})
	if got := readEvent(t, lines); got["event"] != "task_queued" || readers() != 1 {
		t.Errorf("the other reader got %.100q", got)
	}
}

func TestAPIReadersAreBounded(t *testing.T) {
	a := startAPI(t, "127.0.0.1:0", apiConfig{projectID: "local"})
	startTask(a.records, "t", 1)
	for path, limit := range map[string]int{"/events": maxEventReaders, "/job/t/log?follow=true": maxFollowers} {
		var open []io.Closer
		for range limit {
			response, err := http.Get(a.base + path)
			if err != nil || response.StatusCode != 200 {
				t.Fatalf("GET %s: %v", path, err)
			}
			open = append(open, response.Body)
		}
		a.refused("GET", path, "", nil, 503, codeHTTPReaders)
		for _, body := range open {
			body.Close()
		}
		waitFor(t, 5*time.Second, func() string {
			a.api.feed.mu.Lock()
			defer a.api.feed.mu.Unlock()
			if n := len(a.api.feed.readers) + a.api.feed.followers; n > 0 {
				return fmt.Sprintf("%d readers of %s are still there", n, path)
			}
			return ""
		})
	}
}

func TestAPIServeFails(t *testing.T) {
	api := newAPIServer(apiConfig{}, &fakeService{status: healthOK}, &eventBus{}, slog.New(slog.DiscardHandler))
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	listener.Close()
	if err := api.serve(listener); codeOf(err) != codeHTTPServe {
		t.Errorf("serve on a closed listener = %v; want %s", err, codeHTTPServe)
	}
	must(t, api.shutdown(t.Context()))
}

// A connection that was accepted gets its answer, even if it asks when the end has begun: whoever takes the port over never
// sees it.
func TestShutdownAnswersAccepted(t *testing.T) {
	a := startAPI(t, "127.0.0.1:0", apiConfig{})
	address := strings.TrimPrefix(a.base, "http://")
	conn, err := net.Dial("tcp", address)
	must(t, err)
	defer conn.Close()
	waitFor(t, 10*time.Second, func() string {
		if !a.api.leaving.anySilent() {
			return "the connection is not accepted"
		}
		return ""
	})
	ended := make(chan error, 1)
	go func() { ended <- a.api.shutdown(context.Background()) }() // ends when the connection has its answer
	waitFor(t, 10*time.Second, func() string {
		other, err := net.Dial("tcp", address)
		if err == nil {
			other.Close()
			return "the port is still open"
		}
		return ""
	})
	fmt.Fprintf(conn, "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
	answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil || answer.StatusCode != http.StatusOK || !answer.Close {
		t.Fatalf("answer %+v, %v", answer, err)
	}
	answer.Body.Close()
	must(t, <-ended)
}
