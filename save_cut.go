package main

// save_cut.go cuts text into messages: at line ends where possible, else between characters, none larger than the
// receiver takes. It leaves reading and sending to save.go.

import (
	"bytes"
	"unicode/utf8"
)

// A messageCutter fills one message after the other. What is not UTF-8 becomes U+FFFD, one for each byte, which is what
// encoding/json makes of it; that grows text, so it is done before the size is counted.
type messageCutter struct {
	limit int                  // bytes of one message
	emit  func(message []byte) // takes a message for good
	spare func() []byte        // gives an empty buffer for the next one

	text    []byte // the message being filled, UTF-8
	emitted bool
}

// A cutSource is one of the streams whose text is mixed in the messages. The zero value is ready.
type cutSource struct {
	partial []byte // the first bytes of a character whose others have not come, at most 3
}

// add takes the next piece of a source, cut anywhere.
func (c *messageCutter) add(from *cutSource, data []byte) {
	for len(from.partial) > 0 && len(data) > 0 {
		from.partial, data = append(from.partial, data[0]), data[1:]
		if utf8.FullRune(from.partial) {
			// What seemed to be one character may turn out as bad bytes followed by the beginning of another.
			from.partial = append(from.partial[:0], c.addWhole(from.partial)...)
		}
	}
	from.partial = append(from.partial, c.addWhole(data)...)
}

// end says that a source ends here, so that a character it began will never be complete.
func (c *messageCutter) end(from *cutSource) {
	for range from.partial {
		c.addRune(utf8.RuneError)
	}
	from.partial = nil
}

// close emits what is left; if there never was any text, that is one empty message.
func (c *messageCutter) close() {
	if len(c.text) > 0 || !c.emitted {
		c.emitted = true
		c.emit(c.text)
		c.text = nil
	}
}

// addWhole takes everything but a character that data only begins, which it returns.
func (c *messageCutter) addWhole(data []byte) (rest []byte) {
	for len(data) > 0 {
		// Valid text goes in at one stroke, since save shall keep up with a fast pipe.
		fits := data[:min(len(data), c.limit-len(c.text))]
		n := validPrefix(fits)
		c.text = append(c.text, fits[:n]...)
		data = data[n:]
		if n > 0 {
			continue
		}
		if !utf8.FullRune(data) {
			return data
		}
		r, size := utf8.DecodeRune(data)
		c.addRune(r)
		data = data[size:]
	}
	return nil
}

func (c *messageCutter) addRune(r rune) {
	// Twice when a line end comes early: the rest of the first cut may be as good as full.
	for len(c.text)+utf8.RuneLen(r) > c.limit {
		c.cut()
	}
	c.text = utf8.AppendRune(c.text, r)
}

// cut emits the message up to its last line end, all of it if it has none, and begins the next with the rest.
func (c *messageCutter) cut() {
	end := bytes.LastIndexByte(c.text, '\n') + 1
	if end == 0 {
		end = len(c.text)
	}
	next := append(c.spare(), c.text[end:]...)
	c.emitted = true
	c.emit(c.text[:end])
	c.text = next
}

// validPrefix is how many bytes at the start of data are whole characters.
func validPrefix(data []byte) int {
	n := 0
	for n < len(data) {
		if data[n] < utf8.RuneSelf {
			n++
			continue
		}
		r, size := utf8.DecodeRune(data[n:])
		if r == utf8.RuneError && size == 1 {
			break
		}
		n += size
	}
	return n
}
