package policytest

import (
	"fmt"
	"net/netip"

	"github.com/nftcni/nftcni/policy"
)

// Shape is a cluster of equal namespaces, some of whose pods are on node "here".
type Shape struct {
	Pods, Policies, Namespaces int
	Local                      int // the first so many pods are on node "here"
	PerPod                     int // policies that select each local pod; 0: as they fall
}

func shapeAddr(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
}

// Cluster makes s: pods and policies are spread evenly over namespaces, a policy allows
// the pods of its namespace and of one neighbour.
func (s Shape) Cluster() *policy.Cluster {
	c := &policy.Cluster{Nodes: []policy.Node{{Name: "here"}}}
	for i := range s.Namespaces {
		c.Namespaces = append(c.Namespaces, policy.Namespace{
			Name: fmt.Sprintf("ns%d", i), Labels: policy.MakeLabels(map[string]string{"kubernetes.io/metadata.name": fmt.Sprintf("ns%d", i), "team": fmt.Sprintf("t%d", i%50)}),
		})
	}
	for i := range s.Pods {
		c.Pods = append(c.Pods, s.Pod(i))
	}
	for i := range s.Policies {
		c.Policies = append(c.Policies, s.Policy(i))
	}
	return c
}

// Pod is the i-th pod.
func (s Shape) Pod(i int) policy.Pod {
	node := "there"
	if i < s.Local {
		node = "here"
	}
	return policy.Pod{
		Name: policy.Name{Namespace: s.namespaceOf(i, s.Pods), Name: fmt.Sprintf("pod-%d", i)},
		UID:  fmt.Sprintf("00000000-0000-0000-0000-%012d", i), Node: node,
		Labels: policy.MakeLabels(map[string]string{"app": fmt.Sprintf("app%d", i%5), "release": "r1"}),
		Addrs:  []netip.Addr{shapeAddr(i)}, Created: int64(i),
	}
}

// namespaceOf spreads; with PerPod, local pods share the namespaces that hold PerPod policies each.
func (s Shape) namespaceOf(i, n int) string {
	if s.PerPod > 0 && n == s.Policies {
		return fmt.Sprintf("ns%d", min(i/s.PerPod, s.Namespaces-1)) // the first namespaces hold PerPod each
	}
	return fmt.Sprintf("ns%d", i*s.Namespaces/n)
}

// Policy is the i-th policy.
func (s Shape) Policy(i int) policy.Policy {
	ns := s.namespaceOf(i, s.Policies)
	if s.PerPod > 0 {
		// The local pods are in the first namespaces; each of these has PerPod policies.
		localSpaces := max(1, s.Local*s.Namespaces/s.Pods)
		if i < localSpaces*s.PerPod {
			ns = fmt.Sprintf("ns%d", i/s.PerPod)
		} else {
			ns = fmt.Sprintf("ns%d", i%s.Namespaces)
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
			{Pods: &policy.PodSelector{Namespaces: policy.Selector{Requirements: []policy.Requirement{{Key: "kubernetes.io/metadata.name", Values: []string{fmt.Sprintf("ns%d", (i*7)%s.Namespaces)}}}}}},
		},
		Ports: []policy.PortMatch{{Protocol: policy.TCP, First: uint16(8000 + i%100), Last: uint16(8000 + i%100)}},
	}
	if i%10 == 0 {
		rule.Peers = append(rule.Peers, policy.Peer{Block: &policy.Block{CIDR: netip.PrefixFrom(netip.AddrFrom4([4]byte{172, 16, byte(i / 10), 0}), 24)}})
	}
	p.Rules = [2][]policy.Rule{{rule}, {rule}}
	return p
}

// Peer is the number of a remote pod that a policy of local pods admits.
func (s Shape) Peer() int {
	localSpaces := s.Local * s.Namespaces / s.Pods
	admitting := s.Policies*localSpaces/s.Namespaces - 1
	return (admitting * 7 % s.Namespaces) * s.Pods / s.Namespaces
}

// String names s for benchstat.
func (s Shape) String() string {
	return fmt.Sprintf("pods=%d/policies=%d/local=%d", s.Pods, s.Policies, s.Local)
}
