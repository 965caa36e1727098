package policy

import (
	"cmp"
	"net/netip"
	"slices"
)

// Reason says why one direction of a flow was decided as it was.
type Reason uint8

// The reasons, a closed set.
const (
	// NotLocal: no pod of this node (or no pod at all) owns the address on this side.
	NotLocal Reason = iota
	// SamePod: one pod owns both addresses.
	SamePod
	// OwnNode: the other end is an address of the pod's own node (kubelet probes).
	OwnNode
	// NotSelected: no policy selects the pod in this direction.
	NotSelected
	// RuleMatched: a rule with a final action matched.
	RuleMatched
	// Isolated: no rule matched and the policies in Isolating isolate the pod.
	Isolated
	// TierEnd: policies select the pod, no rule decided and none of them isolates.
	TierEnd
)

func (r Reason) String() string {
	return [...]string{"not local", "same pod", "own node", "not selected", "rule", "isolated", "end of tiers"}[r]
}

// Verdict is the oracle's answer. A flow is allowed when both directions allow it.
type Verdict struct {
	Allowed, Log    bool
	Egress, Ingress Decision
}

// Decision is what one direction says, and who said it.
type Decision struct {
	Action Action // Allow or Deny
	Log    bool
	Reason Reason
	// Pod is the pod that was judged, zero when Reason is NotLocal.
	Pod Name
	// Policy, Rule, Peer and Port name what matched when Reason is RuleMatched. Peer
	// and Port are -1 when the rule has no such list.
	Policy           PolicyID
	Rule, Peer, Port int
	// Isolating lists the policies that isolate the pod when Reason is Isolated.
	Isolating []PolicyID
	// Considered lists the rules of every policy that selects the pod in this
	// direction, in the order of the walk; EvaluateAll fills it.
	Considered []Considered
}

// Considered is one rule of one policy compared with the flow. A policy without rules
// in the direction has one entry with Rule -1. Peer and Port are the indices that
// matched, -1 where the rule has no such list or nothing matched.
type Considered struct {
	Policy                 PolicyID
	Rule, Peer, Port       int
	PeerMatched, PortMatch bool
}

// Evaluate judges f as the policies of c demand on node: egress by the policies that
// select the pod owning f.Src and ingress by those of the pod owning f.Dst, as far as
// these pods are on node (node "": every pod counts as local). It is slow and meant to
// be obviously right: it shares nothing with the compiler but the model.
func Evaluate(c *Cluster, node string, f Flow) Verdict { return NewOracle(c, node).Evaluate(f) }

// EvaluateAll is Evaluate with Decision.Considered filled.
func EvaluateAll(c *Cluster, node string, f Flow) Verdict {
	o := NewOracle(c, node)
	o.all = true
	return o.Evaluate(f)
}

// Oracle evaluates many flows of one cluster; it only remembers who owns an address.
type Oracle struct {
	c      *Cluster
	node   string
	all    bool
	owners map[netip.Addr]*Pod
	order  []*Policy
}

// NewOracle prepares c for Evaluate. c must not change afterwards.
func NewOracle(c *Cluster, node string) *Oracle {
	o := &Oracle{c: c, node: node, owners: map[netip.Addr]*Pod{}}
	for i := range c.Pods {
		p := &c.Pods[i]
		if p.Finished || p.HostNetwork {
			continue
		}
		for _, a := range p.Addrs {
			if cur := o.owners[a]; cur == nil || claimBefore(cur, p) {
				o.owners[a] = p
			}
		}
	}
	for i := range c.Policies {
		o.order = append(o.order, &c.Policies[i])
	}
	slices.SortFunc(o.order, func(a, b *Policy) int {
		return cmp.Or(cmp.Compare(a.Tier, b.Tier), cmp.Compare(a.Order, b.Order), comparePolicyID(a.ID, b.ID))
	})
	return o
}

// claimBefore says that b wins an address over a (Pod.Created).
func claimBefore(a, b *Pod) bool {
	if a.Attached != b.Attached {
		return b.Attached
	}
	return cmp.Or(cmp.Compare(a.Created, b.Created), compareName(a.Name, b.Name)) < 0
}

func compareName(a, b Name) int {
	return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
}

func comparePolicyID(a, b PolicyID) int {
	return cmp.Or(cmp.Compare(a.Kind, b.Kind), compareName(a.Name, b.Name))
}

// Owner returns the pod that owns a, or nil.
func (o *Oracle) Owner(a netip.Addr) *Pod { return o.owners[a] }

// Evaluate judges f; see the function Evaluate.
func (o *Oracle) Evaluate(f Flow) Verdict {
	v := Verdict{Egress: o.direction(Egress, f), Ingress: o.direction(Ingress, f)}
	v.Allowed = v.Egress.Action == Allow && v.Ingress.Action == Allow
	v.Log = v.Egress.Log || v.Ingress.Log
	return v
}

func (o *Oracle) direction(dir Direction, f Flow) Decision {
	self, other := f.Src, f.Dst
	if dir == Ingress {
		self, other = f.Dst, f.Src
	}
	d := Decision{Rule: -1, Peer: -1, Port: -1}
	pod := o.owners[self]
	switch {
	case pod == nil || o.node != "" && pod.Node != o.node:
		return d
	case o.owners[other] == pod:
		d.Reason = SamePod
	case o.isNode(pod.Node, other):
		d.Reason = OwnNode
	}
	d.Pod = pod.Name
	if d.Reason != NotLocal {
		return d
	}
	return o.walk(d, pod, dir, other, f)
}

