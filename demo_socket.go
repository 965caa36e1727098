package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/policy"
)

// probeSocket is the client side of one probe: a non-blocking socket, connected, so
// that the kernel hands it nothing but what its destination sent.
type probeSocket struct {
	*probe
	fd   int
	id   uint16 // of the echo request
	done bool
}

// ICMP types: RFC 792 and RFC 4443.
const (
	icmpEchoReply     = 0
	icmpEchoRequest   = 8
	icmpv6EchoRequest = 128
	icmpv6EchoReply   = 129
)

func (s *probeSocket) open() error {
	kind, protocol := unix.SOCK_STREAM, int(s.service.protocol)
	switch s.service.protocol {
	case policy.UDP:
		kind = unix.SOCK_DGRAM
	case policy.ICMP:
		kind = unix.SOCK_RAW
		if s.to.Is6() {
			protocol = unix.IPPROTO_ICMPV6
		}
	}
	fd, err := unix.Socket(familyOf(s.to), kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return fmt.Errorf("open socket: %w", err)
	}
	s.fd = fd
	if err := unix.Bind(fd, sockaddr(netip.AddrPortFrom(s.from, 0))); err != nil {
		return fmt.Errorf("bind to %s: %w", s.from, err)
	}
	err = unix.Connect(fd, sockaddr(netip.AddrPortFrom(s.to, s.service.port)))
	if err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return fmt.Errorf("connect: %w", err)
	}
	return s.send()
}

// send sends the request of a protocol without connections. What the node's own
// firewall refuses at once (EPERM) is as silent as what is lost later, and so is what a
// full queue refuses (ENOBUFS): it is sent once more.
func (s *probeSocket) send() error {
	var request []byte
	switch s.service.protocol {
	case policy.UDP:
		request = []byte("?")
	case policy.ICMP:
		request = s.echoRequest()
	default:
		return nil
	}
	_, err := unix.Write(s.fd, request)
	if err != nil && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.ENOBUFS) {
		return fmt.Errorf("send: %w", err)
	}
	return nil
}

func (s *probeSocket) sendAgain() {
	if !s.done {
		_ = s.send() // the first attempt has reported what there was to report
	}
}

// echoRequest builds an echo request without data. The kernel fills in the checksum of
// ICMPv6 on a raw socket, never that of ICMP.
func (s *probeSocket) echoRequest() []byte {
	b := make([]byte, 8)
	b[0] = icmpEchoRequest
	if s.to.Is6() {
		b[0] = icmpv6EchoRequest
	}
	binary.BigEndian.PutUint16(b[4:], s.id)
	binary.BigEndian.PutUint16(b[6:], uint16(s.fd))
	if s.to.Is4() {
		sum := uint32(b[0])<<8 + uint32(s.id) + uint32(uint16(s.fd))
		sum = sum>>16 + sum&0xffff
		sum += sum >> 16
		binary.BigEndian.PutUint16(b[2:], ^uint16(sum))
	}
	return b
}

// read takes what arrived. Not every packet is the answer: a raw socket sees the
// other end's own echo requests too.
func (s *probeSocket) read() error {
	buf := make([]byte, 256)
	for !s.done {
		n, err := unix.Read(s.fd, buf)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return nil
		case err != nil:
			s.done = true
			return fmt.Errorf("receive: %w", err)
		case s.service.protocol == policy.ICMP:
			s.done = s.isEchoReply(buf[:n])
			s.answered = s.done
		default:
			s.done = true
			if got := string(buf[:n]); got != s.dst.name {
				return fmt.Errorf("answered by %q", got)
			}
			s.answered = true
		}
	}
	return nil
}

func (s *probeSocket) isEchoReply(b []byte) bool {
	reply := byte(icmpv6EchoReply)
	if s.to.Is4() {
		reply = icmpEchoReply
		if len(b) < 20 || len(b) < int(b[0]&15)*4 {
			return false
		}
		b = b[int(b[0]&15)*4:] // raw IPv4 sockets deliver the IP header
	}
	return len(b) >= 8 && b[0] == reply &&
		binary.BigEndian.Uint16(b[4:]) == s.id && binary.BigEndian.Uint16(b[6:]) == uint16(s.fd)
}

func (s *probeSocket) close() {
	if s.fd < 0 {
		return
	}
	if s.service.protocol == policy.TCP {
		// Reset instead of TIME_WAIT: thousands of probes come from few addresses.
		_ = unix.SetsockoptLinger(s.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	}
	unix.Close(s.fd)
	s.fd = -1
}

func familyOf(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}
