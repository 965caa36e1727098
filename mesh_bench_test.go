package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/cni"
)

// BenchmarkMesh is what scripts/bench-mesh runs: two nodes on one link, each with the real agent, a
// thousand Node objects, policies and a pod. Packets between the pods are measured in turn with our
// table and with conntrack alone, direct and through VXLAN.
func BenchmarkMesh(b *testing.B) {
	dir := os.Getenv("NFTCNI_BENCH_MESH")
	if dir == "" {
		b.Skip("namespaces of its own are needed: run scripts/bench-mesh")
	}
	for range b.N {
		for _, mode := range []cni.MeshMode{cni.MeshVXLAN, cni.MeshAuto} {
			w := newMeshBench(b, filepath.Join(dir, string(mode)), mode)
			w.packets()
			if mode == cni.MeshAuto { // with it half of the nodes are behind VXLAN
				w.idle()
			}
			w.close()
		}
	}
}

const meshBenchNodes = 1000

// meshBench is two nodes and a pod on each.
type meshBench struct {
	b     *testing.B
	dir   string
	mode  cni.MeshMode
	nodes [2]*meshBenchNode
	sink  *net.UDPConn // of the second pod
}

// meshBenchNode is a node and its pod.
type meshBenchNode struct {
	*meshBench
	number    int
	name, dir string
	ns, pod   int
	podAddrs  []netip.Addr // IPv4, IPv6
	agent     *exec.Cmd
	client    *agent.Client
	end       chan struct{}
	tables    *tableSwitch
}

func newMeshBench(b *testing.B, dir string, mode cni.MeshMode) *meshBench {
	b.Helper()
	w := &meshBench{b: b, dir: dir, mode: mode}
	w.check(os.MkdirAll(filepath.Join(dir, "manifests"), 0o755))
	w.check(os.WriteFile(filepath.Join(dir, "manifests", "all.yaml"), []byte(meshBenchManifests()), 0o644))
	for i := range w.nodes {
		w.nodes[i] = w.newNode(i + 1)
	}
	w.wire()
	for _, n := range w.nodes {
		n.start()
	}
	for _, n := range w.nodes {
		n.attach()
	}
	return w
}

func (w *meshBench) check(err error) {
	w.b.Helper()
	if err != nil {
		w.b.Fatal(err)
	}
}

// meshBenchManifests: half of the other nodes are on the nodes' link, and half behind a router. Of a
// hundred policies one selects each of the two pods.
func meshBenchManifests() string {
	var s strings.Builder
	for i := range meshBenchNodes {
		hi, lo := (i+1)>>8, (i+1)&0xff
		link := 1
		if i >= 2 && i%2 == 1 {
			link = 2
		}
		fmt.Fprintf(&s, "apiVersion: v1\nkind: Node\nmetadata: {name: n%d}\nspec: {podCIDRs: [10.%d.%d.0/24, \"fd02:%x::/64\"]}\n", i+1, 100+hi, lo, i+1)
		fmt.Fprintf(&s, "status: {addresses: [{type: InternalIP, address: 192.16%d.%d.%d}, {type: InternalIP, address: \"fd0%d::%x\"}]}\n---\n", 7+link, hi, lo, link, i+1)
	}
	s.WriteString("apiVersion: v1\nkind: Namespace\nmetadata: {name: bench}\n---\n")
	for i := range 2 {
		fmt.Fprintf(&s, "apiVersion: v1\nkind: Pod\nmetadata: {name: pod%d, namespace: bench, labels: {app: pod%d}}\nspec: {nodeName: n%d, containers: [{name: c, image: x}]}\n", i+1, i+1, i+1)
		fmt.Fprintf(&s, "status: {phase: Running, podIPs: [{ip: 10.100.%d.1}, {ip: \"fd02:%x::1\"}]}\n---\n", i+1, i+1)
	}
	for i := range 100 {
		fmt.Fprintf(&s, "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p%d, namespace: bench}\nspec: {podSelector: {matchLabels: {app: pod%d}}, policyTypes: [Ingress, Egress],\n", i, i+1)
		fmt.Fprintf(&s, "  ingress: [{from: [{podSelector: {matchLabels: {app: pod%d}}}], ports: [{protocol: UDP, port: 80}, {protocol: TCP, port: 80}, {protocol: TCP, port: 5201}]}],\n", 2-i%2)
		fmt.Fprintf(&s, "  egress: [{to: [{podSelector: {matchLabels: {app: pod%d}}}], ports: [{protocol: UDP, port: 80}, {protocol: TCP, port: 80}, {protocol: TCP, port: 81}, {protocol: TCP, port: 5201}]}]}\n---\n", 2-i%2)
	}
	return s.String()
}

func (w *meshBench) newNode(number int) *meshBenchNode {
	ns, err := newNetNS()
	w.check(err)
	pod, err := newNetNS()
	w.check(err)
	n := &meshBenchNode{meshBench: w, number: number, name: fmt.Sprintf("n%d", number), ns: ns, pod: pod}
	n.dir = filepath.Join(w.dir, n.name)
	n.client = agent.NewClient(filepath.Join(n.dir, "run", cni.SocketName))
	w.check(os.MkdirAll(n.dir, 0o755))
	return n
}

