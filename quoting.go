package main

// quoting.go quotes the framed values of a filled template for sh -c. It reads the template's own text as a shell would
// and puts each value in so that it stays one piece of text there; where a shell would read the value as code, or where
// shells differ in how they read the text (dash, bash, busybox, ksh, mksh), it refuses the value. Which commands read
// their own arguments as code is the business of quoting_commands.go.

import (
	"errors"
	"strings"
)

// maxShellNesting bounds $(… inside "…" inside $(… and so on.
const maxShellNesting = 50

// quotePOSIX quotes a filled template. The error is about the template's own text: a quote that nothing closes.
func quotePOSIX(filled string, probing bool) (quotedCommand, *misplacedValue, error) {
	q := &posixQuoter{in: filled, command: simpleCommand{probing: probing}}
	q.out.Grow(len(filled) + len(filled)/8)
	err := q.text()
	var uncertain uncertainty
	var misplaced *misplacement
	switch {
	case errors.As(err, &uncertain):
		if i := strings.IndexByte(q.in[q.pos:], 0); i >= 0 {
			return quotedCommand{}, &misplacedValue{q.values, "it comes after " + string(uncertain), hintArgument}, nil
		}
		q.needsShell = true
	case errors.As(err, &misplaced):
		return quotedCommand{}, misplaced.at(q.values), nil
	case err != nil:
		return quotedCommand{}, nil, err
	}
	q.out.WriteString(q.in[q.copied:])
	return q.result(), nil, nil
}

// An uncertainty is a text after which shells may differ in where they stand. Every later value is refused.
type uncertainty string

func (u uncertainty) Error() string { return "lost after " + string(u) }

// A misplacement is a value at a place where it cannot be quoted.
type misplacement struct {
	problem, hint string
	earlier       bool // it is about the value before
}

func (m *misplacement) Error() string { return m.problem }

// at says which value it is about, given how many have been passed.
func (m *misplacement) at(passed int) *misplacedValue {
	if m.earlier {
		passed--
	}
	return &misplacedValue{passed, m.problem, m.hint}
}

const hintArgument = `pass it as an argument of its own, as in: sh -c '… "$1"' sh {{name}}`

// A posixQuoter walks over a filled template once.
type posixQuoter struct {
	in     string
	pos    int
	copied int // in[:copied] is in out
	out    strings.Builder
	values int // values passed so far
	depth  int // of nested expansions

	command simpleCommand
	word    shellWord // the word that is being read
	inWord  bool
	target  bool // the word is the target of a redirection
	copies  bool // it is that of >& or <&

	needsShell bool
	ended      bool // a newline has ended a command; another one needs a shell
	argv       []string
	program    string
	programSet bool // the first word, or what stands before it, has been seen
}

// text reads commands up to the end.
func (q *posixQuoter) text() error {
	for q.pos < len(q.in) {
		var err error
		switch c := q.in[q.pos]; c {
		case ' ', '\t':
			q.pos++
			err = q.endWord()
		case '\n', ';', '&', '|', '(', ')', '<', '>':
			err = q.operator(c)
		case '#':
			if q.inWord {
				q.literal(c)
			} else {
				err = q.comment()
			}
		case '\\':
			err = q.escaped()
		default:
			q.startWord()
			err = q.wordPart(c)
		}
		if err != nil {
			return err
		}
	}
	return q.endWord()
}

// wordPart reads one piece of a word outside quotes.
func (q *posixQuoter) wordPart(c byte) error {
	switch c {
	case 0:
		if strings.HasSuffix(q.in[:q.pos], "$") && q.word.dollar {
			return &misplacement{problem: "it stands directly after a $", hint: "put the $ into single quotes: '$'{{name}}"}
		}
		return q.value("'", "'")
	case '\'':
		return q.singleQuoted()
	case '"':
		return q.doubleQuoted()
	case '$':
		q.needsShell, q.word.plain, q.word.dollar = true, false, true
		return q.dollar(false)
	case '`':
		q.needsShell = true
		return q.backquoted(false)
	}
	switch {
	case strings.IndexByte("*?[]{}", c) >= 0:
		q.needsShell, q.word.plain = true, false
		if c == '[' && q.word.bare && isName(string(q.word.text)) {
			if q.command.atName() || q.command.assigns() {
				return uncertainty("a subscript, whose end shells see in different places")
			}
			q.word.subscript = true
		}
	case c == '~':
		if n := len(q.word.text); n == 0 || q.word.text[n-1] == '=' || q.word.text[n-1] == ':' {
			q.needsShell, q.word.plain, q.word.tilde = true, false, true
		}
	case c == '/':
		q.word.tilde = false
	case c == '=' && q.word.bare && q.command.atName() && !q.target:
		if isName(strings.TrimSuffix(string(q.word.text), "+")) {
			q.needsShell, q.word.assignment = true, true
		}
	}
	q.literal(c)
	return nil
}

