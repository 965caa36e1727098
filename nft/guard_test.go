package nft_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/florianl/go-nflog/v2"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/nft/nfttest"
	"github.com/nftcni/nftcni/policy"
)

// sendRaw sends an IPv4 packet with any source address, or an IPv6 ICMP message with any source.
func sendRaw(from *nfttest.Host, packet []byte) error {
	return from.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW)
		if err != nil {
			return fmt.Errorf("raw socket: %w", err)
		}
		defer unix.Close(fd)
		var to unix.SockaddrInet4
		copy(to.Addr[:], packet[16:20])
		return unix.Sendto(fd, packet, 0, &to)
	})
}

// ipv4 is a packet; ipv4UDP and ipv4ICMP fill it.
func ipv4(src, dst string, proto byte, payload []byte) []byte {
	p := []byte{0x45, 0, 0, 0, 0, 1, 0, 0, 64, proto, 0, 0}
	p = append(p, addr(src).AsSlice()...)
	p = append(p, addr(dst).AsSlice()...)
	binary.BigEndian.PutUint16(p[2:], uint16(20+len(payload)))
	binary.BigEndian.PutUint16(p[10:], nfttest.Checksum(p[:20]))
	return append(p, payload...)
}

func udp(sport, dport uint16) []byte {
	b := binary.BigEndian.AppendUint16(nil, sport)
	b = binary.BigEndian.AppendUint16(b, dport)
	return append(b, 0, 12, 0, 0, 'n', 'f', 't', 0) // length 12, no checksum
}

func icmp(kind, code byte, rest []byte) []byte {
	b := append([]byte{kind, code, 0, 0, 0, 0, 0, 0}, rest...)
	binary.BigEndian.PutUint16(b[2:], nfttest.Checksum(b))
	return b
}

// count reads a counter by its comment.
func count(t *testing.T, comment string) int {
	t.Helper()
	total := 0
	for _, line := range strings.Split(runNft(t, "list", "table", "inet", nft.TableName), "\n") {
		if _, after, ok := strings.Cut(line, "counter packets "); ok && strings.Contains(line, comment) {
			var n int
			_, _ = fmt.Sscan(after, &n)
			total += n
		}
	}
	return total
}

func TestKernelSpoofedSources(t *testing.T) {
	needNft(t)
	w := newWorld(t)
	sink := w.outside.Sink(addr("192.0.2.9"), 9)
	own := sendRaw(w.client, ipv4("10.9.0.2", "192.0.2.9", unix.IPPROTO_UDP, udp(1, 9)))
	if own != nil {
		t.Fatal(own)
	}
	for _, src := range []string{"10.9.0.3", "10.9.0.77", "198.51.100.1", "127.0.0.1", "192.0.2.9"} {
		_ = sendRaw(w.client, ipv4(src, "192.0.2.9", unix.IPPROTO_UDP, udp(1, 9)))
	}
	if n := sink.Total(); n != 1 {
		t.Errorf("%d datagrams arrived outside, want the one with the pod's own source", n)
	}
	if n := count(t, "not the pod's address"); n < 4 {
		t.Errorf("the guard counted %d spoofed packets, want at least 4", n)
	}
	// The allowed client's address from the uplink: the server must not see it.
	in := w.server.Sink(addr("10.9.0.1"), 8)
	if err := sendRaw(w.outside, ipv4("10.9.0.2", "10.9.0.1", unix.IPPROTO_UDP, udp(1, 80))); err != nil {
		t.Fatal(err)
	}
	_ = in.Total()
	if n := count(t, "from outside"); n != 1 {
		t.Errorf("%d packets with a local pod's address dropped at the uplink, want 1", n)
	}
}

func TestKernelStrays(t *testing.T) {
	needNft(t)
	w := newWorld(t)
	strays := func() int { return count(t, "no live connection") }
	// An error about no connection, to an isolated pod.
	quoted := ipv4("10.9.0.1", "192.0.2.9", unix.IPPROTO_UDP, udp(4242, 4343))
	if err := sendRaw(w.outside, ipv4("192.0.2.9", "10.9.0.1", unix.IPPROTO_ICMP, icmp(3, 1, quoted))); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the stray error is counted", func() bool { return strays() == 1 })
	// The error of a live connection passes: a closed port answers at once.
	c := w.server.DialUDP(at("192.0.2.9", 1))
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("error of a live connection: %v, want connection refused", err)
	}
	if strays() != 1 {
		t.Error("the live connection's error counted as a stray")
	}
	// A TCP packet of no connection: conntrack may call it new (tcp_loose), policy denies it.
	ack := append(binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, 999), 81), 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 4, 0, 0, 0, 0, 0)
	in := ipv4("10.9.0.2", "10.9.0.1", unix.IPPROTO_TCP, ack)
	if err := sendRaw(w.client, in); err != nil {
		t.Fatal(err)
	}
}

