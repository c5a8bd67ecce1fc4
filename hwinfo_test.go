package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shirou/gopsutil/v3/cpu"
	"github.com/shirou/gopsutil/v3/disk"
	"github.com/shirou/gopsutil/v3/host"
	"github.com/shirou/gopsutil/v3/net"
)

// logLines holds what is logged.
type logLines struct {
	mu    sync.Mutex
	lines []string
}

func (l *logLines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, strings.TrimSpace(string(p)))
	return len(p), nil
}

// about gives the lines in which text stands.
func (l *logLines) about(text string) (found []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, line := range l.lines {
		if strings.Contains(line, text) {
			found = append(found, line)
		}
	}
	return found
}

// testHardware reports to connection, nil: to nobody.
func testHardware(t *testing.T, connection func() (Broker, string), connected <-chan struct{}) (*hardware, *logLines) {
	t.Helper()
	if connection == nil {
		connection = func() (Broker, string) { return nil, "" }
	}
	log := &logLines{}
	return newHardware(t.TempDir(), connection, connected, slog.New(slog.NewTextHandler(log, nil))), log
}

func TestHardwarePlan(t *testing.T) {
	start := time.Now()
	p := newHardwarePlan(start)
	at := func(seconds float64) hardwareDue {
		return p.due(start.Add(time.Duration(seconds * float64(time.Second))))
	}
	for _, step := range []struct {
		wake float64 // when the plan wants to be woken
		at   float64 // when it is
		want hardwareDue
	}{
		{1, 1, hardwareDue{sample: true, report: true}},
		{30, 29.9, hardwareDue{}},
		{30, 31, hardwareDue{sample: true}}, // late, which does not move the next
		{60, 60, hardwareDue{sample: true, report: true}},
		{90, 3600.5, hardwareDue{true, true, true}}, // after a suspend: once
		{3630, 3601, hardwareDue{}},
		{3630, 3630, hardwareDue{sample: true}},
		{3660, 3660, hardwareDue{sample: true, report: true}},
		{3690, 3930, hardwareDue{true, true, true}}, // the host's is of 3900
		{3960, 4199, hardwareDue{sample: true, report: true}},
		{4200, 4200, hardwareDue{true, true, true}},
	} {
		if wake := p.next().Sub(start).Seconds(); wake != step.wake {
			t.Errorf("before %v: next at %v; want %v", step.at, wake, step.wake)
		}
		if due := at(step.at); due != step.want {
			t.Errorf("due at %v: %+v; want %+v", step.at, due, step.want)
		}
	}
}

func TestHardwareHistory(t *testing.T) {
	h, _ := testHardware(t, nil, nil)
	start := time.Unix(1_700_000_000, 0)
	for i := range hardwareHistory + 7 {
		h.latest = hardwareView{SampledAt: start.Add(time.Duration(i) * hardwareSample)}
		if i == hardwareHistory+6 {
			h.latest.CPU = &cpuView{Total: 12.5}
		}
		h.remember()
		history := h.view().History
		if len(history) != min(i+1, hardwareHistory) || !history[len(history)-1].At.Equal(h.latest.SampledAt) {
			t.Fatalf("after %d samples: %d, the newest of %v", i+1, len(history), history[len(history)-1].At)
		}
	}
	history := h.view().History
	for i := 1; i < len(history); i++ {
		if history[i].At.Sub(history[i-1].At) != hardwareSample {
			t.Errorf("point %d is of %v, the one before of %v", i, history[i].At, history[i-1].At)
		}
	}
	last, err := json.Marshal(history[len(history)-1])
	if want := `"cpu":12.5,"memory":null,"disk":null,"rx":null,"tx":null}`; err != nil || !strings.HasSuffix(string(last), want) {
		t.Errorf("last point is %s, %v", last, err)
	}
}

