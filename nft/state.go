package nft

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/policy"
)

// State reads the table back from the kernel. Later changes are differences from it. Elements that a Finish still
// owed will delete are not part of it.
func (t *Table) State(ctx context.Context) (State, error) {
	s, err := t.readState(ctx)
	if err != nil {
		return State{}, fmt.Errorf("read table inet %s: %w", TableName, err)
	}
	for k := range t.dropping {
		delete(s.Tables, k)
	}
	t.remember(s)
	t.stale = t.stale || s.Epoch != t.epoch
	return s, nil
}

// load fills what Apply compares with.
func (t *Table) load(ctx context.Context) error {
	s, err := t.readBindings(ctx)
	if err != nil {
		return err
	}
	t.remember(s)
	if t.epoch, t.again, err = t.readEpoch(); err != nil {
		return err
	}
	if t.epoch == 0 {
		err = t.replaceEpoch()
	}
	t.stale = err != nil
	return err
}

func (t *Table) remember(s State) {
	t.bound, t.networks, t.tunnels = map[bindingKey]Binding{}, map[netip.Prefix]bool{}, s.Tunnels.keys()
	for _, b := range s.Bindings {
		t.bound[b.key()] = b
	}
	for _, p := range s.PodNetworks {
		t.networks[p] = true
	}
	t.toHost = s.PodToHost
	t.ports = map[hostPortKey]HostPort{}
	for _, p := range s.HostPorts {
		t.ports[p.key()] = p
	}
}

// readState reads every element that Apply writes.
func (t *Table) readState(ctx context.Context) (State, error) {
	s, err := t.readBindings(ctx)
	if err != nil {
		return State{}, err
	}
	if s.Epoch, _, err = t.readEpoch(); err != nil {
		return State{}, err
	}
	s.Tables = policy.Tables{}
	for _, m := range elementMaps() {
		for _, set := range setsOf(m) {
			if err := ctx.Err(); err != nil {
				return State{}, err
			}
			elements, err := t.reader.dump(set)
			if err != nil {
				return State{}, err
			}
			if err := addElements(s.Tables, m, elements); err != nil {
				return State{}, err
			}
		}
	}
	s.Generation, err = t.conn.generation(ctx)
	return s, err
}

// setsOf are the sets that hold m's elements.
func setsOf(m policy.Map) []string {
	base := setBase(m)
	switch {
	case addressed(m):
		return []string{base + "4", base + "6"}
	case m == policy.AccessRange:
		return []string{base, "access_icmp"}
	}
	return []string{base}
}

func addElements(tables policy.Tables, m policy.Map, elements []rawElement) error {
	if m == policy.NetID {
		for _, r := range ranges(elements) {
			tables[policy.Key{Map: m, Addr: r.from, To: r.to}] = r.value
		}
		return nil
	}
	for _, e := range elements {
		k, err := decodeKey(m, e)
		if err != nil {
			return err
		}
		if valued(k.Map) {
			if len(e.data) != 4 {
				return fmt.Errorf("element %s of %s: value of %d bytes, want 4", describe(k), ElementSet(k), len(e.data))
			}
			tables[k] = binary.NativeEndian.Uint32(e.data)
		} else {
			tables[k] = 0
		}
	}
	return nil
}

type addressRange struct {
	from, to netip.Addr // inclusive
	value    uint32
}

// ranges pairs the starts and ends of an interval set. A start without an end reaches to the end of the addresses.
func ranges(elements []rawElement) []addressRange {
	slices.SortFunc(elements, func(x, y rawElement) int {
		// An end stands before the start of a neighbour at the same address.
		return cmp.Or(bytes.Compare(x.key, y.key), cmp.Compare(y.flags&unix.NFT_SET_ELEM_INTERVAL_END, x.flags&unix.NFT_SET_ELEM_INTERVAL_END))
	})
	var out []addressRange
	open := false
	for _, e := range elements {
		a, ok := netip.AddrFromSlice(e.key)
		if !ok {
			continue
		}
		if open {
			out[len(out)-1].to = a.Prev()
			open = false
		}
		if e.flags&unix.NFT_SET_ELEM_INTERVAL_END != 0 {
			continue
		}
		r := addressRange{from: a, to: lastAddr(a)}
		if len(e.data) == 4 {
			r.value = binary.NativeEndian.Uint32(e.data)
		}
		out, open = append(out, r), true
	}
	return out
}

