//go:build unix

package main

// status_browser_test.go looks at the status page in a real browser: headless Chromium, driven over the WebDriver
// protocol (https://www.w3.org/TR/webdriver2/), with a real worker behind it. With JOB_ITEM_TEST_SHOTS=FOLDER it leaves
// pictures of the page there.

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math"
	"mime/multipart"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"syscall"
	"testing"
	"time"
)

// A browser is one window of a headless Chromium.
type browser struct {
	t       testing.TB
	session string // URL of the session
}

// openBrowser starts a browser, or skips the test where there is none.
func openBrowser(t testing.TB) *browser {
	t.Helper()
	var programs [2]string
	for i, name := range []string{"chromedriver", "chromium"} {
		path, err := exec.LookPath(name)
		if err != nil {
			if os.Getenv("JOB_ITEM_TEST_BROWSER") != "" {
				t.Fatalf("%v: install it (Debian packages chromium, chromium-driver)", err)
			}
			t.Skipf("%v: the status page is not looked at (Debian packages chromium, chromium-driver)", err)
		}
		programs[i] = path
	}
	said := &lockedBuffer{}
	driver := exec.Command(programs[0], "--port=0")
	driver.Stdout, driver.Stderr = said, said
	driver.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := driver.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		syscall.Kill(-driver.Process.Pid, syscall.SIGKILL)
		driver.Wait()
	})
	port := regexp.MustCompile(`successfully on port (\d+)`)
	waitFor(t, 30*time.Second, func() string {
		if !port.MatchString(said.String()) {
			return "chromedriver has no port:\n" + said.String()
		}
		return ""
	})
	b := &browser{t: t, session: "http://127.0.0.1:" + port.FindStringSubmatch(said.String())[1] + "/session"}
	profile, err := os.MkdirTemp("", "browser")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(profile) }) // the browser may still be writing there: no t.TempDir
	args := []string{"--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
		"--disable-background-networking", "--window-size=1320,900", "--user-data-dir=" + profile}
	var started struct {
		SessionID string `json:"sessionId"`
	}
	b.call("POST", "", map[string]any{"capabilities": map[string]any{"alwaysMatch": map[string]any{
		"goog:chromeOptions": map[string]any{"binary": programs[1], "args": args},
		"goog:loggingPrefs":  map[string]string{"browser": "ALL"},
	}}}, &started)
	b.session += "/" + started.SessionID
	t.Cleanup(func() {
		r, _ := http.NewRequest("DELETE", b.session, nil)
		if resp, err := http.DefaultClient.Do(r); err == nil {
			resp.Body.Close()
		}
	})
	return b
}

// call is one command of WebDriver; v takes the value of the answer.
func (b *browser) call(method, path string, body, v any) {
	b.t.Helper()
	if err := b.try(method, path, body, v); err != nil {
		b.t.Fatal(err)
	}
}

func (b *browser) try(method, path string, body, v any) error {
	var text []byte
	if body != nil {
		var err error
		if text, err = json.Marshal(body); err != nil {
			return err
		}
	}
	r, err := http.NewRequestWithContext(b.t.Context(), method, b.session+path, bytes.NewReader(text))
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer := struct {
		Value json.RawMessage `json:"value"`
	}{}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return err
	}
	if resp.StatusCode != 200 {
		return fmt.Errorf("%s %s = %.600s", method, path, answer.Value)
	}
	if v != nil {
		return json.Unmarshal(answer.Value, v)
	}
	return nil
}

// run evaluates an expression in the page; v takes its value.
func (b *browser) run(expression string, v any) {
	b.t.Helper()
	b.call("POST", "/execute/sync", map[string]any{"script": "return " + expression, "args": []any{}}, v)
}

// until waits for an expression to be true.
func (b *browser) until(expression string) {
	b.t.Helper()
	waitFor(b.t, 30*time.Second, func() string {
		var is bool
		if b.run("!!("+expression+")", &is); is {
			return ""
		}
		var page string
		b.run("document.body.innerText", &page)
		return "not true in the page: " + expression + "\n" + page
	})
}

// shows waits for a text in what the selector finds.
func (b *browser) shows(selector, text string) {
	b.t.Helper()
	b.until(fmt.Sprintf("[...document.querySelectorAll(%q)].some(e => e.innerText.includes(%q))", selector, text))
}

// element finds what the selector and the text say, and gives its WebDriver id.
func (b *browser) element(selector, text string) string {
	b.t.Helper()
	var found map[string]string
	b.shows(selector, text)
	b.run(fmt.Sprintf("[...document.querySelectorAll(%q)].find(e => e.innerText.includes(%q))", selector, text), &found)
	for _, id := range found {
		return id
	}
	b.t.Fatalf("no %s with %q", selector, text)
	return ""
}

