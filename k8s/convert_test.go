package k8s

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nftcni/nftcni/policy"
)

func labels(pairs ...string) policy.Labels {
	m := map[string]string{}
	for i := 0; i < len(pairs); i += 2 {
		m[pairs[i]] = pairs[i+1]
	}
	return policy.MakeLabels(m)
}

func addrs(s ...string) []netip.Addr {
	var out []netip.Addr
	for _, a := range s {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

const (
	publicKey1 = "AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI="
	publicKey2 = "AwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwM="
)

func nodeWithKeys(keys string) string {
	return "apiVersion: v1\nkind: Node\nmetadata: {name: n1, annotations: {nftcni.io/wireguard-keys: '" + keys + "'}}"
}

func nodeWithMesh(addrs string) string {
	return "apiVersion: v1\nkind: Node\nmetadata: {name: n1, annotations: {nftcni.io/mesh-addresses: '" + addrs + "'}}"
}

// TestObjectMeaning: Pods, Namespaces and Nodes, the namespaces that are implied, and
// what is no error.
func TestObjectMeaning(t *testing.T) {
	ns := func(name string, pairs ...string) policy.Event {
		return policy.Event{Namespace: &policy.Namespace{Name: name, Labels: labels(append(pairs, "kubernetes.io/metadata.name", name)...)}}
	}
	pod := func(change func(*policy.Pod)) []policy.Event {
		p := &policy.Pod{Name: policy.Name{Namespace: "default", Name: "p"}}
		change(p)
		return []policy.Event{ns("default"), {Pod: p}}
	}
	tests := []struct {
		name, yaml string
		want       []policy.Event
	}{
		{"nothing", "", nil},
		{"comments and empty documents", "# nothing\n---\n---\n# nothing\n...\n", nil},
		{"null", "null\n", nil},
		{"namespace", "apiVersion: v1\nkind: Namespace\nmetadata: {name: a, labels: {x: z}}", []policy.Event{ns("a", "x", "z")}},
		{"namespace: the name label cannot be changed", "apiVersion: v1\nkind: Namespace\nmetadata: {name: a, labels: {kubernetes.io/metadata.name: b}}", []policy.Event{ns("a")}},
		{"pod: smallest, namespace default and implied", "apiVersion: v1\nkind: Pod\nmetadata: {name: p}", pod(func(*policy.Pod) {})},
		{"pod: explicit namespace is not overridden by its implication",
			"apiVersion: v1\nkind: Pod\nmetadata: {name: p}\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: default, labels: {x: z}}",
			[]policy.Event{ns("default", "x", "z"), {Pod: &policy.Pod{Name: policy.Name{Namespace: "default", Name: "p"}}}}},
		{"pod: labels, node, uid", "apiVersion: v1\nkind: Pod\nmetadata: {name: p, uid: u, labels: {x: z}}\nspec: {nodeName: n1}",
			pod(func(p *policy.Pod) { p.UID, p.Node, p.Labels = "u", "n1", labels("x", "z") })},
		{"pod: mirror of a static pod has the file's hash as UID",
			"apiVersion: v1\nkind: Pod\nmetadata: {name: p, uid: u, annotations: {kubernetes.io/config.hash: h, kubernetes.io/config.mirror: h}}",
			pod(func(p *policy.Pod) { p.UID = "h" })},
		{"pod: podIPs before podIP", "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nstatus: {podIP: 10.0.0.9, podIPs: [{ip: 10.0.0.1}, {ip: 'fd00::1'}, {ip: '::ffff:10.0.0.1'}]}",
			pod(func(p *policy.Pod) { p.Addrs = addrs("10.0.0.1", "fd00::1") })},
		{"pod: podIP alone", "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nstatus: {podIP: 10.0.0.9}",
			pod(func(p *policy.Pod) { p.Addrs = addrs("10.0.0.9") })},
		{"pod: hostNetwork", "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: {hostNetwork: true}", pod(func(p *policy.Pod) { p.HostNetwork = true })},
		{"pod: Succeeded", "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nstatus: {phase: Succeeded}", pod(func(p *policy.Pod) { p.Finished = true })},
		{"pod: Failed", "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nstatus: {phase: Failed}", pod(func(p *policy.Pod) { p.Finished = true })},
		{"pod: Running", "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nstatus: {phase: Running}", pod(func(*policy.Pod) {})},
		{"pod: created", "apiVersion: v1\nkind: Pod\nmetadata: {name: p, creationTimestamp: '1970-01-01T00:01:00Z'}", pod(func(p *policy.Pod) { p.Created = 60 })},
		{"pod: named ports in order, sidecars last, others not",
			`apiVersion: v1
kind: Pod
metadata: {name: p}
spec:
  initContainers:
  - {name: i, ports: [{name: init, containerPort: 1}]}
  - {name: s, restartPolicy: Always, ports: [{name: side, containerPort: 2}]}
  containers:
  - {name: a, ports: [{containerPort: 3}, {name: http, containerPort: 4}, {name: dns, containerPort: 5, protocol: UDP}]}
  - {name: b, ports: [{name: http, containerPort: 6, protocol: SCTP}]}`,
			pod(func(p *policy.Pod) {
				p.Ports = []policy.NamedPort{{Name: "http", Protocol: policy.TCP, Port: 4}, {Name: "dns", Protocol: policy.UDP, Port: 5},
					{Name: "http", Protocol: policy.SCTP, Port: 6}, {Name: "side", Protocol: policy.TCP, Port: 2}}
			})},
		{"node", "apiVersion: v1\nkind: Node\nmetadata: {name: n1, labels: {x: z}}\nspec: {podCIDR: 10.9.0.0/24, podCIDRs: [10.1.0.0/24, 'fd00:1::/64']}\nstatus: {addresses: [{type: Hostname, address: n1}, {type: InternalIP, address: 192.168.0.1}, {type: ExternalIP, address: 1.1.1.1}, {type: InternalIP, address: 'fd01::1'}]}",
			[]policy.Event{{Node: &policy.Node{Name: "n1", Labels: labels("x", "z"), Addrs: addrs("192.168.0.1", "fd01::1"), PodCIDRs: []netip.Prefix{prefix("10.1.0.0/24"), prefix("fd00:1::/64")}}}}},
		{"node: podCIDR alone", "apiVersion: v1\nkind: Node\nmetadata: {name: n1}\nspec: {podCIDR: 10.9.0.0/24}",
			[]policy.Event{{Node: &policy.Node{Name: "n1", PodCIDRs: []netip.Prefix{prefix("10.9.0.0/24")}}}}},
		{"node: public keys", nodeWithKeys("0:" + publicKey1 + "   1:" + publicKey2),
			[]policy.Event{{Node: &policy.Node{Name: "n1", PublicKey: "0:" + publicKey1 + " 1:" + publicKey2}}}},
		{"node: one public key as wg(8) prints it", nodeWithKeys(publicKey1), []policy.Event{{Node: &policy.Node{Name: "n1", PublicKey: publicKey1}}}},
		{"node: mesh addresses", nodeWithMesh("192.0.2.1, fd00::1"), []policy.Event{{Node: &policy.Node{Name: "n1", MeshAddrs: addrs("192.0.2.1", "fd00::1")}}}},
		{"List, lists in lists, typed lists without kinds",
			"apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: NamespaceList, items: [{metadata: {name: a}}]}\n- {apiVersion: v1, kind: Namespace, metadata: {name: b}}",
			[]policy.Event{ns("a"), ns("b")}},
		{"empty List", "apiVersion: v1\nkind: List\nitems: []", nil},
		{"documents ended by dots, byte order mark, CRLF", "\xef\xbb\xbfapiVersion: v1\r\nkind: Namespace\r\nmetadata: {name: a}\r\n...\r\napiVersion: v1\r\nkind: Namespace\r\nmetadata: {name: b}\r\n",
			[]policy.Event{ns("a"), ns("b")}},
		{"content after the marker", "--- {apiVersion: v1, kind: Namespace, metadata: {name: a}}\n--- # comment\napiVersion: v1\nkind: Namespace\nmetadata: {name: b}\n",
			[]policy.Event{ns("a"), ns("b")}},
		{"anchors and aliases", "apiVersion: v1\nkind: Pod\nmetadata: {name: &n p, labels: {x: *n}}", pod(func(p *policy.Pod) { p.Labels = labels("x", "p") })},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, problems := ParseManifests("f.yaml", []byte(tt.yaml))
			if diff := cmp.Diff(tt.want, got, values); diff != "" {
				t.Errorf("events (-want +got):\n%s", diff)
			}
			for _, p := range problems {
				if p.Severity == Refused {
					t.Errorf("refused: %s", p)
				}
			}
		})
	}
}

