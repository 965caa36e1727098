package cni

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// testView is a node with 192.0.2.1/24 and 2001:db8::1/64 on eth0, 198.51.100.1/24 on bond0, and a
// default route.
func testView() *meshView {
	v := &meshView{links: map[string]meshLink{"eth0": {mtu: 1500}, "bond0": {mtu: 9000}}}
	for _, a := range []struct{ link, addr string }{{"eth0", "192.0.2.1"}, {"eth0", "2001:db8::1"}, {"eth0", "fe80::7"}, {"bond0", "198.51.100.1"}} {
		v.addrs = append(v.addrs, meshAddr{a.link, netip.MustParseAddr(a.addr)})
	}
	onLink := map[string]string{"192.0.2.0/24": "eth0", "2001:db8::/64": "eth0", "198.51.100.0/24": "bond0"}
	v.path = func(a netip.Addr) meshPath {
		if _, own := v.has(a); own {
			return meshPath{link: "lo", mtu: 65536, local: true}
		}
		for net, link := range onLink {
			if netip.MustParsePrefix(net).Contains(a) {
				return meshPath{link: link, mtu: v.links[link].mtu, onLink: true}
			}
		}
		return meshPath{link: "eth0", mtu: 1500}
	}
	return v
}

func testKey(seed byte) string { return wgtypes.Key{seed, 1}.String() }

