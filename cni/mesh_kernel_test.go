package cni

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestKernelMesh(t *testing.T) {
	one, routed, mixed := []int{1, 1, 1}, []int{1, 2, 3}, []int{1, 1, 2}
	tests := []struct {
		name string
		labShape
		mode   MeshMode
		near   string // how node 1 reaches node 2
		far    string // how node 1 reaches node 3
		far6   bool
		podMTU int // of node 1
	}{
		{name: "one link, v4", labShape: labShape{links: one, nodes4: true, pods4: true}, near: "direct", far: "direct", podMTU: 1500},
		{name: "one link, v6", labShape: labShape{links: one, nodes6: true, pods6: true}, near: "direct", far: "direct", podMTU: 1500},
		{name: "one link, dual", labShape: labShape{links: one, nodes4: true, nodes6: true, pods4: true, pods6: true}, near: "direct direct", far: "direct direct", podMTU: 1500},
		{name: "router, v4", labShape: labShape{links: routed, nodes4: true, pods4: true}, near: "vxlan", far: "vxlan", podMTU: 1450},
		{name: "router, v6", labShape: labShape{links: routed, nodes6: true, pods6: true}, near: "vxlan", far: "vxlan", podMTU: 1430},
		{name: "router, dual", labShape: labShape{links: routed, nodes4: true, nodes6: true, pods4: true, pods6: true}, near: "vxlan vxlan", far: "vxlan vxlan", podMTU: 1430},
		{name: "mixed, v4", labShape: labShape{links: mixed, nodes4: true, pods4: true}, near: "direct", far: "vxlan", podMTU: 1450},
		{name: "mixed, dual", labShape: labShape{links: mixed, nodes4: true, nodes6: true, pods4: true, pods6: true}, near: "direct direct", far: "vxlan vxlan", podMTU: 1430},
		{name: "v4 pods over v6 nodes", labShape: labShape{links: mixed, nodes6: true, pods4: true}, near: "vxlan", far: "vxlan", podMTU: 1430},
		{name: "v6 pods over v4 nodes", labShape: labShape{links: one, nodes4: true, pods6: true}, near: "vxlan", far: "vxlan", podMTU: 1450},
		{name: "dual pods over v4 nodes", labShape: labShape{links: mixed, nodes4: true, pods4: true, pods6: true}, near: "direct vxlan", far: "vxlan vxlan", podMTU: 1450},
		{name: "vxlan on one link", labShape: labShape{links: one, nodes4: true, nodes6: true, pods4: true, pods6: true}, mode: MeshVXLAN, near: "vxlan vxlan", far: "vxlan vxlan", podMTU: 1430},
		{name: "direct on one link", labShape: labShape{links: one, nodes4: true, pods4: true}, mode: MeshDirect, near: "direct", far: "direct", podMTU: 1500},
	}
	for _, tt := range tests {
		t.Run(strings.ReplaceAll(tt.name, " ", "_"), func(t *testing.T) {
			l := newLab(t, tt.labShape, MeshConfig{Mode: tt.mode})
			l.set()
			if near, far := l.via(0, 1), l.via(0, 2); near != tt.near || far != tt.far {
				t.Errorf("node 2 via %s, node 3 via %s; want %s and %s", near, far, tt.near, tt.far)
			}
			if got := l.nodes[0].mesh.MTU(); got != tt.podMTU {
				t.Errorf("MTU %d, want %d", got, tt.podMTU)
			}
			l.idle()
			l.talkAll()
		})
	}
}

// A port and a VNI of the user's are those of the device, and of the packets between the nodes.
func TestKernelMeshPortAndVNI(t *testing.T) {
	const port, vni = 6000, 77
	l := newLab(t, labShape{links: []int{1, 2, 3}, nodes4: true, pods4: true}, MeshConfig{Port: port, VNI: vni})
	stop := l.router.sniff(func(f []byte) bool { // Ethernet, IPv4, UDP, VXLAN
		return len(f) > 50 && f[14] == 0x45 && f[23] == unix.IPPROTO_UDP && binary.BigEndian.Uint16(f[36:]) == port && binary.BigEndian.Uint32(f[46:]) == vni<<8
	})
	l.set()
	l.talkAll()
	if frames, hits := stop(); hits == 0 {
		t.Errorf("none of %d frames was to port %d with VNI %d", frames, port, vni)
	}
	if d := l.nodes[0].link(VXLANDevice4).(*netlink.Vxlan); d.Port != port || d.VxlanId != vni {
		t.Errorf("the device has port %d and VNI %d", d.Port, d.VxlanId)
	}
}

