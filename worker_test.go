package main

// worker_test.go holds what the tests share: the test binary is the program under test (JOB_ITEM_TEST_MAIN=1) and
// plays the jobs ("test-role NAME"), so every process in a test is a real one.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"testing"
	"time"
)

// testRoles are the programs that jobs run in tests, by name. Tests add to it in init functions.
var testRoles = map[string]func(args []string) int{}

func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "test-role" {
		role, ok := testRoles[os.Args[2]]
		if !ok {
			fmt.Fprintf(os.Stderr, "no test role %q\n", os.Args[2])
			os.Exit(99)
		}
		os.Exit(role(os.Args[3:]))
	}
	if os.Getenv("JOB_ITEM_TEST_MAIN") == "1" {
		actBuild()
		os.Exit(run(context.Background(), os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
	}
	// Under nohup or in the background these are ignored, and every process of the tests would inherit that.
	for _, sig := range []os.Signal{syscall.SIGINT, syscall.SIGHUP} {
		if signal.Ignored(sig) {
			signal.Notify(make(chan os.Signal, 1), sig)
		}
	}
	// The race detector would hold up each process that ends by a second.
	os.Setenv("GORACE", strings.TrimSpace(os.Getenv("GORACE")+" atexit_sleep_ms=0"))
	os.Exit(m.Run())
}

// cliResult is what a run of the program left behind.
type cliResult struct {
	stdout, stderr string
	code           int
}

// cliCommand is the program with these arguments, ready to be started. env entries ("NAME=value") are added to the
// test's own environment.
func cliCommand(t testing.TB, env []string, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, args...)
	cmd.Env = append(append(os.Environ(), "JOB_ITEM_TEST_MAIN=1"), env...)
	return cmd
}

// runCLI runs the program to its end.
func runCLI(t testing.TB, env []string, stdin string, args ...string) cliResult {
	t.Helper()
	cmd := cliCommand(t, env, args...)
	var out, errOut bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errOut
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("run job_item %q: %v", args, err)
	}
	return cliResult{out.String(), errOut.String(), cmd.ProcessState.ExitCode()}
}

// waitFor polls until cond returns "", and fails with its last answer after limit.
func waitFor(t testing.TB, limit time.Duration, cond func() string) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		missing := cond()
		if missing == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %v: %s", limit, missing)
		}
		time.Sleep(5 * time.Millisecond)
	}
}
