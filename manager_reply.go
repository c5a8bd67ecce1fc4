package main

// manager_reply.go reads what a manager answered. Managers are written in many languages, so a number may be text, a
// truth a number, an empty object a list, and most things may be missing; what they send is checked all the same, as
// from a stranger. What becomes of it is manager_merge.go's affair.

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// A managerReply is what the manager wants of this worker, checked as far as this host does not matter.
type managerReply struct {
	Project  string               // the project's id in subjects; "" where the manager names none
	Broker   *BrokerConfig        // nil where it names none; file names as it sent them
	Jobs     map[string]jobBounds // by event, nested ones as parent.nested
	Version  offeredVersion
	Warnings []string // what was ignored, and why

	durableGiven bool            // Broker.Durable is the manager's word, not a default
	received     json.RawMessage // the reply itself, compact
}

// jobBounds is what the manager allows a job.
type jobBounds struct {
	Limit   int           // tasks at once, 0: no word
	Timeout time.Duration // 0: no word
}

// An offeredVersion is the job_item that the manager wants workers to run. Nothing of it is checked here.
type offeredVersion struct {
	Number    int // 0: none is offered
	Name      string
	Link      string
	SHA256    string
	Signature string
}

const (
	maxManagerJobs     = 10_000 // nested ones included
	maxManagerText     = 4096   // bytes of one value
	maxManagerWarnings = 20
)

// The reply on the wire. Every value is read by replyReader, which knows its name and what it may be.
type (
	wireReply struct {
		UUID       json.RawMessage `json:"uuid"`
		Connection json.RawMessage `json:"broker_connection"`
		Project    json.RawMessage `json:"project"`
		Number     json.RawMessage `json:"job_item_version_number"`
		Version    json.RawMessage `json:"job_item_version"`
		Link       json.RawMessage `json:"job_item_link"`
		SHA256     json.RawMessage `json:"job_item_sha256"`
		Signature  json.RawMessage `json:"job_item_signature"`
	}
	wireConnection struct {
		Key      json.RawMessage `json:"key"`
		Name     json.RawMessage `json:"name"`
		Type     json.RawMessage `json:"type"`
		Host     json.RawMessage `json:"host"`
		Port     json.RawMessage `json:"port"`
		Secure   json.RawMessage `json:"secure"`
		CAFile   json.RawMessage `json:"ca_file"`
		CertFile json.RawMessage `json:"cert_file"`
		KeyFile  json.RawMessage `json:"key_file"`
		AuthType json.RawMessage `json:"auth_type"`
		User     json.RawMessage `json:"user"`
		Password json.RawMessage `json:"password"`
		Token    json.RawMessage `json:"token"`
		Exchange json.RawMessage `json:"exchange"`
		VHost    json.RawMessage `json:"vhost"`
		DB       json.RawMessage `json:"db"`
		Durable  json.RawMessage `json:"durable"`
	}
	wireJob struct {
		Event   json.RawMessage `json:"event"`
		Data    json.RawMessage `json:"data"` // of a job
		Limit   json.RawMessage `json:"limit"`
		Timeout json.RawMessage `json:"timeout"` // of a nested one, as limit is
		Nested  json.RawMessage `json:"nested_jobs"`
	}
	wireJobData struct {
		Limit   json.RawMessage `json:"limit_process"`
		Timeout json.RawMessage `json:"timeout"`
	}
)

// parseManagerReply reads a whole reply. key is the project's, which no message repeats.
func parseManagerReply(body []byte, key secret) (*managerReply, error) {
	body = bytes.TrimPrefix(body, []byte("\xef\xbb\xbf"))
	if err := checkJSON(bytes.TrimSpace(body)); err != nil {
		return nil, err
	}
	var compact bytes.Buffer
	if err := json.Compact(&compact, body); err != nil {
		return nil, err
	}
	var reply struct{ Return, Message, Msg json.RawMessage }
	if err := json.Unmarshal(compact.Bytes(), &reply); err != nil {
		return nil, errors.New(`want an object with "return" in it`)
	}
	parsed, err := parseReturn(reply.Return, key)
	if !errors.Is(err, errNoReturn) {
		return parsed, err
	}
	for _, raw := range []json.RawMessage{reply.Message, reply.Msg} {
		if text, ok := plainValue(raw); ok && text != "" {
			return nil, fmt.Errorf("%w; the manager says: %s", err, oneLine(redactKey(text, key), 200))
		}
	}
	return nil, err
}