// A disk that hangs, one that fails and a library that panics cost nothing but themselves.
func TestHardwareParts(t *testing.T) {
	h, log := testHardware(t, nil, nil)
	h.patience = 500 * time.Millisecond
	release := make(chan struct{})
	var asked atomic.Int32
	var failure atomic.Value
	failure.Store("permission denied")
	h.partitions = func(context.Context) ([]disk.PartitionStat, error) {
		return []disk.PartitionStat{{Device: "a", Mountpoint: "/"}, {Device: "b", Mountpoint: "/dead"},
			{Device: "c", Mountpoint: "/closed"}, {Device: "d", Mountpoint: "/gone"}, {Device: "e", Mountpoint: "/file"},
			{Device: "f", Mountpoint: "/bug"}, {Device: "g", Mountpoint: "/empty"}}, nil
	}
	h.usage = func(_ context.Context, path string) (*disk.UsageStat, error) {
		switch path {
		case "/dead":
			asked.Add(1)
			<-release
		case "/closed":
			return nil, errors.New(failure.Load().(string))
		case "/gone":
			return nil, fs.ErrNotExist
		case "/file":
			return nil, errNoFolder
		case "/bug":
			var none []int
			return nil, fmt.Errorf("%d", none[len(path)])
		case "/empty":
			return &disk.UsageStat{}, nil
		}
		return &disk.UsageStat{Total: 10, Used: 4, Free: 6, UsedPercent: 40.04}, nil
	}
	sample := func() (paths []string) {
		h.sample(t.Context())
		for _, d := range h.view().Disk {
			paths = append(paths, d.Path)
		}
		return paths
	}
	for range 3 {
		if got := sample(); !slices.Equal(got, []string{"/"}) {
			t.Errorf("disks are %q", got)
		}
	}
	if view := h.view(); *view.dataDisk != 40 || view.Disk[0].UsedPercent != 40 {
		t.Errorf("data_dir's is %v, the first %+v", *view.dataDisk, view.Disk[0])
	}
	if n := asked.Load(); n != 1 {
		t.Errorf("the dead disk was asked %d times", n)
	}
	for text, want := range map[string]int{
		`read disk /dead: no answer in time" code=ERR-30350903208`:     1,
		`read disk /closed: permission denied" code=ERR-30350903208`:   1,
		`read disk /bug: panic: runtime error: index out of range [4]`: 1,
		"/gone": 0, "/file": 0, "/empty": 0,
	} {
		if got := log.about(text); len(got) != want {
			t.Errorf("%q is logged %d times: %q", text, len(got), log.lines)
		}
	}

	failure.Store("I/O error")
	close(release)
	waitFor(t, 10*time.Second, func() string {
		if got := sample(); !slices.Equal(got, []string{"/", "/dead"}) {
			return fmt.Sprintf("disks are %q", got)
		}
		return ""
	})
	if got := log.about("/closed"); len(got) != 2 || !strings.Contains(got[1], "I/O error") {
		t.Errorf("the other reason is logged as %q", got)
	}

	// Where nothing can be listed there is still data_dir's.
	h.partitions = func(context.Context) ([]disk.PartitionStat, error) { panic("no mounts") }
	if got := sample(); !slices.Equal(got, []string{h.dataDir}) || len(log.about("read file systems: panic: no mounts")) != 1 {
		t.Errorf("disks are %q, the log %q", got, log.lines)
	}
	// What the end interrupts is not missing.
	ended, end := context.WithCancel(t.Context())
	end()
	lines := len(log.lines)
	h.readHost(ended)
	h.sample(ended)
	if len(log.lines) != lines {
		t.Errorf("logged at the end: %q", log.lines[lines:])
	}
}

// On a host without /proc everything else is there.
func TestHardwareWithoutProc(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("other systems have no /proc to lack")
	}
	t.Setenv("HOST_PROC", t.TempDir())
	h, log := testHardware(t, nil, nil)
	for range 2 {
		h.readHost(t.Context())
		h.sample(t.Context())
	}
	view := h.view()
	if view.CPU != nil || view.Memory != nil || view.Network == nil || view.Network.RX != nil || view.Load == nil ||
		len(view.Disk) == 0 || view.dataDisk == nil || view.Host.Hostname == "" || view.Host.KernelArch == "" {
		text, _ := json.Marshal(view)
		t.Errorf("view is %s", text)
	}
	for _, part := range []string{"cpu", "memory", "network traffic", "processes", "boot time"} {
		if got := log.about("read " + part + ": "); len(got) != 1 || !strings.Contains(got[0], string(codeHardware)) {
			t.Errorf("%s: the log says %q", part, log.lines)
		}
	}
	if got := h.reportMessages(nil, view, "p"); len(got) != 2 {
		t.Errorf("reports are %v", got)
	}
}

