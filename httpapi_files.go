package main

// httpapi_files.go serves what a job hands in where the worker is its own manager: results and files, which need the
// key, and the files going out again. Files are passed on as they come and are never in memory.

import (
	"encoding/json"
	"errors"
	"io"
	"mime"
	"net/http"
	"strconv"
	"time"
)

// takeResult is POST /api/worker/job_record/result/{task_id}.
func (a *apiServer) takeResult(w http.ResponseWriter, r *http.Request) error {
	id, err := a.ownTask(r)
	if err != nil {
		return err
	}
	var result json.RawMessage
	if _, err := a.readJSON(w, r, maxResultBytes, &result); err != nil {
		return err
	}
	if err := a.records.Load().saveResult(id, result); err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, map[string]any{"status": "success", "task_id": id})
}

// takeFile is POST /api/worker/job_record/file/{task_id}. The form is read as it comes, so a file is never in memory.
func (a *apiServer) takeFile(w http.ResponseWriter, r *http.Request) error {
	id, err := a.ownTask(r)
	if err != nil {
		return err
	}
	if err := checkContentType(r, true); err != nil {
		return err
	}
	control := http.NewResponseController(w)
	r.Body = &pacedBody{http.MaxBytesReader(w, r.Body, maxTaskFileBytes+maxFormOverhead), control, a.bodyTimeout}
	form, err := r.MultipartReader()
	if err != nil {
		return badRequest("read form", err)
	}
	files := []taskFile{}
	for {
		part, err := form.NextPart()
		if err == io.EOF {
			break
		}
		if err != nil {
			return bodyError("read form", err)
		}
		if part.FormName() != "file" || part.FileName() == "" {
			continue
		}
		size, err := a.records.Load().saveFile(id, part.FileName(), part)
		if err != nil {
			var broken *http.MaxBytesError
			if errors.As(err, &broken) {
				return tooLarge("read form", broken.Limit)
			}
			return err
		}
		files = append(files, taskFile{part.FileName(), size})
	}
	control.SetReadDeadline(time.Time{})
	if len(files) == 0 {
		return badRequest("read form", errors.New(`the form has no file in a field "file"`))
	}
	return writeJSON(w, http.StatusOK, map[string]any{"status": "success", "task_id": id, "files": files})
}

// ownTask gives the task of a call that exists only where the worker is its own manager, and checks the key.
func (a *apiServer) ownTask(r *http.Request) (string, error) {
	config := a.config.Load()
	if !config.ownManager {
		return "", httpError{http.StatusNotFound, fail(codeHTTPNotOurs, "serve "+r.URL.Path,
			errors.New("end_point is set, so results and files go to the Job Manager"))}
	}
	if err := requireKey(config, r); err != nil {
		return "", err
	}
	return taskOf(r)
}

// showFile is GET /job/{task_id}/files/{name}. The file is some job's, so a browser must not take it for a page of ours.
func (a *apiServer) showFile(w http.ResponseWriter, r *http.Request) error {
	id, err := taskOf(r)
	if err != nil {
		return err
	}
	file, err := a.records.Load().openFile(id, r.PathValue("name"))
	if err != nil {
		return err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return unreadable("show file of task "+id, err)
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Length", strconv.FormatInt(info.Size(), 10))
	w.Header().Set("Content-Disposition",
		mime.FormatMediaType("attachment", map[string]string{"filename": r.PathValue("name")}))
	w.Header().Set("Content-Security-Policy", "default-src 'none'; sandbox")
	w.WriteHeader(http.StatusOK)
	if r.Method == http.MethodHead {
		return nil
	}
	_, err = io.CopyN(w, file, info.Size())
	return err
}

// A pacedBody gives every piece of a long body its own time.
type pacedBody struct {
	io.ReadCloser
	control *http.ResponseController
	timeout time.Duration
}

func (b *pacedBody) Read(p []byte) (int, error) {
	b.control.SetReadDeadline(time.Now().Add(b.timeout))
	return b.ReadCloser.Read(p)
}
