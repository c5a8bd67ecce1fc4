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
	"syscall"
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

func readFolder(t testing.TB, dir string) map[string]string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	must(t, err)
	content := map[string]string{}
	for _, path := range files {
		content[filepath.Base(path)] = string(readFile(t, path))
	}
	return content
}

// aSmallJournal gives the bytes of a segment with some tasks, and where the record of each ends.
func aSmallJournal(t testing.TB) (file []byte, ends []int64, data map[string]string) {
	dir := t.TempDir()
	j, _ := mustOpenJournal(t, dir, smallJournal)
	data = map[string]string{}
	for i := range 4 {
		id := fmt.Sprintf("task-%d", i)
		data[id] = strings.Repeat(id, 5*i)
		mustAccept(t, j, id, data[id])
		ends = append(ends, j.stats().Bytes)
	}
	must(t, j.close())
	return readFile(t, segmentPath(dir, 1)), ends, data
}

// freshFolder holds one segment with these bytes.
func freshFolder(t testing.TB, file []byte) string {
	dir := t.TempDir()
	must(t, os.WriteFile(segmentPath(dir, 1), file, 0o600))
	return dir
}

func TestJournalTornAtEveryByte(t *testing.T) {
	file, ends, data := aSmallJournal(t)
	for size := range len(file) + 1 {
		dir := freshFolder(t, file[:size])
		want := map[string]string{}
		good := int64(segmentHeaderBytes)
		for i, end := range ends {
			if int64(size) >= end {
				id := fmt.Sprintf("task-%d", i)
				want[id], good = data[id], end
			}
		}
		j, tasks := mustOpenJournal(t, dir, smallJournal)
		assertTasks(t, j, tasks, want)
		if torn := max(0, int64(size)-good); j.stats().TornBytes != torn || j.stats().DamagedBytes != 0 {
			t.Fatalf("cut at %d: stats() = %+v; want %d torn", size, j.stats(), torn)
		} else if kept, _ := os.ReadFile(filepath.Join(dir, "0000000001.torn")); !bytes.Equal(kept, file[int64(size)-torn:size]) {
			t.Fatalf("cut at %d: kept %d bytes; want %d", size, len(kept), torn)
		}
		mustAccept(t, j, "after", "new")
		want["after"] = "new"
		must(t, j.close())
		j, tasks = mustOpenJournal(t, dir, smallJournal)
		assertTasks(t, j, tasks, want)
		if torn := j.stats().TornBytes; torn != 0 {
			t.Fatalf("cut at %d: %d bytes are torn again", size, torn)
		}
		must(t, j.close())
	}
}

func TestJournalBitFlips(t *testing.T) {
	file, ends, data := aSmallJournal(t)
	for at := range file {
		flipped := bytes.Clone(file)
		flipped[at] ^= 1 << (at % 8)
		dir := freshFolder(t, flipped)
		want := map[string]string{}
		from := int64(segmentHeaderBytes)
		for i, end := range ends {
			if hit := int64(at) >= from && int64(at) < end; !hit {
				id := fmt.Sprintf("task-%d", i)
				want[id] = data[id]
			}
			from = end
		}
		j, tasks := mustOpenJournal(t, dir, smallJournal)
		assertTasks(t, j, tasks, want)
		if stats := j.stats(); (stats.TornBytes+stats.DamagedBytes > 0) != (at >= segmentHeaderBytes) {
			t.Fatalf("flip at %d: stats() = %+v", at, stats)
		}
		mustAccept(t, j, "after", "new")
		want["after"] = "new"
		must(t, j.close())
		j, tasks = mustOpenJournal(t, dir, smallJournal)
		assertTasks(t, j, tasks, want)
		must(t, j.close())
	}
}

