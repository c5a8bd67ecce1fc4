package main

// deploy_linux_test.go puts the container image together as the last stage of deploy/Dockerfile says, and runs the worker
// in it: nothing else is there, and it is not root.

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// containerPath is the PATH that container engines set where an image names none.
const containerPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// An image is a root file system and what the Dockerfile says about its processes.
type image struct {
	root       string
	env        []string
	dir        string
	user       string // uid:gid
	volume     string
	port       string
	stopSignal string
	entry      []string
	health     []string
}

// newImage does what an engine does for the last stage, with the program that build.sh builds.
func newImage(t *testing.T) *image {
	t.Helper()
	made := t.TempDir()
	program, roots, empty := filepath.Join(made, "job_item"), filepath.Join(made, "roots"), filepath.Join(made, "empty")
	build := exec.Command("./build.sh")
	build.Env = append(os.Environ(), "OUT="+program, "VERSION=v4.5.6")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build.sh: %v\n%s", err, out)
	}
	must(t, os.WriteFile(roots, []byte("stands for the certificates of the build stage"), 0o644))
	must(t, os.Mkdir(empty, 0o755))
	built := map[string]string{
		"/build/job_item": program, "/build/empty": empty, "/etc/ssl/certs/ca-certificates.crt": roots,
	}

	i := &image{root: t.TempDir(), env: []string{containerPath}}
	must(t, os.Chmod(i.root, 0o755))
	text := deployFile(t, "Dockerfile")
	_, stage, found := strings.Cut(text, "\nFROM scratch\n")
	if !found || strings.Contains(stage, "\nFROM ") {
		t.Fatal("the last stage of the Dockerfile is not FROM scratch")
	}
	for line := range strings.Lines(stage) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		switch instruction, rest, _ := strings.Cut(strings.TrimSpace(line), " "); instruction {
		case "":
		case "COPY":
			i.copy(t, built, strings.Fields(rest))
		case "ENV":
			i.env = append(i.env, rest)
		case "WORKDIR":
			i.dir = rest
		case "VOLUME":
			i.volume = rest
		case "USER":
			i.user = rest
		case "EXPOSE":
			i.port = rest
		case "STOPSIGNAL":
			i.stopSignal = rest
		case "HEALTHCHECK":
			_, rest, _ = strings.Cut(rest, " CMD ")
			must(t, json.Unmarshal([]byte(rest), &i.health))
		case "ENTRYPOINT":
			must(t, json.Unmarshal([]byte(rest), &i.entry))
		default:
			t.Fatalf("the test does not know what %q in the Dockerfile means", line)
		}
	}
	return i
}

// copy is COPY [--from=build] [--chown=UID:GID] SOURCE DESTINATION.
func (i *image) copy(t *testing.T, built map[string]string, args []string) {
	t.Helper()
	source, target, owner := "", filepath.Join(i.root, args[len(args)-1]), "0:0"
	staged := slices.Contains(args, "--from=build")
	for _, arg := range args[:len(args)-1] {
		if name, ok := strings.CutPrefix(arg, "--chown="); ok {
			owner = name
		} else if !strings.HasPrefix(arg, "--") {
			source = arg
		}
	}
	if staged {
		source = built[source]
	}
	must(t, os.MkdirAll(filepath.Dir(target), 0o755))
	info, err := os.Stat(source)
	must(t, err)
	if info.IsDir() {
		must(t, os.Mkdir(target, 0o755))
	} else {
		content, err := os.ReadFile(source)
		must(t, err)
		must(t, os.WriteFile(target, content, info.Mode().Perm()))
	}
	uid, gid := ids(t, owner)
	must(t, os.Chown(target, uid, gid))
}

func ids(t *testing.T, owner string) (uid, gid int) {
	t.Helper()
	if n, err := fmt.Sscanf(owner, "%d:%d", &uid, &gid); n != 2 {
		t.Fatalf("%q is not UID:GID, as a host without /etc/passwd needs it: %v", owner, err)
	}
	return uid, gid
}

// command is a process in a container of this image, ready to be started.
func (i *image) command(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	uid, gid := ids(t, i.user)
	self, err := os.Executable()
	must(t, err)
	words := []string{"test-role", "container", i.root, i.dir, strconv.Itoa(uid), strconv.Itoa(gid)}
	cmd := exec.Command(self, append(words, args...)...)
	cmd.Env = i.env
	// The mounts are seen by this process alone, and end with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	return cmd
}

// run runs a command in the container to its end.
func (i *image) run(t *testing.T, args ...string) cliResult {
	t.Helper()
	cmd := i.command(t, args...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		skipWithoutNamespaces(t, err)
		t.Fatalf("run %q in the image: %v", args, err)
	}
	return cliResult{out.String(), errOut.String(), cmd.ProcessState.ExitCode()}
}

