package main

// records_files_test.go is about the other files of a task: its data, uploads and notifications, and the names of
// folders.

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestDataForReplay(t *testing.T) {
	dir := t.TempDir()
	r := openTestRecords(t, dir, testRetain)
	large := []byte(`"` + strings.Repeat("L", inlineDataBytes) + `"`)
	for id, data := range map[string][]byte{"small": []byte(`{"a":1}`), "large": large, "odd": []byte("not JSON")} {
		if err := r.keepData(id, data); err != nil {
			t.Fatal(err)
		}
		startTask(r, id, 1)
		if got, err := r.data(id); !bytes.Equal(got, data) {
			t.Errorf("data(%s) while running: %d bytes, %v", id, len(got), err)
		}
		finishTask(r, id, statusFinish)
		if got, err := r.data(id); !bytes.Equal(got, data) {
			t.Errorf("data(%s): %d bytes, %v", id, len(got), err)
		}
	}
	finishTask(r, "none", statusFinish)
	for id, want := range map[string]error{"none": errNotKept, "unknown": errTaskUnknown} {
		if _, err := r.data(id); !errors.Is(err, want) {
			t.Errorf("data(%s) = %v; want %v", id, err, want)
		}
	}
	if err := r.keepData("../x", nil); codeOf(err) != codeRecordTaskID {
		t.Errorf("keepData of a bad id: %v", err)
	}
}

func TestFilesAndResultsAreChecked(t *testing.T) {
	r := openTestRecords(t, t.TempDir(), testRetain)
	startTask(r, "t", 1)
	for _, name := range []string{
		"", ".", "..", ".hidden", "a/b", `a\b`, "/etc/passwd", "a\x00b", "a\nb", "con", "NUL.txt", "com1", "LPT9.log",
		"x.", "x ", "a:b", "a?b", "\xff", strings.Repeat("n", 256),
	} {
		if _, err := r.saveFile("t", name, strings.NewReader("x")); codeOf(err) != codeRecordFileName {
			t.Errorf("saveFile(%q) = %v; want %s", name, err, codeRecordFileName)
		}
		if _, err := r.openFile("t", name); codeOf(err) != codeRecordNotKept {
			t.Errorf("openFile(%q) = %v; want %s", name, err, codeRecordNotKept)
		}
	}
	broken := io.MultiReader(strings.NewReader("x"), failingReader{})
	if _, err := r.saveFile("t", "broken", broken); codeOf(err) != codeRecordFile {
		t.Errorf("an upload that broke off: %v", err)
	}
	for i := range maxTaskFiles {
		if _, err := r.saveFile("t", fmt.Sprintf("Ä file (%d).txt", i), strings.NewReader("x")); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := r.saveFile("t", "one more", strings.NewReader("x")); !errors.Is(err, errTooManyFiles) {
		t.Errorf("file %d: %v", maxTaskFiles+1, err)
	}
	if _, err := r.saveFile("t", "Ä file (3).txt", strings.NewReader("new")); err != nil {
		t.Errorf("a file in place of another: %v", err)
	}
	if rec := mustGet(t, r, "t"); len(rec.Files) != maxTaskFiles {
		t.Errorf("%d files; want %d", len(rec.Files), maxTaskFiles)
	}
	if entries, _ := filepath.Glob(filepath.Join(r.folder("t"), "upload-*")); len(entries) != 0 {
		t.Errorf("left behind: %q", entries)
	}
	for _, c := range []struct {
		id, result string
		want       errCode
	}{
		{"t", "{", codeRecordResult}, {"t", "", codeRecordResult}, {"unknown", "{}", codeRecordUnknown},
		{"t", `"` + strings.Repeat("r", maxResultBytes) + `"`, codeRecordTooLarge},
	} {
		if err := r.saveResult(c.id, json.RawMessage(c.result)); codeOf(err) != c.want {
			t.Errorf("saveResult(%s, %.10s) = %v; want %s", c.id, c.result, err, c.want)
		}
	}
	if _, err := r.saveFile("unknown", "x", strings.NewReader("")); !errors.Is(err, errTaskUnknown) {
		t.Errorf("file of an unknown task: %v", err)
	}
	if _, err := r.openFile("unknown", "x"); !errors.Is(err, errTaskUnknown) {
		t.Errorf("file of an unknown task: %v", err)
	}
}

type failingReader struct{}

func (failingReader) Read([]byte) (int, error) { return 0, errors.New("gone") }

func TestNotificationsAreBounded(t *testing.T) {
	r := openTestRecords(t, t.TempDir(), testRetain)
	startTask(r, "t", 1)
	msg := strings.Repeat("n", maxNotifBytes-10)
	for i := range 60 {
		r.handle(taskNotified{TaskID: "t", Msg: fmt.Sprintf("%06d %s", i, msg), At: time.Now()})
	}
	rec := mustGet(t, r, "t")
	if n := len(rec.Notifications); n < 10 || n > 20 || rec.Notifications[n-1].Msg[:6] != "000059" {
		t.Errorf("%d notifications kept", n)
	}
	if used := diskBytes(t, r.dir); used > 2*notifFileBytes+maxNotifBytes {
		t.Errorf("%d bytes on disk", used)
	}
	if list := r.list(recordFilter{}); len(list[0].Notifications) != 0 {
		t.Errorf("a list shows %d large notifications", len(list[0].Notifications))
	}
}

func TestFolderNames(t *testing.T) {
	seen := map[string]string{}
	for _, id := range []string{
		"a", "A", "0197c1de-7c7c-7e7e-8888-1234567890ab", "con", "con.x", "nul", "com1.a.b", "x.", "x", "a_b", "a-b",
		strings.Repeat("Z", 128), "records.jsonl",
	} {
		name := folderName(id)
		if other, ok := seen[strings.ToLower(name)]; ok {
			t.Errorf("%q and %q share the folder %q", id, other, name)
		}
		seen[strings.ToLower(name)] = id
		if back, ok := folderTask(name); back != id || !ok || len(name) > 255 || strings.ToLower(name) != name {
			t.Errorf("folderName(%q) = %q, and back %q, %v", id, name, back, ok)
		}
	}
	for _, name := range []string{"", "A", "~", "~zz", "~00", ".x", "a b", folderName("A") + "0"} {
		if id, ok := folderTask(name); ok {
			t.Errorf("folderTask(%q) = %q", name, id)
		}
	}
}
