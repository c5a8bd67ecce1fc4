package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

func TestParseTaskMessage(t *testing.T) {
	for _, row := range []struct{ message, id, data, wrong string }{
		{`{"task_id":"a","data":{"x":1},"action":"execute"}`, "a", `{"x":1}`, ""},
		{`{"task_id":"A.b_c-9"}`, "A.b_c-9", `{}`, ""},
		{`{"task_id":"a","data":null,"other":1}`, "a", `null`, ""},
		{`{"task_id":"a","data":[1, 2.50]}`, "a", `[1, 2.50]`, ""},
		{`{"task_id":"` + strings.Repeat("x", 128) + `"}`, strings.Repeat("x", 128), `{}`, ""},
		{`{"task_id":"` + strings.Repeat("x", 129) + `"}`, "", "", "is not 1 to 128"},
		{`{"task_id":""}`, "", "", "is not 1 to 128"},
		{`{"data":{}}`, "", "", "is not 1 to 128"},
		{`{"task_id":".hidden"}`, "", "", "is not 1 to 128"},
		{`{"task_id":"../up"}`, "", "", "is not 1 to 128"},
		{`{"task_id":"a b"}`, "", "", "is not 1 to 128"},
		{`{"task_id":"a\u0000"}`, "", "", "is not 1 to 128"},
		{`{"task_id":"ä"}`, "", "", "is not 1 to 128"},
		{`{"task_id":7}`, "", "", "cannot unmarshal number"},
		{`{"task_id":"a","action":"destroy"}`, "", "", `unknown action "destroy"`},
		{`{"task_id":"a"} {}`, "", "", "after top-level value"},
		{`hello`, "", "", "invalid character"},
		{``, "", "", "unexpected end"},
		{`[]`, "", "", "cannot unmarshal array"},
		{`{"task_id":"a","data":"` + strings.Repeat("x", maxMessageBytes) + `"}`, "", "", "more than the 16777216 allowed"},
	} {
		m, err := parseTaskMessage([]byte(row.message))
		if row.wrong != "" {
			if err == nil || codeOf(err) != codeMessage || !strings.Contains(err.Error(), row.wrong) {
				t.Errorf("parseTaskMessage(%.80q) = %v; want %q", row.message, err, row.wrong)
			}
			continue
		}
		if err != nil || m.TaskID != row.id || string(m.Data) != row.data {
			t.Errorf("parseTaskMessage(%.80q) = %q, %q, %v; want %q, %q", row.message, m.TaskID, m.Data, err, row.id, row.data)
		}
	}
}

