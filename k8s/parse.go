package k8s

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"
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
	var kind decoder
	switch h.APIVersion + " " + h.Kind {
	case "v1 Namespace":
		kind = decodeNamespace
	case "v1 Node":
		kind = decodeNode
	case "v1 Pod":
		kind = decodePod
	case "networking.k8s.io/v1 NetworkPolicy":
		kind = decodePolicy
	case "v1 List", "v1 NamespaceList", "v1 NodeList", "v1 PodList", "networking.k8s.io/v1 NetworkPolicyList":
		p.list(h, at, depth)
		return
	default:
		at.Object = h.Kind
		if name, namespace, err := h.name(); err == nil && name != "" {
			at.Object = objectKey{h.Kind, namespace, name}.String()
		}
		p.file.problems = append(p.file.problems, unsupported(h, at))
		return
	}
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

// unsupported reports an object of a kind that has no meaning to nftcni.
func unsupported(h header, at Problem) Problem {
	group, _, _ := strings.Cut(h.APIVersion, "/")
	at.Severity, at.Field = Refused, "kind"
	at.Message = fmt.Sprintf("unsupported kind %s of %s", quote(h.Kind), quote(h.APIVersion))
	at.Effect = "the object is ignored, all others count"
	switch {
	case h.Kind == "NetworkPolicy" && (group == "networking.k8s.io" || group == "extensions"):
		at.Message, at.Field = "unsupported version "+quote(h.APIVersion)+" of NetworkPolicy", "apiVersion"
		at.Remedy = "use apiVersion: networking.k8s.io/v1"
	case strings.Contains(h.Kind, "NetworkPolicy"), strings.Contains(group, "calico"), strings.Contains(group, "cilium"):
		at.Remedy = "express it as a NetworkPolicy of networking.k8s.io/v1"
	case group == "apps" || group == "batch":
		at.Severity, at.Remedy = Warning, "give the Pods themselves: there is no controller here that makes them"
	default:
		at.Severity, at.Remedy = Warning, "none is needed: only Namespace, Node, Pod and NetworkPolicy matter here"
	}
	return at
}

// A decoder fills in key, value and faults of m from the object's JSON.
type decoder func(m *manifest, h header, data []byte)

func decodeNamespace(m *manifest, _ header, data []byte) {
	var o corev1.Namespace
	m.decode(data, &o, &o.ObjectMeta, false)
	ns := convertNamespace(&o, &m.faults)
	m.value.Namespace = &ns
}

func decodeNode(m *manifest, _ header, data []byte) {
	var o corev1.Node
	m.decode(data, &o, &o.ObjectMeta, false)
	n := convertNode(&o, &m.faults)
	m.value.Node = &n
}

func decodePod(m *manifest, _ header, data []byte) {
	var o corev1.Pod
	m.decode(data, &o, &o.ObjectMeta, true)
	p := convertPod(&o, &m.faults)
	m.value.Pod = &p
}

func decodePolicy(m *manifest, h header, data []byte) {
	var o networkingv1.NetworkPolicy
	m.decode(data, &o, &o.ObjectMeta, true)
	p := convertPolicy(&o, &m.faults)
	m.value.Policy = &p
	if m.faults.refused() {
		m.isolating = isolatingPolicy(m.key, h.Spec)
	}
}

// decode unmarshals into o strictly. Unknown and duplicate fields are warnings, as they
// are for the API server; what does not fit its type is refused.
func (m *manifest) decode(data []byte, o any, meta *metav1.ObjectMeta, namespaced bool) {
	strict, err := kjson.UnmarshalStrict(data, o)
	for _, e := range strict {
		at, message := (*field.Path)(nil), e.Error()
		if x, ok := errors.AsType[kjson.FieldError](e); ok {
			at = field.NewPath(x.FieldPath())
			message = strings.TrimSuffix(strings.TrimSuffix(message, quoteExact(x.FieldPath())), " ")
		}
		m.faults.warn(at, "correct the name of the field or remove it: it has no effect", "%s", message)
	}
	if err != nil {
		m.decodeError(err)
	}
	if namespaced && meta.Namespace == "" {
		meta.Namespace = metav1.NamespaceDefault
	}
	meta.Name = m.key.name
	if !namespaced {
		m.key.namespace = ""
	} else if m.key.namespace == "" {
		m.key.namespace = metav1.NamespaceDefault
	}
	if err == nil {
		checkMeta(meta, namespaced, &m.faults)
	}
}

// decodeError reports a value that does not fit the type of its field. The decoder says
// which field only in its text: "cannot unmarshal number into Go struct field
// NetworkPolicy.metadata.labels of type string".
func (m *manifest) decodeError(err error) {
	const remedy = "correct the type of the value (numbers and words like true, yes and y need quotes where a string is meant)"
	message := strings.TrimPrefix(err.Error(), "json: ")
	what, rest, ok := strings.Cut(message, " into Go struct field ")
	place, typ, ok2 := strings.Cut(rest, " of type ")
	if _, path, ok3 := strings.Cut(place, "."); ok && ok2 && ok3 {
		m.faults.refuse(field.NewPath(path), remedy, "%s is not a %s", strings.TrimPrefix(what, "cannot unmarshal "), typ)
		return
	}
	m.faults.refuse(nil, remedy, "%s", message)
}

func quoteExact(s string) string { return fmt.Sprintf("%q", s) }

// isolatingPolicy is the policy that selects what the spec selects and allows nothing,
// in the directions of policyTypes if they can be read, else in both. Nil if the
// podSelector cannot be read.
func isolatingPolicy(key objectKey, spec json.RawMessage) *policy.Policy {
	var parts struct {
		PodSelector json.RawMessage `json:"podSelector"`
		PolicyTypes json.RawMessage `json:"policyTypes"`
		Egress      json.RawMessage `json:"egress"`
	}
	if len(spec) == 0 || kjson.UnmarshalCaseSensitivePreserveInts(spec, &parts) != nil {
		return nil
	}
	np := networkingv1.NetworkPolicy{}
	np.Name, np.Namespace = key.name, key.namespace
	if len(parts.PodSelector) > 0 {
		if err := kjson.UnmarshalCaseSensitivePreserveInts(parts.PodSelector, &np.Spec.PodSelector); err != nil {
			return nil
		}
	}
	var f faults
	p := convertPolicy(&np, &f)
	if f.refused() {
		return nil
	}
	var types networkingv1.NetworkPolicySpec
	if len(parts.PolicyTypes) > 0 && kjson.UnmarshalCaseSensitivePreserveInts(parts.PolicyTypes, &types.PolicyTypes) != nil {
		types.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress}
	}
	if len(parts.Egress) > 0 && !bytes.Equal(parts.Egress, []byte("null")) && !bytes.Equal(parts.Egress, []byte("[]")) {
		types.Egress = make([]networkingv1.NetworkPolicyEgressRule, 1)
	}
	p.Applies = convertPolicyTypes(&types, nil, &f)
	return &p
}
