package main

import (
	"errors"
	"os"
	"syscall"
)

// isBrokenPipe reports whether a write failed because nobody reads any more.
func isBrokenPipe(err error) bool {
	const errorNoData = syscall.Errno(232) // "the pipe is being closed"
	return errors.Is(err, errorNoData) || errors.Is(err, syscall.ERROR_BROKEN_PIPE)
}

// passSignal does nothing: what Windows tells us as a signal it tells every process of the console.
func passSignal(*os.Process, os.Signal) {}
