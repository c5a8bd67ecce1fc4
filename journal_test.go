package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func init() {
	testRoles["journal-worker"] = journalWorkerRole
}

// smallJournal cuts and compacts all the time.
var smallJournal = journalSizes{segment: 4 << 10, garbage: 8 << 10, idleGarbage: 1 << 10, reserve: 4 << 10}

func mustOpenJournal(t testing.TB, dir string, sizes journalSizes) (*journal, map[string]journalTask) {
	t.Helper()
	j, tasks, err := openJournalSized(dir, sizes)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.close() })
	byID := map[string]journalTask{}
	for _, task := range tasks {
		byID[task.ID] = task
	}
	if len(byID) != len(tasks) {
		t.Fatalf("openJournal gave %d tasks, of them %d distinct", len(tasks), len(byID))
	}
	return j, byID
}

func mustAccept(t testing.TB, j *journal, id, data string) {
	t.Helper()
	must(t, j.accept(journalTask{ID: id, Subject: "local.hello", Event: "hello", CreatedAt: time.Unix(1000, 5)}, []byte(data)))
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func outcomeOf(id string) taskFinished {
	return taskFinished{TaskID: id, Event: "hello", Status: statusFinish, FinishedAt: time.Unix(2000, 0).UTC()}
}

// assertTasks compares what openJournal gave with what was accepted; data is by task id.
func assertTasks(t testing.TB, j *journal, got map[string]journalTask, want map[string]string) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("journal holds %d tasks; want %d", len(got), len(want))
	}
	for id, data := range want {
		assertData(t, j, id, data)
	}
}

func assertData(t testing.TB, j *journal, id, want string) {
	t.Helper()
	got, err := j.data(id)
	if err != nil || string(got) != want {
		t.Fatalf("data(%q) = %.40q, %v; want %.40q", id, got, err, want)
	}
}

func TestJournalReopen(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "journal")
	j, _ := mustOpenJournal(t, dir, defaultJournalSizes())
	p := processIdentity{PID: 77, Start: "123", Boot: "b-1"}
	due := time.Unix(5000, 7)
	created := time.Unix(1000, 5)
	ids := []string{"queued", "running", "returned", "retrying", "crashed-twice", "finished", "reported", "released", "held"}
	for _, id := range ids {
		must(t, j.accept(journalTask{ID: id, Subject: "p.hello", Event: "hello", Held: id == "held", CreatedAt: created},
			[]byte("data of "+id)))
		assertData(t, j, id, "data of "+id)
		if id != "queued" && id != "released" && id != "held" {
			must(t, j.started(id, 1, p))
		}
	}
	must(t, j.returned("returned"))
	must(t, j.retrying("retrying", due))
	must(t, j.started("crashed-twice", 2, p))
	code := 3
	outcome := taskFinished{TaskID: "finished", Event: "hello", Name: "Hello", Status: statusError, Attempt: 1, ExitCode: &code,
		PID: 77, CreatedAt: created.UTC(), FinishedAt: due.UTC(), CPU: time.Second, MaxRSS: 99, Error: "exit code 3"}
	must(t, j.finished(outcome))
	must(t, j.finished(outcomeOf("reported")))
	must(t, j.reported("reported"))
	must(t, j.released("released"))
	if stats := j.stats(); stats.Live != 7 || stats.Syncs == 0 || stats.Entries == 0 || stats.LastSyncAt.IsZero() {
		t.Errorf("stats() = %+v", stats)
	}
	must(t, j.close())

	j, tasks, err := openJournal(dir)
	must(t, err)
	defer j.close()
	base := journalTask{Subject: "p.hello", Event: "hello", CreatedAt: created}
	with := func(id string, change func(*journalTask)) journalTask {
		task := base
		task.ID = id
		change(&task)
		return task
	}
	want := []journalTask{
		with("queued", func(*journalTask) {}),
		with("running", func(t *journalTask) { t.Attempts, t.Crashes, t.Process = 1, 1, p }),
		with("returned", func(t *journalTask) { t.Attempts = 1 }),
		with("retrying", func(t *journalTask) { t.Attempts, t.Failures, t.Due = 1, 1, due }),
		with("crashed-twice", func(t *journalTask) { t.Attempts, t.Crashes, t.Process = 2, 2, p }),
		with("finished", func(t *journalTask) { t.Attempts, t.Outcome = 1, &outcome }),
		with("held", func(t *journalTask) { t.Held = true }),
	}
	for i := range want {
		if i >= len(tasks) || !reflect.DeepEqual(tasks[i], want[i]) {
			t.Fatalf("task %d = %+v\nwant %+v", i, tasks[min(i, len(tasks)-1)], want[i])
		}
		assertData(t, j, tasks[i].ID, "data of "+want[i].ID)
	}
	if len(tasks) != len(want) {
		t.Errorf("%d tasks; want %d", len(tasks), len(want))
	}
	for id, want := range map[string]taskStatus{"finished": statusError, "reported": statusFinish, "queued": "", "unknown": ""} {
		if got, ok := j.outcome(id); got != want || ok != (want != "") {
			t.Errorf("outcome(%q) = %q, %v; want %q", id, got, ok, want)
		}
	}
	for path, mode := range map[string]fs.FileMode{dir: 0o700, segmentPath(dir, 1): 0o600} {
		if info, err := os.Stat(path); runtime.GOOS != "windows" && (err != nil || info.Mode().Perm() != mode) {
			t.Errorf("mode of %s = %v, %v; want %v", path, info.Mode(), err, mode)
		}
	}
}

