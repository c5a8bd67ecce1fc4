package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"
)

// A notificationServer takes messages as a worker does and answers with the statuses it was given, then with 200.
type notificationServer struct {
	*httptest.Server

	mu       sync.Mutex // guards the rest
	statuses []int
	paths    []string
	messages []string
	delay    time.Duration // of every answer
}

func newNotificationServer(t testing.TB, statuses ...int) *notificationServer {
	s := &notificationServer{statuses: statuses}
	s.Server = httptest.NewServer(http.HandlerFunc(s.serve))
	t.Cleanup(s.Close)
	return s
}

func (s *notificationServer) serve(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	delay := s.delay
	s.mu.Unlock()
	time.Sleep(delay)
	var body map[string]*string
	err := json.NewDecoder(r.Body).Decode(&body)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.paths = append(s.paths, r.URL.Path)
	status := http.StatusOK
	switch {
	case err != nil || body["msg"] == nil || r.Method != "POST" || r.Header.Get("Content-Type") != "application/json":
		status = http.StatusBadRequest
	case len(*body["msg"]) > saveMessageBytes:
		status = http.StatusRequestEntityTooLarge
	case len(s.statuses) > 0:
		status, s.statuses = s.statuses[0], s.statuses[1:]
	}
	if status == http.StatusOK {
		s.messages = append(s.messages, *body["msg"])
		fmt.Fprint(w, `{"status":"success"}`)
		return
	}
	w.Header().Set("Location", "http://127.0.0.1:1/")
	w.WriteHeader(status)
	fmt.Fprint(w, `{"status":"error","code":"ERR-1","message":"not \u001b[31mso"}`)
}

func (s *notificationServer) got() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.messages...)
}

// slow delays every answer from now on.
func (s *notificationServer) slow(delay time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.delay = delay
}

// asked gives the path of every request.
func (s *notificationServer) asked() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.paths...)
}

func (s *notificationServer) env() []string { return saveEnv(s.URL + "/msg/notif") }

func saveEnv(host string) []string {
	return []string{"JOB_ITEM_TASK_ID=task-1", "JOB_ITEM_MSG_NOTIF_HOST=" + host}
}

// asJSON is what a message says of the input: encoding/json's own reading of it.
func asJSON(t testing.TB, input string) string {
	t.Helper()
	text, err := json.Marshal(input)
	if err != nil {
		t.Fatal(err)
	}
	var back string
	if err := json.Unmarshal(text, &back); err != nil {
		t.Fatal(err)
	}
	return back
}

// checkMessages fails unless messages are text, cut where it should be.
func checkMessages(t testing.TB, limit int, messages []string, text string) {
	t.Helper()
	if joined := strings.Join(messages, ""); joined != text {
		at := 0
		for at < min(len(joined), len(text)) && joined[at] == text[at] {
			at++
		}
		t.Fatalf("messages hold %d bytes, want %d, they differ at %d", len(joined), len(text), at)
	}
	if text == "" && len(messages) != 1 {
		t.Fatalf("%d messages for empty input, want 1", len(messages))
	}
	rest := text
	for i, message := range messages {
		rest = rest[len(message):]
		last := i == len(messages)-1
		switch {
		case len(message) > limit:
			t.Fatalf("message %d has %d bytes, want at most %d", i, len(message), limit)
		case !utf8.ValidString(message):
			t.Fatalf("message %d is cut within a character", i)
		case message == "" && text != "":
			t.Fatalf("message %d is empty", i)
		case last:
		case strings.HasSuffix(message, "\n"):
			line, _, more := strings.Cut(rest, "\n")
			if more && len(message)+len(line)+1 <= limit {
				t.Fatalf("message %d could have held another line", i)
			}
		case strings.Contains(message, "\n"):
			t.Fatalf("message %d is cut within a line", i)
		default:
			if _, size := utf8.DecodeRuneInString(rest); len(message)+size <= limit {
				t.Fatalf("message %d could have held another character", i)
			}
		}
	}
}