var dual = labShape{links: []int{1, 1, 2}, nodes4: true, nodes6: true, pods4: true, pods6: true}

func TestKernelMeshHeals(t *testing.T) {
	tests := []struct {
		name   string
		spoil  func(n *labNode)
		before bool // Run starts
	}{
		{"vxlan device deleted", func(n *labNode) { n.must(n.h.LinkDel(n.link(VXLANDevice4))) }, false},
		{"vxlan device down", func(n *labNode) { n.must(n.h.LinkSetDown(n.link(VXLANDevice6))) }, false},
		{"vxlan device with another mtu", func(n *labNode) { n.must(n.h.LinkSetMTU(n.link(VXLANDevice4), 1300)) }, false},
		{"vxlan device with another mac", func(n *labNode) {
			n.must(n.h.LinkSetHardwareAddr(n.link(VXLANDevice4), net.HardwareAddr{2, 0, 0, 0, 0, 1}))
		}, false},
		{"vxlan device with another vni", func(n *labNode) {
			n.must(n.h.LinkDel(n.link(VXLANDevice4)))
			attrs := netlink.NewLinkAttrs()
			attrs.Name = VXLANDevice4
			n.must(n.h.LinkAdd(&netlink.Vxlan{LinkAttrs: attrs, VxlanId: 99, Port: 9999}))
		}, true},
		{"host address removed", func(n *labNode) { n.unaddr(VXLANDevice4, "10.244.1.0/32") }, false},
		{"direct route deleted", func(n *labNode) { n.unroute("10.244.2.0/24", meshMetric) }, false},
		{"vxlan route deleted", func(n *labNode) { n.unroute("fd01:3::/64", meshMetric) }, false},
		{"fence deleted", func(n *labNode) { n.unroute("10.244.1.0/24", fenceMetric) }, false},
		{"neighbour deleted", func(n *labNode) {
			n.must(n.h.NeighDel(tunnelNeigh(n.link(VXLANDevice4).Attrs().Index, netip.MustParseAddr("10.244.3.0"), hwAddr{})))
		}, false},
		{"forwarding entry deleted", func(n *labNode) {
			remote := netip.MustParseAddr("192.168.2.3")
			n.must(n.h.NeighDel(fdbEntry(n.link(VXLANDevice4).Attrs().Index, vxlanMAC(remote), remote)))
		}, false},
		{"forwarding entry added", func(n *labNode) {
			n.must(n.h.NeighSet(fdbEntry(n.link(VXLANDevice4).Attrs().Index, hwAddr{2, 0, 0, 0, 0, 9}, netip.MustParseAddr("192.168.2.9"))))
		}, false},
		{"uplink flapped", func(n *labNode) {
			n.must(n.h.LinkSetDown(n.link("eth0")))
			n.up("eth0")
			n.addr("eth0", "fd00:1::1/64") // the kernel removes IPv6 addresses of a link that is set down
			n.route("0.0.0.0/0", "192.168.1.254", "eth0")
			n.route("::/0", "fd00:1::fe", "eth0")
		}, false},
	}
	for _, tt := range tests {
		t.Run(strings.ReplaceAll(tt.name, " ", "_"), func(t *testing.T) {
			l := newLab(t, dual, MeshConfig{})
			l.set()
			n := l.nodes[0]
			want := n.dump()
			if tt.before {
				tt.spoil(n)
			}
			reports := n.run()
			if !tt.before {
				tt.spoil(n)
			}
			n.untilDump(reports, want)
			l.talkAll()
		})
	}
}

