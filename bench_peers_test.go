//go:build linux

package main

// bench_peers_test.go runs other programs that run commands when told to, with the settings that suit them best. None
// of them writes a data file, keeps a record, or notes anything on disk.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/redis/go-redis/v9"
)

// The peers, each triggered as one of ours is: on NATS, over HTTP, on Redis.
const (
	peerNATS    = "nats reply --command"
	peerWebhook = "webhook"
	peerCelery  = "Celery"
)

// benchPeers are those that are installed.
func (b *bench) benchPeers(t *testing.T) (found []contestant) {
	for _, peer := range []struct {
		name, needs string
		start       func(t *testing.T, concurrency int) benchRunner
	}{
		{peerNATS, filepath.Join(b.peers, "nats"), b.startNATSReply},
		{peerWebhook, filepath.Join(b.peers, "webhook"), b.startWebhook},
		{peerCelery, "/usr/lib/python3/dist-packages/celery/__main__.py", b.startCelery},
	} {
		if _, err := os.Stat(peer.needs); err != nil {
			b.report.missing(peer.name + " is not installed and left out")
			continue
		}
		found = append(found, contestant{name: peer.name, start: peer.start})
	}
	return found
}

// startPeer starts a process for as long as the test runs.
func startPeer(t *testing.T, cmd *exec.Cmd) *lockedBuffer {
	t.Helper()
	log := &lockedBuffer{}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		cmd.Wait()
	})
	return log
}

// natsReply is `nats reply --command`, which runs one command at a time: a process for each slot. In one group they
// would share the requests by chance, so that one has more to do in the end: each has a subject, and its even share.
type natsReply struct {
	t        *testing.T
	nc       *nats.Conn
	inbox    string
	replies  chan *nats.Msg
	subjects []string
	pids     []int
}

func (b *bench) startNATSReply(t *testing.T, concurrency int) benchRunner {
	server := newNATSServer(t)
	r := &natsReply{t: t, nc: server.client(t), replies: make(chan *nats.Msg, 1<<16)}
	r.inbox = r.nc.NewInbox()
	if _, err := r.nc.ChanSubscribe(r.inbox, r.replies); err != nil {
		t.Fatal(err)
	}
	for i := range concurrency {
		subject := fmt.Sprintf("bench.reply.%d", i)
		cmd := exec.Command(filepath.Join(b.peers, "nats"), "--server", "nats://"+server.addr, "reply", subject, "--command", "true")
		log := startPeer(t, cmd)
		waitFor(t, benchPatience, func() string {
			_, err := r.nc.Request(subject, nil, time.Second)
			return unless(err == nil, fmt.Sprintf("nats reply: %v\n%s", err, log))
		})
		r.subjects, r.pids = append(r.subjects, subject), append(r.pids, cmd.Process.Pid)
	}
	return r
}

func (r *natsReply) processes() []int { return r.pids }

func (r *natsReply) burst(n int) benchBurst {
	before, began := usedBy(r.t, r.pids), time.Now()
	for i := range n {
		if err := r.nc.PublishRequest(r.subjects[i%len(r.subjects)], r.inbox, []byte(benchData)); err != nil {
			r.t.Fatal(err)
		}
	}
	left := n
	for patience := time.After(benchPatience); left > 0; left-- {
		select {
		case <-r.replies:
			continue
		case <-patience:
		}
		break
	}
	return benchBurst{time.Since(began), usedBy(r.t, r.pids).since(before), left}
}

func (r *natsReply) once(string) benchLatency {
	began := time.Now()
	if _, err := r.nc.Request(r.subjects[0], []byte(benchData), benchPatience); err != nil {
		r.t.Fatal(err)
	}
	return benchLatency{ended: time.Since(began)}
}

// A webhookRunner is webhook, which runs as many commands as there are requests: as many clients as there are slots.
type webhookRunner struct {
	t       *testing.T
	url     string
	clients int
	client  *http.Client
	pids    []int
}

func (b *bench) startWebhook(t *testing.T, concurrency int) benchRunner {
	dir, port := t.TempDir(), freePort(t)
	hooks := filepath.Join(dir, "hooks.json")
	const hook = `[{"id":"true","execute-command":"true","include-command-output-in-response":true}]` // answers at its end
	if err := os.WriteFile(hooks, []byte(hook), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(b.peers, "webhook"), "-hooks", hooks, "-ip", "127.0.0.1", "-port", port)
	startPeer(t, cmd)
	waitForPort(t, "127.0.0.1:"+port)
	transport := &http.Transport{MaxIdleConnsPerHost: concurrency}
	t.Cleanup(transport.CloseIdleConnections)
	return &webhookRunner{
		t: t, url: "http://127.0.0.1:" + port + "/hooks/true", clients: concurrency,
		client: &http.Client{Transport: transport}, pids: []int{cmd.Process.Pid},
	}
}

func (r *webhookRunner) processes() []int { return r.pids }

func (r *webhookRunner) post() error {
	resp, err := r.client.Post(r.url, "application/json", strings.NewReader(benchData))
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	return nil
}

