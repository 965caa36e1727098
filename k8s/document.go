package k8s

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	goyaml "sigs.k8s.io/yaml/goyaml.v2"

	"sigs.k8s.io/yaml"
)

// MaxFileSize is the size in bytes of the largest manifest that is read, and of the
// largest document after its YAML aliases are expanded.
const MaxFileSize = 16 << 20

// A document is one YAML or JSON document of a file.
type document struct {
	number, line int // from 1
	data         []byte
	json         bool
}

// splitDocuments cuts a file at its document markers ("---" and "..."). A file that
// starts with '{' and is named .json is a sequence of JSON objects. err is a syntax
// error of such a sequence, at its line; the documents before it are returned.
func splitDocuments(name string, data []byte) (docs []document, line int, err error) {
	data = bytes.TrimPrefix(data, []byte("\xef\xbb\xbf"))
	if strings.HasSuffix(name, ".json") && bytes.HasPrefix(bytes.TrimSpace(data), []byte("{")) {
		return splitJSON(data)
	}
	current := document{number: 1, line: 1}
	add := func(next int) {
		if !blank(current.data) {
			docs = append(docs, current)
			current.number++
		}
		current.line, current.data = next, nil
	}
	start := 0 // of the current document's data
	line = 0
	for pos := 0; pos < len(data); {
		end := len(data)
		if i := bytes.IndexByte(data[pos:], '\n'); i >= 0 {
			end = pos + i + 1
		}
		line++
		if text := data[pos:end]; marker(text, "---") || marker(text, "...") {
			current.data = data[start:pos]
			add(line)
			start = pos + 3
		}
		pos = end
	}
	current.data = data[start:]
	add(0)
	return docs, 0, nil
}

func splitJSON(data []byte) (docs []document, line int, err error) {
	dec := json.NewDecoder(bytes.NewReader(data))
	line = 1
	for counted := 0; ; {
		rest := data[dec.InputOffset():]
		next := len(data) - len(bytes.TrimLeft(rest, " \t\r\n"))
		line += bytes.Count(data[counted:next], []byte("\n"))
		counted = next
		var raw json.RawMessage
		if err := dec.Decode(&raw); errors.Is(err, io.EOF) {
			return docs, 0, nil
		} else if err != nil {
			return docs, line, err
		}
		docs = append(docs, document{number: len(docs) + 1, line: line, data: raw, json: true})
	}
}

// marker reports whether the line is this document marker: alone or followed by white
// space.
func marker(line []byte, mark string) bool {
	rest, ok := bytes.CutPrefix(line, []byte(mark))
	return ok && (len(rest) == 0 || bytes.IndexByte([]byte(" \t\r\n"), rest[0]) >= 0)
}

// blank reports whether there is nothing but comments, directives and white space.
func blank(data []byte) bool {
	for line := range bytes.Lines(data) {
		if line = bytes.TrimSpace(line); len(line) > 0 && line[0] != '#' && line[0] != '%' {
			return false
		}
	}
	return true
}

// toJSON converts the document. A duplicate key is only a warning: like the API server
// without strict validation, the last one counts.
func (d document) toJSON() (data []byte, warning, err error) {
	if d.json {
		return d.data, nil, nil
	}
	if err := checkAliases(d.data); err != nil {
		return nil, nil, err
	}
	data, strictErr := yaml.YAMLToJSONStrict(d.data)
	if strictErr == nil {
		return data, nil, nil
	}
	if data, err = yaml.YAMLToJSON(d.data); err != nil {
		return nil, nil, err
	}
	return data, strictErr, nil
}

// checkAliases refuses a document whose aliases expand it beyond MaxFileSize. The YAML
// decoder bounds the number of expanded nodes, not the bytes in them: a hundred
// thousand aliases of one long string decode at no cost and encode to a hundred GB.
func checkAliases(data []byte) error {
	if bytes.IndexByte(data, '&') < 0 || bytes.IndexByte(data, '*') < 0 {
		return nil
	}
	var v any
	if err := goyaml.Unmarshal(data, &v); err != nil {
		return err
	}
	if expandedSize(v, MaxFileSize) > MaxFileSize {
		return fmt.Errorf("the document's aliases expand to more than %d MiB", MaxFileSize>>20)
	}
	return nil
}

// expandedSize estimates the bytes of v as JSON and stops counting beyond limit.
func expandedSize(v any, limit int) int {
	n := 8
	switch v := v.(type) {
	case string:
		n += len(v)
	case []any:
		for _, e := range v {
			if n > limit {
				break
			}
			n += expandedSize(e, limit-n)
		}
	case map[any]any:
		for k, e := range v {
			if n > limit {
				break
			}
			n += expandedSize(k, limit-n)
			n += expandedSize(e, limit-n)
		}
	}
	return n
}

// locate turns the decoder's "line N" within the document into a line of the file, and
// cuts the decoders' prefixes from the message.
func (d document) locate(err error) (line int, message string) {
	message = err.Error()
	for _, prefix := range []string{"error converting YAML to JSON: ", "yaml: ", "unmarshal errors:\n  ", "json: "} {
		message = strings.TrimPrefix(message, prefix)
	}
	if rest, ok := strings.CutPrefix(message, "line "); ok {
		if number, text, ok := strings.Cut(rest, ": "); ok {
			if n, err := strconv.Atoi(number); err == nil {
				return d.line + n - 1, text
			}
		}
	}
	return d.line, message
}
