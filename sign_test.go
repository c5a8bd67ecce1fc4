package main

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// signer is a folder with a key made by sign and a file to sign.
type signer struct {
	dir, key, binary string
	publicKey        string // as printed
	content          []byte
}

func newSigner(t *testing.T) *signer {
	t.Helper()
	dir := t.TempDir()
	s := &signer{dir: dir, key: filepath.Join(dir, "release.key"), binary: filepath.Join(dir, "job_item"), content: []byte("\x7fELF or so\n\x00")}
	if err := os.WriteFile(s.binary, s.content, 0o755); err != nil {
		t.Fatal(err)
	}
	made := runCLI(t, nil, "", "sign", "--new-key", s.key)
	if made.code != 0 || made.stderr != "" {
		t.Fatalf("sign --new-key: %+v", made)
	}
	s.publicKey = strings.TrimSuffix(made.stdout, "\n")
	return s
}

// sign gives what `sign --json` prints for the file.
func (s *signer) sign(t *testing.T) signedFile {
	t.Helper()
	result := runCLI(t, nil, "", "sign", "--key", s.key, "--json", s.binary)
	var signed signedFile
	if err := json.Unmarshal([]byte(result.stdout), &signed); err != nil || result.code != 0 {
		t.Fatalf("sign --json: %v, %+v", err, result)
	}
	return signed
}

func TestSign(t *testing.T) {
	s := newSigner(t)
	if got := runCLI(t, nil, "", "sign", "--key", s.key); got.stdout != s.publicKey+"\n" || got.code != 0 {
		t.Errorf("sign --key = %+v; want the public key %s", got, s.publicKey)
	}
	config := filepath.Join(s.dir, "config.yaml")
	text := "jobs: [{event: e, cmd: 'true'}]\nupdate: {public_key: " + s.publicKey + "}\n"
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := loadConfig(config, os.LookupEnv); err != nil {
		t.Errorf("update.public_key does not take the printed key: %v", err)
	}

	signed := s.sign(t)
	publicKey, _ := base64.StdEncoding.DecodeString(s.publicKey)
	signature, _ := base64.StdEncoding.DecodeString(signed.Signature)
	if len(publicKey) != ed25519.PublicKeySize || !ed25519.Verify(publicKey, s.content, signature) {
		t.Errorf("%q is no signature by %q", signed.Signature, s.publicKey)
	}
	sum := sha256.Sum256(s.content)
	if signed.File != s.binary || signed.Size != len(s.content) || signed.SHA256 != hex.EncodeToString(sum[:]) {
		t.Errorf("signed %+v", signed)
	}

	plain := runCLI(t, nil, "", "sign", "--key", s.key, s.binary, s.binary)
	for _, part := range []string{s.binary + "\n", " job_item_sha256     " + signed.SHA256 + "\n", " job_item_signature  " + signed.Signature + "\n"} {
		if strings.Count(plain.stdout, part) != 2 {
			t.Errorf("for two files sign printed\n%s\nwant twice %q", plain.stdout, part)
		}
	}
}

func TestSignCheck(t *testing.T) {
	s := newSigner(t)
	other := newSigner(t)
	signature := s.sign(t).Signature
	changed := filepath.Join(s.dir, "changed")
	if err := os.WriteFile(changed, append(bytes.Clone(s.content), 0), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, publicKey, signature, file string
		code                             int
		says                             string
	}{
		{"the key's own", s.publicKey, signature, s.binary, exitOK, ""},
		{"one byte more", s.publicKey, signature, changed, exitFailed, string(codeSignature)},
		{"another key", other.publicKey, signature, s.binary, exitFailed, string(codeSignature)},
		{"half a signature", s.publicKey, signature[:44], s.binary, exitFailed, string(codeSignature)},
		{"no base64", s.publicKey, "?", s.binary, exitFailed, string(codeSignature)},
		{"no signature", s.publicKey, "", s.binary, exitFailed, string(codeSignature)},
		{"no file", s.publicKey, signature, s.binary + "2", exitFailed, string(codeSignedFile)},
		{"no key", signature, signature, s.binary, exitUsage, string(codePublicKey)},
	} {
		got := runCLI(t, nil, "", "sign", "--check", c.publicKey, "--signature", c.signature, c.file)
		if got.code != c.code || !strings.Contains(got.stderr, c.says) || (got.stdout != "") != (c.code == exitOK) {
			t.Errorf("%s: %+v; want exit code %d and %s", c.name, got, c.code, c.says)
		}
	}
}

