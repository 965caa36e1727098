package k8s

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"

	kjson "sigs.k8s.io/json"

	"github.com/nftcni/nftcni/policy"
)

// objectKey identifies an object of any of our kinds.
type objectKey struct{ kind, namespace, name string }

func (k objectKey) String() string {
	if k.namespace == "" {
		return k.kind + " " + k.name
	}
	return k.kind + " " + k.namespace + "/" + k.name
}

// A manifest is one object as one document gives it, valid or not.
type manifest struct {
	key    objectKey
	place  Problem // File, Document, Line and Object
	value  policy.Event
	faults faults
	// isolating is what holds instead of a refused NetworkPolicy that never was
	// valid: the pods it selects, isolated. Nil if that could not be read.
	isolating *policy.Policy
}

// A parsedFile is what one read of one file gave.
type parsedFile struct {
	manifests []manifest
	problems  []Problem // of documents that could not be told to be any object of ours
	// unreadable: some document's object could not be identified, so an object that
	// is missing here may still be meant to be there.
	unreadable bool
}

// parseFile reads every document of a file. It never fails: what cannot be read
// becomes a Problem.
func parseFile(name string, data []byte) parsedFile {
	p := parser{file: parsedFile{}, name: name}
	if len(data) > MaxFileSize {
		p.reject(Problem{Line: 1}, fmt.Sprintf("larger than %d MiB", MaxFileSize>>20), "split the file")
		return p.file
	}
	docs, line, err := splitDocuments(name, data)
	for _, d := range docs {
		p.document(d)
	}
	if err != nil {
		p.reject(Problem{Document: len(docs) + 1, Line: line}, "JSON syntax: "+err.Error(), "mend the syntax")
	}
	return p.file
}

type parser struct {
	name string
	file parsedFile
}

// reject notes a document that may have been any object.
func (p *parser) reject(at Problem, message, remedy string) {
	at.File, at.Severity, at.Message, at.Remedy = p.name, Refused, message, remedy
	at.Effect = "objects that this file held before stay as they were"
	p.file.problems = append(p.file.problems, at)
	p.file.unreadable = true
}

func (p *parser) document(d document) {
	at := Problem{File: p.name, Document: d.number, Line: d.line}
	data, warning, err := d.toJSON()
	if err != nil {
		var message string
		at.Line, message = d.locate(err)
		p.reject(at, "YAML syntax: "+message, "mend the syntax")
		return
	}
	var f faults
	if warning != nil {
		_, message := d.locate(warning)
		f.warn(nil, "remove one of them; the last one counts", "%s", message)
	}
	p.object(data, at, f, 0)
}

// header is what every Kubernetes object has. Its parts are decoded one by one so that
// a fault in one does not hide the others.
type header struct {
	APIVersion string          `json:"apiVersion"`
	Kind       string          `json:"kind"`
	Metadata   json.RawMessage `json:"metadata"`
	Spec       json.RawMessage `json:"spec"`
	Items      json.RawMessage `json:"items"`
}

// maxListDepth bounds Lists within Lists.
const maxListDepth = 4

func (p *parser) object(data []byte, at Problem, f faults, depth int) {
	if bytes.Equal(bytes.TrimSpace(data), []byte("null")) {
		return
	}
	var h header
	if err := kjson.UnmarshalCaseSensitivePreserveInts(data, &h); err != nil || h.Kind == "" || h.APIVersion == "" {
		p.reject(at, "not a Kubernetes object: apiVersion and kind are required", "give apiVersion and kind, or keep other files out of this directory")
		return
	}
	kind, list := kindOf(h)
	switch {
	case list:
		p.list(h, at, depth)
	case kind == nil:
		at.Object = h.Kind
		if name, namespace, err := h.name(); err == nil && name != "" {
			at.Object = objectKey{h.Kind, namespace, name}.String()
		}
		p.file.problems = append(p.file.problems, unsupported(h, at))
	default:
		p.known(kind, h, data, at, f)
	}
}

// kindOf tells the kinds that have a meaning here, and lists that may hold them.
func kindOf(h header) (kind decoder, list bool) {
	switch h.APIVersion + " " + h.Kind {
	case "v1 Namespace":
		return decodeNamespace, false
	case "v1 Node":
		return decodeNode, false
	case "v1 Pod":
		return decodePod, false
	case "networking.k8s.io/v1 NetworkPolicy":
		return decodePolicy, false
	case "v1 List", "v1 NamespaceList", "v1 NodeList", "v1 PodList", "networking.k8s.io/v1 NetworkPolicyList":
		return nil, true
	}
	return nil, false
}

func (p *parser) known(kind decoder, h header, data []byte, at Problem, f faults) {
	m := manifest{place: at, faults: f, key: objectKey{kind: h.Kind}}
	var err error
	m.key.name, m.key.namespace, err = h.name()
	at.Object, at.Field = h.Kind, "metadata.name"
	switch {
	case err != nil:
		p.reject(at, "name and namespace must be strings", "put quotes around numbers and words like true, yes and y")
		return
	case m.key.name == "":
		p.reject(at, "required", "name the object (generateName works only on an API server)")
		return
	}
	kind(&m, h, data)
	m.place.Object = m.key.String()
	p.file.manifests = append(p.file.manifests, m)
}

func (p *parser) list(h header, at Problem, depth int) {
	var items []json.RawMessage
	err := json.Unmarshal(h.Items, &items)
	if len(h.Items) == 0 {
		err = nil
	}
	if err != nil || depth >= maxListDepth {
		at.Object, at.Field = h.Kind, "items"
		p.reject(at, fmt.Sprintf("not a list of objects, or more than %d lists in one another", maxListDepth), "make it a list of objects")
		return
	}
	single := strings.TrimSuffix(h.Kind, "List")
	for _, item := range items {
		// The items of a typed list may leave out apiVersion and kind.
		var head header
		if err := json.Unmarshal(item, &head); err == nil && head.Kind == "" && single != "" {
			if fields := map[string]json.RawMessage{}; json.Unmarshal(item, &fields) == nil {
				fields["kind"], fields["apiVersion"] = jsonString(single), jsonString(h.APIVersion)
				if b, err := json.Marshal(fields); err == nil {
					item = b
				}
			}
		}
		p.object(item, at, nil, depth+1)
	}
}

func jsonString(s string) json.RawMessage {
	b, err := json.Marshal(s)
	if err != nil {
		return json.RawMessage(`""`)
	}
	return b
}

// name reads metadata.name and metadata.namespace.
func (h header) name() (name, namespace string, err error) {
	if len(h.Metadata) == 0 {
		return "", "", nil
	}
	var meta struct {
		Name      string `json:"name"`
		Namespace string `json:"namespace"`
	}
	err = kjson.UnmarshalCaseSensitivePreserveInts(h.Metadata, &meta)
	return meta.Name, meta.Namespace, err
}
