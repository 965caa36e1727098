package policy

import (
	"slices"
)

// plan is the change in hand, from what is in force to what the cluster demands.
//
// A packet reads, egress first and then ingress: profile, identity, class, code, each
// at its own instant. Let a flow's direction be decided by (profile, identity). Then:
//
//   - An identity change that no profile in use can see (a split) may happen first.
//   - When only identities change, each of them is one lookup, so each direction is
//     decided by the old or by the new one.
//   - When profiles change too, an address whose identity changes goes to a fresh one
//     that the leaving profiles take for the old identity and the coming ones for the
//     new (identity.prev). A profile that cannot serve both because some of its pods
//     keep it is left by all of them for a clone.
//   - Directions are a conjunction. A mix of old and new in two directions lies between
//     the two verdicts when the change only opens or only closes. When it closes one
//     direction and opens the other, everything goes through profiles that allow what
//     both old and new allow: old -> meet -> (grace period) -> new.
type plan struct {
	e *Engine
	// existing: there are profiles in use, so that order matters.
	existing bool
	oldNets  nets
	pieces   []netRange
	moves    []*moves
	byKey    map[moveKey]*moves
	turns    []*turn
	cloned   map[*profile]*profile
	meets    map[[2]*profile]*profile
	opposite opposition
	revokes  bool
	moving   []*identity // fresh identities with prev
	netOps   []Op
	podOps   []Op
	early    []Op
	isolate  []Op
	release  []Op
	late     []Op
	repoints bool
}

// turn is a change of profile of one local address in one direction.
type turn struct {
	a        *address
	dir      Direction
	from, to *profile
	bound    bool // the address was and stays local: packets may be in flight
	leaving  bool
}

type moveKey struct {
	from *identity
	sig  *signature
}

// moves are the changes of identity that have the same end points.
type moves struct {
	moveKey
	list    []move
	held    int // how many are elements of from
	neutral bool
	local   bool // some address was and stays local
	to      *identity
	diffs   []diff
}

type move struct {
	a       *address // nil: pieces[piece]
	piece   int
	element bool // of PodID now
	wanted  bool // needs an element
}

// diff is a profile in use for which a move changes the class.
type diff struct {
	p        *profile
	old, new *class
}

// opposition records per direction whether something closes or opens.
type opposition struct{ closes, opens [2]bool }

func (o opposition) any() bool {
	return o.closes[Egress] && o.opens[Ingress] || o.closes[Ingress] && o.opens[Egress]
}

// settle plans the change and brings the engine's state to its end.
func (e *Engine) settle() Delta {
	pl := &plan{
		e: e, existing: len(e.profiles) > 0, byKey: map[moveKey]*moves{},
		cloned: map[*profile]*profile{}, meets: map[[2]*profile]*profile{},
	}
	pl.turnProfiles()
	pl.cutRanges()
	pl.moveRanges()
	pl.moveAddresses()
	pl.splitIdentities()
	pl.compareMoves()
	pl.chooseTargets()
	pl.fillProfiles(0)
	pl.compareTurns()
	pl.cloneUnstable()
	pl.fillMoving()
	pl.writeMoves()
	pl.writeTurns()
	return pl.delta()
}

// turnProfiles finds the local addresses whose profiles change. It puts the policies of
// new profiles in force, which may bring new peer groups.
func (pl *plan) turnProfiles() {
	e := pl.e
	seen := map[*address]claim{}
	for r, was := range e.dirty {
		if was.local || r.owner != nil && e.isLocal(r.owner) {
			seen[r] = was
		}
	}
	for p := range e.dirtyPods {
		for _, a := range p.Addrs {
			if r := e.addresses[a]; r != nil && r.owner == p {
				if _, ok := seen[r]; !ok {
					seen[r] = claim{p, r.local}
				}
			}
		}
	}
	demanded := map[*pod][2]*profile{}
	for _, r := range sortedAddresses(seen) {
		was, want := seen[r], [2]*profile{}
		local := r.owner != nil && e.isLocal(r.owner)
		if local {
			if _, ok := demanded[r.owner]; !ok {
				demanded[r.owner] = e.demanded(r.owner)
			}
			want = demanded[r.owner]
			e.locals[r] = struct{}{}
		} else {
			delete(e.locals, r)
		}
		r.local = local
		pl.revokes = pl.revokes || was.local && !local
		for _, d := range Directions {
			if r.prof[d] != want[d] {
				pl.turns = append(pl.turns, &turn{a: r, dir: d, from: r.prof[d], to: want[d], bound: was.local && local, leaving: !local})
			}
		}
	}
	e.dirtyPods = emptied(e.dirtyPods)
}

func sortedAddresses(m map[*address]claim) []*address {
	out := make([]*address, 0, len(m))
	for r := range m {
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b *address) int { return a.addr.Compare(b.addr) })
	return out
}

