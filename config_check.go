package main

// config_check.go says which keys the configuration has and what each may hold: one function per part of the file,
// in the order of PROTOCOL section 2. How values are read, and problems collected, is the affair of config_yaml.go and
// config_value.go.

import (
	"errors"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"gopkg.in/yaml.v3"
)

// configKeys are the keys that each part of the file may have.
var configKeys = map[string][]string{
	"": {"identity_id", "end_point", "credential", "broker_connection", "listen", "data_dir", "concurrency",
		"drain_timeout", "kill_after", "max_deliveries", "retain", "take_when", "refresh", "log_format", "update",
		"jobs", "execs"},
	"credential": {"project_id", "secret_key", "secret_key_file"},
	"broker_connection": {"key", "name", "type", "host", "port", "secure", "ca_file", "cert_file", "key_file",
		"auth_type", "user", "password", "token", "exchange", "vhost", "db", "durable"},
	"retain":       {"tasks", "age", "log"},
	"take_when":    {"disk_free", "memory_free"},
	"update":       {"enabled", "public_key", "allow_insecure"},
	"jobs[]":       {"name", "event", "cmd", "working_dir", "env", "timeout", "limit", "retry"},
	"jobs[].retry": {"times", "pause"},
	"execs[]":      {"name", "key", "cmd", "working_dir", "cascade_exit", "attempt", "env"},
}

// Bounds of what no sensible configuration exceeds; they keep sums and products from overflowing.
const (
	maxConcurrency  = 10_000 // RabbitMQ's prefetch is 16 bits
	maxTimeout      = 10 * 365 * 24 * time.Hour
	maxRetryPause   = 10 * time.Minute
	maxKeyFileBytes = 64 << 10
	maxNameBytes    = 128
)

// config reads the whole file into c, which holds the defaults.
func (r *configReader) config(root field, c *Config) {
	top := r.section(root, "")
	r.identity(top["identity_id"], &c.IdentityID)
	r.endPoint(top["end_point"], &c.EndPoint)
	r.credential(top["credential"], &c.Credential)
	r.broker(top["broker_connection"], &c.Broker)
	r.listen(top["listen"], &c.Listen)
	r.path(top["data_dir"], &c.DataDir)
	c.DataDir = r.absolute(c.DataDir)
	r.integer(top["concurrency"], &c.Concurrency, 1, maxConcurrency)
	r.duration(top["drain_timeout"], &c.DrainTimeout, 0, maxTimeout)
	r.duration(top["kill_after"], &c.KillAfter, 0, maxTimeout)
	r.integer(top["max_deliveries"], &c.MaxDeliveries, 1, 1000)
	r.retain(top["retain"], &c.Retain)
	r.takeWhen(top["take_when"], &c.TakeWhen)
	r.duration(top["refresh"], &c.Refresh, 100*time.Millisecond, maxTimeout)
	r.oneOf(top["log_format"], &c.LogFormat, "text", "json")
	r.update(top["update"], &c.Update)
	c.Jobs = r.jobs(top["jobs"], c)
	c.Execs = r.execs(top["execs"])

	if c.EndPoint != "" && c.Credential.ProjectID == defaultConfig().Credential.ProjectID {
		r.refuse(top["end_point"], "a manager wants to know the project, set credential.project_id")
	}
	if c.Credential.SecretKey == "" && !onLoopback(c.Listen) {
		r.warn(top["listen"], "without credential.secret_key every call from another host but /health is refused")
	}
	if top["jobs"].node == nil && top["execs"].node == nil {
		r.warn(root, "neither jobs nor execs: there is nothing to do")
	}
}

