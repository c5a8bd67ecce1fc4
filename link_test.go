//go:build unix

package main

// link_test.go changes the broker of whole workers that go on working, and looks at what stops last.

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// gateJobs are jobs whose tasks note when they begin and end: gate runs until a file of the task's name is there.
const gateJobs = `
jobs:
  - {event: gate, cmd: 'echo begun; echo {{task_id}} >> begun; until test -e {{task_id}}.go; do sleep 0.02; done; echo ended; echo {{task_id}} >> ran'}
  - {event: note, cmd: 'echo {{task_id}} >> ran'}
`

// begun gives the tasks of the job gate that have begun in this worker's folder.
func (a *agent) begun() []string { return a.lines("begun") }

func (a *agent) lines(name string) []string {
	content, _ := os.ReadFile(filepath.Join(a.dir, name))
	return strings.Fields(string(content))
}

// awaitBegun waits for a task of the job gate to begin.
func (a *agent) awaitBegun(id string) {
	a.t.Helper()
	waitFor(a.t, 20*time.Second, func() string {
		if !slices.Contains(a.begun(), id) {
			return fmt.Sprintf("%s has not begun, only %q\n%s", id, a.begun(), a.log)
		}
		return ""
	})
}

// open lets a task of the job gate end.
func (a *agent) open(id string) { a.write(id+".go", "") }

// rebroker changes broker_connection and waits until the new connection is in use.
func (a *agent) rebroker(before, after string) {
	a.t.Helper()
	replaced := strings.Count(a.log.String(), `msg="broker connection replaced"`)
	a.reload("broker_connection: "+before+"\n", "broker_connection: "+after+"\n")
	a.awaitLog("the new broker in use", func() bool {
		return strings.Count(a.log.String(), `msg="broker connection replaced"`) > replaced
	})
}

// assertRanOnce checks that each of these tasks has run, once, on one of the workers.
func assertRanOnce(t *testing.T, ids []string, workers ...*agent) {
	t.Helper()
	var ran []string
	for _, w := range workers {
		ran = append(ran, w.ran()...)
	}
	times := map[string]int{}
	for _, id := range ran {
		times[id]++
	}
	for _, id := range ids {
		if times[id] != 1 {
			t.Errorf("task %s ran %d times", id, times[id])
		}
	}
}

// A creation creates tasks of the job note one after another until it is stopped.
type creation struct {
	ids, refused []string
	stop         chan struct{}
	done         sync.WaitGroup
}

func (a *agent) keepCreating() *creation {
	c := &creation{stop: make(chan struct{})}
	c.done.Add(1)
	go func() { // ends at stop
		defer c.done.Done()
		for {
			select {
			case <-c.stop:
				return
			case <-time.After(50 * time.Millisecond):
			}
			if id, err := createBy(http.DefaultClient, a.url, "note"); err != nil {
				c.refused = append(c.refused, err.Error())
			} else {
				c.ids = append(c.ids, id)
			}
		}
	}()
	return c
}

// end stops it and gives the tasks.
func (c *creation) end(t *testing.T) []string {
	t.Helper()
	close(c.stop)
	c.done.Wait()
	if len(c.refused) > 0 {
		t.Errorf("%d requests were refused, such as: %s", len(c.refused), c.refused[0])
	}
	return c.ids
}

// natsWithMonitor starts a server that tells who is connected.
func natsWithMonitor(t *testing.T) (*natsServer, func() []string) {
	monitor := freePort(t)
	s := newNATSServer(t, "-js", "-sd", t.TempDir(), "-m", monitor)
	return s, func() (names []string) {
		var connz struct {
			Connections []struct{ Name string }
		}
		resp, err := http.Get("http://127.0.0.1:" + monitor + "/connz")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if err := json.NewDecoder(resp.Body).Decode(&connz); err != nil {
			t.Fatal(err)
		}
		for _, c := range connz.Connections {
			if c.Name != "" {
				names = append(names, c.Name)
			}
		}
		return names
	}
}

