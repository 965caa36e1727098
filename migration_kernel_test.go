package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/policy"
)

// TestKernelMigration installs nftcni on a node with pods of the bridge plugin (flannel's too),
// of ptp and of Calico: they go on talking, to new pods as well, whose policy holds for them.
func TestKernelMigration(t *testing.T) { inFreshNode(t, testMigration) }

// The node's range has 13 addresses besides network, gateway and broadcast.
const (
	migrationRange = "10.244.1.0/28"
	bridgeAddress  = "10.244.1.1"
)

// migratingNode is a node whose system directories are its own.
type migratingNode struct {
	*demoNode
	old map[string]*endpoint
}

func newMigratingNode(t *testing.T) *migratingNode {
	t.Helper()
	for _, dir := range []string{"/etc", "/opt", "/usr/local/bin", "/var/lib"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0755"); err != nil {
			t.Fatalf("mount a tmpfs on %s: %v", dir, err)
		}
	}
	node, err := newDemoNode("demo", outsideEnds())
	if err != nil {
		t.Fatal(err)
	}
	// Without a default route the kernel answers for no 169.254.1.1 (a requirement of Calico).
	if err := addRoute("uplink", anywhere, outsidePrefixes[0].Addr()); err != nil {
		t.Fatal(err)
	}
	n := &migratingNode{node, map[string]*endpoint{}}
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br7"}}
	if err := errors.Join(netlink.LinkAdd(bridge), noDAD("br7"), addAddresses("br7", []netip.Prefix{netip.MustParsePrefix(bridgeAddress + "/28")})); err != nil {
		t.Fatal(err)
	}
	for i, p := range []struct {
		name string
		wire func(host string, fd int, a netip.Addr) error
	}{{"bridge-a", bridgePod}, {"bridge-b", bridgePod}, {"ptp", ptpPod}, {"calico-a", calicoPod}, {"calico-b", calicoPod}} {
		host := fmt.Sprintf("veth%08x", i)
		if strings.HasPrefix(p.name, "calico") {
			host = fmt.Sprintf("cali%011x", i)
		}
		a := netip.AddrFrom4([4]byte{10, 244, 1, byte(2 + i)})
		if n.old[p.name], err = oldPod(p.name, host, a, p.wire); err != nil {
			t.Fatalf("%s: %v", p.name, err)
		}
		if err := serve(t.Context(), n.old[p.name], []service{{policy.TCP, 80}, {policy.UDP, 80}}); err != nil {
			t.Fatal(err)
		}
	}
	return n
}

// oldPod makes a namespace with a veth to the node and lets wire do the rest.
func oldPod(name, host string, a netip.Addr, wire func(string, int, netip.Addr) error) (*endpoint, error) {
	fd, err := newNetNS()
	if err != nil {
		return nil, err
	}
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: host, MTU: 1500}, PeerName: "eth0", PeerNamespace: netlink.NsFd(fd)}
	if err := netlink.LinkAdd(veth); err != nil {
		return nil, fmt.Errorf("make veth: %w", err)
	}
	if err := errors.Join(linkUp(host), wire(host, fd, a)); err != nil {
		return nil, err
	}
	return &endpoint{name: name, netns: fd, addrs: []netip.Addr{a}}, awaitCarrier(host)
}

var anywhere = netip.MustParsePrefix("0.0.0.0/0")

// bridgePod: the range on the link, the bridge its gateway.
func bridgePod(host string, fd int, a netip.Addr) error {
	port, err := netlink.LinkByName(host)
	if err != nil {
		return err
	}
	bridge, err := netlink.LinkByName("br7")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetMaster(port, bridge); err != nil {
		return err
	}
	return inNetNS(fd, func() error {
		return errors.Join(addAddresses("eth0", []netip.Prefix{netip.PrefixFrom(a, 28)}), addRoute("eth0", anywhere, netip.MustParseAddr(bridgeAddress)))
	})
}

// ptpPod: everything by the gateway, which the node's end has, and a route to the pod.
func ptpPod(host string, fd int, a netip.Addr) error {
	gateway := netip.MustParseAddr(bridgeAddress)
	return errors.Join(addAddresses(host, []netip.Prefix{netip.PrefixFrom(gateway, 32)}), hostRouteTo(host, a),
		inNetNS(fd, func() error {
			return errors.Join(addAddresses("eth0", []netip.Prefix{netip.PrefixFrom(a, 32)}), hostRouteTo("eth0", gateway), addRoute("eth0", anywhere, gateway))
		}))
}

