package main

// mustache.go is the language that a job's cmd is written in: it reads a template into nodes, and renders these over the
// values of template_data.go. Partials are refused, and nothing is escaped for HTML. It is the program's own because a
// library for any type of data calls methods by names that only the template knows, and for that the linker keeps every
// method of the whole program: half as much again as the binary has now.
// https://mustache.github.io/mustache.5.html

import (
	"errors"
	"fmt"
	"strings"
)

// maxSectionDepth bounds how many sections may be open at once, since a section is rendered by recursion.
const maxSectionDepth = 10000

type mustacheKind int

const (
	mustacheText mustacheKind = iota
	mustacheVariable
	mustacheSection
	mustacheInverted
)

// A mustacheNode is a piece of a template. A text stands before every tag and at the end of every section and of the
// template, even an empty one, so that no section can be shown without a write.
type mustacheNode struct {
	kind mustacheKind
	text string // what a text says, or a tag's name
	body []mustacheNode
}

// parseMustache reads a template. Its errors begin with the line of the tag that they are about.
func parseMustache(source string) ([]mustacheNode, error) {
	p := mustacheParser{source: source, left: "{{", right: "}}"}
	for {
		text, tag, err := p.next()
		if err == nil {
			p.nodes = append(p.nodes, mustacheNode{text: text})
			if tag == "" {
				break
			}
			err = p.take(tag)
		}
		if err != nil {
			return nil, p.at(p.tag, err)
		}
	}
	if n := len(p.open); n > 0 {
		return nil, p.at(p.open[n-1].tag, fmt.Errorf("the section %q has no end", p.open[n-1].node.text))
	}
	return p.nodes, nil
}

type mustacheParser struct {
	source      string
	read        int            // how much of source has been read
	tag         int            // where the last tag begins
	left, right string         // the delimiters of tags
	nodes       []mustacheNode // of the innermost open section
	open        []openSection  // the innermost is the last
}

// An openSection is one whose end has not been read. before are the nodes beside it that have.
type openSection struct {
	node   mustacheNode
	tag    int
	before []mustacheNode
}

func (p *mustacheParser) at(tag int, err error) error {
	return fmt.Errorf("line %d: %w", 1+strings.Count(p.source[:tag], "\n"), err)
}

// next reads the text up to the next tag, and what that has between its delimiters: "" if there is no other tag.
func (p *mustacheParser) next() (text, tag string, err error) {
	text, inside, found := strings.Cut(p.source[p.read:], p.left)
	p.tag = p.read + len(text)
	if !found {
		return text, "", nil
	}
	right := p.right
	if strings.HasPrefix(inside, "{") {
		right = "}" + right
	}
	end := strings.Index(inside, right)
	if end < 0 {
		return "", "", fmt.Errorf("unmatched open tag: no %s after %s", right, p.left)
	}
	end += len(right) - len(p.right)
	tag, after := strings.TrimSpace(inside[:end]), inside[end+len(p.right):]
	if tag == "" {
		return "", "", errors.New("an empty tag")
	}
	// A tag that puts nothing in its place takes its line away if that has nothing else.
	if strings.Contains("#^/<>=!", tag[:1]) {
		unindented := strings.TrimRight(text, " \t")
		line := p.read + len(unindented)
		if rest, ends := cutLineEnd(after); ends && (line == 0 || p.source[line-1] == '\n') {
			text, after = unindented, rest
		}
	}
	p.read = len(p.source) - len(after)
	return text, tag, nil
}

// cutLineEnd cuts off the rest of a line that has only blanks in it.
func cutLineEnd(text string) (rest string, ends bool) {
	line := strings.TrimLeft(text, " \t")
	for _, end := range []string{"\n", "\r\n"} {
		if rest, ends = strings.CutPrefix(line, end); ends {
			return rest, true
		}
	}
	return text, text == ""
}

