package main

// quoting_cmd.go quotes the framed values of a filled template for cmd /C. No quoting is safe from cmd.exe itself, which
// expands %…% even inside quotes, so a value with a character that it could interpret is refused, and double quotes
// group what is left. It compiles on every system, so that it is tested on every system.

import (
	"errors"
	"strings"
)

// quoteCmd quotes a filled template. The error is about the template's own text.
func quoteCmd(filled string) (quotedCommand, *misplacedValue, error) {
	q := &cmdQuoter{in: filled}
	if err := q.text(); err != nil {
		var misplaced *misplacement
		if errors.As(err, &misplaced) {
			return quotedCommand{}, misplaced.at(q.values), nil
		}
		return quotedCommand{}, nil, err
	}
	return q.result(), nil, nil
}

// A cmdQuoter walks over a filled template once.
type cmdQuoter struct {
	in     string
	pos    int
	out    strings.Builder
	values int

	quoted   bool // inside "…"
	before   byte // the character before, 0 after a value
	wrapped  bool // a value in quotes of its own stands before
	percents int  // an odd number: a value may be taken for a variable's name
	lost     string
	command  simpleCommand
	word     shellWord
	inWord   bool

	needsShell bool
	argv       []string
	program    string
	first      bool // the first word has been seen
}

func (q *cmdQuoter) text() error {
	for q.pos < len(q.in) {
		switch c := q.in[q.pos]; {
		case c == 0:
			if err := q.value(); err != nil {
				return err
			}
			continue
		case (c == '\n' || c == '\r') && strings.TrimSpace(q.in[q.pos:]) == "":
			q.in = q.in[:q.pos]
			continue
		case c == '\n' || c == '\r':
			return errors.New("cmd.exe runs only the first line of a command: write a && b")
		case c == '"':
			switch {
			case q.before == '\\':
				q.lost = `\", which cmd.exe takes for the end of the quotes and programs do not`
			case q.inWord && !q.quoted && q.wrapped:
				return &misplacement{problem: `a " follows it directly, and programs read "" as a quote`, hint: "put all of the argument into one pair of quotes", earlier: true}
			case q.inWord && !q.quoted && q.before == '"':
				q.lost = `"" inside an argument, which programs read as a quote`
			}
			q.startWord()
			q.quoted, q.word.quoted, q.word.bare = !q.quoted, true, false
		case (c == ' ' || c == '\t') && !q.quoted:
			if err := q.endWord(); err != nil {
				return err
			}
		case strings.IndexByte("&|<>()", c) >= 0 && !q.quoted:
			if err := q.endWord(); err != nil {
				return err
			}
			q.needsShell, q.first = true, true
			q.command = simpleCommand{}
		default:
			if strings.IndexByte("%!^&|<>()", c) >= 0 {
				q.needsShell, q.word.plain = true, false
			}
			if c == '%' {
				q.percents++
			}
			q.startWord()
			q.word.text = append(q.word.text, c)
		}
		q.before, q.wrapped = q.in[q.pos], false
		q.out.WriteByte(q.before)
		q.pos++
	}
	if q.quoted {
		return errors.New(`a " is not closed`)
	}
	return q.endWord()
}

func (q *cmdQuoter) startWord() {
	if !q.inWord {
		q.inWord = true
		q.word = shellWord{text: q.word.text[:0], bare: true, plain: true}
	}
}

func (q *cmdQuoter) endWord() error {
	if !q.inWord {
		return nil
	}
	q.inWord = false
	text := string(q.word.text)
	if !q.first {
		q.first = true
		if isCmdBuiltin(text) {
			q.needsShell = true
		} else if !q.word.value && q.word.plain {
			q.program = text
		}
	}
	q.argv = append(q.argv, text)
	q.command.addScript(&q.word, text, !q.command.named)
	if !q.command.named {
		q.command.named, q.command.name = true, text
	}
	return nil
}

// value puts the value at pos into the command.
func (q *cmdQuoter) value() error {
	value, rest := unframe(q.in[q.pos:])
	for _, c := range value {
		if c < ' ' || c == 0x7f || strings.ContainsRune(`"%!^&|<>()`, c) {
			return &misplacement{problem: "it has a character in it that cmd.exe would interpret", hint: "let the program read the value from {{task_id}}.json instead"}
		}
	}
	switch {
	case q.lost != "":
		return &misplacement{problem: "it comes after " + q.lost, hint: "leave the quotes away: values are quoted as needed"}
	case q.percents%2 == 1:
		return &misplacement{problem: "it may stand inside %…%, where it would be taken for a variable's name", hint: "write values without %"}
	case q.before == '^' && !q.quoted:
		return &misplacement{problem: "it stands directly after a ^", hint: "take the ^ away"}
	case q.inWord && !q.quoted && (q.wrapped || q.before == '"'):
		return &misplacement{problem: `it follows a " directly, and programs read "" as a quote`, hint: "put all of the argument into one pair of quotes"}
	}
	q.startWord()
	if q.command.named {
		if err := q.command.checkScript(string(q.word.text), value); err != nil {
			return err
		}
	}
	// Programs take a backslash before a quote for its escape, unless it is doubled.
	if !q.quoted {
		q.out.WriteString(trailingBackslashes(q.in[:q.pos]))
		q.out.WriteByte('"')
	}
	q.out.WriteString(value)
	if !q.quoted || strings.HasPrefix(rest, `"`) {
		q.out.WriteString(trailingBackslashes(value))
	}
	if !q.quoted {
		q.out.WriteByte('"')
	}
	q.pos = len(q.in) - len(rest)
	q.before, q.wrapped = 0, !q.quoted
	q.values++
	q.word.text = append(q.word.text, value...)
	q.word.bare, q.word.value = false, true
	return nil
}

func trailingBackslashes(text string) string {
	return text[len(strings.TrimRight(text, `\`)):]
}

func (q *cmdQuoter) result() quotedCommand {
	command := quotedCommand{renderedCommand{line: q.out.String()}, q.program}
	if !q.needsShell && q.lost == "" && len(q.argv) > 0 {
		command.argv = q.argv
	}
	return command
}

// isCmdBuiltin reports whether cmd.exe runs a first word itself.
func isCmdBuiltin(word string) bool {
	switch strings.ToLower(strings.TrimPrefix(word, "@")) {
	case "assoc", "break", "call", "cd", "chdir", "cls", "color", "copy", "date", "del", "dir", "dpath", "echo", "endlocal", "erase",
		"exit", "for", "ftype", "goto", "if", "keys", "md", "mkdir", "mklink", "move", "path", "pause", "popd", "prompt", "pushd",
		"rd", "rem", "ren", "rename", "rmdir", "set", "setlocal", "shift", "start", "time", "title", "type", "ver", "verify", "vol":
		return true
	}
	return strings.HasPrefix(strings.ToLower(word), "echo.") || strings.HasPrefix(word, ":")
}