var errNoReturn = errors.New(`"return" is missing, or there is nothing in it`)

// parseReturn reads what stands in "return", without white space around its values. All that makes it useless is
// reported at once.
func parseReturn(raw json.RawMessage, key secret) (*managerReply, error) {
	if isNothing(raw) {
		return nil, errNoReturn
	}
	r := &replyReader{key: key, jobsLeft: maxManagerJobs}
	reply := &managerReply{received: raw}
	var wire wireReply
	if !r.object("return", raw, &wire) {
		return nil, r.err()
	}
	if reply.Project = r.text("uuid", wire.UUID); reply.Project == "" {
		r.warn("uuid: missing, so the subjects begin with credential.project_id")
	} else if !legalSubject(reply.Project) || strings.Contains(reply.Project, ".") {
		r.want("uuid", reply.Project, "1 to 128 of A-Z a-z 0-9 _ -")
	}
	if !isNothing(wire.Connection) {
		reply.Broker, reply.durableGiven = r.connection(wire.Connection)
	}
	var project struct {
		Jobs json.RawMessage `json:"job_datas"`
	}
	r.object("project", wire.Project, &project)
	reply.Jobs = map[string]jobBounds{}
	r.jobs("project.job_datas", project.Jobs, func(where string, job wireJob) {
		event, ok := r.job(reply.Jobs, where, "", job)
		if !ok {
			return
		}
		r.jobs(where+".nested_jobs", job.Nested, func(where string, nested wireJob) {
			r.job(reply.Jobs, where, event+".", nested)
		})
	})
	reply.Version = offeredVersion{
		Number:    r.count("job_item_version_number", wire.Number, math.MaxInt32),
		Name:      r.optional("job_item_version", wire.Version),
		Link:      r.optional("job_item_link", wire.Link),
		SHA256:    r.optional("job_item_sha256", wire.SHA256),
		Signature: r.optional("job_item_signature", wire.Signature),
	}
	reply.Warnings = r.allWarnings()
	return reply, r.err()
}

// A replyReader reads one reply and collects what is wrong with it: problems make it useless, warnings do not.
type replyReader struct {
	key      secret
	jobsLeft int
	problems []string
	warnings []string
	unsaid   int // warnings beyond maxManagerWarnings
}

func (r *replyReader) err() error {
	if len(r.problems) == 0 {
		return nil
	}
	return errors.New(strings.Join(r.problems, "; "))
}

func (r *replyReader) refuse(where, format string, args ...any) {
	if len(r.problems) < maxManagerWarnings {
		r.problems = append(r.problems, where+": "+fmt.Sprintf(format, args...))
	}
}

// want says what a value should be and what it is; it is not for values that may hold a password.
func (r *replyReader) want(where, got, format string, args ...any) {
	r.refuse(where, "want %s, got %s", fmt.Sprintf(format, args...), r.quote(got))
}

func (r *replyReader) warn(format string, args ...any) {
	if len(r.warnings) == maxManagerWarnings {
		r.unsaid++
		return
	}
	r.warnings = append(r.warnings, "manager: "+fmt.Sprintf(format, args...))
}

func (r *replyReader) allWarnings() []string {
	if r.unsaid > 0 {
		return append(r.warnings, fmt.Sprintf("manager: and %d more such remarks", r.unsaid))
	}
	return r.warnings
}

// quote shows a foreign value: short, without the key, and not at all where it may be a login such as user:pass@host.
func (r *replyReader) quote(text string) string {
	if strings.Contains(text, "@") {
		return "something with @ in it"
	}
	return strconv.Quote(shortened(redactKey(text, r.key)))
}

// isNothing reports whether a value is missing, or what some languages write for an empty object.
func isNothing(raw json.RawMessage) bool {
	switch string(raw) {
	case "", "null", "[]", "{}", `""`:
		return true
	}
	return false
}

// plainValue gives a string, number or truth as text, and nothing as "". It is false for an object or a list.
func plainValue(raw json.RawMessage) (string, bool) {
	if isNothing(raw) {
		return "", true
	}
	switch raw[0] {
	case '{', '[':
		return "", false
	case '"':
		var text string
		err := json.Unmarshal(raw, &text)
		return text, err == nil
	}
	return string(raw), true
}

// object reads an object into wire. It is false for anything else, but nothing is an empty object.
func (r *replyReader) object(where string, raw json.RawMessage, wire any) bool {
	if isNothing(raw) {
		return true
	}
	if raw[0] != '{' || json.Unmarshal(raw, wire) != nil {
		r.refuse(where, "want an object")
		return false
	}
	return true
}

