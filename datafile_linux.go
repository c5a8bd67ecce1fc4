package main

// datafile_linux.go keeps files for data that is on disk for a moment only. Making and deleting a file is much of what a
// short task costs: some file systems look for a number that was not in use lately, and look long when thousands are
// deleted in a minute. So a file is kept in data_dir and lent out under a second name, as long as nobody can tell.

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
)

const (
	maxSpares     = 64       // at rest
	maxSpareBytes = 64 << 10 // longer data is written to a file of its own
)

// spareFiles are the files of one worker. Its methods may be called concurrently; a nil one has none.
type spareFiles struct {
	dir string

	mu      sync.Mutex // guards what follows
	made    int
	atRest  []*spareFile
	refused map[string]bool // folders that they have no second name in; "" is all of them
}

// A spareFile has mode 0600, and one name in a folder that nobody else may enter.
type spareFile struct {
	path string
	file *os.File
	made syscall.Stat_t
	size int64
}

// openSpareFiles begins with an empty folder in dir. What a crash has left there may still be the data file of a task, and
// lives on as that. Without such a folder there are no spare files.
func openSpareFiles(dir string) *spareFiles {
	s := &spareFiles{dir: filepath.Join(dir, "spare"), refused: map[string]bool{}}
	if os.RemoveAll(s.dir) != nil || os.Mkdir(s.dir, 0o700) != nil {
		return nil
	}
	return s
}

// close removes them. None may be lent out.
func (s *spareFiles) close() {
	if s == nil {
		return
	}
	for _, f := range s.atRest {
		f.file.Close()
	}
	os.RemoveAll(s.dir)
}

// take gives a file that holds just data, to be named in folder besides; nil: there is none for it.
func (s *spareFiles) take(folder string, data []byte) *spareFile {
	if s == nil || len(data) > maxSpareBytes {
		return nil
	}
	s.mu.Lock()
	if s.refused[folder] || s.refused[""] {
		s.mu.Unlock()
		return nil
	}
	var f *spareFile
	if last := len(s.atRest) - 1; last >= 0 {
		f, s.atRest = s.atRest[last], s.atRest[:last]
	} else {
		s.made++
	}
	number := s.made
	s.mu.Unlock()

	if f == nil {
		f = s.make(number)
	}
	if f != nil && !f.hold(data) {
		f.discard()
		f = nil
	}
	return f
}

func (s *spareFiles) make(number int) *spareFile {
	f := &spareFile{path: filepath.Join(s.dir, fmt.Sprint(number))}
	var err error
	if f.file, err = os.OpenFile(f.path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
		return nil
	}
	if f.made, err = f.stat(); err != nil {
		f.discard()
		return nil
	}
	return f
}

// hold replaces what the file holds.
func (f *spareFile) hold(data []byte) bool {
	if _, err := f.file.WriteAt(data, 0); err != nil {
		return false
	}
	if f.size > int64(len(data)) && f.file.Truncate(int64(len(data))) != nil {
		return false
	}
	f.size = int64(len(data))
	return true
}

// refuse notes that the files cannot be named in a folder, if that is what err says.
func (s *spareFiles) refuse(folder string, err error) {
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refused[folder] = true
}

// rest takes a file back that is not named in a folder any more. It is used again only if it is as it was made, and
// nobody else has it: under a name, or open.
func (s *spareFiles) rest(f *spareFile) {
	if f == nil {
		return
	}
	now, err := f.stat()
	unchanged := err == nil && now.Nlink == 1 && now.Mode == f.made.Mode && now.Uid == f.made.Uid && now.Gid == f.made.Gid
	if !unchanged || !s.isOurs(f) {
		f.discard()
		return
	}
	f.size = now.Size
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.atRest) == maxSpares {
		f.discard()
		return
	}
	s.atRest = append(s.atRest, f)
}

// isOurs reports whether nobody else has the file open: only then the kernel grants a lease for writing. Where it grants
// none at all the files are of no use.
func (s *spareFiles) isOurs(f *spareFile) bool {
	const setLease = 1024 // F_SETLEASE, see fcntl(2)
	lease := func(kind uintptr) syscall.Errno {
		_, _, errno := syscall.Syscall(syscall.SYS_FCNTL, f.file.Fd(), setLease, kind)
		return errno
	}
	errno := lease(syscall.F_WRLCK)
	if errno == 0 {
		return lease(syscall.F_UNLCK) == 0
	}
	if errno != syscall.EAGAIN {
		s.refuse("", errno)
	}
	return false
}

func (f *spareFile) stat() (st syscall.Stat_t, err error) {
	err = syscall.Fstat(int(f.file.Fd()), &st)
	return st, err
}

// discard lets go of the file. Under another name it lives on.
func (f *spareFile) discard() {
	os.Remove(f.path)
	f.file.Close()
}
