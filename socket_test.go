package main

import (
	"net"
	"strings"
	"testing"
	"time"
)

// A port that another process is about to close is waited for.
func TestListenWaits(t *testing.T) {
	other, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closing := time.AfterFunc(100*time.Millisecond, func() { other.Close() })
	defer closing.Stop()
	listener, err := listen(other.Addr().String(), 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	if got, want := listener.Addr().String(), other.Addr().String(); got != want {
		t.Errorf("listens on %s; want %s", got, want)
	}
}

// Nobody listening is told from nobody answering.
func TestConnectionRefusedHints(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	listener.Close()
	_, err = net.Dial("tcp", listener.Addr().String())
	if hint := connectionHint(err); !strings.Contains(hint, "Nothing listens there") {
		t.Errorf("hint for %v: %q", err, hint)
	}
	if hint := connectHint(err); !strings.Contains(hint, "start RabbitMQ there") {
		t.Errorf("hint for %v: %q", err, hint)
	}
}
