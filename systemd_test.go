//go:build unix

package main

// systemd_test.go listens where systemd would.

import (
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// listenAsServiceManager opens a socket as NOTIFY_SOCKET names it.
func listenAsServiceManager(t *testing.T, name string) *net.UnixConn {
	t.Helper()
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: name})
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	return conn
}

// notifySocket is a path that is short enough for a socket wherever tests have their folders.
func notifySocket(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "notify")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "s")
}

// heard is the next message.
func heard(t *testing.T, manager *net.UnixConn) string {
	t.Helper()
	manager.SetReadDeadline(time.Now().Add(5 * time.Second))
	buf := make([]byte, 64<<10)
	n, err := manager.Read(buf)
	must(t, err)
	return string(buf[:n])
}

func variables(env map[string]string) func(string) (string, bool) {
	return func(name string) (string, bool) {
		value, ok := env[name]
		return value, ok
	}
}

func TestServiceNotifier(t *testing.T) {
	names := map[string]string{"path": notifySocket(t)}
	if runtime.GOOS == "linux" {
		names["abstract"] = fmt.Sprintf("@job_item/test/%d", os.Getpid())
	}
	for kind, name := range names {
		t.Run(kind, func(t *testing.T) {
			manager := listenAsServiceManager(t, name)
			n, err := newServiceNotifier(variables(map[string]string{
				"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "17",
			}), 17)
			must(t, err)
			if n.watchdog() != 30*time.Second {
				t.Errorf("watchdog is %v", n.watchdog())
			}
			for _, row := range []struct {
				sent error
				want string
			}{
				{n.ready("2 jobs\nMAINPID=1\x00\r"), "READY=1\nSTATUS=2 jobs MAINPID=1  "},
				{n.status("läuft\xff"), "STATUS=läuft\uFFFD"},
				{n.alive(), "WATCHDOG=1"},
				{n.mainPID(4711), "MAINPID=4711"},
				{n.stopping(), "STOPPING=1"},
			} {
				must(t, row.sent)
				if got := heard(t, manager); got != row.want {
					t.Errorf("the service manager heard %q; want %q", got, row.want)
				}
			}

			before := monotonicMicros()
			must(t, n.reloading())
			after := monotonicMicros()
			var at int64
			got := heard(t, manager)
			if runtime.GOOS != "linux" {
				if got != "RELOADING=1" {
					t.Errorf("the service manager heard %q", got)
				}
			} else if _, err := fmt.Sscanf(got, "RELOADING=1\nMONOTONIC_USEC=%d", &at); err != nil || at < before || at > after {
				t.Errorf("the service manager heard %q between %d and %d", got, before, after)
			}

			must(t, n.status(strings.Repeat("ü", 5000)))
			if got := heard(t, manager); len(got) > 2048 || !utf8.ValidString(got) || !strings.HasSuffix(got, "ü…") {
				t.Errorf("a long status has %d bytes: %.40q", len(got), got)
			}
		})
	}
}

// CLOCK_MONOTONIC goes on while the system is up, and is the time since boot but for suspensions.
func TestMonotonicClock(t *testing.T) {
	uptime, err := os.ReadFile("/proc/uptime")
	if err != nil {
		t.Skip("this system does not tell how long it is up")
	}
	var up float64
	fmt.Sscan(string(uptime), &up)
	if now := float64(monotonicMicros()) / 1e6; now < 1 || now > up+5 {
		t.Errorf("monotonic clock is at %.2f s, the system is up for %.2f s", now, up)
	}
}

func TestServiceNotifierNobodyAsks(t *testing.T) {
	for _, env := range []map[string]string{{}, {"NOTIFY_SOCKET": "", "WATCHDOG_USEC": "5"}} {
		n, err := newServiceNotifier(variables(env), 1)
		if n != nil || err != nil {
			t.Errorf("%v: notifier %v, %v", env, n, err)
		}
		for _, err := range []error{n.ready(""), n.status(""), n.reloading(), n.stopping(), n.alive(), n.mainPID(1)} {
			must(t, err)
		}
		if n.watchdog() != 0 {
			t.Errorf("%v: watchdog %v", env, n.watchdog())
		}
	}
}

func TestServiceNotifierBadSocket(t *testing.T) {
	for _, name := range []string{
		"relative", "@", "/", "vsock:2:1234", "http://x", " /run/notify", "/" + strings.Repeat("x", 107),
		"@" + strings.Repeat("x", 107), "\n",
	} {
		n, err := newServiceNotifier(variables(map[string]string{"NOTIFY_SOCKET": name}), 1)
		if n != nil || codeOf(err) != codeNotifySocket || !strings.Contains(err.Error(), fmt.Sprintf("%q", name)) {
			t.Errorf("NOTIFY_SOCKET %q: notifier %v, %v", name, n, err)
		}
	}
}

