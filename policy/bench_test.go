package policy_test

import (
	"fmt"
	"net/netip"
	"runtime"
	"testing"

	"github.com/nftcni/nftcni/policy"
)

// shape is a cluster of equal namespaces, some of whose pods are on node "here".
type shape struct {
	pods, policies, namespaces int
	local                      int
	perPod                     int // policies that select each local pod; 0: as they fall
}

func podAddr(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
}

// cluster makes s: pods and policies are spread evenly over namespaces, a policy allows
// the pods of its namespace and of one neighbour.
func (s shape) cluster() *policy.Cluster {
	c := &policy.Cluster{Nodes: []policy.Node{{Name: "here"}}}
	for i := range s.namespaces {
		c.Namespaces = append(c.Namespaces, policy.Namespace{
			Name: fmt.Sprintf("ns%d", i), Labels: policy.MakeLabels(map[string]string{"kubernetes.io/metadata.name": fmt.Sprintf("ns%d", i), "team": fmt.Sprintf("t%d", i%50)}),
		})
	}
	for i := range s.pods {
		c.Pods = append(c.Pods, s.pod(i))
	}
	for i := range s.policies {
		c.Policies = append(c.Policies, s.policy(i))
	}
	return c
}

func (s shape) pod(i int) policy.Pod {
	node := "there"
	if i < s.local {
		node = "here"
	}
	return policy.Pod{
		Name: policy.Name{Namespace: s.namespaceOf(i, s.pods), Name: fmt.Sprintf("pod-%d", i)},
		UID:  fmt.Sprintf("00000000-0000-0000-0000-%012d", i), Node: node,
		Labels: policy.MakeLabels(map[string]string{"app": fmt.Sprintf("app%d", i%5), "release": "r1"}),
		Addrs:  []netip.Addr{podAddr(i)}, Created: int64(i),
	}
}

// namespaceOf spreads; with perPod, local pods share the namespaces that hold perPod policies each.
func (s shape) namespaceOf(i, n int) string {
	if s.perPod > 0 && n == s.policies {
		return fmt.Sprintf("ns%d", min(i/s.perPod, s.namespaces-1)) // the first namespaces hold perPod each
	}
	return fmt.Sprintf("ns%d", i*s.namespaces/n)
}

func (s shape) policy(i int) policy.Policy {
	ns := s.namespaceOf(i, s.policies)
	if s.perPod > 0 {
		// The local pods are in the first namespaces; each of these has perPod policies.
		localSpaces := max(1, s.local*s.namespaces/s.pods)
		if i < localSpaces*s.perPod {
			ns = fmt.Sprintf("ns%d", i/s.perPod)
		} else {
			ns = fmt.Sprintf("ns%d", i%s.namespaces)
		}
	}
	p := policy.Policy{
		ID:   policy.PolicyID{Kind: "NetworkPolicy", Name: policy.Name{Namespace: ns, Name: fmt.Sprintf("policy-%d", i)}},
		Tier: policy.TierNamespaced, Isolates: true, Applies: [2]bool{true, i%2 == 0},
		Subject: policy.PodSelector{Namespace: ns},
	}
	rule := policy.Rule{
		Peers: []policy.Peer{
			{Pods: &policy.PodSelector{Namespace: ns, Pods: policy.Selector{Requirements: []policy.Requirement{{Key: "app", Values: []string{fmt.Sprintf("app%d", i%5)}}}}}},
			{Pods: &policy.PodSelector{Namespaces: policy.Selector{Requirements: []policy.Requirement{{Key: "kubernetes.io/metadata.name", Values: []string{fmt.Sprintf("ns%d", (i*7)%s.namespaces)}}}}}},
		},
		Ports: []policy.PortMatch{{Protocol: policy.TCP, First: uint16(8000 + i%100), Last: uint16(8000 + i%100)}},
	}
	if i%10 == 0 {
		rule.Peers = append(rule.Peers, policy.Peer{Block: &policy.Block{CIDR: netip.PrefixFrom(netip.AddrFrom4([4]byte{172, 16, byte(i / 10), 0}), 24)}})
	}
	p.Rules = [2][]policy.Rule{{rule}, {rule}}
	return p
}

