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
	e.dirtyPods = map[*pod]struct{}{}
}

func sortedAddresses[V any](m map[*address]V) []*address {
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
	pl.pieces = cut(e.decompose(), e.nets.ranges)
	e.nets.ranges = pl.pieces
	for _, r := range e.addresses {
		if r.id == nil {
			continue
		}
		if slices.ContainsFunc(e.freshAtoms, func(a *atom) bool { return a.near(r) }) {
			e.touch(r)
		}
	}
}

// near reports whether a block of a could hold r.
func (a *atom) near(r *address) bool {
	return slices.ContainsFunc(a.blocks, func(b *Block) bool { return b.CIDR.Contains(r.addr) })
}

func (pl *plan) move(from *identity, s *signature, m move, neutral bool) *moves {
	key := moveKey{from, s}
	g := pl.byKey[key]
	if g == nil {
		g = &moves{moveKey: key, neutral: true}
		pl.byKey[key] = g
		pl.moves = append(pl.moves, g)
	}
	g.list = append(g.list, m)
	g.neutral = g.neutral && neutral
	if m.a == nil && from != nil || m.element {
		g.held++
	}
	return g
}

func (pl *plan) moveRanges() {
	for i, r := range pl.pieces {
		if r.id.signature() != r.sig {
			pl.move(r.id, r.sig, move{piece: i, wanted: true}, pl.existing)
		}
	}
}

func (pl *plan) moveAddresses() {
	e := pl.e
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
		if !m.element && !m.wanted {
			continue
		}
		if m.element && from.sig == full {
			continue
		}
		neutral := false
		if pl.existing {
			was, _ := e.sign(r, false)
			neutral = was == from.signature()
		}
		g := pl.move(from, full, m, neutral)
		g.local = g.local || was.local && r.local
	}
}
