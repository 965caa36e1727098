package nft

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

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

// fewPorts of a protocol are asked for one by one; of more the whole protocol is read once.
const fewPorts = 4

// flowQuery chooses entries of conntrack; port 0 is every port.
type flowQuery struct {
	family byte // AF_INET or AF_INET6
	ProtocolPort
}

// queries are the fewest that find every flow that m may concern.
func (m movedPorts) queries() map[flowQuery]bool {
	ports := map[flowQuery]map[uint16]bool{}
	for _, p := range slices.Concat(m.removed, m.added) {
		q := flowQuery{family: addressFamily(p.Addr), ProtocolPort: ProtocolPort{Protocol: p.Protocol}}
		if ports[q] == nil {
			ports[q] = map[uint16]bool{}
		}
		ports[q][p.Port] = true
	}
	out := map[flowQuery]bool{}
	for q, of := range ports {
		if len(of) > fewPorts {
			out[q] = true
			continue
		}
		for port := range of {
			q.Port = port
			out[q] = true
		}
	}
	return out
}

// stale reports whether f leads where m's ports do not lead any more: all of a port that went, and the UDP ones of a port
// that came which began before. TCP connections to a socket of the node that a port hides now may end by themselves.
func (m movedPorts) stale(f flow, local map[netip.Addr]bool) bool {
	asked := func(p HostPort) bool {
		at := f.to.Addr()
		return p.Protocol == f.protocol && p.Port == f.to.Port() && at.Is4() == p.Addr.Is4() && (p.Addr == at || p.Addr.IsUnspecified())
	}
	if slices.ContainsFunc(m.removed, func(p HostPort) bool { return asked(p) && f.server == p.To && f.to.Addr() != p.To.Addr() }) {
		return true
	}
	return local[f.to.Addr()] && slices.ContainsFunc(m.added, func(p HostPort) bool { return asked(p) && f.server != p.To })
}

// current leaves out what changed again since.
func (m movedPorts) current(ports map[hostPortKey]HostPort) movedPorts {
	there := func(p HostPort) bool { return ports[p.key()].To == p.To }
	return movedPorts{
		added:   slices.DeleteFunc(slices.Clone(m.added), func(p HostPort) bool { return !there(p) || p.Protocol != policy.UDP }),
		removed: slices.DeleteFunc(slices.Clone(m.removed), there),
	}
}

// forgetFlows deletes conntrack's entries that m makes stale: a flow that never pauses would never meet its new
// destination. The ports themselves are in force already, so a failure is logged: what is left ends by its own timeout.
func (t *Table) forgetFlows(ctx context.Context, m movedPorts) {
	if m = m.current(t.ports); m.none() {
		return
	}
	local, err := localAddresses(t.netNS)
	for q := range m.queries() {
		if err == nil {
			err = ctx.Err()
		}
		if err == nil {
			err = t.deleteFlows(q, func(f flow) bool { return m.stale(f, local) })
		}
	}
	if err != nil {
		t.log.Warn("connections of host ports that moved stay in conntrack until they time out", "err", err)
	}
}

// flow is one entry of conntrack: where it was sent, and who answers.
type flow struct {
	protocol   policy.Protocol
	to, server netip.AddrPort
	tuple, id  []byte // as the kernel sent them
	zone       []byte
}

// deleteFlows deletes the entries of q that stale chooses.
func (t *Table) deleteFlows(q flowQuery, stale func(flow) bool) error {
	flows, err := t.listFlows(q)
	if err != nil {
		return fmt.Errorf("list connections to %s: %w", q, err)
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
		m, err := conntrackRequest(ctDelete, 0, q.family, e)
		if err == nil {
			_, err = t.conn.Execute(m)
		}
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("delete connection to %s, answered by %s: %w", f.to, f.server, err)
		}
	}
	return nil
}

// listFlows dumps the entries of q; the kernel chooses them (Linux 5.8).
func (t *Table) listFlows(q flowQuery) ([]flow, error) {
	flags := uint32(ctaFilterProto)
	if q.Port != 0 {
		flags |= ctaFilterToPort
	}
	e := netlink.NewAttributeEncoder()
	e.Nested(ctaTupleOrig, func(e *netlink.AttributeEncoder) error {
		e.Nested(ctaTupleProto, func(e *netlink.AttributeEncoder) error {
			e.Uint8(ctaProtoNumber, uint8(q.Protocol))
			e.Bytes(ctaProtoDestination, binary.BigEndian.AppendUint16(nil, q.Port))
			return nil
		})
		return nil
	})
	e.Nested(ctaFilter, func(e *netlink.AttributeEncoder) error {
		e.Uint32(ctaFilterOrigFlags, flags)
		return nil
	})
	m, err := conntrackRequest(ctGet, netlink.Dump, q.family, e)
	if err != nil {
		return nil, err
	}
	replies, err := t.conn.Execute(m)
	if err != nil {
		return nil, err
	}
	var out []flow
	for _, r := range replies {
		if f, ok := decodeFlow(r); ok {
			out = append(out, f)
		}
	}
	return out, nil
}

func addressFamily(a netip.Addr) byte {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func conntrackRequest(kind netlink.HeaderType, flags netlink.HeaderFlags, family byte, e *netlink.AttributeEncoder) (netlink.Message, error) {
	attrs, err := e.Encode()
	if err != nil {
		return netlink.Message{}, fmt.Errorf("encode: %w", err)
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
	var ok, alsoOK bool
	f.protocol, _, f.to, ok = decodeTuple(f.tuple)
	_, f.server, _, alsoOK = decodeTuple(attrs[ctaTupleReply])
	return f, ok && alsoOK
}

func decodeTuple(b []byte) (protocol policy.Protocol, from, to netip.AddrPort, ok bool) {
	tuple, err := attributeMap(b)
	if err != nil {
		return 0, from, to, false
	}
	ips, err := attributeMap(tuple[ctaTupleIP])
	if err != nil {
		return 0, from, to, false
	}
	proto, err := attributeMap(tuple[ctaTupleProto])
	if err != nil || len(proto[ctaProtoNumber]) != 1 || len(proto[ctaProtoSource]) != 2 || len(proto[ctaProtoDestination]) != 2 {
		return 0, from, to, false
	}
	src, srcOK := netip.AddrFromSlice(ips[1]) // CTA_IP_V4_SRC, CTA_IP_V4_DST
	dst, dstOK := netip.AddrFromSlice(ips[2])
	if !srcOK {
		src, srcOK = netip.AddrFromSlice(ips[3]) // CTA_IP_V6_SRC, CTA_IP_V6_DST
		dst, dstOK = netip.AddrFromSlice(ips[4])
	}
	return policy.Protocol(proto[ctaProtoNumber][0]), netip.AddrPortFrom(src, binary.BigEndian.Uint16(proto[ctaProtoSource])),
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
