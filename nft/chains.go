package nft

import (
	"net/netip"
	"slices"
	"strconv"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/policy"
)

func payload(base expr.PayloadBase, offset, length uint32) func(uint32) expr.Any {
	return func(reg uint32) expr.Any {
		return &expr.Payload{DestRegister: reg, Base: base, Offset: offset, Len: length}
	}
}

func meta(k expr.MetaKey) func(uint32) expr.Any {
	return func(reg uint32) expr.Any { return &expr.Meta{Key: k, Register: reg} }
}

func connection(k expr.CtKey, direction uint32) func(uint32) expr.Any {
	return func(reg uint32) expr.Any { return &expr.Ct{Key: k, Register: reg, Direction: direction} }
}

// The fields that rules read.
var (
	metaMark     = field{name: "meta mark", size: 4, host: true, load: meta(expr.MetaKeyMARK)}
	metaPriority = field{name: "meta priority", size: 4, host: true, load: meta(expr.MetaKeyPRIORITY)}
	metaNFProto  = field{name: "meta nfproto", size: 1, load: meta(expr.MetaKeyNFPROTO)}
	metaL4Proto  = field{name: "meta l4proto", size: 1, host: true, load: meta(expr.MetaKeyL4PROTO)}
	iifname      = field{name: "iifname", size: 16, host: true, load: meta(expr.MetaKeyIIFNAME)}
	oifname      = field{name: "oifname", size: 16, host: true, load: meta(expr.MetaKeyOIFNAME)}
	ip4Src       = field{name: "ip saddr", size: 4, l3: unix.NFPROTO_IPV4, load: payload(expr.PayloadBaseNetworkHeader, 12, 4)}
	ip4Dst       = field{name: "ip daddr", size: 4, l3: unix.NFPROTO_IPV4, load: payload(expr.PayloadBaseNetworkHeader, 16, 4)}
	ip6Src       = field{name: "ip6 saddr", size: 16, l3: unix.NFPROTO_IPV6, load: payload(expr.PayloadBaseNetworkHeader, 8, 16)}
	ip6Dst       = field{name: "ip6 daddr", size: 16, l3: unix.NFPROTO_IPV6, load: payload(expr.PayloadBaseNetworkHeader, 24, 16)}
	ip6HopLimit  = field{name: "ip6 hoplimit", size: 1, l3: unix.NFPROTO_IPV6, load: payload(expr.PayloadBaseNetworkHeader, 7, 1)}
	ip4Fragment  = field{name: "ip frag-off", size: 2, l3: unix.NFPROTO_IPV4, load: payload(expr.PayloadBaseNetworkHeader, 6, 2)}
	ip6Next      = field{name: "ip6 nexthdr", size: 1, l3: unix.NFPROTO_IPV6, load: payload(expr.PayloadBaseNetworkHeader, 6, 1)}
	icmpType     = field{name: "icmp type", size: 1, l3: unix.NFPROTO_IPV4, l4: unix.IPPROTO_ICMP, load: payload(expr.PayloadBaseTransportHeader, 0, 1)}
	icmpv6Type   = field{name: "icmpv6 type", size: 1, l3: unix.NFPROTO_IPV6, l4: unix.IPPROTO_ICMPV6, load: payload(expr.PayloadBaseTransportHeader, 0, 1)}
	udpDport     = field{name: "udp dport", size: 2, l4: unix.IPPROTO_UDP, load: payload(expr.PayloadBaseTransportHeader, 2, 2)}
	thDport      = field{name: "th dport", size: 2, load: payload(expr.PayloadBaseTransportHeader, 2, 2)}
	thSport      = field{name: "th sport", size: 2, load: payload(expr.PayloadBaseTransportHeader, 0, 2)}
	ctMark       = field{name: "ct mark", size: 4, host: true, load: connection(expr.CtKeyMARK, 0)}
	ctDirection  = field{name: "ct direction", size: 1, load: connection(expr.CtKeyDIRECTION, 0)}
	ctClient4    = field{name: "ct original ip saddr", size: 4, load: connection(expr.CtKeySRCIP, 0)}
	ctServer4    = field{name: "ct reply ip saddr", size: 4, load: connection(expr.CtKeySRCIP, 1)}
	ctClient6    = field{name: "ct original ip6 saddr", size: 16, load: connection(expr.CtKeySRCIP6, 0)}
	ctServer6    = field{name: "ct reply ip6 saddr", size: 16, load: connection(expr.CtKeySRCIP6, 1)}
	ctProtocol   = field{name: "ct original protocol", size: 1, load: func(reg uint32) expr.Any {
		return &expr.Ct{Key: expr.CtKeyPROTOCOL, Register: reg, OptDirection: true}
	}}
	ctRequest = field{name: "ct original proto-dst", size: 2, load: connection(expr.CtKeyPROTODST, 0)}

	toMark     = target{"meta mark", &expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: 1}}
	toPriority = target{"meta priority", &expr.Meta{Key: expr.MetaKeyPRIORITY, SourceRegister: true, Register: 1}}
	toCtMark   = target{"ct mark", &expr.Ct{Key: expr.CtKeyMARK, SourceRegister: true, Register: 1}}

	ret      = verdict{kind: expr.VerdictReturn}
	drop     = verdict{kind: expr.VerdictDrop}
	accept   = verdict{kind: expr.VerdictAccept}
	gotoDeny = verdict{expr.VerdictGoto, "deny"}
)

