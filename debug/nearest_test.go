package debug

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/policy"
)

const nearestBase = `
apiVersion: v1
kind: Namespace
metadata: {name: a, labels: {team: red}}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: a, labels: {app: client, stage: dev}}
status: {podIPs: [{ip: 10.0.0.1}]}
---
apiVersion: v1
kind: Pod
metadata: {name: server, namespace: b, labels: {app: server}}
spec: {containers: [{name: m, image: x, ports: [{name: web, containerPort: 80}]}]}
status: {podIPs: [{ip: 10.0.0.2}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: p, namespace: b}
spec:
  podSelector: {}
  ingress:
  - %s
`

// TestNearest: the reason that is told is the one that keeps the rule from matching.
func TestNearest(t *testing.T) {
	for _, test := range []struct{ name, rule, want string }{
		{"label of the pod", `from: [{namespaceSelector: {}, podSelector: {matchLabels: {app: other}}}]`, "it wants app=other, and a/client has app=client"},
		{"label of the namespace", `from: [{namespaceSelector: {matchLabels: {team: blue}}}]`, "it wants team=blue, and namespace a has team=red"},
		{"label absent", `from: [{namespaceSelector: {matchLabels: {zone: x}}}]`, "it wants zone=x, and namespace a has no label zone"},
		{"other namespace", `from: [{podSelector: {}}]`, "it wants namespace b, and a/client is in a"},
		{"in", `from: [{namespaceSelector: {}, podSelector: {matchExpressions: [{key: stage, operator: In, values: [prod, test]}]}}]`,
			"it wants stage in (prod, test), and a/client has stage=dev"},
		{"not in", `from: [{namespaceSelector: {}, podSelector: {matchExpressions: [{key: stage, operator: NotIn, values: [dev]}]}}]`,
			"it wants stage not in (dev), and a/client has stage=dev"},
		{"exists", `from: [{namespaceSelector: {}, podSelector: {matchExpressions: [{key: tier, operator: Exists}]}}]`,
			"it wants a label tier, and a/client has no label tier"},
		{"does not exist", `from: [{namespaceSelector: {}, podSelector: {matchExpressions: [{key: stage, operator: DoesNotExist}]}}]`,
			"it wants no label stage, and a/client has stage=dev"},
		{"block", `from: [{ipBlock: {cidr: 192.0.2.0/24}}]`, "ipBlock 192.0.2.0/24 does not hold 10.0.0.1"},
		{"excepted", `from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/24]}}]`, "ipBlock 10.0.0.0/8 excepts 10.0.0.0/24, which holds 10.0.0.1"},
		{"other family", `from: [{ipBlock: {cidr: "2001:db8::/32"}}]`, "ipBlock 2001:db8::/32 is of the other family"},
		{"port", `ports: [{port: 443}]`, "it is for TCP/443, not TCP/80"},
		{"port range", `ports: [{port: 1000, endPort: 2000}]`, "it is for TCP/1000-2000, not TCP/80"},
		{"protocol", `ports: [{protocol: UDP, port: 80}]`, "it is for UDP/80, not TCP/80"},
		{"port name", `ports: [{port: https}]`, `its port "https" is not a port name of b/server (it has web)`},
		{"the nearer of two peers", `from: [{ipBlock: {cidr: 192.0.2.0/24}}, {namespaceSelector: {}, podSelector: {matchLabels: {app: other}}}]`,
			"it wants app=other, and a/client has app=client"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := clusterOf(t, fmt.Sprintf(nearestBase, test.rule))
			f := policy.Flow{Src: netip.MustParseAddr("10.0.0.1"), Dst: netip.MustParseAddr("10.0.0.2"), Protocol: policy.TCP, Port: 80}
			why := newReasons(c, "")
			side := why.side(policy.EvaluateAll(c, "", f).Ingress, policy.Ingress, f)
			if want := test.want; strings.TrimPrefix(strings.TrimPrefix(side.Nearest, "rule 0 of b/p almost matches: "), "rule 0 of b/p comes nearest: ") != want {
				t.Errorf("nearest %q, want %q", side.Nearest, want)
			}
		})
	}
}

