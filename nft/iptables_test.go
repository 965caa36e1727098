package nft_test

import (
	"io"
	"net"
	"net/netip"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/nft/nfttest"
	"github.com/nftcni/nftcni/policy"
)

// proxyRules are what kube-proxy writes in iptables mode (1.36) for a Service with one endpoint, a
// ClusterIP and NodePorts of both external traffic policies; the names of Service chains are short.
const proxyRules = `*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-SVC-WEB - [0:0]
:KUBE-EXT-WEB - [0:0]
:KUBE-SVL-WEB - [0:0]
:KUBE-EXT-LOCAL - [0:0]
:KUBE-SEP-WEB - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-SERVICES -d @SERVICE -p tcp -m tcp --dport 80 -j KUBE-SVC-WEB
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-NODEPORTS -p tcp -m tcp --dport 30080 -j KUBE-EXT-WEB
-A KUBE-NODEPORTS -p tcp -m tcp --dport 30081 -j KUBE-EXT-LOCAL
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-EXT-WEB -j KUBE-MARK-MASQ
-A KUBE-EXT-WEB -j KUBE-SVC-WEB
-A KUBE-EXT-LOCAL -s @PODS -j KUBE-SVC-WEB
-A KUBE-EXT-LOCAL -m addrtype --src-type LOCAL -j KUBE-MARK-MASQ
-A KUBE-EXT-LOCAL -m addrtype --src-type LOCAL -j KUBE-SVC-WEB
-A KUBE-EXT-LOCAL -j KUBE-SVL-WEB
-A KUBE-SVC-WEB ! -s @PODS -d @SERVICE -p tcp -m tcp --dport 80 -j KUBE-MARK-MASQ
-A KUBE-SVC-WEB -j KUBE-SEP-WEB
-A KUBE-SVL-WEB -j KUBE-SEP-WEB
-A KUBE-SEP-WEB -s @SERVER -j KUBE-MARK-MASQ
-A KUBE-SEP-WEB -p tcp -m tcp -j DNAT --to-destination @TARGET
COMMIT
*filter
:KUBE-FORWARD - [0:0]
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
`

// asNft is the translation of one restore file for a machine without iptables: what iptables-nft
// makes of these rules, in nft's words.
func asNft(family, service, pods, server, target string) string {
	return strings.NewReplacer("FAM", family, "@SERVICE", service, "@PODS", pods, "@SERVER", server, "@TARGET", target).Replace(`table FAM nat {
	chain KUBE-MARK-MASQ { meta mark set meta mark or 0x4000; }
	chain KUBE-SEP-WEB { FAM saddr @SERVER jump KUBE-MARK-MASQ; meta l4proto tcp dnat to @TARGET; }
	chain KUBE-SVC-WEB { FAM saddr != @PODS FAM daddr @SERVICE tcp dport 80 jump KUBE-MARK-MASQ; jump KUBE-SEP-WEB; }
	chain KUBE-EXT-WEB { jump KUBE-MARK-MASQ; jump KUBE-SVC-WEB; }
	chain KUBE-EXT-LOCAL { FAM saddr @PODS jump KUBE-SVC-WEB; fib saddr type local jump KUBE-MARK-MASQ; fib saddr type local jump KUBE-SVC-WEB; jump KUBE-SEP-WEB; }
	chain KUBE-NODEPORTS { tcp dport 30080 jump KUBE-EXT-WEB; tcp dport 30081 jump KUBE-EXT-LOCAL; }
	chain KUBE-SERVICES { FAM daddr @SERVICE tcp dport 80 jump KUBE-SVC-WEB; fib daddr type local jump KUBE-NODEPORTS; }
	chain KUBE-POSTROUTING { meta mark and 0x4000 != 0x4000 return; meta mark set meta mark xor 0x4000; masquerade fully-random; }
	chain PREROUTING { type nat hook prerouting priority dstnat; jump KUBE-SERVICES; }
	chain OUTPUT { type nat hook output priority -100; jump KUBE-SERVICES; }
	chain POSTROUTING { type nat hook postrouting priority srcnat; jump KUBE-POSTROUTING; }
}
table FAM filter {
	chain KUBE-FORWARD { ct state invalid drop; meta mark and 0x4000 == 0x4000 accept; ct state related,established accept; }
	chain FORWARD { type filter hook forward priority filter; jump KUBE-FORWARD; }
}
`)
}

// TestKernelKubeProxyIptables: kube-proxy's rules of iptables mode, by iptables of both kinds where
// they are installed, and translated. Policy judges the client's real address behind every way to a
// Service, 0x4000 still masquerades, and a connection is marked on its way out for nobody else.
func TestKernelKubeProxyIptables(t *testing.T) {
	needNft(t)
	for _, kind := range []string{"translated", "nft", "legacy"} {
		if _, err := exec.LookPath("iptables-" + kind + "-restore"); err != nil && kind != "translated" {
			t.Logf("iptables-%s is not installed", kind)
			continue
		}
		for _, f := range []proxyFamily{
			{"ip", "iptables", "10.96.0.1", "10.9.0.0/16", "10.9.0.1", "10.9.0.1:8060", "198.51.100.1", "192.0.2.9"},
			{"ip6", "ip6tables", "fd96::1", "fd09::/64", "fd09::1", "[fd09::1]:8060", "2001:db8:1::1", "2001:db8::9"},
		} {
			t.Run(kind+"/"+f.name, func(t *testing.T) { testProxy(t, kind, f) })
		}
	}
}