// environment applies the variables that stand for a key.
func (r *configReader) environment(c *Config) {
	if id, _ := r.getenv("WORKER_ID"); id != "" {
		if legalSubject(id) {
			c.IdentityID = id
		} else {
			r.refuse(field{key: "WORKER_ID"}, "want %s", subjectRule)
		}
	}
	level, _ := r.getenv("LOG_LEVEL")
	switch strings.ToUpper(level) {
	case "", "INFO":
	case "DEBUG":
		c.LogLevel = slog.LevelDebug
	case "WARN":
		c.LogLevel = slog.LevelWarn
	case "ERROR":
		c.LogLevel = slog.LevelError
	default:
		r.refuse(field{key: "LOG_LEVEL"}, "want DEBUG, INFO, WARN or ERROR")
	}
}

const subjectRule = "1 to 128 of A-Z a-z 0-9 _ - and single dots inside, such as line-1.printer"

// legalSubject reports whether s can be a part of a subject with every broker: words joined by dots.
func legalSubject(s string) bool {
	if len(s) > maxNameBytes {
		return false
	}
	for word := range strings.SplitSeq(s, ".") {
		if word == "" || strings.ContainsFunc(word, func(c rune) bool { return !isSubjectRune(c) }) {
			return false
		}
	}
	return true
}

func isSubjectRune(c rune) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '_' || c == '-'
}

func (r *configReader) identity(f field, to *string) {
	if id, ok := r.text(f); ok && !legalSubject(id) {
		r.want(f, "%s", subjectRule)
	} else if ok {
		*to = id
	}
}

// endPoint reads the manager's address and keeps its base.
func (r *configReader) endPoint(f field, to *string) {
	text, ok := r.text(f)
	if !ok {
		return
	}
	u, err := url.Parse(text)
	switch {
	case err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "":
		r.want(f, "the manager's URL, such as https://manager.example:5280")
	case u.User != nil:
		r.want(f, "a URL without user and password, those are in credential")
	case u.RawQuery != "" || u.Fragment != "":
		r.want(f, "a URL without ? and #")
	default:
		base := strings.TrimRight(text, "/")
		*to = strings.TrimRight(strings.TrimSuffix(base, "/api/worker/config"), "/")
	}
}

func (r *configReader) credential(f field, to *Credential) {
	fields := r.section(f, "credential")
	if id, ok := r.text(fields["project_id"]); ok && (!legalSubject(id) || strings.Contains(id, ".")) {
		r.want(fields["project_id"], "1 to 128 of A-Z a-z 0-9 _ -, such as a UUID")
	} else if ok {
		to.ProjectID = id
	}
	r.secret(fields["secret_key"], &to.SecretKey)
	keyFile := fields["secret_key_file"]
	r.path(keyFile, &to.SecretKeyFile)
	switch {
	case to.SecretKeyFile == "":
	case fields["secret_key"].node != nil:
		r.refuse(keyFile, "want this or secret_key, not both")
	default:
		r.keyFile(keyFile, to)
	}
}

// keyFile reads the secret key from its file.
func (r *configReader) keyFile(f field, to *Credential) {
	info, err := os.Stat(to.SecretKeyFile)
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New("not a regular file") // opening a pipe could wait for ever
	}
	var text []byte
	if err == nil {
		text, err = readBounded(to.SecretKeyFile, maxKeyFileBytes)
	}
	if err != nil {
		r.want(f, "a file with the key (%v)", withoutPath(err))
		return
	}
	key := strings.TrimSuffix(strings.TrimSuffix(string(text), "\n"), "\r")
	if key == "" || strings.ContainsFunc(key, isControl) {
		r.want(f, "a file with the key on one line and nothing else")
		return
	}
	to.SecretKey = secret(key)
	// Windows has no such permission bits: Go makes them up.
	if info.Mode().Perm()&0o004 != 0 && runtime.GOOS != "windows" {
		r.warn(f, "everybody on this host may read the key: chmod 600 the file")
	}
}

// servers are the brokers that are reached over the network, and brokerTypes tells which brokers use a key of
// broker_connection; the keys that are not here serve every broker.
var (
	servers     = []string{"nats", "rabbitmq", "redis"}
	brokerTypes = map[string][]string{
		"host": servers, "port": servers, "user": servers, "password": servers,
		"secure": servers, "ca_file": servers, "cert_file": servers, "key_file": servers,
		"auth_type": {"nats"}, "token": {"nats"},
		"exchange": {"rabbitmq"}, "vhost": {"rabbitmq"},
		"db":      {"redis"},
		"durable": {"nats", "redis"},
	}
)

