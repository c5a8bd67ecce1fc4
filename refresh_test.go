package main

// refresh_test.go runs a configSource over real files and a manager that tells what it likes, and looks at what it
// hands out.

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A sourceTest is a configSource that runs, quickly.
type sourceTest struct {
	t       *testing.T
	path    string
	source  *configSource
	logFile *os.File
	stop    func() // and wait
}

func startSource(t *testing.T, path string, env ...string) *sourceTest {
	t.Helper()
	first, err := loadConfig(path, environment(env...))
	if err != nil {
		t.Fatal(err)
	}
	logFile, err := os.CreateTemp(t.TempDir(), "log")
	if err != nil {
		t.Fatal(err)
	}
	s := &sourceTest{t: t, path: path, logFile: logFile}
	s.source = newConfigSource(first, environment(env...), slog.New(slog.NewTextHandler(logFile, nil)))
	s.source.watch.poll, s.source.watch.gone = 10*time.Millisecond, 500*time.Millisecond
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		s.source.run(ctx)
	}()
	s.stop = func() {
		cancel()
		select {
		case <-ended:
		case <-time.After(5 * time.Second):
			t.Error("the source does not end")
		}
	}
	t.Cleanup(func() { s.stop(); logFile.Close() })
	return s
}

func (s *sourceTest) log() string {
	text, err := os.ReadFile(s.logFile.Name())
	if err != nil {
		s.t.Fatal(err)
	}
	return string(text)
}

// next waits for an update.
func (s *sourceTest) next() configUpdate {
	s.t.Helper()
	select {
	case update := <-s.source.updates:
		if update.problems == nil {
			s.t.Error("an update without a map of problems")
		}
		if update.config != nil && update.config.Broker.Type == "" {
			s.t.Errorf("an incomplete configuration: %+v", update.config)
		}
		return update
	case <-time.After(5 * time.Second):
		s.t.Fatalf("no update\n%s", s.log())
		panic("unreachable")
	}
}

// nextConfig waits for a configuration, with nothing wrong.
func (s *sourceTest) nextConfig() *Config {
	s.t.Helper()
	update := s.next()
	if update.config == nil || len(update.problems) > 0 {
		s.t.Fatalf("update %+v; want a configuration and no problem\n%s", update, s.log())
	}
	return update.config
}

// again asks and gives what the answer is; config is the last one that came with it.
func (s *sourceTest) again() configUpdate {
	s.t.Helper()
	s.source.askAgain()
	var config *Config
	for {
		update := s.next()
		if update.config == nil {
			update.config = config
		}
		if update.answered {
			return update
		}
		config = update.config
	}
}

// unchanged asks and wants to hear that nothing is new or wrong.
func (s *sourceTest) unchanged(after string) {
	s.t.Helper()
	if update := s.again(); update.config != nil || len(update.problems) > 0 {
		s.t.Errorf("after %s: %+v; want neither configuration nor problem", after, update)
	}
}

// problem waits until there is exactly one problem, about this and with that text, and no other configuration.
func (s *sourceTest) problem(about, part string) {
	s.t.Helper()
	update := s.next()
	if text := update.problems[about]; update.config != nil || len(update.problems) != 1 || !strings.Contains(text, part) ||
		strings.Contains(text, "\n") {
		s.t.Errorf("update %+v; want the problem %q with %q", update, about, part)
	}
	if text := fmt.Sprint(update, s.log()); strings.Contains(text, fakeSecretKey) {
		s.t.Errorf("a secret is in\n%s", text)
	}
}

// solved waits until there is no problem any more, and no other configuration.
func (s *sourceTest) solved() {
	s.t.Helper()
	if update := s.next(); update.config != nil || len(update.problems) != 0 {
		s.t.Errorf("update %+v; want that nothing is wrong", update)
	}
}

