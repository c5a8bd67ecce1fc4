package main

// hwinfo_sample.go asks the system for its hardware, part by part. Any part may be missing, as in a container without
// /proc, hang, or make the library panic: then it is left out, and the others are not held up.

import (
	"context"
	"errors"
	"fmt"
	"math"
	stdnet "net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/shirou/gopsutil/v3/cpu"
	"github.com/shirou/gopsutil/v3/host"
	"github.com/shirou/gopsutil/v3/load"
	"github.com/shirou/gopsutil/v3/mem"
	"github.com/shirou/gopsutil/v3/net"
	"github.com/shirou/gopsutil/v3/process"
)

// inquiryLimit is how long an answer is waited for.
const inquiryLimit = 2 * time.Second

var (
	errNoAnswer = errors.New("no answer in time")
	errNothing  = errors.New("the system tells nothing")
)

// An inquiry asks the system for one part. The answer may never come, as from a file server that is gone; until it does
// the part is not asked for again.
type inquiry struct {
	part   string
	open   atomic.Bool
	reason string // why it was left out the last time
}

type answer[T any] struct {
	value T
	err   error
}

// begin asks, and gives where the answer will be.
func begin[T any](ctx context.Context, q *inquiry, get func(context.Context) (T, error)) <-chan answer[T] {
	answers := make(chan answer[T], 1)
	if !q.open.CompareAndSwap(false, true) {
		answers <- answer[T]{err: errNoAnswer}
		return answers
	}
	go func() { // ends when the system answers, which nobody can wait for
		var a answer[T]
		defer func() {
			if p := recover(); p != nil {
				a.err = fmt.Errorf("panic: %v", p)
			}
			q.open.Store(false)
			answers <- a
		}()
		a.value, a.err = get(ctx)
	}()
	return answers
}

// await waits for an answer until ctx ends.
func await[T any](ctx context.Context, answers <-chan answer[T]) (T, error) {
	select {
	case a := <-answers:
		return a.value, a.err
	case <-ctx.Done():
	}
	select {
	case a := <-answers: // it came while another one was waited for
		return a.value, a.err
	default:
		var none T
		return none, errNoAnswer
	}
}

// read asks for a part. What is missing is logged.
func read[T any](ctx context.Context, h *hardware, part string, get func(context.Context) (T, error)) (value T, ok bool) {
	q := h.inquiry(part)
	limited, stop := context.WithTimeout(ctx, h.patience)
	defer stop()
	value, err := await(limited, begin(limited, q, get))
	if err != nil && ctx.Err() == nil {
		h.leaveOut(q, err)
	}
	return value, err == nil
}

func (h *hardware) inquiry(part string) *inquiry {
	q := h.inquiries[part]
	if q == nil {
		q = &inquiry{part: part}
		h.inquiries[part] = q
	}
	return q
}

// leaveOut says once why a part is missing, and again when that changes.
func (h *hardware) leaveOut(q *inquiry, err error) {
	if err.Error() == q.reason {
		return
	}
	q.reason = err.Error()
	h.log.Warn("hardware reports lack a part", errAttrs(fail(codeHardware, "read "+q.part, err)))
}

