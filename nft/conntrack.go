package nft

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/policy"
)

// Messages of conntrack and their attributes (linux/netfilter/nfnetlink_conntrack.h).
const (
	ctGet    = 1
	ctDelete = 2

	ctaTupleOrig  = 1
	ctaTupleReply = 2
	ctaID         = 12
	ctaZone       = 18
	ctaFilter     = 25 // Linux 5.8

	ctaTupleIP    = 1
	ctaTupleProto = 2

	ctaProtoNumber      = 1
	ctaProtoSource      = 2
	ctaProtoDestination = 3

	ctaFilterOrigFlags = 1
	ctaFilterProto     = 1 << 3
	ctaFilterToPort    = 1 << 5
)

// movedPorts are host ports that a change took away or brought.
type movedPorts struct{ added, removed []HostPort }

func (m movedPorts) none() bool { return len(m.added)+len(m.removed) == 0 }

// forgetFlows deletes conntrack's entries that lead where m's ports do not lead any more: all of a port that went, and
// the UDP ones of a port that came which began before (what sends on and on would never meet the pod). TCP connections
// to a socket of the node that the port hides now are left to end. The ports themselves are in force already, so a
// failure is logged: what is left ends by its own timeout.
func (t *Table) forgetFlows(ctx context.Context, m movedPorts) {
	var local map[netip.Addr]bool
	var err error
	for _, p := range m.removed {
		err = errors.Join(err, t.deleteFlows(ctx, p, func(f flow) bool { return f.server == p.To && f.to.Addr() != p.To.Addr() }))
	}
	for _, p := range m.added {
		if p.Protocol != policy.UDP {
			continue
		}
		if local == nil {
			var listErr error
			local, listErr = localAddresses(t.netNS)
			err = errors.Join(err, listErr)
		}
		err = errors.Join(err, t.deleteFlows(ctx, p, func(f flow) bool {
			at := f.to.Addr()
			return f.server != p.To && (p.Addr == at || p.Addr.IsUnspecified() && local[at])
		}))
	}
	if err != nil {
		t.log.Warn("connections of host ports that moved stay in conntrack until they time out", "err", err)
	}
}

// flow is one entry of conntrack: where it was sent, and who answers.
type flow struct {
	to, server netip.AddrPort
	tuple, id  []byte // as the kernel sent them
	zone       []byte
}

// deleteFlows deletes the entries of p's protocol, port and family that stale chooses.
func (t *Table) deleteFlows(ctx context.Context, p HostPort, stale func(flow) bool) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	flows, err := t.listFlows(p)
	if err != nil {
		return fmt.Errorf("list connections of host port %s: %w", p, err)
	}
	for _, f := range flows {
		if !stale(f) {
			continue
		}
		e := netlink.NewAttributeEncoder()
		e.Bytes(unix.NLA_F_NESTED|ctaTupleOrig, f.tuple)
		if f.id != nil {
			e.Bytes(ctaID, f.id) // not a later one with the same tuple
		}
		if f.zone != nil {
			e.Bytes(ctaZone, f.zone)
		}
		m, err := conntrackRequest(ctDelete, 0, p.Addr, e)
		if err == nil {
			_, err = t.conn.Execute(m)
		}
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("delete connection to %s by host port %s: %w", f.server, p, err)
		}
	}
	return nil
}

// listFlows dumps the entries of p's protocol, port and family; the kernel chooses them (Linux 5.8).
func (t *Table) listFlows(p HostPort) ([]flow, error) {
	e := netlink.NewAttributeEncoder()
	e.Nested(ctaTupleOrig, func(e *netlink.AttributeEncoder) error {
		e.Nested(ctaTupleProto, func(e *netlink.AttributeEncoder) error {
			e.Uint8(ctaProtoNumber, uint8(p.Protocol))
			e.Bytes(ctaProtoDestination, binary.BigEndian.AppendUint16(nil, p.Port))
			return nil
		})
		return nil
	})
	e.Nested(ctaFilter, func(e *netlink.AttributeEncoder) error {
		e.Uint32(ctaFilterOrigFlags, ctaFilterProto|ctaFilterToPort)
		return nil
	})
	m, err := conntrackRequest(ctGet, netlink.Dump, p.Addr, e)
	if err != nil {
		return nil, err
	}
	replies, err := t.conn.Execute(m)
	if err != nil {
		return nil, err
	}
	var out []flow
	for _, r := range replies {
		if f, ok := decodeFlow(r); ok && f.to.Port() == p.Port && f.to.Addr().Is4() == p.Addr.Is4() {
			out = append(out, f)
		}
	}
	return out, nil
}

