package nft_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
)

// TestKernelWrongWay: a route that leads a pod's address to another pod's interface delivers nothing there.
func TestKernelWrongWay(t *testing.T) {
	w := newWorld(t)
	for _, a := range w.client.Addrs {
		own := &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}, Flags: unix.IFA_F_NODAD}
		if err := w.stranger.Do(func() error { return netlink.AddrAdd(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: 1}}, own) }); err != nil {
			t.Fatal(err)
		}
		wrong, err := netlink.LinkByName(w.stranger.Interface)
		if err != nil {
			t.Fatal(err)
		}
		via := wrong.Attrs().Index
		err = errors.Join(netlink.RouteReplace(&netlink.Route{LinkIndex: via, Dst: own.IPNet, Scope: netlink.SCOPE_LINK}),
			netlink.NeighSet(&netlink.Neigh{LinkIndex: via, IP: a.AsSlice(), HardwareAddr: w.stranger.MAC, State: netlink.NUD_PERMANENT}))
		if err != nil {
			t.Fatal(err)
		}
	}
	unheard(t, w, "10.9.0.2", "fd09::2")
}

// TestKernelOtherWays: what changes a packet's way or destination behind the back of output leads no more and no less.
func TestKernelOtherWays(t *testing.T) {
	needNft(t)
	w := newWorld(t)
	finish(t, w.table, apply(t, w.table, nft.Change{Unbind: bindings(true, w.stranger)}))
	heard := func(to netip.AddrPort) int64 {
		in := w.stranger.Sink(addr("10.9.0.3"), 9)
		_, _ = w.DialUDP(to).Write([]byte("x"))
		return in.Total()
	}
	nftFile(t, `table ip other {
	chain own { type nat hook output priority -100; udp dport 99 dnat to 10.9.0.3:9; ip daddr 10.9.0.2 udp dport 98 dnat to 10.9.0.1:80; }
	chain early { type nat hook postrouting priority srcnat - 1; ct status dnat masquerade; }
	chain marks { type route hook output priority mangle; ip daddr 192.0.2.9 udp dport 9 meta mark set 0x77; }
}`)
	if n := heard(at("192.0.2.9", 99)); n != 0 {
		t.Errorf("behind an earlier SNAT an unbound address heard %d datagrams", n)
	}
	want(t, "from the node to a pod's address that leads to another pod", w.UDP(at("10.9.0.2", 98)), true)
	wrong, err := netlink.LinkByName(w.stranger.Interface)
	if err != nil {
		t.Fatal(err)
	}
	rule := netlink.NewRule()
	rule.Mark, rule.Table = 0x77, 77
	all := &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}
	if err := errors.Join(netlink.RuleAdd(rule), netlink.RouteAdd(&netlink.Route{LinkIndex: wrong.Attrs().Index, Dst: all, Scope: netlink.SCOPE_LINK, Table: 77}),
		netlink.NeighSet(&netlink.Neigh{LinkIndex: wrong.Attrs().Index, IP: net.IPv4(192, 0, 2, 9), HardwareAddr: w.stranger.MAC, State: netlink.NUD_PERMANENT}),
		w.stranger.Do(func() error {
			return netlink.AddrAdd(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: 1}}, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(192, 0, 2, 9), Mask: net.CIDRMask(32, 32)}})
		})); err != nil {
		t.Fatal(err)
	}
	in := w.stranger.Sink(addr("192.0.2.9"), 9)
	_, _ = w.DialUDP(at("192.0.2.9", 9)).Write([]byte("x"))
	if n := in.Total(); n != 0 {
		t.Errorf("by a mark's route a pod heard %d datagrams that are not its own", n)
	}
}

// unheard: nothing that is sent to the addresses arrives at the stranger, which has them: not by forwarding, not from the
// node itself, and not from the node through a Service. A pod that answers nothing proves it: what it hears is counted.
func unheard(t *testing.T, w *world, addr4, addr6 string) {
	t.Helper()
	nftFile(t, fmt.Sprintf(`table inet service {
	chain own { type nat hook output priority -100; udp dport 99 dnat ip to %s:9; udp dport 99 dnat ip6 to [%s]:9; }
}`, addr4, addr6))
	for _, c := range []struct{ pod, service string }{{addr4, "192.0.2.9"}, {addr6, "2001:db8::9"}} {
		for name, send := range map[string]func() net.Conn{
			"outside":                    func() net.Conn { return w.outside.DialUDP(at(c.pod, 9)) },
			"its node":                   func() net.Conn { return w.DialUDP(at(c.pod, 9)) },
			"its node through a Service": func() net.Conn { return w.DialUDP(at(c.service, 99)) },
		} {
			in := w.stranger.Sink(addr(c.pod), 9)
			_, _ = send().Write([]byte("x"))
			if n := in.Total(); n != 0 {
				t.Errorf("the stranger heard %d datagrams to %s from %s", n, c.pod, name)
			}
		}
	}
	runNft(t, "delete", "table", "inet", "service")
}

// TestKernelOneWay: a connection that nobody answers is live as others are. Its second packet is not judged again, and a
// revocation ends it.
func TestKernelOneWay(t *testing.T) {
	w := newWorld(t)
	for _, a := range []string{"10.9.0.1", "fd09::1"} {
		w.server.Sink(addr(a), 8080)
	}
	port := policy.Key{Map: policy.AccessPort, X: classWeb, Protocol: policy.UDP, First: 8080}
	apply(t, w.table, nft.Change{Delta: policy.Delta{Steps: [][]policy.Op{{put(port, policy.CodeAllow)}}}})
	for _, c := range []struct {
		family, server string
	}{{"4", "10.9.0.1"}, {"6", "fd09::1"}} {
		flow := w.client.DialUDP(at(c.server, 8080))
		send := func() {
			if _, err := flow.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
		}
		send()
		// A table nobody would make: the port is closed without a revocation, so that only what is judged is denied.
		apply(t, w.table, nft.Change{Delta: policy.Delta{Steps: [][]policy.Op{{del(port)}}}})
		before := denials(t, c.family)
		send()
		if n := denials(t, c.family) - before; n != 0 {
			t.Errorf("IPv%s: the second packet of a live connection was judged again and denied", c.family)
		}
		r := apply(t, w.table, nft.Change{Delta: policy.Delta{Revokes: true, Steps: [][]policy.Op{{
			put(policy.Key{Map: policy.AccessPort, X: classWeb, Protocol: policy.SCTP, First: 1}, policy.CodeDeny)}}}})
		send()
		if n := denials(t, c.family) - before; n != 1 {
			t.Errorf("IPv%s: %d packets denied after the revocation, want 1", c.family, n)
		}
		finish(t, w.table, r)
		apply(t, w.table, nft.Change{Delta: policy.Delta{Steps: [][]policy.Op{{put(port, policy.CodeAllow)}}}})
	}
}

// denials are the packets that denied4 or denied6 has counted.
func denials(t *testing.T, family string) (total int) {
	t.Helper()
	for _, part := range strings.Split(runNft(t, "list", "set", "inet", nft.TableName, "denied"+family), "counter packets ")[1:] {
		var n int
		_, _ = fmt.Sscan(part, &n)
		total += n
	}
	return total
}
