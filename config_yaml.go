package main

// config_yaml.go takes the configuration's YAML apart: one document, mappings and lists, duplicate and unknown keys,
// and collects every problem with its line. config_value.go reads the single values; which keys there are is
// config_check.go's affair.

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"gopkg.in/yaml.v3"
)

// A configProblem is one thing that is wrong: where, and what would be right.
type configProblem struct {
	line int    // from 1; 0: not in the file but in the environment
	key  string // such as jobs[2].timeout; may be empty
	text string
}

// configErrors is all that is wrong with one configuration, in the order of the file.
type configErrors struct {
	file     string
	problems []configProblem
}

// maxProblemsShown bounds the message; a file with more is not a configuration.
const maxProblemsShown = 100

// Error gives one problem a line, each with its place.
func (e *configErrors) Error() string {
	lines := e.lines()
	if len(e.problems) > 1 {
		lines = append([]string{fmt.Sprintf("%d problems", len(e.problems))}, lines...)
	}
	return strings.Join(lines, "\n")
}

// lines gives the problems, each with its place.
func (e *configErrors) lines() []string {
	var lines []string
	for i, p := range e.problems {
		if i == maxProblemsShown {
			return append(lines, fmt.Sprintf("and %d more", len(e.problems)-i))
		}
		place := "environment: "
		if p.line > 0 {
			place = fmt.Sprintf("%s:%d: ", e.file, p.line)
		}
		if p.key != "" {
			place += p.key + ": "
		}
		lines = append(lines, place+p.text)
	}
	return lines
}

// err is nil when there is no problem.
func (e *configErrors) err() error {
	if len(e.problems) == 0 {
		return nil
	}
	slices.SortStableFunc(e.problems, func(a, b configProblem) int { return a.line - b.line })
	return e
}

// A configReader reads one file.
type configReader struct {
	dir      string // what relative paths count from
	getenv   func(string) (string, bool)
	budget   int // bytes of values that may still be read: aliases and the environment multiply what the file holds
	problems configErrors
	warnings []string
}

// A field is one value of the file. The zero field is a key that was not given.
type field struct {
	name string // the key itself
	key  string // with the way to it, such as jobs[2].timeout
	line int
	node *yaml.Node // nil: given without a value
}

// refuse notes a problem with f.
func (r *configReader) refuse(f field, format string, args ...any) {
	r.problems.problems = append(r.problems.problems, configProblem{f.line, f.key, fmt.Sprintf(format, args...)})
}

// want notes that f should be something else, and says what it is. Only what stands in the file is quoted, never what
// came from the environment, and nothing that may hold a password.
func (r *configReader) want(f field, format string, args ...any) {
	text := "want " + fmt.Sprintf(format, args...)
	switch {
	case f.node == nil:
	case f.node.Kind == yaml.MappingNode:
		text += ", got a mapping"
	case f.node.Kind == yaml.SequenceNode:
		text += ", got a list"
	case !strings.Contains(f.node.Value, "@"):
		text += fmt.Sprintf(", got %q", shortened(f.node.Value))
	}
	r.refuse(f, "%s", text)
}

// shortened keeps a long value from filling the message.
func shortened(text string) string {
	if len(text) > 60 {
		return strings.ToValidUTF8(text[:60], "") + "…"
	}
	return text
}

// warn notes what is valid but hardly meant.
func (r *configReader) warn(f field, format string, args ...any) {
	text := fmt.Sprintf("%s:%d: ", r.problems.file, f.line)
	if f.key != "" {
		text += f.key + ": "
	}
	r.warnings = append(r.warnings, text+fmt.Sprintf(format, args...))
}

