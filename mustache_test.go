package main

// mustache_test.go compares our Mustache with a library's, which the binary itself does not have.

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"strings"
	"testing"

	"github.com/cbroglie/mustache"
)

// The library has this one switch for all templates.
func init() { mustache.AllowMissingVariables = false }

// renderBare renders a template and takes the frames off its values.
func renderBare(text, data string) (string, error) {
	tmpl := commandTemplate{names: map[string]bool{}}
	if err := tmpl.parse(text); err != nil {
		return "", err
	}
	values, err := tmpl.decode("t1", json.RawMessage(data), false)
	if err != nil {
		return "", err
	}
	filled, err := tmpl.fill(values)
	var bare strings.Builder
	for {
		before, _, framed := strings.Cut(filled, "\x00")
		bare.WriteString(before)
		if !framed {
			return bare.String(), err
		}
		var value string
		value, filled = unframe(filled[len(before):])
		bare.WriteString(value)
	}
}

func TestMustache(t *testing.T) {
	for _, test := range []struct{ text, want string }{
		{"a{{x}}{{{x}}}{{&x}}{{ x }}{{& x}}{{{ x }}}{{\nx\n}}b", "a1111111b"},
		{"{{#o}}{{y}}{{#l}}{{y}}{{x}}{{.}};{{/l}}{{/o}}", "2213;214;"},
		{"{{#l}}{{#.}}{{.}}{{/.}}{{/l}}{{#o.l}}{{.}}{{/o.l}}{{^no}}{{o.y}}{{/no}}", "342"},
		{"{{#o}}{{^no}}{{y}}{{/no}}{{/o}}", "2"},
		// A tag that is alone on its line takes the line away, a variable never.
		{"a\n{{#x}}\nb\n{{/x}}\nc", "a\nb\nc"},
		{"a\r\n \t{{! no }} \t\r\nb", "a\r\nb"},
		{"{{!\nno\n}}\n{{^x}}\n{{/x}}\n{{=<% %>=}}\nb\n <%! no %>", "b\n"},
		{"a\n {{x}} \nb", "a\n 1 \nb"},
		{"a {{#x}}\n b\n{{/x}} c", "a \n b\n c"},
		{"a\n {{#x}}{{/x}} \nb", "a\n  \nb"},
		{" {{#x}}\n a{{/x}}\n", " a\n"},
		{"a\n  {{!no}}", "a\n"},
		{"a\n  {{!no}}  ", "a\n    "}, // as the library has it
		{"{{=<% %>=}}<%x%>{{x}}<%={{ }}=%>{{x}}<%x%>", "1{{x}}1<%x%>"},
		{"{{#x}}{{=| |=}}|x||/x||x|", "11"},
		{"{{={ }=}}{x}{{x}}", "11"},
		{"}} {x} { } {", "}} {x} { } {"},
	} {
		got, err := renderBare(test.text, `{"x":1,"l":[],"o":{"y":2,"l":[3,4]}}`)
		if err != nil || got != test.want {
			t.Errorf("render(%q) = %q, %v; want %q", test.text, got, err, test.want)
		}
	}
}

func TestMustacheErrors(t *testing.T) {
	for _, test := range []struct{ text, want string }{
		{"\n{{x", "line 2: unmatched open tag: no }} after {{"},
		{"{{{x}}", "line 1: unmatched open tag: no }}} after {{"},
		{"{{=<% %>=}}\n\n<%x}}", "line 3: unmatched open tag: no %> after <%"},
		{"a {{ }}", "line 1: an empty tag"},
		{"a\n{{#\n}}{{/}}", "line 2: a tag without a name"},
		{"a {{{}}}", "line 1: a tag without a name"},
		{"a {{&}}", "line 1: a tag without a name"},
		{"a\n {{#x}}\n{{#y}}\n{{/y}}", `line 2: the section "x" has no end`},
		{"{{#x}}\n{{^y}}\n{{/x}}\n{{/y}}", "line 3: {{/x}} is where {{/y}} has to be"},
		{"a\n{{/x}}", "line 2: {{/x}} ends no section"},
		{"a {{> /etc/passwd }}", "line 1: {{>/etc/passwd}} is a partial, which commands do not have"},
		{"a {{ {x}} }}", "line 1: {{{x has a { that is not closed"},
		{"a {{=<%%>=}}", "line 1: {{=<%%>=}} does not set delimiters as {{=<% %>=}} does"},
		{"a {{=< >}}", "line 1: {{=< >}} does not set delimiters as {{=<% %>=}} does"},
		{"a {{=}}", "line 1: {{=}} does not set delimiters as {{=<% %>=}} does"},
		{strings.Repeat("{{#a}}", maxSectionDepth) + "\n{{^a}}", "line 2: more than 10000 sections are open"},
	} {
		if nodes, err := parseMustache(test.text); err == nil || err.Error() != test.want {
			t.Errorf("parseMustache(%.50q) = %.50v, %v; want %s", test.text, nodes, err, test.want)
		}
	}
	deep := strings.Repeat("{{#a}}", maxSectionDepth) + "x" + strings.Repeat("{{/a}}", maxSectionDepth)
	if got, err := renderBare(deep, `{"a":1}`); got != "x" || err != nil {
		t.Errorf("%d sections = %q, %v; want x", maxSectionDepth, got, err)
	}
}

