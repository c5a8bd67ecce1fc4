package main

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func init() {
	testRoles["save-print"] = func(args []string) int { // stdout text, stderr text, exit code
		fmt.Print(args[0])
		fmt.Fprint(os.Stderr, args[1])
		code, _ := strconv.Atoi(args[2])
		return code
	}
	testRoles["save-cat"] = func([]string) int {
		io.Copy(os.Stdout, os.Stdin)
		return 0
	}
	testRoles["save-kill-self"] = func([]string) int {
		self, _ := os.FindProcess(os.Getpid())
		self.Kill()
		select {}
	}
	testRoles["save-hang"] = func([]string) int {
		fmt.Println("ready")
		select {}
	}
	// Leaves a process behind that holds the outputs.
	testRoles["save-leave-behind"] = func(args []string) int {
		self, _ := os.Executable()
		grandchild := exec.Command(self, "test-role", "save-"+args[0])
		grandchild.Stdout, grandchild.Stderr = os.Stdout, os.Stderr
		if err := grandchild.Start(); err != nil {
			return 1
		}
		os.WriteFile(args[1], []byte(strconv.Itoa(grandchild.Process.Pid)), 0o600)
		fmt.Println("left it behind")
		return 0
	}
	testRoles["save-chatter"] = func([]string) int {
		for {
			if _, err := fmt.Println("chatter"); err != nil {
				return 0
			}
		}
	}
	testRoles["save-long"] = func([]string) int { // as much as fits into pipe and messages, then the end
		fmt.Print(strings.Repeat("0123456789abcde\n", 200_000))
		return 0
	}
}

// roleArgs is `save -- ` with a role of the test binary.
func roleArgs(t testing.TB, args ...string) []string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return append([]string{"save", "--", self, "test-role"}, args...)
}

func TestSaveCommand(t *testing.T) {
	s := newNotificationServer(t)
	got := runCLI(t, s.env(), "", roleArgs(t, "save-print", "to stdout\n", "to stderr\n", "7")...)
	if got != (cliResult{"to stdout\n", "to stderr\n", 7}) {
		t.Errorf("save -- gives %+v", got)
	}
	if m := s.got(); len(m) != 1 || m[0] != "to stdout\nto stderr\n" && m[0] != "to stderr\nto stdout\n" {
		t.Errorf("messages are %q", m)
	}
	got = runCLI(t, s.env(), "from stdin", roleArgs(t, "save-cat")...)
	if got != (cliResult{"from stdin", "", 0}) {
		t.Errorf("save -- cat gives %+v", got)
	}
	got = runCLI(t, s.env(), "", roleArgs(t, "save-print", "", "", "0")...)
	if m := s.got(); got.code != 0 || len(m) != 3 || m[1] != "from stdin" || m[2] != "" {
		t.Errorf("save -- with a silent command gives %+v, messages %q", got, m)
	}
	// One character through stdout in two pieces, with stderr between them, stays whole: the streams do not mix in it.
	if runtime.GOOS != "windows" {
		runCLI(t, s.env(), "", "save", "--", "sh", "-c", `printf '\346'; printf E >&2; printf '\227\245'`)
		if m := s.got(); m[3] != "E日" && m[3] != "日E" {
			t.Errorf("message is %q", m[3])
		}
	}
}

func TestSaveCommandExitCodes(t *testing.T) {
	s := newNotificationServer(t)
	notExecutable := filepath.Join(t.TempDir(), "plain.txt")
	if err := os.WriteFile(notExecutable, []byte("text"), 0o600); err != nil {
		t.Fatal(err)
	}
	for want, args := range map[int][]string{
		127: {"save", "--", "no-such-program-anywhere"},
		126: {"save", "--", notExecutable},
		137: roleArgs(t, "save-kill-self"),
	} {
		got := runCLI(t, s.env(), "", args...)
		if runtime.GOOS != "windows" && got.code != want {
			t.Errorf("%q exits %d, want %d: %s", args, got.code, want, got.stderr)
		}
		if want != 137 && !strings.Contains(got.stderr, "[ERR-26112300706]") {
			t.Errorf("%q says %q", args, got.stderr)
		}
	}
	if got := runCLI(t, s.env(), "", "save", "--", "./no/such/path"); got.code != 127 {
		t.Errorf("a path that does not exist: exit %d, want 127", got.code)
	}

	refusing := newNotificationServer(t, 400, 400)
	if got := runCLI(t, refusing.env(), "", roleArgs(t, "save-print", "x", "", "0")...); got.code != 1 || got.stdout != "x" {
		t.Errorf("sending refused, command succeeded: %+v, want exit 1", got)
	}
	if got := runCLI(t, refusing.env(), "", roleArgs(t, "save-print", "x", "", "7")...); got.code != 7 {
		t.Errorf("sending refused, command failed: exit %d, want 7", got.code)
	}
}