// TestObjectRefusals: each row gives one refusal, at this place, and nothing else in
// the same file is lost.
func TestObjectRefusals(t *testing.T) {
	const pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\n"
	const meshField = "metadata.annotations[" + AnnotationMeshAddresses + "]"
	const keysField = "metadata.annotations[" + AnnotationPublicKey + "]"
	tests := []struct {
		name, yaml, object, field, message string
		line                               int
	}{
		{"YAML syntax", "a: 1\n b: 2", "", "", "YAML syntax", 2},
		{"a tab", "a:\n\tb: 2", "", "", "YAML syntax", 2},
		{"a list", "- a\n- b", "", "", "not a Kubernetes object", 1},
		{"a word", "hello", "", "", "not a Kubernetes object", 1},
		{"no kind", "apiVersion: v1", "", "", "apiVersion and kind are required", 1},
		{"kind a number", "apiVersion: v1\nkind: 1", "", "", "not a Kubernetes object", 1},
		{"no name", "apiVersion: v1\nkind: Pod\nmetadata: {generateName: p-}", "Pod", "metadata.name", "required", 1},
		{"no metadata", "apiVersion: v1\nkind: Pod", "Pod", "metadata.name", "required", 1},
		{"name a number", "apiVersion: v1\nkind: Pod\nmetadata: {name: 1}", "Pod", "metadata.name", "must be strings", 1},
		{"name with capitals", "apiVersion: v1\nkind: Pod\nmetadata: {name: P}", "Pod default/P", "metadata.name", "invalid value", 1},
		{"namespace with a dot", "apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: a.b}", "Pod a.b/p", "metadata.namespace", "invalid value", 1},
		{"Namespace with a dot", "apiVersion: v1\nkind: Namespace\nmetadata: {name: a.b}", "Namespace a.b", "metadata.name", "invalid value", 1},
		{"label value", "apiVersion: v1\nkind: Pod\nmetadata: {name: p, labels: {a: 'x y'}}", "Pod default/p", "metadata.labels", "invalid value", 1},
		{"label key", "apiVersion: v1\nkind: Pod\nmetadata: {name: p, labels: {'-': x}}", "Pod default/p", "metadata.labels", "invalid value", 1},
		{"label with NUL", "apiVersion: v1\nkind: Pod\nmetadata: {name: p, labels: {a: \"x\\0\"}}", "Pod default/p", "metadata.labels", "invalid value", 1},
		{"pod IP", pod + "status: {podIPs: [{ip: 10.0.0}]}", "Pod default/p", "status.podIPs[0].ip", "not an IP address", 1},
		{"pod IP with zone", pod + "status: {podIP: 'fe80::1%eth0'}", "Pod default/p", "status.podIPs[0].ip", "not an IP address", 1},
		{"container port 0", pod + "spec: {containers: [{ports: [{containerPort: 0}]}]}", "Pod default/p", "spec.containers[0].ports[0].containerPort", "invalid port", 1},
		{"container port name", pod + "spec: {containers: [{ports: [{name: a_b, containerPort: 1}]}]}", "Pod default/p", "spec.containers[0].ports[0].name", "invalid value", 1},
		{"container port name twice", pod + "spec: {containers: [{ports: [{name: a, containerPort: 1}, {name: a, containerPort: 2}]}]}", "Pod default/p", "spec.containers[0].ports[1].name", "duplicate", 1},
		{"container port protocol", pod + "spec: {containers: [{ports: [{name: a, containerPort: 1, protocol: tcp}]}]}", "Pod default/p", "spec.containers[0].ports[0].protocol", "unsupported", 1},
		{"node podCIDR", "apiVersion: v1\nkind: Node\nmetadata: {name: n1}\nspec: {podCIDRs: [x]}", "Node n1", "spec.podCIDRs[0]", "not a CIDR", 1},
		{"node key too short", nodeWithKeys("AAAA"), "Node n1", keysField, "not 32 bytes", 1},
		{"node key not base64", nodeWithKeys(publicKey1[:43] + "!"), "Node n1", keysField, "not 32 bytes", 1},
		{"node key zero", nodeWithKeys("0:" + strings.Repeat("A", 43) + "="), "Node n1", keysField, "all zero", 1},
		{"node key with another parity", nodeWithKeys("2:" + publicKey1), "Node n1", keysField, "parity", 1},
		{"node keys of one parity", nodeWithKeys(publicKey1 + " 0:" + publicKey2), "Node n1", keysField, "two keys of parity 0", 1},
		{"three node keys", nodeWithKeys("a b c"), "Node n1", keysField, "3 keys", 1},
		{"node keys of blanks", nodeWithKeys("  "), "Node n1", keysField, "0 keys", 1},
		{"endless node keys", nodeWithKeys(strings.Repeat("A", 129)), "Node n1", keysField, "at most 128", 1},
		{"node mesh address", nodeWithMesh("x"), "Node n1", meshField, "not a unicast address", 1},
		{"node mesh address on a link", nodeWithMesh("fe80::1"), "Node n1", meshField, "not a unicast address", 1},
		{"node mesh addresses of one family", nodeWithMesh("192.0.2.1,192.0.2.2"), "Node n1", meshField, "more than one address of a family", 1},
		{"endless node mesh addresses", nodeWithMesh(strings.Repeat("1", 129)), "Node n1", meshField, "at most 128", 1},
		{"wrong type", pod + "spec: []", "Pod default/p", "spec", "is not a", 1},
		{"calico", "apiVersion: crd.projectcalico.org/v1\nkind: NetworkPolicy\nmetadata: {name: x}", "NetworkPolicy x", "kind", "unsupported kind", 1},
		{"old API", "apiVersion: extensions/v1beta1\nkind: NetworkPolicy\nmetadata: {name: x, namespace: z}", "NetworkPolicy z/x", "apiVersion", "unsupported version", 1},
		{"items not a list", "apiVersion: v1\nkind: List\nitems: {}", "List", "items", "not a list", 1},
		{"second line of the second document", "# one\n---\na: 1\n b: 2", "", "", "YAML syntax", 4},
	}
	const good = "\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: good}\n"
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, problems := ParseManifests("f.yaml", []byte(tt.yaml+good))
			var refused []Problem
			for _, p := range problems {
				if p.Severity == Refused {
					refused = append(refused, p)
				}
			}
			if len(refused) != 1 {
				t.Fatalf("got %d refusals, want 1: %v", len(refused), problems)
			}
			p := refused[0]
			if p.Object != tt.object || p.Field != tt.field || !strings.Contains(p.Message, tt.message) || p.Line != tt.line || p.Remedy == "" || p.Effect == "" || p.File != "f.yaml" {
				t.Errorf("got %+v\nwant object %q field %q message %q line %d", p, tt.object, tt.field, tt.message, tt.line)
			}
			for _, e := range got {
				if e.Namespace != nil && e.Namespace.Name == "good" {
					return
				}
			}
			t.Errorf("the other document is lost: %v", got)
		})
	}
}

