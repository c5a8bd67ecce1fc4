package main

// httpapi_follow.go serves the answers that have no end of their own: the log of a running task, and /events.

import (
	"errors"
	"io"
	"net/http"
	"time"
)

const (
	maxFollowers = 256 // logs being followed at once

	eventHeartbeat = 15 * time.Second
	followTimeout  = 10 * time.Minute // a reader of a log may pause that long
)

// showLog is GET /job/{task_id}/log.
func (a *apiServer) showLog(w http.ResponseWriter, r *http.Request) error {
	rec, err := a.recordOf(r)
	if err != nil {
		return err
	}
	follow := false
	switch r.URL.Query().Get("follow") {
	case "", "false", "0":
	case "true", "1":
		follow = r.Method != http.MethodHead
	default:
		return badRequest("show log", errors.New("follow must be true or false"))
	}
	reply := w.(*apiReply)
	if follow {
		if err := a.feed.enterFollow(); err != nil {
			return err
		}
		defer a.feed.leaveFollow()
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		reply.timeout = followTimeout
		reply.flush()
		return a.records.Load().followLog(r.Context(), rec.TaskID, reply, reply.flush)
	}
	log, err := a.records.Load().openLog(rec.TaskID)
	if errors.Is(err, errTaskUnknown) { // it has not started
		log, err = newLogReader("", nil, 0), nil
	}
	if err != nil {
		return err
	}
	defer log.Close()
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(http.StatusOK)
	if r.Method == http.MethodHead {
		return nil
	}
	_, err = io.Copy(reply, log)
	return err
}

// showEvents is GET /events: the events of the bus as server-sent events, numbered, from now on. With output=tail a
// piece of output comes as its last eventTailBytes only: enough to show what a task is at, however much it prints.
func (a *apiServer) showEvents(w http.ResponseWriter, r *http.Request) error {
	tail := false
	switch r.URL.Query().Get("output") {
	case "", "all":
	case "tail":
		tail = true
	default:
		return badRequest("read events", errors.New("output must be all or tail"))
	}
	reply := w.(*apiReply)
	w.Header().Set("Content-Type", "text/event-stream")
	if r.Method == http.MethodHead {
		w.WriteHeader(http.StatusOK)
		return nil
	}
	reader, err := a.feed.enter(tail)
	if err != nil {
		w.Header().Del("Content-Type")
		return err
	}
	defer a.feed.leave(reader)
	reply.flush()
	heartbeat := time.NewTicker(eventHeartbeat)
	defer heartbeat.Stop()
	for {
		written := false
		chunk, more := reader.take()
		for ; len(chunk) > 0; chunk, more = reader.take() {
			if _, err := reply.Write(chunk); err != nil {
				return err
			}
			written = true
		}
		if written {
			reply.flush()
			select {
			case <-time.After(a.feed.pace()):
			case <-r.Context().Done():
				return nil
			}
			continue
		}
		if !more {
			return nil
		}
		select {
		case <-reader.ready:
		case <-r.Context().Done():
			return nil
		case <-heartbeat.C:
			if _, err := io.WriteString(reply, ":\n\n"); err != nil {
				return err
			}
			reply.flush()
		}
	}
}