func (q *posixQuoter) literal(c byte) {
	q.startWord()
	q.word.text = append(q.word.text, c)
	q.pos++
}

func (q *posixQuoter) startWord() {
	if q.inWord {
		return
	}
	q.inWord = true
	q.word = shellWord{text: q.word.text[:0], bare: true, plain: true}
	if q.ended {
		q.needsShell = true
	}
}

// endWord hands the word that has been read, if any, to the command it belongs to.
func (q *posixQuoter) endWord() error {
	if !q.inWord {
		return nil
	}
	q.inWord = false
	if q.target {
		q.target = false
		return nil
	}
	if !q.programSet {
		q.programSet = true
		if q.word.plain && !q.word.value && !q.word.assignment && !readByShellOnly(string(q.word.text)) {
			q.program = string(q.word.text)
		}
	}
	if !q.needsShell {
		if len(q.argv) == 0 && readByShellOnly(string(q.word.text)) || q.word.bare && string(q.word.text) == "!" {
			q.needsShell = true
		} else {
			q.argv = append(q.argv, string(q.word.text))
		}
	}
	return q.command.add(&q.word)
}

// operator reads what ends a word without being part of one.
func (q *posixQuoter) operator(c byte) error {
	if c == '\n' {
		q.pos++
		err := q.endWord()
		q.ended = q.ended || len(q.argv) > 0
		q.newCommand()
		return err
	}
	q.needsShell = true
	rest := q.in[q.pos:]
	if c == '<' || c == '>' {
		return q.redirection(rest)
	}
	if c == '(' && q.inWord {
		// A function, f(), or an array or extended pattern, which only some shells know.
		if !strings.HasPrefix(rest, "()") || q.word.value {
			return uncertainty("a ( inside a word")
		}
		q.inWord, q.programSet = false, true
		q.newCommand()
		q.pos += 2
		return nil
	}
	if err := q.endWord(); err != nil {
		return err
	}
	switch {
	case q.command.double && c != '&' && c != '|':
		return uncertainty("[[ with operators inside")
	case strings.HasPrefix(rest, "(("):
		q.pos += 2
		if err := q.arithmetic("((…))"); err != nil {
			return err
		}
		q.newCommand()
		q.programSet = true
		return nil
	case strings.HasPrefix(rest, "&>"):
		return uncertainty("&>, which shells read differently: write >file 2>&1")
	case c == '(' && !q.command.atName():
		if !q.command.takesParenthesis(strings.TrimLeft(rest[1:], " \t")) {
			return uncertainty("a ( among the words of a command")
		}
		q.program = "" // it is a function's name
	}
	q.pos++
	q.programSet = true
	if !q.command.double {
		q.newCommand()
	}
	return nil
}

func (q *posixQuoter) newCommand() {
	q.command = simpleCommand{probing: q.command.probing, double: q.command.double}
	q.target = false
}

// redirection reads < and >, and what belongs to them but the target.
func (q *posixQuoter) redirection(rest string) error {
	if q.inWord && q.word.isDescriptor() {
		q.inWord = false // the 2 of 2>
	}
	if err := q.endWord(); err != nil {
		return err
	}
	if q.command.double {
		return uncertainty("[[ with < or > inside")
	}
	length := 1
	switch {
	case strings.HasPrefix(rest, "<<<<"):
		return uncertainty("<<<<")
	case strings.HasPrefix(rest, "<<<"):
		length = 3
	case strings.HasPrefix(rest, "<<"):
		return uncertainty("<<: here-documents cannot hold values")
	case strings.HasPrefix(rest, ">>"), strings.HasPrefix(rest, "<&"), strings.HasPrefix(rest, ">&"),
		strings.HasPrefix(rest, ">|"), strings.HasPrefix(rest, "<>"):
		length = 2
	}
	if strings.HasPrefix(rest[length:], "(") {
		return uncertainty("<( or >(, which only some shells know")
	}
	q.pos += length
	q.target, q.programSet = true, true
	q.copies = length == 2 && rest[1] == '&'
	return nil
}

// comment reads up to the end of the line.
func (q *posixQuoter) comment() error {
	q.needsShell = true
	end := strings.IndexByte(q.in[q.pos:], '\n')
	if end < 0 {
		end = len(q.in) - q.pos
	}
	if i := strings.IndexByte(q.in[q.pos:q.pos+end], 0); i >= 0 {
		return &misplacement{problem: "it stands in a comment", hint: "take it out of there"}
	}
	q.pos += end
	return nil
}

