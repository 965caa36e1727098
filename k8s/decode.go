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
