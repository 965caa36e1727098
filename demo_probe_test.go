package main

import (
	"net/netip"
	"testing"
	"time"

	"github.com/nftcni/nftcni/policy"
)

// TestKernelProbe proves what every other kernel test of this package relies on: an
// open port answers, one without a route to it is silent, over every protocol and
// both families, and a closed port is an error rather than a denial.
func TestKernelProbe(t *testing.T) { inFreshNode(t, testProbe) }

func testProbe(t *testing.T) {
	outside, err := newNetNS()
	if err != nil {
		t.Fatal(err)
	}
	v4, v6 := netip.MustParseAddr("203.0.113.10"), netip.MustParseAddr("2001:db8:ffff::10")
	if err := setUpNode(outside, []netip.Addr{v4, v6}); err != nil {
		t.Fatal(err)
	}
	self, err := ownNetNS()
	if err != nil {
		t.Fatal(err)
	}
	node := &endpoint{name: "node", netns: self, addrs: addrsOf(nodePrefixes)}
	world := &endpoint{name: "world", netns: outside, addrs: []netip.Addr{v4, v6}}
	services := []service{{policy.TCP, 80}, {policy.UDP, 53}, echo}
	for _, e := range []*endpoint{node, world} {
		if err := serve(t.Context(), e, services); err != nil {
			t.Fatal(err)
		}
	}
	var probes []*probe
	for _, s := range services {
		for _, pair := range [][2]*endpoint{{node, world}, {world, node}} {
			for _, a := range pair[0].families(pair[1]) {
				probes = append(probes, &probe{src: pair[0], dst: pair[1], from: a[0], to: a[1], service: s})
			}
		}
	}
	if err := newProber(2, 20*time.Second).run(t.Context(), probes); err != nil {
		t.Fatal(err)
	}
	for _, p := range probes {
		if !p.answered {
			t.Errorf("%s: silent, want an answer", p)
		}
	}
	pr := newProber(2, 300*time.Millisecond)
	closed := &probe{src: node, dst: world, from: nodePrefixes[0].Addr(), to: v4, service: service{policy.TCP, 81}}
	if err := newProber(2, 20*time.Second).run(t.Context(), []*probe{closed}); err == nil {
		t.Errorf("%s: no error, want a refused connection", closed)
	}
	// An address that nobody has: the outside host drops what is not for it.
	absent := netip.MustParseAddr("192.0.2.77")
	lost := &probe{src: node, dst: world, from: nodePrefixes[0].Addr(), to: absent, service: service{policy.UDP, 53}}
	if err := pr.run(t.Context(), []*probe{lost}); err != nil || lost.answered {
		t.Errorf("%s: answered %v, error %v, want silence", lost, lost.answered, err)
	}
}
