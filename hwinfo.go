package main

// hwinfo.go asks the host what it is.

import "github.com/shirou/gopsutil/v3/host"

// hostID is the host's own identity, which {task_id}_who gives; empty where the system has none.
func hostID() string {
	id, err := host.HostID()
	if err != nil {
		return ""
	}
	return id
}
