//go:build unix

package main

// exec_output_test.go is about what a command reads and prints: whole, soon, and in whole characters.

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"
)

func TestRunStdin(t *testing.T) {
	path := filepath.Join(t.TempDir(), "in")
	if err := os.WriteFile(path, []byte("from a file"), 0o600); err != nil {
		t.Fatal(err)
	}
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for _, row := range []struct {
		stdin io.Reader
		want  string
	}{{nil, ""}, {strings.NewReader("from memory"), "from memory"}, {file, "from a file"}} {
		var out collected
		c := roleCommand(t, "copy-stdin")
		c.stdin, c.output = row.stdin, out.take
		if status := mustRun(t, context.Background(), c); status.code != 0 || out.text() != row.want {
			t.Errorf("stdin copied: %q, code %d; want %q", out.text(), status.code, row.want)
		}
	}
	unread := roleCommand(t, "exit", "0")
	unread.stdin = bytes.NewReader(make([]byte, 10<<20))
	mustRun(t, context.Background(), unread)
}

// Every byte arrives, in order, while memory stays flat.
func TestRunOutputWhole(t *testing.T) {
	total := 200 << 20
	if testing.Short() {
		total = 20 << 20
	}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)

	var next uint64 // the number expected next
	var partial []byte
	var received, longest int
	c := roleCommand(t, "print-bytes", strconv.Itoa(total))
	c.output = func(_ outputStream, data []byte) {
		received += len(data)
		longest = max(longest, len(data))
		for len(data) > 0 {
			if len(partial) > 0 || len(data) < 8 {
				n := min(8-len(partial), len(data))
				partial = append(partial, data[:n]...)
				data = data[n:]
				if len(partial) < 8 {
					continue
				}
			}
			number := partial
			if len(number) == 0 {
				number, data = data[:8], data[8:]
			}
			if got := binary.BigEndian.Uint64(number); got != next {
				t.Errorf("number %d arrived where %d was due", got, next)
				next = got
			}
			next++
			partial = partial[:0]
		}
	}
	status := mustRun(t, context.Background(), c)
	runtime.ReadMemStats(&after)
	if status.code != 0 || received != total || next != uint64(total/8) {
		t.Errorf("code %d, %d bytes, next number %d; want 0, %d, %d", status.code, received, next, total, total/8)
	}
	if longest > outputChunkBytes {
		t.Errorf("a call of %d bytes; want at most %d", longest, outputChunkBytes)
	}
	if allocated := after.TotalAlloc - before.TotalAlloc; allocated > 2<<20 {
		t.Errorf("%d bytes were allocated for the output; want a buffer per stream", allocated)
	}
}

func TestRunOutputInFewCalls(t *testing.T) {
	var out collected
	c := roleCommand(t, "chatter", "500")
	c.output = out.take
	begin := time.Now()
	mustRun(t, context.Background(), c)
	if most := int(time.Since(begin)/outputGather) + 2; out.calls > most || out.calls < 5 {
		t.Errorf("500 lines in %v made %d calls; want 5 to %d", time.Since(begin), out.calls, most)
	}
	if lines := strings.Count(out.text(), "\n"); lines != 500 {
		t.Errorf("%d lines; want 500", lines)
	}
}

func TestRunOutputSoon(t *testing.T) {
	var out collected
	arrived := make(chan time.Time, 1)
	var first time.Time
	c := &command{line: "date +%s%N; exec sleep 100", killAfter: time.Second}
	c.output = func(stream outputStream, data []byte) {
		out.take(stream, data)
		select {
		case arrived <- time.Now():
		default:
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() { // ends at the first output, or with the test
		select {
		case first = <-arrived:
			cancel()
		case <-ctx.Done():
		}
	}()
	mustRun(t, ctx, c)
	nanos, err := strconv.ParseInt(strings.TrimSpace(out.text()), 10, 64)
	if err != nil {
		t.Skip("date has no %N here")
	}
	if delay := first.Sub(time.Unix(0, nanos)); delay > time.Second { // 200 ms, on a machine that has time
		t.Errorf("a lone line of a command that goes on took %v", delay)
	}
}

func TestRunKeepsCharactersWhole(t *testing.T) {
	var out collected
	c := roleCommand(t, "split-utf8", "aé€😀z")
	c.output = out.take
	mustRun(t, context.Background(), c)
	if out.text() != "aé€😀z" || out.cut || out.calls < 4 {
		t.Errorf("got %q in %d calls, cut: %v", out.text(), out.calls, out.cut)
	}

	var raw collected // what is not UTF-8 passes unchanged, an incomplete end too
	mustRun(t, context.Background(), &command{line: `printf '\377\376ok\351\360\237\230'`, output: raw.take})
	if raw.text() != "\xff\xfeok\xe9\xf0\x9f\x98" {
		t.Errorf("got %q", raw.text())
	}
}

func TestCutCharacter(t *testing.T) {
	for text, want := range map[string]int{
		"": 0, "a": 0, "é": 0, "a\xc3": 1, "\xe2\x82": 2, "x\xf0\x9f\x98": 3, "😀": 0, "\xff": 0, "\x80\x80\x80": 0,
		"\xe2\x28": 0, "é\xe2": 1, "\xf0": 1, "\xf8\x88": 0,
	} {
		if got := cutCharacter([]byte(text)); got != want {
			t.Errorf("cutCharacter(%q) = %d; want %d", text, got, want)
		}
	}
}

// A process that has left the group lives on, and neither its silence nor its noise holds run up.
func TestRunLeakedStdout(t *testing.T) {
	for _, role := range []string{"ready-then-hang", "spew"} {
		var out collected
		c := roleCommand(t, "leak-stdout", role)
		c.output = func(stream outputStream, data []byte) {
			if out.text() == "" {
				out.take(stream, data)
			}
		}
		begin := time.Now()
		mustRun(t, context.Background(), c)
		took := time.Since(begin)
		pid := out.waitForPID(t)
		if !alive(pid) && role != "spew" { // that one dies of SIGPIPE
			t.Errorf("%s was ended", role)
		}
		endProcess(t, pid)
		assertGone(t, pid)
		if took > 5*time.Second {
			t.Errorf("%s held run for %v", role, took)
		}
	}
}

// What was in the pipe when the group ended is handed over, however slow the callback and whoever holds the pipe.
func TestRunLosesNothingAtTheEnd(t *testing.T) {
	var received int
	c := &command{output: func(_ outputStream, data []byte) {
		time.Sleep(600 * time.Millisecond) // this is the slow callback
		received += len(data)
	}}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c.line = fmt.Sprintf("'%s' test-role leak-stdout ready-then-hang; head -c 150000 /dev/zero", self)
	var pid int
	output := c.output
	c.output = func(stream outputStream, data []byte) {
		if pid == 0 {
			line, _, _ := strings.Cut(string(data), "\n")
			pid, _ = strconv.Atoi(line)
			received -= len(line) + 1
		}
		output(stream, data)
	}
	mustRun(t, context.Background(), c)
	endProcess(t, pid)
	if received != 150000 {
		t.Errorf("%d bytes arrived; want 150000", received)
	}
}
