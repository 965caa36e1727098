package nft

import (
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/policy"
)

// unbinds are those of want that are bound.
func (t *Table) unbinds(want []Binding) []Binding {
	var out []Binding
	seen := map[bindingKey]bool{}
	for _, u := range want {
		if have, ok := t.bound[u.key()]; ok && !seen[u.key()] {
			seen[u.key()] = true
			out = append(out, have)
		}
	}
	return out
}

// binds are those of want that are not bound as they should be, once gone is unbound. A binding whose masquerading
// changed is written again.
func (t *Table) binds(want, gone []Binding) []Binding {
	going := map[bindingKey]bool{}
	for _, g := range gone {
		going[g.key()] = true
	}
	var out []Binding
	for _, w := range want {
		if have, ok := t.bound[w.key()]; !ok || going[w.key()] || have.Masquerade != w.Masquerade {
			out = append(out, w)
		}
	}
	return out
}

// fresh are the addresses of want that no interface holds yet.
func (t *Table) fresh(want []Binding) map[netip.Addr]bool {
	held := t.addressesWithout(nil)
	out := map[netip.Addr]bool{}
	for _, w := range want {
		if !held[w.Addr].local {
			out[w.Addr] = true
		}
	}
	return out
}

// addressesWithout says which addresses are still bound somewhere when gone is unbound, and whether to an interface.
func (t *Table) addressesWithout(gone []Binding) map[netip.Addr]holding {
	going := map[bindingKey]bool{}
	for _, g := range gone {
		going[g.key()] = true
	}
	left := map[netip.Addr]holding{}
	for k := range t.bound {
		if !going[k] {
			left[k.addr] = holding{local: true, wired: left[k.addr].wired || k.iface != ""}
		}
	}
	return left
}

// holding says in which sets an address stands because of its bindings.
type holding struct{ local, wired bool }

func familyOf(a netip.Addr) string {
	if a.Is4() {
		return "4"
	}
	return "6"
}

func bindingBytes(b Binding) []byte {
	name := make([]byte, unix.IFNAMSIZ)
	copy(name, b.Interface)
	return append(name, b.Addr.AsSlice()...)
}

// bind lets a pod send and receive. Elements that are there already are no-ops. Without an interface another CNI
// wires the pod: its packets are judged, and no guard stands at its interface.
func (b *batch) bind(x Binding) {
	f, a, comment := familyOf(x.Addr), x.Addr.AsSlice(), cleanComment(x.Comment)
	does := x.Interface + " . " + x.Addr.String()
	b.element(false, "local"+f, element{key: rawKey{first: a}, comment: comment}, does)
	b.element(false, "self"+f, element{key: rawKey{first: append(x.Addr.AsSlice(), a...)}, comment: comment}, does)
	if x.Masquerade {
		b.element(false, "masquerade"+f, element{key: rawKey{first: a}, comment: comment}, does)
	}
	if x.Interface == "" {
		return
	}
	b.element(false, "wired"+f, element{key: rawKey{first: a}, comment: comment}, does)
	b.element(false, "bound"+f, element{key: rawKey{first: bindingBytes(x)}, comment: comment}, does)
}

// rebind binds what is new or has changed.
func (b *batch) rebind(binds []Binding, bound map[bindingKey]Binding) {
	for _, x := range binds {
		if bound[x.key()].Masquerade && !x.Masquerade {
			b.element(true, "masquerade"+familyOf(x.Addr), element{key: rawKey{first: x.Addr.AsSlice()}}, x.Addr.String())
		}
		b.bind(x)
	}
}

// unbind is the inverse of bind; the address itself stays while another binding holds it.
func (b *batch) unbind(x Binding, left holding) {
	f, a := familyOf(x.Addr), x.Addr.AsSlice()
	does := x.Interface + " . " + x.Addr.String()
	if x.Interface != "" {
		b.element(true, "bound"+f, element{key: rawKey{first: bindingBytes(x)}}, does)
		if !left.wired {
			b.element(true, "wired"+f, element{key: rawKey{first: a}}, does)
		}
	}
	if left.local {
		return
	}
	b.element(true, "local"+f, element{key: rawKey{first: a}}, does)
	b.element(true, "self"+f, element{key: rawKey{first: append(x.Addr.AsSlice(), a...)}}, does)
	if x.Masquerade {
		b.element(true, "masquerade"+f, element{key: rawKey{first: a}}, does)
	}
}

// network adds or deletes a pod network.
func (b *batch) network(del bool, p netip.Prefix) {
	k := encodeKey(policy.Key{Map: policy.NetID, Addr: p.Addr(), To: lastOf(p)})
	b.element(del, "pod_networks"+familyOf(p.Addr()), element{key: k}, p.String())
}

func (b *batch) networks(add, remove []netip.Prefix) {
	for _, p := range remove {
		b.network(true, p)
	}
	for _, p := range add {
		b.network(false, p)
	}
}

func (t *Table) networksDiffer(want []netip.Prefix) bool {
	add, remove := t.networkChanges(want)
	return len(add)+len(remove) > 0
}

// networkChanges compares the networks that no other holds; nil wants no change.
func (t *Table) networkChanges(want []netip.Prefix) (add, remove []netip.Prefix) {
	if want == nil {
		return nil, nil
	}
	wanted := map[netip.Prefix]bool{}
	for _, p := range want {
		covered := false
		for _, q := range want {
			covered = covered || q != p && q.Bits() < p.Bits() && q.Contains(p.Addr())
		}
		if !covered && !wanted[p] {
			wanted[p] = true
			if !t.networks[p] {
				add = append(add, p)
			}
		}
	}
	for p := range t.networks {
		if !wanted[p] {
			remove = append(remove, p)
		}
	}
	return add, remove
}
