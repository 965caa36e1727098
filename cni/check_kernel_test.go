package cni

import (
	"context"
	"encoding/json"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/ipam"
)

func TestKernelCheck(t *testing.T) {
	for _, tt := range []struct {
		name   string
		damage func(t *testing.T, n *node, host, pod *netlink.Handle, a Attachment)
		want   string // in the message; empty: CHECK succeeds
	}{
		{name: "nothing", damage: func(*testing.T, *node, *netlink.Handle, *netlink.Handle, Attachment) {}},
		{name: "host route", want: "route 10.22.0.1/32 is missing on the node", damage: func(t *testing.T, _ *node, host, _ *netlink.Handle, a Attachment) {
			l := must(host.LinkByName(a.HostInterface))
			check(t, delHostRoutes(host, l.Attrs().Index, a.Addresses[:1]))
		}},
		{name: "pod route", want: "route ::/0 is missing in the pod", damage: func(t *testing.T, _ *node, _, pod *netlink.Handle, a Attachment) {
			l := must(pod.LinkByName("eth0"))
			check(t, pod.RouteDel(&netlink.Route{LinkIndex: l.Attrs().Index, Family: unix.AF_INET6, Dst: &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}}))
		}},
		{name: "address", want: "address fd00:22::1 is missing in the pod", damage: func(t *testing.T, _ *node, _, pod *netlink.Handle, a Attachment) {
			check(t, pod.AddrDel(must(pod.LinkByName("eth0")), podAddress(a.Addresses[1])))
		}},
		{name: "pod neighbour", want: "neighbour 169.254.1.1 is missing or changed in the pod", damage: func(t *testing.T, _ *node, _, pod *netlink.Handle, a Attachment) {
			v4, _ := gateways()
			nb := neighbour(must(pod.LinkByName("eth0")).Attrs().Index, v4, net.HardwareAddr{2, 0, 0, 0, 0, 9})
			check(t, pod.NeighSet(&nb))
		}},
		{name: "host neighbour", want: "neighbour fd00:22::1 is missing or changed on the node", damage: func(t *testing.T, _ *node, host, _ *netlink.Handle, a Attachment) {
			nb := neighbour(must(host.LinkByName(a.HostInterface)).Attrs().Index, a.Addresses[1], podMAC("a", "eth0"))
			check(t, host.NeighDel(&nb))
		}},
		{name: "MTU", want: "MTU of eth0 is 1300, want 1450", damage: func(t *testing.T, _ *node, _, pod *netlink.Handle, a Attachment) {
			check(t, pod.LinkSetMTU(must(pod.LinkByName("eth0")), 1300))
		}},
		{name: "sysctl", want: "rp_filter is 0, want 1", damage: func(t *testing.T, _ *node, _, _ *netlink.Handle, a Attachment) {
			check(t, os.WriteFile("/proc/sys/net/ipv4/conf/"+a.HostInterface+"/rp_filter", []byte("0"), 0o644))
		}},
		{name: "down", want: "is down", damage: func(t *testing.T, _ *node, host, _ *netlink.Handle, a Attachment) {
			check(t, host.LinkSetDown(must(host.LinkByName(a.HostInterface))))
		}},
		{name: "link", want: "is missing on the node's side", damage: func(t *testing.T, _ *node, host, _ *netlink.Handle, a Attachment) {
			check(t, unmakeLink(host, a.HostInterface))
		}},
		{name: "lease", want: "lease of 10.22.0.1 is missing", damage: func(t *testing.T, n *node, _, _ *netlink.Handle, a Attachment) {
			s := must(store(n.run, n.state, func(string) {}))
			must(s.Release(context.Background(), ipam.Owner{Network: a.Network, ContainerID: a.ContainerID, Interface: a.Interface}))
		}},
		{name: "binding", want: "not bound", damage: func(_ *testing.T, n *node, _, _ *netlink.Handle, a Attachment) {
			n.agent.mu.Lock()
			defer n.agent.mu.Unlock()
			delete(n.agent.attached, a.HostInterface)
		}},
		{name: "record", want: "has no interface eth0", damage: func(t *testing.T, n *node, _, _ *netlink.Handle, a Attachment) {
			check(t, RemoveAttachment(n.run, a.HostInterface))
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := newNode(t)
			l := n.list("1.1.0", dualStack)
			rt := n.runtime("a", n.pod("a"))
			n.mustAdd(l, rt)
			defer n.mustDel(l, rt)
			host, err := netlink.NewHandle(unix.NETLINK_ROUTE)
			if err != nil {
				t.Fatal(err)
			}
			defer host.Close()
			tt.damage(t, n, host, podHandle(t, rt.NetNS), n.agent.attached[HostInterface("a", "eth0")])
			err = n.cni.CheckNetworkList(t.Context(), l, rt)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("CHECK: got %v, want %q", err, tt.want)
			}
		})
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestKernelCheckVersions(t *testing.T) {
	n := newNode(t)
	for _, version := range []string{"0.4.0", "1.0.0", "1.1.0"} {
		l := n.list(version, dualStack)
		rt := n.runtime("a", n.pod("a"))
		n.mustAdd(l, rt)
		if err := n.cni.CheckNetworkList(t.Context(), l, rt); err != nil {
			t.Errorf("CHECK %s: %v", version, err)
		}
		n.mustDel(l, rt)
		n.kill("a")
	}
}

