//go:build unix

package main

// hwinfo_system_test.go looks at the hardware reports of whole workers.

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/shirou/gopsutil/v3/host"
	"github.com/shirou/gopsutil/v3/mem"
	"github.com/shirou/gopsutil/v3/net"
)

// hardware gives the newest report on a subject, "" if there is none.
func (c *collector) hardware(part string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := len(c.events) - 1; i >= 0; i-- {
		if c.events[i].subject == "listen_"+part+"_information" {
			return c.events[i].data
		}
	}
	return ""
}

// awaitHardware waits for a report of each part, those that have a project of this one.
func (c *collector) awaitHardware(t *testing.T, a *agent, project string) {
	t.Helper()
	waitFor(t, 5*time.Second, func() string {
		for _, part := range []string{"host", "cpu", "mem", "net", "disk"} {
			if part == "cpu" && runtime.GOOS == "darwin" {
				continue // gopsutil cannot tell without cgo
			}
			report := c.hardware(part)
			if report == "" || part != "host" && !strings.Contains(report, fmt.Sprintf(`"project_data_uuid":%q`, project)) {
				return "no report of project " + project + " about " + part + ": " + report + "\n" + a.log.String()
			}
		}
		return ""
	})
}

// readFrame checks a report's frame and gives its data.
func (c *collector) readFrame(t *testing.T, part, project string, data any) {
	t.Helper()
	frame := struct {
		HostID   string          `json:"host_id"`
		Data     json.RawMessage `json:"data"`
		Duration string          `json:"time_duration"`
		Project  string          `json:"project_data_uuid"`
	}{}
	text := c.hardware(part)
	decoder := json.NewDecoder(strings.NewReader(text))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&frame); err != nil {
		t.Fatalf("%s report %s: %v", part, text, err)
	}
	if frame.HostID != hostID() || frame.Duration != "one_minute" || frame.Project != project {
		t.Errorf("frame of %s report is %s", part, text)
	}
	if err := json.Unmarshal(frame.Data, data); err != nil {
		t.Errorf("data of %s report %s: %v", part, text, err)
	}
}

func TestHardwareReports(t *testing.T) {
	for _, kind := range brokerKinds {
		if kind.name != "nats" && kind.name != "redis" {
			continue
		}
		t.Run(kind.name, func(t *testing.T) {
			server := kind.start(t)
			events := server.collect(t)
			a := workerOn(t, kind, server, "w1", "jobs: [{event: greet, cmd: 'true'}]\n")
			events.awaitHardware(t, a, "p1")

			var info host.InfoStat
			if err := json.Unmarshal([]byte(events.hardware("host")), &info); err != nil {
				t.Fatal(err)
			}
			name, _ := os.Hostname()
			if info.HostID != hostID() || info.Hostname != name || info.OS != runtime.GOOS || info.Platform == "" ||
				info.KernelVersion == "" || info.KernelArch == "" || info.Uptime == 0 || info.BootTime == 0 || info.Procs < 2 {
				t.Errorf("host is %s", events.hardware("host"))
			}
			var memory mem.VirtualMemoryStat
			events.readFrame(t, "mem", "p1", &memory)
			if memory.Total == 0 || memory.Available == 0 || memory.UsedPercent == 0 {
				t.Errorf("memory is %v", memory)
			}
			var interfaces net.InterfaceStatList
			events.readFrame(t, "net", "p1", &interfaces)
			if len(interfaces) == 0 || interfaces[0].Name == "" {
				t.Errorf("interfaces are %v", interfaces)
			}
			var disks []diskView
			events.readFrame(t, "disk", "p1", &disks)
			if len(disks) == 0 || disks[0].Path == "" || disks[0].FSType == "" || disks[0].Total == 0 || disks[0].Used == 0 {
				t.Errorf("disks are %v", disks)
			}
			if runtime.GOOS != "darwin" {
				var percent []float64
				events.readFrame(t, "cpu", "p1", &percent)
				for _, p := range percent {
					if p < 0 || p > 100 {
						t.Errorf("cpus are %v", percent)
					}
				}
				if len(percent) < runtime.NumCPU() {
					t.Errorf("cpus are %v", percent)
				}
			}

			var view hardwareView
			if code := a.getJSON("/hardware", &view); code != 200 || view.Host == nil || view.Host.HostID != info.HostID ||
				view.Memory == nil || len(view.Disk) != len(disks) || view.Network == nil || len(view.History) == 0 ||
				view.History[0].Disk == nil || view.Load == nil || time.Since(view.SampledAt) > time.Minute {
				t.Errorf("GET /hardware = %d %+v", code, view)
			}

			// Another project, over another connection, hears of the host at once.
			content, err := os.ReadFile(filepath.Join(a.dir, "config.yaml"))
			if err != nil {
				t.Fatal(err)
			}
			events.mu.Lock()
			events.events = nil
			events.mu.Unlock()
			a.write("config.yaml", strings.Replace(string(content), "project_id: p1", "project_id: p2", 1))
			waitFor(t, 20*time.Second, func() string {
				if !strings.Contains(a.log.String(), "broker connection replaced") {
					return "still the connection before:\n" + a.log.String()
				}
				return ""
			})
			events.awaitHardware(t, a, "p2")
		})
	}
}
