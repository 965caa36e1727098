package cni

import (
	"runtime"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// TestKernelLeftovers wants ours found and removed, and what only looks like ours left alone.
func TestKernelLeftovers(t *testing.T) {
	needNode(t)
	runtime.LockOSThread() // never unlocked: the thread stays in the new namespace
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	for _, name := range []string{"nft0123456789ab", "nft-foreign", "nftabcdefabcdeg"} {
		if err := h.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "p" + name[4:]}); err != nil {
			t.Fatal(err)
		}
	}
	if err := h.LinkAdd(&netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: "nftvxlan4"}, VxlanId: 157, Port: 4793}); err != nil {
		t.Fatal(err)
	}
	foreign, err := h.LinkByName("nft-foreign")
	if err != nil {
		t.Fatal(err)
	}
	if err := h.LinkSetUp(foreign); err != nil {
		t.Fatal(err)
	}
	for dst, protocol := range map[string]netlink.RouteProtocol{"10.1.0.0/24": RouteProtocol, "fd00:1::/64": RouteProtocol, "10.2.0.0/24": unix.RTPROT_STATIC} {
		prefix, err := netlink.ParseIPNet(dst)
		if err != nil {
			t.Fatal(err)
		}
		if err := h.RouteAdd(&netlink.Route{LinkIndex: foreign.Attrs().Index, Dst: prefix, Protocol: protocol}); err != nil {
			t.Fatal(dst, err)
		}
	}

	left, err := FindLeftovers(h)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"link nft0123456789ab", "link nftvxlan4", "route 10.1.0.0/24 table 254", "route fd00:1::/64 table 254"}
	if d := cmp.Diff(want, left.Strings()); d != "" {
		t.Errorf("found (-want +got):\n%s", d)
	}
	if err := left.Remove(h); err != nil {
		t.Fatal(err)
	}
	if err := left.Remove(h); err != nil {
		t.Errorf("removing what is gone: %v", err)
	}
	if again, err := FindLeftovers(h); err != nil || len(again.Strings()) != 0 {
		t.Errorf("afterwards: %v, %v", again.Strings(), err)
	}
	for _, name := range []string{"nft-foreign", "nftabcdefabcdeg"} {
		if _, err := h.LinkByName(name); err != nil {
			t.Errorf("link %s of somebody else: %v", name, err)
		}
	}
}
