package main

import (
	"bytes"
	"debug/buildinfo"
	"debug/elf"
	"debug/macho"
	"debug/pe"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// TestBuild runs build.sh: the binary needs nothing beside it, knows its version, and is the same from any folder.
func TestBuild(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("build.sh needs a shell")
	}
	t.Parallel()
	binary := buildRelease(t, ".", "VERSION=v9.8.7", "NUMBER=987", "COMMIT=abcdef")
	checkAlone(t, binary)
	out, err := exec.Command(binary, "version").Output()
	if want := fmt.Sprintf("job_item v9.8.7 (number 987, commit abcdef, %s, %s/%s)\n",
		runtime.Version(), runtime.GOOS, runtime.GOARCH); err != nil || string(out) != want {
		t.Errorf("version: %q, %v; want %q", out, err, want)
	}

	elsewhere := t.TempDir()
	var files []string
	for _, pattern := range []string{"*.go", "*.s", "*.html", "go.mod", "go.sum", "build.sh"} {
		found, err := filepath.Glob(pattern)
		if err != nil || len(found) == 0 {
			t.Fatalf("glob %s: %v, %v", pattern, found, err)
		}
		files = append(files, found...)
	}
	for _, name := range files {
		content, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(elsewhere, name), content, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	same := buildRelease(t, elsewhere, "VERSION=v9.8.7", "NUMBER=987", "COMMIT=abcdef")
	if !sameContent(t, binary, same) {
		t.Error("another folder gives another binary: ./release.sh --check would not do")
	}
	if other := buildRelease(t, elsewhere, "VERSION=v9.8.7", "NUMBER=987", "COMMIT=abcdee"); sameContent(t, binary, other) {
		t.Error("another commit gives the same binary")
	}
}

// TestDist looks at what release.sh has built; it runs the test.
func TestDist(t *testing.T) {
	dist := os.Getenv("JOB_ITEM_DIST")
	if dist == "" {
		t.Skip("JOB_ITEM_DIST names no folder")
	}
	binaries, err := filepath.Glob(filepath.Join(dist, "job_item-*"))
	if err != nil || len(binaries) == 0 {
		t.Fatalf("binaries in %q: %v, %v", dist, binaries, err)
	}
	for _, binary := range binaries {
		info := checkAlone(t, binary)
		system := setting(info, "GOOS") + "-" + setting(info, "GOARCH")
		if arm := setting(info, "GOARM"); arm != "" {
			system += "v" + arm
		}
		if name := strings.TrimSuffix(filepath.Base(binary), ".exe"); !strings.HasSuffix(name, "-"+system) {
			t.Errorf("%s is for %s", binary, system)
		}
	}
}

// buildRelease runs folder's build.sh with these variables and gives the binary.
func buildRelease(t *testing.T, folder string, env ...string) string {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "job_item")
	script, err := filepath.Abs(filepath.Join(folder, "build.sh"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", script)
	cmd.Env = append(append(os.Environ(), "OUT="+binary, "GOFLAGS="), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build.sh: %v\n%s", err, out)
	}
	return binary
}

// checkAlone fails if the program needs anything that its system does not bring along: no C code, no loader, no shared
// library. macOS and Windows have no other way into the kernel than their own libraries.
func checkAlone(t *testing.T, path string) *buildinfo.BuildInfo {
	t.Helper()
	info, err := buildinfo.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if setting(info, "CGO_ENABLED") != "0" {
		t.Errorf("%s is built with C code", path)
	}
	var needs []string
	switch system := setting(info, "GOOS"); system {
	case "darwin":
		file, err := macho.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		libraries, err := file.ImportedLibraries()
		if err != nil {
			t.Fatal(err)
		}
		for _, library := range libraries {
			if !strings.HasPrefix(library, "/usr/lib/") && !strings.HasPrefix(library, "/System/Library/") {
				needs = append(needs, library)
			}
		}
	case "windows":
		file, err := pe.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		symbols, err := file.ImportedSymbols()
		if err != nil {
			t.Fatal(err)
		}
		for _, symbol := range symbols { // as in "ExitProcess:kernel32.dll"
			if _, library, _ := strings.Cut(symbol, ":"); !strings.EqualFold(library, "kernel32.dll") {
				needs = append(needs, library)
			}
		}
	default:
		file, err := elf.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		for _, part := range file.Progs {
			if part.Type == elf.PT_INTERP || part.Type == elf.PT_DYNAMIC {
				needs = append(needs, part.Type.String())
			}
		}
	}
	if len(needs) > 0 {
		t.Errorf("%s needs %q", path, needs)
	}
	return info
}

// setting is what the build was set to, "" if it does not say.
func setting(info *buildinfo.BuildInfo, key string) string {
	for _, s := range info.Settings {
		if s.Key == key {
			return s.Value
		}
	}
	return ""
}

func sameContent(t *testing.T, a, b string) bool {
	t.Helper()
	one, err := os.ReadFile(a)
	if err != nil {
		t.Fatal(err)
	}
	two, err := os.ReadFile(b)
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Equal(one, two)
}
