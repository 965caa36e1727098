package nft

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/policy"
)

// TraceTable is the table that Trace makes for as long as it runs.
const TraceTable = "nftcni_trace"

// tracePriority comes before every other chain that a packet meets first; our guard is there, before defragmentation.
const tracePriority = guardPriority - 10

// TraceReassembled is the chain of TraceTable behind defragmentation (-400). A packet that came in fragments begins there:
// before, its parts are packets of their own, only the first of them has a port, and the whole has another number. What
// came whole is marked in the table's other chain, and meets this one too.
const TraceReassembled = "reassembled"

const reassembledPriority = -390

// TraceFilter says which packets are traced: those that match every field that is set.
type TraceFilter struct {
	Src, Dst []netip.Addr // any of them
	Protocol policy.Protocol
	Port     uint16 // destination port, with TCP, UDP or SCTP
	// PerSecond bounds the packets traced; 0 is 20. A trace costs about a message a rule.
	PerSecond uint64
}

// TraceStep is one rule, chain policy or return that a traced packet met.
type TraceStep struct {
	Packet uint32 // the kernel's number of the packet's trace
	Family uint8  // NFPROTO_* of the chain's table
	Table  string
	Chain  string
	Rule   uint64 // handle; 0: the chain's policy, or its end
	// Verdict is accept, drop, continue, return, jump CHAIN, goto CHAIN or queue.
	Verdict string
	Policy  bool // the verdict is the chain's policy
	InDev   uint32
	OutDev  uint32
	Mark    uint32
	// Flow is the packet's, Response that it is none a question of policy could ask: its
	// port is the packet's destination port. It is zero on steps whose message repeats no header.
	Flow policy.Flow
}

// Trace marks matching packets for tracing and reports each step they take through every
// table, until ctx ends. Its rules live in a table of their own with flag owner and
// without persist (Linux 5.12): the kernel removes it with the socket, however this ends.
func Trace(ctx context.Context, o Options, f TraceFilter, ready func(), report func(TraceStep)) error {
	events, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: o.NetNS, Groups: 1 << (unix.NFNLGRP_NFTRACE - 1)})
	if err != nil {
		return fmt.Errorf("listen to traces: %w", err)
	}
	defer func() { _ = events.Close() }()
	conn, err := nftables.New(nftables.AsLasting(), nftables.WithNetNSFd(o.NetNS))
	if err != nil {
		return fmt.Errorf("dial nfnetlink: %w", err)
	}
	defer func() { _ = conn.CloseLasting() }()
	if err := addTraceRules(conn, f); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = events.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	ready()
	return readTraces(ctx, events, report)
}

func readTraces(ctx context.Context, events *netlink.Conn, report func(TraceStep)) error {
	for {
		messages, err := events.Receive()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS):
			continue // steps are lost; the next packet is whole again
		case err != nil:
			return fmt.Errorf("receive traces: %w", err)
		}
		for _, m := range messages {
			if m.Header.Type != unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_TRACE {
				continue
			}
			step, err := decodeTrace(m)
			if err != nil {
				return fmt.Errorf("decode trace: %w", err)
			}
			report(step)
		}
	}
}

func addTraceRules(conn *nftables.Conn, f TraceFilter) error {
	table := conn.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: TraceTable, Flags: nftables.TableFlagOwner})
	for _, c := range []struct {
		name     string
		hook     *nftables.ChainHook
		priority nftables.ChainPriority
		rules    [][]expr.Any
	}{
		{"prerouting", nftables.ChainHookPrerouting, tracePriority, f.rules(whole)},
		{TraceReassembled, nftables.ChainHookPrerouting, reassembledPriority, f.rules(nil)},
		{"output", nftables.ChainHookOutput, tracePriority, f.rules(nil)},
	} {
		chain := conn.AddChain(&nftables.Chain{Name: c.name, Table: table, Type: nftables.ChainTypeFilter, Hooknum: c.hook, Priority: &c.priority})
		for _, e := range c.rules {
			conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: e})
		}
	}
	err := conn.Flush()
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("make table %s with flag owner: it needs Linux 5.12: %w", TraceTable, err)
	}
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("make table %s: run as root (CAP_NET_ADMIN), and one trace at a time: %w", TraceTable, err)
	}
	if err != nil {
		return fmt.Errorf("make table %s: %w", TraceTable, err)
	}
	return nil
}

// whole matches packets of a family that are no fragments: no offset and no more to come (RFC 791), or no fragment header
// behind the IPv6 header (RFC 8200, 4.5).
func whole(f family) statement {
	if f.l3 == unix.NFPROTO_IPV4 {
		return compare{field: ip4Fragment, value: []byte{0, 0}, mask: []byte{0x3f, 0xff}}
	}
	return compare{field: ip6Next, not: true, value: []byte{unix.IPPROTO_FRAGMENT}}
}

// rules are one for every pair of addresses of one family; with what else to match for a family, one for each family.
func (f TraceFilter) rules(also func(family) statement) [][]expr.Any {
	srcs, dsts := f.Src, f.Dst
	if len(srcs) == 0 {
		srcs = []netip.Addr{{}}
	}
	if len(dsts) == 0 {
		dsts = []netip.Addr{{}}
	}
	var out [][]expr.Any
	for _, s := range srcs {
		for _, d := range dsts {
			if s.IsValid() && d.IsValid() && s.Is4() != d.Is4() {
				continue
			}
			if also == nil {
				out = append(out, f.rule(s, d, nil))
				continue
			}
			for i, family := range families() {
				if a := cmp.Or(s, d); !a.IsValid() || a.Is6() == (i == 1) {
					out = append(out, f.rule(s, d, also(family)))
				}
			}
		}
	}
	return out
}

