package main

// manager.go is what is said to a Job Manager over HTTP (PROTOCOL section 3): who this worker is, and for which
// configuration and certificates it asks. It makes one request at a time and repeats none; the parent does that. The last
// good reply is kept in data_dir, so that a worker starts while its manager is away. What a reply may hold is in
// manager_reply.go, what becomes of it in manager_merge.go.

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/shirou/gopsutil/v3/host"
)

const (
	managerConfigPath = "/api/worker/config"
	managerTLSPath    = "/api/worker/config/tls/download"

	// What one request may take, and how large its reply may be.
	askLimit             = 15 * time.Second
	downloadLimit        = time.Minute
	maxManagerReplyBytes = 8 << 20
	maxArchiveBytes      = 32 << 20

	minManagerPause = 500 * time.Millisecond
	maxManagerPause = 30 * time.Second
)

// managerPause is how long to wait before the n-th repeated question in a row, from 0: growing, jittered, 0.5 to 30 s.
func managerPause(n int) time.Duration {
	pause := min(minManagerPause<<min(n, 10), maxManagerPause)
	return max(minManagerPause, pause/2+rand.N(pause/2))
}

// refreshPause is the configured time between two questions, give or take a tenth: the workers of a project, started
// together, are not to ask together for ever.
func refreshPause(refresh time.Duration) time.Duration {
	return refresh - refresh/10 + rand.N(refresh/5+1)
}

// A managerClient asks the manager of one configuration. Its methods may be called concurrently.
type managerClient struct {
	cfg    *Config // as the file has it
	log    *slog.Logger
	client *http.Client // follows no redirect: the key is for the configured host alone

	askLimit, downloadLimit time.Duration
}

func newManagerClient(cfg *Config, log *slog.Logger) *managerClient {
	return &managerClient{
		cfg: cfg, log: log.With("addr", cfg.EndPoint), client: newHTTPClient(),
		askLimit: askLimit, downloadLimit: downloadLimit,
	}
}

// ask asks once for this worker's configuration, within 15 s. What fails may succeed later, each error is a reason to
// keep what runs and to ask again.
func (m *managerClient) ask(ctx context.Context) (*managerReply, error) {
	ctx, cancel := context.WithTimeout(ctx, m.askLimit)
	defer cancel()
	reply, err := m.post(ctx, managerConfigPath, maxManagerReplyBytes, map[string]any{
		"project_id": m.cfg.Credential.ProjectID,
		"secret_key": m.cfg.Credential.SecretKey,
		"os":         runtime.GOOS,
		"arch":       runtime.GOARCH,
		"host":       hostInformation(ctx),
	})
	if err != nil {
		return nil, err
	}
	parsed, err := parseManagerReply(reply.body, m.cfg.Credential.SecretKey)
	if err != nil {
		hint := "The manager's answer does not fit this worker: compare it with the manager's configuration of the project."
		if strings.HasPrefix(reply.contentType, "text/html") {
			hint = "That is a web page: check end_point."
		}
		return nil, failHint(codeManagerReply, "read the answer of "+m.cfg.EndPoint+managerConfigPath, err, hint)
	}
	m.log.Debug("manager answered", "jobs", len(parsed.Jobs), "version", parsed.Version.Number)
	return parsed, nil
}

// complete asks once for all that the manager has for this worker, certificates included, and gives its reply, the
// configuration that the reply makes of the file, and what a person should know about it.
func (m *managerClient) complete(ctx context.Context) (reply *managerReply, merged *Config, warnings []string, err error) {
	if reply, err = m.ask(ctx); err != nil {
		return nil, nil, nil, err
	}
	if merged, warnings, err = reply.merge(m.cfg); err != nil {
		return nil, nil, nil, err
	}
	if err = m.fetchCertificates(ctx, reply); err != nil {
		return nil, nil, nil, err
	}
	return reply, merged, warnings, nil
}

// hostInformation is the host as gopsutil sees it; what it cannot find out stays empty.
func hostInformation(ctx context.Context) *host.InfoStat {
	info, err := host.InfoWithContext(ctx)
	if err != nil && info == nil {
		return &host.InfoStat{}
	}
	return info
}

