package nft

import (
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// RuleID identifies a rule of any table.
type RuleID struct {
	Family uint8 // NFPROTO_*
	Table  string
	Chain  string
	Handle uint64
}

// RulePlace is where a rule stands and what it says, as far as is known.
type RulePlace struct {
	Index   int    // in its chain, from 0
	Text    string // nft text, for rules of our own table
	Comment string
}

// Rules lists the rules of every table of the namespace.
func Rules(o Options) (map[RuleID]RulePlace, error) {
	replies, err := dumpAll(o, unix.NFT_MSG_GETRULE)
	if err != nil {
		return nil, fmt.Errorf("list rules: %w", err)
	}
	own := ownRules()
	next := map[RuleID]int{} // by chain: handle 0
	out := map[RuleID]RulePlace{}
	for _, m := range replies {
		attrs, err := attributes(m)
		if err != nil {
			return nil, err
		}
		chain := RuleID{Family: m.Data[0], Table: cString(attrs[unix.NFTA_RULE_TABLE]), Chain: cString(attrs[unix.NFTA_RULE_CHAIN])}
		place := RulePlace{Index: next[chain], Comment: elementComment(attrs[unix.NFTA_RULE_USERDATA])}
		next[chain]++
		if texts := own[chain.Chain]; chain.Family == unix.NFPROTO_INET && chain.Table == TableName && place.Index < len(texts) {
			place.Text = texts[place.Index]
		}
		id := chain
		if b := attrs[unix.NFTA_RULE_HANDLE]; len(b) == 8 {
			id.Handle = binary.BigEndian.Uint64(b)
		}
		out[id] = place
	}
	return out, nil
}

// ownRules is the text of the program's rules by chain.
func ownRules() map[string][]string {
	out := map[string][]string{}
	for _, c := range newProgram().chains {
		for _, r := range c.rules {
			parts := make([]string, len(r.statements))
			for i, s := range r.statements {
				parts[i] = s.text()
			}
			out[c.name] = append(out[c.name], strings.Join(parts, " "))
		}
	}
	return out
}

// BaseChain is a chain of any table that hangs on a hook.
type BaseChain struct {
	Family   uint8 // NFPROTO_*
	Table    string
	Name     string
	Kind     string // filter, nat or route
	Hook     uint32 // NF_INET_*, or of another family
	Priority int32
	Drops    bool   // its policy is drop
	Packets  uint64 // that its policy decided, where the chain counts them
}

// BaseChains lists the base chains of every table of the namespace, those of iptables-nft
// and firewalld included.
func BaseChains(o Options) ([]BaseChain, error) {
	replies, err := dumpAll(o, unix.NFT_MSG_GETCHAIN)
	if err != nil {
		return nil, fmt.Errorf("list chains: %w", err)
	}
	var out []BaseChain
	for _, m := range replies {
		attrs, err := attributes(m)
		if err != nil {
			return nil, err
		}
		if attrs[unix.NFTA_CHAIN_HOOK] == nil {
			continue
		}
		hook, err := attributeMap(attrs[unix.NFTA_CHAIN_HOOK])
		if err != nil {
			return nil, err
		}
		counters, err := attributeMap(attrs[unix.NFTA_CHAIN_COUNTERS])
		if err != nil {
			return nil, err
		}
		out = append(out, BaseChain{Packets: number64(counters[unix.NFTA_COUNTER_PACKETS]), Family: m.Data[0], Table: cString(attrs[unix.NFTA_CHAIN_TABLE]), Name: cString(attrs[unix.NFTA_CHAIN_NAME]),
			Kind: cString(attrs[unix.NFTA_CHAIN_TYPE]), Hook: trace32(hook[unix.NFTA_HOOK_HOOKNUM]), Priority: int32(trace32(hook[unix.NFTA_HOOK_PRIORITY])),
			Drops: len(attrs[unix.NFTA_CHAIN_POLICY]) == 4 && trace32(attrs[unix.NFTA_CHAIN_POLICY]) == 0})
	}
	return out, nil
}

func number64(b []byte) uint64 {
	if len(b) != 8 {
		return 0
	}
	return binary.BigEndian.Uint64(b)
}

// FamilyName is nft's word for a NFPROTO_* number.
func FamilyName(family uint8) string {
	switch family {
	case unix.NFPROTO_INET:
		return "inet"
	case unix.NFPROTO_IPV4:
		return "ip"
	case unix.NFPROTO_IPV6:
		return "ip6"
	case unix.NFPROTO_ARP:
		return "arp"
	case unix.NFPROTO_BRIDGE:
		return "bridge"
	case unix.NFPROTO_NETDEV:
		return "netdev"
	}
	return fmt.Sprintf("family %d", family)
}

// dumpAll lists objects of one kind of all families.
func dumpAll(o Options, kind netlink.HeaderType) ([]netlink.Message, error) {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: o.NetNS})
	if err != nil {
		return nil, fmt.Errorf("dial nfnetlink: %w", err)
	}
	defer func() { _ = c.Close() }()
	return c.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | kind, Flags: netlink.Request | netlink.Dump},
		Data:   []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, 0},
	})
}
