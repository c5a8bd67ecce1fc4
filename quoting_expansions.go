package main

// quoting_expansions.go reads the expansions of a command line, $x, ${…}, $(…), $((…)) and `…`, to find their ends. No
// value can be quoted in all of them, so all are refused there; where shells could see different ends, the place is lost.

import (
	"errors"
	"strings"
)

// dollar reads a $ and the expansion that it begins.
func (q *posixQuoter) dollar(inDouble bool) error {
	q.pos++
	rest := q.in[q.pos:]
	switch {
	case strings.HasPrefix(rest, "(("):
		q.expands()
		q.pos += 2
		return q.arithmetic("$((…))")
	case strings.HasPrefix(rest, "("):
		q.expands()
		q.pos++
		return q.nested(q.substitution)
	case strings.HasPrefix(rest, "{"):
		q.expands()
		q.pos++
		return q.nested(func() error { return q.parameter(inDouble) })
	case strings.HasPrefix(rest, "["):
		return uncertainty("$[, which only some shells know: write $((…))")
	case strings.HasPrefix(rest, "'") && !inDouble:
		return uncertainty("$', which only some shells know")
	case rest != "" && (isNameByte(rest[0]) || strings.IndexByte("#?!-@*$", rest[0]) >= 0):
		q.expands()
		if !isNameByte(rest[0]) || rest[0] >= '0' && rest[0] <= '9' {
			q.pos++ // one character only
			return nil
		}
		for q.pos < len(q.in) && isNameByte(q.in[q.pos]) {
			q.pos++
		}
		return nil
	}
	q.word.text = append(q.word.text, '$')
	return nil
}

// expands notes that the word holds text which only the shell knows; a NUL stands for it.
func (q *posixQuoter) expands() {
	q.word.text = append(q.word.text, 0)
	q.word.bare, q.word.plain = false, false
}

func (q *posixQuoter) nested(read func() error) error {
	if q.depth++; q.depth > maxShellNesting {
		return uncertainty("too many expansions inside each other")
	}
	defer func() { q.depth-- }()
	return read()
}

// substitution reads the rest of $(…).
func (q *posixQuoter) substitution() error {
	open, wordStart := 1, true
	kept := len(q.word.text)
	defer func() { q.word.text = q.word.text[:kept] }()
	for q.pos < len(q.in) {
		c, rest := q.in[q.pos], q.in[q.pos:]
		var err error
		switch {
		case c == 0:
			return inside("$(…)")
		case c == '#' && wordStart:
			return uncertainty("a comment inside $(…)")
		case strings.HasPrefix(rest, "<<"):
			return uncertainty("<< inside $(…)")
		case strings.HasPrefix(rest, "(("):
			return uncertainty("(( inside $(…)")
		case wordStart && strings.HasPrefix(rest, "case"):
			return uncertainty("case inside $(…)")
		case c == '\\':
			switch {
			case len(rest) < 2:
				return errors.New("a $( is not closed")
			case rest[1] == 0:
				return inside("$(…)")
			case rest[1] == '\n':
				return uncertainty("a line continued inside $(…)")
			}
			q.pos += 2
		case c == '\'':
			end := strings.IndexByte(rest[1:], '\'')
			if end < 0 {
				return errors.New("a ' is not closed")
			}
			if strings.IndexByte(rest[:end+1], 0) >= 0 {
				return inside("$(…)")
			}
			q.pos += end + 2
		case c == '"':
			err = q.nested(q.doubleInSubstitution)
		case c == '$':
			err = q.dollar(false)
		case c == '`':
			err = q.backquoted(false)
		default:
			q.pos++
			if c == '(' {
				open++
			} else if c == ')' {
				if open--; open == 0 {
					return nil
				}
			}
		}
		if err != nil {
			return err
		}
		wordStart = strings.IndexByte(" \t\n;&|()<>", c) >= 0
	}
	return errors.New("a $( is not closed")
}