// readHost reads what the host is. What does not change is read once: on some systems that runs programs.
func (h *hardware) readHost(ctx context.Context) {
	info := &h.host
	info.OS = runtime.GOOS
	if name, ok := read(ctx, h, "host name", func(context.Context) (string, error) { return os.Hostname() }); ok {
		info.Hostname = name
	}
	if info.HostID == "" {
		info.HostID, _ = read(ctx, h, "host id", host.HostIDWithContext)
	}
	if info.Platform == "" {
		p, _ := read(ctx, h, "platform", readPlatform)
		info.Platform, info.PlatformFamily, info.PlatformVersion = p.name, p.family, p.version
	}
	if info.KernelVersion == "" {
		info.KernelVersion, _ = read(ctx, h, "kernel version", host.KernelVersionWithContext)
	}
	if info.KernelArch == "" {
		info.KernelArch, _ = read(ctx, h, "kernel architecture", func(context.Context) (string, error) { return host.KernelArch() })
	}
	if info.VirtualizationSystem == "" {
		v, _ := read(ctx, h, "virtualization", func(ctx context.Context) (v [2]string, _ error) {
			v[0], v[1], _ = host.VirtualizationWithContext(ctx) // not every system can tell
			return v, nil
		})
		info.VirtualizationSystem, info.VirtualizationRole = v[0], v[1]
	}
	if info.BootTime == 0 {
		info.BootTime, _ = read(ctx, h, "boot time", host.BootTimeWithContext)
	}
	if uptime, ok := read(ctx, h, "uptime", host.UptimeWithContext); ok {
		info.Uptime = uptime
	}
	if count, ok := read(ctx, h, "processes", processCount); ok {
		info.Procs = count
	}
	if h.model == "" {
		h.model, _ = read(ctx, h, "cpu model", func(ctx context.Context) (string, error) {
			cpus, err := cpu.InfoWithContext(ctx)
			if len(cpus) == 0 {
				return "", err // some systems have none to tell
			}
			return cpus[0].ModelName, nil
		})
	}
	current := *info
	h.mu.Lock()
	h.latest.Host = &current
	h.mu.Unlock()
}

// A platform is the system's distribution and release.
type platform struct{ name, family, version string }

// readPlatform is gopsutil's, except on a Debian: there it would run lsb_release, a script of ten processes, at the
// very moment at which the worker starts, only to take the release from a file after all.
func readPlatform(ctx context.Context) (p platform, err error) {
	if version, ok := plainDebian("/"); ok {
		return platform{"debian", "debian", version}, nil
	}
	p.name, p.family, p.version, err = host.PlatformInformationWithContext(ctx)
	return p, err
}

// plainDebian gives the release if the system below root is Debian itself, by name and without what gopsutil would take
// another name from.
func plainDebian(root string) (release string, ok bool) {
	if os.Getenv("HOST_ETC") != "" {
		return "", false // gopsutil's way to ask about another system than this one
	}
	for _, other := range []string{"lsb-release", "oracle-release", "enterprise-release", "slackware-version"} {
		if _, err := os.Stat(filepath.Join(root, "etc", other)); err == nil {
			return "", false
		}
	}
	if _, err := os.Stat(filepath.Join(root, "usr/bin/raspi-config")); err == nil {
		return "", false
	}
	names, err := os.ReadFile(filepath.Join(root, "etc/os-release"))
	if err != nil || !slices.Contains(strings.Split(string(names), "\n"), "ID=debian") {
		return "", false
	}
	version, err := os.ReadFile(filepath.Join(root, "etc/debian_version"))
	release, _, _ = strings.Cut(string(version), "\n")
	return release, err == nil && release != ""
}

// sample reads what changes. CPU and traffic are those since the sample before.
func (h *hardware) sample(ctx context.Context) {
	view := hardwareView{Host: h.latest.Host, SampledAt: time.Now().UTC()}
	if times, ok := read(ctx, h, "cpu", cpuTimes); ok {
		if percent := h.perSample.since(times); len(percent) > 0 {
			view.CPU = &cpuView{Percent: percent, Total: mean(percent), Model: h.model}
		}
		h.perSample.times = times
		if h.perReport.times == nil {
			h.perReport.times = times
		}
	}
	if memory, ok := read(ctx, h, "memory", memoryState); ok {
		view.Memory = memory
	}
	interfaces, told := read(ctx, h, "network interfaces", net.InterfacesWithContext)
	if told {
		view.Network = &networkView{Interfaces: interfaces}
		counters, ok := read(ctx, h, "network traffic", func(ctx context.Context) ([]net.IOCountersStat, error) {
			return net.IOCountersWithContext(ctx, true)
		})
		if ok {
			view.Network.RX, view.Network.TX = h.traffic.since(time.Now(), counters, interfaces)
		}
	}
	if runtime.GOOS != "windows" { // it has no load average
		if average, ok := read(ctx, h, "load", load.AvgWithContext); ok {
			view.Load = average
		}
	}
	view.Disk, view.dataDisk = h.readDisks(ctx)
	h.mu.Lock()
	h.latest = view
	h.mu.Unlock()
}