// TestKernelPrevResult has another plugin before ours in the chain.
func TestKernelPrevResult(t *testing.T) {
	n := newNode(t)
	script := n.bin + "/before"
	body := `#!/bin/sh
case $CNI_COMMAND in
ADD) echo '{"cniVersion":"1.0.0","interfaces":[{"name":"other0","sandbox":"/x"}],"ips":[{"address":"192.0.2.9/24","interface":0}],"dns":{"domain":"first"}}';;
esac
`
	check(t, os.WriteFile(script, []byte(body), 0o755))
	l := n.chain("testnet", "1.0.0", `{"type":"before"}`, n.plugin(`{"dns": {"nameservers": ["192.0.2.53"]}, `+dualStack[1:]))
	rt := n.runtime("a", n.pod("a"))
	res := n.mustAdd(l, rt)
	if len(res.Interfaces) != 3 || len(res.IPs) != 3 || *res.IPs[1].Interface != 2 || res.IPs[0].Address.String() != "192.0.2.9/24" {
		b, _ := json.Marshal(res)
		t.Errorf("result %s", b)
	}
	if len(res.DNS.Nameservers) != 1 {
		t.Errorf("dns %+v", res.DNS)
	}
	if err := n.cni.CheckNetworkList(t.Context(), l, rt); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	n.mustDel(l, rt)
}

func TestKernelCapabilities(t *testing.T) {
	n := newNode(t)
	caps := `{"capabilities": {"mac": true, "ips": true, "dns": true, "portMappings": true, "bandwidth": true}, ` + dualStack[1:]
	l := n.list("1.0.0", caps)
	for _, tt := range []struct {
		name string
		args map[string]any
		code uint
		want string
	}{
		{name: "mac", args: map[string]any{"mac": "02:11:22:33:44:55"}},
		{name: "ips", args: map[string]any{"ips": []string{"10.22.0.77/24", "fd00:22::77"}}},
		{name: "ips elsewhere", args: map[string]any{"ips": []string{"10.99.0.1"}}, code: 7, want: "runtimeConfig.ips: address 10.99.0.1"},
		{name: "dns", args: map[string]any{"dns": types.DNS{Nameservers: []string{"192.0.2.1"}}}},
		{name: "portMappings", args: map[string]any{"portMappings": []map[string]any{{"hostPort": 80, "containerPort": 80, "protocol": "icmp"}}}, code: 7, want: "runtimeConfig.portMappings"},
		{name: "portMappings that fit", args: map[string]any{"portMappings": []map[string]any{{"hostPort": 80, "containerPort": 80}}}},
		{name: "bandwidth out of range", args: map[string]any{"bandwidth": map[string]any{"ingressRate": 1}}, code: 7, want: "runtimeConfig.bandwidth"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := n.snapshot()
			rt := n.runtime("a", n.pod("a"))
			defer n.kill("a")
			rt.CapabilityArgs = tt.args
			res, err := n.add(l, rt)
			if tt.code != 0 {
				if code(err) != tt.code || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("got %v, want code %d and %q", err, tt.code, tt.want)
				}
				n.same("a refused ADD", before)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			switch tt.name {
			case "mac":
				if res.Interfaces[1].Mac != "02:11:22:33:44:55" {
					t.Errorf("MAC %s", res.Interfaces[1].Mac)
				}
			case "ips":
				if res.IPs[0].Address.IP.String() != "10.22.0.77" || res.IPs[1].Address.IP.String() != "fd00:22::77" {
					t.Errorf("addresses %v", res.IPs)
				}
			case "dns":
				if len(res.DNS.Nameservers) != 1 {
					t.Errorf("dns %+v", res.DNS)
				}
			}
			if err := n.cni.CheckNetworkList(t.Context(), l, rt); err != nil {
				t.Errorf("CHECK: %v", err)
			}
			rt.CapabilityArgs = nil
			n.mustDel(l, rt)
			n.same("ADD and DEL", before)
		})
	}
}
