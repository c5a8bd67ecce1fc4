package main

// sign.go is `sign`, for whoever publishes versions: it makes the key pair, prints what the manager has to answer for a
// binary, and checks a signature. The private key is a PEM file (PKCS #8) that other tools read too; the signature is
// Ed25519 over the bytes of the file. What a worker does with a signature is update.go's affair.

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
)

const (
	maxSignedBytes = 256 << 20 // Ed25519 wants the whole file in memory
	maxKeyBytes    = 64 << 10  // a key's file has some 120 bytes; more is another file

	privateKeyBlock = "PRIVATE KEY" // the PEM type of PKCS #8
)

// A signedFile is what the manager has to answer for a binary, under its own names.
type signedFile struct {
	File      string `json:"file"`
	Size      int    `json:"size"`
	SHA256    string `json:"job_item_sha256"`
	Signature string `json:"job_item_signature"`
}

// runSign is `sign`, with one of --new-key, --key and --check.
func runSign(inv *invocation) int {
	modes := 0
	for _, name := range []string{"new-key", "key", "check"} {
		if inv.flags[name] {
			modes++
		}
	}
	switch {
	case modes != 1:
		return inv.usageError("sign takes one of --new-key, --key and --check")
	case inv.flags["signature"] != inv.flags["check"]:
		return inv.usageError("--check and --signature belong together")
	case inv.flags["check"] && len(inv.args) != 1:
		return inv.usageError("sign --check takes one BINARY")
	case inv.flags["new-key"] && len(inv.args) > 0:
		return inv.usageError("sign --new-key takes no BINARY: sign with --key once the key is there")
	case inv.json && (!inv.flags["key"] || len(inv.args) == 0):
		return inv.usageError("sign --json goes with --key and a BINARY")
	case inv.flags["check"]:
		return inv.checkSignature()
	}

	var key ed25519.PrivateKey
	var err error
	if inv.flags["new-key"] {
		key, err = createPrivateKey(inv.newKey)
	} else {
		key, err = readPrivateKey(inv.key)
	}
	if err != nil {
		inv.printError(err)
		return exitFailed
	}
	if len(inv.args) == 0 {
		fmt.Fprintln(inv.stdout, base64.StdEncoding.EncodeToString(key.Public().(ed25519.PublicKey)))
		return exitOK
	}
	return inv.signFiles(key)
}

// signFiles prints each file's line as soon as it is signed. The first failure ends it: half a version is not to
// be published.
func (inv *invocation) signFiles(key ed25519.PrivateKey) int {
	for _, path := range inv.args {
		content, err := readSigned(path)
		if err != nil {
			inv.printError(err)
			return exitFailed
		}
		sum := sha256.Sum256(content)
		signed := signedFile{
			File:      path,
			Size:      len(content),
			SHA256:    hex.EncodeToString(sum[:]),
			Signature: base64.StdEncoding.EncodeToString(ed25519.Sign(key, content)),
		}
		if inv.json {
			err = json.NewEncoder(inv.stdout).Encode(signed)
		} else {
			_, err = fmt.Fprintf(inv.stdout, "%s\n  size                %d\n  job_item_sha256     %s\n  job_item_signature  %s\n",
				signed.File, signed.Size, signed.SHA256, signed.Signature)
		}
		if err != nil {
			inv.printError(fail(codeSignOutput, fmt.Sprintf("print the signature of %q", path), dropPath(err)))
			return exitFailed
		}
	}
	return exitOK
}

// checkSignature is `sign --check`.
func (inv *invocation) checkSignature() int {
	publicKey, err := parsePublicKey(inv.check)
	if err != nil {
		inv.printError(err)
		return exitUsage
	}
	content, err := readSigned(inv.args[0])
	if err != nil {
		inv.printError(err)
		return exitFailed
	}
	if !validSignature(publicKey, inv.signature, content) {
		inv.printError(fail(codeSignature, fmt.Sprintf("%q is not signed so by this key", inv.args[0]), nil))
		return exitFailed
	}
	fmt.Fprintf(inv.stdout, "%s: the signature is valid\n", inv.args[0])
	return exitOK
}

// parsePublicKey reads an Ed25519 public key as update.public_key and sign have it: 32 bytes in standard base64.
func parsePublicKey(text string) (ed25519.PublicKey, error) {
	key, err := base64.StdEncoding.DecodeString(text)
	if err != nil || len(key) != ed25519.PublicKeySize {
		return nil, fail(codePublicKey, fmt.Sprintf("want an Ed25519 public key: 32 bytes in base64, got %q", text), nil)
	}
	return key, nil
}

// createPrivateKey makes a new key and keeps it in path, which must not exist: a key that is overwritten takes with it
// the way to update every worker that trusts it.
func createPrivateKey(path string) (key ed25519.PrivateKey, err error) {
	defer func() {
		if err != nil {
			err = fail(codeNewKey, fmt.Sprintf("make a key in %q", path), dropPath(err))
		}
	}()
	_, key, err = ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	err = pem.Encode(file, &pem.Block{Type: privateKeyBlock, Bytes: der})
	if err == nil {
		err = file.Sync() // its public half may be on its way to the workers in a moment
	}
	if err = errors.Join(err, file.Close()); err != nil {
		os.Remove(path)
		return nil, err
	}
	return key, nil
}

// readPrivateKey reads a key that createPrivateKey, or another tool, has made.
func readPrivateKey(path string) (ed25519.PrivateKey, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, keyError(path, err)
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return nil, keyError(path, err)
	}
	// Refused, as ssh does: whoever has the key decides what every worker runs, and a warning scrolls by. A pipe has no
	// others to be read by, and Windows shows in other ways than by these bits who may read a file.
	if mode := info.Mode(); mode.IsRegular() && mode.Perm()&0o077 != 0 && runtime.GOOS != "windows" {
		return nil, failHint(codeKeyExposed, fmt.Sprintf("private key %q is open to others (mode %#o)", path, mode.Perm()), nil,
			"chmod 600 it, and make a new one if anybody may have read it")
	}
	text, err := io.ReadAll(io.LimitReader(file, maxKeyBytes))
	if err != nil {
		return nil, keyError(path, err)
	}
	key, err := parsePrivateKey(text)
	if err != nil {
		return nil, keyError(path, err)
	}
	return key, nil
}

func keyError(path string, err error) error {
	return failHint(codePrivateKey, fmt.Sprintf("read private key %q", path), dropPath(err), "make one with: job_item sign --new-key FILE")
}

func parsePrivateKey(text []byte) (ed25519.PrivateKey, error) {
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, errors.New("no PEM block")
	}
	if block.Type != privateKeyBlock {
		return nil, fmt.Errorf("want a PEM block %q, got %q", privateKeyBlock, block.Type)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	key, ok := parsed.(ed25519.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("want an Ed25519 key, got %T", parsed)
	}
	return key, nil
}

// readSigned reads a binary whole. An empty one is an accident on its way to all workers.
func readSigned(path string) (content []byte, err error) {
	defer func() {
		if err != nil {
			err = fail(codeSignedFile, fmt.Sprintf("read %q", path), dropPath(err))
		}
	}()
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	content, err = io.ReadAll(io.LimitReader(file, maxSignedBytes+1))
	switch {
	case err != nil:
		return nil, err
	case len(content) == 0:
		return nil, errors.New("the file is empty")
	case len(content) > maxSignedBytes:
		return nil, fmt.Errorf("larger than %d MiB", maxSignedBytes>>20)
	}
	return content, nil
}