// eventually waits for what the kernel does a moment later.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Errorf("%s: not within 20 s", what)
			return
		}
		timer := time.NewTimer(10 * time.Millisecond)
		<-timer.C
	}
}

// TestKernelForeignMark: a connection that is no pod's keeps the mark another table gave it.
func TestKernelForeignMark(t *testing.T) {
	needNft(t)
	w := newWorld(t)
	far := w.Outside("far", "203.0.113.7", "2001:db8:2::7")
	w.Await(far)
	nftFile(t, `table inet vpn {
	chain marks { type filter hook forward priority mangle; ct state new ct mark set 0x77; }
	chain sees { type filter hook postrouting priority 300; ct mark 0x77 meta mark set 0x1 counter comment "kept"; }
}`)
	for _, a := range []string{"203.0.113.7", "2001:db8:2::7"} {
		far.EchoTCP(addr(a), 80)
		c := w.outside.Connect(at(a, 80))
		for range 3 {
			want(t, "transit "+a, nfttest.Answers(c), true)
		}
	}
	out := runNft(t, "list", "table", "inet", "vpn")
	var kept int
	if _, after, ok := strings.Cut(out, "counter packets "); ok {
		_, _ = fmt.Sscan(after, &kept)
	}
	if kept < 20 {
		t.Errorf("%d packets still had the foreign connection mark, want every one of two connections (more than 20)", kept)
	}
}

// kubeProxy does what kube-proxy does for a Service: DNAT, and mark 0x4000 for what must be masqueraded.
const kubeProxy = `table ip kube-proxy-like {
	chain services { type nat hook prerouting priority dstnat;
		ip daddr 10.96.0.1 tcp dport 80 ip saddr != 10.9.0.2 meta mark set meta mark or 0x4000
		ip daddr 10.96.0.1 tcp dport 80 dnat to 10.9.0.1:80
	}
	chain postrouting { type nat hook postrouting priority srcnat - 1;
		meta mark and 0x4000 != 0x4000 return
		meta mark set meta mark xor 0x4000
		counter masquerade fully-random comment "marked"
	}
}`

func TestKernelKubeProxy(t *testing.T) {
	needNft(t)
	w := newWorld(t)
	nftFile(t, kubeProxy)
	want(t, "allowed client through the service", w.client.TCP(at("10.96.0.1", 80)), true)
	want(t, "stranger through the service", w.stranger.TCP(at("10.96.0.1", 80)), false)
	want(t, "server to itself through the service, masqueraded", w.server.TCP(at("10.96.0.1", 80)), true)
	out := runNft(t, "list", "table", "ip", "kube-proxy-like")
	if !strings.Contains(out, "counter packets 1 ") {
		t.Errorf("the mark 0x4000 did not survive for exactly the one allowed connection that had it:\n%s", out)
	}
	// Judged by the client's real address, marked by kube-proxy and allowed by policy: open the server to all.
	r := apply(t, w.table, nft.Change{Delta: policy.Delta{Steps: [][]policy.Op{{
		put(others(profileWeb+2), classAllow)}, {del(ingressOf("10.9.0.1")), put(ingressOf("10.9.0.1"), profileWeb+2)}}}})
	finish(t, w.table, r)
	c := w.stranger.Connect(at("10.96.0.1", 80))
	want(t, "stranger through the service when allowed", nfttest.Answers(c), true)
	out = runNft(t, "list", "table", "ip", "kube-proxy-like")
	if !strings.Contains(out, "counter packets 2 ") {
		t.Errorf("0x4000 of the stranger's connection was lost:\n%s", out)
	}
}

func TestKernelMasquerade(t *testing.T) {
	w := newWorld(t)
	sources := make(chan string, 4)
	listen := func(h *nfttest.Host, a string) {
		err := h.Do(func() error {
			l, err := net.Listen("tcp", net.JoinHostPort(a, "99"))
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
					from, _, _ := net.SplitHostPort(c.RemoteAddr().String())
					sources <- from
					_ = c.Close()
				}
			}()
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		to, seen string
		host     *nfttest.Host
	}{
		{"192.0.2.9", "198.51.100.1", w.outside}, {"2001:db8::9", "2001:db8:1::1", w.outside},
		{"10.9.0.3", "10.9.0.2", w.stranger}, {"fd09::3", "fd09::2", w.stranger},
	} {
		listen(c.host, c.to)
		if w.client.Connect(at(c.to, 99)) == nil {
			t.Errorf("no connection to %s", c.to)
			continue
		}
		if from := <-sources; from != c.seen {
			t.Errorf("%s saw the pod as %s, want %s", c.to, from, c.seen)
		}
	}
}

