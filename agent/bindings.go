package agent

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/nftcni/nftcni/cni"
	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
)

// bindings of an attachment: all its addresses, none of a pod that has finished. Such a
// pod owns no address (and no policy) any more, so its interface is closed until DEL.
func (v *inventory) bindings(at *attachment) []nft.Binding {
	n := podName(at.Attachment)
	if p := v.pods[n]; p != nil && p.Finished && !stale(at.Attachment, *p) {
		return nil
	}
	return bindings(at.Attachment)
}

func bindings(a cni.Attachment) []nft.Binding {
	out := make([]nft.Binding, 0, len(a.Addresses))
	for _, addr := range a.Addresses {
		out = append(out, nft.Binding{Interface: a.HostInterface, Addr: addr, Masquerade: a.Masquerade, Comment: podName(a).String()})
	}
	return out
}

// boundOf are the bindings of the attachments of an event's pod.
func (v *inventory) boundOf(e policy.Event) []nft.Binding {
	if e.Pod == nil {
		return nil
	}
	var out []nft.Binding
	for _, at := range v.byPod[e.Pod.Name] {
		out = append(out, v.bindings(at)...)
	}
	return out
}

// podNetworks are the destinations that are never masqueraded: every node's podCIDRs,
// this node's, and the pools of its attachments; nested ones left out.
func (v *inventory) podNetworks(own []netip.Prefix) []netip.Prefix {
	all := slices.Clone(own)
	for _, n := range v.nodes {
		all = append(all, n.PodCIDRs...)
	}
	for _, a := range v.attached {
		all = append(all, a.Pools...)
	}
	for i := range all {
		all[i] = all[i].Masked()
	}
	slices.SortFunc(all, func(a, b netip.Prefix) int {
		return cmp.Or(cmp.Compare(a.Bits(), b.Bits()), a.Addr().Compare(b.Addr()))
	})
	var out []netip.Prefix
	taken := map[netip.Prefix]bool{}
	for _, p := range all {
		if !covered(p, taken) {
			taken[p] = true
			out = append(out, p)
		}
	}
	slices.SortFunc(out, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) })
	return out
}

// covered reports whether p or a prefix around it is in taken.
func covered(p netip.Prefix, taken map[netip.Prefix]bool) bool {
	for bits := range p.Bits() + 1 {
		if around, err := p.Addr().Prefix(bits); err == nil && taken[around] {
			return true
		}
	}
	return false
}
