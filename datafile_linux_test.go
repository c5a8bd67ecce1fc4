package main

// datafile_linux_test.go lends files out as data files and does to them what commands may do.

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

func TestSpareFiles(t *testing.T) {
	dir := t.TempDir()
	s := openSpareFiles(dir)
	if s == nil {
		t.Fatal("no spare files")
	}
	var holder *os.File
	rows := []struct {
		name   string
		data   string
		do     func(path string) error // what the command does to its file
		reused bool                    // by the next task
		left   string                  // a file that the command has made of it
	}{
		{"nothing", `{"long":"0123456789"}`, func(string) error { return nil }, true, ""},
		{"shorter", `{}`, func(string) error { return nil }, true, ""},
		{"written", `{"a":1}`, func(p string) error { return os.WriteFile(p, []byte("much longer than it was before"), 0o600) }, true, ""},
		{"removed", `{"a":2}`, os.Remove, true, ""},
		{"replaced", `{"a":3}`, func(p string) error {
			return os.WriteFile(p+".new", []byte("x"), 0o600)
		}, true, "replaced.json.new"},
		{"linked", `{"a":4}`, func(p string) error { return os.Link(p, p+".kept") }, false, "linked.json.kept"},
		{"moved", `{"a":5}`, func(p string) error { return os.Rename(p, p+".kept") }, false, "moved.json.kept"},
		{"mode", `{"a":6}`, func(p string) error { return os.Chmod(p, 0o644) }, false, ""},
		{"read on", `{"a":7}`, func(p string) (err error) { holder, err = os.Open(p); return err }, false, ""},
		{"last", `{"a":8}`, func(string) error { return nil }, true, ""},
	}
	var before *spareFile
	for i, row := range rows {
		path := filepath.Join(dir, row.name+".json")
		spare, err := s.writeDataFile(path, []byte(row.data), false)
		if err != nil || spare == nil {
			t.Fatalf("%s: %v, %v", row.name, spare, err)
		}
		if content, _ := os.ReadFile(path); string(content) != row.data {
			t.Errorf("%s: the file holds %q; want %q", row.name, content, row.data)
		}
		if i > 0 && (spare == before) != rows[i-1].reused {
			t.Errorf("after %q: the file was used again: %v; want %v", rows[i-1].name, spare == before, rows[i-1].reused)
		}
		before = spare
		if err := row.do(path); err != nil {
			t.Fatal(err)
		}
		os.Remove(path)
		s.rest(spare)
	}
	for _, row := range rows {
		if content, _ := os.ReadFile(filepath.Join(dir, row.left)); row.left != "" && row.name != "replaced" && string(content) != row.data {
			t.Errorf("%s: %s holds %q; want %q", row.name, row.left, content, row.data)
		}
	}
	if content := make([]byte, 100); true {
		n, _ := holder.ReadAt(content, 0)
		if string(content[:n]) != `{"a":7}` {
			t.Errorf("whoever reads on sees %q", content[:n])
		}
		holder.Close()
	}
	if spare, err := s.writeDataFile(filepath.Join(dir, "large.json"), make([]byte, maxSpareBytes+1), false); spare != nil || err != nil {
		t.Errorf("large data: %v, %v; want a file of its own", spare, err)
	}
	s.close()
	if _, err := os.Stat(s.dir); !os.IsNotExist(err) {
		t.Errorf("the folder is left: %v", err)
	}
}

// Another disk has no second names of files: they are written there, and tried there once only.
func TestSpareFilesElsewhere(t *testing.T) {
	elsewhere, err := os.MkdirTemp("/dev/shm", "job_item-test-")
	if err != nil {
		t.Skip("no second disk here: ", err)
	}
	defer os.RemoveAll(elsewhere)
	s := openSpareFiles(t.TempDir())
	defer s.close()
	for i := range 2 {
		path := filepath.Join(elsewhere, fmt.Sprint(i, ".json"))
		spare, err := s.writeDataFile(path, []byte("{}"), false)
		if err != nil || (spare == nil) != (i > 0) {
			t.Errorf("%d: %v, %v", i, spare, err)
		}
		if content, _ := os.ReadFile(path); string(content) != "{}" {
			t.Errorf("%d: the file holds %q", i, content)
		}
		s.rest(spare)
	}
}

// A leftover of a killed worker is a task's data file still.
func TestSpareFilesAfterCrash(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "x.json")
	if _, err := openSpareFiles(dir).writeDataFile(path, []byte(`{"a":1}`), false); err != nil {
		t.Fatal(err)
	}
	s := openSpareFiles(dir)
	defer s.close()
	spare, err := s.writeDataFile(path, []byte(`{"a":1}`), true)
	if err != nil || spare == nil {
		t.Fatalf("%v, %v", spare, err)
	}
	if status := mustRun(t, context.Background(), &command{line: `test "$(cat x.json)" = '{"a":1}'`, dir: dir}); status.code != 0 {
		t.Errorf("%+v", status)
	}
}
