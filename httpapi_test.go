package main

// httpapi_test.go: every call of the REST API, every refusal, and who gets in, over real connections.

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"
)

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
