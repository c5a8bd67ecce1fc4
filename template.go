package main

// template.go turns a job's cmd and a task's data into a command (PROTOCOL section 6, item 3). It owns the Mustache
// side: which data a template may see, and values that stay recognisable in the text they are put into. Where such a
// value may stand in a command line, and how it is quoted there, is the business of quoting.go and quoting_cmd.go.

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/cbroglie/mustache"
)

// The library has this one switch for all templates, and its default would turn a missing variable into an empty
// argument. Nothing else in the program uses the library.
func init() { mustache.AllowMissingVariables = false }

// A shellKind is the way a command line is read.
type shellKind int

const (
	shellPOSIX shellKind = iota // sh -c
	shellCmd                    // cmd /C
)

const (
	// maxCommandBytes bounds a filled template before quoting. No system starts a command as long as this.
	maxCommandBytes = 8 << 20
	// maxTemplateValues bounds how many list elements and object members of one task's data are decoded.
	maxTemplateValues = 1 << 20
)

// A commandTemplate is a parsed and checked cmd. It may be used concurrently.
type commandTemplate struct {
	parsed *mustache.Template
	shell  shellKind
	names  map[string]bool // every part of every tag's name: other members of the data are skipped

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
	// Raw: shells know nothing of HTML's &quot;. The provider keeps the library from reading partials from files.
	if t.parsed, err = mustache.ParseStringPartialsRaw(text, noPartials{}, true); err != nil {
		return err
	}
	return t.takeNames(t.parsed.Tags())
}

// takeNames collects the parts of all names, and refuses tags that a command cannot have.
func (t *commandTemplate) takeNames(tags []mustache.Tag) error {
	for _, tag := range tags {
		if tag.Type() == mustache.Partial {
			return fmt.Errorf("{{>%s}} is a partial, which commands do not have", tag.Name())
		}
		if tag.Name() == "" {
			return errors.New("it has a tag without a name")
		}
		for _, part := range strings.Split(tag.Name(), ".") {
			t.names[part] = true
		}
		if tag.Type() != mustache.Variable {
			if err := t.takeNames(tag.Tags()); err != nil {
				return err
			}
		}
	}
	return nil
}

// noPartials stands in for the library's provider, which would read files.
type noPartials struct{}

func (noPartials) Get(name string) (string, error) {
	return "", fmt.Errorf("there is no partial %q", name)
}

