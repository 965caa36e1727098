package debug

import (
	"fmt"
	"iter"
	"maps"
	"math/big"
	"net/netip"
	"slices"
	"strings"

	"github.com/nftcni/nftcni/policy"
)

// probeSpan is services that no policy tells apart, and the one that stands for them.
type probeSpan struct {
	protocol    policy.Protocol
	first, last uint16
}

// otherProtocol stands for the protocols that no policy names: GRE.
const otherProtocol policy.Protocol = 47

// spans cuts every protocol's ports where a policy does.
func spans(c *policy.Cluster) []probeSpan {
	cuts := map[policy.Protocol]map[int]bool{}
	for _, p := range []policy.Protocol{policy.TCP, policy.UDP, policy.SCTP, policy.ICMP} {
		cuts[p] = map[int]bool{0: true, 65536: true}
	}
	cut := func(p policy.Protocol, first, last uint16) {
		for proto, set := range cuts {
			if p == proto || p == policy.AnyProtocol || p == policy.ICMPv6 && proto == policy.ICMP {
				set[int(first)], set[int(last)+1] = true, true
			}
		}
	}
	for _, p := range c.Policies {
		for _, d := range policy.Directions {
			for _, r := range p.Rules[d] {
				for _, m := range slices.Concat(r.Ports, r.NotPorts) {
					if m.Name == "" {
						cut(m.Protocol, m.First, m.Last)
					}
				}
			}
		}
	}
	for _, p := range c.Pods {
		for _, np := range p.Ports {
			cut(np.Protocol, np.Port, np.Port)
		}
	}
	var out []probeSpan
	for _, proto := range []policy.Protocol{policy.TCP, policy.UDP, policy.SCTP, policy.ICMP} {
		at := slices.Sorted(maps.Keys(cuts[proto]))
		for i := range len(at) - 1 {
			out = append(out, probeSpan{proto, uint16(at[i]), uint16(at[i+1] - 1)})
		}
	}
	return append(out, probeSpan{otherProtocol, 0, 0})
}

// access computes who may reach whom from the compiled tables of a cluster in which
// every workload is local.
type access struct {
	list   []workload
	spans  []probeSpan
	lookup policy.LookupFunc
	ends   [][]accessEnd // of each workload's addresses
	// classes holds the access classes by profile<<32 | identity, and others those of a
	// profile's other identities: a quarter of a million pairs ask, and numbers hash fast.
	classes map[uint64]uint32
	others  map[uint32]uint32
	memo    map[uint64]*spanSet // by class<<1, and 1 for IPv6
	all     *spanSet
	texts   map[[4]*spanSet]string // by the two directions of the one or two families
}

// accessEnd is what the tables know of one address: as a pod, and as a peer.
type accessEnd struct {
	addr     netip.Addr
	profile  [2]uint32 // by direction; 0: not judged
	identity uint32
}

// spanSet is a set of spans, as bits. Equal access classes share one.
type spanSet struct{ big.Int }

// newAccess compiles c reduced to one pod a workload. cuts are those of spans, of a
// cluster or of two that are to be compared.
func newAccess(c *policy.Cluster, list []workload, cuts []probeSpan) *access {
	const node = "here"
	reduced := &policy.Cluster{Namespaces: c.Namespaces, Policies: c.Policies}
	pods := map[policy.Name]*policy.Pod{}
	for i := range c.Pods {
		pods[c.Pods[i].Name] = &c.Pods[i]
	}
	for _, w := range list {
		if p, known := w.pod, pods[w.pod.Name]; w.isPods && known != nil {
			p.Node, p.Labels, p.Ports = node, known.Labels, known.Ports
			reduced.Pods = append(reduced.Pods, p)
		}
	}
	tables := policy.Compile(reduced, node).Tables
	a := &access{list: list, spans: cuts, lookup: tables.Index(), all: &spanSet{}, classes: map[uint64]uint32{},
		others: map[uint32]uint32{}, memo: map[uint64]*spanSet{}, texts: map[[4]*spanSet]string{}}
	for k, class := range tables {
		switch k.Map {
		case policy.Access:
			a.classes[uint64(k.X)<<32|uint64(k.Y)] = class
		case policy.AccessOthers:
			a.others[k.X] = class
		}
	}
	for i := range cuts {
		a.all.SetBit(&a.all.Int, i, 1)
	}
	for i := range list {
		var ends []accessEnd
		for _, addr := range list[i].addrs {
			ends = append(ends, a.end(addr))
		}
		a.ends = append(a.ends, ends)
	}
	return a
}

// end asks the tables about an address as the pod of a flow and as its other end.
func (a *access) end(addr netip.Addr) accessEnd {
	e := accessEnd{addr: addr, identity: policy.IdentityOthers}
	e.profile[policy.Ingress], _ = a.lookup(policy.Key{Map: policy.IngressProfile, Addr: addr})
	e.profile[policy.Egress], _ = a.lookup(policy.Key{Map: policy.EgressProfile, Addr: addr})
	for _, m := range [2]policy.Map{policy.NetID, policy.PodID} {
		if v, ok := a.lookup(policy.Key{Map: m, Addr: addr}); ok {
			e.identity = v
		}
	}
	return e
}

