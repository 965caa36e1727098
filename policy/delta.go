package policy

import (
	"cmp"
	"slices"
)

// maxStep bounds the ops of one step: a commit holds up other writers of netfilter.
// Any bound is right, for each address is decided by one lookup of its own. Only the
// ranges that replace each other are one step however many they are.
const maxStep = 2000

func add(k Key, v uint32, comment string) Op { return Op{Element: Element{k, v, comment}} }
func remove(k Key, v uint32) Op {
	return Op{Delete: true, Element: Element{Key: k, Value: v}}
}

// writeMoves emits the moves that change an element and counts members.
func (pl *plan) writeMoves() {
	for _, g := range pl.moves {
		for _, m := range g.list {
			if m.a == nil {
				pl.pieces[m.piece].id = g.to
				continue
			}
			pl.writeMove(m.a, g.from, g.to, m.wanted || g.to != nil && (g.neutral || g.to.moved))
		}
	}
	if pl.pieces == nil {
		return
	}
	pl.writeNets(pl.pieces)
}

// writeMove gives r the element i, or none. Until now r is taken for from, by its element or by its range; profiles
// that are gone know from and not i.
func (pl *plan) writeMove(r *address, from, i *identity, keep bool) {
	key := Key{Map: PodID, Addr: r.addr}
	if !keep {
		i = nil
	}
	if r.id == i {
		return
	}
	pl.repoints = pl.repoints || from != nil
	if r.id != nil {
		pl.podOps = append(pl.podOps, remove(key, r.id.num))
		r.id.members--
		pl.e.looseIdentities = append(pl.e.looseIdentities, r.id)
	}
	if i != nil {
		pl.podOps = append(pl.podOps, add(key, i.num, r.comment()))
		i.members++
	}
	r.id = i
}

func (r *address) comment() string {
	if r.owner == nil {
		return ""
	}
	return r.owner.Name.String()
}

// writeNets replaces the ranges.
func (pl *plan) writeNets(pieces []netRange) {
	e := pl.e
	pieces = join(pieces)
	for _, r := range pl.oldNets.ranges {
		r.id.members--
		e.looseIdentities = append(e.looseIdentities, r.id)
	}
	for _, r := range pieces {
		r.id.members++
	}
	pl.netOps = diffNets(pl.oldNets.ranges, pieces)
	for _, op := range pl.netOps {
		pl.repoints = pl.repoints || op.Delete
	}
	e.nets.ranges = pieces
}

// writeTurns emits the changes of profiles: closing ones early, opening ones late, and
// through the meet where both happens and directions could mix.
func (pl *plan) writeTurns() {
	for _, t := range pl.turns {
		key := Key{Map: profileMap(t.dir), Addr: t.a.addr}
		member := Key{Map: isolatedSet(t.dir), Addr: t.a.addr}
		if t.from == nil {
			ops := &pl.isolate
			if !t.bound {
				ops = &pl.podOps
			}
			*ops = append(*ops, add(member, 0, t.a.comment()))
		}
		if t.to == nil {
			pl.release = append(pl.release, remove(member, 0))
		}
		via := pl.via(t)
		switch {
		case !t.bound && !t.leaving:
			pl.podOps = pl.repoint(pl.podOps, key, t.from, t.to, t.a)
		default:
			pl.early = pl.repoint(pl.early, key, t.from, via, t.a)
			pl.late = pl.repoint(pl.late, key, via, t.to, t.a)
		}
		t.a.prof[t.dir] = t.to
		if t.from != nil {
			t.from.users--
		}
		if t.to != nil {
			t.to.users++
		}
	}
}

// repoint appends the ops that change the profile of one key.
func (pl *plan) repoint(ops []Op, key Key, from, to *profile, r *address) []Op {
	if from == to {
		return ops
	}
	if from != nil {
		ops = append(ops, remove(key, from.num))
	}
	if to != nil {
		ops = append(ops, add(key, to.num, r.comment()))
	}
	return ops
}

// via is the profile between the early and the late steps.
func (pl *plan) via(t *turn) *profile {
	switch {
	case t.from == nil:
		return t.to
	case t.to == nil:
		return t.from
	case !pl.opposite.any():
		return t.to
	}
	key := [2]*profile{t.from, t.to}
	if m, ok := pl.meets[key]; ok {
		return m
	}
	closes, opens := pl.compare(t.from, t.to)
	m := t.to
	switch {
	case closes && opens:
		m = pl.meet(t.from, t.to)
	case opens:
		m = t.from
	}
	pl.meets[key] = m
	return m
}

// meet makes the profile that allows what both allow.
func (pl *plan) meet(from, to *profile) *profile {
	e := pl.e
	m := &profile{dir: from.dir, users: 1}
	e.numberProfile(m)
	m.others = e.meet(from.others, to.others)
	m.others.refs++
	pl.eachPair(from, to, func(i *identity, old, new *class) {
		if i != nil {
			e.setRow(m, i, e.meet(old, new))
		}
	})
	return m
}