func TestParseService(t *testing.T) {
	for _, test := range []struct {
		arg, err string
		want     service
	}{
		{arg: "TCP/80", want: service{protocol: policy.TCP, port: 80}},
		{arg: "udp/65535", want: service{protocol: policy.UDP, port: 65535}},
		{arg: "ICMP", want: service{protocol: policy.ICMP, echo: true}},
		{arg: "ICMP/3", want: service{protocol: policy.ICMP, port: 3 << 8}},
		{arg: "IP/47", want: service{protocol: 47}},
		{arg: "TCP/0", err: "a port of 1 to 65535"},
		{arg: "TCP/http", err: "a port of 1 to 65535"},
		{arg: "TCP/70000", err: "a port of 1 to 65535"},
		{arg: "ICMP/300", err: "it takes 0 to 255"},
		{arg: "http", err: "it takes TCP/PORT"},
		{arg: "47/1", err: "it takes TCP/PORT"},
		{arg: "", err: "it takes TCP/PORT"},
	} {
		got, err := parseService(test.arg)
		if test.err != "" {
			if err == nil || !strings.Contains(err.Error(), test.err) {
				t.Errorf("%q: error %v, want %q", test.arg, err, test.err)
			}
		} else if err != nil || got != test.want {
			t.Errorf("%q: %+v, %v; want %+v", test.arg, got, err, test.want)
		}
	}
}

// BenchmarkWhy and its siblings are what the commands compute at 10,000 pods, 500
// policies and 500 workloads, without the transport.
func BenchmarkWhy(b *testing.B) {
	snap := largeSnapshot()
	q, err := newQuestion(b.Context(), snap.Cluster, []string{"ns0/web-0", "ns0/db-0", "TCP/5432"})
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := q.answers(b.Context(), snap, kernel{}); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkMatrix is the picture of the whole cluster.
func BenchmarkMatrix(b *testing.B) {
	snap := largeSnapshot()
	for b.Loop() {
		newPicture(snap.Cluster, "")
	}
}

// BenchmarkImpact deletes one policy.
func BenchmarkImpact(b *testing.B) {
	snap := largeSnapshot()
	after := *snap.Cluster
	after.Policies = after.Policies[1:]
	for b.Loop() {
		accessChanges(snap.Cluster, &after)
		elementDelta(snap, &after)
	}
}

func largeSnapshot() agent.Snapshot {
	c := &policy.Cluster{}
	apps := []string{"web", "api", "db", "cache", "worker"}
	byApp := func(app string) policy.Selector {
		return policy.Selector{Requirements: []policy.Requirement{{Key: "app", Values: []string{app}}}}
	}
	for n := range 100 {
		name := fmt.Sprintf("ns%d", n)
		c.Namespaces = append(c.Namespaces, policy.Namespace{Name: name})
		for i := range 100 {
			app := apps[i%len(apps)]
			c.Pods = append(c.Pods, policy.Pod{Name: policy.Name{Namespace: name, Name: fmt.Sprintf("%s-%d", app, i/len(apps))}, Node: fmt.Sprintf("n%d", i),
				Labels: policy.MakeLabels(map[string]string{"app": app}), Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, byte(n), byte(i)})}})
		}
		for i, app := range apps {
			p := policy.Policy{ID: policy.PolicyID{Kind: "NetworkPolicy", Name: policy.Name{Namespace: name, Name: app}}, Tier: policy.TierNamespaced,
				Subject: policy.PodSelector{Namespace: name, Pods: byApp(app)}, Applies: [2]bool{true, false}, Isolates: true}
			p.Rules[policy.Ingress] = []policy.Rule{{Peers: []policy.Peer{{Pods: &policy.PodSelector{Namespace: name, Pods: byApp(apps[(i+4)%5])}}},
				Ports: []policy.PortMatch{{Protocol: policy.TCP, First: uint16(5432 + i), Last: uint16(5432 + i)}}}}
			c.Policies = append(c.Policies, p)
		}
	}
	return agent.Snapshot{Node: "n5", Cluster: c}
}

func clusterOf(t *testing.T, manifests string) *policy.Cluster {
	t.Helper()
	path := filepath.Join(t.TempDir(), "manifests.yaml")
	if err := os.WriteFile(path, []byte(manifests), 0o644); err != nil {
		t.Fatal(err)
	}
	c, err := loadManifests(path, func(problem string) { t.Error(problem) })
	if err != nil {
		t.Fatal(err)
	}
	return c
}
