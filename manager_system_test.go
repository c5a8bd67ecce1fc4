//go:build unix

package main

// manager_system_test.go runs whole workers whose configuration a Job Manager completes: broker, jobs, limits and
// certificates, and what happens when the manager changes its mind or is away.

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"gopkg.in/yaml.v3"
)

// connectionMap is a connection as a manager's answer has it.
func connectionMap(t testing.TB, flow string) map[string]any {
	t.Helper()
	var m map[string]any
	if err := yaml.Unmarshal([]byte(flow), &m); err != nil {
		t.Fatal(err)
	}
	return m
}

func TestManagerCompletesWorker(t *testing.T) {
	onEveryBroker(t, func(t *testing.T, kind brokerKind, server testServer) {
		manager := newFakeManager(t, "p1")
		manager.change(func(f *fakeManager) {
			f.connection = connectionMap(t, kind.connection(server))
			f.jobs = []any{fakeJob("greet", "2", "1"), fakeJob("parent", 5, 60, fakeNestedJob("nested", 1, "30"))}
		})
		a := newAgent(t, manager.config()+`
identity_id: managed
kill_after: 200ms
jobs:
  - {event: greet, cmd: 'echo Hello; sleep {{s}}'}
  - {event: parent.nested, cmd: 'echo nested'}
  - {event: late, cmd: 'echo at last'}
`)
		a.start()
		events := server.collect(t)
		if !strings.Contains(a.log.String(), "late") {
			t.Errorf("no warning of a job that the manager does not list:\n%s", a.log)
		}
		kind.publish(t, server, "greet", "m-1", `{"s":0}`)
		got := events.finish(t, "m-1")
		if got[0].subject != "_who" || got[len(got)-1].data != "finish" {
			t.Errorf("events %q", got)
		}
		kind.publish(t, server, "parent.nested", "m-2", `{}`)
		events.finish(t, "m-2")
		kind.publish(t, server, "greet", "m-3", `{"s":60}`) // the manager's time limit is one second
		if got := events.finish(t, "m-3"); got[len(got)-1].data != "timeout" {
			t.Errorf("events beyond the manager's time limit: %q", got)
		}

		manager.change(func(f *fakeManager) { f.jobs = append(f.jobs, fakeJob("late", 1, 0)) })
		pid := a.childPID()
		server.publish(t, "p1.restart", "now")
		waitFor(t, 30*time.Second, func() string {
			if !strings.Contains(a.log.String(), "configuration taken up") || a.health().Status != "ok" {
				return "the new configuration is not taken up\n" + a.log.String()
			}
			return ""
		})
		if a.childPID() != pid {
			t.Error("the worker was started anew for it")
		}
		kind.publish(t, server, "late", "m-4", `{}`)
		events.finish(t, "m-4")

		// Without the manager the last answer serves.
		a.stop()
		manager.stop()
		a.start()
		kind.publish(t, server, "late", "m-5", `{}`)
		events.finish(t, "m-5")
		if h := a.health(); h.Status != "degraded" || !strings.Contains(fmt.Sprint(h.Problems), "connection refused") {
			t.Errorf("health without the manager is %+v", h)
		}
		if !strings.Contains(a.log.String(), "last answer") {
			t.Errorf("nothing is said of the manager being away:\n%s", a.log)
		}
		if strings.Contains(a.log.String(), fakeSecretKey) {
			t.Error("the log shows the secret key")
		}
	})
}

// TestManagerAwayAtFirst starts a worker that has never heard of its manager.
func TestManagerAwayAtFirst(t *testing.T) {
	t.Parallel() // it mostly waits
	manager := newFakeManager(t, "p1")
	manager.stop()
	a := newAgent(t, manager.config()+"jobs: [{event: e, cmd: 'true'}]\n")
	a.launch()
	waitFor(t, 10*time.Second, func() string {
		if h := a.health(); h.Status != "starting" || !strings.Contains(fmt.Sprint(h.Problems), "connection refused") {
			return fmt.Sprintf("health is %+v", h)
		}
		return ""
	})
	if code, answer := a.post("/job/create", `{"event":"e"}`); code != 503 {
		t.Errorf("create before the manager has answered = %d %s", code, answer)
	}
	manager.change(func(f *fakeManager) {
		f.jobs = []any{fakeJob("e", 0, 0)}
	})
	manager.start()
	waitFor(t, 20*time.Second, func() string {
		if h := a.health(); h.Status != "ok" {
			return fmt.Sprintf("health is %+v\n%s", h, a.log)
		}
		return ""
	})
}

