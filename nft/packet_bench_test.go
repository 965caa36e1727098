package nft_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/nft/nfttest"
	"github.com/nftcni/nftcni/policy"
)

// BenchmarkFirstPacket is the thread's CPU time of the first packet of a UDP connection from one pod to another through the
// node: send, forward with rules, deliver. Read differences between rows of one run. policies is the number of policies that select the
// server; the one that allows the client is the last. "classic" is a chain a policy with an address set each. Run it with
// -benchtime 100000x: every packet is a new conntrack entry.
func BenchmarkFirstPacket(b *testing.B) {
	for _, c := range []struct {
		name string
		load func(b *testing.B, w *benchWorld)
	}{
		{"rules=none", func(*testing.B, *benchWorld) {}},
		{"rules=conntrack", func(b *testing.B, _ *benchWorld) {
			b.Helper()
			load(b, "table inet tracking { chain forward { type filter hook forward priority -10; ct state established,related accept; }\n }")
		}},
		{"rules=nftcni/policies=1", func(b *testing.B, w *benchWorld) { b.Helper(); w.ours(b, 1) }},
		{"rules=nftcni/policies=10", func(b *testing.B, w *benchWorld) { b.Helper(); w.ours(b, 10) }},
		{"rules=nftcni/policies=1000", func(b *testing.B, w *benchWorld) { b.Helper(); w.ours(b, 1000) }},
		{"rules=classic/policies=1", func(b *testing.B, _ *benchWorld) { b.Helper(); classic(b, 1) }},
		{"rules=classic/policies=10", func(b *testing.B, _ *benchWorld) { b.Helper(); classic(b, 10) }},
		{"rules=classic/policies=100", func(b *testing.B, _ *benchWorld) { b.Helper(); classic(b, 100) }},
	} {
		b.Run(c.name, func(b *testing.B) {
			w := newBenchWorld(b)
			c.load(b, w)
			w.send(b)
		})
	}
}

type benchWorld struct {
	*nfttest.Node
	client, server *nfttest.Host
}

// newBenchWorld routes 10.9.0.50 to a pod that does not hold it: what arrives is dropped at once.
func newBenchWorld(b *testing.B) *benchWorld {
	b.Helper()
	w := &benchWorld{Node: nfttest.NewNode(b)}
	w.client, w.server = w.Pod("client", "10.9.0.2"), w.Pod("server", "10.9.0.1")
	w.Await(w.client, w.server)
	l, err := netlink.LinkByName(w.server.Interface)
	if err != nil {
		b.Fatal(err)
	}
	to := &net.IPNet{IP: net.IPv4(10, 9, 0, 50).To4(), Mask: net.CIDRMask(32, 32)}
	if err := netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: to, Scope: netlink.SCOPE_LINK}); err != nil {
		b.Fatal(err)
	}
	err = netlink.NeighSet(&netlink.Neigh{LinkIndex: l.Attrs().Index, IP: to.IP, HardwareAddr: w.server.MAC, State: netlink.NUD_PERMANENT})
	if err != nil {
		b.Fatal(err)
	}
	return w
}

// ours loads a profile of so many policies, each allowing an identity of its own; 10,000 pods are there.
func (w *benchWorld) ours(b *testing.B, policies int) {
	b.Helper()
	table, err := nft.Open(context.Background(), nft.Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = table.Close() })
	ops := append(classes(), put(others(profileWeb), classDeny), put(ingressOf("10.9.0.50"), profileWeb), put(isolated("10.9.0.50"), 0))
	for i := range policies {
		ops = append(ops, put(access(profileWeb, idClient+uint32(i)), classWeb))
	}
	for i := range 10_000 {
		ops = append(ops, put(policy.Key{Map: policy.PodID, Addr: podAddr(1<<20 + i)}, idClient+uint32(i%policies)))
	}
	ops = append(ops, put(podID("10.9.0.2"), idClient+uint32(policies-1)))
	bind := append(bindings(false, w.client, w.server), nft.Binding{Interface: w.server.Interface, Addr: addr("10.9.0.50")})
	if _, err := table.Apply(context.Background(), nft.Change{Delta: policy.Delta{Steps: [][]policy.Op{ops}}, Bind: bind}); err != nil {
		b.Fatal(err)
	}
}

// classic is the layout of a chain and a set for each policy, with 300 addresses a set.
func classic(b *testing.B, policies int) {
	b.Helper()
	var s strings.Builder
	s.WriteString("table inet classic {\n")
	for i := range policies {
		var peers []string
		for j := range 300 {
			peers = append(peers, podAddr(1<<20+i*300+j).String())
		}
		if i == policies-1 {
			peers = append(peers, "10.9.0.2")
		}
		fmt.Fprintf(&s, "set s%d { type ipv4_addr; elements = { %s }; }\nchain p%d { ip saddr @s%d udp dport 80 accept; }\n", i, strings.Join(peers, ","), i, i)
	}
	s.WriteString("chain pod {\n")
	for i := range policies {
		fmt.Fprintf(&s, "jump p%d\n", i)
	}
	s.WriteString("drop\n}\nchain forward { type filter hook forward priority -10; ct state established,related accept; ip daddr 10.9.0.50 jump pod; }\n}\n")
	load(b, s.String())
}

func load(b *testing.B, rules string) {
	b.Helper()
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(rules)
	if out, err := cmd.CombinedOutput(); err != nil {
		b.Skipf("nft: %v\n%s", err, out)
	}
}

// send sends b.N packets, each from another port, and reports the CPU time of each.
func (w *benchWorld) send(b *testing.B) {
	b.Helper()
	nfttest.Sysctl(b, "net/netfilter/nf_conntrack_udp_timeout", "1")
	err := w.client.Do(func() error {
		runtime.LockOSThread()
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW)
		if err != nil {
			return fmt.Errorf("raw socket: %w", err)
		}
		defer unix.Close(fd)
		p := ipv4("10.9.0.2", "10.9.0.50", unix.IPPROTO_UDP, udp(0, 80))
		to := unix.SockaddrInet4{Addr: [4]byte{10, 9, 0, 50}}
		var before, after unix.Timespec
		b.ResetTimer()
		if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &before); err != nil {
			return err
		}
		for i := range b.N {
			binary.BigEndian.PutUint16(p[20:], uint16(i*7919))
			if err := unix.Sendto(fd, p, 0, &to); err != nil {
				return fmt.Errorf("send: %w", err)
			}
		}
		if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &after); err != nil {
			return err
		}
		b.StopTimer()
		b.ReportMetric(float64(after.Nano()-before.Nano())/float64(b.N), "cpu-ns/packet")
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
}
