//go:build unix

package main

// reload_test.go changes the configuration of whole, working workers.

import (
	"fmt"
	"io"
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

// change replaces text in the configuration, the way editors do: a new file takes the old one's place.
func (a *agent) change(oldnew ...string) {
	a.t.Helper()
	path := filepath.Join(a.dir, "config.yaml")
	content, err := os.ReadFile(path)
	if err != nil {
		a.t.Fatal(err)
	}
	text := strings.NewReplacer(oldnew...).Replace(string(content))
	if text == string(content) {
		a.t.Fatalf("the configuration does not hold %q:\n%s", oldnew[0], text)
	}
	if err := os.WriteFile(path+"~", []byte(text), 0o600); err != nil {
		a.t.Fatal(err)
	}
	if err := os.Rename(path+"~", path); err != nil {
		a.t.Fatal(err)
	}
}

// takenUp counts how often a configuration has been taken up in place.
func (a *agent) takenUp() int { return strings.Count(a.log.String(), `msg="configuration taken up"`) }

// reload changes the configuration and waits until the worker has taken it up.
func (a *agent) reload(oldnew ...string) {
	a.t.Helper()
	before := a.takenUp()
	a.change(oldnew...)
	a.awaitLog("the changed configuration taken up", func() bool { return a.takenUp() > before })
}

// awaitLog waits for something that the log tells.
func (a *agent) awaitLog(what string, told func() bool) {
	a.t.Helper()
	waitFor(a.t, 20*time.Second, func() string {
		if !told() {
			return "not " + what + "\n" + a.log.String()
		}
		return ""
	})
}

// TestReloadUnderLoad changes the configuration ten times, with and without SIGHUP, while tasks are created and run:
// nothing is refused, lost or done twice, and the worker stays the same process.
func TestReloadUnderLoad(t *testing.T) {
	t.Parallel() // beside others that wait
	a := newAgent(t, `
concurrency: 4
retain: {tasks: 5000}
drain_timeout: 20s
jobs:
  - {event: quick, cmd: 'echo {{task_id}} >> ran'}
  - {event: slow, cmd: 'sleep 0.3; echo {{task_id}} >> ran'} # round 0
execs:
  - {key: kept, cmd: 'sleep 1000'}
  - {key: changed, cmd: 'sleep 1000; : round 0'}
`)
	a.start()
	pid := a.childPID()
	execs := a.execPIDs()

	created := a.createAlong(4, func(n int) string {
		if n%8 == 0 {
			return "slow"
		}
		return "quick"
	})
	for round := 1; round <= 10; round++ {
		before, after := fmt.Sprintf("round %d", round-1), fmt.Sprintf("round %d", round)
		switch round % 5 {
		case 0:
			a.reload(before, after, "concurrency: 4", "concurrency: 2", "20s", "21s")
		case 1:
			a.reload(before, after, "concurrency: 2", "concurrency: 4", "20s", "19s")
		case 2:
			a.reload(before, after, "jobs:\n", "jobs:\n  - {event: more, cmd: 'true'}\n")
		case 3:
			a.reload(before, after, "  - {event: more, cmd: 'true'}\n", "", "sleep 0.3", "sleep 0.30")
		case 4:
			taken := a.takenUp()
			a.change(before, after, "sleep 0.30", "sleep 0.3", "5000", fmt.Sprint(5000+round))
			a.cmd.Process.Signal(syscall.SIGHUP)
			a.awaitLog("taken up at SIGHUP", func() bool { return a.takenUp() > taken })
		}
		if round == 5 {
			a.change("5004", "5000")
		}
	}
	tasks := created()
	if a.childPID() != pid {
		t.Error("the worker process is another one")
	}
	now := a.execPIDs()
	if now["kept"] == 0 || now["kept"] != execs["kept"] || now["changed"] == execs["changed"] {
		t.Errorf("background processes were %v, and are %v", execs, now)
	}
	t.Logf("%d tasks, %d reloads", tasks, a.takenUp())
}

// createAlong has clients create tasks, each request on a connection of its own, as from a script. The jobs append the
// task's id to the file ran. The function that it gives ends them, waits for the tasks, and checks that no request was
// refused and that each task ran once.
func (a *agent) createAlong(clients int, event func(n int) string) (check func() (tasks int)) {
	var mu sync.Mutex // guards what follows
	var ids, refused []string
	stop := make(chan struct{})
	var creating sync.WaitGroup
	for i := range clients {
		creating.Add(1)
		go func() { // ends at stop
			defer creating.Done()
			client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
			for n := i; ; n++ {
				select {
				case <-stop:
					return
				case <-time.After(40 * time.Millisecond):
				}
				id, err := createBy(client, a.url, event(n))
				mu.Lock()
				if err != nil {
					refused = append(refused, err.Error())
				} else {
					ids = append(ids, id)
				}
				mu.Unlock()
			}
		}()
	}
	return func() int {
		a.t.Helper()
		close(stop)
		creating.Wait()
		for _, id := range ids {
			a.wait(id, statusFinish)
		}
		ran := a.ran()
		slices.Sort(ran)
		if doubled := len(ran) - len(slices.Compact(slices.Clone(ran))); doubled > 0 {
			a.t.Errorf("%d tasks ran twice", doubled)
		}
		if len(refused) > 0 {
			a.t.Errorf("%d requests were refused, such as: %s", len(refused), refused[0])
		}
		if len(ran) != len(ids) {
			a.t.Errorf("%d tasks were created, %d ran", len(ids), len(ran))
		}
		return len(ids)
	}
}

// createBy creates a task by a client of its own.
func createBy(client *http.Client, url, event string) (string, error) {
	resp, err := client.Post(url+"/job/create", "application/json", strings.NewReader(fmt.Sprintf(`{"event":%q}`, event)))
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("%d %s %v", resp.StatusCode, body, err)
	}
	_, id, _ := strings.Cut(string(body), `"task_id":"`)
	id, _, _ = strings.Cut(id, `"`)
	return id, nil
}