// take does what a tag says.
func (p *mustacheParser) take(tag string) error {
	name := strings.TrimSpace(tag[1:])
	switch tag[0] {
	case '!':
		return nil
	case '=':
		return p.setDelimiters(tag)
	case '>':
		return fmt.Errorf("{{>%s}} is a partial, which commands do not have", name)
	case '#':
		return p.enter(mustacheSection, name)
	case '^':
		return p.enter(mustacheInverted, name)
	case '/':
		return p.leave(name)
	case '&':
	case '{':
		inner, closed := strings.CutSuffix(name, "}")
		if !closed {
			return fmt.Errorf("%s%s has a { that is not closed", p.left, tag)
		}
		name = strings.TrimSpace(inner)
	default:
		name = tag
	}
	if name == "" {
		return errTagWithoutName
	}
	p.nodes = append(p.nodes, mustacheNode{kind: mustacheVariable, text: name})
	return nil
}

var errTagWithoutName = errors.New("a tag without a name")

func (p *mustacheParser) enter(kind mustacheKind, name string) error {
	if name == "" {
		return errTagWithoutName
	}
	if len(p.open) == maxSectionDepth {
		return fmt.Errorf("more than %d sections are open", maxSectionDepth)
	}
	p.open = append(p.open, openSection{mustacheNode{kind: kind, text: name}, p.tag, p.nodes})
	p.nodes = nil
	return nil
}

func (p *mustacheParser) leave(name string) error {
	last := len(p.open) - 1
	if last < 0 {
		return fmt.Errorf("{{/%s}} ends no section", name)
	}
	section := p.open[last]
	if section.node.text != name {
		return fmt.Errorf("{{/%s}} is where {{/%s}} has to be", name, section.node.text)
	}
	section.node.body = p.nodes
	p.nodes = append(section.before, section.node)
	p.open = p.open[:last]
	return nil
}

func (p *mustacheParser) setDelimiters(tag string) error {
	inner, closed := strings.CutSuffix(tag[1:], "=")
	left, right, two := strings.Cut(strings.TrimSpace(inner), " ")
	if !closed || !two {
		return fmt.Errorf("{{%s}} does not set delimiters as {{=<%% %%>=}} does", tag)
	}
	p.left, p.right = left, right
	return nil
}

// renderMustache writes nodes as they read in a scope. Its errors are a missingVariable and those of out.
func renderMustache(nodes []mustacheNode, in *scope, out *boundedText) error {
	for _, node := range nodes {
		if node.kind == mustacheText {
			if err := out.write(node.text); err != nil {
				return err
			}
			continue
		}
		value, found := in.lookUp(node.text)
		if node.kind == mustacheVariable {
			if !found {
				return missingVariable(node.text)
			}
			if err := out.write(textOf(value)); err != nil {
				return err
			}
			continue
		}
		for _, inner := range node.shownIn(in, value) {
			if err := renderMustache(node.body, &scope{inner, in}, out); err != nil {
				return err
			}
		}
	}
	return nil
}

// shownIn gives the values that a section is shown for, given the value of its name: nil if it has none.
func (n *mustacheNode) shownIn(in *scope, value any) []any {
	elements, isList := value.(*list)
	_, isHidden := value.(hidden)
	isEmpty := value == nil || isHidden || isList && len(elements.values) == 0
	switch {
	case isEmpty != (n.kind == mustacheInverted):
		return nil
	case isEmpty:
		return []any{in.value}
	case isList:
		return elements.values
	}
	return []any{value}
}

// A scope is a value whose members have names in a template, within the scope around it.
type scope struct {
	value any
	outer *scope
}

// lookUp finds the first part of a dotted name in the innermost scope that has it, and the rest below that.
func (s *scope) lookUp(name string) (value any, found bool) {
	if name == "." {
		return s.value, true
	}
	first, rest, dotted := strings.Cut(name, ".")
	for ; s != nil && !found; s = s.outer {
		if o, ok := s.value.(*object); ok {
			value, found = o.members[first]
		}
	}
	if found && dotted {
		return (&scope{value: value}).lookUp(rest)
	}
	return value, found
}

// A missingVariable is the whole name of a variable that the data does not have.
type missingVariable string

func (name missingVariable) Error() string { return fmt.Sprintf("missing variable %q", string(name)) }