// click clicks as with a mouse: on what is visible there and in nobody's shade. What it finds may be drawn anew.
func (b *browser) click(selector, text string) {
	b.t.Helper()
	waitFor(b.t, 30*time.Second, func() string {
		if err := b.try("POST", "/element/"+b.element(selector, text)+"/click", map[string]any{}, nil); err != nil {
			return err.Error()
		}
		return ""
	})
}

// keys types into what the selector finds; text may hold WebDriver's key codes.
func (b *browser) keys(selector, text string) {
	b.t.Helper()
	b.call("POST", "/element/"+b.element(selector, "")+"/value", map[string]any{"text": text}, nil)
}

// devtools sends a command of the DevTools protocol.
func (b *browser) devtools(command string, params map[string]any) {
	b.t.Helper()
	b.call("POST", "/goog/cdp/execute", map[string]any{"cmd": command, "params": params}, nil)
}

// look sets the size of the window and whether it is dark.
func (b *browser) look(width, height int, scheme string) {
	b.t.Helper()
	b.devtools("Emulation.setDeviceMetricsOverride",
		map[string]any{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600})
	b.devtools("Emulation.setEmulatedMedia",
		map[string]any{"features": []any{map[string]string{"name": "prefers-color-scheme", "value": scheme}}})
}

// shoot keeps pictures, light and dark, if somebody wants them.
func (b *browser) shoot(name string, width, height int) {
	b.t.Helper()
	folder := os.Getenv("JOB_ITEM_TEST_SHOTS")
	if folder == "" {
		return
	}
	for _, scheme := range []string{"light", "dark"} {
		b.look(width, height, scheme)
		b.until("new Promise(done => setTimeout(() => done(true), 300))") // what moves comes to rest
		var picture string
		b.call("GET", "/screenshot", nil, &picture)
		data, err := base64.StdEncoding.DecodeString(picture)
		if err == nil {
			err = os.WriteFile(filepath.Join(folder, name+"-"+scheme+".png"), data, 0o644)
		}
		if err != nil {
			b.t.Fatal(err)
		}
	}
}

// complaints gives what the browser's console has collected: errors of the script, and what the policy has blocked.
func (b *browser) complaints() []string {
	b.t.Helper()
	var entries []struct{ Level, Message string }
	b.call("POST", "/se/log", map[string]string{"type": "browser"}, &entries)
	var found []string
	for _, e := range entries {
		if e.Level == "SEVERE" || e.Level == "WARNING" {
			found = append(found, e.Message)
		}
	}
	return found
}

// hostBehind is a worker's address with a hardware report of our own in front: an hour of history, and hostile names.
func hostBehind(t testing.TB, worker string) string {
	t.Helper()
	target, err := url.Parse(worker)
	if err != nil {
		t.Fatal(err)
	}
	proxy := &httputil.ReverseProxy{
		Director:      func(r *http.Request) { r.URL.Scheme, r.URL.Host = target.Scheme, target.Host },
		FlushInterval: -1,
		ErrorLog:      slog.NewLogLogger(slog.DiscardHandler, 0),
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/hardware" {
			proxy.ServeHTTP(w, r)
			return
		}
		var history []map[string]any
		end := time.Now()
		for i := range 120 {
			wave := math.Sin(float64(i)/9) + math.Sin(float64(i)/2.3)/3
			history = append(history, map[string]any{"at": end.Add(time.Duration(i-119) * 30 * time.Second),
				"cpu": 34 + 22*wave, "memory": 48 + float64(i)/12, "disk": 61 + float64(i)/60,
				"rx": 300e3 * (1.3 + wave), "tx": 120e3 * (1.4 - wave)})
		}
		writeJSON(w, http.StatusOK, map[string]any{
			"host": map[string]any{"hostname": "<b>build-07</b>", "platform": "debian", "platformVersion": "12.11",
				"kernelArch": "x86_64", "os": "linux", "kernelVersion": "6.1.0"},
			"cpu":    map[string]any{"percent": []float64{31, 40, 22, 57}, "total": 37.5},
			"memory": map[string]any{"total": 16 << 30, "used": 9 << 30, "usedPercent": 57.9},
			"disk": []any{
				map[string]any{"path": "/", "fstype": "ext4", "total": 100 << 30, "free": 37 << 30, "used_percent": 63},
				map[string]any{"path": "/srv", "fstype": "xfs", "total": 500 << 30, "free": 31 << 30, "used_percent": 93.8}},
			"network":    map[string]any{"rx_bytes_per_s": 412e3, "tx_bytes_per_s": 98e3},
			"sampled_at": end, "history": history})
	}))
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	return server.URL
}

