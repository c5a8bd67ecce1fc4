package main

// manager_test.go: what must be true of talking to a Job Manager.

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

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