// delta forgets what nothing uses any more and puts the steps in order.
func (pl *plan) delta() Delta {
	e := pl.e
	d := Delta{Revokes: pl.revokes}
	discard := func(Key, uint32) {}
	for _, p := range e.freshProfiles {
		if p.users == 0 {
			e.releaseProfile(p, discard)
		}
	}
	d.add(e.maxStep, pl.newElements())
	d.addRanges(e.maxStep, pl.netOps)
	d.add(e.maxStep, pl.podOps)
	d.add(e.maxStep, pl.early)
	d.add(e.maxStep, pl.isolate)
	if n := len(d.Steps); pl.opposite.any() && len(pl.late) > 0 {
		d.Pause = n
	}
	d.add(e.maxStep, pl.release)
	d.add(e.maxStep, pl.late)
	earlier := e.retired
	e.retired = false
	d.Drops = pl.drops()
	d.Settle = pl.repoints && (earlier || e.retired)
	e.retired = e.retired || earlier && !d.Settle
	e.finish()
	return d
}

// add appends ops in steps of at most limit, which is 2 or more.
func (d *Delta) add(limit int, ops []Op) {
	for len(ops) > 0 {
		n := min(len(ops), limit)
		if n < len(ops) && ops[n-1].Delete {
			n-- // a change is a delete and an add of one key: never in two steps
		}
		d.addWhole(ops[:n])
		ops = ops[n:]
	}
}

// addRanges does the same for ranges. Those that overlap, deleted and added, are in one
// step: an address must never miss its range.
func (d *Delta) addRanges(limit int, ops []Op) {
	slices.SortStableFunc(ops, func(a, b Op) int { return a.Addr.Compare(b.Addr) })
	var step []Op
	for len(ops) > 0 {
		n, end := 1, ops[0].To
		for ; n < len(ops) && !end.Less(ops[n].Addr); n++ {
			if end.Less(ops[n].To) {
				end = ops[n].To
			}
		}
		if len(step)+n > limit {
			d.addWhole(deletesFirst(step))
			step = nil
		}
		step = append(step, ops[:n]...)
		ops = ops[n:]
	}
	d.addWhole(deletesFirst(step))
}

func deletesFirst(ops []Op) []Op {
	slices.SortStableFunc(ops, func(a, b Op) int { return boolDelta(!a.Delete) - boolDelta(!b.Delete) })
	return ops
}

func (d *Delta) addWhole(ops []Op) {
	if len(ops) > 0 {
		d.Steps = append(d.Steps, ops)
	}
}

// newElements are the elements under fresh numbers: classes, profiles, rows.
func (pl *plan) newElements() []Op {
	e := pl.e
	var classes, ops []Op
	write := func(c *class) {
		if !c.written {
			c.written = true
			c.elements(func(k Key, v uint32) { classes = append(classes, add(k, v, "")) })
		}
	}
	for _, p := range e.freshProfiles {
		if p.rows != nil {
			write(p.others)
			ops = append(ops, add(Key{Map: AccessOthers, X: p.num}, p.others.num, p.comment()))
		}
	}
	slices.SortFunc(e.newRows, func(a, b row) int {
		return cmp.Or(cmp.Compare(a.p.num, b.p.num), cmp.Compare(a.i.num, b.i.num))
	})
	for _, r := range e.newRows {
		if c := r.p.rows[r.i]; c != nil && r.i.rows != nil {
			write(c)
			ops = append(ops, add(Key{Map: Access, X: r.p.num, Y: r.i.num}, c.num, ""))
		}
	}
	return append(classes, ops...)
}

func (p *profile) comment() string {
	text := ""
	for i, t := range p.parts {
		if i > 0 {
			text += " "
		}
		text += t.id.String()
	}
	return text
}

// drops releases what lost its last user.
func (pl *plan) drops() []Op {
	e := pl.e
	var drops []Op
	drop := func(k Key, v uint32) { drops = append(drops, remove(k, v)) }
	release := func(p *profile) {
		if p != nil && p.users == 0 && p.rows != nil {
			e.releaseProfile(p, drop)
			e.retired = true
		}
	}
	for _, t := range pl.turns {
		release(t.from)
	}
	for key, m := range pl.meets {
		if m != key[0] && m != key[1] {
			m.users--
			release(m)
		}
	}
	for _, i := range e.looseIdentities {
		if i.members == 0 && i.rows != nil {
			e.releaseIdentity(i, drop)
		}
	}
	e.releaseClasses(drop)
	slices.SortFunc(drops, func(a, b Op) int { return compareKey(a.Key, b.Key) })
	return drops
}

func compareKey(a, b Key) int {
	return cmp.Or(cmp.Compare(a.Map, b.Map), cmp.Compare(a.X, b.X), cmp.Compare(a.Y, b.Y), cmp.Compare(a.Protocol, b.Protocol),
		cmp.Compare(a.First, b.First), cmp.Compare(a.Last, b.Last), a.Addr.Compare(b.Addr), a.To.Compare(b.To))
}

// finish ends the change in hand.
func (e *Engine) finish() {
	for _, a := range e.freshAtoms {
		a.fresh = false
	}
	for _, u := range e.freshNames {
		u.fresh = false
	}
	for _, p := range e.freshProfiles {
		p.fresh = false
	}
	for _, i := range e.freshIdentities {
		i.moved, i.prev = false, nil
	}
	for r := range e.dirty {
		if r.owner == nil && r.id == nil && r.prof == [2]*profile{} {
			delete(e.addresses, r.addr)
		}
	}
	e.dirty = map[*address]claim{}
	e.forgetSignatures()
	e.freshAtoms, e.freshNames, e.freshProfiles, e.freshIdentities = nil, nil, nil, nil
	e.newRows, e.looseIdentities = nil, nil
}
