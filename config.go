package main

// config.go turns the configuration file, the environment and (later) the manager's answer into one checked Config,
// handed out whole. It knows nothing of brokers or tasks. config_check.go says what each key may hold; config_yaml.go and
// config_value.go read the file for it.

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"
)

// A Config is a complete, checked configuration. It crosses the lifeline from parent to child as JSON, so every field
// is exported. All paths are absolute.
type Config struct {
	File string // the file it came from
	Dir  string // that file's folder

	IdentityID   string
	EndPoint     string // base URL of the Job Manager, "" when this worker is its own manager
	Credential   Credential
	Project      string // first part of the job subjects: the manager's uuid, else Credential.ProjectID
	Broker       BrokerConfig
	Listen       string // host:port; no host means every address, port 0 any free port
	DataDir      string
	Concurrency  int
	DrainTimeout time.Duration
	KillAfter    time.Duration

	MaxDeliveries int
	Retain        Retain
	TakeWhen      TakeWhen
	Refresh       time.Duration
	LogFormat     string // text or json
	LogLevel      slog.Level
	Update        UpdateConfig
	Jobs          []Job
	Execs         []Exec

	Warnings []string // what is valid but hardly meant, each with its place in the file
}

// A Credential is who this worker is to its manager.
type Credential struct {
	ProjectID     string
	SecretKey     secret
	SecretKeyFile string // where SecretKey was read from, "" when it stands in the configuration itself
}

// A secret is a string that no log, error or format verb prints. string(s) gives it away, on purpose, and so does its
// JSON, which the lifeline needs.
type secret string

// Format serves every verb: with a mere String method the wrong ones, such as %d, would print the text.
func (s secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, s.redacted()) }
func (s secret) String() string             { return s.redacted() }
func (s secret) LogValue() slog.Value       { return slog.StringValue(s.redacted()) }
func (s secret) redacted() string {
	if s == "" {
		return ""
	}
	return "redacted"
}

// A BrokerConfig says how to reach the broker (PROTOCOL section 3).
type BrokerConfig struct {
	Key, Name string
	Type      string // local, nats, rabbitmq or redis
	Host      string // one or more, separated by commas, each with or without a port
	Port      int    // for those without; 0: the broker's usual one
	Secure    bool
	CAFile    string
	CertFile  string
	KeyFile   string
	AuthType  string // nats: none, token, user_password, user_password_bcrypt
	User      string
	Password  secret
	Token     secret
	Exchange  string // rabbitmq
	VHost     string // rabbitmq; "" is the virtual host /
	DB        int    // redis
	Durable   bool

	// FilesDigest tells other content of the TLS files: SHA-256 in hex, "" without such files. See tlsDigest.
	FilesDigest string
}

// Retain bounds what is kept of finished tasks.
type Retain struct {
	Tasks int
	Age   time.Duration
	Log   int64 // bytes kept of one task's output
}

// TakeWhen holds the resources below which no new task is started, in bytes; 0 asks for nothing.
type TakeWhen struct {
	DiskFree   int64
	MemoryFree int64
}

// An UpdateConfig says whether and whose new versions are trusted.
type UpdateConfig struct {
	Enabled       bool
	PublicKey     string // standard base64 of an Ed25519 key
	AllowInsecure bool
}

// A Job is something that can be triggered.
type Job struct {
	Name       string
	Event      string
	Cmd        string
	WorkingDir string
	Env        map[string]string
	Timeout    time.Duration // 0: none
	Limit      int           // tasks at once, 1 to Concurrency
	Retry      Retry
}

// A Retry says how often and how soon a failed run is run again.
type Retry struct {
	Times int
	Pause time.Duration // before the first, doubling up to 10 min
}

// An Exec is a background process.
type Exec struct {
	Name, Key   string
	Cmd         string
	WorkingDir  string
	CascadeExit bool
	Attempt     int // restarts in a row
	Env         map[string]string
}

