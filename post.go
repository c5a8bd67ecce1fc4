package main

// post.go sends what a job script hands over (messages, results, files) by HTTP and repeats what may succeed later: a
// receiver that restarts must not cost a message. It also owns what all client commands share: the HTTP client, which
// follows no redirect since the key belongs to the named host alone, and how a refusal is read.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode"
)

const (
	// sendRetryFor bounds the retries of one request (PROTOCOL section 10).
	sendRetryFor = 30 * time.Second

	// maxErrorReplyBytes bounds what is read of a refusal.
	maxErrorReplyBytes = 64 << 10
)

// newHTTPClient gives a client without a time limit of its own: every request has its context.
func newHTTPClient() *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			Proxy:                  http.ProxyFromEnvironment, // never for loopback
			DialContext:            (&net.Dialer{Timeout: 5 * time.Second}).DialContext,
			TLSHandshakeTimeout:    10 * time.Second,
			ExpectContinueTimeout:  time.Second,
			MaxResponseHeaderBytes: 64 << 10,
			// Short, since a connection that a firewall has forgotten swallows the next request.
			IdleConnTimeout: 5 * time.Second,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// A poster sends requests until they have been accepted.
type poster struct {
	client   *http.Client
	retryFor time.Duration // from the first failure on
	stallFor time.Duration // how long one attempt may go on without moving a byte
	pause    time.Duration // before the second attempt, doubling up to 3 s
}

func newPoster() *poster {
	return &poster{
		client:   newHTTPClient(),
		retryFor: sendRetryFor,
		// Long, since megabytes may still be on their way when the last byte has been handed to the system.
		stallFor: 5 * time.Minute,
		pause:    200 * time.Millisecond,
	}
}

// errNoProgress ends an attempt whose receiver neither takes nor answers anything.
var errNoProgress = errors.New("no answer")

// post makes a request, and makes it again while it fails for a reason that may pass: no connection, 408, 429 and 5xx.
// newRequest is called for every attempt, and its own error is final.
func (p *poster) post(ctx context.Context, newRequest func(context.Context) (*http.Request, error)) error {
	var giveUp time.Time
	var last error
	pause := p.pause
	for attempts := 1; ; attempts++ {
		err := p.attempt(ctx, newRequest)
		if err == nil || !mayPass(err) {
			return err
		}
		if attempts == 1 {
			giveUp = time.Now().Add(p.retryFor)
		} else if ctx.Err() != nil {
			// What went wrong before tells more than that time is over.
			return last
		}
		wait := pause/2 + rand.N(pause)
		var refused *refusal
		if errors.As(err, &refused) {
			wait = max(wait, min(refused.retryAfter, p.retryFor/3))
		}
		if attempts > 1 {
			err = fmt.Errorf("%w (after %d attempts)", err, attempts)
		}
		last = err
		if errors.Is(err, errNoProgress) || time.Now().Add(wait).After(giveUp) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(wait):
		}
		pause = min(2*pause, 3*time.Second)
	}
}

// attempt makes the request once.
func (p *poster) attempt(ctx context.Context, newRequest func(context.Context) (*http.Request, error)) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	req, err := newRequest(ctx)
	if err != nil {
		return unsendable{err}
	}
	stalled := time.AfterFunc(p.stallFor, func() { cancel(errNoProgress) })
	defer stalled.Stop()
	req.Body = &watchedBody{req.Body, func() { stalled.Reset(p.stallFor) }}

	resp, err := p.client.Do(req)
	if err != nil {
		return requestError(ctx, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return readRefusal(resp)
	}
	// Read to its end, so that the connection serves the next request.
	io.CopyN(io.Discard, resp.Body, maxErrorReplyBytes)
	return nil
}

// A watchedBody reports every read, that is, that the receiver takes the request.
type watchedBody struct {
	io.ReadCloser
	moved func()
}

func (b *watchedBody) Read(p []byte) (int, error) {
	b.moved()
	return b.ReadCloser.Read(p)
}

// unsendable is a request that could not be made, which trying again does not help.
type unsendable struct{ error }

func (u unsendable) Unwrap() error { return u.error }

// mayPass reports whether another attempt makes sense.
func mayPass(err error) bool {
	var refused *refusal
	if errors.As(err, &refused) {
		s := refused.status
		return s == http.StatusRequestTimeout || s == http.StatusTooManyRequests || s >= 500
	}
	var bad unsendable
	return !errors.As(err, &bad)
}

// requestError is why a request got no reply, without the URL, which may carry a password.
func requestError(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return errNoProgress
	}
	var withURL *url.Error
	if errors.As(err, &withURL) {
		err = withURL.Err
	}
	return err
}

// A refusal is a reply that is not a success.
type refusal struct {
	status     int
	code       errCode // of the one that refuses, "" if it gave none
	message    string
	retryAfter time.Duration
}

func (r *refusal) Error() string {
	text := fmt.Sprintf("answered %d %s", r.status, http.StatusText(r.status))
	if r.message != "" {
		text += ": " + r.message
	}
	if r.code != "" {
		text += " [" + string(r.code) + "]"
	}
	return text
}

// readRefusal reads at most maxErrorReplyBytes of the reply.
func readRefusal(resp *http.Response) *refusal {
	body, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorReplyBytes))
	r := &refusal{status: resp.StatusCode}
	if seconds, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && seconds > 0 {
		r.retryAfter = time.Duration(min(seconds, 3600)) * time.Second
	}
	var reply struct{ Code, Message string }
	switch {
	case json.Unmarshal(body, &reply) == nil && reply.Message != "":
		r.code, r.message = errCode(oneLine(reply.Code, 40)), oneLine(reply.Message, 500)
	case resp.StatusCode >= 300 && resp.StatusCode < 400:
		r.message = "redirects are not followed, give the URL it leads to: " + oneLine(resp.Header.Get("Location"), 200)
	case strings.HasPrefix(resp.Header.Get("Content-Type"), "text/plain"):
		r.message = oneLine(string(body), 200)
	}
	return r
}

// oneLine makes foreign text fit for a line of a terminal: no control characters, at most limit characters.
func oneLine(text string, limit int) string {
	text = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, strings.TrimSpace(text))
	if runes := []rune(text); len(runes) > limit {
		return string(runes[:limit-1]) + "…"
	}
	return text
}

// shownURL is a URL without what may be secret in it: password and query.
func shownURL(u *url.URL) string {
	return (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path, RawPath: u.RawPath}).String()
}

// parseHTTPURL takes an absolute http or https URL only.
func parseHTTPURL(text string) (*url.URL, error) {
	u, err := url.Parse(text)
	var withURL *url.Error
	switch {
	case errors.As(err, &withURL):
		return nil, withURL.Err
	case err != nil:
		return nil, err
	case u.Scheme != "http" && u.Scheme != "https":
		return nil, errors.New("want http:// or https://")
	case u.Hostname() == "":
		return nil, errors.New("it names no host")
	}
	return u, nil
}
