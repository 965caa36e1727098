package nft_test

import (
	"context"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/nft/nfttest"
	"github.com/nftcni/nftcni/policy"
)

func hostPort(p policy.Protocol, a string, port uint16, to string, toPort uint16) nft.HostPort {
	return nft.HostPort{Protocol: p, Addr: addr(a), Port: port, To: at(to, toPort), Comment: "test/server"}
}

// webPorts lead TCP and UDP 8080 of every address of the node to the world's server.
func webPorts() []nft.HostPort {
	var out []nft.HostPort
	for _, p := range []policy.Protocol{policy.TCP, policy.UDP} {
		out = append(out, hostPort(p, "0.0.0.0", 8080, "10.9.0.1", 80), hostPort(p, "::", 8080, "fd09::1", 80))
	}
	return out
}

// TestKernelHostPorts: who reaches a pod by the node's port is who may reach the pod.
func TestKernelHostPorts(t *testing.T) {
	w := newWorld(t)
	nfttest.Sysctl(t, "net/ipv4/conf/"+w.server.Interface+"/route_localnet", "1") // as the plugin does for a pod with host ports
	ports := append(webPorts(), hostPort(policy.TCP, "0.0.0.0", 8081, "10.9.0.3", 80), hostPort(policy.TCP, "::", 8081, "fd09::3", 80))
	r := apply(t, w.table, nft.Change{HostPorts: ports})
	finish(t, w.table, r)
	for _, a := range w.stranger.Addrs {
		w.stranger.EchoTCP(a, 80)
	}
	for _, node := range []string{"198.51.100.1", "2001:db8:1::1"} {
		for _, c := range []struct {
			name string
			from *nfttest.Host
			open bool
		}{{"allowed client", w.client, true}, {"stranger", w.stranger, false}, {"outside", w.outside, false}, {"the node", &w.Host, true},
			{"the pod itself", w.server, true}} {
			want(t, c.name+" tcp "+node, c.from.TCP(at(node, 8080)), c.open)
			want(t, c.name+" udp "+node, c.from.UDP(at(node, 8080)), c.open)
		}
		want(t, "outside to an open pod "+node, w.outside.TCP(at(node, 8081)), true)
		want(t, "a port nobody asked for "+node, w.outside.TCP(at(node, 8082)), false)
	}
	want(t, "the node's loopback", w.Host.TCP(at("127.0.0.1", 8080)), true)
	want(t, "the node's loopback, udp", w.Host.UDP(at("127.0.0.1", 8080)), true)
	want(t, "another host's port", w.client.TCP(at("192.0.2.9", 8080)), false)
	apply(t, w.table, nft.Change{HostPorts: []nft.HostPort{}})
	want(t, "after the port went", w.client.TCP(at("198.51.100.1", 8080)), false)
	want(t, "the pod itself stays", w.client.TCP(at("10.9.0.1", 80)), true)
}

// TestKernelHostPortAddress: a port at one address of the node is a port at that one only.
func TestKernelHostPortAddress(t *testing.T) {
	w := newWorld(t)
	second := w.Outside("second", "203.0.113.7", "2001:db8:2::7")
	w.Await(second)
	apply(t, w.table, nft.Change{HostPorts: []nft.HostPort{
		hostPort(policy.TCP, "198.51.100.1", 8080, "10.9.0.1", 80), hostPort(policy.TCP, "2001:db8:1::1", 8080, "fd09::1", 80),
		hostPort(policy.TCP, "198.51.100.2", 8080, "10.9.0.1", 8050), hostPort(policy.TCP, "127.0.0.1", 9090, "10.9.0.1", 80),
	}})
	want(t, "the address", w.client.TCP(at("198.51.100.1", 8080)), true)
	want(t, "the address, v6", w.client.TCP(at("2001:db8:1::1", 8080)), true)
	want(t, "its neighbour with a port of its own", w.client.TCP(at("198.51.100.2", 8080)), true)
	want(t, "its neighbour, v6", w.client.TCP(at("2001:db8:1::2", 8080)), false)
	want(t, "a port of the loopback, from a pod", w.client.TCP(at("198.51.100.1", 9090)), false)
}

// said is what a listener of the node itself answers.
func nodeListens(t *testing.T, w *world, a string, port uint16) {
	t.Helper()
	l, err := net.Listen("tcp", at(a, port).String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, "node")
			go func() { _, _ = io.Copy(io.Discard, c); _ = c.Close() }()
		}
	}()
}

