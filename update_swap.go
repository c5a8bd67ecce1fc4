package main

// update_swap.go puts a proven version in the binary's place. At every moment there is a whole program under the binary's
// name; the one before stays beside it with the ending .old (PROTOCOL section 11).

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// updateFile is where the new version of a binary waits.
func updateFile(program string) string { return beside(program, ".new") }

// previousFile is where the one before stays.
func previousFile(program string) string { return beside(program, ".old") }

// swapBinary puts the file of the new version in the program's place.
func swapBinary(program string) error {
	next, previous := updateFile(program), previousFile(program)
	if err := setAside(program, previous); err != nil {
		return failUpdate(fmt.Sprintf("keep %s as %s", program, previous), err)
	}
	if err := os.Rename(next, program); err != nil {
		return failUpdate(fmt.Sprintf("put %s in the place of %s", next, program), errors.Join(err, putBack(previous, program)))
	}
	if err := syncFolder(filepath.Dir(program)); err != nil {
		return failUpdate("write the folder of "+program, err)
	}
	return nil
}

// copyProgram is for file systems without links.
func copyProgram(from, to string) error {
	source, err := os.Open(from)
	if err != nil {
		return err
	}
	defer source.Close()
	info, err := source.Stat()
	if err != nil {
		return err
	}
	target, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, info.Mode().Perm())
	if err != nil {
		return err
	}
	_, err = io.Copy(target, source)
	if err = errors.Join(err, target.Sync(), target.Close()); err != nil {
		return errors.Join(err, os.Remove(to))
	}
	return nil
}

// removeIfThere removes a file that need not be there.
func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