// dump is what the mesh has in the kernel, and what others have in the main table.
func (n *labNode) dump() string {
	n.t.Helper()
	v, err := n.mesh.readLinks()
	n.must(err)
	w := &meshWriter{Mesh: n.mesh, ctx: n.t.Context(), view: v}
	var list []string
	routes, err := n.mesh.readRoutes(v)
	n.must(err)
	for k, r := range routes {
		list = append(list, fmt.Sprintf("route %v %+v", k, r))
	}
	for _, name := range []string{VXLANDevice4, VXLANDevice6} {
		link, ok := v.links[name]
		if !ok {
			continue
		}
		a := link.Attrs()
		x := link.Link.(*netlink.Vxlan)
		list = append(list, fmt.Sprintf("device %s %s mtu %d up %t vni %d port %d local %s", name, a.HardwareAddr, a.MTU, a.RawFlags&unix.IFF_UP != 0, x.VxlanId, x.Port, x.SrcAddr))
		e, err := w.readEntries(a.Index)
		n.must(err)
		for mac, remote := range e.fdb {
			list = append(list, fmt.Sprintf("%s fdb %s %s", name, mac, remote))
		}
		for gateway, mac := range e.neigh {
			list = append(list, fmt.Sprintf("%s neighbour %s %s", name, gateway, mac))
		}
		addrs, err := again(func() ([]netlink.Addr, error) { return n.h.AddrList(link.Link, netlink.FAMILY_ALL) })
		n.must(err)
		for _, a := range addrs {
			list = append(list, fmt.Sprintf("%s address %s", name, a.IPNet))
		}
	}
	slices.Sort(list)
	return strings.Join(list, "\n")
}

// untilDump waits for passes until the kernel holds what is wanted.
func (n *labNode) untilDump(reports <-chan Report, want string) {
	n.t.Helper()
	for range 100 {
		if n.dump() == want {
			return
		}
		select {
		case <-reports:
		case <-time.After(5 * time.Second):
			n.t.Fatalf("not healed (-want +have):\n%s", cmp.Diff(want, n.dump()))
		}
	}
	n.t.Fatalf("never healed (-want +have):\n%s", cmp.Diff(want, n.dump()))
}

func (n *labNode) unroute(dst string, metric int) {
	n.t.Helper()
	n.must(n.h.RouteDel(&netlink.Route{Dst: ipNet(netip.MustParsePrefix(dst)), Priority: metric}))
}

func TestKernelMeshPeers(t *testing.T) {
	l := newLab(t, dual, MeshConfig{})
	n := l.nodes[0]
	if err := exchange(n.pod, l.nodes[2].pod, l.nodes[2].pods[0], n.pods[0]); err == nil {
		t.Fatal("pods reach each other without a mesh: this test proves nothing")
	}
	empty := n.dump()
	l.set()
	full := n.dump()

	all := n.peers
	n.peers = all[:2]
	n.set()
	if d := n.dump(); strings.Contains(d, "10.244.3.") || strings.Contains(d, "192.168.2.3") || strings.Contains(d, "vxlan") {
		t.Errorf("after node 3 left:\n%s", d)
	}
	if err := exchange(n.pod, l.nodes[2].pod, l.nodes[2].pods[0], n.pods[0]); err == nil {
		t.Error("a node that left is still reached")
	}
	n.peers = all
	n.set()
	if d := cmp.Diff(full, n.dump()); d != "" {
		t.Errorf("node 3 came back differently:\n%s", d)
	}
	l.talkAll()

	n.must(n.mesh.Cleanup(t.Context()))
	if d := cmp.Diff(empty, n.dump()); d != "" {
		t.Errorf("Cleanup left:\n%s", d)
	}
}

func TestKernelMeshAddressChanges(t *testing.T) {
	l := newLab(t, dual, MeshConfig{})
	l.set()
	moved := l.nodes[2]
	moved.unaddr("eth0", "192.168.2.3/24")
	moved.addr("eth0", "192.168.2.33/24")
	moved.route("0.0.0.0/0", "192.168.2.254", "eth0")
	for _, n := range l.nodes {
		n.peers[2].Addrs = []netip.Addr{netip.MustParseAddr("192.168.2.33"), moved.self.Addrs[1]}
	}
	moved.self = moved.peers[2]
	l.set()
	for _, n := range l.nodes {
		if d := n.dump(); strings.Contains(d, "192.168.2.3 ") {
			t.Errorf("%s still knows the old address:\n%s", n.self.Name, d)
		}
	}
	l.idle()
	l.talkAll()
}

