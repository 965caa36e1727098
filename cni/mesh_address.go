package cni

import (
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strings"
)

// A pair holds at most one address of each family, IPv4 first.
type pair [2]netip.Addr

func familyIndex(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}

func (p *pair) add(a netip.Addr) {
	if i := familyIndex(a); usableNodeAddr(a) && !p[i].IsValid() {
		p[i] = a
	}
}

func (p pair) list() []netip.Addr {
	return slices.DeleteFunc(slices.Clone(p[:]), func(a netip.Addr) bool { return !a.IsValid() })
}

// own chooses this node's addresses.
func (n NodeAddress) own(self Peer, v *meshView) (pair, error) {
	var chosen pair
	switch {
	case len(n.Addrs) > 0:
		for _, a := range n.Addrs {
			chosen.add(a)
		}
	case len(n.CIDRs) > 0:
		for _, m := range v.addrs {
			if n.prefers(m.addr) {
				chosen.add(m.addr)
			}
		}
	case n.Interface != "":
		for _, m := range v.addrs {
			if ok, _ := path.Match(n.Interface, m.link); ok { // check has seen the pattern
				chosen.add(m.addr)
			}
		}
	default:
		for _, a := range self.Addrs {
			chosen.add(a.Unmap())
		}
	}
	if chosen == (pair{}) {
		return chosen, fmt.Errorf("no address of this node %s; its addresses are %s", n.wanted(), v.describeAddrs())
	}
	return chosen, nil
}

func (n NodeAddress) wanted() string {
	switch {
	case len(n.CIDRs) > 0:
		return fmt.Sprintf("is inside the node address CIDRs %v", n.CIDRs)
	case n.Interface != "":
		return fmt.Sprintf("is on a link that matches %q", n.Interface)
	}
	return "is known: the Node object has no InternalIP and no node address is configured"
}

func (v *meshView) describeAddrs() string {
	var list []string
	for _, m := range v.addrs {
		if usableNodeAddr(m.addr) {
			list = append(list, m.addr.String()+" on "+m.link)
		}
	}
	if len(list) == 0 {
		return "none"
	}
	return strings.Join(list, ", ")
}

// of chooses a peer's addresses: those the CIDRs prefer, else the first of each family.
func (n NodeAddress) of(p Peer) pair {
	var chosen pair
	for _, preferred := range []bool{true, false} {
		for _, a := range p.Addrs {
			if a = a.Unmap(); n.prefers(a) == preferred {
				chosen.add(a)
			}
		}
	}
	return chosen
}

func (n NodeAddress) prefers(a netip.Addr) bool {
	return slices.ContainsFunc(n.CIDRs, func(p netip.Prefix) bool { return p.Contains(a) })
}

func clonePeer(p Peer) Peer {
	p.Addrs, p.PodCIDRs = slices.Clone(p.Addrs), slices.Clone(p.PodCIDRs)
	return p
}

// clonePeers copies peers in the order of their names, so that what is decided does not depend on
// the order they were listed in.
func clonePeers(peers []Peer) []Peer {
	list := make([]Peer, len(peers))
	for i, p := range peers {
		list[i] = clonePeer(p)
	}
	slices.SortStableFunc(list, func(a, b Peer) int { return strings.Compare(a.Name, b.Name) })
	return list
}
