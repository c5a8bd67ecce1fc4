//go:build linux

package main

// bench_events_test.go measures what readers of /events cost the tasks.

import (
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

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
					io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{conn}, make([]byte, 64<<10))
				}()
			}
			watched = append(watched, run())
			ratios = append(ratios, watched[len(watched)-1]/alone[len(alone)-1])
			for _, conn := range conns {
				conn.Close()
			}
			wg.Wait()
		}
		b.ReportMetric(median(alone), "alone/s")
		b.ReportMetric(median(watched), "watched/s")
		b.ReportMetric(median(ratios), "ratio")
	}
}
