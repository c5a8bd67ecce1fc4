//go:build unix

package main

// brokers_system_test.go runs whole workers on every broker: what a Job Manager sees of them, how they share work, and
// what becomes of the tasks when the broker or a worker is killed.

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// A brokerKind is a way to run on a broker.
type brokerKind struct {
	name    string
	start   func(testing.TB) testServer
	durable bool // the broker holds a task until it is done
}

var brokerKinds = []brokerKind{
	{"nats", startNATS, false},
	{"nats-durable", startNATS, true},
	{"rabbitmq", startRabbitMQ, true},
	{"redis", startRedis, false},
	{"redis-durable", startRedis, true},
}

// onEveryBroker runs a test on a private server of each kind.
func onEveryBroker(t *testing.T, test func(t *testing.T, kind brokerKind, server testServer)) {
	for _, kind := range brokerKinds {
		t.Run(kind.name, func(t *testing.T) {
			test(t, kind, kind.start(t))
		})
	}
}

// connection is the value of broker_connection for this kind.
func (k brokerKind) connection(s testServer) string {
	if strings.HasSuffix(k.name, "-durable") {
		return strings.TrimSuffix(s.connection(), "}") + ", durable: true}"
	}
	return s.connection()
}

// publish sends a task in the way that the broker holds, where there are two.
func (k brokerKind) publish(t testing.TB, s testServer, event, id, data string) {
	t.Helper()
	message := fmt.Sprintf(`{"task_id":%q,"data":%s,"action":"execute"}`, id, data)
	switch k.name {
	case "nats-durable":
		s.(*natsServer).add(t, "p1."+event, message)
	case "redis-durable":
		s.(*redisServer).add(t, "p1."+event, message)
	default:
		s.publish(t, "p1."+event, message)
	}
}

// workerOn is a worker on a server, one of several of the project p1.
func workerOn(t testing.TB, kind brokerKind, server testServer, name, rest string) *agent {
	t.Helper()
	a := newAgent(t, fmt.Sprintf("identity_id: %s\ncredential: {project_id: p1}\nbroker_connection: %s\n%s",
		name, kind.connection(server), rest))
	return a.start()
}

// ran gives what tasks have noted in a worker's folder.
func (a *agent) ran() []string {
	content, _ := os.ReadFile(filepath.Join(a.dir, "ran"))
	return strings.Fields(string(content))
}

func TestBrokerTellsOfATask(t *testing.T) {
	onEveryBroker(t, func(t *testing.T, kind brokerKind, server testServer) {
		a := workerOn(t, kind, server, "w1", `
kill_after: 300ms
jobs:
  - {event: greet, cmd: 'echo Hello, {{name}}; echo careful >&2'}
  - {event: fail, cmd: 'echo why >&2; exit 3'}
  - {event: long, cmd: 'echo begun; sleep 60'}
  - {event: cannot, cmd: /no/such/program}
`)
		events := server.collect(t)
		kind.publish(t, server, "greet", "t-1", `{"name":"Ada"}`)
		got := events.finish(t, "t-1")
		output := ""
		for _, e := range got {
			if e.subject == "_process" {
				output += e.data
			}
		}
		if first, last := got[0], got[len(got)-1]; first.subject != "_who" || first.data != hostID() ||
			last.subject != "_finish" || last.data != "finish" || !strings.Contains(output, "Hello, Ada\n") ||
			!strings.Contains(output, "careful\n") {
			t.Errorf("events of a good task: %q", got)
		}

		kind.publish(t, server, "fail", "t-2", `{}`)
		got = events.finish(t, "t-2")
		if len(got) < 4 || got[len(got)-2] != (publishedEvent{"_failed", "why"}) || got[len(got)-1].data != "error" {
			t.Errorf("events of a failed task: %q", got)
		}

		kind.publish(t, server, "cannot", "t-3", `{}`)
		got = events.finish(t, "t-3")
		if len(got) != 3 || got[0].subject != "_who" || got[1].subject != "_failed" || got[2].data != "error" ||
			!strings.Contains(got[1].data, "/no/such/program") {
			t.Errorf("events of a task that cannot start: %q", got)
		}

		// A duplicate of a finished task is only reported again.
		kind.publish(t, server, "fail", "t-2", `{}`)
		waitFor(t, 10*time.Second, func() string {
			if n := countOf(events.of("t-2"), "_finish"); n != 2 {
				return fmt.Sprintf("%d finish events", n)
			}
			return ""
		})
		if n := countOf(events.of("t-2"), "_who"); n != 1 {
			t.Errorf("the duplicate was run: %q", events.of("t-2"))
		}

		// The manager stops a task and asks for a sign of life.
		for action, status := range map[string]string{"terminate": "terminate", "timeout": "timeout"} {
			id := "t-" + action
			kind.publish(t, server, "long", id, `{}`)
			waitFor(t, 10*time.Second, func() string {
				if n := countOf(events.of(id), "_process"); n == 0 {
					return fmt.Sprintf("no output among %q", events.of(id))
				}
				server.publish(t, id+"_listen", "?")
				if n := countOf(events.of(id), "_listen.callback"); n == 0 {
					return "no sign of life"
				}
				return ""
			})
			server.publish(t, id+"_worker", fmt.Sprintf(`{"task_id":%q,"action":%q}`, id, action))
			got := events.finish(t, id)
			if last := got[len(got)-1]; last.data != status {
				t.Errorf("%s gives %q", action, got)
			}
			// It gives no sign of life of what has ended, although it may still be asked for a moment.
			kind.publish(t, server, "greet", "t-after-"+action, `{"name":"Ada"}`)
			events.finish(t, "t-after-"+action) // the end of the other one is settled by now
			before := countOf(events.of(id), "_listen.callback")
			server.publish(t, id+"_listen", "?")
			kind.publish(t, server, "greet", "t-later-"+action, `{"name":"Ada"}`)
			events.finish(t, "t-later-"+action)
			if n := countOf(events.of(id), "_listen.callback") - before; n != 0 {
				t.Errorf("%d signs of life after %s", n, action)
			}
		}
		if h := a.health(); h.Status != "ok" {
			t.Errorf("health %+v", h)
		}
		server.publish(t, "w1.shutdown", "now")
		a.waitGone(20 * time.Second)
	})
}

