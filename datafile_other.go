//go:build !linux

package main

// spareFiles are Linux's.
type spareFiles struct{}

type spareFile struct{ path string }

func openSpareFiles(string) *spareFiles { return nil }

func (*spareFiles) close() {}

func (*spareFiles) take(string, []byte) *spareFile { return nil }

func (*spareFiles) refuse(string, error) {}

func (*spareFiles) rest(*spareFile) {}
