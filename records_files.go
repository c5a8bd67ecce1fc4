package main

// records_files.go owns what lies in a task's folder beside its log: data too large for a line, notifications, the
// result and uploaded files. A folder comes into being with the first of them. Everything read back is bounded, and
// left out where it does not parse.

import (
	"bufio"
	"encoding/base32"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Bounds of what one task may keep.
const (
	maxDataBytes     = 16 << 20
	maxResultBytes   = 16 << 20
	maxNotifBytes    = 102_400 // of one message
	notifFileBytes   = 1 << 20 // then a new file is begun; two are kept
	maxTaskFiles     = 100
	maxTaskFileBytes = 1 << 30 // all files together
	maxFileName      = 255     // bytes
)

// Names in a task's folder.
const (
	dataFile     = "data.json"
	resultFile   = "result.json"
	notifFile    = "notifications.jsonl"
	notifOldFile = "notifications.old.jsonl"
	filesFolder  = "files"
)

var (
	errTaskID       = errors.New("not a task id: 1 to 128 of A-Z a-z 0-9 . _ -, no dot first")
	errTaskUnknown  = errors.New("no such task")
	errNotKept      = errors.New("there is none")
	errFileName     = errors.New("not a file name that can be kept")
	errTooLarge     = errors.New("too large")
	errTooManyFiles = fmt.Errorf("the task has %d files, which is the limit", maxTaskFiles)
	errNotJSON      = errors.New("not JSON")
)

// A recordDetail says how much of a folder a record shows.
type recordDetail struct {
	notifications int // the last ones
	notifBytes    int
	resultBytes   int64
}

var (
	detailFull = recordDetail{notifications: 100_000, notifBytes: 2 * notifFileBytes, resultBytes: maxResultBytes}
	detailList = recordDetail{notifications: 10, notifBytes: 4 << 10, resultBytes: 16 << 10}
)

// saveResult keeps what a task hands in as its result, in place of an earlier one.
func (r *records) saveResult(id string, result json.RawMessage) error {
	switch {
	case !r.known(id):
		return r.unknown(id)
	case len(result) > maxResultBytes:
		return tooLargeToKeep("save result of task "+id, errTooLarge)
	case !json.Valid(result):
		return fail(codeRecordResult, "save result of task "+id, errNotJSON)
	}
	return r.writeFolderFile(id, resultFile, result)
}

// saveFile keeps a file that a task hands in, in place of an earlier one of that name, and gives its size. It is there
// whole or not at all.
func (r *records) saveFile(id, name string, content io.Reader) (size int64, err error) {
	op := fmt.Sprintf("save file %q of task %s", name, id)
	if !r.known(id) {
		return 0, r.unknown(id)
	}
	if !keepableName(name) {
		return 0, fail(codeRecordFileName, op, errFileName)
	}
	size, err = r.storeUpload(id, name, content)
	switch {
	case errors.Is(err, errTooLarge), errors.Is(err, errTooManyFiles):
		return 0, tooLargeToKeep(op, err)
	case err != nil:
		return 0, fail(codeRecordFile, op, err)
	}
	return size, nil
}

// storeUpload writes an upload beside the task's files, and makes it one of them if it is within the bounds.
func (r *records) storeUpload(id, name string, content io.Reader) (size int64, err error) {
	if err := r.makeFolder(id); err != nil {
		return 0, err
	}
	folder := r.folder(id)
	upload, err := os.CreateTemp(folder, "upload-*")
	if err != nil {
		return 0, err
	}
	defer os.Remove(upload.Name()) // nothing once it has been renamed
	size, err = io.Copy(upload, io.LimitReader(content, maxTaskFileBytes+1))
	if err = errors.Join(err, upload.Close()); err != nil {
		return 0, err
	}

	r.filesMu.Lock()
	defer r.filesMu.Unlock()
	count, total := 1, size
	for _, file := range taskFiles(folder) {
		if file.Name != name {
			count, total = count+1, total+file.Size
		}
	}
	switch {
	case total > maxTaskFileBytes:
		return 0, errTooLarge
	case count > maxTaskFiles:
		return 0, errTooManyFiles
	}
	files := filepath.Join(folder, filesFolder)
	if err := os.MkdirAll(files, 0o700); err != nil {
		return 0, err
	}
	return size, os.Rename(upload.Name(), filepath.Join(files, name))
}

// openFile opens a file that a task handed in.
func (r *records) openFile(id, name string) (*os.File, error) {
	op := fmt.Sprintf("open file %q of task %s", name, id)
	if !r.known(id) {
		return nil, r.unknown(id)
	}
	path := filepath.Join(r.folder(id), filesFolder, name)
	if !keepableName(name) {
		return nil, notKept(op)
	}
	if info, err := os.Lstat(path); err != nil || !info.Mode().IsRegular() {
		return nil, notKept(op)
	}
	file, err := os.Open(path)
	if err != nil {
		return nil, unreadable(op, err)
	}
	return file, nil
}

func tooLargeToKeep(op string, err error) error { return fail(codeRecordTooLarge, op, err) }
func notKept(op string) error                   { return fail(codeRecordNotKept, op, errNotKept) }
func unreadable(op string, err error) error     { return fail(codeRecordRead, op, err) }

// addNotification appends to a task's notifications; when there are too many the older ones go.
func (r *records) addNotification(id string, n notification) error {
	if !r.known(id) {
		return errTaskUnknown
	}
	if len(n.Msg) > maxNotifBytes {
		n.Msg = n.Msg[:maxNotifBytes]
	}
	line, err := json.Marshal(n)
	if err != nil {
		return err
	}
	if err := r.makeFolder(id); err != nil {
		return err
	}
	r.filesMu.Lock()
	defer r.filesMu.Unlock()
	path := filepath.Join(r.folder(id), notifFile)
	if info, err := os.Stat(path); err == nil && info.Size()+int64(len(line)) > notifFileBytes {
		if err := os.Rename(path, filepath.Join(r.folder(id), notifOldFile)); err != nil {
			return err
		}
	}
	file, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	_, err = file.Write(append(line, '\n'))
	return errors.Join(err, file.Close())
}

// addFolder completes a record with what lies in its folder, if it has one.
func (r *records) addFolder(rec *record, folder bool, detail recordDetail) {
	rec.Notifications, rec.Result, rec.Files = []notification{}, nil, []taskFile{}
	if !folder {
		return
	}
	dir := r.folder(rec.TaskID)
	rec.Files = append(rec.Files, taskFiles(dir)...)
	if info, err := os.Stat(filepath.Join(dir, resultFile)); err == nil && info.Size() <= detail.resultBytes {
		if result, err := r.readFolderFile(rec.TaskID, resultFile, maxResultBytes); err == nil && json.Valid(result) {
			rec.Result = result
		}
	}
	r.filesMu.Lock()
	all := append(readNotifications(filepath.Join(dir, notifOldFile)), readNotifications(filepath.Join(dir, notifFile))...)
	r.filesMu.Unlock()
	for bytes, i := 0, len(all)-1; i >= 0; i-- {
		bytes += len(all[i].Msg)
		if len(rec.Notifications) == detail.notifications || bytes > detail.notifBytes {
			break
		}
		rec.Notifications = append(rec.Notifications, all[i])
	}
	slices.Reverse(rec.Notifications)
}

func readNotifications(path string) []notification {
	file, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer file.Close()
	var all []notification
	lines := bufio.NewReader(io.LimitReader(file, 2*notifFileBytes))
	for {
		line, _, err := readLine(lines, maxRecordLine)
		if err != nil {
			return all
		}
		var n notification
		if json.Unmarshal(line, &n) == nil {
			all = append(all, n)
		}
	}
}

// taskFiles lists the files in a task's folder by name.
func taskFiles(folder string) []taskFile {
	entries, err := os.ReadDir(filepath.Join(folder, filesFolder))
	if err != nil {
		return nil
	}
	var files []taskFile
	for _, entry := range entries {
		if info, err := entry.Info(); err == nil && info.Mode().IsRegular() && len(files) < maxTaskFiles {
			files = append(files, taskFile{entry.Name(), info.Size()})
		}
	}
	return files
}

// writeFolderFile writes a file of a task's folder whole or not at all.
func (r *records) writeFolderFile(id, name string, content []byte) error {
	err := r.makeFolder(id)
	if err == nil {
		err = replaceFile(filepath.Join(r.folder(id), name), content)
	}
	if err != nil {
		return fail(codeRecordFolder, "write "+name+" of task "+id, err)
	}
	return nil
}

func replaceFile(path string, content []byte) error {
	temp, err := os.CreateTemp(filepath.Dir(path), "upload-*")
	if err != nil {
		return err
	}
	defer os.Remove(temp.Name()) // nothing once it has been renamed
	_, err = temp.Write(content)
	if err = errors.Join(err, temp.Close()); err != nil {
		return err
	}
	return os.Rename(temp.Name(), path)
}

func (r *records) readFolderFile(id, name string, limit int64) ([]byte, error) {
	op := "read " + name + " of task " + id
	file, err := os.Open(filepath.Join(r.folder(id), name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, notKept(op)
	}
	if err != nil {
		return nil, unreadable(op, err)
	}
	defer file.Close()
	content, err := io.ReadAll(io.LimitReader(file, limit+1))
	if err == nil && int64(len(content)) > limit {
		err = fmt.Errorf("longer than %d bytes", limit)
	}
	if err != nil {
		return nil, unreadable(op, err)
	}
	return content, nil
}

// makeFolder sees to it that a task has a folder, and that its record knows.
func (r *records) makeFolder(id string) error {
	if err := os.MkdirAll(r.folder(id), 0o700); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if t := r.live[id]; t != nil {
		t.folder.Store(true)
	} else if e := r.index.byID[id]; e != nil {
		e.folder = true
	}
	return nil
}

// folder is where a task's folder is, or would be.
func (r *records) folder(id string) string { return filepath.Join(r.dir, "tasks", folderName(id)) }

func (r *records) folderExists(id string) bool {
	info, err := os.Lstat(r.folder(id))
	return err == nil && info.IsDir()
}

// foldersOnDisk lists the tasks that have a folder.
func (r *records) foldersOnDisk() []string {
	entries, _ := os.ReadDir(filepath.Join(r.dir, "tasks"))
	var ids []string
	for _, entry := range entries {
		if id, ok := folderTask(entry.Name()); ok && entry.IsDir() {
			ids = append(ids, id)
		}
	}
	return ids
}

// removeOrphans removes folders that no record speaks of: of tasks that were given up elsewhere, and those that prune
// could not remove. An unfinished task may still come back to its folder, so it waits for as long as records stay.
func (r *records) removeOrphans() {
	r.mu.Lock()
	ours, oldest := r.ours, time.Now().Add(-max(r.retain.Age, 24*time.Hour))
	r.mu.Unlock()
	if !ours {
		return
	}
	for _, id := range r.foldersOnDisk() {
		info, err := os.Lstat(r.folder(id))
		if err == nil && info.ModTime().Before(oldest) && !r.known(id) {
			os.RemoveAll(r.folder(id))
		}
	}
}

// folderEncoding writes the ids that are no safe folder name everywhere. No id contains a tilde.
var folderEncoding = base32.NewEncoding("0123456789abcdefghijklmnopqrstuv").WithPadding(base32.NoPadding)

// folderName is the folder of a task: its id, except where a system would take two ids for one (upper case) or refuse
// the name (Windows).
func folderName(id string) string {
	if id == strings.ToLower(id) && !strings.HasSuffix(id, ".") && !reservedOnWindows(id) {
		return id
	}
	return "~" + folderEncoding.EncodeToString([]byte(id))
}

// folderTask is the reverse of folderName.
func folderTask(name string) (id string, ok bool) {
	id = name
	if encoded, isEncoded := strings.CutPrefix(name, "~"); isEncoded {
		decoded, err := folderEncoding.DecodeString(encoded)
		if err != nil {
			return "", false
		}
		id = string(decoded)
	}
	return id, validTaskID(id) && folderName(id) == name
}

// keepableName reports whether a file of that name can be kept on every system and under exactly that name.
func keepableName(name string) bool {
	if name == "" || len(name) > maxFileName || !utf8.ValidString(name) || reservedOnWindows(name) ||
		name[0] == '.' || strings.HasSuffix(name, ".") || strings.HasSuffix(name, " ") {
		return false
	}
	return !strings.ContainsFunc(name, func(c rune) bool {
		return unicode.IsControl(c) || strings.ContainsRune(`/\<>:"|?*`, c)
	})
}

// reservedOnWindows reports whether Windows takes the name for a device, whatever its ending.
func reservedOnWindows(name string) bool {
	stem, _, _ := strings.Cut(strings.ToUpper(name), ".")
	stem = strings.TrimRight(stem, " ")
	switch stem {
	case "CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$":
		return true
	}
	device, isPort := strings.CutPrefix(stem, "COM")
	if !isPort {
		device, isPort = strings.CutPrefix(stem, "LPT")
	}
	return isPort && utf8.RuneCountInString(device) == 1 && strings.ContainsAny(device, "0123456789¹²³")
}
