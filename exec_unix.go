//go:build unix

package main

// exec_unix.go is what running a command takes on Unix: process groups, signals, and /bin/sh.

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// hostShell is how this system's shell reads a line.
const hostShell = shellPOSIX

// A processGroup is named by the pid of the process that leads it.
type processGroup struct{ pgid int }

func groupAttributes(*command) *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }

func openGroup(leader int) (processGroup, error) { return processGroup{leader}, nil }

// terminate asks every member to end. A stopped process hears of it only when it goes on.
func (g processGroup) terminate() {
	syscall.Kill(-g.pgid, syscall.SIGTERM)
	syscall.Kill(-g.pgid, syscall.SIGCONT)
}

func (g processGroup) kill() { syscall.Kill(-g.pgid, syscall.SIGKILL) }

// empty reports that no process is in the group, once its leader has been reaped.
func (g processGroup) empty() bool {
	err := syscall.Kill(-g.pgid, 0)
	if err == syscall.ESRCH || err == syscall.EPERM && runtime.GOOS != "linux" {
		return true // macOS answers EPERM for a group of zombies
	}
	return g.lost(true)
}

// lost reports that the group's number is in use by another process: a number stays taken as long as a group bears it,
// so a process with the reaped leader's number means that the group is gone.
func (g processGroup) lost(reaped bool) bool {
	return reaped && syscall.Kill(g.pgid, 0) != syscall.ESRCH
}

// dead reports that only zombies are left, which whoever adopted them has yet to wait for.
func (g processGroup) dead() bool {
	members, known := groupMembers(g.pgid)
	return known && len(members) == 0
}

// describe names what is left of the group.
func (g processGroup) describe() string {
	members, _ := groupMembers(g.pgid)
	if len(members) == 0 {
		return fmt.Sprintf("process group %d is not empty", g.pgid)
	}
	return fmt.Sprintf("process group %d is not empty: %s", g.pgid, strings.Join(members[:min(len(members), 5)], ", "))
}

func (g processGroup) close() {}

// bindCommands does nothing: dieWithStarter binds each command, where the system can.
func bindCommands() (unbind func()) { return func() {} }

// readReady reads what is in the pipe right now, without waiting.
func readReady(pipe *os.File, buf []byte) (n int) {
	pipe.SetReadDeadline(time.Time{}) // a deadline in the past refuses to try
	conn, err := pipe.SyscallConn()
	if err != nil {
		return 0
	}
	conn.Read(func(fd uintptr) bool {
		for {
			if n, err = syscall.Read(int(fd), buf); err != syscall.EINTR {
				return true
			}
		}
	})
	return max(n, 0)
}

// sealDescriptors makes sure that nothing which this process inherited, such as the listening socket, is inherited
// further by commands. What Go opens itself never is. Call it once, when the inherited files have been taken over.
func sealDescriptors() {
	entries, err := os.ReadDir("/dev/fd")
	for _, entry := range entries {
		if fd, err := strconv.Atoi(entry.Name()); err == nil && fd > 2 {
			syscall.CloseOnExec(fd)
		}
	}
	if err != nil {
		for fd := 3; fd < 256; fd++ { // no /dev or /proc in here: those that a parent would use
			syscall.CloseOnExec(fd)
		}
	}
}

// hasShell reports whether this host can run shell lines.
func hasShell() bool {
	_, err := shellPath("", nil)
	return err == nil
}

func shellPath(dir string, env []string) (string, error) {
	const standard = "/bin/sh"
	if checkProgram(standard) == nil {
		return standard, nil
	}
	return lookProgram("sh", dir, env)
}

// shellCommand runs line by sh.
func shellCommand(line, dir string, env []string) (path string, argv []string, err error) {
	if path, err = shellPath(dir, env); err != nil {
		return "", nil, execError("start command", errors.New("it needs a shell, and this host has no sh"),
			"it needs one for pipes, redirections, variables, quotes within words or several commands; "+
				"a program with plain arguments runs without")
	}
	if strings.HasPrefix(line, "-") || strings.HasPrefix(line, "+") {
		line = " " + line // else sh would take it for its own options
	}
	return path, []string{"sh", "-c", line}, nil
}

// scriptCommand runs a file that the kernel does not know how to execute, as shells and execvp do: as a shell script,
// unless it is a program of another system.
func scriptCommand(file string, argv []string, dir string, env []string) (path string, shArgv []string, err error) {
	op := fmt.Sprintf("start program %q", file)
	if bytes.IndexByte(fileHead(file), 0) >= 0 {
		return "", nil, execError(op, fmt.Errorf("it is no program for %s/%s", runtime.GOOS, runtime.GOARCH),
			"install the build for this system")
	}
	if path, err = shellPath(dir, env); err != nil {
		return "", nil, execError(op, errors.New("it is a script for sh, and this host has no sh"),
			"name its interpreter in the first line: #!/path/of/interpreter")
	}
	return path, append([]string{"sh", file}, argv[1:]...), nil
}

// fileHead is the beginning of a file, as far as its first line can matter.
func fileHead(path string) []byte {
	file, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer file.Close()
	head := make([]byte, 256)
	n, _ := file.Read(head)
	return head[:n]
}

// checkProgram reports why path cannot be executed, nil if it can.
func checkProgram(path string) error {
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return err
	case info.IsDir():
		return errIsFolder
	case syscall.Access(path, 1 /* X_OK */) != nil:
		return errNotExecutable
	}
	return nil
}

// checkArguments: every program gets its arguments as they are.
func checkArguments(string, []string) error { return nil }

// programFiles are the files that may be meant by path.
func programFiles(path string, _ []string) []string { return []string{path} }

