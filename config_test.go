package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// environment is a getenv over "NAME=value" entries.
func environment(entries ...string) func(string) (string, bool) {
	return func(name string) (string, bool) {
		for _, entry := range entries {
			if n, value, _ := strings.Cut(entry, "="); n == name {
				return value, true
			}
		}
		return "", false
	}
}

// configFolder is a folder with a config.yaml of that text, and gives the file's path.
func configFolder(t testing.TB, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func mustLoad(t testing.TB, text string, env ...string) *Config {
	t.Helper()
	c, err := loadConfig(configFolder(t, text), environment(env...))
	if err != nil {
		t.Fatalf("loadConfig of\n%s\n%v", text, err)
	}
	return c
}

// refusals loads text and gives what was refused, one problem a line, without the file's name.
func refusals(t testing.TB, text string, env ...string) []string {
	t.Helper()
	path := configFolder(t, text)
	_, err := loadConfig(path, environment(env...))
	if err == nil {
		t.Fatalf("loadConfig took\n%.1000s", text)
	}
	var problems *configErrors
	if codeOf(err) != codeConfig || !errors.As(err, &problems) {
		t.Fatalf("loadConfig of\n%s\n%v, code %q; want configErrors with %s", text, err, codeOf(err), codeConfig)
	}
	lines := strings.Split(strings.ReplaceAll(problems.Error(), path+":", ""), "\n")
	if len(problems.problems) > 1 {
		lines = lines[1:]
	}
	return lines
}

const minimalConfig = "jobs: [{event: a, cmd: b}]\n"

func TestConfigDefaults(t *testing.T) {
	path := configFolder(t, "jobs: []\nexecs:\n")
	got, err := loadConfig(path, environment())
	if err != nil {
		t.Fatal(err)
	}
	want := defaultConfig()
	want.File, want.Dir = path, filepath.Dir(path)
	want.DataDir = filepath.Join(want.Dir, "data")
	if !reflect.DeepEqual(got, want) {
		t.Errorf("a file without settings gives\n%+v; want\n%+v", got, want)
	}
	if !legalSubject(want.IdentityID) || want.Concurrency < 1 {
		t.Errorf("defaultConfig() is not valid: %+v", want)
	}
}

// everyKey sets every key of the configuration to something that is not its default.
const everyKey = `
identity_id: node.7
end_point: http://manager:5280/base/api/worker/config/
credential: {project_id: p-1, secret_key: s e c r e t}
broker_connection:
  key: k
  name: n
  type: nats
  host: a.example:4222, [::1]:4223
  port: "4224"
  secure: "1"
  ca_file: tls/ca
  cert_file: /abs/cert
  key_file: key
  auth_type: user_password_bcrypt
  user: u
  password: ${PASSWORD}
  token: t
  exchange: ex
  vhost: vh
  db: 0
  durable: true
listen: :0
data_dir: ../elsewhere
concurrency: ${CONCURRENCY}
drain_timeout: 1m
kill_after: 0s
max_deliveries: 1
retain: {tasks: 7, age: 24h, log: 1MB}
take_when: {disk_free: 0, memory_free: 1GiB}
refresh: 1s
log_format: json
update: {enabled: false, public_key: AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=, allow_insecure: true}
jobs:
  - name: Job One
    event: parent.nested
    cmd: run {{task_id}} $HOME $$ ${HOME%/} $(date) ${WORDS}
    working_dir: sub
    env: {TEXT: "1.10", NUMBER: 1.10, TRUTH: true, EMPTY: "", FILLED: "${EMPTY:-a}${WORDS}"}
    timeout: 90s
    limit: 2
    retry: {times: 2, pause: 1s}
  - {event: true, cmd: true, limit: 99}
execs:
  - name: Exec One
    key: log_monitor
    cmd: tail -f {{not a template
    working_dir: /abs
    cascade_exit: true
    attempt: 0
    env: {JOB_ITEM_TASK_ID: mine}
  - {key: second, cmd: second}
`

func TestConfigEveryKey(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("the paths are those of Unix")
	}
	c := mustLoad(t, everyKey, "PASSWORD=p#: {w}", "CONCURRENCY=3", "EMPTY=", "WORDS=two: ${CONCURRENCY}",
		"LOG_LEVEL=debug", "WORKER_ID=override")
	dir := c.Dir
	want := &Config{
		File: filepath.Join(dir, "config.yaml"), Dir: dir,
		IdentityID: "override", EndPoint: "http://manager:5280/base", Project: "p-1",
		Credential: Credential{ProjectID: "p-1", SecretKey: "s e c r e t"},
		Broker: BrokerConfig{Key: "k", Name: "n", Type: "nats", Host: "a.example:4222,[::1]:4223", Port: 4224, Secure: true,
			CAFile: dir + "/tls/ca", CertFile: "/abs/cert", KeyFile: dir + "/key", AuthType: "user_password_bcrypt",
			User: "u", Password: "p#: {w}", Token: "t", Exchange: "ex", VHost: "vh", Durable: true},
		Listen: ":0", DataDir: filepath.Dir(dir) + "/elsewhere", Concurrency: 3, DrainTimeout: time.Minute,
		MaxDeliveries: 1, Retain: Retain{7, 24 * time.Hour, 1e6}, TakeWhen: TakeWhen{0, 1 << 30},
		Refresh: time.Second, LogFormat: "json", LogLevel: slog.LevelDebug,
		Update: UpdateConfig{PublicKey: "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", AllowInsecure: true},
		Jobs: []Job{
			{Name: "Job One", Event: "parent.nested", WorkingDir: dir + "/sub", Timeout: 90 * time.Second, Limit: 2,
				Cmd:   "run {{task_id}} $HOME $$ ${HOME%/} $(date) two: ${CONCURRENCY}",
				Retry: Retry{2, time.Second}, Env: map[string]string{"TEXT": "1.10", "NUMBER": "1.10", "TRUTH": "true",
					"EMPTY": "", "FILLED": "atwo: ${CONCURRENCY}"}},
			{Name: "true", Event: "true", Cmd: "true", WorkingDir: dir, Limit: 3, Retry: Retry{0, 10 * time.Second}},
		},
		Execs: []Exec{
			{Name: "Exec One", Key: "log_monitor", Cmd: "tail -f {{not a template", WorkingDir: "/abs", CascadeExit: true,
				Env: map[string]string{"JOB_ITEM_TASK_ID": "mine"}},
			{Name: "second", Key: "second", Cmd: "second", WorkingDir: dir, Attempt: 3},
		},
		Warnings: c.Warnings,
	}
	if !reflect.DeepEqual(c, want) {
		t.Errorf("loadConfig gives\n%#v; want\n%#v", c, want)
	}
	for part, keys := range configKeys {
		for _, key := range keys {
			if key != "secret_key_file" && !regexp.MustCompile(`\b`+key+`:`).MatchString(everyKey) {
				t.Errorf("the test sets no %s.%s", part, key)
			}
		}
	}

	line, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	over := new(Config)
	if err := json.Unmarshal(line, over); err != nil || !reflect.DeepEqual(over, c) {
		t.Errorf("the lifeline changes the configuration to\n%#v (%v); want\n%#v", over, err, c)
	}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%d", "%x"} {
		text := fmt.Sprintf(verb, c)
		if strings.Contains(text, "s e c r e t") || strings.Contains(text, "p#: {w}") {
			t.Errorf("%s prints a secret: %s", verb, text)
		}
	}
	if c.job("true") != &c.Jobs[1] || c.job("parent") != nil {
		t.Error("job does not find the job of an event")
	}
}

