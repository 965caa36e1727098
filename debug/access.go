package debug

import (
	"fmt"
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
	memo   map[accessKey]*big.Int
	all    *big.Int
}

type accessKey struct {
	class uint32
	six   bool
}

// newAccess compiles c reduced to one pod a workload. cuts are those of spans, of a
// cluster or of two that are to be compared.
func newAccess(c *policy.Cluster, list []workload, cuts []probeSpan) *access {
	const node = "here"
	reduced := &policy.Cluster{Namespaces: c.Namespaces, Policies: c.Policies}
	labels := map[policy.Name]*policy.Pod{}
	for i := range c.Pods {
		labels[c.Pods[i].Name] = &c.Pods[i]
	}
	for _, w := range list {
		if p, known := w.pod, labels[w.pod.Name]; w.isPods && known != nil {
			p.Node, p.Labels, p.Ports = node, known.Labels, known.Ports
			reduced.Pods = append(reduced.Pods, p)
		}
	}
	a := &access{list: list, spans: cuts, lookup: policy.Compile(reduced, node).Tables.Index(), memo: map[accessKey]*big.Int{}}
	a.all = new(big.Int).Sub(new(big.Int).Lsh(big.NewInt(1), uint(len(cuts))), big.NewInt(1))
	return a
}

// reach is the set of spans, as bits, that src may open to dst over each family that
// both have, IPv4 first; restricted says that a policy selects either end.
func (a *access) reach(src, dst *workload) (families []*big.Int, restricted bool) {
	for _, x := range src.addrs {
		for _, y := range dst.addrs {
			if x.Is4() != y.Is4() {
				continue
			}
			v := policy.DecideWith(a.lookup, policy.Flow{Src: x, Dst: y, Protocol: otherProtocol})
			restricted = restricted || v.Egress.Judged || v.Ingress.Judged
			families = append(families, new(big.Int).And(a.side(v.Egress, x), a.side(v.Ingress, x)))
		}
	}
	return families, restricted
}

// side is what one direction's access class allows.
func (a *access) side(d policy.TableDecision, addr netip.Addr) *big.Int {
	if !d.Judged {
		return a.all
	}
	key := accessKey{d.Class, addr.Is6()}
	if set := a.memo[key]; set != nil {
		return set
	}
	set := new(big.Int)
	if d.Class != 0 {
		for i, s := range a.spans {
			if a.classAllows(d.Class, s, addr.Is6()) {
				set.SetBit(set, i, 1)
			}
		}
	}
	a.memo[key] = set
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

// text is a set of spans for people: all, none, or services.
func (a *access) text(families []*big.Int) string {
	if len(families) == 0 {
		return "no common family"
	}
	first := a.setText(families[0])
	for _, f := range families[1:] {
		if f.Cmp(families[0]) != 0 {
			return "IPv4 " + first + "; IPv6 " + a.setText(f)
		}
	}
	return first
}

func (a *access) setText(set *big.Int) string {
	switch {
	case set.Sign() == 0:
		return "none"
	case set.Cmp(a.all) == 0:
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
	var out []pair
	for i := range a.list {
		for j := range a.list {
			src, dst := &a.list[i], &a.list[j]
			if !src.isPods && !dst.isPods || i == j && len(src.pods) < 2 {
				continue
			}
			families, restricted := a.reach(src, dst)
			if len(families) == 0 {
				continue
			}
			out = append(out, pair{src.name, dst.name, a.text(families), restricted, i, j})
		}
	}
	return out
}
