package cni

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/vishvananda/netlink"
)

func TestKernelProbePath(t *testing.T) {
	for _, tt := range []struct {
		name   string
		narrow func(r *labNS) // the way from node 1 to node 3
		want   int
		small  bool
	}{
		{"as large as it says", func(*labNS) {}, 1500, false},
		{"a narrow link behind the router", func(r *labNS) { setMTU(r, "br2", 1400) }, 1400, true},
		{"a port that drops large frames and says nothing", func(r *labNS) {
			r.must(r.h.LinkSetMaster(r.link("port3"), r.link("br2")))
			setMTU(r, "port3", 1444)
			setMTU(r, "br2", 1500)
		}, 1448, true}, // a veth takes a VLAN tag more than its MTU
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t, dual, MeshConfig{})
			tt.narrow(l.router)
			l.nodes[0].set()
			for _, p := range l.nodes[0].mesh.Report().Paths {
				if p.Peer != "n3" {
					continue
				}
				var got PathProbe
				var err error
				for range 20 { // a busy machine may be late with every answer, so a result may be too low, never too high
					got, err = ProbePath(t.Context(), int(l.nodes[0].fd), p.Address, p.LinkMTU)
					if err != nil || got.Carries >= tt.want {
						break
					}
				}
				if err != nil || got.Carries != tt.want || got.TooSmall() != tt.small {
					t.Errorf("%+v, too small %t, %v; want %d", got, got.TooSmall(), err, tt.want)
				}
			}
			silent, err := ProbePath(t.Context(), int(l.nodes[0].fd), netip.MustParseAddr("192.168.2.77"), 1500)
			if err != nil || silent.Carries != 0 || silent.TooSmall() {
				t.Errorf("nobody answers: %+v, %v", silent, err)
			}
		})
	}
	for _, size := range []int{0, 575, 65536} {
		if _, err := ProbePath(t.Context(), 0, netip.MustParseAddr("127.0.0.1"), size); err == nil {
			t.Errorf("size %d is taken", size)
		}
	}
}

func setMTU(n *labNS, link string, mtu int) {
	n.t.Helper()
	if err := n.h.LinkSetMTU(n.link(link), mtu); err != nil {
		n.t.Fatal(fmt.Errorf("set MTU of %s to %d: %w", link, mtu, err))
	}
}

func TestKernelSetPodMTU(t *testing.T) {
	n := newNode(t)
	l, fixed := n.list("1.1.0", dualStack), n.list("1.1.0", `{"mtu": 1300, `+dualStack[1:])
	a, b := n.runtime("a", n.pod("a")), n.runtime("b", n.pod("b"))
	n.mustAdd(l, a) // 1450, as the agent says
	n.mustAdd(fixed, b)
	if err := SetPodMTU(t.Context(), n.run, 1450, 1400); err != nil {
		t.Fatal(err)
	}
	for _, want := range []struct {
		rt  *libcni.RuntimeConf
		mtu int
	}{{a, 1400}, {b, 1300}} {
		host, err := netlink.LinkByName(HostInterface(want.rt.ContainerID, want.rt.IfName))
		if err != nil {
			t.Fatal(err)
		}
		pod, err := podHandle(t, want.rt.NetNS).LinkByName(want.rt.IfName)
		if err != nil {
			t.Fatal(err)
		}
		if host.Attrs().MTU != want.mtu || pod.Attrs().MTU != want.mtu {
			t.Errorf("%s has %d on the node and %d inside, want %d", want.rt.ContainerID, host.Attrs().MTU, pod.Attrs().MTU, want.mtu)
		}
	}
	n.kill("b")
	if err := SetPodMTU(t.Context(), n.run, 1300, 1400); err != nil {
		t.Errorf("a pod whose namespace is gone: %v", err)
	}
	n.mustDel(l, a)
	n.mustDel(fixed, b)
}
