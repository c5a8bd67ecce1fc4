//go:build !linux

package main

import "os"

// A dataSyncedFile is synced as a whole, where there is no call for less.
type dataSyncedFile struct{ *os.File }
