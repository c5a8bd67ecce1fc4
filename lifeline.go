package main

// lifeline.go is the language between parent and child: JSON lines, down the child's stdin and up its stdout. The end
// of stdin means that the parent is gone. Unknown fields are ignored, since an update runs a child under a parent of
// the version before.

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"
)

// alivePause is how often a child says that it makes progress.
const alivePause = 2 * time.Second

// maxLifelineBytes bounds one line; a configuration is the largest.
const maxLifelineBytes = 4 << 20

// An order is what the parent tells its child.
type order struct {
	Config   *Config `json:"config,omitempty"`   // the first order carries it, and later ones what it has become
	Pending  bool    `json:"pending,omitempty"`  // the manager has not completed it yet: a later order will
	Listener bool    `json:"listener,omitempty"` // descriptor 3 is the listening socket
	Standby  bool    `json:"standby,omitempty"`  // say that it lives, and wait: the order to begin follows
	Drain    bool    `json:"drain,omitempty"`    // stop gracefully
	Kill     bool    `json:"kill,omitempty"`     // stop at once

	// Problems is all that the parent knows to be wrong, by what it is about, for /health; nil: as before.
	Problems map[string]string `json:"problems,omitzero"`
	// Execs is how the background processes are doing, for /health; nil: as before.
	Execs []execHealth `json:"execs,omitzero"`
}

// A notice is what a child tells its parent.
type notice struct {
	Alive    bool `json:"alive,omitempty"`    // it makes progress; said every alivePause
	Ready    bool `json:"ready,omitempty"`    // it does its work
	Reload   bool `json:"reload,omitempty"`   // the manager wants its configuration asked for again
	Shutdown bool `json:"shutdown,omitempty"` // this worker is wanted to stop, by the manager or a background process
	Failed   bool `json:"failed,omitempty"`   // with Shutdown: it is a failure, and to be told by the exit code

	Pulse *pulse       `json:"pulse,omitempty"` // of the worker, with Alive
	Execs []execHealth `json:"execs,omitzero"`  // of the execs child: whenever one of its processes has changed
}

// writeLine sends an order or a notice.
func writeLine(w io.Writer, message any) error {
	line, err := json.Marshal(message)
	if err != nil {
		return err
	}
	_, err = w.Write(append(line, '\n'))
	return err
}

// lineReader reads what writeLine wrote.
type lineReader struct{ scanner *bufio.Scanner }

func newLineReader(r io.Reader) lineReader {
	scanner := bufio.NewScanner(r)
	scanner.Buffer(nil, maxLifelineBytes)
	return lineReader{scanner}
}

// next fills message from the next line; io.EOF when the other end is gone.
func (r lineReader) next(message any) error {
	if !r.scanner.Scan() {
		return errors.Join(r.scanner.Err(), io.EOF)
	}
	if err := json.Unmarshal(r.scanner.Bytes(), message); err != nil {
		return fmt.Errorf("read line of the other process: %w", err)
	}
	return nil
}

// A lifeline is a child's side of what ties it to its parent.
type lifeline struct {
	first  order // with the configuration
	orders lineReader
	log    *slog.Logger
	notify func(notice)
}

// joinParent begins a child's process: notices go up its stdout, and orders come down its stdin. What else it inherited
// its own children do not inherit.
func joinParent(inv *invocation) (*lifeline, error) {
	notices := os.Stdout
	os.Stdout = os.Stderr // whatever else would print there goes to the log
	sealDescriptors()
	hearOfNoChildren()
	l := &lifeline{orders: newLineReader(inv.stdin)}
	if err := l.begin(inv, notices); err != nil {
		return nil, fail(codeLifeline, "read the parent's first order", err)
	}
	// A terminal sends its interrupt and its end to the whole group; the parent passes on what is meant. And a parent or a
	// log's reader that is gone must not end this process by the pipe to it. They are not ignored, which commands would
	// inherit, but delivered to nobody.
	signal.Notify(make(chan os.Signal, 1), os.Interrupt, syscall.SIGHUP, syscall.SIGPIPE)
	return l, nil
}

// begin reads the order to begin. A new version on trial gets it when the old one has ended.
func (l *lifeline) begin(inv *invocation, notices io.Writer) error {
	for standby := true; standby; standby = l.first.Standby {
		l.first = order{}
		if err := l.orders.next(&l.first); err != nil {
			return err
		}
		if l.first.Config == nil {
			return errors.New("it holds no configuration")
		}
		l.log = newLogger(inv.stderr, l.first.Config)
		l.notify = func(n notice) {
			if err := writeLine(notices, n); err != nil {
				l.log.Debug("parent does not listen", errAttrs(err))
			}
		}
		if l.first.Standby {
			l.notify(notice{Alive: true})
		}
	}
	return nil
}

// signalOnce notes a wish that is open already if it is not taken yet.
func signalOnce(wish chan<- struct{}) {
	select {
	case wish <- struct{}{}:
	default:
	}
}
