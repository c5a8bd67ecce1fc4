package main

// log.go makes the logger and writes the life of the tasks to it: one line per event that a person would ask about.
// Task output is in the log only at DEBUG.

import (
	"context"
	"io"
	"log/slog"
	"time"
)

func newLogger(w io.Writer, cfg *Config) *slog.Logger {
	options := &slog.HandlerOptions{Level: cfg.LogLevel}
	if cfg.LogFormat == "json" {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}

// logEvents is the log as a subscriber of the event bus.
func logEvents(log *slog.Logger) func(event) {
	return func(e event) {
		switch e := e.(type) {
		case taskQueued:
			log.Debug("task accepted", "task", e.TaskID, "job", e.Event)
		case taskStarted:
			log.Info("task started", "task", e.TaskID, "job", e.Event, "pid", e.PID, "attempt", e.Attempt)
		case taskOutput:
			log.Debug("task output", "task", e.TaskID, "stream", e.Stream, "data", string(e.Data))
		case taskRetrying:
			log.Warn("task failed, another attempt follows",
				"task", e.TaskID, "job", e.Event, "attempt", e.Attempt, "err", e.Reason, "due", e.Due.Format(time.RFC3339))
		case taskFinished:
			attrs := []any{"task", e.TaskID, "job", e.Event, "status", e.Status, "attempt", e.Attempt}
			if !e.StartedAt.IsZero() {
				attrs = append(attrs, "dur", e.FinishedAt.Sub(e.StartedAt).Round(time.Millisecond).String())
			}
			level := slog.LevelInfo
			if e.Status != statusFinish {
				level = slog.LevelWarn
				attrs = append(attrs, "err", e.Error)
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
