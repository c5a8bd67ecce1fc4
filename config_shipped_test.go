package main

// config_shipped_test.go checks the configuration that is handed out with the program.

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"strings"
	"testing"

	"github.com/cbroglie/mustache"
)

// The shipped file loads as it is and is the reference: with its settings in use it still loads, has every key, and
// shows the defaults.
func TestShippedConfig(t *testing.T) {
	text, err := os.ReadFile("config.yaml")
	if err != nil {
		t.Fatal(err)
	}
	c := mustLoad(t, string(text))
	d := defaultConfig()
	if len(c.Warnings) > 0 || c.Jobs[0].Event != "hello" || c.EndPoint != "" || c.Broker != d.Broker {
		t.Errorf("config.yaml as shipped: %+v; want no warnings, hello first, and the embedded queue", c)
	}

	// A "#" with no space is a setting, and so is what is indented below one.
	inUse := regexp.MustCompile(`(?m)^( *)#(\S|  )`).ReplaceAllString(string(text), "$1$2")
	for part, keys := range configKeys {
		for _, key := range keys {
			if !regexp.MustCompile(`(?m)^[ -]*` + key + `:`).MatchString(inUse) {
				t.Errorf("config.yaml does not show %s.%s", part, key)
			}
		}
	}
	// A manager wants a project of its own, and the key stands in one place only.
	inUse = strings.Replace(inUse, "project_id: local", "project_id: p-1", 1)
	inUse = regexp.MustCompile(` *secret_key_file: .*`).ReplaceAllString(inUse, "")
	c = mustLoad(t, inUse, "BROKER_PASSWORD=", "BROKER_TOKEN=")
	if c.EndPoint == "" || c.Credential.ProjectID != "p-1" || c.Jobs[len(c.Jobs)-1].Env["LANG"] != "C" || len(c.Execs) != 1 {
		t.Errorf("config.yaml with every setting in use: %+v; want them read", c)
	}
	shown := c.Execs[0]
	if shown.Attempt != defaultExec().Attempt || shown.CascadeExit || shown.WorkingDir != c.Dir {
		t.Errorf("config.yaml shows %+v as an exec; want the defaults", shown)
	}
	// What differs because the text beside it says so.
	c.Project = d.Project
	c.File, c.Dir, c.IdentityID, c.EndPoint, c.Concurrency, c.Jobs, c.Execs, c.Warnings, c.Broker, c.Credential =
		"", "", d.IdentityID, "", d.Concurrency, nil, nil, nil, d.Broker, d.Credential
	c.DataDir = filepath.Base(c.DataDir)
	if !reflect.DeepEqual(c, d) {
		t.Errorf("config.yaml shows\n%+v; want the defaults\n%+v", c, d)
	}
}

// The samples do what they say with nothing but a shell; job_item itself is played by a script.
func TestShippedJobs(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("the samples are for a POSIX shell")
	}
	text, err := os.ReadFile("config.yaml")
	if err != nil {
		t.Fatal(err)
	}
	c := mustLoad(t, string(text))
	for name, content := range map[string]string{
		"job_item": "#!/bin/sh\nif [ $1 = upload ]; then ls $2; else cat; fi\n",
		"t1.json":  `{"a":1}`,
	} {
		if err := os.WriteFile(filepath.Join(c.Dir, name), []byte(content), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, row := range []struct {
		event, data, attempt string
		want                 string
		fails                bool
	}{
		{"hello", `{"name":"Ada"}`, "1", "Hello, Ada!\n", false},
		{"hello", `{}`, "1", "Hello, world!\n", false},
		{"show_data", `{}`, "1", `{"a":1}`, false},
		{"report", `{}`, "1", "report-t1.txt\n" + `{"status": "completed", "files": 1}` + "\n", false},
		{"flaky", `{}`, "2", "attempt 2\n", true},
		{"flaky", `{}`, "3", "attempt 3\n", false},
	} {
		data := map[string]any{}
		if err := json.Unmarshal([]byte(row.data), &data); err != nil {
			t.Fatal(err)
		}
		data["task_id"] = "t1"
		line, err := mustache.Render(c.job(row.event).Cmd, data)
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("sh", "-c", line)
		cmd.Dir, cmd.Env = c.Dir, append(os.Environ(), "JOB_ITEM_TASK_ID=t1", "JOB_ITEM_ATTEMPT="+row.attempt)
		out, err := cmd.CombinedOutput()
		if string(out) != row.want || (err != nil) != row.fails {
			t.Errorf("%s with %s, attempt %s: %q, %v; want %q", row.event, row.data, row.attempt, out, err, row.want)
		}
	}
	for _, job := range c.Jobs {
		if out, err := exec.Command("sh", "-n", "-c", job.Cmd).CombinedOutput(); err != nil {
			t.Errorf("sh -n of %s: %v\n%s", job.Event, err, out)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(c.Dir, "report-*")); len(left) > 0 {
		t.Errorf("the samples leave %q behind", left)
	}
}