// fetchCertificates has the manager's TLS files unpacked into the folder of ca_file, when the connection is to be
// secure and names one. A refused archive leaves everything as it was.
func (m *managerClient) fetchCertificates(ctx context.Context, reply *managerReply) error {
	if reply.Broker == nil || !reply.Broker.Secure || reply.Broker.CAFile == "" {
		return nil
	}
	caFile, err := managerPath(m.cfg, "ca_file", reply.Broker.CAFile, m.cfg.Broker.CAFile)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, m.downloadLimit)
	defer cancel()
	archive, err := m.post(ctx, managerTLSPath, maxArchiveBytes, map[string]any{
		"app_id":     m.cfg.Credential.ProjectID,
		"app_secret": m.cfg.Credential.SecretKey,
	})
	if err != nil {
		return err
	}
	files, leftOut, err := readCertificateArchive(archive.body)
	if err != nil {
		return failHint(codeCertificateArchive, "refuse the archive of "+m.cfg.EndPoint+managerTLSPath, err,
			"Nothing of it was unpacked. Check the TLS files that the manager has for this broker.")
	}
	if len(leftOut) > 0 {
		m.log.Warn("entries of the manager's TLS archive are no certificates or keys and were left out",
			"count", len(leftOut), "path", redactKey(leftOut[0], m.cfg.Credential.SecretKey))
	}
	changed, err := placeCertificates(filepath.Dir(caFile), files, m.cfg.File, m.cfg.Credential.SecretKeyFile)
	if err != nil {
		return failHint(codeCertificateWrite, "unpack the manager's TLS files into "+filepath.Dir(caFile), err,
			"Let this user write there, or put the files there by hand.")
	}
	if changed > 0 {
		m.log.Info("TLS files of the manager unpacked", "path", filepath.Dir(caFile), "count", changed)
	}
	return nil
}

// httpReply is a reply with status 200.
type httpReply struct {
	body        []byte
	contentType string
}

// post makes one request. The error says with which URL, and what to do.
func (m *managerClient) post(ctx context.Context, path string, limit int64, body any) (httpReply, error) {
	target := m.cfg.EndPoint + path
	text, err := json.Marshal(body)
	if err != nil {
		return httpReply{}, fmt.Errorf("ask %s: %w", target, err)
	}
	reply, err := m.exchange(ctx, target, limit, text)
	var refused *managerRefusal
	switch {
	case errors.As(err, &refused):
		return httpReply{}, failHint(codeManagerStatus, "ask "+target, err, refused.hint())
	case err != nil:
		return httpReply{}, failHint(codeManagerAway, "ask "+target, err, connectionHint(err))
	}
	return reply, nil
}

func (m *managerClient) exchange(ctx context.Context, target string, limit int64, body []byte) (httpReply, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, target, bytes.NewReader(body))
	if err != nil {
		return httpReply{}, err
	}
	request.Header.Set("Content-Type", "application/json")
	request.Header.Set("User-Agent", "job_item/"+version)
	response, err := m.client.Do(request)
	if err != nil {
		return httpReply{}, requestError(ctx, err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return httpReply{}, m.readRefusal(response)
	}
	content, err := io.ReadAll(io.LimitReader(response.Body, limit+1))
	switch {
	case err != nil:
		return httpReply{}, fmt.Errorf("the reply broke off: %w", requestError(ctx, err))
	case int64(len(content)) > limit:
		return httpReply{}, fmt.Errorf("the reply is larger than %d MiB", limit>>20)
	}
	return httpReply{content, response.Header.Get("Content-Type")}, nil
}

// A managerRefusal is a status other than 200.
type managerRefusal struct {
	status  int
	message string // what the manager says about it, may be empty
}

func (r *managerRefusal) Error() string {
	text := strings.TrimSpace(fmt.Sprintf("answered %d %s", r.status, http.StatusText(r.status)))
	if r.message != "" {
		text += ": " + r.message
	}
	return text
}

func (r *managerRefusal) hint() string {
	switch {
	case r.status == http.StatusUnauthorized || r.status == http.StatusForbidden:
		return "Check credential.project_id and credential.secret_key against the manager."
	case r.status == http.StatusNotFound || r.status == http.StatusMethodNotAllowed:
		return "There is no Job Manager at that address, or it does not know the project: check end_point and credential.project_id."
	case r.status == http.StatusProxyAuthRequired:
		return "A proxy stands between: check HTTP_PROXY, HTTPS_PROXY and NO_PROXY."
	case r.status >= 300 && r.status < 400:
		return "Redirects are not followed with the key: set end_point to the address where the manager really is."
	case r.status >= 500:
		return "The manager has a problem of its own: look at its log."
	}
	return "Check end_point and credential against the manager."
}

// readRefusal takes a short message along. A manager that repeats the request in it repeats the key too.
func (m *managerClient) readRefusal(response *http.Response) *managerRefusal {
	r := &managerRefusal{status: response.StatusCode}
	text, _ := io.ReadAll(io.LimitReader(response.Body, maxErrorReplyBytes))
	var reply struct{ Message, Msg, Error json.RawMessage }
	switch {
	case json.Unmarshal(text, &reply) == nil:
		for _, raw := range []json.RawMessage{reply.Message, reply.Msg, reply.Error} {
			if message, ok := plainValue(raw); ok && r.message == "" {
				r.message = message
			}
		}
	case r.status >= 300 && r.status < 400:
		r.message = response.Header.Get("Location")
	default:
		// Go's own servers name no type when they are asked over http for https.
		if kind := response.Header.Get("Content-Type"); kind == "" || strings.HasPrefix(kind, "text/plain") {
			r.message = strings.ToValidUTF8(string(text), "?")
		}
	}
	r.message = oneLine(redactKey(r.message, m.cfg.Credential.SecretKey), 200)
	return r
}

