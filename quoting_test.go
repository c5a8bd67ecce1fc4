package main

import (
	"context"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestQuotePOSIXPlaces(t *testing.T) {
	for _, test := range []struct{ text, want string }{
		{"echo {{x}}", "echo 'X'"},
		{"echo a{{x}}b{{x}}", "echo a'X'b'X'"},
		{"echo '{{x}}' 'a{{x}}b'", "echo 'X' 'aXb'"},
		{`echo "{{x}}" "$a{{x}}b"`, `echo ""'X'"" "$a"'X'"b"`},
		{`echo \\{{x}} '\'{{x}} "\\{{x}}" \"{{x}}`, `echo \\'X' '\''X' "\\"'X'"" \"'X'`},
		{`echo $a{{x}} "$"{{x}} "$'{{x}}" '$'{{x}} \${{x}}`, `echo $a'X' "$"'X' "$'"'X'"" '$''X' \$'X'`},
		{"a | b {{x}} && c {{x}}; d {{x}} & e {{x}}\nf {{x}}", "a | b 'X' && c 'X'; d 'X' & e 'X'\nf 'X'"},
		{"(a {{x}}); { b {{x}}; }", "(a 'X'); { b 'X'; }"},
		{"if a {{x}}; then b {{x}}; fi", "if a 'X'; then b 'X'; fi"},
		{"for i in {{x}} b; do c {{x}} \"$i\"; done", "for i in 'X' b; do c 'X' \"$i\"; done"},
		{"case {{x}} in a|{{x}}) b {{x}};; (*) c {{x}};; esac", "case 'X' in a|'X') b 'X';; (*) c 'X';; esac"},
		{"f() { a \"$1\"; }; f {{x}}", "f() { a \"$1\"; }; f 'X'"},
		{"f () { a \"$1\"; }; f {{x}}", "f () { a \"$1\"; }; f 'X'"},
		{"X={{x}} Y=\"{{x}}\" prog {{x}}", "X='X' Y=\"\"'X'\"\" prog 'X'"},
		{"export X={{x}}; readonly Y='{{x}}'", "export X='X'; readonly Y='X'"},
		{"a >{{x}} <{{x}} 2>>{{x}} >&2 2>&1 >|{{x}} b {{x}} >&{{n}}", "a >'X' <'X' 2>>'X' >&2 2>&1 >|'X' b 'X' >&'-42'"},
		{"cat <<<{{x}}", "cat <<<'X'"},
		{"a $(date +'%s' | tr -d \"$x\") {{x}}", "a $(date +'%s' | tr -d \"$x\") 'X'"},
		{"a \"$(b \"$(c ')' \\) )\")\" {{x}}", "a \"$(b \"$(c ')' \\) )\")\" 'X'"},
		{"a `date '+%s'` {{x}}", "a `date '+%s'` 'X'"},
		{"a ${x:-b} ${x#*/} ${#x} \"${y:-$(z)}\" $? $# $1 $$ {{x}}", "a ${x:-b} ${x#*/} ${#x} \"${y:-$(z)}\" $? $# $1 $$ 'X'"},
		{"a $((1 + (n << 2))) {{x}}", "a $((1 + (n << 2))) 'X'"},
		{"((n > 1)) && a {{x}}", "((n > 1)) && a 'X'"},
		{"[[ $y = z ]] && a {{x}}", "[[ $y = z ]] && a 'X'"},
		{"a # it's a comment\nb {{x}}", "a # it's a comment\nb 'X'"},
		{"a b#{{x}} ${#x}", "a b#'X' ${#x}"},
		{"a \\\n {{x}} |\\\n b {{x}} \\\n{{x}}", "a \\\n 'X' |\\\n b 'X' \\\n'X'"},
		{`sh -c 'echo "$1"' sh {{x}}`, `sh -c 'echo "$1"' sh 'X'`},
		{`sudo bash -lc 'echo "$1"' bash -c {{x}}`, `sudo bash -lc 'echo "$1"' bash -c 'X'`},
		{`bash -o pipefail -c 'a | b "$@"' _ {{x}}`, `bash -o pipefail -c 'a | b "$@"' _ 'X'`},
		{"sh deploy.sh -c {{x}}", "sh deploy.sh -c 'X'"},
		{"sh -- {{x}}", "sh -- 'X'"},
		{`bash "$script" {{x}}`, `bash "$script" 'X'`},
		{"a ~/{{x}}", "a ~/'X'"},
		{"$shell script.sh -c {{x}}", "$shell script.sh -c 'X'"},
		{`"$tool" {{x}}`, `"$tool" 'X'`},
		{"find . -name {{x}} -exec sh -c 'a \"$1\"' _ {} \\; -print", "find . -name 'X' -exec sh -c 'a \"$1\"' _ {} \\; -print"},
		{"python3 -c 'import sys' {{x}}", "python3 -c 'import sys' 'X'"},
		{"python3 -m pytest -c {{x}}", "python3 -m pytest -c 'X'"},
		{"python validate.py {{x}}.json", "python validate.py 'X'.json"},
		{"perl -ne 'print' {{x}}", "perl -ne 'print' 'X'"},
		{"env A={{x}} prog -S {{x}}", "env A='X' prog -S 'X'"},
		{"su app -c 'run \"$0\"' {{x}}", "su app -c 'run \"$0\"' 'X'"},
		{"flock /tmp/l prog {{x}}", "flock /tmp/l prog 'X'"},
		{"ssh -p 22 {{x}} uptime", "ssh -p 22 'X' uptime"},
		{"powershell -File x.ps1 {{x}}", "powershell -File x.ps1 'X'"},
		{"[ {{x}} = a ] || test -n {{x}} -a -f {{x}}", "[ 'X' = a ] || test -n 'X' -a -f 'X'"},
		{"printf '%s %d\\n' a {{n}}; printf \"{{x}}\\n\"; printf -- {{x}}", "printf '%s %d\\n' a '-42'; printf \"\"'X'\"\\n\"; printf -- 'X'"},
		{"[ {{n}} -gt 3 ] && exit {{n}}", "[ '-42' -gt 3 ] && exit '-42'"},
		{"set -- {{x}} {{x}}; a \"$@\"", "set -- 'X' 'X'; a \"$@\""},
		{"export $(cat .env); a {{x}}", "export $(cat .env); a 'X'"},
		{"trap 'rm -f x' EXIT; a {{x}}", "trap 'rm -f x' EXIT; a 'X'"},
		{"echo eval {{x}}; apt install sh {{x}}", "echo eval 'X'; apt install sh 'X'"},
	} {
		got, err := renderTemplate(test.text, `{"x":"X","n":-42}`, shellPOSIX)
		if err != nil {
			t.Errorf("render(%q): %v (%s)", test.text, err, hintOf(err))
		} else if got.line != test.want {
			t.Errorf("render(%q) = %q; want %q", test.text, got.line, test.want)
		}
	}
}

// Places where no value is safe are refused when the template is read.
func TestQuotePOSIXRefusals(t *testing.T) {
	for text, want := range map[string]string{
		`a \{{x}}`: "backslash", `a "\{{x}}"`: "backslash", `a \\\{{x}}`: "backslash",
		"a ${{x}}": "after a $", "a $${{x}}": "after a $", "a b${{x}}": "after a $",
		"a $'{{x}}'": "$'", "a $'b' {{x}}": "$'",
		"a $({{x}})": "$(…)", "a \"$(b '{{x}}')\"": "$(…)", "a $(b \"{{x}}\")": "$(…)", `a $(b \{{x}})`: "$(…)", `a $(b "\{{x}}")`: "$(…)", "a \"$(b \"$(c {{x}})\")\"": "$(…)",
		"a `{{x}}`": "`…`", "a \"`{{x}}`\"": "`…`", "a `b \\{{x}}`": "`…`",
		"a ${b:-{{x}}}": "${…}", "a \"${b:-{{x}}}\"": "${…}", "a ${b:-'}'} {{x}}": "${…}", "a \"${b:-\\}}\" {{x}}": "${…}", "a ${ b;} {{x}}": "${",
		"a ${b:-`c`} {{x}}": "${…}", "a ${b:-$'c'} {{x}}": "${…}",
		"a $(({{x}}))": "$((…))", "a $((1+`b`)) {{x}}": "$((…))", "a $((b) ) {{x}}": "$((…))", "a $[{{x}}]": "$[", "a $[1] {{x}}": "$[", "a \"$[1]\" {{x}}": "$[",
		"(({{x}}))": "((…))", "((a<<2)) && b {{x}}": "((…))", "((a); (b)) && c {{x}}": "((…))",
		"[[ {{x}} = y ]]": "[[ … ]]", "[[ a =~ (b) ]] && c {{x}}": "[[", "export $a; declare -x $b; c={{x}}": "declare", "[[ a < b ]] && c {{x}}": "[[", "[[ a; b {{x}}": "[[",
		"cat <<{{x}}": "here-documents", "cat <<EOF\n{{x}}\nEOF": "here-documents", "cat <<-EOF\nEOF\na {{x}}": "here-documents", "cat <<<<{{x}}": "<<<<",
		"a # {{x}}": "comment", "#{{x}}\na": "comment", "a;# it's {{x}}": "comment",
		"a[{{x}}]=b": "subscript", "a[0]={{x}}": "subscript", "a[\"{{x}}\"]=1": "subscript",
		"a=({{x}})": "(", "a @({{x}})": "(", "a ({{x}})": "(", "a <(b {{x}})": "<(", "a >({{x}})": "<(", "for ((i=0;i<{{x}};i++)); do a; done": "((…))",
		"a &>b {{x}}": "&>", "coproc x { eval {{x}}; }": "coproc",
		"a$\\\n(b {{x}})": "continued", "a <\\\n<EOF {{x}}": "continued", "a \"$\\\n(b {{x}})\"": "continued", "a $(b \\\n) {{x}}": "continued",
		"a $(case b in c) d;; esac) {{x}}": "case", "a $(b # )\n) {{x}}": "comment", "a $(b <<E\nE\n) {{x}}": "<<", "a $((b); c) {{x}}": "$((…))", "a $(b; ((c))) {{x}}": "((",
		"a `b 'c`d'` {{x}}": "`…`", "a `$(b)` {{x}}": "`…`", "a \"`b \"c\"`\" {{x}}": "`…`", "a `b # c` {{x}}": "`…`", "a `b '\\''` {{x}}": "`…`",
		strings.Repeat("$(", 60) + "{{x}}": "inside each other",

		"eval {{x}}": "eval", "eval \"a {{x}}\"": "eval", "a; eval 'b {{x}}'": "eval", "if eval {{x}}; then b; fi": "eval", "a && ! eval {{x}}": "eval",
		"\\eval {{x}}": "eval", "e'v'al {{x}}": "eval", "command -p eval {{x}}": "eval", "builtin eval {{x}}": "eval", "time -p eval {{x}}": "eval", "X=1 eval {{x}}": "eval",
		">y eval {{x}}": "eval", "2>&1 eval {{x}}": "eval", "{fd}>y eval {{x}}": "eval", "for i do eval {{x}}; done": "eval", "case a in (b) eval {{x}};; esac": "eval", "f() { eval {{x}}; }": "eval",
		"function f { eval {{x}}; }": "eval", "(eval {{x}})": "eval", "a[1]=2 eval {{x}}": "subscript", "export a[1]=2 {{x}}": "subscript", "ls a[{{x}}]": "subscript", "X+=1 eval {{x}}": "eval", "a \\\n; eval {{x}}": "eval", "select i in a; do eval {{x}}; done": "eval",
		"$a eval {{x}}": "eval", "\"$@\" eval {{x}}": "eval", "$a sh -c {{x}}": "code", "$a $b -c {{x}}": "code", "[ {{x}} $a {{x}} ]": "operator", "a ~{{x}}": "~", "a=~b{{x}}": "~", "let {{x}}": "let", "trap {{x}} EXIT": "trap", "alias a={{x}}": "alias", "alias a=eval\na {{x}}": "alias", "source {{x}}": "source", ". {{x}}": ".", "read {{x}}": "read", "unset {{x}}": "unset",
		"export {{x}}": "names", "declare \"a[{{x}}]=1\"": "names", "declare -i a; a={{x}}": "declare", "readonly -a a={{x}}": "readonly", "typeset -n a={{x}}": "typeset", "local $a b={{x}}": "local", "integer a; a={{x}}": "integer",
		"set {{x}}": "set", "PS4={{x}}; set -x": "PS4", "BASH_ENV={{x}} a": "BASH_ENV", "env BASH_ENV={{x}} a": "BASH_ENV", "export SECONDS={{x}}": "SECONDS", "RANDOM+={{x}}": "RANDOM",
		"[ {{x}} {{x}} ]": "operator",

		"sh -c {{x}}": "code", "sh -c 'a {{x}}'": "code", "sh -c \"a {{x}}\"": "code", "/bin/bash -c {{x}}": "code", "bash -lc {{x}}": "code", "sh -ec {{x}}": "code", "sh -c -e {{x}}": "code", "sh -c -- {{x}}": "code",
		"bash -o pipefail -c {{x}}": "code", "bash -c -o pipefail {{x}}": "code", "bash -eo pipefail -c {{x}}": "code", "bash --rcfile y -c {{x}}": "code", "bash --norc -c {{x}}": "code", "sh +c {{x}}": "code",
		"env sh -c {{x}}": "code", "env A=1 sh -c {{x}}": "code", "env -i -u B sh -c {{x}}": "code", "sudo -u bob bash -lc {{x}}": "code", "exec sh -c {{x}}": "code", "busybox sh -c {{x}}": "code", "busybox ash -c {{x}}": "code", "timeout 5 sh -c {{x}}": "code",
		"xargs sh -c 'a {{x}}'": "code", "find . -exec sh -c 'a {{x}}' \\;": "code", "find . -exec sh -c a sh {} \\; -exec bash -c {{x}} \\;": "code", "docker exec y sh -c {{x}}": "code",
		"$SHELL -c {{x}}": "code", "\"$SHELL\" -c {{x}}": "code", "$(which bash) -c {{x}}": "code", "/bin/$y -c {{x}}": "code", "bash $y {{x}}": "code", "bash-5.2 -c {{x}}": "code", "'sh' -c {{x}}": "code", "s\\h -c {{x}}": "code",
		"su bob -c {{x}}": "code", "su -c{{x}} bob": "code", "su --command={{x}}": "code", "su --command {{x}}": "code", "flock y -c {{x}}": "code", "flock y sh -c {{x}}": "code", "env -S {{x}}": "code", "env -S{{x}}": "code",
		"python3 -c {{x}}": "code", "python -Wi -c \"print({{x}})\"": "code", "perl -e {{x}}": "code", "perl -pe {{x}}": "code", "perl -e a -e {{x}}": "code", "node -e {{x}}": "code", "node --eval={{x}}": "code", "node --eval {{x}}": "code", "ruby -e {{x}}": "code", "php -r {{x}}": "code",
		"ssh y ls {{x}}": "to a shell", "ssh -p 22 y 'ls {{x}}'": "to a shell", "ssh -o ProxyCommand={{x}} y": "code", "watch {{x}}": "to a shell", "watch -n 1 {{x}}": "to a shell", "powershell -Command {{x}}": "to a shell", "pwsh {{x}}": "to a shell", "su -{{x}}": "code", "python -{{x}}": "code",
	} {
		_, err := parseTemplate(text, shellPOSIX)
		if codeOf(err) != codeTemplatePlace || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), `"x"`) {
			t.Errorf("parseTemplate(%q) = %v [%s]; want %q about x", text, err, codeOf(err), want)
		}
	}
	// Sections hide places from a single look.
	for _, text := range []string{"a {{#y}}$({{x}}){{/y}}", "a {{^y}}$({{x}}){{/y}}", "a {{#z}}{{^y}}$({{x}}){{/y}}{{/z}}"} {
		if _, err := parseTemplate(text, shellPOSIX); codeOf(err) != codeTemplatePlace {
			t.Errorf("parseTemplate(%q) = %v", text, err)
		}
	}
}

