package cni

import (
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// addressInUse asks the kernel whether an address belongs to the node itself or has a
// route of its own, of whoever made it: then a pod of another plugin may have it. So may
// it when host-local holds it.
func addressInUse(h *netlink.Handle) func(netip.Addr) bool {
	held := heldByHostLocal(hostLocalDir)
	return func(a netip.Addr) bool {
		if held(a) {
			return true
		}
		// With RTM_F_FIB_MATCH (kernel 4.13) the answer is the route as it stands in the table.
		routes, err := h.RouteGetWithOptions(a.AsSlice(), &netlink.RouteGetOptions{FIBMatch: true})
		if err != nil || len(routes) == 0 {
			return false
		}
		r := routes[0]
		if r.Type == unix.RTN_LOCAL || r.Type == unix.RTN_ANYCAST {
			return true
		}
		if r.Dst == nil {
			return false
		}
		ones, size := r.Dst.Mask.Size()
		return ones == size && r.Type == unix.RTN_UNICAST
	}
}

// uplinkMTU is the MTU of the interface that leads away from the node, or 1500 where
// there is none.
func uplinkMTU(h *netlink.Handle) int {
	for _, to := range []string{"192.0.2.1", "2001:db8::1"} { // documentation addresses: only a default route matches
		routes, err := h.RouteGet(net.ParseIP(to))
		if err != nil || len(routes) == 0 || routes[0].LinkIndex == 0 || routes[0].Type != unix.RTN_UNICAST {
			continue
		}
		link, err := h.LinkByIndex(routes[0].LinkIndex)
		if err == nil && link.Attrs().MTU >= minMTU4 {
			return min(link.Attrs().MTU, maxMTU)
		}
	}
	return 1500
}
