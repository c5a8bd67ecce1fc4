//go:build unix

package main

// bench_test.go measures the whole worker beside the least that anybody could do: a bare loop that starts the same
// command at the same concurrency, with its own process group, captured output and a data file. Both are measured in
// turns, in one run, since machines differ and change.

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

const benchData = `{"text":"` + "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef" + `"}`

// rawLoop runs `true` n times, so many at once.
func rawLoop(b *testing.B, dir string, n, concurrency int) time.Duration {
	b.Helper()
	path, err := exec.LookPath("true")
	if err != nil {
		b.Fatal(err)
	}
	began := time.Now()
	var next atomic.Int64
	var wg sync.WaitGroup
	for range concurrency {
		wg.Add(1)
		go func() { // ends when n are done
			defer wg.Done()
			for {
				i := next.Add(1)
				if i > int64(n) {
					return
				}
				file := filepath.Join(dir, fmt.Sprintf("raw-%d.json", i))
				if err := os.WriteFile(file, []byte(benchData), 0o600); err != nil {
					b.Error(err)
					return
				}
				var out, errOut bytes.Buffer
				cmd := exec.Command(path)
				cmd.Stdout, cmd.Stderr = &out, &errOut
				cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
				if err := cmd.Run(); err != nil {
					b.Error(err)
					return
				}
				os.Remove(file)
			}
		}()
	}
	wg.Wait()
	return time.Since(began)
}

// createAll creates n tasks by so many clients and gives how long that took.
func (a *agent) createAll(b *testing.B, event string, n, clients int) time.Duration {
	b.Helper()
	body := fmt.Sprintf(`{"event":%q,"form_body":%s}`, event, benchData)
	transport := &http.Transport{MaxIdleConnsPerHost: clients}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport}
	began := time.Now()
	var next atomic.Int64
	var wg sync.WaitGroup
	for range clients {
		wg.Add(1)
		go func() { // ends when n are done
			defer wg.Done()
			for next.Add(1) <= int64(n) {
				resp, err := client.Post(a.url+"/job/create", "application/json", strings.NewReader(body))
				if err != nil {
					b.Error(err)
					return
				}
				if resp.Body.Close(); resp.StatusCode != 200 {
					b.Errorf("create = %d", resp.StatusCode)
					return
				}
			}
		}()
	}
	wg.Wait()
	return time.Since(began)
}

func (a *agent) finished() int { return a.health().Jobs["finish"] }

// BenchmarkTrue is tasks per second through create → finished on the embedded queue, and its ratio to the raw loop.
func BenchmarkTrue(b *testing.B) {
	for _, concurrency := range []int{1, 8} {
		b.Run(fmt.Sprintf("concurrency=%d", concurrency), func(b *testing.B) {
			const tasks, rounds = 400, 5
			a := newAgent(b, fmt.Sprintf("concurrency: %d\njobs:\n  - {event: nothing, cmd: 'true'}\n", concurrency))
			a.env = []string{"LOG_LEVEL=WARN"}
			a.launch()
			waitFor(b, 10*time.Second, func() string { return strings.TrimPrefix("ok", a.health().Status) })
			dir := b.TempDir()
			for range b.N {
				var raw, ours, ratios []float64
				for range rounds {
					rawRate := tasks / rawLoop(b, dir, tasks, concurrency).Seconds()
					before := a.finished()
					began := time.Now()
					a.createAll(b, "nothing", tasks, 8)
					waitFor(b, time.Minute, func() string {
						if done := a.finished() - before; done < tasks {
							return fmt.Sprintf("%d of %d tasks finished", done, tasks)
						}
						return ""
					})
					rate := tasks / time.Since(began).Seconds()
					raw, ours, ratios = append(raw, rawRate), append(ours, rate), append(ratios, rate/rawRate)
				}
				b.ReportMetric(median(raw), "raw/s")
				b.ReportMetric(median(ours), "tasks/s")
				b.ReportMetric(median(ratios), "ratio")
			}
		})
	}
}

// BenchmarkCreate is creates per second with 64 clients, while nothing is started.
func BenchmarkCreate(b *testing.B) {
	a := newAgent(b, "take_when: {disk_free: 1000000GiB}\njobs:\n  - {event: nothing, cmd: 'true'}\n")
	a.env = []string{"LOG_LEVEL=ERROR"}
	a.start()
	waitFor(b, 10*time.Second, func() string { return strings.TrimPrefix("degraded", string(a.health().Status)) })
	b.ResetTimer()
	took := a.createAll(b, "nothing", b.N, 64)
	b.ReportMetric(float64(b.N)/took.Seconds(), "creates/s")
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[len(sorted)/2]
}

// BenchmarkBroker is the same on each broker: tasks per second, and when idle the time from the publishing of a task to
// the arrival of its _finish, beside the time of the bare command and of a message through the broker and back.
func BenchmarkBroker(b *testing.B) {
	for _, kind := range brokerKinds {
		b.Run(kind.name, func(b *testing.B) { benchmarkBroker(b, kind) })
	}
}

