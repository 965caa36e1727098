package policy

import (
	"cmp"
	"encoding/binary"
	"net/netip"
	"slices"
)

// The steps from a predecessor's tables to the engine's are planned like any other
// change (see plan), from what the tables say: who knows no labels and no rules of the
// old policy has no splits and leaves more to Tidy.
//
//   - Profiles of other content have other numbers, and identities change before
//     profiles do. A number that an address comes to have has, in the profiles that are
//     left, the classes of the number it had.
//   - An address that has an element keeps one, and so does a range: a packet that read
//     net_id before and pod_id after would take it for one that it never was. What is
//     not needed goes in Tidy.
//   - A profile that stays shows an identity's change at once. It stays only when no pod
//     leaves it and nothing goes through a meet, or when it sees no change.

// renaming is a change of identity: the predecessor's number and what it should be, nil
// for all others.
type renaming struct {
	from uint32
	to   *identity
}

// shift is a renaming that an address or a range goes through.
type shift struct {
	renaming
	r     *address // nil: pieces[piece]
	piece int
}

// targetKey is all that a number must tell: what it is now, and what the profiles that
// are left took it for.
type targetKey struct {
	to   *identity
	seen string
}

// findShifts compares the identity of every address and range.
func (a *adoption) findShifts() {
	e := a.e
	var old []netRange
	for k, v := range a.kernel {
		if k.Map == NetID {
			a.ranges = append(a.ranges, rangeValue{k.Addr, k.To, v})
		}
		if k.Map == PodID && e.addresses[k.Addr] == nil {
			e.addresses[k.Addr] = &address{addr: k.Addr}
		}
	}
	sortRanges(a.ranges)
	for _, r := range a.ranges {
		old = append(old, netRange{from: r.from, to: r.to, id: &identity{num: r.value}})
	}
	a.renamings, a.changed = map[renaming]bool{{from: IdentityOthers}: false}, map[renaming]bool{}
	a.pieces = cut(e.nets.ranges, old)
	for _, r := range cut(old, e.nets.ranges) {
		if r.id == nil {
			a.pieces = append(a.pieces, r)
		}
	}
	slices.SortFunc(a.pieces, func(x, y netRange) int { return x.from.Compare(y.from) })
	for i := range a.pieces {
		r := &a.pieces[i]
		from := a.netNumber(r.from)
		if n := e.nets.at(r.from); n != nil {
			r.id = n.id
		}
		a.shift(shift{renaming: renaming{from, r.id}, piece: i})
	}
	for _, r := range a.sortedAddresses() {
		from, ok := a.kernel[Key{Map: PodID, Addr: r.addr}]
		if !ok {
			from = a.netNumber(r.addr)
		}
		to := r.id
		if n := e.nets.at(r.addr); to == nil && n != nil {
			to = n.id
		}
		p := renaming{from, to}
		if !ok && r.id == nil { // it goes with its range
			a.rename(p, true)
			continue
		}
		a.shift(shift{renaming: p, r: r})
	}
}

// netNumber is the number that addr had by ranges.
func (a *adoption) netNumber(addr netip.Addr) uint32 {
	if v, ok := findRange(a.ranges, addr); ok {
		return v
	}
	return IdentityOthers
}

// sortedAddresses are those of this node and those with an element, now or before.
func (a *adoption) sortedAddresses() []*address {
	all := map[*address]claim{}
	for _, r := range a.e.addresses {
		if _, ok := a.kernel[Key{Map: PodID, Addr: r.addr}]; ok || r.id != nil || r.local {
			all[r] = claim{}
		}
	}
	return sortedAddresses(all)
}

func (a *adoption) shift(s shift) {
	a.rename(s.renaming, s.r != nil && s.r.local)
	a.shifts = append(a.shifts, s)
}

// rename notes that some address changes its identity so.
func (a *adoption) rename(p renaming, local bool) {
	a.renamings[p] = a.renamings[p] || local
	if a.identities[p.to] != p.from {
		a.changed[p] = a.renamings[p]
	}
}

// seen is what the profiles that are left take number i for.
func (a *adoption) seen(i uint32) string {
	var key []byte
	for _, n := range a.left {
		key = binary.BigEndian.AppendUint32(key, a.value(n, i))
	}
	return string(key)
}

