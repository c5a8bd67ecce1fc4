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
	"syscall"
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

// A rebrokering is a change of broker_connection that is followed by the end of what was before.
type rebrokering struct {
	kind          brokerKind
	first, second testServer // the same where only the login changes
	before, after string
	end           func()              // of the login or server before
	held          func() (int, error) // tasks of the job gate that the server has still; nil: it is gone

	w1, w2            *agent
	atFirst, atSecond *collector
	published         []string
	created           *creation
}

// withLogin adds a login to a connection.
func withLogin(connection, login string) string {
	return strings.TrimSuffix(connection, "}") + ", " + login + "}"
}

// newLogins are servers of every kind that holds tasks, each with a login that is taken away.
func newLogins(t *testing.T) []*rebrokering {
	store := t.TempDir()
	users := func(more string) string {
		return fmt.Sprintf("jetstream { store_dir: %q }\nno_auth_user: guest\nauthorization { users: [ "+
			"{user: guest, password: guest}, {user: new, password: new}%s ] }\n", store, more)
	}
	nats := natsServerWith(t, users(", {user: old, password: old}"))
	redis := newRedisServer(t)
	for _, user := range []string{"old", "new"} {
		if err := redis.client.Do(t.Context(), "ACL", "SETUSER", user, "on", ">"+user, "~*", "&*", "+@all").Err(); err != nil {
			t.Fatal(err)
		}
	}
	rabbit := newRabbitVHost(t)
	rabbit.write(t, "logins.json", fmt.Sprintf(`{
"users":[{"name":"old","password":"old","tags":""},{"name":"new","password":"new","tags":""}],
"permissions":[{"user":"old","vhost":%[1]q,"configure":".*","write":".*","read":".*"},
{"user":"new","vhost":%[1]q,"configure":".*","write":".*","read":".*"}]}`, rabbit.vhost))
	rabbit.ctl(t, "import_definitions", filepath.Join(rabbit.dir, "logins.json"))

	natsLogin := func(name string) string {
		return withLogin(brokerKinds[1].connection(nats), fmt.Sprintf("auth_type: user_password, user: %s, password: %[1]s", name))
	}
	redisLogin := func(name string) string {
		return withLogin(brokerKinds[4].connection(redis), fmt.Sprintf("user: %s, password: %[1]s", name))
	}
	rabbitLogin := func(name string) string {
		return strings.NewReplacer("user: guest", "user: "+name, "password: guest", "password: "+name).Replace(rabbit.connection())
	}
	return []*rebrokering{
		{kind: brokerKinds[1], first: nats, second: nats, before: natsLogin("old"), after: natsLogin("new"), end: func() {
			if err := os.WriteFile(nats.args[len(nats.args)-1], []byte(users("")), 0o600); err != nil {
				t.Fatal(err)
			}
			nats.cmd.Process.Signal(syscall.SIGHUP)
		}, held: nats.inStream(t, "p1.gate")},
		{kind: brokerKinds[4], first: redis, second: redis, before: redisLogin("old"), after: redisLogin("new"), end: func() {
			if err := redis.client.Do(t.Context(), "ACL", "DELUSER", "old").Err(); err != nil {
				t.Fatal(err)
			}
		}, held: func() (int, error) {
			n, err := redis.client.XLen(t.Context(), "p1.gate").Result()
			return int(n), err
		}},
		{kind: brokerKinds[2], first: rabbit, second: rabbit, before: rabbitLogin("old"), after: rabbitLogin("new"), end: func() {
			rabbit.ctl(t, "delete_user", "old")
		}, held: func() (int, error) { return queueLength(t, rabbit, "p1.gate"), nil }},
	}
}

