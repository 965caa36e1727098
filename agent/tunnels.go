package agent

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/nftcni/nftcni/cni"
	"github.com/nftcni/nftcni/nft"
)

// wireGuardPorts is how many ports the mesh uses from cni.DefaultWireGuardPort on.
const wireGuardPorts = 4

// tunnels is what the node's tunnels may hear: every Node's addresses, and those this node was told to use. Nil, which
// changes nothing, while no Node is known.
func (l *loop) tunnels() *nft.Tunnels {
	m := l.cfg.Mesh
	switch {
	case l.cfg.Network != NetworkRouted || m.Mode == cni.MeshNone:
		return &nft.Tunnels{} // none of ours
	case len(l.inv.nodes) == 0:
		return nil
	}
	t := &nft.Tunnels{Ports: []uint16{cmp.Or(m.Port, cni.DefaultVXLANPort)}}
	if m.Encrypt == cni.EncryptWireGuard {
		for i := range uint16(wireGuardPorts) {
			t.Ports = append(t.Ports, cni.DefaultWireGuardPort+i)
		}
	}
	for _, a := range m.NodeAddresses {
		t.Nodes = append(t.Nodes, a.Unmap())
	}
	for _, n := range l.inv.nodes {
		for _, a := range slices.Concat(n.Addrs, n.MeshAddrs) {
			t.Nodes = append(t.Nodes, a.Unmap())
		}
	}
	t.Nodes = slices.DeleteFunc(t.Nodes, func(a netip.Addr) bool { return !a.IsValid() || a.Zone() != "" })
	slices.SortFunc(t.Nodes, netip.Addr.Compare)
	t.Nodes = slices.Compact(t.Nodes)
	return t
}

// changedTunnels is what differs from what the kernel holds; nil when nothing does.
func (l *loop) changedTunnels() *nft.Tunnels {
	want := l.tunnels()
	if want == nil || slices.Equal(want.Ports, l.heard.Ports) && slices.Equal(want.Nodes, l.heard.Nodes) {
		return nil
	}
	l.heard = *want
	return want
}
