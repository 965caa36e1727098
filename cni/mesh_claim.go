package cni

import (
	"net/netip"
)

// A member is a peer with what of it is fit for use.
type member struct {
	Peer
	addrs pair
}

// claim gives every pod network one owner and drops what would misdirect others' traffic.
func (p *meshPlan) claim(peers []Peer) []member {
	members := make([]member, 0, len(peers))
	lengths := map[int]bool{}
	for _, peer := range peers {
		if peer.Name == p.self.Name {
			continue
		}
		m := member{Peer: peer, addrs: p.cfg.Node.of(peer)}
		m.PodCIDRs = nil
		for _, cidr := range peer.PodCIDRs {
			cidr = cidr.Masked()
			if p.claimOne(peer.Name, cidr) {
				m.PodCIDRs = append(m.PodCIDRs, cidr)
				lengths[cidr.Bits()] = true
			}
		}
		members = append(members, m)
	}
	for i := range members {
		p.refuseInside(&members[i], lengths)
	}
	return members
}

func (p *meshPlan) claimOne(name string, cidr netip.Prefix) bool {
	if reason := unfitPodCIDR(cidr); reason != "" {
		p.rep.problem(name, "pod network %s %s: mend spec.podCIDRs of its Node", cidr, reason)
		return false
	}
	if other, taken := p.owner[cidr]; taken {
		if other != name {
			p.rep.problem(name, "pod network %s belongs to node %s already: give each Node its own spec.podCIDRs", cidr, other)
		}
		return false
	}
	for _, own := range p.self.PodCIDRs {
		if own.Overlaps(cidr) {
			p.rep.problem(name, "pod network %s overlaps %s of this node: give each Node its own spec.podCIDRs", cidr, own)
			return false
		}
	}
	for _, a := range p.rep.Addrs {
		if cidr.Contains(a) {
			p.rep.problem(name, "pod network %s contains address %s of this node: give the pods a network of their own", cidr, a)
			return false
		}
	}
	p.owner[cidr] = name
	return true
}

// refuseInside drops addresses inside a pod network: packets to them would enter the tunnel they
// are meant to carry. The address is dropped and not the network, because a kubelet can write the
// addresses of its own Node, and spec.podCIDRs only when it creates it.
func (p *meshPlan) refuseInside(m *member, lengths map[int]bool) {
	for i, a := range m.addrs {
		for bits := range lengths {
			if !a.IsValid() || bits > a.BitLen() {
				continue
			}
			net := netip.PrefixFrom(a, bits).Masked()
			if other, ok := p.owner[net]; ok {
				p.rep.problem(m.Name, "its address %s is inside pod network %s of node %s and is not used: give nodes addresses outside the pod networks", a, net, other)
				m.addrs[i] = netip.Addr{}
				break
			}
		}
	}
}

// unfitPodCIDR says what is wrong with a pod network, or nothing. The least lengths keep one
// mistaken or hostile Node from taking over what is not pods.
func unfitPodCIDR(p netip.Prefix) string {
	least := 8
	if p.Addr().Is6() {
		least = 16
	}
	switch {
	case !p.IsValid() || p.Addr().Is4In6():
		return "is not a prefix"
	case p.Bits() < least:
		return "is too large"
	case !p.Addr().IsGlobalUnicast():
		return "is not unicast"
	case p.Addr().BitLen()-p.Bits() < 1:
		return "has a single address"
	}
	return ""
}
