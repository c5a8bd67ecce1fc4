package main

// refresh.go keeps the parent's configuration up to date: the file, whenever its content changes, completed by what the
// Job Manager answers, asked for at intervals and on demand. What is bad changes nothing: the last good file and the
// manager's last good answer serve on. How changed files are noticed is config_watch.go's affair.

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"time"
)

// A configSource tells of every complete configuration, the first as soon as there is one (PROTOCOL sections 3 and 8).
type configSource struct {
	getenv  func(string) (string, bool)
	log     *slog.Logger
	updates chan configUpdate // unbuffered, sent by run
	again   chan struct{}     // load and ask now

	// followed says that another process has worked here until now: what the manager said to that one serves at once.
	followed bool // set before run

	// What follows is run's alone.
	watch    *configWatch
	identity string  // where the configuration names none: a host that is renamed meanwhile keeps it
	file     *Config // the newest that was accepted
	complete *Config // what the worker is to run with; nil: the manager has not said yet
	problems map[string]string
	refused  string              // content and error of the file that was refused; "": it was not
	warned   map[string][]string // by who gave the warnings, each without its place

	client    *managerClient // of file; nil without end_point
	managerID managerID
	reply     *managerReply // the last good one; nil: none yet
	replyFrom managerID
	answers   chan managerAnswer // of the question that is under way; nil: there is none
	giveUp    context.CancelFunc // ends that question
	askNext   bool               // ask once more when it has been answered
	due       <-chan time.Time   // when to ask again
	failures  int                // in a row

	offer     offeredVersion // of the manager's last good answer
	sentOffer offeredVersion

	sent         *Config
	sentProblems map[string]string
	owed         bool // askAgain has not been answered yet
}

// A configUpdate is sent when something has changed, or as the answer to askAgain.
type configUpdate struct {
	config *Config // complete and different from the last one sent; nil: as before

	// problems is everything that is wrong now, by what it is about: "manager" (why it could not be asked, or its answer
	// not be used) and "configuration" (why the changed file is not taken up). Empty when nothing is wrong.
	problems map[string]string

	offer offeredVersion // what the manager wants to run, as it said last; zero: nothing, or no manager has answered yet

	answered bool // file and manager have been asked since askAgain was called
}

// newConfigSource starts from first, the checked file as loaded at start.
func newConfigSource(first *Config, getenv func(string) (string, bool), log *slog.Logger) *configSource {
	return &configSource{
		getenv: getenv, log: log, updates: make(chan configUpdate), again: make(chan struct{}, 1),
		watch: newConfigWatch(first), identity: hostIdentity(), file: first,
		problems: map[string]string{}, warned: map[string][]string{},
	}
}

// askAgain reads the file and asks the manager now rather than at the next interval.
func (s *configSource) askAgain() { signalOnce(s.again) }

// run sends updates until ctx ends.
func (s *configSource) run(ctx context.Context) {
	defer s.endQuestion()
	s.warn("file", s.file.Warnings)
	if s.watch.once {
		s.log.Info("the configuration is no regular file, changes of it are not noticed", "path", s.file.File)
	}
	poll := time.NewTicker(s.watch.poll)
	defer poll.Stop()
	if s.followed && s.file.EndPoint != "" {
		s.managerID = managerIDOf(s.file)
		if reply, _, err := newManagerClient(s.file, s.log).remembered(); err == nil {
			_ = s.useReply(reply)
		}
	}
	_ = s.try(s.file) // nothing is there yet that it could be refused for
	s.adopt(ctx, s.file)
	s.watch.look()
	for {
		update, due := s.update()
		updates := s.updates
		if !due {
			updates = nil
		}
		select {
		case updates <- update:
			s.sent, s.sentProblems, s.sentOffer = s.complete, update.problems, update.offer
			s.owed = s.owed && !update.answered
		case <-poll.C:
			if s.watch.look(); s.watch.changed() {
				s.considerFile(ctx)
			}
		case <-s.again:
			s.owed = true
			s.watch.look()
			s.ask(ctx)
		case <-s.due:
			s.ask(ctx)
		case answer := <-s.answers:
			s.considerAnswer(ctx, answer)
		case <-ctx.Done():
			return
		}
	}
}

// update is what there is to tell, if anything.
func (s *configSource) update() (update configUpdate, due bool) {
	update.problems, update.offer = maps.Clone(s.problems), s.offer
	if s.complete != s.sent {
		if s.sent != nil && sameConfig(s.complete, s.sent) {
			s.complete = s.sent
		} else {
			update.config = s.complete
		}
	}
	update.answered = s.owed && s.answers == nil && s.watch.settled()
	return update, update.config != nil || update.answered || update.offer != s.sentOffer ||
		!maps.Equal(update.problems, s.sentProblems)
}

