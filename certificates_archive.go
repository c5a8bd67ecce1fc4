package main

// certificates_archive.go unpacks the TLS files that a manager hands out as a zip. The archive is a stranger's: it is
// checked whole, in memory, before anything is written, and only certificates, keys and the like are written at all, so
// that nobody's program or configuration can be among what it brings or replaces.

import (
	"archive/zip"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

const (
	maxArchiveEntries   = 100
	maxUnpackedBytes    = 16 << 20
	maxArchiveNameBytes = 255 // of a whole name in the archive

	// unpackPrefix begins the name of the folder in which files wait for their place.
	unpackPrefix = ".job_item-unpack-"
)

// certificateExtensions are the files that TLS is made of. Nothing runs, configures or imports a file named like this.
var certificateExtensions = []string{
	".crt", ".cer", ".pem", ".key", ".der", ".ca", ".crl", ".csr", ".srl", ".p7b", ".p8", ".p12", ".pfx", ".jks",
}

// A certificateFile is one file of an archive.
type certificateFile struct {
	name    string // local, with slashes
	content []byte
}

// readCertificateArchive checks and unpacks an archive in memory. leftOut names the entries that are no TLS files. An
// error refuses the archive whole.
func readCertificateArchive(archive []byte) (files []certificateFile, leftOut []string, err error) {
	// The directory of an archive is read before its entries can be counted, so a hostile one is told by its marks.
	if bytes.Count(archive, []byte("PK\x01\x02")) > 10*maxArchiveEntries {
		return nil, nil, fmt.Errorf("more than %d entries", maxArchiveEntries)
	}
	reader, err := zip.NewReader(bytes.NewReader(archive), int64(len(archive)))
	if err != nil {
		return nil, nil, fmt.Errorf("not a zip archive: %w", err)
	}
	if len(reader.File) > maxArchiveEntries {
		return nil, nil, fmt.Errorf("%d entries are more than %d", len(reader.File), maxArchiveEntries)
	}
	names := archiveNames{}
	room := int64(maxUnpackedBytes)
	for _, entry := range reader.File {
		if err := names.add(entry); err != nil {
			return nil, nil, fmt.Errorf("entry %q: %w", shortened(entry.Name), err)
		}
		content, err := unpackEntry(entry, room)
		if err != nil {
			return nil, nil, fmt.Errorf("entry %q: %w", shortened(entry.Name), err)
		}
		room -= int64(len(content))
		switch {
		case entry.Mode().IsDir(): // made where a file needs it
		case isCertificateName(entry.Name):
			files = append(files, certificateFile{entry.Name, content})
		default:
			leftOut = append(leftOut, entry.Name)
		}
	}
	if len(files) == 0 {
		return nil, nil, fmt.Errorf("no certificate or key in it (%s)", strings.Join(certificateExtensions, " "))
	}
	return files, leftOut, nil
}

// isCertificateName reports whether a file is one of TLS. Hidden files are notes of the system that made the archive.
func isCertificateName(name string) bool {
	hidden := slices.ContainsFunc(strings.Split(name, "/"), func(part string) bool {
		return part[0] == '.' || part == "__MACOSX"
	})
	return !hidden && slices.Contains(certificateExtensions, strings.ToLower(path.Ext(name)))
}

// archiveNames are the names that an archive has used, folded as systems that ignore case do: true for files.
type archiveNames map[string]bool

// add checks an entry's kind and name on its own and beside those before it.
func (names archiveNames) add(entry *zip.File) error {
	switch mode := entry.Mode(); {
	case mode&fs.ModeSymlink != 0:
		return errors.New("it is a link")
	case !mode.IsRegular() && !mode.IsDir():
		return errors.New("it is neither a file nor a folder")
	case entry.Flags&1 != 0:
		return errors.New("it is encrypted")
	case entry.Method != zip.Store && entry.Method != zip.Deflate:
		return fmt.Errorf("it is packed in an unknown way, %d", entry.Method)
	}
	name := strings.TrimSuffix(entry.Name, "/")
	if err := checkArchiveName(name); err != nil {
		return err
	}
	folded := strings.ToLower(name)
	if _, twice := names[folded]; twice {
		return errors.New("there are two of that name")
	}
	names[folded] = !entry.Mode().IsDir()
	for other, isFile := range names {
		if isFile && strings.HasPrefix(folded, other+"/") || names[folded] && strings.HasPrefix(other, folded+"/") {
			return errors.New("it is a file and a folder at once")
		}
	}
	return nil
}

// checkArchiveName refuses what is not, on every system, a plain name below the folder.
func checkArchiveName(name string) error {
	switch {
	case name == "" || len(name) > maxArchiveNameBytes || !utf8.ValidString(name):
		return fmt.Errorf("want a name in UTF-8 of 1 to %d bytes", maxArchiveNameBytes)
	case strings.ContainsFunc(name, unicode.IsControl):
		return errors.New("its name has control characters")
	case strings.ContainsAny(name, `\:*?"<>|`):
		return errors.New(`its name has one of \ : * ? " < > |`)
	case !filepath.IsLocal(filepath.FromSlash(name)):
		return errors.New("it would land outside of the folder")
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == "" || part == "." || part == ".." {
			return errors.New("it would land outside of the folder")
		}
		// Windows drops these, and the name is another one's.
		if strings.TrimRight(part, ". ") != part {
			return errors.New("its name ends in a dot or a space")
		}
	}
	return nil
}

// unpackEntry reads an entry of at most room bytes, counted as they come: what its header says proves nothing.
func unpackEntry(entry *zip.File, room int64) ([]byte, error) {
	content, err := entry.Open()
	if err != nil {
		return nil, err
	}
	defer content.Close()
	data, err := io.ReadAll(io.LimitReader(content, room+1))
	switch {
	case int64(len(data)) > room:
		return nil, fmt.Errorf("the archive holds more than %d MiB unpacked", maxUnpackedBytes>>20)
	case err != nil:
		return nil, err
	case entry.Mode().IsDir() && len(data) > 0:
		return nil, errors.New("a folder with content")
	}
	return data, nil
}

// placeCertificates writes files into a folder, 0600 in folders of 0700, and gives the number of those that were not
// there in the same words. All of them are written beside their places before the first is renamed into its own; other
// files stay. protected files are never replaced.
func placeCertificates(dir string, files []certificateFile, protected ...string) (changed int, err error) {
	dir = filepath.Clean(dir)
	var fresh []certificateFile
	for _, file := range files {
		target := filepath.Join(dir, filepath.FromSlash(file.name))
		if slices.ContainsFunc(protected, func(p string) bool { return p != "" && strings.EqualFold(p, target) }) {
			return 0, fmt.Errorf("%s is not the manager's to replace", target)
		}
		same, err := checkPlace(dir, target, file.content)
		if err != nil {
			return 0, err
		}
		if !same {
			fresh = append(fresh, file)
		}
	}
	if len(fresh) == 0 {
		return 0, nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return 0, err
	}
	removeLeftovers(dir)
	waiting, err := os.MkdirTemp(dir, unpackPrefix)
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(waiting)
	for i, file := range fresh {
		if err := writeSynced(filepath.Join(waiting, fmt.Sprint(i)), file.content); err != nil {
			return 0, err
		}
	}
	for i, file := range fresh {
		target := filepath.Join(dir, filepath.FromSlash(file.name))
		err := os.MkdirAll(filepath.Dir(target), 0o700)
		if err == nil {
			err = os.Rename(filepath.Join(waiting, fmt.Sprint(i)), target)
		}
		if err == nil {
			err = syncFolder(filepath.Dir(target))
		}
		if err != nil {
			return i, err
		}
	}
	return len(fresh), nil
}

// checkPlace looks at what is at a file's place below dir: nothing, a file, which may be the same, or what is in the
// way. A link among the folders would lead out of dir.
func checkPlace(dir, target string, content []byte) (same bool, err error) {
	for folder := filepath.Dir(target); folder != dir; folder = filepath.Dir(folder) {
		info, err := os.Lstat(folder)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return false, err
		case !info.IsDir():
			return false, fmt.Errorf("%s is not a folder", folder)
		}
	}
	info, err := os.Lstat(target)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case err != nil:
		return false, err
	case info.IsDir():
		return false, fmt.Errorf("%s is a folder", target)
	case !info.Mode().IsRegular() || info.Size() != int64(len(content)):
		return false, nil
	}
	present, err := readBounded(target, maxUnpackedBytes)
	if err != nil || !bytes.Equal(present, content) {
		return false, nil
	}
	// In a folder that cannot be written, somebody else has put it there, and decides who may read it.
	_ = os.Chmod(target, 0o600)
	return true, nil
}

// removeLeftovers removes what an unpacking left that the end of its process interrupted, long ago: another worker may
// be unpacking just now.
func removeLeftovers(dir string) {
	entries, _ := os.ReadDir(dir)
	for _, entry := range entries {
		info, err := entry.Info()
		if err == nil && strings.HasPrefix(entry.Name(), unpackPrefix) && time.Since(info.ModTime()) > time.Hour {
			_ = os.RemoveAll(filepath.Join(dir, entry.Name()))
		}
	}
}

func writeSynced(path string, content []byte) error {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = file.Write(content)
	return errors.Join(err, file.Sync(), file.Close())
}
