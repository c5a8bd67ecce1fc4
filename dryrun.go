package main

// dryrun.go is --dry-run: it checks that a valid configuration would also work on this host, without running a job,
// and prints one line for each check. What a broker and a manager say is checked in the files that know them.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"
)

// dryRun prints one line per check to out, "ok", "warn" or "FAIL" first, and reports whether none failed.
func dryRun(ctx context.Context, cfg *Config, out io.Writer) bool {
	d := &dryRunner{out: out, passed: true}
	d.ok("configuration %s: %s, %s", cfg.File, count(len(cfg.Jobs), "job"), count(len(cfg.Execs), "exec"))
	for _, warning := range cfg.Warnings {
		d.warn("%s", warning)
	}
	if cfg.Credential.SecretKeyFile != "" {
		d.ok("secret key read from %s", cfg.Credential.SecretKeyFile)
	}
	d.shell(cfg)
	for i := range cfg.Jobs {
		job := &cfg.Jobs[i]
		if label := "job " + job.Event; d.workingDir(label, job.WorkingDir, true) {
			d.program(label, job.Cmd, job.WorkingDir, job.Env)
		}
	}
	for i := range cfg.Execs {
		exec := &cfg.Execs[i]
		if label := "exec " + exec.Key; d.workingDir(label, exec.WorkingDir, false) {
			d.program(label, exec.Cmd, exec.WorkingDir, exec.Env)
		}
	}
	d.dataDir(cfg.DataDir)
	d.port(ctx, cfg)
	if complete := d.manager(ctx, cfg); complete != nil {
		d.broker(ctx, complete)
	}
	return d.passed
}

// manager asks the Job Manager and gives the configuration that it completes, nil if it could not be asked.
func (d *dryRunner) manager(ctx context.Context, cfg *Config) *Config {
	if cfg.EndPoint == "" {
		return cfg
	}
	_, complete, warnings, err := newManagerClient(cfg, slog.New(slog.DiscardHandler)).complete(ctx)
	if err != nil {
		d.failed("manager "+cfg.EndPoint, err)
		return nil
	}
	d.ok("manager %s answers: project %s, broker %s", cfg.EndPoint, complete.Project, complete.Broker.Type)
	for _, warning := range warnings {
		d.warn("%s", warning)
	}
	return complete
}

// broker connects once with the login that the worker would use.
func (d *dryRunner) broker(ctx context.Context, cfg *Config) {
	if cfg.Broker.Type == "local" {
		return
	}
	secured, err := brokerTLS(cfg.Broker, cfg.Dir)
	if err != nil {
		d.failed("TLS files", err)
		return
	}
	ctx, cancel := context.WithTimeout(ctx, brokerProbeLimit)
	defer cancel()
	err = probeBroker(ctx, brokerOptions{
		config: cfg.Broker, project: cfg.Project, identity: cfg.IdentityID, tls: secured,
		log: slog.New(slog.DiscardHandler), changed: func(error) {},
	})
	if err != nil {
		d.failed("broker "+cfg.Broker.Type, err)
		return
	}
	d.ok("broker %s at %s accepts the login", cfg.Broker.Type, cfg.Broker.Host)
}

// brokerProbeLimit bounds how long a broker may take to accept a login.
const brokerProbeLimit = 15 * time.Second

// failed is fail for an error that brings its own cure.
func (d *dryRunner) failed(what string, err error) {
	cure := hintOf(err)
	if code := codeOf(err); code != "" && cure != "" {
		cure += "; " + string(code)
	} else if code != "" {
		cure = string(code)
	}
	d.fail(cure, "%s: %v", what, err)
}

func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

// A dryRunner prints the checks' outcome and remembers whether one failed.
type dryRunner struct {
	out    io.Writer
	passed bool
}

func (d *dryRunner) ok(format string, args ...any) { fmt.Fprintf(d.out, "ok   "+format+"\n", args...) }
func (d *dryRunner) warn(format string, args ...any) {
	fmt.Fprintf(d.out, "warn "+format+"\n", args...)
}

// fail prints what is wrong and what to do about it.
func (d *dryRunner) fail(cure, format string, args ...any) {
	d.passed = false
	fmt.Fprintf(d.out, "FAIL "+format+" (%s)\n", append(args, cure)...)
}

// shell checks that there is a shell if some command needs one for certain.
func (d *dryRunner) shell(cfg *Config) {
	needed := len(cfg.Execs) > 0
	for i := range cfg.Jobs {
		_, known := programOf(cfg.Jobs[i].Cmd)
		needed = needed || !known
	}
	switch {
	case hasShell():
		d.ok("a shell runs the commands")
	case needed:
		d.fail("install one, or keep to jobs whose cmd is a program and its arguments",
			"there is no shell, and commands of this configuration need one")
	default:
		d.warn("there is no shell: only commands that are a program and its arguments can run")
	}
}

