package main

// config_watch.go notices that the configuration file, or a file that it names, has another content (PROTOCOL section 8).
// It opens them by path and reads them again and again, since only that sees through every way in which files change: an
// editor that renames or writes in place, a swapped folder of symbolic links, a bind mount, a network file system. What
// a new content means is refresh.go's affair.

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"time"
)

const (
	// configPoll is how often the files are read. A new content is taken up when the next look finds it unchanged, so an
	// editor that empties a file before it writes is not seen half way; that makes a second, of the two that there are.
	configPoll = 500 * time.Millisecond
	// configGone is how long a file may be missing or empty before that counts as its new content.
	configGone = 3 * time.Second
)

// A configWatch knows the content of the configuration file, and of the files that it names, as last seen and as last
// taken up.
type configWatch struct {
	path           string
	poll, gone     time.Duration
	once           bool           // the configuration came through a pipe or the like: it cannot be read again
	keyFile        string         // credential.secret_key_file, "" if there is none
	brokers        []BrokerConfig // whose TLS files count
	dir            string         // what the default names of TLS files count from
	text           []byte         // the configuration file as last seen
	err            error          // why it could not be read
	seenAt         time.Time      // since when it looks like that
	lastSeen, last watchedContent // last is what was taken up
}

// A watchedContent stands for what was read of all files.
type watchedContent struct {
	config, key, tls string
	missing          bool // of a file that is named at least: perhaps it is just being replaced
}

func newConfigWatch(cfg *Config) *configWatch {
	w := &configWatch{path: cfg.File, dir: cfg.Dir, poll: configPoll, gone: configGone,
		keyFile: cfg.Credential.SecretKeyFile}
	if info, err := os.Stat(w.path); err == nil && !info.Mode().IsRegular() {
		w.once = true
	}
	return w
}

// look reads the files.
func (w *configWatch) look() {
	if w.once {
		return
	}
	var now watchedContent
	w.text, w.err = readRegular(w.path, maxConfigBytes)
	now.config, now.missing = contentSum(w.text, w.err)
	if w.keyFile != "" {
		var missing bool
		now.key, missing = contentSum(readRegular(w.keyFile, maxKeyFileBytes))
		now.missing = now.missing || missing
	}
	for _, broker := range w.brokers {
		digest, missing := tlsDigest(broker, w.dir)
		now.tls += digest + "\n"
		now.missing = now.missing || missing
	}
	if now != w.lastSeen {
		w.lastSeen, w.seenAt = now, time.Now()
	}
}

// changed says that there is a new content which has come to rest.
func (w *configWatch) changed() bool {
	// Ticks come a little early or late.
	rest := w.poll * 3 / 4
	if w.lastSeen.missing {
		rest = w.gone
	}
	return w.lastSeen != w.last && time.Since(w.seenAt) >= rest
}

// take counts what was seen as taken up, forget counts nothing so. settled says that all that was seen is taken up.
func (w *configWatch) take()         { w.last = w.lastSeen }
func (w *configWatch) forget()       { w.last = watchedContent{} }
func (w *configWatch) settled() bool { return w.lastSeen == w.last }

// readRegular reads a file of at most limit bytes. What has become a pipe or a device could keep the reader for ever.
func readRegular(path string, limit int64) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, withoutPath(err)
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("not a regular file")
	}
	return readBounded(path, limit)
}

// contentSum stands for a file's content, or for why it could not be read. Empty counts as missing.
func contentSum(text []byte, err error) (sum string, missing bool) {
	if err != nil {
		return err.Error(), true
	}
	digest := sha256.Sum256(text)
	return hex.EncodeToString(digest[:]), len(bytes.TrimSpace(text)) == 0
}

// tlsDigest stands for the content of the files that brokerTLS reads, and tells whether one of them cannot be read. It
// is "" where there are none.
func tlsDigest(b BrokerConfig, dir string) (digest string, missing bool) {
	ca, cert, key := b.tlsFiles(dir)
	if ca == "" && cert == "" && key == "" {
		return "", false
	}
	all := sha256.New()
	for _, path := range []string{ca, cert, key} {
		if path == "" {
			fmt.Fprintln(all, "none")
			continue
		}
		sum, gone := contentSum(readRegular(path, maxPEMBytes))
		fmt.Fprintln(all, sum)
		missing = missing || gone
	}
	return hex.EncodeToString(all.Sum(nil)), missing
}
