package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
)

// dryRunOf checks a configuration with that text, after change, and gives the lines and the verdict.
func dryRunOf(t *testing.T, text string, change func(*Config)) (lines string, passed bool) {
	t.Helper()
	c := mustLoad(t, "listen: 127.0.0.1:0\n"+text)
	if change != nil {
		change(c)
	}
	before := listing(t, c.Dir)
	var out strings.Builder
	passed = dryRun(context.Background(), c, &out)
	if after := listing(t, c.Dir); after != before {
		t.Errorf("the dry run changed the folder from %s to %s", before, after)
	}
	return strings.ReplaceAll(out.String(), c.Dir, "DIR"), passed
}

func listing(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(entries)
}

func TestDryRunShippedConfig(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("the samples are for a POSIX shell")
	}
	text, err := os.ReadFile("config.yaml")
	if err != nil {
		t.Fatal(err)
	}
	// The samples that use job_item expect it beside the file; what is checked is each first word.
	lines, passed := dryRunOf(t, string(text), nil)
	if !passed || strings.Contains(lines, "warn") || !strings.HasPrefix(lines, "ok   configuration DIR"+string(filepath.Separator)+"config.yaml: 6 jobs, 0 execs\n") {
		t.Errorf("dryRun of config.yaml: passed %v\n%s", passed, lines)
	}
}

func TestDryRunFailures(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("the programs are those of Unix")
	}
	for _, row := range []struct {
		text   string
		change func(*Config)
		want   string
		passed bool
	}{
		{"jobs: [{event: a, cmd: ls}]", nil, "ok   job a: ls is /", true},
		{"jobs: [{event: a, cmd: exit 3}]", nil, "ok   job a: what it runs is told by the shell", true},
		{"jobs: [{event: a, cmd: \"{{x}} y\"}]", nil, "ok   job a: what it runs is told by the shell or the data\n", true},
		{"jobs: [{event: a, cmd: no-such-program x}]", nil, `FAIL job a: program "no-such-program": `, false},
		{"jobs: [{event: a, cmd: ./nothing-here}]", nil, `FAIL job a: program "./nothing-here": `, false},
		{"execs: [{key: e, cmd: no-such-program x}]", nil, `FAIL exec e: program "no-such-program": `, false},
		{"execs: [{key: e, cmd: \"ls {{\"}]", nil, "ok   exec e: what it runs is told by the shell or the data\n", true},
		{"jobs: [{event: a, cmd: ls, working_dir: gone}]", nil, "FAIL job a: folder DIR/gone: no such file or directory (create it, or set working_dir)\n", false},
		{"jobs: [{event: a, cmd: ls, working_dir: config.yaml}]", nil, "FAIL job a: DIR/config.yaml is not a folder (set working_dir to a folder)\n", false},
		{"execs: [{key: e, cmd: ls, working_dir: gone}]", nil, "FAIL exec e: folder DIR/gone: no such file or directory (create it, or set working_dir)\n", false},
		{"jobs: []", nil, "ok   data_dir DIR/data can be created\n", true},
		{"data_dir: .", nil, "ok   data_dir DIR is writable\n", true},
		{"data_dir: config.yaml/x", nil, "FAIL data_dir DIR/config.yaml/x: ", false},
		{"data_dir: config.yaml", nil, "FAIL data_dir DIR/config.yaml: DIR/config.yaml is not a folder (set data_dir to a folder)\n", false},
		{"retain: {}", nil, "warn DIR/config.yaml:1: neither jobs nor execs: there is nothing to do\n", true},
		{"jobs: []", func(c *Config) { c.Credential.SecretKeyFile = "/k" }, "ok   secret key read from /k\n", true},
		{"jobs: []", nil, "ok   listen 127.0.0.1:0 is free\n", true},
	} {
		lines, passed := dryRunOf(t, row.text, row.change)
		if passed != row.passed || !strings.Contains(lines, row.want) {
			t.Errorf("dryRun of %s: passed %v\n%s\nwant %v and %q", row.text, passed, lines, row.passed, row.want)
		}
		if strings.Contains(lines, "FAIL") == passed {
			t.Errorf("dryRun of %s says %v\n%s", row.text, passed, lines)
		}
	}
}

func TestDryRunUnwritableFolders(t *testing.T) {
	if os.Geteuid() <= 0 {
		t.Skip("root writes everywhere, and Windows has no such folders")
	}
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o500); err != nil {
		t.Fatal(err)
	}
	lines, passed := dryRunOf(t, "jobs: [{event: a, cmd: ls, working_dir: "+dir+"}]\ndata_dir: "+dir+"/data", nil)
	for _, want := range []string{"FAIL job a: write into " + dir + ": permission denied", "FAIL data_dir " + dir + "/data: write into "} {
		if passed || !strings.Contains(lines, want) {
			t.Errorf("dryRun: passed %v\n%s\nwant %q", passed, lines, want)
		}
	}
}

func TestDryRunPort(t *testing.T) {
	answer := ""
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/health" {
			t.Errorf("dryRun asks for %s; want /health", r.URL.Path)
		}
		w.WriteHeader(http.StatusServiceUnavailable)
		fmt.Fprint(w, answer)
	}))
	defer server.Close()
	mute, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var accepting sync.WaitGroup
	defer accepting.Wait()
	defer mute.Close()
	accepting.Add(1)
	go func() { // ends when mute is closed
		defer accepting.Done()
		for {
			conn, err := mute.Accept()
			if err != nil {
				return
			}
			_ = conn.Close()
		}
	}()

	for _, row := range []struct {
		addr, answer string
		want         string
		passed       bool
	}{
		{server.Listener.Addr().String(), `{"status":"starting","identity_id":"me"}`, " is held by this worker\n", true},
		{server.Listener.Addr().String(), `{"identity_id":"other"}`, ` is held by another worker, "other" (`, false},
		{server.Listener.Addr().String(), `{}`, "address already in use (stop the program that has it, or set listen)\n", false},
		{server.Listener.Addr().String(), `<html>`, "address already in use (", false},
		{mute.Addr().String(), "", "address already in use (", false},
	} {
		if runtime.GOOS == "windows" {
			row.want = strings.TrimPrefix(row.want, "address already in use")
		}
		answer = row.answer
		lines, passed := dryRunOf(t, "identity_id: me", func(c *Config) { c.Listen = row.addr })
		if passed != row.passed || !strings.Contains(lines, "listen "+row.addr) || !strings.Contains(lines, row.want) {
			t.Errorf("dryRun with %s at the port: passed %v\n%s\nwant %v and %q", row.answer, passed, lines, row.passed, row.want)
		}
	}
}