func TestConfigRefusals(t *testing.T) {
	for _, row := range []struct {
		text string
		want []string
	}{
		// The file as a whole.
		{"", []string{`1: the file is empty, want at least jobs`}},
		{"# nothing\n", []string{`1: the file is empty, want at least jobs`}},
		{"---\n", []string{`1: the file is empty, want at least jobs`}},
		{"- a\n", []string{`1: want a mapping with the keys ` + strings.Join(configKeys[""], ", ")}},
		{"jobs: []\n---\njobs: []\n", []string{`2: a second document begins here, want one`}},
		{"jobs: []\nname: \xff\n", []string{`2: want a text file in UTF-8, got bytes that are none`}},
		{"jobs: []\n\nname: \x00\n", []string{`3: want a text file in UTF-8, got bytes that are none`}},
		{"jobs:\n\t- a\n", []string{"2: not YAML: found character that cannot start any token (a tab? indent with spaces; " +
			"a value that begins with @, % or ` needs quotes)"}},
		{"jobs:\n  - event: a\n   cmd: b\n", []string{"2: not YAML: did not find expected '-' indicator " +
			"(is a line of the block that begins here indented differently?)"}},
		{"a: 1\nb: c: d\n", []string{`2: not YAML: mapping values are not allowed in this context ` +
			`(is the line indented too far? a value with ": " in it needs quotes)`}},
		{"jobs: [1\nlisten: 2\n", []string{`2: not YAML: did not find expected ',' or ']'`}},
		{"jobs: []\ncredential:\n  secret_key: *hunter2\n", []string{`3: not YAML: a value that begins with * is an alias, ` +
			`and its anchor does not exist; put it in quotes if it is text`}},

		// Keys.
		{"jobs: []\njobs: []\n", []string{`2: jobs: given twice, first in line 1`}},
		{"job: []\n", []string{`1: job: unknown key, did you mean jobs?`}},
		{"identityId: a\n", []string{`1: identityId: unknown key, did you mean identity_id?`}},
		{"timeout: 5s\n", []string{`1: timeout: unknown key, did you mean jobs[].timeout?`}},
		{"env: {}\n", []string{`1: env: unknown key, did you mean execs[].env or jobs[].env?`}},
		{"retain:\n  bananas: 3\n", []string{`2: retain.bananas: unknown key, want one of tasks, age, log`}},
		{"retain: &x {tasks: 1}\ntake_when:\n  <<: *x\n", []string{`3: take_when.<<: merge keys are not supported, write the keys out`}},
		{"[a]: b\n", []string{`1: want a plain key, got an alias, a list or a mapping`}},
		{"credential: hunter2\n", []string{`1: credential: want a mapping with the keys project_id, secret_key, secret_key_file`}},
		{"jobs: {event: a}\n", []string{`1: jobs: want a list, each entry beginning with "- ", got a mapping`}},

		// Values.
		{"identity_id: [a]\n", []string{`1: identity_id: want a single value, got a list`}},
		{"identity_id: !x a\n", []string{`1: identity_id: want a plain value, got one with a YAML tag`}},
		{"data_dir: \"a\\0b\"\n", []string{`1: data_dir: want text in UTF-8 without NUL`}},
		{"identity_id: a..b\n", []string{`1: identity_id: want ` + subjectRule + `, got "a..b"`}},
		{"identity_id: " + strings.Repeat("a", 129) + "\n",
			[]string{`1: identity_id: want ` + subjectRule + `, got "` + strings.Repeat("a", 60) + `…"`}},
		{"end_point: ftp://x\n", []string{`1: end_point: want the manager's URL, such as https://manager.example:5280, got "ftp://x"`}},
		{"end_point: http://u:hunter2@x\n", []string{`1: end_point: want a URL without user and password, those are in credential`}},
		{"end_point: http://x?y\n", []string{`1: end_point: want a URL without ? and #, got "http://x?y"`}},
		{"end_point: http://x\n", []string{`1: end_point: a manager wants to know the project, set credential.project_id`}},
		{"credential: {project_id: a.b}\n", []string{`1: credential.project_id: want 1 to 128 of A-Z a-z 0-9 _ -, such as a UUID, got "a.b"`}},
		{"credential:\n  secret_key: \"hunter\\n2\"\n", []string{`2: credential.secret_key: want a key on one line, without control characters`}},
		{"credential:\n  secret_key: a\n  secret_key_file: b\n", []string{`3: credential.secret_key_file: want this or secret_key, not both`}},
		{"credential: {secret_key_file: .}\n", []string{`1: credential.secret_key_file: want a file with the key (not a regular file), got "."`}},
		{"listen: 8080\n", []string{`1: listen: want host:port such as 127.0.0.1:8080, or :8080 for every address, got "8080"`}},
		{"listen: 127.0.0.1:65536\n", []string{`1: listen: want host:port such as 127.0.0.1:8080, or :8080 for every address, got "127.0.0.1:65536"`}},
		{"concurrency: 0\n", []string{`1: concurrency: want a whole number from 1 to 10000, got "0"`}},
		{"concurrency: 1.5\n", []string{`1: concurrency: want a whole number from 1 to 10000, got "1.5"`}},
		{"drain_timeout: -1s\n", []string{`1: drain_timeout: want a duration from 0s to 87600h, got "-1s"`}},
		{"kill_after: 7d\n", []string{`1: kill_after: want a duration such as 30s or 5m, got "7d"`}},
		{"max_deliveries: many\n", []string{`1: max_deliveries: want a whole number from 1 to 1000, got "many"`}},
		{"retain: {tasks: 0, age: 0s, log: 1}\n", []string{
			`1: retain.tasks: want a whole number from 1 to 1000000, got "0"`,
			`1: retain.age: want a duration from 1ms to 87600h, got "0s"`,
			`1: retain.log: want a size of at least 1024 bytes, got "1"`}},
		{"take_when: {disk_free: 1Gb, memory_free: 9999999TiB}\n", []string{
			`1: take_when.disk_free: want a size such as 64MiB, 500MB or a plain number of bytes, got "1Gb"`,
			`1: take_when.memory_free: want a size such as 64MiB, 500MB or a plain number of bytes, got "9999999TiB"`}},
		{"refresh: 0s\n", []string{`1: refresh: want a duration from 100ms to 87600h, got "0s"`}},
		{"log_format: xml\n", []string{`1: log_format: want one of text, json, got "xml"`}},
		{"update: {enabled: maybe, public_key: AAAA}\n", []string{
			`1: update.enabled: want true or false, got "maybe"`,
			`1: update.public_key: want an Ed25519 public key: 32 bytes in base64, got "AAAA"`}},

		// The broker.
		{"broker_connection: {type: kafka}\n", []string{`1: broker_connection.type: want one of nats, rabbitmq, redis, local, got "kafka"`}},
		{"broker_connection:\n  host: a\n", []string{`1: broker_connection.type: missing, want one of nats, rabbitmq, redis`}},
		{"broker_connection: {type: redis, host: \"\"}\n", []string{`1: broker_connection.host: missing, want the broker's host, such as broker.example`}},
		{"broker_connection: {type: redis, host: \"a,,b\"}\n", []string{
			`1: broker_connection.host: want a host, or several such as a.example:4222,b.example:4222, got "a,,b"`}},
		{"broker_connection: {type: nats, host: \"nats://u:hunter2@h\"}\n", []string{
			`1: broker_connection.host: want a host, or several such as a.example:4222,b.example:4222`}},
		{"broker_connection: {type: nats, host: h, port: 65536, secure: perhaps}\n", []string{
			`1: broker_connection.port: want a whole number from 1 to 65535, got "65536"`,
			`1: broker_connection.secure: want true or false, got "perhaps"`}},
		{"broker_connection: {type: nats, host: h, auth_type: token}\n", []string{`1: broker_connection.auth_type: token needs the token beside it`}},
		{"broker_connection: {type: nats, host: h, auth_type: user_password}\n", []string{
			`1: broker_connection.auth_type: user_password needs user and password beside it`}},
		{"broker_connection: {type: nats, host: h, auth_type: magic}\n", []string{
			`1: broker_connection.auth_type: want one of none, token, user_password, user_password_bcrypt, got "magic"`}},
		{"broker_connection: {type: redis, host: h, cert_file: c, db: -1}\n", []string{
			`1: broker_connection.db: want a whole number from 0 to 2147483647, got "-1"`,
			`1: broker_connection: cert_file and key_file go together, want both or none`}},

		// Jobs and execs.
		{"jobs:\n  - name: x\n", []string{
			`2: jobs[0].event: missing, want ` + subjectRule,
			`2: jobs[0].cmd: missing, want the command line to run`}},
		{"jobs:\n  -\n", []string{
			`2: jobs[0].event: missing, want ` + subjectRule,
			`2: jobs[0].cmd: missing, want the command line to run`}},
		{"jobs: [a]\n", []string{`1: jobs[0]: want a mapping with the keys ` + strings.Join(configKeys["jobs[]"], ", ")}},
		{"jobs:\n  - {event: a, cmd: x}\n  - {event: a, cmd: x}\n", []string{`3: jobs[1].event: want another event, line 2 has this one`}},
		{"jobs: [{event: a.*, cmd: x}]\n", []string{`1: jobs[0].event: want ` + subjectRule + `, got "a.*"`}},
		{"jobs: [{event: restart, cmd: x}]\n", []string{`1: jobs[0].event: that subject is the manager's restart order, want another`}},
		{"jobs: [{event: a, cmd: \" \"}]\n", []string{`1: jobs[0].cmd: missing, want the command line to run`}},
		{"jobs:\n  - {event: a, cmd: x}\n  - {event: b, cmd: x}\n  - event: c\n    cmd: x\n    timeout: 30\n",
			[]string{`6: jobs[2].timeout: want a duration such as 30s or 5m, got "30"`}},
		{"jobs: [{event: a, cmd: x, limit: 0, retry: {times: -1, pause: 11m}}]\n", []string{
			`1: jobs[0].limit: want a whole number from 1 to 2147483647, got "0"`,
			`1: jobs[0].retry.times: want a whole number from 0 to 1000, got "-1"`,
			`1: jobs[0].retry.pause: want a duration from 0s to 10m, got "11m"`}},
		{"jobs: [{event: a, cmd: x, env: [A]}]\n", []string{`1: jobs[0].env: want a mapping of names to values, got a list`}},
		{"jobs:\n  - event: a\n    cmd: x\n    env:\n      1A: x\n      job_item_task_id: x\n      B:\n      C: [d]\n", []string{
			`5: jobs[0].env.1A: want a name of A-Z a-z 0-9 _ that does not begin with a digit`,
			`6: jobs[0].env.job_item_task_id: the worker sets this one itself, want another name`,
			`7: jobs[0].env.B: want a value, "" for an empty one`,
			`8: jobs[0].env.C: want a single value, got a list`}},
		{"execs:\n  - cascade_exit: 1\n    attempt: -1\n    env: {JOB_ITEM_BASE_URL: x}\n", []string{
			`2: execs[0].key: missing, want ` + subjectRule,
			`2: execs[0].cmd: missing, want the command line to run`,
			`2: execs[0].cascade_exit: want true or false, got "1"`,
			`3: execs[0].attempt: want a whole number from 0 to 1000, got "-1"`,
			`4: execs[0].env.JOB_ITEM_BASE_URL: the worker sets this one itself, want another name`}},
		{"execs:\n  - {key: a, cmd: x}\n  - {key: a, cmd: x}\n", []string{`3: execs[1].key: want another key, line 2 has this one`}},
	} {
		if got := refusals(t, row.text); !slices.Equal(got, row.want) {
			t.Errorf("loadConfig of\n%s\n refuses\n%s\nwant\n%s", row.text, strings.Join(got, "\n"), strings.Join(row.want, "\n"))
		}
	}
}

