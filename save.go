package main

// save.go is the save command (PROTOCOL section 10): it copies what comes in, or what a command prints, and sends all of
// it to the notification URL of the task, in constant memory. Copying and sending run side by side; a receiver that is
// slower than the input slows it, one that is gone for good does not. Cutting is in save_cut.go, the command in
// save_command.go, retrying in post.go.

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	// saveMessageBytes is the most a receiver takes as msg, in bytes of UTF-8 (PROTOCOL section 7).
	saveMessageBytes = 102_400

	// saveMessagesAhead is how many messages may wait to be sent before reading waits too.
	saveMessagesAhead = 4

	saveBufferBytes = 64 << 10

	saveGCPercent = 20 // garbage above what lives, in percent of it

	// saveLinger is how long input is awaited after a signal, or after the end of the command whose output it is.
	saveLinger = time.Second
)

// runSave is `save` and `save -- COMMAND ARG…`.
func runSave(ctx context.Context, inv *invocation) int {
	if len(inv.args) > 0 && !inv.dashes {
		return inv.usageError("the command that save is to run stands after --")
	}
	target, err := notificationURL()
	if err != nil {
		inv.printError(err)
		return exitUsage
	}
	// It stands in pipes of small hosts, and its garbage is the same few buffers: collecting it early costs little.
	debug.SetGCPercent(saveGCPercent)
	// Reading, copying and sending are so little work each that with two processors they mostly wake one another up.
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(1)
	}
	s := newSaver(target, inv)
	if len(inv.args) > 0 {
		return s.saveCommand(ctx)
	}
	return s.saveInput(ctx)
}

// notificationURL is where the messages go: $JOB_ITEM_MSG_NOTIF_HOST, completed by the task's id unless it ends in it.
func notificationURL() (*url.URL, error) {
	values, err := jobVariables("JOB_ITEM_TASK_ID", "JOB_ITEM_MSG_NOTIF_HOST")
	if err != nil {
		return nil, err
	}
	id := values[0]
	if err := checkTaskID(id); err != nil {
		return nil, err
	}
	target, err := taskURL("JOB_ITEM_MSG_NOTIF_HOST", values[1])
	if err != nil {
		return nil, err
	}
	if path := strings.TrimRight(target.Path, "/"); strings.HasSuffix(path, "/"+id) {
		target.Path, target.RawPath = path, ""
		return target, nil
	}
	return target.JoinPath(id), nil
}

// A saver is one run of save.
type saver struct {
	inv      *invocation
	target   *url.URL
	poster   *poster
	retryFor time.Duration // for one message, all attempts together

	mu      sync.Mutex // guards cutter, streams and their sources, closed
	cutter  messageCutter
	streams []*savedStream
	closed  bool

	outbox chan []byte // messages to be sent, closed after the last
	spare  chan []byte // buffers of sent messages, to be filled again
	sent   chan error  // gets the sender's result, once
}

func newSaver(target *url.URL, inv *invocation) *saver {
	s := &saver{
		inv: inv, target: target, poster: newPoster(), retryFor: sendRetryFor,
		outbox: make(chan []byte, saveMessagesAhead),
		spare:  make(chan []byte, saveMessagesAhead),
		sent:   make(chan error, 1),
	}
	s.cutter = messageCutter{
		limit: saveMessageBytes,
		emit:  func(message []byte) { s.outbox <- message },
		spare: func() []byte {
			select {
			case buffer := <-s.spare:
				return buffer[:0]
			default:
				return make([]byte, 0, saveMessageBytes)
			}
		},
	}
	return s
}

// saveInput copies stdin to its end. The first signal ends the reading, the second the sending.
func (s *saver) saveInput(ctx context.Context) int {
	catchBrokenPipe()
	signals := endSignals()
	defer signal.Stop(signals)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go s.send(ctx) // ends when outbox is closed; waited for in finish

	input := s.stream(s.inv.stdin, s.inv.stdout)
	copied := make(chan error, 1)
	// Ends at the end of input. After a signal it may sit in a read that nothing can interrupt, and is left there.
	go func() { copied <- input.copy() }()

	var caught os.Signal
	var linger <-chan time.Time
	var err error
	for reading := true; reading; {
		select {
		case err = <-copied:
			reading = false
		case sig := <-signals:
			if caught != nil {
				cancel(stoppedBy{sig})
				reading = false
				break
			}
			// It mostly goes to the whole pipeline, and the last words of its other end are still to come.
			caught, linger = sig, time.After(saveLinger)
		case <-linger:
			reading = false
		}
	}

	last, sendErr := s.finish(signals, cancel, caught)
	code := exitOK
	if err := errors.Join(err, sendErr); err != nil {
		code = exitFailed
	}
	s.report(err, sendErr)
	if last != nil {
		return exitCodeOfSignal(last)
	}
	return code
}

// finish sends what is left and waits until all is sent, or given up, or a second signal comes. It returns the signal
// that was caught, if any.
func (s *saver) finish(signals <-chan os.Signal, stop context.CancelCauseFunc, caught os.Signal) (os.Signal, error) {
	go s.close() // waits for room in the outbox, so it ends before send does
	for {
		select {
		case err := <-s.sent:
			return caught, err
		case sig := <-signals:
			if caught != nil {
				stop(stoppedBy{sig})
			}
			caught = sig
		}
	}
}

// report prints each error on its own.
func (s *saver) report(errs ...error) {
	for _, err := range errs {
		if err != nil {
			s.inv.printError(err)
		}
	}
}

