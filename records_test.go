package main

// records_test.go: what is kept of tasks, for how long, and that a crash or a full disk takes no more than it must.

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

var testRetain = Retain{Tasks: 1000, Age: time.Hour, Log: 1 << 20}

func openTestRecords(t *testing.T, dir string, retain Retain) *records {
	t.Helper()
	r, err := openRecords(dir, retain)
	if err == nil {
		err = r.takeOver()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.close() })
	return r
}

func startTask(r *records, id string, attempt int) {
	now := time.Now()
	r.handle(taskStarted{TaskID: id, Event: "e", Name: "E", PID: 7, Attempt: attempt, CreatedAt: now, At: now})
}

func printTask(r *records, id, text string) {
	r.handle(taskOutput{TaskID: id, Stream: streamStdout, Data: []byte(text)})
}

func finishTask(r *records, id string, status taskStatus) {
	now := time.Now()
	code := 0
	r.handle(taskFinished{TaskID: id, Event: "e", Name: "E", Status: status, Attempt: 1, ExitCode: &code, PID: 7,
		CreatedAt: now, StartedAt: now.Add(-time.Second), FinishedAt: now, CPU: 12 * time.Millisecond, MaxRSS: 99})
}

func mustGet(t *testing.T, r *records, id string) record {
	t.Helper()
	rec, ok := r.get(id)
	if !ok {
		t.Fatalf("no record of %q", id)
	}
	return rec
}

// diskBytes adds up the files under dir.
func diskBytes(t *testing.T, dir string) (total int64) {
	t.Helper()
	filepath.WalkDir(dir, func(_ string, entry os.DirEntry, err error) error {
		if err == nil && entry.Type().IsRegular() {
			if info, err := entry.Info(); err == nil {
				total += info.Size()
			}
		}
		return nil
	})
	return total
}

func TestRecordsOfOneTask(t *testing.T) {
	dir := t.TempDir()
	r := openTestRecords(t, dir, testRetain)
	const id = "Task-1"
	if err := r.keepData(id, []byte(`{"n": 12345678901234567890, "t": "<&>"}`)); err != nil {
		t.Fatal(err)
	}
	if _, ok := r.get(id); ok {
		t.Error("a task that has not started has a record")
	}
	startTask(r, id, 1)
	printTask(r, id, "one\n")
	r.handle(taskNotified{TaskID: id, Msg: "half", At: time.Now()})
	r.handle(taskNotified{TaskID: "elsewhere", Msg: "lost", At: time.Now()})
	if rec := mustGet(t, r, id); rec.Status != statusRunning || rec.OutputBytes != 4 || len(rec.Notifications) != 1 ||
		rec.FinishedAt != nil {
		t.Errorf("running: %+v", rec)
	}
	if err := r.saveResult(id, json.RawMessage(`{"ok":true}`)); err != nil {
		t.Fatal(err)
	}
	if n, err := r.saveFile(id, "a.txt", strings.NewReader("12345")); n != 5 || err != nil {
		t.Fatalf("saveFile = %d, %v", n, err)
	}
	printTask(r, id, "two\n")
	finishTask(r, id, statusFinish)
	printTask(r, id, "too late\n")
	r.handle(taskNotified{TaskID: id, Msg: "after", At: time.Now()})

	check := func(r *records) {
		t.Helper()
		rec := mustGet(t, r, id)
		if rec.Status != statusFinish || *rec.ExitCode != 0 || rec.OutputBytes != 8 || rec.DurationMS != 1000 ||
			rec.CPUMS != 12 || rec.MaxRSS != 99 || string(rec.Result) != `{"ok":true}` ||
			!reflect.DeepEqual(rec.Files, []taskFile{{"a.txt", 5}}) || len(rec.Notifications) != 2 ||
			rec.Notifications[1].Msg != "after" {
			t.Errorf("finished: %+v", rec)
		}
		if got := logOf(t, r, id); got != "one\ntwo\n" {
			t.Errorf("log = %q", got)
		}
		if data, err := r.data(id); string(data) != `{"n": 12345678901234567890, "t": "<&>"}` || err != nil {
			t.Errorf("data = %s, %v", data, err)
		}
		file, err := r.openFile(id, "a.txt")
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		if content, _ := io.ReadAll(file); string(content) != "12345" {
			t.Errorf("file = %q", content)
		}
	}
	check(r)
	if err := r.close(); err != nil {
		t.Fatal(err)
	}
	check(openTestRecords(t, dir, testRetain))
}

