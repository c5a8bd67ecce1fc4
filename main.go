package main

// main.go is the command line: flags, which command, exit code (PROTOCOL section 1). What a command does is in the
// file that owns it.

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
)

// Exit codes.
const (
	exitOK        = 0
	exitFailed    = 1
	exitUsage     = 2 // wrong usage or invalid configuration
	exitTimeout   = 124
	exitTerminate = 143
)

// Stamped by the linker (build.sh). A build without a stamp never updates itself.
var (
	version       = "dev"
	versionNumber = "0"
	commit        = "unknown"
)

const usage = `job_item runs the jobs that a Job Manager, a script or a person triggers, and loses none of them.

  job_item [--config FILE] [--dry-run]      run the worker; --dry-run only checks that it could
  job_item run EVENT [--data JSON|@FILE|-]  run one task of a job here and now, to try the job out
  job_item create EVENT [--data JSON|@FILE|-] [--wait]
                                            create a task on the worker that runs on this host
  job_item status [--json]                  what that worker is doing; exit code 0 only if it is healthy
  job_item replay TASK_ID                   create a finished task again, with the data of its record

inside a job:
  … | job_item save                         send stdin as progress messages, and copy it to stdout
  job_item save -- COMMAND ARG…             the same with a command's output; exits as the command does
  job_item upload FILE…                     keep files with the task
  job_item result [JSON|@FILE|-]            submit the task's result

publishing a version:
  job_item sign --new-key FILE              make a key: the private half into FILE, the public one is printed
  job_item sign --key FILE [BINARY…] [--json]
                                            what the manager answers for each BINARY; without one, the public key
  job_item sign --check PUBLIC_KEY --signature SIGNATURE BINARY
                                            whether that key has signed BINARY so: exit code 0 or 1

  job_item version                          which build this is
  job_item help                             this text

Flags stand before or after the command:
  -c, --config FILE   the configuration ($CONFIG_PATH, else config.yaml)
  --data DATA         a JSON object, @FILE to read it from a file, - from stdin (default {})
  --wait              stay until the task has ended and exit as it did: 0 finish, 1 error, 124 timeout, 143 terminate
  --url URL           where the worker listens ($JOB_ITEM_BASE_URL, else listen of the configuration)
  --json              the answer as JSON

Exit codes: 0 done, 1 failed, 2 wrong usage or invalid configuration.

A first session:
  $ job_item run hello --data '{"name":"Ada"}'
`

// An invocation is one call of the program: what was asked and what it reads from and writes to.
type invocation struct {
	command string
	args    []string // what follows the command
	dashes  bool     // "--" stood before the last of them
	flags   map[string]bool

	config     string
	dryRun     bool
	data       string
	wait       bool
	url        string
	json       bool
	newKey     string
	key        string
	check      string
	signature  string
	supervised bool // set by the parent when it starts a child: stdin is the lifeline

	stdin          io.Reader
	stdout, stderr io.Writer
}

// commandFlags names the flags that each command takes, besides config.
var commandFlags = map[string][]string{
	"":                    {"dry-run", "version", "help"},
	"child_process":       {"supervised"},
	"child_execs_process": {"supervised"},
	"save":                {},
	"run":                 {"data"},
	"create":              {"data", "wait", "url"},
	"status":              {"url", "json"},
	"replay":              {"url", "wait"},
	"upload":              {},
	"result":              {},
	"sign":                {"new-key", "key", "check", "signature", "json"},
	"version":             {},
	"help":                {},
}