// TestStatusPageInBrowser is a visit: an idle worker, a task that is watched and ended, output that would like to be
// a program, one that never ends, a failure, a phone, and a worker that goes away and comes back.
func TestStatusPageInBrowser(t *testing.T) {
	t.Parallel() // it mostly waits
	b := openBrowser(t)
	a := newAgent(t, `
identity_id: build-07
concurrency: 12
kill_after: 500ms
drain_timeout: 100ms
jobs:
  - event: steps
    cmd: 'echo step 1; until test -e go; do sleep 0.05; done; echo step 2; sleep 60'
  - {event: hello, name: Greeting, cmd: 'echo Hello, {{name}}!'}
  - event: hostile
    cmd: >-
      printf "<script>document.title=\047owned\047</script><img src=x onerror=document.title=\047owned\047>\n
      \033[1;31mred\033[0m \033]0;owned\007\033[2Jplain\033[38;5;46mgreen\033[m\n
      half\rwhole\n\000\001\n\033[31";
      until test -e "{{task_id}}.go"; do sleep 0.05; done; echo "mstill red"
  - {event: flood, cmd: 'seq 1 9000; head -c 300000 /dev/zero | tr "\0" x; echo; echo last line'}
  - {event: fail, cmd: 'echo Reading orders; echo "orders.csv: line 17: quantity missing" >&2; exit 3'}
  - {event: thumbnails, limit: 3, cmd: 'for n in 1 2 3; do echo "photo-$n.jpg  1280x960 -> 320x240"; done; sleep 60'}
  - event: import_orders
    name: Nightly import
    cmd: >-
      for n in 1 2 3 4 5 6; do printf "\033[32mok\033[0m  batch %d of 40: 250 orders, 0 refused\n" $n; done;
      printf "\033[33mwarn\033[0m batch 7 of 40: one duplicate\n"; sleep 60
execs:
  - {key: log_shipper, cmd: sleep 1000}
  - {key: warm_cache, cmd: 'true'}
`).start()
	page := hostBehind(t, a.url)
	b.call("POST", "/url", map[string]string{"url": page + "/"}, nil)

	// Idle.
	b.shows("#health", "Healthy")
	b.shows("#running-none", "job_item create hello")
	b.shows("#facts", "embedded queue · dev")
	b.until("document.querySelectorAll('#plots .plot').length === 4")
	b.until("document.querySelector('.graph path:not(.area)').getAttribute('d').length > 500")
	b.shows("#host", "<b>build-07</b>")
	b.shows("#execs", "log_shipper")
	b.shoot("idle", 1320, 900)

	// A task as it runs: its card, its output while it comes, and its end by hand, in two steps.
	id := a.create("steps", "{}")
	b.shows("#running .card pre", "step 1")
	b.click("#running .card a", "steps")
	b.shows(".term", "step 1")
	a.write("go", "")
	b.shows(".term", "step 2")
	b.click(".acts button", "Terminate")
	b.click(".acts button", "No, let it run")
	if v := a.task(id); v.Status != statusRunning {
		t.Fatalf("the task is %s before anybody said yes", v.Status)
	}
	b.click(".acts button", "Terminate")
	b.click(".acts button", "Yes, terminate it")
	b.shows(".panel .state", "terminated")
	if v := a.wait(id, statusTerminate); v.Status != statusTerminate {
		t.Errorf("the task is %s; want terminate", v.Status)
	}
	b.shows(".acts button", "Run again")
	b.keys("body", "\uE00C") // Escape
	b.until("document.querySelector('#panel').hidden")
	b.shows("#recent .row", "terminated")

	// Output, a message, a result and a file name that would like to be markup, and colours.
	const script = `<script>document.title='owned'</script><img src=x onerror=document.title='owned'>`
	id = a.create("hostile", "{}")
	b.click("#running .card a", "hostile")
	if code, answer := a.post("/msg/notif/"+id, fmt.Sprintf(`{"msg":%q}`, script)); code != 200 {
		t.Fatal(answer)
	}
	if code, answer := a.post("/api/worker/job_record/result/"+id, fmt.Sprintf(`{"text":%q}`, script)); code != 200 {
		t.Fatal(answer)
	}
	const fileName = "it's 100% new &amp; #1.txt"
	a.upload(id, fileName)
	b.shows(".term", "whole")
	a.write(id+".go", "")
	b.shows(".panel .state", "finished")
	b.shows(".term", "still red") // an escape that came in two pieces
	b.shows(".msgs", script)
	b.shows(".panel .text", `"text": "<script>`)
	b.shows(".files a", fileName)
	b.shows(".term", script)
	for _, is := range []string{
		"document.title.includes('build-07') && !document.title.includes('owned')",
		"!document.querySelector('#panel script, #panel img, main script, main img')",
		"[...document.querySelectorAll('.term .c1.s1')].some(e => e.textContent === 'red')",
		"[...document.querySelectorAll('.term .c10')].some(e => e.textContent === 'green')",
		"[...document.querySelectorAll('.term .c1:not(.s1)')].some(e => e.textContent === 'still red')",
		"!/half|\\x1b|\\x07|\\x00|0;owned/.test(document.querySelector('.term').textContent)",
		"/\u2400\u2401/.test(document.querySelector('.term').textContent)",
	} {
		b.until(is)
	}
	var status int
	b.run("fetch(document.querySelector('.files a').href).then(r => r.status)", &status)
	if status != 200 {
		t.Errorf("the file's link gives %d", status)
	}

	// More output than anybody would scroll through.
	a.wait(a.create("flood", "{}"), statusFinish)
	b.click(".panel button", "") // close
	b.click("#recent .row", "flood")
	b.shows(".term", "last line")
	b.until("document.querySelectorAll('.term div').length <= 2001 && document.querySelector('.term').textContent.length < 300000")
	b.until("document.querySelector('.term .gap') && document.querySelector('.term').scrollTop > 1000")

	// A failure, found with the keyboard.
	failed := a.create("fail", "{}")
	a.wait(failed, statusError)
	b.keys("body", "\uE00C")
	b.click("#choice button", "Failed")
	b.shows("#recent .row .why", "quantity missing")
	b.until("document.querySelectorAll('#recent .row').length === 1")
	b.run("document.querySelector('#recent .row').focus()", nil)
	b.keys("#recent .row", "\uE007") // Enter
	b.shows(".why-box", "orders.csv: line 17")
	b.shows(".panel dl", "Exit code\n3")
	b.shoot("failed", 1320, 900)
	b.keys("body", "\uE00C")
	b.until("document.activeElement.matches('#recent .row')")
	b.click("#choice button", "All")

	// A new task from here.
	b.click("#new", "")
	b.keys("[name=event]", "hello")
	b.run("document.querySelector('[name=data]').value = '{'", nil)
	b.click("#create button", "Create")
	b.shows("#create-error", "not JSON")
	b.run(`document.querySelector('[name=data]').value = '{"name":"Ada"}'`, nil)
	b.click("#create button", "Create")
	b.shows(".term", "Hello, Ada!")
	b.click("summary", "Data")
	b.shows("details .text", `"name": "Ada"`)
	b.keys("body", "\uE00C")

	for range 7 {
		id = a.create("import_orders", "{}")
		a.create("thumbnails", "{}")
	}
	b.until("document.querySelectorAll('#running .card').length === 10")
	b.until("document.querySelectorAll('#waiting .row').length === 4")
	b.shows("#running .card pre", "warn batch 7 of 40")
	if code, answer := a.post("/msg/notif/"+id, `{"msg":"1,750 of 10,000 orders"}`); code != 200 {
		t.Fatal(answer)
	}
	b.shows("#running .card .msg", "1,750 of 10,000 orders")
	b.shoot("busy", 1320, 900)

	// A phone: nothing is wider than the screen, with and without a task open.
	b.look(390, 844, "dark")
	const fits = "document.documentElement.scrollWidth <= innerWidth && document.querySelector('#panel').scrollWidth <= innerWidth"
	b.until(fits)
	b.until("matchMedia('(prefers-color-scheme: dark)').matches")
	b.shoot("narrow", 390, 844)
	b.click("#running .card a", "import_orders")
	b.shows(".term", "warn batch 7 of 40")
	b.until(fits)
	b.shoot("narrow-task", 390, 844)
	b.click(".panel button", "") // close
	b.look(1320, 900, "light")
	if found := b.complaints(); len(found) > 0 {
		t.Errorf("the browser complains: %q", found)
	}

	// The worker goes away and comes back, with the tasks that it had put back.
	b.click("#running .card a", "thumbnails")
	b.shows(".term", "photo-3.jpg")
	a.change("photo-", "picture-")
	a.stop()
	b.shows("#away", "No answer from the worker")
	b.shows("#health", "Out of reach")
	b.shoot("away", 1320, 900)
	a.start()
	b.shows(".term", "picture-3.jpg")
	b.until("document.querySelector('#away').hidden && document.querySelectorAll('#running .card').length === 10")
}

// upload hands in a file as a job would, named as given.
func (a *agent) upload(taskID, name string) {
	a.t.Helper()
	var body bytes.Buffer
	form := multipart.NewWriter(&body)
	part, err := form.CreateFormFile("file", name)
	if err != nil {
		a.t.Fatal(err)
	}
	io.WriteString(part, "content")
	form.Close()
	resp, err := http.Post(a.url+"/api/worker/job_record/file/"+taskID, form.FormDataContentType(), &body)
	if err != nil {
		a.t.Fatal(err)
	}
	defer resp.Body.Close()
	if answer, _ := io.ReadAll(resp.Body); resp.StatusCode != 200 {
		a.t.Fatalf("upload of %q = %s", name, answer)
	}
}
