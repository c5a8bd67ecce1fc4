package main

// update.go decides whether the version that the manager offers is taken (PROTOCOL section 11), fetches it beside the
// binary, has it proven and remembers what became of it. How it is fetched and proven is in update_download.go and
// update_proof.go; how it takes the old one's place in update_trial.go and update_swap.go. It knows nothing of tasks.

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

const (
	// What failed for a reason that may pass (a server that is away, a full disk) is tried again after pauses that grow
	// between these.
	minUpdatePause = 10 * time.Minute
	maxUpdatePause = 24 * time.Hour

	maxUpdateNoteBytes = 64 << 10
)

// An updater is about one binary. Its methods have one caller at a time; only the fetching goes on beside them.
type updater struct {
	program  string // the binary's file, links followed
	number   int    // of the version in that file; 0: it never updates itself
	terminal io.Writer
	log      *slog.Logger
	reaper   *reaper

	offer   offeredVersion
	cfg     *Config
	note    updateNote
	problem string // why the offered version is not taken; "": nothing is wrong

	fetched chan error         // of the fetching that is under way; nil: there is none
	giveUp  context.CancelFunc // ends it
	stale   bool               // something else is offered meanwhile
	due     <-chan time.Time   // when a failed one is repeated
}

// An updateNote is what data_dir remembers of the last offer.
type updateNote struct {
	Offer     string    `json:"offer"`               // tells one answer of the manager from another
	Fetching  bool      `json:"fetching,omitempty"`  // the file beside the binary is this version, or a part of it
	Installed bool      `json:"installed,omitempty"` // it has taken the binary's place
	Refused   string    `json:"refused,omitempty"`   // why it is not taken, ever
	Failed    string    `json:"failed,omitempty"`    // why it could not be taken so far
	Failures  int       `json:"failures,omitempty"`  // in a row
	Again     time.Time `json:"again,omitzero"`      // when it is tried again
}

// newUpdater finds out what this process is. It never fails: an update that turns out to be impossible is its own error.
func newUpdater(program string, terminal io.Writer, log *slog.Logger, reaper *reaper) *updater {
	number, err := strconv.Atoi(versionNumber)
	if err != nil {
		number = 0
	}
	return &updater{program: program, number: number, terminal: terminal, log: log, reaper: reaper}
}

// programFile is the file of the running program, links followed.
func programFile() (string, error) {
	path, err := os.Executable()
	if err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	if err != nil {
		return "", fmt.Errorf("find the program file: %w", err)
	}
	return path, nil
}

// file is where a new version waits until it has proven itself.
func (u *updater) file() string { return updateFile(u.program) }

// consider looks at what the manager offers now. asked says that somebody wants a failed one tried again at once.
func (u *updater) consider(ctx context.Context, cfg *Config, offer offeredVersion, asked bool) {
	u.cfg, u.offer = cfg, offer
	wanted := u.number > 0 && cfg.Update.Enabled && offer.Number > u.number
	if u.fetched != nil {
		if !wanted || u.note.Offer != u.offerID() {
			u.stale = true
			u.giveUp() // its end brings us back here
		}
		return
	}
	if u.due = nil; !wanted {
		u.problem = ""
		return
	}
	known := u.note.Offer == u.offerID()
	if !known {
		u.recall()
	}
	pause := min(time.Until(u.note.Again), maxUpdatePause)
	switch {
	case u.note.Refused != "":
		u.tell(u.note.Refused, known)
	case u.note.Installed:
		// It has been here and is not any more: somebody has put the one before back.
		if u.problem = ""; !known {
			u.log.Warn("the version that the manager offers was installed here and taken back, so it is left alone",
				"version", offer.Name, "number", offer.Number)
		}
	case u.note.Failed != "" && pause > 0 && !asked:
		u.tell(u.note.Failed, known)
		u.due = time.After(pause)
	default:
		u.fetch(ctx)
	}
}

// recall reads the note, or begins one when that is about another offer.
func (u *updater) recall() {
	u.note = updateNote{}
	text, err := readBounded(u.notePath(), maxUpdateNoteBytes)
	if err == nil {
		err = json.Unmarshal(text, &u.note)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		u.log.Warn("what is remembered of an earlier update cannot be used", errAttrs(failUpdate("read "+u.notePath(), err)))
	}
	if id := u.offerID(); u.note.Offer != id {
		if u.note.Fetching {
			u.discard()
		}
		u.note = updateNote{Offer: id}
	}
}