// The zeros ahead of the records are no damage, are used up before there are more, and go when a segment is complete.
func TestJournalFilledAhead(t *testing.T) {
	dir := t.TempDir()
	j, _ := mustOpenJournal(t, dir, defaultJournalSizes())
	mustAccept(t, j, "one", "1")
	first, oneTask := readFile(t, segmentPath(dir, 1)), j.stats().Bytes
	mustAccept(t, j, "two", "2")
	open := readFile(t, segmentPath(dir, 1))
	if len(first) != fillAheadBytes || len(open) != fillAheadBytes {
		t.Errorf("the file has %d bytes, then %d; want %d", len(first), len(open), fillAheadBytes)
	}
	size := j.stats().Bytes
	must(t, j.close())
	if closed := readFile(t, segmentPath(dir, 1)); int64(len(closed)) != size {
		t.Errorf("closed, it has %d bytes; want %d", len(closed), size)
	}

	torn := bytes.Clone(open)
	torn[size-1]++
	for _, row := range []struct {
		name  string
		file  []byte
		last  bool
		bytes int64 // of whole records and headers
		tasks map[string]string
	}{
		{"killed", open, true, size, map[string]string{"one": "1", "two": "2"}},
		{"killed as it became complete", open, false, size + segmentHeaderBytes, map[string]string{"one": "1", "two": "2"}},
		{"power cut", torn, true, oneTask, map[string]string{"one": "1"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			dir := freshFolder(t, row.file)
			if !row.last {
				must(t, os.WriteFile(segmentPath(dir, 2), segmentHeader(1), 0o600))
			}
			j, tasks := mustOpenJournal(t, dir, defaultJournalSizes())
			assertTasks(t, j, tasks, row.tasks)
			stats := j.stats()
			if torn := row.bytes == oneTask; stats.Bytes != row.bytes || stats.TornBytes > 0 != torn || stats.DamagedBytes > 0 {
				t.Errorf("stats() = %+v; want %d bytes", stats, row.bytes)
			}
			mustAccept(t, j, "three", "3")
			must(t, j.close())
			j, tasks = mustOpenJournal(t, dir, defaultJournalSizes())
			row.tasks["three"] = "3"
			assertTasks(t, j, tasks, row.tasks)
			if stats := j.stats(); stats.TornBytes > 0 {
				t.Errorf("opened again: %+v", stats)
			}
		})
	}
}

// What stands in a task's data must never be taken for a record, not even a copy of the journal itself.
func TestJournalGarbage(t *testing.T) {
	file, _, data := aSmallJournal(t)
	for name, garbage := range map[string][]byte{
		"ones":    bytes.Repeat([]byte{0xff}, 5000),
		"markers": bytes.Repeat([]byte(frameMarker), 200_000),
		"itself":  file,
		"records": file[segmentHeaderBytes:],
	} {
		for _, last := range []bool{true, false} {
			dir := freshFolder(t, append(bytes.Clone(file), garbage...))
			if !last {
				must(t, os.WriteFile(segmentPath(dir, 2), segmentHeader(1), 0o600))
			}
			j, tasks := mustOpenJournal(t, dir, smallJournal)
			assertTasks(t, j, tasks, data)
			if stats := j.stats(); stats.TornBytes+stats.DamagedBytes != int64(len(garbage)) {
				t.Errorf("%s: stats() = %+v; want %d bytes", name, stats, len(garbage))
			}
			must(t, j.close())
		}
	}
}

