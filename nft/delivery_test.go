package nft_test

import (
	"errors"
	"fmt"
	"net"
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
