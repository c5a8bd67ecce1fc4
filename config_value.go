package main

// config_value.go reads the configuration's single values: text with ${NAME} filled in from the environment, numbers,
// durations, sizes and choices. A value that is empty, perhaps because ${NAME} was, is as if its key were not there.

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"gopkg.in/yaml.v3"
)

// text gives a value as text, with the environment put in. It is false where there is none to use: not given, empty,
// or refused.
func (r *configReader) text(f field) (string, bool) {
	if f.node == nil {
		return "", false
	}
	text, ok := r.rawText(f)
	return text, ok && text != ""
}

// rawText is text for a value that was given; it may be empty.
func (r *configReader) rawText(f field) (string, bool) {
	if f.node.Kind != yaml.ScalarNode {
		r.want(f, "a single value")
		return "", false
	}
	switch f.node.Tag {
	case "!!str", "!!int", "!!float", "!!bool", "!!timestamp":
	default:
		r.refuse(f, "want a plain value, got one with a YAML tag")
		return "", false
	}
	text, unset := expandEnv(f.node.Value, r.budget, r.getenv)
	for _, name := range unset {
		r.refuse(f, "${%s} is not set in the environment: set it, or write ${%s:-} for an empty default%s",
			name, name, shellHint(f.name, name))
	}
	switch {
	case len(unset) > 0 || text != f.node.Value && !r.spend(f, len(text)):
		return "", false
	case strings.ContainsRune(text, 0) || !utf8.ValidString(text):
		r.refuse(f, "want text in UTF-8 without NUL")
		return "", false
	}
	return text, true
}

// shellHint tells apart the two readers of a $ in a command.
func shellHint(key, name string) string {
	if key != "cmd" {
		return ""
	}
	return fmt.Sprintf("; for a variable of the task write $%s, which is left to the shell", name)
}

var envReference = regexp.MustCompile(`\$\{([A-Za-z_][A-Za-z0-9_]*)(:-[^}]*)?\}`)

// expandEnv replaces ${NAME} and ${NAME:-default} from the environment; as in the shell, the default also stands in
// for an empty value. What it puts in is not looked at again. Any other $ is left alone. Once the text is longer than
// limit bytes it stops, with the text as far as it is.
func expandEnv(text string, limit int, getenv func(string) (string, bool)) (expanded string, unset []string) {
	var b strings.Builder
	end := 0
	for _, at := range envReference.FindAllStringSubmatchIndex(text, -1) {
		b.WriteString(text[end:at[0]])
		end = at[1]
		name := text[at[2]:at[3]]
		value, set := getenv(name)
		switch {
		case at[4] >= 0 && value == "":
			value = text[at[4]+len(":-") : at[5]]
		case !set && !slices.Contains(unset, name):
			unset = append(unset, name)
		}
		if b.WriteString(value); b.Len() > limit {
			return b.String(), unset
		}
	}
	b.WriteString(text[end:])
	return b.String(), unset
}

// str reads any single value as text.
func (r *configReader) str(f field, to *string) {
	if text, ok := r.text(f); ok {
		*to = text
	}
}

// secret reads a value that no message repeats.
func (r *configReader) secret(f field, to *secret) {
	text, ok := r.text(f)
	if !ok {
		return
	}
	if strings.ContainsFunc(text, isControl) {
		r.refuse(f, "want a key on one line, without control characters")
		return
	}
	*to = secret(text)
}

func isControl(c rune) bool { return c < ' ' || c == 0x7f }

// integer reads a whole number from min to max.
func (r *configReader) integer(f field, to *int, min, max int) {
	text, ok := r.text(f)
	if !ok {
		return
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < min || n > max {
		r.want(f, "a whole number from %d to %d", min, max)
		return
	}
	*to = n
}

// duration reads a time with its unit, from min to max.
func (r *configReader) duration(f field, to *time.Duration, min, max time.Duration) {
	text, ok := r.text(f)
	if !ok {
		return
	}
	d, err := time.ParseDuration(text)
	switch {
	case err != nil:
		r.want(f, "a duration such as 30s or 5m")
	case d < min || d > max:
		r.want(f, "a duration from %s to %s", shortDuration(min), shortDuration(max))
	default:
		*to = d
	}
}

// shortDuration prints 10m, not 10m0s.
func shortDuration(d time.Duration) string {
	text := d.String()
	if strings.HasSuffix(text, "m0s") {
		text = strings.TrimSuffix(text, "0s")
	}
	if strings.HasSuffix(text, "h0m") {
		text = strings.TrimSuffix(text, "0m")
	}
	return text
}

// size reads a number of bytes of at least min, with or without a unit.
func (r *configReader) size(f field, to *int64, min int64) {
	text, ok := r.text(f)
	if !ok {
		return
	}
	n, ok := parseSize(text)
	switch {
	case !ok:
		r.want(f, "a size such as 64MiB, 500MB or a plain number of bytes")
	case n < min:
		r.want(f, "a size of at least %d bytes", min)
	default:
		*to = n
	}
}

// parseSize reads "64MiB" and the like, in bytes. It is false for what is none, negative, or beyond an int64.
func parseSize(text string) (int64, bool) {
	digits := strings.TrimRight(text, "BKMGTi")
	unit, known := map[string]int64{
		"": 1, "B": 1,
		"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
		"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40,
	}[text[len(digits):]]
	n, err := strconv.ParseInt(strings.TrimSpace(digits), 10, 64)
	if !known || err != nil || n < 0 || n > (1<<63-1)/unit {
		return 0, false
	}
	return n * unit, true
}

// boolean reads true or false.
func (r *configReader) boolean(f field, to *bool) {
	switch text, ok := r.text(f); {
	case !ok:
	case strings.EqualFold(text, "true"):
		*to = true
	case strings.EqualFold(text, "false"):
		*to = false
	default:
		r.want(f, "true or false")
	}
}

// oneOf reads one of a few words.
func (r *configReader) oneOf(f field, to *string, choices ...string) {
	text, ok := r.text(f)
	if !ok {
		return
	}
	if !slices.Contains(choices, text) {
		r.want(f, "one of %s", strings.Join(choices, ", "))
		return
	}
	*to = text
}