// hears is the first word that comes when from connects, "" if there is none in half a second, or in ten where one is
// wanted.
func hears(from *nfttest.Host, to netip.AddrPort, wanted bool) string {
	c := from.Connect(to)
	if c == nil {
		return "refused"
	}
	defer c.Close()
	patience := 500 * time.Millisecond
	if wanted {
		patience = 10 * time.Second
	}
	_ = c.SetReadDeadline(time.Now().Add(patience))
	b := make([]byte, 4)
	n, _ := io.ReadFull(c, b)
	return string(b[:n])
}

// TestKernelHostPortNeighbours: a Service of kube-proxy wins over a host port, a host port over a socket of the node.
func TestKernelHostPortNeighbours(t *testing.T) {
	needNft(t)
	w := newWorld(t)
	for _, a := range w.stranger.Addrs {
		w.stranger.EchoTCP(a, 80)
	}
	nodeListens(t, w, "198.51.100.1", 8080)
	nodeListens(t, w, "2001:db8:1::1", 8080)
	nodes := []string{"198.51.100.1", "2001:db8:1::1"}
	for _, node := range nodes {
		if got := hears(w.client, at(node, 8080), true); got != "node" {
			t.Errorf("before: %s answered %q, want the node's socket", node, got)
		}
	}
	live := w.outside.Connect(at("198.51.100.1", 8080))
	r := apply(t, w.table, nft.Change{HostPorts: webPorts()})
	finish(t, w.table, r)
	for _, node := range nodes {
		if got := hears(w.client, at(node, 8080), false); got != "" {
			t.Errorf("%s answered %q, want the pod's silence", node, got)
		}
		want(t, "the pod answers at "+node, w.client.TCP(at(node, 8080)), true)
	}
	b := make([]byte, 4)
	_ = live.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.ReadFull(live, b); err != nil || string(b) != "node" {
		t.Errorf("the connection to the node's socket that lives: %q, %v", b, err)
	}
	nftFile(t, `table inet kube-proxy-like {
	chain nat-prerouting { type nat hook prerouting priority dstnat; policy accept;
		fib daddr type local tcp dport 8080 meta nfproto ipv4 dnat ip to 10.9.0.3:80
		fib daddr type local tcp dport 8080 meta nfproto ipv6 dnat ip6 to [fd09::3]:80
	}
	chain nat-output { type nat hook output priority -100; policy accept;
		fib daddr type local tcp dport 8080 meta nfproto ipv4 dnat ip to 10.9.0.3:80
	}
}`)
	for _, node := range nodes {
		want(t, "a NodePort of the same number, from where the pod is closed "+node, w.outside.TCP(at(node, 8080)), true)
	}
	runNft(t, "delete", "table", "inet", "kube-proxy-like")
	want(t, "outside, without the Service", w.outside.TCP(at("198.51.100.1", 8080)), false)
	apply(t, w.table, nft.Change{HostPorts: []nft.HostPort{}})
	for _, node := range nodes {
		if got := hears(w.client, at(node, 8080), true); got != "node" {
			t.Errorf("after: %s answered %q, want the node's socket", node, got)
		}
	}
}

// TestKernelHostPortFlows: a UDP flow that never pauses follows its port: to the node's socket, a pod, another pod.
func TestKernelHostPortFlows(t *testing.T) {
	w := newWorld(t)
	beyond := w.Outside("beyond", "203.0.113.7", "2001:db8:2::7")
	w.Await(beyond)
	for _, f := range []struct{ node, one, other, any, far string }{
		{"198.51.100.1", "10.9.0.2", "10.9.0.3", "0.0.0.0", "203.0.113.7"}, {"2001:db8:1::1", "fd09::2", "fd09::3", "::", "2001:db8:2::7"},
	} {
		sinks := map[string]*nfttest.Sink{"node": w.Host.Sink(addr(f.node), 7000), "one": w.client.Sink(addr(f.one), 8080), "other": w.stranger.Sink(addr(f.other), 7000)}
		bystander := beyond.Sink(addr(f.far), 7000)
		c := w.outside.DialUDP(at(f.node, 7000))
		others := w.outside.DialUDP(at(f.far, 7000))
		for _, step := range []struct {
			to    string
			ports []nft.HostPort
		}{
			{"node", nil},
			{"one", []nft.HostPort{hostPort(policy.UDP, f.any, 7000, f.one, 8080)}},
			{"other", []nft.HostPort{hostPort(policy.UDP, f.any, 7000, f.other, 7000)}},
			{"one", []nft.HostPort{hostPort(policy.UDP, f.node, 7000, f.one, 8080)}},
			{"node", []nft.HostPort{}},
		} {
			before := map[string]int64{}
			finish(t, w.table, apply(t, w.table, nft.Change{HostPorts: step.ports}))
			for name, s := range sinks {
				before[name] = s.Received.Load()
			}
			away := bystander.Received.Load()
			_, _ = c.Write([]byte("x"))
			_, _ = others.Write([]byte("x"))
			eventually(t, f.node+": the flow reaches "+step.to, func() bool { return sinks[step.to].Received.Load() == before[step.to]+1 })
			eventually(t, "a flow of the same port to elsewhere goes on", func() bool { return bystander.Received.Load() == away+1 })
		}
	}
}