func TestJournalRefuses(t *testing.T) {
	j, _ := mustOpenJournal(t, t.TempDir(), defaultJournalSizes())
	mustAccept(t, j, "a", "1")
	mustAccept(t, j, "done", "1")
	must(t, j.finished(outcomeOf("done")))
	acceptErr := func(id string, data []byte) error {
		err := j.accept(journalTask{ID: id}, data)
		return err
	}
	_, dataErr := j.data("unknown")
	for name, err := range map[string]error{
		"accept twice":       acceptErr("a", nil),
		"accept no id":       acceptErr("", nil),
		"accept large data":  acceptErr("b", make([]byte, maxTaskDataBytes+1)),
		"accept large id":    acceptErr(strings.Repeat("x", maxPayloadBytes), nil),
		"start unknown":      j.started("unknown", 1, processIdentity{}),
		"start finished":     j.started("done", 1, processIdentity{}),
		"return unknown":     j.returned("unknown"),
		"retry unknown":      j.retrying("unknown", time.Now()),
		"finish not final":   j.finished(taskFinished{TaskID: "a", Status: statusRunning}),
		"report unfinished":  j.reported("a"),
		"data of unknown":    dataErr,
		"finish large error": j.finished(taskFinished{TaskID: "a", Status: statusError, Error: strings.Repeat("x", maxPayloadBytes)}),
	} {
		if codeOf(err) != codeJournalTask {
			t.Errorf("%s: %v [%s]; want %s", name, err, codeOf(err), codeJournalTask)
		}
	}
	must(t, j.reported("unknown"))
	must(t, j.released("unknown"))
	must(t, acceptErr("largest", bytes.Repeat([]byte{7}, maxTaskDataBytes)))
	assertData(t, j, "largest", strings.Repeat("\a", maxTaskDataBytes))
	must(t, j.writable())

	must(t, j.close())
	must(t, j.close())
	if err := acceptErr("c", nil); !errors.Is(err, os.ErrClosed) || codeOf(err) != codeJournalWrite {
		t.Errorf("accept after close: %v", err)
	}
}

func TestJournalOneProcess(t *testing.T) {
	dir := t.TempDir()
	j, _ := mustOpenJournal(t, dir, smallJournal)
	if _, _, err := openJournal(dir); !errors.Is(err, errJournalBusy) || codeOf(err) != codeJournalBusy {
		t.Fatalf("second openJournal: %v", err)
	}
	must(t, j.close())
	mustOpenJournal(t, dir, smallJournal)
}

func TestJournalCannotOpen(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(file, nil, 0o600))
	if _, _, err := openJournal(file); codeOf(err) != codeJournalOpen {
		t.Errorf("openJournal(a file): %v", err)
	}
}

