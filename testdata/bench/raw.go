// raw is the least that anybody could do in Go: a bare loop that starts a command, so many at once, each in a process
// group of its own, with captured output and a data file. bench.sh measures job_item beside it.
//
//	raw -tasks 2000 -at-once 8 -data 1024 true     prints seconds taken, CPU seconds of its own and of the commands
//	raw -serve true                                for every line read runs the command once and prints when it began
//	                                               and ended (nanoseconds since 1970), and the output
package main

import (
	"bufio"
	"bytes"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

func main() {
	tasks := flag.Int("tasks", 1, "how often the command is run")
	atOnce := flag.Int("at-once", 1, "how many run at once")
	dataBytes := flag.Int("data", 1024, "size of the data file")
	folder := flag.String("folder", ".", "where the data files are")
	serve := flag.Bool("serve", false, "run the command for every line read")
	flag.Parse()
	path, err := exec.LookPath(flag.Arg(0))
	if err != nil {
		die(err)
	}
	data := bytes.Repeat([]byte("x"), *dataBytes)
	once := func(n int64) []byte {
		file := filepath.Join(*folder, fmt.Sprintf("raw-%d.json", n))
		if err := os.WriteFile(file, data, 0o600); err != nil {
			die(err)
		}
		var out, errOut bytes.Buffer
		cmd := exec.Command(path, flag.Args()[1:]...)
		cmd.Stdout, cmd.Stderr = &out, &errOut
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		if err := cmd.Run(); err != nil {
			die(err)
		}
		os.Remove(file)
		return out.Bytes()
	}
	if *serve {
		for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
			began := time.Now()
			out := once(0)
			fmt.Println(began.UnixNano(), time.Now().UnixNano(), strings.TrimSpace(string(out)))
		}
		return
	}

	began := time.Now()
	var next atomic.Int64
	var wg sync.WaitGroup
	for range *atOnce {
		wg.Add(1)
		go func() { // ends when all are done
			defer wg.Done()
			for {
				n := next.Add(1)
				if n > int64(*tasks) {
					return
				}
				once(n)
			}
		}()
	}
	wg.Wait()
	fmt.Println(time.Since(began).Seconds(), cpu(syscall.RUSAGE_SELF), cpu(syscall.RUSAGE_CHILDREN))
}

// cpu is what this process or its children have used, in seconds.
func cpu(who int) float64 {
	var use syscall.Rusage
	if err := syscall.Getrusage(who, &use); err != nil {
		die(err)
	}
	return float64(use.Utime.Nano()+use.Stime.Nano()) / 1e9
}

func die(err error) {
	fmt.Fprintln(os.Stderr, "raw:", err)
	os.Exit(1)
}
