package nft_test

import (
	"errors"
	"net/netip"
	"os"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/nft/nfttest"
)

// bridged makes a host's uplink a port of a bridge that takes over its addresses and routes, as on a
// node whose uplink carries virtual machines.
func bridged(t *testing.T, name string, h *nfttest.Host) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	port, err := netlink.LinkByName(h.Interface)
	must(err)
	addrs, err := netlink.AddrList(port, netlink.FAMILY_ALL)
	must(err)
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr = name, port.Attrs().HardwareAddr
	bridge := &netlink.Bridge{LinkAttrs: attrs}
	must(netlink.LinkAdd(bridge))
	must(netlink.LinkSetMaster(port, bridge))
	must(netlink.LinkSetUp(bridge))
	for _, a := range addrs {
		if a.IP.IsLinkLocalUnicast() {
			continue // each link makes its own from the hardware address, which both share, when it comes up
		}
		must(netlink.AddrDel(port, &a))
		must(netlink.AddrAdd(bridge, &netlink.Addr{IPNet: a.IPNet, Flags: unix.IFA_F_NODAD, Scope: a.Scope}))
	}
	for _, a := range h.Addrs {
		to := netlink.NewIPNet(a.AsSlice())
		must(netlink.RouteReplace(&netlink.Route{LinkIndex: bridge.Attrs().Index, Dst: to, Scope: netlink.SCOPE_LINK}))
		must(netlink.NeighSet(&netlink.Neigh{LinkIndex: bridge.Attrs().Index, IP: a.AsSlice(), HardwareAddr: h.MAC, State: netlink.NUD_PERMANENT}))
	}
}

// TestKernelBridgedUplink: policy, masquerade and the guards are the same where the uplink is a
// bridge, whether br_netfilter shows bridged packets to our hooks or not.
func TestKernelBridgedUplink(t *testing.T) {
	for _, call := range []string{"off", "on"} {
		t.Run("br_netfilter_"+call, func(t *testing.T) {
			w := newWorld(t)
			bridged(t, "br0", w.outside)
			value := map[string]string{"off": "0", "on": "1"}[call]
			for _, key := range []string{"net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables"} {
				if _, err := os.Stat("/proc/sys/" + key); errors.Is(err, os.ErrNotExist) {
					t.Logf("%s: br_netfilter is not loaded, which is off", key)
					continue
				}
				nfttest.Sysctl(t, key, value)
			}
			for _, a := range []string{"10.9.0.1", "fd09::1"} {
				want(t, "allowed client "+a, w.client.TCP(at(a, 80)), true)
				want(t, "stranger "+a, w.stranger.TCP(at(a, 80)), false)
				want(t, "outside "+a, w.outside.TCP(at(a, 80)), false)
			}
			for _, a := range []string{"192.0.2.9", "2001:db8::9"} {
				w.outside.EchoTCP(addr(a), 99)
				w.outside.EchoUDP(addr(a), 99)
				want(t, "masqueraded to "+a, w.client.TCP(at(a, 99)), true)
				want(t, "masqueraded to "+a+", UDP", w.client.UDP(at(a, 99)), true)
			}
			w.stranger.EchoTCP(addr("10.9.0.3"), 99)
			want(t, "outside to an open pod", w.outside.TCP(netip.AddrPortFrom(addr("10.9.0.3"), 99)), true)
			in := w.server.Sink(addr("10.9.0.1"), 8)
			if err := sendRaw(w.outside, ipv4("10.9.0.2", "10.9.0.1", unix.IPPROTO_UDP, udp(1, 80))); err != nil {
				t.Fatal(err)
			}
			if n := in.Total(); n != 0 {
				t.Errorf("%d packets with a pod's address came in over the bridge", n)
			}
		})
	}
}