func (r *configReader) broker(f field, to *BrokerConfig) {
	fields := r.section(f, "broker_connection")
	r.str(fields["key"], &to.Key)
	r.str(fields["name"], &to.Name)
	r.oneOf(fields["type"], &to.Type, "nats", "rabbitmq", "redis", "local")
	r.integer(fields["port"], &to.Port, 1, 65535)
	r.looseBoolean(fields["secure"], &to.Secure)
	r.path(fields["ca_file"], &to.CAFile)
	r.path(fields["cert_file"], &to.CertFile)
	r.path(fields["key_file"], &to.KeyFile)
	r.str(fields["user"], &to.User)
	r.secret(fields["password"], &to.Password)
	r.secret(fields["token"], &to.Token)
	r.str(fields["exchange"], &to.Exchange)
	r.str(fields["vhost"], &to.VHost)
	r.integer(fields["db"], &to.DB, 0, math.MaxInt32)
	r.looseBoolean(fields["durable"], &to.Durable)
	r.authType(fields["auth_type"], to)

	if (to.CertFile == "") != (to.KeyFile == "") {
		r.refuse(f, "cert_file and key_file go together, want both or none")
	}
	switch {
	case to.Type != "local":
		r.hosts(f, fields, &to.Host)
	case fields["type"].node == nil && fields["host"].node != nil:
		r.missing(f, "type", "one of nats, rabbitmq, redis")
		return
	}
	for _, name := range configKeys["broker_connection"] {
		used, limited := brokerTypes[name]
		if limited && fields[name].node != nil && !slices.Contains(used, to.Type) {
			r.warn(fields[name], "not used with type %s", to.Type)
		}
	}
}

// authType reads how to log in to NATS; without it, what was given tells.
func (r *configReader) authType(f field, to *BrokerConfig) {
	if to.Type != "nats" {
		return
	}
	switch {
	case to.Token != "":
		to.AuthType = "token"
	case to.User != "":
		to.AuthType = "user_password"
	default:
		to.AuthType = "none"
	}
	r.oneOf(f, &to.AuthType, "none", "token", "user_password", "user_password_bcrypt")
	switch {
	case to.AuthType == "token" && to.Token == "":
		r.refuse(f, "token needs the token beside it")
	case strings.HasPrefix(to.AuthType, "user_password") && to.User == "":
		r.refuse(f, "%s needs user and password beside it", to.AuthType)
	}
}

// hosts reads servers separated by commas.
func (r *configReader) hosts(section field, fields map[string]field, to *string) {
	text, ok := r.required(section, fields, "host", "the broker's host, such as broker.example")
	if !ok {
		return
	}
	var hosts []string
	for server := range strings.SplitSeq(text, ",") {
		server = strings.TrimSpace(server)
		if !legalServer(server) {
			r.want(fields["host"], "a host, or several such as a.example:4222,b.example:4222")
			return
		}
		hosts = append(hosts, server)
	}
	*to = strings.Join(hosts, ",")
}

// legalServer reports whether s is a host with or without a port; an IPv6 address with one stands in brackets.
func legalServer(s string) bool {
	if legalHost(strings.TrimSuffix(strings.TrimPrefix(s, "["), "]")) {
		return true
	}
	host, port, err := net.SplitHostPort(s)
	return err == nil && legalHost(host) && legalPort(port, 1)
}

func legalHost(s string) bool {
	_, err := netip.ParseAddr(s)
	return err == nil || legalSubject(s)
}

func legalPort(s string, min int) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n >= uint64(min)
}

