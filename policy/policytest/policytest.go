// Package policytest makes random clusters and flows for tests of whatever claims to
// enforce policy. The same seed always gives the same cluster.
package policytest

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"

	"github.com/nftcni/nftcni/policy"
)

// Options say how large a cluster is and what it uses. The zero value is a small one
// with NetworkPolicy only.
type Options struct {
	Namespaces int // default 3
	Pods       int // default 14
	Policies   int // default 8
	Nodes      int // default 2, named node0, node1, ...
	Tiers      bool
}

// Generator draws clusters, flows and events. It is not safe for concurrent use.
type Generator struct {
	*rand.Rand
	o Options
}

// New returns a generator; equal seeds and options give equal draws.
func New(seed uint64, o Options) *Generator {
	for _, d := range []struct {
		v *int
		n int
	}{{&o.Namespaces, 3}, {&o.Pods, 14}, {&o.Policies, 8}, {&o.Nodes, 2}} {
		if *d.v == 0 {
			*d.v = d.n
		}
	}
	return &Generator{rand.New(rand.NewPCG(seed, 0x6e667463)), o}
}

// Node returns the name of the i-th node.
func Node(i int) string { return fmt.Sprintf("node%d", i) }

func pick[T any](g *Generator, v ...T) T { return v[g.IntN(len(v))] }

func (g *Generator) chance(percent int) bool { return g.IntN(100) < percent }

// Cluster draws a cluster.
func (g *Generator) Cluster() *policy.Cluster {
	c := &policy.Cluster{}
	for i := range g.o.Nodes {
		c.Nodes = append(c.Nodes, policy.Node{
			Name:  Node(i),
			Addrs: []netip.Addr{netip.AddrFrom4([4]byte{192, 168, 0, byte(10 + i)}), netip.MustParseAddr(fmt.Sprintf("fd01::%d", 10+i))},
		})
	}
	for i := range g.o.Namespaces {
		c.Namespaces = append(c.Namespaces, g.Namespace(i))
	}
	for i := range g.o.Pods {
		c.Pods = append(c.Pods, g.Pod(i))
	}
	for i := range g.o.Policies {
		c.Policies = append(c.Policies, g.Policy(i))
	}
	return c
}

// Namespace draws the i-th namespace.
func (g *Generator) Namespace(i int) policy.Namespace {
	name := namespaceName(i)
	m := map[string]string{"kubernetes.io/metadata.name": name}
	if g.chance(60) {
		m["team"] = pick(g, "red", "blue")
	}
	return policy.Namespace{Name: name, Labels: policy.MakeLabels(m)}
}

func namespaceName(i int) string { return fmt.Sprintf("ns%d", i) }

func (g *Generator) labels() policy.Labels {
	m := map[string]string{}
	if g.chance(85) {
		m["app"] = pick(g, "web", "db", "job")
	}
	if g.chance(40) {
		m["tier"] = pick(g, "front", "back")
	}
	return policy.MakeLabels(m)
}

// Address returns the v4 or v6 address of slot i: pods live in 10.1.0.0/24 and
// fd00:1::/120, and so do parts of the blocks.
func Address(i int, v6 bool) netip.Addr {
	if v6 {
		return netip.MustParseAddr(fmt.Sprintf("fd00:1::%x", i))
	}
	return netip.AddrFrom4([4]byte{10, 1, 0, byte(i)})
}

// Pod draws the i-th pod. Some share an address with a neighbour, are finished, or are
// on the host network.
func (g *Generator) Pod(i int) policy.Pod {
	p := policy.Pod{
		Name:    policy.Name{Namespace: namespaceName(g.IntN(g.o.Namespaces)), Name: fmt.Sprintf("pod%d", i)},
		UID:     fmt.Sprintf("uid%d-%d", i, g.IntN(2)),
		Node:    Node(g.IntN(g.o.Nodes)),
		Labels:  g.labels(),
		Created: int64(g.IntN(4)),
	}
	// The name is fixed by i so that events hit it again; the namespace must be too.
	p.Namespace = namespaceName(i % g.o.Namespaces)
	slot := 1 + i
	if g.chance(8) {
		slot = 1 + g.IntN(g.o.Pods)
	}
	switch {
	case g.chance(60):
		p.Addrs = []netip.Addr{Address(slot, false), Address(slot, true)}
	case g.chance(70):
		p.Addrs = []netip.Addr{Address(slot, false)}
	case g.chance(70):
		p.Addrs = []netip.Addr{Address(slot, true)}
	}
	p.HostNetwork = g.chance(4)
	p.Finished = g.chance(4)
	p.Attached = g.chance(30)
	if g.chance(80) {
		p.Ports = append(p.Ports, policy.NamedPort{Name: "http", Protocol: pick(g, policy.TCP, policy.TCP, policy.UDP), Port: pick[uint16](g, 80, 8080, 81)})
	}
	if g.chance(30) {
		p.Ports = append(p.Ports, policy.NamedPort{Name: pick(g, "http", "dns"), Protocol: pick(g, policy.UDP, policy.TCP), Port: pick[uint16](g, 53, 80, 90)})
	}
	return p
}