func TestSaveCopiesAndSends(t *testing.T) {
	random := make([]byte, 300_000)
	rand.NewChaCha8([32]byte{1}).Read(random)
	for name, input := range map[string]string{
		"empty":              "",
		"one byte":           "x",
		"a line":             "hello\n",
		"one less than full": strings.Repeat("x", saveMessageBytes-1),
		"full":               strings.Repeat("x", saveMessageBytes),
		"one more than full": strings.Repeat("x", saveMessageBytes+1),
		"lines":              strings.Repeat("a line of text\n", 20_000),
		"a long line":        "short\n" + strings.Repeat("long", 80_000),
		"character at cut":   strings.Repeat("x", saveMessageBytes-1) + "é" + strings.Repeat("日本", 40_000),
		"invalid that grows": strings.Repeat("\xff", saveMessageBytes),
		"early line end":     "\n" + strings.Repeat("x", saveMessageBytes-1) + "日",
		"cut short at end":   "ok \xf0\x9f\x98",
		"binary":             string(random),
		"escapes":            strings.Repeat("\x00<&>\"\\\u2028", 30_000),
	} {
		t.Run(name, func(t *testing.T) {
			s := newNotificationServer(t)
			got := runCLI(t, s.env(), input, "save")
			if got.code != 0 || got.stderr != "" {
				t.Errorf("save exits %d with %q on stderr", got.code, got.stderr)
			}
			if got.stdout != input {
				t.Errorf("stdout has %d bytes, want the %d of the input", len(got.stdout), len(input))
			}
			checkMessages(t, saveMessageBytes, s.got(), asJSON(t, input))
			if len(input) <= saveMessageBytes && utf8.ValidString(input) && len(s.got()) != 1 {
				t.Errorf("%d messages for what fits in one", len(s.got()))
			}
		})
	}
}

func TestSaveURL(t *testing.T) {
	for host, want := range map[string]string{
		"/msg/notif":                  "/msg/notif/task-1",
		"/msg/notif/":                 "/msg/notif/task-1",
		"/msg/notif/task-1":           "/msg/notif/task-1",
		"/msg/notif/task-1/":          "/msg/notif/task-1",
		"/msg/notif/other-task-1":     "/msg/notif/other-task-1/task-1",
		"":                            "/task-1",
		"/msg/notif?token=a%2Fb":      "/msg/notif/task-1",
		"/a%20b/msg":                  "/a b/msg/task-1",
		"/msg/notif/task-1?project=x": "/msg/notif/task-1",
	} {
		s := newNotificationServer(t)
		if got := runCLI(t, saveEnv(s.URL+host), "x", "save"); got.code != 0 || !slices.Equal(s.asked(), []string{want}) {
			t.Errorf("with host %q save exits %d and posts to %q, want %q", host, got.code, s.asked(), want)
		}
	}
}

// Nothing is read before the variables are right, so that what is piped in is not lost silently.
func TestSaveRefusesBadVariables(t *testing.T) {
	for _, c := range []struct{ id, host, want string }{
		{"", "http://127.0.0.1:1/", "not set: JOB_ITEM_TASK_ID [ERR-26112300701]"},
		{"task-1", "", "JOB_ITEM_MSG_NOTIF_HOST=http://"},
		{"", "", "not set: JOB_ITEM_TASK_ID, JOB_ITEM_MSG_NOTIF_HOST"},
		{"../evil", "http://127.0.0.1:1/", `"../evil" is no task id`},
		{".hidden", "http://127.0.0.1:1/", "is no task id"},
		{strings.Repeat("x", 129), "http://127.0.0.1:1/", "is no task id"},
		{"task-1", "ftp://127.0.0.1/", "want http:// or https://"},
		{"task-1", "127.0.0.1:8080/msg", "bad URL in JOB_ITEM_MSG_NOTIF_HOST"},
		{"task-1", "http:///msg", "it names no host"},
		{"task-1", "http://user:geheim@[bad/", "bad URL in JOB_ITEM_MSG_NOTIF_HOST"},
	} {
		env := []string{"JOB_ITEM_TASK_ID=" + c.id, "JOB_ITEM_MSG_NOTIF_HOST=" + c.host}
		for _, args := range [][]string{{"save"}, {"save", "--", "test-command-that-must-not-run"}} {
			got := runCLI(t, env, "input", args...)
			if got.code != exitUsage || !strings.Contains(got.stderr, c.want) || got.stdout != "" {
				t.Errorf("%q with %q: exit %d, stdout %q, stderr %q; want exit 2 and %q",
					args, env, got.code, got.stdout, got.stderr, c.want)
			}
			if strings.Contains(got.stderr, "geheim") {
				t.Errorf("%q shows the password: %s", args, got.stderr)
			}
		}
	}
}

func TestSaveRetries(t *testing.T) {
	t.Parallel() // beside others that wait
	for status, final := range map[int]bool{
		400: true, 401: true, 404: true, 413: true, 307: true,
		408: false, 429: false, 500: false, 503: false,
	} {
		s := newNotificationServer(t, status, status)
		got := runCLI(t, s.env(), "hello\n", "save")
		if got.stdout != "hello\n" {
			t.Errorf("%d: stdout is %q", status, got.stdout)
		}
		if !final {
			if got.code != 0 || len(s.got()) != 1 || len(s.asked()) != 3 || got.stderr != "" {
				t.Errorf("%d twice: exit %d after %d requests, stderr %q; want the message sent by the third",
					status, got.code, len(s.asked()), got.stderr)
			}
			continue
		}
		if got.code != 1 || len(s.asked()) != 1 || !strings.Contains(got.stderr, strconv.Itoa(status)) ||
			!strings.Contains(got.stderr, "[ERR-26112300704]") || strings.Contains(got.stderr, "\x1b") {
			t.Errorf("%d: exit %d after %d requests, stderr %q; want a final refusal", status, got.code, len(s.asked()), got.stderr)
		}
	}
}

