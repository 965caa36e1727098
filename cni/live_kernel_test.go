package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/ipam"
)

// TestKernelAddressInUse has addresses that others use: one with a route of its own, as a
// pod of the plugin that was here before, and one of the node.
func TestKernelAddressInUse(t *testing.T) {
	n := newNode(t)
	h := must(netlink.NewHandle(unix.NETLINK_ROUTE))
	defer h.Close()
	lo := must(h.LinkByName("lo"))
	check(t, h.LinkSetUp(lo))
	before := n.snapshot()
	foreign := &netlink.Route{LinkIndex: lo.Attrs().Index, Dst: &net.IPNet{IP: net.IP{10, 22, 0, 1}, Mask: net.CIDRMask(32, 32)}, Scope: netlink.SCOPE_LINK}
	check(t, h.RouteAdd(foreign))
	own := &netlink.Addr{IPNet: &net.IPNet{IP: net.IP{10, 22, 0, 2}, Mask: net.CIDRMask(32, 32)}}
	check(t, h.AddrAdd(lo, own))
	l := n.list("1.1.0", dualStack)
	rt := n.runtime("a", n.pod("a"))
	if got := n.mustAdd(l, rt).IPs[0].Address.String(); got != "10.22.0.3/32" {
		t.Errorf("got %s, want 10.22.0.3/32", got)
	}
	n.mustDel(l, rt)
	check(t, h.RouteDel(foreign))
	check(t, h.AddrDel(lo, own))
	n.same("ADD and DEL", before)
}

// TestKernelCorruptLeases loses the lease file under two live pods, one of them without a
// record.
func TestKernelCorruptLeases(t *testing.T) {
	n := newNode(t)
	before := n.snapshot()
	l := n.list("1.1.0", dualStack)
	a, b, c := n.runtime("a", n.pod("a")), n.runtime("b", n.pod("b")), n.runtime("c", n.pod("c"))
	n.mustAdd(l, a)
	n.mustAdd(l, b)
	check(t, os.Remove(recordPath(n.run, HostInterface("b", "eth0"))))
	path := filepath.Join(n.state, ipam.FileName)
	check(t, os.WriteFile(path, []byte("not a database"), 0o600))
	if got := n.mustAdd(l, c).IPs[0].Address.String(); got != "10.22.0.3/32" {
		t.Errorf("got %s, want 10.22.0.3/32: the first two live", got)
	}
	if aside := must(filepath.Glob(path + ".corrupt-*")); len(aside) != 1 {
		t.Errorf("set aside %v", aside)
	}
	if err := n.cni.CheckNetworkList(t.Context(), l, a); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	for _, rt := range []string{"a", "b", "c"} {
		n.mustDel(l, n.runtime(rt, ""))
	}
	n.reconcile()
	n.same("DEL after the leases were lost", before)
}

// TestKernelNamespaceGoesDuringAdd takes the namespace's name away in the middle.
func TestKernelNamespaceGoesDuringAdd(t *testing.T) {
	for _, step := range []string{"add lease", "add link", "add attach"} {
		t.Run(step, func(t *testing.T) {
			n := newNode(t)
			before := n.snapshot()
			conf := map[string]any{}
			check(t, json.Unmarshal([]byte(n.plugin(dualStack)), &conf))
			conf["name"], conf["cniVersion"] = "testnet", "1.0.0"
			stdin := must(json.Marshal(conf))
			env := map[string]string{"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "a", "CNI_IFNAME": "eth0", "CNI_NETNS": n.pod("a"), "CNI_PATH": n.bin}
			var out bytes.Buffer
			p := Plugin{Getenv: func(k string) string { return env[k] }, Stdin: bytes.NewReader(stdin), Stdout: &out, Stderr: &out,
				AfterStep: func(done string) {
					if done == step {
						n.kill("a")
					}
				}}
			p.Run(t.Context())
			n.settle()
			n.reconcileUntilGone("a")
			n.same("a namespace that goes after "+step, before)
		})
	}
}

// TestKernelLeaseOnly has GC find an attachment of which only the lease is left.
func TestKernelLeaseOnly(t *testing.T) {
	n := newNode(t)
	before := n.snapshot()
	s := must(store(n.run, n.state, func(string) {}))
	r := record{Attachment: Attachment{Network: "first", ContainerID: "x", Interface: "eth0", HostInterface: HostInterface("x", "eth0")}}
	pool := must(nodePools([]netip.Prefix{netip.MustParsePrefix("10.22.0.0/24")}))
	must(s.Acquire(context.Background(), ipam.Request{Owner: r.owner(), Payload: payload(r), Pools: pool}))
	if err := n.direct("GC", strings.ReplaceAll(`{"cniVersion": "1.1.0", "name": "first", "type": "nftcni", "runDir": "DIR/run", "stateDir": "DIR/state",
		"cni.dev/valid-attachments": []}`, "DIR", n.dir)); err != nil {
		t.Errorf("GC: %v", err)
	}
	n.same("GC", before)
}

// TestKernelNodePodCIDRs takes addresses from what the agent knows of the node.
func TestKernelNodePodCIDRs(t *testing.T) {
	n := newNode(t)
	l := n.list("1.1.0", `{}`)
	a, b := n.runtime("a", n.pod("a")), n.runtime("b", n.pod("b"))
	if _, err := n.add(l, a); code(err) != 7 || !strings.Contains(err.Error(), "podCIDRs") {
		t.Errorf("without podCIDRs: got %v, want code 7", err)
	}
	if err := n.cni.GetStatusNetworkList(t.Context(), l); code(err) != 50 {
		t.Errorf("STATUS without podCIDRs: got %v, want code 50", err)
	}
	n.agent.ready.PodCIDRs = []netip.Prefix{netip.MustParsePrefix("10.60.0.0/31"), netip.MustParsePrefix("fd00:60::/128")}
	if err := n.cni.GetStatusNetworkList(t.Context(), l); err != nil {
		t.Errorf("STATUS: %v", err)
	}
	before := n.snapshot()
	res := n.mustAdd(l, a)
	if len(res.IPs) != 2 || res.IPs[0].Address.String() != "10.60.0.0/32" || res.IPs[1].Address.String() != "fd00:60::/128" {
		t.Errorf("addresses %v", res.IPs)
	}
	if _, err := n.add(l, b); code(err) != 11 || !strings.Contains(err.Error(), "fd00:60::-fd00:60:: of network testnet is full: 1 addresses, 1 leased") ||
		!strings.Contains(err.Error(), "default/a") {
		t.Errorf("full pool: got %v, want code 11, the pool, its size and who holds it", err)
	}
	n.mustDel(l, a)
	n.same("ADD and DEL", before)
}