func TestJournalRefusesNewerVersion(t *testing.T) {
	dir := t.TempDir()
	j, _ := mustOpenJournal(t, dir, smallJournal)
	mustAccept(t, j, "a", "1")
	must(t, j.close())
	must(t, os.WriteFile(segmentPath(dir, 1), append(readFile(t, segmentPath(dir, 1)), "torn"...), 0o600))
	newer := segmentHeader(9)
	for half := newer; len(half) > 0; half = half[segmentCopyBytes:] {
		half[8]++
		binary.LittleEndian.PutUint32(half[segmentCopyBytes-4:], crc32.Checksum(half[:segmentCopyBytes-4], castagnoli))
	}
	must(t, os.WriteFile(segmentPath(dir, 2), append(newer, "whatever"...), 0o600))
	before := readFolder(t, dir)
	_, _, err := openJournal(dir)
	if !errors.Is(err, errSegmentVersion) || codeOf(err) != codeJournalVersion {
		t.Fatalf("openJournal of a newer version: %v", err)
	}
	if after := readFolder(t, dir); !reflect.DeepEqual(after, before) {
		t.Error("the folder was changed")
	}
}

func readFile(t testing.TB, path string) []byte {
	t.Helper()
	text, err := os.ReadFile(path)
	must(t, err)
	return text
}

// A journalWorkerRole does what a worker does with its journal, and says on stdout what has been acknowledged.
func journalWorkerRole(args []string) int {
	j, _, err := openJournalSized(args[0], smallJournal)
	if err != nil {
		fmt.Println("failed", err)
		return 1
	}
	var out sync.Mutex
	say := func(what, id string) {
		out.Lock()
		defer out.Unlock()
		os.Stdout.WriteString(what + " " + id + "\n")
	}
	var all sync.WaitGroup
	for g := range 4 {
		all.Add(1)
		go func() {
			defer all.Done()
			for i := 0; ; i++ {
				id := fmt.Sprintf("%s-%d-%d", args[1], g, i)
				if err := j.accept(journalTask{ID: id, Event: "e"}, []byte("data "+id)); err != nil {
					say("failed", err.Error())
					return
				}
				say("accepted", id)
				if i%10 == 0 {
					continue // stays queued
				}
				err := errors.Join(j.started(id, 1, processIdentity{PID: 1}), j.finished(outcomeOf(id)))
				say("finished", id)
				if i%10 != 1 {
					err = errors.Join(err, j.reported(id))
				}
				if err != nil {
					say("failed", err.Error())
					return
				}
			}
		}()
	}
	all.Wait()
	return 1
}

func TestJournalKilled(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	self, err := os.Executable()
	must(t, err)
	dir := t.TempDir()
	accepted, finished := map[string]bool{}, map[string]bool{}
	for round := range 6 {
		cmd := exec.Command(self, "test-role", "journal-worker", dir, fmt.Sprint(round))
		stdout, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		lines := bufio.NewScanner(stdout)
		for n, limit := 0, 1+random.IntN(1500); lines.Scan(); n++ {
			if n == limit {
				must(t, cmd.Process.Kill())
			}
			switch what, id, _ := strings.Cut(lines.Text(), " "); what {
			case "accepted":
				accepted[id] = true
			case "finished":
				finished[id] = true
			default:
				t.Errorf("worker says %q", lines.Text())
			}
		}
		cmd.Wait()

		j, tasks := mustOpenJournal(t, dir, smallJournal)
		for id := range accepted {
			task, live := tasks[id]
			status, known := j.outcome(id)
			switch {
			case finished[id] && (status != statusFinish || live && task.Outcome == nil):
				t.Fatalf("round %d: finished task %s: status %q, %+v", round, id, status, task)
			case !live && !known:
				t.Fatalf("round %d: accepted task %s is lost", round, id)
			case live:
				assertData(t, j, id, "data "+id)
			}
		}
		must(t, j.close())
	}
	if len(accepted) < 100 || len(finished) < 100 {
		t.Errorf("only %d accepted, %d finished", len(accepted), len(finished))
	}
}

