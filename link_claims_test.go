//go:build unix

package main

// link_claims_test.go takes the broker away during a change of it, and looks at the claims of tasks that run meanwhile.

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

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
					return fmt.Sprintf("%s: no _finish of %s; w1 ran %q, w2 ran %q\n%s\n%s", name, id, c.w1.ran(), c.w2.ran(), c.w1.log, c.w2.log)
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