func TestJournalDamagedHeader(t *testing.T) {
	file, _, data := aSmallJournal(t)
	dir := freshFolder(t, file)
	damaged := append(make([]byte, segmentHeaderBytes), file[segmentHeaderBytes:]...)
	for _, number := range []uint64{2, 3} {
		must(t, os.WriteFile(segmentPath(dir, number), damaged, 0o600))
	}
	j, tasks := mustOpenJournal(t, dir, smallJournal)
	assertTasks(t, j, tasks, data)
	if got := j.stats().DamagedBytes; got != 2*int64(len(damaged)) {
		t.Errorf("DamagedBytes = %d; want %d", got, 2*len(damaged))
	}
	if !bytes.Equal(readFile(t, segmentPath(dir, 3)+".damaged"), damaged) {
		t.Error("the damaged segment was not kept")
	}
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

func TestJournalIdleIsSmall(t *testing.T) {
	dir := t.TempDir()
	j, _ := mustOpenJournal(t, dir, smallJournal)
	for i := range 30 {
		id := fmt.Sprint(i)
		mustAccept(t, j, id, strings.Repeat("x", 1000))
		must(t, j.finished(outcomeOf(id)))
		must(t, j.reported(id))
	}
	waitFor(t, 10*time.Second, func() string {
		if n := j.stats().Bytes; n > smallJournal.idleGarbage+30*outcomeBytes {
			return fmt.Sprintf("still %d bytes", n)
		}
		return ""
	})
	must(t, j.close())
	j, _ = mustOpenJournal(t, dir, smallJournal)
	if status, _ := j.outcome("0"); status != statusFinish {
		t.Error("compaction forgot an outcome")
	}
}

// A task whose record is damaged on disk neither stops compaction for ever nor takes others with it.
func TestJournalCompactsAroundDamage(t *testing.T) {
	dir := t.TempDir()
	j, _ := mustOpenJournal(t, dir, smallJournal)
	mustAccept(t, j, "damaged", "some data")
	place := j.tasks["damaged"]
	f, err := os.OpenFile(place.segment.path, os.O_RDWR, 0)
	must(t, err)
	_, err = f.WriteAt([]byte("X"), place.offset+place.bytes()-1)
	must(t, errors.Join(err, f.Close()))
	if _, err := j.data("damaged"); codeOf(err) != codeJournalRead {
		t.Fatalf("data of a damaged task: %v", err)
	}
	mustAccept(t, j, "good", "other data")
	for i := range 30 {
		mustAccept(t, j, fmt.Sprint(i), strings.Repeat("x", 1000))
		must(t, j.finished(outcomeOf(fmt.Sprint(i))))
		must(t, j.reported(fmt.Sprint(i)))
	}
	must(t, j.finished(outcomeOf("damaged")))
	must(t, j.reported("damaged"))
	j.mu.Lock()
	j.compactAfter = time.Time{}
	j.mu.Unlock()
	mustAccept(t, j, "wakes compaction", "")
	waitFor(t, 10*time.Second, func() string {
		if _, err := os.Stat(place.segment.path); err == nil {
			return "the damaged segment is still there"
		}
		return ""
	})
	assertData(t, j, "good", "other data")
}

// failingFile fails as a disk does.
type failingFile struct {
	journalFile
	writes, syncs, truncates *atomic.Bool // fail
}

func (f failingFile) WriteAt(p []byte, off int64) (int, error) {
	if f.writes.Load() {
		n, _ := f.journalFile.WriteAt(p[:len(p)/2], off)
		return n, syscall.ENOSPC
	}
	return f.journalFile.WriteAt(p, off)
}

func (f failingFile) Sync() error {
	if f.syncs.Load() {
		return syscall.EIO
	}
	return f.journalFile.Sync()
}

func (f failingFile) Truncate(size int64) error {
	if f.truncates.Load() {
		return syscall.EIO
	}
	return f.journalFile.Truncate(size)
}

func TestJournalFailingDisk(t *testing.T) {
	for _, kind := range []string{"write", "write and truncate", "sync"} {
		t.Run(kind, func(t *testing.T) {
			dir := t.TempDir()
			j, _ := mustOpenJournal(t, dir, defaultJournalSizes())
			var writes, syncs, truncates atomic.Bool
			j.mu.Lock()
			j.wrap = func(s *segment) { s.file = failingFile{s.file, &writes, &syncs, &truncates} }
			j.wrap(j.tail())
			j.mu.Unlock()
			mustAccept(t, j, "before", "1")
			mustAccept(t, j, "running", "2")
			must(t, j.started("running", 1, processIdentity{PID: 9}))
			err := j.accept(journalTask{ID: "held", Held: true}, []byte("4"))
			must(t, err)

			writes.Store(strings.HasPrefix(kind, "write"))
			syncs.Store(kind == "sync")
			truncates.Store(kind != "write")
			if err := j.accept(journalTask{ID: "failing"}, bytes.Repeat([]byte("z"), 5000)); codeOf(err) != codeJournalWrite {
				t.Fatalf("accept: %v", err)
			}
			if _, err := j.data("failing"); codeOf(err) != codeJournalTask {
				t.Errorf("a task whose acceptance failed is still there: %v", err)
			}
			if err := j.finished(outcomeOf("running")); codeOf(err) != codeJournalWrite {
				t.Fatalf("finished: %v", err)
			}
			if _, known := j.outcome("running"); known || j.writable() == nil {
				t.Errorf("outcome known: %v, writable() = %v", known, j.writable())
			}

			writes.Store(false)
			syncs.Store(false)
			truncates.Store(false)
			waitFor(t, 5*time.Second, func() string { return fmtErr(j.writable()) })
			must(t, j.finished(outcomeOf("running")))
			mustAccept(t, j, "failing", "3")
			want := map[string]string{"before": "1", "running": "2", "failing": "3", "held": "4"}
			assertTasks(t, j, map[string]journalTask{"before": {}, "running": {}, "failing": {}, "held": {}}, want)
			must(t, j.close())
			j, tasks := mustOpenJournal(t, dir, defaultJournalSizes())
			assertTasks(t, j, tasks, want)
			if tasks["running"].Outcome == nil || tasks["running"].Attempts != 1 {
				t.Errorf("running = %+v", tasks["running"])
			}
		})
	}
}

// gatedFile's syncs wait to be told how they end.
type gatedFile struct {
	journalFile
	begun chan bool
	end   chan error
	open  chan bool // closed: let all pass
}

func (f gatedFile) Sync() error {
	select {
	case f.begun <- true:
		return <-f.end
	case <-f.open:
		return f.journalFile.Sync()
	}
}

// Tasks that were not accepted because the sync failed do not come back, although their records reached the file; nor
// does the one that was written while that sync ran, whose own sync would wrongly have gone well.
func TestJournalFailedSyncIsNoAcceptance(t *testing.T) {
	dir := t.TempDir()
	j, _ := mustOpenJournal(t, dir, defaultJournalSizes())
	gate := gatedFile{j.tail().file, make(chan bool), make(chan error), make(chan bool)}
	j.mu.Lock()
	j.tail().file = gate
	j.mu.Unlock()
	failed := make(chan error, 2)
	accept := func(id string) {
		err := j.accept(journalTask{ID: id}, nil)
		failed <- err
	}
	go accept("first")
	<-gate.begun
	go accept("meanwhile")
	waitFor(t, 5*time.Second, func() string {
		j.mu.Lock()
		defer j.mu.Unlock()
		if j.batch == nil {
			return "the second task does not wait"
		}
		return ""
	})
	gate.end <- syscall.EIO
	for range 2 {
		if err := <-failed; !errors.Is(err, syscall.EIO) || codeOf(err) != codeJournalWrite {
			t.Errorf("accept: %v", err)
		}
	}
	waitFor(t, 5*time.Second, func() string { return fmtErr(j.writable()) })
	mustAccept(t, j, "after", "1")
	must(t, j.close())
	j, tasks := mustOpenJournal(t, dir, defaultJournalSizes())
	assertTasks(t, j, tasks, map[string]string{"after": "1"})
}

// Nobody hears of an outcome that a crash could still take back.
func TestJournalOutcomeOnceDurable(t *testing.T) {
	j, _ := mustOpenJournal(t, t.TempDir(), defaultJournalSizes())
	mustAccept(t, j, "a", "")
	gate := gatedFile{j.tail().file, make(chan bool), make(chan error), make(chan bool)}
	j.mu.Lock()
	j.tail().file = gate
	j.mu.Unlock()
	done := make(chan error)
	go func() { done <- j.finished(outcomeOf("a")) }()
	<-gate.begun
	if status, known := j.outcome("a"); known {
		t.Errorf("outcome before the sync: %q", status)
	}
	gate.end <- nil
	must(t, <-done)
	if status, _ := j.outcome("a"); status != statusFinish {
		t.Errorf("outcome after the sync: %q", status)
	}
	close(gate.open)
}

// However many wait, they share syncs.
func TestJournalGroupCommit(t *testing.T) {
	j, _ := mustOpenJournal(t, t.TempDir(), defaultJournalSizes())
	gate := gatedFile{j.tail().file, make(chan bool), make(chan error), make(chan bool)}
	j.mu.Lock()
	j.tail().file = gate
	j.mu.Unlock()
	const callers = 50
	var all sync.WaitGroup
	for i := range callers {
		all.Add(1)
		go func() {
			defer all.Done()
			mustAccept(t, j, fmt.Sprint(i), "data")
		}()
	}
	<-gate.begun
	waitFor(t, 5*time.Second, func() string {
		if n := j.stats().Entries; n < callers {
			return fmt.Sprintf("%d entries", n)
		}
		return ""
	})
	before := j.stats().Syncs
	gate.end <- nil
	<-gate.begun
	// What survives our own death does not wait for the disk.
	must(t, j.started("0", 1, processIdentity{PID: 1}))
	gate.end <- nil
	all.Wait()
	if n := j.stats().Syncs - before; n != 2 {
		t.Errorf("%d syncs; want 2", n)
	}
	close(gate.open)
}

func fmtErr(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func TestJournalOutcomeMemory(t *testing.T) {
	var m outcomeMemory
	statuses := []taskStatus{statusFinish, statusError, statusTimeout, statusTerminate}
	for i := range outcomesKept + 100 {
		m.remember(fmt.Sprint(i), statuses[i%4])
	}
	dir := t.TempDir()
	j, _ := mustOpenJournal(t, dir, defaultJournalSizes())
	j.mu.Lock()
	j.outcomes = m
	_, err := j.append(m.frame(), true)
	j.mu.Unlock()
	must(t, err)
	must(t, j.close())
	j, _ = mustOpenJournal(t, dir, defaultJournalSizes())
	must(t, j.finished(outcomeOf("new")))
	for i, want := range map[int]taskStatus{0: "", 99: "", 100: "", 101: statusError, 102: statusTimeout, 103: statusTerminate,
		outcomesKept + 96: statusFinish} {
		if got, _ := j.outcome(fmt.Sprint(i)); got != want {
			t.Errorf("outcome(%d) = %q; want %q", i, got, want)
		}
	}
}

func TestJournalHundredThousandTasks(t *testing.T) {
	const count = 100_000
	dir := t.TempDir()
	j, _ := mustOpenJournal(t, dir, defaultJournalSizes())
	data := bytes.Repeat([]byte("d"), 1024)
	for i := range count {
		err := j.accept(journalTask{ID: fmt.Sprintf("018f0000-0000-7000-8000-%012d", i), Subject: "local.hello", Event: "hello",
			Held: true, CreatedAt: time.Now()}, data)
		must(t, err)
	}
	must(t, j.close())
	j = nil
	before := heapInUse()
	begun := time.Now()
	j, tasks, err := openJournal(dir)
	must(t, err)
	defer j.close()
	took := time.Since(begun)
	if len(tasks) != count || tasks[count-1].Event != "hello" {
		t.Fatalf("%d tasks", len(tasks))
	}
	for i := 1; i < count; i++ {
		if tasks[i].ID <= tasks[i-1].ID {
			t.Fatalf("task %d is out of order", i)
		}
	}
	tasks = nil
	used := heapInUse() - before
	t.Logf("opened in %v, %d KiB of memory", took, used>>10)
	if used > 25<<20 {
		t.Errorf("%d tasks take %d bytes of memory", count, used)
	}
	if took > 10*time.Second {
		t.Errorf("opening took %v", took)
	}
	runtime.KeepAlive(j)
}

func heapInUse() int64 {
	runtime.GC()
	runtime.GC()
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	return int64(stats.HeapAlloc)
}

// FuzzJournal opens whatever bytes: raw as the file, and payload, cut at its newlines, as whole records after it.
func FuzzJournal(f *testing.F) {
	file, _, _ := aSmallJournal(f)
	f.Add(file, []byte{})
	f.Add(file[:100], []byte("\x01\x00\x00\x01a\n\x02\x01a\x01\x01\x00\x00"))
	f.Add(file, []byte("\x06{\"task_id\":\"task-1\",\"status\":\"finish\"}\n\x07\x06task-1\n\x08"+strings.Repeat("\x01", 34)))
	f.Add(segmentHeader(1), []byte("\x04\x06task-2\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"))
	f.Fuzz(func(t *testing.T, raw, payloads []byte) {
		if salt, err := readSegmentHeader(bytes.NewReader(raw)); err == nil && len(raw) >= segmentHeaderBytes {
			for payload := range bytes.SplitSeq(payloads, []byte("\n")) {
				if len(payload) > 0 {
					frame := sealFrame(append(newFrame(payload[0], len(payload)), payload[1:]...))
					placeFrame(frame, salt, int64(len(raw)))
					raw = append(raw, frame...)
				}
			}
		}
		dir := freshFolder(t, raw)
		j, tasks, err := openJournalSized(dir, smallJournal)
		if err != nil {
			if codeOf(err) != codeJournalVersion {
				t.Fatal(err)
			}
			return
		}
		for _, task := range tasks {
			if _, err := j.data(task.ID); err != nil {
				t.Fatal(err)
			}
		}
		_, _, known := j.place("after")
		if !known {
			mustAccept(t, j, "after", "new")
		}
		must(t, j.close())
		j, again, err := openJournalSized(dir, smallJournal)
		must(t, err)
		defer j.close()
		if stats := j.stats(); len(again) != len(tasks) && len(again) != len(tasks)+1 || stats.TornBytes > 0 {
			t.Fatalf("reopened: %d tasks; had %d; %+v", len(again), len(tasks), stats)
		}
		if !known {
			assertData(t, j, "after", "new")
		}
	})
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
