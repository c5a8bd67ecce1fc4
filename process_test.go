//go:build unix

package main

// process_test.go kills a worker and looks at what endStaleGroups does to the processes that are left.

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func init() {
	testRoles["run-commands"] = roleRunCommands
	testRoles["family"] = roleFamily
}

// roleRunCommands is a worker: it runs a family for each argument, a task id, and prints each leader's identity.
func roleRunCommands(taskIDs []string) int {
	self, _ := os.Executable()
	spawn := startSpawner()
	lines := make(chan string)
	for _, taskID := range taskIDs {
		c := &command{
			argv:  []string{self, "test-role", "family"},
			env:   append(os.Environ(), "JOB_ITEM_TASK_ID="+taskID, "JOB_ITEM_BASE_URL=http://127.0.0.1:1"),
			spawn: spawn,
			started: func(p processIdentity) error {
				line, err := json.Marshal(p)
				lines <- string(line) + "\n"
				return err
			},
			output: func(_ outputStream, data []byte) { lines <- string(data) },
		}
		go c.run(context.Background()) // ends with this process
	}
	for line := range lines {
		fmt.Print(line)
	}
	return 0
}

// roleFamily prints the pids of its children and waits for ever: one in its group that ignores SIGTERM, one in a
// session of its own, and one that has lost its parent.
func roleFamily([]string) int {
	self, _ := os.Executable()
	for _, child := range []struct {
		role string
		attr syscall.SysProcAttr
	}{{"ignore-term", syscall.SysProcAttr{}}, {"ready-then-hang", syscall.SysProcAttr{Setsid: true}}} {
		cmd := exec.Command(self, "test-role", child.role)
		cmd.SysProcAttr = &child.attr
		out, _ := cmd.StdoutPipe()
		if cmd.Start() != nil {
			return 1
		}
		line, _ := bufio.NewReader(out).ReadString('\n')
		fmt.Print(line)
	}
	orphan := exec.Command(self, "test-role", "leak-stdout", "ready-then-hang")
	orphan.Stdout = os.Stdout
	orphan.Run()
	return hang()
}

// startWorkerRole starts role run-commands and reads what it says of its tasks: leaders, and all other processes.
func startWorkerRole(t *testing.T, taskIDs ...string) (worker *exec.Cmd, leaders []processIdentity, others []int) {
	t.Helper()
	args := append([]string{"test-role", "run-commands"}, taskIDs...)
	worker = cliCommand(t, nil, args...)
	out, err := worker.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := worker.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		worker.Process.Kill()
		worker.Wait()
		for _, leader := range leaders {
			endProcess(t, leader.PID)
		}
		for _, pid := range others {
			endProcess(t, pid)
		}
	})
	scanner := bufio.NewScanner(out)
	for len(leaders)+len(others) < 4*len(taskIDs) && scanner.Scan() {
		var leader processIdentity
		if pid, err := strconv.Atoi(scanner.Text()); err == nil {
			others = append(others, pid)
		} else if err := json.Unmarshal(scanner.Bytes(), &leader); err == nil {
			leaders = append(leaders, leader)
		} else {
			t.Fatalf("worker said %q", scanner.Text())
		}
	}
	if len(leaders) != len(taskIDs) || len(others) != 3*len(taskIDs) {
		t.Fatalf("worker said %v, %v: %v", leaders, others, scanner.Err())
	}
	return worker, leaders, others
}

// startBystander starts a process that must live through the test.
func startBystander(t *testing.T, env ...string) (pid int) {
	t.Helper()
	cmd := cliCommand(t, env, "test-role", "ready-then-hang")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if cmd.Process.Kill() != nil {
			t.Errorf("bystander with %q was ended", env)
		}
		cmd.Wait()
	})
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	return cmd.Process.Pid
}

// assertUnharmed fails if the process is not alive.
func assertUnharmed(t *testing.T, pid int) {
	t.Helper()
	if state, there := processState(pid); !there || state == 'Z' {
		t.Errorf("process %d was ended", pid)
	}
}

// Only the very process that was recorded is ended, not another with its number or of another boot.
func TestEndStaleGroupsOfOthers(t *testing.T) {
	pid := startBystander(t)
	for name, p := range map[string]processIdentity{
		"no start":      {PID: pid, Boot: bootID()},
		"other start":   {PID: pid, Start: "1", Boot: bootID()},
		"no boot":       {PID: pid, Start: processStart(pid)},
		"other boot":    {PID: pid, Start: processStart(pid), Boot: "11111111-2222-3333-4444-555555555555"},
		"never started": {},
	} {
		if err := endStaleGroup(p, "stale-others", 0); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if !alive(pid) {
			t.Fatalf("%s: a stranger was ended", name)
		}
	}
	assertUnharmed(t, pid)
}

// With its identity alone, without any environment, the leader's group is ended.
func TestEndStaleGroupByLeader(t *testing.T) {
	if bootID() == "" {
		t.Skip("this system does not name processes")
	}
	cmd := cliCommand(t, nil, "test-role", "family")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	scanner := bufio.NewScanner(out)
	var pids []int
	for len(pids) < 3 && scanner.Scan() {
		pid, _ := strconv.Atoi(scanner.Text())
		pids = append(pids, pid)
	}
	if len(pids) < 3 {
		t.Fatalf("family said %v", pids)
	}
	defer endProcess(t, pids[1]) // this and the next left the group
	defer endProcess(t, pids[2])
	identity := identifyProcess(cmd.Process.Pid)
	waited := make(chan error, 1)
	go func() { waited <- cmd.Wait() }() // ends with the process
	if err := endStaleGroup(identity, "stale-leader-only", 200*time.Millisecond); err != nil {
		t.Error(err)
	}
	<-waited
	assertGone(t, cmd.Process.Pid, pids[0])
}

func TestStaleErrorNamesProcesses(t *testing.T) {
	pid := startBystander(t)
	err := staleError([]staleProcess{{identifyProcess(pid), true}, {processIdentity{PID: 4711}, false}})
	var coded *codedError
	if !errors.As(err, &coded) || coded.code != codeStaleGroup || coded.hint == "" {
		t.Errorf("staleError = %v; want %s with a hint", err, codeStaleGroup)
	}
	for _, want := range []string{"group " + strconv.Itoa(pid), "process 4711"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("staleError = %v; want %q in it", err, want)
		}
	}
}
