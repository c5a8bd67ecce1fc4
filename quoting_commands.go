package main

// quoting_commands.go knows which commands read their own arguments as code once more: shell builtins such as eval, and
// programs that take a script on their command line, such as sh -c. Quoting cannot help there, so a value is refused.
// It follows one simple command at a time, word by word, as quoting.go reads them.

import "strings"

// A shellWord is a word of a command, as far as it has been read.
type shellWord struct {
	text       []byte // without its quotes; a NUL stands for an expansion, whose text only the shell knows
	bare       bool   // nothing in it is quoted, expanded or a value, so that it may be a keyword
	plain      bool   // the shell would expand nothing in it
	quoted     bool   // something in it is quoted
	value      bool   // a value is in it
	dollar     bool   // its last piece was a bare $
	assignment bool   // NAME=… before a command
	subscript  bool   // NAME[…
	tilde      bool   // ~ and what may be a user's name
}

// mayVanish reports whether nothing may be left of the word, so that the next one takes its place.
func (w *shellWord) mayVanish() bool {
	return len(w.text) > 0 && strings.Trim(string(w.text), "\x00") == ""
}

// isDescriptor reports whether the word belongs to the redirection right behind it: 2 or {name}.
func (w *shellWord) isDescriptor() bool {
	if !w.bare {
		return false
	}
	text := string(w.text)
	return strings.Trim(text, "0123456789") == "" || strings.HasPrefix(text, "{") && strings.HasSuffix(text, "}")
}

// A simpleCommand is what has been read of one command.
type simpleCommand struct {
	probing bool // values are only names, and may stand for numbers
	double  bool // inside [[ … ]]

	name     string
	named    bool
	prefixed bool // the words so far were command, exec and the like: their options are not the name
	last     string

	// What matters of a command that reads numbers as arithmetic.
	valueLast  bool // the word before is a value
	textBefore bool // there was a value that is no number
	numbers    bool // values must be numbers
	dashes     bool // -- has come
	format     bool // of printf: the format has come

	language scriptLanguage
	reading  scriptReading
	skip     bool // the next word belongs to the option before it
	operand  bool // a word that is no option has come
}

// atName reports whether the command's name is still to come.
func (c *simpleCommand) atName() bool { return !c.named && !c.double }

// assigns reports whether the command's arguments may be assignments.
func (c *simpleCommand) assigns() bool {
	switch c.name {
	case "declare", "typeset", "local", "export", "readonly", "global":
		return true
	}
	return false
}

// takesParenthesis reports whether a ( may follow the words so far: that of a pattern of case or of a function f ().
func (c *simpleCommand) takesParenthesis(after string) bool {
	return c.name == "case" && c.last == "in" || c.last == c.name && strings.HasPrefix(after, ")")
}

// add takes a complete word. Its error is an uncertainty or about a value before.
func (c *simpleCommand) add(w *shellWord) error {
	text := string(w.text)
	defer func() { c.last = text }()
	if c.double {
		if w.bare && text == "]]" {
			c.double, c.named = false, true
		}
		return nil
	}
	if !c.named {
		return c.addName(w, text)
	}
	c.addScript(w, text, false)

	switch c.name {
	case "for", "select", "function":
		if w.bare && (text == "do" || text == "{") {
			*c = simpleCommand{probing: c.probing}
		}
	case "export", "readonly":
		if strings.HasPrefix(text, "-") && strings.Trim(text, "-pfn") != "" {
			return uncertainty(c.name + " " + text + ", which only some shells know")
		}
	case "declare", "typeset", "local", "global":
		if text != "" && (text[0] == 0 || (text[0] == '-' || text[0] == '+') && strings.Trim(text[1:], "xrgp-") != "") {
			return uncertainty(c.name + " " + strings.ReplaceAll(text, "\x00", "$…") + ", which may make variables that compute")
		}
	case "printf":
		c.addFormat(text)
	case "test", "[":
		switch text {
		case "-eq", "-ne", "-lt", "-le", "-gt", "-ge", "-v", "-R", "-t":
			c.numbers = true
			if c.textBefore {
				return &misplacement{problem: c.name + " " + text + " takes numbers only: some shells run commands that other text names", earlier: true}
			}
		}
		c.valueLast = w.value || c.valueLast && w.mayVanish()
	}
	c.dashes = c.dashes || text == "--"
	return nil
}

