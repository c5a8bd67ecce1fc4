package main

// httpapi_reply.go makes HTTP answers: of values, and of errors, whose status and code are decided here. A client gets
// the message; where it is our fault, it does not get the cause, which is for the log.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"
)

// An httpError is an error that brings its status with it.
type httpError struct {
	status int
	err    error
}

func (e httpError) Error() string { return e.err.Error() }
func (e httpError) Unwrap() error { return e.err }

func badRequest(op string, err error) error {
	return httpError{http.StatusBadRequest, fail(codeHTTPBadRequest, op, err)}
}

func tooLarge(op string, limit int64) error {
	return httpError{http.StatusRequestEntityTooLarge,
		fail(codeHTTPTooLarge, op, fmt.Errorf("more than %d bytes", limit))}
}

// bodyError is why a body could not be read: too long, too slow, or not what it says.
func bodyError(op string, err error) error {
	var long *http.MaxBytesError
	switch {
	case errors.As(err, &long):
		return tooLarge(op, long.Limit)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return httpError{http.StatusRequestTimeout, fail(codeHTTPBodySlow, op, err)}
	}
	return badRequest(op, err)
}

// statusOf gives the HTTP status of an error, and the code for one that has none.
func statusOf(err error) (int, errCode) {
	var own httpError
	if errors.As(err, &own) {
		return own.status, codeHTTPInternal
	}
	for _, known := range []struct {
		err    error
		status int
		code   errCode
	}{
		{errTaskID, http.StatusBadRequest, codeHTTPBadRequest},
		{errFileName, http.StatusBadRequest, codeHTTPBadRequest},
		{errNotJSON, http.StatusBadRequest, codeHTTPBadRequest},
		{errTaskUnknown, http.StatusNotFound, codeRecordUnknown},
		{errNotKept, http.StatusNotFound, codeRecordNotKept},
		{errUnknownEvent, http.StatusNotFound, codeHTTPEvent},
		{errTaskEnded, http.StatusConflict, codeHTTPEnded},
		{errTooLarge, http.StatusRequestEntityTooLarge, codeHTTPTooLarge},
		{errTooManyFiles, http.StatusRequestEntityTooLarge, codeHTTPTooLarge},
		{io.ErrUnexpectedEOF, http.StatusBadRequest, codeHTTPBadRequest},
		{os.ErrDeadlineExceeded, http.StatusRequestTimeout, codeHTTPBodySlow},
		{errStarting, http.StatusServiceUnavailable, codeHTTPAway},
		{errBrokerAway, http.StatusServiceUnavailable, codeHTTPAway},
		{errJournalAway, http.StatusServiceUnavailable, codeHTTPAway},
		{context.DeadlineExceeded, http.StatusServiceUnavailable, codeHTTPAway},
		{context.Canceled, http.StatusServiceUnavailable, codeHTTPAway},
	} {
		if errors.Is(err, known.err) {
			return known.status, known.code
		}
	}
	return http.StatusInternalServerError, codeHTTPInternal
}

// replyError answers with an error, unless the answer has begun: then the connection is cut, so that the client does
// not take what it has for all.
func (a *apiServer) replyError(reply *apiReply, err error, r *http.Request) {
	if reply.status != 0 {
		a.log.Debug("http answer broke off", "path", r.URL.Path, errAttrs(err))
		panic(http.ErrAbortHandler)
	}
	status, code := statusOf(err)
	if coded := codeOf(err); coded != "" {
		code = coded
	}
	message := err.Error()
	if status == http.StatusInternalServerError {
		a.log.Error("http request failed", "path", r.URL.Path, errAttrs(err))
		message = "internal error; the worker's log says more"
	}
	if status == http.StatusUnauthorized {
		reply.Header().Set("WWW-Authenticate", "Bearer")
	}
	for _, name := range []string{"Content-Length", "Content-Disposition"} {
		reply.Header().Del(name)
	}
	writeJSON(reply, status, map[string]any{"status": "error", "code": code, "message": message})
}

// writeJSON answers with v. Its error means that the client is gone.
func writeJSON(w http.ResponseWriter, status int, v any) error {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	encoder := json.NewEncoder(w)
	encoder.SetEscapeHTML(false)
	return encoder.Encode(v)
}

// An apiReply writes an answer, gives each piece of it its own time, and remembers the status.
type apiReply struct {
	http.ResponseWriter
	control *http.ResponseController
	timeout time.Duration // for each piece
	status  int           // 0 until something is written
	err     error         // what the handler returned
}

func (w *apiReply) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *apiReply) Write(p []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	w.control.SetWriteDeadline(time.Now().Add(w.timeout))
	return w.ResponseWriter.Write(p)
}

// flush sends what has been written so far.
func (w *apiReply) flush() {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	w.control.SetWriteDeadline(time.Now().Add(w.timeout))
	w.control.Flush() // a client that is gone shows at the next write
}

// Unwrap lets http.ResponseController find the connection.
func (w *apiReply) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// A headOnly takes an answer of the mux itself, of which only the head matters.
type headOnly struct{ header http.Header }

func (h *headOnly) Header() http.Header         { return h.header }
func (h *headOnly) Write(p []byte) (int, error) { return len(p), nil }
func (h *headOnly) WriteHeader(int)             {}