func wgKeyOf(t *testing.T, s string) wgKey {
	t.Helper()
	k, err := wgtypes.ParseKey(s)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// checkPlan compares how the peers' networks are reached, and wants one problem that holds a text,
// or none.
func checkPlan(t *testing.T, r Report, via, problem string) {
	t.Helper()
	var list []string
	for _, p := range r.Paths {
		list = append(list, string(p.Via))
	}
	if got := strings.Join(list, " "); got != via {
		t.Errorf("via %q, want %q", got, via)
	}
	switch {
	case problem == "" && len(r.Problems) != 0:
		t.Errorf("problems %v, want none", r.Problems)
	case problem != "" && (len(r.Problems) != 1 || !strings.Contains(r.Problems[0].Message, problem)):
		t.Errorf("problems %v, want one with %q", r.Problems, problem)
	}
}

func TestPlanMesh(t *testing.T) {
	near := Peer{Name: "n2", Addrs: addrs("192.0.2.2"), PodCIDRs: prefixes("10.244.2.0/24")}
	far := Peer{Name: "n3", Addrs: addrs("203.0.113.3"), PodCIDRs: prefixes("10.244.3.0/24")}
	with := func(p Peer, change func(*Peer)) Peer { p = clonePeer(p); change(&p); return p }
	tests := []struct {
		name    string
		cfg     MeshConfig
		peers   []Peer
		via     string
		problem string
		mtu     int
	}{
		{"no peers", MeshConfig{}, nil, "", "", 1500},
		{"no peers yet, vxlan", MeshConfig{Mode: MeshVXLAN}, nil, "", "", 1430},
		{"near", MeshConfig{}, []Peer{near}, "direct", "", 1500},
		{"far", MeshConfig{}, []Peer{near, far}, "direct vxlan", "", 1450},
		{"vxlan", MeshConfig{Mode: MeshVXLAN}, []Peer{near}, "vxlan", "", 1450},
		{"direct, but far", MeshConfig{Mode: MeshDirect}, []Peer{near, far}, "direct", "set mesh mode to auto", 1500},
		{"none", MeshConfig{Mode: MeshNone}, []Peer{near, far}, "", "", 1500},
		{"mtu set", MeshConfig{MTU: 1400}, []Peer{far}, "vxlan", "", 1400},
		{"mtu set too large", MeshConfig{MTU: 1500}, []Peer{far}, "vxlan", "lower it", 1500},
		{"a jumbo link", MeshConfig{Node: NodeAddress{Interface: "bond*"}}, []Peer{with(near, func(p *Peer) { p.Addrs = addrs("198.51.100.2") })}, "direct", "", 9000},
		{"cidr chooses the peer's address", MeshConfig{Node: NodeAddress{CIDRs: prefixes("198.51.100.0/24")}}, []Peer{with(near, func(p *Peer) { p.Addrs = addrs("192.0.2.2", "198.51.100.2") })}, "direct", "", 9000},
		{"ourselves", MeshConfig{}, []Peer{{Name: "n1", Addrs: addrs("192.0.2.1"), PodCIDRs: prefixes("10.244.1.0/24")}}, "", "", 1500},
		{"our address", MeshConfig{}, []Peer{with(near, func(p *Peer) { p.Addrs = addrs("192.0.2.1") })}, "", "two nodes need two addresses", 1500},
		{"no address", MeshConfig{}, []Peer{with(near, func(p *Peer) { p.Addrs = nil })}, "", "needs an InternalIP", 1500},
		{"link-local address", MeshConfig{}, []Peer{with(near, func(p *Peer) { p.Addrs = addrs("169.254.3.4") })}, "", "needs an InternalIP", 1500},
		{"no pod network yet", MeshConfig{}, []Peer{with(near, func(p *Peer) { p.PodCIDRs = nil })}, "", "", 1500},
		{"a network twice", MeshConfig{}, []Peer{near, with(far, func(p *Peer) { p.PodCIDRs = near.PodCIDRs })}, "direct", "belongs to node n2 already", 1500},
		{"our network", MeshConfig{}, []Peer{with(near, func(p *Peer) { p.PodCIDRs = prefixes("10.244.1.128/25") })}, "", "overlaps 10.244.1.0/24 of this node", 1500},
		{"everything", MeshConfig{}, []Peer{with(near, func(p *Peer) { p.PodCIDRs = prefixes("0.0.0.0/0") })}, "", "too large", 1500},
		{"multicast", MeshConfig{}, []Peer{with(near, func(p *Peer) { p.PodCIDRs = prefixes("224.0.0.0/8") })}, "", "not unicast", 1500},
		{"one address", MeshConfig{}, []Peer{with(near, func(p *Peer) { p.PodCIDRs = prefixes("10.244.2.1/32") })}, "", "single address", 1500},
		{"our node address", MeshConfig{}, []Peer{with(near, func(p *Peer) { p.PodCIDRs = prefixes("192.0.0.0/16") })}, "", "contains address 192.0.2.1 of this node", 1500},
		{"inside another's pods", MeshConfig{}, []Peer{near, with(far, func(p *Peer) { p.Addrs = addrs("10.244.2.9", "2001:db8::3") })}, "direct vxlan", "inside pod network 10.244.2.0/24 of node n2", 1430},
	}
	self := Peer{Name: "n1", Addrs: addrs("192.0.2.1", "2001:db8::1"), PodCIDRs: prefixes("10.244.1.0/24", "fd01:1::/64")}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if err := tt.cfg.complete(); err != nil {
				t.Fatal(err)
			}
			_, r, err := tt.cfg.planMesh(self, tt.peers, testView())
			if err != nil {
				t.Fatal(err)
			}
			checkPlan(t, r, tt.via, tt.problem)
			if r.MTU != tt.mtu {
				t.Errorf("MTU %d, want %d", r.MTU, tt.mtu)
			}
		})
	}
}

