package main

// update_download.go fetches a new version into the file beside the binary: bounded, resumed where it broke off, with its
// progress in the log and, for somebody who watches, as a bar.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

const (
	maxUpdateBytes    = 256 << 20
	updateStall       = 30 * time.Second       // without a byte, and the connection is given up
	updateAttempts    = 5                      // in a row that brought nothing
	updatePause       = 500 * time.Millisecond // before the second, doubling
	updateRedirects   = 5
	progressPause     = 10 * time.Second // between two lines of the log
	progressBarPause  = 100 * time.Millisecond
	progressBarColumn = 40
)

// An updateFetch is the way of one offered version from its link to a proven file. It runs beside the supervisor, and
// everything it has is its own.
type updateFetch struct {
	offer    offeredVersion
	cfg      *Config
	file     string // where it goes
	like     string // the binary that it is to replace
	partial  bool   // what is in file may be gone on with
	terminal io.Writer
	log      *slog.Logger
	reaper   *reaper
}

// run fetches and proves the version. Its errors have their code.
func (f *updateFetch) run(ctx context.Context) error {
	link, err := f.check()
	if err != nil {
		return err
	}
	// A worker that was stopped in the middle of an update may have left all of it.
	if !f.partial || f.proveBytes() != nil {
		if err := f.download(ctx, link); err != nil {
			return err
		}
	}
	return f.prove(ctx)
}

// check looks at the offer alone. Nothing is fetched that could not be trusted.
func (f *updateFetch) check() (*url.URL, error) {
	link, err := url.Parse(f.offer.Link)
	if err == nil && f.cfg.EndPoint != "" && !link.IsAbs() && f.offer.Link != "" {
		var base *url.URL
		if base, err = url.Parse(f.cfg.EndPoint + "/"); err == nil {
			link = base.ResolveReference(link)
		}
	}
	switch {
	case err != nil || link.Host == "" || link.Scheme != "http" && link.Scheme != "https":
		return nil, refuseVersion("check job_item_link", errors.New("it is no http or https address"))
	case f.offer.SHA256 != "" && !isSHA256(f.offer.SHA256):
		return nil, refuseVersion("check job_item_sha256", errors.New("it is not 64 hex digits"))
	case f.cfg.Update.PublicKey != "" && f.offer.Signature == "":
		return nil, refuseVersion("check job_item_signature",
			errors.New("the manager gives none, and update.public_key wants one"))
	case f.cfg.Update.PublicKey == "" && f.offer.SHA256 == "" && link.Scheme != "https" && !f.cfg.Update.AllowInsecure:
		return nil, refuseVersion("check job_item_link",
			errors.New("plain http, without job_item_sha256 and without update.public_key, could bring anything"))
	}
	return link, nil
}

// download fetches the file, in as many pieces as the connection breaks into.
func (f *updateFetch) download(ctx context.Context, link *url.URL) error {
	op := "download " + link.Redacted()
	if link.RawQuery != "" { // which may be what gives access
		shown := *link
		shown.RawQuery = ""
		op = "download " + shown.Redacted() + "?…"
	}
	var err error
	if !f.partial {
		err = removeIfThere(f.file) // not only its content: it may run
	}
	var file *os.File
	if err == nil {
		file, err = os.OpenFile(f.file, os.O_RDWR|os.O_CREATE, 0o600)
	}
	if err != nil {
		return failHint(codeUpdate, "update: write "+f.file, withoutPath(err),
			"The binary's folder must be writable for whoever runs it, or update.enabled be false.")
	}
	defer file.Close()
	progress := newProgress(f.terminal, f.log)
	defer progress.end()
	pause := updatePause
	for attempt, size := 1, int64(-1); ; attempt++ {
		got, err := f.downloadRest(ctx, link, file, progress)
		if err == nil {
			break
		}
		var refused *versionRefused
		if got > size && size >= 0 {
			attempt, pause = 1, updatePause
		}
		size = got
		if errors.As(err, &refused) || !mayPass(err) || ctx.Err() != nil || attempt >= updateAttempts {
			return failUpdate(op, err)
		}
		f.log.Debug("the download broke off", "bytes", got, errAttrs(err))
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return failUpdate(op, context.Cause(ctx))
		}
		pause = min(2*pause, 10*time.Second)
	}
	if err := errors.Join(file.Sync(), file.Close()); err != nil {
		return failUpdate("write "+f.file, err)
	}
	return nil
}