func countOf(events []publishedEvent, subject string) int {
	n := 0
	for _, e := range events {
		if e.subject == subject {
			n++
		}
	}
	return n
}

func TestBrokerSharesTasks(t *testing.T) {
	onEveryBroker(t, func(t *testing.T, kind brokerKind, server testServer) {
		const tasks = 1000
		job := "concurrency: 4\nretain: {tasks: 5000}\njobs: [{event: note, cmd: 'echo {{task_id}} >> ran'}]\n"
		workers := []*agent{
			workerOn(t, kind, server, "w1", job), workerOn(t, kind, server, "w2", job), workerOn(t, kind, server, "w3", job),
		}
		events := server.collect(t)
		for i := range tasks {
			kind.publish(t, server, "note", fmt.Sprintf("n-%d", i), "{}")
		}
		for i := range tasks {
			events.finish(t, fmt.Sprintf("n-%d", i))
		}
		var all []string
		for i, w := range workers {
			done := w.ran()
			t.Logf("worker %d ran %d tasks", i+1, len(done))
			if len(done) < tasks/20 {
				t.Errorf("worker %d ran only %d of %d tasks", i+1, len(done), tasks)
			}
			all = append(all, done...)
		}
		slices.Sort(all)
		if once := slices.Compact(slices.Clone(all)); len(all) != tasks || len(once) != tasks {
			t.Errorf("%d runs of %d different tasks; want %d of each", len(all), len(once), tasks)
		}
	})
}

func TestBrokerKilled(t *testing.T) {
	onEveryBroker(t, func(t *testing.T, kind brokerKind, server testServer) {
		const tasks = 300
		a := workerOn(t, kind, server, "w1", `
concurrency: 8
retain: {tasks: 5000}
jobs: [{event: note, cmd: 'sleep 0.05; echo {{task_id}} >> ran'}]
`)
		events := server.collect(t)
		for i := range tasks {
			kind.publish(t, server, "note", fmt.Sprintf("k-%d", i), "{}")
		}
		waitFor(t, 30*time.Second, func() string {
			jobs := a.health().Jobs
			if known := jobs["running"] + jobs["queued"] + jobs["finish"]; !kind.durable && known < tasks || jobs["finish"] < 20 {
				return fmt.Sprintf("jobs are %v", jobs)
			}
			return ""
		})
		server.stop(t)
		waitFor(t, 30*time.Second, func() string {
			if h := a.health(); h.Status != "down" {
				return fmt.Sprintf("health without a broker is %+v", h)
			}
			return ""
		})
		server.start(t)
		for i := range tasks {
			events.finish(t, fmt.Sprintf("k-%d", i))
		}
		done := a.ran()
		slices.Sort(done)
		if once := slices.Compact(slices.Clone(done)); len(done) != tasks || len(once) != tasks {
			t.Errorf("%d runs of %d different tasks; want each once", len(done), len(once))
		}
		waitFor(t, 20*time.Second, func() string {
			if h := a.health(); h.Status != "ok" {
				return fmt.Sprintf("health with the broker back is %+v", h)
			}
			return ""
		})
	})
}

