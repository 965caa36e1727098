package policy

import (
	"slices"
)

// splitIdentities handles the moves that no profile in use can see: of each identity the
// largest part keeps the number.
func (pl *plan) splitIdentities() {
	left := map[*identity]int{}
	best := map[*identity]*moves{}
	for _, g := range pl.moves {
		if g.from == nil {
			continue
		}
		if _, ok := left[g.from]; !ok {
			left[g.from] = g.from.members
			for _, r := range pl.oldNets.ranges {
				if pl.pieces != nil && r.id == g.from {
					left[g.from]--
				}
			}
			for _, r := range pl.pieces {
				if r.id == g.from {
					left[g.from]++
				}
			}
		}
		left[g.from] -= g.held
		if b := best[g.from]; g.neutral && g.sig.primary == nil && (b == nil || g.held > b.held) {
			best[g.from] = g
		}
	}
	for _, g := range slices.Clone(pl.moves) {
		if !g.neutral {
			continue
		}
		if g.from != nil && best[g.from] == g && g.held > left[g.from] {
			pl.growInPlace(g, left[g.from])
			continue
		}
		if g.sig.primary == nil {
			pl.copyRows(g.from, pl.e.newIdentity(g.sig))
		}
		g.to = g.sig.primary
	}
}

func (pl *plan) copyRows(from, to *identity) {
	if from == nil {
		return
	}
	for p, c := range from.rows {
		pl.e.setRow(p, to, c)
	}
}

// growInPlace lets the identity of g take g's signature; its rest members who do not
// move with g get a fresh number for the old one.
func (pl *plan) growInPlace(g *moves, rest int) {
	e, old := pl.e, g.from.sig
	e.setSignature(g.from, g.sig)
	g.to = g.from
	if rest == 0 {
		return
	}
	stay := &moves{moveKey: moveKey{g.from, old}, neutral: true}
	moved := map[move]struct{}{}
	for _, o := range pl.moves {
		if o.from == g.from {
			for _, m := range o.list {
				moved[move{a: m.a, piece: m.piece}] = struct{}{}
			}
		}
	}
	for i, r := range pl.pieces {
		if _, ok := moved[move{piece: i}]; !ok && r.id == g.from {
			stay.list = append(stay.list, move{piece: i})
		}
	}
	if pl.pieces == nil {
		pl.pieces = slices.Clone(pl.oldNets.ranges)
		for i, r := range pl.pieces {
			if r.id == g.from {
				stay.list = append(stay.list, move{piece: i})
			}
		}
	}
	members := map[*address]claim{}
	for _, r := range e.addresses {
		if _, ok := moved[move{a: r}]; !ok && r.id == g.from {
			members[r] = claim{}
		}
	}
	for _, r := range sortedAddresses(members) {
		stay.list = append(stay.list, move{a: r})
	}
	stay.to = e.newIdentity(old)
	pl.copyRows(g.from, stay.to)
	pl.moves = append(pl.moves, stay)
}

// compareMoves finds what the other moves change for profiles in use.
func (pl *plan) compareMoves() {
	if !pl.existing {
		return
	}
	e := pl.e
	for _, g := range pl.moves {
		if g.neutral {
			continue
		}
		for _, p := range e.lookers(g.sig, g.from) {
			d := diff{p, p.at(g.from), e.classify(p, g.sig)}
			if d.old == d.new {
				continue
			}
			g.diffs = append(g.diffs, d)
			closes := !e.covers(d.new, d.old)
			pl.revokes = pl.revokes || closes
			if g.local {
				pl.opposite.closes[p.dir] = pl.opposite.closes[p.dir] || closes
				pl.opposite.opens[p.dir] = pl.opposite.opens[p.dir] || !e.covers(d.old, d.new)
			}
		}
	}
}

// chooseTargets gives the moves that are not splits their identities.
func (pl *plan) chooseTargets() {
	e := pl.e
	bound := slices.ContainsFunc(pl.turns, func(t *turn) bool { return t.bound })
	for _, g := range pl.moves {
		switch {
		case g.neutral:
		case len(g.diffs) > 0 && (bound || pl.opposite.any()):
			g.to = e.newIdentity(g.sig)
			g.to.prev, g.to.moved = g.from, true
			pl.moving = append(pl.moving, g.to)
			e.untidy = true
		case !slices.ContainsFunc(g.list, func(m move) bool { return m.wanted }):
		case g.sig.primary == nil || g.sig.primary.moved: // which profiles in use take for what others were
			g.to = e.newIdentity(g.sig)
			for _, p := range e.lookers(g.sig) {
				e.setRow(p, g.to, e.classify(p, g.sig))
			}
		default:
			g.to = g.sig.primary
		}
	}
}