// TestKernelHostPortsAreState: they are read back, adopted without a write, and survive a table that is replaced.
func TestKernelHostPortsAreState(t *testing.T) {
	needNft(t)
	namespace(t)
	table := open(t, nft.Options{})
	ports := append(webPorts(), hostPort(policy.SCTP, "198.51.100.1", 8080, "10.9.0.1", 80), hostPort(policy.TCP, "2001:db8:1::1", 65535, "fd09::1", 1))
	finish(t, table, apply(t, table, nft.Change{HostPorts: ports}))
	if again := apply(t, table, nft.Change{HostPorts: ports}); again.Transactions != 0 {
		t.Errorf("the same ports took %d transactions", again.Transactions)
	}
	same := func(what string, s nft.State) {
		t.Helper()
		if len(s.HostPorts) != len(ports) {
			t.Errorf("%s: %v", what, s.HostPorts)
		}
		for _, p := range ports {
			if !slices.Contains(s.HostPorts, p) {
				t.Errorf("%s: no %v in %v", what, p, s.HostPorts)
			}
		}
	}
	before := state(t, table)
	same("read back", before)
	listing := nftList(t)
	_ = table.Close()
	adopted := open(t, nft.Options{})
	if s := state(t, adopted); s.Generation != before.Generation {
		t.Errorf("adopting wrote: generation %d to %d", before.Generation, s.Generation)
	}
	_ = adopted.Close()
	for _, edit := range []string{"flush chain inet nftcni host_port", "flush set inet nftcni host_port", "add element inet nftcni host_port { tcp . 1 }"} {
		nftFile(t, edit+"\n")
		edited := generation(t)
		mended := open(t, nft.Options{})
		s := state(t, mended)
		same(edit, s)
		if s.Generation == edited {
			t.Errorf("%s: nothing was mended", edit)
		}
		_ = mended.Close()
	}
	runNft(t, "delete", "table", "inet", "nftcni")
	nftFile(t, listing)
	if again := nftList(t); again != listing {
		t.Errorf("the listing reloads as something else\n%s\n---\n%s", listing, again)
	}
	last := open(t, nft.Options{})
	same("reloaded by nft", state(t, last))
	apply(t, last, nft.Change{HostPorts: []nft.HostPort{}})
	if s := nftList(t); strings.Contains(s, "8080") {
		t.Errorf("something is left:\n%s", s)
	}
}

func TestKernelHostPortsRefused(t *testing.T) {
	namespace(t)
	table := open(t, nft.Options{})
	for _, c := range []struct {
		name, message string
		port          nft.HostPort
	}{
		{"ICMP", "want tcp, udp or sctp", hostPort(policy.ICMP, "0.0.0.0", 1, "10.0.0.1", 1)},
		{"port 0", "want ports from 1", hostPort(policy.TCP, "0.0.0.0", 0, "10.0.0.1", 1)},
		{"no port of the pod", "want ports from 1", hostPort(policy.TCP, "0.0.0.0", 1, "10.0.0.1", 0)},
		{"two families", "one family", hostPort(policy.TCP, "::", 1, "10.0.0.1", 1)},
		{"mapped", "one family", hostPort(policy.TCP, "::ffff:192.0.2.1", 1, "10.0.0.1", 1)},
		{"no address", "one family", nft.HostPort{Protocol: policy.TCP, Port: 1, To: at("10.0.0.1", 1)}},
	} {
		_, err := table.Apply(context.Background(), nft.Change{HostPorts: []nft.HostPort{c.port}})
		if err == nil || !strings.Contains(err.Error(), c.message) {
			t.Errorf("%s: error %v, want one with %q", c.name, err, c.message)
		}
	}
	p := hostPort(policy.TCP, "0.0.0.0", 1, "10.0.0.1", 1)
	if _, err := table.Apply(context.Background(), nft.Change{HostPorts: []nft.HostPort{p, p}}); err == nil || !strings.Contains(err.Error(), "stands twice") {
		t.Errorf("one port twice: %v", err)
	}
	if s := state(t, table); len(s.HostPorts) != 0 {
		t.Errorf("something came: %v", s.HostPorts)
	}
}
