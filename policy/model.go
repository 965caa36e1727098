package policy

import (
	"net/netip"
)

// Direction of a flow as seen from the pod a policy selects.
type Direction uint8

// The two directions of NetworkPolicySpec.policyTypes.
const (
	Ingress Direction = iota
	Egress
)

// Directions lists both, for loops.
var Directions = [2]Direction{Ingress, Egress}

func (d Direction) String() string {
	if d == Egress {
		return "egress"
	}
	return "ingress"
}

// Action is what a matching rule does.
type Action uint8

const (
	// Allow accepts and ends the walk.
	Allow Action = iota
	// Deny drops and ends the walk.
	Deny
	// Pass ends the walk of this tier; the next tier decides.
	Pass
	// Log is not final: the flow is marked for logging and the walk goes on.
	Log
)

func (a Action) String() string {
	return [...]string{"allow", "deny", "pass", "log"}[a]
}

// Protocol is an IANA protocol number; AnyProtocol in a PortMatch means every one.
type Protocol uint8

// Protocols that NetworkPolicyPort.protocol and the tests name.
const (
	AnyProtocol Protocol = 0
	ICMP        Protocol = 1
	TCP         Protocol = 6
	UDP         Protocol = 17
	ICMPv6      Protocol = 58
	SCTP        Protocol = 132
)

// Name identifies a namespaced object.
type Name struct{ Namespace, Name string }

func (n Name) String() string { return n.Namespace + "/" + n.Name }

// Cluster is everything policy depends on. A Cluster is immutable once handed over.
type Cluster struct {
	Namespaces []Namespace
	Pods       []Pod
	Nodes      []Node
	Policies   []Policy
}

// Namespace is a v1 Namespace stripped to what selectors read. The label
// kubernetes.io/metadata.name is part of Labels (the API server's default).
type Namespace struct {
	Name   string
	Labels Labels
}

// Node is a v1 Node stripped to what policy and routing read.
type Node struct {
	Name     string
	Labels   Labels
	Addrs    []netip.Addr   // status.addresses of type InternalIP
	PodCIDRs []netip.Prefix // spec.podCIDRs
	// PublicKey is what the node published for encryption between nodes, and MeshAddrs
	// the addresses it wants others to send its pods' packets to, at most one of each family (none: Addrs). Both are
	// carried for the routing and mean nothing to policy.
	PublicKey string
	MeshAddrs []netip.Addr
}

// Pod is a v1 Pod stripped to what policy reads.
type Pod struct {
	Name
	UID    string
	Node   string // spec.nodeName
	Labels Labels
	// Addrs are the addresses the pod claims (status.podIPs, or what the CNI
	// attachment holds), at most a few, unmapped (never 4in6).
	Addrs []netip.Addr
	// Ports are the named container ports in the order of the pod's containers.
	Ports       []NamedPort
	HostNetwork bool // its addresses are its node's: neither subject nor selected peer
	Finished    bool // phase Succeeded or Failed: it owns no address
	// Created orders claims on one address: the greater wins, then the greater
	// Name; a pod for which Attached is true wins over one for which it is not.
	Created  int64
	Attached bool // this node's kernel holds the attachment
}

// NamedPort is a containerPort with a name.
type NamedPort struct {
	Name     string
	Protocol Protocol
	Port     uint16
}

// PolicyID identifies a policy of any kind.
type PolicyID struct {
	Kind string // "NetworkPolicy", "ClusterNetworkPolicy", ...
	Name        // Namespace is empty for cluster-scoped kinds
}

func (id PolicyID) String() string {
	if id.Namespace == "" {
		return id.Name.Name
	}
	return id.Name.String()
}

// Tier orders policies: a lower tier is walked first. NetworkPolicy is TierNamespaced.
type Tier int32

// Tiers of policy.networking.k8s.io; other values may lie between them.
const (
	TierAdmin      Tier = 100
	TierNamespaced Tier = 200
	TierBaseline   Tier = 300
)

// Policy is one normalised, valid policy of any API kind. Within a tier policies are
// walked by Order, then by ID; the first rule that matches with a final action
// decides. When no rule of a tier matched and a policy of that tier that selects the
// pod in that direction has Isolates set, the tier denies; otherwise the next tier is
// walked, and after the last one the flow is allowed.
type Policy struct {
	ID         PolicyID
	Generation int64 // metadata.generation, carried for receipts; not part of the meaning
	Tier       Tier
	Order      int64
	Subject    PodSelector
	// Applies says for which directions the policy selects its subjects
	// (policyTypes after defaulting), indexed by Direction.
	Applies [2]bool
	// Isolates: flows of an applied direction that no rule of the tier matched are
	// denied (true for NetworkPolicy; false for ClusterNetworkPolicy).
	Isolates bool
	Rules    [2][]Rule // indexed by Direction
}

// Rule matches a flow when the other end is in Peers (nil: any address at all) and
// not in NotPeers, and protocol and port are in Ports (nil: any) and not in NotPorts.
// A non-nil empty Peers or Ports matches nothing.
type Rule struct {
	Action   Action
	Log      bool
	Peers    []Peer
	NotPeers []Peer
	Ports    []PortMatch
	NotPorts []PortMatch
}

// Peer is a set of addresses: exactly one of Pods and Block is set.
type Peer struct {
	Pods  *PodSelector
	Block *Block
}

// PodSelector selects pods. With Namespace set it is that namespace's pods; otherwise
// those of the namespaces that Namespaces matches (a namespace without an object has no
// labels). Pods on the host network and
// finished pods are never selected.
type PodSelector struct {
	Namespace  string
	Namespaces Selector
	Pods       Selector
}

// Block is an ipBlock: the addresses of CIDR that are in none of Except. Both masked.
// It matches every address in it, pods' addresses included.
type Block struct {
	CIDR   netip.Prefix
	Except []netip.Prefix
}

// PortMatch matches a protocol and a port of the flow's server side. For ICMP and
// ICMPv6 the port is type<<8 | code. With Name set, First and Last are ignored and the
// number is that of the first port of the destination pod with this name and protocol
// (with AnyProtocol: the first with this name, its own protocol). AnyProtocol with a
// range other than 0 to 65535 means the protocols with ports: TCP, UDP and SCTP.
type PortMatch struct {
	Protocol    Protocol
	First, Last uint16 // inclusive; 0 to 65535 means the whole protocol
	Name        string
}

// Flow is a question: may Src open a connection to Dst. Port is the server's, after
// any DNAT, or type<<8 | code for ICMP; 0 for protocols without ports.
type Flow struct {
	Src, Dst netip.Addr
	Protocol Protocol
	Port     uint16
}

// Event is one change of the cluster. Exactly one pointer is set; with Delete only the
// identifying name of the object is read.
type Event struct {
	Delete    bool
	Namespace *Namespace
	Pod       *Pod
	Node      *Node
	Policy    *Policy
}
