package main

// service_slot.go stands in for the worker while there is none: the REST API answers from the first moment, but the
// worker begins when its configuration is complete, for which a Job Manager may have to be waited.

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"sync/atomic"
	"time"
)

// A serviceSlot is a taskService that says "starting" until it is filled with the real one. To the health of either it
// adds what the parent knows.
type serviceSlot struct {
	cfg     *Config
	started time.Time

	filled   atomic.Pointer[worker]
	isFilled chan struct{}                     // closed then
	problem  atomic.Pointer[string]            // why there is no worker; nil: the manager is waited for
	problems atomic.Pointer[map[string]string] // of the parent, by what they are about; nil: none
	execs    atomic.Pointer[[]execHealth]      // the background processes; nil: none
}

var _ taskService = (*serviceSlot)(nil)

func newServiceSlot(cfg *Config) *serviceSlot {
	return &serviceSlot{cfg: cfg, started: time.Now(), isFilled: make(chan struct{})}
}

// fill has one caller, once.
func (s *serviceSlot) fill(w *worker) {
	s.filled.Store(w)
	close(s.isFilled)
}

// openPatience is how long a request waits for a worker that is about to begin, as after a restart.
const openPatience = 5 * time.Second

// await gives the worker once it can accept tasks. It is errStarting when that takes too long.
func (s *serviceSlot) await(ctx context.Context) (*worker, error) {
	ctx, stop := context.WithTimeout(ctx, openPatience)
	defer stop()
	select {
	case <-s.isFilled:
	case <-ctx.Done():
		return nil, errStarting
	}
	w := s.filled.Load()
	select {
	case <-w.opened:
		return w, nil
	case <-ctx.Done():
		return nil, errStarting
	}
}

// explain says why there is no worker yet.
func (s *serviceSlot) explain(err error) {
	text := codedText(err)
	s.problem.Store(&text)
}

// hear notes what the parent says of itself and of the background processes.
func (s *serviceSlot) hear(o order) {
	if o.Problems != nil {
		s.problems.Store(&o.Problems)
	}
	if o.Execs != nil {
		s.execs.Store(&o.Execs)
	}
}

func (s *serviceSlot) create(ctx context.Context, appID, event string, formBody json.RawMessage) (string, error) {
	w, err := s.await(ctx)
	if err != nil {
		return "", err
	}
	return w.create(ctx, appID, event, formBody)
}

func (s *serviceSlot) terminate(ctx context.Context, taskID string) error {
	w, err := s.await(ctx)
	if err != nil {
		return err
	}
	return w.terminate(ctx, taskID)
}

func (s *serviceSlot) notify(ctx context.Context, taskID, msg string) error {
	w, err := s.await(ctx)
	if err != nil {
		return err
	}
	return w.notify(ctx, taskID, msg)
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
	w := s.filled.Load()
	if w == nil {
		return s.withParent(s.starting())
	}
	return s.withParent(w.health())
}

// starting is the health while there is no worker.
func (s *serviceSlot) starting() healthReport {
	problems := []string{}
	if known := s.problem.Load(); known != nil {
		problems = append(problems, *known)
	} else if s.cfg.EndPoint != "" {
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

// withParent adds what the parent knows.
func (s *serviceSlot) withParent(report healthReport) healthReport {
	before := len(report.Problems)
	if problems := s.problems.Load(); problems != nil {
		for _, about := range slices.Sorted(maps.Keys(*problems)) {
			report.Problems = append(report.Problems, (*problems)[about])
		}
	}
	if execs := s.execs.Load(); execs != nil {
		report.Execs = *execs
		for _, e := range *execs {
			if e.State == execFailed {
				report.Problems = append(report.Problems, fmt.Sprintf("background process %q has been given up", e.Key))
			}
		}
	}
	if len(report.Problems) > before && report.Status == healthOK {
		report.Status = healthDegraded
	}
	return report
}