// downloadRest makes one request for what the file lacks, and gives what it has then.
func (f *updateFetch) downloadRest(ctx context.Context, link *url.URL, file *os.File, progress *progress) (got int64, err error) {
	if got, err = file.Seek(0, io.SeekEnd); err != nil {
		return 0, unsendable{err}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, link.String(), nil)
	if err != nil {
		return got, unsendable{err}
	}
	request.Header.Set("User-Agent", "job_item/"+version)
	request.Header.Set("Accept-Encoding", "identity") // its bytes are what counts
	if got > 0 {
		request.Header.Set("Range", fmt.Sprintf("bytes=%d-", got))
	}
	client := newHTTPClient()
	defer client.CloseIdleConnections()
	client.CheckRedirect = f.checkRedirect
	stalled := time.AfterFunc(updateStall, func() { cancel(errNoProgress) })
	defer stalled.Stop()
	response, err := client.Do(request)
	if err != nil {
		return got, requestError(ctx, err)
	}
	defer response.Body.Close()
	body := &watchedBody{response.Body, func() { stalled.Reset(updateStall) }}
	switch {
	case response.StatusCode == http.StatusPartialContent && startsAt(response.Header.Get("Content-Range"), got):
	case response.StatusCode == http.StatusOK:
		got = 0
	case got > 0 && (response.StatusCode == http.StatusPartialContent || response.StatusCode == http.StatusRequestedRangeNotSatisfiable):
		// It has another end than what is here: all of it once more.
		return 0, errors.Join(errors.New("the server has no such rest"), truncate(file, 0))
	default:
		return got, readRefusal(response)
	}
	if err := truncate(file, got); err != nil {
		return got, unsendable{err}
	}
	total := int64(-1)
	if response.ContentLength >= 0 {
		total = got + response.ContentLength
	}
	if total > maxUpdateBytes {
		return got, refuseVersion("download", fmt.Errorf("%d bytes, more than %d MiB", total, maxUpdateBytes>>20))
	}
	need := TakeWhen{DiskFree: max(total-got, 0) + f.cfg.TakeWhen.DiskFree}
	if short := diskShortage(need, filepath.Dir(f.file)); short != "" {
		return got, unsendable{errors.New("too little room: " + short)}
	}
	progress.begin(got, total)
	n, err := io.Copy(io.MultiWriter(diskWriter{file}, progress), io.LimitReader(body, maxUpdateBytes+1-got))
	got += n
	var full diskError
	switch {
	case errors.As(err, &full):
		return got, unsendable{full.err}
	case err != nil:
		return got, requestError(ctx, err)
	case got > maxUpdateBytes:
		return got, refuseVersion("download", fmt.Errorf("more than %d MiB", maxUpdateBytes>>20))
	}
	return got, nil
}

// checkRedirect lets a link lead elsewhere, but not out of the transport that vouches for what comes.
func (f *updateFetch) checkRedirect(next *http.Request, before []*http.Request) error {
	switch {
	case len(before) > updateRedirects:
		return errors.New("redirected too often")
	case next.URL.Scheme != "https" && before[0].URL.Scheme == "https":
		return errors.New("redirected from https to " + next.URL.Scheme)
	}
	return nil
}

// startsAt reports whether a Content-Range begins at offset.
func startsAt(contentRange string, offset int64) bool {
	rest, ok := strings.CutPrefix(contentRange, "bytes ")
	first, _, found := strings.Cut(rest, "-")
	n, err := strconv.ParseInt(first, 10, 64)
	return ok && found && err == nil && n == offset
}

// truncate cuts the file to size and has the next byte written there.
func truncate(file *os.File, size int64) error {
	if err := file.Truncate(size); err != nil {
		return err
	}
	_, err := file.Seek(size, io.SeekStart)
	return err
}

// A diskWriter tells errors of the file from those of the connection.
type diskWriter struct{ file *os.File }

type diskError struct{ err error }

func (d diskError) Error() string { return d.err.Error() }
func (d diskError) Unwrap() error { return d.err }

func (d diskWriter) Write(p []byte) (int, error) {
	n, err := d.file.Write(p)
	if err != nil {
		err = diskError{withoutPath(err)}
	}
	return n, err
}

// A progress shows how far a download is.
type progress struct {
	terminal io.Writer // nil: nobody watches
	log      *slog.Logger
	got      int64
	total    int64 // -1: unknown
	logged   time.Time
	drawn    time.Time
}

// newProgress draws a bar where out is a terminal.
func newProgress(out io.Writer, log *slog.Logger) *progress {
	p := &progress{log: log, logged: time.Now()}
	if file, ok := out.(*os.File); ok {
		if info, err := file.Stat(); err == nil && info.Mode()&os.ModeCharDevice != 0 {
			p.terminal = out
		}
	}
	return p
}

func (p *progress) begin(got, total int64) { p.got, p.total = got, total }

func (p *progress) Write(data []byte) (int, error) {
	p.got += int64(len(data))
	now := time.Now()
	if now.Sub(p.logged) >= progressPause {
		p.logged = now
		p.log.Info("downloading the new version", "bytes", p.got, "of", p.total)
	}
	if p.terminal != nil && now.Sub(p.drawn) >= progressBarPause {
		p.drawn = now
		p.draw()
	}
	return len(data), nil
}

func (p *progress) draw() {
	if p.total > 0 {
		done := int(p.got * progressBarColumn / p.total)
		fmt.Fprintf(p.terminal, "\r[%-*s] %d of %d MiB\x1b[K", progressBarColumn, strings.Repeat("#", done),
			p.got>>20, p.total>>20)
	} else {
		fmt.Fprintf(p.terminal, "\r%d MiB\x1b[K", p.got>>20)
	}
}

// end wipes the bar away.
func (p *progress) end() {
	if p.terminal != nil {
		fmt.Fprint(p.terminal, "\r\x1b[K")
	}
	p.log.Debug("downloaded", "bytes", p.got)
}
