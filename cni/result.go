package cni

import (
	"net"
	"net/netip"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
)

// result is that of our interface, behind those of the plugins before us in the chain.
func (a *adding) result() *current.Result {
	res := &current.Result{CNIVersion: current.ImplementedSpecVersion, DNS: a.got.dns}
	if a.conf.prevResult != nil {
		res = a.conf.prevResult
	}
	if d := a.conf.DNS; !d.IsEmpty() {
		res.DNS = d
	}
	at := len(res.Interfaces) + 1
	res.Interfaces = append(res.Interfaces,
		&current.Interface{Name: a.record.HostInterface, Mac: a.record.HostMAC, Mtu: a.record.MTU},
		&current.Interface{Name: a.ifname, Mac: a.record.PodMAC, Mtu: a.record.MTU, Sandbox: a.netns})
	for _, addr := range a.record.Addresses {
		res.IPs = append(res.IPs, &current.IPConfig{Interface: current.Int(at), Address: *hostNet(addr), Gateway: gatewayOf(addr).AsSlice()})
	}
	for _, r := range a.wire.podRoutes(a.got.routes) {
		res.Routes = append(res.Routes, &types.Route{Dst: *r.Dst, GW: net.IP(gatewayOf(prefixAddr(r.Dst)).AsSlice())})
	}
	return res
}

func prefixAddr(n *net.IPNet) netip.Addr {
	a, _ := netip.AddrFromSlice(n.IP)
	return a
}