// calicoPod: everything by 169.254.1.1, for which the node's end answers.
func calicoPod(host string, fd int, a netip.Addr) error {
	gateway := netip.MustParseAddr("169.254.1.1")
	for _, s := range []string{"proxy_arp", "forwarding"} {
		if err := os.WriteFile(filepath.Join("/proc/sys/net/ipv4/conf", host, s), []byte("1"), 0); err != nil {
			return err
		}
	}
	// Calico writes this one too: the answer comes at once.
	if err := os.WriteFile(filepath.Join("/proc/sys/net/ipv4/neigh", host, "proxy_delay"), []byte("0"), 0); err != nil {
		return err
	}
	return errors.Join(hostRouteTo(host, a), inNetNS(fd, func() error {
		return errors.Join(addAddresses("eth0", []netip.Prefix{netip.PrefixFrom(a, 32)}), hostRouteTo("eth0", gateway), addRoute("eth0", anywhere, gateway))
	}))
}

func hostRouteTo(name string, a netip.Addr) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: netlink.NewIPNet(a.AsSlice()), Scope: netlink.SCOPE_LINK})
}

// others are the files that the plugins of the old pods leave on a node. One lease is of a
// pod that this test does not make.
func (n *migratingNode) writeOthers(t *testing.T) map[string]string {
	t.Helper()
	confs := map[string]string{
		"/etc/cni/net.d/10-flannel.conflist": `{"name":"cbr0","cniVersion":"0.3.1","plugins":[{"type":"flannel","delegate":{"isDefaultGateway":true}},{"type":"portmap"}]}`,
		"/etc/cni/net.d/10-calico.conflist":  `{"name":"k8s-pod-network","cniVersion":"0.3.1","plugins":[{"type":"calico","ipam":{"type":"calico-ipam"}}]}`,
		"/etc/cni/net.d/20-mynet.conf":       `{"cniVersion":"0.3.1","name":"mynet","type":"bridge","bridge":"br7","isGateway":true,"ipam":{"type":"host-local","subnet":"` + migrationRange + `"}}`,
	}
	files := map[string]string{
		"/var/lib/cni/networks/mynet/10.244.1.2": "old\neth0", "/var/lib/cni/networks/mynet/10.244.1.3": "old\neth0",
		"/var/lib/cni/networks/mynet/10.244.1.9": "elsewhere\neth0", "/var/lib/cni/networks/mynet/last_reserved_ip.0": "10.244.1.9",
		"/var/lib/calico/nodename": "demo", "/run/flannel/subnet.env": "FLANNEL_MTU=1450\n",
	}
	for _, m := range []map[string]string{confs, files} {
		for path, content := range m {
			if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o644)); err != nil {
				t.Fatal(err)
			}
		}
	}
	c, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "cni_plugins_masquerade"})
	filter := c.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "filter"})
	c.AddChain(&nftables.Chain{Name: "cali-FORWARD", Table: filter})
	c.AddChain(&nftables.Chain{Name: "KUBE-FORWARD", Table: filter})
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	return confs
}

// command runs nftcni as people do and returns what it says.
func (n *migratingNode) command(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), n.path("bin/nftcni"), args...).CombinedOutput()
	if err != nil {
		t.Fatalf("nftcni %v: %v\n%s", args, err, out)
	}
	return string(out)
}