// TestBrokerBeforeIsLost takes the old login away, or kills the old server, right after the change: nothing that runs is
// run by another worker as well, and its story goes on over the new connection.
func TestBrokerBeforeIsLost(t *testing.T) {
	t.Parallel() // it mostly waits
	changes := newLogins(t)
	gone := newNATSServer(t, "-js", "-sd", t.TempDir())
	next := newNATSServer(t, "-js", "-sd", t.TempDir())
	changes = append(changes, &rebrokering{
		kind: brokerKinds[1], first: gone, second: next, end: func() { gone.stop(t) },
		before: brokerKinds[1].connection(gone), after: brokerKinds[1].connection(next),
	})
	config := func(name, connection string) *agent {
		return newAgent(t, fmt.Sprintf("identity_id: %s\ncredential: {project_id: p1}\nbroker_connection: %s\nconcurrency: 2%s",
			name, connection, gateJobs)).start()
	}
	for _, c := range changes {
		c.w1 = config("w1", c.before)
		c.atFirst = c.first.collect(t)
		if c.atSecond = c.atFirst; c.second != c.first {
			c.atSecond = c.second.collect(t)
		}
		c.kind.publish(t, c.first, "gate", "g-1", "{}")
		c.kind.publish(t, c.first, "gate", "g-2", "{}")
		c.w1.awaitBegun("g-1")
		c.w1.awaitBegun("g-2") // both slots are taken
		c.w2 = config("w2", c.kind.connection(c.first))
		if c.first == c.second { // else the lost server keeps what nobody has taken yet
			c.created = c.w1.keepCreating()
		}
		for i := range 20 {
			if i == 5 {
				c.w1.rebroker(c.before, c.after)
				c.end()
			}
			if id := fmt.Sprintf("n-%d", i); i >= 5 || c.first == c.second {
				c.kind.publish(t, c.second, "note", id, "{}")
				c.published = append(c.published, id)
			}
		}
		c.w1.open("g-1")
	}
	for i, c := range changes {
		name := fmt.Sprintf("%d %s", i, c.kind.name)
		got := c.atSecond.finish(t, "g-1")
		t.Logf("%s: told over the new connection: %q", name, got)
		// What runs on listens on the new connection now.
		waitFor(t, 15*time.Second, func() string {
			c.second.publish(t, "g-2_listen", "?")
			if countOf(c.atSecond.of("g-2"), "_listen.callback") == 0 {
				return name + ": no sign of life"
			}
			return ""
		})
		c.w1.open("g-2")
		c.atSecond.finish(t, "g-2")
		ids := c.published
		if c.created != nil {
			ids = append(ids, c.created.end(t)...)
		}
		for _, id := range ids {
			waitFor(t, 20*time.Second, func() string {
				if countOf(append(c.atFirst.of(id), c.atSecond.of(id)...), "_finish") == 0 {
					return fmt.Sprintf("%s: no _finish of %s\n%s", name, id, c.w1.log)
				}
				return ""
			})
		}
		assertRanOnce(t, append(ids, "g-1", "g-2"), c.w1, c.w2)
		if n := countOf(c.atSecond.of("g-2"), "_finish"); n != 1 {
			t.Errorf("%s: %d times _finish", name, n)
		}
		if h := c.w1.health(); h.Status != "ok" {
			t.Errorf("%s: health %+v", name, h)
		}
	}
	for i, c := range changes {
		// What could not be acknowledged is delivered again, to one worker or the other.
		waitFor(t, claimLost+20*time.Second, func() string {
			if c.held == nil {
				return ""
			}
			held, err := c.held()
			if left := strings.Count(c.w2.log.String(), "left to that one"); err != nil || held > left {
				return fmt.Sprintf("%d %s: the server holds %d tasks, the other worker has left %d, %v", i, c.kind.name, held, left, err)
			}
			return ""
		})
		if begun := c.w2.begun(); len(begun) > 0 {
			t.Errorf("%d %s: the other worker began %q", i, c.kind.name, begun)
		}
	}
}

// heldKinds are those whose broker holds a task until it is done.
func heldKinds() (kinds []brokerKind) {
	for _, kind := range brokerKinds {
		if kind.durable {
			kinds = append(kinds, kind)
		}
	}
	return kinds
}