func TestProblemJSON(t *testing.T) {
	for _, want := range []Problem{{Message: "m"}, {Severity: Refused, File: "f", Document: 1, Line: 2, Object: "o", Field: "x", Message: "m", Effect: "e", Remedy: "r"}} {
		b, err := json.Marshal(want)
		must(t, err)
		var got Problem
		must(t, json.Unmarshal(b, &got))
		if got != want {
			t.Errorf("got %+v, want %+v", got, want)
		}
	}
	var s Severity
	if err := s.UnmarshalText([]byte("x")); err != nil || s != Refused {
		t.Errorf("an unknown severity is %v, %v", s, err)
	}
}

func TestJSONFile(t *testing.T) {
	data := []byte("{\"apiVersion\": \"v1\",\n\"kind\": \"Namespace\", \"metadata\": {\"name\": \"a\"}}\n\n{\"apiVersion\": \"v1\", \"kind\": \"Namespace\", \"metadata\": {\"name\": \"b\"}} {")
	events, problems := ParseManifests("f.json", data)
	if len(events) != 2 {
		t.Errorf("got %d objects, want 2", len(events))
	}
	if len(problems) != 1 || problems[0].Line != 4 || problems[0].Document != 3 {
		t.Errorf("got %+v, want a syntax error in document 3, line 4", problems)
	}
}

