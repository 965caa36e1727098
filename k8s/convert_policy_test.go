package k8s

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/nftcni/nftcni/policy"
)

// values makes the comparable types of the model comparable for cmp.
var values = cmpopts.EquateComparable(policy.Labels{}, netip.Addr{}, netip.Prefix{})

func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func require(key string, op policy.Operator, vals ...string) policy.Requirement {
	return policy.Requirement{Key: key, Op: op, Values: vals}
}

func selector(r ...policy.Requirement) policy.Selector { return policy.Selector{Requirements: r} }

func podsIn(namespace string, r ...policy.Requirement) policy.Peer {
	return policy.Peer{Pods: &policy.PodSelector{Namespace: namespace, Pods: selector(r...)}}
}

func block(cidr string, except ...string) policy.Peer {
	b := &policy.Block{CIDR: prefix(cidr)}
	for _, e := range except {
		b.Except = append(b.Except, prefix(e))
	}
	return policy.Peer{Block: b}
}

func tcp(first, last uint16) policy.PortMatch {
	return policy.PortMatch{Protocol: policy.TCP, First: first, Last: last}
}

// policyYAML is a NetworkPolicy default/p with this spec.
func policyYAML(spec string) []byte {
	return []byte("apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p}\nspec:\n  " +
		strings.ReplaceAll(strings.TrimSpace(spec), "\n", "\n  ") + "\n")
}

// parsePolicy returns the policy in force, nil if there is none.
func parsePolicy(t *testing.T, data []byte) (*policy.Policy, []Problem) {
	t.Helper()
	events, problems := ParseManifests("p.yaml", data)
	var out *policy.Policy
	for _, e := range events {
		if e.Policy != nil {
			out = e.Policy
		}
	}
	return out, problems
}