func lastAddr(a netip.Addr) netip.Addr {
	b := a.AsSlice()
	for i := range b {
		b[i] = 0xff
	}
	last, _ := netip.AddrFromSlice(b)
	return last
}

// readBindings reads bindings, pod networks, tunnels, host ports and what the node takes from pods.
func (t *Table) readBindings(ctx context.Context) (State, error) {
	var s State
	for _, f := range families() {
		if err := ctx.Err(); err != nil {
			return State{}, err
		}
		masqueraded, err := t.reader.dump("masquerade" + f.suffix)
		if err != nil {
			return State{}, err
		}
		hidden := map[string]bool{}
		for _, e := range masqueraded {
			hidden[string(e.key)] = true
		}
		bound, err := t.reader.dump("bound" + f.suffix)
		if err != nil {
			return State{}, err
		}
		wired := map[string]bool{}
		for _, e := range bound {
			if len(e.key) != unix.IFNAMSIZ+int(f.addr.size) {
				return State{}, fmt.Errorf("set bound%s: key of %d bytes", f.suffix, len(e.key))
			}
			a, _ := netip.AddrFromSlice(e.key[unix.IFNAMSIZ:])
			wired[string(e.key[unix.IFNAMSIZ:])] = true
			s.Bindings = append(s.Bindings, Binding{cString(e.key[:unix.IFNAMSIZ]), a, hidden[string(e.key[unix.IFNAMSIZ:])], e.comment})
		}
		foreign, err := t.readUnwired(f, wired)
		if err != nil {
			return State{}, err
		}
		s.Bindings = append(s.Bindings, foreign...)
		networks, err := t.reader.dump("pod_networks" + f.suffix)
		if err != nil {
			return State{}, err
		}
		for _, r := range ranges(networks) {
			s.PodNetworks = append(s.PodNetworks, prefixes(r.from, r.to)...)
		}
	}
	var err error
	if s.Tunnels, err = t.readTunnels(); err != nil {
		return State{}, err
	}
	if s.HostPorts, err = t.reader.HostPorts(); err != nil {
		return State{}, err
	}
	if s.PodToHost, err = t.readPodToHost(); err != nil {
		return State{}, err
	}
	slices.SortFunc(s.Bindings, func(x, y Binding) int { return cmp.Or(cmp.Compare(x.Interface, y.Interface), x.Addr.Compare(y.Addr)) })
	return s, nil
}

// readUnwired reads the bindings without interface: what is local and hairpins like a pod's address, but is not wired.
func (t *Table) readUnwired(f family, wired map[string]bool) ([]Binding, error) {
	pairs, err := t.reader.dump("self" + f.suffix)
	if err != nil {
		return nil, err
	}
	pods := map[string]bool{}
	for _, e := range pairs {
		pods[string(e.key[len(e.key)/2:])] = true
	}
	local, err := t.reader.dump("local" + f.suffix)
	if err != nil {
		return nil, err
	}
	var out []Binding
	for _, e := range local {
		if a, ok := netip.AddrFromSlice(e.key); ok && pods[string(e.key)] && !wired[string(e.key)] {
			out = append(out, Binding{Addr: a, Comment: e.comment})
		}
	}
	return out, nil
}

// prefixes covers a range with the fewest prefixes.
func prefixes(from, to netip.Addr) []netip.Prefix {
	var out []netip.Prefix
	for {
		bits := from.BitLen()
		p := netip.PrefixFrom(from, bits)
		for bits > 0 {
			wider := netip.PrefixFrom(from, bits-1)
			if wider.Masked().Addr() != from || to.Less(lastOf(wider)) {
				break
			}
			p, bits = wider, bits-1
		}
		out = append(out, p)
		last := lastOf(p)
		if !last.Less(to) {
			return out
		}
		from = last.Next()
	}
}

// lastOf is the last address of a prefix.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// readEpoch reads the live epoch, 0 when there is none.
func (t *Table) readEpoch() (epoch uint32, again bool, err error) {
	elements, err := t.reader.dump("epoch")
	if err != nil {
		return 0, false, err
	}
	for _, e := range elements {
		if len(e.key) == 4 {
			epoch, again = binary.NativeEndian.Uint32(e.key), e.comment == epochAgain
		}
	}
	if len(elements) > 1 {
		return 0, false, nil // nobody of ours wrote that: a fresh epoch replaces them all
	}
	return epoch, again, nil
}
