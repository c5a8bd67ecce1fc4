package main

// hwinfo.go tells what the host is and how busy it is: reports to the broker (PROTOCOL section 4, listen_…) and the
// answer of GET /hardware, with the last hour for plots. How the numbers are asked for is in hwinfo_sample.go, file
// systems are in hwinfo_disk.go. It knows nothing of the worker but its broker.

import (
	"context"
	"encoding/json"
	"log/slog"
	"sync"
	"time"

	"github.com/shirou/gopsutil/v3/disk"
	"github.com/shirou/gopsutil/v3/host"
	"github.com/shirou/gopsutil/v3/load"
	"github.com/shirou/gopsutil/v3/mem"
	"github.com/shirou/gopsutil/v3/net"
)

const (
	firstHardware   = time.Second // from the start to the first report: CPU and network are measured over it
	hardwareSample  = 30 * time.Second
	hardwareReport  = time.Minute
	hostReport      = 5 * time.Minute
	hardwareHistory = int(time.Hour / hardwareSample) // samples kept

	hardwarePatience = 500 * time.Millisecond // for the worker to be ready before the host is looked at
	hardwareAnswer   = time.Second            // for whoever asks before that
	hardwareRetry    = time.Second            // until a broker that is connected has the first report
	hardwareLimit    = 5 * time.Second        // for publishing
)

// hostID is the host's own identity, which {task_id}_who gives; empty where the system has none.
func hostID() string {
	id, err := host.HostID()
	if err != nil {
		return ""
	}
	return id
}

// A hardware samples the host. Everything but what mu guards is run's alone.
type hardware struct {
	log     *slog.Logger
	dataDir string // whose file system is the one of the history

	// connection gives the broker in use and the project there; nil while there is none to publish to. connected holds a
	// value when that may have changed.
	connection func() (broker Broker, project string)
	connected  <-chan struct{}

	partitions func(ctx context.Context) ([]disk.PartitionStat, error)
	usage      func(ctx context.Context, path string) (*disk.UsageStat, error)
	patience   time.Duration // with one part; all file systems together are one

	inquiries map[string]*inquiry // by part
	disks     map[string]*inquiry // by path
	host      host.InfoStat       // what is known of it
	model     string              // of the CPU
	perSample cpuMeter
	perReport cpuMeter
	traffic   trafficMeter
	told      Broker // has had its first report; nil: none

	looked chan struct{} // closed once all parts have been asked for

	mu      sync.Mutex // guards what follows
	latest  hardwareView
	history []hardwarePoint // a ring of hardwareHistory
	newest  int             // in history
}

// A hardwareView is the answer of GET /hardware. What cannot be told is null.
type hardwareView struct {
	Host      *host.InfoStat         `json:"host"`
	CPU       *cpuView               `json:"cpu"`
	Memory    *mem.VirtualMemoryStat `json:"memory"`
	Disk      []diskView             `json:"disk"`
	Network   *networkView           `json:"network"`
	Load      *load.AvgStat          `json:"load"`
	SampledAt time.Time              `json:"sampled_at"`
	History   []hardwarePoint        `json:"history"` // oldest first

	dataDisk *float64 // percent used of the file system that data_dir is on
}

type cpuView struct {
	Percent []float64 `json:"percent"` // per CPU
	Total   float64   `json:"total"`   // of all of them
	Model   string    `json:"model,omitempty"`
}

type diskView struct {
	Path        string  `json:"path"`
	FSType      string  `json:"fstype"`
	Total       uint64  `json:"total"`
	Free        uint64  `json:"free"`
	Used        uint64  `json:"used"`
	UsedPercent float64 `json:"used_percent"`
}

type networkView struct {
	Interfaces net.InterfaceStatList `json:"interfaces"`
	RX         *float64              `json:"rx_bytes_per_s"`
	TX         *float64              `json:"tx_bytes_per_s"`
}

// A hardwarePoint is a sample in the history: percent, of the disk that data_dir is on, and bytes per second.
type hardwarePoint struct {
	At     time.Time `json:"at"`
	CPU    *float64  `json:"cpu"`
	Memory *float64  `json:"memory"`
	Disk   *float64  `json:"disk"`
	RX     *float64  `json:"rx"`
	TX     *float64  `json:"tx"`
}

// newHardware prepares the reports and asks nothing yet.
func newHardware(dataDir string, connection func() (Broker, string), connected <-chan struct{}, log *slog.Logger) *hardware {
	return &hardware{
		log: log, dataDir: dataDir, connection: connection, connected: connected,
		partitions: ownPartitions, usage: folderUsage, patience: inquiryLimit,
		inquiries: map[string]*inquiry{}, disks: map[string]*inquiry{}, looked: make(chan struct{}),
	}
}

