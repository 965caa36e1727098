package nft

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/policy"
)

// ProtocolPort is a port of a transport protocol.
type ProtocolPort struct {
	Protocol policy.Protocol // TCP, UDP or SCTP
	Port     uint16
}

// String is "tcp/53".
func (p ProtocolPort) String() string { return fmt.Sprintf("%s/%d", p.Protocol, p.Port) }

func (p ProtocolPort) validate() error {
	if p.Protocol != policy.TCP && p.Protocol != policy.UDP && p.Protocol != policy.SCTP || p.Port == 0 {
		return fmt.Errorf("port %s: want tcp, udp or sctp and 1 to 65535", p)
	}
	return nil
}

func (p ProtocolPort) bytes() []byte {
	return append(binary.BigEndian.AppendUint16([]byte{byte(p.Protocol), 0, 0, 0}, p.Port), 0, 0)
}

func decodeProtocolPort(b []byte) (ProtocolPort, bool) {
	if len(b) != 8 {
		return ProtocolPort{}, false
	}
	return ProtocolPort{policy.Protocol(b[0]), binary.BigEndian.Uint16(b[4:])}, true
}

func compareProtocolPorts(p, q ProtocolPort) int {
	return cmp.Or(cmp.Compare(p.Protocol, q.Protocol), cmp.Compare(p.Port, q.Port))
}

// PodToHost is what the node's own addresses take from its pods. Answers to the node's own connections, ICMP errors of
// live connections and neighbour discovery pass in any case.
type PodToHost struct {
	Deny bool           // only Open
	Open []ProtocolPort // ignored without Deny
}

// Equal reports whether p and q mean the same.
func (p PodToHost) Equal(q PodToHost) bool {
	return p.Deny == q.Deny && slices.Equal(p.ports(), q.ports())
}

// ports are Open in order, none without Deny.
func (p PodToHost) ports() []ProtocolPort {
	if !p.Deny {
		return nil
	}
	out := slices.SortedFunc(slices.Values(p.Open), compareProtocolPorts)
	return slices.Compact(out)
}

func (p PodToHost) validate() error {
	for _, port := range p.Open {
		if err := port.validate(); err != nil {
			return fmt.Errorf("open to pods: %w", err)
		}
	}
	return nil
}

// podToHostPlan is the order in which a change meets no packet half-way: a packet asks whether the node is closed, then
// for its port. So ports open before the node closes, and go after every packet that found it closed is through.
type podToHostPlan struct {
	before        []portChange // a transaction of its own
	with          []portChange
	close, reopen bool
	after         []portChange // after a grace period
}

type portChange struct {
	del  bool
	port ProtocolPort
}

// planPodToHost brings the kernel from have, whose Open may be left of an earlier agent, to want; nil wants no change.
func planPodToHost(have PodToHost, want *PodToHost) podToHostPlan {
	var p podToHostPlan
	if want == nil {
		return p
	}
	var changes []portChange
	wanted := want.ports()
	for _, port := range have.Open {
		if !slices.Contains(wanted, port) {
			changes = append(changes, portChange{true, port})
		}
	}
	for _, port := range wanted {
		if !slices.Contains(have.Open, port) {
			changes = append(changes, portChange{false, port})
		}
	}
	switch {
	case !have.Deny:
		p.before, p.close = changes, want.Deny
	case want.Deny:
		p.with = changes
	default:
		p.reopen, p.after = true, changes
	}
	return p
}

func (p podToHostPlan) empty() bool {
	return len(p.before)+len(p.with)+len(p.after) == 0 && !p.close && !p.reopen
}

func (t *Table) commitPodPorts(r *Receipt, changes []portChange) error {
	b := newBatch(t.conn.seq)
	b.podPorts(changes)
	return t.commit(r, b)
}

func (b *batch) podPorts(changes []portChange) {
	for _, c := range changes {
		b.element(c.del, "node_open", element{key: rawKey{first: c.port.bytes()}}, c.port.String())
	}
}

// podToHost adds what commits with the last step.
func (b *batch) podToHost(p podToHostPlan) {
	b.podPorts(p.with)
	if !p.close && !p.reopen {
		return
	}
	for _, nfproto := range []byte{unix.NFPROTO_IPV4, unix.NFPROTO_IPV6} {
		b.element(p.reopen, "node_closed", element{key: rawKey{first: []byte{nfproto}}}, "to pods")
	}
}

// readPodToHost reads it back; sets that an older program does not have are empty.
func (t *Table) readPodToHost() (PodToHost, error) {
	var out PodToHost
	closed, err := t.reader.dump("node_closed")
	if err != nil {
		return out, err
	}
	open, err := t.reader.dump("node_open")
	if err != nil {
		return out, err
	}
	out.Deny = len(closed) > 0
	for _, e := range open {
		if p, ok := decodeProtocolPort(e.key); ok {
			out.Open = append(out.Open, p)
		}
	}
	slices.SortFunc(out.Open, compareProtocolPorts)
	return out, nil
}

func podToHostSets() []*setSpec {
	return []*setSpec{
		{name: "node_closed", key: []dataType{typeNFProto}, comment: "podToHost: deny"},
		{name: "node_open", key: []dataType{typeProto, typePort}, comment: "ports of this node that its pods reach all the same"},
	}
}

// podInputChain judges what the node's own addresses get from its pods. The loopback is the node's in any case: a pod
// with host ports has route_localnet on its interface, so the kernel does not refuse it by itself.
func podInputChain() chain {
	return chain{name: "pod_input", rules: []rule{
		does(compare{field: ctDirection, value: []byte{1}, shown: "reply"}, ret),
		does(within(ip4Dst, false, "127.0.0.0/8"), counter{}, drop).noted("a pod speaks to the node's loopback"),
		does(in{key: key{metaNFProto}, not: true, set: "node_closed"}, ret),
		does(ctState(ctRelated, "related"), ret),
		does(in{key: key{metaL4Proto, thDport}, set: "node_open"}, ret),
		does(in{key: key{icmpv6Type}, set: "neighbor_discovery"}, compare{field: ip6HopLimit, value: []byte{255}, shown: "255"}, ret),
		does(counter{}, drop).noted("podToHost: deny"),
	}}
}