// Other places take some values only.
func TestQuotePOSIXValueRefusals(t *testing.T) {
	for _, test := range []struct{ text, x, y, want string }{
		{"[ {{x}} -gt 3 ]", "a[$(b)]", "", "numbers"},
		{"[ 3 -gt {{x}} ]", "a[$(b)]", "", "numbers"},
		{"[ {{x}} = 1 -a -v {{y}} ]", "1", "a", "numbers"},
		{"test {{x}} = {{y}} -a 1 -eq 1", "a", "b", "numbers"},
		{"exit {{x}}", "a", "", "numbers"},
		{"a >&{{x}}", "$(b)", "", "number"}, {"a <&{{x}}", "b", "", "number"},
		{"shift {{x}}", "1x", "", "numbers"},
		{"printf %d {{x}}", "a", "", "number"},
		{"printf '%5.2f' {{x}}", "1.", "", "number"},
		{"printf \"{{x}} %s\" {{y}}", "%d", "b", "number"},
		{"printf $f {{x}}", "b", "", "number"},
		{"declare z={{x}}", "($(b))", "", "list"},
		{"printf -v z %s {{x}}", "b", "", "number"},
		{"printf {{x}} {{y}}", "-v", "b", "option"},
		{"sh {{x}} {{y}}", "-c", "b", "dash"},
		{"python3 {{x}}", "-cimport os", "", "dash"},
		{"ssh {{x}} uptime", "-oProxyCommand=b", "", "dash"},
		{"su {{x}}", "-cb", "", "dash"},
		{"{{x}} {{y}}", "eval", "b", "eval"},
		{"a; {{x}} {{y}}", "eval", "b", "eval"},
		{"{{x}} -c {{y}}", "bash", "b", "code"},
		{"{{x}}{{y}}{{y}} -c {{y}}", "/bin/sh", "", "code"},
		{"bash -{{x}} {{y}}", "lc", "b", "code"},
	} {
		data, err := json.Marshal(map[string]string{"x": test.x, "y": test.y})
		if err != nil {
			t.Fatal(err)
		}
		_, err = renderTemplate(test.text, string(data), shellPOSIX)
		if codeOf(err) != codeTemplatePlace || !strings.Contains(err.Error(), test.want) {
			t.Errorf("render(%q) of %q, %q = %v; want %q", test.text, test.x, test.y, err, test.want)
		}
	}
	// What only looks like a shell with a script is no such thing.
	got, err := renderTemplate("echo {{a}} {{b}} {{c}} {{d}}", `{"a":"sh","b":"-c","c":"eval","d":"x"}`, shellPOSIX)
	if want := []string{"echo", "sh", "-c", "eval", "x"}; err != nil || !slices.Equal(got.argv, want) {
		t.Errorf("render = %q, %v; want %q", got.argv, err, want)
	}
}

