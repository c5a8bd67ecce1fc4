//go:build linux

package main

// bench_test.go measures job_item as a user has it beside the least that anybody could do, a bare loop that starts the
// same command at the same concurrency with a process group of its own, captured output and a data file, and beside
// other programs that run commands when told to. ./bench.sh runs it. Machines differ and change: everybody takes turns
// in every round, right after the bare loop, and only what both did then is compared.

import (
	"bufio"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// A bench is one run of the benchmark.
type bench struct {
	binary    string // the job_item under test
	peers     string // folder of the peers' programs
	raw, rawC string // the bare loops; rawC is "" where there is no C compiler
	folder    string // of the bare loops' data files
	rounds    int
	tasks     int // in each burst
	idleTasks int // one at a time
	flood     int // bytes that a task prints, and save copies
	waiting   int // tasks that wait while memory is looked at

	brokers     []benchBroker
	contestants []contestant
	report      *benchReport
}

// A contestant runs commands when it is told to.
type contestant struct {
	name  string
	start func(t *testing.T, concurrency int) benchRunner // skips the test where it is not installed
	ours  bool
}

// A benchRunner is a contestant at work, until the test ends.
type benchRunner interface {
	burst(n int) benchBurst      // runs `true` so often, as fast as it can
	once(id string) benchLatency // runs it once, when nothing else is to be done
	processes() []int            // its own, without the commands
}

// A benchBurst is what running many tasks took, from the moment when the first may begin to when the last has ended.
type benchBurst struct {
	took time.Duration
	use  processorUse
	lost int
}

// A benchLatency is what one task took, from its trigger on. Zero is what the contestant cannot be asked for.
type benchLatency struct {
	trip    time.Duration // a message to the broker and back, without it
	started time.Duration // until the command ran
	ended   time.Duration // until its end was heard of
}

func TestBench(t *testing.T) {
	if os.Getenv("BENCH_BINARY") == "" {
		t.Skip("./bench.sh runs it")
	}
	b := newBench(t)
	b.contend(t)
	for round := range b.rounds {
		for _, concurrency := range benchConcurrencies {
			for _, c := range b.turn(round) {
				b.measure(t, round, fmt.Sprintf("%d at once, %s", concurrency, c.name), func(t *testing.T) { b.throughput(t, c, concurrency) })
			}
		}
		for _, c := range b.turn(round) {
			b.measure(t, round, "idle, "+c.name, func(t *testing.T) { b.idle(t, c) })
		}
		for _, m := range benchRest {
			b.measure(t, round, m.name, func(t *testing.T) { m.run(b, t) })
		}
	}
	b.measure(t, b.rounds-1, "tasks waiting", b.waitingMemory)
	if err := b.report.write(os.Stdout, os.Getenv("BENCH_OUT")); err != nil {
		t.Error(err)
	}
}

var benchConcurrencies = []int{1, 2, 8, 64}

func newBench(t *testing.T) *bench {
	b := &bench{
		binary: os.Getenv("BENCH_BINARY"), peers: os.Getenv("BENCH_PEERS"), folder: t.TempDir(),
		rounds: envNumber(t, "ROUNDS", 5), tasks: envNumber(t, "TASKS", 2000), idleTasks: envNumber(t, "IDLE_TASKS", 500),
		flood: envNumber(t, "FLOOD", 1_000_000_000), waiting: envNumber(t, "WAITING", 100_000),
	}
	b.raw = filepath.Join(b.folder, "raw")
	build := exec.Command("go", "build", "-o", b.raw, "testdata/bench/raw.go")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the bare loop: %v\n%s", err, out)
	}
	b.report = newBenchReport(b)
	return b
}

// contend starts the brokers and lists who takes turns.
func (b *bench) contend(t *testing.T) {
	for _, server := range benchServers {
		if server.installed() {
			b.brokers = append(b.brokers, server.start(t))
		} else if note := server.program + " is not installed, and what needs it left out"; !slices.Contains(b.report.notes, note) {
			b.report.missing(note)
		}
	}
	if gcc, err := exec.LookPath("gcc"); err != nil {
		b.report.missing("no gcc: the loop in C is left out")
	} else {
		b.rawC = filepath.Join(b.folder, "raw-c")
		if out, err := exec.Command(gcc, "-O2", "-pthread", "-o", b.rawC, "testdata/bench/raw.c").CombinedOutput(); err != nil {
			t.Fatalf("build the bare loop in C: %v\n%s", err, out)
		}
		b.contestants = append(b.contestants, contestant{name: benchC, start: b.startRawC})
	}
	b.contestants = append(b.contestants, b.workerOn(nil))
	for i := range b.brokers {
		b.contestants = append(b.contestants, b.workerOn(&b.brokers[i]))
	}
	b.contestants = append(b.contestants, b.benchPeers(t)...)
}