// wire connects the nodes by one link, as two machines on one switch, with a default route for the
// nodes that are not on it.
func (w *meshBench) wire() {
	link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0", MTU: 1500}, PeerName: "eth0", PeerNamespace: netlink.NsFd(w.nodes[1].ns)}
	w.check(inNetNS(w.nodes[0].ns, func() error { return netlink.LinkAdd(link) }))
	for _, n := range w.nodes {
		n.do(func() error {
			for _, name := range []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"} {
				if err := os.WriteFile("/proc/sys/"+name, []byte("1"), 0); err != nil {
					return err
				}
			}
			return errors.Join(noDAD("eth0"), addAddresses("eth0", []netip.Prefix{
				netip.MustParsePrefix(fmt.Sprintf("192.168.0.%d/16", n.number)), netip.MustParsePrefix(fmt.Sprintf("fd01::%x/64", n.number))}))
		})
	}
	for _, n := range w.nodes {
		n.do(func() error {
			return errors.Join(awaitCarrier("eth0"), addRoute("eth0", netip.MustParsePrefix("0.0.0.0/0"), netip.MustParseAddr("192.168.255.254")),
				addRoute("eth0", netip.MustParsePrefix("::/0"), netip.MustParseAddr("fd01::ffff")))
		})
	}
}

func (n *meshBenchNode) do(f func() error) {
	n.b.Helper()
	n.check(inNetNS(n.ns, f))
}

// start starts the agent and waits until it is ready.
func (n *meshBenchNode) start() {
	n.b.Helper()
	config := fmt.Sprintf("node: %s\nrunDir: %[2]s/run\nstateDir: %[2]s/state\nownTable: false\nmesh: {mode: %s}\n", n.name, n.dir, n.mode)
	n.check(os.WriteFile(filepath.Join(n.dir, "agent.yaml"), []byte(config), 0o644))
	log, err := os.OpenFile(filepath.Join(n.dir, "agent.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	n.check(err)
	defer log.Close()
	n.agent = exec.Command(os.Getenv("NFTCNI_BENCH_BINARY"), "agent", "--manifests", filepath.Join(n.meshBench.dir, "manifests"), "--config", filepath.Join(n.dir, "agent.yaml"))
	n.agent.Stdout, n.agent.Stderr = log, log
	n.do(n.agent.Start)
	n.end = make(chan struct{})
	go func() { _ = n.agent.Wait(); close(n.end) }()
	n.until("the agent is ready", func() bool {
		var ready cni.Ready
		return n.client.Get(n.b.Context(), cni.PathReady, &ready) == nil && ready.Ready
	})
	n.until("routes to all nodes", func() bool { return n.meshRoutes() >= 2*(meshBenchNodes-1) })
}

// meshRoutes counts the agent's routes to other nodes.
func (n *meshBenchNode) meshRoutes() (count int) {
	n.do(func() error {
		list, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Protocol: cni.RouteProtocol}, netlink.RT_FILTER_PROTOCOL)
		for _, r := range list {
			if r.Gw != nil {
				count++
			}
		}
		return err
	})
	return count
}

func (n *meshBenchNode) until(what string, done func() bool) {
	n.b.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for range 3000 {
		if done() {
			return
		}
		select {
		case <-n.end:
			n.b.Fatalf("the agent of %s ended, see %s/agent.log", n.name, n.dir)
		case <-tick.C:
		}
	}
	n.b.Fatalf("%s: not %s within a minute, see %s/agent.log", n.name, what, n.dir)
}

// stop ends the agent; its table and routes stay.
func (n *meshBenchNode) stop() {
	n.check(n.agent.Process.Signal(unix.SIGTERM))
	<-n.end
}

func (w *meshBench) close() {
	for _, n := range w.nodes {
		n.stop()
		w.check(errors.Join(unix.Close(n.ns), unix.Close(n.pod)))
	}
}

// attach runs the plugin's ADD for the node's pod.
func (n *meshBenchNode) attach() {
	n.b.Helper()
	conf := fmt.Sprintf(`{"cniVersion": "1.1.0", "name": "bench", "type": "nftcni", "ipMasq": true, "runDir": "%[1]s/run", "stateDir": "%[1]s/state"}`, n.dir)
	cmd := exec.Command(os.Getenv("NFTCNI_BENCH_BINARY"))
	cmd.Env = append(os.Environ(), "CNI_COMMAND=ADD", "CNI_CONTAINERID=bench"+strconv.Itoa(n.number), "CNI_NETNS="+netnsPath(n.pod), "CNI_IFNAME=eth0", "CNI_PATH=/",
		fmt.Sprintf("CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=bench;K8S_POD_NAME=pod%d", n.number))
	cmd.Stdin = strings.NewReader(conf)
	var out bytes.Buffer
	cmd.Stdout = &out
	if err := inNetNS(n.ns, cmd.Run); err != nil {
		n.b.Fatalf("ADD: %v: %s", err, out.String())
	}
	var result types100.Result
	n.check(json.Unmarshal(out.Bytes(), &result))
	for _, ip := range result.IPs {
		a, _ := netip.AddrFromSlice(ip.Address.IP)
		n.podAddrs = append(n.podAddrs, a.Unmap())
	}
	slices.SortFunc(n.podAddrs, netip.Addr.Compare)
}

// nft runs nft(8) on the node.
func (n *meshBenchNode) nft(rules string) {
	n.b.Helper()
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(rules)
	n.do(func() error {
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("nft: %w: %s", err, out)
		}
		return nil
	})
}

// dial opens a TCP connection from the first pod to the second.
func (w *meshBench) dial(family int, port uint16, patience time.Duration) (c net.Conn, err error) {
	err = inNetNS(w.nodes[0].pod, func() error {
		ctx, cancel := context.WithTimeout(w.b.Context(), patience)
		defer cancel()
		c, err = new(net.Dialer).DialContext(ctx, "tcp", netip.AddrPortFrom(w.nodes[1].podAddrs[family], port).String())
		return err
	})
	return c, err
}
