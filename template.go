package main

// template.go turns a job's cmd and a task's data into a command (PROTOCOL section 6, item 3). It checks templates and
// fills them with values that stay recognisable in the text they are put into. The tags are read in mustache.go; what a
// template sees of the data is in template_data.go; where a value may stand in a command line and how it is quoted there,
// in quoting.go and quoting_cmd.go.

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// A shellKind is the way a command line is read.
type shellKind int

const (
	shellPOSIX shellKind = iota // sh -c
	shellCmd                    // cmd /C
)

const (
	// maxCommandBytes bounds a filled template before quoting. No system starts a command as long as this.
	maxCommandBytes = 8 << 20
	// maxTemplateWrites bounds how many pieces of text and values a filled template is made of.
	maxTemplateWrites = 1 << 20
	// maxTemplateValues bounds how many list elements and object members of one task's data are decoded.
	maxTemplateValues = 1 << 20
)

// A commandTemplate is a parsed and checked cmd. It may be used concurrently.
type commandTemplate struct {
	nodes []mustacheNode
	shell shellKind
	names map[string]bool // every part of every tag's name: other members of the data are skipped

	firstWord string // for program
	firstIs   bool
}

// A renderedCommand is what a task runs: argv without a shell when it is not nil, else line by the shell.
type renderedCommand struct {
	argv []string
	line string // always the whole command, quoted for the shell
}

// parseTemplate reads a cmd and refuses what could never run safely, whatever the data: codeTemplate for text that is no
// command template, codePlace for a tag at a place where a value would be read as code.
func parseTemplate(text string, shell shellKind) (*commandTemplate, error) {
	t := &commandTemplate{shell: shell, names: map[string]bool{}}
	if err := t.parse(text); err != nil {
		return nil, fail(codeTemplate, "read the command template", err)
	}
	if err := t.tryOut(); err != nil {
		return nil, err
	}
	return t, nil
}

func (t *commandTemplate) parse(text string) (err error) {
	if strings.IndexByte(text, 0) >= 0 {
		return errors.New("it has a NUL byte in it")
	}
	if strings.TrimSpace(text) == "" {
		return errors.New("it is empty")
	}
	if t.nodes, err = parseMustache(text); err != nil {
		return err
	}
	t.takeNames(t.nodes)
	return nil
}

// takeNames collects the parts of all names.
func (t *commandTemplate) takeNames(nodes []mustacheNode) {
	for _, node := range nodes {
		if node.kind != mustacheText {
			for _, part := range strings.Split(node.text, ".") {
				t.names[part] = true
			}
			t.takeNames(node.body)
		}
	}
}

// tryOut fills the template with values that are their variables' names, so that a tag at a bad place is found when the
// configuration is loaded and not when the first task comes: once with all sections shown, once with all inverted ones,
// once with both as far as their names allow.
func (t *commandTemplate) tryOut() error {
	shown := map[string]bool{}
	takeSections(t.nodes, shown)
	empty := true
	for i, on := range []func(string) bool{
		func(string) bool { return true },
		func(string) bool { return false },
		func(name string) bool { return shown[name] },
	} {
		probe := objectNamed(".")
		addProbes(probe, t.nodes, on)
		filled, err := t.fill(probe)
		if err != nil {
			continue // sections that contradict each other; the real data decides
		}
		quoted, misplaced, err := quoteCommand(filled, t.shell, true)
		switch {
		case err != nil:
			return fail(codeTemplate, "read the command", err)
		case misplaced != nil:
			return misplaced.named(nthValue(filled, misplaced.value))
		}
		empty = empty && strings.TrimSpace(quoted.line) == ""
		if i == 0 {
			t.firstWord, t.firstIs = quoted.program, quoted.program != ""
		} else {
			t.firstIs = t.firstIs && quoted.program == t.firstWord
		}
	}
	if empty {
		return fail(codeTemplate, "read the command template", errors.New("no command is left of it"))
	}
	return nil
}

func takeSections(nodes []mustacheNode, names map[string]bool) {
	for _, node := range nodes {
		if node.kind == mustacheSection {
			names[node.text] = true
		}
		takeSections(node.body, names)
	}
}

// addProbes gives every tag a value in context that is the tag's own name; sections are shown where on says so.
func addProbes(context *object, nodes []mustacheNode, on func(name string) bool) {
	for _, node := range nodes {
		if node.kind == mustacheText {
			continue
		}
		inner := context
		if node.kind == mustacheVariable || on(node.text) {
			inner = probeAt(context, node.text)
		} else if _, taken := context.members[node.text]; !taken {
			context.members[node.text] = hidden(frame(node.text))
		}
		addProbes(inner, node.body, on)
	}
}