// A second link to the far node makes its address a neighbour: the path becomes direct, and VXLAN
// again when the link goes.
func TestKernelMeshRedecides(t *testing.T) {
	l := newLab(t, labShape{links: []int{1, 1, 2}, nodes4: true, pods4: true}, MeshConfig{})
	l.set()
	for _, n := range l.nodes {
		n.sysctl("ipv4/conf/all/rp_filter", "0") // node 3's answers keep coming over VXLAN
		n.sysctl("ipv4/conf/eth0/rp_filter", "0")
		if n != l.nodes[0] {
			n.sysctl("ipv4/conf/"+VXLANDevice4+"/rp_filter", "0")
		}
	}
	n := l.nodes[0]
	reports := n.run()
	n.addr("eth0", "192.168.2.101/24")
	until(t, reports, "direct", func(Report) bool { return l.via(0, 2) == "direct" })
	n.unaddr("eth0", "192.168.2.101/24")
	until(t, reports, "vxlan", func(Report) bool { return l.via(0, 2) == "vxlan" })
	for i, other := range l.nodes[:2] { // all of the link, or frames are lost in it
		port := l.router.link(fmt.Sprint("port", i+1))
		l.router.must(l.router.h.LinkSetMTU(port, 1400))
		other.must(other.h.LinkSetMTU(other.link("eth0"), 1400))
	}
	until(t, reports, "MTU 1350", func(r Report) bool { return r.MTU == 1350 })
	if got := n.link(VXLANDevice4).Attrs().MTU; got != 1350 {
		t.Errorf("MTU of the device %d, want 1350", got)
	}
	l.nodes[1].set()
	l.talkAll()
}

// An agent that starts with another configuration leads every path another way, of each family, and
// finds the routes of the one before.
func TestKernelMeshChangesPaths(t *testing.T) {
	l := newLab(t, labShape{links: []int{1, 1, 1}, nodes4: true, nodes6: true, pods4: true, pods6: true}, MeshConfig{})
	all := slices.Clone(l.nodes[0].peers)
	steps := []struct {
		name     string
		mode     MeshMode
		families []int // of the addresses that the nodes have
		via      string
		devices  string // of the routes to 10.244.2.0/24 and fd01:2::/64 on node 1
	}{
		{"direct", MeshAuto, []int{0, 1}, "direct direct", "eth0 eth0"},
		{"direct to vxlan", MeshVXLAN, []int{0, 1}, "vxlan vxlan", VXLANDevice4 + " " + VXLANDevice6},
		{"IPv6 into the device of IPv4", MeshVXLAN, []int{0}, "vxlan vxlan", VXLANDevice4 + " " + VXLANDevice4},
		{"both into the device of IPv6", MeshVXLAN, []int{1}, "vxlan vxlan", VXLANDevice6 + " " + VXLANDevice6},
		{"vxlan to direct, IPv4 alone", MeshAuto, []int{0}, "direct vxlan", "eth0 " + VXLANDevice4},
		{"vxlan to direct", MeshAuto, []int{0, 1}, "direct direct", "eth0 eth0"},
	}
	for _, step := range steps {
		for i, n := range l.nodes {
			n.mesh.Close()
			m, err := NewMesh(MeshConfig{Mode: step.mode, NetNS: int(n.fd), StateDir: n.state})
			n.must(err)
			t.Cleanup(m.Close)
			for j := range n.peers {
				n.peers[j].Addrs = nil
				for _, f := range step.families {
					n.peers[j].Addrs = append(n.peers[j].Addrs, all[j].Addrs[f])
				}
			}
			n.mesh, n.self = m, n.peers[i]
		}
		l.set()
		n := l.nodes[0]
		var devices []string
		for _, dst := range []string{"10.244.2.0/24", "fd01:2::/64"} {
			dev := "none"
			v, err := n.mesh.readLinks()
			n.must(err)
			routes, err := n.mesh.readRoutes(v)
			n.must(err)
			if r, ok := routes[routeKey{netip.MustParsePrefix(dst), meshMetric}]; ok {
				dev = r.link
			}
			devices = append(devices, dev)
		}
		if got := strings.Join(devices, " "); got != step.devices || l.via(0, 1) != step.via {
			t.Errorf("%s: %s by %s, want %s by %s", step.name, l.via(0, 1), got, step.via, step.devices)
		}
		l.idle()
		l.talkAll()
	}
}

func TestKernelMeshLeavesOthersAlone(t *testing.T) {
	l := newLab(t, dual, MeshConfig{})
	n := l.nodes[0]
	n.route("10.99.0.0/16", "192.168.1.2", "eth0")
	foreign := netlink.Route{Dst: ipNet(netip.MustParsePrefix("10.244.3.0/24")), LinkIndex: n.link("eth0").Attrs().Index,
		Gw: net.IPv4(192, 168, 1, 254), Priority: meshMetric, Protocol: unix.RTPROT_STATIC}
	n.must(n.h.RouteAdd(&foreign))
	_, err := n.mesh.Set(t.Context(), n.self, n.peers)
	if err == nil || !strings.Contains(err.Error(), "route of another program") {
		t.Errorf("a foreign route in the way gives %v", err)
	}
	n.must(n.mesh.Cleanup(t.Context()))
	for _, dst := range []string{"10.99.0.0/16", "10.244.3.0/24", "10.244.1.7/32"} {
		r, err := n.h.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Dst: ipNet(netip.MustParsePrefix(dst))}, netlink.RT_FILTER_DST)
		if err != nil || len(r) != 1 {
			t.Errorf("route to %s: %v, %v", dst, r, err)
		}
	}
}