func TestSourceFollowsTheFile(t *testing.T) {
	path := configFolder(t, minimalConfig)
	s := startSource(t, path, "WORKER_ID=w-1", "NAME=filled")
	if first := s.nextConfig(); first.Jobs[0].Cmd != "b" || first.IdentityID != "w-1" {
		t.Errorf("first %+v", first)
	}
	s.unchanged("no change")
	write(t, path, "jobs: [{event: a, cmd: '${NAME}'}]\nconcurrency: 3\n")
	if next := s.nextConfig(); next.Jobs[0].Cmd != "filled" || next.IdentityID != "w-1" || next.Concurrency != 3 {
		t.Errorf("changed %+v", next)
	}
	write(t, path, "# a comment\n\njobs: [{event: a, cmd: '${NAME}'}]\nconcurrency: 3\n")
	s.unchanged("a comment")

	// Bad, in three places, and said once; then good again.
	bad := "jobs: [{event: a, cmd: 'x {{'}]\nconcurrency: no\nlisten: '${UNSET}'\n"
	write(t, path, bad)
	s.problem("configuration", path+`:1: jobs[0].cmd: the template does not parse`)
	if update := s.again(); !strings.Contains(update.problems["configuration"], "(and 2 more) ["+string(codeConfig)+"]") {
		t.Errorf("asked again with a bad file: %+v", update)
	}
	for _, part := range []string{":1: jobs[0].cmd", ":2: concurrency", ":3: listen"} {
		if n := strings.Count(s.log(), part); n != 1 || !strings.Contains(s.log(), string(codeConfig)) {
			t.Errorf("%s is logged %d times; want once, with %s\n%s", part, n, codeConfig, s.log())
		}
	}
	write(t, path, "jobs: [{event: a, cmd: '${NAME}'}]\nconcurrency: 3\n")
	s.solved()

	// Bad, then good and new.
	write(t, path, bad)
	s.problem("configuration", "jobs[0].cmd")
	write(t, path, minimalConfig)
	if next := s.nextConfig(); next.Jobs[0].Cmd != "b" {
		t.Errorf("after a bad one: %+v", next)
	}

	// Gone, and back as it was; gone for long, too.
	rename(t, path, path+"~")
	s.source.askAgain()
	rename(t, path+"~", path)
	if update := s.next(); !update.answered || update.config != nil || len(update.problems) > 0 {
		t.Errorf("after a moment without a file: %+v", update)
	}
	rename(t, path, path+"~")
	s.problem("configuration", "no such file")
	if !strings.Contains(s.log(), string(codeConfigFile)) {
		t.Errorf("no %s in the log\n%s", codeConfigFile, s.log())
	}
	rename(t, path+"~", path)
	s.solved()
	write(t, path, " \n")
	s.problem("configuration", "the file is empty")
}

// TestSourceLogsWarningsOnce looks at what is valid but hardly meant.
func TestSourceLogsWarningsOnce(t *testing.T) {
	path := configFolder(t, "listen: :0\n"+minimalConfig)
	s := startSource(t, path)
	s.nextConfig()
	s.unchanged("no change")
	write(t, path, "# moved to the second line\nlisten: :0\n"+minimalConfig)
	s.unchanged("a comment")
	if n := strings.Count(s.log(), "without credential.secret_key"); n != 1 {
		t.Errorf("the warning is logged %d times; want once\n%s", n, s.log())
	}
	write(t, path, "listen: :0\nbroker_connection: {port: 4222}\n"+minimalConfig)
	s.nextConfig()
	if log := s.log(); strings.Count(log, "without credential.secret_key") != 1 || strings.Count(log, "not used with") != 1 {
		t.Errorf("want each warning once:\n%s", log)
	}
}