func TestConfigBadTemplate(t *testing.T) {
	got := refusals(t, "jobs:\n  - event: a\n    cmd: echo {{#x}}\n")
	if len(got) != 1 || !strings.HasPrefix(got[0], "3: jobs[0].cmd: the template does not parse: ") {
		t.Errorf("loadConfig refuses %q; want the template in line 3", got)
	}
	got = refusals(t, "jobs:\n  - event: a\n    cmd: echo ${X}\n", "X={{#hunter2}}")
	if want := []string{"3: jobs[0].cmd: the template does not parse with the environment's values in it"}; !slices.Equal(got, want) {
		t.Errorf("loadConfig refuses %q; want %q", got, want)
	}
}

func TestConfigEnvironmentRefusals(t *testing.T) {
	unset := func(key, name, more string) string {
		return fmt.Sprintf("2: %s: ${%s} is not set in the environment: set it, or write ${%s:-} for an empty default%s", key, name, name, more)
	}
	for _, row := range []struct {
		text string
		env  []string
		want []string
	}{
		{"jobs: []\nlisten: ${HOST}:${PORT}\n", nil, []string{unset("listen", "HOST", ""), unset("listen", "PORT", "")}},
		{"jobs:\n- {event: a, cmd: \"x ${A} ${A}\"}\n", nil,
			[]string{unset("jobs[0].cmd", "A", "; for a variable of the task write $A, which is left to the shell")}},
		{"concurrency: ${N}\n", []string{"N=hunter2"}, []string{`1: concurrency: want a whole number from 1 to 10000, got "${N}"`}},
		{"credential: {secret_key_file: \"${N}\"}\n", []string{"N=."},
			[]string{`1: credential.secret_key_file: want a file with the key (not a regular file), got "${N}"`}},
		{"retain: ${N}\n", []string{"N={tasks: 7}"}, []string{`1: retain: want a mapping with the keys tasks, age, log`}},
		{"data_dir: ${N}\n", []string{"N=\xff"}, []string{`1: data_dir: want text in UTF-8 without NUL`}},
		{minimalConfig, []string{"WORKER_ID=a b", "LOG_LEVEL=LOUD"}, []string{
			`environment: WORKER_ID: want ` + subjectRule,
			`environment: LOG_LEVEL: want DEBUG, INFO, WARN or ERROR`}},
	} {
		if got := refusals(t, row.text, row.env...); !slices.Equal(got, row.want) {
			t.Errorf("loadConfig of\n%s with %q refuses\n%s\nwant\n%s", row.text, row.env, strings.Join(got, "\n"), strings.Join(row.want, "\n"))
		}
	}
}

