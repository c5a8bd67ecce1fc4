package main

// update_proof.go is what a new version must show before it is let near the work: that its bytes are the ones that were
// published, that it runs on this host, is the version that the manager says, and can work with this configuration.

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime/debug"
	"strings"
	"syscall"
	"time"
)

const (
	versionLimit = 10 * time.Second
	dryRunLimit  = 90 * time.Second // it asks manager and broker
	maxTrialText = 4 << 10          // bytes of its output that are kept
)

// prove checks the fetched file.
func (f *updateFetch) prove(ctx context.Context) error {
	if err := f.proveBytes(); err != nil {
		return err
	}
	info, err := os.Stat(f.like)
	if err == nil {
		err = os.Chmod(f.file, info.Mode().Perm())
	}
	if err != nil {
		return failUpdate("make "+f.file+" executable", withoutPath(err))
	}
	said, err := f.ask(ctx, versionLimit, "version")
	switch {
	case err != nil && !isItsOwnFault(err):
		return failUpdate("run the new version", err)
	case err != nil:
		return refuseVersion("run the new version", fmt.Errorf("%w%s", err, lastWords(said)))
	case !strings.Contains(said, fmt.Sprintf("(number %d,", f.offer.Number)):
		return refuseVersion("run the new version", fmt.Errorf("the manager offers number %d, and it says %q", f.offer.Number,
			strings.TrimSpace(said)))
	}
	if said, err := f.ask(ctx, dryRunLimit, "--dry-run", "--config", f.cfg.File); err != nil {
		// What it misses, such as a broker that is away, may be there later.
		return failUpdate("try the new version with --dry-run", fmt.Errorf("%w%s", err, lastWords(failuresIn(said))))
	}
	f.log.Info("the new version is proven", "version", f.offer.Name, "number", f.offer.Number)
	return nil
}

// proveBytes checks the sum and the signature, whichever there are.
func (f *updateFetch) proveBytes() error {
	content, err := readBounded(f.file, maxUpdateBytes)
	if err != nil {
		return failUpdate("read "+f.file, err)
	}
	var key ed25519.PublicKey
	if f.cfg.Update.PublicKey != "" {
		if key, err = parsePublicKey(f.cfg.Update.PublicKey); err != nil {
			return err
		}
	}
	defer debug.FreeOSMemory() // the parent stays small
	sum := sha256.Sum256(content)
	switch {
	case len(content) == 0:
		return refuseVersion("check the download", errors.New("it is empty"))
	case f.offer.SHA256 != "" && !strings.EqualFold(f.offer.SHA256, hex.EncodeToString(sum[:])):
		return refuseVersion("check the download", fmt.Errorf("its SHA-256 is %x, and job_item_sha256 is %s (%d bytes)",
			sum, f.offer.SHA256, len(content)))
	case key != nil && !validSignature(key, f.offer.Signature, content):
		return refuseVersion("check the download", errors.New("job_item_signature is not that of update.public_key"))
	}
	return nil
}

func isSHA256(text string) bool {
	sum, err := hex.DecodeString(text)
	return err == nil && len(sum) == sha256.Size
}

// validSignature checks a signature in base64. Text that is no base64, or not of a signature's length, is no valid one.
func validSignature(publicKey ed25519.PublicKey, signature string, content []byte) bool {
	sig, err := base64.StdEncoding.DecodeString(signature)
	return err == nil && ed25519.Verify(publicKey, content, sig)
}

// ask runs the new version with these arguments to its end, and gives what it says.
func (f *updateFetch) ask(ctx context.Context, limit time.Duration, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for pause := 50 * time.Millisecond; ; pause *= 2 {
		said, err := f.askOnce(ctx, args)
		// A child that another goroutine is about to start still has the file open that was written.
		if !errors.Is(err, syscall.ETXTBSY) || pause > time.Second {
			return said, err
		}
		time.Sleep(pause)
	}
}

func (f *updateFetch) askOnce(ctx context.Context, args []string) (string, error) {
	out := &tailBuffer{limit: maxTrialText}
	cmd := exec.Command(f.file, args...)
	cmd.Env = withoutServiceVariables(os.Environ())
	cmd.Stdout, cmd.Stderr = out, out
	cmd.WaitDelay = time.Second // for pipes that something it started holds
	if err := f.reaper.start(cmd); err != nil {
		return "", withoutPath(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- f.reaper.wait(cmd) }() // ends with the process
	select {
	case err := <-ended:
		return out.text(), err
	case <-ctx.Done():
	}
	cmd.Process.Kill()
	<-ended
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return out.text(), errSilentProgram
	}
	return out.text(), ctx.Err()
}

// errSilentProgram is the error of a program that was run for an answer and did not end.
var errSilentProgram = errors.New("it did not end in time")

// isItsOwnFault reports whether a program that could not be run would fare no better on another day.
func isItsOwnFault(err error) bool {
	var exit *exec.ExitError
	return errors.As(err, &exit) || errors.Is(err, errSilentProgram) || errors.Is(err, errForeignProgram)
}

// failuresIn gives the lines of a dry run that tell of a failure, all lines if none does.
func failuresIn(said string) string {
	var failures []string
	for line := range strings.Lines(said) {
		if strings.HasPrefix(line, "FAIL") {
			failures = append(failures, strings.TrimSpace(line))
		}
	}
	if failures == nil {
		return said
	}
	return strings.Join(failures, "; ")
}

// lastWords is the end of what a program said, for an error's text.
func lastWords(said string) string {
	if said = oneLine(strings.TrimSpace(said), 300); said == "" {
		return ""
	}
	return ": " + said
}
