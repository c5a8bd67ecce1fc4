package main

// log.go makes the logger and writes the life of the tasks to it: one line per event that a person would ask about.
// Task output is in the log only at DEBUG.

import (
	"context"
	"io"
	"log/slog"
	"sync/atomic"
	"time"
)

// newLogger makes a logger that writes to w as cfg says.
func newLogger(w io.Writer, cfg *Config) *slog.Logger {
	options := &slog.HandlerOptions{Level: cfg.LogLevel}
	h := formatHandler{text: slog.NewTextHandler(w, options), json: slog.NewJSONHandler(w, options), useJSON: &atomic.Bool{}}
	log := slog.New(h)
	setLogFormat(log, cfg.LogFormat)
	return log
}

// setLogFormat changes the format of a logger that newLogger made, and of all that were derived from it.
func setLogFormat(log *slog.Logger, format string) {
	if h, ok := log.Handler().(formatHandler); ok {
		h.useJSON.Store(format == "json")
	}
}

// A formatHandler writes in the one or the other format, which may change at any time.
type formatHandler struct {
	text, json slog.Handler
	useJSON    *atomic.Bool
}

func (h formatHandler) current() slog.Handler {
	if h.useJSON.Load() {
		return h.json
	}
	return h.text
}

func (h formatHandler) Enabled(ctx context.Context, level slog.Level) bool {
	return h.text.Enabled(ctx, level)
}

func (h formatHandler) Handle(ctx context.Context, r slog.Record) error {
	return h.current().Handle(ctx, r)
}

func (h formatHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return formatHandler{h.text.WithAttrs(attrs), h.json.WithAttrs(attrs), h.useJSON}
}

func (h formatHandler) WithGroup(name string) slog.Handler {
	return formatHandler{h.text.WithGroup(name), h.json.WithGroup(name), h.useJSON}
}

// logEvents is the log as a subscriber of the event bus.
func logEvents(log *slog.Logger) func(event) {
	return func(e event) {
		switch e := e.(type) {
		case taskQueued:
			log.Debug("task accepted", "task_id", e.TaskID, "event", e.Event)
		case taskStarted:
			log.Info("task started", "task_id", e.TaskID, "event", e.Event, "pid", e.PID, "attempt", e.Attempt)
		case taskOutput:
			log.Debug("task output", "task_id", e.TaskID, "stream", e.Stream, "data", string(e.Data))
		case taskRetrying:
			log.Warn("task failed, another attempt follows",
				"task_id", e.TaskID, "event", e.Event, "attempt", e.Attempt, "err", e.Reason, "due", e.Due.Format(time.RFC3339))
		case taskFinished:
			attrs := []any{"task_id", e.TaskID, "event", e.Event, "status", e.Status, "attempt", e.Attempt}
			if !e.StartedAt.IsZero() {
				attrs = append(attrs, "dur", e.FinishedAt.Sub(e.StartedAt).Round(time.Millisecond).String())
			}
			level := slog.LevelInfo
			if e.Status != statusFinish {
				level = slog.LevelWarn
				attrs = append(attrs, "err", e.Error)
				if e.Code != "" {
					attrs = append(attrs, "code", e.Code)
				}
			}
			log.Log(context.Background(), level, "task ended", attrs...)
		case brokerChanged:
			if e.Connected {
				log.Info("broker connected", "broker", e.Type)
			} else {
				log.Error("no connection to the broker", "broker", e.Type, "err", e.Err, "code", e.Code)
			}
		}
	}
}