func TestRecordJSON(t *testing.T) {
	rec := record{TaskID: "t", Status: statusQueued}
	rec.fillLists()
	text, err := json.Marshal(rec)
	want := `{"task_id":"t","event":"","name":"","status":"queued","attempt":0,"exit_code":null,"signal":"","pid":0,` +
		`"created_at":null,"started_at":null,"finished_at":null,"duration_ms":0,"cpu_ms":0,"max_rss":0,"error":"",` +
		`"output_bytes":0,"notifications":[],"result":null,"files":[]}`
	if string(text) != want || err != nil {
		t.Errorf("record = %s, %v\nwant %s", text, err, want)
	}
}

func TestQuietTasksHaveNoFolder(t *testing.T) {
	dir := t.TempDir()
	r := openTestRecords(t, dir, testRetain)
	for i := range 50 {
		id := fmt.Sprint("quiet-", i)
		r.keepData(id, []byte(`{}`))
		startTask(r, id, 1)
		finishTask(r, id, statusFinish)
	}
	if entries, _ := os.ReadDir(filepath.Join(dir, "tasks")); len(entries) != 0 {
		t.Errorf("%d folders for tasks that left nothing", len(entries))
	}
	if got := logOf(t, r, "quiet-7"); got != "" {
		t.Errorf("log = %q", got)
	}
	finishTask(r, "never-started", statusError)
	if rec := mustGet(t, r, "never-started"); rec.Status != statusError {
		t.Errorf("never started: %+v", rec)
	}
}

func TestRecordsList(t *testing.T) {
	r := openTestRecords(t, t.TempDir(), testRetain)
	begin := time.Now()
	for i := range 6 {
		at := begin.Add(time.Duration(i) * time.Second)
		id, event := fmt.Sprint("t", i), []string{"a", "b"}[i%2]
		r.handle(taskStarted{TaskID: id, Event: event, Attempt: 1, CreatedAt: at, At: at})
		if i < 4 {
			r.handle(taskFinished{TaskID: id, Event: event, Status: statusFinish, CreatedAt: at, FinishedAt: at})
		}
	}
	r.handle(taskRetrying{TaskID: "t4", Event: "a", Attempt: 1, Reason: "exit 1"})
	for _, c := range []struct {
		filter recordFilter
		want   string
	}{
		{recordFilter{}, "t5 t4 t3 t2 t1 t0"},
		{recordFilter{limit: 3}, "t5 t4 t3"},
		{recordFilter{event: "a"}, "t4 t2 t0"},
		{recordFilter{status: statusRunning}, "t5"},
		{recordFilter{status: statusQueued}, "t4"},
		{recordFilter{status: statusFinish, event: "b", limit: 1}, "t3"},
		{recordFilter{status: statusTimeout}, ""},
	} {
		var ids []string
		for _, rec := range r.list(c.filter) {
			ids = append(ids, rec.TaskID)
		}
		if got := strings.Join(ids, " "); got != c.want {
			t.Errorf("list(%+v) = %q; want %q", c.filter, got, c.want)
		}
	}
}

func init() {
	// records-hang opens a store, gives a task all it can have, and waits to be killed.
	testRoles["records-hang"] = func(args []string) int {
		r, err := openRecords(args[0], Retain{Tasks: 10, Age: time.Hour, Log: 1000})
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		finishTask(r, "done", statusFinish)
		r.keepData("t", bytes.Repeat([]byte("x"), inlineDataBytes+1))
		startTask(r, "t", 1)
		printTask(r, "t", strings.Repeat("a", 20_000))
		r.handle(taskNotified{TaskID: "t", Msg: "halfway", At: time.Now()})
		r.saveResult("t", json.RawMessage(`1`))
		r.saveFile("t", "f", strings.NewReader("file"))
		fmt.Println("ready")
		select {}
	}
}

