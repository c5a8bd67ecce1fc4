//go:build unix

package main

// deploy_test.go holds the files in deploy/ against the program: that they are well-formed, that their configurations are
// valid, and that nobody kills a worker while it still may drain. The container image has deploy_linux_test.go.

import (
	"bytes"
	"encoding/xml"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"gopkg.in/yaml.v3"
)

// deployFile reads a file of deploy/.
func deployFile(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("deploy", name))
	must(t, err)
	return string(text)
}

// A kubernetesObject is what the tests look at in deploy/kubernetes.yaml.
type kubernetesObject struct {
	Kind     string
	Metadata struct{ Name string }
	Data     map[string]string
	Spec     struct{ Template struct{ Spec kubernetesPod } }
}

type kubernetesPod struct {
	Containers []struct {
		Readiness    kubernetesProbe `yaml:"readinessProbe"`
		Liveness     kubernetesProbe `yaml:"livenessProbe"`
		VolumeMounts []struct {
			Name string
			Path string `yaml:"mountPath"`
		} `yaml:"volumeMounts"`
	}
	Volumes []struct {
		Name      string
		ConfigMap struct{ Name string } `yaml:"configMap"`
	}
}

type kubernetesProbe struct {
	HTTP map[string]string `yaml:"httpGet"`
	TCP  map[string]string `yaml:"tcpSocket"`
}

func kubernetesObjects(t *testing.T) map[string]kubernetesObject {
	t.Helper()
	objects := map[string]kubernetesObject{}
	for documents := yaml.NewDecoder(strings.NewReader(deployFile(t, "kubernetes.yaml"))); ; {
		var o kubernetesObject
		if err := documents.Decode(&o); err == io.EOF {
			return objects
		} else if err != nil {
			t.Fatal(err)
		}
		objects[o.Kind] = o
	}
}

// TestDeployedConfigs reads every configuration that is shipped for a deployment, with a key where it expects one.
func TestDeployedConfigs(t *testing.T) {
	keys := t.TempDir()
	for _, name := range []string{"secret.key", "job_item_key", "job_item/secret.key"} {
		path := filepath.Join(keys, name)
		must(t, os.MkdirAll(filepath.Dir(path), 0o700))
		must(t, os.WriteFile(path, []byte("hush\n"), 0o600))
	}
	getenv := variables(map[string]string{"CREDENTIALS_DIRECTORY": keys})
	for _, row := range []struct {
		name, text string
		container  bool
	}{
		{"config.yaml", deployFile(t, "config.yaml"), false},
		{"container.yaml", deployFile(t, "container.yaml"), true},
		{"kubernetes.yaml", kubernetesObjects(t)["ConfigMap"].Data["config.yaml"], true},
	} {
		text := strings.ReplaceAll(row.text, "/run/secrets", keys)
		cfg, err := parseConfig("/etc/job_item/config.yaml", []byte(text), getenv)
		if err != nil {
			t.Errorf("%s: %v", row.name, err)
			continue
		}
		if len(cfg.Warnings) > 0 || cfg.Credential.SecretKey != "hush" || len(cfg.Jobs) == 0 {
			t.Errorf("%s: warnings %q, key %d bytes, %d jobs", row.name, cfg.Warnings, len(cfg.Credential.SecretKey), len(cfg.Jobs))
		}
		if cfg.Update.Enabled == row.container || onLoopback(cfg.Listen) == row.container {
			t.Errorf("%s: update %v, listen %s", row.name, cfg.Update.Enabled, cfg.Listen)
		}
		for _, job := range cfg.Jobs {
			if job.WorkingDir != "/var/lib/job_item" || filepath.Dir(cfg.DataDir) != job.WorkingDir {
				t.Errorf("%s: job %s works in %s, the data is in %s", row.name, job.Event, job.WorkingDir, cfg.DataDir)
			}
		}
		if cfg.DrainTimeout != defaultConfig().DrainTimeout || cfg.KillAfter != defaultConfig().KillAfter {
			t.Errorf("%s: a stop takes longer than the definitions expect", row.name)
		}
	}
}

// TestDeployedStopTimes compares how long each supervisor waits for a stop with how long one may take.
func TestDeployedStopTimes(t *testing.T) {
	cfg := defaultConfig()
	longest := cfg.DrainTimeout + cfg.KillAfter + stopMargin
	for _, row := range []struct {
		file, pattern string
		unit          time.Duration
	}{
		{"job_item.service", `(?m)^TimeoutStopSec=(\d+)$`, time.Second},
		{"job_item.openrc", `(?m)^retry="TERM/(\d+)/`, time.Second},
		{"runit/run", `sv -w (\d+) down`, time.Second},
		{"s6/timeout-kill", `^(\d+)\n$`, time.Millisecond},
		{"job_item.supervisord.conf", `(?m)^stopwaitsecs=(\d+)$`, time.Second},
		{"job_item.plist", `<key>ExitTimeOut</key>\s*<integer>(\d+)<`, time.Second},
		{"kubernetes.yaml", `terminationGracePeriodSeconds: (\d+)\n`, time.Second},
		{"compose.yaml", `stop_grace_period: (\d+)s\n`, time.Second},
		{"Dockerfile", `--stop-timeout (\d+) `, time.Second},
	} {
		found := regexp.MustCompile(row.pattern).FindStringSubmatch(deployFile(t, row.file))
		if found == nil {
			t.Errorf("%s has nothing like %s", row.file, row.pattern)
			continue
		}
		n, _ := strconv.Atoi(found[1])
		if waits := time.Duration(n) * row.unit; waits <= longest {
			t.Errorf("%s waits %v for a stop that may take %v", row.file, waits, longest)
		}
	}
}

