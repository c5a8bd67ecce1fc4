package main

// httpapi_follow_test.go is about answers that go on: logs and events that are read while they happen.

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
)

func TestAPIFollowsALog(t *testing.T) {
	a := startAPI(t, "127.0.0.1:0", apiConfig{projectID: "local"})
	response, err := http.Get(a.base + "/job/waiting/log?follow=true")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	lines := bufio.NewReader(response.Body)
	startTask(a.records, "waiting", 1)
	for i := range 3 {
		printTask(a.records, "waiting", fmt.Sprintln("line", i))
		if line, err := lines.ReadString('\n'); line != fmt.Sprintln("line", i) {
			t.Fatalf("read %q, %v", line, err)
		}
	}
	finishTask(a.records, "waiting", statusFinish)
	if rest, err := io.ReadAll(lines); len(rest) != 0 || err != nil {
		t.Errorf("at the end: %q, %v", rest, err)
	}

	startTask(a.records, "waiting", 2)
	cut, err := http.Get(a.base + "/job/waiting/log?follow=true")
	if err != nil {
		t.Fatal(err)
	}
	defer cut.Body.Close()
	if err := a.api.shutdown(t.Context()); err != nil {
		t.Errorf("shutdown with a follower: %v", err)
	}
	if _, err := io.ReadAll(cut.Body); err == nil {
		t.Error("a log that was cut off looks complete")
	}
}

// readEvent reads one server-sent event, skipping comments.
func readEvent(t *testing.T, lines *bufio.Reader) map[string]string {
	t.Helper()
	fields := map[string]string{}
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			t.Fatalf("read event: %v", err)
		}
		if line == "\n" && len(fields) > 0 {
			return fields
		}
		if name, value, ok := strings.Cut(strings.TrimSuffix(line, "\n"), ": "); ok {
			fields[name] = value
		}
	}
}

func TestAPIEvents(t *testing.T) {
	a := startAPI(t, "127.0.0.1:0", apiConfig{projectID: "local"})
	a.bus.publish(taskQueued{TaskID: "before"})
	response, err := http.Get(a.base + "/events")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if got := response.Header.Get("Content-Type"); got != "text/event-stream" {
		t.Errorf("Content-Type = %q", got)
	}
	lines := bufio.NewReader(response.Body)
	a.bus.publish(taskOutput{TaskID: "t", Stream: streamStderr, Data: []byte("two\nlines")})
	a.bus.publish(taskFinished{TaskID: "t", Status: statusFinish, CPU: 3 * time.Millisecond})
	a.bus.publish(brokerChanged{Type: "local", Connected: true})
	for i, want := range []struct{ name, data string }{
		{"task_output", `{"task_id":"t","stream":"stderr","data":"two\nlines"}`},
		{"task_finished", `"cpu_ms":3`},
		{"broker_changed", `"connected":true`},
	} {
		got := readEvent(t, lines)
		if got["event"] != want.name || !strings.Contains(got["data"], want.data) || got["id"] != fmt.Sprint(i+2) {
			t.Errorf("event %d = %q; want %s with %s", i+2, got, want.name, want.data)
		}
	}
}

// TestAPIEventsTail reads the same output in both sizes. The cut falls into the middle of a character.
func TestAPIEventsTail(t *testing.T) {
	a := startAPI(t, "127.0.0.1:0", apiConfig{projectID: "local"})
	read := func(query string) *bufio.Reader {
		response, err := http.Get(a.base + "/events" + query)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { response.Body.Close() })
		return bufio.NewReader(response.Body)
	}
	all, tail := read("?output=all"), read("?output=tail")
	long := strings.Repeat("x", 5000) + "é" + strings.Repeat("y", eventTailBytes-1)
	a.bus.publish(taskOutput{TaskID: "t", Data: []byte(long)})
	a.bus.publish(taskOutput{TaskID: "t", Data: []byte("short")})
	for _, want := range []struct {
		reader *bufio.Reader
		texts  []string
	}{{all, []string{long, "short"}}, {tail, []string{long[len(long)-eventTailBytes+1:], "short"}}} {
		for i, text := range want.texts {
			got := readEvent(t, want.reader)
			if got["id"] != fmt.Sprint(i+1) || !strings.Contains(got["data"], `"`+text+`"`) {
				t.Errorf("event %s is %d bytes; want %d of text", got["id"], len(got["data"]), len(text))
			}
		}
	}
}

func TestAPISlowEventReaderIsDropped(t *testing.T) {
	a := startAPI(t, "127.0.0.1:0", apiConfig{projectID: "local"})
	slow, err := http.Get(a.base + "/events") // never read
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Body.Close()
	fast, err := http.Get(a.base + "/events")
	if err != nil {
		t.Fatal(err)
	}
	defer fast.Body.Close()
	lines := bufio.NewReaderSize(fast.Body, 1<<20)
	output := taskOutput{TaskID: "t", Stream: streamStdout, Data: bytes.Repeat([]byte("x"), outputChunkBytes)}
	readers := func() int {
		a.api.feed.mu.Lock()
		defer a.api.feed.mu.Unlock()
		return len(a.api.feed.readers)
	}
	const atOnce = 40 // far below what a reader may be behind
	for sent := 0; readers() == 2; sent++ {
		if sent > 5000/atOnce {
			t.Fatal("a reader that reads nothing is still served")
		}
		for range atOnce {
			a.bus.publish(output)
		}
		for range atOnce {
			readEvent(t, lines)
		}
	}
	a.bus.publish(taskQueued{TaskID: "after"})
	if got := readEvent(t, lines); got["event"] != "task_queued" || readers() != 1 {
		t.Errorf("the other reader got %.100q", got)
	}
}

func TestAPIReadersAreBounded(t *testing.T) {
	a := startAPI(t, "127.0.0.1:0", apiConfig{projectID: "local"})
	startTask(a.records, "t", 1)
	for path, limit := range map[string]int{"/events": maxEventReaders, "/job/t/log?follow=true": maxFollowers} {
		var open []io.Closer
		for range limit {
			response, err := http.Get(a.base + path)
			if err != nil || response.StatusCode != 200 {
				t.Fatalf("GET %s: %v", path, err)
			}
			open = append(open, response.Body)
		}
		a.refused("GET", path, "", nil, 503, codeHTTPReaders)
		for _, body := range open {
			body.Close()
		}
		waitFor(t, 5*time.Second, func() string {
			a.api.feed.mu.Lock()
			defer a.api.feed.mu.Unlock()
			if n := len(a.api.feed.readers) + a.api.feed.followers; n > 0 {
				return fmt.Sprintf("%d readers of %s are still there", n, path)
			}
			return ""
		})
	}
}