// text reads a value that must not hold control characters. White space around it is no part of it.
func (r *replyReader) text(where string, raw json.RawMessage) string {
	text, ok := r.secretText(where, raw)
	if !ok {
		return ""
	}
	return strings.TrimSpace(text)
}

// secretText reads a value exactly as it is.
func (r *replyReader) secretText(where string, raw json.RawMessage) (string, bool) {
	text, problem := legalText(raw)
	if problem != "" {
		r.refuse(where, "%s", problem)
		return "", false
	}
	return text, true
}

// optional reads text that the worker can do without.
func (r *replyReader) optional(where string, raw json.RawMessage) string {
	text, problem := legalText(raw)
	if problem != "" {
		r.warn("%s: %s, so it is ignored", where, problem)
		return ""
	}
	return strings.TrimSpace(text)
}

func legalText(raw json.RawMessage) (text, problem string) {
	text, plain := plainValue(raw)
	switch {
	case !plain:
		return "", "want a single value"
	case len(text) > maxManagerText:
		return "", fmt.Sprintf("want at most %d bytes", maxManagerText)
	case strings.ContainsFunc(text, isControl) || !utf8.ValidString(text):
		return "", "want text on one line, without control characters"
	}
	return text, ""
}

// boolean reads true, "true", 1, "1", "yes", "on" and their opposites; given is false where there is nothing.
func (r *replyReader) boolean(where string, raw json.RawMessage) (truth, given bool) {
	text := r.text(where, raw)
	switch strings.ToLower(text) {
	case "":
		return false, false
	case "true", "1", "yes", "on":
		return true, true
	case "false", "0", "no", "off":
	default:
		r.want(where, text, "true or false")
	}
	return false, true
}

// integer reads a whole number from 0 to max, which may be text or written as 4222.0; nothing is 0.
func (r *replyReader) integer(where string, raw json.RawMessage, max int) int {
	text := r.text(where, raw)
	if text == "" {
		return 0
	}
	n, err := strconv.ParseFloat(text, 64)
	if err != nil || !(n >= 0 && n <= float64(max)) || n != math.Trunc(n) {
		r.want(where, text, "a whole number from 0 to %d", max)
		return 0
	}
	return int(n)
}

// number reads a bound that the worker can do without: what is no number, or not above 0, bounds nothing.
func (r *replyReader) number(where string, raw json.RawMessage) float64 {
	text := r.optional(where, raw)
	if text == "" {
		return 0
	}
	n, err := strconv.ParseFloat(text, 64)
	if err != nil && !errors.Is(err, strconv.ErrRange) || math.IsNaN(n) {
		r.warn("%s: want a number, got %s, so it is ignored", where, r.quote(text))
		return 0
	}
	return math.Max(n, 0)
}

// count is number as a whole one, at least 1 if it is above 0.
func (r *replyReader) count(where string, raw json.RawMessage, max int) int {
	return int(math.Ceil(math.Min(r.number(where, raw), float64(max))))
}

// seconds is number as a time.
func (r *replyReader) seconds(where string, raw json.RawMessage) time.Duration {
	return time.Duration(math.Min(r.number(where, raw), maxTimeout.Seconds()) * float64(time.Second))
}

// jobs hands out the jobs of a list one by one, so that a long one takes no memory.
func (r *replyReader) jobs(where string, raw json.RawMessage, each func(where string, job wireJob)) {
	if isNothing(raw) {
		return
	}
	if raw[0] != '[' {
		r.refuse(where, "want a list")
		return
	}
	list := json.NewDecoder(bytes.NewReader(raw))
	_, _ = list.Token() // the bracket
	for i := 0; list.More(); i++ {
		if r.jobsLeft--; r.jobsLeft < 0 {
			if r.jobsLeft == -1 {
				r.refuse(where, "more than %d jobs", maxManagerJobs)
			}
			return
		}
		var element json.RawMessage
		if err := list.Decode(&element); err != nil {
			r.refuse(where, "not a list of jobs")
			return
		}
		var job wireJob
		switch at := fmt.Sprintf("%s[%d]", where, i); {
		case isNothing(element):
		case element[0] != '{' || json.Unmarshal(element, &job) != nil:
			r.warn("%s: want an object, so it is ignored", at)
		default:
			each(at, job)
		}
	}
}

