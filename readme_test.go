package main

import (
	"os"
	"reflect"
	"strings"
	"testing"

	"gopkg.in/yaml.v3"
)

// TestReadme holds the README against what it describes.
func TestReadme(t *testing.T) {
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	readme := string(text)
	if help := runCLI(t, nil, "", "help"); !strings.Contains(readme, "```\n"+help.stdout) || help.code != 0 {
		t.Error("the commands in the README are not what `job_item help` prints")
	}
	for command := range commandFlags {
		if command != "" && !strings.Contains(readme, command) && !strings.HasPrefix(command, "child_") {
			t.Errorf("the README does not name the command %s", command)
		}
	}
	shipped, err := os.ReadFile("config.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var keys map[string]any
	if err := yaml.Unmarshal(shipped, &keys); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{
		"identity_id", "end_point", "project_id", "secret_key", "broker_connection", "listen", "data_dir", "concurrency",
		"drain_timeout", "kill_after", "max_deliveries", "retain", "take_when", "refresh", "log_format", "update",
		"working_dir", "timeout", "limit", "retry", "execs",
	} {
		if !strings.Contains(readme, key) {
			t.Errorf("the README does not describe the key %s", key)
		}
	}
	env := (&jobRunner{}).taskEnv(&Config{}, "http://127.0.0.1:1", "x", 1)
	runner, err := newJobRunner(&Config{}, &Job{Event: "e", Cmd: "true"}, "http://127.0.0.1:1")
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range append(env, runner.env.entries...) {
		name, _, _ := strings.Cut(entry, "=")
		if strings.HasPrefix(name, "JOB_") && !strings.HasPrefix(name, "JOB_ITEM_TEST") && !strings.Contains(readme, "`"+name+"`") {
			t.Errorf("the README does not name the variable %s", name)
		}
	}
}

// TestHandedOverConfig sends a configuration through the lifeline and looks for what got lost.
func TestHandedOverConfig(t *testing.T) {
	path := t.TempDir() + "/config.yaml"
	content := `
identity_id: w
credential: {project_id: p, secret_key: hush}
broker_connection: {type: nats, host: "a,b", port: 1, password: hush2, token: hush3}
jobs: [{event: e, cmd: 'true', env: {A: b}, timeout: 3s, retry: {times: 2, pause: 1s}}]
execs: [{key: k, cmd: 'true'}]
`
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := loadConfig(path, os.LookupEnv)
	if err != nil {
		t.Fatal(err)
	}
	var line strings.Builder
	if err := writeLine(&line, order{Config: cfg, Listener: true}); err != nil {
		t.Fatal(err)
	}
	var got order
	if err := newLineReader(strings.NewReader(line.String())).next(&got); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got.Config, cfg) || !got.Listener {
		t.Errorf("handed over %+v; want %+v", got.Config, cfg)
	}
	if string(got.Config.Credential.SecretKey) != "hush" {
		t.Error("the key was lost on the way")
	}
}
