package nft_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/nft/nfttest"
	"github.com/nftcni/nftcni/policy"
)

// fragments4 cuts a datagram from src to dst into two IPv4 fragments of one identification.
func fragments4(src, dst netip.Addr, payload []byte) (first, second []byte) {
	return fragment4(src, dst, 0x2000, payload[:8]), fragment4(src, dst, 1, payload[8:])
}

func fragment4(src, dst netip.Addr, offset uint16, part []byte) []byte {
	p := ipv4(src.String(), dst.String(), unix.IPPROTO_UDP, part)
	binary.BigEndian.PutUint16(p[4:], 77)
	binary.BigEndian.PutUint16(p[6:], offset)
	binary.BigEndian.PutUint16(p[10:], 0)
	binary.BigEndian.PutUint16(p[10:], nfttest.Checksum(p[:20]))
	return p
}

// fragments6 does the same with IPv6 fragment headers (RFC 8200, 4.5).
func fragments6(src, dst netip.Addr, payload []byte) (first, second []byte) {
	return fragment6(src, dst, 1, payload[:8]), fragment6(src, dst, 8, payload[8:])
}

func fragment6(src, dst netip.Addr, offset uint16, part []byte) []byte {
	p := []byte{0x60, 0, 0, 0, 0, byte(8 + len(part)), unix.IPPROTO_FRAGMENT, 64}
	p = append(append(p, src.AsSlice()...), dst.AsSlice()...)
	p = append(p, unix.IPPROTO_UDP, 0, byte(offset>>8), byte(offset), 0, 0, 0, 77)
	return append(p, part...)
}

// datagram is a UDP datagram with its checksum, so that one put together from two senders' parts would be taken only if
// the attacker knew the rest; no checksum is asked for over IPv4, so there it is taken as it is.
func datagram(src, dst netip.Addr, port uint16, text string) []byte {
	b := binary.BigEndian.AppendUint16(nil, 4000)
	b = binary.BigEndian.AppendUint16(b, port)
	b = binary.BigEndian.AppendUint16(b, uint16(8+len(text)))
	b = append(append(b, 0, 0), text...)
	if src.Is6() {
		pseudo := append(append([]byte{}, src.AsSlice()...), dst.AsSlice()...)
		pseudo = append(pseudo, 0, 0, 0, byte(len(b)), 0, 0, 0, unix.IPPROTO_UDP)
		binary.BigEndian.PutUint16(b[6:], nfttest.Checksum(append(pseudo, b...)))
	}
	return b
}

// TestKernelForgedFragment: a pod cannot put a fragment into another pod's datagram. The kernel puts fragments together
// by source address and identification, from whatever interface they came, so the guard has to come before that: what
// completes a datagram in the victim's name would be asked for nothing any more.
func TestKernelForgedFragment(t *testing.T) {
	w := newWorld(t)
	for _, c := range []struct {
		name     string
		src, dst string
		cut      func(src, dst netip.Addr, payload []byte) (first, second []byte)
		send     func(from *nfttest.Host, packet []byte) error
	}{{"IPv4", "10.9.0.2", "192.0.2.9", fragments4, sendRaw}, {"IPv6", "fd09::2", "2001:db8::9", fragments6, sendRaw6}} {
		t.Run(c.name, func(t *testing.T) {
			src, dst := addr(c.src), addr(c.dst)
			heard := hear(t, w.outside, netip.AddrPortFrom(dst, 9))
			_, forged := c.cut(src, dst, datagram(src, dst, 9, "from the attack"))
			first, second := c.cut(src, dst, datagram(src, dst, 9, "from the victim"))
			for _, p := range []struct {
				from   *nfttest.Host
				packet []byte
			}{{w.stranger, forged}, {w.client, first}, {w.client, second}} {
				if err := c.send(p.from, p.packet); err != nil {
					t.Fatal(err)
				}
			}
			if got := heard(); got != "from the victim" {
				t.Errorf("arrived: %q, want the victim's own datagram", got)
			}
		})
	}
}

// hear opens a UDP socket; what it returns waits for the first datagram.
func hear(t *testing.T, on *nfttest.Host, at netip.AddrPort) func() string {
	t.Helper()
	var c *net.UDPConn
	if err := on.Do(func() (err error) {
		c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return func() string {
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		b := make([]byte, 100)
		n, err := c.Read(b)
		if err != nil {
			return err.Error()
		}
		return string(b[:n])
	}
}

// TestKernelTraceFragments: a packet that came in fragments is one packet of a trace, with its port, and one that came whole is
// seen from before the source guard on.
func TestKernelTraceFragments(t *testing.T) {
	w := newWorld(t)
	for _, c := range []struct {
		src, dst string
		cut      func(src, dst netip.Addr, payload []byte) (first, second []byte)
		send     func(from *nfttest.Host, packet []byte) error
	}{{"10.9.0.2", "192.0.2.9", fragments4, sendRaw}, {"fd09::2", "2001:db8::9", fragments6, sendRaw6}} {
		for _, port := range []uint16{0, 9} {
			src, dst := addr(c.src), addr(c.dst)
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			begun, chains := map[string]policy.Flow{}, map[string]string{}
			err := nft.Trace(ctx, nft.Options{}, nft.TraceFilter{Dst: []netip.Addr{dst}, Protocol: policy.UDP, Port: port}, func() {
				first, second := c.cut(src, dst, datagram(src, dst, 9, "in two parts"))
				if err := errors.Join(c.send(w.client, first), c.send(w.client, second)); err != nil {
					t.Error(err)
				}
				_, _ = w.stranger.DialUDP(netip.AddrPortFrom(dst, 9)).Write([]byte("whole"))
			}, func(s nft.TraceStep) {
				id := fmt.Sprintf("%08x", s.Packet)
				chains[id] += s.Chain + " "
				if s.Flow.Src.IsValid() {
					begun[id] = s.Flow
				}
				if s.Chain == "srcnat" && begun[id].Src != src {
					cancel() // the whole one came last
				}
			})
			cancel()
			if err != nil {
				t.Fatal(err)
			}
			for id, f := range begun {
				want := "reassembled"
				if f.Src != src {
					want = "prerouting"
				}
				if f.Port != 9 || f.Protocol != policy.UDP || !strings.HasPrefix(chains[id], want) || !strings.Contains(chains[id], "forward") {
					t.Errorf("port %d: packet of %v begins at %q: %s", port, f, want, chains[id])
				}
			}
			if len(begun) != 2 {
				t.Errorf("port %d: %d packets to %s were traced, want 2: %v", port, len(begun), dst, begun)
			}
		}
	}
}
