package main

// client.go is what people and scripts ask of the worker on this host: create, replay and status, through its REST API
// (PROTOCOL sections 1 and 7). Following a task to its end is in client_wait.go; what a job hands over is in upload.go.

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"
)

const (
	// maxClientDataBytes bounds a task's data and result (PROTOCOL section 6.1).
	maxClientDataBytes = 16 << 20

	// maxReplyBytes bounds what is read of a reply that is kept whole.
	maxReplyBytes = 64 << 20

	// clientTimeout bounds one request but the following of a log.
	clientTimeout = 30 * time.Second
)

// runCreate is `create EVENT`.
func runCreate(ctx context.Context, inv *invocation) int {
	if len(inv.args) != 1 || inv.args[0] == "" {
		return inv.usageError("create takes one EVENT")
	}
	data, err := inv.taskData()
	if err != nil {
		inv.printError(err)
		return exitUsage
	}
	c, err := findWorker(inv)
	if err != nil {
		inv.printError(err)
		return exitUsage
	}
	return c.createTask(ctx, inv, inv.args[0], data)
}

// runReplay is `replay TASK_ID`.
func runReplay(ctx context.Context, inv *invocation) int {
	if len(inv.args) != 1 {
		return inv.usageError("replay takes one TASK_ID")
	}
	id := inv.args[0]
	if err := checkTaskID(id); err != nil {
		inv.printError(err)
		return exitUsage
	}
	c, err := findWorker(inv)
	if err != nil {
		inv.printError(err)
		return exitUsage
	}
	event, data, err := c.finishedTask(ctx, id)
	if err != nil {
		inv.printError(err)
		return exitFailed
	}
	return c.createTask(ctx, inv, event, data)
}

// createTask creates a task and prints its id, or with --wait its output.
func (c *workerClient) createTask(ctx context.Context, inv *invocation, event string, data json.RawMessage) int {
	id, err := c.create(ctx, event, data)
	if err != nil {
		inv.printError(err)
		return exitFailed
	}
	if inv.wait {
		return c.wait(ctx, inv, id)
	}
	fmt.Fprintln(inv.stdout, id)
	return exitOK
}

// create asks the worker for a task and gives its id. It is not repeated: a lost answer may mean a second task.
func (c *workerClient) create(ctx context.Context, event string, data json.RawMessage) (string, error) {
	body, err := json.Marshal(map[string]any{"event": event, "form_body": data})
	if err != nil {
		return "", err
	}
	var reply struct {
		TaskID string `json:"task_id"`
	}
	if err := c.call(ctx, http.MethodPost, body, &reply, "job", "create"); err != nil {
		return "", err
	}
	if !validTaskID(reply.TaskID) {
		return "", c.strangeReply(fmt.Errorf("no task id but %q", oneLine(reply.TaskID, 40)))
	}
	return reply.TaskID, nil
}

// finishedTask gives the event and the data of a task that has ended.
func (c *workerClient) finishedTask(ctx context.Context, id string) (event string, data json.RawMessage, err error) {
	record, err := c.task(ctx, id)
	if err != nil {
		return "", nil, err
	}
	if !record.Status.final() {
		return "", nil, failHint(codeNotEnded, fmt.Sprintf("task %s has not ended: it is %s", id, oneLine(string(record.Status), 20)),
			nil, "only a finished task can be replayed; create makes a new one at any time")
	}
	err = c.call(ctx, http.MethodGet, nil, &data, "job", id, "data")
	var refused *refusal
	if errors.As(err, &refused) && refused.status == http.StatusNotFound {
		return "", nil, failHint(codeDataGone, "the data of task "+id+" is no longer kept", err,
			"retain in the configuration says how long it is; create the task anew with create --data")
	}
	if err != nil {
		return "", nil, err
	}
	if string(data) == "null" || len(data) == 0 {
		data = json.RawMessage("{}")
	}
	if err := checkObject(data); err != nil {
		return "", nil, c.strangeReply(fmt.Errorf("data of task %s: %w", id, err))
	}
	return record.Event, data, nil
}

// A workerClient talks to one worker.
type workerClient struct {
	base     *url.URL
	key      secret
	http     *http.Client
	patience time.Duration // how long wait puts up with a worker that is away
}

// findWorker finds the worker by --url, $JOB_ITEM_BASE_URL or the configuration. The key goes nowhere else.
func findWorker(inv *invocation) (*workerClient, error) {
	c := &workerClient{http: newHTTPClient(), patience: 2 * time.Minute}
	cfg, cfgErr := loadConfig(inv.configFile(), os.LookupEnv)
	if cfgErr == nil {
		c.key = cfg.Credential.SecretKey
	}
	source, text := "--url", inv.url
	if !inv.flags["url"] {
		source, text = "JOB_ITEM_BASE_URL", os.Getenv("JOB_ITEM_BASE_URL")
	}
	if source == "JOB_ITEM_BASE_URL" && text == "" {
		if cfgErr != nil {
			return nil, failHint(codeNoWorkerURL, "where the worker listens is unknown", cfgErr,
				"name the configuration with --config FILE, or the worker with --url http://127.0.0.1:8080")
		}
		source, text = "listen", baseURL(cfg.Listen)
	} else if key := os.Getenv("JOB_ITEM_PROJECT_KEY"); key != "" {
		c.key = secret(key)
	}
	base, err := parseHTTPURL(text)
	if err != nil {
		return nil, failHint(codeWorkerURL, "bad URL in "+source, err, "for example http://127.0.0.1:8080")
	}
	base.RawQuery, base.Fragment = "", ""
	c.base = base
	return c, nil
}

