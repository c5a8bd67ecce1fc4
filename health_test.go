//go:build unix

package main

// health_test.go follows /health, and job_item status, through what happens to a worker. A full disk is in
// faults_test.go.

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"
)

// expectHealth waits for a status and for a problem that says why; "" for none.
func (a *agent) expectHealth(status, problem string, code int) {
	a.t.Helper()
	waitFor(a.t, 40*time.Second, func() string {
		var h healthView
		got := a.getJSON("/health", &h)
		problems := strings.Join(h.Problems, "; ")
		if h.Status != status || got != code || (problem == "") != (problems == "") || !strings.Contains(problems, problem) {
			return fmt.Sprintf("health is %d %s %q, want %d %s with %q\n%s", got, h.Status, problems, code, status, problem, a.log)
		}
		return ""
	})
	exit := map[bool]int{true: exitOK, false: exitFailed}[code == http.StatusOK]
	if got := runCLI(a.t, a.env, "", "status", "--url", a.url); got.code != exit || !strings.Contains(got.stdout, status) {
		a.t.Errorf("job_item status exits %d while the health is %s, want %d:\n%s%s", got.code, status, exit, got.stdout, got.stderr)
	}
}

func TestHealthFollows(t *testing.T) {
	t.Parallel() // beside others that wait
	server := startRedis(t)
	a := newAgent(t, fmt.Sprintf(`
credential: {project_id: p1}
broker_connection: %s
jobs:
  - {event: a, cmd: 'true'}
execs:
  - {key: side, cmd: 'test ! -e broken && exec sleep 1000', attempt: 0}
`, server.connection()))
	a.start()
	a.expectHealth("ok", "", http.StatusOK)

	server.stop(t)
	a.expectHealth("down", "redis", http.StatusServiceUnavailable)
	server.start(t)
	a.expectHealth("ok", "", http.StatusOK)

	a.write("broken", "")
	a.change("exec sleep 1000", "exec sleep 1001")
	a.expectHealth("degraded", `"side" has been given up`, http.StatusOK)
	a.change("test ! -e broken && ", "")
	a.expectHealth("ok", "", http.StatusOK)
}
