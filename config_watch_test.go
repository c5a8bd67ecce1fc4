package main

// config_watch_test.go changes files in the ways in which they are changed out there, and looks whether it is noticed,
// and nothing half way.

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

// watchTest is a watch whose looks a test makes by hand: rested has what was seen lie there for a poll, or for as long
// as a missing file may be missing.
type watchTest struct {
	t *testing.T
	*configWatch
}

func newWatchTest(t *testing.T, path string) watchTest {
	w := watchTest{t, newConfigWatch(&Config{File: path, Dir: filepath.Dir(path)})}
	w.look()
	w.take()
	return w
}

func (w watchTest) want(changed bool, what string) {
	w.t.Helper()
	if w.look(); w.changed() != changed {
		w.t.Errorf("%s: changed() = %v; want %v (seen %+v, text %q)", what, !changed, changed, w.lastSeen, w.text)
	}
}

func (w watchTest) rested(d time.Duration) { w.seenAt = w.seenAt.Add(-d) }

// wantTaken sees a new content come to rest, and nothing before.
func (w watchTest) wantTaken(text string) {
	w.t.Helper()
	w.want(false, "a content seen once")
	w.rested(configPoll)
	w.want(true, "the content at rest")
	if string(w.text) != text {
		w.t.Errorf("text %q; want %q", w.text, text)
	}
	w.take()
	w.rested(configGone)
	w.want(false, "a content that was taken up")
}