// defaultConfig, with defaultJob and defaultExec, is the only home of a default. DataDir still counts from the
// configuration's folder.
func defaultConfig() *Config {
	return &Config{
		IdentityID:    hostIdentity(),
		Credential:    Credential{ProjectID: "local"},
		Project:       "local",
		Broker:        BrokerConfig{Type: "local"},
		Listen:        "127.0.0.1:8080",
		DataDir:       "data",
		Concurrency:   runtime.NumCPU(),
		DrainTimeout:  30 * time.Second,
		KillAfter:     5 * time.Second,
		MaxDeliveries: 5,
		Retain:        Retain{Tasks: 1000, Age: 168 * time.Hour, Log: 16 << 20},
		TakeWhen:      TakeWhen{DiskFree: 64 << 20},
		Refresh:       10 * time.Minute,
		LogFormat:     "text",
		LogLevel:      slog.LevelInfo,
		Update:        UpdateConfig{Enabled: true},
	}
}

func defaultJob() Job   { return Job{Retry: Retry{Pause: 10 * time.Second}} }
func defaultExec() Exec { return Exec{Attempt: 3} }

// hostIdentity is the host name with what a subject cannot hold replaced by "-".
func hostIdentity() string {
	name, err := os.Hostname()
	if err != nil {
		name = ""
	}
	name = strings.Map(func(c rune) rune {
		if isSubjectRune(c) || c == '.' {
			return c
		}
		return '-'
	}, name)
	if len(name) > maxNameBytes {
		name = name[:maxNameBytes]
	}
	if name = strings.Trim(name, ".-"); !legalSubject(name) {
		return "worker"
	}
	return name
}

// maxConfigBytes bounds the file, and the sum of its values with aliases and environment put in is at most 8 times it.
const maxConfigBytes = 1 << 20

// loadConfig reads and checks the configuration file and what the environment adds to it. Every problem is reported
// at once: the error wraps configErrors.
func loadConfig(path string, getenv func(string) (string, bool)) (*Config, error) {
	text, err := readBounded(path, maxConfigBytes)
	if err != nil {
		return nil, failConfigFile(path, err)
	}
	return parseConfig(path, text, getenv)
}

func failConfigFile(path string, err error) error {
	return failHint(codeConfigFile, fmt.Sprintf("read config %q", path), err,
		"name another file with --config FILE or CONFIG_PATH")
}

// parseConfig is loadConfig for text that was read from path.
func parseConfig(path string, text []byte, getenv func(string) (string, bool)) (*Config, error) {
	c := defaultConfig()
	if err := c.parse(path, text, getenv); err != nil {
		return nil, err
	}
	return c, nil
}

// parse puts what stands in text, read from path, over the defaults in c. With an error c holds what could be read.
func (c *Config) parse(path string, text []byte, getenv func(string) (string, bool)) error {
	file, err := filepath.Abs(path)
	if err != nil {
		return fmt.Errorf("find config %q: %w", path, err)
	}
	c.File, c.Dir = file, filepath.Dir(file)
	r := &configReader{dir: c.Dir, getenv: getenv, budget: 8 * maxConfigBytes}
	r.problems.file = path
	if root, ok := r.parse(text); ok {
		r.config(root, c)
	}
	r.environment(c)
	if err := r.problems.err(); err != nil {
		return fail(codeConfig, fmt.Sprintf("check config %q", path), err)
	}
	c.Warnings = r.warnings
	c.Project = c.Credential.ProjectID
	return nil
}

// readBounded reads a file of at most limit bytes. The error does not name the file: the caller does.
func readBounded(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, withoutPath(err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, withoutPath(err)
	}
	if int64(len(text)) > limit {
		return nil, fmt.Errorf("larger than %d bytes", limit)
	}
	return text, nil
}

// withoutPath takes the path out of an error of the os package: it may hold what came from the environment.
func withoutPath(err error) error {
	var pathErr *fs.PathError
	if errors.As(err, &pathErr) {
		return pathErr.Err
	}
	return err
}

// job gives the job of an event, nil if there is none.
func (c *Config) job(event string) *Job {
	for i := range c.Jobs {
		if c.Jobs[i].Event == event {
			return &c.Jobs[i]
		}
	}
	return nil
}

// baseURL is where a worker that listens on this address is reached from its own host.
func baseURL(listen string) string {
	host, port, err := net.SplitHostPort(listen)
	if err != nil {
		return "http://" + listen
	}
	switch host {
	case "", "0.0.0.0":
		host = "127.0.0.1"
	case "::":
		host = "::1"
	}
	return "http://" + net.JoinHostPort(host, port)
}