func benchmarkBroker(b *testing.B, kind brokerKind) {
	const tasks, rounds, idleTasks, concurrency = 400, 3, 100, 8
	server := kind.start(b)
	a := newAgent(b, fmt.Sprintf("identity_id: bench\ncredential: {project_id: p1}\nbroker_connection: %s\n"+
		"concurrency: %d\njobs:\n  - {event: nothing, cmd: 'true'}\n", kind.connection(server), concurrency))
	a.env = []string{"LOG_LEVEL=WARN"}
	a.launch()
	waitFor(b, 20*time.Second, func() string { return strings.TrimPrefix("ok", a.health().Status) })
	cfg, err := loadConfig(filepath.Join(a.dir, "config.yaml"), os.LookupEnv)
	if err != nil {
		b.Fatal(err)
	}
	manager := openForTest(b, cfg.Broker, "p1", "manager")
	publish := func(messages ...Message) {
		b.Helper()
		if _, err := manager.Publish(b.Context(), messages...); err != nil {
			b.Fatal(err)
		}
	}
	task := func(id string) Message {
		return Message{Subject: "p1.nothing", Task: true, Data: fmt.Appendf(nil, `{"task_id":%q,"data":%s}`, id, benchData)}
	}
	dir := b.TempDir()
	for n := range b.N {
		var raw, ours, ratios []float64
		for round := range rounds {
			rawRate := tasks / rawLoop(b, dir, tasks, concurrency).Seconds()
			before := a.finished()
			began := time.Now()
			for i := range tasks {
				publish(task(fmt.Sprintf("b-%d-%d-%d", n, round, i)))
			}
			waitFor(b, time.Minute, func() string {
				if done := a.finished() - before; done < tasks {
					return fmt.Sprintf("%d of %d tasks finished", done, tasks)
				}
				return ""
			})
			rate := tasks / time.Since(began).Seconds()
			raw, ours, ratios = append(raw, rawRate), append(ours, rate), append(ratios, rate/rawRate)
		}

		arrived := make(chan string, idleTasks)
		for i := range idleTasks {
			for _, subject := range []string{fmt.Sprintf("i-%d-%d_finish", n, i), fmt.Sprintf("i-%d-%d_echo", n, i)} {
				unsubscribe := manager.Subscribe(subject, func([]byte) { arrived <- subject })
				defer unsubscribe()
			}
		}
		time.Sleep(2 * time.Second) // the subscriptions take effect some time later and tell nobody
		var bare, trips, finishes []float64
		timed := func(list *[]float64, do func()) {
			began := time.Now()
			do()
			*list = append(*list, float64(time.Since(began).Microseconds())/1000)
		}
		for i := range idleTasks {
			id := fmt.Sprintf("i-%d-%d", n, i)
			timed(&bare, func() { rawLoop(b, dir, 1, 1) })
			timed(&trips, func() {
				publish(Message{Subject: id + "_echo", Data: []byte("x")})
				<-arrived
			})
			timed(&finishes, func() {
				publish(task(id))
				<-arrived
			})
		}
		b.ReportMetric(median(raw), "raw/s")
		b.ReportMetric(median(ours), "tasks/s")
		b.ReportMetric(median(ratios), "ratio")
		b.ReportMetric(median(bare), "bare-ms")
		b.ReportMetric(median(trips), "trip-ms")
		b.ReportMetric(median(finishes), "finish-ms")
	}
}

// BenchmarkEventReaders is what 200 readers of /events and one that never reads cost: tasks per second with them and
// without, in turns, and the ratio. The readers are in this process, and take their share of the same processors.
func BenchmarkEventReaders(b *testing.B) {
	const tasks, rounds, readers = 2000, 5, 200
	a := newAgent(b, "concurrency: 8\njobs:\n  - {event: nothing, cmd: 'true'}\n")
	a.env = []string{"LOG_LEVEL=WARN"}
	a.launch()
	waitFor(b, 10*time.Second, func() string { return strings.TrimPrefix("ok", a.health().Status) })
	run := func() float64 {
		before := a.finished()
		began := time.Now()
		a.createAll(b, "nothing", tasks, 8)
		waitFor(b, time.Minute, func() string {
			if done := a.finished() - before; done < tasks {
				return fmt.Sprintf("%d of %d tasks finished", done, tasks)
			}
			return ""
		})
		return tasks / time.Since(began).Seconds()
	}
	for range b.N {
		var alone, watched, ratios []float64
		for range rounds {
			alone = append(alone, run())
			var wg sync.WaitGroup
			var conns []net.Conn
			var read atomic.Int64
			for i := range readers + 1 {
				conn, err := net.Dial("tcp", strings.TrimPrefix(a.url, "http://"))
				if err != nil {
					b.Fatal(err)
				}
				conns = append(conns, conn)
				fmt.Fprintf(conn, "GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
				if i == readers {
					break // the one that never reads
				}
				wg.Add(1)
				go func() { // ends with the connection
					defer wg.Done()
					n, _ := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{conn}, make([]byte, 64<<10))
					read.Add(n)
				}()
			}
			watched = append(watched, run())
			ratios = append(ratios, watched[len(watched)-1]/alone[len(alone)-1])
			for _, conn := range conns {
				conn.Close()
			}
			wg.Wait()
			if false {
				b.Errorf("%d readers have read %d bytes in all of %d tasks", readers, read.Load(), tasks)
			}
		}
		b.ReportMetric(median(alone), "alone/s")
		b.ReportMetric(median(watched), "watched/s")
		b.ReportMetric(median(ratios), "ratio")
	}
}