func TestPlainDebian(t *testing.T) {
	debian := map[string]string{
		"etc/os-release":     "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nID=debian\nVERSION_ID=\"12\"\n",
		"etc/debian_version": "12.11\n",
	}
	for _, test := range []struct {
		name  string
		other map[string]string // instead of Debian's files, or besides them
		want  string
	}{
		{"as it is installed", nil, "12.11"},
		{"no release", map[string]string{"etc/debian_version": "\n"}, ""},
		{"a derived system", map[string]string{"etc/os-release": "ID=devuan\nID_LIKE=debian\n"}, ""},
		{"one that has a name of its own", map[string]string{"etc/lsb-release": "DISTRIB_ID=LinuxMint\n"}, ""},
		{"a Raspberry Pi", map[string]string{"usr/bin/raspi-config": "#!/bin/sh\n"}, ""},
	} {
		root := t.TempDir()
		files := maps.Clone(debian)
		maps.Copy(files, test.other)
		for name, text := range files {
			path := filepath.Join(root, name)
			if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if release, ok := plainDebian(root); release != test.want || ok != (test.want != "") {
			t.Errorf("%s: release %q, %v; want %q", test.name, release, ok, test.want)
		}
	}
	// Whatever system this is, the report says of it what gopsutil would.
	got, err := readPlatform(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	var want platform
	if want.name, want.family, want.version, err = host.PlatformInformation(); err != nil || got != want {
		t.Errorf("platform %+v, gopsutil has %+v, %v", got, want, err)
	}
}

func TestCPUMeter(t *testing.T) {
	m := cpuMeter{[]cpu.TimesStat{{CPU: "cpu0", User: 10, Idle: 90, Guest: 10}, {CPU: "cpu1", Idle: 50}, {CPU: "cpu2", User: 9, Idle: 9}}}
	got := m.since([]cpu.TimesStat{
		{CPU: "cpu0", User: 12, System: 1, Idle: 92, Iowait: 5, Guest: 12}, // 3 of 10 s
		{CPU: "cpu1", Steal: 4, Idle: 49},                                  // idle time may run backwards
		{CPU: "cpu3", User: 1},                                             // a new one
		{CPU: "cpu2", User: 9, Idle: 9},                                    // no time has passed
	})
	if want := []float64{30, 100, 0}; !slices.Equal(got, want) {
		t.Errorf("percent are %v; want %v", got, want)
	}
}

func TestTrafficMeter(t *testing.T) {
	interfaces := net.InterfaceStatList{
		{Name: "lo", Addrs: net.InterfaceAddrList{{Addr: "127.0.0.1/8"}, {Addr: "::1/128"}}},
		{Name: "eth0", Addrs: net.InterfaceAddrList{{Addr: "fe80::1/64"}, {Addr: "192.0.2.2/24"}}},
		{Name: "veth1", Addrs: net.InterfaceAddrList{{Addr: "fe80::2/64"}}},
		{Name: "wg0", Addrs: net.InterfaceAddrList{{Addr: "fd00::2/64"}}},
	}
	counters := func(eth, wg uint64) []net.IOCountersStat {
		return []net.IOCountersStat{{Name: "lo", BytesRecv: 99 * eth}, {Name: "veth1", BytesSent: 99 * eth},
			{Name: "eth0", BytesRecv: eth, BytesSent: 2 * eth}, {Name: "wg0", BytesRecv: wg, BytesSent: wg}}
	}
	var m trafficMeter
	start := time.Now()
	if rx, tx := m.since(start, counters(1000, 500), interfaces); rx != nil || tx != nil {
		t.Errorf("the first time: %v, %v", rx, tx)
	}
	if rx, tx := m.since(start.Add(10*time.Second), counters(2000, 600), interfaces); *rx != 110 || *tx != 210 {
		t.Errorf("rates are %v and %v; want 110 and 210", *rx, *tx)
	}
	if rx, tx := m.since(start.Add(20*time.Second), counters(50, 700), interfaces); *rx != 10 || *tx != 10 {
		t.Errorf("rates after a counter began anew are %v and %v; want 10 and 10", *rx, *tx)
	}
}

func TestRealFileSystems(t *testing.T) {
	mount := func(device, point, fsType string, opts ...string) disk.PartitionStat {
		return disk.PartitionStat{Device: device, Mountpoint: point, Fstype: fsType, Opts: opts}
	}
	for _, test := range []struct {
		name   string
		mounts []disk.PartitionStat
		want   string
	}{
		{"host", []disk.PartitionStat{
			mount("/dev/sda1", "/", "ext4"), mount("proc", "/proc", "proc"), mount("tmpfs", "/run", "tmpfs"),
			mount("/dev/sda1", "/var/snap/x", "ext4", "bind"), mount("/dev/loop0", "/snap/core", "squashfs"),
			mount("srv:/home", "/home", "nfs4"), mount("overlay", "/var/lib/docker/overlay2/1/merged", "overlay"),
			mount("/dev/sdb1", "/srv/backup", "xfs"), mount("/dev/sdb1", "/mnt", "xfs"),
		}, "/ /home /mnt"},
		{"container", []disk.PartitionStat{
			mount("overlay", "/", "overlay"), mount("/dev/vda1", "/etc/hosts", "ext4", "bind"),
			mount("/dev/vda1", "/srv/worker", "ext4", "bind"), mount("/dev/vda1", "/etc/hostname", "ext4", "bind"),
		}, "/ /srv/worker"},
		{"btrfs", []disk.PartitionStat{
			mount("/dev/sda2", "/home", "btrfs", "bind"), mount("/dev/sda2", "/", "btrfs", "bind"),
		}, "/"},
		{"macOS", []disk.PartitionStat{
			mount("/dev/disk3s1s1", "/", "apfs"), mount("devfs", "/dev", "devfs"), mount("/dev/disk3s5", "/System/Volumes/Data", "apfs"),
			mount("/dev/disk5s1", "/Volumes/Backup", "apfs"),
		}, "/ /Volumes/Backup"},
		{"Windows", []disk.PartitionStat{mount("D:", "D:", "NTFS"), mount("C:", "C:", "NTFS"), mount("E:", "E:", "CDFS")}, "C: D:"},
		{"without devices", []disk.PartitionStat{mount("none", "/a", "9p"), mount("", "/b", "virtiofs")}, "/a /b"},
	} {
		var got []string
		for _, m := range realFileSystems(test.mounts, "/srv/worker/data") {
			got = append(got, m.Mountpoint)
		}
		if strings.Join(got, " ") != test.want {
			t.Errorf("%s: %q; want %q", test.name, got, test.want)
		}
	}
	for _, test := range []struct {
		path, folder string
		want         bool
	}{{"/a/b", "/a", true}, {"/a/b", "/", true}, {"/a", "/a", true}, {"/ab", "/a", false}, {"/a", "/a/b", false}} {
		if got := isWithin(test.path, test.folder); got != test.want {
			t.Errorf("isWithin(%q, %q) = %v", test.path, test.folder, got)
		}
	}
}

// A reportSink is a broker that only publishes.
type reportSink struct {
	Broker
	failing  atomic.Bool
	attempts atomic.Int32
	messages chan Message
}

func (s *reportSink) Publish(_ context.Context, messages ...Message) (int, error) {
	s.attempts.Add(1)
	if s.failing.Load() {
		return 0, errors.New("not just now")
	}
	for _, m := range messages {
		s.messages <- m
	}
	return len(messages), nil
}

// subjects waits for so many messages.
func (s *reportSink) subjects(t *testing.T, n int) []string {
	t.Helper()
	var got []string
	for range n {
		select {
		case m := <-s.messages:
			got = append(got, m.Subject)
		case <-time.After(10 * time.Second):
			t.Fatalf("only %q within 10 s", got)
		}
	}
	slices.Sort(got)
	return got
}

// A broker has its first report when it is connected, however late, and once for all.
func TestHardwareFollowsTheConnection(t *testing.T) {
	all := []string{"listen_cpu_information", "listen_disk_information", "listen_host_information", "listen_mem_information",
		"listen_net_information"}
	if runtime.GOOS == "darwin" {
		all = all[1:] // gopsutil cannot tell without cgo
	}
	newSink := func() *reportSink { return &reportSink{messages: make(chan Message, 100)} }
	var current atomic.Pointer[reportSink]
	connected := make(chan struct{}, 1)
	h, log := testHardware(t, func() (Broker, string) {
		if s := current.Load(); s != nil {
			return s, "p1"
		}
		return nil, ""
	}, connected)
	ctx, end := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); h.run(ctx) }() // ends at end
	waitFor(t, 10*time.Second, func() string {
		if n := len(h.view().History); n != 1 {
			return fmt.Sprintf("%d samples", n)
		}
		return ""
	})
	first := newSink()
	first.failing.Store(true)
	current.Store(first)
	signalOnce(connected)
	waitFor(t, 10*time.Second, func() string {
		if n := first.attempts.Load(); n == 0 {
			return "nothing was tried"
		}
		return ""
	})
	first.failing.Store(false)
	if got := first.subjects(t, len(all)); !slices.Equal(got, all) {
		t.Errorf("first reports are %q, log %q", got, log.lines)
	}
	signalOnce(connected) // a reconnect
	second := newSink()
	current.Store(second)
	signalOnce(connected)
	if got := second.subjects(t, len(all)); !slices.Equal(got, all) {
		t.Errorf("the other broker's reports are %q", got)
	}
	end()
	<-ended
	if len(first.messages) != 0 || len(second.messages) != 0 {
		t.Errorf("more was sent: %d and %d messages", len(first.messages), len(second.messages))
	}
}