// target returns the identity that a renaming leads to.
func (a *adoption) target(p renaming) *identity {
	n, known := a.identities[p.to]
	if known && n == p.from {
		return p.to
	}
	key := targetKey{p.to, a.seen(p.from)}
	if t := a.targets[key]; t != nil {
		return t
	}
	t := p.to
	if _, taken := a.sources[p.to]; p.to == nil || known && a.seen(n) != key.seen || taken {
		var s *signature
		if p.to != nil {
			s = p.to.sig
		}
		t = a.e.newIdentity(s)
		(&plan{e: a.e}).copyRows(p.to, t)
		a.e.untidy = true
	}
	if !known || t != p.to {
		a.sources[t] = p.from
	}
	a.targets[key] = t
	return t
}

// applyShifts gives every address and range its identity.
func (a *adoption) applyShifts() {
	e := a.e
	for _, r := range e.nets.ranges {
		r.id.members--
	}
	for _, s := range a.shifts {
		to := a.target(s.renaming)
		if s.r == nil {
			a.pieces[s.piece].id = to
			continue
		}
		if s.r.id == nil {
			e.untidy = true
		} else {
			s.r.id.members--
		}
		s.r.id = to
		to.members++
	}
	pieces := join(a.pieces)
	for _, r := range pieces {
		r.id.members++
	}
	e.nets.ranges = pieces
}

// leftRows are the rows that the profiles that are left need for new numbers.
func (a *adoption) leftRows() []Op {
	var ops []Op
	for t, from := range a.sources {
		for _, n := range a.left {
			if v, ok := a.rows[n][from]; ok {
				ops = append(ops, add(Key{Map: Access, X: n, Y: t.num}, v, ""))
			}
		}
	}
	return ops
}

// steps is the delta from the kernel's elements to the engine's.
func (a *adoption) steps() Delta {
	e := a.e
	added, removed := a.difference()
	var d Delta
	fresh := slices.Concat(added[AccessPort], added[AccessRange], added[AccessRest], added[AccessOthers], added[Access])
	left := a.leftRows()
	fresh = append(fresh, left...)
	early, late, meets := a.cross(&fresh)
	slices.SortFunc(fresh, compareFresh)
	d.add(e.maxStep, fresh)
	d.add(e.maxStep, sortedOps(append(removed[PodID], added[PodID]...)))
	d.addRanges(e.maxStep, append(removed[NetID], added[NetID]...))
	d.add(e.maxStep, early)
	d.add(e.maxStep, sortedOps(append(added[IsolatedIngress], added[IsolatedEgress]...)))
	if a.opposite.any() && len(late) > 0 {
		d.Pause = len(d.Steps)
	}
	d.add(e.maxStep, sortedOps(append(removed[IsolatedIngress], removed[IsolatedEgress]...)))
	d.add(e.maxStep, late)
	d.Drops = append(left, slices.Concat(removed[AccessPort], removed[AccessRange], removed[AccessRest], removed[AccessOthers], removed[Access])...)
	for i := range left {
		d.Drops[i].Delete = true
	}
	drop := func(k Key, v uint32) { d.Drops = append(d.Drops, remove(k, v)) }
	for _, m := range meets {
		e.releaseProfile(m, drop)
	}
	e.releaseClasses(drop)
	d.Drops = sortedOps(d.Drops)
	d.Revokes = len(d.Steps) > 0
	a.freeNumbers()
	e.finish()
	e.retired = true // profiles of the kernel may be among the drops
	return d
}

// difference is what the engine wants and the kernel has not, and the other way round.
func (a *adoption) difference() (added, removed [AccessRest + 1][]Op) {
	want := make(map[Key]Element, len(a.kernel))
	a.e.elements(func(el Element) { want[el.Key] = el })
	for k, v := range a.kernel {
		if w, ok := want[k]; !ok || w.Value != v {
			removed[k.Map] = append(removed[k.Map], remove(k, v))
		}
	}
	for k, w := range want {
		if v, ok := a.kernel[k]; !ok || v != w.Value {
			added[k.Map] = append(added[k.Map], Op{Element: w})
		}
	}
	return added, removed
}

// compareFresh puts classes before what names them.
func compareFresh(x, y Op) int {
	names := func(op Op) int { return boolDelta(op.Map == Access || op.Map == AccessOthers) }
	return cmp.Or(cmp.Compare(names(x), names(y)), compareKey(x.Key, y.Key))
}