// redactKey takes the key out of foreign text. It has to come before the text is shortened.
func redactKey(text string, key secret) string {
	if key == "" {
		return text
	}
	return strings.ReplaceAll(text, string(key), key.redacted())
}

// connectionHint says what to do when no answer came.
func connectionHint(err error) string {
	var untrusted *tls.CertificateVerificationError
	var noTLS tls.RecordHeaderError
	var unknownHost *net.DNSError
	var wrongName x509.HostnameError
	switch {
	case errors.As(err, &wrongName):
		return "The manager's certificate is for another name: use that in end_point."
	case errors.As(err, &untrusted):
		return "This host does not trust the manager's certificate: add its CA to the system's, or name it in SSL_CERT_FILE."
	case errors.As(err, &noTLS) || errors.Is(err, http.ErrSchemeMismatch):
		return "There is no TLS at that port: end_point probably begins with http://."
	case errors.As(err, &unknownHost):
		return "The host's name cannot be looked up: check end_point and this host's DNS."
	case errors.Is(err, errConnectionRefused):
		return "Nothing listens there: is the manager running, and end_point its address and port?"
	case errors.Is(err, errNoProgress):
		return "The manager, or the network on the way to it, does not answer in time."
	}
	return "Is the manager running and reachable from this host, and end_point its address?"
}

// A rememberedReply is the last good reply as it lies in data_dir. It holds what the manager sent, broker passwords
// among them.
type rememberedReply struct {
	SavedAt   time.Time       `json:"saved_at"`
	EndPoint  string          `json:"end_point"`
	ProjectID string          `json:"project_id"`
	SHA256    string          `json:"sha256"` // of the reply, hex
	Return    json.RawMessage `json:"return"`
}

func (m *managerClient) rememberedPath() string { return filepath.Join(m.cfg.DataDir, "manager.json") }

// remember keeps a reply for a start without the manager. The file is replaced as a whole, and only its owner reads it.
func (m *managerClient) remember(reply *managerReply) error {
	sum := sha256.Sum256(reply.received)
	var text bytes.Buffer
	encoder := json.NewEncoder(&text)
	encoder.SetEscapeHTML(false) // it would change what the sum is of
	err := encoder.Encode(rememberedReply{
		SavedAt: time.Now().UTC(), EndPoint: m.cfg.EndPoint, ProjectID: m.cfg.Credential.ProjectID,
		SHA256: hex.EncodeToString(sum[:]), Return: reply.received,
	})
	if err == nil {
		err = os.MkdirAll(m.cfg.DataDir, 0o700)
	}
	if err == nil {
		err = writePrivately(m.rememberedPath(), text.Bytes())
	}
	if err != nil {
		return failHint(codeManagerRemember, "keep the manager's answer in "+m.rememberedPath(), withoutPath(err),
			"Check that data_dir may be written to and has room; without it the worker cannot start while the manager is away.")
	}
	return nil
}

// writePrivately replaces a file by one with mode 0600: whole and on disk, or not at all.
func writePrivately(path string, content []byte) error {
	next := path + ".new"
	if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	file, err := os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = file.Write(content)
	if err = errors.Join(err, file.Sync(), file.Close()); err == nil {
		err = os.Rename(next, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(next))
	}
	return syncFolder(filepath.Dir(path))
}

// remembered gives the last good reply of this manager to this project, and when it came. Its error wraps
// fs.ErrNotExist where none is kept; a damaged one, or another manager's, is not used.
func (m *managerClient) remembered() (*managerReply, time.Time, error) {
	reply, savedAt, err := m.readRemembered()
	if err != nil {
		return nil, time.Time{}, failHint(codeManagerRemembered, "use the answer kept in "+m.rememberedPath(), err,
			"The worker starts as soon as the manager answers.")
	}
	return reply, savedAt, nil
}

func (m *managerClient) readRemembered() (*managerReply, time.Time, error) {
	text, err := readBounded(m.rememberedPath(), maxManagerReplyBytes+4096)
	if err != nil {
		return nil, time.Time{}, err
	}
	var kept rememberedReply
	if err := json.Unmarshal(text, &kept); err != nil {
		return nil, time.Time{}, fmt.Errorf("damaged: %w", err)
	}
	if kept.EndPoint != m.cfg.EndPoint || kept.ProjectID != m.cfg.Credential.ProjectID {
		return nil, time.Time{}, errors.New("it belongs to another end_point or project_id")
	}
	if sum := sha256.Sum256(kept.Return); kept.SHA256 != hex.EncodeToString(sum[:]) {
		return nil, time.Time{}, errors.New("damaged: its checksum does not match")
	}
	reply, err := parseReturn(kept.Return, m.cfg.Credential.SecretKey)
	return reply, kept.SavedAt, err
}
