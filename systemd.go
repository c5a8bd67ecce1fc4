package main

// systemd.go speaks to the service manager that started this process, as sd_notify(3) does: that it is ready, takes up a
// new configuration, stops, and lives (PROTOCOL section 8). When to say so is the supervisor's affair.

import (
	"errors"
	"fmt"
	"math"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

const (
	// notifyPatience is how long a message may wait for room in the service manager's queue.
	notifyPatience = time.Second

	// maxStatusBytes keeps a message well below the 4096 bytes that systemd reads.
	maxStatusBytes = 1 << 10

	// maxSocketPath is what fits into an address of a Unix socket on Linux, with its NUL.
	maxSocketPath = 107
)

// serviceVariables are the service manager's messages to this process; no other program may take them for its own.
var serviceVariables = []string{
	"NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC",
	"LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES",
}

// withoutServiceVariables is an environment ("NAME=value") for another program than this one.
func withoutServiceVariables(env []string) []string {
	return slices.DeleteFunc(slices.Clone(env), func(entry string) bool {
		name, _, _ := strings.Cut(entry, "=")
		return slices.Contains(serviceVariables, name)
	})
}

// A serviceNotifier tells the service manager how this process is. A nil one says nothing. Its methods may be called
// concurrently and take at most notifyPatience; an error, such as of a manager that does not read, is for the log only.
type serviceNotifier struct {
	socket   *net.UnixAddr
	interval time.Duration
}

// newServiceNotifier finds out from the environment whom to tell; nil if nobody asks. pid is this process's. With an
// error (codeNotifySocket, codeWatchdog) what can be used is returned, too.
func newServiceNotifier(getenv func(string) (string, bool), pid int) (*serviceNotifier, error) {
	path, _ := getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil, nil
	}
	if err := checkNotifySocket(path); err != nil {
		return nil, failHint(codeNotifySocket, fmt.Sprintf("use NOTIFY_SOCKET %q", path), err,
			"The service manager sets it; unset it where there is none.")
	}
	// The package net takes a leading @ for the NUL of an abstract name, as systemd does.
	n := &serviceNotifier{socket: &net.UnixAddr{Net: "unixgram", Name: path}}
	var err error
	if n.interval, err = watchdogInterval(getenv, pid); err != nil {
		return n, failHint(codeWatchdog, "use WATCHDOG_USEC and WATCHDOG_PID", err,
			"The service manager sets them from WatchdogSec=; unset them where there is none.")
	}
	return n, nil
}

func checkNotifySocket(path string) error {
	switch {
	case path[0] != '/' && path[0] != '@':
		return errors.New("it is neither an absolute path nor the name of an abstract socket (@name)")
	case len(path) < 2:
		return errors.New("it names no socket")
	case len(path) > maxSocketPath:
		return fmt.Errorf("it has %d bytes, more than a socket's name can have (%d)", len(path), maxSocketPath)
	}
	return nil
}

// watchdogInterval is 0 where no watchdog is set, or one for another process.
func watchdogInterval(getenv func(string) (string, bool), pid int) (time.Duration, error) {
	text, _ := getenv("WATCHDOG_USEC")
	if text == "" {
		return 0, nil
	}
	if whose, _ := getenv("WATCHDOG_PID"); whose != "" {
		n, err := strconv.Atoi(whose)
		if err != nil || n < 1 {
			return 0, fmt.Errorf("WATCHDOG_PID is %q, no process number", whose)
		}
		if n != pid {
			return 0, nil
		}
	}
	micros, err := strconv.ParseInt(text, 10, 64)
	if err != nil || micros < 1 || micros > math.MaxInt64/1000 {
		return 0, fmt.Errorf("WATCHDOG_USEC is %q, no number of microseconds", text)
	}
	return time.Duration(micros) * time.Microsecond, nil
}

// watchdog is how often at least alive must be called; twice as often is advised. 0 means never.
func (n *serviceNotifier) watchdog() time.Duration {
	if n == nil {
		return 0
	}
	return n.interval
}

// ready ends the start and also each reloading.
func (n *serviceNotifier) ready(status string) error {
	return n.send("READY=1", "STATUS="+statusLine(status))
}

// status is the line that systemctl status shows.
func (n *serviceNotifier) status(text string) error { return n.send("STATUS=" + statusLine(text)) }

// reloading announces a new configuration; ready must follow, also when it was refused. systemd tells by the time which
// reload is meant (Type=notify-reload).
func (n *serviceNotifier) reloading() error {
	lines := []string{"RELOADING=1"}
	if now := monotonicMicros(); now > 0 {
		lines = append(lines, fmt.Sprintf("MONOTONIC_USEC=%d", now))
	}
	return n.send(lines...)
}

func (n *serviceNotifier) stopping() error { return n.send("STOPPING=1") }

// alive is the sign of life that the watchdog waits for.
func (n *serviceNotifier) alive() error { return n.send("WATCHDOG=1") }

// mainPID names the process that is the service from now on.
func (n *serviceNotifier) mainPID(pid int) error { return n.send(fmt.Sprintf("MAINPID=%d", pid)) }

// send opens a socket for each message, which also finds a service manager that has opened its own anew.
func (n *serviceNotifier) send(lines ...string) error {
	if n == nil {
		return nil
	}
	conn, err := net.DialUnix(n.socket.Net, nil, n.socket)
	if err == nil {
		defer conn.Close()
		conn.SetWriteDeadline(time.Now().Add(notifyPatience))
		_, err = conn.Write([]byte(strings.Join(lines, "\n")))
	}
	if err != nil {
		return fail(codeNotifySend, fmt.Sprintf("tell the service manager %s", lines[0]), err)
	}
	return nil
}

// statusLine makes of any text one that is a single assignment for systemd, which drops a message with a NUL or with
// bytes that are not UTF-8.
func statusLine(text string) string {
	text = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(text, "\uFFFD"))
	if len(text) <= maxStatusBytes {
		return text
	}
	end := maxStatusBytes
	for !utf8.RuneStart(text[end]) {
		end--
	}
	return text[:end] + "…"
}
