package k8s

import (
	"math"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"
	netutils "k8s.io/utils/net"

	"github.com/nftcni/nftcni/policy"
)

// KindNetworkPolicy is the PolicyID.Kind of networking.k8s.io/v1 NetworkPolicy.
const KindNetworkPolicy = "NetworkPolicy"

// convertPolicy converts a NetworkPolicy with the API's defaults and the checks of
// k8s.io/kubernetes/pkg/apis/networking/validation. Where f refuses something, the
// result allows less than any reading of the object: peers and ports that cannot be
// read match nothing, and an unreadable podSelector selects more and allows nothing.
func convertPolicy(np *networkingv1.NetworkPolicy, f *faults) policy.Policy {
	spec := field.NewPath("spec")
	p := policy.Policy{
		ID:         policy.PolicyID{Kind: KindNetworkPolicy, Name: policy.Name{Namespace: np.Namespace, Name: np.Name}},
		Generation: np.Generation,
		Tier:       policy.TierNamespaced,
		Isolates:   true,
	}
	pods, ok := convertSelector(&np.Spec.PodSelector, spec.Child("podSelector"), f)
	p.Subject = policy.PodSelector{Namespace: np.Namespace, Pods: pods}
	p.Applies = convertPolicyTypes(&np.Spec, spec, f)

	r := ruleConverter{namespace: np.Namespace, faults: f}
	for i, in := range np.Spec.Ingress {
		at := spec.Child("ingress").Index(i)
		r.add(policy.Ingress, in.From, at.Child("from"), in.Ports, at.Child("ports"))
	}
	for i, out := range np.Spec.Egress {
		at := spec.Child("egress").Index(i)
		r.add(policy.Egress, out.To, at.Child("to"), out.Ports, at.Child("ports"))
	}
	for _, d := range policy.Directions {
		if ok && p.Applies[d] {
			p.Rules[d] = r.rules[d]
		}
	}
	return p
}

// convertPolicyTypes applies SetDefaults_NetworkPolicy: absent or empty means Ingress,
// and Egress too if there is an egress rule. With an unknown type both directions apply.
func convertPolicyTypes(spec *networkingv1.NetworkPolicySpec, at *field.Path, f *faults) (applies [2]bool) {
	path := at.Child("policyTypes")
	if len(spec.PolicyTypes) == 0 {
		return [2]bool{policy.Ingress: true, policy.Egress: len(spec.Egress) > 0}
	}
	if len(spec.PolicyTypes) > 2 {
		f.refuse(path, "list each of Ingress and Egress at most once", "may not specify more than two policyTypes")
		return [2]bool{true, true}
	}
	for i, t := range spec.PolicyTypes {
		switch t {
		case networkingv1.PolicyTypeIngress:
			applies[policy.Ingress] = true
		case networkingv1.PolicyTypeEgress:
			applies[policy.Egress] = true
		default:
			f.refuse(path.Index(i), `use "Ingress" or "Egress"`, "unsupported policy type %s", quote(t))
			return [2]bool{true, true}
		}
	}
	if !applies[policy.Ingress] && len(spec.Ingress) > 0 {
		f.warn(at.Child("ingress"), "add Ingress to spec.policyTypes if they are meant", "ingress rules have no effect: policyTypes does not list Ingress")
	}
	if !applies[policy.Egress] && len(spec.Egress) > 0 {
		f.warn(at.Child("egress"), "add Egress to spec.policyTypes if they are meant", "egress rules have no effect: policyTypes does not list Egress")
	}
	return applies
}

type ruleConverter struct {
	namespace string
	faults    *faults
	rules     [2][]policy.Rule
}

// add converts one NetworkPolicyIngressRule or NetworkPolicyEgressRule: an absent or
// empty list of peers or ports matches all of them.
func (r *ruleConverter) add(d policy.Direction, peers []networkingv1.NetworkPolicyPeer, peersAt *field.Path, ports []networkingv1.NetworkPolicyPort, portsAt *field.Path) {
	rule := policy.Rule{Action: policy.Allow}
	if len(peers) > 0 {
		rule.Peers = make([]policy.Peer, 0, len(peers))
	}
	for i := range peers {
		if p, ok := r.peer(&peers[i], peersAt.Index(i)); ok {
			rule.Peers = append(rule.Peers, p)
		}
	}
	if len(ports) > 0 {
		rule.Ports = make([]policy.PortMatch, 0, len(ports))
	}
	for i := range ports {
		if m, ok := r.port(&ports[i], portsAt.Index(i)); ok {
			rule.Ports = append(rule.Ports, m)
		}
	}
	r.rules[d] = append(r.rules[d], rule)
}

// peer: podSelector alone selects in the policy's own namespace, namespaceSelector
// alone all pods of those namespaces, both together pods in those namespaces.
func (r *ruleConverter) peer(p *networkingv1.NetworkPolicyPeer, at *field.Path) (policy.Peer, bool) {
	switch {
	case p.IPBlock != nil && (p.PodSelector != nil || p.NamespaceSelector != nil):
		r.faults.refuse(at, "make two peers of it", "may not specify both ipBlock and another peer")
		return policy.Peer{}, false
	case p.IPBlock != nil:
		b, ok := r.block(p.IPBlock, at.Child("ipBlock"))
		return policy.Peer{Block: b}, ok
	case p.PodSelector == nil && p.NamespaceSelector == nil:
		r.faults.refuse(at, "give podSelector, namespaceSelector or ipBlock; to match everything leave the list of peers out", "must specify a peer")
		return policy.Peer{}, false
	}
	pods, ok := convertSelector(p.PodSelector, at.Child("podSelector"), r.faults)
	sel := &policy.PodSelector{Pods: pods}
	if p.NamespaceSelector == nil {
		sel.Namespace = r.namespace
		return policy.Peer{Pods: sel}, ok
	}
	namespaces, nsOK := convertSelector(p.NamespaceSelector, at.Child("namespaceSelector"), r.faults)
	sel.Namespaces = namespaces
	return policy.Peer{Pods: sel}, ok && nsOK
}

