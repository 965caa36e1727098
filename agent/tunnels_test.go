package agent

import (
	"log/slog"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/nftcni/nftcni/cni"
	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
)

func TestTunnels(t *testing.T) {
	a, b := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::2")
	nodes := []policy.Node{{Name: "n1", Addrs: []netip.Addr{a}}, {Name: "n2", Addrs: []netip.Addr{b, netip.MustParseAddr("::ffff:192.0.2.1")}}}
	for _, c := range []struct {
		name  string
		cfg   Config
		nodes []policy.Node
		want  *nft.Tunnels
	}{
		{"vxlan", Config{}, nodes, &nft.Tunnels{Ports: []uint16{4793}, Nodes: []netip.Addr{a, b}}},
		{"another port", Config{Mesh: MeshConfig{Port: 8472}}, nodes[:1], &nft.Tunnels{Ports: []uint16{8472}, Nodes: []netip.Addr{a}}},
		{"wireguard", Config{Mesh: MeshConfig{Encrypt: cni.EncryptWireGuard}}, nodes[1:2], &nft.Tunnels{Ports: []uint16{4793, 4794, 4795, 4796, 4797}, Nodes: []netip.Addr{a, b}}},
		{"chosen address", Config{Mesh: MeshConfig{NodeAddresses: []netip.Addr{b}}}, nodes[:1], &nft.Tunnels{Ports: []uint16{4793}, Nodes: []netip.Addr{a, b}}},
		{"published address", Config{}, []policy.Node{{Name: "n1", Addrs: []netip.Addr{a}, MeshAddrs: []netip.Addr{b}}}, &nft.Tunnels{Ports: []uint16{4793}, Nodes: []netip.Addr{a, b}}},
		{"no node known", Config{}, nil, nil},
		{"no mesh", Config{Mesh: MeshConfig{Mode: cni.MeshNone}}, nodes, &nft.Tunnels{}},
		{"another CNI", Config{Network: NetworkNone}, nodes, &nft.Tunnels{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.cfg.Node, c.cfg.RunDir, c.cfg.StateDir = "n1", "/run/x", "/var/x"
			cfg, err := c.cfg.withDefaults()
			if err != nil {
				t.Fatal(err)
			}
			l := newLoop(cfg, slog.New(slog.DiscardHandler), newMemoryTable())
			for i := range c.nodes {
				l.inv.apply(policy.Event{Node: &c.nodes[i]})
			}
			if d := cmp.Diff(c.want, l.tunnels(), cmpopts.EquateComparable(netip.Addr{})); d != "" {
				t.Error(d)
			}
			if l.changedTunnels() == nil && c.want != nil && len(c.want.Ports) > 0 || l.changedTunnels() != nil {
				t.Error("tunnels must be sent once")
			}
		})
	}
}
