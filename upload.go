package main

// upload.go is what a job hands over besides messages: upload sends files, result sends the result (PROTOCOL sections 1
// and 6.4). Both carry the project's key to the URL that the worker has named, and are repeated as messages are.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"mime/multipart"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"unicode"
)

// runUpload is `upload FILE…`. Every file is tried, whatever happens to the others.
func runUpload(ctx context.Context, inv *invocation) int {
	if len(inv.args) == 0 {
		return inv.usageError("upload takes at least one FILE")
	}
	names := map[string]string{}
	for _, path := range inv.args {
		name := filepath.Base(path)
		if other, twice := names[name]; twice {
			return inv.usageError(fmt.Sprintf("%q and %q would be kept under the same name", other, path))
		}
		names[name] = path
	}
	target, err := handOverURL("JOB_MANAGER_UPLOAD_FILE")
	if err != nil {
		inv.printError(err)
		return exitUsage
	}
	p := newPoster()
	code := exitOK
	for _, path := range inv.args {
		if err := p.upload(ctx, target, path); err != nil {
			inv.printError(fail(codeUpload, fmt.Sprintf("upload %q to %s", path, shownURL(target)), err))
			code = exitFailed
		}
	}
	return code
}

// runResult is `result [JSON|@FILE|-]`.
func runResult(ctx context.Context, inv *invocation) int {
	arg := "-"
	switch {
	case len(inv.args) > 1:
		return inv.usageError("result takes one JSON value")
	case len(inv.args) == 1:
		arg = inv.args[0]
	case isTerminal(inv.stdin):
		return inv.usageError("result takes a JSON value, @FILE, or stdin from a pipe or file")
	}
	target, err := handOverURL("JOB_MANAGER_RESULT_URL")
	if err != nil {
		inv.printError(err)
		return exitUsage
	}
	text, err := readArgument(arg, inv.stdin)
	if err == nil {
		if bad := checkJSON(text); bad != nil {
			err = failHint(codeResultData, "bad result", bad, `for example: job_item result '{"status":"completed"}'`)
		}
	}
	if err != nil {
		inv.printError(err)
		return exitUsage
	}
	err = newPoster().post(ctx, func(ctx context.Context) (*http.Request, error) {
		return newKeyedPost(ctx, target, "application/json", bytes.NewReader(text))
	})
	if err != nil {
		inv.printError(fail(codeResult, "send the result to "+shownURL(target), err))
		return exitFailed
	}
	return exitOK
}

// handOverURL is the URL in a variable that the worker sets for a job.
func handOverURL(name string) (*url.URL, error) {
	values, err := jobVariables(name)
	if err != nil {
		return nil, err
	}
	return taskURL(name, values[0])
}

// newKeyedPost is newPost with the project's key, where there is one.
func newKeyedPost(ctx context.Context, target *url.URL, contentType string, body io.Reader) (*http.Request, error) {
	req, err := newPost(ctx, target, contentType, body)
	if err != nil {
		return nil, err
	}
	if key := os.Getenv("JOB_ITEM_PROJECT_KEY"); key != "" {
		req.Header.Set("Authorization", "Bearer "+key)
	}
	return req, nil
}

// upload sends one file as the multipart field "file", straight from the disk.
func (p *poster) upload(ctx context.Context, target *url.URL, path string) error {
	return p.post(ctx, func(ctx context.Context) (*http.Request, error) {
		file, size, err := openRegular(path)
		if err != nil {
			return nil, err
		}
		body, length, contentType, err := fileForm(filepath.Base(path), file, size)
		if err != nil {
			file.Close()
			return nil, err
		}
		req, err := newKeyedPost(ctx, target, contentType, body)
		if err != nil {
			file.Close()
			return nil, err
		}
		req.ContentLength = length
		// A refusal then comes before the file has been sent for nothing.
		req.Header.Set("Expect", "100-continue")
		return req, nil
	})
}

// openRegular opens a file, but not a pipe, which might never end, nor a folder.
func openRegular(path string) (*os.File, int64, error) {
	if info, err := os.Stat(path); err != nil {
		return nil, 0, dropPath(err)
	} else if !info.Mode().IsRegular() {
		return nil, 0, errors.New("not a regular file")
	}
	file, err := os.Open(path)
	if err != nil {
		return nil, 0, dropPath(err)
	}
	info, err := file.Stat()
	if err != nil {
		file.Close()
		return nil, 0, err
	}
	return file, info.Size(), nil
}

// dropPath drops the path, which the message names already.
func dropPath(err error) error {
	var withPath *fs.PathError
	if errors.As(err, &withPath) {
		return withPath.Err
	}
	return err
}

// fileForm is a form with one file as a stream, and its length. Closing the form closes the file. What is appended to
// the file meanwhile is not sent.
func fileForm(name string, file *os.File, size int64) (form io.ReadCloser, length int64, contentType string, err error) {
	if strings.ContainsFunc(name, unicode.IsControl) {
		return nil, 0, "", errors.New("its name has control characters")
	}
	var frame bytes.Buffer
	w := multipart.NewWriter(&frame)
	if _, err := w.CreateFormFile("file", name); err != nil {
		return nil, 0, "", err
	}
	head := bytes.Clone(frame.Bytes())
	frame.Reset()
	if err := w.Close(); err != nil {
		return nil, 0, "", err
	}
	tail := frame.Bytes()
	form = struct {
		io.Reader
		io.Closer
	}{io.MultiReader(bytes.NewReader(head), io.LimitReader(file, size), bytes.NewReader(tail)), file}
	return form, int64(len(head)) + size + int64(len(tail)), w.FormDataContentType(), nil
}

// isTerminal reports whether a person would have to type what is read.
func isTerminal(from io.Reader) bool {
	file, ok := from.(*os.File)
	if !ok {
		return false
	}
	info, err := file.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}
