package agent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"syscall"

	"github.com/mdlayher/netlink"
	"github.com/ti-mo/conntrack"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/policy"
)

// Messages and attributes of conntrack (linux/netfilter/nfnetlink_conntrack.h).
const (
	conntrackNew = unix.NFNL_SUBSYS_CTNETLINK<<8 | 0
	conntrackGet = unix.NFNL_SUBSYS_CTNETLINK<<8 | 1

	ctaTupleOrig = 1

	ctaTupleIP    = 1
	ctaTupleProto = 2

	ctaProtoNumber      = 1
	ctaProtoSource      = 2
	ctaProtoDestination = 3
)

// connectionLookup finds single connections in conntrack. Its answers are read without the
// netlink package: the kernel marks them as parts of a list that it never ends.
type connectionLookup struct {
	mu   sync.Mutex // over a question and its answer
	conn *netlink.Conn
	raw  syscall.RawConn
	buf  [4096]byte // an entry has some 300 bytes
}

func newConnectionLookup() (*connectionLookup, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("open conntrack: %w", err)
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open conntrack: %w", err), conn.Close())
	}
	return &connectionLookup{conn: conn, raw: raw}, nil
}

func (l *connectionLookup) close() { _ = l.conn.Close() }

// of is the connection that a packet of TCP, UDP or SCTP belongs to, whichever side sent
// it; false when there is none.
func (l *connectionLookup) of(f policy.Flow, sourcePort uint16) (*conntrack.Flow, bool) {
	attrs, err := tupleOf(f, sourcePort)
	if err != nil {
		return nil, false
	}
	family := byte(unix.AF_INET6)
	if f.Src.Is4() {
		family = unix.AF_INET
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	_, err = l.conn.Send(netlink.Message{
		Header: netlink.Header{Type: conntrackGet, Flags: netlink.Request},
		Data:   append([]byte{family, unix.NFNETLINK_V0, 0, 0}, attrs...),
	})
	if err != nil {
		return nil, false
	}
	n, err := l.receive()
	if err != nil || n < unix.NLMSG_HDRLEN || binary.NativeEndian.Uint16(l.buf[4:]) != conntrackNew {
		return nil, false
	}
	var e conntrack.Event // as of a new connection: that message has the same form
	err = e.Unmarshal(netlink.Message{Header: netlink.Header{Type: conntrackNew, Flags: netlink.Create}, Data: l.buf[unix.NLMSG_HDRLEN:n]})
	return e.Flow, err == nil && e.Flow != nil && e.Flow.TupleReply.IP.SourceAddress.IsValid()
}

// receive reads the one answer that every question has.
func (l *connectionLookup) receive() (n int, err error) {
	closed := l.raw.Read(func(fd uintptr) bool {
		n, _, err = unix.Recvfrom(int(fd), l.buf[:], unix.MSG_DONTWAIT)
		return !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR)
	})
	return n, errors.Join(err, closed)
}

// tupleOf is the attribute that names a packet's connection.
func tupleOf(f policy.Flow, sourcePort uint16) ([]byte, error) {
	source, destination := uint16(1), uint16(2) // CTA_IP_V4_SRC and _DST
	if !f.Src.Is4() {
		source, destination = 3, 4
	}
	e := netlink.NewAttributeEncoder()
	e.ByteOrder = binary.BigEndian
	e.Nested(ctaTupleOrig, func(e *netlink.AttributeEncoder) error {
		e.Nested(ctaTupleIP, func(e *netlink.AttributeEncoder) error {
			e.Bytes(source, f.Src.AsSlice())
			e.Bytes(destination, f.Dst.AsSlice())
			return nil
		})
		e.Nested(ctaTupleProto, func(e *netlink.AttributeEncoder) error {
			e.Uint8(ctaProtoNumber, uint8(f.Protocol))
			e.Uint16(ctaProtoSource, sourcePort)
			e.Uint16(ctaProtoDestination, f.Port)
			return nil
		})
		return nil
	})
	return e.Encode()
}