// parse turns the file's text into its one document.
func (r *configReader) parse(text []byte) (root field, ok bool) {
	if line := firstBinaryLine(text); line > 0 {
		r.refuse(field{line: line}, "want a text file in UTF-8, got bytes that are none")
		return field{}, false
	}
	decoder := yaml.NewDecoder(bytes.NewReader(text))
	document, err := decodeNode(decoder)
	if errors.Is(err, io.EOF) || err == nil && document.Content[0].Tag == "!!null" {
		r.refuse(field{line: 1}, "the file is empty, want at least jobs")
		return field{}, false
	}
	var second *yaml.Node
	if err == nil {
		second, err = decodeNode(decoder)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		line, why := yamlProblem(err, text)
		r.refuse(field{line: line}, "not YAML: %s", why)
		return field{}, false
	}
	if second != nil {
		r.refuse(field{line: second.Line}, "a second document begins here, want one")
	}
	node := document.Content[0]
	return field{line: node.Line, node: node}, true
}

// firstBinaryLine gives the first line with a byte that no text has, 0 if there is none. yaml.v3 tells no line for it.
func firstBinaryLine(text []byte) int {
	line := 1
	for len(text) > 0 {
		c, size := utf8.DecodeRune(text)
		switch {
		case c == '\n':
			line++
		case c == utf8.RuneError && size == 1, isControl(c) && c != '\t' && c != '\r':
			return line
		}
		text = text[size:]
	}
	return 0
}

// decodeNode reads the next document. yaml.v3 panics where it meets a bug of its own.
func decodeNode(decoder *yaml.Decoder) (document *yaml.Node, err error) {
	defer func() {
		if cause := recover(); cause != nil {
			document, err = nil, errors.New("yaml: the parser gave up")
		}
	}()
	document = new(yaml.Node)
	if err := decoder.Decode(document); err != nil {
		return nil, err
	}
	return document, nil
}

// yamlProblem gives the line and the text of a syntax error.
func yamlProblem(err error, text []byte) (line int, why string) {
	yamlLine := regexp.MustCompile(`^line (\d+): `)
	unknownAnchor := regexp.MustCompile(`^unknown anchor '(.*)' referenced`)
	why = strings.TrimPrefix(err.Error(), "yaml: ")
	if found := unknownAnchor.FindStringSubmatch(why); found != nil {
		// The name is not repeated: it may well be a password that wants quotes.
		at := bytes.Index(text, []byte("*"+found[1]))
		return 1 + bytes.Count(text[:max(at, 0)], []byte("\n")),
			"a value that begins with * is an alias, and its anchor does not exist; put it in quotes if it is text"
	}
	line = 1
	if found := yamlLine.FindStringSubmatch(why); found != nil {
		line, _ = strconv.Atoi(found[1])
		why = why[len(found[0]):]
		// yaml.v3 counts lines from 1 for its scanner's errors but from 0 for its parser's, which are these, and
		// names the beginning of the collection they are in.
		for _, parserError := range []string{"expected key", "expected '", "expected <", "expected node"} {
			if strings.Contains(why, parserError) {
				line++
				break
			}
		}
	}
	switch {
	case strings.Contains(why, "cannot start any token"):
		why += " (a tab? indent with spaces; a value that begins with @, % or ` needs quotes)"
	case strings.Contains(why, "expected key"), strings.Contains(why, "expected '-'"):
		why += " (is a line of the block that begins here indented differently?)"
	case strings.Contains(why, "mapping values are not allowed"):
		why += " (is the line indented too far? a value with \": \" in it needs quotes)"
	}
	return line, why
}

// pairs gives what a mapping holds, in its order. Aliases are followed.
func (r *configReader) pairs(f field) []field {
	var found []field
	lines := map[string]int{}
	for i := 0; i+1 < len(f.node.Content); i += 2 {
		key, value := f.node.Content[i], f.node.Content[i+1]
		p := field{name: key.Value, key: join(f.key, key.Value), line: key.Line}
		if key.Kind != yaml.ScalarNode {
			r.refuse(field{key: f.key, line: key.Line}, "want a plain key, got an alias, a list or a mapping")
			continue
		}
		if key.Tag == "!!merge" {
			r.refuse(p, "merge keys are not supported, write the keys out")
			continue
		}
		if before, twice := lines[p.name]; twice {
			r.refuse(p, "given twice, first in line %d", before)
			continue
		}
		lines[p.name] = p.line
		if p, ok := r.follow(p, value); ok {
			found = append(found, p)
		}
	}
	return found
}

