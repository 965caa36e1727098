package nft

import (
	"slices"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// hostPortSets hold where the node's ports lead.
func hostPortSets() []*setSpec {
	ports := []dataType{typeProto, typePort}
	sets := []*setSpec{{name: "host_port", key: ports, comment: "ports of this node that lead to pods"}}
	for _, f := range families() {
		to := pairOf(f.addr, typePort)
		sets = append(sets, &setSpec{name: "host_port" + f.suffix, key: ports, data: &to, comment: "at any address of this node"},
			&setSpec{name: "host_port_at" + f.suffix, key: append([]dataType{f.addr}, ports...), data: &to, comment: "at one address"})
	}
	return sets
}

// pairOf is the concatenation of two types as a value.
func pairOf(a, b dataType) dataType {
	return dataType{name: a.name + " . " + b.name, magic: a.magic<<6 | b.magic, size: (a.size+3)&^3 + (b.size+3)&^3}
}

// hostPortPriority is behind kube-proxy's (dstnat): Services win (CVE-2019-9946 was the other way round).
const hostPortPriority = -90

// hostPortChains give connections to the node's mapped ports their pod as destination. Only the first packet of a
// connection comes here.
func hostPortChains() []chain {
	asked := key{metaL4Proto, thDport}
	local := []statement{in{key: asked, set: "host_port"}, addressType{unix.RTN_LOCAL, "local"}}
	lead := chain{name: "host_port"}
	for _, f := range families() {
		lead.rules = append(lead.rules,
			does(destination{f.l3, key{f.dst, metaL4Proto, thDport}, "host_port_at" + f.suffix}),
			does(destination{f.l3, asked, "host_port" + f.suffix}))
	}
	return []chain{
		lead,
		{name: "host_port_in", rules: []rule{does(within(ip4Dst, false, "127.0.0.0/8"), ret), does(goTo("host_port"))}},
		{name: "dstnat", hook: &hook{"nat", "prerouting", unix.NF_INET_PRE_ROUTING, hostPortPriority, "dstnat + 10"},
			rules: []rule{does(append(slices.Clone(local), goTo("host_port_in"))...)}},
		{name: "dstnat_own", hook: &hook{"nat", "output", unix.NF_INET_LOCAL_OUT, hostPortPriority, "-90"},
			rules: []rule{does(append(slices.Clone(local), goTo("host_port"))...)}},
	}
}

// hairpinChain gives packets whose source the pod could not answer, its own or the node's loopback, the node's address.
func hairpinChain() chain {
	c := chain{name: "hairpin", rules: []rule{does(within(ip4Src, false, "127.0.0.0/8"), masquerade{})}}
	for _, f := range families() {
		c.rules = append(c.rules, does(in{key: key{f.src, f.dst}, set: "self" + f.suffix}, masquerade{}))
	}
	return c
}

// addressType matches packets by what the routes say of their destination (fib, Linux 4.10).
type addressType struct {
	kind  uint32 // RTN_*
	shown string
}

func (a addressType) text() string { return "fib daddr type " + a.shown }

func (a addressType) exprs(r *ruleContext) {
	r.add(&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: host32(a.kind)})
}

// destination gives the connection the address and port that the map has for the key. A key that is not there ends
// the rule.
type destination struct {
	l3  byte
	key key
	by  string
}

func (d destination) text() string {
	family := "ip"
	if d.l3 == unix.NFPROTO_IPV6 {
		family = "ip6"
	}
	return "dnat " + family + " to " + d.key.String() + " map @" + d.by
}

func (d destination) exprs(r *ruleContext) {
	d.key.load(r, false)
	port := uint32(unix.NFT_REG32_01) // behind the address: one register of 4 bytes, or one of 16
	if d.l3 == unix.NFPROTO_IPV6 {
		port = unix.NFT_REG_2
	}
	r.add(&expr.Lookup{SourceRegister: 1, SetName: d.by, DestRegister: 1, IsDestRegSet: true},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(d.l3), RegAddrMin: 1, RegAddrMax: 1, RegProtoMin: port, RegProtoMax: port})
}