func TestRecordsSurviveKill(t *testing.T) {
	dir := t.TempDir()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "test-role", "records-hang", dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, len("ready"))
	if _, err := io.ReadFull(out, line); err != nil {
		t.Fatalf("role did not get ready: %v", err)
	}
	cmd.Process.Kill()
	cmd.Wait()

	// A line that was being written, and the upload that was under way.
	lines, err := os.OpenFile(filepath.Join(dir, "records.jsonl"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	lines.WriteString(`{"task_id":"torn","status":"fini`)
	lines.Close()

	r := openTestRecords(t, dir, Retain{Tasks: 10, Age: time.Hour, Log: 1000})
	mustGet(t, r, "done")
	if _, ok := r.get("torn"); ok {
		t.Error("a torn line became a record")
	}
	r.keepData("t", []byte(`{}`))
	startTask(r, "t", 2)
	printTask(r, "t", "second\n")
	finishTask(r, "t", statusError)
	rec := mustGet(t, r, "t")
	if len(rec.Notifications) != 1 || string(rec.Result) != "1" || len(rec.Files) != 1 {
		t.Errorf("after the crash: %+v", rec)
	}
	between := "\n" + attemptResumes(2)
	if want := int64(20_000 + len("second\n")); rec.OutputBytes != want {
		t.Errorf("output_bytes = %d; want %d", rec.OutputBytes, want)
	}
	tail := strings.Repeat("a", 500-len(between)-len("second\n")) + between + "second\n"
	want := strings.Repeat("a", 500) + missing(20_000+int64(len(between)+len("second\n"))-1000) + tail
	if got := logOf(t, r, "t"); got != want {
		t.Errorf("log = %q\nwant %q", got, want)
	}
	r.close()
	r = openTestRecords(t, dir, testRetain)
	mustGet(t, r, "done")
	mustGet(t, r, "t")
}

func TestRecordsSkipWhatDoesNotParse(t *testing.T) {
	dir := t.TempDir()
	lines := strings.Join([]string{
		`{"task_id":"good","status":"finish","created_at":"2020-01-01T00:00:00Z","finished_at":"2200-01-01T00:00:00Z"}`,
		`{"task_id":"../bad","status":"finish","finished_at":"2200-01-01T00:00:00Z"}`,
		`{"task_id":"live","status":"running","finished_at":"2200-01-01T00:00:00Z"}`,
		`{"task_id":17}`, `null`, `[`, ``, strings.Repeat("z", maxRecordLine+10), "\x00\xff",
		`{"task_id":"last","status":"error","created_at":"2020-01-02T00:00:00Z","finished_at":"2200-01-01T00:00:00Z"}`,
	}, "\n") + "\n"
	if err := os.WriteFile(filepath.Join(dir, "records.jsonl"), []byte(lines), 0o600); err != nil {
		t.Fatal(err)
	}
	folder := filepath.Join(dir, "tasks", "good")
	for name, content := range map[string]string{
		"log.0": "ab", "log.00": "no", "log.-1": "no", "log.x": "no", "log.1": "BC", "log.9": "j", "result.json": "{",
		"notifications.jsonl":     "junk\n" + `{"msg":"m","created_at":"2020-01-01T00:00:00Z"}` + "\n" + `{"msg":"torn`,
		"log.9223372036854775807": "overflow",
	} {
		os.MkdirAll(folder, 0o700)
		if err := os.WriteFile(filepath.Join(folder, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	os.MkdirAll(filepath.Join(dir, "tasks", "..no"), 0o700)
	r := openTestRecords(t, dir, testRetain)
	if list := r.list(recordFilter{}); len(list) != 2 || list[0].TaskID != "last" || list[1].TaskID != "good" {
		t.Errorf("list = %+v", list)
	}
	rec := mustGet(t, r, "good")
	if len(rec.Notifications) != 1 || rec.Result != nil {
		t.Errorf("record = %+v", rec)
	}
	if got, want := logOf(t, r, "good"), "abC"+missing(6)+"j"; got != want {
		t.Errorf("log = %q; want %q", got, want)
	}
}

func TestRetention(t *testing.T) {
	dir := t.TempDir()
	r := openTestRecords(t, dir, Retain{Tasks: 3, Age: time.Hour, Log: 1000})
	startTask(r, "alive", 1)
	printTask(r, "alive", "x")
	for i := range 6 {
		id := fmt.Sprint("t", i)
		startTask(r, id, 1)
		printTask(r, id, "x")
		finishTask(r, id, statusFinish)
	}
	check := func(r *records, want string) {
		t.Helper()
		var ids []string
		for _, rec := range r.list(recordFilter{}) {
			ids = append(ids, rec.TaskID)
		}
		if got := strings.Join(ids, " "); got != want {
			t.Errorf("kept %q; want %q", got, want)
		}
	}
	check(r, "t5 t4 t3 alive")
	if _, err := os.Stat(r.folder("t2")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("folder of a forgotten task: %v", err)
	}
	if _, err := r.openLog("t2"); !errors.Is(err, errTaskUnknown) {
		t.Errorf("log of a forgotten task: %v", err)
	}
	r.setRetain(Retain{Tasks: 2, Age: time.Hour, Log: 1000})
	check(r, "t5 t4 alive")
	r.close()
	r = openTestRecords(t, dir, Retain{Tasks: 2, Age: time.Hour, Log: 1000})
	check(r, "t5 t4")
	r.handle(taskFinished{TaskID: "old", Status: statusFinish, FinishedAt: time.Now().Add(-2 * time.Hour)})
	check(r, "t5 old")
	r.setRetain(Retain{Tasks: 2, Age: time.Nanosecond, Log: 1000})
	check(r, "")
	if _, err := os.Stat(r.folder("alive")); err != nil {
		t.Errorf("folder of an unfinished task: %v", err)
	}
	old := time.Now().Add(-48 * time.Hour)
	os.Chtimes(r.folder("alive"), old, old)
	r.removeOrphans()
	if _, err := os.Stat(r.folder("alive")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("folder that nobody came back for: %v", err)
	}
}

func TestRecordsFileIsCompacted(t *testing.T) {
	dir := t.TempDir()
	r := openTestRecords(t, dir, Retain{Tasks: 20, Age: time.Hour, Log: 1000})
	data := []byte(`{"d":"` + strings.Repeat("d", 50_000) + `"}`)
	for i := range 300 {
		id := fmt.Sprint("t", i)
		r.keepData(id, data)
		startTask(r, id, 1)
		finishTask(r, id, statusFinish)
	}
	if size := diskBytes(t, dir); size > compactBytes+int64(2*len(data)) {
		t.Errorf("%d bytes on disk for 20 records of %d", size, len(data))
	}
	check := func(r *records) {
		t.Helper()
		for i := 280; i < 300; i++ {
			if got, err := r.data(fmt.Sprint("t", i)); !bytes.Equal(got, data) {
				t.Fatalf("data of t%d: %d bytes, %v", i, len(got), err)
			}
		}
		if n := len(r.list(recordFilter{limit: 1000})); n != 20 {
			t.Errorf("%d records; want 20", n)
		}
	}
	check(r)
	r.close()
	check(openTestRecords(t, dir, Retain{Tasks: 20, Age: time.Hour, Log: 1000}))
}

func TestRecordsGoOnWhenTheDiskFails(t *testing.T) {
	dir := t.TempDir()
	r := openTestRecords(t, dir, testRetain)
	var log bytes.Buffer
	r.setLog(slog.New(slog.NewTextHandler(&log, nil)))
	startTask(r, "t", 1)
	printTask(r, "t", "first\n")

	// A folder in the way of the next log file, and one in the way of the records.
	r.index.closeFile()
	os.Rename(filepath.Join(dir, "records.jsonl"), filepath.Join(dir, "aside"))
	os.Mkdir(filepath.Join(dir, "records.jsonl"), 0o700)
	os.Rename(r.folder("t"), filepath.Join(dir, "tasks", "aside"))
	os.WriteFile(r.folder("t"), nil, 0o600)
	startTask(r, "unlucky", 1)
	r.live["t"].output.closeFile()
	printTask(r, "t", "lost\n")
	finishTask(r, "unlucky", statusFinish)
	if got := log.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, string(codeRecordWrite)) {
		t.Errorf("logged %q; want one line", got)
	}
	if n, err := r.failure(); n != 2 || codeOf(err) != codeRecordWrite {
		t.Errorf("failure() = %d, %v", n, err)
	}
	if rec := mustGet(t, r, "unlucky"); rec.Status != statusFinish {
		t.Errorf("a record that waits: %+v", rec)
	}

	os.Remove(filepath.Join(dir, "records.jsonl"))
	os.Rename(filepath.Join(dir, "aside"), filepath.Join(dir, "records.jsonl"))
	os.Remove(r.folder("t"))
	os.Rename(filepath.Join(dir, "tasks", "aside"), r.folder("t"))
	printTask(r, "t", "last\n")
	finishTask(r, "t", statusFinish)
	if _, err := r.failure(); err != nil {
		t.Errorf("failure() = %v after writing went well", err)
	}
	r.close()
	r = openTestRecords(t, dir, testRetain)
	mustGet(t, r, "unlucky")
	if got, want := logOf(t, r, "t"), "first\n"+missing(5)+"last\n"; got != want {
		t.Errorf("log = %q; want %q", got, want)
	}
	if rec := mustGet(t, r, "t"); rec.OutputBytes != 16 {
		t.Errorf("output_bytes = %d; want 16", rec.OutputBytes)
	}
}

func TestRecordThatCannotBeWritten(t *testing.T) {
	r := openTestRecords(t, t.TempDir(), testRetain)
	startTask(r, "t", 1)
	r.handle(taskFinished{TaskID: "t", Status: statusFinish, FinishedAt: time.Date(12345, 1, 1, 0, 0, 0, 0, time.UTC)})
	if n, err := r.failure(); n != 1 || codeOf(err) != codeRecordWrite {
		t.Errorf("failure() = %d, %v", n, err)
	}
	if rec, ok := r.get("t"); ok {
		t.Errorf("the task counts as live: %+v", rec)
	}
}

// TestRecordsOfTheWorkerBefore opens a store while another process still writes to it, as a worker does whose parent
// was killed.
func TestRecordsOfTheWorkerBefore(t *testing.T) {
	dir := t.TempDir()
	before := openTestRecords(t, dir, testRetain)
	startTask(before, "early", 1)
	next, err := openRecords(dir, Retain{Tasks: 2, Age: time.Hour, Log: 1000})
	if err != nil {
		t.Fatal(err)
	}
	defer next.close()
	for _, id := range []string{"old", "early", "late"} {
		startTask(before, id, 1)
		printTask(before, id, "text of "+id)
		finishTask(before, id, statusFinish)
	}
	before.close()
	if err := next.takeOver(); err != nil {
		t.Fatal(err)
	}
	finishTask(next, "own", statusFinish)
	var ids []string
	for _, rec := range next.list(recordFilter{}) {
		ids = append(ids, rec.TaskID)
	}
	slices.Sort(ids)
	if !slices.Equal(ids, []string{"late", "own"}) {
		t.Errorf("kept are %q; want the last two", ids)
	}
	if got := logOf(t, next, "late"); got != "text of late" {
		t.Errorf("log = %q", got)
	}
	again := openTestRecords(t, dir, testRetain)
	if rec := mustGet(t, again, "late"); rec.Status != statusFinish {
		t.Errorf("record = %+v", rec)
	}
}

func TestRecordsCannotOpen(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "tasks"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openRecords(dir, testRetain); codeOf(err) != codeRecordsOpen {
		t.Errorf("openRecords = %v; want %s", err, codeRecordsOpen)
	}
}

func BenchmarkQuietTask(b *testing.B) {
	r, err := openRecords(b.TempDir(), testRetain)
	if err != nil {
		b.Fatal(err)
	}
	defer r.close()
	for i := 0; b.Loop(); i++ {
		id := fmt.Sprint("task-", i)
		r.keepData(id, []byte(`{"a":1}`))
		startTask(r, id, 1)
		finishTask(r, id, statusFinish)
	}
}