func TestSaveCommandSignals(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("signals cannot be sent")
	}
	for sig, code := range map[syscall.Signal]int{syscall.SIGTERM: 143, syscall.SIGHUP: 129} {
		s := newNotificationServer(t)
		cmd := cliCommand(t, s.env(), roleArgs(t, "save-hang")...)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		io.ReadFull(out, make([]byte, len("ready\n")))
		cmd.Process.Signal(sig)
		cmd.Wait()
		if got := cmd.ProcessState.ExitCode(); got != code {
			t.Errorf("%v: exit %d, want %d", sig, got, code)
		}
		checkMessages(t, saveMessageBytes, s.got(), "ready\n")
	}
}

// A process that the command leaves behind holds the pipe, silent or not, and must not hold save.
func TestSaveCommandLeavesProcess(t *testing.T) {
	for _, role := range []string{"hang", "chatter"} {
		s := newNotificationServer(t)
		pidFile := filepath.Join(t.TempDir(), "pid")
		begin := time.Now()
		got := runCLI(t, s.env(), "", roleArgs(t, "save-leave-behind", role, pidFile)...)
		if took := time.Since(begin); took > 20*time.Second {
			t.Errorf("%s: save took %v", role, took)
		}
		if m := strings.Join(s.got(), ""); got.code != 0 || !strings.Contains(got.stdout, "left it behind\n") || m != got.stdout {
			t.Errorf("%s: exit %d, stdout %.80q, message %.80q", role, got.code, got.stdout, m)
		}
		text, err := os.ReadFile(pidFile)
		if err != nil {
			t.Fatal(err)
		}
		if pid, _ := strconv.Atoi(string(text)); pid > 1 {
			if process, err := os.FindProcess(pid); err == nil {
				process.Kill()
			}
		}
	}
}

// A command that ends while the receiver is slow loses none of what is still in the pipe.
func TestSaveCommandSlowReceiver(t *testing.T) {
	t.Parallel() // beside others that wait
	s := newNotificationServer(t)
	s.slow(120 * time.Millisecond)
	got := runCLI(t, s.env(), "", roleArgs(t, "save-long")...)
	if want := strings.Repeat("0123456789abcde\n", 200_000); got.code != 0 || got.stdout != want {
		t.Errorf("exit %d, %d bytes, want %d: %s", got.code, len(got.stdout), len(want), got.stderr)
	}
	checkMessages(t, saveMessageBytes, s.got(), got.stdout)
}

// After the command's end a pipe that another process holds gives what is in it, however late it is read, and no more
// than a pipe holds.
func TestOutputPipeAfterEnd(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	pipe := &outputPipe{file: r}
	if err := r.SetReadDeadline(time.Now().Add(-time.Second)); err != nil {
		t.Skip("this system has no deadlines on pipes")
	}
	text := strings.Repeat("last words\n", 1000)
	io.WriteString(w, text)
	pipe.ended.Store(true)
	if got, err := io.ReadAll(pipe); err != nil || string(got) != text {
		t.Errorf("read %d bytes, %v; want %d", len(got), err, len(text))
	}

	written := make(chan struct{})
	go func() { // ends when the reading end is closed
		defer close(written)
		io.Copy(w, repeated(text))
	}()
	pipe = &outputPipe{file: r}
	pipe.ended.Store(true)
	if n, err := io.Copy(io.Discard, pipe); err != nil || n > savePipeBytes+saveBufferBytes {
		t.Errorf("read %d bytes of an endless pipe, %v; want at most %d", n, err, savePipeBytes+saveBufferBytes)
	}
	r.Close()
	<-written
	w.Close()
}