func init() { testRoles["container"] = enterContainer }

// enterContainer becomes the program in the container: root, dir, uid, gid, and its arguments.
func enterContainer(args []string) int {
	uid, _ := strconv.Atoi(args[2])
	gid, _ := strconv.Atoi(args[3])
	err := errors.Join(
		syscall.Mount("proc", filepath.Join(args[0], "proc"), "proc", 0, ""),
		syscall.Mount("/dev", filepath.Join(args[0], "dev"), "", syscall.MS_BIND, ""),
		syscall.Chroot(args[0]),
		syscall.Chdir(args[1]),
		syscall.Setgroups(nil), syscall.Setgid(gid), syscall.Setuid(uid),
	)
	if err == nil {
		err = syscall.Exec(args[4], args[4:], os.Environ())
	}
	fmt.Fprintf(os.Stderr, "enter the container: %v\n", err)
	return 98
}

// TestImage runs jobs in the image without a shell, as docker run and docker exec would.
func TestImage(t *testing.T) {
	t.Parallel() // it mostly builds
	if os.Getuid() != 0 {
		t.Skip("only root can enter another root file system")
	}
	i := newImage(t)
	if i.volume != i.dir || i.stopSignal != "SIGTERM" || i.entry == nil || i.health == nil {
		t.Errorf("the image is %+v", i)
	}

	// What an engine adds, and what the Dockerfile says is to be mounted. The port is another, as the host's may be taken.
	for _, dir := range []string{"proc", "dev", "run/secrets"} {
		must(t, os.MkdirAll(filepath.Join(i.root, dir), 0o755))
	}
	uid, gid := ids(t, i.user)
	key := filepath.Join(i.root, "run/secrets/job_item_key")
	must(t, os.WriteFile(key, []byte("hush\n"), 0o400))
	must(t, os.Chown(key, uid, gid))
	config := filepath.Join(i.root, "etc/job_item/config.yaml")
	text, err := os.ReadFile(config)
	must(t, err)
	shipped, port := "listen: 0.0.0.0:"+i.port+"\n", freePort(t)
	if !bytes.Contains(text, []byte(shipped)) {
		t.Errorf("the image's configuration has no %s", shipped)
	}
	text = bytes.Replace(text, []byte(shipped), []byte("listen: 0.0.0.0:"+port+"\n"), 1)
	text = append(text, "  - {event: piped, cmd: 'echo a | cat', working_dir: /var/lib/job_item}\n"...)
	must(t, os.WriteFile(config, text, 0o644))

	const line = "job_item v4.5.6 "
	job := i.entry[0]
	if got := i.run(t, job, "run", "version"); got.code != 0 || !strings.HasPrefix(got.stdout, line) {
		t.Fatalf("run version = %+v", got)
	}
	if got := i.run(t, job, "run", "piped"); got.code != 1 || !strings.Contains(got.stderr, "sh") {
		t.Errorf("a job that needs a shell, where none is: %+v", got)
	}
	if got := i.run(t, i.health...); got.code != 1 {
		t.Errorf("the health check without a worker = %+v", got)
	}

	log := &lockedBuffer{}
	worker := i.command(t, i.entry...)
	worker.Stderr = log
	must(t, worker.Start())
	t.Cleanup(func() { worker.Process.Kill() })
	waitFor(t, 20*time.Second, func() string {
		if got := i.run(t, i.health...); got.code != 0 {
			return fmt.Sprintf("the health check = %+v\n%s", got, log)
		}
		return ""
	})
	if got := i.run(t, job, "create", "version", "--wait"); got.code != 0 || !strings.Contains(got.stdout, line) {
		t.Errorf("create version --wait = %+v\n%s", got, log)
	}
	info, err := os.Stat(filepath.Join(i.root, i.volume, "data"))
	must(t, err)
	if owner := info.Sys().(*syscall.Stat_t).Uid; owner != uint32(uid) {
		t.Errorf("the data belongs to user %d", owner)
	}
	resp, err := http.Get("http://127.0.0.1:" + port + "/jobs")
	must(t, err)
	resp.Body.Close()
	if resp.StatusCode != http.StatusUnauthorized {
		t.Errorf("a call without the key is answered with %s", resp.Status)
	}
	must(t, worker.Process.Signal(syscall.SIGTERM))
	if err := worker.Wait(); err != nil {
		t.Errorf("the worker ended with %v\n%s", err, log)
	}

	var programs []string
	must(t, filepath.WalkDir(i.root, func(path string, entry fs.DirEntry, err error) error {
		if info, infoErr := entry.Info(); err == nil && infoErr == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			programs = append(programs, strings.TrimPrefix(path, i.root))
		}
		return err
	}))
	if !slices.Equal(programs, i.entry) {
		t.Errorf("the programs in the image are %q", programs)
	}
}