func (c *simpleCommand) addName(w *shellWord, text string) error {
	switch {
	case w.assignment:
		return nil
	case w.bare && text == "[[":
		c.double = true
		return nil
	case w.bare && text == "coproc":
		return uncertainty("coproc, which only some shells know")
	case w.bare && isLeadingKeyword(text), text == "command", text == "builtin", text == "exec":
		c.prefixed = true
		return nil
	case c.prefixed && strings.HasPrefix(text, "-"):
		return nil
	case w.mayVanish():
		c.addScript(w, text, true)
		return nil
	}
	c.name, c.named = text, true
	if text == "alias" || text == "integer" || text == "nameref" {
		c.name = "alias"
		return uncertainty(text + ", which changes what later words mean")
	}
	c.addScript(w, text, true)
	return nil
}

// addFormat looks for printf's format, since some shells compute what %d is to print.
func (c *simpleCommand) addFormat(text string) {
	switch {
	case c.format:
		return
	case !c.dashes && strings.HasPrefix(text, "-"):
		c.numbers = c.numbers || text != "--"
		return
	}
	c.format = true
	if strings.IndexByte(text, 0) >= 0 {
		c.numbers = true
	}
	for {
		_, after, found := strings.Cut(text, "%")
		if !found {
			return
		}
		after = strings.TrimLeft(after, "-+ #0123456789.")
		if after == "" || strings.IndexByte("sbcq%", after[0]) < 0 {
			c.numbers = true
			return
		}
		text = after[1:]
	}
}

// check refuses a value in the word w, as far as it has been read, where it would be read as code.
func (c *simpleCommand) check(w *shellWord, value string) error {
	before := string(w.text)
	switch {
	case c.double:
		return &misplacement{problem: "it stands inside [[ … ]], where shells compute what a value names", hint: `write [ … ]`}
	case w.subscript:
		return &misplacement{problem: "it stands in a subscript, where shells run commands that a value names", hint: "use a name without [ ]"}
	case w.tilde:
		return &misplacement{problem: "it stands after a ~, where it may be taken for a user's name", hint: "write the folder out"}
	}
	if name, _, assigns := strings.Cut(before, "="); assigns && isReadLater(strings.TrimSuffix(name, "+")) {
		return &misplacement{problem: "the shell reads what " + name + " holds as code", hint: "use a variable with another name"}
	}
	if w.assignment {
		return nil
	}
	if err := c.checkScript(before, value); err != nil {
		return err
	}
	number := c.probing || isNumber(value)
	switch c.name {
	case "eval", "let", "trap", "alias", ".", "source", "bind", "complete", "compgen", "compopt", "enable", "fc", "hist",
		"mapfile", "readarray", "read", "unset", "getopts", "print", "rename":
		return &misplacement{problem: c.name + " reads its arguments as shell code", hint: "put the value into a variable first, name={{name}}, and use \"$name\""}
	case "declare", "typeset", "local", "export", "readonly", "global":
		name, text, assigns := strings.Cut(before, "=")
		if !assigns || !isName(name) {
			return &misplacement{problem: c.name + " reads names as code", hint: "give it the name: " + c.name + " name={{name}}"}
		}
		if text == "" && strings.HasPrefix(value, "(") && c.name != "export" && c.name != "readonly" {
			return &misplacement{problem: "a ( begins a list of code for " + c.name, hint: "assign first: name={{name}}; " + c.name + " name"}
		}
	case "set":
		if !c.dashes {
			return &misplacement{problem: "set may take it for an option", hint: "write set -- {{name}}"}
		}
	case "exit", "return", "shift", "break", "continue", "ulimit", "wait":
		if !number {
			return &misplacement{problem: c.name + " takes numbers only: some shells run commands that other text names"}
		}
	case "printf":
		if !c.format && !c.dashes && before == "" && strings.HasPrefix(value, "-") {
			return &misplacement{problem: "printf would take it for an option", hint: "write printf '%s' {{name}}"}
		}
		if c.numbers && !number {
			return &misplacement{problem: "printf takes a number here: some shells run commands that other text names", hint: "write printf '%s' {{name}}"}
		}
	case "test", "[":
		if c.valueLast {
			return &misplacement{problem: "the value before it could be an operator of " + c.name, hint: "put an operator between them"}
		}
		if c.numbers && !number {
			return &misplacement{problem: c.name + " takes numbers only here: some shells run commands that other text names"}
		}
		c.textBefore = c.textBefore || !number
	}
	return nil
}