// TestDeployedUnit has systemd read the unit, with a program in it that exists here.
func TestDeployedUnit(t *testing.T) {
	unit := deployFile(t, "job_item.service")
	found := regexp.MustCompile(`(?m)^WatchdogSec=(\d+)$`).FindStringSubmatch(unit)
	if found == nil {
		t.Fatal("the unit has no watchdog")
	}
	// Less would have the parent kill a worker that is merely slow: see checkLiveness.
	if n, _ := strconv.Atoi(found[1]); time.Duration(n)*time.Second/2 < silenceLimit {
		t.Errorf("the watchdog's %s s shorten the %v that a worker may be silent", found[1], silenceLimit)
	}
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		t.Skip("there is no systemd-analyze")
	}
	self, err := os.Executable()
	must(t, err)
	path := filepath.Join(t.TempDir(), "job_item.service")
	must(t, os.WriteFile(path, []byte(strings.ReplaceAll(unit, "/opt/job_item/job_item", self)), 0o600))
	out, err := exec.Command("systemd-analyze", "verify", path).CombinedOutput()
	if err != nil || bytes.Contains(out, []byte("job_item.service")) {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
}

// TestDeployedFiles reads every file of deploy/ as what it is, and looks for it in the README.
func TestDeployedFiles(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	must(t, err)
	_, section, _ := strings.Cut(string(readme), "\n## Deployment\n")
	section, _, _ = strings.Cut(section, "\n## ")
	must(t, filepath.WalkDir("deploy", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || path == "deploy" {
			return err
		}
		if filepath.Dir(path) == "deploy" && !strings.Contains(section, "`"+filepath.ToSlash(path)+"`") {
			t.Errorf("the README's Deployment does not name %s", path)
		}
		if entry.IsDir() {
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		switch filepath.Ext(path) {
		case ".yaml", ".yml":
			err = eachDocument(yaml.NewDecoder(bytes.NewReader(text)).Decode)
		case ".plist", ".xml":
			err = eachDocument(xml.NewDecoder(bytes.NewReader(text)).Decode)
		}
		if err != nil {
			t.Errorf("%s: %v", path, err)
		}
		if bytes.HasPrefix(text, []byte("#!")) {
			checkScript(t, path, entry)
		}
		return nil
	}))
}

// eachDocument decodes to the end; what is not well-formed is an error.
func eachDocument(decode func(any) error) error {
	for {
		var document struct{}
		if err := decode(&document); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
	}
}

func checkScript(t *testing.T, path string, entry fs.DirEntry) {
	t.Helper()
	if out, err := exec.Command("sh", "-n", path).CombinedOutput(); err != nil {
		t.Errorf("sh -n %s: %v\n%s", path, err, out)
	}
	if info, err := entry.Info(); err != nil || info.Mode().Perm()&0o111 == 0 {
		t.Errorf("%s cannot be executed", path)
	}
}

// TestKubernetes looks for what the cluster would find out too late: volumes without a name, and probes that kill workers
// because a broker is away.
func TestKubernetes(t *testing.T) {
	objects := kubernetesObjects(t)
	pod := objects["DaemonSet"].Spec.Template.Spec
	if len(pod.Containers) != 1 {
		t.Fatalf("the DaemonSet has %d containers", len(pod.Containers))
	}
	container := pod.Containers[0]
	if container.Readiness.HTTP["path"] != "/health" {
		t.Error("readiness is not told by /health")
	}
	if container.Liveness.HTTP != nil || container.Liveness.TCP == nil {
		t.Error("liveness is not told by the port alone")
	}
	mounted := map[string]string{}
	for _, m := range container.VolumeMounts {
		mounted[m.Name] = m.Path
	}
	for _, volume := range pod.Volumes {
		if mounted[volume.Name] == "" {
			t.Errorf("the volume %s is mounted nowhere", volume.Name)
		}
		delete(mounted, volume.Name)
		if name := volume.ConfigMap.Name; name != "" && name != objects["ConfigMap"].Metadata.Name {
			t.Errorf("there is no ConfigMap %s", name)
		}
	}
	if len(mounted) > 0 {
		t.Errorf("there are no volumes for %v", mounted)
	}
}
