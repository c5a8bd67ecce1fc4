package main

// httpapi_status.go serves the status page (PROTOCOL section 7, GET /): one embedded file, which shows what the other
// calls of the API tell. Its policy lets a browser run the script and the style in that file, ask this server, and
// nothing else, so that whatever a task prints stays text even if the page had a mistake in it.

import (
	"compress/gzip"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"io"
	"net/http"
	"strings"
)

//go:embed status.html
var statusPage string

// showStatus is GET /. It answers while the worker is still starting, too, as the page itself says so.
func (a *apiServer) showStatus(w http.ResponseWriter, r *http.Request) error {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Content-Security-Policy", statusPolicy(statusPage))
	w.Header().Set("Referrer-Policy", "no-referrer")
	w.Header().Set("Cross-Origin-Opener-Policy", "same-origin")
	w.Header().Set("Vary", "Accept-Encoding")
	if !strings.Contains(r.Header.Get("Accept-Encoding"), "gzip") {
		_, err := io.WriteString(w, statusPage)
		return err
	}
	w.Header().Set("Content-Encoding", "gzip")
	packed := gzip.NewWriter(w)
	if _, err := io.WriteString(packed, statusPage); err != nil {
		return err
	}
	return packed.Close()
}

// statusPolicy is the Content-Security-Policy of a page whose one script and one style element are to work. Trusted
// types make a browser that knows them refuse innerHTML and its like altogether.
func statusPolicy(page string) string {
	return strings.Join([]string{
		"default-src 'none'",
		"script-src " + inlineHash(page, "script"),
		"style-src " + inlineHash(page, "style"),
		"connect-src 'self'",
		"img-src data:",
		"base-uri 'none'",
		"form-action 'none'",
		"frame-ancestors 'none'",
		"require-trusted-types-for 'script'",
		"trusted-types 'none'",
	}, "; ")
}

// inlineHash is the source expression for what stands between the tags of the page's element of this name.
func inlineHash(page, element string) string {
	_, rest, _ := strings.Cut(page, "<"+element+">")
	text, _, _ := strings.Cut(rest, "</"+element+">")
	sum := sha256.Sum256([]byte(text))
	return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
}
