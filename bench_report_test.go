//go:build linux

package main

// bench_report_test.go keeps the figures of the benchmark and puts them into tables: medians over the rounds, with the
// least and the most in brackets. It says which of the bounds that were set beforehand have been reached.

import (
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"unicode/utf8"
)

const (
	benchRaw = "bare loop in Go"
	benchC   = "posix_spawn in C"
)

// A benchReport is all that was measured.
type benchReport struct {
	b        *bench
	notes    []string
	perSlots map[int]*benchSheet
	latency  *benchSheet
	memory   *benchSheet
	journal  *benchSheet
	rest     *benchSheet
}

// A benchSheet is one table.
type benchSheet struct {
	title   string
	columns []benchColumn
	rows    []string
	values  map[[2]string][]float64 // by row and column, one a round
}

// A benchColumn has a key, a heading and the digits after the point.
type benchColumn struct {
	key, heading string
	digits       int
	plain        bool // without its spread
}

func newBenchReport(b *bench) *benchReport {
	r := &benchReport{b: b, perSlots: map[int]*benchSheet{}}
	for _, n := range benchConcurrencies {
		r.perSlots[n] = newSheet(fmt.Sprintf("`true`, %s at once", thousands(float64(n))),
			benchColumn{"tasks/s", "tasks/s", 0, false}, benchColumn{"ratio", "of the bare loop", 2, false},
			benchColumn{"CPU own", "its own CPU, ms/task", 3, true}, benchColumn{"CPU all", "with the command's", 3, true},
			benchColumn{"CPU ratio", "of the bare loop's", 2, false}, benchColumn{"lost", "lost", 0, true})
	}
	r.latency = newSheet("One task at a time, ms",
		benchColumn{"trip p50", "broker there and back, p50", 2, false}, benchColumn{"started p50", "command started, p50", 2, false},
		benchColumn{"started p99", "p99", 2, true}, benchColumn{"ended p50", "end heard of, p50", 2, false},
		benchColumn{"ended p99", "p99", 2, true}, benchColumn{"beyond", "beyond command and broker", 2, false})
	r.memory = newSheet("Memory, MB (proportional set size of all its processes)",
		benchColumn{"idle 1", "idle, 1 slot", 1, false}, benchColumn{"idle 8", "idle, 8 slots", 1, false}, benchColumn{"loaded", "running 8 at once", 1, false},
		benchColumn{"waiting", thousands(float64(b.waiting)) + " tasks of 1 KiB waiting", 1, false})
	r.journal = newSheet("The journal, for each task from its acceptance to its end, 8 at once",
		benchColumn{"syncs", "syncs", 2, false}, benchColumn{"entries", "entries", 2, true}, benchColumn{"bytes", "bytes", 0, false})
	r.rest = newSheet("The rest",
		benchColumn{"beside", "beside", 2, false}, benchColumn{"job_item", "job_item", 2, false}, benchColumn{"ratio", "ratio", 2, false})
	return r
}

func newSheet(title string, columns ...benchColumn) *benchSheet {
	return &benchSheet{title: title, columns: columns, values: map[[2]string][]float64{}}
}

// sheets are the tables in the order of their appearance.
func (r *benchReport) sheets() (all []*benchSheet) {
	for _, n := range benchConcurrencies {
		all = append(all, r.perSlots[n])
	}
	return append(all, r.latency, r.memory, r.journal, r.rest)
}

func (r *benchReport) throughput(concurrency int) *benchSheet { return r.perSlots[concurrency] }

// missing notes what could not be measured here.
func (r *benchReport) missing(what string) { r.notes = append(r.notes, what) }

func (s *benchSheet) add(row, column string, value float64) {
	if !slices.Contains(s.rows, row) {
		s.rows = append(s.rows, row)
	}
	key := [2]string{row, column}
	s.values[key] = append(s.values[key], value)
}

// pair is what job_item does beside something else, more being better, and the ratio.
func (s *benchSheet) pair(row string, beside, ours float64) {
	s.add(row, "beside", beside)
	s.add(row, "job_item", ours)
	s.add(row, "ratio", ours/beside)
}

// single is what job_item does alone.
func (s *benchSheet) single(row string, value float64) { s.add(row, "job_item", value) }

// of is the median of a cell; NaN if nothing was measured.
func (s *benchSheet) of(row, column string) float64 {
	if values := s.values[[2]string{row, column}]; len(values) > 0 {
		return median(values)
	}
	return math.NaN()
}

// cell is a cell as it is shown.
func (s *benchSheet) cell(row string, c benchColumn) string {
	values := s.values[[2]string{row, c.key}]
	if len(values) == 0 {
		return ""
	}
	show := func(v float64) string {
		if c.digits == 0 || v >= 1000 {
			return thousands(v)
		}
		return strconv.FormatFloat(v, 'f', c.digits, 64)
	}
	text := show(median(values))
	if least, most := show(slices.Min(values)), show(slices.Max(values)); !c.plain && least != most {
		text += " (" + least + "–" + most + ")"
	}
	return text
}