// TestPolicyMeaning has a row for every sentence of the API text of NetworkPolicySpec,
// NetworkPolicyPeer and NetworkPolicyPort that gives a form a meaning.
func TestPolicyMeaning(t *testing.T) {
	both := [2]bool{true, true}
	ingress := [2]bool{true, false}
	egress := [2]bool{false, true}
	allow := func(peers []policy.Peer, ports []policy.PortMatch) []policy.Rule {
		return []policy.Rule{{Peers: peers, Ports: ports}}
	}
	tests := []struct {
		name    string
		spec    string
		subject policy.Selector
		applies [2]bool
		ingress []policy.Rule
		egress  []policy.Rule
	}{
		{name: "empty spec selects the namespace and isolates ingress", spec: "{}", applies: ingress},
		{name: "absent podSelector is empty", spec: "policyTypes: [Egress]", applies: egress},
		{name: "matchLabels", spec: "podSelector: {matchLabels: {b: x, a: w}}", applies: ingress,
			subject: selector(require("a", policy.In, "w"), require("b", policy.In, "x"))},
		{name: "matchExpressions, all four operators", applies: ingress,
			spec: "podSelector: {matchExpressions: [{key: d, operator: DoesNotExist}, {key: c, operator: Exists}, {key: b, operator: NotIn, values: [z, w, z]}, {key: a, operator: In, values: [x]}]}",
			subject: selector(require("a", policy.In, "x"), require("b", policy.NotIn, "w", "z"),
				require("c", policy.Exists), require("d", policy.DoesNotExist))},
		{name: "label and expression on one key are a conjunction", applies: ingress,
			spec:    "podSelector: {matchLabels: {a: x}, matchExpressions: [{key: a, operator: NotIn, values: [x]}]}",
			subject: selector(require("a", policy.In, "x"), require("a", policy.NotIn, "x"))},
		{name: "the same condition twice is one", applies: ingress,
			spec:    "podSelector: {matchLabels: {a: x}, matchExpressions: [{key: a, operator: In, values: [x]}]}",
			subject: selector(require("a", policy.In, "x"))},

		{name: "policyTypes empty list is defaulted", spec: "policyTypes: []", applies: ingress},
		{name: "policyTypes default with an egress rule", spec: "egress: [{}]", applies: both, egress: allow(nil, nil)},
		{name: "policyTypes default with empty egress", spec: "egress: []", applies: ingress},
		{name: "policyTypes both, no rules", spec: "policyTypes: [Egress, Ingress]", applies: both},
		{name: "policyTypes the same twice", spec: "policyTypes: [Egress, Egress]", applies: egress},
		{name: "policyTypes Egress only: ingress rules have no effect", spec: "policyTypes: [Egress]\ningress: [{}]", applies: egress},
		{name: "policyTypes Ingress only: egress rules have no effect", spec: "policyTypes: [Ingress]\negress: [{}]", applies: ingress},

		{name: "no rule allows nothing", spec: "ingress: []", applies: ingress},
		{name: "empty rule allows everything", spec: "ingress: [{}]", applies: ingress, ingress: allow(nil, nil)},
		{name: "empty from is every source", spec: "ingress: [{from: []}]", applies: ingress, ingress: allow(nil, nil)},
		{name: "empty ports is every port", spec: "ingress: [{from: [{podSelector: {}}], ports: []}]", applies: ingress,
			ingress: allow([]policy.Peer{podsIn("default")}, nil)},
		{name: "ports only", spec: "ingress: [{ports: [{port: 80}]}]", applies: ingress,
			ingress: allow(nil, []policy.PortMatch{tcp(80, 80)})},
		{name: "two rules stay in order", spec: "ingress: [{ports: [{port: 2}]}, {ports: [{port: 1}]}]", applies: ingress,
			ingress: []policy.Rule{{Ports: []policy.PortMatch{tcp(2, 2)}}, {Ports: []policy.PortMatch{tcp(1, 1)}}}},

		{name: "podSelector peer is in the policy's namespace", spec: "ingress: [{from: [{podSelector: {matchLabels: {a: x}}}]}]", applies: ingress,
			ingress: allow([]policy.Peer{podsIn("default", require("a", policy.In, "x"))}, nil)},
		{name: "empty podSelector peer is the whole namespace", spec: "egress: [{to: [{podSelector: {}}]}]", applies: both,
			egress: allow([]policy.Peer{podsIn("default")}, nil)},
		{name: "namespaceSelector peer is all pods of those namespaces", applies: ingress,
			spec:    "ingress: [{from: [{namespaceSelector: {matchLabels: {a: x}}}]}]",
			ingress: allow([]policy.Peer{{Pods: &policy.PodSelector{Namespaces: selector(require("a", policy.In, "x"))}}}, nil)},
		{name: "empty namespaceSelector peer is all pods", applies: ingress,
			spec:    "ingress: [{from: [{namespaceSelector: {}}]}]",
			ingress: allow([]policy.Peer{{Pods: &policy.PodSelector{}}}, nil)},
		{name: "both selectors in one peer: and", applies: ingress,
			spec: "ingress: [{from: [{namespaceSelector: {matchLabels: {a: x}}, podSelector: {matchLabels: {b: w}}}]}]",
			ingress: allow([]policy.Peer{{Pods: &policy.PodSelector{
				Namespaces: selector(require("a", policy.In, "x")), Pods: selector(require("b", policy.In, "w"))}}}, nil)},
		{name: "two peers: or", applies: ingress,
			spec: "ingress: [{from: [{namespaceSelector: {matchLabels: {a: x}}}, {podSelector: {matchLabels: {b: w}}}]}]",
			ingress: allow([]policy.Peer{{Pods: &policy.PodSelector{Namespaces: selector(require("a", policy.In, "x"))}},
				podsIn("default", require("b", policy.In, "w"))}, nil)},

		{name: "ipBlock v4 and v6", spec: "egress: [{to: [{ipBlock: {cidr: 10.0.0.0/8}}, {ipBlock: {cidr: 'fd00::/8'}}]}]", applies: both,
			egress: allow([]policy.Peer{block("10.0.0.0/8"), block("fd00::/8")}, nil)},
		{name: "ipBlock of everything", spec: "egress: [{to: [{ipBlock: {cidr: 0.0.0.0/0}}]}]", applies: both,
			egress: allow([]policy.Peer{block("0.0.0.0/0")}, nil)},
		{name: "ipBlock with excepts", spec: "egress: [{to: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16, 10.2.3.4/32]}}]}]", applies: both,
			egress: allow([]policy.Peer{block("10.0.0.0/8", "10.1.0.0/16", "10.2.3.4/32")}, nil)},
		{name: "ipBlock with host bits is masked", spec: "egress: [{to: [{ipBlock: {cidr: 10.1.2.3/8, except: [10.1.2.3/16]}}]}]", applies: both,
			egress: allow([]policy.Peer{block("10.0.0.0/8", "10.1.0.0/16")}, nil)},
		{name: "ipBlock with leading zeros is decimal", spec: "egress: [{to: [{ipBlock: {cidr: 010.0.0.0/08}}]}]", applies: both,
			egress: allow([]policy.Peer{block("10.0.0.0/8")}, nil)},
		{name: "ipBlock IPv4-mapped is IPv4", spec: "egress: [{to: [{ipBlock: {cidr: '::ffff:10.0.0.0/104'}}]}]", applies: both,
			egress: allow([]policy.Peer{block("10.0.0.0/8")}, nil)},

		{name: "protocol defaults to TCP", spec: "ingress: [{ports: [{port: 80}]}]", applies: ingress, ingress: allow(nil, []policy.PortMatch{tcp(80, 80)})},
		{name: "protocol alone is all its ports", spec: "ingress: [{ports: [{protocol: UDP}]}]", applies: ingress,
			ingress: allow(nil, []policy.PortMatch{{Protocol: policy.UDP, Last: 65535}})},
		{name: "empty port entry is all TCP", spec: "ingress: [{ports: [{}]}]", applies: ingress, ingress: allow(nil, []policy.PortMatch{tcp(0, 65535)})},
		{name: "SCTP", spec: "ingress: [{ports: [{protocol: SCTP, port: 7777}]}]", applies: ingress,
			ingress: allow(nil, []policy.PortMatch{{Protocol: policy.SCTP, First: 7777, Last: 7777}})},
		{name: "endPort", spec: "ingress: [{ports: [{port: 32000, endPort: 32768}]}]", applies: ingress, ingress: allow(nil, []policy.PortMatch{tcp(32000, 32768)})},
		{name: "endPort equal to port", spec: "ingress: [{ports: [{port: 1, endPort: 1}]}]", applies: ingress, ingress: allow(nil, []policy.PortMatch{tcp(1, 1)})},
		{name: "named port", spec: "ingress: [{ports: [{protocol: UDP, port: dns}]}]", applies: ingress,
			ingress: allow(nil, []policy.PortMatch{{Protocol: policy.UDP, Name: "dns"}})},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, problems := parsePolicy(t, policyYAML(tt.spec))
			for _, p := range problems {
				if p.Severity == Refused {
					t.Errorf("refused: %s", p)
				}
			}
			want := &policy.Policy{
				ID:         policy.PolicyID{Kind: "NetworkPolicy", Name: policy.Name{Namespace: "default", Name: "p"}},
				Generation: 1, Tier: policy.TierNamespaced, Isolates: true,
				Subject: policy.PodSelector{Namespace: "default", Pods: tt.subject},
				Applies: tt.applies, Rules: [2][]policy.Rule{tt.ingress, tt.egress},
			}
			if diff := cmp.Diff(want, got, values); diff != "" {
				t.Errorf("policy (-want +got):\n%s", diff)
			}
		})
	}
}