func (o *Oracle) isNode(name string, a netip.Addr) bool {
	for _, n := range o.c.Nodes {
		if n.Name == name && slices.Contains(n.Addrs, a) {
			return true
		}
	}
	return false
}

// walk goes through the tiers as documented on Policy.
func (o *Oracle) walk(d Decision, pod *Pod, dir Direction, other netip.Addr, f Flow) Decision {
	selecting := slices.DeleteFunc(slices.Clone(o.order), func(p *Policy) bool {
		return !p.Applies[dir] || !o.selects(&p.Subject, pod)
	})
	d.Reason = NotSelected
	if len(selecting) > 0 {
		d.Reason = TierEnd
	}
	if o.all {
		d.Considered = o.consider(selecting, dir, other, f)
	}
	for len(selecting) > 0 {
		n := slices.IndexFunc(selecting, func(p *Policy) bool { return p.Tier != selecting[0].Tier })
		if n < 0 {
			n = len(selecting)
		}
		if o.tier(&d, selecting[:n], dir, other, f) {
			return d
		}
		selecting = selecting[n:]
	}
	return d
}

// tier walks the policies of one tier and reports whether d is final.
func (o *Oracle) tier(d *Decision, policies []*Policy, dir Direction, other netip.Addr, f Flow) bool {
	var isolating []PolicyID
	for _, p := range policies {
		if p.Isolates {
			isolating = append(isolating, p.ID)
		}
		for i, r := range p.Rules[dir] {
			peer, peerOK := o.peer(r, other)
			port, portOK := o.port(r, f)
			if !peerOK || !portOK {
				continue
			}
			d.Log = d.Log || r.Log || r.Action == Log
			switch r.Action {
			case Log:
				continue
			case Pass:
				return false
			}
			d.Action, d.Reason, d.Policy, d.Rule, d.Peer, d.Port = r.Action, RuleMatched, p.ID, i, peer, port
			return true
		}
	}
	if isolating == nil {
		return false
	}
	d.Action, d.Reason, d.Isolating = Deny, Isolated, isolating
	return true
}

func (o *Oracle) consider(selecting []*Policy, dir Direction, other netip.Addr, f Flow) []Considered {
	var out []Considered
	for _, p := range selecting {
		if len(p.Rules[dir]) == 0 {
			out = append(out, Considered{Policy: p.ID, Rule: -1, Peer: -1, Port: -1})
		}
		for i, r := range p.Rules[dir] {
			c := Considered{Policy: p.ID, Rule: i}
			c.Peer, c.PeerMatched = o.peer(r, other)
			c.Port, c.PortMatch = o.port(r, f)
			out = append(out, c)
		}
	}
	return out
}

// peer reports whether a is in r.Peers and not in r.NotPeers, and which entry matched.
func (o *Oracle) peer(r Rule, a netip.Addr) (int, bool) {
	in := func(p Peer) bool { return o.peerHas(p, a) }
	if slices.ContainsFunc(r.NotPeers, in) {
		return -1, false
	}
	if r.Peers == nil {
		return -1, true
	}
	i := slices.IndexFunc(r.Peers, in)
	return i, i >= 0
}

func (o *Oracle) peerHas(p Peer, a netip.Addr) bool {
	if p.Block != nil {
		return p.Block.CIDR.Contains(a) &&
			!slices.ContainsFunc(p.Block.Except, func(e netip.Prefix) bool { return e.Contains(a) })
	}
	pod := o.owners[a]
	return pod != nil && o.selects(p.Pods, pod)
}

func (o *Oracle) selects(s *PodSelector, pod *Pod) bool {
	if s.Namespace != "" {
		return s.Namespace == pod.Namespace && s.Pods.Matches(pod.Labels)
	}
	var labels Labels
	for _, ns := range o.c.Namespaces {
		if ns.Name == pod.Namespace {
			labels = ns.Labels
		}
	}
	return s.Namespaces.Matches(labels) && s.Pods.Matches(pod.Labels)
}

// port reports whether the flow's protocol and port are in r.Ports and not in
// r.NotPorts, and which entry matched.
func (o *Oracle) port(r Rule, f Flow) (int, bool) {
	in := func(m PortMatch) bool { return o.portHas(m, f) }
	if slices.ContainsFunc(r.NotPorts, in) {
		return -1, false
	}
	if r.Ports == nil {
		return -1, true
	}
	i := slices.IndexFunc(r.Ports, in)
	return i, i >= 0
}

func (o *Oracle) portHas(m PortMatch, f Flow) bool {
	if m.Name == "" {
		if m.Protocol == AnyProtocol {
			whole := m.First == 0 && m.Last == 65535
			ported := f.Protocol == TCP || f.Protocol == UDP || f.Protocol == SCTP
			return whole || ported && m.First <= f.Port && f.Port <= m.Last
		}
		return m.Protocol == f.Protocol && m.First <= f.Port && f.Port <= m.Last
	}
	pod := o.owners[f.Dst]
	if pod == nil {
		return false
	}
	for _, p := range pod.Ports {
		if p.Name == m.Name && (m.Protocol == AnyProtocol || m.Protocol == p.Protocol) {
			return p.Protocol == f.Protocol && p.Port == f.Port
		}
	}
	return false
}