// What the library is given in place of our values: it decides by kind whether a section is shown, and prints with fmt.
// A libraryList prints as the element after its last; if it is empty a section hides it, as it does a hidden value.
type (
	libraryList   []any
	libraryObject map[string]any
)

func (l libraryList) Format(out fmt.State, _ rune)   { fmt.Fprint(out, l[:len(l)+1][len(l)]) }
func (o libraryObject) Format(out fmt.State, _ rune) { fmt.Fprint(out, o["\x00"]) }

func libraryValue(value any) any {
	text := textOf(value)
	switch value := value.(type) {
	case hidden:
		return libraryList{text}[:0]
	case *list:
		l := libraryList{}
		for _, element := range value.values {
			l = append(l, libraryValue(element))
		}
		return append(l, text)[:len(l)]
	case *object:
		o := libraryObject{"\x00": text}
		for name, member := range value.members {
			o[name] = libraryValue(member)
		}
		return o
	}
	return text
}

// A libraryText lets the library write within our bounds.
type libraryText struct{ boundedText }

func (l *libraryText) Write(p []byte) (int, error) { return len(p), l.write(string(p)) }

// noPartials keeps the library from reading files.
type noPartials struct{}

func (noPartials) Get(name string) (string, error) { return "", fmt.Errorf("no partial %q", name) }

// libraryParse also refuses what commands cannot have.
func libraryParse(text string) (*mustache.Template, error) {
	tmpl, err := mustache.ParseStringPartialsRaw(text, noPartials{}, true)
	if err != nil {
		return nil, err
	}
	var check func(tags []mustache.Tag) error
	check = func(tags []mustache.Tag) error {
		for _, tag := range tags {
			if tag.Type() == mustache.Partial || tag.Name() == "" {
				return errors.New("a partial or a tag without a name")
			}
			if tag.Type() != mustache.Variable {
				if err := check(tag.Tags()); err != nil {
					return err
				}
			}
		}
		return nil
	}
	return tmpl, check(tmpl.Tags())
}