// items gives what a list holds.
func (r *configReader) items(f field) []field {
	if f.node == nil {
		return nil
	}
	if f.node.Kind != yaml.SequenceNode {
		r.want(f, "a list, each entry beginning with \"- \"")
		return nil
	}
	var found []field
	for i, value := range f.node.Content {
		if item, ok := r.follow(field{key: fmt.Sprintf("%s[%d]", f.key, i), line: value.Line}, value); ok {
			found = append(found, item)
		}
	}
	return found
}

// follow gives f its value, unless the file has already yielded more than a configuration can be.
func (r *configReader) follow(f field, value *yaml.Node) (field, bool) {
	if value.Kind == yaml.AliasNode {
		value = value.Alias
	}
	if !r.spend(f, 16+len(value.Value)) {
		return field{}, false
	}
	if value.Kind != yaml.ScalarNode || value.Tag != "!!null" {
		f.node = value
	}
	return f, true
}

// spend takes bytes off the budget and reports whether there were enough. The first time there are not, that is the
// one problem to report: the others may well be its consequences, thousandfold.
func (r *configReader) spend(f field, bytes int) bool {
	if r.budget >= 0 && r.budget < bytes {
		r.problems.problems = nil
		r.refuse(f, "too much: aliases and environment make the values larger than %d bytes", 8*maxConfigBytes)
		r.budget = -1
	}
	if r.budget < 0 {
		return false
	}
	r.budget -= bytes
	return true
}

func join(path, name string) string {
	name = shortened(name)
	if path == "" {
		return name
	}
	return path + "." + name
}

// section gives the fields of one part of the file by name, having refused those that it cannot have.
func (r *configReader) section(f field, part string) map[string]field {
	fields := map[string]field{}
	if f.node == nil {
		return fields
	}
	known := configKeys[part]
	if f.node.Kind != yaml.MappingNode {
		// Not quoted: it may be a key without its name.
		r.refuse(f, "want a mapping with the keys %s", strings.Join(known, ", "))
		return nil
	}
	for _, p := range r.pairs(f) {
		if !slices.Contains(known, p.name) {
			r.refuse(p, "unknown key, %s", likelyKey(p.name, part))
			continue
		}
		fields[p.name] = p
	}
	return fields
}

// likelyKey says which key was meant.
func likelyKey(name, part string) string {
	if len(name) <= 40 {
		nearest, distance := "", 3
		for _, known := range configKeys[part] {
			if d := editDistance(plainKey(name), plainKey(known)); d < distance && d < len(known)/2+1 {
				nearest, distance = known, d
			}
		}
		if nearest != "" {
			return "did you mean " + nearest + "?"
		}
		var elsewhere []string
		for other, keys := range configKeys {
			if slices.Contains(keys, name) {
				elsewhere = append(elsewhere, strings.TrimPrefix(other+"."+name, "."))
			}
		}
		if slices.Sort(elsewhere); len(elsewhere) > 0 {
			return "did you mean " + strings.Join(elsewhere, " or ") + "?"
		}
	}
	return "want one of " + strings.Join(configKeys[part], ", ")
}

// plainKey is a key without what is most often got wrong.
func plainKey(key string) string {
	return strings.ToLower(strings.NewReplacer("_", "", "-", "").Replace(key))
}

// editDistance counts the letters to insert, remove or replace to make b of a (Levenshtein).
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			replaced := diagonal
			if a[i] != b[j] {
				replaced++
			}
			diagonal = row[j+1]
			row[j+1] = min(replaced, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