// TestPolicyRefusals: what the API server refuses is refused, naming the field, and
// isolates the pods it selects.
func TestPolicyRefusals(t *testing.T) {
	both, ingress, none := [2]bool{true, true}, [2]bool{true, false}, [2]bool{}
	tests := []struct {
		name, spec, field, message string
		isolates                   [2]bool // none: no policy in force
	}{
		{"unknown policy type", "policyTypes: [ingress]", "spec.policyTypes[0]", "unsupported policy type", both},
		{"three policy types", "policyTypes: [Ingress, Ingress, Ingress]", "spec.policyTypes", "more than two", both},
		{"unknown operator", "podSelector: {matchExpressions: [{key: a, operator: Is, values: [x]}]}", "spec.podSelector.matchExpressions[0].operator", "not a valid selector operator", none},
		{"In without values", "podSelector: {matchExpressions: [{key: a, operator: In}]}", "spec.podSelector.matchExpressions[0].values", "must be specified", none},
		{"Exists with values", "ingress: [{from: [{podSelector: {matchExpressions: [{key: a, operator: Exists, values: [x]}]}}]}]", "spec.ingress[0].from[0].podSelector.matchExpressions[0].values", "may not be specified", ingress},
		{"label key", "ingress: [{from: [{podSelector: {matchLabels: {'a b': x}}}]}]", "spec.ingress[0].from[0].podSelector.matchLabels", "", ingress},
		{"label value", "ingress: [{from: [{namespaceSelector: {matchLabels: {a: '-'}}}]}]", "spec.ingress[0].from[0].namespaceSelector.matchLabels", "", ingress},
		{"expression value", "ingress: [{from: [{podSelector: {matchExpressions: [{key: a, operator: In, values: ['x y']}]}}]}]", "spec.ingress[0].from[0].podSelector.matchExpressions[0].values[0]", "", ingress},
		{"empty peer", "ingress: [{from: [{}]}]", "spec.ingress[0].from[0]", "must specify a peer", ingress},
		{"ipBlock beside a selector", "ingress: [{from: [{podSelector: {}, ipBlock: {cidr: 10.0.0.0/8}}]}]", "spec.ingress[0].from[0]", "may not specify both", ingress},
		{"cidr absent", "egress: [{to: [{ipBlock: {}}]}]", "spec.egress[0].to[0].ipBlock.cidr", "required", both},
		{"cidr without length", "egress: [{to: [{ipBlock: {cidr: 10.0.0.1}}]}]", "spec.egress[0].to[0].ipBlock.cidr", "not a CIDR", both},
		{"cidr too long", "egress: [{to: [{ipBlock: {cidr: 10.0.0.0/33}}]}]", "spec.egress[0].to[0].ipBlock.cidr", "not a CIDR", both},
		{"cidr with zone", "egress: [{to: [{ipBlock: {cidr: 'fe80::%eth0/64'}}]}]", "spec.egress[0].to[0].ipBlock.cidr", "not a CIDR", both},
		{"except not a cidr", "egress: [{to: [{ipBlock: {cidr: 10.0.0.0/8, except: [x]}}]}]", "spec.egress[0].to[0].ipBlock.except[0]", "not a CIDR", both},
		{"except outside", "egress: [{to: [{ipBlock: {cidr: 10.0.0.0/8, except: [11.0.0.0/16]}}]}]", "spec.egress[0].to[0].ipBlock.except[0]", "strict subset", both},
		{"except equal", "egress: [{to: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/8]}}]}]", "spec.egress[0].to[0].ipBlock.except[0]", "strict subset", both},
		{"except larger", "egress: [{to: [{ipBlock: {cidr: 10.0.0.0/16, except: [10.0.0.0/8]}}]}]", "spec.egress[0].to[0].ipBlock.except[0]", "strict subset", both},
		{"except of the other family", "egress: [{to: [{ipBlock: {cidr: 10.0.0.0/8, except: ['fd00::/16']}}]}]", "spec.egress[0].to[0].ipBlock.except[0]", "strict subset", both},
		{"protocol in small letters", "ingress: [{ports: [{protocol: tcp, port: 80}]}]", "spec.ingress[0].ports[0].protocol", "unsupported protocol", ingress},
		{"protocol ICMP", "ingress: [{ports: [{protocol: ICMP}]}]", "spec.ingress[0].ports[0].protocol", "unsupported protocol", ingress},
		{"port 0", "ingress: [{ports: [{port: 0}]}]", "spec.ingress[0].ports[0].port", "invalid port", ingress},
		{"port 65536", "ingress: [{ports: [{port: 65536}]}]", "spec.ingress[0].ports[0].port", "invalid port", ingress},
		{"port negative", "ingress: [{ports: [{port: -1}]}]", "spec.ingress[0].ports[0].port", "invalid port", ingress},
		{"port a quoted number", "ingress: [{ports: [{port: '80'}]}]", "spec.ingress[0].ports[0].port", "invalid port name", ingress},
		{"port name too long", "ingress: [{ports: [{port: a234567890123456}]}]", "spec.ingress[0].ports[0].port", "invalid port name", ingress},
		{"endPort without port", "ingress: [{ports: [{endPort: 90}]}]", "spec.ingress[0].ports[0].endPort", "port is not specified", ingress},
		{"endPort less than port", "ingress: [{ports: [{port: 91, endPort: 90}]}]", "spec.ingress[0].ports[0].endPort", "less than port", ingress},
		{"endPort with a named port", "ingress: [{ports: [{port: http, endPort: 90}]}]", "spec.ingress[0].ports[0].endPort", "port is a name", ingress},
		{"endPort 65536", "ingress: [{ports: [{port: 1, endPort: 65536}]}]", "spec.ingress[0].ports[0].endPort", "invalid port", ingress},
		{"ingress not a list", "ingress: {from: []}", "spec.ingress", "is not a", ingress},
		{"egress not a list", "egress: {to: []}", "spec.egress", "is not a", both},
		{"label value a number", "podSelector: {matchLabels: {a: 1}}", "spec.podSelector.matchLabels", "number is not a string", none},
		{"policyTypes not a list", "policyTypes: Ingress", "spec.policyTypes", "is not a", both},
		{"podSelector a word, nothing to isolate", "podSelector: all", "spec.podSelector", "is not a", none},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, problems := parsePolicy(t, policyYAML(tt.spec))
			found := false
			for _, p := range problems {
				found = found || p.Severity == Refused && p.Field == tt.field && strings.Contains(p.Message, tt.message)
				if p.Severity == Refused && (p.Remedy == "" || p.Effect == "" || p.Object != "NetworkPolicy default/p" || p.Line != 1 || p.Document != 1) {
					t.Errorf("incomplete problem %+v", p)
				}
			}
			if !found {
				t.Errorf("no refusal of %s with %q in %v", tt.field, tt.message, problems)
			}
			var applies [2]bool
			if got != nil {
				applies = got.Applies
				if !got.Isolates || got.Rules[0] != nil || got.Rules[1] != nil {
					t.Errorf("a policy that was never valid allows something: %+v", got)
				}
			}
			if applies != tt.isolates {
				t.Errorf("isolates %v, want %v", applies, tt.isolates)
			}
		})
	}
}

