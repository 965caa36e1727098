package debug

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/nftcni/nftcni/policy"
)

// reasons says why rules did not match a flow, in the words of the policy's author.
type reasons struct {
	cluster    *policy.Cluster
	policies   map[policy.PolicyID]*policy.Policy
	namespaces map[string]policy.Labels
	oracle     *policy.Oracle
}

func newReasons(c *policy.Cluster, node string) *reasons {
	r := &reasons{cluster: c, policies: map[policy.PolicyID]*policy.Policy{}, namespaces: map[string]policy.Labels{}, oracle: policy.NewOracle(c, node)}
	for i := range c.Policies {
		r.policies[c.Policies[i].ID] = &c.Policies[i]
	}
	for _, ns := range c.Namespaces {
		r.namespaces[ns.Name] = ns.Labels
	}
	return r
}

// gap is what keeps a rule from matching: how much, and in words.
type gap struct {
	size int
	text []string
}

func (g gap) and(o gap) gap { return gap{g.size + o.size, append(slices.Clone(g.text), o.text...)} }

func single(format string, args ...any) gap { return gap{1, []string{fmt.Sprintf(format, args...)}} }

// nearestGap is up to which gap a rule is said to match almost: three labels, another
// address block.
const nearestGap = 3

// nearest names the considered rule that needs the least to match, and what it needs.
func (r *reasons) nearest(d policy.Decision, dir policy.Direction, f policy.Flow) string {
	best, text := 1<<30, ""
	dns := dir == policy.Egress && f.Port == 53 && (f.Protocol == policy.UDP || f.Protocol == policy.TCP)
	for _, c := range d.Considered {
		g, ok := r.gap(c, dir, f)
		dns = dns && !(ok && c.PortMatch)
		if ok && g.size < best {
			is := "almost matches"
			if g.size > nearestGap {
				is = "comes nearest"
			}
			best, text = g.size, fmt.Sprintf("rule %d of %s %s: %s", c.Rule, c.Policy, is, strings.Join(g.text, "; "))
		}
	}
	if dns {
		text = strings.TrimPrefix(text+"; no egress rule for this pod allows DNS (UDP/53 and TCP/53), which it needs to resolve any name", "; ")
	}
	return text
}

// gap compares one considered rule with the flow; false when there is no such rule.
func (r *reasons) gap(c policy.Considered, dir policy.Direction, f policy.Flow) (gap, bool) {
	p := r.policies[c.Policy]
	if p == nil || c.Rule < 0 || c.Rule >= len(p.Rules[dir]) {
		return gap{}, false
	}
	rule := p.Rules[dir][c.Rule]
	var g gap
	if !c.PeerMatched {
		g = g.and(r.peers(rule, other(dir, f)))
	}
	if !c.PortMatch {
		g = g.and(r.ports(rule, f))
	}
	return g, true
}

// other is the end of f that a rule's peers are compared with.
func other(dir policy.Direction, f policy.Flow) netip.Addr {
	if dir == policy.Ingress {
		return f.Src
	}
	return f.Dst
}

func (r *reasons) peers(rule policy.Rule, a netip.Addr) gap {
	if rule.Peers != nil && len(rule.Peers) == 0 {
		return gap{9, []string{"its list of peers matches nothing"}}
	}
	best := gap{size: 1 << 20, text: []string{"the address is excepted"}}
	for _, p := range rule.Peers {
		if g := r.peer(p, a); g.size < best.size {
			best = g
		}
	}
	return best
}

func (r *reasons) peer(p policy.Peer, a netip.Addr) gap {
	if p.Block != nil {
		return blockGap(*p.Block, a)
	}
	pod := r.oracle.Owner(a)
	if pod == nil {
		return gap{4, []string{fmt.Sprintf("it wants a pod (%s), and %s is none", selectorText(*p.Pods), a)}}
	}
	var g gap
	if p.Pods.Namespace != "" {
		if p.Pods.Namespace != pod.Namespace {
			g = g.and(gap{2, []string{fmt.Sprintf("it wants namespace %s, and %s is in %s", p.Pods.Namespace, pod.Name, pod.Namespace)}})
		}
	} else {
		g = g.and(labelGap(p.Pods.Namespaces, r.namespaces[pod.Namespace], "namespace "+pod.Namespace))
	}
	return g.and(labelGap(p.Pods.Pods, pod.Labels, pod.Name.String()))
}

