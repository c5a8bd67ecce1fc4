package main

// update_build_test.go makes versions of the program to update to: copies of the test binary with a line at their end
// that says which version they are, and what is wrong with them.

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

const buildMark = "\njob_item test build: "

// A build is a version of the program.
type build struct {
	content []byte
	sum     string
}

var testBinary = sync.OnceValues(func() ([]byte, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return os.ReadFile(self)
})

// makeBuild makes a version with this number that behaves so, see actBuild; "" is well.
func makeBuild(t testing.TB, number int, behaviour string) build {
	t.Helper()
	content, err := testBinary()
	must(t, err)
	content = fmt.Appendf(bytes.Clone(content), "%s%-5d%s\n", buildMark, number, behaviour)
	return buildOf(content)
}

func buildOf(content []byte) build {
	sum := sha256.Sum256(content)
	return build{content, hex.EncodeToString(sum[:])}
}

// install puts the build into a folder of its own and gives its file.
func (b build) install(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "job_item")
	must(t, os.WriteFile(path, b.content, 0o755))
	return path
}

// actBuild makes the running program what the line at its end says. It returns where that is well so far.
func actBuild() {
	var number int
	behaviour := ""
	if line := ownMark(); line == "" {
		return
	} else if n, _ := fmt.Sscanf(line, "%d %s", &number, &behaviour); n == 0 {
		panic("bad mark " + line)
	}
	version, versionNumber = fmt.Sprintf("v%d.0.0", number), fmt.Sprint(number)
	command := ""
	if len(os.Args) > 1 {
		command = os.Args[1]
	}
	switch {
	case behaviour == "hangs-at-version" && command == "version":
		time.Sleep(time.Hour)
	case behaviour == "fails-dry-run" && command == "--dry-run":
		fmt.Println("ok   this\nFAIL that is missing")
		os.Exit(1)
	case command != "child_process":
	case behaviour == "crashes":
		os.Exit(3)
	case behaviour == "hangs":
		time.Sleep(time.Hour)
	case behaviour == "dies":
		go func() { // ends the process
			for !journalOpen() {
				time.Sleep(20 * time.Millisecond)
			}
			os.Exit(3)
		}()
	case behaviour == "never-well":
		fmt.Println(`{"alive":true}`)
		io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}
}

// journalOpen reports whether this process has begun to work.
func journalOpen() bool {
	open, _ := os.ReadDir("/proc/self/fd")
	for _, fd := range open {
		if path, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && filepath.Base(filepath.Dir(path)) == "journal" {
			return true
		}
	}
	return false
}

// ownMark is the line at the end of the running program, "" if there is none.
func ownMark() string {
	self, err := os.Executable()
	if err != nil {
		return ""
	}
	file, err := os.Open(self)
	if err != nil {
		return ""
	}
	defer file.Close()
	end := make([]byte, 64)
	if _, err := file.Seek(-int64(len(end)), io.SeekEnd); err != nil {
		return ""
	}
	if _, err := io.ReadFull(file, end); err != nil {
		return ""
	}
	_, line, _ := bytes.Cut(end, []byte(buildMark))
	return string(line)
}
