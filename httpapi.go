package main

// httpapi.go serves the REST API (PROTOCOL section 7): it reads and checks requests, hands them to the worker or the
// records, and writes their answers. Who may call is decided in httpapi_access.go; answers without an end (logs being
// followed, events) are in httpapi_follow.go. Handlers return errors, and one wrapper makes replies of them.

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"
)

// A taskService is what the API asks of the worker. Its errors may wrap the sentinels below; any other is a 500.
type taskService interface {
	// create makes a task of a job, and returns when the broker or the journal has it.
	create(ctx context.Context, appID, event string, formBody json.RawMessage) (taskID string, err error)
	// terminate ends a queued or running task, and returns before it has ended.
	terminate(ctx context.Context, taskID string) error
	// notify passes a progress message on; the task need not be known.
	notify(ctx context.Context, taskID, msg string) error
	// record and list know queued tasks besides those of the records.
	record(taskID string) (record, bool)
	list(f recordFilter) []record
	health() healthReport
}

// Errors of a taskService that have a status of their own. errTaskUnknown and errTaskID are further ones.
var (
	errUnknownEvent = errors.New("no job has this event")                  // 404
	errTaskEnded    = errors.New("the task has ended")                     // 409
	errStarting     = errors.New("the worker is not ready yet")            // 503
	errBrokerAway   = errors.New("the broker is not connected")            // 503
	errJournalAway  = errors.New("the journal cannot be written just now") // 503
)

// A healthReport is the answer of GET /health.
type healthReport struct {
	Status     healthStatus `json:"status"`
	Problems   []string     `json:"problems"`
	IdentityID string       `json:"identity_id"`
	Version    string       `json:"version"`
	UptimeS    int64        `json:"uptime_s"`
	Broker     brokerHealth `json:"broker"`
	Jobs       jobCounts    `json:"jobs"`
	Execs      []execHealth `json:"execs"`
}

// A healthStatus is the worker's state in one word.
type healthStatus string

const (
	healthStarting healthStatus = "starting"
	healthOK       healthStatus = "ok"
	healthDegraded healthStatus = "degraded"
	healthDraining healthStatus = "draining"
	healthDown     healthStatus = "down"
)

type brokerHealth struct {
	Type      string     `json:"type"`
	Connected bool       `json:"connected"`
	Since     *time.Time `json:"since"` // of being connected or not
}

type jobCounts struct {
	Running   int64 `json:"running"`
	Queued    int64 `json:"queued"`
	Finish    int64 `json:"finish"` // this one and the next three: since the start
	Error     int64 `json:"error"`
	Timeout   int64 `json:"timeout"`
	Terminate int64 `json:"terminate"`
}

type execHealth struct {
	Key      string `json:"key"`
	State    string `json:"state"`
	PID      int    `json:"pid"`
	Restarts int    `json:"restarts"`
}

// An apiConfig is what a configuration says about the API.
type apiConfig struct {
	secretKey  secret
	ownManager bool   // there is no end_point: results and files are handed in here
	projectID  string // the app_id of a job that names none
}

// Bounds of requests and answers.
const (
	maxCreateBytes    = 16 << 20
	maxNotifBodyBytes = 1 << 20 // a message of maxNotifBytes with every character escaped
	maxFormOverhead   = 1 << 20 // of a multipart body besides its files
	maxHeaderBytes    = 64 << 10
	maxSubjectBytes   = 255 // AMQP's bound for a routing key
	maxListLimit      = 1000
	largeBodyBytes    = 64 << 10 // of larger bodies only maxLargeBodies are in memory at once
	maxLargeBodies    = 8

	headerTimeout = 10 * time.Second
	writeTimeout  = 30 * time.Second // for each piece of an answer
	idleTimeout   = 2 * time.Minute
)

// An apiServer serves the API on the listeners given to serve.
type apiServer struct {
	service     taskService
	records     atomic.Pointer[records] // nil until they could be opened
	recorded    chan struct{}           // closed then
	hardware    atomic.Pointer[hardware]
	log         *slog.Logger
	config      atomic.Pointer[apiConfig]
	routes      *http.ServeMux
	server      *http.Server
	feed        *eventFeed
	answered    [6]atomic.Int64 // requests, by the first digit of their status
	largeBodies chan struct{}   // holds a value per large body in memory
	bodyTimeout time.Duration   // for a JSON body, and for each piece of a file
	leaving     leaving
}

