package main

// client_status.go is the status command: what the worker on this host is doing, as a table for people or as JSON.

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// healthReply is what GET /health says.
type healthReply struct {
	Status     string   `json:"status"`
	Problems   []string `json:"problems"`
	IdentityID string   `json:"identity_id"`
	Version    string   `json:"version"`
	UptimeS    float64  `json:"uptime_s"`
	Broker     struct {
		Type      string `json:"type"`
		Connected bool   `json:"connected"`
		Since     string `json:"since"`
	} `json:"broker"`
	Jobs  map[string]int64 `json:"jobs"`
	Execs []struct {
		Key      string `json:"key"`
		State    string `json:"state"`
		PID      int    `json:"pid"`
		Restarts int    `json:"restarts"`
	} `json:"execs"`
}

// runStatus is `status`.
func runStatus(ctx context.Context, inv *invocation) int {
	if len(inv.args) > 0 {
		return inv.usageError("status takes no argument")
	}
	c, err := findWorker(inv)
	if err != nil {
		inv.printError(err)
		return exitUsage
	}
	show := c.showStatus
	if inv.json {
		show = c.showStatusJSON
	}
	healthy, err := show(ctx, inv.stdout)
	if err != nil {
		inv.printError(err)
	}
	if err != nil || !healthy {
		return exitFailed
	}
	return exitOK
}

// health asks how the worker is. It is healthy when the reply says 200.
func (c *workerClient) health(ctx context.Context) (text json.RawMessage, healthy bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, clientTimeout)
	defer cancel()
	resp, err := c.do(ctx, http.MethodGet, nil, nil, "health")
	if err != nil {
		return nil, false, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusServiceUnavailable {
		return nil, false, c.refused(resp)
	}
	return text, resp.StatusCode == http.StatusOK, c.decode(resp.Body, &text)
}

// jobs asks for tasks: in a status, or in any if it is "".
func (c *workerClient) jobs(ctx context.Context, status taskStatus, limit int, reply any) error {
	ctx, cancel := context.WithTimeout(ctx, clientTimeout)
	defer cancel()
	query := url.Values{"limit": {strconv.Itoa(limit)}}
	if status != "" {
		query.Set("status", string(status))
	}
	resp, err := c.do(ctx, http.MethodGet, nil, query, "jobs")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return c.refused(resp)
	}
	return c.decode(resp.Body, reply)
}

// showStatusJSON prints {"health":…,"jobs":…}, as the worker gave them.
func (c *workerClient) showStatusJSON(ctx context.Context, out io.Writer) (healthy bool, err error) {
	health, healthy, err := c.health(ctx)
	if err != nil {
		return false, err
	}
	var reply struct {
		Jobs json.RawMessage `json:"jobs"`
	}
	if err := c.jobs(ctx, "", 100, &reply); err != nil {
		return false, err
	}
	text, err := json.Marshal(map[string]json.RawMessage{"health": health, "jobs": reply.Jobs})
	if err != nil {
		return false, c.strangeReply(err)
	}
	_, err = fmt.Fprintf(out, "%s\n", text)
	return healthy, err
}

// shownTasks bounds each list of the table.
const shownTasks = 10

func (c *workerClient) showStatus(ctx context.Context, out io.Writer) (healthy bool, err error) {
	text, healthy, err := c.health(ctx)
	if err != nil {
		return false, err
	}
	var health healthReply
	if err := json.Unmarshal(text, &health); err != nil || health.Status == "" {
		return false, c.strangeReply(err)
	}
	var running, queued, last struct {
		Jobs []taskReply `json:"jobs"`
	}
	if err := c.jobs(ctx, statusRunning, shownTasks, &running); err != nil {
		return false, err
	}
	if err := c.jobs(ctx, statusQueued, shownTasks, &queued); err != nil {
		return false, err
	}
	if err := c.jobs(ctx, "", 3*shownTasks, &last); err != nil {
		return false, err
	}

	t := statusTable{tabwriter.NewWriter(out, 0, 0, 2, ' ', 0), time.Now()}
	t.overview(c, health)
	t.tasks("RUNNING", running.Jobs, health.Jobs["running"])
	t.tasks("QUEUED", queued.Jobs, health.Jobs["queued"])
	t.ended(finals(last.Jobs, shownTasks))
	t.execs(health)
	return healthy, t.Flush()
}

// A statusTable lays the answers out. What comes from the worker is made fit for a line.
type statusTable struct {
	*tabwriter.Writer
	now time.Time
}

func (t statusTable) overview(c *workerClient, h healthReply) {
	fmt.Fprintf(t, "worker\t%s %s: %s, up %s\n", oneLine(h.IdentityID, 60), oneLine(h.Version, 40),
		oneLine(h.Status, 20), time.Duration(h.UptimeS)*time.Second)
	fmt.Fprintf(t, "address\t%s\n", shownURL(c.base))
	state := "not connected"
	if h.Broker.Connected {
		state = "connected"
	}
	if h.Broker.Since != "" {
		state += " since " + oneLine(h.Broker.Since, 40)
	}
	fmt.Fprintf(t, "broker\t%s, %s\n", oneLine(h.Broker.Type, 20), state)
	var counts []string
	for _, status := range []taskStatus{
		statusRunning, statusQueued, statusFinish, statusError, statusTimeout, statusTerminate,
	} {
		counts = append(counts, fmt.Sprintf("%d %s", h.Jobs[string(status)], status))
	}
	fmt.Fprintf(t, "tasks\t%s\n", strings.Join(counts, ", "))
	for _, problem := range h.Problems {
		fmt.Fprintf(t, "problem\t%s\n", oneLine(problem, 300))
	}
}

// tasks lists what has not ended; total counts those that are not in the list too.
func (t statusTable) tasks(title string, tasks []taskReply, total int64) {
	if len(tasks) == 0 {
		return
	}
	fmt.Fprintf(t, "\n%s\tEVENT\tATTEMPT\tFOR\n", title)
	for _, task := range tasks {
		since := task.StartedAt
		if since == nil || since.IsZero() {
			since = task.CreatedAt
		}
		fmt.Fprintf(t, "%s\t%s\t%d\t%s\n",
			oneLine(task.TaskID, 128), oneLine(task.Event, 40), task.Attempt, span(since, &t.now))
	}
	if more := total - int64(len(tasks)); more > 0 {
		fmt.Fprintf(t, "and %d more\n", more)
	}
}

func (t statusTable) ended(tasks []taskReply) {
	if len(tasks) == 0 {
		return
	}
	fmt.Fprint(t, "\nENDED\tEVENT\tSTATUS\tTOOK\tAGO\tREASON\n")
	for _, task := range tasks {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", oneLine(task.TaskID, 128), oneLine(task.Event, 40), task.Status,
			span(task.StartedAt, task.FinishedAt), span(task.FinishedAt, &t.now), oneLine(task.Error, 60))
	}
}

func (t statusTable) execs(h healthReply) {
	if len(h.Execs) == 0 {
		return
	}
	fmt.Fprint(t, "\nEXEC\tSTATE\tPID\tRESTARTS\n")
	for _, e := range h.Execs {
		fmt.Fprintf(t, "%s\t%s\t%d\t%d\n", oneLine(e.Key, 40), oneLine(e.State, 20), e.PID, e.Restarts)
	}
}

// span is the time between two moments, "-" if one is unknown.
func span(from, to *time.Time) string {
	if from == nil || to == nil || from.IsZero() || to.IsZero() {
		return "-"
	}
	d := to.Sub(*from)
	if d > 10*time.Second {
		return d.Round(time.Second).String()
	}
	return d.Round(time.Millisecond).String()
}