// Many tasks at once through a journal that compacts all the time, reopened at random moments.
func TestJournalUnderLoad(t *testing.T) {
	dir := t.TempDir()
	want := map[string]string{}
	var finished []string
	var mu sync.Mutex
	for round := range 4 {
		j, tasks := mustOpenJournal(t, dir, smallJournal)
		assertTasks(t, j, tasks, want)
		for id, task := range tasks {
			if n := len(id) % 3; task.Attempts != n {
				t.Fatalf("%s: %d attempts; want %d", id, task.Attempts, n)
			}
		}
		for _, id := range finished {
			if status, _ := j.outcome(id); status != statusFinish {
				t.Fatalf("outcome(%q) = %q", id, status)
			}
		}
		var all sync.WaitGroup
		for g := range 8 {
			all.Add(1)
			go func() {
				defer all.Done()
				for i := range 150 {
					id := fmt.Sprintf("%d-%d-%d", round, g, i)
					data := strings.Repeat(id, i%40)
					mustAccept(t, j, id, data)
					for attempt := range len(id) % 3 {
						must(t, j.started(id, attempt+1, processIdentity{PID: 5}))
					}
					assertData(t, j, id, data)
					if i%25 == 0 {
						mu.Lock()
						want[id] = data
						mu.Unlock()
						continue
					}
					must(t, j.finished(outcomeOf(id)))
					must(t, j.reported(id))
					mu.Lock()
					finished = append(finished, id)
					mu.Unlock()
				}
			}()
		}
		all.Wait()
		must(t, j.close())
		if _, err := os.Stat(segmentPath(dir, 1)); err == nil {
			t.Errorf("the first segment was not removed: %+v", j.stats())
		}
	}
}

func BenchmarkJournalAppend(b *testing.B) {
	for _, callers := range []int{1, 64} {
		b.Run(fmt.Sprint(callers), func(b *testing.B) {
			j, _ := mustOpenJournal(b, b.TempDir(), defaultJournalSizes())
			data := make([]byte, 1024)
			before := j.stats()
			begun := time.Now()
			inParallel(b, callers, func(i int) {
				err := j.accept(journalTask{ID: fmt.Sprintf("018f0000-0000-7000-8000-%012d", i), Event: "hello"}, data)
				must(b, err)
			})
			b.ReportMetric(float64(b.N)/time.Since(begun).Seconds(), "appends/s")
			b.ReportMetric(float64(j.stats().Syncs-before.Syncs)/float64(b.N), "syncs/append")
		})
	}
}

func BenchmarkJournalLifecycle(b *testing.B) {
	j, _ := mustOpenJournal(b, b.TempDir(), defaultJournalSizes())
	data := make([]byte, 1024)
	begun := time.Now()
	inParallel(b, 8, func(i int) {
		id := fmt.Sprintf("018f0000-0000-7000-8000-%012d", i)
		err := j.accept(journalTask{ID: id, Event: "hello"}, data)
		must(b, err)
		must(b, j.started(id, 1, processIdentity{PID: 1, Start: "12345678", Boot: "6f8c0a1e-0000-0000-0000-000000000000"}))
		must(b, j.finished(outcomeOf(id)))
		must(b, j.reported(id))
	})
	b.ReportMetric(float64(b.N)/time.Since(begun).Seconds(), "tasks/s")
}

func inParallel(b *testing.B, callers int, do func(i int)) {
	b.ResetTimer()
	var next atomic.Int64
	var all sync.WaitGroup
	for range callers {
		all.Add(1)
		go func() {
			defer all.Done()
			for i := next.Add(1); i <= int64(b.N); i = next.Add(1) {
				do(int(i))
			}
		}()
	}
	all.Wait()
}

func TestJournalAdopt(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "journal")
	j, _ := mustOpenJournal(t, dir, defaultJournalSizes())
	for _, id := range []string{"held", "adopted"} {
		err := j.accept(journalTask{ID: id, Subject: "p.e", Event: "e", Held: true}, []byte(id))
		must(t, err)
	}
	must(t, j.adopt("adopted"))
	if err := j.adopt("unknown"); codeOf(err) != codeJournalTask {
		t.Errorf("adopt unknown = %v", err)
	}
	for round := range 2 { // the second after the first has rewritten what it found
		must(t, j.close())
		var tasks map[string]journalTask
		j, tasks = mustOpenJournal(t, dir, journalSizes{segment: 1, garbage: 0, idleGarbage: 0, reserve: 1})
		if len(tasks) != 2 || !tasks["held"].Held || tasks["adopted"].Held {
			t.Fatalf("round %d: %+v; want the second adopted", round, tasks)
		}
	}
	must(t, j.close())
}