// cutRanges decomposes the blocks anew when there are new ones. No block leaves before Tidy.
func (pl *plan) cutRanges() {
	e := pl.e
	pl.oldNets = e.nets
	if !e.netDirty {
		return
	}
	e.netDirty = false
	pl.pieces = cut(e.decompose(e.blockAtoms()), e.nets.ranges)
	e.nets.set(pl.pieces)
	for _, r := range e.addresses {
		if r.id != nil && slices.ContainsFunc(e.freshAtoms, func(a *atom) bool { return a.near(r) }) {
			e.touch(r)
		}
	}
}

// near reports whether a block of a could hold r.
func (a *atom) near(r *address) bool {
	return slices.ContainsFunc(a.blocks, func(b *Block) bool { return b.CIDR.Contains(r.addr) })
}

func (pl *plan) move(from *identity, s *signature, m move, neutral, local bool) {
	key := moveKey{from, s}
	g := pl.byKey[key]
	if g == nil {
		g = &moves{moveKey: key, neutral: true}
		pl.byKey[key] = g
		pl.moves = append(pl.moves, g)
	}
	g.list = append(g.list, m)
	g.neutral = g.neutral && neutral
	g.local = g.local || local
	if m.a == nil && from != nil || m.element {
		g.held++
	}
}

func (pl *plan) moveRanges() {
	for i, r := range pl.pieces {
		if r.id.signature() != r.sig {
			pl.move(r.id, r.sig, move{piece: i, wanted: true}, pl.existing, false)
		}
	}
}

func (pl *plan) moveAddresses() {
	e := pl.e
	fresh := len(e.freshAtoms) > 0 || len(e.freshNames) > 0
	for _, r := range sortedAddresses(e.dirty) {
		was := e.dirty[r]
		if was.owner != nil && r.owner != nil && (was.owner.Name != r.owner.Name || was.owner.UID != r.owner.UID) {
			pl.revokes = pl.revokes || pl.existing
		}
		full, net := e.sign(r, true)
		m := move{a: r, element: r.id != nil, wanted: full != net}
		from := r.id
		if from == nil {
			if n := pl.oldNets.at(r.addr); n != nil {
				from = n.id
			}
		}
		switch {
		case !m.element && !m.wanted:
			continue
		case m.element && from.sig == full && (m.wanted || r.owner != nil):
			e.untidy = e.untidy || !m.wanted
			continue
		}
		e.untidy = e.untidy || !m.wanted
		neutral := false
		if fresh && pl.existing && full != nil {
			was, _ := e.sign(r, false)
			neutral = was == from.signature()
		}
		pl.move(from, full, m, neutral, was.local && r.local)
	}
}

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
		if b := best[g.from]; g.neutral && g.sig != nil && g.sig.primary == nil && (b == nil || g.held > b.held) {
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
	if rest == 0 || old == nil {
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
			stay.list = append(stay.list, move{piece: i, wanted: true})
		}
	}
	if pl.pieces == nil {
		pl.pieces = slices.Clone(pl.oldNets.ranges)
		for i, r := range pl.pieces {
			if r.id == g.from {
				stay.list = append(stay.list, move{piece: i, wanted: true})
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
		stay.list = append(stay.list, move{a: r, element: true, wanted: true})
	}
	stay.to = e.newIdentity(old)
	pl.copyRows(g.from, stay.to)
	pl.moves = append(pl.moves, stay)
}

// compareMoves finds what the other moves change for profiles in use.
func (pl *plan) compareMoves() {
	e := pl.e
	for _, g := range pl.moves {
		if g.neutral || !pl.existing {
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
		case g.sig.primary == nil:
			g.to = e.newIdentity(g.sig)
			for _, p := range e.lookers(g.sig) {
				e.setRow(p, g.to, e.classify(p, g.sig))
			}
		default:
			g.to = g.sig.primary
		}
	}
}

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
		if i.moved && !to.fresh {
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
	case from == nil && to == nil:
		return false, false
	case from == nil:
		all := permitsAll(to.others)
		for _, c := range to.rows {
			all = all && permitsAll(c)
		}
		return !all, false
	case to == nil:
		return false, true
	}
	pl.eachPair(from, to, func(_ *identity, old, new *class) {
		closes = closes || !pl.e.covers(new, old)
		opens = opens || !pl.e.covers(old, new)
	})
	return closes, opens
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
	for _, r := range sortedLocals(pl.e.locals) {
		for _, d := range Directions {
			if c := pl.cloned[r.prof[d]]; c != nil && !turning[r][d] {
				pl.turns = append(pl.turns, &turn{a: r, dir: d, from: r.prof[d], to: c, bound: true})
			}
		}
	}
}

func sortedLocals(m map[*address]struct{}) []*address {
	out := make([]*address, 0, len(m))
	for r := range m {
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b *address) int { return a.addr.Compare(b.addr) })
	return out
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
