package main

// manager_merge_test.go is about what becomes of a manager's configuration here: merged, and remembered.

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestManagerMerge(t *testing.T) {
	f := newFakeManager(t, "project-1")
	cfg := managedConfig(t, f, `
concurrency: 8
broker_connection: {type: nats, host: from.file, password: theirs, durable: true}
jobs:
  - {event: neither, cmd: x}
  - {event: manager, cmd: x}
  - {event: file, cmd: x, limit: 2, timeout: 20s}
  - {event: both, cmd: x, limit: 3, timeout: 30s}
  - {event: less, cmd: x, limit: 3, timeout: 30s}
  - {event: parent.nested, cmd: x, limit: 5}
  - {event: unlisted, cmd: x}
  - {event: nested, cmd: x}
`)
	f.change(func(f *fakeManager) {
		f.connection = map[string]any{"type": "nats", "host": "from.manager"}
		f.jobs = []any{
			fakeJob("neither", nil, nil), fakeJob("manager", 4, 40), fakeJob("file", "", 0), fakeJob("both", "5", "50"),
			fakeJob("less", 1, 10), fakeJob("parent", 1, 1, fakeNestedJob("nested", "4", "40")), fakeJob("not_ours", 1, 1),
		}
	})
	before, _ := json.Marshal(cfg)
	reply, err := newManagerClient(cfg, silentLog()).ask(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	merged, warnings, err := reply.merge(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if after, _ := json.Marshal(cfg); !bytes.Equal(before, after) {
		t.Errorf("the file's configuration was changed: %s; want %s", after, before)
	}
	want := []jobBounds{{8, 0}, {4, 40 * time.Second}, {2, 20 * time.Second}, {3, 30 * time.Second}, {1, 10 * time.Second},
		{4, 40 * time.Second}}
	events := []string{"neither", "manager", "file", "both", "less", "parent.nested"}
	var got []jobBounds
	var gotEvents []string
	for _, job := range merged.Jobs {
		got, gotEvents = append(got, jobBounds{job.Limit, job.Timeout}), append(gotEvents, job.Event)
	}
	if !reflect.DeepEqual(got, want) || !slices.Equal(gotEvents, events) {
		t.Errorf("jobs %v %v; want %v %v", gotEvents, got, events, want)
	}
	if len(warnings) != 2 || !strings.Contains(warnings[0], "unlisted is not subscribed") ||
		!strings.Contains(warnings[1], "job nested is not subscribed") {
		t.Errorf("warnings %q; want that unlisted and nested are not subscribed", warnings)
	}
	wantBroker := BrokerConfig{Type: "nats", Host: "from.manager", AuthType: "none", Durable: true}
	if merged.Broker != wantBroker {
		t.Errorf("broker %+v; want %+v: the manager's, durable from the file", merged.Broker, wantBroker)
	}
	if merged.Project != "project-1" || merged.Credential.ProjectID != fakeProjectID {
		t.Errorf("project %q, credential %q; want the manager's and the file's", merged.Project, merged.Credential.ProjectID)
	}

	// The manager's own word on durable counts, and another type of broker takes nothing from the file.
	for _, connection := range []string{`{"type":"nats","host":"h","durable":"0"}`, `{"type":"redis","host":"h"}`} {
		reply, err := parseManagerReply([]byte(`{"return":{"uuid":"u","broker_connection":`+connection+`}}`), "")
		if err != nil {
			t.Fatal(err)
		}
		if merged, _, _ := reply.merge(cfg); merged.Broker.Durable {
			t.Errorf("%s is durable after the merge; want not", connection)
		}
	}
}

func TestManagerMergeSaysNothing(t *testing.T) {
	f := newFakeManager(t, "")
	cfg := managedConfig(t, f, minimalConfig)
	reply, err := parseManagerReply([]byte(`{"return":{"project":null,"other":1}}`), "")
	if err != nil {
		t.Fatal(err)
	}
	merged, warnings, err := reply.merge(cfg)
	if err != nil || merged.Project != fakeProjectID || merged.Broker.Type != "local" || len(merged.Jobs) != 0 {
		t.Errorf("merged %+v, %v; want the file's project and broker, and no jobs", merged, err)
	}
	text := strings.Join(warnings, "\n")
	for _, part := range []string{"uuid: missing", "names a broker", "job a is not subscribed"} {
		if !strings.Contains(text, part) {
			t.Errorf("no %q among the warnings\n%s", part, text)
		}
	}
}

func TestManagerPaths(t *testing.T) {
	root := t.TempDir()
	cfg := &Config{Dir: filepath.Join(root, "etc"), DataDir: filepath.Join(root, "var", "data"),
		Credential: Credential{SecretKey: fakeSecretKey}}
	ours := filepath.Join(root, "pki", "ca.crt")
	for _, row := range []struct{ path, want string }{
		{"ca.crt", filepath.Join(root, "etc", "ca.crt")},
		{"./tls//nats/ca.crt", filepath.Join(root, "etc", "tls", "nats", "ca.crt")},
		{`tls\nats\ca.crt`, filepath.Join(root, "etc", "tls", "nats", "ca.crt")},
		{"tls/../ca.crt", filepath.Join(root, "etc", "ca.crt")},
		{filepath.Join(root, "etc", "x", "ca.crt"), filepath.Join(root, "etc", "x", "ca.crt")},
		{"../var/data/tls/ca.crt", filepath.Join(root, "var", "data", "tls", "ca.crt")},
		{ours, ours},
		{"../pki/ca.crt", ours},
		{filepath.Join(root, "pki", "other.crt"), ""},
		{filepath.Join(root, "pki", "ca.crt", "x"), ""},
		{filepath.Join(root, "etcetera", "ca.crt"), ""},
		{filepath.Join(root, "etc"), ""},
		{".", ""}, {"..", ""}, {"../ca.crt", ""}, {`..\..\ca.crt`, ""}, {"tls/../../ca.crt", ""},
		{"/etc/ssl/ca.crt", ""}, {"//server/share/ca.crt", ""}, {`\\server\share\ca.crt`, ""}, {`C:\certs\ca.crt`, ""},
		{"C:ca.crt", ""}, {"/" + fakeSecretKey, ""},
	} {
		got, err := managerPath(cfg, "ca_file", row.path, ours)
		if got != row.want {
			t.Errorf("managerPath(%q) = %q, %v; want %q", row.path, got, err, row.want)
		}
		if row.want == "" {
			wantError(t, err, codeManagerPath, "broker_connection.ca_file")
		}
	}
	atRoot := filepath.VolumeName(root) + string(filepath.Separator)
	if liesBelow(atRoot, root) || !liesBelow(atRoot, filepath.Join(atRoot, "tls", "ca.crt")) {
		t.Error("for a configuration in the root folder everything, or not even tls, is inside")
	}
	reply := &managerReply{Broker: &BrokerConfig{Type: "nats", Host: "h", KeyFile: "/etc/ssl/private/host.key"}}
	_, _, err := reply.merge(cfg)
	wantError(t, err, codeManagerPath, "key_file")
}

func TestManagerRemembers(t *testing.T) {
	f := newFakeManager(t, "project-1")
	f.change(func(f *fakeManager) {
		f.connection = map[string]any{"type": "nats", "host": "h", "user": "<&>\u2028", "password": "p", "ca_file": "ca.crt"}
		f.jobs = []any{fakeJob("a", 1, 2)}
	})
	cfg := managedConfig(t, f, minimalConfig)
	m := newManagerClient(cfg, silentLog())
	_, _, err := m.remembered()
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a kept answer: %v; want that it does not exist", err)
	}
	wantError(t, err, codeManagerRemembered, "manager.json")

	reply, err := m.ask(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second replaces the first
		if err := m.remember(reply); err != nil {
			t.Fatal(err)
		}
	}
	got, at, err := m.remembered()
	if err != nil || !reflect.DeepEqual(got, reply) || time.Since(at) > time.Minute {
		t.Errorf("remembered %+v of %v, %v; want %+v", got, at, err, reply)
	}
	path := filepath.Join(cfg.DataDir, "manager.json")
	info, err := os.Stat(path)
	if err != nil || runtime.GOOS != "windows" && info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v; want mode 0600", info.Mode(), err)
	}
	if entries, _ := os.ReadDir(cfg.DataDir); len(entries) != 1 {
		t.Errorf("%v in data_dir; want manager.json alone", entries)
	}

	whole, _ := os.ReadFile(path)
	for what, text := range map[string]string{
		"empty": "", "torn": string(whole[:len(whole)/2]), "array": "[]",
		"changed": strings.Replace(string(whole), `"h"`, `"evil"`, 1),
		"unsound": `{"end_point":"` + cfg.EndPoint + `","project_id":"` + fakeProjectID + `","return":7}`,
		"large":   string(whole) + strings.Repeat(" ", maxManagerReplyBytes+4096),
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, _, err := m.remembered(); err == nil {
			t.Errorf("%s file gives %+v", what, got)
		} else {
			wantError(t, err, codeManagerRemembered, "manager.json")
		}
	}
	if err := m.remember(reply); err != nil {
		t.Fatal(err)
	}
	other := *cfg
	other.EndPoint = "http://other.example"
	_, _, err = newManagerClient(&other, silentLog()).remembered()
	wantError(t, err, codeManagerRemembered, "another end_point")

	other = *cfg
	other.DataDir = path // a file
	wantError(t, newManagerClient(&other, silentLog()).remember(reply), codeManagerRemember, "data_dir")
}