// sameConfig compares all but the warnings, which name lines that move with every comment.
func sameConfig(a, b *Config) bool {
	x, y := *a, *b
	x.Warnings, y.Warnings = nil, nil
	return reflect.DeepEqual(x, y)
}

// adopt makes next the file in force. Its manager, if it names one, is asked at once.
func (s *configSource) adopt(ctx context.Context, next *Config) {
	before := s.managerID
	s.file, s.managerID = next, managerIDOf(next)
	if s.managerID != before {
		s.failures = 0
	}
	s.due, s.client = nil, nil
	if s.answers != nil {
		s.giveUp() // the question was asked for another file
	}
	if next.EndPoint == "" {
		delete(s.problems, "manager")
		s.offer = offeredVersion{}
		return
	}
	s.client = newManagerClient(next, s.log)
	s.ask(ctx)
}

// considerFile takes up what the files hold now, if that is good.
func (s *configSource) considerFile(ctx context.Context) {
	s.watch.take()
	next, err := s.load()
	if err == nil {
		err = s.try(next)
	}
	if err != nil {
		s.refuse(err)
		// What the file in force names may have changed all the same. Where that is bad too, refuse has said enough.
		if sound, _, err := s.completed(s.file); err == nil && sound != nil && s.checkTLS(sound) == nil {
			s.complete = sound
		}
		return
	}
	if s.refused != "" {
		s.refused = ""
		delete(s.problems, "configuration")
		s.log.Info("configuration file is good again", "path", next.File)
	}
	s.warn("file", next.Warnings)
	if !sameConfig(next, s.file) {
		s.adopt(ctx, next)
	}
}

// load checks the configuration file as it was last seen.
func (s *configSource) load() (*Config, error) {
	if s.watch.err != nil {
		return nil, failConfigFile(s.watch.path, s.watch.err)
	}
	next := defaultConfig()
	next.IdentityID = s.identity
	err := next.parse(s.watch.path, s.watch.text, s.getenv)
	// Of a refused file too: the key file may be what was wrong with it.
	s.watch.keyFile = next.Credential.SecretKeyFile
	if err != nil {
		return nil, err
	}
	return next, nil
}

// try completes cfg and has the worker run with it. An error leaves everything as it was, but for the TLS files that are
// watched: mending them may be what is needed.
func (s *configSource) try(cfg *Config) error {
	complete, warnings, err := s.completed(cfg)
	if err != nil {
		return err
	}
	s.watch.brokers = nil
	for _, c := range []*Config{s.complete, complete} {
		if c != nil {
			s.watch.brokers = append(s.watch.brokers, c.Broker)
		}
	}
	if complete == nil {
		return nil
	}
	if err := s.checkTLS(complete); err != nil {
		return err
	}
	s.watch.brokers = []BrokerConfig{complete.Broker}
	s.complete = complete
	s.warn("manager", warnings)
	return nil
}

// completed gives cfg with what its manager has said, nil where that has said nothing yet.
func (s *configSource) completed(cfg *Config) (complete *Config, warnings []string, err error) {
	if cfg.EndPoint == "" {
		own := *cfg
		complete = &own
	} else if s.reply == nil || s.replyFrom != managerIDOf(cfg) {
		return nil, nil, nil
	} else if complete, warnings, err = s.reply.merge(cfg); err != nil {
		return nil, nil, err
	}
	complete.Broker.FilesDigest, _ = tlsDigest(complete.Broker, complete.Dir)
	return complete, warnings, nil
}

// checkTLS keeps a worker that has a connection from being sent to another one that cannot be made. The first
// configuration is not checked: there is nothing to lose, and the worker says what is wrong.
func (s *configSource) checkTLS(next *Config) error {
	if s.complete == nil || next.Broker == s.complete.Broker {
		return nil
	}
	_, err := brokerTLS(next.Broker, next.Dir)
	return err
}

