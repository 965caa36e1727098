package nft

import (
	"strings"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/policy"
)

// TableName is the name of the one table, of family inet.
const TableName = "nftcni"

// InterfacePrefix begins the name of every pod interface on the host side.
const InterfacePrefix = "nft"

// nflog groups. A message carries the profile that decided as its mark.
const (
	LogGroupDenied = 100 // denials, sampled: at most 10/s a profile, 100/s in all
	LogGroupRule   = 101 // flows that a policy asked to log, prefix "allow" or "deny"
)

// Marks of a denial that no profile explains: an isolated address whose profile was not found.
const (
	UnknownEgressProfile  uint32 = 0x1000_0000
	UnknownIngressProfile uint32 = 0x2000_0000
)

// A program is the constant part of the table.
type program struct {
	sets   []*setSpec
	chains []chain
}

// A chain is a list of rules; base chains have a hook.
type chain struct {
	name  string
	hook  *hook
	rules []rule
}

type hook struct {
	kind     string // filter or nat
	name     string
	number   uint32 // NF_INET_*
	priority int32
	shown    string
}

type rule struct {
	statements []statement
	comment    string
}

func (p *program) set(name string) *setSpec {
	for _, s := range p.sets {
		if s.name == name {
			return s
		}
	}
	return nil
}

// family is what differs between the two families: data, not code.
type family struct {
	suffix         string
	addr           dataType
	src, dst       field // of the packet
	client, server field // of the connection: who opened it, and who answered after DNAT
	l3             byte
	icmpType       field
}

func families() [2]family {
	return [2]family{
		{"4", typeIP4, ip4Src, ip4Dst, ctClient4, ctServer4, unix.NFPROTO_IPV4, icmpType},
		{"6", typeIP6, ip6Src, ip6Dst, ctClient6, ctServer6, unix.NFPROTO_IPV6, icmpv6Type},
	}
}

// newProgram builds the program. It depends on nothing: every node of every version has the same text.
func newProgram() *program {
	p := &program{sets: policySets()}
	for _, f := range families() {
		p.sets = append(p.sets, familySets(f)...)
	}
	p.sets = append(p.sets, tunnelSets()...)
	p.sets = append(p.sets, hostPortSets()...)
	p.sets = append(p.sets, podToHostSets()...)
	p.sets = append(p.sets, constantSets()...)
	p.chains = append(p.chains, verdictChains()...)
	for _, f := range families() {
		p.chains = append(p.chains, familyChains(f)...)
	}
	p.chains = append(p.chains, tunnelChains()...)
	p.chains = append(p.chains, hostPortChains()...)
	p.chains = append(p.chains, hairpinChain())
	p.chains = append(p.chains, baseChains()...)
	return p
}

func policySets() []*setSpec {
	m, c := typeMark, typeClassID
	ports := []dataType{c, typeProto, typePort}
	return []*setSpec{
		{name: "access", key: []dataType{m, c}, data: &c, comment: "profile . identity -> access class"},
		{name: "access_others", key: []dataType{m}, data: &c, comment: "profile -> access class of every other identity"},
		{name: "access_port", key: ports, data: &c, comment: "class . protocol . port -> code"},
		{name: "access_range", key: ports, data: &c, flags: unix.NFT_SET_INTERVAL, comment: "class . protocol . ports -> code"},
		{name: "access_icmp", key: ports, data: &c, flags: unix.NFT_SET_INTERVAL, comment: "class . protocol . type*256+code -> code"},
		{name: "access_rest", key: []dataType{c}, data: &c, comment: "class -> code of everything else"},
	}
}

func familySets(f family) []*setSpec {
	m, c, a := typeMark, typeClassID, []dataType{f.addr}
	pair := []dataType{f.addr, f.addr}
	s := f.suffix
	return []*setSpec{
		{name: "local" + s, key: a, comment: "addresses of this node's pods"},
		{name: "wired" + s, key: a, comment: "of these, those behind a pod interface of ours"},
		{name: "bound" + s, key: []dataType{typeIfname, f.addr}, comment: "pod interface . its address"},
		{name: "self" + s, key: pair, comment: "a pod's address twice: hairpin"},
		{name: "pod_id" + s, key: a, data: &c, comment: "pod address -> identity"},
		{name: "net_id" + s, key: a, data: &c, flags: unix.NFT_SET_INTERVAL, comment: "address range -> identity"},
		{name: "egress_profile" + s, key: a, data: &m, comment: "pod address -> profile"},
		{name: "ingress_profile" + s, key: a, data: &m},
		{name: "isolated_egress" + s, key: a, comment: "pods whose profile must be found"},
		{name: "isolated_ingress" + s, key: a},
		{name: "masquerade" + s, key: a, comment: "pods with ipMasq"},
		{name: "pod_networks" + s, key: a, flags: unix.NFT_SET_INTERVAL, comment: "never masqueraded towards"},
		{name: "denied" + s, key: append([]dataType{m}, pair...), flags: unix.NFT_SET_EVAL | unix.NFT_SET_TIMEOUT, timeout: 3600, size: 16384,
			comment: "profile . client . server"},
		{name: "log_limit" + s, key: []dataType{m, f.addr}, flags: unix.NFT_SET_EVAL | unix.NFT_SET_TIMEOUT, timeout: 60, size: 16384,
			comment: "profile . client: one noisy pod hides nobody"},
	}
}