func TestQuoteCmd(t *testing.T) {
	for _, test := range []struct{ text, x, want, argv string }{
		{"prog {{x}}", "a b", `prog "a b"`, "prog|a b"},
		{"prog {{x}}", "", `prog ""`, "prog|"},
		{`prog "{{x}}" "a {{x}}"`, "b", `prog "b" "a b"`, "prog|b|a b"},
		{"prog {{x}}", `c:\d\`, `prog "c:\d\\"`, `prog|c:\d\`},
		{`prog "{{x}}" b`, `c:\d\`, `prog "c:\d\\" b`, `prog|c:\d\|b`},
		{`prog c:\{{x}}`, "d e", `prog c:\\"d e"`, `prog|c:\d e`},
		{`prog "c:\{{x}}\e"`, "d", `prog "c:\d\e"`, `prog|c:\d\e`},
		{"prog '{{x}}' $y `z` *", "a'b", "prog '\"a'b\"' $y `z` *", "prog|'a'b'|$y|`z`|*"},
		{"prog x{{x}}y\r\n", "é,;=", `prog x"é,;="y`, "prog|xé,;=y"},
		{"echo {{x}}", "a", `echo "a"`, ""},
		{"prog {{x}} >y", "a", `prog "a" >y`, ""},
		{"prog %A% {{x}}", "a", `prog %A% "a"`, ""},
		{`a "%A% & (b)" {{x}}`, "c", `a "%A% & (b)" "c"`, ""},
		{"python -m x {{x}} && prog {{x}}", "a", `python -m x "a" && prog "a"`, ""},
	} {
		data, err := json.Marshal(map[string]string{"x": test.x})
		if err != nil {
			t.Fatal(err)
		}
		got, err := renderTemplate(test.text, string(data), shellCmd)
		if err != nil || got.line != test.want || strings.Join(got.argv, "|") != test.argv {
			t.Errorf("render(%q) of %q = %q, %q, %v; want %q, %q", test.text, test.x, got.line, got.argv, err, test.want, test.argv)
		}
	}
	for _, x := range []string{`"`, "%", "!", "^", "&", "|", "<", ">", "(", ")", "\n", "\r", "\x00", "\t", "\x7f", "a%PATH%b", `a" & calc & "`} {
		for _, text := range []string{"prog {{x}}", `prog "{{x}}"`, "echo {{x}}"} {
			data, err := json.Marshal(map[string]string{"x": x})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := renderTemplate(text, string(data), shellCmd); codeOf(err) != codeTemplatePlace || !strings.Contains(err.Error(), "cmd.exe") {
				t.Errorf("render(%q) of %q = %v", text, x, err)
			}
		}
	}
	for text, want := range map[string]string{
		`prog "a\" {{x}}"`: `\"`, `prog \"{{x}}\"`: `\"`, "prog %{{x}}%": "%", "prog ^{{x}}": "^", "prog {{x}}{{x}}": `""`, `prog "a"{{x}}`: `""`, `prog {{x}}"a"`: `""`, `prog "a""b" {{x}}`: `""`,
		`powershell -Command "a {{x}}"`: "to a shell", "bash.exe -c {{x}}": "code", `C:\bin\SH.EXE -c {{x}}`: "code", "python -c {{x}}": "code", "a && powershell {{x}}": "to a shell",
	} {
		if _, err := parseTemplate(text, shellCmd); codeOf(err) != codeTemplatePlace || !strings.Contains(err.Error(), want) {
			t.Errorf("parseTemplate(%q) = %v; want %q", text, err, want)
		}
	}
	for text, want := range map[string]string{`prog "a`: `a " is not closed`, "a\nb": "first line"} {
		if _, err := parseTemplate(text, shellCmd); codeOf(err) != codeTemplate || !strings.Contains(err.Error(), want) {
			t.Errorf("parseTemplate(%q) = %v; want %q", text, err, want)
		}
	}
}

// FuzzTemplate puts a value into a template, compares how it is rendered with a library's way, and compares what the
// shell makes of it with what it makes of a harmless word in the same place: nothing but that word may differ. The pieces around the value are cut down to what opens and
// closes places in a command line, so that they can name no program; the shell has no PATH.
func FuzzTemplate(f *testing.F) {
	for _, seed := range [][3]string{
		{"", "", "x"}, {`"`, `"`, "$(0)"}, {"'", "'", "'"}, {"$", "", "'"}, {`\`, "", "'"}, {"$((", "))", "0"}, {"${0:-", "}", "'"}, {"`", "`", ";"},
		{"# '", "\n'", "\n0"}, {`"${0:-"`, `"}"`, "$(0)"}, {"$'\\'", "'", "';0;'"}, {"[", "]", "]"}, {"{", "}", ","}, {`"$`, `"`, "{0}"}, {"\\\n", "", "#"}, {"$(#)\n)", "", ")"},
		{"0;0 ", ";0", "\n"}, {"((0)) ", "", "))"}, {"$(0) `0` ", " $0", "`"},
		{"{{#x}}\n", "\n {{/x}}\n{{^x.y}}{{/x.y}}", ""}, {"{{=<% %>=}}<%{x}%>", "<%! %>", ""},
	} {
		f.Add(seed[0], seed[1], seed[2])
	}
	shells := shells(f)
	f.Fuzz(func(t *testing.T, before, after, value string) {
		// Any text at all: no panic, and a coded error.
		data, err := json.Marshal(map[string]string{"x": value})
		if err != nil {
			t.Fatal(err)
		}
		for _, shell := range []shellKind{shellPOSIX, shellCmd} {
			if _, err := renderTemplate(before+"{{x}}"+after, string(data), shell); err != nil && codeOf(err) == "" {
				t.Fatalf("render(%q) = %v, without a code", before+"{{x}}"+after, err)
			}
		}
		compareMustache(t, before+"{{x}}"+after, `{"x":[{"y":"z"},0]}`)
		var decoded struct{ X string }
		if err := json.Unmarshal(data, &decoded); err != nil {
			t.Fatal(err)
		}
		value = decoded.X // without what is not UTF-8

		const harmless = "h4rml3ss"
		text := "printf '%s\\000' " + cutToPlaces(before) + "{{x}}" + cutToPlaces(after)
		// A value may stand where a command's name does: builtins and programs are not for trying out, and $$ changes.
		if strings.Contains(value, "/") || value != "" && strings.Trim(value, "abcdefghijklmnopqrstuvwxyz") == "" || strings.Contains(text, "$$") {
			return
		}
		tmpl, err := parseTemplate(text, shellPOSIX)
		if err != nil {
			return
		}
		hostile, err := tmpl.render("t", data)
		if err != nil {
			return
		}
		plain, err := tmpl.render("t", json.RawMessage(`{"x":"`+harmless+`"}`))
		if err != nil {
			t.Fatalf("render(%q) takes %q but not %q: %v", text, value, harmless, err)
		}
		dir := t.TempDir()
		runIn := func(shell []string, line string) string {
			cmd := exec.Command(shell[0], append(slices.Clone(shell[1:]), line)...)
			cmd.Dir, cmd.Env = dir, []string{"PATH=/nowhere"}
			out, err := cmd.Output()
			var exit *exec.ExitError
			if err != nil && !errors.As(err, &exit) {
				t.Fatal(err)
			}
			return string(out)
		}
		for _, shell := range shells {
			got, want := runIn(shell, hostile.line), strings.ReplaceAll(runIn(shell, plain.line), harmless, value)
			if got != want {
				t.Fatalf("%s: %q of %q prints %q; want %q\n%s", shell, text, value, got, want, hostile.line)
			}
			if left, _ := os.ReadDir(dir); len(left) > 0 {
				t.Fatalf("%s: %q of %q wrote %s", shell, text, value, left[0].Name())
			}
		}
		if hostile.argv != nil {
			got := strings.Join(hostile.argv[2:], "\x00") + "\x00"
			if want := runIn(shells[0], hostile.line); got != want {
				t.Fatalf("%q of %q is %q directly and %q by the shell", text, value, got, want)
			}
		}
	})
}

// cutToPlaces keeps the characters of text that cannot name a program or a file.
func cutToPlaces(text string) string {
	if len(text) > 40 {
		text = text[:40]
	}
	return strings.Map(func(c rune) rune {
		if strings.ContainsRune("'\"\\$`(){}[]#; \n\t0:-=*?~!,", c) {
			return c
		}
		return -1
	}, text)
}

// Templates put together at random, most of them nonsense: those that are taken must treat a hostile value as they
// treat a harmless one, in every shell there is.
func TestQuotePOSIXRandomTemplates(t *testing.T) {
	t.Parallel() // it uses one processor, beside those that wait
	pieces := []string{
		"'", `"`, `\`, "$", "`", "(", ")", "{", "}", "$(", "$((", "))", "((", "${", "${b", ":-", "#", " ", " ", " ", "\n", ";", "|", "&&", "&", "\\\n", "<<E\n", "\nE\n",
		"<<<", "<", ">", ">&", "2>", "&>", "case ", " in ", ";;", "esac", "[[ ", " ]]", "printf '%s\\000' ", "printf '%s\\000' ", ": ", "a=", "export c=", "d[", "]", "if ", "then ", "fi", "for e in ",
		"do ", "done", "eval ", "command ", "set -- ", "\"$@\" ", "f() ", "$'", "$\"", "~", "!", "0", "x", "$b", "$?", ",", "=", "${#b}", "$(:)", "`:`", "$((1))", "'z'", `"z"`,
		"{{x}}", "{{x}}", "{{x}}", "'{{x}}'", `"{{x}}"`, `"$b{{x}}"`,
	}
	values := []string{
		"'", `"`, "`", `\`, "\n", ")", "$(: >canary)", "`: >canary`", ";: >canary;", "\n: >canary\n", "';: >canary;'", `";: >canary;"`, `$(: >canary)'$(: >canary)"$(: >canary)`, "): >canary;(", "}: >canary;{ ",
		"`\n: >canary\n`", "\\'\n: >canary\n'", "a[$(: >canary)]", "E\n: >canary\n", "))\n: >canary\n((", "#", " x y ", "*", "~", "-n", "", ": >canary", "|: >canary", "&: >canary", "$b", "${b:=c}", "\\\n: >canary",
	}
	const harmless = "h4rml3ss"
	seed := rand.Uint64()
	random := rand.New(rand.NewPCG(seed, 2))
	shells, dir := shells(t), t.TempDir()
	printed := func(shell []string, line string) string {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		cmd := exec.CommandContext(ctx, shell[0], append(slices.Clone(shell[1:]), line)...)
		cmd.Dir, cmd.Env = dir, []string{"PATH=/nowhere"}
		out, _ := cmd.Output() // most are no valid commands
		left, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range left {
			if file.Name() == "canary" {
				t.Fatalf("seed %d, %s: a value has run:\n%s", seed, shell, line)
			}
			os.Remove(filepath.Join(dir, file.Name())) // the target of a redirection
		}
		return string(out)
	}
	for taken := 0; taken < 150; {
		var text strings.Builder
		text.WriteString("printf '%s\\000' ")
		for range 1 + random.IntN(14) {
			text.WriteString(pieces[random.IntN(len(pieces))])
		}
		tmpl, err := parseTemplate(text.String(), shellPOSIX)
		if err != nil || !strings.Contains(text.String(), "{{x}}") || strings.Contains(text.String(), "$$") || strings.Contains(text.String(), "{$") {
			continue // $$ changes
		}
		value := values[random.IntN(len(values))]
		if random.IntN(2) == 0 {
			value += values[random.IntN(len(values))]
		}
		data, err := json.Marshal(map[string]string{"x": value})
		if err != nil {
			t.Fatal(err)
		}
		hostile, err := tmpl.render("t", data)
		if err != nil {
			continue
		}
		taken++
		plain, err := tmpl.render("t", json.RawMessage(`{"x":"`+harmless+`"}`))
		if err != nil {
			t.Fatalf("render(%q) takes %q but not %q: %v", text.String(), value, harmless, err)
		}
		for _, shell := range shells {
			got := printed(shell, hostile.line)
			want := strings.ReplaceAll(printed(shell, plain.line), harmless, value)
			// case decides by the value, a file named by it may be read or not, and what runs beside prints in any order.
			if got != want && value != "" && !strings.ContainsAny(text.String(), "<>&") && !strings.Contains(text.String(), "case") {
				t.Fatalf("seed %d, %s: %q of %q prints %q; want %q\n%s", seed, shell, text.String(), value, got, want, hostile.line)
			}
		}
	}
}