// TestManagerHandsOutCertificates lets the manager's archive decide whether the broker is reached.
func TestManagerHandsOutCertificates(t *testing.T) {
	ca, other := newTestAuthority(t), newTestAuthority(t)
	hour := time.Now().Add(time.Hour)
	ago := time.Now().Add(-time.Hour)
	certificate, key := ca.issue(ago, hour)
	dir := t.TempDir()
	putFiles(t, dir, map[string][]byte{"ca.crt": ca.pem, "s.crt": certificate, "s.key": key})
	in := func(name string) string { return filepath.Join(dir, name) }

	nats := natsServerWith(t, fmt.Sprintf("tls { cert_file: %q, key_file: %q, ca_file: %q, verify: true }",
		in("s.crt"), in("s.key"), in("ca.crt")))
	redisPort := freePort(t)
	redis := &redisServer{dir: t.TempDir(), port: redisPort, args: []string{
		"--port", "0", "--tls-port", redisPort, "--tls-cert-file", in("s.crt"), "--tls-key-file", in("s.key"),
		"--tls-ca-cert-file", in("ca.crt"),
	}}
	redis.client = redisClient(redis.addr())
	t.Cleanup(func() { redis.client.Close(); redis.stop(t) })
	redis.start(t)

	rabbit := newRabbitVHost(t) // which has an authority of its own
	ofRabbit := func(name string) string {
		content, err := os.ReadFile(filepath.Join(rabbit.dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return string(content)
	}

	pack := func(ca, certificate, key string) []byte {
		return makeZip(t, zipEntry{name: "ca.crt", content: ca}, zipEntry{name: "client.crt", content: certificate},
			zipEntry{name: "client.key", content: key})
	}
	archive := func(authority *testAuthority, until time.Time) []byte {
		certificate, key := ca.issue(ago, until)
		return pack(string(authority.pem), string(certificate), string(key))
	}
	hostile := makeZip(t, zipEntry{name: "ca.crt", content: string(ca.pem)}, zipEntry{name: "../../escaped.crt", content: "x"})
	for _, row := range []struct {
		name   string
		zip    []byte
		rabbit []byte // where RabbitMQ needs another
		says   string // "" where the broker is reached
	}{
		{"good", archive(ca, hour), pack(ofRabbit("ca.crt"), ofRabbit("client.crt"), ofRabbit("client.key")), ""},
		{"another authority", archive(other, hour),
			pack(string(other.pem), ofRabbit("client.crt"), ofRabbit("client.key")), "unknown authority"},
		{"expired", archive(ca, time.Now().Add(-time.Minute)), nil, "expired"},
		{"hostile archive", hostile, nil, "escaped.crt"},
		{"none", nil, nil, "404"},
	} {
		for kind, host := range map[string]string{
			"nats": nats.addr, "redis": "127.0.0.1:" + redisPort, "rabbitmq": "localhost:" + rabbit.tlsPort,
		} {
			t.Run(row.name+"/"+kind, func(t *testing.T) {
				manager := newFakeManager(t, "p1")
				manager.change(func(f *fakeManager) {
					f.connection = map[string]any{"type": kind, "host": host, "secure": "true", "password": "", "vhost": rabbit.vhost,
						"ca_file": "tls/" + kind + "/ca.crt", "cert_file": "tls/" + kind + "/client.crt",
						"key_file": "tls/" + kind + "/client.key"}
					f.jobs = []any{fakeJob("e", 0, 0)}
					if f.zip = row.zip; kind == "rabbitmq" && row.rabbit != nil {
						f.zip = row.rabbit
					}
				})
				a := newAgent(t, manager.config()+"jobs: [{event: e, cmd: 'true'}]\n")
				before := tree(t, a.dir)
				if row.says == "" {
					a.start()
					a.wait(a.create("e", "{}"), statusFinish)
				} else {
					a.launch()
					waitFor(t, 20*time.Second, func() string {
						if !strings.Contains(a.log.String(), row.says) {
							return fmt.Sprintf("%q is not said\n%s", row.says, a.log)
						}
						return ""
					})
					waitFor(t, 5*time.Second, func() string {
						h := a.health()
						if h.Status != "starting" && h.Status != "down" || !strings.Contains(fmt.Sprint(h.Problems), row.says) {
							return fmt.Sprintf("health is %+v", h)
						}
						return ""
					})
				}
				if strings.Contains(a.log.String(), fakeSecretKey) || strings.Contains(a.log.String(), "PRIVATE KEY") {
					t.Errorf("a secret is in the log:\n%s", a.log)
				}
				if row.name == "hostile archive" {
					for path := range tree(t, a.dir) {
						if _, was := before[path]; !was && strings.HasSuffix(path, ".crt") {
							t.Errorf("%s was written", path)
						}
					}
					if _, err := os.Stat(filepath.Join(filepath.Dir(a.dir), "escaped.crt")); err == nil {
						t.Error("the archive wrote outside of its folder")
					}
				}
			})
		}
	}
}