// doubleInSubstitution reads "…" inside $(…).
func (q *posixQuoter) doubleInSubstitution() error {
	for q.pos++; q.pos < len(q.in); {
		var err error
		switch c := q.in[q.pos]; c {
		case '"':
			q.pos++
			return nil
		case 0:
			return inside("$(…)")
		case '$':
			err = q.dollar(true)
		case '`':
			err = q.backquoted(true)
		case '\\':
			if q.pos+1 < len(q.in) && q.in[q.pos+1] == 0 {
				return inside("$(…)")
			}
			err = q.escapedInDouble()
		default:
			q.pos++
		}
		if err != nil {
			return err
		}
	}
	return errors.New(`a " is not closed`)
}

// parameter reads the rest of ${…}. Shells differ in how they read quotes in it.
func (q *posixQuoter) parameter(inDouble bool) error {
	for first := true; q.pos < len(q.in); first = false {
		c := q.in[q.pos]
		next := byte(0)
		if q.pos+1 < len(q.in) {
			next = q.in[q.pos+1]
		}
		switch {
		case c == 0:
			return inside("${…}")
		case c == '}' && !first:
			q.pos++
			return nil
		case first && !isNameByte(c) && strings.IndexByte("#@*?$!-", c) < 0:
			return uncertainty("${ with something unusual inside")
		case c == '$' && next != '\'' && next != '"' && !first:
			if err := q.dollar(inDouble); err != nil {
				return err
			}
		case isNameByte(c) || strings.IndexByte("$:-+=?#%/.,^@*![]~ ", c) >= 0 && next != '\'' && next != '"':
			q.pos++
		default:
			return uncertainty("${…} with quotes or something unusual inside")
		}
	}
	return errors.New("a ${ is not closed")
}

// arithmetic reads the rest of $((…)) or ((…)); what names it for messages.
func (q *posixQuoter) arithmetic(what string) error {
	open := 0
	for q.pos < len(q.in) {
		c, rest := q.in[q.pos], q.in[q.pos:]
		switch {
		case c == 0:
			return &misplacement{problem: "it stands inside " + what + ", where shells run commands that a value names",
				hint: "compute it in a program that takes it as an argument"}
		case c == '(':
			open++
		case c == ')' && open > 0:
			open--
		case strings.HasPrefix(rest, "))"):
			q.pos += 2
			return nil
		case what == "((…))" && strings.HasPrefix(rest, "<<"):
			return uncertainty("((…)) with << inside")
		case c == '$' && len(rest) > 1 && isNameByte(rest[1]):
		case isNameByte(c) || strings.IndexByte(" \t+-*/%<>=!&|^~?:,", c) >= 0:
		default:
			return uncertainty(what + " with something unusual inside")
		}
		q.pos++
	}
	return errors.New("a (( is not closed")
}

// backquoted reads `…`. Its end is the next backquote that no backslash escapes; where quotes or nested expansions could
// make a shell see another end, the place is lost.
func (q *posixQuoter) backquoted(inDouble bool) error {
	q.expands()
	quote := byte(0)
	for q.pos++; q.pos < len(q.in); {
		c, rest := q.in[q.pos], q.in[q.pos:]
		switch {
		case c == 0:
			return inside("`…`")
		case c == '`' && quote == 0:
			q.pos++
			return nil
		case c == '`', c == '\\' && quote != 0, c == '"' && inDouble,
			c == '#' && quote == 0,
			strings.HasPrefix(rest, "$("), strings.HasPrefix(rest, "${"), strings.HasPrefix(rest, "$'"), strings.HasPrefix(rest, "<<"):
			return uncertainty("`…` with something unusual inside: write $(…)")
		case c == '\\':
			if len(rest) > 1 && rest[1] == 0 {
				return inside("`…`")
			}
			q.pos++
		case c == quote:
			quote = 0
		case quote == 0 && (c == '\'' || c == '"'):
			quote = c
		}
		q.pos++
	}
	return errors.New("a ` is not closed")
}

func inside(what string) error {
	return &misplacement{problem: "it stands inside " + what + ", where its text would be read as shell code", hint: hintArgument}
}

func isNameByte(c byte) bool {
	return c == '_' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
}

// isName reports whether text can be a variable's name.
func isName(text string) bool {
	for i := range len(text) {
		if !isNameByte(text[i]) {
			return false
		}
	}
	return text != "" && (text[0] < '0' || text[0] > '9')
}
