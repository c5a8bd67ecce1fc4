package main

// certificates_test.go is about the files of TLS: how they get here from a manager, what is in their way, and what is wrong
// with a file.

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// A testAuthority issues certificates for tests.
type testAuthority struct {
	t           testing.TB
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
	pem         []byte
}

func newTestAuthority(t testing.TB) *testAuthority {
	a := &testAuthority{t: t}
	a.pem, _ = a.issue(time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
	return a
}

// issue makes a certificate for 127.0.0.1 and localhost, for servers and clients, with its key. The first is the
// authority's own.
func (a *testAuthority) issue(from, until time.Time) (certificate, key []byte) {
	a.t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	serial, _ := rand.Int(rand.Reader, big.NewInt(1<<62))
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "job_item test " + serial.String()},
		NotBefore: from, NotAfter: until, IsCA: a.key == nil, BasicConstraintsValid: true,
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		DNSNames:    []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	parent, signer := a.certificate, a.key
	if a.key == nil {
		template.KeyUsage |= x509.KeyUsageCertSign
		parent, signer = template, private
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &private.PublicKey, signer)
	if err != nil {
		a.t.Fatal(err)
	}
	if a.key == nil {
		if a.certificate, err = x509.ParseCertificate(der); err != nil {
			a.t.Fatal(err)
		}
		a.key = private
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		a.t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
}

// putFiles writes files into a folder, by name with slashes.
func putFiles(t testing.TB, dir string, files map[string][]byte) {
	t.Helper()
	for name, content := range files {
		path := filepath.Join(dir, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// tree gives all that is in a folder: files with their content, folders and links by what they are.
func tree(t testing.TB, dir string) map[string]string {
	t.Helper()
	found := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		name = filepath.ToSlash(name)
		if !entry.Type().IsRegular() {
			found[name] = entry.Type().String()
			return nil
		}
		text, err := os.ReadFile(path)
		found[name] = string(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// fetchInto has a manager's archive unpacked for ca_file tls/nats/ca.crt in the configuration's folder.
func fetchInto(t testing.TB, f *fakeManager, cfg *Config) error {
	t.Helper()
	m := newManagerClient(cfg, silentLog())
	reply, err := m.ask(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return m.fetchCertificates(t.Context(), reply)
}

func secureNATS(caFile string) map[string]any {
	return map[string]any{"type": "nats", "host": "localhost", "secure": 1, "ca_file": caFile}
}

func TestCertificatesFetched(t *testing.T) {
	f := newFakeManager(t, "project-1")
	cfg := managedConfig(t, f, minimalConfig)
	old := map[string][]byte{"tls/nats/ca.crt": []byte("old"), "tls/nats/mine.txt": []byte("mine")}
	putFiles(t, cfg.Dir, old)
	f.change(func(f *fakeManager) {
		f.connection = secureNATS("tls/nats/ca.crt")
		f.zip = makeZip(t, plainEntry("ca.crt"), zipEntry{name: "sub/"}, plainEntry("sub/deep/client.KEY"),
			plainEntry("README.md"), plainEntry("run.sh"), plainEntry("config.yaml"), plainEntry("__MACOSX/x.crt"),
			plainEntry(".hidden.pem"), zipEntry{name: "client.crt", content: "c", mode: 0o6777})
	})
	for range 2 {
		if err := fetchInto(t, f, cfg); err != nil {
			t.Fatal(err)
		}
		got := tree(t, filepath.Join(cfg.Dir, "tls"))
		want := map[string]string{
			"nats": fs.ModeDir.String(), "nats/ca.crt": "content of ca.crt", "nats/mine.txt": "mine", "nats/client.crt": "c",
			"nats/sub": fs.ModeDir.String(), "nats/sub/deep": fs.ModeDir.String(),
			"nats/sub/deep/client.KEY": "content of sub/deep/client.KEY",
		}
		for name, kind := range got {
			if strings.HasPrefix(kind, "d") {
				got[name] = fs.ModeDir.String()
			}
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("the folder holds %q; want %q", got, want)
		}
	}
	for name, want := range map[string]fs.FileMode{"ca.crt": 0o600, "client.crt": 0o600, "sub/deep/client.KEY": 0o600,
		"sub": 0o700, "sub/deep": 0o700} {
		info, err := os.Stat(filepath.Join(cfg.Dir, "tls", "nats", name))
		if err != nil || runtime.GOOS != "windows" && info.Mode().Perm() != want {
			t.Errorf("%s has mode %v, %v; want %v", name, info.Mode(), err, want)
		}
	}
	requests := f.received(managerTLSPath)
	want := map[string]any{"app_id": fakeProjectID, "app_secret": fakeSecretKey}
	if len(requests) != 2 || !reflect.DeepEqual(requests[0].body, want) {
		t.Errorf("requests %v; want 2 of %v", requests, want)
	}
}

// TestCertificatesNotFetched is about connections that need no files of the manager's, or may not have them.
func TestCertificatesNotFetched(t *testing.T) {
	f := newFakeManager(t, "project-1")
	cfg := managedConfig(t, f, minimalConfig)
	f.change(func(f *fakeManager) { f.zip = makeZip(t, plainEntry("ca.crt")) })
	for _, connection := range []map[string]any{
		nil,
		{"type": "nats", "host": "h", "secure": false, "ca_file": "tls/ca.crt"},
		{"type": "nats", "host": "h", "secure": true, "ca_file": ""},
	} {
		f.change(func(f *fakeManager) { f.connection = connection })
		if err := fetchInto(t, f, cfg); err != nil {
			t.Errorf("%v: %v", connection, err)
		}
	}
	f.change(func(f *fakeManager) { f.connection = secureNATS("../ca.crt") })
	wantError(t, fetchInto(t, f, cfg), codeManagerPath, "outside")
	if n := len(f.received(managerTLSPath)); n != 0 {
		t.Errorf("%d downloads; want none", n)
	}
	f.change(func(f *fakeManager) { f.connection, f.zip = secureNATS("tls/ca.crt"), nil })
	wantError(t, fetchInto(t, f, cfg), codeManagerStatus, managerTLSPath+": answered 404")
}

// TestCertificatesNamedHere is about a folder elsewhere, which the configuration file has to allow.
func TestCertificatesNamedHere(t *testing.T) {
	f := newFakeManager(t, "project-1")
	elsewhere := filepath.Join(t.TempDir(), "pki")
	caFile := filepath.Join(elsewhere, "ca.crt")
	cfg := managedConfig(t, f, "broker_connection: {type: nats, host: h, ca_file: '"+caFile+"'}\n"+minimalConfig)
	f.change(func(f *fakeManager) {
		f.connection, f.zip = secureNATS(caFile), makeZip(t, plainEntry("ca.crt"))
	})
	if err := fetchInto(t, f, cfg); err != nil {
		t.Fatal(err)
	}
	if got := tree(t, elsewhere); got["ca.crt"] != "content of ca.crt" {
		t.Errorf("the folder holds %q", got)
	}
}

// TestCertificatesInTheWay is about what stands where a file of the archive belongs.
func TestCertificatesInTheWay(t *testing.T) {
	f := newFakeManager(t, "project-1")
	outside := t.TempDir()
	for what, row := range map[string]struct {
		put  func(dir string) error
		part string
	}{
		"a folder": {func(dir string) error { return os.MkdirAll(filepath.Join(dir, "sub", "client.crt"), 0o700) },
			"is a folder"},
		"a file as a folder": {func(dir string) error { return os.WriteFile(filepath.Join(dir, "sub"), nil, 0o600) },
			"is not a folder"},
		"a link out": {func(dir string) error { return os.Symlink(outside, filepath.Join(dir, "sub")) }, "is not a folder"},
	} {
		cfg := managedConfig(t, f, minimalConfig)
		dir := filepath.Join(cfg.Dir, "tls")
		putFiles(t, dir, map[string][]byte{"ca.crt": []byte("old")})
		if err := row.put(dir); err != nil {
			t.Skip(err)
		}
		f.change(func(f *fakeManager) {
			f.connection, f.zip = secureNATS("tls/ca.crt"), makeZip(t, plainEntry("ca.crt"), plainEntry("sub/client.crt"))
		})
		err := fetchInto(t, f, cfg)
		if err == nil {
			t.Errorf("%s: no error", what)
			continue
		}
		wantError(t, err, codeCertificateWrite, row.part)
		if got := tree(t, dir)["ca.crt"]; got != "old" || len(tree(t, outside)) > 0 {
			t.Errorf("%s: ca.crt is %q, outside is %q; want nothing new", what, got, tree(t, outside))
		}
	}

	// A link at the file's own place is replaced, what it points to is not.
	cfg := managedConfig(t, f, minimalConfig)
	target := filepath.Join(outside, "target")
	if err := os.WriteFile(target, []byte("theirs"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(target, filepath.Join(cfg.Dir, "ca.crt")); err != nil {
		t.Skip(err)
	}
	f.change(func(f *fakeManager) { f.connection, f.zip = secureNATS("ca.crt"), makeZip(t, plainEntry("ca.crt")) })
	if err := fetchInto(t, f, cfg); err != nil {
		t.Fatal(err)
	}
	if tree(t, outside)["target"] != "theirs" || tree(t, cfg.Dir)["ca.crt"] != "content of ca.crt" {
		t.Errorf("%q and %q; want the link replaced alone", tree(t, outside), tree(t, cfg.Dir))
	}

	// The worker's own key is no certificate of the manager's.
	cfg.Credential.SecretKeyFile = filepath.Join(cfg.Dir, "secret.key")
	f.change(func(f *fakeManager) { f.zip = makeZip(t, plainEntry("Secret.key")) })
	wantError(t, fetchInto(t, f, cfg), codeCertificateWrite, "not the manager's to replace")
}

func TestCertificatesLeftovers(t *testing.T) {
	dir := t.TempDir()
	old, fresh := filepath.Join(dir, unpackPrefix+"1"), filepath.Join(dir, unpackPrefix+"2")
	putFiles(t, dir, map[string][]byte{unpackPrefix + "1/0": nil, unpackPrefix + "2/0": nil})
	yesterday := time.Now().Add(-24 * time.Hour)
	if err := os.Chtimes(old, yesterday, yesterday); err != nil {
		t.Fatal(err)
	}
	changed, err := placeCertificates(dir, []certificateFile{{"ca.crt", []byte("x")}})
	if err != nil || changed != 1 {
		t.Fatalf("%d, %v; want 1 file", changed, err)
	}
	if _, err := os.Stat(old); err == nil {
		t.Error("yesterday's leftovers are still there")
	}
	if _, err := os.Stat(fresh); err != nil {
		t.Error("what another worker unpacks just now is gone")
	}
}

func TestBrokerTLSProblems(t *testing.T) {
	a := newTestAuthority(t)
	now := time.Now()
	cert, key := a.issue(now.Add(-time.Hour), now.Add(time.Hour))
	expired, expiredKey := a.issue(now.Add(-2*time.Hour), now.Add(-time.Hour))
	early, earlyKey := a.issue(now.Add(time.Hour), now.Add(2*time.Hour))
	_, otherKey := a.issue(now.Add(-time.Hour), now.Add(time.Hour))
	block := func(kind string) []byte { return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: []byte("nonsense")}) }
	legacy := pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: []byte("x"),
		Headers: map[string]string{"Proc-Type": "4,ENCRYPTED", "DEK-Info": "AES-128-CBC,00"}})
	dir := t.TempDir()
	putFiles(t, dir, map[string][]byte{
		"ca": a.pem, "cert": cert, "key": key, "expired": expired, "expired.key": expiredKey, "early": early, "early.key": earlyKey,
		"other.key": otherKey, "empty": nil, "text": []byte("hello"), "nonsense": block("CERTIFICATE"),
		"nonsense.key": block("PRIVATE KEY"), "encrypted": block("ENCRYPTED PRIVATE KEY"), "legacy": legacy,
		"folder/x": nil, "large": make([]byte, maxPEMBytes+1), "bundle": slices.Concat(expired, block("CERTIFICATE"), key, a.pem),
		"bad bundle": slices.Concat(expired, early),
	})
	for _, row := range []struct{ ca, cert, key, file, part string }{
		{"missing", "", "", "ca_file", "no such file"},
		{"folder", "", "", "ca_file", "not a regular file"},
		{"empty", "", "", "ca_file", "empty"},
		{"text", "", "", "ca_file", "not PEM"},
		{"key", "", "", "ca_file", "found only PRIVATE KEY"},
		{"nonsense", "", "", "ca_file", "malformed"},
		{"expired", "", "", "ca_file", "has expired on"},
		{"early", "", "", "ca_file", "not valid before"},
		{"bad bundle", "", "", "ca_file", "has expired on"},
		{"large", "", "", "ca_file", "larger than"},
		{"ca", "cert", "", "cert_file", "no key_file"},
		{"ca", "", "key", "key_file", "no cert_file"},
		{"ca", "missing", "key", "cert_file", "no such file"},
		{"ca", "text", "key", "cert_file", "not PEM"},
		{"ca", "key", "key", "cert_file", "found only PRIVATE KEY"},
		{"ca", "nonsense", "key", "cert_file", "malformed"},
		{"ca", "expired", "expired.key", "cert_file", "has expired on"},
		{"ca", "early", "early.key", "cert_file", "not valid before"},
		{"ca", "cert", "missing", "key_file", "no such file"},
		{"ca", "cert", "text", "key_file", "not PEM"},
		{"ca", "cert", "cert", "key_file", "found only CERTIFICATE"},
		{"ca", "cert", "encrypted", "key_file", "encrypted with a password"},
		{"ca", "cert", "legacy", "key_file", "encrypted with a password"},
		{"ca", "cert", "nonsense.key", "key_file", "does not go with"},
		{"ca", "cert", "other.key", "key_file", "does not go with"},
	} {
		at := func(name string) string {
			if name == "" {
				return ""
			}
			return filepath.Join(dir, name)
		}
		b := BrokerConfig{Type: "nats", Secure: true, CAFile: at(row.ca), CertFile: at(row.cert), KeyFile: at(row.key)}
		config, err := brokerTLS(b, dir)
		if runtime.GOOS == "windows" {
			row.part = strings.ReplaceAll(row.part, "no such file", "cannot find the file")
		}
		wantError(t, err, codeTLSFile, row.part)
		named := map[string]string{"ca_file": b.CAFile, "cert_file": b.CertFile, "key_file": b.KeyFile}[row.file]
		if err != nil && !strings.Contains(err.Error(), row.file+" "+named) || config != nil {
			t.Errorf("%+v: %v, %v; want an error that names %s %s", row, config, err, row.file, named)
		}
		b.Secure = false
		if config, err := brokerTLS(b, dir); config != nil || err != nil {
			t.Errorf("not secure: %v, %v; want nothing", config, err)
		}
	}
	if _, err := brokerTLS(BrokerConfig{Type: "nats", Secure: true, CAFile: filepath.Join(dir, "bundle")}, dir); err != nil {
		t.Errorf("a bundle with one good certificate: %v", err)
	}
}

// TestBrokerTLSDefaults connects with the files that lie beside a configuration.
func TestBrokerTLSDefaults(t *testing.T) {
	a := newTestAuthority(t)
	cert, key := a.issue(time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	clients := x509.NewCertPool()
	clients.AddCert(a.certificate)
	server := &tls.Config{Certificates: []tls.Certificate{pair}, ClientCAs: clients}

	dir := t.TempDir()
	putFiles(t, dir, map[string][]byte{
		"tls/nats/ca.crt": a.pem, "tls/nats/client.crt": cert, "tls/nats/client.key": key,
		"tls/rabbitmq/server.crt": cert, // the server's own, as its name says
		"tls/redis/ca.crt":        a.pem,
	})
	for _, row := range []struct {
		broker, dir string
		demand      tls.ClientAuthType
		works       bool
	}{
		{"nats", dir, tls.RequireAndVerifyClientCert, true},
		{"rabbitmq", dir, tls.NoClientCert, true},
		{"redis", dir, tls.NoClientCert, true},
		{"redis", dir, tls.RequireAndVerifyClientCert, false},
		{"nats", t.TempDir(), tls.NoClientCert, false}, // the system does not know our authority
	} {
		config, err := brokerTLS(BrokerConfig{Type: row.broker, Secure: true}, row.dir)
		if err != nil {
			t.Errorf("%s: %v", row.broker, err)
			continue
		}
		if config.MinVersion != tls.VersionTLS12 || config.ServerName != "" {
			t.Errorf("%s: %+v; want TLS 1.2 and the name left open", row.broker, config)
		}
		config.ServerName = "127.0.0.1"
		server := server.Clone()
		server.ClientAuth = row.demand
		if err := shakeHands(t, server, config); (err == nil) != row.works {
			t.Errorf("%s with %v: %v; want works: %v", row.broker, row.demand, err, row.works)
		}
	}
	if err := os.Remove(filepath.Join(dir, "tls", "nats", "client.key")); err != nil {
		t.Fatal(err)
	}
	_, err = brokerTLS(BrokerConfig{Type: "nats", Secure: true}, dir)
	wantError(t, err, codeTLSFile, "no key_file")
}

// shakeHands connects a client to a server and gives what either says against it.
func shakeHands(t testing.TB, server, client *tls.Config) error {
	t.Helper()
	listener, err := tls.Listen("tcp", "127.0.0.1:0", server)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	served := make(chan error, 1)
	go func() { // ends with its one connection; waited for below
		conn, err := listener.Accept()
		if err == nil {
			err = conn.(*tls.Conn).Handshake()
			conn.Close()
		}
		served <- err
	}()
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: 10 * time.Second}, "tcp", listener.Addr().String(), client)
	if err == nil {
		defer conn.Close()
	}
	if serverErr := <-served; serverErr != nil {
		return serverErr
	}
	return err
}
