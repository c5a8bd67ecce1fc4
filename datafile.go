package main

// datafile.go is a task's {task_id}.json (PROTOCOL section 6, item 2): how it comes to be in the job's working folder, and
// what may be there already.

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// writeDataFile writes a task's {task_id}.json, mode 0600, by way of a spare file where it can: rest takes that back when
// the name is gone. A file of that name is only overwritten when it is one of ours: from an earlier attempt, or with the
// beginning of the very same data in it.
func (s *spareFiles) writeDataFile(path string, data []byte, again bool) (*spareFile, error) {
	op := fmt.Sprintf("write data file %q", path)
	if !filepath.IsLocal(filepath.Base(path)) {
		return nil, fail(codeDataFileWrite, op, errors.New("this system takes the name for a device"))
	}
	spare := s.take(filepath.Dir(path), data)
	err := s.place(spare, path, data)
	if errors.Is(err, fs.ErrExist) {
		if !again && !holdsBeginning(path, data) {
			s.rest(spare)
			return nil, fail(codeDataFile, op, errors.New("there is a file of this name already, and it is not the task's"))
		}
		// Removed rather than truncated: the path may have become a link.
		if err = os.Remove(path); err == nil {
			err = s.place(spare, path, data)
		}
	}
	if err != nil {
		s.rest(spare)
		return nil, fail(codeDataFileWrite, op, err)
	}
	return spare, nil
}

// place makes the file: the spare one, under its second name, or a new one where there is none or it cannot be had there.
func (s *spareFiles) place(spare *spareFile, path string, data []byte) error {
	if spare != nil {
		err := os.Link(spare.path, path)
		if err == nil || errors.Is(err, fs.ErrExist) {
			return err
		}
		s.refuse(filepath.Dir(path), err) // another disk, or one without links
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Close()); err != nil {
		os.Remove(path)
	}
	return err
}

// holdsBeginning reports whether path is a regular file with a beginning of data in it: what a crash leaves.
func holdsBeginning(path string, data []byte) bool {
	info, err := os.Lstat(path)
	if err != nil || !info.Mode().IsRegular() || info.Size() > int64(len(data)) {
		return false
	}
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, int64(len(data))))
	return err == nil && bytes.HasPrefix(data, content)
}