func TestBrokerOutlivesWorker(t *testing.T) {
	onEveryBroker(t, func(t *testing.T, kind brokerKind, server testServer) {
		t.Parallel() // it waits for claims to be lost
		const tasks = 12
		config := `
concurrency: 4
jobs: [{event: note, cmd: 'echo {{task_id}} >> begun; sleep 1; echo {{task_id}} >> ran'}]
`
		victim := workerOn(t, kind, server, "victim", config)
		events := server.collect(t)
		for i := range tasks {
			kind.publish(t, server, "note", fmt.Sprintf("v-%d", i), "{}")
		}
		waitFor(t, 20*time.Second, func() string {
			begun, _ := os.ReadFile(filepath.Join(victim.dir, "begun"))
			if n := len(strings.Fields(string(begun))); n < 4 {
				return fmt.Sprintf("%d tasks have begun", n)
			}
			if jobs := victim.health().Jobs; !kind.durable && jobs["running"]+jobs["queued"]+jobs["finish"] < tasks {
				return fmt.Sprintf("jobs are %v", jobs)
			}
			return ""
		})
		pid := victim.childPID()
		victim.cmd.Process.Kill()
		syscall.Kill(pid, syscall.SIGKILL)
		<-victim.gone
		if kind.durable {
			workerOn(t, kind, server, "heir", config)
		} else {
			victim.start()
		}
		for i := range tasks {
			if got := events.finish(t, fmt.Sprintf("v-%d", i)); got[len(got)-1].data != "finish" {
				t.Errorf("task %d: %q", i, got)
			}
		}
	})
}

// TestBrokerCreatedElsewhere creates tasks on a worker that cannot run them and follows them there.
func TestBrokerCreatedElsewhere(t *testing.T) {
	onEveryBroker(t, func(t *testing.T, kind brokerKind, server testServer) {
		here := workerOn(t, kind, server, "here", "jobs: [{event: other, cmd: 'true'}]\n")
		workerOn(t, kind, server, "there", `
concurrency: 8
jobs:
  - {event: far, cmd: 'echo {{word}}; sleep 0.3; exit {{code}}'}
  - {event: quick, cmd: echo x}
`)
		config := filepath.Join(here.dir, "config.yaml")
		for code, want := range map[int]int{0: 0, 7: 1} {
			got := runCLI(t, nil, "", "create", "far", "--data", fmt.Sprintf(`{"word":"from afar","code":%d}`, code),
				"--wait", "--config", config)
			if got.code != want || !strings.Contains(got.stdout, "from afar") {
				t.Errorf("create --wait of a task elsewhere = %+v; want %d", got, want)
			}
		}
		id := here.create("far", `{"word":"x","code":0}`)
		if v := here.wait(id, statusFinish); v.OutputBytes != 2 {
			t.Errorf("record of a task elsewhere: %+v", v)
		}
		// However quick the other worker is, nothing of them is missed.
		ids := make([]string, 100)
		var creating sync.WaitGroup
		for from := range 4 {
			creating.Add(1)
			go func() { // ends with its share
				defer creating.Done()
				for i := from; i < len(ids); i += 4 {
					if id, err := createBy(http.DefaultClient, here.url, "quick"); err != nil {
						t.Error(err)
					} else {
						ids[i] = id
					}
				}
			}()
		}
		creating.Wait()
		for _, id := range ids {
			if v := here.wait(id, statusFinish); v.OutputBytes != 2 {
				t.Errorf("record of a quick task elsewhere: %+v", v)
			}
		}
	})
}

// TestBrokerDrainsToOthers stops a worker that holds more tasks than it runs: what waits there goes elsewhere at once.
func TestBrokerDrainsToOthers(t *testing.T) {
	onEveryBroker(t, func(t *testing.T, kind brokerKind, server testServer) {
		if !kind.durable {
			t.Skip("the journal of the stopped worker answers for them")
		}
		const tasks = 12
		leaver := workerOn(t, kind, server, "leaver", `
concurrency: 2
drain_timeout: 60s
jobs: [{event: note, cmd: 'sleep 1.5; echo {{task_id}} >> ran'}]
`)
		events := server.collect(t)
		for i := range tasks {
			kind.publish(t, server, "note", fmt.Sprintf("d-%d", i), "{}")
		}
		waitFor(t, 20*time.Second, func() string {
			if n := leaver.health().Jobs["running"]; n < 2 {
				return fmt.Sprintf("%d tasks run", n)
			}
			return ""
		})
		heir := workerOn(t, kind, server, "heir", "jobs: [{event: note, cmd: 'echo {{task_id}} >> ran'}]\n")
		began := time.Now()
		leaver.cmd.Process.Signal(syscall.SIGTERM)
		for i := range tasks {
			events.finish(t, fmt.Sprintf("d-%d", i))
		}
		leaver.waitGone(20 * time.Second)
		done := append(leaver.ran(), heir.ran()...)
		slices.Sort(done)
		if once := slices.Compact(slices.Clone(done)); len(done) != tasks || len(once) != tasks {
			t.Errorf("%d runs of %d different tasks; want %d of each", len(done), len(once), tasks)
		}
		if took := time.Since(began); took > 20*time.Second {
			t.Errorf("it took %v, as long as a lost claim", took)
		}
	})
}