func goTo(chain string) verdict       { return verdict{expr.VerdictGoto, chain} }
func jump(chain string) verdict       { return verdict{expr.VerdictJump, chain} }
func does(s ...statement) rule        { return rule{statements: s} }
func (r rule) noted(text string) rule { r.comment = text; return r }
func protocol(n byte, s string) compare {
	return compare{field: metaL4Proto, value: []byte{n}, shown: s}
}

// podInterface matches every interface of a pod by its prefix.
func podInterface(f field, not bool) compare {
	return compare{field: f, not: not, value: []byte(InterfacePrefix), shown: `"` + InterfacePrefix + `*"`}
}

// within matches an address against a prefix.
func within(f field, not bool, prefix string) compare {
	p := netip.MustParsePrefix(prefix)
	c := compare{field: f, not: not, value: p.Addr().AsSlice(), shown: prefix}
	if p.IsSingleIP() {
		c.shown = p.Addr().String()
		return c
	}
	c.mask = make([]byte, len(c.value))
	for i := range p.Bits() {
		c.mask[i/8] |= 0x80 >> (i % 8)
	}
	return c
}

// live matches packets of connections that the policy in force has allowed. The mark says it all: what conntrack calls
// invalid or does not track has no connection to read a mark of, and an allowed connection that nobody has answered yet
// is stamped, too.
func live() statement { return in{key: key{ctMark}, set: "epoch"} }

// guardPriority is before defragmentation (-400, NF_IP_PRI_CONNTRACK_DEFRAG): the kernel puts fragments together by
// address and identification, from whatever interface they came, and what is put together has one interface only.
const guardPriority = -450

// Bits of ct state (include/uapi/linux/netfilter/nf_conntrack_common.h, NF_CT_STATE_BIT).
const (
	ctInvalid   = 1
	ctRelated   = 4
	ctUntracked = 64
)

// ctDNAT is IPS_DST_NAT (same file): the connection's destination was changed.
const ctDNAT = 1 << 5

// deliveryPriority is before every other nat chain that a kernel takes (they come behind conntrack, -200): the first one that
// gives a connection another source is the last one that is asked.
const deliveryPriority = -199

// verdictChains end a walk. They need no family: the maps they read hold numbers.
func verdictChains() []chain {
	port := func(f field, by string) rule {
		// Not meta l4proto: where a set has intervals nft 1.0.6 converts its single byte with an expression that
		// Linux 7.2 refuses.
		return does(assign{toPriority, key{metaPriority, ctProtocol, f}, by}, dispatch{key{metaPriority}, "verdict"})
	}
	icmp := func(p compare) rule {
		return does(append([]statement{p}, port(ctRequest, "access_icmp").statements...)...)
	}
	return append(deniedChains(),
		chain{name: "decide_rest", rules: []rule{
			icmp(protocol(unix.IPPROTO_ICMP, "icmp")),
			icmp(protocol(unix.IPPROTO_ICMPV6, "ipv6-icmp")),
			does(assign{toPriority, key{metaPriority}, "access_rest"}, dispatch{key{metaPriority}, "verdict"}),
			does(gotoDeny),
		}},
		chain{name: "decide_reply", rules: []rule{port(thSport, "access_port"), port(thSport, "access_range"), does(goTo("decide_rest"))}},
		chain{name: "decide", rules: []rule{
			does(compare{field: ctDirection, value: []byte{1}, shown: "reply"}, goTo("decide_reply")),
			port(thDport, "access_port"), port(thDport, "access_range"), does(goTo("decide_rest")),
		}},
		chain{name: "evaluate", rules: []rule{
			does(assign{toPriority, key{metaMark, metaPriority}, "access"}, goTo("decide")),
			does(assign{toPriority, key{metaMark}, "access_others"}, goTo("decide")),
			does(gotoDeny),
		}},
		// One connection of multicast leaves by several interfaces: what is allowed to one pod must not be live for another.
		chain{name: "allowed", rules: []rule{
			does(constant{toPriority, 0, "none"}),
			does(assign{toMark, key{ctMark}, ""}),
			does(within(ip4Dst, false, "224.0.0.0/4"), ret),
			does(within(ip6Dst, false, "ff00::/8"), ret),
			does(assign{toCtMark, key{metaNFProto}, "stamp"}),
		}},
		chain{name: "stray_drop", rules: []rule{does(counter{}, drop).noted("belongs to no live connection")}},
	)
}