// envNumber reads a number from the environment.
func envNumber(t *testing.T, name string, standard int) int {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return standard
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("%s=%q is no count", name, text)
	}
	return n
}

// turn is the contestants in the order of a round: another one begins each time.
func (b *bench) turn(round int) []contestant {
	first := round % len(b.contestants)
	return slices.Concat(b.contestants[first:], b.contestants[:first])
}

// measure runs one measurement, whose failure does not end the others.
func (b *bench) measure(t *testing.T, round int, name string, run func(t *testing.T)) {
	began := time.Now()
	ok := t.Run(fmt.Sprintf("round %d, %s", round+1, name), run)
	state := ""
	if !ok {
		state = " FAILED"
	}
	fmt.Fprintf(os.Stderr, "round %d of %d: %s, %.1f s%s\n", round+1, b.rounds, name, time.Since(began).Seconds(), state)
}

// throughput has a contestant run its tasks so many at once, after the bare loop.
func (b *bench) throughput(t *testing.T, c contestant, concurrency int) {
	runner := c.start(t, concurrency)
	if own := runner.processes(); concurrency == 1 && len(own) > 0 {
		b.report.memory.add(c.name, "idle 1", leastMemory(t, own))
	}
	if warm := runner.burst(max(b.tasks/20, concurrency)); warm.lost > 0 {
		t.Errorf("%d tasks were lost", warm.lost)
	}
	raw := b.rawLoop(t, b.tasks, concurrency, "true")
	got := runner.burst(b.tasks)
	if got.lost > 0 {
		t.Errorf("%d of %d tasks were lost", got.lost, b.tasks)
	}
	sheet := b.report.throughput(concurrency)
	for _, row := range []struct {
		name string
		benchBurst
	}{{benchRaw, raw}, {c.name, got}} {
		sheet.add(row.name, "tasks/s", float64(b.tasks)/row.took.Seconds())
		sheet.add(row.name, "lost", float64(row.lost))
		if row.use.known(len(runner.processes())) {
			each := func(d time.Duration) float64 { return d.Seconds() * 1000 / float64(b.tasks) }
			sheet.add(row.name, "CPU own", each(row.use.own))
			sheet.add(row.name, "CPU all", each(row.use.all()))
		}
	}
	sheet.add(c.name, "ratio", raw.took.Seconds()/got.took.Seconds())
	if got.use.known(len(runner.processes())) {
		sheet.add(c.name, "CPU ratio", got.use.all().Seconds()/raw.use.all().Seconds())
	}
}

// idle looks at a contestant that has nothing to do, and then triggers one task at a time.
func (b *bench) idle(t *testing.T, c contestant) {
	const concurrency = 8
	runner := c.start(t, concurrency)
	own := runner.processes()
	if len(own) == 0 {
		return // it cannot be triggered
	}
	b.report.memory.add(c.name, "idle 8", leastMemory(t, own))
	raw := b.serveRaw(t, "true")
	var bare, trips, started, ended []float64
	add := func(list *[]float64, d time.Duration) {
		if d > 0 {
			*list = append(*list, d.Seconds()*1000)
		}
	}
	for i := range b.idleTasks {
		began, end, _ := raw.once(t)
		add(&bare, end.Sub(began))
		got := runner.once(fmt.Sprintf("idle-%d-%d", time.Now().UnixNano(), i))
		add(&trips, got.trip)
		add(&started, got.started)
		add(&ended, got.ended)
	}
	sheet := b.report.latency
	sheet.add(benchRaw, "ended p50", median(bare))
	sheet.add(benchRaw, "ended p99", quantile(bare, 0.99))
	sheet.add(c.name, "ended p50", median(ended))
	sheet.add(c.name, "ended p99", quantile(ended, 0.99))
	if len(started) > 0 {
		sheet.add(c.name, "trip p50", median(trips))
		sheet.add(c.name, "started p50", median(started))
		sheet.add(c.name, "started p99", quantile(started, 0.99))
		sheet.add(c.name, "beyond", median(ended)-median(bare)-median(trips))
	}
	if c.name == benchLocal { // once a round is enough
		date := b.serveRaw(t, "date", "+%s.%N")
		var dates []float64
		for range b.idleTasks {
			began, _, output := date.once(t)
			add(&dates, dateIn(t, output).Sub(began))
		}
		sheet.add(benchRaw, "started p50", median(dates))
		sheet.add(benchRaw, "started p99", quantile(dates, 0.99))
	}
}

// rawLoop runs the bare loop.
func (b *bench) rawLoop(t *testing.T, n, concurrency int, command ...string) benchBurst {
	t.Helper()
	return runRaw(t, b.raw, append([]string{
		"-tasks", strconv.Itoa(n), "-at-once", strconv.Itoa(concurrency), "-folder", b.folder,
		"-data", strconv.Itoa(len(benchData)), "--",
	}, command...)...)
}