// looseBoolean reads what managers send for a boolean: true, "true", 1, "yes" and the like.
func (r *configReader) looseBoolean(f field, to *bool) {
	text, ok := r.text(f)
	if !ok {
		return
	}
	switch strings.ToLower(text) {
	case "true", "1", "yes", "on":
		*to = true
	case "false", "0", "no", "off":
		*to = false
	default:
		r.want(f, "true or false")
	}
}

func (r *configReader) listen(f field, to *string) {
	text, ok := r.text(f)
	if !ok {
		return
	}
	host, port, err := net.SplitHostPort(text)
	if err != nil || host != "" && !legalHost(host) || !legalPort(port, 0) {
		r.want(f, "host:port such as 127.0.0.1:8080, or :8080 for every address")
		return
	}
	*to = text
}

// onLoopback reports whether only this host reaches that address.
func onLoopback(listen string) bool {
	host, _, _ := net.SplitHostPort(listen)
	addr, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && addr.Unmap().IsLoopback()
}

func (r *configReader) retain(f field, to *Retain) {
	fields := r.section(f, "retain")
	r.integer(fields["tasks"], &to.Tasks, 1, 1_000_000)
	r.duration(fields["age"], &to.Age, time.Millisecond, maxTimeout)
	r.size(fields["log"], &to.Log, 1<<10)
}

func (r *configReader) takeWhen(f field, to *TakeWhen) {
	fields := r.section(f, "take_when")
	r.size(fields["disk_free"], &to.DiskFree, 0)
	r.size(fields["memory_free"], &to.MemoryFree, 0)
}

func (r *configReader) update(f field, to *UpdateConfig) {
	fields := r.section(f, "update")
	r.boolean(fields["enabled"], &to.Enabled)
	r.boolean(fields["allow_insecure"], &to.AllowInsecure)
	if text, ok := r.text(fields["public_key"]); ok {
		if _, err := parsePublicKey(text); err != nil {
			r.want(fields["public_key"], "an Ed25519 public key: 32 bytes in base64")
		} else {
			to.PublicKey = text
		}
	}
}

func (r *configReader) jobs(list field, c *Config) []Job {
	var jobs []Job
	taken := map[string]field{}
	for _, f := range r.items(list) {
		fields := r.section(f, "jobs[]")
		job := defaultJob()
		job.Limit = c.Concurrency
		job.Event = r.unique(f, fields, "event", taken)
		if job.Event == "restart" {
			r.refuse(fields["event"], "that subject is the manager's restart order, want another")
		}
		job.Name = job.Event
		r.str(fields["name"], &job.Name)
		job.Cmd, _ = r.required(f, fields, "cmd", "the command line to run")
		r.template(fields["cmd"], job.Cmd)
		r.path(fields["working_dir"], &job.WorkingDir)
		job.WorkingDir = r.absolute(job.WorkingDir)
		job.Env = r.env(fields["env"], taskVariables)
		r.duration(fields["timeout"], &job.Timeout, 0, maxTimeout)
		r.integer(fields["limit"], &job.Limit, 1, math.MaxInt32)
		job.Limit = min(job.Limit, c.Concurrency)
		retry := r.section(fields["retry"], "jobs[].retry")
		r.integer(retry["times"], &job.Retry.Times, 0, 1000)
		r.duration(retry["pause"], &job.Retry.Pause, 0, maxRetryPause)
		jobs = append(jobs, job)
	}
	return jobs
}

func (r *configReader) execs(list field) []Exec {
	var execs []Exec
	taken := map[string]field{}
	for _, f := range r.items(list) {
		fields := r.section(f, "execs[]")
		exec := defaultExec()
		exec.Key = r.unique(f, fields, "key", taken)
		exec.Name = exec.Key
		r.str(fields["name"], &exec.Name)
		exec.Cmd, _ = r.required(f, fields, "cmd", "the command line to run")
		r.path(fields["working_dir"], &exec.WorkingDir)
		exec.WorkingDir = r.absolute(exec.WorkingDir)
		r.boolean(fields["cascade_exit"], &exec.CascadeExit)
		r.integer(fields["attempt"], &exec.Attempt, 0, 1000)
		exec.Env = r.env(fields["env"], execVariables)
		execs = append(execs, exec)
	}
	return execs
}