func TestServiceNotifierWatchdog(t *testing.T) {
	for _, row := range []struct {
		usec, pid string
		want      time.Duration
		bad       bool
	}{
		{"", "", 0, false},
		{"", "nonsense", 0, false},
		{"1", "", time.Microsecond, false},
		{"10000000", "42", 10 * time.Second, false},
		{"10000000", "43", 0, false},
		{"10000000", "-42", 0, true},
		{"10000000", "42x", 0, true},
		{"0", "42", 0, true},
		{"-1", "", 0, true},
		{"1e6", "", 0, true},
		{"30s", "", 0, true},
		{"9223372036854775", "", 9223372036854775 * time.Microsecond, false},
		{"9223372036854776", "", 0, true},
		{"18446744073709551615", "", 0, true},
	} {
		n, err := newServiceNotifier(variables(map[string]string{
			"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": row.usec, "WATCHDOG_PID": row.pid,
		}), 42)
		if n == nil || n.watchdog() != row.want || (codeOf(err) == codeWatchdog) != row.bad || err != nil && !row.bad {
			t.Errorf("WATCHDOG_USEC=%q WATCHDOG_PID=%q: %v, %v; want %v", row.usec, row.pid, n.watchdog(), err, row.want)
		}
	}
}

// A service manager that is gone, or does not read, holds nobody up, and one that has come back is found again.
func TestServiceNotifierUnheard(t *testing.T) {
	name := notifySocket(t)
	n, err := newServiceNotifier(variables(map[string]string{"NOTIFY_SOCKET": name}), 1)
	must(t, err)
	if err := n.ready("x"); codeOf(err) != codeNotifySend || !strings.Contains(err.Error(), "READY=1") {
		t.Errorf("nobody listens: %v", err)
	}
	manager := listenAsServiceManager(t, name)
	begin := time.Now()
	sent := 0
	for ; err == nil && sent < 100_000; sent++ {
		err = n.alive()
	}
	if took := time.Since(begin); codeOf(err) != codeNotifySend || took > 10*time.Second {
		t.Fatalf("nobody reads: after %d messages and %v: %v", sent, took, err)
	}
	heard(t, manager)
	must(t, n.alive())
}

func TestWithoutServiceVariables(t *testing.T) {
	env := []string{"A=1", "NOTIFY_SOCKET=/run/x", "WATCHDOG_PID=1", "WATCHDOG_USEC=", "MY_NOTIFY_SOCKET=y",
		"LISTEN_FDS=1", "LISTEN_PID=1", "LISTEN_FDNAMES=x", "NOTIFY_SOCKETS=z", "=C:=C:\\", "B=NOTIFY_SOCKET=1"}
	before := slices.Clone(env)
	got := withoutServiceVariables(env)
	want := []string{"A=1", "MY_NOTIFY_SOCKET=y", "NOTIFY_SOCKETS=z", "=C:=C:\\", "B=NOTIFY_SOCKET=1"}
	if !slices.Equal(got, want) || !slices.Equal(env, before) {
		t.Errorf("environment is %q, was %q", got, env)
	}
}

// A child that makes no progress is ended, and systemd's watchdog is fed until that has not helped either.
func TestSilentChild(t *testing.T) {
	name := notifySocket(t)
	manager := listenAsServiceManager(t, name)
	log := &lockedBuffer{}
	system, err := newServiceNotifier(variables(map[string]string{"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "60000000"}), 1)
	must(t, err)
	cmd := exec.Command("sleep", "300")
	must(t, cmd.Start())
	t.Cleanup(func() { cmd.Process.Kill() })
	s := &supervisor{system: system, log: slog.New(slog.NewTextHandler(log, nil))}
	s.worker = keptChild{name: "worker process", process: &childProcess{cmd: cmd}}
	s.checkLiveness(29 * time.Second)
	if s.childEvent(childEvent{from: s.worker.process, notice: notice{Alive: true}}); s.worker.silent != 0 {
		t.Errorf("a child that has just said that it lives is silent for %v", s.worker.silent)
	}
	s.checkLiveness(29 * time.Second)
	if !alive(cmd.Process.Pid) || log.String() != "" {
		t.Errorf("ended too early: %s", log)
	}
	s.checkLiveness(time.Second)
	if err := cmd.Wait(); err == nil || err.Error() != "signal: killed" || !strings.Contains(log.String(), string(codeChildSilent)) {
		t.Errorf("a silent child: %v\n%s", err, log)
	}
	s.worker.process = nil
	s.checkLiveness(29 * time.Second)
	must(t, s.system.status("59 s"))
	s.checkLiveness(time.Second)
	must(t, s.system.status("60 s"))
	for _, want := range []string{
		"WATCHDOG=1", "READY=1\nSTATUS=working", "WATCHDOG=1", "WATCHDOG=1", "WATCHDOG=1", "STATUS=59 s", "STATUS=60 s",
	} {
		if got := heard(t, manager); got != want {
			t.Errorf("the service manager heard %q; want %q", got, want)
		}
	}
}
