package main

// refresh.go keeps the parent's configuration up to date: the file, completed by what the Job Manager answers, asked
// for again at intervals and on demand. While the manager is away its last good answer serves.

import (
	"context"
	"log/slog"
	"reflect"
	"slices"
	"time"
)

// A configSource tells of every complete configuration, the first as soon as there is one.
type configSource struct {
	file    *Config
	client  *managerClient
	log     *slog.Logger
	updates chan configUpdate
	again   chan struct{} // ask the manager now

	onlyLooking bool // for --dry-run: leave no answer behind
}

// A configUpdate is sent when something has changed.
type configUpdate struct {
	config  *Config // complete; nil: as before
	problem string  // why the manager could not be asked; "": nothing is wrong
}

func newConfigSource(file *Config, log *slog.Logger) *configSource {
	return &configSource{
		file: file, client: newManagerClient(file, log), log: log,
		updates: make(chan configUpdate), again: make(chan struct{}, 1),
	}
}

// askAgain lets the manager be asked now rather than at the next interval.
func (s *configSource) askAgain() { signalOnce(s.again) }

// run asks the manager until ctx ends.
func (s *configSource) run(ctx context.Context) {
	var current *Config
	var warned []string
	failures, problem := 0, ""
	for {
		next, warnings, err := s.ask(ctx)
		if ctx.Err() != nil {
			return
		}
		pause := refreshPause(s.file.Refresh)
		update := configUpdate{}
		if err != nil {
			update.problem = err.Error()
			s.log.Error("no configuration from the manager", errAttrs(err))
			pause = min(pause, managerPause(failures))
			failures++
			if current == nil {
				next = s.lastAnswer()
			}
		} else {
			failures = 0
		}
		if !slices.Equal(warnings, warned) { // not the same ones at each interval
			for _, warning := range warnings {
				s.log.Warn("configuration", "err", warning)
			}
			warned = warnings
		}
		if next != nil && (current == nil || !reflect.DeepEqual(next, current)) {
			update.config, current = next, next
		}
		if update.config != nil || update.problem != problem {
			problem = update.problem
			select {
			case s.updates <- update:
			case <-ctx.Done():
				return
			}
		}
		select {
		case <-time.After(pause):
		case <-s.again:
		case <-ctx.Done():
			return
		}
	}
}

// ask gives the configuration as the manager wants it now, and what a person should know about it.
func (s *configSource) ask(ctx context.Context) (complete *Config, warnings []string, err error) {
	reply, err := s.client.ask(ctx)
	if err != nil {
		return nil, nil, err
	}
	if complete, warnings, err = reply.merge(s.file); err != nil {
		return nil, nil, err
	}
	if err := s.client.fetchCertificates(ctx, reply); err != nil {
		return nil, nil, err
	}
	if s.onlyLooking {
		return complete, warnings, nil
	}
	if err := s.client.remember(reply); err != nil {
		warnings = append(warnings, "the manager's answer is not kept for a start without it: "+err.Error())
	}
	return complete, warnings, nil
}

// lastAnswer gives the configuration that the manager's last good answer makes, nil if there is none.
func (s *configSource) lastAnswer() *Config {
	reply, at, err := s.client.remembered()
	if err != nil {
		s.log.Debug("no earlier answer of the manager is kept", errAttrs(err))
		return nil
	}
	next, _, err := reply.merge(s.file)
	if err != nil {
		s.log.Warn("the manager's last answer does not fit the configuration", errAttrs(err))
		return nil
	}
	s.log.Warn("starting with the manager's last answer", "received", at.Format(time.RFC3339))
	return next
}
