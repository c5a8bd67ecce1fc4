package main

// update_trial.go is how a proven version takes over (PROTOCOL section 11): its worker process first shows that it lives,
// while the old one works on; then it works under the old parent, on trial; then its file takes the binary's place, and at
// a quiet moment the parent follows. Until the file has been swapped, whatever goes wrong brings the old worker back.

import (
	"context"
	"errors"
	"fmt"
	"time"
)

const (
	trialLifeLimit   = 10 * time.Second // to say that it lives
	trialHealthLimit = time.Minute      // to become healthy
	trialSteady      = 10 * time.Second // healthy, without a break
	trialDeaths      = 2                // and it is over
	trialKillLimit   = 5 * time.Second  // for a worker that was never healthy to end by itself

	// trialPatience is how long the worker that runs may be unhealthy before a new version is tried all the same: it may
	// be what helps.
	trialPatience = 5 * time.Minute

	followQuiet = 10 * time.Second // without a task, and the parent follows
)

// A trialStage is how far a new version has come.
type trialStage int

const (
	trialWaits    trialStage = iota // for the worker that runs to be healthy
	trialStarts                     // its process starts, the old one works on
	trialReplaces                   // the old worker drains
	trialRuns                       // its worker works
	trialReturns                    // it has failed, and the old worker comes back
	trialPassed                     // it is installed, and the parent waits for a quiet moment
	trialLeaves                     // the children end, so that the parent can follow
)

// A trial is a new version on its way.
type trial struct {
	stage    trialStage
	since    time.Time // of the stage
	deaths   int
	everWell bool
}

// A pulse is how a worker says it is doing.
type pulse struct {
	Status  healthStatus `json:"status"`
	Running int64        `json:"running"` // tasks
	Ended   int64        `json:"ended"`   // tasks, since it was started
}

// vitals is what the parent makes of it.
type vitals struct {
	pulse     pulse
	wellSince time.Time // zero: it is not healthy
	idleSince time.Time // of running and ending no task
}

// hear notes what the worker says.
func (v *vitals) hear(said pulse) {
	now := time.Now()
	switch well := said.Status == healthOK || said.Status == healthDegraded; {
	case !well:
		v.wellSince = time.Time{}
	case v.wellSince.IsZero():
		v.wellSince = now
	}
	if said.Running > 0 || said.Ended != v.pulse.Ended || v.idleSince.IsZero() {
		v.idleSince = now
	}
	v.pulse = said
}

// wellFor is how long the worker has been healthy without a break; 0: it is not.
func (v *vitals) wellFor() time.Duration {
	if v.wellSince.IsZero() {
		return 0
	}
	return time.Since(v.wellSince)
}

func (v *vitals) idleFor() time.Duration { return time.Since(v.idleSince) }

// considerOffer looks at what the manager offers, unless a new version is on its way already.
func (s *supervisor) considerOffer(ctx context.Context, asked bool) {
	if s.stopping || s.trial != nil && s.trial.stage != trialPassed {
		return
	}
	s.updater.consider(ctx, s.cfg, s.offer, asked)
	s.tellUpdateProblem()
}

// fetched takes the outcome of a download and its proof.
func (s *supervisor) fetched(ctx context.Context, err error) {
	if s.updater.finishFetch(ctx, err) && !s.stopping {
		s.enter(&trial{}, trialWaits)
		s.advanceTrial(ctx)
	}
	s.tellUpdateProblem()
}

// enter begins a stage.
func (s *supervisor) enter(t *trial, stage trialStage) {
	s.trial = t
	t.stage, t.since = stage, time.Now()
}

// trialIn reports whether a new version is in this stage.
func (s *supervisor) trialIn(stage trialStage) bool { return s.trial != nil && s.trial.stage == stage }

// advanceTrial does what has become due. It is called every second, and when something has happened.
func (s *supervisor) advanceTrial(ctx context.Context) {
	if s.trial == nil || s.stopping {
		return
	}
	t, spent := s.trial, time.Since(s.trial.since)
	steady := s.worker.runs() && !s.worker.ending
	switch t.stage {
	case trialWaits:
		if steady && s.candidate == nil && (s.vitals.wellFor() > 0 || spent > trialPatience) {
			s.startCandidate()
		}
	case trialStarts:
		if spent > trialLifeLimit {
			s.failTrial(refuseVersion("start the new version", errSilentProgram))
		}
	case trialRuns:
		t.everWell = t.everWell || s.vitals.wellFor() > 0
		switch well := s.vitals.wellFor(); {
		case well > trialSteady:
			s.passTrial(ctx)
		case spent > trialHealthLimit && well == 0:
			s.failTrial(refuseVersion("trial of the new version",
				fmt.Errorf("it is not healthy after %v, but %q", trialHealthLimit, s.vitals.pulse.Status)))
		}
	case trialReturns:
		switch {
		case steady && s.vitals.wellFor() > 0:
			s.log.Info("the version before works again")
			s.endTrial()
			s.considerOffer(ctx, false)
		case spent > trialHealthLimit+s.cfg.DrainTimeout:
			s.updater.failed(failUpdate("trial of the new version",
				errors.New("it was not healthy, but then the version before is not healthy either")))
			s.endTrial()
			s.tellUpdateProblem()
		}
	case trialPassed:
		if steady && s.vitals.wellFor() > 0 && s.vitals.idleFor() > followQuiet && len(s.sourceProblems) == 0 &&
			s.updater.fetched == nil {
			s.leave()
		}
	case trialLeaves:
		if !s.worker.runs() && !s.execs.runs() {
			s.follow()
		}
	}
}

