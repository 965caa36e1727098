package nft

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/nftcni/nftcni/policy"
)

// HostPort leads a port of the node to a port of a pod (the CNI conventions' portMappings, Kubernetes' hostPort).
type HostPort struct {
	Protocol policy.Protocol // TCP, UDP or SCTP
	Addr     netip.Addr      // of the node; 0.0.0.0 or :: is every address of the node of that family
	Port     uint16          // of the node, 1 to 65535
	To       netip.AddrPort  // of the pod, of the same family
	Comment  string          // "namespace/pod"
}

// hostPortKey is what two host ports cannot share.
type hostPortKey struct {
	protocol policy.Protocol
	addr     netip.Addr
	port     uint16
}

func (p HostPort) key() hostPortKey    { return hostPortKey{p.Protocol, p.Addr, p.Port} }
func (p HostPort) ports() ProtocolPort { return ProtocolPort{p.Protocol, p.Port} }

// String is "tcp 0.0.0.0:8080 -> 10.244.1.7:80".
func (p HostPort) String() string {
	return fmt.Sprintf("%s %s -> %s", p.Protocol, netip.AddrPortFrom(p.Addr, p.Port), p.To)
}

// Overlaps reports whether some packet would have two destinations: the same protocol and port at the same address,
// or at one address and at every address of its family. It is the scheduler's rule, family by family.
func (p HostPort) Overlaps(q HostPort) bool {
	return p.ports() == q.ports() && p.Addr.Is4() == q.Addr.Is4() && (p.Addr == q.Addr || p.Addr.IsUnspecified() || q.Addr.IsUnspecified())
}

func (p HostPort) validate() error {
	plain := func(a netip.Addr) bool { return a.IsValid() && !a.Is4In6() && a.Zone() == "" }
	switch {
	case p.Protocol != policy.TCP && p.Protocol != policy.UDP && p.Protocol != policy.SCTP:
		return fmt.Errorf("host port %s: protocol %d: want tcp, udp or sctp", p, p.Protocol)
	case p.Port == 0 || p.To.Port() == 0:
		return fmt.Errorf("host port %s: want ports from 1 to 65535", p)
	case !plain(p.Addr) || !plain(p.To.Addr()) || p.Addr.Is4() != p.To.Addr().Is4():
		return fmt.Errorf("host port %s: want two addresses of one family without zone, not mapped", p)
	}
	return nil
}

func validateHostPorts(ports []HostPort) error {
	seen := map[hostPortKey]bool{}
	for _, p := range ports {
		if err := p.validate(); err != nil {
			return err
		}
		if seen[p.key()] {
			return fmt.Errorf("host port %s: it stands twice", p)
		}
		seen[p.key()] = true
	}
	return nil
}

// hostPortChanges is what brings the kernel from have to want, in order; nil wants no change.
func hostPortChanges(have map[hostPortKey]HostPort, want []HostPort) (add, remove []HostPort) {
	if want == nil {
		return nil, nil
	}
	wanted := map[hostPortKey]HostPort{}
	for _, p := range want {
		wanted[p.key()] = p
		if old, ok := have[p.key()]; !ok || old.To != p.To {
			add = append(add, p)
		}
	}
	for k, p := range have {
		if wanted[k].To != p.To {
			remove = append(remove, p)
		}
	}
	slices.SortFunc(add, compareHostPorts)
	slices.SortFunc(remove, compareHostPorts)
	return add, remove
}

func compareHostPorts(p, q HostPort) int {
	return cmp.Or(cmp.Compare(p.Protocol, q.Protocol), cmp.Compare(p.Port, q.Port), p.Addr.Compare(q.Addr))
}

// hostPortKeys are the maps' keys that lead somewhere.
func hostPortKeys(ports map[hostPortKey]HostPort) map[ProtocolPort]bool {
	out := map[ProtocolPort]bool{}
	for _, p := range ports {
		out[p.ports()] = true
	}
	return out
}

