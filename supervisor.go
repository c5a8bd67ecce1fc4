package main

// supervisor.go is the parent: it holds the listening socket and the configuration, keeps the worker and the background
// processes running, each as a child of its own, hands changed configurations down and passes signals on. It is small so
// that it is hard to break, and knows nothing of brokers, tasks or HTTP.

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"
)

const (
	// stopMargin is what a child gets beyond drain timeout and kill grace, to report and to write.
	stopMargin = 15 * time.Second

	// killMargin is what a child gets to end its processes after a second signal.
	killMargin = 3 * time.Second

	// silenceLimit is how long a child may go without a sign of progress before it is killed and started again. A disk
	// that hangs for seconds must not be taken for a child that does.
	silenceLimit = time.Minute

	minSilence    = 5 * alivePause // not less than that, whatever the service manager's watchdog wants
	livenessPause = time.Second    // between two looks at it
)

// runParent is job_item without a command.
func runParent(ctx context.Context, inv *invocation) int {
	cfg, err := loadConfig(inv.configFile(), os.LookupEnv)
	if err != nil {
		inv.printError(err)
		return exitUsage
	}
	if inv.dryRun {
		if !dryRun(ctx, cfg, inv.stdout) {
			return exitFailed
		}
		return exitOK
	}
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer signal.Stop(signals)
	// Whoever reads the log may go away, which is no reason to stop.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)

	reserveThreads(parentThreads)
	limitParentGarbage(os.LookupEnv)
	program, err := programFile()
	if err != nil {
		inv.printError(err)
		return exitFailed
	}
	s := newSupervisor(cfg, program, newLogger(inv.stderr, cfg), inv.stderr)
	if s.takeOverSocket() {
		s.log.Info("the parent is the new version now", "version", version, "number", versionNumber, "pid", os.Getpid())
	} else if err := s.openSocket(cfg.Listen, bindPatience); err != nil {
		inv.printError(err)
		return exitFailed
	}
	defer s.closeSocket()
	return s.supervise(ctx, signals)
}

// A supervisor keeps the children running.
type supervisor struct {
	cfg      *Config // the last one that was handed down, or as it was at the start
	complete bool    // the manager has completed it, if there is one
	log      *slog.Logger
	stderr   io.Writer
	socket   *os.File // the listening socket that the worker inherits; nil where that is impossible
	system   *serviceNotifier
	reaper   *reaper
	source   *configSource
	program  string // the installed program's file

	worker, execs keptChild
	vitals        vitals
	events        chan childEvent
	watching      sync.WaitGroup

	updater   *updater
	offer     offeredVersion // what the manager said last
	trial     *trial         // of a new version; nil: there is none
	swapped   bool           // this process is not what is installed any more
	candidate *childProcess  // the new version's, before it is the worker; nil: there is none

	// What is wrong, by what it is about: with the configuration, as its source says, and with what the parent does.
	sourceProblems, ownProblems map[string]string

	execStates []execHealth // what the execs child said last

	refused  *Config          // cannot be taken up for want of its port; nil: the last one was
	again    <-chan time.Time // when to try once more
	told     bool             // the service manager knows that we are ready
	stopping bool
	killed   bool
	failed   bool             // the exit code is to say so
	quiet    time.Duration    // since a worker last said that it makes progress
	execsBy  <-chan time.Time // when the background processes are ended although the worker has not ended yet
}

func newSupervisor(cfg *Config, program string, log *slog.Logger, stderr io.Writer) *supervisor {
	s := &supervisor{
		cfg: cfg, program: program, log: log, stderr: stderr, reaper: newReaper(log), events: make(chan childEvent),
		worker:      keptChild{name: "worker process", command: "child_process", pause: minRestartPause},
		execs:       keptChild{name: "process of the execs", command: "child_execs_process", pause: minRestartPause},
		ownProblems: map[string]string{},
		execStates:  []execHealth{},
	}
	s.updater = newUpdater(program, stderr, log, s.reaper)
	var err error
	if s.system, err = newServiceNotifier(os.LookupEnv, os.Getpid()); err != nil {
		log.Warn("service manager", errAttrs(err))
	}
	if err := becomeSubreaper(); err != nil {
		log.Debug("orphans of a dead worker go to init", errAttrs(err))
	}
	s.source = newConfigSource(cfg, os.LookupEnv, log)
	return s
}