// TestBrokerReplaced moves a worker from one server to another while a task runs: the task's story is told where it
// began, new tasks come from the new server, and the old one is let go of after that.
func TestBrokerReplaced(t *testing.T) {
	for _, kind := range brokerKinds[:2] {
		t.Run(kind.name, func(t *testing.T) {
			first, connected := natsWithMonitor(t)
			second := newNATSServer(t, "-js", "-sd", t.TempDir())
			a := workerOn(t, kind, first, "w1", "concurrency: 2"+gateJobs)
			atFirst, atSecond := first.collect(t), second.collect(t)
			kind.publish(t, first, "gate", "g-1", "{}")
			a.awaitBegun("g-1")
			creating := a.keepCreating()
			a.rebroker(kind.connection(first), kind.connection(second))
			kind.publish(t, second, "note", "n-1", "{}")
			atSecond.finish(t, "n-1")
			if now := connected(); !slices.Contains(now, "job_item/w1") {
				t.Errorf("connected to the old server while its task runs: %q", now)
			}
			first.publish(t, "g-1_listen", "?")
			waitFor(t, 5*time.Second, func() string {
				if countOf(atFirst.of("g-1"), "_listen.callback") == 0 {
					return "the task does not listen on the old server any more"
				}
				return ""
			})
			a.open("g-1")
			got := atFirst.finish(t, "g-1")
			if output := outputOf(got); output != "begun\nended\n" || countOf(got, "_finish") != 1 {
				t.Errorf("story on the old server: %q", got)
			}
			if strays := atSecond.of("g-1"); len(strays) > 0 {
				t.Errorf("told on the new server: %q", strays)
			}
			created := creating.end(t)
			for _, id := range created {
				a.wait(id, statusFinish)
			}
			waitFor(t, 10*time.Second, func() string {
				if now := connected(); slices.Contains(now, "job_item/w1") {
					return fmt.Sprintf("connected to the old server: %q", now)
				}
				return ""
			})
			if kind.durable {
				assertStreamEmpty(t, first, "p1.gate")
				assertStreamEmpty(t, first, "p1.note")
			}
			assertRanOnce(t, append(created, "g-1", "n-1"), a)
			if h := a.health(); h.Status != "ok" {
				t.Errorf("health %+v", h)
			}
			t.Logf("%d tasks created meanwhile", len(created))
		})
	}
}

func outputOf(events []publishedEvent) (output string) {
	for _, e := range events {
		if e.subject == "_process" {
			output += e.data
		}
	}
	return output
}

// TestBrokerOfAnotherKind goes from broker to broker, while a task runs and others wait: those that wait in the journal,
// and those that only the broker before has, where nobody else is left to take them.
func TestBrokerOfAnotherKind(t *testing.T) {
	nats, redis, rabbit := newNATSServer(t), newRedisServer(t), newRabbitVHost(t)
	steps := []struct{ name, connection string }{
		{"local", "{type: local}"},
		{"nats", brokerKinds[0].connection(nats)},
		{"redis-durable", brokerKinds[4].connection(redis)},
		{"rabbitmq", rabbit.connection()},
		{"redis", redis.connection()},
		{"local again", "{type: local}"},
	}
	a := newAgent(t, "identity_id: w1\ncredential: {project_id: p1}\nbroker_connection: "+steps[0].connection+
		"\nconcurrency: 1\nretain: {tasks: 5000}"+gateJobs).start()
	var ids []string
	for i, step := range steps[1:] {
		gate := a.create("gate", "{}")
		a.awaitBegun(gate)
		waiting := []string{a.create("note", "{}"), a.create("note", "{}"), a.create("note", "{}")}
		creating := a.keepCreating()
		began := time.Now()
		a.rebroker(steps[i].connection, step.connection)
		t.Logf("%s in use after %v", step.name, time.Since(began).Round(time.Millisecond))
		a.open(gate)
		a.wait(gate, statusFinish)
		for _, id := range append(waiting, creating.end(t)...) {
			a.wait(id, statusFinish)
			ids = append(ids, id)
		}
		ids = append(ids, gate)
		if v := a.task(gate); a.output(gate) != "begun\nended\n" || v.Attempt != 1 {
			t.Errorf("the task that ran meanwhile: %+v, output %q", v, a.output(gate))
		}
	}
	assertRanOnce(t, ids, a)
	if h := a.health(); h.Status != "ok" {
		t.Errorf("health %+v", h)
	}
	for _, queue := range []string{"p1.gate", "p1.note"} {
		if n, err := redis.client.XLen(t.Context(), queue).Result(); n != 0 || err != nil {
			t.Errorf("%d tasks are left in the stream %s, %v", n, queue, err)
		}
		if n := queueLength(t, rabbit, queue); n != 0 {
			t.Errorf("%d tasks are left in %s", n, queue)
		}
	}
}

// TestNewBrokerAway names servers that are not there: the one before serves on, and the health says what is wrong until
// the configuration is right, whichever way that is.
func TestNewBrokerAway(t *testing.T) {
	t.Parallel() // it mostly waits
	first, second := newNATSServer(t), newNATSServer(t)
	wrong := "{type: nats, host: 127.0.0.1, port: " + freePort(t) + "}"
	a := workerOn(t, brokerKinds[0], first, "w1", "concurrency: 2"+gateJobs)
	atFirst, atSecond := first.collect(t), second.collect(t)
	first.publish(t, "p1.gate", taskJSON("g-1"))
	a.awaitBegun("g-1")
	creating := a.keepCreating()
	inUse, last := first.connection(), atFirst
	for i, good := range []string{second.connection(), second.connection()} { // a better one, and back
		a.reload("broker_connection: "+inUse+"\n", "broker_connection: "+wrong+"\n")
		h := a.awaitHealth("degraded", strings.Trim(strings.SplitAfter(wrong, "port: ")[1], "}"))
		if !strings.Contains(fmt.Sprint(h.Problems), string(codeNATSConnect)) {
			t.Errorf("health %+v", h)
		}
		id := fmt.Sprintf("n-%d", i)
		if i == 0 {
			first.publish(t, "p1.note", taskJSON(id))
		} else {
			second.publish(t, "p1.note", taskJSON(id))
		}
		last.finish(t, id)
		a.reload("broker_connection: "+wrong+"\n", "broker_connection: "+good+"\n")
		a.awaitHealth("ok", "")
		inUse, last = good, atSecond
	}
	second.publish(t, "p1.note", taskJSON("n-2"))
	atSecond.finish(t, "n-2")
	a.open("g-1")
	atFirst.finish(t, "g-1")
	ids := creating.end(t)
	for _, id := range ids {
		a.wait(id, statusFinish)
	}
	assertRanOnce(t, append(ids, "g-1", "n-0", "n-1", "n-2"), a)
	if n := strings.Count(a.log.String(), `msg="broker connection replaced"`); n != 1 {
		t.Errorf("the connection was replaced %d times", n)
	}
}