type proxyFamily struct{ name, tool, service, pods, server, target, node, outside string }

func testProxy(t *testing.T, kind string, f proxyFamily) {
	w := newWorld(t)
	if kind == "translated" {
		nftFile(t, asNft(f.name, f.service, f.pods, f.server, f.target))
	} else {
		cmd := exec.Command(f.tool + "-" + kind + "-restore")
		cmd.Stdin = strings.NewReader(strings.NewReplacer("@SERVICE", f.service, "@PODS", f.pods, "@SERVER", f.server, "@TARGET", f.target).Replace(proxyRules))
		if out, err := cmd.CombinedOutput(); err != nil {
			if kind == "legacy" { // the kernel may have no ip_tables any more
				t.Logf("%v: %s", err, out)
				return
			}
			t.Fatalf("%v: %s", err, out)
		}
	}
	sources := proxyServer(t, w, f)
	up, err := netlink.LinkByName(w.outside.Interface) // the node's own way to the Service, before DNAT
	if err != nil {
		t.Fatal(err)
	}
	service := net.ParseIP(f.service)
	if err := netlink.RouteAdd(&netlink.Route{LinkIndex: up.Attrs().Index, Dst: netlink.NewIPNet(service)}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		from *nfttest.Host
		port uint16
		open bool
		seen string // by the server
	}{
		{"allowed client, ClusterIP", w.client, 80, true, "client"},
		{"stranger, ClusterIP", w.stranger, 80, false, ""},
		{"outside, ClusterIP", w.outside, 80, false, ""},
		{"the server itself, ClusterIP", w.server, 80, true, "node"},
		{"the node, ClusterIP", &w.Host, 80, true, "any"},
		{"stranger, NodePort", w.stranger, 30080, false, ""},
		{"outside, NodePort", w.outside, 30080, false, ""},
		{"allowed client, NodePort", w.client, 30080, true, "node"},
		{"allowed client, local NodePort", w.client, 30081, true, "client"},
	} {
		to := at(f.node, c.port)
		if c.port == 80 {
			to = at(f.service, 80)
		}
		want(t, c.name, c.from.TCP(to), c.open)
		checkSource(t, c.name, sources, c.open, c.seen, map[string]string{"client": hostIn(w.client, f), "node": ""})
	}
	opened := apply(t, w.table, nft.Change{Delta: policy.Delta{Steps: [][]policy.Op{{put(others(profileWeb+2), classAllow)},
		{del(ingressOf(f.server)), put(ingressOf(f.server), profileWeb+2)}}}})
	finish(t, w.table, opened)
	want(t, "outside, NodePort, when all are let in", w.outside.TCP(at(f.node, 30080)), true)
	checkSource(t, "outside, NodePort", sources, true, "node", nil)
	want(t, "outside, local NodePort", w.outside.TCP(at(f.node, 30081)), true)
	checkSource(t, "outside, local NodePort", sources, true, "outside", map[string]string{"outside": f.outside})
}

func hostIn(h *nfttest.Host, f proxyFamily) string {
	for _, a := range h.Addrs {
		if a.Is4() == (f.name == "ip") {
			return a.String()
		}
	}
	return ""
}

// proxyServer tells the source of every connection to the Service's target.
func proxyServer(t *testing.T, w *world, f proxyFamily) <-chan string {
	t.Helper()
	sources := make(chan string, 64)
	const port = 8060
	if err := w.server.Do(func() error {
		l, err := net.Listen("tcp", net.JoinHostPort(f.server, strconv.Itoa(port)))
		if err != nil {
			return err
		}
		t.Cleanup(func() { _ = l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				sources <- netip.MustParseAddrPort(c.RemoteAddr().String()).Addr().String()
				go func() { _, _ = io.Copy(c, c); _ = c.Close() }()
			}
		}()
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return sources
}

// checkSource compares what the server saw; "node" is any address that is no pod's and not outside's.
func checkSource(t *testing.T, name string, sources <-chan string, open bool, want string, addrs map[string]string) {
	t.Helper()
	if !open || want == "any" {
		for len(sources) > 0 {
			<-sources
		}
		return
	}
	got := <-sources
	switch a := addrs[want]; {
	case a != "" && got != a:
		t.Errorf("%s: the server saw %s, want %s", name, got, a)
	case a == "" && (strings.HasPrefix(got, "10.9.0.2") || strings.HasPrefix(got, "fd09::2") || strings.HasPrefix(got, "192.0.2.") || strings.HasPrefix(got, "2001:db8::9")):
		t.Errorf("%s: the server saw %s, want it masqueraded", name, got)
	}
}