func TestNodeAddress(t *testing.T) {
	for _, tt := range []struct {
		name string
		node NodeAddress
		want string
	}{
		{"of the Node", NodeAddress{}, "[192.0.2.9]"},
		{"explicit", NodeAddress{Addrs: addrs("192.0.2.1")}, "[192.0.2.1]"},
		{"cidr", NodeAddress{CIDRs: prefixes("198.51.100.0/24", "2001:db8::/32")}, "[198.51.100.1 2001:db8::1]"},
		{"interface", NodeAddress{Interface: "eth*"}, "[192.0.2.1 2001:db8::1]"},
		{"no such interface", NodeAddress{Interface: "wan0"}, `no address of this node is on a link that matches "wan0"; its addresses are 192.0.2.1 on eth0, 2001:db8::1 on eth0, 198.51.100.1 on bond0`},
		{"not in a cidr", NodeAddress{CIDRs: prefixes("10.0.0.0/8")}, "no address of this node is inside the node address CIDRs [10.0.0.0/8]; its addresses are 192.0.2.1 on eth0, 2001:db8::1 on eth0, 198.51.100.1 on bond0"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			chosen, err := tt.node.own(Peer{Addrs: addrs("192.0.2.9")}, testView())
			got := fmt.Sprint(chosen.list())
			if err != nil {
				got = err.Error()
			}
			if got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
}

func TestMeshConfig(t *testing.T) {
	for _, tt := range []struct {
		name string
		cfg  MeshConfig
		want string
	}{
		{"defaults", MeshConfig{}, ""},
		{"mode", MeshConfig{Mode: "ipip"}, "auto, direct, vxlan or none"},
		{"encrypt", MeshConfig{Encrypt: "ipsec"}, "none or wireguard"},
		{"encrypt without routes", MeshConfig{Mode: MeshNone, Encrypt: EncryptWireGuard}, "use mode auto"},
		{"vni", MeshConfig{VNI: 1 << 24}, "1 to 16777215"},
		{"ports", MeshConfig{Port: 4000, WireGuardPort: 3998}, "use another"},
		{"mtu", MeshConfig{MTU: 500}, "1280"},
		{"address", MeshConfig{Node: NodeAddress{Addrs: addrs("127.0.0.1")}}, "unicast address that other nodes can reach"},
		{"two addresses", MeshConfig{Node: NodeAddress{Addrs: addrs("192.0.2.1", "192.0.2.2")}}, "at most one of each family"},
		{"pattern", MeshConfig{Node: NodeAddress{Interface: "eth["}}, "pattern such as bond*"},
		{"cidr", MeshConfig{Node: NodeAddress{CIDRs: []netip.Prefix{{}}}}, "not a prefix"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := tt.cfg.complete()
			if (err == nil) != (tt.want == "") || (err != nil && !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

// What is decided depends on the peers, not on the order they are listed in.
func TestPlanMeshOrder(t *testing.T) {
	cfg := MeshConfig{}
	if err := cfg.complete(); err != nil {
		t.Fatal(err)
	}
	peers := thousandPeers()[:50]
	peers[7].PodCIDRs = peers[3].PodCIDRs
	self := Peer{Name: "n1", Addrs: addrs("192.0.2.1"), PodCIDRs: prefixes("10.244.1.0/24")}
	first, firstReport, err := cfg.planMesh(self, clonePeers(peers), testView())
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		rand.Shuffle(len(peers), func(i, j int) { peers[i], peers[j] = peers[j], peers[i] })
		again, report, err := cfg.planMesh(self, clonePeers(peers), testView())
		if err != nil || !reflect.DeepEqual(first, again) || !reflect.DeepEqual(firstReport, report) {
			t.Fatal("another order of peers gives another plan")
		}
	}
}

func TestVXLANMAC(t *testing.T) {
	seen := map[hwAddr]bool{}
	for _, p := range thousandPeers() {
		for _, a := range p.Addrs {
			mac := vxlanMAC(a)
			if mac[0]&1 != 0 || mac[0]&2 == 0 {
				t.Errorf("%s of %s is not unicast and locally administered", mac, a)
			}
			if seen[mac] {
				t.Errorf("%s twice", mac)
			}
			seen[mac] = true
		}
	}
	if got := vxlanMAC(netip.MustParseAddr("192.0.2.1")).String(); got != "ea:54:50:f2:3c:6c" {
		t.Errorf("192.0.2.1 has %s: nodes of different versions would not find each other", got)
	}
}