// unique reads the key that names an entry of a list.
func (r *configReader) unique(entry field, fields map[string]field, name string, taken map[string]field) string {
	f := fields[name]
	text, ok := r.required(entry, fields, name, subjectRule)
	if !ok {
		return ""
	}
	if !legalSubject(text) {
		r.want(f, "%s", subjectRule)
	} else if before, twice := taken[text]; twice {
		r.refuse(f, "want another %s, line %d has this one", name, before.line)
	} else {
		taken[text] = f
	}
	return text
}

// required reads text that has to be there and not blank. fields is nil when the whole section was refused.
func (r *configReader) required(section field, fields map[string]field, name, what string) (string, bool) {
	f := fields[name]
	if f.node != nil {
		text, ok := r.rawText(f)
		if !ok || strings.TrimSpace(text) != "" {
			return text, ok
		}
	}
	if fields != nil {
		r.missing(section, name, what)
	}
	return "", false
}

func (r *configReader) missing(section field, name, what string) {
	r.refuse(field{key: join(section.key, name), line: section.line}, "missing, want %s", what)
}

// template checks that a command line parses. What the environment put into it is part of the template.
func (r *configReader) template(f field, cmd string) {
	if cmd == "" {
		return
	}
	if _, err := parseTemplate(cmd, hostShell); err != nil && cmd == f.node.Value {
		r.refuse(f, "the template does not parse: %v", err)
	} else if err != nil {
		// The cause may quote what is not ours to show.
		r.refuse(f, "the template does not parse with the environment's values in it")
	}
}

// Variables that the worker sets: for a task (PROTOCOL section 6) and for an exec (section 9).
var (
	taskVariables = []string{"JOB_MANAGER_HOST", "JOB_MANAGER_RESULT_URL", "JOB_MANAGER_UPLOAD_FILE",
		"JOB_ITEM_TASK_ID", "JOB_ITEM_PROJECT_ID", "JOB_ITEM_PROJECT_KEY", "JOB_ITEM_MSG_NOTIF_HOST",
		"JOB_ITEM_EVENT", "JOB_ITEM_ATTEMPT", "JOB_ITEM_BASE_URL", "JOB_ITEM_CREATE_URL", "JOB_ITEM_APP_ID"}
	execVariables = []string{"JOB_ITEM_BASE_URL", "JOB_ITEM_CREATE_URL", "JOB_ITEM_APP_ID"}
)

// env reads additional environment variables.
func (r *configReader) env(f field, reserved []string) map[string]string {
	if f.node == nil {
		return nil
	}
	if f.node.Kind != yaml.MappingNode {
		r.want(f, "a mapping of names to values")
		return nil
	}
	env := map[string]string{}
	for _, v := range r.pairs(f) {
		switch {
		case !legalVariable(v.name):
			r.refuse(v, "want a name of A-Z a-z 0-9 _ that does not begin with a digit")
		case slices.Contains(reserved, strings.ToUpper(v.name)):
			r.refuse(v, "the worker sets this one itself, want another name")
		case v.node == nil:
			r.refuse(v, "want a value, \"\" for an empty one")
		default:
			if text, ok := r.rawText(v); ok {
				env[v.name] = text
			}
		}
	}
	return env
}

func legalVariable(name string) bool {
	return name != "" && !('0' <= name[0] && name[0] <= '9') &&
		!strings.ContainsFunc(name, func(c rune) bool { return !isSubjectRune(c) || c == '-' })
}

// path reads the name of a file or folder.
func (r *configReader) path(f field, to *string) {
	if text, ok := r.text(f); ok {
		*to = r.absolute(text)
	}
}

// absolute counts a path from the configuration's folder; "" is that folder.
func (r *configReader) absolute(path string) string {
	if filepath.IsAbs(path) {
		return filepath.Clean(path)
	}
	return filepath.Join(r.dir, path)
}
