package main

import (
	"path/filepath"
	"syscall"
	"testing"
)

// TestWatchBindMount changes a file from the other end of a bind mount, as it is with a file mounted into a container.
func TestWatchBindMount(t *testing.T) {
	source := filepath.Join(t.TempDir(), "on-the-host.yaml")
	write(t, source, "old")
	path := configFolder(t, "underneath")
	if err := syscall.Mount(source, path, "", syscall.MS_BIND, ""); err != nil {
		t.Skip("bind mounts need root and a kernel that permits them:", err)
	}
	mounted := true
	t.Cleanup(func() {
		if mounted {
			syscall.Unmount(path, 0)
		}
	})
	w := newWatchTest(t, path)
	if string(w.text) != "old" {
		t.Fatalf("through the mount it reads %q", w.text)
	}
	write(t, source, "new")
	w.wantTaken("new")

	// Mounted anew, as when a container's file is swapped.
	if err := syscall.Unmount(path, 0); err != nil {
		t.Fatal(err)
	}
	mounted = false
	w.wantTaken("underneath")
}

// TestWatchPipe does not wait for a writer who never comes.
func TestWatchPipe(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if w := newConfigWatch(&Config{File: path, Dir: filepath.Dir(path)}); !w.once {
		t.Error("a pipe is watched")
	}
	w := newWatchTest(t, configFolder(t, "text"))
	w.keyFile = path
	if w.look(); !w.lastSeen.missing {
		t.Error("a pipe counts as a key")
	}
}