// services says what src may open to dst, by index: "all", "none" or services, for both
// families when they differ. restricted: a policy selects either end.
func (a *access) services(src, dst int) (text string, restricted bool) {
	var sets [4]*spanSet
	n := 0
	for _, x := range a.ends[src] {
		for _, y := range a.ends[dst] {
			if x.addr.Is4() != y.addr.Is4() || n == len(sets) {
				continue
			}
			restricted = restricted || x.profile[policy.Egress] != 0 || y.profile[policy.Ingress] != 0
			sets[n] = a.allowed(x.profile[policy.Egress], y.identity, x.addr.Is6())
			sets[n+1] = a.allowed(y.profile[policy.Ingress], x.identity, x.addr.Is6())
			n += 2
		}
	}
	text, known := a.texts[sets]
	if !known {
		text = a.text(sets)
		a.texts[sets] = text
	}
	return text, restricted
}

// allowed is what a profile lets pass to or from an identity.
func (a *access) allowed(profile, identity uint32, six bool) *spanSet {
	if profile == 0 {
		return a.all
	}
	class, ok := a.classes[uint64(profile)<<32|uint64(identity)]
	if !ok {
		class = a.others[profile] // 0: none
	}
	key := uint64(class) << 1
	if six {
		key |= 1
	}
	set := a.memo[key]
	if set == nil {
		set = &spanSet{}
		for i, s := range a.spans {
			if class != 0 && a.classAllows(class, s, six) {
				set.SetBit(&set.Int, i, 1)
			}
		}
		a.memo[key] = set
	}
	return set
}

func (a *access) classAllows(class uint32, s probeSpan, six bool) bool {
	proto := s.protocol
	if proto == policy.ICMP && six {
		proto = policy.ICMPv6
	}
	for _, k := range [3]policy.Key{
		{Map: policy.AccessPort, X: class, Protocol: proto, First: s.first},
		{Map: policy.AccessRange, X: class, Protocol: proto, First: s.first, Last: s.first},
		{Map: policy.AccessRest, X: class},
	} {
		if code, ok := a.lookup(k); ok {
			return code == policy.CodeAllow || code == policy.CodeAllowLog
		}
	}
	return false
}

// text is what both directions of a pair allow, for people.
func (a *access) text(sets [4]*spanSet) string {
	if sets[0] == nil {
		return ""
	}
	first := new(big.Int).And(&sets[0].Int, &sets[1].Int)
	if sets[2] == nil {
		return a.setText(first)
	}
	second := new(big.Int).And(&sets[2].Int, &sets[3].Int)
	if first.Cmp(second) == 0 {
		return a.setText(first)
	}
	return "IPv4 " + a.setText(first) + "; IPv6 " + a.setText(second)
}

func (a *access) setText(set *big.Int) string {
	switch {
	case set.Sign() == 0:
		return "none"
	case set.Cmp(&a.all.Int) == 0:
		return "all"
	}
	var parts []string
	for _, proto := range []policy.Protocol{policy.TCP, policy.UDP, policy.SCTP, policy.ICMP, otherProtocol} {
		parts = append(parts, a.protocolText(set, proto)...)
	}
	return strings.Join(parts, ", ")
}

// protocolText joins the neighbouring spans of one protocol.
func (a *access) protocolText(set *big.Int, proto policy.Protocol) []string {
	var merged []policy.PortMatch
	for i, s := range a.spans {
		if s.protocol != proto || set.Bit(i) == 0 {
			continue
		}
		if n := len(merged); n > 0 && int(merged[n-1].Last)+1 == int(s.first) {
			merged[n-1].Last = s.last
			continue
		}
		merged = append(merged, policy.PortMatch{Protocol: proto, First: s.first, Last: s.last})
	}
	out := make([]string, len(merged))
	for i, m := range merged {
		switch {
		case proto == otherProtocol:
			out[i] = "other protocols"
		case proto == policy.ICMP && (m.First != 0 || m.Last != 65535):
			out[i] = fmt.Sprintf("ICMP types %d-%d", m.First>>8, m.Last>>8)
		default:
			out[i] = portText(m)
		}
	}
	return out
}

// pair is one edge of the picture.
type pair struct {
	Src      string `json:"src"`
	Dst      string `json:"dst"`
	Services string `json:"services"` // "all", "none", or TCP/80, UDP/53
	// Restricted: a policy selects either end; else everything is open by default.
	Restricted bool `json:"restricted"`

	from, to int
}

// pairs lists every pair of different ends of which one is pods.
func (a *access) pairs() []pair {
	out := make([]pair, 0, len(a.list)*len(a.list))
	for i, j := range a.indices() {
		if text, restricted := a.services(i, j); text != "" {
			out = append(out, pair{a.list[i].name, a.list[j].name, text, restricted, i, j})
		}
	}
	return out
}

// indices are what pairs asks about.
func (a *access) indices() iter.Seq2[int, int] {
	return func(yield func(int, int) bool) {
		for i := range a.list {
			for j := range a.list {
				src, dst := &a.list[i], &a.list[j]
				if !src.isPods && !dst.isPods || i == j && len(src.pods) < 2 {
					continue
				}
				if !yield(i, j) {
					return
				}
			}
		}
	}
}
