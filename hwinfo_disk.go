package main

// hwinfo_disk.go finds the file systems that hold data and asks each how full it is, all at once, since one of a file
// server that is gone never answers.

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/shirou/gopsutil/v3/common"
	"github.com/shirou/gopsutil/v3/disk"
)

// dataDisk is the part of the history: the file system of data_dir.
const dataDisk = "disk of data_dir"

// errNoFolder is about a single file that a file system is mounted on, as a container's /etc/hosts.
var errNoFolder = errors.New("not a folder")

// ownPartitions lists what is mounted for this process, which need not be what the first process of the host sees.
func ownPartitions(ctx context.Context) ([]disk.PartitionStat, error) {
	if runtime.GOOS == "linux" {
		ctx = context.WithValue(ctx, common.EnvKey, common.EnvMap{"HOST_PROC_MOUNTINFO": "/proc/self/mountinfo"})
	}
	found, err := disk.PartitionsWithContext(ctx, true)
	if len(found) > 0 {
		err = nil // Windows warns of drives that it cannot read
	}
	return found, err
}

func folderUsage(ctx context.Context, path string) (*disk.UsageStat, error) {
	if info, err := os.Stat(path); err != nil {
		return nil, err
	} else if !info.IsDir() {
		return nil, errNoFolder
	}
	return disk.UsageWithContext(ctx, path)
}

// readDisks gives every file system that answers, and how full the one of data_dir is, in percent.
func (h *hardware) readDisks(ctx context.Context) (disks []diskView, dataPercent *float64) {
	listed, _ := read(ctx, h, "file systems", h.partitions)
	mounted := realFileSystems(listed, h.dataDir)
	type asked struct {
		mount   disk.PartitionStat
		inquiry *inquiry
		answers <-chan answer[*disk.UsageStat]
	}
	limited, stop := context.WithTimeout(ctx, h.patience)
	defer stop()
	ask := func(q *inquiry, mount disk.PartitionStat) asked {
		return asked{mount, q, begin(limited, q, func(ctx context.Context) (*disk.UsageStat, error) {
			return h.usage(ctx, mount.Mountpoint)
		})}
	}
	known := h.disks
	h.disks = map[string]*inquiry{}
	var all []asked
	for _, mount := range mounted {
		q := known[mount.Mountpoint]
		if q == nil {
			q = &inquiry{part: "disk " + mount.Mountpoint}
		}
		h.disks[mount.Mountpoint] = q
		all = append(all, ask(q, mount))
	}
	data := ask(h.inquiry(dataDisk), disk.PartitionStat{Mountpoint: h.dataDir})
	for _, a := range append(all, data) {
		usage, err := await(limited, a.answers)
		switch {
		case err == nil && usage.Total == 0 || errors.Is(err, errNoFolder) || errors.Is(err, fs.ErrNotExist):
			continue // it holds no data, or is gone again
		case err != nil:
			if ctx.Err() == nil {
				h.leaveOut(a.inquiry, err)
			}
			continue
		}
		view := diskView{
			Path: a.mount.Mountpoint, FSType: a.mount.Fstype, Total: usage.Total, Free: usage.Free, Used: usage.Used,
			UsedPercent: oneDecimal(usage.UsedPercent),
		}
		if a.inquiry == data.inquiry {
			dataPercent = &view.UsedPercent
			if len(disks) > 0 {
				continue
			}
			view.FSType = usage.Fstype // where the system lists none, there is at least this one
		}
		disks = append(disks, view)
	}
	return disks, dataPercent
}

// isPseudo is about file systems that hold no data of their own, or none that changes. Many more are empty, and left out
// for that; these need not, or must not, be asked.
func isPseudo(fsType string) bool {
	switch strings.ToLower(fsType) {
	case "autofs", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devfs", "devpts", "devtmpfs", "efivarfs",
		"fusectl", "hugetlbfs", "mqueue", "nfsd", "nsfs", "proc", "pstore", "ramfs", "rpc_pipefs", "securityfs", "selinuxfs",
		"sysfs", "tmpfs", "tracefs",
		"cd9660", "cdfs", "erofs", "iso9660", "squashfs", "udf",
		"fuse.gvfsd-fuse", "fuse.lxcfs", "fuse.portal", "fuse.snapfuse":
		return true
	}
	return false
}

// realFileSystems gives each file system once, at the place that says most: where its root is, where it holds dataDir, or
// the shortest path.
func realFileSystems(mounts []disk.PartitionStat, dataDir string) []disk.PartitionStat {
	best := map[string]disk.PartitionStat{} // by device
	for _, m := range mounts {
		switch {
		case isPseudo(m.Fstype):
			continue
		case m.Fstype == "overlay" && m.Mountpoint != "/": // a container's, seen from its host
			continue
		case strings.HasPrefix(m.Mountpoint, "/System/Volumes/"): // macOS: parts of the one that / shows
			continue
		}
		device := m.Device
		if device == "" || device == "none" {
			device = m.Mountpoint
		}
		if other, seen := best[device]; !seen || saysMore(m, other, dataDir) {
			best[device] = m
		}
	}
	var found []disk.PartitionStat
	for _, m := range best {
		found = append(found, m)
	}
	slices.SortFunc(found, func(a, b disk.PartitionStat) int { return strings.Compare(a.Mountpoint, b.Mountpoint) })
	return found
}

func saysMore(a, b disk.PartitionStat, dataDir string) bool {
	rank := func(m disk.PartitionStat) int {
		switch {
		case !slices.Contains(m.Opts, "bind"):
			return 0
		case isWithin(dataDir, m.Mountpoint):
			return 1
		}
		return 2
	}
	if x, y := rank(a), rank(b); x != y {
		return x < y
	}
	return len(a.Mountpoint) < len(b.Mountpoint)
}

// isWithin reports whether path is folder or lies in it.
func isWithin(path, folder string) bool {
	path, folder = filepath.ToSlash(path), strings.TrimSuffix(filepath.ToSlash(folder), "/")
	return strings.HasPrefix(path+"/", folder+"/")
}