// thousands is a whole number with its thousands apart.
func thousands(v float64) string {
	text := strconv.FormatFloat(v, 'f', 0, 64)
	for i := len(text) - 3; i > 0 && text[i-1] != '-'; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}

// text is the table in Markdown, its columns aligned for those who read it as it is.
func (s *benchSheet) text() string {
	lines := [][]string{{""}}
	for _, c := range s.columns {
		lines[0] = append(lines[0], c.heading)
	}
	for _, row := range s.rows {
		line := []string{row}
		for _, c := range s.columns {
			line = append(line, s.cell(row, c))
		}
		lines = append(lines, line)
	}
	widths := make([]int, len(lines[0]))
	for _, line := range lines {
		for i, cell := range line {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	var out strings.Builder
	fmt.Fprintf(&out, "## %s\n\n", s.title)
	write := func(line []string) {
		for i, cell := range line {
			fmt.Fprintf(&out, "| %s%s ", cell, strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell)))
		}
		out.WriteString("|\n")
	}
	write(lines[0])
	for _, width := range widths {
		out.WriteString("|" + strings.Repeat("-", width+2))
	}
	out.WriteString("|\n")
	for _, line := range lines[1:] {
		write(line)
	}
	return out.String()
}

// write prints the report, and publishes it in a folder if one is named.
func (r *benchReport) write(out io.Writer, folder string) error {
	var text strings.Builder
	fmt.Fprintf(&text, "# job_item, measured\n\n%s Rounds: %d. Tasks in each burst: %s; one at a time: %s.\n\n",
		machine(r.b.binary), r.b.rounds, thousands(float64(r.b.tasks)), thousands(float64(r.b.idleTasks)))
	text.WriteString(benchMethod + "\n")
	for _, note := range r.notes {
		text.WriteString("\n" + note + ".\n")
	}
	for _, sheet := range r.sheets() {
		if len(sheet.rows) > 0 {
			text.WriteString("\n" + sheet.text())
		}
	}
	text.WriteString("\n## Bounds\n\nSet beforehand, of the medians above.\n\n")
	for _, v := range r.judge() {
		text.WriteString("- " + v.String() + "\n")
	}
	if _, err := io.WriteString(out, text.String()); err != nil || folder == "" {
		return err
	}
	if err := os.WriteFile(filepath.Join(folder, "docs", "bench.md"), []byte(text.String()), 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(folder, "bench.svg"), []byte(r.chart()), 0o644)
}

const benchMethod = `Each round has everybody take turns, and each turn begins with the bare loop: the ratio is of what both did one after the
other; medians over the rounds, with the least and the most in brackets. The bare loop runs the same command at the same
concurrency with os/exec: a process group of its own, captured output, a data file of 1 KiB. The loop in C does so with
posix_spawn.

job_item is the binary of build.sh with its usual settings. Its tasks wait before the clock starts: all slots are held by
commands that read from a pipe; on the embedded queue, plain NATS and plain Redis the tasks then wait in the worker's
journal, on the others at the broker; then the pipe is filled. The clock stops when the manager has heard the last
_finish, or, on the embedded queue, when /health counts it. Broker, manager and worker share the processors. Redis keeps
no file where it is plain and syncs it every second where it is durable; RabbitMQ and NATS do as they do by default.

job_item lends the same few data files out again and again, while the bare loop makes and deletes one for each command:
where the file system is slow at that, it is much of the difference between them. On some machines the cost of starting
a process changes within minutes; then a ratio says more than a rate, and several rounds more than one.

CPU is user and system time of all processes of the program from /proc, and of the commands that they have waited for;
where there are so many processes that the system's steps of 10 ms would blur it, there is none. A command has started
when date, as the command, says so. The broker's way there and back is that of a task that something answers
which runs nothing, written with the broker's own client library; on the embedded queue it is a call of /health.

The peers run the same command at the same concurrency, with the settings that suit them best. They write no data file,
keep no record, and note nothing on disk. nats reply runs one command at a time: there are as many processes as there are
slots, each with its even share of the requests, which are published in one go. webhook has as many clients as there are
slots, each with its connection kept, and answers at the end of the command. Celery has prefork processes on a Redis
without a file, results ignored, 64 tasks prefetched for each process, fair scheduling, no gossip, mingle and heartbeat;
its tasks wait as job_item's do, and tell their end through a pipe.`

// machine says what was measured, and where.
func machine(binary string) string {
	var uname syscall.Utsname
	syscall.Uname(&uname)
	var release []byte
	for _, c := range uname.Release {
		if c == 0 {
			break
		}
		release = append(release, byte(c))
	}
	processor := "processor unknown"
	if info, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		if _, rest, ok := strings.Cut(string(info), "model name"); ok {
			name, _, _ := strings.Cut(rest, "\n")
			processor = strings.TrimLeft(name, "\t: ")
		}
	}
	text := fmt.Sprintf("%d processors (%s), Linux %s, %s.", runtime.NumCPU(), processor, release, runtime.Version())
	if out, err := exec.Command(binary, "version").Output(); err == nil {
		text += " " + strings.TrimSpace(string(out)) + "."
	}
	return text
}
