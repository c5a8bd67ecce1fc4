package main

import (
	"bytes"
	"testing"
	"unicode/utf8"
)

// FuzzSaveCut: whatever the bytes and wherever reads cut them, the messages are the input as encoding/json has it.
func FuzzSaveCut(f *testing.F) {
	f.Add([]byte(""), []byte{1}, uint8(16))
	f.Add([]byte("line\nline\nline that is longer than a message\n"), []byte{3, 1, 7}, uint8(8))
	f.Add([]byte("\xf0\x9f\x98\x80\xf0\x9f\xf0\x9f\x98\x80\xe6\x97"), []byte{1}, uint8(4))
	f.Add([]byte("\xff\xfe\xed\xa0\x80日本\n語"), []byte{2, 1}, uint8(5))
	f.Add(bytes.Repeat([]byte("日本語テキスト\n"), 60), []byte{255, 3}, uint8(0))
	f.Fuzz(func(t *testing.T, input, cuts []byte, small uint8) {
		if len(input) > 16<<10 {
			return // the check takes quadratic time
		}
		limit := int(small) + utf8.UTFMax
		var messages []string
		cutter := messageCutter{
			limit: limit,
			emit:  func(message []byte) { messages = append(messages, string(message)) },
			spare: func() []byte { return nil },
		}
		var source cutSource
		rest := input
		for i := 0; len(rest) > 0; i++ {
			n := len(rest)
			if len(cuts) > 0 {
				n = min(n, int(cuts[i%len(cuts)]))
			}
			if n == 0 {
				n = 1
			}
			cutter.add(&source, rest[:n])
			rest = rest[n:]
		}
		cutter.end(&source)
		cutter.close()
		checkMessages(t, limit, messages, asJSON(t, string(input)))
	})
}
