package cni

import "net/netip"

// minIPv6MTU is what every link that carries IPv6 has (RFC 8200, 5).
const minIPv6MTU = 1280

// vxlanOverhead is what VXLAN adds to an inner IP packet, in bytes: inner Ethernet 14,
// VXLAN 8, UDP 8, and the outer header of the underlay's family (RFC 7348, 5).
func vxlanOverhead(underlay netip.Addr) int { return 14 + 8 + 8 + ipHeader(underlay) }

// wireGuardOverhead is what WireGuard adds: a data message's header 16, the tag 16, UDP 8,
// and the outer header. Its padding to 16 bytes ends at the device's MTU.
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