func conntrackRequest(kind netlink.HeaderType, flags netlink.HeaderFlags, a netip.Addr, e *netlink.AttributeEncoder) (netlink.Message, error) {
	attrs, err := e.Encode()
	if err != nil {
		return netlink.Message{}, fmt.Errorf("encode: %w", err)
	}
	family := byte(unix.AF_INET)
	if a.Is6() {
		family = unix.AF_INET6
	}
	return netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_CTNETLINK<<8 | kind, Flags: netlink.Request | flags},
		Data:   append([]byte{family, unix.NFNETLINK_V0, 0, 0}, attrs...),
	}, nil
}

// decodeFlow reads a message of conntrack; one of a kind that has no ports is none.
func decodeFlow(m netlink.Message) (flow, bool) {
	attrs, err := attributes(m)
	if err != nil {
		return flow{}, false
	}
	f := flow{tuple: attrs[ctaTupleOrig], id: attrs[ctaID], zone: attrs[ctaZone]}
	_, to, ok := decodeTuple(f.tuple)
	from, _, alsoOK := decodeTuple(attrs[ctaTupleReply])
	f.to, f.server = to, from
	return f, ok && alsoOK
}

func decodeTuple(b []byte) (from, to netip.AddrPort, ok bool) {
	tuple, err := attributeMap(b)
	if err != nil {
		return from, to, false
	}
	ips, err := attributeMap(tuple[ctaTupleIP])
	if err != nil {
		return from, to, false
	}
	proto, err := attributeMap(tuple[ctaTupleProto])
	if err != nil || len(proto[ctaProtoSource]) != 2 || len(proto[ctaProtoDestination]) != 2 {
		return from, to, false
	}
	src, srcOK := netip.AddrFromSlice(ips[1]) // CTA_IP_V4_SRC, CTA_IP_V4_DST
	dst, dstOK := netip.AddrFromSlice(ips[2])
	if !srcOK {
		src, srcOK = netip.AddrFromSlice(ips[3]) // CTA_IP_V6_SRC, CTA_IP_V6_DST
		dst, dstOK = netip.AddrFromSlice(ips[4])
	}
	return netip.AddrPortFrom(src, binary.BigEndian.Uint16(proto[ctaProtoSource])),
		netip.AddrPortFrom(dst, binary.BigEndian.Uint16(proto[ctaProtoDestination])), srcOK && dstOK
}

// localAddresses lists the addresses of a network namespace, 0 being the caller's.
func localAddresses(netNS int) (map[netip.Addr]bool, error) {
	c, err := netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{NetNS: netNS})
	if err != nil {
		return nil, fmt.Errorf("dial rtnetlink: %w", err)
	}
	defer func() { _ = c.Close() }()
	replies, err := c.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.RTM_GETADDR, Flags: netlink.Request | netlink.Dump},
		Data:   make([]byte, unix.SizeofIfAddrmsg),
	})
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	out := map[netip.Addr]bool{}
	for _, r := range replies {
		if len(r.Data) < unix.SizeofIfAddrmsg {
			continue
		}
		attrs, err := attributeMap(r.Data[unix.SizeofIfAddrmsg:])
		if err != nil {
			return nil, err
		}
		for _, kind := range []uint16{unix.IFA_LOCAL, unix.IFA_ADDRESS} {
			if a, ok := netip.AddrFromSlice(attrs[kind]); ok {
				out[a] = true
				break // the address of a point-to-point peer is not ours
			}
		}
	}
	return out, nil
}