// remember writes the note. Where that fails, what it says holds until the next start.
func (u *updater) remember() {
	text, err := json.Marshal(u.note)
	if err == nil {
		err = os.MkdirAll(u.cfg.DataDir, 0o700)
	}
	if err == nil {
		err = writePrivately(u.notePath(), text)
	}
	if err != nil {
		u.log.Warn("an update is not remembered", errAttrs(failUpdate("write "+u.notePath(), withoutPath(err))))
	}
}

func (u *updater) notePath() string { return filepath.Join(u.cfg.DataDir, "update.json") }

// offerID tells one offer from another, and whether it is to be trusted as before.
func (u *updater) offerID() string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%q %v", u.offer, u.cfg.Update))
	return hex.EncodeToString(sum[:])
}

// fetch begins to download and prove the offered version. What becomes of it comes through fetched.
func (u *updater) fetch(ctx context.Context) {
	u.log.Info("the manager offers a newer version", "version", u.offer.Name, "number", u.offer.Number, "have", u.number)
	partial := u.note.Fetching && u.offer.SHA256 != "" // without a sum nobody could tell that the parts fit
	u.note.Fetching = true
	u.remember()
	ctx, u.giveUp = context.WithCancel(ctx)
	fetched, f := make(chan error, 1), updateFetch{
		offer: u.offer, cfg: u.cfg, file: u.file(), like: u.program, partial: partial,
		terminal: u.terminal, log: u.log, reaper: u.reaper,
	}
	u.fetched = fetched
	go func() { fetched <- f.run(ctx) }() // ends with ctx; end waits
}

// finishFetch takes what came through fetched, and reports whether the offered version is there and proven.
func (u *updater) finishFetch(ctx context.Context, err error) (proven bool) {
	u.giveUp()
	u.fetched = nil
	switch {
	case ctx.Err() != nil: // everything ends
	case u.stale:
		u.stale = false
		u.consider(ctx, u.cfg, u.offer, false)
	case err != nil:
		u.failed(err)
	default:
		u.problem = ""
		return true
	}
	return false
}

// end waits for the fetching that is under way, if any. What there is of the file is kept: the next start goes on with it.
func (u *updater) end() {
	if u.fetched != nil {
		u.giveUp()
		<-u.fetched
	}
}

// failed notes that the offered version cannot be taken: never, or not now.
func (u *updater) failed(err error) {
	u.discard()
	text := codedText(err)
	var refused *versionRefused
	if errors.As(err, &refused) {
		u.note = updateNote{Offer: u.note.Offer, Refused: text}
	} else {
		pause := min(minUpdatePause<<min(u.note.Failures, 10), maxUpdatePause)
		u.note = updateNote{Offer: u.note.Offer, Failed: text, Failures: u.note.Failures + 1, Again: time.Now().Add(pause)}
		u.due = time.After(pause)
	}
	u.remember()
	u.tell(text, false)
}

// tell says why the offered version is not taken, in the log only once.
func (u *updater) tell(problem string, known bool) {
	u.problem = problem
	if known {
		return
	}
	if u.note.Refused != "" {
		u.log.Error("the version that the manager offers is not taken", "err", problem, "code", codeUpdate)
	} else {
		u.log.Error("the update has failed", "err", problem, "code", codeUpdate, "again", u.note.Again.Format(time.RFC3339))
	}
}

// installed notes that the offered version has taken the binary's place.
func (u *updater) installed() {
	u.number = u.offer.Number
	u.note = updateNote{Offer: u.note.Offer, Installed: true}
	u.remember()
}

// discard removes what was fetched.
func (u *updater) discard() {
	if err := os.Remove(u.file()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		u.log.Warn("a new version that is not taken stays on the disk", errAttrs(failUpdate("remove "+u.file(), withoutPath(err))))
	}
}

// versionRefused is the error of a version that will be no better next time.
type versionRefused struct{ err error }

func (r *versionRefused) Error() string { return r.err.Error() }
func (r *versionRefused) Unwrap() error { return r.err }

// refuseVersion is failUpdate for good.
func refuseVersion(op string, err error) error { return &versionRefused{failUpdate(op, err)} }

func failUpdate(op string, err error) error { return fail(codeUpdate, "update: "+op, err) }