func TestConfigEnvironment(t *testing.T) {
	getenv := environment("A=1", "EMPTY=", "NESTED=${A}")
	for text, want := range map[string]string{
		"":                                 "",
		"${A}":                             "1",
		"${A:-2}${EMPTY:-2}${EMPTY}${B:-}": "12",
		"${B:-http://x:1/}":                "http://x:1/",
		"${NESTED}":                        "${A}",
		"$A $$ $(A) ${A%x} ${#A} ${1} {{A}} ${ A}": "$A $$ $(A) ${A%x} ${#A} ${1} {{A}} ${ A}",
		"${A": "${A",
	} {
		if got, unset := expandEnv(text, 100, getenv); got != want || len(unset) > 0 {
			t.Errorf("expandEnv(%q) = %q, unset %q; want %q", text, got, unset, want)
		}
	}
	for _, level := range []struct {
		text string
		want slog.Level
	}{{"", slog.LevelInfo}, {"info", slog.LevelInfo}, {"WARN", slog.LevelWarn}, {"ERROR", slog.LevelError}} {
		if got := mustLoad(t, minimalConfig, "LOG_LEVEL="+level.text).LogLevel; got != level.want {
			t.Errorf("LOG_LEVEL=%s gives %v; want %v", level.text, got, level.want)
		}
	}
	// An empty value leaves the default, in the file and from the environment.
	c := mustLoad(t, "concurrency: ${N:-}\nlisten: ''\nrefresh:\nretain:\n")
	if d := defaultConfig(); c.Concurrency != d.Concurrency || c.Listen != d.Listen || c.Refresh != d.Refresh || c.Retain != d.Retain {
		t.Errorf("empty values give %+v; want the defaults", c)
	}
}