// TestIdentityChanges changes what the subjects are made of, while a task runs that the broker holds.
func TestIdentityChanges(t *testing.T) {
	t.Parallel() // it mostly waits
	for _, kind := range []brokerKind{brokerKinds[1], brokerKinds[4]} {
		t.Run(kind.name, func(t *testing.T) {
			server := kind.start(t)
			a := workerOn(t, kind, server, "w1", "concurrency: 1"+gateJobs)
			events := server.collect(t)
			kind.publish(t, server, "gate", "g-1", "{}")
			a.awaitBegun("g-1")
			other := workerOn(t, kind, server, "w2", "jobs: [{event: gate, cmd: 'echo {{task_id}} >> ran'}]\n")
			waiting := []string{a.create("note", "{}"), a.create("note", "{}")} // nobody else does these
			replaced := func(n int) func() bool {
				return func() bool { return strings.Count(a.log.String(), `msg="broker connection replaced"`) == n }
			}
			a.change("identity_id: w1", "identity_id: w9")
			a.awaitLog("the new identity in use", replaced(1))
			a.change("project_id: p1", "project_id: p2")
			a.awaitLog("the new project in use", replaced(2))
			later := a.create("note", "{}")
			a.open("g-1")
			if got := events.finish(t, "g-1"); outputOf(got) != "begun\nended\n" || countOf(got, "_finish") != 1 {
				t.Errorf("story of the task that ran: %q", got)
			}
			for _, id := range append(waiting, later) {
				a.wait(id, statusFinish)
			}
			assertRanOnce(t, append(waiting, "g-1", later), a, other)
			if h := a.health(); h.Status != "ok" || h.IdentityID != "w9" {
				t.Errorf("health %+v", h)
			}
			server.publish(t, "p2.restart", "now")
			a.awaitLog("asked again", func() bool {
				return strings.Contains(a.log.String(), "the configuration is to be asked for again")
			})
			server.publish(t, "w9.shutdown", "now")
			a.waitGone(20 * time.Second)
			other.stop()
		})
	}
}

// TestCertificatesChange changes the content of TLS files whose names stay.
func TestCertificatesChange(t *testing.T) {
	ca, stranger := newTestAuthority(t), newTestAuthority(t)
	ago, hour := time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	dir := t.TempDir()
	certificate, key := ca.issue(ago, hour)
	putFiles(t, dir, map[string][]byte{"ca.crt": ca.pem, "s.crt": certificate, "s.key": key})
	in := func(name string) string { return filepath.Join(dir, name) }
	server := natsServerWith(t, fmt.Sprintf("tls { cert_file: %q, key_file: %q, ca_file: %q, verify: true }",
		in("s.crt"), in("s.key"), in("ca.crt")))
	a := newAgent(t, "broker_connection: {type: nats, host: "+server.addr+", secure: true, ca_file: tls/ca.crt, "+
		"cert_file: tls/client.crt, key_file: tls/client.key}"+gateJobs)
	issue := func(authority *testAuthority) {
		certificate, key := authority.issue(ago, hour)
		putFiles(t, filepath.Join(a.dir, "tls"), map[string][]byte{
			"ca.crt": ca.pem, "client.crt": certificate, "client.key": key,
		})
	}
	issue(ca)
	a.start()
	gate := a.create("gate", "{}")
	a.awaitBegun(gate)
	issue(ca)
	a.awaitLog("the new certificate in use", func() bool {
		return strings.Contains(a.log.String(), `msg="broker connection replaced"`)
	})
	issue(stranger)
	h := a.awaitHealth("degraded", string(codeNATSTLS))
	t.Logf("with a certificate that the server refuses: %q", h.Problems)
	a.wait(a.create("note", "{}"), statusFinish)
	issue(ca)
	a.awaitHealth("ok", "")
	a.open(gate)
	a.wait(gate, statusFinish)
	a.wait(a.create("note", "{}"), statusFinish)
}
