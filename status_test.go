package main

// status_test.go: how the status page is served, and what must be true of the file. What it does in a browser is in
// status_browser_test.go.

import (
	"regexp"
	"strings"
	"testing"
)

func TestStatusPageIsServed(t *testing.T) {
	a := startAPI(t, "127.0.0.1:0", apiConfig{projectID: "local"})
	for _, method := range []string{"GET", "HEAD"} {
		got := a.call(method, "/", "")
		if got.status != 200 || got.header.Get("Content-Type") != "text/html; charset=utf-8" {
			t.Errorf("%s / = %d %s", method, got.status, got.header.Get("Content-Type"))
		}
		if method == "GET" && got.body != statusPage {
			t.Errorf("the page has %d bytes; want %d", len(got.body), len(statusPage))
		}
		policy := got.header.Get("Content-Security-Policy")
		for _, want := range []string{"default-src 'none';", "script-src 'sha256-", "style-src 'sha256-", "connect-src 'self'",
			"frame-ancestors 'none'", "form-action 'none'", "base-uri 'none'"} {
			if !strings.Contains(policy, want) {
				t.Errorf("policy %q lacks %q", policy, want)
			}
		}
		if strings.Contains(policy, "unsafe") || strings.Contains(policy, "http") {
			t.Errorf("policy %q allows too much", policy)
		}
	}
	if got := a.call("GET", "/index.html", ""); got.status != 404 {
		t.Errorf("GET /index.html = %d; want 404", got.status)
	}
	if got := a.call("POST", "/", "{}"); got.status != 405 {
		t.Errorf("POST / = %d; want 405", got.status)
	}
	// A link on another page may lead here; from another host's name nobody gets in.
	got := a.call("GET", "/", "", "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate")
	if got.status != 200 {
		t.Errorf("a link to the page = %d; want 200", got.status)
	}
	if got := a.call("GET", "/", "", "Host: evil.example"); got.status != 403 {
		t.Errorf("the page under a foreign name = %d; want 403", got.status)
	}
}

// TestStatusPagePolicyKnowsTheFile computes the hash of a page whose sum is known.
func TestStatusPagePolicyKnowsTheFile(t *testing.T) {
	const page = "<style>a</style><script>alert('Hello, world.');</script>"
	// https://www.w3.org/TR/CSP3/#external-hash: sha256 of alert('Hello, world.');
	if want := "'sha256-qznLcsROx4GACP2dm0UCKCzCG+HiZ1guq6ZZDob/Tng='"; inlineHash(page, "script") != want {
		t.Errorf("inlineHash = %s; want %s", inlineHash(page, "script"), want)
	}
}

// TestStatusPageFile looks for what the page must not have: an address outside, a way to make markup of text, handlers
// or styles in attributes (the policy would block them), a second script or style element.
func TestStatusPageFile(t *testing.T) {
	const maxBytes = 64 << 10
	if len(statusPage) > maxBytes {
		t.Errorf("the page has %d bytes; want at most %d", len(statusPage), maxBytes)
	}
	if n, m := strings.Count(statusPage, "<script"), strings.Count(statusPage, "<style"); n != 1 || m != 1 {
		t.Errorf("the page has %d script and %d style elements; want one of each", n, m)
	}
	outside := strings.ReplaceAll(statusPage, "'http://www.w3.org/2000/svg'", "") // a name, not an address
	for _, never := range []string{`(?i)https?:`, `["'(]//`, `(?i)innerHTML|outerHTML|insertAdjacent|document\.write|DOMParser|srcdoc`,
		`\beval\(|new Function|javascript:`, `(?i)<[^>]*\son[a-z]+=`, `(?i)<[^>]*\sstyle=`, `@import|url\(`} {
		if found := regexp.MustCompile(never).FindString(outside); found != "" {
			t.Errorf("the page has %q", found)
		}
	}
}