// supervise runs the children until a signal comes, or one of them asks for the end of all. It returns the exit code.
func (s *supervisor) supervise(ctx context.Context, signals <-chan os.Signal) int {
	ctx, stop := context.WithCancel(ctx)
	var owned sync.WaitGroup
	defer owned.Wait()
	defer stop()
	owned.Add(2)
	go func() { // ends with ctx
		defer owned.Done()
		s.reaper.run(ctx)
	}()
	go func() { // ends with ctx
		defer owned.Done()
		s.source.run(ctx)
	}()
	defer s.watching.Wait()

	s.complete = s.cfg.EndPoint == ""
	s.startWorker()
	s.keepExecs()
	look := livenessPause
	if watchdog := s.system.watchdog(); watchdog > 0 {
		look = min(look, watchdog/2)
	}
	liveness := time.NewTicker(look)
	defer liveness.Stop()
	defer s.updater.end()
	for !s.stopping || s.worker.runs() || s.execs.runs() || s.candidate != nil {
		select {
		case e := <-s.events:
			select {
			case sig := <-signals: // first: a signal to the whole group ends the children, too
				s.signal(sig)
			default:
			}
			s.childEvent(e)
			s.advanceTrial(ctx)
		case update := <-s.source.updates:
			s.update(update)
			s.considerOffer(ctx, update.answered)
		case sig := <-signals:
			s.signal(sig)
		case <-liveness.C:
			s.checkLiveness(look)
			s.advanceTrial(ctx)
		case err := <-s.updater.fetched:
			s.fetched(ctx, err)
		case <-s.updater.due:
			s.considerOffer(ctx, true)
		case <-s.worker.due:
			s.startWorker()
		case <-s.execs.due:
			s.keepExecs()
		case <-s.execsBy:
			s.drainExecs()
		case <-s.again:
			s.update(configUpdate{problems: s.sourceProblems, offer: s.offer})
		case <-s.worker.endBy:
			s.overdue(&s.worker)
		case <-s.execs.endBy:
			s.overdue(&s.execs)
		}
	}
	s.log.Info("stopped")
	if s.failed {
		return exitFailed
	}
	return exitOK
}

// startWorker starts the worker with what is known now.
func (s *supervisor) startWorker() {
	s.vitals = vitals{}
	s.worker.start(s, s.firstOrder())
}

// firstOrder lets a worker begin.
func (s *supervisor) firstOrder() order {
	return order{
		Config: s.cfg, Pending: !s.complete, Listener: s.socket != nil, Problems: s.problems(), Execs: s.execStates,
	}
}

// problems is all that is wrong, for /health.
func (s *supervisor) problems() map[string]string {
	all := map[string]string{}
	maps.Copy(all, s.sourceProblems)
	maps.Copy(all, s.ownProblems)
	return all
}

// keepExecs starts the background processes' child if there are any and it does not run.
func (s *supervisor) keepExecs() {
	s.execs.due = nil
	if len(s.cfg.Execs) > 0 && !s.execs.runs() && !s.trialIn(trialLeaves) {
		s.execs.start(s, order{Config: s.cfg, Pending: !s.complete})
	}
}

// childEvent follows what a child says.
func (s *supervisor) childEvent(e childEvent) {
	child := &s.worker
	switch e.from {
	case s.execs.process:
		child = &s.execs
	case s.candidate:
		s.candidateEvent(e)
		return
	}
	switch {
	case e.ended && child == &s.worker:
		s.workerEnded(e.err)
	case e.ended:
		s.execsEnded(e.err)
	}
	said := e.notice
	if said.Alive {
		child.silent = 0
	}
	if said.Ready {
		s.log.Debug("worker process is ready", "pid", e.from.cmd.Process.Pid)
	}
	if said.Pulse != nil && child == &s.worker {
		s.vitals.hear(*said.Pulse)
	}
	if said.Alive && child == &s.worker {
		if s.quiet = 0; !s.told && !s.stopping {
			s.told = true
			s.tellSystem(s.system.ready("working"))
		}
	}
	if said.Execs != nil {
		s.setExecStates(said.Execs)
	}
	if said.Reload {
		s.source.askAgain()
	}
	if said.Shutdown && !s.stopping {
		s.failed = s.failed || said.Failed
		reason := "asked for by the manager"
		if child == &s.execs {
			reason = "a background process with cascade_exit has ended"
		}
		s.stop(reason)
	}
}

func (s *supervisor) workerEnded(err error) {
	wanted := s.worker.ending && !s.stopping // for a new port or folder, or another version
	s.worker.ended(s, err)
	s.vitals = vitals{}
	switch {
	case s.stopping, s.trialIn(trialLeaves):
		s.worker.due = nil
		s.drainExecs()
	case s.trialIn(trialReplaces):
		s.promote()
	case wanted:
		s.startWorker()
	case s.trialIn(trialRuns):
		s.trialDeath(err)
	}
}

func (s *supervisor) execsEnded(err error) {
	s.execs.ended(s, err)
	if s.stopping {
		s.execs.due = nil
		return
	}
	states := []execHealth{}
	for _, e := range s.execStates {
		if e.PID = 0; e.State == execRunning {
			e.State = execPausing
		}
		states = append(states, e)
	}
	if len(s.cfg.Execs) == 0 {
		s.execs.due, states = nil, []execHealth{}
	} else if s.execs.due == nil {
		s.keepExecs() // it was ended for want of background processes, and there are some again
	}
	s.setExecStates(states)
}

func (s *supervisor) setExecStates(states []execHealth) {
	s.execStates = states
	s.worker.tell(s, order{Execs: states})
}