// constantSets hold what other rulesets would write as anonymous sets: named ones keep their name in every
// listing, so that adopting the table can compare it word for word.
func constantSets() []*setSpec {
	c, v, m := typeClassID, typeVerdict, typeMark
	return []*setSpec{
		{name: "verdict", key: []dataType{c}, data: &v, size: 4, fixed: []fixedElement{
			{shown: "0:1 : return", key: host32(policy.CodeAllow), goes: &ret},
			{shown: "0:2 : goto deny", key: host32(policy.CodeDeny), goes: &gotoDeny},
			{shown: "0:3 : goto allow_log", key: host32(policy.CodeAllowLog), goes: &verdict{expr.VerdictGoto, "allow_log"}},
			{shown: "0:4 : goto deny_log", key: host32(policy.CodeDenyLog), goes: &verdict{expr.VerdictGoto, "deny_log"}},
		}},
		{name: "icmp_error4", key: []dataType{typeICMP}, fixed: []fixedElement{
			{shown: "destination-unreachable", key: []byte{3}}, {shown: "source-quench", key: []byte{4}}, {shown: "redirect", key: []byte{5}},
			{shown: "time-exceeded", key: []byte{11}}, {shown: "parameter-problem", key: []byte{12}},
		}},
		{name: "icmp_error6", key: []dataType{typeICMPv6}, fixed: []fixedElement{
			{shown: "destination-unreachable", key: []byte{1}}, {shown: "packet-too-big", key: []byte{2}},
			{shown: "time-exceeded", key: []byte{3}}, {shown: "parameter-problem", key: []byte{4}},
		}},
		{name: "neighbor_discovery", key: []dataType{typeICMPv6}, fixed: []fixedElement{
			{shown: "nd-neighbor-solicit", key: []byte{135}}, {shown: "nd-neighbor-advert", key: []byte{136}},
		}},
		{name: "link_chatter", key: []dataType{typeICMPv6}, comment: "what every IPv6 stack says at start and a routed veth does not need",
			fixed: []fixedElement{
				{shown: "mld-listener-report", key: []byte{131}}, {shown: "mld-listener-done", key: []byte{132}},
				{shown: "nd-router-solicit", key: []byte{133}}, {shown: "mld2-listener-report", key: []byte{143}},
			}},
		{name: "epoch", key: []dataType{m}, size: 16, comment: "marks of connections judged by the policy in force"},
		{name: "stamp", key: []dataType{typeNFProto}, data: &m, comment: "the mark an allowed connection gets"},
	}
}

// text prints the program as nft reads it, without table flags.
func (p *program) text() string {
	var b strings.Builder
	b.WriteString("table inet " + TableName + " {\n")
	for _, s := range p.sets {
		s.text(&b)
	}
	for i, c := range p.chains {
		c.text(&b)
		if i < len(p.chains)-1 {
			b.WriteString("\n")
		}
	}
	b.WriteString("}\n")
	return b.String()
}

func (c chain) text(b *strings.Builder) {
	b.WriteString("\tchain " + c.name + " {\n")
	if c.hook != nil {
		b.WriteString("\t\ttype " + c.hook.kind + " hook " + c.hook.name + " priority " + c.hook.shown + "; policy accept;\n")
	}
	for _, r := range c.rules {
		b.WriteString("\t\t")
		for i, s := range r.statements {
			if i > 0 {
				b.WriteByte(' ')
			}
			b.WriteString(s.text())
		}
		if r.comment != "" {
			b.WriteString(" comment \"" + r.comment + "\"")
		}
		b.WriteByte('\n')
	}
	b.WriteString("\t}\n")
}

// Program is the constant ruleset as nft text without table flags: chains, rules and sets as every node
// has them, without the elements that policy and pods bring.
func Program() string { return newProgram().text() }