// job notes one job under its event, which prefix begins.
func (r *replyReader) job(jobs map[string]jobBounds, where, prefix string, job wireJob) (event string, ok bool) {
	event = prefix + r.optional(where+".event", job.Event)
	if !legalSubject(event) {
		r.warn("%s.event: want %s, got %s, so the job is ignored", where, subjectRule, r.quote(event))
		return "", false
	}
	if _, twice := jobs[event]; twice {
		r.warn("%s: event %s is listed twice, the first counts", where, r.quote(event))
		return event, true
	}
	var data wireJobData
	switch {
	case prefix != "":
		data = wireJobData{job.Limit, job.Timeout}
	case isNothing(job.Data):
	case job.Data[0] != '{' || json.Unmarshal(job.Data, &data) != nil:
		r.warn("%s.data: want an object, so it is ignored", where)
	}
	jobs[event] = jobBounds{
		Limit:   r.count("limit of "+where, data.Limit, maxConcurrency),
		Timeout: r.seconds("timeout of "+where, data.Timeout),
	}
	return event, true
}

// connection reads how to reach the broker.
func (r *replyReader) connection(raw json.RawMessage) (broker *BrokerConfig, durableGiven bool) {
	const in = "broker_connection."
	var wire wireConnection
	if !r.object("broker_connection", raw, &wire) {
		return nil, false
	}
	b := &BrokerConfig{
		Key:      r.optional(in+"key", wire.Key),
		Name:     r.optional(in+"name", wire.Name),
		Type:     strings.ToLower(r.text(in+"type", wire.Type)),
		Host:     r.hosts(in+"host", wire.Host),
		Port:     r.integer(in+"port", wire.Port, 65535),
		CAFile:   r.text(in+"ca_file", wire.CAFile),
		CertFile: r.text(in+"cert_file", wire.CertFile),
		KeyFile:  r.text(in+"key_file", wire.KeyFile),
	}
	b.User, _ = r.secretText(in+"user", wire.User)
	b.Password = r.secret(in+"password", wire.Password)
	b.Secure, _ = r.boolean(in+"secure", wire.Secure)
	b.Durable, durableGiven = r.boolean(in+"durable", wire.Durable)
	switch b.Type {
	case "nats":
		b.Token = r.secret(in+"token", wire.Token)
		r.authType(in+"auth_type", wire.AuthType, b)
	case "rabbitmq":
		b.Exchange = r.name(in+"exchange", wire.Exchange)
		b.VHost = r.name(in+"vhost", wire.VHost)
	case "redis":
		b.DB = r.integer(in+"db", wire.DB, math.MaxInt32)
	default:
		r.want(in+"type", b.Type, "one of %s", strings.Join(servers, ", "))
	}
	return b, durableGiven
}

func (r *replyReader) secret(where string, raw json.RawMessage) secret {
	text, _ := r.secretText(where, raw)
	return secret(text)
}

// name reads a name in AMQP, which has at most 255 bytes.
func (r *replyReader) name(where string, raw json.RawMessage) string {
	text := r.text(where, raw)
	if len(text) > 255 {
		r.refuse(where, "want at most 255 bytes")
	}
	return text
}

// hosts reads one or several servers, as hosts of the configuration does.
func (r *replyReader) hosts(where string, raw json.RawMessage) string {
	text := r.text(where, raw)
	hosts := strings.Split(text, ",")
	for i := range hosts {
		hosts[i] = strings.TrimSpace(hosts[i])
	}
	if !slices.ContainsFunc(hosts, func(host string) bool { return !legalServer(host) }) {
		return strings.Join(hosts, ",")
	}
	r.want(where, text, "a host, or several such as a.example:4222,b.example:4222")
	return ""
}

// authType reads how to log in to NATS; without it, what was given tells.
func (r *replyReader) authType(where string, raw json.RawMessage, b *BrokerConfig) {
	b.AuthType = strings.ToLower(r.text(where, raw))
	switch b.AuthType {
	case "":
		switch {
		case b.Token != "":
			b.AuthType = "token"
		case b.User != "":
			b.AuthType = "user_password"
		default:
			b.AuthType = "none"
		}
	case "none":
	case "token":
		if b.Token == "" {
			r.refuse(where, "token, but there is no token")
		}
	case "user_password", "user_password_bcrypt":
		if b.User == "" {
			r.refuse(where, "%s, but there is no user", b.AuthType)
		}
	default:
		r.want(where, b.AuthType, "one of none, token, user_password, user_password_bcrypt")
	}
}