// block converts an ipBlock. An except that cannot be read invalidates the block: it
// would otherwise allow what was meant to be left out.
func (r *ruleConverter) block(b *networkingv1.IPBlock, at *field.Path) (*policy.Block, bool) {
	cidr, ok := parseCIDR(b.CIDR, at.Child("cidr"), r.faults)
	if !ok {
		return nil, false
	}
	out := &policy.Block{CIDR: cidr}
	for i, e := range b.Except {
		path := at.Child("except").Index(i)
		except, exceptOK := parseCIDR(e, path, r.faults)
		if exceptOK && (!cidr.Contains(except.Addr()) || except.Bits() <= cidr.Bits()) {
			r.faults.refuse(path, "except must lie inside "+cidr.String()+" and be smaller", "%s is not a strict subset of cidr %s", quote(e), cidr)
			exceptOK = false
		}
		ok = ok && exceptOK
		out.Except = append(out.Except, except)
	}
	return out, ok
}

// port converts a NetworkPolicyPort: protocol defaults to TCP, an absent port is every
// port of the protocol.
func (r *ruleConverter) port(p *networkingv1.NetworkPolicyPort, at *field.Path) (policy.PortMatch, bool) {
	m := policy.PortMatch{Protocol: policy.TCP, Last: math.MaxUint16}
	ok := true
	if p.Protocol != nil {
		m.Protocol, ok = convertProtocol(*p.Protocol, at.Child("protocol"), r.faults)
	}
	refuse := func(child, remedy, format string, args ...any) {
		r.faults.refuse(at.Child(child), remedy, format, args...)
		ok = false
	}
	switch {
	case p.Port == nil:
		if p.EndPort != nil {
			refuse("endPort", "give port, the first of the range", "may not be specified when port is not specified")
		}
	case p.Port.Type == intstr.String:
		m.Name, m.Last = p.Port.StrVal, 0
		if p.EndPort != nil {
			refuse("endPort", "give port as a number", "may not be specified when port is a name")
		}
		for _, msg := range validation.IsValidPortName(p.Port.StrVal) {
			refuse("port", `use a number without quotes, or the name of a container port (at most 15 of a-z, 0-9 and "-")`, "invalid port name %s: %s", quote(p.Port.StrVal), msg)
		}
	default:
		last := p.Port.IntVal
		if p.EndPort != nil {
			last = *p.EndPort
		}
		if p.Port.IntVal < 1 || p.Port.IntVal > math.MaxUint16 {
			refuse("port", "use a number from 1 to 65535", "invalid port %d", p.Port.IntVal)
		}
		if p.EndPort != nil && (last < 1 || last > math.MaxUint16) {
			refuse("endPort", "use a number from 1 to 65535", "invalid port %d", last)
		} else if last < p.Port.IntVal {
			refuse("endPort", "exchange port and endPort", "%d is less than port %d", last, p.Port.IntVal)
		}
		m.First, m.Last = uint16(p.Port.IntVal), uint16(last)
	}
	return m, ok
}

func convertProtocol(p corev1.Protocol, at *field.Path, f *faults) (policy.Protocol, bool) {
	switch p {
	case corev1.ProtocolTCP:
		return policy.TCP, true
	case corev1.ProtocolUDP:
		return policy.UDP, true
	case corev1.ProtocolSCTP:
		return policy.SCTP, true
	}
	f.refuse(at, "use TCP, UDP or SCTP, in capitals", "unsupported protocol %s", quote(p))
	return policy.AnyProtocol, false
}

// parseCIDR reads a prefix as API servers before StrictIPCIDRValidation (Kubernetes
// 1.36) did: set host bits and leading zeros are accepted, with a warning, and masked
// away or read as decimal. An IPv4-mapped prefix is the IPv4 prefix.
func parseCIDR(s string, at *field.Path, f *faults) (netip.Prefix, bool) {
	const remedy = "write it as network/length, for example 10.9.8.0/24 or 2001:db8::/64"
	if s == "" {
		f.refuse(at, remedy, "required")
		return netip.Prefix{}, false
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		_, sloppy, sloppyErr := netutils.ParseCIDRSloppy(s)
		if sloppyErr != nil {
			f.refuse(at, remedy, "%s is not a CIDR", quote(s))
			return netip.Prefix{}, false
		}
		addr, _ := netip.AddrFromSlice(sloppy.IP)
		bits, _ := sloppy.Mask.Size()
		p = netip.PrefixFrom(addr, bits)
	}
	if p.Addr().Is4In6() {
		if p.Bits() < 96 {
			f.refuse(at, "write the IPv4 prefix", "%s reaches beyond the IPv4-mapped addresses", quote(s))
			return netip.Prefix{}, false
		}
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	p = p.Masked()
	if strict, strictErr := netip.ParsePrefix(s); strictErr != nil || strict != p {
		f.warn(at, "write "+p.String(), "%s is not in canonical form and is read as %s", quote(s), p)
	}
	return p, true
}
