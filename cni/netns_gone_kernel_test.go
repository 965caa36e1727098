package cni

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/nftcni/nftcni/ipam"
)

// TestKernelNamespaceGoneForTheRuntime lets go of a namespace's path while something still
// holds the namespace, so that its links stay: no DEL will come.
func TestKernelNamespaceGoneForTheRuntime(t *testing.T) {
	n := newNode(t)
	l := n.list("1.1.0", dualStack)
	before := n.snapshot()
	rt := n.runtime("a", n.pod("a"))
	n.mustAdd(l, rt)
	held, err := os.Open(rt.NetNS)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if gone := n.reconcile(); len(gone) != 0 {
		t.Errorf("reconcile removed %v, which lives", gone)
	}
	n.kill("a")
	if gone := n.reconcile(); len(gone) != 1 || gone[0].ContainerID != "a" {
		t.Errorf("reconcile removed %v, want a", gone)
	}
	n.same("a namespace without a path", before)
}

// TestKernelServedLeases has leases of nftcni-ipam, of this boot, and one pass of the agent.
func TestKernelServedLeases(t *testing.T) {
	n := newNode(t)
	alive := n.pod("alive")
	s, err := store(n.run, n.state, func(string) {})
	if err != nil {
		t.Fatal(err)
	}
	pool, err := ipam.NewRange(netip.MustParsePrefix("10.60.0.0/24"), netip.Addr{}, netip.Addr{}, netip.Addr{})
	if err != nil {
		t.Fatal(err)
	}
	rows := []struct {
		name, netns string
		stays       bool
	}{
		{name: "alive", netns: alive, stays: true},
		{name: "path gone", netns: filepath.Join(filepath.Dir(alive), "gone")},
		{name: "of a process", netns: "/proc/4194304/ns/net", stays: true},
		{name: "directory not shown", netns: n.dir + "/not-mounted/x", stays: true},
		{name: "none", netns: "", stays: true},
	}
	for _, r := range rows {
		if _, err := s.Acquire(t.Context(), ipam.Request{Owner: ipam.Owner{Network: "bridged", ContainerID: r.name, Interface: "eth0"},
			NetNS: r.netns, Pools: []ipam.Pool{{pool}}}); err != nil {
			t.Fatal(err)
		}
	}
	n.reconcile()
	leases, err := s.Leases(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rows {
		if has := slices.ContainsFunc(leases, func(l ipam.Lease) bool { return l.ContainerID == r.name }); has != r.stays {
			t.Errorf("%s (%q): leased %t after the agent's pass, want %t", r.name, r.netns, has, r.stays)
		}
	}
}