// probeAt is the probe at a dotted name below context, made where it is missing.
func probeAt(context *object, name string) *object {
	if name == "." {
		return context
	}
	parts := strings.Split(name, ".")
	for i, part := range parts {
		member, ok := context.members[part].(*object)
		if !ok {
			member = objectNamed(strings.Join(parts[:i+1], "."))
			context.members[part] = member
		}
		context = member
	}
	return context
}

// program is the command's first word where that can be told without a shell and without data.
func (t *commandTemplate) program() (name string, known bool) { return t.firstWord, t.firstIs }

// render fills the template with a task's data. Errors are codeTemplateMissing, codeTemplateData and, for a value that
// cannot be passed safely, codeTemplatePlace; they name the variable.
func (t *commandTemplate) render(taskID string, data json.RawMessage) (renderedCommand, error) {
	values, err := t.decode(taskID, data, false)
	if err != nil {
		return renderedCommand{}, fail(codeTemplateData, "read the task's data", err)
	}
	filled, err := t.fill(values)
	var missing missingVariable
	if errors.As(err, &missing) {
		return renderedCommand{}, fail(codeTemplateMissing, fmt.Sprintf("the task's data has no %q, which the command needs", string(missing)), nil)
	}
	if err != nil {
		return renderedCommand{}, fail(codeTemplateData, "fill the command", err)
	}
	quoted, misplaced, err := quoteCommand(filled, t.shell, false)
	if err != nil {
		return renderedCommand{}, fail(codeTemplateData, "read the filled command", err)
	}
	if misplaced != nil {
		return renderedCommand{}, misplaced.named(t.nameOf(misplaced.value, taskID, data))
	}
	return quoted.renderedCommand, nil
}

// nameOf names the nth value of a filled template, by filling it again with the values' names in place of the values.
func (t *commandTemplate) nameOf(n int, taskID string, data json.RawMessage) string {
	names, err := t.decode(taskID, data, true)
	if err != nil {
		return "?"
	}
	filled, err := t.fill(names)
	if err != nil {
		return "?"
	}
	return nthValue(filled, n)
}

// quoteCommand quotes the values in a filled template for the shell. probing says that the values are only names.
func quoteCommand(filled string, shell shellKind, probing bool) (quotedCommand, *misplacedValue, error) {
	if shell == shellCmd {
		return quoteCmd(filled)
	}
	return quotePOSIX(filled, probing)
}

// A quotedCommand is a command whose values have been quoted.
type quotedCommand struct {
	renderedCommand
	program string // the first word, where it is literal and names a program
}

// A misplacedValue says which value of a command, counted from 0, cannot be passed as it is, why, and what would help.
type misplacedValue struct {
	value         int
	problem, hint string
}

func (m *misplacedValue) named(name string) error {
	return failHint(codeTemplatePlace, fmt.Sprintf("cannot pass %q to the command safely", name), errors.New(m.problem), m.hint)
}

// Values in a filled template are framed: a NUL, the length in decimal, a colon, the bytes. The template's own text has
// no NUL, so nothing that a value holds can make it look like template text.

func frame(value string) string { return "\x00" + strconv.Itoa(len(value)) + ":" + value }

// unframe splits text that begins with a frame into the value and what follows.
func unframe(text string) (value, rest string) {
	digits, tail, _ := strings.Cut(text[1:], ":")
	n, err := strconv.Atoi(digits)
	if err != nil || n > len(tail) {
		panic("a frame without its length") // only frame writes them
	}
	return tail[:n], tail[n:]
}

func nthValue(filled string, n int) string {
	for ; ; n-- {
		i := strings.IndexByte(filled, 0)
		if i < 0 {
			return "?"
		}
		value, rest := unframe(filled[i:])
		if n == 0 {
			return value
		}
		filled = rest
	}
}

// fill renders the template over framed values.
func (t *commandTemplate) fill(values *object) (string, error) {
	var filled boundedText
	if err := renderMustache(t.nodes, &scope{value: values}, &filled); err != nil {
		return "", err
	}
	return string(filled.bytes), nil
}

var errCommandTooLong = fmt.Errorf("it is longer than %d bytes or repeats too much", maxCommandBytes)

// boundedText takes what a template writes. Writes are counted too, since sections within sections over long lists can
// turn for ever and write nothing.
type boundedText struct {
	bytes  []byte
	writes int
}

func (b *boundedText) write(text string) error {
	if b.writes++; len(b.bytes)+len(text) > maxCommandBytes || b.writes > maxTemplateWrites {
		return errCommandTooLong
	}
	b.bytes = append(b.bytes, text...)
	return nil
}
