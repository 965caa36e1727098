package nft

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// ForwardChain is a base chain of another table that forwarded packets meet: an accept of
// ours does not spare them its drops (nft(8), "accept").
type ForwardChain struct {
	BaseChain
	// SparesPods: it accepts what comes from and what goes to pods' interfaces before any
	// other rule or its policy drops it.
	SparesPods bool
	Accepts    bool       // a rule accepts something, or may: a verdict map, a queue
	Blocks     []DropRule // up to the rules that spare pods
}

// DropRule is a rule of a table that is not ours and that drops or rejects packets.
type DropRule struct {
	Chain       string // the base chain, or one that it jumps to
	Index       int    // in its chain, from 0
	Handle      uint64
	Comment     string
	Verdict     string // drop or reject
	Conditional bool   // it, or the jump that leads to it, asks for more than the hook
	Packets     uint64 // of the rule's counter, 0 without one
}

// maxForeignChains bounds how many chains are read for one base chain: kube-proxy has
// tens of thousands.
const maxForeignChains = 256

// ForwardChains lists the base chains of other tables of families ip, ip6 and inet on the
// hooks prerouting, forward and postrouting, with the rules in them that drop. Tables of
// iptables-legacy are none of nf_tables. The table kube-proxy is left out: it drops what
// has no Service behind it.
func ForwardChains(ctx context.Context, o Options) ([]ForwardChain, error) {
	bases, err := BaseChains(o)
	if err != nil {
		return nil, err
	}
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: o.NetNS})
	if err != nil {
		return nil, fmt.Errorf("dial nfnetlink: %w", err)
	}
	defer func() { _ = c.Close() }()
	var out []ForwardChain
	for _, b := range bases {
		ours := b.Table == TableName || b.Table == TraceTable || b.Table == "kube-proxy"
		passes := slices.Contains([]uint32{unix.NF_INET_PRE_ROUTING, unix.NF_INET_FORWARD, unix.NF_INET_POST_ROUTING}, b.Hook)
		if ours || !passes || !slices.Contains([]uint8{unix.NFPROTO_IPV4, unix.NFPROTO_IPV6, unix.NFPROTO_INET}, b.Family) {
			continue
		}
		w := foreignWalk{conn: c, base: b, left: maxForeignChains}
		if err := w.chain(ctx, b.Name, false, 0); err != nil {
			return nil, err
		}
		out = append(out, ForwardChain{BaseChain: b, SparesPods: w.spares(), Accepts: w.accepts, Blocks: w.blocks})
	}
	return out, nil
}

// TablesWithChain lists the tables, as "ip nat", that have a chain of one of these names.
func TablesWithChain(ctx context.Context, o Options, names ...string) ([]string, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	replies, err := dumpAll(o, unix.NFT_MSG_GETCHAIN)
	if err != nil {
		return nil, fmt.Errorf("list chains: %w", err)
	}
	var out []string
	for _, m := range replies {
		attrs, err := attributes(m)
		if err != nil {
			return nil, err
		}
		if slices.Contains(names, cString(attrs[unix.NFTA_CHAIN_NAME])) {
			out = append(out, FamilyName(m.Data[0])+" "+cString(attrs[unix.NFTA_CHAIN_TABLE]))
		}
	}
	return out, nil
}

// foreignWalk follows the jumps of one base chain.
type foreignWalk struct {
	conn     *netlink.Conn
	base     BaseChain
	blocks   []DropRule
	from, to bool // accepted so far: all that comes from pods' interfaces, or goes to them
	accepts  bool
	left     int
}

func (w *foreignWalk) spares() bool { return w.from && w.to }

// maxJumps is the kernel's limit of nested jumps (NFT_JUMP_STACK_SIZE).
const maxJumps = 16

func (w *foreignWalk) chain(ctx context.Context, name string, conditional bool, depth int) error {
	if w.left--; w.left < 0 || depth > maxJumps {
		w.accepts = true // for all that was read
		return nil
	}
	rules, err := w.rules(ctx, name)
	if err != nil {
		return err
	}
	for i, r := range rules {
		r.place.Chain, r.place.Index = name, i
		r.place.Conditional = conditional || r.conditional
		w.accepts = w.accepts || r.accepts
		switch {
		case w.spares():
			return nil
		case (r.from || r.to) && !conditional:
			w.from, w.to = w.from || r.from, w.to || r.to
		case r.place.Verdict != "":
			w.blocks = append(w.blocks, r.place)
		case r.jump != "":
			if err := w.chain(ctx, r.jump, r.place.Conditional, depth+1); err != nil {
				return err
			}
		}
	}
	return nil
}

// foreignRule is what a rule of another table means for packets of pods.
type foreignRule struct {
	place       DropRule
	conditional bool
	jump        string // chain of an unconditional or conditional jump or goto
	accepts     bool   // accepts, or may accept, something
	from, to    bool   // accepts everything from pods' interfaces, or to them
}

