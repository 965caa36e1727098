package policy

import (
	"slices"
)

// fillProfiles computes the rows of the fresh profiles from the n-th on.
func (pl *plan) fillProfiles(n int) {
	e := pl.e
	for _, p := range e.freshProfiles[n:] {
		for _, i := range e.watched(p) {
			e.setRow(p, i, e.classify(p, i.sig))
		}
	}
}

// before is the class that p gave the members of i before the change.
func (p *profile) before(i *identity) *class {
	if i.moved {
		return p.at(i.prev)
	}
	return p.at(i)
}

// eachPair yields the classes of every identity on which two profiles can differ: what
// from gave it before, what to gives it after. The last call is for all others.
func (pl *plan) eachPair(from, to *profile, yield func(i *identity, old, new *class)) {
	seen := map[*identity]struct{}{}
	visit := func(i *identity) {
		if _, ok := seen[i]; ok {
			return
		}
		seen[i] = struct{}{}
		after := to.at(i)
		if i.moved {
			after = pl.e.classify(to, i.sig)
		}
		yield(i, from.before(i), after)
	}
	for i := range from.rows {
		visit(i)
	}
	for i := range to.rows {
		visit(i)
	}
	for _, i := range pl.moving {
		visit(i)
	}
	yield(nil, from.others, to.others)
}

// compare reports whether going from one profile to the other closes or opens anything.
func (pl *plan) compare(from, to *profile) (closes, opens bool) {
	switch {
	case from == nil:
		return !to.permitsAll(), false
	case to == nil:
		return false, true
	}
	pl.eachPair(from, to, func(_ *identity, old, new *class) {
		closes = closes || !pl.e.covers(new, old)
		opens = opens || !pl.e.covers(old, new)
	})
	return closes, opens
}

// permitsAll reports whether p denies nobody anything.
func (p *profile) permitsAll() bool {
	all := permitsAll(p.others)
	for _, c := range p.rows {
		all = all && permitsAll(c)
	}
	return all
}

func permitsAll(c *class) bool {
	return allows(c.rest) && !slices.ContainsFunc(c.spans, func(s span) bool { return !allows(s.code) })
}

func (pl *plan) compareTurns() {
	done := map[[2]*profile]struct{}{}
	for _, t := range pl.turns {
		key := [2]*profile{t.from, t.to}
		if _, ok := done[key]; ok || !t.bound {
			continue
		}
		done[key] = struct{}{}
		closes, opens := pl.compare(t.from, t.to)
		pl.revokes = pl.revokes || closes
		pl.opposite.closes[t.dir] = pl.opposite.closes[t.dir] || closes
		pl.opposite.opens[t.dir] = pl.opposite.opens[t.dir] || opens
	}
}

// cloneUnstable finds the profiles that must keep showing the old identities and moves
// the pods that would stay with them to clones.
func (pl *plan) cloneUnstable() {
	leaving := map[*profile]bool{}
	turning := map[*address][2]bool{}
	for _, t := range pl.turns {
		v := turning[t.a]
		v[t.dir] = true
		turning[t.a] = v
		if t.bound && t.from != nil {
			leaving[t.from] = true
		}
	}
	n := len(pl.e.freshProfiles)
	for _, g := range pl.moves {
		if g.to == nil || !g.to.moved {
			continue
		}
		for _, d := range g.diffs {
			if pl.cloned[d.p] == nil && (pl.opposite.any() || leaving[d.p]) {
				pl.cloned[d.p] = pl.e.clone(d.p)
			}
		}
	}
	if len(pl.cloned) == 0 {
		return
	}
	pl.fillProfiles(n)
	for _, t := range pl.turns {
		if c := pl.cloned[t.to]; c != nil {
			t.to = c
		}
	}
	for _, r := range sortedAddresses(pl.e.locals) {
		for _, d := range Directions {
			if c := pl.cloned[r.prof[d]]; c != nil && !turning[r][d] {
				pl.turns = append(pl.turns, &turn{a: r, dir: d, from: r.prof[d], to: c, bound: true})
			}
		}
	}
}

// fillMoving computes the rows of the profiles in use for the fresh identities of moves.
func (pl *plan) fillMoving() {
	e := pl.e
	for _, g := range pl.moves {
		if g.to == nil || !g.to.moved {
			continue
		}
		for _, p := range e.lookers(g.sig, g.from) {
			if pl.cloned[p] != nil {
				e.setRow(p, g.to, p.at(g.from))
			} else {
				e.setRow(p, g.to, e.classify(p, g.sig))
			}
		}
	}
}