// close hands the last message over. What a stream that was left behind still brings is ignored.
func (s *saver) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for _, stream := range s.streams {
		s.cutter.end(&stream.source)
	}
	s.cutter.close()
	close(s.outbox)
}

// send sends every message in turn. Once one has failed for good the others are dropped, so that copying goes on.
func (s *saver) send(ctx context.Context) {
	var failed error
	number := 0
	for message := range s.outbox {
		number++
		if failed == nil {
			if err := s.sendMessage(ctx, message); err != nil {
				failed = fail(codeSend, fmt.Sprintf("send message %d to %s", number, shownURL(s.target)), err)
			}
		}
		select {
		case s.spare <- message:
		default:
		}
	}
	s.sent <- failed
}

func (s *saver) sendMessage(ctx context.Context, text []byte) error {
	ctx, cancel := context.WithTimeout(ctx, s.retryFor)
	defer cancel()
	var body bytes.Buffer
	enc := json.NewEncoder(&body)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(map[string]string{"msg": string(text)}); err != nil {
		return err
	}
	return s.poster.post(ctx, func(ctx context.Context) (*http.Request, error) {
		return newPost(ctx, s.target, "application/json", bytes.NewReader(body.Bytes()))
	})
}

// newPost is a POST request, without a key.
func newPost(ctx context.Context, target *url.URL, contentType string, body io.Reader) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, target.String(), body)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", contentType)
	return req, nil
}

// A savedStream is copied to its own output as it comes, and into the messages.
type savedStream struct {
	saver  *saver
	from   io.Reader
	to     io.Writer
	source cutSource
}

func (s *saver) stream(from io.Reader, to io.Writer) *savedStream {
	stream := &savedStream{saver: s, from: from, to: to}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.streams = append(s.streams, stream)
	return stream
}

// copy ends at the end of input, whatever happens to the output.
func (st *savedStream) copy() error {
	buf := make([]byte, saveBufferBytes)
	var failed error
	for {
		n, err := st.from.Read(buf)
		failed = errors.Join(failed, st.take(buf[:n]))
		if err == io.EOF {
			return failed
		}
		if err != nil {
			return errors.Join(failed, fail(codeCopy, "read what to save", err))
		}
	}
}

// take passes data on. Output that breaks is reported once and not written to again; a reader that has seen enough
// (`save | head -1`) is no error at all, the message still counts.
func (st *savedStream) take(data []byte) error {
	var failed error
	if st.to != nil && len(data) > 0 {
		if _, err := st.to.Write(data); err != nil {
			st.to = nil
			if !isBrokenPipe(err) {
				failed = fail(codeCopy, "write what is saved", err)
			}
		}
	}
	st.saver.mu.Lock()
	defer st.saver.mu.Unlock()
	if !st.saver.closed {
		st.saver.cutter.add(&st.source, data)
	}
	return failed
}

// catchBrokenPipe makes a write to a closed stdout an error instead of the end. To ignore the signal would do that too,
// but a command started by us would inherit it.
func catchBrokenPipe() {
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
}

// endSignals delivers what would end the program, and not what it was started to ignore (nohup, a shell's `&`).
func endSignals() chan os.Signal {
	signals := make(chan os.Signal, 4)
	for _, sig := range []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		if !signal.Ignored(sig) {
			signal.Notify(signals, sig)
		}
	}
	return signals
}

// stoppedBy is why something was not done to its end.
type stoppedBy struct{ sig os.Signal }

func (s stoppedBy) Error() string { return "stopped by " + s.sig.String() }

// exitCodeOfSignal is the exit code of a program that a signal has ended, as shells count it.
func exitCodeOfSignal(sig os.Signal) int {
	if number, ok := sig.(syscall.Signal); ok {
		return 128 + int(number)
	}
	return exitFailed
}

// checkTaskID refuses what must not become part of a URL.
func checkTaskID(id string) error {
	if validTaskID(id) {
		return nil
	}
	return failHint(codeTaskID, fmt.Sprintf("%q is no task id", oneLine(id, 200)), nil,
		"1 to 128 of A-Z a-z 0-9 . _ -, not starting with a dot, for example monitoring-task-001")
}

// jobVariables gives the values of environment variables that the worker sets for a job, or an error that names those
// that are missing.
func jobVariables(names ...string) ([]string, error) {
	examples := map[string]string{
		"JOB_ITEM_TASK_ID":        "monitoring-task-001",
		"JOB_ITEM_MSG_NOTIF_HOST": "http://127.0.0.1:8080/msg/notif",
		"JOB_MANAGER_UPLOAD_FILE": "http://127.0.0.1:8080/api/worker/job_record/file/monitoring-task-001",
		"JOB_MANAGER_RESULT_URL":  "http://127.0.0.1:8080/api/worker/job_record/result/monitoring-task-001",
	}
	var values, missing, example []string
	for _, name := range names {
		value := os.Getenv(name)
		values = append(values, value)
		if value == "" {
			missing = append(missing, name)
			example = append(example, name+"="+examples[name])
		}
	}
	if len(missing) == 0 {
		return values, nil
	}
	return nil, failHint(codeTaskVariables, "not set: "+strings.Join(missing, ", "), nil,
		"inside a job the worker sets them; elsewhere, for example: export "+strings.Join(example, " "))
}

// taskURL reads the URL in a variable.
func taskURL(name, value string) (*url.URL, error) {
	u, err := parseHTTPURL(value)
	if err != nil {
		return nil, failHint(codeTaskURL, "bad URL in "+name, err, "for example http://127.0.0.1:8080/msg/notif")
	}
	return u, nil
}
