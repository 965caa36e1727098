package policy

import (
	"slices"
)

// crossing is a change of profile of one local address in one direction.
type crossing struct {
	key  Key
	from uint32   // 0: none
	to   *profile // nil: none
	r    *address
}

type crossingKey struct {
	dir  Direction
	from uint32
	to   *profile
}

// value is the number of the class that the predecessor's profile n gave the addresses
// numbered i.
func (a *adoption) value(n, i uint32) uint32 {
	if v, ok := a.rows[n][i]; ok {
		return v
	}
	return a.kernel[Key{Map: AccessOthers, X: n}]
}

// class is what the predecessor's profile n gave the addresses numbered i.
func (a *adoption) class(n, i uint32) *class {
	v := a.value(n, i)
	if c := a.contents[v]; c != nil {
		return c
	}
	rest := uint8(a.kernel[Key{Map: AccessRest, X: v}])
	c := a.e.classes[classKey(rest, a.spans[v])]
	if c == nil {
		c = &class{rest: rest, spans: a.spans[v]}
	}
	a.contents[v] = c
	return c
}

// chooseProfiles finds the profiles that keep their number and the crossings of those
// that do not.
func (a *adoption) chooseProfiles() {
	for again := true; again; {
		again = false
		a.findCrossings()
		a.compareCrossings()
		var sees []*profile
		for p, n := range a.profiles {
			if a.sees(n, p) {
				sees = append(sees, p)
			}
		}
		for _, p := range sees {
			if n := a.profiles[p]; a.opposite.any() || slices.Contains(a.left, n) {
				delete(a.profiles, p)
				again = true
			}
		}
	}
	kept := map[uint32]bool{}
	for _, n := range a.profiles {
		kept[n] = true
	}
	a.left = slices.DeleteFunc(a.left, func(n uint32) bool { return kept[n] })
}

func (a *adoption) compareCrossings() {
	done := map[crossingKey]bool{}
	for _, c := range a.crossings {
		key := crossingKey{directionOf(c.key.Map), c.from, c.to}
		if c.r.local && !done[key] {
			done[key] = true
			closes, opens := a.compare(c.from, c.to)
			a.opposite.note(key.dir, closes, opens)
		}
	}
}

func (o *opposition) note(d Direction, closes, opens bool) {
	o.closes[d] = o.closes[d] || closes
	o.opens[d] = o.opens[d] || opens
}

// sees reports whether an identity changes for p, which keeps the number n.
func (a *adoption) sees(n uint32, p *profile) bool {
	sees := false
	for r, local := range a.changed {
		old, now := a.class(n, r.from), p.at(r.to)
		if old == now {
			continue
		}
		sees = true
		if local {
			a.opposite.note(p.dir, !a.e.covers(now, old), !a.e.covers(old, now))
		}
	}
	return sees
}

// compare reports whether going from one profile to the other closes or opens anything.
func (a *adoption) compare(from uint32, to *profile) (closes, opens bool) {
	switch {
	case from == 0:
		return !to.permitsAll(), false
	case to == nil:
		return false, true
	}
	for r := range a.renamings {
		old, now := a.class(from, r.from), to.at(r.to)
		closes = closes || !a.e.covers(now, old)
		opens = opens || !a.e.covers(old, now)
	}
	return closes, opens
}

func directionOf(profiles Map) Direction {
	if profiles == EgressProfile {
		return Egress
	}
	return Ingress
}

// findCrossings lists the addresses whose profile changes, and the numbers that are left.
func (a *adoption) findCrossings() {
	e := a.e
	a.crossings, a.left = nil, nil
	cross := func(r *address, d Direction) {
		key := Key{Map: profileMap(d), Addr: r.addr}
		from, to := a.kernel[key], r.prof[d]
		if n, ok := a.profiles[to]; ok && n == from || to == nil && from == 0 {
			return
		}
		a.crossings = append(a.crossings, crossing{key, from, to, r})
		if !slices.Contains(a.left, from) { // 0 has no rows
			a.left = append(a.left, from)
		}
	}
	for k := range a.kernel {
		if k.Map != IngressProfile && k.Map != EgressProfile {
			continue
		}
		r := e.addresses[k.Addr]
		if r == nil {
			r = &address{addr: k.Addr}
		}
		if r.prof[directionOf(k.Map)] == nil {
			cross(r, directionOf(k.Map))
		}
	}
	for r := range e.locals {
		for _, d := range Directions {
			if r.prof[d] != nil {
				cross(r, d)
			}
		}
	}
	slices.SortFunc(a.crossings, func(x, y crossing) int { return compareKey(x.key, y.key) })
}

// meet makes the profile that allows what both allow, and appends its elements.
func (a *adoption) meet(c crossing, ops *[]Op) *profile {
	e := a.e
	m := &profile{dir: directionOf(c.key.Map)}
	e.numberProfile(m)
	write := func(k *class) {
		if !k.written {
			k.written = true
			k.elements(func(k Key, v uint32) { *ops = append(*ops, add(k, v, "")) })
		}
	}
	m.others = e.meet(a.class(c.from, IdentityOthers), c.to.others)
	m.others.refs++
	write(m.others)
	*ops = append(*ops, add(Key{Map: AccessOthers, X: m.num}, m.others.num, ""))
	for p := range a.renamings {
		if p.to == nil && p.from == IdentityOthers {
			continue
		}
		t := a.target(p)
		e.setRow(m, t, e.meet(a.class(c.from, p.from), c.to.at(p.to)))
	}
	for t, k := range m.rows {
		write(k)
		*ops = append(*ops, add(Key{Map: Access, X: m.num, Y: t.num}, k.num, ""))
	}
	return m
}

// cross emits the changes of profiles, as writeTurns does.
func (a *adoption) cross(fresh *[]Op) (early, late []Op, meets []*profile) {
	vias := map[crossingKey]uint32{}
	for _, c := range a.crossings {
		key := crossingKey{directionOf(c.key.Map), c.from, c.to}
		via, ok := vias[key]
		if !ok {
			closes, opens := a.compare(c.from, c.to)
			switch {
			case c.to == nil || opens && !closes && a.opposite.any():
				via = c.from
			case opens && closes && a.opposite.any():
				m := a.meet(c, fresh)
				meets = append(meets, m)
				via = m.num
			default:
				via = c.to.num
			}
			vias[key] = via
		}
		var to uint32
		if c.to != nil {
			to = c.to.num
		}
		early = changeValue(early, c.key, c.from, via, c.r.comment())
		late = changeValue(late, c.key, via, to, c.r.comment())
	}
	return early, late, meets
}

// changeValue appends the ops that give a key another value; 0 is none.
func changeValue(ops []Op, k Key, from, to uint32, comment string) []Op {
	if from == to {
		return ops
	}
	if from != 0 {
		ops = append(ops, remove(k, from))
	}
	if to != 0 {
		ops = append(ops, add(k, to, comment))
	}
	return ops
}