// execPIDs gives the background processes that run.
func (a *agent) execPIDs() map[string]int {
	a.t.Helper()
	pids := map[string]int{}
	waitFor(a.t, 10*time.Second, func() string {
		for _, e := range a.health().Execs {
			if e.PID == 0 {
				return fmt.Sprintf("%q is %s", e.Key, e.State)
			}
			pids[e.Key] = e.PID
		}
		if len(pids) == 0 {
			return "no background process\n" + a.log.String()
		}
		return ""
	})
	return pids
}

// TestReloadRemovesJob removes a job whose tasks run and wait: they are done to the end as they were accepted, and no
// new one is. Limits go up and down on the way.
func TestReloadRemovesJob(t *testing.T) {
	t.Parallel() // beside others that wait
	a := newAgent(t, `
concurrency: 4
jobs:
  - {event: gone, limit: 1, cmd: 'until test -e go; do sleep 0.02; done; echo {{task_id}} >> ran'}
  - {event: other, limit: 1, cmd: 'echo one; until test -e go; do sleep 0.02; done'}
`)
	a.start()
	var gone, other []string
	for range 3 {
		gone = append(gone, a.create("gone", "{}"))
		other = append(other, a.create("other", "{}"))
	}
	a.wait(gone[0], statusRunning)
	a.wait(other[0], statusRunning)
	a.reload("event: gone, limit: 1", "event: new, limit: 1", "event: other, limit: 1, cmd: 'echo one", "event: other, limit: 3, cmd: 'echo two")
	if code, body := a.post("/job/create", `{"event":"gone"}`); code != http.StatusNotFound {
		t.Errorf("create of a removed job = %d %s", code, body)
	}
	for _, id := range other {
		a.wait(id, statusRunning)
	}
	a.write("go", "")
	for i, id := range other {
		a.wait(id, statusFinish)
		if want := map[bool]string{true: "one\n", false: "two\n"}[i == 0]; a.output(id) != want {
			t.Errorf("task %d of the changed job wrote %q, want %q", i, a.output(id), want)
		}
	}
	for _, id := range gone {
		a.wait(id, statusFinish)
	}
	a.awaitLog("released", func() bool { return strings.Contains(a.log.String(), `msg="removed job released" event=gone`) })
	a.wait(a.create("new", "{}"), statusFinish)
}