// peer is the number of a remote pod that a policy of local pods admits.
func (s shape) peer() int {
	localSpaces := s.local * s.namespaces / s.pods
	admitting := s.policies*localSpaces/s.namespaces - 1
	return (admitting * 7 % s.namespaces) * s.pods / s.namespaces
}

func (s shape) String() string {
	return fmt.Sprintf("pods=%d/policies=%d/local=%d", s.pods, s.policies, s.local)
}

var compileShapes = []shape{
	{pods: 1000, policies: 1000, namespaces: 100, local: 250},
	{pods: 10000, policies: 10000, namespaces: 1000, local: 250},
	{pods: 100000, policies: 75000, namespaces: 25000, local: 250, perPod: 100},
	{pods: 100000, policies: 75000, namespaces: 25000, local: 100000},
}

func BenchmarkCompile(b *testing.B) {
	for _, s := range compileShapes {
		b.Run(s.String(), func(b *testing.B) {
			c := s.cluster()
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			var e *policy.Engine
			for b.Loop() {
				e = policy.NewEngine("here")
				e.Replace(c)
			}
			runtime.GC()
			runtime.ReadMemStats(&after)
			b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/(1<<20), "MB-kept")
			b.ReportMetric(float64(len(e.Tables())), "elements")
			runtime.KeepAlive(c)
		})
	}
}

// BenchmarkEvent measures one event at scale: a remote pod's change of labels, a remote
// pod that comes and goes, a policy that comes and goes.
func BenchmarkEvent(b *testing.B) {
	for _, s := range []shape{
		{pods: 1000, policies: 200, namespaces: 100, local: 50},
		{pods: 10000, policies: 2000, namespaces: 1000, local: 250},
		{pods: 50000, policies: 10000, namespaces: 1000, local: 250},
	} {
		for _, k := range eventKinds {
			b.Run(k.name+"/"+s.String(), func(b *testing.B) {
				e := policy.NewEngine("here")
				e.Replace(s.cluster())
				events := k.events(s)
				ops, i := 0, 0
				for b.Loop() {
					d := e.Apply(events[i%len(events)])
					for _, step := range d.Steps {
						ops += len(step)
					}
					i++
				}
				b.ReportMetric(float64(ops)/float64(i), "ops/op")
			})
		}
	}
}

var eventKinds = []struct {
	name   string
	events func(shape) []policy.Event
}{
	{"remote-relabel", func(s shape) []policy.Event {
		a, b := s.pod(s.peer()), s.pod(s.peer())
		b.Labels = policy.MakeLabels(map[string]string{"app": "app2", "release": "r2"})
		return []policy.Event{{Pod: &b}, {Pod: &a}}
	}},
	{"remote-come-go", func(s shape) []policy.Event {
		a := s.pod(s.peer())
		return []policy.Event{{Pod: &a, Delete: true}, {Pod: &a}}
	}},
	{"local-come-go", func(s shape) []policy.Event {
		a := s.pod(1)
		return []policy.Event{{Pod: &a, Delete: true}, {Pod: &a}}
	}},
	{"policy-go-come", func(s shape) []policy.Event {
		a := s.policy(0)
		return []policy.Event{{Policy: &a, Delete: true}, {Policy: &a}}
	}},
	{"policy-halves-pods", func(s shape) []policy.Event {
		a := s.policy(0)
		a.ID.Name.Name = "halves"
		a.Rules[0] = []policy.Rule{{Peers: []policy.Peer{{Pods: &policy.PodSelector{Pods: policy.Selector{Requirements: []policy.Requirement{{Key: "app", Values: []string{"app1", "app3"}}}}}}}}}
		return []policy.Event{{Policy: &a}, {Policy: &a, Delete: true}}
	}},
}
