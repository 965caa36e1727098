package nft_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/nft/nfttest"
	"github.com/nftcni/nftcni/policy"
	"github.com/nftcni/nftcni/policy/policytest"
)

const (
	randomClusters = 30
	randomFlows    = 110 // a cluster
	randomPods     = 14
)

// probe is a flow as one packet on the wire, numbered by its IPv4 identification or its IPv6 flow label.
type probe struct {
	number   uint32
	src, dst netip.Addr
}

// wire sends packets with any source from a host, and notes the probes that arrive there.
type wire struct {
	host     *nfttest.Host
	raw4     int
	raw6     int
	mu       sync.Mutex
	arrivals map[probe]bool
}

func newWire(t *testing.T, h *nfttest.Host) *wire {
	t.Helper()
	w := &wire{host: h, arrivals: map[probe]bool{}}
	tap := -1
	err := h.Do(func() (err error) {
		// Nobody forwards what is not his.
		nfttest.Sysctl(t, "net/ipv4/ip_forward", "0")
		nfttest.Sysctl(t, "net/ipv6/conf/all/forwarding", "0")
		if w.raw4, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW); err != nil {
			return fmt.Errorf("raw socket: %w", err)
		}
		if w.raw6, err = unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW); err != nil {
			return fmt.Errorf("raw socket: %w", err)
		}
		all := int(binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL)))
		if tap, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, all); err != nil {
			return fmt.Errorf("packet socket: %w", err)
		}
		tv := unix.NsecToTimeval(int64(50 * time.Millisecond))
		return unix.SetsockoptTimeval(tap, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
	})
	if err != nil {
		t.Fatal(err)
	}
	stop, done := make(chan struct{}), make(chan struct{})
	go func() { defer close(done); w.listen(tap, stop) }()
	t.Cleanup(func() {
		close(stop)
		<-done
		for _, fd := range []int{w.raw4, w.raw6, tap} {
			_ = unix.Close(fd)
		}
	})
	return w
}

func (w *wire) listen(tap int, stop <-chan struct{}) {
	b := make([]byte, 256)
	for {
		select {
		case <-stop:
			return
		default:
		}
		n, from, err := unix.Recvfrom(tap, b, 0)
		if err != nil {
			continue // the timeout
		}
		if l, ok := from.(*unix.SockaddrLinklayer); !ok || l.Pkttype == unix.PACKET_OUTGOING {
			continue
		}
		if p, ok := parseProbe(b[:n]); ok {
			w.mu.Lock()
			w.arrivals[p] = true
			w.mu.Unlock()
		}
	}
}

func parseProbe(b []byte) (p probe, ok bool) {
	switch {
	case len(b) >= 20 && b[0]>>4 == 4:
		p.number = uint32(binary.BigEndian.Uint16(b[4:]))
		p.src, _ = netip.AddrFromSlice(b[12:16])
		p.dst, _ = netip.AddrFromSlice(b[16:20])
		return p, true
	case len(b) >= 40 && b[0]>>4 == 6:
		p.number = binary.BigEndian.Uint32(b) & 0xfffff
		p.src, _ = netip.AddrFromSlice(b[8:24])
		p.dst, _ = netip.AddrFromSlice(b[24:40])
		return p, true
	}
	return p, false
}

func (w *wire) has(p probe) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.arrivals[p]
}

