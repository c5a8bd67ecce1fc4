package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
)

func init() {
	// argv prints how many arguments it has and each with its length, so that a test can tell them apart.
	testRoles["argv"] = func(args []string) int {
		fmt.Printf("%d:", len(args))
		for _, arg := range args {
			fmt.Printf("%d:%s", len(arg), arg)
		}
		return 0
	}
}

// renderTemplate parses and renders in one go.
func renderTemplate(text, data string, shell shellKind) (renderedCommand, error) {
	tmpl, err := parseTemplate(text, shell)
	if err != nil {
		return renderedCommand{}, err
	}
	return tmpl.render("t1", json.RawMessage(data))
}

func TestTemplateValues(t *testing.T) {
	const data = `{
		"name": "Ada", "space": " ", "empty": "", "nothing": null, "yes": true, "no": false, "task_id": "forged",
		"n": 12345678901234567890, "e": 1e3, "f": 0.10, "zero": 0, "zeroes": -0.0E7, "list": ["a", "", null, 2], "none": [],
		"user": {"name": "Grace", "mail": {"home": "g@h"}, "list": [{"x": 1}, {"x": "two"}]}, "void": {},
		"name.dot": "unreachable", "html": "<a href=\"x\">&'", "Format": "a method's name", "twice": 1, "twice": 2
	}`
	for _, test := range []struct{ text, want string }{
		{"echo {{name}}", "echo|Ada"},
		{"echo {{{name}}} {{&name}}{{! a comment }}", "echo|Ada|Ada"},
		{"echo {{=<% %>=}}<% name %>", "echo|Ada"},
		{"echo {{user.name}} {{user.mail.home}}", "echo|Grace|g@h"},
		{"echo {{n}} {{e}} {{f}} {{zero}} {{zeroes}}", "echo|12345678901234567890|1e3|0.10|0|-0.0E7"},
		{"echo {{yes}} {{no}}", "echo|true|false"},
		{"echo {{empty}} {{nothing}} x", "echo|||x"},
		{"echo {{list}} {{none}} {{void}}", `echo|["a","",null,2]|[]|{}`},
		{"echo {{user.mail}}", `echo|{"home":"g@h"}`},
		{"echo {{task_id}} {{html}} {{Format}} {{twice}}", `echo|t1|<a href="x">&'|a method's name|2`},
		{"echo{{#list}} {{.}}{{/list}}", "echo|a|||2"},
		{"echo{{#user.list}} {{x}}-{{name}}{{/user.list}}", "echo|1-Ada|two-Ada"},
		{"echo{{#user}}{{#mail}} {{home}} {{name}}{{/mail}}{{/user}}", "echo|g@h|Grace"},
		{"echo{{#name}} {{.}}{{/name}}{{#space}} space{{/space}}{{#yes}} yes{{/yes}}{{#n}} n{{/n}}{{#void}} void{{/void}}", "echo|Ada|space|yes|n|void"},
		{"echo{{#no}}x{{/no}}{{#empty}}x{{/empty}}{{#nothing}}x{{/nothing}}{{#zero}}x{{/zero}}{{#zeroes}}x{{/zeroes}}{{#none}}x{{/none}}{{#missing}}x{{/missing}}", "echo"},
		{"echo{{^no}} a{{/no}}{{^none}} b{{/none}}{{^missing.deep}} c{{/missing.deep}}{{^name}} d{{/name}}", "echo|a|b|c"},
		{"echo a{{name}}b '{{name}}' \"{{name}}\" 'x {{name}}'\"y {{empty}}\"", "echo|aAdab|Ada|Ada|x Aday "},
		{"echo \\\n  {{name}} \\\n\tx\n", "echo|Ada|x"},
		{`echo "a\"b\$\x" \{ a\ b`, `echo|a"b$\x|{|a b`},
		{"{{name}} x", "Ada|x"},
	} {
		got, err := renderTemplate(test.text, data, shellPOSIX)
		if err != nil {
			t.Errorf("render(%q): %v", test.text, err)
		} else if argv := strings.Join(got.argv, "|"); argv != test.want {
			t.Errorf("render(%q) = %q; want %q", test.text, argv, test.want)
		}
	}
	for data, want := range map[string]string{"": "t1|{}", "[1, 2]": "t1|[1,2]", `"x"`: "t1|x", "null": "t1|", "[ ]": "t1|[]"} {
		got, err := renderTemplate("{{task_id}} {{.}}", data, shellPOSIX)
		if err != nil || strings.Join(got.argv, "|") != want {
			t.Errorf("render of %q = %q, %v; want %q", data, got.argv, err, want)
		}
	}
}

