package main

// records_log_test.go is about the logs of what tasks print: what is kept of them, and who reads along.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

func logOf(t *testing.T, r *records, id string) string {
	t.Helper()
	log, err := r.openLog(id)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	text, err := io.ReadAll(log)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestLogKeepsFirstAndLastHalf(t *testing.T) {
	for _, c := range []struct{ limit, total int64 }{
		{100, 0}, {100, 1}, {100, 100}, {100, 101}, {101, 5000}, {0, 10}, {1, 3}, {10_000, 9_999}, {10_000, 10_000},
		{10_000, 10_001}, {10_000, 300_000}, {100_000, 140_000}, {100_000, 1_234_567},
	} {
		for _, chunk := range []int64{1777, outputChunkBytes} {
			r := openTestRecords(t, t.TempDir(), Retain{Tasks: 9, Age: time.Hour, Log: c.limit})
			var all bytes.Buffer
			for i := 0; int64(all.Len()) < c.total; i++ {
				fmt.Fprintf(&all, "%d.", i)
			}
			all.Truncate(int(c.total))
			startTask(r, "t", 1)
			for rest := all.Bytes(); len(rest) > 0; {
				n := min(chunk, int64(len(rest)))
				printTask(r, "t", string(rest[:n]))
				rest = rest[n:]
			}
			want := all.String()
			if c.total > c.limit {
				head, tail := c.limit/2, c.limit-c.limit/2
				want = want[:head] + missing(c.total-c.limit) + want[c.total-tail:]
			}
			for _, state := range []string{"running", "finished"} {
				if got := logOf(t, r, "t"); got != want {
					t.Errorf("limit %d, total %d, %s: log has %d bytes; want %d", c.limit, c.total, state, len(got), len(want))
				}
				finishTask(r, "t", statusFinish)
			}
			if rec := mustGet(t, r, "t"); rec.OutputBytes != c.total {
				t.Errorf("output_bytes = %d; want %d", rec.OutputBytes, c.total)
			}
			room := c.limit + 2*max(minSegmentBytes, c.limit/16)
			if used := diskBytes(t, r.folder("t")); used > room {
				t.Errorf("limit %d, total %d: %d bytes on disk; want at most %d", c.limit, c.total, used, room)
			}
			r.close()
		}
	}
}

func TestLogCutsNoCharacter(t *testing.T) {
	for limit := int64(20); limit < 28; limit++ {
		r := openTestRecords(t, t.TempDir(), Retain{Tasks: 9, Age: time.Hour, Log: limit})
		startTask(r, "t", 1)
		text := strings.Repeat("€", 9000)
		printTask(r, "t", text)
		head, rest, _ := strings.Cut(logOf(t, r, "t"), "\n[")
		_, tail, _ := strings.Cut(rest, "]\n")
		var gone int
		fmt.Sscanf(rest, "… %d", &gone)
		if head == "" || strings.Trim(head, "€") != "" || tail == "" || strings.Trim(tail, "€") != "" ||
			len(head)+gone+len(tail) != len(text) {
			t.Errorf("limit %d: %q, %d missing, %q", limit, head, gone, tail)
		}
		r.close()
	}
}

func TestLogMarksAttempts(t *testing.T) {
	r := openTestRecords(t, t.TempDir(), testRetain)
	startTask(r, "t", 1)
	printTask(r, "t", "no newline")
	r.handle(taskRetrying{TaskID: "t", Attempt: 1, Reason: "exit code 1\nand more"})
	startTask(r, "t", 2)
	printTask(r, "t", "second\n")
	finishTask(r, "t", statusFinish)
	want := "no newline\n--- attempt 1 failed (exit code 1 and more); attempt 2 follows ---\nsecond\n"
	if got := logOf(t, r, "t"); got != want {
		t.Errorf("log = %q; want %q", got, want)
	}
	if rec := mustGet(t, r, "t"); rec.OutputBytes != int64(len("no newline"+"second\n")) {
		t.Errorf("output_bytes = %d", rec.OutputBytes)
	}
}

func TestLogsBeyondTheOpenFiles(t *testing.T) {
	r := openTestRecords(t, t.TempDir(), testRetain)
	for round := range 3 {
		for i := range openLogFiles + 20 {
			id := fmt.Sprint("t", i)
			if round == 0 {
				startTask(r, id, 1)
			}
			printTask(r, id, fmt.Sprintln(id, round))
		}
	}
	if n := len(r.logSlots); n != openLogFiles {
		t.Errorf("%d log files open; want %d", n, openLogFiles)
	}
	for i := range openLogFiles + 20 {
		id := fmt.Sprint("t", i)
		finishTask(r, id, statusFinish)
		if got, want := logOf(t, r, id), fmt.Sprintf("%[1]s 0\n%[1]s 1\n%[1]s 2\n", id); got != want {
			t.Errorf("log of %s = %q; want %q", id, got, want)
		}
	}
	if n := len(r.logSlots); n != 0 {
		t.Errorf("%d log files open after all tasks have ended", n)
	}
}

func TestHugeOutputIsBounded(t *testing.T) {
	r := openTestRecords(t, t.TempDir(), Retain{Tasks: 9, Age: time.Hour, Log: 4 << 20})
	startTask(r, "t", 1)
	chunk := bytes.Repeat([]byte("0123456789abcde\n"), outputChunkBytes/16)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	var mostDisk int64
	const total = 200 << 20
	for sent := 0; sent < total; sent += len(chunk) {
		r.handle(taskOutput{TaskID: "t", Stream: streamStdout, Data: chunk})
		if sent%(1<<20) == 0 {
			mostDisk = max(mostDisk, diskBytes(t, r.folder("t")))
		}
	}
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 8<<20 {
		t.Errorf("the heap grew by %d bytes", grown)
	}
	if mostDisk > 5<<20 {
		t.Errorf("%d bytes on disk; want about 4 MiB", mostDisk)
	}
	finishTask(r, "t", statusFinish)
	if rec := mustGet(t, r, "t"); rec.OutputBytes != total {
		t.Errorf("output_bytes = %d; want %d", rec.OutputBytes, total)
	}
	if got, want := len(logOf(t, r, "t")), 4<<20+len(missing(total-4<<20)); got != want {
		t.Errorf("log has %d bytes; want %d", got, want)
	}
}

// A followerBuffer is a reader of a log that waits before its first bytes until it may go on.
type followerBuffer struct {
	mu   sync.Mutex
	text bytes.Buffer
	wait chan struct{}
}

func (b *followerBuffer) Write(p []byte) (int, error) {
	<-b.wait
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *followerBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

func TestFollowLog(t *testing.T) {
	r := openTestRecords(t, t.TempDir(), Retain{Tasks: 9, Age: time.Hour, Log: 10_000})
	fast, slow := &followerBuffer{wait: make(chan struct{})}, &followerBuffer{wait: make(chan struct{})}
	close(fast.wait)
	errs := make(chan error, 2)
	for _, b := range []*followerBuffer{fast, slow} {
		go func() { errs <- r.followLog(t.Context(), "t", b, func() {}) }()
	}
	waitFor(t, 5*time.Second, func() string { // both wait for a task that is not known
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.appeared == nil {
			return "nobody waits"
		}
		return ""
	})
	startTask(r, "t", 1)
	printTask(r, "t", "hello\n")
	waitFor(t, 5*time.Second, func() string {
		if fast.String() != "hello\n" {
			return fmt.Sprintf("followed %q", fast.String())
		}
		return ""
	})
	for range 50 { // the slow one does not hold the task up
		printTask(r, "t", strings.Repeat("m", 1000))
	}
	printTask(r, "t", "end\n")
	finishTask(r, "t", statusFinish)
	close(slow.wait)
	for range 2 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	for name, got := range map[string]string{"fast": fast.String(), "slow": slow.String()} {
		if !strings.HasPrefix(got, "hello\n") || !strings.HasSuffix(got, "mend\n") {
			t.Errorf("%s: %d bytes, from %.20q", name, len(got), got)
		}
	}
	if got := slow.String(); !strings.Contains(got, "bytes of output are not kept") || len(got) > 25_000 {
		t.Errorf("slow: %d bytes without a mark", len(got))
	}
	var again bytes.Buffer
	if err := r.followLog(t.Context(), "t", &again, func() {}); err != nil || again.String() != logOf(t, r, "t") {
		t.Errorf("follow of a finished task: %d bytes, %v", again.Len(), err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	startTask(r, "endless", 1)
	for _, id := range []string{"endless", "unknown"} {
		if err := r.followLog(ctx, id, io.Discard, func() {}); !errors.Is(err, context.Canceled) {
			t.Errorf("followLog(%s) = %v; want the context's end", id, err)
		}
	}
	printTask(r, "endless", "more\n") // so that nobody counts as waiting any more
	done := make(chan error, 1)
	go func() { done <- r.followLog(t.Context(), "endless", io.Discard, func() {}) }()
	waitFor(t, 5*time.Second, func() string {
		live := r.lookLive("endless")
		live.mu.Lock()
		defer live.mu.Unlock()
		if live.changed == nil {
			return "nobody follows"
		}
		return ""
	})
	r.release("endless")
	if _, ok := r.get("endless"); ok {
		t.Error("a task that was given back has a record")
	}
	if err := <-done; !errors.Is(err, errReleased) {
		t.Errorf("followLog of a task that was given back = %v; want %v", err, errReleased)
	}
}
