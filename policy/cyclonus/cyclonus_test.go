package cyclonus

import (
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/mattfenwick/cyclonus/pkg/matcher"
	v1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/nftcni/nftcni/policy"
	"github.com/nftcni/nftcni/policy/policytest"
)

// networkPolicies writes p as the API object it came from. Its subject is rewritten as
// notInAbsent demands, which may take several objects. Rules that match nothing have no
// API form (an empty list there means everything) and are left out.
func networkPolicies(p *policy.Policy) []*networkingv1.NetworkPolicy {
	var out []*networkingv1.NetworkPolicy
	for i, subject := range notInAbsent(p.Subject.Pods) {
		np := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: p.ID.Namespace, Name: p.ID.Name.Name + "-" + strconv.Itoa(i)}}
		np.Spec.PodSelector = subject
		for _, r := range p.Rules[policy.Ingress] {
			if writable(r) {
				np.Spec.Ingress = append(np.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: peers(r.Peers), Ports: ports(r.Ports)})
			}
		}
		for _, r := range p.Rules[policy.Egress] {
			if writable(r) {
				np.Spec.Egress = append(np.Spec.Egress, networkingv1.NetworkPolicyEgressRule{To: peers(r.Peers), Ports: ports(r.Ports)})
			}
		}
		if p.Applies[policy.Ingress] {
			np.Spec.PolicyTypes = append(np.Spec.PolicyTypes, networkingv1.PolicyTypeIngress)
		}
		if p.Applies[policy.Egress] {
			np.Spec.PolicyTypes = append(np.Spec.PolicyTypes, networkingv1.PolicyTypeEgress)
		}
		out = append(out, np)
	}
	return out
}

func writable(r policy.Rule) bool {
	return (r.Peers == nil || len(r.Peers) > 0) && (r.Ports == nil || len(r.Ports) > 0)
}

func peers(in []policy.Peer) []networkingv1.NetworkPolicyPeer {
	var out []networkingv1.NetworkPolicyPeer
	for _, p := range in {
		if p.Block != nil {
			b := &networkingv1.IPBlock{CIDR: p.Block.CIDR.String()}
			for _, e := range p.Block.Except {
				b.Except = append(b.Except, e.String())
			}
			out = append(out, networkingv1.NetworkPolicyPeer{IPBlock: b})
			continue
		}
		for _, pods := range notInAbsent(p.Pods.Pods) {
			if p.Pods.Namespace != "" {
				out = append(out, networkingv1.NetworkPolicyPeer{PodSelector: &pods})
				continue
			}
			for _, namespaces := range notInAbsent(p.Pods.Namespaces) {
				out = append(out, networkingv1.NetworkPolicyPeer{NamespaceSelector: &namespaces, PodSelector: &pods})
			}
		}
	}
	return out
}

func ports(in []policy.PortMatch) []networkingv1.NetworkPolicyPort {
	var out []networkingv1.NetworkPolicyPort
	for _, m := range in {
		protocol := protocolName(m.Protocol)
		p := networkingv1.NetworkPolicyPort{Protocol: &protocol}
		switch {
		case m.Name != "":
			p.Port = new(intstr.FromString(m.Name))
		case m.First == 0 && m.Last == 65535:
		default:
			p.Port = new(intstr.FromInt32(int32(m.First)))
			if m.Last != m.First {
				p.EndPort = new(int32(m.Last))
			}
		}
		out = append(out, p)
	}
	return out
}

func protocolName(p policy.Protocol) v1.Protocol {
	switch p {
	case policy.TCP:
		return v1.ProtocolTCP
	case policy.UDP:
		return v1.ProtocolUDP
	case policy.SCTP:
		return v1.ProtocolSCTP
	}
	return v1.Protocol(strconv.Itoa(int(p)))
}

// reference is cyclonus's view of a cluster.
type reference struct {
	rules      *matcher.Policy
	oracle     *policy.Oracle // only for who owns an address
	namespaces map[string]map[string]string
}

func newReference(c *policy.Cluster) *reference {
	r := &reference{oracle: policy.NewOracle(c, ""), namespaces: map[string]map[string]string{}}
	var all []*networkingv1.NetworkPolicy
	for i := range c.Policies {
		all = append(all, networkPolicies(&c.Policies[i])...)
	}
	r.rules = matcher.BuildNetworkPolicies(false, all)
	for _, ns := range c.Namespaces {
		r.namespaces[ns.Name] = ns.Labels.Map()
	}
	return r
}

// allows asks cyclonus for one direction of f, once per name of the port (severalNames).
func (r *reference) allows(f policy.Flow, d policy.Direction) bool {
	t := &matcher.Traffic{ResolvedPort: int(f.Port), Protocol: protocolName(f.Protocol)}
	t.Source = r.peer(f.Src.String(), r.oracle.Owner(f.Src))
	t.Destination = r.peer(f.Dst.String(), r.oracle.Owner(f.Dst))
	for _, name := range portNames(r.oracle.Owner(f.Dst), f) {
		t.ResolvedPortName = name
		if r.rules.IsIngressOrEgressAllowed(t, d == policy.Ingress).IsAllowed() {
			return true
		}
	}
	return false
}

func (r *reference) peer(addr string, pod *policy.Pod) *matcher.TrafficPeer {
	p := &matcher.TrafficPeer{IP: addr}
	if pod != nil {
		p.Internal = &matcher.InternalPeer{PodLabels: pod.Labels.Map(), Namespace: pod.Namespace, NamespaceLabels: r.namespaces[pod.Namespace]}
	}
	return p
}

// TestCyclonusAgrees compares each direction of random flows. CYCLONUS_CLUSTERS changes
// the number of clusters.
func TestCyclonusAgrees(t *testing.T) {
	clusters := uint64(500)
	if s := os.Getenv("CYCLONUS_CLUSTERS"); s != "" {
		n, err := strconv.ParseUint(s, 10, 32)
		if err != nil {
			t.Fatalf("CYCLONUS_CLUSTERS: %v", err)
		}
		clusters = n
	}
	counts := map[string]int{}
	for seed := range clusters {
		g := policytest.New(seed, policytest.Options{})
		c := g.Cluster()
		r := newReference(c)
		for range 400 {
			f := g.Flow(c)
			v := r.oracle.Evaluate(f)
			for _, d := range policy.Directions {
				ours := []policy.Decision{v.Ingress, v.Egress}[d]
				if name := outside(ours); name != "" {
					counts[name]++
					continue
				}
				if got, want := r.allows(f, d), ours.Action == policy.Allow; got != want {
					t.Fatalf("seed %d: %+v, %v: cyclonus allows: %v, oracle: %+v", seed, f, d, got, ours)
				}
				counts["compared, "+ours.Reason.String()]++
			}
		}
	}
	var b strings.Builder
	for name, n := range counts {
		b.WriteString("\n" + name + ": " + strconv.Itoa(n))
	}
	t.Log(b.String())
	if counts["compared, isolated"] < 10*int(clusters) || counts["compared, rule"] < 10*int(clusters) {
		t.Error("too few directions were decided by policies")
	}
}