func TestSignRefuses(t *testing.T) {
	s := newSigner(t)
	empty := filepath.Join(s.dir, "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	key, err := os.ReadFile(s.key)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"--new-key", s.key}, exitFailed, string(codeNewKey)},
		{[]string{"--new-key", filepath.Join(s.dir, "no", "folder")}, exitFailed, string(codeNewKey)},
		{[]string{"--key", s.key + "2"}, exitFailed, string(codePrivateKey)},
		{[]string{"--key", empty}, exitFailed, string(codePrivateKey)},
		{[]string{"--key", s.key, empty}, exitFailed, string(codeSignedFile)},
		{[]string{"--key", s.key, s.dir}, exitFailed, string(codeSignedFile)},
		{[]string{}, exitUsage, "one of --new-key, --key and --check"},
		{[]string{s.binary}, exitUsage, "one of --new-key, --key and --check"},
		{[]string{"--new-key", "a", "--key", "b"}, exitUsage, "one of --new-key, --key and --check"},
		{[]string{"--new-key", s.key + "2", s.binary}, exitUsage, "takes no BINARY"},
		{[]string{"--key", s.key, "--json"}, exitUsage, "sign --json goes with"},
		{[]string{"--key", s.key, "--signature", "x", s.binary}, exitUsage, "belong together"},
		{[]string{"--check", s.publicKey, s.binary}, exitUsage, "belong together"},
		{[]string{"--check", s.publicKey, "--signature", "x"}, exitUsage, "takes one BINARY"},
	} {
		got := runCLI(t, nil, "", append([]string{"sign"}, c.args...)...)
		if got.code != c.code || got.stdout != "" || !strings.Contains(got.stderr, c.says) {
			t.Errorf("sign %q: %+v; want exit code %d and %q", c.args, got, c.code, c.says)
		}
	}
	if after, err := os.ReadFile(s.key); err != nil || !bytes.Equal(after, key) {
		t.Errorf("the key was overwritten: %v", err)
	}
}

func TestSignExposedKey(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("Windows has no such permission bits")
	}
	s := newSigner(t)
	info, err := os.Stat(s.key)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the new key: %v, %v; want mode 0600", info.Mode(), err)
	}
	for _, mode := range []os.FileMode{0o640, 0o604, 0o620} {
		if err := os.Chmod(s.key, mode); err != nil {
			t.Fatal(err)
		}
		if got := runCLI(t, nil, "", "sign", "--key", s.key, s.binary); got.code != exitFailed || !strings.Contains(got.stderr, string(codeKeyExposed)) {
			t.Errorf("mode %v: %+v; want %s", mode, got, codeKeyExposed)
		}
	}
}

// TestSignOpenSSL has OpenSSL check a signature, and sign takes keys that OpenSSL has made, but only Ed25519 ones.
func TestSignOpenSSL(t *testing.T) {
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skip("openssl is missing")
	}
	s := newSigner(t)
	openssl := func(args ...string) (string, error) {
		cmd := exec.Command("openssl", args...)
		cmd.Dir = s.dir
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	must := func(args ...string) {
		t.Helper()
		if out, err := openssl(args...); err != nil {
			t.Fatalf("openssl %q: %v\n%s", args, err, out)
		}
	}
	verifies := func(file string) bool {
		_, err := openssl("pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", "public.pem", "-sigfile", "signature", "-in", file)
		return err == nil
	}
	if version, _ := openssl("version"); !strings.HasPrefix(version, "OpenSSL 3") {
		t.Skipf("%s: -rawin needs OpenSSL 3", strings.TrimSpace(version))
	}
	signature, err := base64.StdEncoding.DecodeString(s.sign(t).Signature)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(s.dir, "signature"), signature, 0o600); err != nil {
		t.Fatal(err)
	}
	must("pkey", "-in", "release.key", "-pubout", "-out", "public.pem")
	if !verifies("job_item") {
		t.Error("openssl does not accept the signature")
	}
	if verifies("release.key") {
		t.Error("openssl accepts the signature for another file")
	}

	s.key = filepath.Join(s.dir, "theirs.key")
	must("genpkey", "-algorithm", "ed25519", "-out", s.key)
	if got := runCLI(t, nil, "", "sign", "--check", strings.TrimSpace(runCLI(t, nil, "", "sign", "--key", s.key).stdout),
		"--signature", s.sign(t).Signature, s.binary); got.code != exitOK {
		t.Errorf("with OpenSSL's key: %+v", got)
	}
	must("pkey", "-in", s.key, "-aes256", "-passout", "pass:x", "-out", "encrypted.key")
	must("genpkey", "-algorithm", "x25519", "-out", "exchange.key")
	for name, says := range map[string]string{"encrypted.key": `got "ENCRYPTED PRIVATE KEY"`, "exchange.key": "want an Ed25519 key"} {
		path := filepath.Join(s.dir, name)
		if err := os.Chmod(path, 0o600); err != nil {
			t.Fatal(err)
		}
		if got := runCLI(t, nil, "", "sign", "--key", path); got.code != exitFailed || !strings.Contains(got.stderr, says) {
			t.Errorf("%s: %+v; want %q", name, got, says)
		}
	}
}
