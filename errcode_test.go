package main

import (
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"unicode"
)

// codeInSource is an error code as errcode.go has it.
type codeInSource struct{ name, literal, doc string }

func codesInSource(t *testing.T) []codeInSource {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "errcode.go", nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	var codes []codeInSource
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok || len(spec.Values) != 1 {
			return true
		}
		if literal, ok := spec.Values[0].(*ast.BasicLit); ok && strings.HasPrefix(literal.Value, `"ERR-`) {
			codes = append(codes, codeInSource{spec.Names[0].Name, strings.Trim(literal.Value, `"`), spec.Doc.Text()})
		}
		return true
	})
	return codes
}

// TestErrorCodes compares the codes with their use in the source and with the README.
func TestErrorCodes(t *testing.T) {
	var source strings.Builder
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		if text, err := os.ReadFile(name); err == nil && !strings.HasSuffix(name, "_test.go") {
			source.Write(text)
		}
	}
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	words := map[string]int{} // how often each stands in the source
	for _, word := range strings.FieldsFunc(source.String(), func(r rune) bool { return !unicode.IsLetter(r) && !unicode.IsDigit(r) }) {
		words[word]++
	}
	shape := regexp.MustCompile(`^ERR-[0-9T]{11,12}$`)
	seen := map[string]bool{}
	codes := codesInSource(t)
	for _, code := range codes {
		if seen[code.literal] || !shape.MatchString(code.literal) {
			t.Errorf("%s: %s is not a code of its own", code.name, code.literal)
		}
		seen[code.literal] = true
		if len(code.doc) < 20 {
			t.Errorf("%s has no comment that says when it occurs and what to do", code.name)
		}
		if n := strings.Count(source.String(), code.literal); n != 1 {
			t.Errorf("%s stands %d times in the source", code.literal, n)
		}
		if words[code.name] < 2 {
			t.Errorf("%s is never raised", code.name)
		}
		if n := strings.Count(string(readme), code.literal); n != 1 {
			t.Errorf("%s stands %d times in the README", code.literal, n)
		}
	}
	if len(codes) < 50 {
		t.Errorf("only %d codes were found in errcode.go", len(codes))
	}
	for _, literal := range regexp.MustCompile(`ERR-[0-9T]{11,12}`).FindAllString(string(readme), -1) {
		if !seen[literal] {
			t.Errorf("the README lists %s, which is not in the source", literal)
		}
	}
}

func TestCodedError(t *testing.T) {
	cause := errors.New("no such file")
	err := fmt.Errorf("load: %w", failHint(codeConfigFile, `open "x"`, cause, "make one"))
	if err.Error() != `load: open "x": no such file` || !errors.Is(err, cause) {
		t.Errorf("error is %v", err)
	}
	if codeOf(err) != codeConfigFile || hintOf(err) != "make one" {
		t.Errorf("code %q, hint %q", codeOf(err), hintOf(err))
	}
	if codeOf(cause) != "" || hintOf(cause) != "" {
		t.Error("a plain error has a code or a hint")
	}
}