// TestPolicyFailsClosed: an API object that cannot be read in full (an old object, or a
// newer API) is in force as far as it can, and a broken part allows nothing.
func TestPolicyFailsClosed(t *testing.T) {
	tests := []struct {
		name, spec string
		want       []policy.Rule
	}{
		{"broken peer beside a good one", "ingress: [{from: [{}, {podSelector: {}}]}]", []policy.Rule{{Peers: []policy.Peer{podsIn("default")}}}},
		{"only a broken peer", "ingress: [{from: [{}]}]", []policy.Rule{{Peers: []policy.Peer{}}}},
		{"only a broken port", "ingress: [{ports: [{protocol: QUIC}]}]", []policy.Rule{{Ports: []policy.PortMatch{}}}},
		{"broken except", "ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [x]}}]}]", []policy.Rule{{Peers: []policy.Peer{}}}},
		{"broken subject", "podSelector: {matchExpressions: [{key: a, operator: Is}]}\ningress: [{}]", nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			file := parseFile("p.yaml", policyYAML(tt.spec))
			got := file.manifests[0].value.Policy
			if !file.manifests[0].faults.refused() {
				t.Errorf("not reported")
			}
			if diff := cmp.Diff(tt.want, got.Rules[policy.Ingress], values); diff != "" {
				t.Errorf("rules (-want +got):\n%s", diff)
			}
		})
	}
}

func TestPolicyWarnings(t *testing.T) {
	tests := []struct{ name, spec, field, message string }{
		{"unknown field", "podselector: {}", "spec.podselector", "unknown field"},
		{"duplicate field", "ingress: []\ningress: [{}]", "", "already set"},
		{"host bits", "egress: [{to: [{ipBlock: {cidr: 10.0.0.1/8}}]}]", "spec.egress[0].to[0].ipBlock.cidr", "read as 10.0.0.0/8"},
		{"rules without their type", "policyTypes: [Egress]\ningress: [{}]", "spec.ingress", "no effect"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p, problems := parsePolicy(t, policyYAML(tt.spec))
			if p == nil {
				t.Fatal("the object is not in force")
			}
			if len(problems) != 1 || problems[0].Severity != Warning || problems[0].Field != tt.field || !strings.Contains(problems[0].Message, tt.message) || problems[0].Remedy == "" {
				t.Errorf("got %+v, want one warning at %q with %q", problems, tt.field, tt.message)
			}
		})
	}
}