func write(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func rename(t testing.TB, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

func TestWatchEditors(t *testing.T) {
	path := configFolder(t, "old")
	dir := filepath.Dir(path)
	w := newWatchTest(t, path)

	// vi: the old file is moved away, a new one written.
	rename(t, path, path+"~")
	w.want(false, "a file moved away")
	write(t, path, "by vi")
	w.wantTaken("by vi")

	// Others write beside it and rename.
	write(t, filepath.Join(dir, "new"), "by rename")
	rename(t, filepath.Join(dir, "new"), path)
	w.wantTaken("by rename")

	// In place: emptied, then written in steps, seen in between.
	write(t, path, "")
	w.want(false, "an emptied file")
	w.rested(configPoll)
	w.want(false, "an emptied file after a poll")
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range []string{"in ", "place"} {
		if _, err := f.WriteString(part); err != nil {
			t.Fatal(err)
		}
		if part == "in " {
			w.want(false, "a half written file")
		}
	}
	f.Close()
	w.wantTaken("in place")

	// A new time of change is none, and neither is the same content in a new file.
	if err := os.Chtimes(path, time.Now(), time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	w.want(false, "another time")
	write(t, filepath.Join(dir, "new"), "in place")
	rename(t, filepath.Join(dir, "new"), path)
	w.rested(configGone)
	w.want(false, "the same again")

	// Gone for a moment, then for long.
	rename(t, path, path+"~")
	w.want(false, "a missing file")
	w.rested(configPoll)
	w.want(false, "a file that is missing for a moment")
	rename(t, path+"~", path)
	w.rested(configGone)
	w.want(false, "a file that is back")
	rename(t, path, path+"~")
	w.want(false, "a missing file")
	w.rested(configGone)
	w.want(true, "a file that is missing for long")
	if w.err == nil {
		t.Error("a missing file gives no error")
	}
	w.take()
	rename(t, path+"~", path)
	w.wantTaken("in place")
}

// TestWatchSymlinkedFolder changes a file as Kubernetes does: config.yaml -> ..data/config.yaml, ..data -> a folder.
func TestWatchSymlinkedFolder(t *testing.T) {
	dir := t.TempDir()
	version := func(name, text string) {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, name, "config.yaml"), text)
		if err := os.Symlink(name, filepath.Join(dir, "..data_tmp")); err != nil {
			t.Skip("no symbolic links here:", err)
		}
		rename(t, filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data"))
	}
	version("..1", "first")
	path := filepath.Join(dir, "config.yaml")
	if err := os.Symlink(filepath.Join("..data", "config.yaml"), path); err != nil {
		t.Skip("no symbolic links here:", err)
	}
	w := newWatchTest(t, path)
	version("..2", "second")
	if err := os.RemoveAll(filepath.Join(dir, "..1")); err != nil {
		t.Fatal(err)
	}
	w.wantTaken("second")
}

// TestWatchNamedFiles is about the key file and the broker's TLS files, those of the default names among them.
func TestWatchNamedFiles(t *testing.T) {
	path := configFolder(t, "text")
	dir := filepath.Dir(path)
	key := filepath.Join(dir, "key")
	write(t, key, "secret")
	w := newWatchTest(t, path)
	w.keyFile = key
	w.wantTaken("text") // the first look at the key
	write(t, key, "other")
	w.wantTaken("text")
	rename(t, key, key+"~")
	w.want(false, "a missing key")
	w.rested(configPoll)
	w.want(false, "a key that is missing for a moment")
	w.rested(configGone)
	w.want(true, "a key that is missing for long")
	rename(t, key+"~", key)
	w.want(false, "a key that is back")

	secure := BrokerConfig{Type: "nats", Secure: true}
	w.brokers = []BrokerConfig{secure}
	w.wantTaken("text")
	w.want(false, "no TLS files")
	if digest, missing := tlsDigest(secure, dir); digest != "" || missing {
		t.Errorf("the digest of no files is %q, %v", digest, missing)
	}
	if err := os.MkdirAll(filepath.Join(dir, "tls", "nats"), 0o700); err != nil {
		t.Fatal(err)
	}
	ca := filepath.Join(dir, "tls", "nats", "ca.crt")
	digests := map[string]bool{}
	for _, text := range []string{"one", "another", "one more"} {
		write(t, ca, text)
		w.wantTaken("text")
		digest, missing := tlsDigest(secure, dir)
		again, _ := tlsDigest(secure, dir)
		if digest == "" || missing || digest != again || digests[digest] {
			t.Errorf("the digest of %q is %q, then %q", text, digest, again)
		}
		digests[digest] = true
	}
	secure.Secure = false
	if digest, _ := tlsDigest(secure, dir); digest != "" {
		t.Errorf("the digest without TLS is %q", digest)
	}
	secure.Secure, secure.CertFile = true, filepath.Join(dir, "none.crt")
	if _, missing := tlsDigest(secure, dir); !missing {
		t.Error("a named file that is not there is not missing")
	}
}

// TestWatchNoFile is about what only looks like a file.
func TestWatchNoFile(t *testing.T) {
	dir := t.TempDir()
	if w := newConfigWatch(&Config{File: dir, Dir: dir}); !w.once {
		t.Error("a folder is watched")
	} else if w.look(); !w.settled() || w.changed() {
		t.Error("what cannot be read again has changed")
	}
	path := configFolder(t, "text")
	w := newWatchTest(t, path)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	w.want(false, "a folder")
	w.rested(configGone)
	w.want(true, "a folder for long")
	if w.err == nil || !strings.Contains(w.err.Error(), "not a regular file") {
		t.Errorf("a folder gives %v", w.err)
	}
	os.Remove(path)
	write(t, path, strings.Repeat("x", maxConfigBytes+1))
	if w.look(); w.err == nil || !strings.Contains(w.err.Error(), "larger than") {
		t.Errorf("a huge file gives %v", w.err)
	}
	if runtime.GOOS == "windows" || os.Getuid() == 0 {
		return // root reads everything
	}
	write(t, path, "text")
	if err := os.Chmod(path, 0); err != nil {
		t.Fatal(err)
	}
	if w.look(); w.err == nil || !w.lastSeen.missing {
		t.Errorf("an unreadable file gives %v", w.err)
	}
}

func BenchmarkWatchLook(b *testing.B) {
	path := configFolder(b, strings.Repeat("# a line of a configuration\n", 200))
	w := newConfigWatch(&Config{File: path, Dir: filepath.Dir(path)})
	b.ReportAllocs()
	for b.Loop() {
		w.look()
	}
}