func TestTemplateErrors(t *testing.T) {
	t.Parallel() // beside others that wait
	long := `{"a":"` + strings.Repeat("x", maxCommandBytes) + `"}`
	ones := "[" + strings.Repeat("1,", 5000) + "1]"
	for _, test := range []struct {
		text, data string
		code       errCode
		want       string
	}{
		{"", "", codeTemplate, "empty"},
		{" \n", "", codeTemplate, "empty"},
		{"{{! nothing }}", "", codeTemplate, "no command is left"},
		{"echo {{x", "", codeTemplate, "unmatched open tag"},
		{"echo {{#x}}", "", codeTemplate, "x"},
		{"echo {{{}}}", "", codeTemplate, "without a name"},
		{"echo {{>/etc/passwd}}", "", codeTemplate, "partial"},
		{"echo {{#x}}{{>p}}{{/x}}", "", codeTemplate, "partial"},
		{"echo \x00", "", codeTemplate, "NUL"},
		{"echo 'x", "", codeTemplate, "a ' is not closed"},
		{`echo "x`, "", codeTemplate, `a " is not closed`},
		{`echo "x\`, "", codeTemplate, `a " is not closed`},
		{"echo $(x", "", codeTemplate, "a $( is not closed"},
		{"echo `x", "", codeTemplate, "a ` is not closed"},
		{"echo ${x", "", codeTemplate, "a ${ is not closed"},
		{"echo $((1", "", codeTemplate, "a (( is not closed"},
		{`echo x\`, "", codeTemplate, "backslash"},
		{"echo {{x}}", "{}", codeTemplateMissing, `"x"`},
		{"echo {{x}}", "[]", codeTemplateMissing, `"x"`},
		{"echo {{user.mail.home}}", `{"user":{"mail":{}}}`, codeTemplateMissing, `"user.mail.home"`},
		{"echo {{user.mail.home}}", `{"user":"x","mail":{"home":1}}`, codeTemplateMissing, `"user.mail.home"`},
		{"echo {{a.name}} {{b.name}}", `{"a":{"name":1},"b":{}}`, codeTemplateMissing, `"b.name"`},
		{"echo {{#l}}{{a.b}}{{/l}}", `{"l":[{"a":{"b":1}},{}]}`, codeTemplateMissing, `"a.b"`},
		{"echo {{^l}}{{a.b}}{{/l}}", `{"l":[]}`, codeTemplateMissing, `"a.b"`},
		{"echo {{#l}}x{{/l}}{{l.length}}", `{"l":[1]}`, codeTemplateMissing, `"l.length"`},
		{"echo {{a}}", `{"a":`, codeTemplateData, "JSON"},
		{"echo {{a}}", strings.Repeat("[", 20000) + strings.Repeat("]", 20000), codeTemplateData, "JSON"},
		{"echo {{a}}", `{"a":[` + strings.Repeat("0,", maxTemplateValues) + "0]}", codeTemplateData, "values"},
		{"echo {{a}}", long, codeTemplateData, "longer"},
		{"echo {{#a}}{{#a}}{{#b}}{{/b}}{{/a}}{{/a}}", `{"a":` + ones + `,"b":` + ones + `}`, codeTemplateData, "repeats"},
		{"echo {{a}}", `{"a":"x\u0000y"}`, codeTemplatePlace, `"a"`},
		{"echo {{#l}}{{a.b}}{{/l}}", `{"l":[{"a":{"b":1}},{"a":{"b":"\u0000"}}]}`, codeTemplatePlace, `"l.#2.a.b"`},
	} {
		_, err := renderTemplate(test.text, test.data, shellPOSIX)
		if codeOf(err) != test.code || !strings.Contains(err.Error(), test.want) {
			t.Errorf("render(%q) = %v [%s]; want %q [%s]", test.text, err, codeOf(err), test.want, test.code)
		}
	}
}

// What needs no shell is run without one.
func TestTemplateDirect(t *testing.T) {
	for _, test := range []struct {
		text   string
		direct bool
	}{
		{"prog a 'b c' \"d\" \\;", true},
		{"echo x", true}, {"printf x", true}, {"true", true}, {"test -f x", true}, {"kill 1", true}, {"sleep 1", true},
		{"prog a=b x:y a#b %1 a!b", true},
		{"\n prog x\n\n", true},
		{"prog '$x `y` * ~' \"* ? [a] ~ {} |\"", true},
		{"a | b", false}, {"a & b", false}, {"a; b", false}, {"a <x", false}, {"a >x", false}, {"(a)", false}, {"a\nb", false},
		{"a $x", false}, {"a `b`", false}, {"a \"$x\"", false}, {"a \"`b`\"", false}, {"a *", false}, {"a ?", false}, {"a [b]", false},
		{"a ~", false}, {"a x=~", false}, {"a x:~", false}, {"a x~", true}, {"a #x", false}, {"a {b,c}", false}, {"! a", false}, {"a !", false},
		{"X=1 a", false}, {"cd x", false}, {"if x", false}, {"exec x", false}, {". x", false}, {": x", false}, {"[ x ]", false}, {"'cd' x", false},
	} {
		got, err := renderTemplate(test.text, "{}", shellPOSIX)
		if err != nil || (got.argv != nil) != test.direct {
			t.Errorf("render(%q) = %q, %v; want direct: %t", test.text, got.argv, err, test.direct)
		}
	}
	if got, err := renderTemplate("{{a}} x", `{"a":"cd"}`, shellPOSIX); err != nil || got.argv != nil || got.line != "'cd' x" {
		t.Errorf("a builtin from a value = %+v, %v", got, err)
	}
}

func TestTemplateConcurrent(t *testing.T) {
	tmpl, err := parseTemplate("prog {{#l}}{{.}} {{o}}{{/l}} {{l}}", shellPOSIX)
	if err != nil {
		t.Fatal(err)
	}
	var tasks sync.WaitGroup
	for i := range 8 {
		tasks.Add(1)
		go func() {
			defer tasks.Done()
			want := fmt.Sprintf("prog|%d|{}|[%[1]d]", i)
			for range 50 {
				got, err := tmpl.render("t", json.RawMessage(fmt.Sprintf(`{"l":[%d],"o":{ }}`, i)))
				if err != nil || strings.Join(got.argv, "|") != want {
					t.Errorf("render = %q, %v; want %q", got.argv, err, want)
				}
			}
		}()
	}
	tasks.Wait()
}

func TestTemplateProgram(t *testing.T) {
	for text, want := range map[string]string{
		"prog {{x}}": "prog", "'my prog' x": "my prog", "prog | other": "prog", "prog >x": "prog", "prog \"$x\"": "prog",
		"{{#a}}x {{/a}}prog": "", "{{#a}}prog a{{/a}}{{^a}}prog b{{/a}}": "prog",
		"{{x}} y": "", "$x y": "", "cd x": "", "if x; then y; fi": "", "X=1 prog": "", "(prog)": "", ">x prog": "", "f() { x; }": "", "f () { x; }": "",
		"~/prog": "", "*x": "", "./{{x}}": "", "! prog": "", "prog# x": "prog#", "# prog": "",
	} {
		tmpl, err := parseTemplate(text, shellPOSIX)
		if err != nil {
			t.Errorf("parseTemplate(%q): %v", text, err)
			continue
		}
		if got, known := tmpl.program(); got != want && known || known != (want != "") {
			t.Errorf("program of %q = %q, %t; want %q", text, got, known, want)
		}
	}
}

// shells are those that can be tested here, as the words before a command line.
func shells(t testing.TB) [][]string {
	t.Helper()
	if runtime.GOOS == "windows" {
		t.Skip("no POSIX shell")
	}
	found := [][]string{{"/bin/sh", "-c"}}
	for _, shell := range [][]string{{"dash", "-c"}, {"bash", "-c"}, {"bash", "--posix", "-c"}, {"busybox", "sh", "-c"}, {"mksh", "-c"}, {"ksh93", "-c"}, {"yash", "-c"}} {
		if path, err := exec.LookPath(shell[0]); err == nil {
			found = append(found, append([]string{path}, shell[1:]...))
		}
	}
	return found
}

// argvOf runs a command whose program is the argv role, and gives the arguments that it got.
func argvOf(t testing.TB, argv []string, dir string) []string {
	t.Helper()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir = dir
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("run %.200q: %v", argv, err)
	}
	return readArgv(t, out)
}

func readArgv(t testing.TB, out []byte) []string {
	t.Helper()
	count, out, _ := bytes.Cut(out, []byte(":"))
	n, err := strconv.Atoi(string(count))
	if err != nil {
		t.Fatalf("the argv role did not run: %.200q", count)
	}
	args := make([]string, n)
	for i := range args {
		var length []byte
		length, out, _ = bytes.Cut(out, []byte(":"))
		n, err := strconv.Atoi(string(length))
		if err != nil || n > len(out) {
			t.Fatalf("argument %d has length %q of %d", i, length, len(out))
		}
		args[i], out = string(out[:n]), out[n:]
	}
	return args
}

// hostileValues draws values that try to get out of their place; one that does makes the file canary.
func hostileValues(random *rand.Rand, n int) []string {
	pieces := []string{
		"'", `"`, "`", "\\", "$", "$(touch canary)", "`touch canary`", ";touch canary;", "\ntouch canary\n", "|touch canary", "&&touch canary",
		"${x:-$(touch canary)}", "$((a[$(touch canary)]))", "a[$(touch canary)]", "'$(touch canary)'", `"$(touch canary)"`, "';touch canary;'", `";touch canary;"`,
		"-v", "--", "-c", "-", "*", "?", "[a-z]", "~", "~root", "{a,b}", "{1..9}", "#", "!", "!!", "=", "x=y", "<<EOF\n", ">canary", "<", "(", ")", " ", "  ", "\t", "\n", "\r",
		"eval", "sh", "if", "{{task_id}}", "{{x}}", "}}", "\x01", "\x1b[31m", "\x7f", "é", "日本", "😀", "\ufffd", "\u2028", "\u00a0", "%s", "%PATH%", "\\n", "\\'", "\\\n", "5", "abc",
	}
	values := []string{"", " ", "'", "\n", "-n", "\\", strings.Repeat("x'y\"", 500), strings.Repeat("'", 500), strings.Repeat("日", 1000)}
	for len(values) < n {
		var value strings.Builder
		for range 1 + random.IntN(7) {
			value.WriteString(pieces[random.IntN(len(pieces))])
		}
		values = append(values, value.String())
	}
	return values
}

func TestTemplateHostileValues(t *testing.T) {
	t.Parallel() // beside those that wait
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program := "'" + self + "' test-role argv"
	seed := rand.Uint64()
	random := rand.New(rand.NewPCG(seed, 1))
	values := hostileValues(random, 1000)
	dir := t.TempDir()
	shells := shells(t)
	for len(values) > 0 {
		// Linux takes 128 KiB in one argument, here a whole line with each value ten times.
		taken, size := 0, 0
		for taken < len(values) && size+len(values[taken])+40 < 7000 {
			size += len(values[taken]) + 40
			taken++
		}
		some := values[:taken]
		values = values[taken:]

		text := program
		data := map[string]any{"list": some}
		var want []string
		for i, value := range some {
			name := fmt.Sprintf("v%d", i)
			data[name] = value
			text += fmt.Sprintf(` {{%s}} "{{%[1]s}}" '{{%[1]s}}' a{{%[1]s}}b "x $b{{%[1]s}}$b y" --k='{{%[1]s}}'"{{%[1]s}}"{{%[1]s}} %%\\{{%[1]s}}`, name)
			want = append(want, value, value, value, "a"+value+"b", "x "+value+" y", "--k="+value+value+value, `%\`+value)
		}
		text += `{{#list}} {{.}}{{/list}}`
		want = append(want, some...)
		encoded, err := json.Marshal(data)
		if err != nil {
			t.Fatal(err)
		}
		compare := func(how string, got []string) {
			t.Helper()
			if slices.Equal(got, want) {
				return
			}
			for i := range min(len(got), len(want)) {
				if got[i] != want[i] {
					t.Fatalf("seed %d, %s: argument %d is %q; want %q", seed, how, i, got[i], want[i])
				}
			}
			t.Fatalf("seed %d, %s: %d arguments; want %d", seed, how, len(got), len(want))
		}

		command, err := renderTemplate(text, string(encoded), shellPOSIX)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if command.argv != nil {
			t.Fatalf("%q is no command to run directly", text)
		}
		compare("sh -c", argvOf(t, []string{"/bin/sh", "-c", command.line}, dir))
		// The other shells print the arguments themselves, since starting this program takes long.
		printing := "printf '%s\\000' " + strings.TrimPrefix(command.line, program)
		for _, shell := range shells {
			cmd := exec.Command(shell[0], append(slices.Clone(shell[1:]), printing)...)
			cmd.Dir = dir
			out, err := cmd.Output()
			if err != nil {
				t.Fatalf("run %q: %v", shell, err)
			}
			compare(strings.Join(shell, " "), strings.Split(strings.TrimSuffix(string(out), "\x00"), "\x00"))
		}
		direct, err := renderTemplate(strings.ReplaceAll(text, "$b", ""), string(encoded), shellPOSIX)
		if err != nil || direct.argv == nil {
			t.Fatalf("seed %d: direct: %q, %v", seed, direct.argv, err)
		}
		compare("directly", argvOf(t, direct.argv, dir))
	}
	if _, err := os.Stat(filepath.Join(dir, "canary")); err == nil {
		t.Errorf("seed %d: a value has run as a command", seed)
	}
}
