package main

// exec_windows.go is what running a command takes on Windows: a job object in place of a process group, Ctrl+Break in
// place of SIGTERM, and cmd.exe.

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"unsafe"
)

// hostShell is how this system's shell reads a line.
const hostShell = shellCmd

// Entry points of system libraries, found when first called and never changed.
var (
	kernel32                 = syscall.NewLazyDLL("kernel32.dll")
	createJobObject          = kernel32.NewProc("CreateJobObjectW")
	assignProcessToJobObject = kernel32.NewProc("AssignProcessToJobObject")
	setInformationJobObject  = kernel32.NewProc("SetInformationJobObject")
	queryInformationJob      = kernel32.NewProc("QueryInformationJobObject")
	terminateJobObject       = kernel32.NewProc("TerminateJobObject")
	generateConsoleCtrlEvent = kernel32.NewProc("GenerateConsoleCtrlEvent")
	resumeProcess            = syscall.NewLazyDLL("ntdll.dll").NewProc("NtResumeProcess")
)

// A processGroup is a job object: whatever its processes start is in it too, and it dies with our handle on it.
type processGroup struct {
	job syscall.Handle
	pid uint32
}

// groupAttributes has the process created suspended, so that it is in the job object before it can start others.
func groupAttributes(c *command) *syscall.SysProcAttr {
	const createSuspended = 0x4
	attr := &syscall.SysProcAttr{CreationFlags: syscall.CREATE_NEW_PROCESS_GROUP | createSuspended}
	if c.argv == nil {
		// With /S, cmd takes off exactly these quotes and reads what is between them as it stands.
		attr.CmdLine = `cmd.exe /S /C "` + c.line + `"`
	}
	return attr
}

type jobBasicLimits struct {
	perProcessUserTime, perJobUserTime int64
	flags                              uint32
	minWorkingSet, maxWorkingSet       uintptr
	activeProcesses                    uint32
	affinity                           uintptr
	priorityClass, schedulingClass     uint32
}

type jobExtendedLimits struct {
	basic                                                      jobBasicLimits
	ioCounters                                                 [6]uint64
	processMemory, jobMemory, peakProcessMemory, peakJobMemory uintptr
}

type jobAccounting struct {
	totalUser, totalKernel, periodUser, periodKernel        int64
	pageFaults, totalProcesses, activeProcesses, terminated uint32
}

// openGroup puts the suspended leader into a job object and lets it run.
func openGroup(leader int) (group processGroup, err error) {
	const (
		processTerminate = 0x1
		processSetQuota  = 0x100
		processSuspend   = 0x800
	)
	job, err := newJob()
	if err != nil {
		return group, err
	}
	group = processGroup{job, uint32(leader)}
	defer func() {
		if err != nil {
			group.close()
		}
	}()
	process, err := syscall.OpenProcess(processTerminate|processSetQuota|processSuspend, false, group.pid)
	if err != nil {
		return group, fmt.Errorf("open process: %w", err)
	}
	defer syscall.CloseHandle(process)
	if ok, _, err := assignProcessToJobObject.Call(uintptr(job), uintptr(process)); ok == 0 {
		return group, fmt.Errorf("assign process to job object: %w", err)
	}
	if status, _, _ := resumeProcess.Call(uintptr(process)); status != 0 {
		return group, fmt.Errorf("resume process: NTSTATUS %#x", status)
	}
	return group, nil
}

const killOnJobClose = 0x2000 // JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE

// newJob creates a job object whose processes end when its last handle is closed.
func newJob() (syscall.Handle, error) {
	job, _, err := createJobObject.Call(0, 0)
	if job == 0 {
		return 0, fmt.Errorf("create job object: %w", err)
	}
	if err := limitJob(syscall.Handle(job), killOnJobClose); err != nil {
		syscall.CloseHandle(syscall.Handle(job))
		return 0, err
	}
	return syscall.Handle(job), nil
}

func limitJob(job syscall.Handle, flags uint32) error {
	const extendedLimitClass = 9 // JobObjectExtendedLimitInformation
	limits := jobExtendedLimits{basic: jobBasicLimits{flags: flags}}
	if ok, _, err := setInformationJobObject.Call(uintptr(job), extendedLimitClass,
		uintptr(unsafe.Pointer(&limits)), unsafe.Sizeof(limits)); ok == 0 {
		return fmt.Errorf("set limits of job object: %w", err)
	}
	return nil
}

// bindCommands puts this process into a job object of its own, so that even a command that was created and is not in
// its own yet ends with this process. Where that cannot be, each command's own has to do.
func bindCommands() (unbind func()) {
	job, err := newJob()
	if err != nil {
		return func() {}
	}
	const self = ^uintptr(0) // GetCurrentProcess()
	if ok, _, _ := assignProcessToJobObject.Call(uintptr(job), self); ok == 0 {
		syscall.CloseHandle(job)
		return func() {}
	}
	return func() {
		if limitJob(job, 0) == nil { // closing it would end this very process otherwise
			syscall.CloseHandle(job)
		}
	}
}

// terminate sends Ctrl+Break, which only a process on our console hears; without one the job ends at once.
func (g processGroup) terminate() {
	const ctrlBreak = 1
	if ok, _, _ := generateConsoleCtrlEvent.Call(ctrlBreak, uintptr(g.pid)); ok == 0 {
		g.kill()
	}
}

func (g processGroup) kill() { terminateJobObject.Call(uintptr(g.job), 1) }