// programOf gives the first word of a command line where that can be told without running it.
func programOf(cmd string) (name string, known bool) {
	t, err := parseTemplate(cmd, hostShell)
	if err != nil {
		// A job's template was checked on loading; an exec's command is none and may look like a bad one.
		return "", false
	}
	return t.program()
}

// workingDir checks that a folder is there, and for a job that its data file can be written into it.
func (d *dryRunner) workingDir(label, dir string, written bool) bool {
	info, err := os.Stat(dir)
	switch {
	case err != nil:
		d.fail("create it, or set working_dir", "%s: folder %s: %v", label, dir, withoutPath(err))
	case !info.IsDir():
		d.fail("set working_dir to a folder", "%s: %s is not a folder", label, dir)
	case written:
		if err := tryWriting(dir); err != nil {
			d.fail("a job finds its data in its working folder: let this user write there, or set working_dir",
				"%s: write into %s: %v", label, dir, err)
			return false
		}
		return true
	default:
		return true
	}
	return false
}

// program checks that a command's program exists.
func (d *dryRunner) program(label, cmd, dir string, extra map[string]string) {
	name, known := programOf(cmd)
	if !known {
		d.ok("%s: what it runs is told by the shell or the data", label)
		return
	}
	env := os.Environ()
	for variable, value := range extra {
		env = append(env, variable+"="+value)
	}
	path, err := lookProgram(name, dir, env)
	switch {
	case err == nil:
		d.ok("%s: %s is %s", label, name, path)
	default:
		d.fail("install it, write its whole path, or put its folder on PATH", "%s: program %q: %v", label, name, err)
	}
}

// dataDir checks that the data folder can be written, or created where it is not there yet.
func (d *dryRunner) dataDir(dir string) {
	existing := dir
	info, err := os.Stat(existing)
	for errors.Is(err, fs.ErrNotExist) && filepath.Dir(existing) != existing {
		existing = filepath.Dir(existing)
		info, err = os.Stat(existing)
	}
	if err == nil && !info.IsDir() {
		d.fail("set data_dir to a folder", "data_dir %s: %s is not a folder", dir, existing)
		return
	}
	if err == nil {
		err = tryWriting(existing)
	}
	switch {
	case err != nil:
		d.fail("let this user write there, or set data_dir", "data_dir %s: write into %s: %v", dir, existing, withoutPath(err))
	case existing != dir:
		d.ok("data_dir %s can be created", dir)
	default:
		d.ok("data_dir %s is writable", dir)
	}
}

// tryWriting writes a file into a folder and removes it again.
func tryWriting(dir string) error {
	f, err := os.CreateTemp(dir, ".job_item-dry-run-*")
	if err != nil {
		return withoutPath(err)
	}
	_, writeErr := f.WriteString("x")
	return withoutPath(errors.Join(writeErr, f.Close(), os.Remove(f.Name())))
}

// port checks that the address is free, or that the worker of this configuration has it.
func (d *dryRunner) port(ctx context.Context, cfg *Config) {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", cfg.Listen)
	if err == nil {
		_ = listener.Close()
		d.ok("listen %s is free", cfg.Listen)
		return
	}
	identity, healthErr := identityAt(ctx, baseURL(cfg.Listen))
	switch {
	case healthErr == nil && identity == cfg.IdentityID:
		d.ok("listen %s is held by this worker", cfg.Listen)
	case healthErr == nil:
		d.fail("stop that one, or set listen or identity_id", "listen %s is held by another worker, %q", cfg.Listen, identity)
	default:
		d.fail("stop the program that has it, or set listen", "listen %s: %v", cfg.Listen, err)
	}
}

// identityAt asks a running worker who it is.
func identityAt(ctx context.Context, base string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, base+"/health", nil)
	if err != nil {
		return "", err
	}
	// No proxy stands between this host and itself, and no connection outlives the question.
	transport := &http.Transport{DisableKeepAlives: true}
	response, err := transport.RoundTrip(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	var health struct {
		IdentityID string `json:"identity_id"`
	}
	if err := json.NewDecoder(io.LimitReader(response.Body, 1<<20)).Decode(&health); err != nil {
		return "", err
	}
	if health.IdentityID == "" {
		return "", errors.New("not a worker")
	}
	return health.IdentityID, nil
}