// A thousand peers, half of them on a link of ours.
func TestKernelMeshThousandPeers(t *testing.T) {
	l := newLab(t, labShape{links: []int{1}, nodes4: true, nodes6: true, pods4: true, pods6: true}, MeshConfig{})
	n := l.nodes[0]
	n.addr("eth0", "192.169.0.1/16", "fd02::1/64")
	n.peers = thousandPeers()
	for _, step := range []struct {
		name  string
		peers []Peer
		least int
	}{{"all", n.peers, 1000}, {"again", n.peers, 0}, {"one less", n.peers[1:], 1}, {"none", nil, 1000}} {
		n.peers = step.peers
		start, cpu := time.Now(), cpuTime()
		r := n.set()
		t.Logf("%s: %d writes, %v, CPU %v", step.name, r.Writes, time.Since(start).Round(time.Millisecond), cpuTime()-cpu)
		if r.Writes < step.least || (step.least == 0 && r.Writes != 0) {
			t.Errorf("%s: %d writes", step.name, r.Writes)
		}
	}
}

func thousandPeers() []Peer {
	var peers []Peer
	for i := range 1000 {
		hi, lo := byte(i>>8), byte(i)
		p := Peer{Name: fmt.Sprintf("peer%04d", i), PodCIDRs: []netip.Prefix{
			netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 100 + hi, lo, 0}), 24), netip.MustParsePrefix(fmt.Sprintf("fd03:%x::/64", i))}}
		if i%2 == 0 {
			p.Addrs = []netip.Addr{netip.AddrFrom4([4]byte{192, 169, hi + 1, lo}), netip.MustParseAddr(fmt.Sprintf("fd02::1:%x", i))}
		} else {
			p.Addrs = []netip.Addr{netip.AddrFrom4([4]byte{172, 16, hi, lo}), netip.MustParseAddr(fmt.Sprintf("fd09::1:%x", i))}
		}
		peers = append(peers, p)
	}
	return peers
}

func cpuTime() time.Duration {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()).Round(time.Millisecond)
}

// What pods and their links do all day wakes nobody; what a path depends on does.
func TestKernelMeshIgnoresPods(t *testing.T) {
	l := newLab(t, dual, MeshConfig{})
	l.set()
	n := l.nodes[0]
	conn, err := listenMesh(int(n.fd))
	n.must(err)
	defer conn.Close()
	// heard tells whether anything that is done matters. A foreign route is the last message.
	last := byte(0)
	heard := func(do func()) bool {
		do()
		last++
		n.route(fmt.Sprintf("203.0.113.%d/32", last), "192.168.1.254", "eth0")
		matters := 0
		for {
			msgs, err := conn.Receive()
			n.must(err)
			for _, msg := range msgs {
				if !n.mesh.matters(msg) {
					continue
				}
				if matters++; bytes.Contains(msg.Data, []byte{203, 0, 113, last}) {
					return matters > 1
				}
			}
		}
	}
	pod := newLabNS(t)
	const veth = "nft0000000000ff"
	podComesAndGoes := func() {
		n.wire(veth, pod, "eth0")
		n.addr(veth, "fe80::1/64")
		r := netlink.Route{Dst: hostNet(netip.MustParseAddr("10.244.1.9")), LinkIndex: n.link(veth).Attrs().Index, Scope: netlink.SCOPE_LINK, Protocol: RouteProtocol}
		n.must(n.h.RouteAdd(&r))
		n.must(n.h.NeighSet(&netlink.Neigh{LinkIndex: n.link(veth).Attrs().Index, Family: unix.AF_INET, State: netlink.NUD_PERMANENT, IP: net.IPv4(10, 244, 1, 9), HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 1}}))
		n.must(n.h.RouteDel(&r))
		n.must(n.h.LinkDel(n.link(veth)))
	}
	// The lab's own links still report their carrier a while after they were made.
	const tries, enough = 200, 5
	quiet := 0
	for range tries {
		if !heard(podComesAndGoes) {
			quiet++
		}
		if quiet == enough {
			break
		}
	}
	if quiet < enough {
		t.Errorf("%d of %d pods that come and go wake the mesh", tries-quiet, tries)
	}
	for name, do := range map[string]func(){
		"a link":     func() { n.must(n.h.LinkSetMTU(n.link("eth0"), 1490)) },
		"an address": func() { n.addr("eth0", "192.168.7.1/24") },
		"our route":  func() { n.unroute("10.244.2.0/24", meshMetric) },
		"our entry": func() {
			n.must(n.h.NeighDel(tunnelNeigh(n.link(VXLANDevice4).Attrs().Index, netip.MustParseAddr("10.244.3.0"), hwAddr{})))
		},
	} {
		if !heard(do) {
			t.Errorf("%s that changes wakes nobody", name)
		}
	}
}