// TestClaimsOutliveTheirTime drains workers for longer than a broker is patient with a silent one: what runs there goes
// on, and no other worker gets it meanwhile.
func TestClaimsOutliveTheirTime(t *testing.T) {
	t.Parallel() // it waits for claims that are not lost
	config := `
drain_timeout: 45s
jobs: [{event: long, cmd: 'echo {{task_id}} >> begun; sleep {{s}}; echo {{task_id}} >> ran'}]
`
	type share struct {
		kind         brokerKind
		leaver, heir *agent
		events       *collector
		began        time.Time
	}
	var shares []*share
	for _, kind := range heldKinds() {
		server := kind.start(t)
		s := &share{kind: kind, leaver: workerOn(t, kind, server, "leaver", config), events: server.collect(t)}
		kind.publish(t, server, "long", "long-1", fmt.Sprintf(`{"s":%.0f}`, (claimLost+8*time.Second).Seconds()))
		s.leaver.awaitBegun("long-1")
		s.leaver.cmd.Process.Signal(syscall.SIGTERM)
		s.began = time.Now()
		s.heir = workerOn(t, kind, server, "heir", config)
		shares = append(shares, s)
	}
	for _, s := range shares {
		s.leaver.waitGone(60 * time.Second)
		if took := time.Since(s.began); took < claimLost {
			t.Errorf("%s: drained within %v:\n%s", s.kind.name, took, s.leaver.log)
		}
		got := s.events.finish(t, "long-1")
		if begun := s.heir.begun(); len(begun) > 0 {
			t.Errorf("%s: the other worker began it, too", s.kind.name)
		}
		assertRanOnce(t, []string{"long-1"}, s.leaver, s.heir)
		if countOf(got, "_who") != 1 || countOf(got, "_finish") != 1 || got[len(got)-1].data != "finish" {
			t.Errorf("%s: %q", s.kind.name, got)
		}
	}
}

// TestClaimsOutliveTheLastProcess drains workers whose task ignores every polite word: the claim is given back when the
// last process of the task has been killed, and not before.
func TestClaimsOutliveTheLastProcess(t *testing.T) {
	t.Parallel() // with the one before
	// A child of the command's group says every 20 ms that it lives; only SIGKILL ends it.
	config := func(folder, cmd string) string {
		return "drain_timeout: 500ms\nkill_after: 3s\njobs: [{event: stubborn, working_dir: " + folder + ", cmd: '" + cmd + "'}]\n"
	}
	for _, kind := range heldKinds() {
		t.Run(kind.name, func(t *testing.T) {
			server, folder := kind.start(t), t.TempDir()
			leaver := workerOn(t, kind, server, "leaver", config(folder,
				`trap "" TERM; (while :; do echo x >> lives; sleep 0.02; done) & echo {{task_id}} >> begun; wait`))
			lives := func() time.Time {
				info, err := os.Stat(filepath.Join(folder, "lives"))
				if err != nil {
					return time.Time{}
				}
				return info.ModTime()
			}
			events := server.collect(t)
			kind.publish(t, server, "stubborn", "s-1", "{}")
			waitFor(t, 20*time.Second, func() string {
				if lives().IsZero() {
					return "it has not begun\n" + leaver.log.String()
				}
				return ""
			})
			heir := workerOn(t, kind, server, "heir", config(folder, "echo > heir"))
			began := time.Now()
			leaver.cmd.Process.Signal(syscall.SIGTERM)
			if got := events.finish(t, "s-1"); countOf(got, "_finish") != 1 {
				t.Errorf("events %q", got)
			}
			info, err := os.Stat(filepath.Join(folder, "heir"))
			if err != nil {
				t.Fatalf("the other worker did not run it: %v\n%s", err, heir.log)
			}
			last, next := lives().Sub(began), info.ModTime().Sub(began)
			t.Logf("last sign of the first run %v after SIGTERM, second run after %v", last.Round(time.Millisecond), next.Round(time.Millisecond))
			if last < 3*time.Second || next < last {
				t.Errorf("the task ran twice at once, or was not given its time:\n%s", leaver.log)
			}
			if next > claimRenewal+8*time.Second { // Redis is looked at so often for what others have put back
				t.Errorf("the claim was not given back, but lost")
			}
			leaver.waitGone(10 * time.Second)
		})
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
