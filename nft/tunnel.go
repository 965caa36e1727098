package nft

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// Tunnels are the UDP ports by which nodes carry pods' packets to one another. They take packets from nodes only: what
// is decapsulated has the source its sender chose. Nothing from a pod's interface reaches such a port of any node.
type Tunnels struct {
	Ports []uint16
	Nodes []netip.Addr // of all nodes, as their packets' source: a node that is not here is not heard
}

func (t Tunnels) validate() error {
	if slices.Contains(t.Ports, 0) {
		return fmt.Errorf("tunnel port 0: want 1 to 65535")
	}
	for _, a := range t.Nodes {
		if !a.IsValid() || a.Is4In6() || a.Zone() != "" {
			return fmt.Errorf("node address %q of the tunnels: want an IPv4 or IPv6 address without zone, not mapped", a)
		}
	}
	return nil
}

// tunnelKey is a port or a node's address.
type tunnelKey struct {
	port uint16
	node netip.Addr
}

func (t Tunnels) keys() map[tunnelKey]bool {
	out := map[tunnelKey]bool{}
	for _, p := range t.Ports {
		out[tunnelKey{port: p}] = true
	}
	for _, a := range t.Nodes {
		out[tunnelKey{node: a}] = true
	}
	return out
}

// tunnelChanges is what brings the kernel from have to want; nil wants no change.
func tunnelChanges(have map[tunnelKey]bool, want *Tunnels) (add, remove []tunnelKey) {
	if want == nil {
		return nil, nil
	}
	wanted := want.keys()
	missing := func(from, in map[tunnelKey]bool) []tunnelKey {
		out := slices.DeleteFunc(slices.Collect(maps.Keys(from)), func(k tunnelKey) bool { return in[k] })
		slices.SortFunc(out, func(x, y tunnelKey) int { return cmp.Or(cmp.Compare(x.port, y.port), x.node.Compare(y.node)) })
		return out
	}
	return missing(wanted, have), missing(have, wanted)
}

func (t *Table) tunnelsDiffer(want *Tunnels) bool {
	add, remove := tunnelChanges(t.tunnels, want)
	return len(add)+len(remove) > 0
}

// tunnelsNarrow reports whether live connections may lead to what becomes a tunnel.
func (t *Table) tunnelsNarrow(want *Tunnels) bool {
	add, _ := tunnelChanges(t.tunnels, want)
	return len(add) > 0
}

// tunnel adds or deletes a port or an address.
func (b *batch) tunnel(del bool, k tunnelKey) {
	if k.node.IsValid() {
		b.element(del, "node"+familyOf(k.node), element{key: rawKey{first: k.node.AsSlice()}}, k.node.String())
		return
	}
	b.element(del, "tunnel_port", element{key: rawKey{first: binary.BigEndian.AppendUint16(nil, k.port)}}, strconv.Itoa(int(k.port)))
}

func (b *batch) tunnels(add, remove []tunnelKey) {
	for _, k := range remove {
		b.tunnel(true, k)
	}
	for _, k := range add {
		b.tunnel(false, k)
	}
}

// readTunnels reads them back; a set that an older program does not have is empty.
func (t *Table) readTunnels() (Tunnels, error) {
	var out Tunnels
	for _, set := range []string{"tunnel_port", "node4", "node6"} {
		if t.reader.sets != nil && !t.reader.sets[set] {
			continue
		}
		elements, err := t.reader.dump(set)
		if err != nil {
			return Tunnels{}, err
		}
		for _, e := range elements {
			if a, ok := netip.AddrFromSlice(e.key); ok {
				out.Nodes = append(out.Nodes, a)
			} else if len(e.key) == 2 {
				out.Ports = append(out.Ports, binary.BigEndian.Uint16(e.key))
			}
		}
	}
	slices.Sort(out.Ports)
	slices.SortFunc(out.Nodes, netip.Addr.Compare)
	return out, nil
}

// tunnelSets hold what the rules below ask.
func tunnelSets() []*setSpec {
	sets := []*setSpec{{name: "tunnel_port", key: []dataType{typePort}, comment: "UDP ports by which nodes carry pods' packets"}}
	for _, f := range families() {
		sets = append(sets, &setSpec{name: "node" + f.suffix, key: []dataType{f.addr}, comment: "addresses of all nodes"})
	}
	return sets
}

// tunnelPort matches packets to a tunnel.
func tunnelPort() statement { return in{key: key{udpDport}, set: "tunnel_port"} }

// tunnelChains guard the tunnels' ports of this node. The hook runs after DNAT: no Service leads there either.
func tunnelChains() []chain {
	guard := chain{name: "tunnel", rules: []rule{does(podInterface(iifname, false), counter{}, drop).noted("a pod speaks to a tunnel")}}
	for _, f := range families() {
		guard.rules = append(guard.rules, does(in{key: key{f.src}, set: "node" + f.suffix}, ret))
	}
	guard.rules = append(guard.rules, does(counter{}, drop).noted("a tunnel's packet from no node"))
	return []chain{guard, podInputChain(), {name: "input", hook: &hook{"filter", "input", unix.NF_INET_LOCAL_IN, -10, "filter - 10"},
		rules: []rule{does(tunnelPort(), goTo("tunnel")), does(podInterface(iifname, false), goTo("pod_input"))}}}
}

// tunnelForward keeps pods from the tunnels of other nodes: behind masquerading they would look like this node.
func tunnelForward() []rule {
	var out []rule
	for _, f := range families() {
		out = append(out, does(podInterface(iifname, false), tunnelPort(), in{key: key{f.dst}, set: "node" + f.suffix}, counter{}, drop).
			noted("a pod speaks to a tunnel"))
	}
	return out
}
