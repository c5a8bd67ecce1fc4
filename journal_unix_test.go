//go:build unix

package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

func init() {
	testRoles["journal-file-limit"] = journalFileLimitRole
}

// journalFileLimitRole runs into the system's limit on file sizes, and past it once that is lifted.
func journalFileLimitRole(args []string) int {
	j, _, err := openJournal(args[0])
	if err != nil {
		fmt.Println(err)
		return 1
	}
	defer j.close()
	var limit syscall.Rlimit
	err = syscall.Getrlimit(syscall.RLIMIT_FSIZE, &limit)
	narrow := limit
	narrow.Cur = 4000
	if err = errors.Join(err, syscall.Setrlimit(syscall.RLIMIT_FSIZE, &narrow)); err != nil {
		fmt.Println(err)
		return 1
	}
	data := bytes.Repeat([]byte("x"), 1000)
	for n := 0; err == nil; n++ {
		if err = j.accept(journalTask{ID: fmt.Sprint(n)}, data); err == nil {
			fmt.Println("accepted", n)
		}
	}
	if !errors.Is(err, syscall.EFBIG) || codeOf(err) != codeJournalWrite || j.writable() == nil {
		fmt.Println("at the limit:", err)
		return 1
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &limit); err != nil {
		fmt.Println(err)
		return 1
	}
	for deadline := time.Now().Add(10 * time.Second); j.writable() != nil && time.Now().Before(deadline); {
		time.Sleep(5 * time.Millisecond)
	}
	if err := j.accept(journalTask{ID: "after"}, data); err != nil {
		fmt.Println("after the limit:", err)
		return 1
	}
	return 0
}

func TestJournalFileLimit(t *testing.T) {
	self, err := os.Executable()
	must(t, err)
	dir := t.TempDir()
	if out, err := exec.Command(self, "test-role", "journal-file-limit", dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	j, tasks := mustOpenJournal(t, dir, defaultJournalSizes())
	data := string(bytes.Repeat([]byte("x"), 1000))
	assertTasks(t, j, tasks, map[string]string{"0": data, "1": data, "2": data, "after": data})
}