// tryOut fills the template with values that are their variables' names, so that a tag at a bad place is found when the
// configuration is loaded and not when the first task comes: once with all sections shown, once with all inverted ones,
// once with both as far as their names allow.
func (t *commandTemplate) tryOut() error {
	shown := map[string]bool{}
	takeSections(t.parsed.Tags(), shown)
	empty := true
	for i, on := range []func(string) bool{
		func(string) bool { return true },
		func(string) bool { return false },
		func(name string) bool { return shown[name] },
	} {
		probe := object{ownText: frame(".")}
		addProbes(probe, t.parsed.Tags(), on)
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

func takeSections(tags []mustache.Tag, names map[string]bool) {
	for _, tag := range tags {
		if tag.Type() == mustache.Section {
			names[tag.Name()] = true
		}
		if tag.Type() != mustache.Variable {
			takeSections(tag.Tags(), names)
		}
	}
}

// addProbes gives every tag a value in context that is the tag's own name; sections are shown where on says so.
func addProbes(context object, tags []mustache.Tag, on func(name string) bool) {
	for _, tag := range tags {
		inner := context
		if tag.Type() == mustache.Variable || on(tag.Name()) {
			inner = probeAt(context, tag.Name())
		} else if _, taken := context[tag.Name()]; !taken {
			context[tag.Name()] = emptyList(frame(tag.Name()))
		}
		if tag.Type() != mustache.Variable {
			addProbes(inner, tag.Tags(), on)
		}
	}
}

// probeAt is the probe at a dotted name below context, made where it is missing.
func probeAt(context object, name string) object {
	if name == "." {
		return context
	}
	for i, part := range strings.Split(name, ".") {
		member, ok := context[part].(object)
		if !ok {
			member = object{ownText: frame(strings.Join(strings.Split(name, ".")[:i+1], "."))}
			context[part] = member
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
	if errors.Is(err, errCommandTooLong) {
		return renderedCommand{}, fail(codeTemplateData, "fill the command", err)
	}
	if err != nil {
		missing := missingName(t.parsed.Tags(), []any{values})
		if missing == "" {
			missing = err.Error()
		}
		return renderedCommand{}, fail(codeTemplateMissing, fmt.Sprintf("the task's data has no %q, which the command needs", missing), nil)
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
func (t *commandTemplate) fill(values object) (string, error) {
	var text boundedText
	if err := t.parsed.FRender(&text, values); err != nil {
		return "", err
	}
	return string(text.bytes), text.err
}

var errCommandTooLong = fmt.Errorf("it is longer than %d bytes or repeats too much", maxCommandBytes)

// boundedText takes what the library writes. The library ignores errors of values but not of the text between them, so
// an error stays. Calls are counted too, since sections within sections over long lists can turn for ever and write nothing.
type boundedText struct {
	bytes []byte
	calls int
	err   error
}

func (b *boundedText) Write(p []byte) (int, error) {
	if b.calls++; len(b.bytes)+len(p) > maxCommandBytes || b.calls > maxCommandBytes {
		b.err = errCommandTooLong
	}
	if b.err != nil {
		return 0, b.err
	}
	b.bytes = append(b.bytes, p...)
	return len(p), nil
}

// The data as the library sees it. It calls exported methods without arguments by name, walks struct fields, and decides
// by kind whether a section is shown; so a value is one of these, and none has a method that a template could call:
//
//	string   a frame that a section shows: its first byte is a NUL, which the library does not take for white space
//	list     a list, or, empty, a value that a section does not show: null, false, "", 0
//	object   an object; a section shows it even when it has no members

type object map[string]any
type list []any

// ownText is where an object keeps its own text: JSON, or a ready frame. No tag can name it.
const ownText = "\x00"

// Format writes the object's frame, for the library's fmt.Fprint.
func (o object) Format(out fmt.State, _ rune) {
	o[ownText] = frameOf(o[ownText])
	io.WriteString(out, o[ownText].(string))
}

// Format writes the list's frame. The list keeps its text in the element after its last.
func (l list) Format(out fmt.State, _ rune) {
	text := &l[:len(l)+1][len(l)]
	*text = frameOf(*text)
	io.WriteString(out, (*text).(string))
}

func emptyList(text string) list { return append(list(nil), text)[:0] }

// frameOf frames JSON in its compact form; the result is kept, so that a long text is not compacted for each use.
func frameOf(text any) string {
	raw, ok := text.(json.RawMessage)
	if !ok {
		return text.(string)
	}
	var compact bytes.Buffer
	json.Compact(&compact, raw) // it was valid when it was decoded
	return frame(compact.String())
}

// decode reads the members that the template names. With naming, every value is its own path, for error messages.
func (t *commandTemplate) decode(taskID string, data json.RawMessage, naming bool) (object, error) {
	if len(data) == 0 {
		data = json.RawMessage("{}")
	}
	// Valid also bounds the nesting, which Token does not.
	if !json.Valid(data) {
		return nil, errors.New("it is no valid JSON")
	}
	d := &dataDecoder{json: json.NewDecoder(bytes.NewReader(data)), source: data, wanted: t.names, naming: naming, left: maxTemplateValues}
	d.json.UseNumber()
	value, err := d.value(".")
	if err != nil {
		return nil, err
	}
	root, ok := value.(object)
	if !ok {
		// Data that is no object has no members; {{.}} is still its text.
		root = object{ownText: json.RawMessage(data)}
		if text, ok := value.(string); ok {
			root[ownText] = text
		} else if l := value.(list); len(l) == 0 {
			root[ownText] = l[:1][0]
		}
	}
	if naming {
		taskID = "task_id"
	}
	root["task_id"] = frame(taskID)
	return root, nil
}

// A dataDecoder turns JSON into the kinds above.
type dataDecoder struct {
	json    *json.Decoder
	source  json.RawMessage
	wanted  map[string]bool
	naming  bool
	left    int             // list elements and members that may still be decoded
	skipped json.RawMessage // reused
}

func (d *dataDecoder) value(path string) (any, error) {
	if d.left--; d.left < 0 {
		return nil, fmt.Errorf("more than %d values are more than a command can take", maxTemplateValues)
	}
	start := d.json.InputOffset()
	token, err := d.json.Token()
	if err != nil {
		return nil, err
	}
	switch token := token.(type) {
	case json.Delim:
		if token == '{' {
			return d.object(start, path)
		}
		return d.list(start, path)
	case json.Number:
		return d.scalar(token.String(), isZero(token), path), nil
	case string:
		return d.scalar(token, token == "", path), nil
	case bool:
		return d.scalar(strconv.FormatBool(token), !token, path), nil
	default:
		return d.scalar("", true, path), nil // null
	}
}

func (d *dataDecoder) object(start int64, path string) (any, error) {
	o := object{}
	for d.json.More() {
		key, err := d.json.Token()
		if err != nil {
			return nil, err
		}
		name := key.(string)
		if !d.wanted[name] {
			err = d.json.Decode(&d.skipped)
		} else {
			o[name], err = d.value(d.below(path, name))
		}
		if err != nil {
			return nil, err
		}
	}
	if _, err := d.json.Token(); err != nil {
		return nil, err
	}
	o[ownText] = d.textFrom(start, path)
	return o, nil
}

func (d *dataDecoder) list(start int64, path string) (any, error) {
	var l list
	for d.json.More() {
		element, err := d.value(d.below(path, "#"+strconv.Itoa(len(l)+1)))
		if err != nil {
			return nil, err
		}
		l = append(l, element)
	}
	if _, err := d.json.Token(); err != nil {
		return nil, err
	}
	return append(l, d.textFrom(start, path))[:len(l)], nil
}

func (d *dataDecoder) scalar(text string, hidden bool, path string) any {
	if d.naming {
		text = path
	}
	if hidden {
		return emptyList(frame(text))
	}
	return frame(text)
}

// textFrom is the text of the object or list that has just ended: its JSON, or its path.
func (d *dataDecoder) textFrom(start int64, path string) any {
	if d.naming {
		return frame(path)
	}
	// Between the token before and this one there is only white space, a colon or a comma.
	return json.RawMessage(bytes.TrimLeft(d.source[start:d.json.InputOffset()], " \t\r\n:,"))
}

func (d *dataDecoder) below(path, name string) string {
	switch {
	case !d.naming:
		return ""
	case path == ".":
		return name
	}
	return path + "." + name
}

// isZero reports whether a JSON number is 0, in whatever form.
func isZero(n json.Number) bool {
	digits, _, _ := strings.Cut(strings.ToLower(n.String()), "e")
	return !strings.ContainsAny(digits, "123456789")
}

// missingName is the first variable that rendering would not find, "" if there is none. The library's own message has
// only a part of a dotted name.
func missingName(tags []mustache.Tag, contexts []any) string {
	for _, tag := range tags {
		value, found := lookUp(contexts, tag.Name())
		if tag.Type() == mustache.Variable {
			if !found {
				return tag.Name()
			}
			continue
		}
		elements, isList := value.(list)
		shown := found && !(isList && len(elements) == 0)
		switch {
		case shown != (tag.Type() == mustache.Section):
			continue
		case !shown:
			elements = list{contexts[0]}
		case !isList:
			elements = list{value}
		}
		for _, element := range elements {
			if name := missingName(tag.Tags(), append([]any{element}, contexts...)); name != "" {
				return name
			}
		}
	}
	return ""
}

// lookUp finds a name as the library does: the first part in the innermost context that has it, the rest below that.
func lookUp(contexts []any, name string) (any, bool) {
	if name == "." {
		return contexts[0], true
	}
	first, rest, dotted := strings.Cut(name, ".")
	for _, context := range contexts {
		o, _ := context.(object)
		if value, found := o[first]; found {
			if dotted {
				return lookUp([]any{value}, rest)
			}
			return value, true
		}
	}
	return nil, false
}