// newAPIServer prepares a server; it takes events from bus until shutdown.
func newAPIServer(config apiConfig, service taskService, bus *eventBus, log *slog.Logger) *apiServer {
	a := &apiServer{
		service:     service,
		log:         log,
		recorded:    make(chan struct{}),
		routes:      http.NewServeMux(),
		feed:        newEventFeed(bus),
		largeBodies: make(chan struct{}, maxLargeBodies),
		bodyTimeout: time.Minute,
	}
	a.reconfigure(config)
	a.handle("GET /{$}", a.showStatus)
	a.handle("POST /job/create", a.createJob)
	a.handle("POST /msg/notif/{task_id}", a.notify)
	a.handle("GET /jobs", a.listJobs)
	a.handle("GET /job/{task_id}", a.showJob)
	a.handle("GET /job/{task_id}/log", a.showLog)
	a.handle("GET /job/{task_id}/data", a.showData)
	a.handle("GET /job/{task_id}/files/{name}", a.showFile)
	a.handle("POST /job/{task_id}/terminate", a.terminate)
	a.handle("GET /events", a.showEvents)
	a.handle("GET /health", a.showHealth)
	a.handle("GET /hardware", a.showHardware)
	a.handle("POST /api/worker/job_record/result/{task_id}", a.takeResult)
	a.handle("POST /api/worker/job_record/file/{task_id}", a.takeFile)

	streams, stopStreams := context.WithCancel(context.Background())
	a.server = &http.Server{
		Handler:                      a,
		ReadHeaderTimeout:            headerTimeout,
		IdleTimeout:                  idleTimeout,
		MaxHeaderBytes:               maxHeaderBytes,
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		ConnContext:                  a.leaving.arrived,
		ConnState:                    a.leaving.changed,
		BaseContext: func(l net.Listener) context.Context {
			return context.WithValue(streams, listenAddrKey{}, addrOf(l.Addr()))
		},
	}
	a.server.RegisterOnShutdown(stopStreams)
	return a
}

// An apiHandler answers a request, or returns why it cannot: before it has written anything.
type apiHandler func(w http.ResponseWriter, r *http.Request) error

// handle adds a call; pattern is http.ServeMux's, with a method. It must come before serve.
func (a *apiServer) handle(pattern string, handler apiHandler) {
	a.routes.Handle(pattern, routeHandler{handler})
}

// reconfigure changes the key and the rest for the requests that come from now on.
func (a *apiServer) reconfigure(config apiConfig) { a.config.Store(&config) }

// serveRecords lets the API answer more than what needs no records.
func (a *apiServer) serveRecords(recs *records) {
	a.records.Store(recs)
	close(a.recorded)
}

// awaitRecords reports whether there are records, after some patience.
func (a *apiServer) awaitRecords(ctx context.Context) bool {
	ctx, stop := context.WithTimeout(ctx, openPatience)
	defer stop()
	select {
	case <-a.recorded:
		return true
	case <-ctx.Done():
		return false
	}
}

// listenAddrKey finds the listening address of a request in its context.
type listenAddrKey struct{}

// A routeHandler is an apiHandler as the mux wants it; the error goes to the reply.
type routeHandler struct{ handler apiHandler }

func (h routeHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.(*apiReply).err = h.handler(w, r)
}

// ServeHTTP admits a request, answers it and logs it.
func (a *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.leaving.asked(r)
	begin := time.Now()
	reply := &apiReply{ResponseWriter: w, control: http.NewResponseController(w), timeout: writeTimeout}
	reply.control.SetWriteDeadline(begin.Add(writeTimeout))
	if r.ContentLength != 0 {
		reply.control.SetReadDeadline(begin.Add(a.bodyTimeout))
	}
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("X-Frame-Options", "DENY")
	w.Header().Set("Cache-Control", "no-store")
	defer func() {
		a.countAnswer(reply.status)
		a.log.Debug("http request", "method", r.Method, "path", r.URL.Path, "status", reply.status,
			"addr", r.RemoteAddr, "dur", time.Since(begin))
	}()
	if reply.err = admit(callerOf(r), a.config.Load(), r); reply.err == nil {
		a.route(reply, r)
	}
	if reply.err != nil {
		a.replyError(reply, reply.err, r)
	}
}

