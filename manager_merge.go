package main

// manager_merge.go makes the configuration that a worker runs with out of its file and the manager's reply: whose word
// counts for what, and which files of this host the manager may name.

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
)

// merge gives the configuration for the worker, and what a person should know about it. cfg is the file's and stays as
// it is. The error is codeManagerPath.
func (r *managerReply) merge(cfg *Config) (merged *Config, warnings []string, err error) {
	m := *cfg
	warnings = slices.Clone(r.Warnings)
	if r.Project != "" {
		m.Project = r.Project
	}
	switch {
	case r.Broker != nil:
		if m.Broker, err = r.broker(cfg); err != nil {
			return nil, nil, err
		}
	case cfg.Broker.Type == "local":
		warnings = append(warnings, "neither the manager nor the configuration names a broker: "+
			"tasks come through the REST API of this worker only")
	}
	m.Jobs = nil
	for _, job := range cfg.Jobs {
		bounds, listed := r.Jobs[job.Event]
		if !listed {
			warnings = append(warnings, fmt.Sprintf("job %s is not subscribed, the manager does not list its event: "+
				"add it to the project there, or remove it here", job.Event))
			continue
		}
		// A limit that the file does not set is Concurrency by now, which nothing exceeds anyway.
		job.Limit = smallerSet(job.Limit, bounds.Limit)
		job.Timeout = smallerSet(job.Timeout, bounds.Timeout)
		m.Jobs = append(m.Jobs, job)
	}
	return &m, warnings, nil
}

// smallerSet is the smaller of two bounds of which 0 is none.
func smallerSet[T ~int | ~int64](a, b T) T {
	if a == 0 || b == 0 {
		return a + b
	}
	return min(a, b)
}

// broker is the manager's connection. The file adds to it, for the same type of broker, what managers may not know of.
func (r *managerReply) broker(cfg *Config) (BrokerConfig, error) {
	b := *r.Broker
	for _, file := range []struct {
		key  string
		path *string
		ours string
	}{
		{"ca_file", &b.CAFile, cfg.Broker.CAFile},
		{"cert_file", &b.CertFile, cfg.Broker.CertFile},
		{"key_file", &b.KeyFile, cfg.Broker.KeyFile},
	} {
		if *file.path == "" {
			continue
		}
		path, err := managerPath(cfg, file.key, *file.path, file.ours)
		if err != nil {
			return BrokerConfig{}, err
		}
		*file.path = path
	}
	if b.Type != cfg.Broker.Type {
		return b, nil
	}
	if !r.durableGiven {
		b.Durable = cfg.Broker.Durable
	}
	if b.VHost == "" {
		b.VHost = cfg.Broker.VHost
	}
	if b.Type == "redis" && b.User == "" {
		b.User = cfg.Broker.User
	}
	return b, nil
}

// managerPath is the file on this host that a manager means by path. An archive of the manager's is unpacked beside
// ca_file and a key_file is what this host proves its identity with, so a manager may name what is inside of the
// configuration's folder or data_dir, and elsewhere only what the configuration file names too, as ours, under the same
// key. Relative paths count from the configuration's folder; a backslash separates like a slash, on every system.
func managerPath(cfg *Config, key, path, ours string) (string, error) {
	slashed := strings.ReplaceAll(path, `\`, "/")
	onHost := filepath.FromSlash(slashed)
	var problem error
	switch {
	case strings.HasPrefix(slashed, "//"):
		problem = errors.New("it is a path in the network")
	case filepath.IsAbs(onHost):
		onHost = filepath.Clean(onHost)
	case strings.HasPrefix(slashed, "/") || len(slashed) > 1 && slashed[1] == ':':
		problem = errors.New("it is a path of another operating system")
	default:
		onHost = filepath.Join(cfg.Dir, onHost)
	}
	if problem == nil {
		if onHost == ours || liesBelow(cfg.Dir, onHost) || liesBelow(cfg.DataDir, onHost) {
			return onHost, nil
		}
		problem = fmt.Errorf("it is outside of %s and of data_dir", cfg.Dir)
	}
	return "", failHint(codeManagerPath,
		fmt.Sprintf("use %s %q of the manager", key, shortened(redactKey(path, cfg.Credential.SecretKey))), problem,
		fmt.Sprintf("If it is meant, name the same path as broker_connection.%s in the configuration file.", key))
}

// liesBelow reports whether a clean absolute path is below a folder. Everything is below the root, so for a
// configuration there only its folder tls counts.
func liesBelow(dir, path string) bool {
	if filepath.Dir(dir) == dir {
		dir = filepath.Join(dir, "tls")
	}
	rest, err := filepath.Rel(dir, path)
	return err == nil && rest != "." && filepath.IsLocal(rest)
}
