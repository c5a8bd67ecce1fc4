package main

// certificates_archive_test.go opens the archives in which a manager hands out the files of TLS, most of them hostile
// here.

import (
	"archive/zip"
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// A zipEntry is one entry of an archive made by makeZip.
type zipEntry struct {
	name    string
	content string
	mode    fs.FileMode
	edit    func(*zip.FileHeader)
}

func makeZip(t testing.TB, entries ...zipEntry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := zip.NewWriter(&b)
	for _, e := range entries {
		header := &zip.FileHeader{Name: e.name, Method: zip.Deflate}
		if strings.HasSuffix(e.name, "/") {
			header.Method = zip.Store
		}
		if e.mode != 0 {
			header.SetMode(e.mode)
		}
		if e.edit != nil {
			e.edit(header)
		}
		entry, err := w.CreateHeader(header)
		if err == nil {
			_, err = io.WriteString(entry, e.content)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func plainEntry(name string) zipEntry { return zipEntry{name: name, content: "content of " + name} }

// manyEntries are n entries with names of their own.
func manyEntries(n int) []zipEntry {
	var entries []zipEntry
	for i := range n {
		entries = append(entries, plainEntry(fmt.Sprintf("%d.crt", i)))
	}
	return entries
}

func TestCertificateArchivesRefused(t *testing.T) {
	t.Parallel() // beside those that wait
	f := newFakeManager(t, "project-1")
	f.change(func(f *fakeManager) { f.connection = secureNATS("tls/nats/ca.crt") })
	cfg := managedConfig(t, f, minimalConfig)
	putFiles(t, cfg.Dir, map[string][]byte{"tls/nats/ca.crt": []byte("old"), "tls/nats/client.crt": []byte("old too")})
	before := tree(t, cfg.Dir)

	good := makeZip(t, plainEntry("ca.crt"), plainEntry("client.crt"))
	damaged := bytes.Replace(good, []byte("PK\x01\x02"), []byte("PK\x01\x03"), 1)
	wrongSum := bytes.Clone(makeZip(t, zipEntry{name: "ca.crt", content: "stored", edit: func(h *zip.FileHeader) { h.Method = zip.Store }}))
	wrongSum[bytes.Index(wrongSum, []byte("stored"))] = 'S'
	// The header of a bomb that says that it is small.
	liar := makeZip(t, zipEntry{name: "ca.crt", content: strings.Repeat("\x00", maxUnpackedBytes+1)})
	for _, row := range []struct {
		what    string
		archive []byte
		part    string
	}{
		{"nothing", []byte{}, "not a zip"},
		{"text", []byte(`{"error":"no"}`), "not a zip"},
		{"empty archive", makeZip(t), "no certificate or key"},
		{"no certificate", makeZip(t, plainEntry("readme.txt"), plainEntry("ca.crt.exe")), "no certificate or key"},
		{"damaged directory", damaged, "not a zip"},
		{"torn", good[:len(good)-10], "not a zip"},
		{"wrong sum", wrongSum, "checksum"},
		{"up", makeZip(t, plainEntry("ca.crt"), plainEntry("../evil.crt")), "outside of the folder"},
		{"up later", makeZip(t, plainEntry("a/../../evil.crt")), "outside of the folder"},
		{"up and down", makeZip(t, plainEntry("a/../ca.crt")), "outside of the folder"},
		{"dot", makeZip(t, plainEntry("./ca.crt")), "outside of the folder"},
		{"dots", makeZip(t, plainEntry(".."), plainEntry("ca.crt")), "outside of the folder"},
		{"empty part", makeZip(t, plainEntry("a//ca.crt")), "outside of the folder"},
		{"absolute", makeZip(t, plainEntry("/tmp/evil.crt")), "outside of the folder"},
		{"drive", makeZip(t, plainEntry("C:/evil.crt")), "its name has one of"},
		{"drive, relative", makeZip(t, plainEntry("C:evil.crt")), "its name has one of"},
		{"stream", makeZip(t, plainEntry("ca.crt:evil.crt")), "its name has one of"},
		{"backslash", makeZip(t, plainEntry(`..\evil.crt`)), "its name has one of"},
		{"network", makeZip(t, plainEntry(`\\server\evil.crt`)), "its name has one of"},
		{"NUL", makeZip(t, plainEntry("ca.crt\x00.txt")), "control characters"},
		{"no name", makeZip(t, zipEntry{name: ""}), "want a name"},
		{"no UTF-8", makeZip(t, zipEntry{name: "\xff.crt", edit: func(h *zip.FileHeader) { h.NonUTF8 = true }}), "want a name in UTF-8"},
		{"long name", makeZip(t, plainEntry(strings.Repeat("n", 252)+".crt")), "want a name"},
		{"dot at the end", makeZip(t, plainEntry("ca.crt.")), "ends in a dot"},
		{"space at the end", makeZip(t, plainEntry("a /ca.crt")), "ends in a dot or a space"},
		{"link", makeZip(t, zipEntry{name: "ca.crt", content: "/etc/passwd", mode: fs.ModeSymlink | 0o777}), "it is a link"},
		{"link as a folder", makeZip(t, zipEntry{name: "a", content: "/tmp", mode: fs.ModeSymlink | 0o777}, plainEntry("a/ca.crt")),
			"it is a link"},
		{"device", makeZip(t, zipEntry{name: "ca.crt", mode: fs.ModeDevice | 0o600}), "neither a file nor a folder"},
		{"pipe", makeZip(t, zipEntry{name: "ca.crt", mode: fs.ModeNamedPipe | 0o600}), "neither a file nor a folder"},
		{"socket", makeZip(t, zipEntry{name: "ca.crt", mode: fs.ModeSocket | 0o600}), "neither a file nor a folder"},
		{"twice", makeZip(t, plainEntry("ca.crt"), plainEntry("ca.crt")), "two of that name"},
		{"twice but for case", makeZip(t, plainEntry("ca.crt"), plainEntry("CA.CRT")), "two of that name"},
		{"file as a folder", makeZip(t, plainEntry("ca.crt"), plainEntry("CA.crt/x.crt")), "a file and a folder"},
		{"folder as a file", makeZip(t, plainEntry("a.crt/x.crt"), plainEntry("a.crt")), "a file and a folder"},
		{"encrypted", makeZip(t, zipEntry{name: "ca.crt", edit: func(h *zip.FileHeader) { h.Flags |= 1 }}), "encrypted"},
		{"unknown method", bytes.ReplaceAll(makeZip(t, zipEntry{name: "ca.crt", edit: func(h *zip.FileHeader) { h.Method = 0 }}),
			[]byte("\x14\x00\x08\x00\x00\x00"), []byte("\x14\x00\x08\x00\x63\x00")), "unknown way"},
		{"101 entries", makeZip(t, manyEntries(101)...), "more than 100"},
		{"5,000 entries", makeZip(t, manyEntries(5000)...), "more than 100"},
		{"bomb", makeZip(t, zipEntry{name: "ca.crt", content: strings.Repeat("0", 64<<20)}), "more than 16 MiB"},
		{"two halves of a bomb", makeZip(t, zipEntry{name: "a.crt", content: strings.Repeat("0", 9<<20)},
			zipEntry{name: "no-certificate", content: strings.Repeat("0", 9<<20)}), "more than 16 MiB"},
		{"one byte too many", liar, "more than 16 MiB"},
	} {
		f.change(func(f *fakeManager) { f.zip = row.archive })
		err := fetchInto(t, f, cfg)
		if err == nil {
			t.Errorf("%s: not refused", row.what)
			continue
		}
		wantError(t, err, codeCertificateArchive, row.part)
		if after := tree(t, cfg.Dir); !reflect.DeepEqual(after, before) {
			t.Fatalf("%s: the folder holds %q; want it as before", row.what, slices.Sorted(maps.Keys(after)))
		}
	}
	f.change(func(f *fakeManager) { f.zip = bytes.Repeat([]byte("PK"), maxArchiveBytes/2+1) })
	wantError(t, fetchInto(t, f, cfg), codeManagerAway, "larger than 32 MiB")
	// At the bounds all is well.
	f.change(func(f *fakeManager) {
		f.zip = makeZip(t, append(manyEntries(99), zipEntry{name: "big.pem", content: strings.Repeat("0", 15<<20)})...)
	})
	if err := fetchInto(t, f, cfg); err != nil {
		t.Error(err)
	}
}

func FuzzZip(f *testing.F) {
	f.Add(makeZip(f, plainEntry("ca.crt"), zipEntry{name: "sub/"}, plainEntry("sub/client.key")))
	f.Add(makeZip(f, plainEntry("../evil.crt")))
	f.Add(makeZip(f, plainEntry("/evil.crt"), plainEntry(`..\evil.crt`), plainEntry("C:evil.crt")))
	f.Add(makeZip(f, zipEntry{name: "a.pem", content: "/", mode: fs.ModeSymlink}, plainEntry("a.pem/x.pem")))
	f.Add(makeZip(f, plainEntry("a.crt"), plainEntry("A.CRT"), plainEntry("a.crt/b.crt")))
	f.Add(makeZip(f, zipEntry{name: "big.pem", content: strings.Repeat("0", 1<<20)}))
	f.Fuzz(func(t *testing.T, archive []byte) {
		files, leftOut, err := readCertificateArchive(archive)
		if err != nil {
			if len(files)+len(leftOut) > 0 {
				t.Errorf("files beside the error %v", err)
			}
			return
		}
		var size int
		for _, file := range files {
			size += len(file.content)
		}
		if size > maxUnpackedBytes || len(files)+len(leftOut) > maxArchiveEntries {
			t.Fatalf("%d files of %d bytes", len(files)+len(leftOut), size)
		}
		root := t.TempDir()
		dir := filepath.Join(root, "a", "b")
		changed, err := placeCertificates(dir, files)
		if err != nil {
			t.Fatalf("%d of %d placed: %v", changed, len(files), err) // all that can go wrong has been checked
		}
		found := 0
		for name, content := range tree(t, root) {
			switch {
			case name == "a" || name == "a/b":
			case !strings.HasPrefix(name, "a/b/"):
				t.Errorf("%q is outside of the folder", name)
			case !strings.HasPrefix(content, "d"):
				found++
			}
		}
		for _, file := range files {
			got, err := os.ReadFile(filepath.Join(dir, filepath.FromSlash(file.name)))
			if err != nil || !bytes.Equal(got, file.content) {
				t.Errorf("%q holds other content, %v", file.name, err)
			}
		}
		if again, err := placeCertificates(dir, files); err != nil || again != 0 {
			t.Errorf("the second time %d are new, %v", again, err)
		}
	})
}