// TestHostileManifests: what is huge, deep or expands is refused in bounded time and
// memory.
func TestHostileManifests(t *testing.T) {
	object := "apiVersion: v1\nkind: Pod\nmetadata:\n  name: p\n  annotations:\n"
	tests := []struct{ name, yaml string }{
		{"larger than the limit", object + "    a: " + strings.Repeat("x", MaxFileSize)},
		{"aliases of a long string", "a: &a " + strings.Repeat("x", 1<<20) + "\nb: [" + strings.Repeat("*a,", 10_000) + "]"},
		{"billion laughs", "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\ng: &g [*f,*f,*f,*f,*f,*f,*f,*f,*f]\nh: [*g,*g,*g,*g,*g,*g,*g,*g,*g]"},
		{"an alias to itself", "a: &a [*a]"},
		{"deep", strings.Repeat("[", 100_000)},
		{"deep lists", strings.Repeat("{apiVersion: v1, kind: List, items: [", 50) + strings.Repeat("]}", 50)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			events, problems := ParseManifests("f.yaml", []byte(tt.yaml))
			if len(events) != 0 || len(problems) != 1 || problems[0].Severity != Refused {
				t.Errorf("got %d events and %.500v, want one refusal", len(events), problems)
			}
		})
	}
	t.Run("many broken documents are told in part", func(t *testing.T) {
		_, problems := ParseManifests("f.yaml", []byte(strings.Repeat("---\nx\n", 50_000)))
		if len(problems) != maxProblems+1 {
			t.Errorf("got %d problems, want %d", len(problems), maxProblems+1)
		}
	})
}

