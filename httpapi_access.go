package main

// httpapi_access.go decides who may call the REST API (PROTOCOL section 7, "Who gets in"). On a loopback address
// everybody on this host may, but no web page in a browser on this host; on any other address one needs the key. It
// looks at the request's head only, so a refused body is never read.

import (
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
)

var (
	errWrongKey = errors.New("this call needs the header Authorization: Bearer <secret_key>")
	errNoKey    = errors.New("no key is configured, so only this host's loopback address would serve this call: " +
		"set credential.secret_key or secret_key_file, or listen on 127.0.0.1")
	errForeignHost = errors.New("the Host header must be localhost or a loopback address, as this server listens on one")
	errForeignPage = errors.New("calls from web pages of another origin are not served")
	errContentType = errors.New("the Content-Type of this body must be ")
)

// A caller is what is known of who sent a request before its body is read.
type caller struct {
	listen netip.Addr // the address that the server listens on; zero if that is no IP address
	local  netip.Addr // this side of the connection
	remote netip.Addr // the other side
}

// admit returns nil when the call may be served with this configuration, and otherwise why not.
func admit(c caller, config *apiConfig, r *http.Request) error {
	if c.listen.IsLoopback() {
		return admitLoopback(r)
	}
	switch {
	case r.URL.Path == "/health":
		return nil
	case config.secretKey != "" && bearsKey(r, config.secretKey):
		return nil
	case c.sameHost() && r.Method == http.MethodPost && strings.HasPrefix(r.URL.Path, "/msg/notif/"):
		return admitPage(r)
	case config.secretKey == "":
		return httpError{http.StatusForbidden, fail(codeHTTPNoKey, "serve "+r.URL.Path, errNoKey)}
	}
	return wrongKey(r)
}

// admitLoopback keeps web pages out: those that reach this server under a name of their own (DNS rebinding), and those
// that post across origins, which browsers allow without asking for some content types only.
func admitLoopback(r *http.Request) error {
	if !loopbackHost(r.Host) {
		return httpError{http.StatusForbidden, fail(codeHTTPHost, "serve "+r.URL.Path, errForeignHost)}
	}
	if err := admitPage(r); err != nil {
		return err
	}
	hasBody := r.ContentLength != 0 || len(r.Header.Values("Content-Type")) > 0
	if r.Method != http.MethodPost || !hasBody {
		return nil
	}
	return checkContentType(r, wantsFiles(r))
}

// admitPage refuses a request that a browser sends for a page which this server did not serve.
func admitPage(r *http.Request) error {
	foreign := false
	switch r.Header.Get("Sec-Fetch-Site") {
	case "cross-site", "same-site":
		foreign = r.Method != http.MethodGet || r.Header.Get("Sec-Fetch-Mode") != "navigate" // a link may lead here
	}
	for _, origin := range r.Header.Values("Origin") {
		u, err := url.Parse(origin)
		foreign = foreign || err != nil || u.Host == "" || !strings.EqualFold(u.Host, r.Host)
	}
	if foreign {
		return httpError{http.StatusForbidden, fail(codeHTTPOrigin, "serve "+r.URL.Path, errForeignPage)}
	}
	return nil
}

// checkContentType refuses a body that is not what the call takes: JSON, or a form with files.
func checkContentType(r *http.Request, files bool) error {
	want := "application/json"
	if files {
		want = "multipart/form-data"
	}
	// A browser takes a list of two types for the last of them, this parser for an error.
	got, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err == nil && got == want && len(r.Header.Values("Content-Type")) == 1 {
		return nil
	}
	return httpError{http.StatusUnsupportedMediaType,
		fail(codeHTTPContentType, "read body of "+r.URL.Path, errors.New(errContentType.Error()+want))}
}

// wantsFiles reports whether the call takes files rather than JSON.
func wantsFiles(r *http.Request) bool {
	return strings.HasPrefix(r.URL.Path, "/api/worker/job_record/file/")
}

// requireKey refuses who does not present the key, where one is configured.
func requireKey(config *apiConfig, r *http.Request) error {
	if config.secretKey == "" || bearsKey(r, config.secretKey) {
		return nil
	}
	return wrongKey(r)
}

func wrongKey(r *http.Request) error {
	return httpError{http.StatusUnauthorized, fail(codeHTTPKey, "serve "+r.URL.Path, errWrongKey)}
}

// bearsKey compares in constant time; the sums make it independent of the lengths.
func bearsKey(r *http.Request, key secret) bool {
	scheme, token, ok := strings.Cut(r.Header.Get("Authorization"), " ")
	if !ok || !strings.EqualFold(scheme, "Bearer") {
		return false
	}
	got, want := sha256.Sum256([]byte(strings.TrimSpace(token))), sha256.Sum256([]byte(key))
	return subtle.ConstantTimeCompare(got[:], want[:]) == 1
}

// sameHost reports whether the request comes from the host that the server runs on.
func (c caller) sameHost() bool {
	return c.remote.IsValid() && (c.remote.IsLoopback() || c.remote == c.local)
}

// loopbackHost reports whether a Host header names this host's loopback: localhost, 127.0.0.0/8 or [::1], any port.
func loopbackHost(host string) bool {
	if name, port, err := net.SplitHostPort(host); err == nil && strings.Trim(port, "0123456789") == "" {
		host = name
	} else if inner, ok := strings.CutPrefix(host, "["); ok && strings.HasSuffix(inner, "]") {
		host = strings.TrimSuffix(inner, "]")
	}
	if strings.EqualFold(host, "localhost") {
		return true
	}
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.Zone() == "" && addr.Unmap().IsLoopback()
}

// addrOf gives the IP address of a network address, the zero Addr if it has none.
func addrOf(a net.Addr) netip.Addr {
	if tcp, ok := a.(*net.TCPAddr); ok {
		return tcp.AddrPort().Addr().Unmap().WithZone("")
	}
	return netip.Addr{}
}
