package nft_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/nft/nfttest"
	"github.com/nftcni/nftcni/policy"
)

// ipv6 is a packet with a chain of headers of the caller's.
func ipv6(src, dst string, next byte, payload []byte) []byte {
	p := []byte{0x60, 0, 0, 0, 0, 0, next, 255}
	binary.BigEndian.PutUint16(p[4:], uint16(len(payload)))
	p = append(p, addr(src).AsSlice()...)
	p = append(p, addr(dst).AsSlice()...)
	return append(p, payload...)
}

// checksum6 fills the checksum at offset of an upper-layer message.
func checksum6(src, dst string, next byte, message []byte, offset int) []byte {
	pseudo := append(addr(src).AsSlice(), addr(dst).AsSlice()...)
	pseudo = binary.BigEndian.AppendUint32(pseudo, uint32(len(message)))
	pseudo = append(pseudo, 0, 0, 0, next)
	binary.BigEndian.PutUint16(message[offset:], nfttest.Checksum(append(pseudo, message...)))
	return message
}

func sendRaw6(from *nfttest.Host, packet []byte) error {
	return from.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_RAW, unix.IPPROTO_RAW)
		if err != nil {
			return fmt.Errorf("raw socket: %w", err)
		}
		defer unix.Close(fd)
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return fmt.Errorf("find eth0: %w", err)
		}
		to := unix.SockaddrInet6{ZoneId: uint32(l.Attrs().Index)}
		copy(to.Addr[:], packet[24:40])
		return unix.Sendto(fd, packet, 0, &to)
	})
}

// udp6 is a UDP message behind n destination-options headers.
func udp6(src, dst string, port uint16, headers int) []byte {
	m := checksum6(src, dst, unix.IPPROTO_UDP, udp(1, port), 6)
	next := byte(unix.IPPROTO_UDP)
	for range headers {
		m = append([]byte{next, 0, 1, 4, 0, 0, 0, 0}, m...)
		next = unix.IPPROTO_DSTOPTS
	}
	return ipv6(src, dst, next, m)
}

func TestKernelIPv6Guards(t *testing.T) {
	needNft(t)
	w := newWorld(t)
	sink := w.outside.Sink(addr("2001:db8::9"), 9)
	for _, p := range [][]byte{
		udp6("fd09::2", "2001:db8::9", 9, 0), udp6("fd09::2", "2001:db8::9", 9, 2), // the pod's own
		udp6("fd09::3", "2001:db8::9", 9, 0), udp6("2001:db8:1::1", "2001:db8::9", 9, 0), udp6("fe80::77", "2001:db8::9", 9, 0),
	} {
		if err := sendRaw6(w.client, p); err != nil {
			t.Fatal(err)
		}
	}
	if n := sink.Total(); n != 2 {
		t.Errorf("%d datagrams arrived outside, want the two with the pod's own source", n)
	}
	before := count(t, "not the pod's address")
	message := func(kind byte, size int) []byte { return append([]byte{kind, 0, 0, 0}, make([]byte, size)...) }
	for _, c := range []struct {
		name    string
		kind    byte
		size    int
		counted int
	}{
		{"router advertisement", 134, 12, 1}, {"redirect", 137, 36, 1}, {"router solicitation", 133, 4, 0}, {"MLD report", 131, 20, 0},
	} {
		m := checksum6("fe80::77", "ff02::1", unix.IPPROTO_ICMPV6, message(c.kind, c.size), 2)
		if err := sendRaw6(w.client, ipv6("fe80::77", "ff02::1", unix.IPPROTO_ICMPV6, m)); err != nil {
			t.Fatal(err)
		}
		if n := count(t, "not the pod's address") - before; n != c.counted {
			t.Errorf("%s: counted %d, want %d", c.name, n, c.counted)
		}
		before = count(t, "not the pod's address")
	}
}

// TestKernelNeighborDiscovery: a pod that forgot its gateway finds it again.
func TestKernelNeighborDiscovery(t *testing.T) {
	w := newWorld(t)
	err := w.client.Do(func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.NeighDel(&netlink.Neigh{LinkIndex: l.Attrs().Index, IP: net.ParseIP("fe80::1")})
	})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the gateway is found by neighbour discovery", func() bool { return w.client.TCP(at("fd09::1", 80)) })
}

// TestKernelExtensionHeaders: policy finds the port behind extension headers, and in fragments.
func TestKernelExtensionHeaders(t *testing.T) {
	w := newWorld(t)
	allowed, denied := w.server.Sink(addr("fd09::1"), 8080), w.server.Sink(addr("fd09::1"), 90)
	apply(t, w.table, nft.Change{Delta: policy.Delta{Steps: [][]policy.Op{{
		put(policy.Key{Map: policy.AccessPort, X: classWeb, Protocol: policy.UDP, First: 8080}, policy.CodeAllow)}}}})
	for _, port := range []uint16{8080, 90} {
		if err := sendRaw6(w.client, udp6("fd09::2", "fd09::1", port, 3)); err != nil {
			t.Fatal(err)
		}
	}
	if a, d := allowed.Total(), denied.Total(); a != 1 || d != 0 {
		t.Errorf("behind extension headers: %d on the allowed port, want 1; %d on the denied one, want 0", a, d)
	}
	big := bytes.Repeat([]byte("x"), 4000)
	for _, a := range []string{"10.9.0.1", "fd09::1"} {
		for _, c := range []struct {
			from *nfttest.Host
			want bool
		}{{w.client, true}, {w.stranger, false}} {
			conn := c.from.DialUDP(at(a, 80))
			if _, err := conn.Write(big); err != nil {
				t.Fatal(err)
			}
			patience := time.Second
			if c.want {
				patience = 10 * time.Second
			}
			_ = conn.SetReadDeadline(time.Now().Add(patience))
			n, _ := conn.Read(make([]byte, 5000))
			want(t, c.from.Name+" fragments to "+a, n == 4000, c.want)
		}
	}
}

// TestKernelRevokePush: a revoked UDP flow is cut though only its server still speaks.
func TestKernelRevokePush(t *testing.T) {
	w := newWorld(t)
	conn := w.client.DialUDP(at("10.9.0.1", 80))
	want(t, "before", nfttest.Answers(conn), true)
	apply(t, w.table, nft.Change{Delta: policy.Delta{Revokes: true, Steps: [][]policy.Op{
		{put(others(profileWeb+1), classDeny)},
		{del(ingressOf("10.9.0.1")), put(ingressOf("10.9.0.1"), profileWeb+1)},
	}}})
	local := conn.LocalAddr().(*net.UDPAddr).AddrPort()
	push := ipv4("10.9.0.1", "10.9.0.2", unix.IPPROTO_UDP, udp(80, local.Port()))
	if err := sendRaw(w.server, push); err != nil {
		t.Fatal(err)
	}
	_ = conn.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
	if n, err := conn.Read(make([]byte, 64)); err == nil {
		t.Errorf("%d bytes of a revoked flow arrived", n)
	}
	// A flow of a profile that still allows goes on without the client speaking.
	r := apply(t, w.table, nft.Change{Delta: policy.Delta{Revokes: true, Steps: [][]policy.Op{
		{put(access(profileWeb+1, idClient), classWeb)},
	}}})
	if err := sendRaw(w.server, push); err != nil {
		t.Fatal(err)
	}
	_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := conn.Read(make([]byte, 64)); err != nil {
		t.Errorf("push of a flow that is allowed again: %v", err)
	}
	finish(t, w.table, r)
}