func main() {
	os.Exit(run(context.Background(), os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// run is the whole program and returns its exit code.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	inv, err := parseCommandLine(args)
	if err != nil {
		fmt.Fprintf(stderr, "job_item: %v\ntry: job_item help\n", err)
		return exitUsage
	}
	inv.stdin, inv.stdout, inv.stderr = stdin, stdout, stderr

	switch inv.command {
	case "":
		return runParent(ctx, inv)
	case "child_process":
		return runWorker(ctx, inv)
	case "child_execs_process":
		return runExecs(ctx, inv)
	case "save":
		return runSave(ctx, inv)
	case "run":
		return runOnce(ctx, inv)
	case "create":
		return runCreate(ctx, inv)
	case "status":
		return runStatus(ctx, inv)
	case "replay":
		return runReplay(ctx, inv)
	case "upload":
		return runUpload(ctx, inv)
	case "result":
		return runResult(ctx, inv)
	case "sign":
		return runSign(inv)
	case "version":
		fmt.Fprintln(stdout, versionLine())
		return exitOK
	default:
		fmt.Fprint(stdout, usage)
		return exitOK
	}
}

func versionLine() string {
	return fmt.Sprintf("job_item %s (number %s, commit %s, %s, %s/%s)",
		version, versionNumber, commit, runtime.Version(), runtime.GOOS, runtime.GOARCH)
}

// parseCommandLine reads flags and words in any order; what follows "--" is left alone.
func parseCommandLine(args []string) (*invocation, error) {
	inv := &invocation{flags: map[string]bool{}}
	var showVersion, showHelp bool
	flags := flag.NewFlagSet("job_item", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.Usage = func() {}
	flags.StringVar(&inv.config, "config", "", "")
	flags.StringVar(&inv.config, "c", "", "")
	flags.BoolVar(&inv.dryRun, "dry-run", false, "")
	flags.StringVar(&inv.data, "data", "", "")
	flags.BoolVar(&inv.wait, "wait", false, "")
	flags.StringVar(&inv.url, "url", "", "")
	flags.BoolVar(&inv.json, "json", false, "")
	flags.StringVar(&inv.newKey, "new-key", "", "")
	flags.StringVar(&inv.key, "key", "", "")
	flags.StringVar(&inv.check, "check", "", "")
	flags.StringVar(&inv.signature, "signature", "", "")
	flags.BoolVar(&inv.supervised, "supervised", false, "")
	flags.BoolVar(&showVersion, "version", false, "")
	flags.BoolVar(&showHelp, "help", false, "")
	flags.BoolVar(&showHelp, "h", false, "")

	var verbatim []string
	if i := slices.Index(args, "--"); i >= 0 {
		args, verbatim, inv.dashes = args[:i], args[i+1:], true
	}
	var words []string
	for len(args) > 0 {
		if err := flags.Parse(args); err != nil {
			return nil, err
		}
		if args = flags.Args(); len(args) > 0 {
			words, args = append(words, args[0]), args[1:]
		}
	}
	if len(words) > 0 {
		inv.command, words = words[0], words[1:]
	}
	inv.args = append(words, verbatim...)

	allowed, known := commandFlags[inv.command]
	if !known {
		return nil, fmt.Errorf("there is no command %q", inv.command)
	}
	var misplaced []string
	flags.Visit(func(f *flag.Flag) {
		inv.flags[f.Name] = true
		if f.Name != "config" && f.Name != "c" && f.Name != "help" && f.Name != "h" && !slices.Contains(allowed, f.Name) {
			misplaced = append(misplaced, "--"+f.Name)
		}
	})
	switch {
	case showHelp:
		inv.command = "help"
	case showVersion && inv.command == "":
		inv.command = "version"
	case len(misplaced) > 0:
		return nil, fmt.Errorf("%s has no flag %s", nameOf(inv.command), strings.Join(misplaced, ", "))
	}
	if inv.command == "" && len(inv.args) > 0 {
		return nil, errors.New(`"--" belongs to save`)
	}
	return inv, nil
}

func nameOf(command string) string {
	if command == "" {
		return "job_item"
	}
	return command
}

// configFile is the configuration that was asked for: the flag, else $CONFIG_PATH, else config.yaml.
func (inv *invocation) configFile() string {
	if inv.config != "" {
		return inv.config
	}
	if path := os.Getenv("CONFIG_PATH"); path != "" {
		return path
	}
	return "config.yaml"
}

// failed tells a person why a process could not begin, and gives its exit code.
func (inv *invocation) failed(err error) int {
	inv.printError(err)
	if codeOf(err) == codeConfig {
		return exitUsage
	}
	return exitFailed
}

// printError tells a person what went wrong: the error, its code, and what would help.
func (inv *invocation) printError(err error) {
	text := err.Error()
	if code := codeOf(err); code != "" && strings.Contains(text, "\n") {
		text += "\n[" + string(code) + "]" // a list of problems: it is no part of the last
	} else if code != "" {
		text += " [" + string(code) + "]"
	}
	fmt.Fprintf(inv.stderr, "job_item: %s\n", text)
	if hint := hintOf(err); hint != "" {
		fmt.Fprintf(inv.stderr, "  %s\n", hint)
	}
}