// compareMustache renders by our Mustache and by the library, which have to agree, and reports whether both could. Only
// a {{ {x}} is refused here and left out silently there.
func compareMustache(t *testing.T, text, data string) (rendered bool) {
	t.Helper()
	if strings.Contains(text, "\x00") {
		return false // commands have none; here it is the name of an object's own text
	}
	ours := commandTemplate{names: map[string]bool{}}
	nodes, parseErr := parseMustache(text)
	if parseErr != nil && strings.Contains(parseErr.Error(), "has a { that is not closed") {
		return false
	}
	ours.nodes = nodes
	ours.takeNames(nodes)
	values, err := ours.decode("t1", json.RawMessage(data), false)
	if err != nil {
		return false
	}

	var want libraryText
	library, wantErr := libraryParse(text)
	if wantErr == nil {
		wantErr = library.FRender(&want, libraryValue(values))
	}
	if errors.Is(wantErr, errCommandTooLong) {
		return false // the library writes more often
	}
	got, err := "", parseErr
	if err == nil {
		got, err = ours.fill(values)
	}
	if (err != nil) != (wantErr != nil) || err == nil && got != string(want.bytes) {
		t.Fatalf("render(%q) with %s = %q, %v; the library has %q, %v", text, data, got, err, want.bytes, wantErr)
	}
	// The library's message has only the part of a dotted name that it misses.
	var missing missingVariable
	if errors.As(err, &missing) {
		_, part, _ := strings.Cut(wantErr.Error(), `missing variable `)
		if part = strings.Trim(part, `"`); !strings.Contains(string(missing), part) && !strings.Contains(part, `\`) {
			t.Fatalf("render(%q) with %s misses %q; the library %v", text, data, missing, wantErr)
		}
	}
	return err == nil
}

// A templateMaker puts random templates and data together.
type templateMaker struct {
	*rand.Rand
	left, right string
}

func (m *templateMaker) pick(from ...string) string { return from[m.IntN(len(from))] }

func (m *templateMaker) name() string {
	return m.pick("a", "a", "b", "l", "l", "o", "o", ".", "o.a", "o.o.b", "o.l", "l.a", "a.", ".a", "..", "<a", "task_id", "é b")
}

func (m *templateMaker) blank() string {
	return m.pick("", "", "", " ", "\t", "\n", "\n", " \n", "\n ", "\r\n", "\r", "\n\n", "\u00a0")
}

func (m *templateMaker) tag(inside string) string {
	return m.left + m.pick("", "", " ", "\t", "\n") + inside + m.pick("", "", " ", "\n") + m.right
}

func (m *templateMaker) text(depth int) string {
	var text strings.Builder
	for range m.IntN(5) {
		text.WriteString(m.blank())
		switch kind := m.IntN(12); {
		case kind < 3:
			text.WriteString(m.tag(m.pick("", "", "", "&", "& ") + m.name()))
		case kind < 4:
			text.WriteString(m.left + "{" + m.pick("", " ") + m.name() + m.pick("", "\n") + "}" + m.right)
		case kind < 5:
			text.WriteString(m.tag("!" + m.blank() + m.pick("no", "{{", "=", "}")))
		case kind < 6:
			left, right := m.pick("{{", "<%", "|", "{", "=", "#"), m.pick("}}", "%>", "|", "}", "=", "#", " %")
			text.WriteString(m.tag("=" + m.pick("", " ") + left + " " + right + m.pick("", " ") + "="))
			m.left, m.right = left, right
		case kind < 10 && depth > 0:
			name := m.name()
			text.WriteString(m.tag(m.pick("#", "#", "# ", "^") + name))
			text.WriteString(m.text(depth - 1))
			text.WriteString(m.tag("/" + m.pick("", " ") + name))
		default:
			text.WriteString(m.pick("x", "y z", "{", "}", "$", "{ {", "é"))
		}
		text.WriteString(m.blank())
	}
	return text.String()
}

// spoilt is text with a piece put in or cut out at random.
func (m *templateMaker) spoilt(text string) string {
	from := m.IntN(len(text) + 1)
	to := min(len(text), from+m.IntN(3))
	return text[:from] + m.pick("", "{", "}", "{{", "}}", "{{{", "#", "/", "^", "=", "!", ">", "<", "&", " ", "\n", "{{}}", "{{>p}}", "{{=x=}}", "{{=<% %>=}}") + text[to:]
}

func (m *templateMaker) data(depth int) any {
	switch kind := m.IntN(12); {
	case kind < 4 && depth > 0:
		o := map[string]any{}
		for _, name := range []string{"a", "b", "l", "o", "", "<a", "é b"} {
			if m.IntN(5) > 0 {
				o[name] = m.data(depth - 1)
			}
		}
		return o
	case kind < 7 && depth > 0:
		l := []any{}
		for range m.IntN(4) {
			l = append(l, m.data(depth-1))
		}
		return l
	case kind < 8:
		return nil
	case kind < 9:
		return m.IntN(2) == 0
	case kind < 10:
		return m.IntN(3)
	}
	return m.pick("", " ", "v", "{{a}}", "\x00", "\n", "<&>")
}

func TestMustacheLikeLibrary(t *testing.T) {
	t.Parallel() // beside those that wait
	const runs = 10000
	seed := rand.Uint64()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("seed %d", seed)
		}
	})
	maker := templateMaker{Rand: rand.New(rand.NewPCG(seed, 2))}
	rendered := 0
	for range runs {
		maker.left, maker.right = "{{", "}}"
		text := maker.text(4)
		for range maker.IntN(3) {
			text = maker.spoilt(text)
		}
		data, err := json.Marshal(maker.data(4))
		if err != nil {
			t.Fatal(err)
		}
		if compareMustache(t, text, string(data)) {
			rendered++
		}
	}
	if rendered < runs/5 {
		t.Errorf("only %d of %d templates were rendered", rendered, runs)
	}
}

// Whatever calls methods by names known only at run time, as these packages do, keeps the linker from leaving out any.
func TestNoMethodsByName(t *testing.T) {
	t.Parallel() // beside those that wait
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	if errors.Is(err, exec.ErrNotFound) {
		t.Skip("needs the go command")
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range strings.Fields(string(out)) {
		switch path {
		case "text/template", "html/template", "github.com/cbroglie/mustache":
			t.Errorf("the program depends on %s, which makes the binary half as large again", path)
		}
	}
}