const defaultSearchPath = "/bin:/usr/bin" // where execvp looks without a PATH

func sameEnvName(a, b string) bool { return a == b }

// isTransient reports whether starting may succeed in a moment: a limit on processes, memory or files was hit, or the
// program is still open for writing, perhaps only in a process just being forked.
func isTransient(err error) bool {
	var errno syscall.Errno
	return errors.As(err, &errno) && slices.Contains([]syscall.Errno{
		syscall.EAGAIN, syscall.ENOMEM, syscall.ETXTBSY, syscall.EMFILE, syscall.ENFILE,
	}, errno)
}

// hostLacks is what the system says when it is short of disk, memory, processes or descriptors.
func hostLacks() []syscall.Errno {
	return []syscall.Errno{
		syscall.ENOSPC, syscall.EDQUOT, syscall.EMFILE, syscall.ENFILE, syscall.EAGAIN, syscall.ENOMEM,
	}
}

// explainStart says in a person's words why path was not started, and what to do.
func explainStart(path string, argv []string, err error) (hint string, cause error) {
	switch {
	case errors.Is(err, syscall.EAGAIN):
		return "the limit on processes of this user or container is reached (ulimit -u, pids.max)", err
	case errors.Is(err, syscall.ENOMEM):
		return "the host is out of memory", err
	case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE):
		return "the limit on open files is reached (ulimit -n, fs.file-max)", err
	case errors.Is(err, syscall.ETXTBSY):
		return "the program is open for writing: whoever copies it has not finished", err
	case errors.Is(err, syscall.E2BIG):
		size := 0
		for _, arg := range argv {
			size += len(arg)
		}
		return "pass large data through the file {{task_id}}.json instead of the command line",
			fmt.Errorf("%w: %d bytes", err, size)
	case errors.Is(err, syscall.EINVAL):
		return "an argument holds a NUL byte", err
	case errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.EACCES):
		head, isScript := strings.CutPrefix(string(fileHead(path)), "#!")
		if line, _, _ := strings.Cut(head, "\n"); isScript {
			interpreter, _, _ := strings.Cut(strings.TrimLeft(line, " \t"), " ")
			return "install it, or correct the script's first line (a \\r at its end comes from a Windows editor)",
				fmt.Errorf("its interpreter %q: %w", filepath.Clean(interpreter), err)
		}
		if errors.Is(err, syscall.ENOENT) {
			return "the file is there, its loader is not: the program was built for another system or C library", err
		}
	}
	return "", err
}

// reap waits for the process.
func (l leader) reap() exitStatus {
	end, _ := l.reapNow(0)
	return end
}

// reapEnded is reap for a process that has ended, false if it has not.
func (l leader) reapEnded() (end exitStatus, ended bool) {
	if l.process == nil {
		return l.reapNow(syscall.WNOHANG)
	}
	if !hasEnded(l.pid) {
		return end, false
	}
	return l.reap(), true
}

// reapNow is wait4(2).
func (l leader) reapNow(options int) (end exitStatus, reaped bool) {
	var status syscall.WaitStatus
	var use syscall.Rusage
	if l.process != nil {
		state, err := l.process.Wait()
		if err != nil {
			return exitStatus{code: -1}, false
		}
		status, _ = state.Sys().(syscall.WaitStatus)
		if used, ok := state.SysUsage().(*syscall.Rusage); ok {
			use = *used
		}
	} else {
		pid, err := syscall.Wait4(l.pid, &status, options, &use)
		for err == syscall.EINTR {
			pid, err = syscall.Wait4(l.pid, &status, options, &use)
		}
		if pid != l.pid {
			return exitStatus{code: -1}, false
		}
	}
	return exitStatus{
		code: status.ExitStatus(), signal: signalName(status), maxRSS: maxRSS(&use),
		cpu: time.Duration(use.Utime.Nano() + use.Stime.Nano()),
	}, true
}

// maxRSS is in bytes. Only Darwin's kernel counts in them.
func maxRSS(use *syscall.Rusage) int64 {
	if runtime.GOOS == "darwin" {
		return int64(use.Maxrss)
	}
	return int64(use.Maxrss) << 10
}

// signalName is the signal that killed a process, "SIGKILL", or "".
func signalName(status syscall.WaitStatus) string {
	if !status.Signaled() {
		return ""
	}
	names := map[syscall.Signal]string{
		syscall.SIGABRT: "SIGABRT", syscall.SIGALRM: "SIGALRM", syscall.SIGBUS: "SIGBUS", syscall.SIGFPE: "SIGFPE",
		syscall.SIGHUP: "SIGHUP", syscall.SIGILL: "SIGILL", syscall.SIGINT: "SIGINT", syscall.SIGIO: "SIGIO",
		syscall.SIGKILL: "SIGKILL", syscall.SIGPIPE: "SIGPIPE", syscall.SIGPROF: "SIGPROF", syscall.SIGQUIT: "SIGQUIT",
		syscall.SIGSEGV: "SIGSEGV", syscall.SIGSYS: "SIGSYS", syscall.SIGTERM: "SIGTERM", syscall.SIGTRAP: "SIGTRAP",
		syscall.SIGUSR1: "SIGUSR1", syscall.SIGUSR2: "SIGUSR2", syscall.SIGVTALRM: "SIGVTALRM",
		syscall.SIGXCPU: "SIGXCPU", syscall.SIGXFSZ: "SIGXFSZ",
	}
	if name := names[status.Signal()]; name != "" {
		return name
	}
	return "SIG" + strconv.Itoa(int(status.Signal()))
}
