package main

// program.go finds the file that a command's first word means, as execvp would with the command's own PATH and folder.

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

var (
	errNotExecutable = errors.New("it may not be executed")
	errIsFolder      = errors.New("it is a folder")
)

// lookProgram gives the absolute path of the program name. A name with a slash counts from dir; any other is looked up
// in the PATH of env, whose empty and relative elements count from dir too. An empty dir is the worker's own, a nil env
// the worker's own. The error (codeExec) says where it was looked for and what to do.
func lookProgram(name, dir string, env []string) (string, error) {
	op := fmt.Sprintf("find program %q", name)
	if name == "" {
		return "", execError(op, errors.New("the name is empty"), "the command must begin with a program")
	}
	if filepath.Base(name) != name {
		path, err := findProgram(dir, name, env)
		if err != nil {
			return "", execError(op, err, programHint(err, "correct the path: it counts from the working folder"))
		}
		return path, nil
	}
	searchPath := searchPathOf(env)
	elements := filepath.SplitList(searchPath)
	if len(elements) == 0 {
		elements = []string{""}
	}
	var unusable error // as execvp: a later element may do better
	for _, element := range elements {
		path, err := findProgram(dir, filepath.Join(element, name), env)
		if err == nil {
			return path, nil
		}
		absent := errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) || errors.Is(err, errIsFolder)
		if unusable == nil && !absent {
			unusable = err
		}
	}
	if unusable != nil {
		return "", execError(op, unusable, programHint(unusable, ""))
	}
	return "", execError(op, fmt.Errorf("it is not in PATH %q", searchPath),
		"install it, write its full path, or set PATH in the job's env")
}

// findProgram checks the file at path, which counts from dir.
func findProgram(dir, path string, env []string) (string, error) {
	if !filepath.IsAbs(path) {
		path = filepath.Join(dir, path)
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	for _, file := range programFiles(path, env) {
		if err = checkProgram(file); err == nil {
			return file, nil
		}
	}
	if errors.Is(err, errNotExecutable) || errors.Is(err, errIsFolder) {
		err = fmt.Errorf("%q: %w", path, err)
	}
	return "", err
}

func programHint(err error, otherwise string) string {
	if errors.Is(err, errNotExecutable) {
		return "chmod +x it, or check that its disk is not mounted noexec"
	}
	return otherwise
}

// searchPathOf is the PATH in env, of several the last.
func searchPathOf(env []string) string {
	if env == nil {
		env = os.Environ()
	}
	for i := len(env) - 1; i >= 0; i-- {
		if name, value, _ := strings.Cut(env[i], "="); sameEnvName(name, "PATH") {
			return value
		}
	}
	return defaultSearchPath
}