func FuzzParseManifests(f *testing.F) {
	f.Add("f.yaml", policyYAML("podSelector: {matchLabels: {a: b}}\ningress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}}], ports: [{port: 1, endPort: 2}, {port: http}]}]"))
	f.Add("f.yaml", []byte("a: &a [*a]\n--- {}\n...\n%YAML 1.1\n---\nnull"))
	f.Add("f.yaml", []byte("apiVersion: v1\nkind: List\nitems: [{apiVersion: v1, kind: Pod, metadata: {name: p}, spec: {containers: [{ports: [{name: a, containerPort: 1}]}]}, status: {podIPs: [{ip: '::1'}]}}]"))
	f.Add("f.json", []byte(`{"apiVersion":"v1","kind":"Node","metadata":{"name":"n"},"spec":{"podCIDRs":["10.0.0.1/8"]}} {`))
	f.Fuzz(func(t *testing.T, name string, data []byte) {
		events, problems := ParseManifests(name, data)
		for _, e := range events {
			if e.Delete {
				t.Fatalf("deletes %+v", e)
			}
			if e.Policy == nil {
				continue
			}
			for _, d := range policy.Directions {
				for _, r := range e.Policy.Rules[d] {
					checkRule(t, r)
				}
			}
		}
		for _, p := range problems {
			if p.Message == "" || p.Severity == Refused && p.Effect == "" {
				t.Fatalf("incomplete problem %+v", p)
			}
		}
	})
}

// checkRule checks what the compiler relies on.
func checkRule(t *testing.T, r policy.Rule) {
	t.Helper()
	for _, p := range r.Peers {
		if (p.Pods == nil) == (p.Block == nil) {
			t.Fatalf("peer %+v is not exactly one kind", p)
		}
		if p.Block == nil {
			continue
		}
		for _, c := range append(p.Block.Except, p.Block.CIDR) {
			if !c.IsValid() || c != c.Masked() || c.Addr().Is4In6() {
				t.Fatalf("prefix %v is not masked, valid and unmapped", c)
			}
		}
	}
	for _, m := range r.Ports {
		if m.Last < m.First || m.Name != "" && m.First+m.Last != 0 {
			t.Fatalf("port %+v", m)
		}
	}
}