// Selector draws a label selector over the labels of pods or of namespaces.
func (g *Generator) selector(key string, values ...string) policy.Selector {
	var s policy.Selector
	if g.chance(25) {
		return s
	}
	for range 1 + g.IntN(2) {
		r := policy.Requirement{Key: key, Op: pick(g, policy.In, policy.In, policy.In, policy.NotIn, policy.Exists, policy.DoesNotExist)}
		if r.Op == policy.In || r.Op == policy.NotIn {
			r.Values = []string{pick(g, values...)}
			if g.chance(30) && r.Values[0] != values[len(values)-1] {
				r.Values = append(r.Values, values[len(values)-1])
			}
		}
		s.Requirements = append(s.Requirements, r)
	}
	return s
}

func (g *Generator) podLabels() policy.Selector {
	if g.chance(30) {
		return g.selector("tier", "back", "front")
	}
	return g.selector("app", "db", "job", "web")
}

func (g *Generator) podSelector(namespace string) *policy.PodSelector {
	s := &policy.PodSelector{Pods: g.podLabels()}
	if g.chance(50) {
		s.Namespace = namespace
	} else {
		s.Namespaces = g.selector("team", "blue", "red")
		if g.chance(15) {
			s.Namespaces = policy.Selector{Requirements: []policy.Requirement{{Key: "kubernetes.io/metadata.name", Values: []string{namespaceName(g.IntN(g.o.Namespaces))}}}}
		}
	}
	return s
}

func (g *Generator) block() *policy.Block {
	v6 := g.chance(35)
	width := pick(g, 0, 8, 20, 26, 28, 29, 30, 32)
	prefix := func(bits int) policy.Block {
		if v6 {
			return policy.Block{CIDR: netip.PrefixFrom(Address(g.IntN(64), true), 96+bits).Masked()}
		}
		return policy.Block{CIDR: netip.PrefixFrom(Address(g.IntN(64), false), bits).Masked()}
	}
	b := prefix(width)
	if v6 && width == 0 {
		b.CIDR = netip.MustParsePrefix("::/0")
	}
	for g.chance(45) && width < 32 {
		b.Except = append(b.Except, prefix(width+1+g.IntN(32-width)).CIDR)
	}
	return &b
}

// Peers draws a list of peers: nil (any), empty (none), or some.
func (g *Generator) peers(namespace string) []policy.Peer {
	if g.chance(15) {
		return nil
	}
	if g.chance(2) {
		return []policy.Peer{}
	}
	var out []policy.Peer
	for range 1 + g.IntN(3) {
		if g.chance(45) {
			out = append(out, policy.Peer{Block: g.block()})
		} else {
			out = append(out, policy.Peer{Pods: g.podSelector(namespace)})
		}
	}
	return out
}

func (g *Generator) ports() []policy.PortMatch {
	if g.chance(12) {
		return nil
	}
	var out []policy.PortMatch
	for range 1 + g.IntN(3) {
		out = append(out, g.port())
	}
	return out
}

