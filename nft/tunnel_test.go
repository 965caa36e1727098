package nft_test

import (
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/nft/nfttest"
)

// vxlanDevice makes a VXLAN device of the node, over IPv6 with a local address of that family.
func vxlanDevice(t *testing.T, vni, port int, local net.IP) net.HardwareAddr {
	t.Helper()
	name := "vx" + strconv.Itoa(vni)
	link := &netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: name}, VxlanId: vni, Port: port, SrcAddr: local}
	if err := netlink.LinkAdd(link); err != nil {
		t.Skipf("no VXLAN here: %v", err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		t.Fatal(err)
	}
	l, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	return l.Attrs().HardwareAddr
}

// vxlan is a VXLAN message (RFC 7348) with a UDP datagram inside.
func vxlan(vni byte, mac net.HardwareAddr, src, dst string, port uint16) []byte {
	kind, inner := uint16(0x0800), ipv4
	packet := func() []byte { return inner(src, dst, unix.IPPROTO_UDP, udp(1, port)) }
	if addr(src).Is6() {
		kind = 0x86dd
		packet = func() []byte { return udp6(src, dst, port, 0) }
	}
	m := append([]byte{8, 0, 0, 0, 0, 0, vni, 0}, mac...)
	m = append(m, 2, 0, 0, 0, 0, 1)
	return append(binary.BigEndian.AppendUint16(m, kind), packet()...)
}

// TestKernelTunnels: a real VXLAN device takes what nodes send and nothing that pods or strangers do.
func TestKernelTunnels(t *testing.T) {
	needNft(t)
	const port = 4793
	w := newWorld(t)
	intruder := w.Outside("intruder", "203.0.113.7", "2001:db8:2::7")
	w.Await(intruder)
	macs := map[byte]net.HardwareAddr{7: vxlanDevice(t, 7, port, nil), 8: vxlanDevice(t, 8, port, net.ParseIP("2001:db8:1::1"))}
	nftFile(t, `table inet service { chain prerouting { type nat hook prerouting priority dstnat;
		ip daddr 10.96.0.1 udp dport 99 dnat ip to 198.51.100.1:4793
		ip6 daddr fd96::1 udp dport 99 dnat ip6 to [2001:db8:1::1]:4793
	}
}`)
	for _, f := range []struct {
		name                                    string
		vni                                     byte
		pod, inner, own, gateway, service, node string
	}{
		{"v4", 7, "10.9.0.3", "10.20.0.5", "198.51.100.1", "169.254.1.1", "10.96.0.1", "192.0.2.9"},
		{"v6", 8, "fd09::3", "fd20::5", "2001:db8:1::1", "2001:db8:1::2", "fd96::1", "2001:db8::9"},
	} {
		sends := func(from *nfttest.Host, to string, at16 uint16) (arrived int64) {
			sink := w.stranger.Sink(addr(f.pod), 7)
			c := from.DialUDP(at(to, at16))
			_, _ = c.Write(vxlan(f.vni, macs[f.vni], f.inner, f.pod, 7))
			_ = c.Close()
			return sink.Total()
		}
		other := func() int64 {
			sink := w.outside.Sink(addr(f.node), port)
			c := w.client.DialUDP(at(f.node, port))
			_, _ = c.Write([]byte("a pod"))
			_ = c.Close()
			return sink.Total()
		}
		check := func(when string, pods, strangers, nodes int64) {
			t.Helper()
			for _, c := range []struct {
				name string
				got  int64
				want int64
			}{
				{"pod to its node", sends(w.client, f.own, port), pods},
				{"pod to its gateway", sends(w.client, f.gateway, port), pods},
				{"pod by a Service", sends(w.client, f.service, 99), pods},
				{"pod to another node", other(), pods},
				{"stranger", sends(intruder, f.own, port), strangers},
				{"node", sends(w.outside, f.own, port), nodes},
			} {
				if c.got != c.want {
					t.Errorf("%s, %s, %s: %d packets arrived, want %d", f.name, when, c.name, c.got, c.want)
				}
			}
		}
		apply(t, w.table, nft.Change{Tunnels: &nft.Tunnels{}})
		check("unguarded", 1, 1, 1)
		apply(t, w.table, nft.Change{Tunnels: &nft.Tunnels{Ports: []uint16{port, 4794}, Nodes: []netip.Addr{addr("192.0.2.9"), addr("2001:db8::9")}}})
		check("guarded", 0, 0, 1)
	}
}

// TestKernelTunnelsAreState: they are read back, survive a restart without a write and a replaced table.
func TestKernelTunnelsAreState(t *testing.T) {
	needNft(t)
	namespace(t)
	table := open(t, nft.Options{})
	want := nft.Tunnels{Ports: []uint16{4793, 4794}, Nodes: []netip.Addr{addr("192.0.2.9"), addr("2001:db8::9")}}
	r := apply(t, table, nft.Change{Tunnels: &want})
	finish(t, table, r)
	before := state(t, table)
	if again := apply(t, table, nft.Change{Tunnels: &want}); again.Transactions != 0 {
		t.Errorf("the same tunnels took %d transactions", again.Transactions)
	}
	same := func(what string, s nft.State) {
		t.Helper()
		if !slices.Equal(s.Tunnels.Ports, want.Ports) || !slices.Equal(s.Tunnels.Nodes, want.Nodes) {
			t.Errorf("%s: %+v, want %+v", what, s.Tunnels, want)
		}
	}
	same("read back", before)
	_ = table.Close()
	adopted := open(t, nft.Options{})
	if s := state(t, adopted); s.Generation != before.Generation {
		t.Errorf("adopting wrote: generation %d to %d", before.Generation, s.Generation)
	}
	_ = adopted.Close()
	runNft(t, "flush", "chain", "inet", "nftcni", "tunnel")
	replaced := open(t, nft.Options{})
	same("replaced", state(t, replaced))
	want.Ports, want.Nodes = []uint16{4793}, want.Nodes[1:]
	apply(t, replaced, nft.Change{Tunnels: &want})
	same("narrowed", state(t, replaced))
	for _, bad := range []nft.Tunnels{{Ports: []uint16{0}}, {Nodes: []netip.Addr{{}}}} {
		if _, err := replaced.Apply(t.Context(), nft.Change{Tunnels: &bad}); err == nil {
			t.Errorf("%+v was accepted", bad)
		}
	}
}
