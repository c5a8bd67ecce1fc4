package main

// process_linux.go reads /proc.

import (
	"bytes"
	"io"
	"os"
	"strconv"
	"strings"
)

// maxEnvironBytes bounds what is read of a process's environment; the kernel allows 6 MiB with the arguments.
const maxEnvironBytes = 8 << 20

// bootID is different after each boot.
func bootID() string {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(id))
}

// processStart is in clock ticks since boot; "" if there is no such process.
func processStart(pid int) string {
	p, _ := readProcess(pid)
	return p.start
}

// A procStat is what /proc/PID/stat says of a process. See proc(5).
type procStat struct {
	pid, parent, pgrp int
	name              string
	state             byte
	start             string
}

// dead reports a zombie.
func (p procStat) dead() bool { return p.state == 'Z' || p.state == 'X' }

func readProcess(pid int) (p procStat, ok bool) {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return p, false
	}
	// The name is in parentheses and may hold any others.
	begin, end := bytes.IndexByte(stat, '('), bytes.LastIndexByte(stat, ')')
	if begin < 0 || end < begin {
		return p, false
	}
	fields := strings.Fields(string(stat[end+1:])) // from the third on
	if len(fields) < 20 {
		return p, false
	}
	p = procStat{pid: pid, name: string(stat[begin+1 : end]), state: fields[0][0], start: fields[19]}
	p.parent, _ = strconv.Atoi(fields[1])
	p.pgrp, _ = strconv.Atoi(fields[2])
	return p, true
}

// eachProcess calls visit for every process there is, and reports whether that could be found out.
func eachProcess(visit func(procStat)) bool {
	proc, err := os.Open("/proc")
	if err != nil {
		return false
	}
	defer proc.Close()
	names, err := proc.Readdirnames(-1)
	if err != nil {
		return false
	}
	found := false
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		if p, ok := readProcess(pid); ok {
			found = true
			visit(p)
		}
	}
	return found
}

// strayProcesses finds the living processes that carry the id of one of the tasks, in one look at /proc.
func strayProcesses(tasks []staleTask, boot string) (strays []staleProcess) {
	byID := map[string]staleTask{}
	for _, t := range tasks {
		byID["JOB_ITEM_TASK_ID="+t.taskID] = t
	}
	all := map[int]procStat{}
	eachProcess(func(p procStat) { all[p.pid] = p })
	for pid := os.Getpid(); pid > 0; { // neither ourselves nor those we descend from
		p := all[pid]
		delete(all, pid)
		pid = p.parent
	}
	var environ bytes.Buffer
	for _, p := range all {
		if !p.dead() && carriesTask(p.pid, &environ, byID) {
			strays = append(strays, staleProcess{processIdentity{p.pid, p.start, boot}, false})
		}
	}
	return strays
}

// carriesTask reports whether a process was started in the environment of one of the tasks (by "JOB_ITEM_TASK_ID=…").
// The kernel shows it only of processes that we could end, too.
func carriesTask(pid int, environ *bytes.Buffer, byID map[string]staleTask) bool {
	file, err := os.Open("/proc/" + strconv.Itoa(pid) + "/environ")
	if err != nil {
		return false
	}
	defer file.Close()
	environ.Reset()
	if _, err := environ.ReadFrom(io.LimitReader(file, maxEnvironBytes)); err != nil {
		return false
	}
	entries := environ.Bytes()
	for rest := entries; len(rest) > 0; {
		var entry []byte
		entry, rest, _ = bytes.Cut(rest, []byte{0})
		if t, ok := byID[string(entry)]; ok {
			return holdsEntries(entries, t.env)
		}
	}
	return false
}

func holdsEntries(environ []byte, wanted []string) bool {
	for _, entry := range wanted {
		found := bytes.HasPrefix(environ, []byte(entry+"\x00")) || bytes.Contains(environ, []byte("\x00"+entry+"\x00"))
		if !found {
			return false
		}
	}
	return true
}