func (r *webhookRunner) burst(n int) benchBurst {
	before, began := usedBy(r.t, r.pids), time.Now()
	var next, failed atomic.Int64
	var wg sync.WaitGroup
	for range r.clients {
		wg.Add(1)
		go func() { // ends when n are done
			defer wg.Done()
			for next.Add(1) <= int64(n) {
				if err := r.post(); err != nil {
					failed.Add(1)
				}
			}
		}()
	}
	wg.Wait()
	return benchBurst{time.Since(began), usedBy(r.t, r.pids).since(before), int(failed.Load())}
}

func (r *webhookRunner) once(string) benchLatency {
	began := time.Now()
	if err := r.post(); err != nil {
		r.t.Fatal(err)
	}
	return benchLatency{ended: time.Since(began)}
}

// A celeryRunner is Celery on Redis with as many processes as there are slots.
type celeryRunner struct {
	t           *testing.T
	client      *redis.Client
	concurrency int
	gate, done  *os.File
	patterns    map[string]string // a message of each task
	sent        int
	pids        []int
}

const celeryPrefetch = 64 // for each process, in celery_tasks.py

func (b *bench) startCelery(t *testing.T, concurrency int) benchRunner {
	server := newRedisServer(t, "--appendonly", "no")
	r := &celeryRunner{t: t, client: server.client, concurrency: concurrency, patterns: map[string]string{}}
	dir := t.TempDir()
	pipe := func(name string) *os.File {
		path := filepath.Join(dir, name)
		if err := syscall.Mkfifo(path, 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	r.gate, r.done = pipe("gate"), pipe("done")
	celery := func(args ...string) *exec.Cmd {
		cmd := exec.Command("/usr/bin/python3", args...)
		cmd.Dir = "testdata/bench"
		cmd.Env = append(os.Environ(), "BENCH_BROKER=redis://"+server.addr()+"/0", "BENCH_GATE="+r.gate.Name(),
			"BENCH_DONE="+r.done.Name(), "BENCH_DATA="+benchData, "PYTHONDONTWRITEBYTECODE=1", "C_FORCE_ROOT=1")
		return cmd
	}
	if out, err := celery("celery_tasks.py").CombinedOutput(); err != nil {
		t.Fatalf("celery: %v\n%s", err, out)
	}
	for _, task := range []string{"hold", "run"} {
		message, err := r.client.LPop(t.Context(), "pattern-"+task).Result()
		if err != nil {
			t.Fatal(err)
		}
		// The program ran as __main__, the worker imports the file.
		r.patterns[task] = strings.ReplaceAll(message, "__main__."+task, "celery_tasks."+task)
	}
	cmd := celery("-m", "celery", "-A", "celery_tasks", "worker", "--concurrency", fmt.Sprint(concurrency), "--loglevel", "WARNING",
		"--without-gossip", "--without-mingle", "--without-heartbeat", "-O", "fair")
	log := startPeer(t, cmd)
	ready := time.Now()
	if lost := r.burst(concurrency).lost; lost > 0 {
		t.Fatalf("celery does nothing after %v:\n%s", time.Since(ready), log)
	}
	r.pids = append(r.pids, cmd.Process.Pid)
	eachProcess(func(p procStat) {
		if p.parent == cmd.Process.Pid {
			r.pids = append(r.pids, p.pid)
		}
	})
	return r
}

func (r *celeryRunner) processes() []int { return r.pids }

// send pushes n messages of a task, as Celery's own client would, but quicker.
func (r *celeryRunner) send(task string, n int) {
	r.t.Helper()
	var message struct {
		Properties struct {
			Tag string `json:"delivery_tag"`
		} `json:"properties"`
	}
	if err := json.Unmarshal([]byte(r.patterns[task]), &message); err != nil || message.Properties.Tag == "" {
		r.t.Fatalf("celery's message %s has no tag: %v", r.patterns[task], err)
	}
	all := make([]any, n)
	for i := range all {
		r.sent++
		all[i] = strings.ReplaceAll(r.patterns[task], message.Properties.Tag, fmt.Sprintf("bench-%d", r.sent))
	}
	if err := r.client.LPush(context.Background(), "celery", all...).Err(); err != nil {
		r.t.Fatal(err)
	}
}

func (r *celeryRunner) burst(n int) benchBurst {
	r.send("hold", r.concurrency)
	r.send("run", n)
	waitFor(r.t, benchPatience, func() string { // until it has prefetched what it will
		waiting := r.client.LLen(context.Background(), "celery").Val()
		return unless(waiting <= int64(max(0, n-(celeryPrefetch-1)*r.concurrency)), fmt.Sprintf("%d tasks wait at Redis", waiting))
	})
	before, began := usedBy(r.t, r.pids), time.Now()
	if _, err := r.gate.Write(make([]byte, r.concurrency)); err != nil {
		r.t.Fatal(err)
	}
	left := n - r.await(n)
	return benchBurst{time.Since(began), usedBy(r.t, r.pids).since(before), left}
}

// await reads what n tasks say at their end.
func (r *celeryRunner) await(n int) (ended int) {
	buffer := make([]byte, 4096)
	for ended < n {
		r.done.SetReadDeadline(time.Now().Add(benchPatience))
		said, err := r.done.Read(buffer)
		if err != nil {
			return ended
		}
		ended += said
	}
	return ended
}

func (r *celeryRunner) once(string) benchLatency {
	began := time.Now()
	r.send("run", 1)
	if r.await(1) == 0 {
		r.t.Fatal("celery does nothing")
	}
	return benchLatency{ended: time.Since(began)}
}