// send sends the first packet of a flow: a TCP SYN, a UDP datagram or an echo request.
func (w *wire) send(f policy.Flow, number uint32) error {
	source := uint16(20_000 + number%40_000)
	var m []byte
	offset := 6 // of the checksum
	switch f.Protocol {
	case policy.TCP:
		m = binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, source), f.Port)
		m = append(m, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 4, 0, 0, 0, 0, 0)
		offset = 16
	case policy.UDP:
		m = udp(source, f.Port)
	default:
		m = append([]byte{byte(f.Port >> 8), byte(f.Port), 0, 0}, byte(source>>8), byte(source), 0, 1)
		offset = 2
	}
	if f.Src.Is6() {
		m = checksum6(f.Src.String(), f.Dst.String(), byte(f.Protocol), m, offset)
		p := ipv6(f.Src.String(), f.Dst.String(), byte(f.Protocol), m)
		p[1], p[2], p[3] = p[1]|byte(number>>16)&0xf, byte(number>>8), byte(number)
		return unix.Sendto(w.raw6, p, 0, &unix.SockaddrInet6{Addr: f.Dst.As16()})
	}
	if f.Protocol == policy.ICMP {
		binary.BigEndian.PutUint16(m[2:], nfttest.Checksum(m))
	} else {
		pseudo := append(append(f.Src.AsSlice(), f.Dst.AsSlice()...), 0, byte(f.Protocol), 0, byte(len(m)))
		binary.BigEndian.PutUint16(m[offset:], nfttest.Checksum(append(pseudo, m...)))
	}
	p := ipv4(f.Src.String(), f.Dst.String(), byte(f.Protocol), m)
	binary.BigEndian.PutUint16(p[4:], uint16(number))
	p[10], p[11] = 0, 0
	binary.BigEndian.PutUint16(p[10:], nfttest.Checksum(p[:20]))
	return unix.Sendto(w.raw4, p, 0, &unix.SockaddrInet4{Addr: f.Dst.As4()})
}

// randomNode has a pod for every address of policytest's pods, and the rest of the world behind one uplink. An address that is no
// local pod's of the cluster at hand is the world's.
type randomNode struct {
	*nfttest.Node
	slots map[netip.Addr]*wire
	world *wire
	local map[netip.Addr]bool
}

func newRandomNode(t *testing.T) *randomNode {
	n := &randomNode{Node: nfttest.NewNode(t), slots: map[netip.Addr]*wire{}, local: map[netip.Addr]bool{}}
	var hosts []*nfttest.Host
	for i := 1; i <= randomPods; i++ {
		h := n.Pod(fmt.Sprintf("slot%d", i), policytest.Address(i, false).String(), policytest.Address(i, true).String())
		hosts = append(hosts, h)
	}
	outside := n.Outside("world", "192.0.2.9", "2001:db8::9")
	n.Await(append(hosts, outside)...)
	for _, h := range hosts {
		w := newWire(t, h)
		for _, a := range h.Addrs {
			n.slots[a], n.local[a] = w, true
		}
	}
	n.world = newWire(t, outside)
	l, err := netlink.LinkByName(outside.Interface)
	if err != nil {
		t.Fatal(err)
	}
	for _, gw := range outside.Addrs {
		all := &net.IPNet{IP: make(net.IP, gw.BitLen()/8), Mask: net.CIDRMask(0, gw.BitLen())}
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: all, Gw: gw.AsSlice(), Flags: int(netlink.FLAG_ONLINK)}); err != nil {
			t.Fatal(err)
		}
	}
	return n
}

// settle gives the node the local pods of c, and returns what to unbind and to bind.
func (n *randomNode) settle(t *testing.T, c *policy.Cluster) (unbind, bind []nft.Binding) {
	t.Helper()
	o := policy.NewOracle(c, policytest.Node(0))
	for a, w := range n.slots {
		far := netip.MustParseAddr("203.0.113.9")
		if a.Is6() {
			far = netip.MustParseAddr("2001:db8::1")
		}
		local := o.Evaluate(policy.Flow{Src: a, Dst: far, Protocol: policy.TCP, Port: 1}).Egress.Reason != policy.NotLocal
		b := nft.Binding{Interface: w.host.Interface, Addr: a}
		if local {
			bind = append(bind, b)
		} else {
			unbind = append(unbind, b)
		}
		if local == n.local[a] {
			continue
		}
		n.local[a] = local
		l, err := netlink.LinkByName(w.host.Interface)
		if err != nil {
			t.Fatal(err)
		}
		route := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}, Scope: netlink.SCOPE_LINK}
		change := netlink.RouteDel
		if local {
			change = netlink.RouteReplace
		}
		if err := change(route); err != nil {
			t.Fatalf("route to %s: %v", a, err)
		}
	}
	return unbind, bind
}