func TestParseSize(t *testing.T) {
	for text, want := range map[string]int64{
		"0": 0, "7": 7, "7B": 7, "500MB": 500e6, "2KB": 2000, "3GB": 3e9, "1TB": 1e12,
		"2KiB": 2048, "64MiB": 64 << 20, "1 GiB": 1 << 30, "1TiB": 1 << 40, "9223372036854775807": 1<<63 - 1,
		"": -1, "B": -1, "-1": -1, "1.5GiB": -1, "1K": -1, "1mib": -1, "1MiBB": -1, "MiB1": -1, "9223372036854775808": -1, "8388608TiB": -1,
	} {
		n, ok := parseSize(text)
		if ok != (want >= 0) || ok && n != want {
			t.Errorf("parseSize(%q) = %d, %v; want %d", text, n, ok, want)
		}
	}
}

func TestConfigSecretKeyFile(t *testing.T) {
	path := configFolder(t, "credential: {secret_key_file: key}\njobs: []\n")
	keyFile := filepath.Join(filepath.Dir(path), "key")
	for _, row := range []struct {
		text string
		mode os.FileMode
		key  secret
		warn bool
	}{
		{"hunter2\n", 0o600, "hunter2", false},
		{"hunter2\r\n", 0o640, "hunter2", false},
		{"hunter2", 0o644, "hunter2", true},
		{"\n", 0o600, "", false},
		{"hunter2\n\n", 0o600, "", false},
		{strings.Repeat("x", maxKeyFileBytes+1), 0o600, "", false},
	} {
		if err := os.WriteFile(keyFile, []byte(row.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(keyFile, row.mode); err != nil {
			t.Fatal(err)
		}
		c, err := loadConfig(path, environment())
		if row.key == "" {
			if err == nil || !strings.Contains(err.Error(), ":1: credential.secret_key_file: want a file with the key") ||
				strings.Contains(err.Error(), "hunter2") {
				t.Errorf("a key file with %.10q gives %v; want a refusal", row.text, err)
			}
			continue
		}
		if err != nil || c.Credential.SecretKey != row.key || c.Credential.SecretKeyFile != keyFile {
			t.Errorf("a key file with %q gives %+v, %v; want %q", row.text, c, err, string(row.key))
			continue
		}
		if warned := strings.Contains(strings.Join(c.Warnings, ""), "chmod 600"); warned != row.warn && runtime.GOOS != "windows" {
			t.Errorf("a key file of mode %o gives the warnings %q; want one: %v", row.mode, c.Warnings, row.warn)
		}
	}
}

func TestConfigWarnings(t *testing.T) {
	for text, want := range map[string]string{
		"refresh: 5m\n":                               ":1: neither jobs nor execs: there is nothing to do",
		minimalConfig + "listen: 0.0.0.0:80\n":        ":2: listen: without credential.secret_key every call from another host but /health is refused",
		minimalConfig + "broker_connection:\n  db: 3": ":3: broker_connection.db: not used with type local",
	} {
		c := mustLoad(t, text)
		if len(c.Warnings) != 1 || c.Warnings[0] != c.File+want {
			t.Errorf("loadConfig of\n%s\nwarns %q; want %q", text, c.Warnings, want)
		}
	}
	for _, text := range []string{minimalConfig, "execs: [{key: a, cmd: b}]", minimalConfig + "listen: localhost:0", minimalConfig + "listen: '[::1]:0'",
		minimalConfig + "listen: :80\ncredential: {secret_key: x}"} {
		if c := mustLoad(t, text); len(c.Warnings) > 0 {
			t.Errorf("loadConfig of\n%s\nwarns %q; want none", text, c.Warnings)
		}
	}
}

func TestConfigNATSLogin(t *testing.T) {
	for login, want := range map[string]string{
		"":                                 "none",
		", user: u":                        "user_password",
		", token: t":                       "token",
		", user: u, token: t":              "token",
		", user: u, auth_type: none":       "none",
		", user: u, auth_type: \"${A:-}\"": "user_password",
	} {
		c := mustLoad(t, minimalConfig+"broker_connection: {type: nats, host: h"+login+"}")
		if c.Broker.AuthType != want {
			t.Errorf("a connection with %q logs in with %q; want %q", login, c.Broker.AuthType, want)
		}
	}
}

// A file of aliases that would fill the memory is refused before it does, and so is one that the environment blows up.
func TestConfigBombs(t *testing.T) {
	var lines strings.Builder
	lines.WriteString("jobs:\n- &j\n  event: a\n  cmd: b\n  env: &e\n")
	for i := range 1000 {
		fmt.Fprintf(&lines, "    V%d: x\n", i)
	}
	lines.WriteString(strings.Repeat("- *j\n", 10_000))
	big := "BIG=" + strings.Repeat("x", 100_000)
	for _, text := range []string{lines.String(), "data_dir: \"" + strings.Repeat("${BIG}", 100_000) + "\"\n"} {
		all := strings.Join(refusals(t, text, big), "\n")
		if !strings.Contains(all, "too much: aliases and environment") {
			t.Errorf("%.40q… is refused with\n%.1000s\nwant the bound", text, all)
		}
		if len(all) > 100_000 {
			t.Errorf("%.40q… is refused with %d bytes of text", text, len(all))
		}
	}
	// A value within itself ends where the keys end.
	refusals(t, "jobs: &j [*j]\n")
	refusals(t, "jobs: [{event: a, cmd: b, env: &e {A: *e}}]\n")
}

func TestConfigUnreadable(t *testing.T) {
	tooLarge := configFolder(t, "jobs: []\n#"+strings.Repeat("x", maxConfigBytes))
	missing := filepath.Join(t.TempDir(), "none.yaml")
	for _, path := range []string{tooLarge, missing, t.TempDir()} {
		_, err := loadConfig(path, environment())
		if codeOf(err) != codeConfigFile || hintOf(err) == "" || strings.Count(err.Error(), strconv.Quote(path)) != 1 {
			t.Errorf("loadConfig(%q) = %v; want it to name the file and what to do, code %s", path, err, codeConfigFile)
		}
	}
}

func TestBaseURL(t *testing.T) {
	for listen, want := range map[string]string{
		"127.0.0.1:8080": "http://127.0.0.1:8080",
		":8080":          "http://127.0.0.1:8080",
		"0.0.0.0:8080":   "http://127.0.0.1:8080",
		"[::]:8080":      "http://[::1]:8080",
		"node:8080":      "http://node:8080",
	} {
		if got := baseURL(listen); got != want {
			t.Errorf("baseURL(%q) = %q; want %q", listen, got, want)
		}
	}
}

func FuzzConfig(f *testing.F) {
	shipped, err := os.ReadFile("config.yaml")
	if err != nil {
		f.Fatal(err)
	}
	for _, seed := range []string{string(shipped), everyKey, minimalConfig, "", "a: &x [*x]\n", "jobs: &j [*j]", "{a: [b, {c: *d}]}",
		"<<: {a: b}", "? [a]\n: b\n", "!!map {}", "%YAML 1.2\n---\njobs: []\n...\n", "jobs:\n- event: ${A}\n  cmd: ${B:-x} {{y}}\n",
		"credential: {secret_key: 'x\x01'}", "broker_connection: {type: ${A}, host: '[::]:1'}", "listen: ${A}:${A}", "# x\n- # y\n"} {
		f.Add(seed)
	}
	const planted = "pl4nted-s3cret"
	getenv := func(name string) (string, bool) {
		switch name {
		case "WORKER_ID", "LOG_LEVEL":
			return "", false
		}
		return planted, true
	}
	place := regexp.MustCompile(`^fuzz\.yaml:[1-9][0-9]*: `)
	f.Fuzz(func(t *testing.T, text string) {
		if len(text) > 1<<16 {
			return
		}
		c, err := parseConfig("fuzz.yaml", []byte(text), getenv)
		if err != nil {
			var problems *configErrors
			if codeOf(err) != codeConfig || !errors.As(err, &problems) {
				t.Fatalf("%v has the code %q; want configErrors with %s", err, codeOf(err), codeConfig)
			}
			if strings.Contains(err.Error(), planted) && !strings.Contains(text, planted) {
				t.Fatalf("the environment's value is in %v", err)
			}
			if first := problems.problems[0]; !place.MatchString((&configErrors{"fuzz.yaml", []configProblem{first}}).Error()) {
				t.Fatalf("%v does not name its place", err)
			}
			return
		}
		if !legalSubject(c.IdentityID) || c.Concurrency < 1 || !filepath.IsAbs(c.DataDir) {
			t.Fatalf("took %+v", c)
		}
		events := map[string]bool{}
		for _, job := range c.Jobs {
			if events[job.Event] || !legalSubject(job.Event) || job.Cmd == "" || job.Limit < 1 || job.Limit > c.Concurrency {
				t.Fatalf("took the job %+v", job)
			}
			events[job.Event] = true
		}
	})
}