// run samples and reports until ctx ends. It may be called once.
func (h *hardware) run(ctx context.Context) {
	plan := newHardwarePlan(time.Now())
	h.readHost(ctx)
	h.sample(ctx)
	close(h.looked)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for measured := false; ; {
		wake := plan.next()
		if broker, _ := h.connection(); measured && broker != nil && broker != h.told {
			wake = earlier(wake, time.Now().Add(hardwareRetry))
		}
		timer.Reset(time.Until(wake))
		var due hardwareDue
		select {
		case <-timer.C:
			due = plan.due(time.Now())
		case <-h.connected:
		case <-ctx.Done():
			return
		}
		if due.host {
			h.readHost(ctx)
		}
		if due.sample {
			h.sample(ctx)
			h.remember()
			measured = true
		}
		if measured {
			h.publish(ctx, due)
		}
	}
}

// A hardwarePlan says when what is to be done, at fixed distances from the start: a late sample does not move the next
// one, and what was missed, as in a suspended host, is made up for once.
type hardwarePlan struct {
	start                time.Time
	sample, report, host time.Time // the next of each
}

type hardwareDue struct{ sample, report, host bool }

func newHardwarePlan(start time.Time) *hardwarePlan {
	first := start.Add(firstHardware)
	return &hardwarePlan{start: start, sample: first, report: first, host: start.Add(hostReport)}
}

// next is when something will be due.
func (p *hardwarePlan) next() time.Time { return earlier(p.sample, earlier(p.report, p.host)) }

// due says what is, and that it is done.
func (p *hardwarePlan) due(now time.Time) hardwareDue {
	take := func(next *time.Time, pause time.Duration) bool {
		if now.Before(*next) {
			return false
		}
		*next = p.start.Add((now.Sub(p.start)/pause + 1) * pause)
		return true
	}
	return hardwareDue{take(&p.sample, hardwareSample), take(&p.report, hardwareReport), take(&p.host, hostReport)}
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// publish sends what is due, and everything to a broker that has had nothing yet. Only the newest report is worth
// sending, so without a connection it is dropped.
func (h *hardware) publish(ctx context.Context, due hardwareDue) {
	view := h.latest // only run writes it
	if due.report && view.CPU != nil {
		if percent := h.perReport.since(h.perSample.times); len(percent) > 0 {
			view.CPU = &cpuView{Percent: percent}
		}
	}
	if due.report {
		h.perReport = h.perSample
	}
	broker, project := h.connection()
	if broker == nil {
		return
	}
	first := broker != h.told
	var messages []Message
	if due.host || first {
		messages = h.hostMessage(messages)
	}
	if due.report || first {
		messages = h.reportMessages(messages, view, project)
	}
	if len(messages) == 0 {
		return
	}
	ctx, stop := context.WithTimeout(ctx, hardwareLimit)
	defer stop()
	if _, err := broker.Publish(ctx, messages...); err != nil {
		h.log.Debug("hardware report not sent", errAttrs(err))
		return
	}
	h.told = broker
}

func (h *hardware) hostMessage(messages []Message) []Message {
	if h.latest.Host == nil {
		return messages
	}
	return h.addMessage(messages, "listen_host_information", h.latest.Host)
}

// reportMessages are the reports of the parts that could be read.
func (h *hardware) reportMessages(messages []Message, view hardwareView, project string) []Message {
	type frame struct {
		HostID   string `json:"host_id"`
		Data     any    `json:"data"`
		Duration string `json:"time_duration"`
		Project  string `json:"project_data_uuid"`
	}
	add := func(part string, data any) {
		messages = h.addMessage(messages, "listen_"+part+"_information", frame{h.host.HostID, data, "one_minute", project})
	}
	if view.CPU != nil {
		add("cpu", view.CPU.Percent)
	}
	if view.Memory != nil {
		add("mem", view.Memory)
	}
	if view.Network != nil && view.Network.Interfaces != nil {
		add("net", view.Network.Interfaces)
	}
	if len(view.Disk) > 0 {
		add("disk", view.Disk)
	}
	return messages
}

// addMessage leaves out what cannot be put into JSON: a number that is none.
func (h *hardware) addMessage(messages []Message, subject string, payload any) []Message {
	data, err := json.Marshal(payload)
	if err != nil {
		h.leaveOut(h.inquiry(subject), err)
		return messages
	}
	return append(messages, Message{Subject: subject, Data: data})
}

// remember adds the latest sample to the history.
func (h *hardware) remember() {
	h.mu.Lock()
	defer h.mu.Unlock()
	point := hardwarePoint{At: h.latest.SampledAt}
	if h.latest.CPU != nil {
		point.CPU = &h.latest.CPU.Total
	}
	if h.latest.Memory != nil {
		percent := oneDecimal(h.latest.Memory.UsedPercent)
		point.Memory = &percent
	}
	if n := h.latest.Network; n != nil {
		point.RX, point.TX = n.RX, n.TX
	}
	point.Disk = h.latest.dataDisk
	if len(h.history) < hardwareHistory {
		h.newest = len(h.history)
		h.history = append(h.history, point)
		return
	}
	h.newest = (h.newest + 1) % hardwareHistory
	h.history[h.newest] = point
}

// view is the latest sample with the last hour.
func (h *hardware) view() hardwareView {
	h.mu.Lock()
	defer h.mu.Unlock()
	view := h.latest
	view.History = make([]hardwarePoint, 0, len(h.history))
	for i := range h.history {
		view.History = append(view.History, h.history[(h.newest+1+i)%len(h.history)])
	}
	return view
}