func (w *foreignWalk) rules(ctx context.Context, chain string) ([]foreignRule, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	e := netlink.NewAttributeEncoder()
	e.String(unix.NFTA_RULE_TABLE, w.base.Table)
	e.String(unix.NFTA_RULE_CHAIN, chain)
	msg, err := nfnetlinkRequest(unix.NFT_MSG_GETRULE, netlink.Dump, e)
	if err != nil {
		return nil, err
	}
	msg.Data[0] = w.base.Family
	replies, err := w.conn.Execute(msg)
	if err != nil {
		return nil, fmt.Errorf("list rules of %s %s %s: %w", FamilyName(w.base.Family), w.base.Table, chain, err)
	}
	var out []foreignRule
	for _, m := range replies {
		attrs, err := attributes(m)
		if err != nil {
			return nil, err
		}
		if cString(attrs[unix.NFTA_RULE_CHAIN]) != chain || cString(attrs[unix.NFTA_RULE_TABLE]) != w.base.Table {
			continue // kernels that ignore the filter
		}
		r, err := readForeignRule(attrs[unix.NFTA_RULE_EXPRESSIONS])
		if err != nil {
			return nil, err
		}
		r.place.Comment = elementComment(attrs[unix.NFTA_RULE_USERDATA])
		r.place.Handle = number64(attrs[unix.NFTA_RULE_HANDLE])
		out = append(out, r)
	}
	return out, nil
}

// readForeignRule reads the expressions of a rule as far as its effect on pods goes.
func readForeignRule(expressions []byte) (foreignRule, error) {
	var r foreignRule
	d, err := netlink.NewAttributeDecoder(expressions)
	if err != nil {
		return r, fmt.Errorf("decode rule: %w", err)
	}
	var names []string
	var byInterface uint32 // the meta key that was compared with our prefix
	for d.Next() {
		e, err := attributeMap(d.Bytes())
		if err != nil {
			return r, err
		}
		name := cString(e[unix.NFTA_EXPR_NAME])
		names = append(names, name)
		data, err := attributeMap(e[unix.NFTA_EXPR_DATA])
		if err != nil {
			return r, err
		}
		switch name {
		case "meta":
			byInterface = trace32(data[unix.NFTA_META_KEY])
		case "cmp":
			if !comparesPrefix(data) {
				byInterface = 0
			}
		}
		if err := r.effect(name, data, names, byInterface); err != nil {
			return r, err
		}
	}
	return r, d.Err()
}

// comparesPrefix matches iifname "nft*", as -i nft+ of iptables does.
func comparesPrefix(cmp map[uint16][]byte) bool {
	value, err := attributeMap(cmp[unix.NFTA_CMP_DATA])
	return err == nil && trace32(cmp[unix.NFTA_CMP_OP]) == unix.NFT_CMP_EQ && string(value[unix.NFTA_DATA_VALUE]) == InterfacePrefix
}

// effect notes what one expression adds to the rule.
func (r *foreignRule) effect(name string, data map[uint16][]byte, names []string, byInterface uint32) error {
	switch name {
	case "counter":
		r.place.Packets = number64(data[unix.NFTA_COUNTER_PACKETS])
	case "log", "meta", "payload", "ct":
	case "reject":
		r.place.Verdict = "reject"
	case "target":
		switch target := cString(data[unix.NFTA_TARGET_NAME]); target {
		case "DROP", "REJECT":
			r.place.Verdict = strings.ToLower(target)
		}
	case "immediate":
		return r.verdict(data, names, byInterface)
	case "queue":
		r.accepts = true
	case "lookup":
		r.accepts = len(data[unix.NFTA_LOOKUP_DREG]) == 4 && trace32(data[unix.NFTA_LOOKUP_DREG]) == unix.NFT_REG_VERDICT
		r.conditional = true
	default:
		r.conditional = true
	}
	return nil
}

func (r *foreignRule) verdict(immediate map[uint16][]byte, names []string, byInterface uint32) error {
	value, err := attributeMap(immediate[unix.NFTA_IMMEDIATE_DATA])
	if err != nil || len(value[unix.NFTA_DATA_VERDICT]) == 0 {
		return err // a constant for a register
	}
	v, err := attributeMap(value[unix.NFTA_DATA_VERDICT])
	if err != nil {
		return err
	}
	switch int32(trace32(v[unix.NFTA_VERDICT_CODE])) {
	case 0: // NF_DROP
		r.place.Verdict = "drop"
	case 1: // NF_ACCEPT
		r.accepts = true
		matches := slices.DeleteFunc(slices.Clone(names), func(n string) bool { return n == "counter" || n == "immediate" })
		byPrefix := slices.Equal(matches, []string{"meta", "cmp"})
		r.from = len(matches) == 0 || byPrefix && byInterface == unix.NFT_META_IIFNAME
		r.to = len(matches) == 0 || byPrefix && byInterface == unix.NFT_META_OIFNAME
	case unix.NFT_JUMP, unix.NFT_GOTO:
		r.jump = cString(v[unix.NFTA_VERDICT_CHAIN])
	}
	return nil
}
