package main

// template_data.go turns a task's JSON into the values that a command template sees. It decodes only what the template
// names, in bounded memory, and keeps numbers as they were sent.

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// A value of the data is one of these:
//
//	string   a frame that a section shows
//	hidden   a frame that a section does not show: null, false, "", 0
//	*list    a section shows it once for each of its values
//	*object  a section shows it even when it has no members

type hidden string

type list struct {
	values []any
	text   ownText
}

type object struct {
	members map[string]any
	text    ownText
}

// objectNamed is an object without members whose text is its name.
func objectNamed(name string) *object {
	return &object{members: map[string]any{}, text: ownText{framed: frame(name)}}
}

// ownText is what a list or an object reads as: its JSON, framed in its compact form when it is first asked for and kept,
// so that a long text is not compacted for each use.
type ownText struct {
	json   json.RawMessage
	framed string
}

func (t *ownText) frame() string {
	if t.framed == "" {
		var compact bytes.Buffer
		json.Compact(&compact, t.json) // it was valid when it was decoded
		t.framed = frame(compact.String())
	}
	return t.framed
}

// textOf is a value's frame.
func textOf(value any) string {
	switch value := value.(type) {
	case *list:
		return value.text.frame()
	case *object:
		return value.text.frame()
	case hidden:
		return string(value)
	}
	return value.(string)
}

// decode reads the members that the template names. With naming, every value is its own path, for error messages.
func (t *commandTemplate) decode(taskID string, data json.RawMessage, naming bool) (*object, error) {
	if naming {
		taskID = "task_id"
	}
	if !t.namesData() {
		return &object{members: map[string]any{"task_id": frame(taskID)}}, nil
	}
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
	root, ok := value.(*object)
	if !ok {
		// Data that is no object has no members; {{.}} is still its text.
		root = &object{members: map[string]any{}, text: ownText{framed: textOf(value)}}
	}
	root.members["task_id"] = frame(taskID)
	return root, nil
}

// namesData reports whether the template puts anything but the task's id into the command: many leave the data to the file
// that the command reads.
func (t *commandTemplate) namesData() bool {
	return len(t.names) > 1 || len(t.names) == 1 && !t.names["task_id"]
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
	members := map[string]any{}
	for d.json.More() {
		key, err := d.json.Token()
		if err != nil {
			return nil, err
		}
		name := key.(string)
		if !d.wanted[name] {
			err = d.json.Decode(&d.skipped)
		} else {
			members[name], err = d.value(d.below(path, name))
		}
		if err != nil {
			return nil, err
		}
	}
	if _, err := d.json.Token(); err != nil {
		return nil, err
	}
	return &object{members, d.textFrom(start, path)}, nil
}

func (d *dataDecoder) list(start int64, path string) (any, error) {
	var values []any
	for d.json.More() {
		element, err := d.value(d.below(path, "#"+strconv.Itoa(len(values)+1)))
		if err != nil {
			return nil, err
		}
		values = append(values, element)
	}
	if _, err := d.json.Token(); err != nil {
		return nil, err
	}
	return &list{values, d.textFrom(start, path)}, nil
}

func (d *dataDecoder) scalar(text string, isHidden bool, path string) any {
	if d.naming {
		text = path
	}
	if isHidden {
		return hidden(frame(text))
	}
	return frame(text)
}

// textFrom is the text of the object or list that has just ended: its JSON, or its path.
func (d *dataDecoder) textFrom(start int64, path string) ownText {
	if d.naming {
		return ownText{framed: frame(path)}
	}
	// Between the token before and this one there is only white space, a colon or a comma.
	return ownText{json: bytes.TrimLeft(d.source[start:d.json.InputOffset()], " \t\r\n:,")}
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
