package main

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func init() {
	testRoles["wait-for-ever"] = func([]string) int {
		fmt.Println("waiting")
		time.Sleep(time.Hour)
		return 0
	}
	testRoles["bound-starter"] = roleBoundStarter
}

// roleBoundStarter starts a process as a worker starts a command, but never gets to its job object; prints its pid.
func roleBoundStarter([]string) int {
	startSpawner()
	cmd := cliCommand(&testing.T{}, nil, "test-role", "wait-for-ever")
	cmd.SysProcAttr = &syscall.SysProcAttr{CreationFlags: syscall.CREATE_NEW_PROCESS_GROUP | 0x4} // suspended
	if err := cmd.Start(); err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println(cmd.Process.Pid)
	time.Sleep(time.Hour)
	return 0
}

// A leader that is there still is ended, and only that very process.
func TestStaleLeaderEnded(t *testing.T) {
	cmd := cliCommand(t, nil, "test-role", "wait-for-ever")
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	defer func() {
		cmd.Process.Kill()
		<-exited
	}()
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Error(err)
	}
	p := identifyProcess(cmd.Process.Pid)
	go func() { // ends with the process
		defer close(exited)
		cmd.Wait()
	}()
	if p.Start == "" {
		t.Fatalf("a running process is %+v; want a start time", p)
	}

	earlier := processIdentity{PID: p.PID, Start: p.Start[:len(p.Start)-1] + "x"}
	if err := endStaleGroup(earlier, "t1", 0); err != nil || processStart(p.PID) != p.Start {
		t.Fatalf("endStaleGroup of another process with that pid: %v; want it left alone", err)
	}
	select {
	case <-exited:
		t.Fatal("another process with that pid was ended")
	default:
	}
	if err := endStaleGroup(p, "t1", 0); err != nil {
		t.Fatal(err)
	}
	waitFor(t, 5*time.Second, func() string {
		select {
		case <-exited:
			return ""
		default:
			return "the leader is still there"
		}
	})
	if err := endStaleGroup(p, "t1", 0); err != nil {
		t.Errorf("endStaleGroup of a process that is gone: %v", err)
	}
}

// A command that was created just before its worker was killed does not outlive it, not even suspended.
func TestCommandBoundFromItsCreation(t *testing.T) {
	starter := cliCommand(t, nil, "test-role", "bound-starter")
	out, err := starter.StdoutPipe()
	if err == nil {
		err = starter.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	line, _ := bufio.NewReader(out).ReadString('\n')
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatalf("%q: %v", line, err)
	}
	process, err := openProcess(pid, syscall.SYNCHRONIZE|syscall.PROCESS_TERMINATE)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.CloseHandle(process)
	starter.Process.Kill()
	starter.Wait()
	if event, err := syscall.WaitForSingleObject(process, 5000); event != syscall.WAIT_OBJECT_0 {
		syscall.TerminateProcess(process, 1)
		t.Errorf("the command outlives who started it: %v", err)
	}
}

// What Windows says of a full disk is a fault of the host and not of the task.
func TestHostFaultsOfWindows(t *testing.T) {
	full := &fs.PathError{Op: "write", Path: "x", Err: syscall.Errno(112)}
	if !isHostFault(fmt.Errorf("write data file: %w", full)) || isHostFault(errors.New("other")) || isHostFault(syscall.Errno(2)) {
		t.Error("isHostFault does not know a full disk from the rest")
	}
	if !isTransient(&fs.PathError{Err: errorSharingViolation}) || isTransient(fs.ErrNotExist) {
		t.Error("isTransient does not know a program being written from a missing one")
	}
}

// A task whose id is the name of a device would write its data there, and its command would find none.
func TestDataFileIsNoDevice(t *testing.T) {
	for _, id := range []string{"nul", "CON", "com1"} {
		_, err := (*spareFiles)(nil).writeDataFile(id+".json", []byte("{}"), false)
		if codeOf(err) != codeDataFileWrite {
			t.Errorf("the data file of task %q: %v; want code %s", id, err, codeDataFileWrite)
		}
	}
}