// startCandidate starts the new version's worker process, which is to do nothing yet.
func (s *supervisor) startCandidate() {
	s.log.Info("the new version goes on trial", "version", s.updater.offer.Name, "number", s.updater.offer.Number)
	process, err := s.startProcess(s.updater.file(), s.worker.command, order{Config: s.cfg, Standby: true, Listener: s.socket != nil})
	if err != nil {
		err = failUpdate("start the new version", err)
		if errors.Is(err, errForeignProgram) {
			err = &versionRefused{err}
		}
		s.failTrial(err)
		return
	}
	s.candidate = process
	s.enter(s.trial, trialStarts)
}

// candidateEvent follows the new version's process until it is the worker.
func (s *supervisor) candidateEvent(e childEvent) {
	switch {
	case e.ended:
		s.candidate = nil
		if s.trialIn(trialStarts) || s.trialIn(trialReplaces) {
			s.failTrial(refuseVersion("start the new version", fmt.Errorf("its process ended: %w", e.err)))
		}
	case e.notice.Alive && s.trialIn(trialStarts):
		s.enter(s.trial, trialReplaces)
		s.worker.drain(s, s.cfg.DrainTimeout+s.cfg.KillAfter+stopMargin)
	}
}

// promote makes the candidate the worker. The old one has ended.
func (s *supervisor) promote() {
	s.enter(s.trial, trialRuns)
	s.vitals = vitals{}
	s.worker.program = s.updater.file()
	s.worker.adopt(s.candidate)
	s.candidate = nil
	s.worker.tell(s, s.firstOrder())
}

// trialDeath counts the ends of the new version's worker.
func (s *supervisor) trialDeath(err error) {
	if s.trial.deaths++; s.trial.deaths >= trialDeaths {
		s.failTrial(refuseVersion("trial of the new version", fmt.Errorf("its worker has died %d times: %w", s.trial.deaths, err)))
	}
}

// failTrial lets the old version go on, or come back.
func (s *supervisor) failTrial(err error) {
	s.dropCandidate()
	replaced := s.trial.stage == trialReplaces || s.trial.stage == trialRuns
	if s.updater.failed(err); replaced {
		s.log.Warn("back to the version before")
		s.returnToOld()
	} else {
		s.endTrial()
	}
	s.tellUpdateProblem()
}

// returnToOld has the program that is installed take the worker's place again.
func (s *supervisor) returnToOld() {
	everWell := s.trial.everWell || s.worker.program == ""
	s.worker.program, s.worker.pause = "", minRestartPause
	s.enter(s.trial, trialReturns)
	s.vitals = vitals{}
	limit := trialKillLimit
	if everWell {
		limit = s.cfg.DrainTimeout + s.cfg.KillAfter + stopMargin
	}
	if s.worker.runs() {
		s.worker.drain(s, limit) // its end starts the old one
	} else {
		s.startWorker()
	}
}

// dropCandidate ends a process that has not begun to work.
func (s *supervisor) dropCandidate() {
	if s.candidate != nil {
		s.candidate.cmd.Process.Kill() // its event follows
	}
}

// recallCandidate has the new version's process started anew later.
func (s *supervisor) recallCandidate() {
	s.dropCandidate()
	s.enter(s.trial, trialWaits)
}

// passTrial puts the new version's file in the binary's place.
func (s *supervisor) passTrial(ctx context.Context) {
	if err := swapBinary(s.program); err != nil {
		s.failTrial(err)
		return
	}
	s.worker.program = "" // it is the installed one now
	s.updater.installed()
	s.log.Info("the new version is installed", "version", s.updater.offer.Name, "number", s.updater.number,
		"path", s.program, "previous", previousFile(s.program))
	s.swapped = true
	if s.endTrial(); !parentFollows {
		s.log.Info("the parent process becomes the new version when it is started the next time")
	}
	s.considerOffer(ctx, false)
}

// endTrial goes on with what is installed.
func (s *supervisor) endTrial() {
	if s.trial = nil; s.swapped && parentFollows {
		s.enter(&trial{}, trialPassed)
	}
}

// leave ends the children, so that the parent can become the new version. A task that begins just now is waited for.
func (s *supervisor) leave() {
	if _, err := loadConfig(s.cfg.File, s.source.getenv); err != nil {
		return // the file in force is another than what is there now
	}
	s.log.Info("the parent follows the new version")
	s.enter(s.trial, trialLeaves)
	s.worker.drain(s, s.cfg.DrainTimeout+s.cfg.KillAfter+stopMargin)
}

// follow turns this process into the new version. It returns only if that is impossible.
func (s *supervisor) follow() {
	err := takeOver(s.program, s.socket, s.cfg.Listen)
	s.updater.problem = codedText(failUpdate("become the new version", err))
	s.log.Error("the parent stays what it was", "err", s.updater.problem, "code", codeUpdate)
	s.trial, s.swapped = nil, false
	s.startWorker()
	s.keepExecs()
	s.tellUpdateProblem()
}

// tellUpdateProblem has /health say what is wrong with the update, and stop saying so.
func (s *supervisor) tellUpdateProblem() {
	if s.ownProblems["update"] == s.updater.problem {
		return
	}
	delete(s.ownProblems, "update")
	if s.updater.problem != "" {
		s.ownProblems["update"] = s.updater.problem
	}
	s.worker.tell(s, order{Problems: s.problems()})
}