func TestAPIHardware(t *testing.T) {
	a := startAPI(t, "127.0.0.1:0", apiConfig{})
	if got := a.call("GET", "/hardware", ""); got.status != http.StatusServiceUnavailable {
		t.Errorf("before the first worker: %+v", got)
	}
	h, _ := testHardware(t, nil, nil)
	a.api.serveHardware(h)
	if got := a.call("GET", "/hardware", ""); got.status != 200 || !strings.Contains(got.body, `"history":[]`) {
		t.Errorf("without a first sample: %+v", got)
	}

	// Whoever asks before the first sample gets that.
	h, _ = testHardware(t, func() (Broker, string) { return nil, "" }, nil)
	a.api.serveHardware(h)
	answer := make(chan string, 1)
	go func() { answer <- a.call("GET", "/hardware", "").body }() // ends with the answer
	ctx, end := context.WithCancel(t.Context())
	ended := make(chan struct{})
	time.AfterFunc(hardwareAnswer/4, func() {
		defer close(ended)
		h.run(ctx)
	})
	if body := <-answer; !strings.Contains(body, `"hostname"`) {
		t.Errorf("asked before the first sample: %s", body)
	}
	end()
	<-ended
}

func BenchmarkHardwareSample(b *testing.B) {
	h := newHardware(filepath.Dir("."), func() (Broker, string) { return nil, "" }, nil, slog.New(slog.DiscardHandler))
	h.readHost(b.Context())
	for b.Loop() {
		h.sample(b.Context())
		h.remember()
	}
}

func BenchmarkHardwareHost(b *testing.B) {
	h := newHardware(filepath.Dir("."), func() (Broker, string) { return nil, "" }, nil, slog.New(slog.DiscardHandler))
	for b.Loop() {
		h.readHost(b.Context())
	}
}