// route finds the call; the mux's own answers (no such path, no such method) are put into JSON.
func (a *apiServer) route(reply *apiReply, r *http.Request) {
	handler, pattern := a.routes.Handler(r)
	if _, ours := handler.(routeHandler); ours && pattern != "" {
		switch pattern {
		case "GET /health", "GET /{$}", metricsPattern: // these need none
		default:
			if !a.awaitRecords(r.Context()) {
				reply.err = fmt.Errorf("serve %s: %w", r.URL.Path, errStarting)
				return
			}
		}
		a.routes.ServeHTTP(reply, r)
		return
	}
	answer := &headOnly{header: http.Header{}}
	handler.ServeHTTP(answer, r)
	if allow := answer.header.Get("Allow"); allow != "" {
		reply.Header().Set("Allow", allow)
		reply.err = httpError{http.StatusMethodNotAllowed,
			fail(codeHTTPMethod, r.URL.Path, fmt.Errorf("takes %s, not %s", allow, r.Method))}
		return
	}
	reply.err = httpError{http.StatusNotFound, fail(codeHTTPPath, "serve "+r.URL.Path, errors.New("no such path"))}
}

func callerOf(r *http.Request) caller {
	var c caller
	c.listen, _ = r.Context().Value(listenAddrKey{}).(netip.Addr)
	if local, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr); ok {
		c.local = addrOf(local)
	}
	if remote, err := netip.ParseAddrPort(r.RemoteAddr); err == nil {
		c.remote = remote.Addr().Unmap().WithZone("")
	}
	return c
}

// createJob is POST /job/create.
func (a *apiServer) createJob(w http.ResponseWriter, r *http.Request) error {
	var job struct {
		AppID    string          `json:"app_id"`
		Event    string          `json:"event"`
		FormBody json.RawMessage `json:"form_body"`
	}
	body, err := a.readJSON(w, r, maxCreateBytes, &job)
	if err != nil {
		return err
	}
	if job.AppID == "" {
		job.AppID = a.config.Load().projectID
	}
	if len(job.FormBody) == 0 || string(job.FormBody) == "null" {
		job.FormBody = json.RawMessage("{}")
	}
	switch {
	case !validSubject(job.Event):
		return badRequest("create job", errors.New("event must be the event of a job"))
	case !validSubject(job.AppID) || len(job.AppID)+1+len(job.Event) > maxSubjectBytes:
		return badRequest("create job", errors.New("app_id must be a project's id"))
	case job.FormBody[0] != '{':
		return badRequest("create job", errors.New("form_body must be an object"))
	}
	id, err := a.service.create(r.Context(), job.AppID, job.Event, job.FormBody)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, map[string]any{
		"status": "success", "message": "job created", "task_id": id, "app_id": job.AppID, "job": json.RawMessage(body),
	})
}

// notify is POST /msg/notif/{task_id}.
func (a *apiServer) notify(w http.ResponseWriter, r *http.Request) error {
	id, err := taskOf(r)
	if err != nil {
		return err
	}
	var notif struct {
		Msg *string `json:"msg"` // may be empty: then silence is reported
	}
	if _, err := a.readJSON(w, r, maxNotifBodyBytes, &notif); err != nil {
		return err
	}
	if notif.Msg == nil {
		return badRequest("notify", errors.New("msg is missing"))
	}
	if len(*notif.Msg) > maxNotifBytes {
		return tooLarge("notify", maxNotifBytes)
	}
	if err := a.service.notify(r.Context(), id, *notif.Msg); err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, map[string]any{"status": "success", "return": map[string]string{"msg": *notif.Msg}})
}