func processCount(ctx context.Context) (uint64, error) {
	pids, err := process.PidsWithContext(ctx)
	if err == nil && len(pids) == 0 {
		err = errNothing
	}
	return uint64(len(pids)), err
}

func cpuTimes(ctx context.Context) ([]cpu.TimesStat, error) {
	times, err := cpu.TimesWithContext(ctx, true)
	if err == nil && len(times) == 0 {
		err = errNothing // what gopsutil makes of a missing /proc/stat
	}
	return times, err
}

func memoryState(ctx context.Context) (*mem.VirtualMemoryStat, error) {
	memory, err := mem.VirtualMemoryWithContext(ctx)
	if err == nil && memory.Total == 0 {
		err = errNothing
	}
	return memory, err
}

// A cpuMeter measures how busy the CPUs are between two times.
type cpuMeter struct{ times []cpu.TimesStat }

// since gives percent per CPU. A CPU that has come since is not among them.
func (m cpuMeter) since(now []cpu.TimesStat) []float64 {
	before := make(map[string]cpu.TimesStat, len(m.times))
	for _, t := range m.times {
		before[t.CPU] = t
	}
	percent := make([]float64, 0, len(now))
	for _, t := range now {
		if b, known := before[t.CPU]; known {
			percent = append(percent, busyPercent(b, t))
		}
	}
	return percent
}

// busyPercent is the part of the time between a and b that was spent working. The times of guests are in User and Nice
// already.
func busyPercent(a, b cpu.TimesStat) float64 {
	idle := (b.Idle + b.Iowait) - (a.Idle + a.Iowait)
	busy := (b.User + b.System + b.Nice + b.Irq + b.Softirq + b.Steal) - (a.User + a.System + a.Nice + a.Irq + a.Softirq + a.Steal)
	if busy <= 0 || idle+busy <= 0 {
		return 0
	}
	return oneDecimal(min(100, 100*busy/(busy+max(idle, 0))))
}

// A trafficMeter measures what goes over the network between two times.
type trafficMeter struct {
	at     time.Time
	before map[string]net.IOCountersStat // by interface
}

// since gives bytes per second, nil the first time. Interfaces with an address that others can reach count, which
// leaves out the loopback and the parts that bridges and bonds are made of: their traffic would count twice.
func (m *trafficMeter) since(now time.Time, counters []net.IOCountersStat, interfaces net.InterfaceStatList) (rx, tx *float64) {
	last := *m
	m.at, m.before = now, make(map[string]net.IOCountersStat, len(counters))
	for _, c := range counters {
		m.before[c.Name] = c
	}
	seconds := now.Sub(last.at).Seconds()
	if last.before == nil || seconds <= 0 {
		return nil, nil
	}
	var received, sent float64
	for _, i := range interfaces {
		a, known := last.before[i.Name]
		b, there := m.before[i.Name]
		if !known || !there || !reachableInterface(i) || b.BytesRecv < a.BytesRecv || b.BytesSent < a.BytesSent {
			continue // one that has begun to count anew tells nothing this time
		}
		received += float64(b.BytesRecv - a.BytesRecv)
		sent += float64(b.BytesSent - a.BytesSent)
	}
	received, sent = math.Round(received/seconds), math.Round(sent/seconds)
	return &received, &sent
}

func reachableInterface(i net.InterfaceStat) bool {
	for _, a := range i.Addrs {
		ip, _, err := stdnet.ParseCIDR(a.Addr)
		if err == nil && !ip.IsLoopback() && !ip.IsLinkLocalUnicast() {
			return true
		}
	}
	return false
}

func mean(values []float64) float64 {
	sum := 0.0
	for _, v := range values {
		sum += v
	}
	return oneDecimal(sum / float64(len(values)))
}

func oneDecimal(v float64) float64 { return math.Round(10*v) / 10 }