func blockGap(b policy.Block, a netip.Addr) gap {
	switch {
	case b.CIDR.Addr().Is4() != a.Is4():
		return gap{5, []string{fmt.Sprintf("ipBlock %s is of the other family", b.CIDR)}}
	case !b.CIDR.Contains(a):
		return gap{3, []string{fmt.Sprintf("ipBlock %s does not hold %s", b.CIDR, a)}}
	}
	for _, e := range b.Except {
		if e.Contains(a) {
			return gap{1, []string{fmt.Sprintf("ipBlock %s excepts %s, which holds %s", b.CIDR, e, a)}}
		}
	}
	return gap{}
}

// labelGap counts the requirements that who does not meet.
func labelGap(s policy.Selector, l policy.Labels, who string) gap {
	var g gap
	for _, q := range s.Requirements {
		if (policy.Selector{Requirements: []policy.Requirement{q}}).Matches(l) {
			continue
		}
		has := "has no label " + q.Key
		if v, ok := l.Get(q.Key); ok {
			has = fmt.Sprintf("has %s=%s", q.Key, v)
		}
		g = g.and(single("it wants %s, and %s %s", requirementText(q), who, has))
	}
	return g
}

func requirementText(q policy.Requirement) string {
	switch {
	case q.Op == policy.Exists:
		return "a label " + q.Key
	case q.Op == policy.DoesNotExist:
		return "no label " + q.Key
	case q.Op == policy.In && len(q.Values) == 1:
		return q.Key + "=" + q.Values[0]
	case q.Op == policy.In:
		return q.Key + " in (" + strings.Join(q.Values, ", ") + ")"
	}
	return q.Key + " not in (" + strings.Join(q.Values, ", ") + ")"
}

func selectorText(s policy.PodSelector) string {
	var parts []string
	if s.Namespace != "" {
		parts = append(parts, "namespace "+s.Namespace)
	}
	for _, q := range s.Namespaces.Requirements {
		parts = append(parts, "namespaces with "+requirementText(q))
	}
	if s.Namespace == "" && len(s.Namespaces.Requirements) == 0 {
		parts = append(parts, "any namespace")
	}
	for _, q := range s.Pods.Requirements {
		parts = append(parts, requirementText(q))
	}
	return strings.Join(parts, ", ")
}

// portNames are the names of the ports of the pod at a.
func (r *reasons) portNames(a netip.Addr) string {
	var names []string
	if p := r.oracle.Owner(a); p != nil {
		for _, np := range p.Ports {
			names = append(names, np.Name)
		}
	}
	if names == nil {
		return "it has none"
	}
	return "it has " + strings.Join(names, ", ")
}

// ports says which services the rule opens instead.
func (r *reasons) ports(rule policy.Rule, f policy.Flow) gap {
	if rule.Ports != nil && len(rule.Ports) == 0 {
		return gap{9, []string{"its list of ports matches nothing"}}
	}
	var opens []string
	same := false
	for _, m := range rule.Ports {
		opens = append(opens, portText(m))
		same = same || m.Protocol == f.Protocol && m.Name == ""
		if m.Name != "" && r.hasNoPort(m, f.Dst) {
			return single("its port %q is not a port name of %s (%s)", m.Name, newNamesOf(r, f.Dst), r.portNames(f.Dst))
		}
	}
	size := 2
	if same {
		size = 1
	}
	return gap{size, []string{fmt.Sprintf("it is for %s, not %s", strings.Join(opens, ", "), serviceName(f))}}
}

func (r *reasons) hasNoPort(m policy.PortMatch, a netip.Addr) bool {
	pod := r.oracle.Owner(a)
	return pod == nil || !slices.ContainsFunc(pod.Ports, func(p policy.NamedPort) bool {
		return p.Name == m.Name && (m.Protocol == policy.AnyProtocol || m.Protocol == p.Protocol)
	})
}

func newNamesOf(r *reasons, a netip.Addr) string {
	if p := r.oracle.Owner(a); p != nil {
		return p.Name.String()
	}
	return a.String()
}

// portText is a PortMatch as TCP/80, UDP/5000-5100, TCP/http or TCP.
func portText(m policy.PortMatch) string {
	name := "any protocol"
	if m.Protocol != policy.AnyProtocol {
		name = protocolName(m.Protocol)
	}
	switch {
	case m.Name != "":
		return name + "/" + m.Name
	case m.First == 0 && m.Last == 65535:
		return name
	case m.First == m.Last:
		return name + "/" + strconv.Itoa(int(m.First))
	}
	return fmt.Sprintf("%s/%d-%d", name, m.First, m.Last)
}