// runRaw runs a bare loop and reads what it says of itself.
func runRaw(t *testing.T, program string, args ...string) benchBurst {
	t.Helper()
	out, err := exec.Command(program, args...).Output()
	if err != nil {
		t.Fatalf("bare loop: %v", err)
	}
	var took, own, commands float64
	if _, err := fmt.Sscan(string(out), &took, &own, &commands); err != nil {
		t.Fatalf("bare loop says %q: %v", out, err)
	}
	return benchBurst{seconds(took), processorUse{seconds(own), seconds(commands)}, 0}
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// rawCRunner is the bare loop in C.
type rawCRunner struct {
	b           *bench
	t           *testing.T
	concurrency int
}

func (b *bench) startRawC(t *testing.T, concurrency int) benchRunner {
	return &rawCRunner{b, t, concurrency}
}

func (r *rawCRunner) burst(n int) benchBurst {
	return runRaw(r.t, r.b.rawC, strconv.Itoa(n), strconv.Itoa(r.concurrency), strconv.Itoa(len(benchData)), r.b.folder, "true")
}

func (r *rawCRunner) once(string) benchLatency { return benchLatency{} }
func (r *rawCRunner) processes() []int         { return nil }

// A rawServer is the bare loop that waits for its turns.
type rawServer struct {
	in  io.Writer
	out *bufio.Reader
}

func (b *bench) serveRaw(t *testing.T, command ...string) *rawServer {
	t.Helper()
	cmd := exec.Command(b.raw, append([]string{"-serve", "-folder", b.folder, "-data", strconv.Itoa(len(benchData)), "--"}, command...)...)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); cmd.Wait() })
	return &rawServer{in, bufio.NewReader(out)}
}

// once has the command run once.
func (s *rawServer) once(t *testing.T) (began, ended time.Time, output string) {
	t.Helper()
	io.WriteString(s.in, "\n")
	line, err := s.out.ReadString('\n')
	var from, to int64
	if err == nil {
		_, err = fmt.Sscan(line, &from, &to)
	}
	if err != nil {
		t.Fatalf("bare loop says %q: %v", line, err)
	}
	words := strings.Fields(line)
	return time.Unix(0, from), time.Unix(0, to), strings.Join(words[2:], " ")
}

// dateIn reads what `date +%s.%N` has printed.
func dateIn(t testing.TB, text string) time.Time {
	t.Helper()
	var s, ns int64
	if _, err := fmt.Sscanf(text, "%d.%d", &s, &ns); err != nil {
		t.Fatalf("date printed %q", text)
	}
	return time.Unix(s, ns)
}

// processorUse is CPU time: of processes themselves, and of the commands that they have waited for.
type processorUse struct{ own, commands time.Duration }

func (u processorUse) all() time.Duration { return u.own + u.commands }

// known reports whether the steps in which the system tells the time of so many processes leave a figure.
func (u processorUse) known(processes int) bool {
	return u.all() > 10*time.Duration(processes)*processorTick
}

func (u processorUse) since(before processorUse) processorUse {
	return processorUse{u.own - before.own, u.commands - before.commands}
}

const processorTick = time.Second / 100 // USER_HZ

// usedBy sums over processes.
func usedBy(t testing.TB, pids []int) (sum processorUse) {
	t.Helper()
	for _, pid := range pids {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			t.Fatal(err)
		}
		fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:])) // from the third on: proc(5)
		number := func(i int) time.Duration {
			n, _ := strconv.ParseInt(fields[i-3], 10, 64)
			return time.Duration(n) * processorTick
		}
		sum.own += number(14) + number(15)
		sum.commands += number(16) + number(17)
	}
	return sum
}

// memoryOfAll is the proportional set size of processes, in MB.
func memoryOfAll(pids []int) (megabytes float64, err error) {
	for _, pid := range pids {
		h, err := holdingsOf(pid)
		if err != nil {
			return 0, err
		}
		megabytes += float64(h.memory) / 1e6
	}
	return megabytes, nil
}

// leastMemory is the least that is seen within a second and a half, and leastWithin within some other while: what is not
// needed any more is let go with a delay.
func leastMemory(t testing.TB, pids []int) float64 {
	t.Helper()
	return leastWithin(t, 1500*time.Millisecond, pids)
}

// leastWithin looks at it again and again for so long: what is given back is given back by and by.
func leastWithin(t testing.TB, limit time.Duration, pids []int) float64 {
	t.Helper()
	least := math.Inf(1)
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		now, err := memoryOfAll(pids)
		if err != nil {
			t.Fatal(err)
		}
		least = min(least, now)
	}
	return least
}

func quantile(values []float64, q float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return (sorted[(len(sorted)-1)/2] + sorted[len(sorted)/2]) / 2
}
