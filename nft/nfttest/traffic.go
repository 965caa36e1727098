package nfttest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// EchoTCP answers every byte on a TCP port of the host until the test ends.
func (h *Host) EchoTCP(addr netip.Addr, port uint16) {
	h.t.Helper()
	h.must(h.Do(func() error {
		l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(addr, port)))
		if err != nil {
			return fmt.Errorf("listen: %w", err)
		}
		h.t.Cleanup(func() { _ = l.Close() })
		go func() {
			for {
				c, err := l.AcceptTCP()
				if err != nil {
					return
				}
				h.t.Cleanup(func() { _ = c.Close() })
				go echo(c)
			}
		}()
		return nil
	}))
}

func echo(c *net.TCPConn) {
	b := make([]byte, 4096)
	for {
		n, err := c.Read(b)
		if err != nil {
			return
		}
		if _, err := c.Write(b[:n]); err != nil {
			return
		}
	}
}

// EchoUDP answers every datagram on a UDP port of the host until the test ends.
func (h *Host) EchoUDP(addr netip.Addr, port uint16) {
	h.t.Helper()
	h.must(h.Do(func() error {
		c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr, port)))
		if err != nil {
			return fmt.Errorf("listen: %w", err)
		}
		h.t.Cleanup(func() { _ = c.Close() })
		go func() {
			b := make([]byte, 1<<16)
			for {
				n, from, err := c.ReadFromUDPAddrPort(b)
				if err != nil {
					return
				}
				_, _ = c.WriteToUDPAddrPort(b[:n], from)
			}
		}()
		return nil
	}))
}

// Connect opens a TCP connection from the host; nil when it gets no answer in time.
func (h *Host) Connect(to netip.AddrPort) net.Conn {
	var c net.Conn
	_ = h.Do(func() error {
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		defer silence(cancel)()
		var err error
		c, err = new(net.Dialer).DialContext(ctx, "tcp", to.String())
		if err != nil {
			c = nil
		}
		return err
	})
	if c != nil {
		h.t.Cleanup(func() { _ = c.Close() })
	}
	return c
}

// DialUDP connects a UDP socket of the host.
func (h *Host) DialUDP(to netip.AddrPort) net.Conn {
	h.t.Helper()
	var c net.Conn
	h.must(h.Do(func() (err error) {
		c, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
		return err
	}))
	h.t.Cleanup(func() { _ = c.Close() })
	return c
}

// Answers sends one message on c and reports whether it comes back.
func Answers(c net.Conn) bool {
	if c == nil {
		return false
	}
	message := binary.BigEndian.AppendUint64(nil, uint64(time.Now().UnixNano()))
	if _, err := c.Write(message); err != nil {
		return false
	}
	_ = c.SetReadDeadline(time.Time{})
	defer silence(func() { _ = c.SetReadDeadline(time.Unix(1, 0)) })()
	b := make([]byte, 64)
	for {
		n, err := c.Read(b)
		if err != nil {
			return false
		}
		if string(b[:n]) == string(message) {
			return true
		}
	}
}

// TCP and UDP report whether one probe to an echo server is answered.
func (h *Host) TCP(to netip.AddrPort) bool { return Answers(h.Connect(to)) }

// UDP is TCP for datagrams.
func (h *Host) UDP(to netip.AddrPort) bool { return Answers(h.DialUDP(to)) }

// Ping reports whether an echo request is answered.
func (h *Host) Ping(to netip.Addr) bool {
	ok := false
	_ = h.Do(func() error {
		var err error
		ok, err = ping(to)
		return err
	})
	return ok
}

// Await pings every address of the hosts until it answers: IPv6 is not there the moment a link is up. Call it before
// rules are loaded.
func (n *Node) Await(hosts ...*Host) {
	n.t.Helper()
	for _, h := range hosts {
		for _, a := range h.Addrs {
			deadline := time.Now().Add(20 * time.Second)
			for !n.Ping(a) {
				if time.Now().After(deadline) {
					n.t.Fatalf("%s does not answer at %s", h.Name, a)
				}
			}
		}
	}
}

func ping(to netip.Addr) (bool, error) {
	family, proto, request, reply := unix.AF_INET, unix.IPPROTO_ICMP, byte(8), byte(0)
	if to.Is6() {
		family, proto, request, reply = unix.AF_INET6, unix.IPPROTO_ICMPV6, 128, 129
	}
	fd, err := unix.Socket(family, unix.SOCK_RAW, proto)
	if err != nil {
		return false, fmt.Errorf("raw socket: %w", err)
	}
	defer unix.Close(fd)
	stamp := uint16(time.Now().UnixNano())
	m := binary.BigEndian.AppendUint16([]byte{request, 0, 0, 0}, stamp)
	m = append(m, 0, 1, 'n', 'f', 't', '.')
	if family == unix.AF_INET {
		binary.BigEndian.PutUint16(m[2:], Checksum(m))
	}
	if err := unix.Sendto(fd, m, 0, sockaddr(netip.AddrPortFrom(to, 0))); err != nil {
		return false, fmt.Errorf("send echo request: %w", err)
	}
	tv := unix.NsecToTimeval(int64(patience()))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return false, fmt.Errorf("set timeout: %w", err)
	}
	b := make([]byte, 256)
	for slow := false; ; {
		n, _, err := unix.Recvfrom(fd, b, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if errors.Is(err, unix.EAGAIN) && !slow {
			slow = true
			roundTrips(context.Background())
			continue
		}
		if err != nil {
			return false, nil
		}
		p := b[:n]
		if family == unix.AF_INET && n > 20 {
			p = p[int(p[0]&15)*4:]
		}
		if len(p) >= 8 && p[0] == reply && binary.BigEndian.Uint16(p[4:]) == stamp {
			return true, nil
		}
	}
}

// Checksum is the internet checksum (RFC 1071).
func Checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	if len(b)%2 == 1 {
		sum += uint32(b[len(b)-1]) << 8
	}
	for sum>>16 != 0 {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}