// empty reports that no process is in the job.
func (g processGroup) empty() bool {
	const accountingClass = 1 // JobObjectBasicAccountingInformation
	var accounting jobAccounting
	ok, _, _ := queryInformationJob.Call(uintptr(g.job), accountingClass,
		uintptr(unsafe.Pointer(&accounting)), unsafe.Sizeof(accounting), 0)
	return ok != 0 && accounting.activeProcesses == 0
}

// lost: a handle is never another's.
func (g processGroup) lost(bool) bool { return false }

func (g processGroup) dead() bool { return false }

func (g processGroup) describe() string {
	return fmt.Sprintf("the job object of process %d is not empty", g.pid)
}

func (g processGroup) close() { syscall.CloseHandle(g.job) }

// dieWithStarter: the job object sees to it.
func dieWithStarter(*syscall.SysProcAttr) bool { return false }

func awaitExit(int) bool { return false }

// readReady: there are no deadlines on pipes here, after which it would be asked for.
func readReady(*os.File, []byte) int { return 0 }

// sealDescriptors: handles are inherited only when named.
func sealDescriptors() {}

// hasShell reports whether this host can run shell lines.
func hasShell() bool {
	_, err := shellPath("", nil)
	return err == nil
}

func shellPath(dir string, env []string) (string, error) {
	if path := os.Getenv("ComSpec"); path != "" && checkProgram(path) == nil {
		return path, nil
	}
	return lookProgram("cmd.exe", dir, env)
}

// shellCommand runs line by cmd.exe; the line itself travels in groupAttributes.
func shellCommand(_, dir string, env []string) (path string, argv []string, err error) {
	if path, err = shellPath(dir, env); err != nil {
		return "", nil, execError("start command", errors.New("it needs a shell, and this host has no cmd.exe"),
			"a program with plain arguments runs without")
	}
	return path, []string{"cmd.exe"}, nil
}

// scriptCommand: Windows knows files by their ending only.
func scriptCommand(file string, _ []string, _ string, _ []string) (string, []string, error) {
	return "", nil, execError(fmt.Sprintf("start program %q", file), errors.New("it is no program for Windows"), "")
}

// checkProgram reports why path cannot be executed, nil if it can.
func checkProgram(path string) error {
	info, err := os.Stat(path)
	if err == nil && info.IsDir() {
		return errIsFolder
	}
	return err
}

// checkArguments refuses what would not stay text: batch files get their arguments by way of cmd.exe, which interprets
// these characters whatever the quotes.
func checkArguments(path string, args []string) error {
	if ending := strings.ToLower(filepath.Ext(path)); ending != ".bat" && ending != ".cmd" {
		return nil
	}
	for _, arg := range args {
		if strings.ContainsAny(arg, "\"%!^&|<>()\r\n") {
			return execError(fmt.Sprintf("start batch file %q", path),
				errors.New("an argument holds a character that cmd.exe interprets"),
				"pass the data through the file {{task_id}}.json instead")
		}
	}
	return nil
}

// programFiles are the files that may be meant by path: with each ending of PATHEXT, unless it has one.
func programFiles(path string, env []string) []string {
	endings := ".COM;.EXE;.BAT;.CMD"
	if env == nil {
		env = os.Environ()
	}
	for _, entry := range env {
		if name, value, _ := strings.Cut(entry, "="); sameEnvName(name, "PATHEXT") && value != "" {
			endings = value
		}
	}
	var files []string
	for _, ending := range filepath.SplitList(endings) {
		if strings.EqualFold(filepath.Ext(path), ending) {
			return []string{path}
		}
		files = append(files, path+ending)
	}
	return files
}

const defaultSearchPath = "" // none

func sameEnvName(a, b string) bool { return strings.EqualFold(a, b) }

// isTransient reports whether starting may succeed in a moment: something of the system ran out, or the program is
// still open for writing.
func isTransient(err error) bool {
	var errno syscall.Errno
	return errors.As(err, &errno) && (errno == errorSharingViolation || slices.Contains(hostLacks(), errno))
}

// hostLacks is what the system says when it is short of disk, memory, processes or handles. The Unix names that
// package syscall has for these are its own inventions, which no call returns.
func hostLacks() []syscall.Errno {
	return []syscall.Errno{
		4,    // ERROR_TOO_MANY_OPEN_FILES
		8,    // ERROR_NOT_ENOUGH_MEMORY
		14,   // ERROR_OUTOFMEMORY
		39,   // ERROR_HANDLE_DISK_FULL
		112,  // ERROR_DISK_FULL
		1295, // ERROR_DISK_QUOTA_EXCEEDED
		1450, // ERROR_NO_SYSTEM_RESOURCES
		1455, // ERROR_COMMITMENT_LIMIT: no memory can be promised any more
	}
}

func explainStart(_ string, _ []string, err error) (hint string, cause error) { return "", err }

// reap waits for the process. The largest resident set is not told by os, and there are no signals.
func (l leader) reap() exitStatus {
	state, err := l.process.Wait()
	if err != nil {
		return exitStatus{code: -1}
	}
	return exitStatus{code: state.ExitCode(), cpu: state.UserTime() + state.SystemTime()}
}

// reapEnded: false, the process has to be waited for to know.
func (l leader) reapEnded() (end exitStatus, ended bool) { return end, false }

func yieldProcessor() {}

func hearOfNoChildren() {}

func commandPipe() (read, write *os.File, err error) { return os.Pipe() }

// A bootClock is Linux's.
type bootClock struct{}

func (*bootClock) now() int64 { return 0 }

func (*bootClock) born(pid int, _ int64) string { return processStart(pid) }