// TestKernelDenials: who was refused is in the sets, the deciding profile in set and nflog message.
func TestKernelDenials(t *testing.T) {
	w := newWorld(t)
	marks := make(chan uint32, 64)
	nf, err := nflog.Open(&nflog.Config{Group: nft.LogGroupDenied, Copymode: nflog.CopyPacket})
	if err != nil {
		t.Fatal(err)
	}
	defer nf.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	err = nf.RegisterWithErrorFunc(ctx, func(a nflog.Attribute) int {
		if a.Mark != nil {
			marks <- *a.Mark
		}
		return 0
	}, func(error) int { return 0 })
	if err != nil {
		t.Fatal(err)
	}
	want(t, "stranger", w.stranger.UDP(at("10.9.0.1", 80)), false)
	select {
	case m := <-marks:
		if m != profileWeb {
			t.Errorf("nflog mark %#x, want the profile %#x", m, uint32(profileWeb))
		}
	case <-time.After(20 * time.Second):
		t.Error("no nflog message")
	}
	want(t, "stranger", w.stranger.UDP(at("fd09::1", 80)), false)
	// An isolated address without a profile.
	apply(t, w.table, nft.Change{Delta: policy.Delta{Steps: [][]policy.Op{{put(isolated("10.9.0.3"), 0)}}}})
	want(t, "isolation without a profile", w.client.UDP(at("10.9.0.3", 7)), false)
	reader, err := nft.NewReader(context.Background(), nft.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	denials, err := reader.Denials(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]uint64{}
	for _, d := range denials {
		got[fmt.Sprintf("%#x %s %s", d.Profile, d.Src, d.Dst)] = d.Packets
	}
	for _, k := range []string{"0x20000001 10.9.0.3 10.9.0.1", "0x20000001 fd09::3 fd09::1", "0x20000000 10.9.0.2 10.9.0.3"} {
		if got[k] == 0 {
			t.Errorf("no denial %q in %v", k, got)
		}
	}
}

// TestKernelEgressAndNetworks: egress profiles, address ranges, everything else, and logging codes.
func TestKernelEgressAndNetworks(t *testing.T) {
	w := newWorld(t)
	const profile, id, class = policy.EgressProfileFirst, policy.IdentityFirst + 50, policy.ClassFirst + 50
	w.outside.EchoUDP(addr("192.0.2.9"), 53)
	w.outside.EchoUDP(addr("2001:db8::9"), 53)
	ops := []policy.Op{
		put(policy.Key{Map: policy.NetID, Addr: addr("192.0.2.0"), To: addr("192.0.2.255")}, id),
		put(policy.Key{Map: policy.NetID, Addr: addr("2001:db8::"), To: addr("2001:db8::ffff")}, id),
		put(access(profile, id), class), put(others(profile), classDeny),
		put(policy.Key{Map: policy.AccessPort, X: class, Protocol: policy.UDP, First: 53}, policy.CodeAllowLog),
		put(policy.Key{Map: policy.AccessRest, X: class}, policy.CodeDenyLog),
	}
	for _, a := range []string{"10.9.0.2", "fd09::2"} {
		ops = append(ops, put(egressOf(a), profile), put(policy.Key{Map: policy.IsolatedEgress, Addr: addr(a)}, 0))
	}
	apply(t, w.table, nft.Change{Delta: policy.Delta{Steps: [][]policy.Op{ops}, Revokes: true}})
	for _, a := range []string{"192.0.2.9", "2001:db8::9"} {
		want(t, "allowed range "+a, w.client.UDP(at(a, 53)), true)
		want(t, "denied port "+a, w.client.Ping(addr(a)), false)
		want(t, "other pod is not concerned "+a, w.stranger.UDP(at(a, 53)), true)
	}
	want(t, "egress denied though ingress allows", w.client.TCP(at("10.9.0.1", 80)), false)
	want(t, "its own node", w.client.Ping(addr("169.254.1.1")), true)
	v, err := w.table.Decide(context.Background(), policy.Flow{Src: addr("10.9.0.2"), Dst: addr("192.0.2.9"), Protocol: policy.UDP, Port: 53})
	if err != nil || !v.Allowed || !v.Log {
		t.Errorf("Decide %+v, %v; want allowed and logged", v, err)
	}
	v, err = w.table.Decide(context.Background(), policy.Flow{Src: addr("10.9.0.2"), Dst: addr("10.9.0.1"), Protocol: policy.TCP, Port: 80})
	if err != nil || v.Allowed {
		t.Errorf("Decide %+v, %v; want denied", v, err)
	}
}