// isNumber reports whether text is a plain decimal number.
func isNumber(text string) bool {
	whole, part, point := strings.Cut(strings.TrimPrefix(text, "-"), ".")
	digits := func(s string) bool { return s != "" && strings.Trim(s, "0123456789") == "" }
	return digits(whole) && (!point || digits(part))
}

// isLeadingKeyword reports whether a command follows this word.
func isLeadingKeyword(word string) bool {
	switch word {
	case "if", "then", "elif", "else", "fi", "while", "until", "do", "done", "{", "}", "!", "time", "esac":
		return true
	}
	return false
}

// isReadLater reports whether shells expand or compute what is assigned to this variable.
func isReadLater(name string) bool {
	switch name {
	case "ENV", "BASH_ENV", "PROMPT_COMMAND", "PS0", "PS1", "PS2", "PS3", "PS4", "FPATH",
		"RANDOM", "SRANDOM", "SECONDS", "LINENO", "OPTIND", "HISTCMD", "HISTSIZE", "TMOUT", "COLUMNS", "LINES", "MAILCHECK",
		"EPOCHSECONDS", "EPOCHREALTIME", "BASHPID", "PPID", "UID", "EUID", "GID", "EGID", "USER_ID", "PGRP",
		"PIPESTATUS", "KSHUID", "KSHGID", "KSHEGID":
		return true
	}
	return false
}

// readByShellOnly reports whether a first word means something to a shell but is no program.
func readByShellOnly(word string) bool {
	switch word {
	case "if", "then", "else", "elif", "fi", "for", "while", "until", "do", "done", "case", "esac", "select", "function",
		"coproc", "{", "}", "!", "[", "[[", "]]", "time",
		":", ".", "source", "exit", "return", "cd", "pushd", "popd", "dirs", "export", "set", "unset", "exec", "eval", "trap",
		"ulimit", "umask", "wait", "read", "type", "command", "builtin", "local", "declare", "typeset", "integer", "nameref",
		"global", "readonly", "shift", "times", "alias", "unalias", "bg", "fg", "jobs", "disown", "suspend", "let", "getopts",
		"hash", "break", "continue", "shopt", "enable", "bind", "complete", "compgen", "compopt", "mapfile", "readarray",
		"history", "fc", "hist", "caller", "help", "logout", "whence", "print":
		return true
	}
	return false
}

// A scriptLanguage is how a program takes a script on its command line.
type scriptLanguage struct {
	letters  string // its options whose argument is a script
	others   string // its options with another argument, which is a word of its own
	flags    bool   // the letters are flags, and the script is the first word that is no option, as with sh
	repeats  bool   // there may be several scripts
	anywhere bool   // options may stand after other words
	prefix   bool   // the first other word is a program itself
	joins    bool   // the first other word and all after it, or all after it with host, are code
	host     bool
	unknown  bool // perhaps a shell: its name is an expansion
}

// scriptReading is how far the words of such a program have been read.
type scriptReading int

const (
	noScript    scriptReading = iota
	scriptFlags               // options are being read
	scriptNext                // the next word is a script
	scriptRest                // all other words are
	scriptDone                // the other words are data
)