// escaped reads a backslash outside quotes and what it escapes.
func (q *posixQuoter) escaped() error {
	if q.pos+1 == len(q.in) {
		return errors.New("it ends in a backslash")
	}
	switch next := q.in[q.pos+1]; next {
	case 0:
		return &misplacement{problem: "it stands directly after a backslash", hint: "take the backslash away: values are quoted as needed"}
	case '\n':
		// The shell takes both away before it looks for operators, so they may join two halves of one.
		before := q.pos == 0 || strings.IndexByte(" \t\n", q.in[q.pos-1]) >= 0 && !q.inWord
		after := q.pos+2 == len(q.in) || strings.IndexByte(" \t\n", q.in[q.pos+2]) >= 0
		if !before && !after {
			return uncertainty("a line continued without a blank")
		}
		q.pos += 2
	default:
		q.startWord()
		q.word.bare, q.word.quoted, q.word.dollar = false, true, false
		q.word.text = append(q.word.text, next)
		q.pos += 2
	}
	return nil
}

func (q *posixQuoter) singleQuoted() error {
	q.word.bare, q.word.quoted, q.word.dollar = false, true, false
	for q.pos++; q.pos < len(q.in); {
		switch c := q.in[q.pos]; c {
		case '\'':
			q.pos++
			return nil
		case 0:
			if err := q.value("", ""); err != nil {
				return err
			}
		default:
			q.literal(c)
		}
	}
	return errors.New("a ' is not closed")
}

func (q *posixQuoter) doubleQuoted() error {
	q.word.bare, q.word.quoted, q.word.dollar = false, true, false
	for q.pos++; q.pos < len(q.in); {
		var err error
		switch c := q.in[q.pos]; c {
		case '"':
			q.pos++
			return nil
		case 0:
			// Out of the quotes and in again, so that "$name{{x}}" cannot become a longer name.
			err = q.value(`"'`, `'"`)
		case '$':
			q.needsShell = true
			err = q.dollar(true)
		case '`':
			q.needsShell = true
			err = q.backquoted(true)
		case '\\':
			err = q.escapedInDouble()
		default:
			q.literal(c)
		}
		if err != nil {
			return err
		}
	}
	return errors.New(`a " is not closed`)
}

func (q *posixQuoter) escapedInDouble() error {
	if q.pos+1 == len(q.in) {
		return errors.New(`a " is not closed`)
	}
	next := q.in[q.pos+1]
	switch {
	case next == 0:
		return &misplacement{problem: "it stands directly after a backslash", hint: "take the backslash away: values are quoted as needed"}
	case next == '\n':
		if q.in[q.pos-1] == '$' {
			return uncertainty("a line continued after a $")
		}
	case strings.IndexByte("$`\"\\", next) >= 0:
		q.word.text = append(q.word.text, next)
	default:
		q.word.text = append(q.word.text, '\\', next)
	}
	q.pos += 2
	return nil
}

// value puts the value at pos into the command, between what opens and closes single quotes there.
func (q *posixQuoter) value(open, close string) error {
	value, rest := unframe(q.in[q.pos:])
	if strings.IndexByte(value, 0) >= 0 {
		return &misplacement{problem: "it has a NUL byte in it, which no argument can hold"}
	}
	switch {
	case q.target && q.copies && !q.command.probing && !isNumber(value):
		// bash expands a word here that is no number twice, whatever its quotes.
		return &misplacement{problem: "it is no number, after >& or <&", hint: "write >{{name}} 2>&1"}
	case !q.target:
		if err := q.command.check(&q.word, value); err != nil {
			return err
		}
	}
	q.out.WriteString(q.in[q.copied:q.pos])
	q.out.WriteString(open)
	for part := value; ; {
		text, after, more := strings.Cut(part, "'")
		q.out.WriteString(text)
		if !more {
			break
		}
		q.out.WriteString(`'\''`)
		part = after
	}
	q.out.WriteString(close)
	q.pos = len(q.in) - len(rest)
	q.copied = q.pos
	q.values++
	q.word.text = append(q.word.text, value...)
	q.word.bare, q.word.value, q.word.dollar = false, true, false
	return nil
}

// result is the quoted command, as argv too if no shell is needed to read it.
func (q *posixQuoter) result() quotedCommand {
	line := q.out.String()
	command := quotedCommand{renderedCommand{line: line}, q.program}
	if !q.needsShell && len(q.argv) > 0 {
		command.argv = q.argv
	}
	return command
}