func (g *Generator) port() policy.PortMatch {
	m := policy.PortMatch{Protocol: pick(g, policy.TCP, policy.TCP, policy.TCP, policy.UDP, policy.UDP, policy.SCTP)}
	switch n := g.IntN(100); {
	case n < 45:
		m.Name = pick(g, "http", "http", "http", "http", "http", "dns", "absent")
		m.Protocol = pick(g, policy.TCP, policy.TCP, policy.TCP, policy.UDP, policy.SCTP)
	case n < 75:
		m.First = pick[uint16](g, 79, 80, 81, 85, 8000, 0)
		m.Last = m.First + pick[uint16](g, 0, 1, 5, 10, 1000)
	case n < 90:
		m.First = pick[uint16](g, 53, 80, 81, 8080, 90)
		m.Last = m.First
	default:
		m.Last = 65535
	}
	if g.o.Tiers {
		switch n := g.IntN(100); {
		case n < 12:
			m = policy.PortMatch{Protocol: pick(g, policy.ICMP, policy.ICMPv6), First: 8 << 8, Last: pick[uint16](g, 8<<8, 8<<8|255)}
		case n < 20:
			m.Protocol = policy.AnyProtocol
		case n < 25:
			m = policy.PortMatch{Protocol: pick(g, policy.Protocol(50), policy.Protocol(47)), Last: 65535}
		}
	}
	return m
}

// Policy draws the i-th policy.
func (g *Generator) Policy(i int) policy.Policy {
	ns := namespaceName(i % g.o.Namespaces)
	p := policy.Policy{
		ID:         policy.PolicyID{Kind: "NetworkPolicy", Name: policy.Name{Namespace: ns, Name: fmt.Sprintf("policy%d", i)}},
		Generation: int64(g.IntN(5)),
		Tier:       policy.TierNamespaced,
		Isolates:   true,
		Subject:    policy.PodSelector{Namespace: ns, Pods: g.podLabels()},
	}
	p.Applies = pick(g, [2]bool{true, false}, [2]bool{true, true}, [2]bool{false, true}, [2]bool{true, true})
	if g.o.Tiers && i%2 == 0 {
		p.ID.Kind, p.ID.Namespace = "ClusterNetworkPolicy", ""
		p.Tier = pick(g, policy.TierAdmin, policy.TierAdmin, policy.TierBaseline, policy.TierNamespaced)
		p.Isolates = g.chance(15)
		p.Order = int64(g.IntN(3))
		p.Subject = *g.podSelector(ns)
	}
	for _, d := range policy.Directions {
		for p.Applies[d] && len(p.Rules[d]) < 4 && g.chance(75) {
			p.Rules[d] = append(p.Rules[d], g.rule(ns))
		}
	}
	return p
}

func (g *Generator) rule(ns string) policy.Rule {
	r := policy.Rule{Peers: g.peers(ns), Ports: g.ports()}
	if !g.o.Tiers {
		return r
	}
	r.Action = pick(g, policy.Allow, policy.Allow, policy.Allow, policy.Deny, policy.Deny, policy.Deny, policy.Pass, policy.Log)
	r.Log = g.chance(15)
	if g.chance(15) {
		r.NotPeers = g.peers(ns)
	}
	if g.chance(15) {
		r.NotPorts = g.ports()
	}
	return r
}

// Flow draws a question about c. Most have at least one pod at an end and a port that
// some rule names.
func (g *Generator) Flow(c *policy.Cluster) policy.Flow {
	if g.chance(90) && len(c.Policies) > 0 {
		for range 6 {
			if f, ok := g.aimedFlow(c); ok {
				return f
			}
		}
	}
	v6 := g.chance(35)
	f := policy.Flow{Src: g.address(c, v6), Dst: g.address(c, v6), Protocol: pick(g, policy.TCP, policy.TCP, policy.TCP, policy.UDP, policy.UDP, policy.SCTP)}
	f.Port = pick[uint16](g, 80, 80, 80, 8080, 53, 81, 90, 79, 82, 84, 86, 91, 95, 8000, 8001, 8005, 1, 1000, 65535)
	if g.chance(4) {
		f.Protocol, f.Port = pick(g, policy.ICMP, policy.ICMPv6), pick[uint16](g, 8<<8, 8<<8|1, 3<<8)
	}
	if g.chance(2) {
		f.Protocol, f.Port = policy.Protocol(pick(g, 50, 47)), 0
	}
	return f
}

