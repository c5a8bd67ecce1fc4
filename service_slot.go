package main

// service_slot.go stands in for the worker while there is none: the REST API answers from the first moment, but the
// worker begins when its configuration is complete, for which a Job Manager may have to be waited.

import (
	"context"
	"encoding/json"
	"sync/atomic"
	"time"
)

// A serviceSlot is a taskService that says "starting" until it is filled with the real one.
type serviceSlot struct {
	cfg     *Config
	started time.Time

	filled  atomic.Pointer[worker]
	problem atomic.Pointer[string] // why there is no worker; nil: the manager is waited for
	manager atomic.Pointer[string] // why the manager could not be asked; nil or empty: nothing is wrong
}

var _ taskService = (*serviceSlot)(nil)

func newServiceSlot(cfg *Config) *serviceSlot { return &serviceSlot{cfg: cfg, started: time.Now()} }

func (s *serviceSlot) fill(w *worker) {
	s.filled.Store(w)
	if problem := s.manager.Load(); problem != nil {
		w.setProblem("manager", *problem)
	}
}

// explain says why there is no worker yet.
func (s *serviceSlot) explain(err error) {
	text := err.Error()
	s.problem.Store(&text)
}

// noteManager says why the manager could not be asked, or takes that back.
func (s *serviceSlot) noteManager(problem string) {
	s.manager.Store(&problem)
	if w := s.filled.Load(); w != nil {
		w.setProblem("manager", problem)
	}
}

func (s *serviceSlot) create(ctx context.Context, appID, event string, formBody json.RawMessage) (string, error) {
	if w := s.filled.Load(); w != nil {
		return w.create(ctx, appID, event, formBody)
	}
	return "", errStarting
}

func (s *serviceSlot) terminate(ctx context.Context, taskID string) error {
	if w := s.filled.Load(); w != nil {
		return w.terminate(ctx, taskID)
	}
	return errStarting
}

func (s *serviceSlot) notify(ctx context.Context, taskID, msg string) error {
	if w := s.filled.Load(); w != nil {
		return w.notify(ctx, taskID, msg)
	}
	return errStarting
}

func (s *serviceSlot) record(taskID string) (record, bool) {
	if w := s.filled.Load(); w != nil {
		return w.record(taskID)
	}
	return record{}, false
}

func (s *serviceSlot) list(f recordFilter) []record {
	if w := s.filled.Load(); w != nil {
		return w.list(f)
	}
	return nil
}

func (s *serviceSlot) health() healthReport {
	if w := s.filled.Load(); w != nil {
		return w.health()
	}
	problems := []string{}
	for _, known := range []*string{s.problem.Load(), s.manager.Load()} {
		if known != nil && *known != "" {
			problems = append(problems, *known)
		}
	}
	if len(problems) == 0 && s.cfg.EndPoint != "" {
		problems = append(problems, "the Job Manager at "+s.cfg.EndPoint+" has not answered yet")
	}
	status := healthStarting
	if time.Since(s.started) > startPatience {
		status = healthDown
	}
	return healthReport{
		Status: status, Problems: problems,
		IdentityID: s.cfg.IdentityID, Version: version, UptimeS: int64(time.Since(s.started).Seconds()),
		Broker: brokerHealth{Type: s.cfg.Broker.Type, Since: &s.started}, Execs: []execHealth{},
	}
}