func (f TraceFilter) rule(src, dst netip.Addr, also statement) []expr.Any {
	r := &ruleContext{}
	if also != nil {
		also.exprs(r)
	}
	families := families()
	for i, a := range []netip.Addr{src, dst} {
		if !a.IsValid() {
			continue
		}
		family := families[0]
		if a.Is6() {
			family = families[1]
		}
		match := compare{field: [2]field{family.src, family.dst}[i], value: a.AsSlice()}
		match.exprs(r)
	}
	if f.Protocol != policy.AnyProtocol {
		protocol(byte(f.Protocol), "").exprs(r)
	}
	if f.Port != 0 {
		compare{field: thDport, value: binary.BigEndian.AppendUint16(nil, f.Port)}.exprs(r)
	}
	rate := f.PerSecond
	if rate == 0 {
		rate = 20
	}
	r.add(&expr.Limit{Type: expr.LimitTypePkts, Rate: rate, Unit: expr.LimitTimeSecond, Burst: uint32(rate)},
		&expr.Immediate{Register: 1, Data: []byte{1}},
		&expr.Meta{Key: expr.MetaKeyNFTRACE, SourceRegister: true, Register: 1})
	return r.out
}

func decodeTrace(m netlink.Message) (TraceStep, error) {
	attrs, err := attributes(m)
	if err != nil {
		return TraceStep{}, err
	}
	s := TraceStep{Family: m.Data[0], Table: cString(attrs[unix.NFTA_TRACE_TABLE]), Chain: cString(attrs[unix.NFTA_TRACE_CHAIN]),
		Packet: trace32(attrs[unix.NFTA_TRACE_ID]), Policy: trace32(attrs[unix.NFTA_TRACE_TYPE]) == unix.NFT_TRACETYPE_POLICY,
		InDev: trace32(attrs[unix.NFTA_TRACE_IIF]), OutDev: trace32(attrs[unix.NFTA_TRACE_OIF]), Mark: trace32(attrs[unix.NFTA_TRACE_MARK])}
	if b := attrs[unix.NFTA_TRACE_RULE_HANDLE]; len(b) == 8 {
		s.Rule = binary.BigEndian.Uint64(b)
	}
	if b := attrs[unix.NFTA_TRACE_VERDICT]; b != nil {
		v, err := attributeMap(b)
		if err != nil {
			return s, err
		}
		s.Verdict = verdictName(int32(trace32(v[unix.NFTA_VERDICT_CODE])), cString(v[unix.NFTA_VERDICT_CHAIN]))
	}
	if s.Policy {
		s.Verdict = verdictName(int32(trace32(attrs[unix.NFTA_TRACE_POLICY])), "")
	}
	s.Flow = headerFlow(attrs[unix.NFTA_TRACE_NETWORK_HEADER], attrs[unix.NFTA_TRACE_TRANSPORT_HEADER])
	return s, nil
}

func trace32(b []byte) uint32 {
	if len(b) != 4 {
		return 0
	}
	return binary.BigEndian.Uint32(b)
}

// verdictName reads a verdict of linux/netfilter.h or linux/netfilter/nf_tables.h.
func verdictName(code int32, chain string) string {
	switch {
	case code == unix.NFT_JUMP:
		return "jump " + chain
	case code == unix.NFT_GOTO:
		return "goto " + chain
	case code == unix.NFT_CONTINUE:
		return "continue"
	case code == unix.NFT_BREAK:
		return "break"
	case code == unix.NFT_RETURN:
		return "return"
	}
	names := []string{"drop", "accept", "stolen", "queue", "repeat"}
	if i := int(code & 0xff); i < len(names) {
		return names[i]
	}
	return "verdict " + strconv.Itoa(int(code))
}

// headerFlow reads the addresses, the protocol and the destination port of a packet; the
// zero Flow when the headers are missing or cut short.
func headerFlow(network, transport []byte) policy.Flow {
	var f policy.Flow
	switch {
	case len(network) >= 20 && network[0]>>4 == 4:
		f.Src, f.Dst = netip.AddrFrom4([4]byte(network[12:16])), netip.AddrFrom4([4]byte(network[16:20]))
		f.Protocol = policy.Protocol(network[9])
	case len(network) >= 40 && network[0]>>4 == 6:
		f.Src, f.Dst = netip.AddrFrom16([16]byte(network[8:24])), netip.AddrFrom16([16]byte(network[24:40]))
		f.Protocol = policy.Protocol(network[6])
	default:
		return f
	}
	switch {
	case len(transport) < 4:
	case f.Protocol == policy.ICMP || f.Protocol == policy.ICMPv6:
		f.Port = uint16(transport[0])<<8 | uint16(transport[1])
	case slices.Contains([]policy.Protocol{policy.TCP, policy.UDP, policy.SCTP}, f.Protocol):
		f.Port = binary.BigEndian.Uint16(transport[2:4])
	}
	return f
}