// deniedChains count, log and drop, and log for policies that ask for it.
func deniedChains() []chain {
	denied := func(f family) rule {
		return does(update{"denied" + f.suffix, key{metaMark, f.client, f.server}, counter{}}, goTo("denied"))
	}
	logged := func(f family) rule {
		return does(update{"log_limit" + f.suffix, key{metaMark, f.client}, limit{10, 20}}, limit{100, 200}, logTo{LogGroupDenied, "", 128})
	}
	fs := families()
	return []chain{
		{name: "denied", rules: []rule{
			logged(fs[0]),
			logged(fs[1]),
			does(counter{}, drop),
		}},
		{name: "deny", rules: []rule{
			does(constant{toCtMark, policy.DeniedMark, "0x40000000"}),
			denied(fs[0]),
			denied(fs[1]),
			does(counter{}).noted("denied4 or denied6 is full"),
			does(goTo("denied")),
		}},
		{name: "allow_log", rules: []rule{does(limit{1000, 1000}, logTo{LogGroupRule, "allow", 128})}},
		{name: "deny_log", rules: []rule{does(limit{1000, 1000}, logTo{LogGroupRule, "deny", 128}), does(gotoDeny)}},
	}
}

// directionChains judge one direction: the profile of the address in pod, the identity of the address in peer.
// Both lookups stand twice: see docs/decisions/0002.
func directionChains(f family, name string, pod, peer field, unknown uint32, shown string) []chain {
	profile := does(assign{toMark, key{pod}, name + "_profile" + f.suffix}, goTo(name+"_peer"+f.suffix))
	podID := does(assign{toPriority, key{peer}, "pod_id" + f.suffix}, goTo("evaluate"))
	netID := does(assign{toPriority, key{peer}, "net_id" + f.suffix}, goTo("evaluate"))
	return []chain{
		{name: name + "_peer" + f.suffix, rules: []rule{
			does(in{key: key{f.client, f.server}, set: "self" + f.suffix}, ret),
			podID, podID, netID, netID,
			does(constant{toPriority, policy.IdentityOthers, "0:ffff"}, goTo("evaluate")),
		}},
		{name: name + f.suffix, rules: []rule{
			profile,
			does(in{key: key{pod}, not: true, set: "isolated_" + name + f.suffix}, ret),
			profile,
			does(constant{toMark, unknown, shown}, gotoDeny),
		}},
	}
}

// familyChains judge the packets of one family.
func familyChains(f family) []chain {
	s := f.suffix
	stray := func(end field, direction string) rule {
		return does(in{key: key{end}, set: "isolated_" + direction + s}, goTo("stray_drop"))
	}
	cs := directionChains(f, "egress", f.client, f.server, UnknownEgressProfile, "0x10000000")
	cs = append(cs, directionChains(f, "ingress", f.server, f.client, UnknownIngressProfile, "0x20000000")...)
	return append(cs,
		chain{name: "stray" + s, rules: []rule{
			stray(f.src, "egress"), stray(f.src, "ingress"), stray(f.dst, "ingress"), stray(f.dst, "egress"),
		}},
		chain{name: "pod" + s, rules: []rule{
			does(ctState(ctInvalid|ctUntracked, "invalid,untracked"), goTo("stray"+s)),
			does(in{key: key{f.icmpType}, set: "icmp_error" + s}, goTo("stray"+s)),
			does(assign{toCtMark, key{metaMark}, ""}),
			does(jump("egress" + s)),
			does(jump("ingress" + s)),
			does(goTo("allowed")),
		}},
	)
}

