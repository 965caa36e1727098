package cni

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	probeWait  = 300 * time.Millisecond // for one answer
	probeTries = 3                      // a lost packet is not a small path
	smallProbe = 576                    // bytes; every path carries it (RFC 791)
)

// A PathProbe is what really passes on the way to an address.
type PathProbe struct {
	Address netip.Addr `json:"address"`
	Want    int        `json:"want"` // MTU that was asked about, bytes
	// Carries is the largest packet that was answered, up to Want. 0: not even a small one was, and
	// nothing is known: a firewall may drop echo requests.
	Carries int `json:"carries"`
}

// TooSmall tells that the path is proved to carry less than it should.
func (p PathProbe) TooSmall() bool { return p.Carries > 0 && p.Carries < p.Want }

// ProbePath sends ICMP echo requests of want bytes (the whole IP packet) that nobody may fragment
// to a node, from the namespace ns (0: the caller's), and looks for the largest size that is
// answered. Learned path MTUs are ignored (IP_PMTUDISC_PROBE), so a path that drops large packets
// silently is found as well. It needs CAP_NET_RAW. Ask with PeerPath.Address and PeerPath.LinkMTU:
// the outer packets of a tunnel are what has to fit.
func ProbePath(ctx context.Context, ns int, to netip.Addr, want int) (PathProbe, error) {
	p := PathProbe{Address: to, Want: want}
	if want < smallProbe || want > 65535 {
		return p, fmt.Errorf("probe path to %s: size %d is not 576 to 65535", to, want)
	}
	e, err := newEcho(ns, to)
	if err != nil {
		return p, fmt.Errorf("probe path to %s: %w", to, err)
	}
	defer e.close()
	low, high := 0, want // the largest known to pass, the largest that may
	for size := smallProbe; low < high; size = low + (high-low+1)/2 {
		passed, err := e.answered(ctx, size)
		switch {
		case err != nil:
			return p, fmt.Errorf("probe path to %s with %d bytes: %w", to, size, err)
		case passed:
			low = size
		case low == 0:
			return p, nil
		default:
			high = size - 1
		}
		if low == smallProbe && high == want { // what should hold first: most paths need two probes
			if passed, err = e.answered(ctx, want); err != nil {
				return p, fmt.Errorf("probe path to %s with %d bytes: %w", to, want, err)
			}
			if passed {
				low = want
			} else {
				high = want - 1
			}
		}
	}
	p.Carries = low
	return p, nil
}

// An echo is a raw ICMP socket connected to one address.
type echo struct {
	fd  int
	v4  bool
	id  uint16
	seq uint16
}

func newEcho(ns int, to netip.Addr) (*echo, error) {
	e := &echo{v4: to.Is4(), fd: -1, id: uint16(unix.Getpid())}
	open := func() (err error) {
		e.fd, err = unix.Socket(family(to), unix.SOCK_RAW|unix.SOCK_CLOEXEC, e.protocol())
		return err
	}
	var err error
	if ns == 0 {
		err = open()
	} else {
		err = inNetNS(netns.NsHandle(ns), open)
	}
	if err != nil {
		return nil, fmt.Errorf("open raw ICMP socket (needs CAP_NET_RAW): %w", err)
	}
	wait := unix.NsecToTimeval(probeWait.Nanoseconds())
	if e.v4 {
		err = errors.Join(unix.SetsockoptInt(e.fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE),
			unix.Connect(e.fd, &unix.SockaddrInet4{Addr: to.As4()}))
	} else {
		err = errors.Join(unix.SetsockoptInt(e.fd, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE),
			unix.SetsockoptInt(e.fd, unix.IPPROTO_IPV6, unix.IPV6_DONTFRAG, 1),
			unix.Connect(e.fd, &unix.SockaddrInet6{Addr: to.As16()}))
	}
	if err = errors.Join(err, unix.SetsockoptTimeval(e.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait)); err != nil {
		e.close()
		return nil, err
	}
	return e, nil
}

func (e *echo) close() { _ = unix.Close(e.fd) }

func (e *echo) protocol() int {
	if e.v4 {
		return unix.IPPROTO_ICMP
	}
	return unix.IPPROTO_ICMPV6
}

// answered sends an IP packet of size bytes up to three times and waits for the reply.
func (e *echo) answered(ctx context.Context, size int) (bool, error) {
	first := e.seq + 1
	for range probeTries {
		if err := ctx.Err(); err != nil {
			return false, err
		}
		e.seq++
		_, err := unix.Write(e.fd, e.request(size))
		switch {
		case errors.Is(err, unix.EMSGSIZE): // larger than the link itself
			return false, nil
		case errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.ECONNREFUSED): // of an earlier one
			continue
		case err != nil:
			return false, err
		}
		if e.reply(first, time.Now().Add(probeWait)) {
			return true, nil
		}
	}
	return false, nil
}

// request is an ICMP echo (RFC 792, RFC 4443 4.1). The kernel fills in the checksum of ICMPv6.
func (e *echo) request(size int) []byte {
	header, kind := 40, byte(128)
	if e.v4 {
		header, kind = 20, 8
	}
	b := make([]byte, size-header)
	b[0] = kind
	binary.BigEndian.PutUint16(b[4:], e.id)
	binary.BigEndian.PutUint16(b[6:], e.seq)
	if e.v4 {
		binary.BigEndian.PutUint16(b[2:], checksum(b))
	}
	return b
}

// reply reads until an answer to a request since first is there or the deadline has passed: a late
// answer proves as much as one in time. Errors of
// the socket are ICMP errors about a packet, and tell no more than silence does.
func (e *echo) reply(first uint16, deadline time.Time) bool {
	buf := make([]byte, 1<<16)
	for time.Now().Before(deadline) {
		n, err := unix.Read(e.fd, buf)
		if err != nil {
			continue
		}
		b, kind := buf[:n], byte(129)
		if e.v4 {
			kind = 0
			if n == 0 || n < int(b[0]&15)*4 {
				continue
			}
			b = b[int(b[0]&15)*4:]
		}
		if len(b) >= 8 && b[0] == kind && binary.BigEndian.Uint16(b[4:]) == e.id && binary.BigEndian.Uint16(b[6:])-first <= e.seq-first {
			return true
		}
	}
	return false
}

// checksum is the Internet checksum (RFC 1071).
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	if len(b)%2 == 1 {
		sum += uint32(b[len(b)-1]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