// TestReloadRefused leaves everything as it was when the changed file is wrong, and says so until it is right.
func TestReloadRefused(t *testing.T) {
	t.Parallel() // beside others that wait
	a := newAgent(t, "jobs:\n  - {event: a, cmd: 'echo fine'}\n")
	a.start()
	taken := a.takenUp()
	a.change("echo fine", "echo {{fine")
	waitFor(t, 10*time.Second, func() string {
		if h := a.health(); h.Status != "degraded" || !strings.Contains(fmt.Sprint(h.Problems), "config.yaml:") {
			return fmt.Sprintf("health %+v\n%s", h, a.log)
		}
		return ""
	})
	if id := a.create("a", "{}"); a.wait(id, statusFinish).Status == statusFinish && a.output(id) != "fine\n" {
		t.Errorf("output %q", a.output(id))
	}
	a.change("echo {{fine", "echo fine")
	waitFor(t, 10*time.Second, func() string {
		if h := a.health(); h.Status != "ok" {
			return fmt.Sprintf("health %+v\n%s", h, a.log)
		}
		return ""
	})
	if a.takenUp() != taken {
		t.Errorf("something was taken up although nothing has changed:\n%s", a.log)
	}
	a.change("jobs:", "log_format: json\njobs:")
	a.awaitLog("written as JSON", func() bool { return strings.Contains(a.log.String(), `"msg":"configuration taken up"`) })
}

// TestReloadMoves changes port and folder: the worker drains and starts anew, and neither port refuses anything.
func TestReloadMoves(t *testing.T) {
	a := newAgent(t, "drain_timeout: 20s\njobs:\n  - {event: a, cmd: 'sleep {{s}}; echo {{task_id}} >> ran'}\n")
	a.start()
	pid, oldURL := a.childPID(), a.url
	long := a.create("a", `{"s":1}`)
	a.wait(long, statusRunning)
	port := freePort(t)
	a.change("listen: "+strings.TrimPrefix(oldURL, "http://"), "listen: 127.0.0.1:"+port+"\ndata_dir: other")
	a.url = "http://127.0.0.1:" + port
	a.awaitLog("moved", func() bool { return strings.Contains(a.log.String(), "the worker drains and starts anew") })
	// The old port still answers, or the new one does already; a connection to the new one waits until it does.
	id := a.create("a", `{"s":0}`)
	a.wait(id, statusFinish)
	if a.childPID() == pid {
		t.Error("the worker is the same process")
	}
	if ran := a.ran(); !slices.Equal(ran, []string{long, id}) {
		t.Errorf("ran %q, want %q and then %q", ran, long, id)
	}
	if _, err := os.Stat(filepath.Join(a.dir, "other", "journal")); err != nil {
		t.Error(err)
	}

	// A port that is taken changes nothing.
	busy, err := listen("127.0.0.1:0", bindPatience)
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	a.change("127.0.0.1:"+port, busy.Addr().String())
	waitFor(t, 20*time.Second, func() string {
		if h := a.health(); h.Status != "degraded" || !strings.Contains(fmt.Sprint(h.Problems), "in use") {
			return fmt.Sprintf("health %+v\n%s", h, a.log)
		}
		return ""
	})
	a.wait(a.create("a", `{"s":0}`), statusFinish)
	busy.Close()
	a.cmd.Process.Signal(syscall.SIGHUP)
	a.url = "http://" + busy.Addr().String()
	waitFor(t, 20*time.Second, func() string {
		if h := a.health(); h.Status != "ok" {
			return fmt.Sprintf("health %+v\n%s", h, a.log)
		}
		return ""
	})
}

// TestCascadeExit ends everything with a background process that asks for it, as a failure if it was one.
func TestCascadeExit(t *testing.T) {
	t.Parallel() // beside others that wait
	for code, want := range map[int]int{0: 0, 3: 1} {
		a := newAgent(t, fmt.Sprintf(`
drain_timeout: 20s
jobs:
  - {event: a, cmd: 'until test -e go; do sleep 0.02; done; sleep 0.5; echo {{task_id}} >> ran'}
execs:
  - {key: side, cmd: 'sleep 1000'}
  - {key: main, cmd: 'until test -e go; do sleep 0.02; done; exit %d', cascade_exit: true, attempt: 0}
`, code))
		a.start()
		id := a.create("a", "{}")
		a.wait(id, statusRunning)
		pids := a.execPIDs()
		a.write("go", "")
		a.waitGone(20 * time.Second)
		if got := a.cmd.ProcessState.ExitCode(); got != want {
			t.Errorf("exit code %d after one of %d, want %d\n%s", got, code, want, a.log)
		}
		if ran := a.ran(); !slices.Equal(ran, []string{id}) {
			t.Errorf("the running task did not end: %q", ran)
		}
		if err := syscall.Kill(pids["side"], 0); err != syscall.ESRCH {
			t.Errorf("the other background process: %v", err)
		}
	}
}