// A receiver that is there only later gets the message.
func TestSaveWaitsForReceiver(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := listener.Addr().String()
	listener.Close()
	cmd := cliCommand(t, saveEnv("http://"+addr), "save")
	cmd.Stdin = strings.NewReader("hello")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	io.ReadFull(out, make([]byte, len("hello"))) // it runs
	s := &notificationServer{}
	var later net.Listener
	waitFor(t, 5*time.Second, func() string {
		if later, err = net.Listen("tcp", addr); err != nil {
			return err.Error()
		}
		return ""
	})
	s.Server = &httptest.Server{Listener: later, Config: &http.Server{Handler: http.HandlerFunc(s.serve)}}
	s.Start()
	defer s.Close()
	if err := cmd.Wait(); err != nil || len(s.got()) != 1 {
		t.Errorf("save ends with %v, %d messages", err, len(s.got()))
	}
}

// savePatient runs save in this process with a shorter patience.
func savePatient(t *testing.T, url string, input io.Reader, output io.Writer) (code int, stderr string) {
	t.Helper()
	var errOut bytes.Buffer
	target, err := parseHTTPURL(url)
	if err != nil {
		t.Fatal(err)
	}
	s := newSaver(target, &invocation{stdin: input, stdout: output, stderr: &errOut})
	s.retryFor, s.poster.retryFor, s.poster.pause = 300*time.Millisecond, 300*time.Millisecond, 10*time.Millisecond
	return s.saveInput(context.Background()), errOut.String()
}

// A dead receiver costs the messages, but neither the copy nor more than the patience once.
func TestSaveDeadReceiver(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0") // takes connections, never answers
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	for url, want := range map[string]string{
		"http://127.0.0.1:1/":                     "refused",
		"http://" + silent.Addr().String() + "/x": "no answer",
	} {
		input := strings.Repeat("some line\n", 1_000_000) // more than may wait
		var out bytes.Buffer
		begin := time.Now()
		code, stderr := savePatient(t, url, strings.NewReader(input), &out)
		if code != 1 || !strings.Contains(stderr, want) {
			t.Errorf("%s: exit %d, stderr %q; want 1 and %q", url, code, stderr, want)
		}
		if out.String() != input {
			t.Errorf("%s: %d bytes copied, want %d", url, out.Len(), len(input))
		}
		if took := time.Since(begin); took > 5*time.Second {
			t.Errorf("%s: took %v", url, took)
		}
	}
}

func TestSaveSlowReceiver(t *testing.T) {
	t.Parallel() // beside others that wait
	s := newNotificationServer(t)
	s.slow(30 * time.Millisecond)
	input := strings.Repeat("some line\n", 400_000)
	if got := runCLI(t, s.env(), input, "save"); got.code != 0 || got.stdout != input {
		t.Errorf("save exits %d, %d bytes copied: %s", got.code, len(got.stdout), got.stderr)
	}
	checkMessages(t, saveMessageBytes, s.got(), input)
}

// What arrives is written at once, also when neither a line nor a message is complete.
func TestSaveCopiesAtOnce(t *testing.T) {
	s := newNotificationServer(t)
	cmd := cliCommand(t, s.env(), "save")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for _, piece := range []string{"a", "\xe6", "\x97\xa5", "line\n"} {
		if _, err := io.WriteString(in, piece); err != nil {
			t.Fatal(err)
		}
		back := make([]byte, len(piece))
		if _, err := io.ReadFull(out, back); err != nil || string(back) != piece {
			t.Fatalf("wrote %q, read %q, %v", piece, back, err)
		}
	}
	in.Close()
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	checkMessages(t, saveMessageBytes, s.got(), "a日line\n")
}