// What counts as a link of ours is the kernel's answer, route by route.
func TestKernelMeshLookup(t *testing.T) {
	l := newLab(t, labShape{links: []int{1, 1}, nodes4: true, nodes6: true}, MeshConfig{})
	n := l.nodes[0]
	n.wire("eth1", newLabNS(t), "far")
	n.addr("eth1", "192.168.9.1/24", "192.168.8.1/32")
	n.must(n.h.LinkSetMTU(n.link("eth1"), 1400))
	dev := func(dst, link string) netlink.Route {
		return netlink.Route{Dst: ipNet(netip.MustParsePrefix(dst)), LinkIndex: n.link(link).Attrs().Index, Scope: netlink.SCOPE_LINK}
	}
	via := func(dst, link, gateway string) netlink.Route {
		r := dev(dst, link)
		r.Gw, r.Scope = netip.MustParseAddr(gateway).AsSlice(), netlink.SCOPE_UNIVERSE
		return r
	}
	narrow := via("203.0.113.0/24", "eth0", "192.168.1.254")
	narrow.MTU = 1300
	many := netlink.Route{Dst: ipNet(netip.MustParsePrefix("198.51.100.0/24")), MultiPath: []*netlink.NexthopInfo{
		{LinkIndex: n.link("eth0").Attrs().Index, Gw: net.IPv4(192, 168, 1, 254)}, {LinkIndex: n.link("eth1").Attrs().Index, Gw: net.IPv4(192, 168, 9, 254)}}}
	none := netlink.Route{Dst: ipNet(netip.MustParsePrefix("198.18.0.0/24")), Type: unix.RTN_UNREACHABLE}
	for _, r := range []netlink.Route{narrow, many, none, dev("192.168.8.0/24", "eth1"), dev("198.18.1.0/24", "lo")} {
		n.must(n.h.RouteAdd(&r))
	}
	for _, tt := range []struct {
		name, addr string
		want       meshPath
		fails      bool
	}{
		{name: "connected", addr: "192.168.1.2", want: meshPath{link: "eth0", mtu: 1500, onLink: true}},
		{name: "connected, v6", addr: "fd00:1::2", want: meshPath{link: "eth0", mtu: 1500, onLink: true}},
		{name: "link route without a connected prefix", addr: "192.168.8.7", want: meshPath{link: "eth1", mtu: 1400, onLink: true}},
		{name: "default route", addr: "192.0.2.1", want: meshPath{link: "eth0", mtu: 1500}},
		{name: "default route, v6", addr: "2001:db8::1", want: meshPath{link: "eth0", mtu: 1500}},
		{name: "route with an MTU", addr: "203.0.113.5", want: meshPath{link: "eth0", mtu: 1300}},
		{name: "several next hops, the least MTU", addr: "198.51.100.5", want: meshPath{link: "eth1", mtu: 1400}},
		{name: "loopback", addr: "198.18.1.5", want: meshPath{link: "lo", mtu: 65536}},
		{name: "our own", addr: "192.168.1.1", want: meshPath{link: "eth0", mtu: 1500, local: true}},
		{name: "unreachable", addr: "198.18.0.5", fails: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			v, err := n.mesh.readLinks()
			n.must(err)
			got := v.path(netip.MustParseAddr(tt.addr))
			if (got.err != nil) != tt.fails {
				t.Fatalf("error %v", got.err)
			}
			got.err = nil
			if tt.want.local {
				got.onLink, tt.want.link, tt.want.mtu = false, got.link, got.mtu
			}
			if got != tt.want {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
		})
	}
}