// listJobs is GET /jobs.
func (a *apiServer) listJobs(w http.ResponseWriter, r *http.Request) error {
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return badRequest("list jobs", errors.New("the query is malformed"))
	}
	filter := recordFilter{status: taskStatus(query.Get("status")), event: query.Get("event"), limit: defaultListLimit}
	switch filter.status {
	case "", statusQueued, statusRunning, filterEnded, statusFinish, statusError, statusTimeout, statusTerminate:
	default:
		return badRequest("list jobs",
			errors.New("status must be queued, running, ended, finish, error, timeout or terminate"))
	}
	if query.Has("limit") {
		filter.limit, err = strconv.Atoi(query.Get("limit"))
		if err != nil || filter.limit < 1 || filter.limit > maxListLimit {
			return badRequest("list jobs", fmt.Errorf("limit must be 1 to %d", maxListLimit))
		}
	}
	jobs := a.service.list(filter)
	for i := range jobs {
		jobs[i].fillLists()
	}
	if jobs == nil {
		jobs = []record{}
	}
	return writeJSON(w, http.StatusOK, map[string]any{"jobs": jobs})
}

// showJob is GET /job/{task_id}.
func (a *apiServer) showJob(w http.ResponseWriter, r *http.Request) error {
	rec, err := a.recordOf(r)
	if err != nil {
		return err
	}
	rec.fillLists()
	return writeJSON(w, http.StatusOK, rec)
}

// showData is GET /job/{task_id}/data: what the task was created with.
func (a *apiServer) showData(w http.ResponseWriter, r *http.Request) error {
	id, err := taskOf(r)
	if err != nil {
		return err
	}
	data, err := a.records.Load().data(id)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	_, err = w.Write(data)
	return err
}

// terminate is POST /job/{task_id}/terminate.
func (a *apiServer) terminate(w http.ResponseWriter, r *http.Request) error {
	id, err := taskOf(r)
	if err != nil {
		return err
	}
	if err := a.service.terminate(r.Context(), id); err != nil {
		return err
	}
	return writeJSON(w, http.StatusAccepted, map[string]any{"status": "success", "task_id": id})
}

// showHealth is GET /health.
func (a *apiServer) showHealth(w http.ResponseWriter, r *http.Request) error {
	health := a.service.health()
	if health.Problems == nil {
		health.Problems = []string{}
	}
	if health.Execs == nil {
		health.Execs = []execHealth{}
	}
	status := http.StatusServiceUnavailable
	if health.Status == healthOK || health.Status == healthDegraded {
		status = http.StatusOK
	}
	return writeJSON(w, status, health)
}

// recordOf gives the record of the task in the path.
func (a *apiServer) recordOf(r *http.Request) (record, error) {
	id, err := taskOf(r)
	if err != nil {
		return record{}, err
	}
	rec, ok := a.service.record(id)
	if !ok {
		return record{}, a.records.Load().unknown(id)
	}
	return rec, nil
}

func taskOf(r *http.Request) (string, error) {
	id := r.PathValue("task_id")
	if !validTaskID(id) {
		return "", badRequest("read task id", errTaskID)
	}
	return id, nil
}

// validSubject reports whether text may be a part of a subject for every broker: no space, control character or
// wildcard in it.
func validSubject(text string) bool {
	return text != "" && len(text) <= maxSubjectBytes && utf8.ValidString(text) &&
		!strings.ContainsFunc(text, func(c rune) bool {
			return c == '*' || c == '>' || unicode.IsSpace(c) || unicode.IsControl(c)
		})
}

// fillLists makes empty lists of missing ones, as JSON shows them.
func (rec *record) fillLists() {
	if rec.Notifications == nil {
		rec.Notifications = []notification{}
	}
	if rec.Files == nil {
		rec.Files = []taskFile{}
	}
}

// readJSON reads a body of at most limit bytes into v and gives it as sent.
func (a *apiServer) readJSON(w http.ResponseWriter, r *http.Request, limit int64, v any) ([]byte, error) {
	const op = "read body"
	if r.ContentLength > limit {
		return nil, tooLarge(op, limit)
	}
	if r.ContentLength < 0 || r.ContentLength > largeBodyBytes {
		select {
		case a.largeBodies <- struct{}{}:
			defer func() { <-a.largeBodies }()
		case <-r.Context().Done():
			return nil, r.Context().Err()
		}
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
	if err != nil {
		return nil, bodyError(op, err)
	}
	// The deadline was for the body only; what the worker does with it may take longer.
	http.NewResponseController(w).SetReadDeadline(time.Time{})
	if !utf8.Valid(body) {
		body = bytes.ToValidUTF8(body, []byte("\uFFFD")) // as encoding/json reads it
	}
	if err := json.Unmarshal(body, v); err != nil {
		return nil, badRequest(op, err)
	}
	return body, nil
}