// refuse says once what is wrong with a file's content.
func (s *configSource) refuse(err error) {
	lines := []string{err.Error()}
	var problems *configErrors
	if errors.As(err, &problems) {
		lines = problems.lines()
	}
	short := oneLine(lines[0], 300)
	if len(lines) > 1 {
		short += fmt.Sprintf(" (and %d more)", len(problems.problems)-1)
	}
	if code := codeOf(err); code != "" {
		short += " [" + string(code) + "]"
	}
	s.problems["configuration"] = "the changed configuration is not taken up: " + short
	refused := s.watch.last.config + err.Error()
	if refused == s.refused {
		return
	}
	s.refused = refused
	for _, line := range lines {
		s.log.Error("configuration refused, what was in force stays so", "err", line, "code", codeOf(err))
	}
}

// A managerID tells managers, and what they say to different projects, apart.
type managerID struct{ endPoint, project string }

func managerIDOf(cfg *Config) managerID { return managerID{cfg.EndPoint, cfg.Credential.ProjectID} }

// A managerAnswer is what became of a question.
type managerAnswer struct {
	from  *managerClient
	reply *managerReply
	err   error
}

// ask asks the manager now, or once more after the question that is under way.
func (s *configSource) ask(ctx context.Context) {
	s.due = nil
	if s.answers != nil {
		s.askNext = true
		return
	}
	if s.client == nil {
		return
	}
	ctx, s.giveUp = context.WithCancel(ctx)
	client, answers := s.client, make(chan managerAnswer, 1)
	s.answers = answers
	go func() { // ends with its context; endQuestion waits
		reply, _, _, err := client.complete(ctx)
		answers <- managerAnswer{client, reply, err}
	}()
}

// endQuestion waits for the question that is under way, if any.
func (s *configSource) endQuestion() {
	if s.answers != nil {
		s.giveUp()
		<-s.answers
	}
}

// considerAnswer takes up what the manager has said, if that is good.
func (s *configSource) considerAnswer(ctx context.Context, answer managerAnswer) {
	s.giveUp()
	s.answers = nil
	if answer.from != s.client {
		s.askNext = false
		s.ask(ctx)
		return
	}
	err := answer.err
	if err == nil {
		err = s.useReply(answer.reply)
	}
	pause := refreshPause(s.file.Refresh)
	if err == nil {
		s.failures = 0
		s.managerFine(answer.reply)
	} else {
		pause = min(pause, managerPause(s.failures))
		s.failures++
		s.managerFailed(err)
	}
	s.due = time.After(pause)
	if s.askNext {
		s.askNext = false
		s.ask(ctx)
	}
}

// useReply completes the file with a reply, or leaves everything as it was.
func (s *configSource) useReply(reply *managerReply) error {
	before, beforeFrom := s.reply, s.replyFrom
	s.reply, s.replyFrom = reply, s.managerID
	if err := s.try(s.file); err != nil {
		s.reply, s.replyFrom = before, beforeFrom
		return err
	}
	return nil
}

func (s *configSource) managerFine(reply *managerReply) {
	s.offer = reply.Version
	if s.problems["manager"] != "" {
		delete(s.problems, "manager")
		s.log.Info("the manager answers again", "addr", s.file.EndPoint)
	}
	if s.refused != "" {
		s.watch.forget() // it may fit this answer
	}
	var warnings []string
	if err := s.client.remember(reply); err != nil {
		warnings = append(warnings, "the manager's answer is not kept for a start without it: "+err.Error())
	}
	s.warn("memory", warnings)
}

func (s *configSource) managerFailed(err error) {
	level, problem := slog.LevelError, codedText(err)
	if s.problems["manager"] == problem {
		level = slog.LevelDebug // it has been said
	}
	s.log.Log(context.Background(), level, "no configuration from the manager", errAttrs(err))
	s.problems["manager"] = problem
	if s.complete != nil {
		return
	}
	reply, at, err := s.client.remembered()
	if err != nil {
		s.log.Debug("no earlier answer of the manager is kept", errAttrs(err))
		return
	}
	if err := s.useReply(reply); err != nil {
		s.log.Warn("the manager's last answer does not fit the configuration", errAttrs(err))
		return
	}
	s.log.Warn("starting with the manager's last answer", "received", at.Format(time.RFC3339))
}

// linePlace is the place in the file that a warning begins with.
var linePlace = regexp.MustCompile(`^.*?:\d+: `)

// warn logs the warnings of one origin that it did not give the time before; that one stands in another line by now is
// nothing new.
func (s *configSource) warn(origin string, warnings []string) {
	var given []string
	for _, warning := range warnings {
		text := linePlace.ReplaceAllString(warning, "")
		if !slices.Contains(s.warned[origin], text) {
			s.log.Warn("configuration", "err", warning)
		}
		given = append(given, text)
	}
	s.warned[origin] = given
}