// set names the map that holds p.
func (p HostPort) set() string {
	if p.Addr.IsUnspecified() {
		return "host_port" + familyOf(p.Addr)
	}
	return "host_port_at" + familyOf(p.Addr)
}

func (p HostPort) element() element {
	e := element{key: rawKey{first: p.ports().bytes()}, comment: cleanComment(p.Comment)}
	if !p.Addr.IsUnspecified() {
		e.key.first = append(p.Addr.AsSlice(), e.key.first...)
	}
	e.data = append(p.To.Addr().AsSlice(), byte(p.To.Port()>>8), byte(p.To.Port()), 0, 0)
	return e
}

// unmapPorts and mapPorts change the maps; have is what stays besides: the first question, host_port, keeps a port for
// as long as one map holds it.
func (b *batch) unmapPorts(remove []HostPort, have map[hostPortKey]HostPort) {
	left := hostPortKeys(have)
	for _, p := range remove {
		b.element(true, p.set(), p.element(), p.String())
	}
	for _, p := range remove {
		if !left[p.ports()] {
			left[p.ports()] = true // once
			b.element(true, "host_port", element{key: rawKey{first: p.ports().bytes()}}, p.String())
		}
	}
}

func (b *batch) mapPorts(add []HostPort, have map[hostPortKey]HostPort) {
	there := hostPortKeys(have)
	for _, p := range add {
		if !there[p.ports()] {
			there[p.ports()] = true
			b.element(false, "host_port", element{key: rawKey{first: p.ports().bytes()}}, p.String())
		}
	}
	for _, p := range add {
		b.element(false, p.set(), p.element(), p.String())
	}
}

// HostPorts reads the ports of the node that lead to pods, in order.
func (r *Reader) HostPorts() ([]HostPort, error) {
	var out []HostPort
	for _, f := range families() {
		for _, set := range []string{"host_port" + f.suffix, "host_port_at" + f.suffix} {
			elements, err := r.dump(set)
			if err != nil {
				return nil, err
			}
			for _, e := range elements {
				p, err := decodeHostPort(f, e)
				if err != nil {
					return nil, fmt.Errorf("map %s: %w", set, err)
				}
				out = append(out, p)
			}
		}
	}
	slices.SortFunc(out, compareHostPorts)
	return out, nil
}

func decodeHostPort(f family, e rawElement) (HostPort, error) {
	size := int(f.addr.size)
	p := HostPort{Addr: netip.IPv6Unspecified(), Comment: e.comment}
	if size == 4 {
		p.Addr = netip.IPv4Unspecified()
	}
	key := e.key
	if len(key) == size+8 {
		p.Addr, _ = netip.AddrFromSlice(key[:size])
		key = key[size:]
	}
	if len(key) != 8 || len(e.data) != size+4 {
		return p, fmt.Errorf("key of %d and value of %d bytes", len(e.key), len(e.data))
	}
	p.Protocol, p.Port = policy.Protocol(key[0]), binary.BigEndian.Uint16(key[4:])
	to, _ := netip.AddrFromSlice(e.data[:size])
	p.To = netip.AddrPortFrom(to, binary.BigEndian.Uint16(e.data[size:]))
	return p, nil
}

// hostPortsDiffer looks for what only somebody else's edit leaves behind: ports that the first question does not know,
// or that lead nowhere.
func (t *Table) hostPortsDiffer() (string, error) {
	ports, err := t.reader.HostPorts()
	if err != nil {
		return "", err
	}
	first, err := t.reader.dump("host_port")
	if err != nil {
		return "", err
	}
	want := map[string]bool{}
	for _, p := range ports {
		want[string(p.ports().bytes())] = true
	}
	for _, e := range first {
		if !want[string(e.key)] {
			return "host_port has a port that leads nowhere", nil
		}
		delete(want, string(e.key))
	}
	if len(want) > 0 {
		return "host_port lacks a port that leads to a pod", nil
	}
	return "", nil
}
