//go:build linux

package main

// soak_test.go runs very many tasks through one worker and compares what its processes hold afterwards with what they
// held after the first thousand, when the records are full.

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

const (
	soakBase = 1000 // tasks until everything that is bounded has reached its bound: retain.tasks is 1000

	// Memory may differ by what the garbage collector has not given back yet.
	soakMemoryTolerance = 6 << 20
	soakOtherTolerance  = 4 // descriptors and threads
)

// TestSoak runs SOAK_TASKS tasks. Memory means something only without the race detector:
//
//	SOAK_TASKS=50000 go test -count=1 -run 'TestSoak$' -timeout 0 -v .
func TestSoak(t *testing.T) {
	t.Parallel() // beside those that wait
	tasks := soakBase + 250
	if n, err := strconv.Atoi(os.Getenv("SOAK_TASKS")); err == nil && n > soakBase {
		tasks = n
	}
	a := newAgent(t, `
concurrency: 8
execs:
  - {key: beside, cmd: 'exec sleep 100000'}
jobs:
  - {event: quiet, cmd: 'true'}
  - {event: print, cmd: 'echo {{n}}'}
  - {event: fail, cmd: 'exit 3', retry: {times: 1, pause: 1ms}}
`)
	a.env = []string{"LOG_LEVEL=ERROR"}
	a.start()
	began := time.Now()
	done := 0
	until := func(want int) map[string]processHoldings {
		for done < want {
			const batch = 250
			for i := range batch {
				a.create([]string{"quiet", "quiet", "print", "quiet", "fail"}[i%5], fmt.Sprintf(`{"n":%d}`, done+i))
			}
			done += batch
			waitFor(t, time.Minute, func() string {
				jobs := a.health().Jobs
				if ended := jobs["finish"] + jobs["error"]; ended < done {
					return fmt.Sprintf("%d of %d tasks have ended", ended, done)
				}
				return ""
			})
		}
		return a.holdings(t)
	}
	before := until(soakBase)
	halfTasks := max(tasks/2, soakBase)
	half := until(halfTasks)
	after := until(tasks)
	t.Logf("%d tasks in %v", done, time.Since(began).Round(time.Second))
	if len(before) != 3 {
		t.Errorf("processes: %v; want parent, worker and the execs' own", before)
	}
	for name, was := range before {
		is := after[name]
		t.Logf("%s: after %d tasks %v; after %d %v; after %d %v", name, soakBase, was, halfTasks, half[name], done, is)
		if !raceEnabled && is.memory > was.memory+soakMemoryTolerance {
			t.Errorf("%s holds %d KiB more memory", name, (is.memory-was.memory)>>10)
		}
		if is.descriptors > was.descriptors+soakOtherTolerance || is.threads > was.threads+soakOtherTolerance {
			t.Errorf("%s holds more descriptors or threads", name)
		}
	}
}

// processHoldings is what a process holds.
type processHoldings struct {
	memory      int64 // proportional set size in bytes
	descriptors int
	threads     int
}

func (h processHoldings) String() string {
	return fmt.Sprintf("%.1f MiB, %d descriptors, %d threads", float64(h.memory)/(1<<20), h.descriptors, h.threads)
}

// holdings looks at the processes of an agent, by name: at the least that each holds within some seconds, since memory
// and connections that are not needed any more are let go with a delay.
func (a *agent) holdings(t testing.TB) map[string]processHoldings {
	t.Helper()
	least := map[string]processHoldings{}
	for deadline := time.Now().Add(1500 * time.Millisecond); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		for name, pid := range a.processes() {
			now, err := holdingsOf(pid)
			if err != nil {
				t.Fatal(err)
			}
			if was, ok := least[name]; ok {
				now = processHoldings{min(was.memory, now.memory), min(was.descriptors, now.descriptors), min(was.threads, now.threads)}
			}
			least[name] = now
		}
	}
	return least
}

// processes gives the agent's own processes: the parent and its children.
func (a *agent) processes() map[string]int {
	found := map[string]int{"parent": a.cmd.Process.Pid}
	eachProcess(func(p procStat) {
		if p.parent != a.cmd.Process.Pid {
			return
		}
		line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.pid))
		if words := strings.Split(string(line), "\x00"); len(words) > 1 && strings.HasPrefix(words[1], "child_") {
			found[words[1]] = p.pid
		}
	})
	return found
}

func holdingsOf(pid int) (h processHoldings, err error) {
	folder := fmt.Sprintf("/proc/%d", pid)
	sizes, err := os.ReadFile(filepath.Join(folder, "smaps_rollup"))
	if err != nil {
		return h, err
	}
	status, err := os.ReadFile(filepath.Join(folder, "status"))
	if err != nil {
		return h, err
	}
	number := func(pattern string, text []byte) int64 {
		match := regexp.MustCompile(pattern).FindSubmatch(text)
		if match == nil {
			return 0
		}
		n, _ := strconv.ParseInt(string(match[1]), 10, 64)
		return n
	}
	h.memory = number(`Pss:\s+(\d+) kB`, sizes) << 10
	h.threads = int(number(`Threads:\s+(\d+)`, status))
	descriptors, err := os.ReadDir(filepath.Join(folder, "fd"))
	h.descriptors = len(descriptors)
	return h, err
}