func FuzzMessage(f *testing.F) {
	for _, seed := range []string{
		`{"task_id":"a","data":{"x":[1,"y",null]},"action":"execute"}`, `{"task_id":"../x"}`, `{"task_id":"a","data":`,
		`{"TASK_ID":"a"}`, `{"task_id":"a","task_id":"b"}`, "\xff", `{"task_id":"\ud800"}`, `{"data":1e999,"task_id":"a"}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := parseTaskMessage(data)
		if err != nil {
			if codeOf(err) != codeMessage {
				t.Errorf("%q is refused without its code: %v", data, err)
			}
			return
		}
		if !validTaskID(m.TaskID) || m.TaskID != filepath.Base(m.TaskID) {
			t.Errorf("%q gives task id %q", data, m.TaskID)
		}
		if !json.Valid(m.Data) {
			t.Errorf("%q gives data %q", data, m.Data)
		}
	})
}

func TestWriteDataFile(t *testing.T) {
	dir := t.TempDir()
	data := []byte(`{"a":1}`)
	precious := filepath.Join(dir, "precious")
	write := func(path, content string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write(precious, "keep me")

	for _, row := range []struct {
		name, there string
		link, again bool
		code        errCode
	}{
		{name: "new"},
		{name: "cut-off", there: `{"a"`}, // what a crash leaves
		{name: "whole", there: `{"a":1}`},
		{name: "empty-of-a-crash"},
		{name: "somebody-elses", there: `{"name":"my package"}`, code: codeDataFile},
		{name: "of-an-earlier-attempt", there: "changed by the command", again: true},
		{name: "link", link: true, code: codeDataFile},
		{name: "link-by-the-command", link: true, again: true},
	} {
		path := filepath.Join(dir, row.name+".json")
		if row.link {
			if err := os.Symlink(precious, path); err != nil {
				t.Skip("no links here")
			}
		} else if row.there != "" {
			write(path, row.there)
		}
		_, err := (*spareFiles)(nil).writeDataFile(path, data, row.again)
		if codeOf(err) != row.code {
			t.Errorf("%s: %v; want code %q", row.name, err, row.code)
		}
		if err != nil {
			continue
		}
		content, _ := os.ReadFile(path)
		info, _ := os.Lstat(path)
		if string(content) != string(data) || !info.Mode().IsRegular() {
			t.Errorf("%s: %q, %v", row.name, content, info.Mode())
		}
		if os.PathSeparator == '/' && info.Mode().Perm() != 0o600 {
			t.Errorf("%s: mode %v", row.name, info.Mode())
		}
	}
	if content, _ := os.ReadFile(precious); string(content) != "keep me" {
		t.Errorf("a link led to %q being overwritten", content)
	}
	if _, err := (*spareFiles)(nil).writeDataFile(filepath.Join(dir, "gone", "x.json"), data, false); codeOf(err) != codeDataFileWrite {
		t.Errorf("missing folder: %v", err)
	}
}

func TestTailBuffer(t *testing.T) {
	for _, row := range []struct {
		pieces []string
		want   string
	}{
		{nil, ""},
		{[]string{"short\n"}, "short"},
		{[]string{"0123456789", "abcd"}, "456789abcd"},
		{[]string{"0", "123456789abcdef"}, "6789abcdef"},
		{[]string{"x\u00e4\u00e4\u00e4\u00e4\u00e4", "y"}, "\u00e4\u00e4\u00e4\u00e4y"}, // cut inside a character
		{[]string{"bad \xff"}, "bad \uFFFD"},
	} {
		b := &tailBuffer{limit: 10}
		for _, piece := range row.pieces {
			b.Write([]byte(piece))
		}
		if got := b.text(); got != row.want || !utf8.ValidString(got) {
			t.Errorf("tail of %q = %q; want %q", row.pieces, got, row.want)
		}
	}
}

func TestTaskID(t *testing.T) {
	last := ""
	for range 1000 {
		id := newTaskID()
		if !validTaskID(id) || len(id) != 36 || id[14] != '7' || !strings.Contains("89ab", id[19:20]) {
			t.Fatalf("newTaskID() = %q", id)
		}
		if id[:13] < last {
			t.Fatalf("%q comes before %q", id, last)
		}
		last = id[:13]
	}
}

func TestScheduler(t *testing.T) {
	var started []string
	s := newScheduler(3, func(x *task) { started = append(started, x.id) })
	expect := func(what string, want ...string) {
		t.Helper()
		if got := strings.Join(started, " "); got != strings.Join(want, " ") {
			t.Fatalf("%s: started %q; want %q", what, got, want)
		}
		started = nil
	}
	add := func(event string, ids ...string) {
		for _, id := range ids {
			s.add(&task{id: id, event: event})
		}
	}
	s.setLimit("a", 1)
	s.setLimit("b", 5)
	add("a", "a1", "a2")
	add("b", "b1", "b2", "b3")
	expect("limit of a job, then slots", "a1", "b1", "b2")
	s.done("b")
	expect("next of those that may", "b3")
	s.done("a")
	expect("its turn has come", "a2")
	add("b", "b4", "b5")
	add("a", "a3")
	s.pause("for a test")
	s.done("a")
	s.done("b")
	expect("paused")
	s.pause("for another reason")
	s.resume("for a test")
	expect("still paused")
	s.resume("for another reason")
	expect("in order of arrival", "b4", "b5")
	add("gone", "g1")
	s.done("b")
	expect("no lane without a limit overtakes", "a3")
	s.done("b")
	expect("an unconfigured job never runs")
	s.setLimit("gone", 1)
	expect("until it is configured", "g1")

	waiting := &task{id: "w", event: "gone"}
	s.add(waiting)
	if !s.remove(waiting) || s.remove(waiting) {
		t.Error("a waiting task is removed once")
	}
	s.done("gone")
	expect("removed")

	for range maxEnding + 1 {
		s.ended("b")
	}
	if n := s.mostUnsettled("b"); n != 5+maxEnding {
		t.Errorf("%d deliveries may be unsettled; want the limit and %d", n, maxEnding)
	}
	for range maxEnding {
		s.settled("b")
	}
	if n := s.mostUnsettled("b"); n != 6 {
		t.Errorf("%d deliveries may be unsettled; want 6", n)
	}
	if n := s.mostUnsettled("nobody's"); n != 0 {
		t.Errorf("%d deliveries of a job that is not there may be unsettled", n)
	}
}

// TestSchedulerKeepsNothing lets very many tasks pass and looks at what their lane holds.
func TestSchedulerKeepsNothing(t *testing.T) {
	s := newScheduler(1, func(*task) {})
	s.setLimit("a", 1)
	const n = 50_000
	for i := range n {
		s.add(&task{id: fmt.Sprint(i), event: "a"})
	}
	began := time.Now()
	for range n - 1 {
		s.done("a")
		if l := s.lanes["a"]; l.head > 1024 && l.head > len(l.tasks)/2 {
			t.Fatalf("%d of %d places are held by tasks that have left", l.head, len(l.tasks))
		}
	}
	t.Logf("%d tasks in %v", n, time.Since(began))
	if len(s.lanes["a"].tasks) != 0 || len(s.waiting) != 0 {
		t.Errorf("%d tasks, %d lanes are left", len(s.lanes["a"].tasks), len(s.waiting))
	}
}