// baseChains hang the others on the kernel's hooks. On postrouting there are nat chains only, which see the first packet
// of a connection: another hook would cost every packet of a live one. So the guard of delivery is asked where the way is
// chosen: in forward, on output for what the node itself sends, and where a connection's first packet leaves, since DNAT and marks
// change the way behind output's back.
func baseChains() []chain {
	dropped := func(m statement, why string) rule { return does(m, counter{}, drop).noted(why) }
	nd := []statement{in{key: key{icmpv6Type}, set: "neighbor_discovery"}, compare{field: ip6HopLimit, value: []byte{255}, shown: "255"}}
	var judge, spoofed, bound, reach []rule
	masq := make([]rule, 0, 2)
	for _, f := range families() {
		judge = append(judge, does(in{key: key{f.src}, set: "local" + f.suffix}, goTo("pod"+f.suffix)),
			does(in{key: key{f.dst}, set: "local" + f.suffix}, goTo("pod"+f.suffix)))
		spoofed = append(spoofed, dropped(in{key: key{f.src}, set: "wired" + f.suffix}, "a local pod's address from outside"))
		bound = append(bound, does(in{key: key{iifname, f.src}, set: "bound" + f.suffix}, ret))
		reach = append(reach, does(in{key: key{oifname, f.dst}, set: "bound" + f.suffix}, ret))
		masq = append(masq, masqueradeRule(f))
	}
	return []chain{
		{name: "from_pod", rules: append(bound,
			does(append(nd, within(ip6Src, false, "fe80::/10"), ret)...),
			does(append(nd, within(ip6Src, false, "::/128"), ret)...),
			does(in{key: key{icmpv6Type}, set: "link_chatter"}, drop),
			does(counter{}, drop).noted("not the pod's address"),
		)},
		{name: "to_pod", rules: append(reach,
			does(append(nd, ret)...),
			does(counter{}, drop).noted("address not bound to the interface"),
		)},
		{name: "prerouting", hook: &hook{"filter", "prerouting", unix.NF_INET_PRE_ROUTING, guardPriority, strconv.Itoa(guardPriority)},
			rules: append([]rule{does(podInterface(iifname, false), goTo("from_pod"))}, spoofed...)},
		{name: "forward", hook: &hook{"filter", "forward", unix.NF_INET_FORWARD, -10, "filter - 10"},
			rules: append(slices.Concat([]rule{does(live(), accept)}, tunnelForward(), []rule{does(podInterface(oifname, false), jump("to_pod"))}, judge),
				dropped(podInterface(iifname, false), "from a pod that is not bound any more"),
				dropped(podInterface(oifname, false), "to a pod that is not bound any more"))},
		{name: "node_to_pod", rules: []rule{does(ctBits{"ct status", expr.CtKeySTATUS, ctDNAT, "dnat"}, accept), does(goTo("to_pod"))}},
		{name: "output", hook: &hook{"filter", "output", unix.NF_INET_LOCAL_OUT, 0, "filter"}, rules: []rule{does(podInterface(oifname, false), goTo("node_to_pod"))}},
		{name: "delivery", hook: &hook{"nat", "postrouting", unix.NF_INET_POST_ROUTING, deliveryPriority, strconv.Itoa(deliveryPriority)},
			rules: []rule{does(podInterface(oifname, false), goTo("to_pod"))}},
		{name: "srcnat", hook: &hook{"nat", "postrouting", unix.NF_INET_POST_ROUTING, 100, "srcnat"}, rules: append([]rule{does(podInterface(oifname, false), goTo("hairpin"))}, masq...)},
	}
}

// masqueradeRule hides pods with ipMasq from what is outside the pod networks; multicast and broadcast keep
// their source.
func masqueradeRule(f family) rule {
	s := []statement{in{key: key{f.src}, set: "masquerade" + f.suffix}}
	if f.l3 == unix.NFPROTO_IPV4 {
		s = append(s, within(f.dst, true, "224.0.0.0/4"), within(f.dst, true, "255.255.255.255/32"))
	} else {
		s = append(s, within(f.dst, true, "ff00::/8"))
	}
	return does(append(s, in{key: key{f.dst}, not: true, set: "pod_networks" + f.suffix}, masquerade{})...)
}