// scriptLanguageOf tells languages by the program's name.
func scriptLanguageOf(program string) (scriptLanguage, bool) {
	program = program[strings.LastIndexAny(program, `/\`)+1:]
	if strings.IndexByte(program, 0) >= 0 {
		return scriptLanguage{letters: "c", others: "oO", flags: true, unknown: true}, true
	}
	program = strings.TrimSuffix(strings.ToLower(program), ".exe")
	if trimmed := strings.TrimRight(program, "0123456789.-"); trimmed != "" {
		program = trimmed
	}
	switch program {
	case "sh", "bash", "rbash", "dash", "ash", "hush", "zsh", "ksh", "rksh", "mksh", "lksh", "pdksh", "oksh", "yash", "posh":
		return scriptLanguage{letters: "c", others: "oO", flags: true}, true
	case "fish", "csh", "tcsh":
		return scriptLanguage{letters: "cC", flags: true}, true
	case "su", "runuser", "script", "flock":
		return scriptLanguage{letters: "c", anywhere: true}, true
	case "env":
		return scriptLanguage{letters: "S", others: "uCaP", prefix: true}, true
	case "python", "pypy":
		return scriptLanguage{letters: "c", others: "WX"}, true
	case "perl":
		return scriptLanguage{letters: "eE", repeats: true}, true
	case "ruby", "lua", "luajit", "rscript":
		return scriptLanguage{letters: "e", repeats: true}, true
	case "node", "nodejs", "bun":
		return scriptLanguage{letters: "ep", others: "r", repeats: true}, true
	case "php":
		return scriptLanguage{letters: "rBRE", others: "dc", repeats: true}, true
	case "ssh":
		return scriptLanguage{letters: "o", others: "BbcDEeFIiJLlmOpPQRSWw", repeats: true, joins: true, host: true}, true
	case "watch", "powershell", "pwsh":
		return scriptLanguage{joins: true}, true
	}
	return scriptLanguage{}, false
}

// addScript follows the words of a program that may take a script. isName says that the word names the command.
func (c *simpleCommand) addScript(w *shellWord, text string, isName bool) {
	option := len(text) > 1 && (text[0] == '-' || text[0] == '+')
	switch {
	case text == ";" || text == "+":
		c.reading = noScript // the end of find -exec
		return
	case c.skip:
		c.skip = false
		return
	case c.reading == scriptDone:
		return
	case c.reading == scriptRest:
		if strings.EqualFold(text, "-file") || strings.EqualFold(text, "-f") {
			c.reading = scriptDone // of powershell
		}
		return
	case c.reading == scriptNext && !(c.language.flags && option):
		c.reading = scriptDone
		if c.language.repeats || c.language.anywhere || c.language.prefix {
			c.reading = scriptFlags
		}
		return
	}
	// A value is no program's name, unless it is the name of the command.
	if c.reading == noScript || c.language.prefix || c.language.anywhere || c.language.unknown {
		if language, ok := scriptLanguageOf(text); ok && (isName || !w.value && !language.unknown) {
			c.language, c.reading = language, scriptFlags
			if language.joins && !language.host {
				c.reading = scriptRest
			}
			return
		}
	}
	switch {
	case c.reading == noScript:
	case text == "--":
		c.dashes = true
	case option && !c.dashes:
		c.addOption(text)
	case c.language.flags && !w.quoted && w.mayVanish():
		c.reading = scriptNext // bash $options
	case c.language.joins:
		c.reading = scriptRest
	case c.language.anywhere:
		c.operand = true
	case c.language.prefix:
		if !strings.Contains(text, "=") {
			c.reading = noScript
		}
	default:
		c.reading = scriptDone
	}
}

func (c *simpleCommand) addOption(text string) {
	if strings.HasPrefix(text, "--") {
		switch text {
		case "--command", "--session-command", "--eval", "--print", "--run", "--split-string", "--execute":
			c.reading = scriptNext
		case "--rcfile", "--init-file":
			c.skip = true
		}
		return
	}
	for i, letter := range text[1:] {
		switch {
		case strings.ContainsRune(c.language.letters, letter):
			if c.language.flags || i+2 == len(text) {
				c.reading = scriptNext
			}
			if !c.language.flags {
				return
			}
		case strings.ContainsRune(c.language.others, letter):
			if c.language.flags || i+2 == len(text) {
				c.skip = true
			}
			if !c.language.flags {
				return
			}
		}
	}
}

// checkScript refuses a value in a script, or one that could begin a script.
func (c *simpleCommand) checkScript(before, value string) error {
	if c.skip {
		return nil
	}
	inScript := c.reading == scriptNext
	if c.reading == scriptFlags && len(before) > 0 && before[0] == '-' && !c.dashes {
		if strings.HasPrefix(before, "--") {
			inScript = strings.HasPrefix(before, "--command=") || strings.HasPrefix(before, "--session-command=") ||
				strings.HasPrefix(before, "--eval=") || strings.HasPrefix(before, "--print=") ||
				strings.HasPrefix(before, "--run=") || strings.HasPrefix(before, "--split-string=") || before == "--"
		} else {
			inScript = strings.ContainsAny(before, c.language.letters) || before == "-"
		}
	}
	if c.reading == scriptRest {
		return &misplacement{problem: c.name + " hands its arguments to a shell as one text", hint: "hand the value over as input: printf '%s' {{name}} | …"}
	}
	if inScript {
		return &misplacement{problem: "it stands in a text that the command reads as code", hint: hintArgument}
	}
	if c.reading == scriptFlags && !c.language.unknown && !c.dashes && !c.operand && before == "" && strings.HasPrefix(value, "-") {
		return &misplacement{problem: "it begins with a dash where the command takes options that are code", hint: "write -- before it, or ./ if it is a file"}
	}
	return nil
}