// update takes up what the configuration has become.
func (s *supervisor) update(u configUpdate) {
	if s.stopping {
		return
	}
	s.sourceProblems, s.offer = maps.Clone(u.problems), u.offer
	delete(s.ownProblems, "listen") // it is found anew
	switch {
	case u.config != nil && s.complete && sameConfig(u.config, s.cfg):
		u.config, s.refused = nil, nil // the very first, or one that was changed back
	case u.config == nil:
		u.config = s.refused
		if u.answered && u.config == nil && len(u.problems) == 0 {
			s.log.Info("the configuration has not changed")
		}
	}
	if u.config != nil {
		if s.refused, s.again = nil, nil; !s.moveSocket(u.config) {
			u.config = nil
		}
	}
	s.worker.tell(s, order{Problems: s.problems()})
	if u.config != nil {
		s.handDown(u.config)
	}
	if u.answered {
		s.tellSystem(s.system.ready("working"))
	}
}

// handDown lets the children take up a configuration.
func (s *supervisor) handDown(cfg *Config) {
	before, wasComplete := s.cfg, s.complete
	s.cfg, s.complete = cfg, true
	setLogFormat(s.log, cfg.LogFormat)
	if before.Listen != s.cfg.Listen && s.candidate != nil {
		s.recallCandidate() // it has the port before
	}
	moved := before.Listen != s.cfg.Listen || before.DataDir != s.cfg.DataDir
	switch {
	case !s.worker.runs(), s.worker.ending: // the next one starts with it
	case moved && wasComplete:
		s.log.Info("listen or data_dir has changed, the worker drains and starts anew")
		s.worker.drain(s, before.DrainTimeout+before.KillAfter+stopMargin)
	default:
		s.worker.tell(s, order{Config: s.cfg})
	}
	if len(s.cfg.Execs) == 0 {
		s.drainExecs()
	} else {
		s.execs.tell(s, order{Config: s.cfg})
		if s.execs.due == nil {
			s.keepExecs()
		}
	}
}

// signal follows the service manager, or whoever sits at the terminal.
func (s *supervisor) signal(sig os.Signal) {
	switch {
	case sig == syscall.SIGHUP:
		s.log.Info("the configuration is to be read again", "reason", sig.String())
		s.tellSystem(s.system.reloading())
		s.source.askAgain()
	case !s.stopping:
		s.stop(sig.String())
	case !s.killed:
		s.killed = true
		s.log.Warn("stopping at once", "reason", sig.String())
		for _, child := range []*keptChild{&s.worker, &s.execs} {
			child.tell(s, order{Kill: true, Drain: true})
			if child.runs() {
				child.ending, child.endBy = true, time.After(killMargin)
			}
		}
	}
}

// stop lets the children drain: the worker first, since its tasks may need what the background processes do, but these
// no later than what makes everything end within drain_timeout and kill_after.
func (s *supervisor) stop(reason string) {
	s.stopping = true
	s.log.Info("stopping", "reason", reason)
	s.tellSystem(s.system.stopping())
	s.worker.due, s.execs.due = nil, nil
	s.dropCandidate()
	s.execsBy = time.After(s.cfg.DrainTimeout)
	s.worker.drain(s, s.cfg.DrainTimeout+s.cfg.KillAfter+stopMargin)
	if !s.worker.runs() {
		s.drainExecs()
	}
}

func (s *supervisor) drainExecs() {
	s.execsBy = nil
	s.execs.drain(s, s.cfg.KillAfter+stopMargin)
}

// overdue kills a child that was told to end and has not.
func (s *supervisor) overdue(child *keptChild) {
	s.log.Error(child.name+" did not end in time, killing it", "pid", child.process.cmd.Process.Pid)
	s.failed = s.failed || s.stopping
	child.kill()
}

// checkLiveness kills a child that has made no progress for too long, and tells the service manager that the parent does
// what it can: not any more when the worker stays silent although it was started again. Time is counted in looks, so that
// a host that was asleep finds its children no later than it left them.
func (s *supervisor) checkLiveness(look time.Duration) {
	limit := silenceLimit
	if watchdog := s.system.watchdog(); watchdog > 0 {
		limit = min(limit, max(watchdog/2, minSilence))
	}
	for _, child := range []*keptChild{&s.worker, &s.execs} {
		if !child.runs() || child.ending {
			continue
		}
		if child.silent += look; child.silent >= limit {
			child.silent = 0
			s.log.Error(child.name+" makes no progress, killing it",
				errAttrs(fail(codeChildSilent, child.name, fmt.Errorf("no sign of progress for %v", limit))))
			child.kill()
		}
	}
	if s.quiet += look; s.quiet < 2*limit || s.stopping {
		s.tellSystem(s.system.alive())
	}
}

// tellSystem notes that the service manager could not be told something.
func (s *supervisor) tellSystem(err error) {
	if err != nil {
		s.log.Debug("service manager not told", errAttrs(err))
	}
}