// call makes one request and decodes the reply into reply.
func (c *workerClient) call(ctx context.Context, method string, body []byte, reply any, path ...string) error {
	ctx, cancel := context.WithTimeout(ctx, clientTimeout)
	defer cancel()
	resp, err := c.do(ctx, method, body, nil, path...)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return c.refused(resp)
	}
	return c.decode(resp.Body, reply)
}

// do makes one request. The reply may have any status.
func (c *workerClient) do(ctx context.Context, method string, body []byte, query url.Values, path ...string) (*http.Response, error) {
	target := c.base.JoinPath(path...)
	target.RawQuery = query.Encode()
	req, err := http.NewRequestWithContext(ctx, method, target.String(), bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if c.key != "" {
		req.Header.Set("Authorization", "Bearer "+string(c.key))
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, failHint(codeUnreachable, "no worker answers at "+shownURL(c.base), requestError(ctx, err),
			"start it with: job_item --config FILE, or say with --url where it listens")
	}
	return resp, nil
}

// decode reads a reply of at most maxReplyBytes.
func (c *workerClient) decode(body io.Reader, reply any) error {
	text, err := io.ReadAll(io.LimitReader(body, maxReplyBytes+1))
	if err == nil && len(text) > maxReplyBytes {
		err = fmt.Errorf("larger than %d MiB", maxReplyBytes>>20)
	}
	if err == nil {
		err = json.Unmarshal(text, reply)
	}
	if err != nil {
		return c.strangeReply(err)
	}
	return nil
}

// refused is the worker's own error, with its code where it gave one.
func (c *workerClient) refused(resp *http.Response) error {
	r := readRefusal(resp)
	code := codeRefused
	if r.code != "" {
		code, r.code = r.code, ""
	}
	hint := ""
	if r.status == http.StatusUnauthorized || r.status == http.StatusForbidden {
		hint = "the key comes from the configuration (--config FILE) or from JOB_ITEM_PROJECT_KEY"
	}
	return failHint(code, "the worker at "+shownURL(c.base), r, hint)
}

func (c *workerClient) strangeReply(err error) error {
	return failHint(codeStrangeReply, "the reply of "+shownURL(c.base)+" is not a worker's", err,
		"check with --url that it is a job_item that listens there")
}

// A taskReply is what the commands want to know of a task.
type taskReply struct {
	TaskID     string     `json:"task_id"`
	Event      string     `json:"event"`
	Status     taskStatus `json:"status"`
	Attempt    int        `json:"attempt"`
	ExitCode   *int       `json:"exit_code"`
	Signal     string     `json:"signal"`
	StartedAt  *time.Time `json:"started_at"`
	FinishedAt *time.Time `json:"finished_at"`
	CreatedAt  *time.Time `json:"created_at"`
	Error      string     `json:"error"`
}

// task asks for a task's record.
func (c *workerClient) task(ctx context.Context, id string) (taskReply, error) {
	var record taskReply
	err := c.call(ctx, http.MethodGet, nil, &record, "job", id)
	return record, err
}

// usageError says what a command takes.
func (inv *invocation) usageError(text string) int {
	inv.printError(failHint(codeUsage, text, nil, "try: job_item help"))
	return exitUsage
}

// taskData is the task's data that --data gives, {} without it.
func (inv *invocation) taskData() (json.RawMessage, error) {
	if !inv.flags["data"] {
		return json.RawMessage("{}"), nil
	}
	data, err := readArgument(inv.data, inv.stdin)
	if err != nil {
		return nil, err
	}
	if err := checkObject(data); err != nil {
		return nil, failHint(codeClientData, "bad --data", err, `want a JSON object, for example --data '{"name":"Ada"}'`)
	}
	return data, nil
}

// readArgument reads JSON given as TEXT, @FILE or - (stdin), at most maxClientDataBytes of it.
func readArgument(arg string, stdin io.Reader) ([]byte, error) {
	text, what, err := []byte(arg), "the JSON given", error(nil)
	switch {
	case arg == "-":
		what = "stdin"
		text, err = readData(stdin)
	case strings.HasPrefix(arg, "@"):
		what = fmt.Sprintf("%q", arg[1:])
		var file *os.File
		if file, err = os.Open(arg[1:]); err == nil {
			defer file.Close()
			text, err = readData(file)
		}
	}
	if err == nil && len(text) > maxClientDataBytes {
		err = fmt.Errorf("larger than %d MiB", maxClientDataBytes>>20)
	}
	if err != nil {
		return nil, fail(codeClientRead, "read "+what, dropPath(err))
	}
	// Some editors put a byte order mark first, which is no JSON.
	return bytes.TrimSpace(bytes.TrimPrefix(text, []byte("\xef\xbb\xbf"))), nil
}

// readData reads one byte more than allowed at most.
func readData(from io.Reader) ([]byte, error) {
	return io.ReadAll(io.LimitReader(from, maxClientDataBytes+1))
}

// checkJSON says where text stops being JSON.
func checkJSON(text []byte) error {
	if len(text) == 0 {
		return errors.New("it is empty")
	}
	var value json.RawMessage
	err := json.Unmarshal(text, &value)
	var syntax *json.SyntaxError
	if errors.As(err, &syntax) {
		return fmt.Errorf("not JSON: %w at byte %d", err, syntax.Offset)
	}
	return err
}

// checkObject is checkJSON for what must be an object.
func checkObject(text []byte) error {
	if err := checkJSON(text); err != nil {
		return err
	}
	if text = bytes.TrimSpace(text); text[0] != '{' {
		return errors.New("it is JSON, but not an object")
	}
	return nil
}

// finals picks the tasks that have ended, at most limit.
func finals(tasks []taskReply, limit int) []taskReply {
	tasks = slices.DeleteFunc(slices.Clone(tasks), func(t taskReply) bool { return !t.Status.final() })
	return tasks[:min(limit, len(tasks))]
}
