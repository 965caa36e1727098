package cni

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const dualStack = `{"ipam": {"type": "nftcni-ipam", "ranges": [[{"subnet": "10.22.0.0/24"}], [{"subnet": "fd00:22::/64"}]]}}`

func TestKernelAddDel(t *testing.T) {
	for _, version := range []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		t.Run(version, func(t *testing.T) {
			n := newNode(t)
			before := n.snapshot()
			n.agent.onAttach = func(a Attachment) {
				h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
				if err != nil {
					t.Error(err)
					return
				}
				defer h.Close()
				if _, err := h.LinkByName(a.HostInterface); err != nil {
					t.Errorf("when the agent is asked: %v", err)
				}
				if routes, err := ourRoutes(h); err != nil || len(routes) != 0 && a.Pod == "a" {
					t.Errorf("routes before the policy is in force: %v, %v", routes, err)
				}
			}
			l := n.list(version, dualStack)
			a, b := n.runtime("a", n.pod("a")), n.runtime("b", n.pod("b"))
			resA, resB := n.mustAdd(l, a), n.mustAdd(l, b)
			if len(resA.IPs) != 2 || len(resA.Interfaces) != 2 || len(resA.Routes) != 2 {
				t.Fatalf("result %v", resA)
			}
			if got := resA.IPs[0].Address.String(); got != "10.22.0.1/32" {
				t.Errorf("first address %s, want 10.22.0.1/32", got)
			}
			if resA.Interfaces[1].Sandbox != a.NetNS || *resA.IPs[0].Interface != 1 {
				t.Errorf("the address is not on the pod's interface: %v", resA)
			}
			for _, ip := range resB.IPs {
				n.talk(a.NetNS, b.NetNS, ip.Address.IP.String())
			}
			n.mustDel(l, a)
			n.mustDel(l, a)
			n.mustDel(l, b)
			n.same("ADD and DEL", before)
		})
	}
}

func TestKernelPodSide(t *testing.T) {
	n := newNode(t)
	l := n.list("1.1.0", `{"mtu": 1400, "ipMasq": true, "sysctl": {"net.ipv4.conf.IFNAME.arp_filter": "1"},
		"args": {"cni": {"labels": [{"key": "app", "value": "web"}]}}, `+dualStack[1:])
	rt := n.runtime("a", n.pod("a"))
	rt.CapabilityArgs = map[string]any{}
	n.mustAdd(l, rt)
	h := podHandle(t, rt.NetNS)
	link, err := h.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	if link.Attrs().MTU != 1400 || link.Attrs().HardwareAddr.String() != podMAC("a", "eth0").String() {
		t.Errorf("mtu %d, MAC %s", link.Attrs().MTU, link.Attrs().HardwareAddr)
	}
	addrs, err := h.AddrList(link, netlink.FAMILY_V6)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		// The link-local address is the kernel's own: its DAD, though off, passes through a work queue.
		if a.Flags&unix.IFA_F_TENTATIVE != 0 && !a.IP.IsLinkLocalUnicast() {
			t.Errorf("%s is tentative", a)
		}
	}
	inside(t, rt.NetNS, func() error {
		bad, err := differing(append(podSettings("eth0", true), setting{"/proc/sys/net/ipv4/conf/eth0/arp_filter", "1"}))
		if len(bad) > 0 {
			t.Error(bad)
		}
		return err
	})
	got := n.agent.attached[HostInterface("a", "eth0")]
	if !got.Masquerade || got.Labels["app"] != "web" || got.Namespace != "default" || got.Pod != "a" || got.UID != "uid-a" ||
		len(got.Pools) != 2 || got.Pools[0] != netip.MustParsePrefix("10.22.0.0/24") {
		t.Errorf("attached as %+v", got)
	}
	live, err := LiveLinks(t.Context())
	if err != nil || live[got.HostInterface].Alias != "default/a a" || !live[got.HostInterface].Up {
		t.Errorf("host link %+v, %v", live, err)
	}
	if list, errs := Attachments(n.run); len(list) != 1 || len(errs) != 0 {
		t.Errorf("attachments %v, %v", list, errs)
	}
	n.mustDel(l, rt)
}

func TestKernelAgentSays(t *testing.T) {
	for _, tt := range []struct {
		name    string
		prepare func(*node)
		add     uint
		status  uint
		message string
	}{
		{name: "absent", prepare: func(n *node) { n.agent.stop() }, add: 11, status: 50, message: "start it"},
		{name: "not ready", prepare: func(n *node) { n.agent.ready = Ready{Reason: "no table yet"} }, add: 11, status: 50, message: "no table yet"},
		{name: "table broken", prepare: func(n *node) { n.agent.ready = Ready{Reason: "commit refused", Limited: true} }, add: 11, status: 51, message: "commit refused"},
		{name: "refuses", prepare: func(n *node) { n.agent.refuse[PathAttach] = &Error{Code: 11, Message: "pod unknown"} }, add: 11, message: "pod unknown"},
		{name: "broken", prepare: func(n *node) { n.agent.refuse[PathAttach] = &Error{Message: "kernel said no"} }, add: 999, message: "kernel said no"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := newNode(t)
			before := n.snapshot()
			tt.prepare(n)
			l := n.list("1.1.0", dualStack)
			rt := n.runtime("a", n.pod("a"))
			_, err := n.add(l, rt)
			if code(err) != tt.add || !strings.Contains(err.Error(), tt.message) {
				t.Errorf("ADD: got %v (code %d), want code %d and %q", err, code(err), tt.add, tt.message)
			}
			n.same("a refused ADD", before)
			if err := n.cni.GetStatusNetworkList(t.Context(), l); code(err) != tt.status {
				t.Errorf("STATUS: got %v (code %d), want code %d", err, code(err), tt.status)
			}
			n.mustDel(l, rt)
		})
	}
}