// TestSourceFollowsNamedFiles changes the files that the configuration names.
func TestSourceFollowsNamedFiles(t *testing.T) {
	ca := newTestAuthority(t)
	certificate, key := ca.issue(time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
	path := configFolder(t, `
credential: {secret_key_file: secret}
broker_connection: {type: nats, host: "127.0.0.1:1", secure: true}
`+minimalConfig)
	dir := filepath.Dir(path)
	tls := filepath.Join(dir, "tls", "nats")
	if err := os.MkdirAll(tls, 0o700); err != nil {
		t.Fatal(err)
	}
	secretFile := filepath.Join(dir, "secret")
	write(t, secretFile, "one")
	putFiles(t, tls, map[string][]byte{"ca.crt": ca.pem})
	s := startSource(t, path)
	first := s.nextConfig()
	if first.Broker.FilesDigest == "" || first.Credential.SecretKey != "one" {
		t.Errorf("first %+v", first)
	}
	write(t, secretFile, "two\n")
	if next := s.nextConfig(); next.Credential.SecretKey != "two" || next.Broker != first.Broker {
		t.Errorf("with another key %+v", next)
	}
	rename(t, secretFile, secretFile+"~")
	s.problem("configuration", "secret_key_file: want a file with the key")
	rename(t, secretFile+"~", secretFile)
	s.solved()

	putFiles(t, tls, map[string][]byte{"client.crt": certificate})
	s.problem("configuration", "there is no key_file to go with it")
	putFiles(t, tls, map[string][]byte{"client.key": key})
	second := s.nextConfig()
	if second.Broker.FilesDigest == first.Broker.FilesDigest {
		t.Error("other TLS files have the same digest")
	}
	putFiles(t, tls, map[string][]byte{"client.key": []byte("no key")})
	s.problem("configuration", "client.key: not PEM")
	// What else there is in the file has to wait for them.
	write(t, path, "credential: {secret_key_file: secret}\nconcurrency: no\n")
	s.problem("configuration", "concurrency")
	// The files are mended while the configuration is bad.
	certificate, key = ca.issue(time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
	write(t, path+"~", string(certificate))
	write(t, path+"~~", string(key))
	rename(t, path+"~", filepath.Join(tls, "client.crt"))
	rename(t, path+"~~", filepath.Join(tls, "client.key"))
	update := s.next()
	if update.config == nil || update.config.Broker.FilesDigest == second.Broker.FilesDigest ||
		!strings.Contains(update.problems["configuration"], "concurrency") {
		t.Errorf("new TLS files beside a bad configuration: %+v", update)
	}
}

// TestSourceAsksTheManager has file and manager change in turn.
func TestSourceAsksTheManager(t *testing.T) {
	f := newFakeManager(t, "project-1")
	f.change(func(f *fakeManager) { f.jobs = []any{fakeJob("a", 2, 0), fakeJob("b", 0, 0)} })
	path := configFolder(t, f.config()+minimalConfig)
	s := startSource(t, path)
	if first := s.nextConfig(); first.Project != "project-1" || first.Jobs[0].Limit != min(2, first.Concurrency) {
		t.Errorf("first %+v", first)
	}
	s.unchanged("no change")
	two := "jobs: [{event: a, cmd: b}, {event: b, cmd: c}]\n"
	write(t, path, f.config()+two)
	if next := s.nextConfig(); len(next.Jobs) != 2 || next.Project != "project-1" {
		t.Errorf("another file: %+v", next)
	}
	f.change(func(f *fakeManager) { f.uuid = "project-2" })
	if update := s.again(); update.config == nil || len(update.config.Jobs) != 2 || update.config.Project != "project-2" {
		t.Errorf("another answer: %+v", update)
	}

	// The file changes while the manager does not answer: its last word counts.
	f.change(func(f *fakeManager) { f.delay = time.Minute })
	s.source.askAgain()
	waitFor(t, 5*time.Second, func() string {
		if n := len(f.received(managerConfigPath)); n < 4 {
			return fmt.Sprintf("%d questions", n)
		}
		return ""
	})
	write(t, path, f.config()+minimalConfig)
	if next := s.nextConfig(); len(next.Jobs) != 1 || next.Project != "project-2" {
		t.Errorf("another file beside a hanging manager: %+v", next)
	}
	f.change(func(f *fakeManager) { f.delay = 0 })
	f.stop() // ends the question
	s.problem("manager", "ask "+f.url())
	f.start()
	if update := s.again(); len(update.problems) > 0 {
		t.Errorf("the manager is back, and there is %+v", update)
	}

	// A wrong key: what was in force stays, and the key for the REST API is the new one.
	write(t, path, strings.Replace(f.config(), fakeSecretKey, "wrong", 1)+minimalConfig)
	if next := s.nextConfig(); next.Credential.SecretKey != "wrong" {
		t.Errorf("another key: %+v", next)
	}
	s.problem("manager", "401 Unauthorized: no project "+fakeProjectID+" with key redacted ["+string(codeManagerStatus)+"]")
	write(t, path, f.config()+minimalConfig)
	if next := s.next(); next.config == nil || next.config.Credential.SecretKey != fakeSecretKey {
		t.Errorf("the right key again: %+v", next)
	}
	s.solved()

	// Another manager, which is away, and has the say when it comes.
	other := newFakeManager(t, "project-3")
	other.stop()
	other.change(func(f *fakeManager) { f.jobs = []any{fakeJob("b", 0, 0)} })
	write(t, path, other.config()+two)
	s.problem("manager", other.url())
	other.start()
	if update := s.again(); update.config == nil || update.config.Project != "project-3" || len(update.config.Jobs) != 1 {
		t.Errorf("another manager: %+v", update)
	}

	// None, and one again.
	write(t, path, two)
	if next := s.nextConfig(); next.Project != "local" || len(next.Jobs) != 2 {
		t.Errorf("without a manager: %+v", next)
	}
	asked := len(other.received(managerConfigPath))
	s.unchanged("the manager was taken out")
	if n := len(other.received(managerConfigPath)); n != asked {
		t.Error("a manager that is not in the file any more was asked")
	}
	write(t, path, f.config()+two)
	if next := s.nextConfig(); next.Project != "project-2" || len(next.Jobs) != 2 {
		t.Errorf("with a manager again: %+v", next)
	}

	// The interval.
	write(t, path, f.config()+two+"refresh: 100ms\n")
	s.nextConfig()
	f.change(func(f *fakeManager) { f.uuid = "project-4" })
	if next := s.nextConfig(); next.Project != "project-4" {
		t.Errorf("after the interval: %+v", next)
	}
}

// TestSourceKeepsWhatWorks has the manager answer what nobody can use.
func TestSourceKeepsWhatWorks(t *testing.T) {
	f := newFakeManager(t, "project-1")
	f.change(func(f *fakeManager) { f.jobs = []any{fakeJob("a", 0, 0)} })
	path := configFolder(t, f.config()+minimalConfig)
	s := startSource(t, path)
	s.nextConfig()
	for _, row := range []struct {
		status     int
		body, part string
	}{
		{200, "", "it is empty"},
		{200, "<html>", "not JSON"},
		{200, `{"return":{"uuid":{"a":1},"project":{"job_datas":7}}}`, "job_datas: want a list"},
		{200, `{"return":{"uuid":"u","broker_connection":{"type":"carrier pigeon","host":"h"}}}`, "type: want one of"},
		{200, `{"return":{"uuid":"u","broker_connection":{"type":"nats","host":"h","secure":1,"key_file":"/etc/shadow"}}}`,
			"/etc/shadow"},
		{200, `{"return":{"uuid":"u","broker_connection":{"type":"nats","host":"h","secure":1,"cert_file":"c","key_file":"k"}}}`,
			"cert_file"},
		{302, "", "answered 302"},
		{500, "oh", "answered 500"},
	} {
		f.change(func(f *fakeManager) { f.status, f.body = row.status, row.body })
		update := s.again()
		if !strings.Contains(update.problems["manager"], row.part) || update.config != nil || len(update.problems) != 1 {
			t.Errorf("%d %s gives %+v; want the problem %q", row.status, row.body, update, row.part)
		}
	}
	if n := strings.Count(s.log(), "answered 500"); n != 1 {
		t.Errorf("a failure is logged %d times; want once\n%s", n, s.log())
	}
	s.again()
	if n := strings.Count(s.log(), "answered 500"); n != 1 {
		t.Errorf("the same failure again is logged %d times; want once\n%s", n, s.log())
	}
	f.change(func(f *fakeManager) { f.status, f.body = 0, "" })
	s.unchanged("the manager has recovered")

	// A file that does not fit the manager's last word, and is made to by the next.
	f.change(func(f *fakeManager) {
		f.connection = map[string]any{"type": "nats", "host": "h", "ca_file": "/pki/ca.crt"}
	})
	named := f.config() + minimalConfig + "broker_connection: {type: nats, host: h, ca_file: /pki/ca.crt}\n"
	write(t, path, named)
	if next := s.nextConfig(); next.Broker.CAFile == "" {
		t.Errorf("the file's broker: %+v", next.Broker)
	}
	if update := s.again(); len(update.problems) > 0 {
		t.Errorf("a path that both name: %+v", update)
	}
	write(t, path, f.config()+minimalConfig)
	s.problem("configuration", "/pki/ca.crt")
	f.change(func(f *fakeManager) { f.connection["ca_file"] = "tls/ca.crt" })
	s.source.askAgain()
	waitFor(t, 5*time.Second, func() string {
		if update := s.next(); len(update.problems) > 0 {
			return fmt.Sprint(update)
		}
		return ""
	})
}

// TestSourceStartsWithoutItsManager has the manager's last answer in data_dir serve.
func TestSourceStartsWithoutItsManager(t *testing.T) {
	f := newFakeManager(t, "project-1")
	f.change(func(f *fakeManager) { f.jobs = []any{fakeJob("a", 0, 0)} })
	path := configFolder(t, f.config()+minimalConfig)
	s := startSource(t, path)
	s.nextConfig()
	s.stop()
	f.stop()
	s = startSource(t, path)
	update := s.next()
	if update.config == nil || update.config.Project != "project-1" || update.problems["manager"] == "" {
		t.Errorf("with the last answer: %+v", update)
	}
	// And with a file that has changed since.
	write(t, path, f.config()+minimalConfig+"concurrency: 3\n")
	if update := s.next(); update.config == nil || update.config.Concurrency != 3 || update.config.Project != "project-1" {
		t.Errorf("with the last answer and another file: %+v", update)
	}
}
