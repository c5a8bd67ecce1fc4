package main

// message.go is what a manager sends to start a task: how it is read and checked, and what ids may look like.

import (
	"crypto/rand"
	"encoding/json"
	"fmt"
	"time"
)

// maxMessageBytes bounds a task's message (PROTOCOL section 6).
const maxMessageBytes = 16 << 20

// A taskMessage is what a manager sends to start a task.
type taskMessage struct {
	TaskID string          `json:"task_id"`
	Data   json.RawMessage `json:"data"`
	Action string          `json:"action,omitempty"`
}

// parseTaskMessage checks a message that claims to be a task (PROTOCOL section 6, item 1).
func parseTaskMessage(data []byte) (taskMessage, error) {
	var m taskMessage
	switch err := error(nil); {
	case len(data) > maxMessageBytes:
		return m, fail(codeMessage, "read task message", fmt.Errorf("%d bytes are more than the %d allowed", len(data), maxMessageBytes))
	default:
		if err = json.Unmarshal(data, &m); err != nil {
			return m, fail(codeMessage, "read task message", err)
		}
	}
	if !validTaskID(m.TaskID) {
		return m, fail(codeMessage, "read task message", fmt.Errorf(
			"task_id %.140q is not 1 to 128 of A-Z a-z 0-9 . _ - without a dot in front", m.TaskID))
	}
	if m.Action != "" && m.Action != "execute" {
		return m, fail(codeMessage, "read task message", fmt.Errorf("unknown action %.40q", m.Action))
	}
	if len(m.Data) == 0 {
		m.Data = json.RawMessage("{}")
	}
	return m, nil
}

// validTaskID reports whether an id may name a file and a subject.
func validTaskID(id string) bool {
	if len(id) == 0 || len(id) > 128 || id[0] == '.' {
		return false
	}
	for _, c := range []byte(id) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '.', c == '_', c == '-':
		default:
			return false
		}
	}
	return true
}

// newTaskID makes a UUID version 7 (RFC 9562): it sorts by time.
func newTaskID() string {
	var u [16]byte
	rand.Read(u[6:])
	ms := time.Now().UnixMilli()
	for i := range 6 {
		u[i] = byte(ms >> (40 - 8*i))
	}
	u[6] = u[6]&0x0f | 0x70
	u[8] = u[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}
