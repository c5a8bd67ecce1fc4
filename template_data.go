package main

// template_data.go turns a task's JSON into the values that a command template sees. It decodes only what the template
// names, in bounded memory, and keeps numbers as they were sent.

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