func (n *randomNode) at(a netip.Addr) *wire {
	if n.local[a] {
		return n.slots[a]
	}
	return n.world
}

// flow draws a flow that crosses the node as one of the packets above.
func (n *randomNode) flow(g *policytest.Generator, c *policy.Cluster) policy.Flow {
	usable := func(a netip.Addr) bool {
		if a.Is4() {
			b := a.As4()
			return a.IsGlobalUnicast() && b[0] != 0 && b[0] < 224 && b != [4]byte{192, 168, 0, 10}
		}
		return a.IsGlobalUnicast() && a.As16()[0] != 0 && a != netip.MustParseAddr("fd01::10")
	}
	for {
		f := g.Flow(c)
		if g.IntN(10) < 2 || f.Protocol != policy.TCP && f.Protocol != policy.UDP {
			f.Protocol, f.Port = policy.ICMP, 8<<8
			if f.Src.Is6() {
				f.Protocol, f.Port = policy.ICMPv6, 128<<8
			}
		}
		if usable(f.Src) && usable(f.Dst) && f.Src != f.Dst && f.Src.Is4() == f.Dst.Is4() && (n.local[f.Src] || n.local[f.Dst]) {
			return f
		}
	}
}

// TestKernelRandomClusters: random clusters, one after the other in one table, give real packets the oracle's answers.
func TestKernelRandomClusters(t *testing.T) {
	n := newRandomNode(t)
	table := open(t, nft.Options{})
	engine := policy.NewEngine(policytest.Node(0))
	seen := map[string]int{}
	number := uint32(0)
	for seed := range uint64(randomClusters) {
		g := policytest.New(seed, policytest.Options{Pods: randomPods, Tiers: seed%3 == 2})
		c := g.Cluster()
		unbind, bind := n.settle(t, c)
		finish(t, table, apply(t, table, nft.Change{Unbind: unbind, Delta: engine.Replace(c), Bind: bind}))
		oracle := policy.NewOracle(c, policytest.Node(0))
		want := map[probe]bool{}
		flows := map[probe]policy.Flow{}
		for range randomFlows {
			f := n.flow(g, c)
			number++
			p := probe{number, f.Src, f.Dst}
			v := oracle.Evaluate(f)
			want[p], flows[p] = v.Allowed, f
			tally(seen, f, v)
			if err := n.at(f.Src).send(f, number); err != nil && !errors.Is(err, unix.EPERM) {
				t.Fatalf("send %+v: %v", f, err)
			}
		}
		n.await(want)
		for p, allowed := range want {
			if got := n.at(p.dst).has(p); got != allowed {
				t.Errorf("seed %d: %+v: arrived %v, oracle %v: %+v", seed, flows[p], got, allowed, oracle.Evaluate(flows[p]))
			}
		}
	}
	t.Logf("%d flows: %v", number, seen)
	for _, kind := range []string{"v4", "v6", "tcp", "udp", "icmp", "denied", "allowed"} {
		if seen[kind] < int(number)/20 {
			t.Errorf("%d of %d flows are %s: too few", seen[kind], number, kind)
		}
	}
	if number < 3000 {
		t.Errorf("%d flows, want at least 3,000", number)
	}
}

// await waits for what must arrive, and a moment for what must not.
func (n *randomNode) await(want map[probe]bool) {
	deadline := time.Now().Add(20 * time.Second)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for missing := true; missing && time.Now().Before(deadline); {
		missing = false
		for p, allowed := range want {
			missing = missing || allowed && !n.at(p.dst).has(p)
		}
		<-tick.C
	}
	quiet := time.NewTimer(50 * time.Millisecond)
	<-quiet.C
}

func tally(seen map[string]int, f policy.Flow, v policy.Verdict) {
	family, verdict := "v4", "denied"
	if f.Src.Is6() {
		family = "v6"
	}
	if v.Allowed {
		verdict = "allowed"
	}
	for _, k := range []string{family, verdict, strings.TrimSuffix(f.Protocol.String(), "v6")} {
		seen[k]++
	}
}