// startInstalled starts the agent with the command line of the unit that install wrote.
func (n *migratingNode) startInstalled(t *testing.T) {
	t.Helper()
	unit, err := os.ReadFile("/etc/systemd/system/nftcni-agent.service")
	if err != nil {
		t.Fatal(err)
	}
	_, line, _ := strings.Cut(string(unit), "ExecStart=")
	line, _, _ = strings.Cut(line, "\n")
	settings, err := os.OpenFile("/etc/nftcni/agent.yaml", os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = fmt.Fprintf(settings, "\nnode: demo\npodCIDRs: [%s]\n", migrationRange)
	if err := errors.Join(err, settings.Close()); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(n.path("agent.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	ctx, stop := context.WithCancel(t.Context())
	args := strings.Fields(line)
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	wait, err := startTied(cmd, 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	end := make(chan struct{})
	n.stopAgent, n.agentEnd, n.agentPID = stop, end, cmd.Process.Pid
	go func() {
		n.agentErr = wait()
		close(end)
	}()
	const conflist = "/etc/cni/net.d/00-nftcni.conflist"
	err = n.until(t.Context(), func(context.Context) bool {
		_, err := os.Stat(conflist)
		return err == nil
	})
	if err != nil {
		t.Fatal(err)
	}
	n.plugin = libcni.NewCNIConfigWithCacheDir([]string{"/opt/cni/bin"}, n.path("cache"), nil)
	if n.network, err = libcni.ConfListFromFile(conflist); err != nil {
		t.Fatal(err)
	}
}

// ask wants these to answer each other, or none of them.
func (n *migratingNode) ask(t *testing.T, when string, sources, targets []*endpoint, want bool) {
	t.Helper()
	var probes []*probe
	for _, src := range sources {
		for _, dst := range targets {
			if src == dst {
				continue
			}
			for _, pair := range src.families(dst) {
				for _, s := range []service{{policy.TCP, 80}, {policy.UDP, 80}} {
					probes = append(probes, &probe{src: src, dst: dst, from: pair[0], to: pair[1], service: s})
				}
			}
		}
	}
	if len(probes) == 0 {
		t.Fatalf("%s: no probes", when)
	}
	if err := askAll(t.Context(), probes, func(*probe) bool { return want }); err != nil {
		t.Error(err)
	}
	for _, p := range probes {
		if p.answered != want {
			t.Errorf("%s: %s: %s", when, p, verdict(p.answered))
		}
	}
}

const migrationPolicy = `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: closed, namespace: shop}
spec:
  podSelector: {matchLabels: {app: closed}}
  ingress: [{from: [{podSelector: {}}]}]
`

func migrationPod(name string) string {
	return fmt.Sprintf("---\napiVersion: v1\nkind: Pod\nmetadata: {name: %s, namespace: shop, labels: {app: %s}}\n"+
		"spec: {nodeName: demo, containers: [{name: main, image: demo}]}\n", name, name)
}

func testMigration(t *testing.T) {
	n := newMigratingNode(t)
	confs := n.writeOthers(t)
	world := n.ends["world"]
	if err := serve(t.Context(), world, []service{{policy.TCP, 80}, {policy.UDP, 80}}); err != nil {
		t.Fatal(err)
	}
	var old []*endpoint
	for _, e := range n.old {
		old = append(old, e)
	}
	bridged := []*endpoint{n.old["bridge-a"], n.old["bridge-b"]}
	routed := []*endpoint{n.old["ptp"], n.old["calico-a"], n.old["calico-b"]}
	everywhere := func(when string) {
		t.Helper()
		// Pods behind a bridge find no others in its network until install says proxy_arp; no
		// node has both kinds in one network but this one.
		n.ask(t, when+": old to old", bridged, bridged, true)
		n.ask(t, when+": old to old", routed, routed, true)
		n.ask(t, when+": old to outside", old, []*endpoint{world}, true)
		n.ask(t, when+": outside to old", []*endpoint{world}, old, true)
	}
	everywhere("before")

	manifests := "/etc/nftcni/manifests"
	text := "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n" + migrationPod("open") + migrationPod("closed") + "---\n" + migrationPolicy
	if err := errors.Join(os.MkdirAll(manifests, 0o755), os.WriteFile(manifests+"/shop.yaml", []byte(text), 0o644)); err != nil {
		t.Fatal(err)
	}
	report := n.command(t, "install", "--manifests", manifests)
	t.Logf("install says:\n%s", report)
	wantReport(t, report)
	for path, content := range confs {
		if b, err := os.ReadFile(path + ".nftcni-disabled"); err != nil || string(b) != content {
			t.Errorf("%s is not aside: %q, %v", path, b, err)
		}
	}
	everywhere("installed")
	n.startInstalled(t)
	everywhere("the agent serves")
	n.newPods(t, old, world)
	everywhere("new pods are there")
	n.fillPool(t)
	n.takeOff(t, confs)
	everywhere("uninstalled")
}

func wantReport(t *testing.T, report string) {
	t.Helper()
	for _, want := range []string{
		"br7", "veth00000000", "veth00000002", "cali00000000003", "ip link delete br7", "net.ipv4.conf.br7.proxy_arp = 1",
		"10.244.1.4/32", "10.244.1.5/32", "/var/lib/cni/networks/mynet", "3 addresses", "/var/lib/calico", "/run/flannel",
		"table inet cni_plugins_masquerade", "nft delete table inet cni_plugins_masquerade", "cali-FORWARD",
	} {
		if !strings.Contains(report, want) {
			t.Errorf("install does not name %q", want)
		}
	}
	if strings.Contains(report, "KUBE-FORWARD") || strings.Contains(report, "uplink") {
		t.Error("install names what is no network plugin's")
	}
}

// newPods attaches two pods; one lets only pods of its namespace in.
func (n *migratingNode) newPods(t *testing.T, old []*endpoint, world *endpoint) {
	t.Helper()
	pods := map[string]*endpoint{}
	for _, name := range []string{"open", "closed"} {
		e, err := n.attach(t.Context(), n.network, "shop", name)
		if err != nil {
			t.Fatal(err)
		}
		pods[name] = e
		if err := serve(t.Context(), e, []service{{policy.TCP, 80}, {policy.UDP, 80}}); err != nil {
			t.Fatal(err)
		}
	}
	open, closed := []*endpoint{pods["open"]}, []*endpoint{pods["closed"]}
	n.ask(t, "old to new", old, open, true)
	n.ask(t, "new to old", append(open, closed...), old, true)
	n.ask(t, "outside to new", []*endpoint{world}, open, true)
	n.ask(t, "new to outside", open, []*endpoint{world}, true)
	n.ask(t, "new to new", open, closed, true)
	n.ask(t, "old to a new pod whose policy refuses it", old, closed, false)
}

// fillPool attaches pods until the range is used up: no address is given twice, and none
// that is an old pod's, leased by host-local or the node's.
func (n *migratingNode) fillPool(t *testing.T) {
	t.Helper()
	taken := map[netip.Addr]string{netip.MustParseAddr(bridgeAddress): "the bridge", netip.MustParseAddr("10.244.1.9"): "a lease of host-local"}
	for name, e := range n.old {
		taken[e.addrs[0]] = name
	}
	given := len(n.attached) // of newPods
	for i := range 16 {
		e, err := n.attach(t.Context(), n.network, "shop", fmt.Sprintf("more-%d", i))
		if err != nil {
			if !strings.Contains(err.Error(), "network nftcni is full") {
				t.Errorf("the range is full: %v", err)
			}
			break
		}
		given++
		if owner, is := taken[e.addrs[0]]; is {
			t.Errorf("%s belongs to %s and was given to %s", e.addrs[0], owner, e.name)
		}
		taken[e.addrs[0]] = e.name
	}
	if want := 14 - 7; given != want {
		t.Errorf("%d addresses were given, want %d: %v", given, want, taken)
	}
}

// takeOff wants the node as others left it.
func (n *migratingNode) takeOff(t *testing.T, confs map[string]string) {
	t.Helper()
	if err := errors.Join(n.detachAll(t.Context()), n.checkEmpty(), n.close()); err != nil {
		t.Fatal(err)
	}
	n.command(t, "uninstall")
	n.command(t, "uninstall", "--check")
	for path, content := range confs {
		if b, err := os.ReadFile(path); err != nil || string(b) != content {
			t.Errorf("%s is not back: %q, %v", path, b, err)
		}
	}
	names, err := filepath.Glob("/etc/cni/net.d/*")
	if err != nil || len(names) != len(confs) {
		t.Errorf("network configurations after uninstall: %v, %v", names, err)
	}
	if b, err := os.ReadFile("/proc/sys/net/ipv4/conf/br7/proxy_arp"); err != nil || !bytes.Equal(b, []byte("0\n")) {
		t.Errorf("proxy_arp of the bridge after uninstall: %q, %v", b, err)
	}
	if leases, err := os.ReadDir("/var/lib/cni/networks/mynet"); err != nil || !slices.ContainsFunc(leases, func(e os.DirEntry) bool { return e.Name() == "10.244.1.9" }) {
		t.Errorf("leases of others after uninstall: %v, %v", leases, err)
	}
}
