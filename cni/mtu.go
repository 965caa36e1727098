package cni

import "net/netip"

// minIPv6MTU is what every link that carries IPv6 has (RFC 8200, 5).
const minIPv6MTU = 1280

// vxlanOverhead is what VXLAN adds to an inner IP packet, in bytes: inner Ethernet 14, VXLAN 8, UDP
// 8, and the outer header of the underlay's family (RFC 7348, 5).
func vxlanOverhead(underlay netip.Addr) int { return 14 + 8 + 8 + ipHeader(underlay) }

// wireGuardOverhead is what WireGuard adds: a data message's header 16, the tag 16, UDP 8, and the
// outer header. Its padding to 16 bytes ends at the device's MTU.
func wireGuardOverhead(underlay netip.Addr) int { return 16 + 16 + 8 + ipHeader(underlay) }

func ipHeader(a netip.Addr) int {
	if a.Is4() {
		return 20
	}
	return 40
}

// least is the smaller of two MTUs, where 0 is not known.
func least(a, b int) int {
	if a == 0 || (b != 0 && b < a) {
		return b
	}
	return a
}

// finishMTU takes the least MTU of all paths for the pods, and that of this node's own links for
// devices and pods that have no path yet.
func (p *meshPlan) finishMTU(members []member) {
	for _, path := range p.rep.Paths {
		p.rep.MTU = least(p.rep.MTU, path.MTU)
		if path.MTU != 0 && path.MTU < minIPv6MTU {
			p.rep.problem(path.Peer, "the path leaves pods %d bytes a packet through %s, and IPv6 needs %d: raise that link's MTU", path.MTU, path.Link, minIPv6MTU)
		}
		if p.cfg.MTU > path.MTU && path.MTU != 0 {
			p.rep.problem(path.Peer, "mtu is set to %d, and the path through %s carries %d: lower it", p.cfg.MTU, path.Link, path.MTU)
		}
	}
	for i, a := range p.addrs {
		link, ok := p.view.has(a)
		mtu := p.view.links[link].mtu
		if !ok || p.view.links[link].loopback { // packets leave through another link, not known without a peer
			continue
		}
		for name, t := range p.state.tunnels {
			if t.mtu == 0 && (isWireGuardDevice(name) || t.local == p.addrs[i]) {
				t.mtu = mtu - p.overhead(name, a)
			}
		}
		if len(p.rep.Paths) == 0 {
			p.rep.MTU = least(p.rep.MTU, mtu-p.overhead("", a))
		}
	}
	if p.cfg.MTU != 0 {
		p.rep.MTU = p.cfg.MTU
	}
}

// overhead is that of a device, or of what every path of the configured mode has.
func (p *meshPlan) overhead(device string, underlay netip.Addr) int {
	switch {
	case isWireGuardDevice(device), device == "" && p.cfg.Encrypt == EncryptWireGuard:
		return wireGuardOverhead(underlay)
	case device != "", p.cfg.Mode == MeshVXLAN:
		return vxlanOverhead(underlay)
	}
	return 0
}