// aimedFlow draws a flow near what a random rule matches.
func (g *Generator) aimedFlow(c *policy.Cluster) (policy.Flow, bool) {
	p := &c.Policies[g.IntN(len(c.Policies))]
	d := policy.Directions[g.IntN(2)]
	if !p.Applies[d] || len(p.Rules[d]) == 0 {
		return policy.Flow{}, false
	}
	r := &p.Rules[d][g.IntN(len(p.Rules[d]))]
	if !slices.ContainsFunc(r.Ports, func(m policy.PortMatch) bool { return m.Name != "" }) && g.chance(60) {
		return policy.Flow{}, false
	}
	v6 := g.chance(35)
	self, ok := g.member(c, &p.Subject, v6)
	if !ok {
		return policy.Flow{}, false
	}
	other := g.address(c, v6)
	if len(r.Peers) > 0 {
		if peer := r.Peers[g.IntN(len(r.Peers))]; peer.Pods != nil {
			if a, ok := g.member(c, peer.Pods, v6); ok {
				other = a
			}
		} else if peer.Block.CIDR.Addr().Is6() == v6 {
			other = g.inside(peer.Block.CIDR)
		}
	}
	f := policy.Flow{Src: other, Dst: self, Protocol: policy.TCP, Port: 80}
	if d == policy.Egress {
		f.Src, f.Dst = self, other
	}
	if len(r.Ports) > 0 {
		g.aimPort(c, &f, r.Ports)
	}
	return f, true
}

// aimPort gives f a protocol and port that one of ports matches, or nearly.
func (g *Generator) aimPort(c *policy.Cluster, f *policy.Flow, ports []policy.PortMatch) {
	m := ports[g.IntN(len(ports))]
	for _, n := range ports {
		if n.Name != "" && g.chance(80) {
			m = n
		}
	}
	f.Protocol, f.Port = m.Protocol, m.First
	if m.Last > m.First {
		f.Port += uint16(g.IntN(int(m.Last - m.First)))
	}
	if g.chance(10) {
		f.Port = m.Last + 1
	}
	if m.Protocol == policy.AnyProtocol {
		f.Protocol = pick(g, policy.TCP, policy.UDP, policy.SCTP, policy.ICMP)
	}
	for _, p := range c.Pods {
		for _, a := range p.Addrs {
			for _, n := range p.Ports {
				if m.Name == n.Name && m.Protocol == n.Protocol && a == f.Dst {
					f.Protocol, f.Port = n.Protocol, n.Port
				}
			}
		}
	}
	if m.Name != "" && f.Port == 0 {
		f.Port = 80
	}
}

// member draws an address of a pod that s may select (namespace labels are ignored).
func (g *Generator) member(c *policy.Cluster, s *policy.PodSelector, v6 bool) (netip.Addr, bool) {
	for range 30 {
		p := &c.Pods[g.IntN(max(1, len(c.Pods)))]
		if s.Namespace != "" && s.Namespace != p.Namespace || !s.Pods.Matches(p.Labels) || p.HostNetwork || p.Finished {
			continue
		}
		for _, a := range p.Addrs {
			if a.Is6() == v6 {
				return a, true
			}
		}
	}
	return netip.Addr{}, false
}

// inside draws an address of p, near its start.
func (g *Generator) inside(p netip.Prefix) netip.Addr {
	a := p.Addr()
	for range g.IntN(20) {
		if n := a.Next(); p.Contains(n) {
			a = n
		}
	}
	return a
}

func (g *Generator) address(c *policy.Cluster, v6 bool) netip.Addr {
	switch n := g.IntN(100); {
	case n < 72:
		for range 20 {
			p := c.Pods[g.IntN(max(1, len(c.Pods)))]
			for _, a := range p.Addrs {
				if a.Is6() == v6 {
					return a
				}
			}
		}
	case n < 76 && len(c.Nodes) > 0:
		for _, a := range c.Nodes[g.IntN(len(c.Nodes))].Addrs {
			if a.Is6() == v6 {
				return a
			}
		}
	case n < 80:
		if v6 {
			return netip.MustParseAddr("2001:db8::1")
		}
		return netip.AddrFrom4([4]byte{203, 0, 113, 9})
	}
	return Address(g.IntN(66), v6)
}

// Event draws a change of an object: added, changed, repeated or deleted.
func (g *Generator) Event() policy.Event {
	ev := policy.Event{Delete: g.chance(25)}
	switch n := g.IntN(100); {
	case n < 50:
		p := g.Pod(g.IntN(g.o.Pods))
		ev.Pod = &p
	case n < 85:
		p := g.Policy(g.IntN(g.o.Policies))
		ev.Policy = &p
	case n < 97:
		ns := g.Namespace(g.IntN(g.o.Namespaces))
		ev.Namespace = &ns
	default:
		ev.Node = &policy.Node{Name: Node(0)}
	}
	return ev
}