func TestSaveMemory(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("reads /proc")
	}
	size := 200_000_000
	if raceEnabled {
		size = 20_000_000 // memory tells nothing then, and it takes long
	}
	s := newNotificationServer(t)
	cmd := cliCommand(t, s.env(), "save")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line := strings.Repeat("x", 99) + "\n"
	begin := time.Now()
	go io.CopyN(in, repeated(strings.Repeat(line, 500)), int64(size)) // ends with the copying below
	if n, err := io.CopyN(io.Discard, out, int64(size)); err != nil {
		t.Fatalf("%d bytes copied: %v", n, err)
	}
	// Not ru_maxrss, which a child inherits from a large parent.
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	in.Close()
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if sent := len(strings.Join(s.got(), "")); sent != size {
		t.Errorf("%d bytes sent, want %d", sent, size)
	}
	_, peakText, _ := strings.Cut(string(status), "VmHWM:")
	var peak int // KiB
	if _, err := fmt.Sscan(peakText, &peak); err != nil {
		t.Fatal(err)
	}
	t.Logf("peak memory %d KiB, copied in %v", peak, time.Since(begin))
	if !raceEnabled && peak > 20<<10 {
		t.Errorf("peak memory %d KiB, want at most 20 MiB", peak)
	}
}

// repeated is endless text.
type repeated string

func (r repeated) Read(p []byte) (int, error) { return copy(p, r), nil }

// errorOutput runs a command and gives its stderr.
func errorOutput(cmd *exec.Cmd) (string, error) {
	var errOut bytes.Buffer
	cmd.Stderr = &errOut
	err := cmd.Run()
	return errOut.String(), err
}

// `save | head -1`: the reader leaves, the message counts.
func TestSaveClosedStdout(t *testing.T) {
	s := newNotificationServer(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	input := strings.Repeat("some line\n", 50_000)
	cmd := cliCommand(t, s.env(), "save")
	cmd.Stdin, cmd.Stdout = strings.NewReader(input), w
	if out, err := errorOutput(cmd); err != nil || out != "" {
		t.Errorf("save ends with %v, stderr %q", err, out)
	}
	w.Close()
	checkMessages(t, saveMessageBytes, s.got(), input)
}

type saveBrokenReader struct{}

func (saveBrokenReader) Read([]byte) (int, error) { return 0, errors.New("bad tape") }

type saveBrokenWriter struct{}

func (saveBrokenWriter) Write([]byte) (int, error) { return 0, errors.New("disk full") }

func TestSaveBrokenCopy(t *testing.T) {
	s := newNotificationServer(t)
	code, stderr := savePatient(t, s.URL, strings.NewReader("hello"), saveBrokenWriter{})
	if code != 1 || !strings.Contains(stderr, "disk full") {
		t.Errorf("full disk: exit %d, stderr %q", code, stderr)
	}
	code, stderr = savePatient(t, s.URL, io.MultiReader(strings.NewReader("hello"), saveBrokenReader{}), io.Discard)
	if code != 1 || !strings.Contains(stderr, "bad tape") {
		t.Errorf("bad tape: exit %d, stderr %q", code, stderr)
	}
	if got := s.got(); len(got) != 2 || got[0] != "hello" || got[1] != "hello" {
		t.Errorf("messages are %q, want what was read", got)
	}
}

func TestSaveSignals(t *testing.T) {
	t.Parallel() // beside others that wait
	if runtime.GOOS == "windows" {
		t.Skip("signals cannot be sent")
	}
	for sig, code := range map[syscall.Signal]int{syscall.SIGINT: 130, syscall.SIGTERM: 143, syscall.SIGHUP: 129} {
		s := newNotificationServer(t)
		cmd := cliCommand(t, s.env(), "save")
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		io.WriteString(in, "before \xe6")
		io.ReadFull(out, make([]byte, 8))
		cmd.Process.Signal(sig)
		io.WriteString(in, "\x97\xa5 last words\xe6") // and never an end of input
		io.ReadFull(out, make([]byte, 14))
		cmd.Wait()
		if got := cmd.ProcessState.ExitCode(); got != code {
			t.Errorf("%v: exit %d, want %d", sig, got, code)
		}
		checkMessages(t, saveMessageBytes, s.got(), "before 日 last words\ufffd")
		in.Close()
	}
}

// The second signal ends the sending too.
func TestSaveSecondSignal(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("signals cannot be sent")
	}
	asked := make(chan struct{}, 9)
	release := make(chan struct{})
	hang := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		asked <- struct{}{}
		<-release
	}))
	defer hang.Close()
	defer close(release)
	cmd := cliCommand(t, saveEnv(hang.URL), "save")
	cmd.Stdin = strings.NewReader("hello")
	var errOut bytes.Buffer
	cmd.Stderr = &errOut
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	<-asked
	cmd.Process.Signal(syscall.SIGTERM)
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	waitFor(t, 10*time.Second, func() string {
		cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
			return ""
		default:
			return "save still sends"
		}
	})
	if code := cmd.ProcessState.ExitCode(); code != 143 || !strings.Contains(errOut.String(), "stopped by") {
		t.Errorf("exit %d, stderr %q", code, errOut.String())
	}
}
