package main

// certificates.go makes the TLS side of a broker's connection out of the files that the configuration or the manager
// names, and says of each what is wrong with it before a server has to. How a manager's files get here is in
// certificates_archive.go.

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// maxPEMBytes bounds one file of certificates; the bundle of a whole system has 300 KB.
const maxPEMBytes = 4 << 20

// defaultTLSFiles are where a broker's files are looked for beside the configuration when no path is given.
var defaultTLSFiles = map[string]struct{ ca, cert, key string }{
	"nats":     {"tls/nats/ca.crt", "tls/nats/client.crt", "tls/nats/client.key"},
	"rabbitmq": {ca: "tls/rabbitmq/server.crt"},
	"redis":    {"tls/redis/ca.crt", "tls/redis/client.crt", "tls/redis/client.key"},
}

// brokerTLS is how to secure a connection to the broker, nil where it is not to be. dir is the configuration's folder.
// Files are those that b names, else those of the default names if they are there, else the system's roots and no
// certificate of ours. ServerName is left to the caller, who knows the host. The error is codeTLSFile and names the file.
func brokerTLS(b BrokerConfig, dir string) (*tls.Config, error) {
	if !b.Secure {
		return nil, nil
	}
	caFile, certFile, keyFile := b.tlsFiles(dir)
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	now := time.Now()
	if caFile != "" {
		roots, err := loadRoots(caFile, now)
		if err != nil {
			return nil, failTLS("ca_file", caFile, err)
		}
		config.RootCAs = roots
	}
	switch {
	case certFile == "" && keyFile == "":
		return config, nil
	case certFile == "":
		return nil, failTLS("key_file", keyFile, errors.New("there is no cert_file to go with it"))
	case keyFile == "":
		return nil, failTLS("cert_file", certFile, errors.New("there is no key_file to go with it"))
	}
	certText, err := readPEM(certFile)
	if err == nil {
		err = checkClientCertificate(certText, now)
	}
	if err != nil {
		return nil, failTLS("cert_file", certFile, err)
	}
	keyText, err := readPEM(keyFile)
	if err == nil {
		err = checkKey(keyText)
	}
	if err != nil {
		return nil, failTLS("key_file", keyFile, err)
	}
	pair, err := tls.X509KeyPair(certText, keyText)
	if err != nil {
		return nil, failTLS("key_file", keyFile, fmt.Errorf("does not go with cert_file %s: %w", certFile, err))
	}
	config.Certificates = []tls.Certificate{pair}
	return config, nil
}

// tlsFiles are the files that brokerTLS reads, "" where there is none to read.
func (b BrokerConfig) tlsFiles(dir string) (ca, cert, key string) {
	if !b.Secure {
		return "", "", ""
	}
	defaults := defaultTLSFiles[b.Type]
	return existing(b.CAFile, dir, defaults.ca), existing(b.CertFile, dir, defaults.cert), existing(b.KeyFile, dir, defaults.key)
}

// existing is the named file, or else the one of the default name if there is one.
func existing(path, dir, name string) string {
	if path != "" || name == "" {
		return path
	}
	path = filepath.Join(dir, filepath.FromSlash(name))
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return ""
	}
	return path
}

func failTLS(key, path string, err error) error {
	hint := "Replace the file, or correct broker_connection." + key + " (here or in the manager)."
	if errors.Is(err, fs.ErrNotExist) {
		hint = "Put it there, or correct broker_connection." + key + " (here or in the manager)."
	}
	return failHint(codeTLSFile, fmt.Sprintf("use %s %s", key, path), err, hint)
}

// readPEM reads a file that a stranger may have named: opening a pipe or a device could wait for ever.
func readPEM(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, withoutPath(err)
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("not a regular file")
	}
	text, err := readBounded(path, maxPEMBytes)
	if err == nil && len(text) == 0 {
		err = errors.New("the file is empty")
	}
	return text, err
}

// loadRoots reads the certificates that a server's must come from. A bundle may hold old ones, as those of the systems
// do, but one at least has to be good today.
func loadRoots(path string, now time.Time) (*x509.CertPool, error) {
	text, err := readPEM(path)
	if err != nil {
		return nil, err
	}
	roots, good := x509.NewCertPool(), false
	var first error
	err = eachCertificate(text, func(certificate *x509.Certificate, err error) bool {
		if err == nil {
			err = checkPeriod(certificate, now)
		}
		if err == nil {
			roots.AddCert(certificate)
			good = true
		} else if first == nil {
			first = err
		}
		return true
	})
	if err == nil && !good {
		err = first
	}
	return roots, err
}

// eachCertificate hands out the certificates of a PEM file, or why one cannot be read, until visit returns false. The
// error says that there are none.
func eachCertificate(text []byte, visit func(*x509.Certificate, error) bool) error {
	found, other := false, ""
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			other = block.Type
			continue
		}
		found = true
		if certificate, err := x509.ParseCertificate(block.Bytes); !visit(certificate, err) {
			break
		}
	}
	switch {
	case found:
		return nil
	case other != "":
		return fmt.Errorf("want a certificate, found only %s", other)
	}
	return errors.New("not PEM: want -----BEGIN CERTIFICATE-----")
}

func checkPeriod(certificate *x509.Certificate, now time.Time) error {
	switch {
	case now.Before(certificate.NotBefore):
		return fmt.Errorf("the certificate is not valid before %s (it is %s now)",
			certificate.NotBefore.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	case now.After(certificate.NotAfter):
		return fmt.Errorf("the certificate has expired on %s", certificate.NotAfter.UTC().Format(time.RFC3339))
	}
	return nil
}

// checkClientCertificate looks at the first certificate, which is ours; others are on the way from it to the root.
func checkClientCertificate(text []byte, now time.Time) error {
	var problem error
	err := eachCertificate(text, func(certificate *x509.Certificate, err error) bool {
		if problem = err; err == nil {
			problem = checkPeriod(certificate, now)
		}
		return false
	})
	return errors.Join(err, problem)
}

// checkKey tells what cannot be a key; whether it is the right one only its certificate tells.
func checkKey(text []byte) error {
	other := ""
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			break
		}
		switch {
		case block.Type == "ENCRYPTED PRIVATE KEY" || block.Headers["DEK-Info"] != "":
			return errors.New("the key is encrypted with a password, want a plain one")
		case block.Type == "PRIVATE KEY" || block.Type == "RSA PRIVATE KEY" || block.Type == "EC PRIVATE KEY":
			return nil
		}
		other = block.Type
	}
	if other != "" {
		return fmt.Errorf("want a private key, found only %s", other)
	}
	return errors.New("not PEM: want -----BEGIN PRIVATE KEY-----")
}
