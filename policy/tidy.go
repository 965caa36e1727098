package policy

import (
	"cmp"
	"slices"
)

// Tidy returns the delta that removes what past deltas left behind because removing it
// would not have been exact while packets were in flight: identities that no rule tells
// apart any more are merged and elements no rule needs are deleted. Call it when idle.
func (e *Engine) Tidy() Delta {
	if !e.untidy {
		return Delta{}
	}
	e.untidy = false
	e.forgetAtoms()
	pl := &plan{e: e, oldNets: e.nets}
	winner := e.mergeIdentities()
	pieces := cut(e.decompose(), e.nets.ranges)
	for i := range pieces {
		pieces[i].id = winner[pieces[i].sig]
	}
	pl.writeNets(pieces)
	all := map[*address]claim{}
	for _, r := range e.addresses {
		if r.id != nil {
			all[r] = claim{}
		}
	}
	for _, r := range sortedAddresses(all) {
		s := r.id.sig
		pl.writeMove(r, r.id, winner[s], r.owner != nil && s != e.nets.find(r.addr))
		if r.owner == nil {
			e.touch(r)
		}
	}
	return pl.delta()
}

// forgetAtoms removes the peer groups and names that no rule in force uses.
func (e *Engine) forgetAtoms() {
	gone := map[*atom]bool{}
	for key, a := range e.atoms {
		if a.refs > 0 {
			forgetNames(a.names)
			continue
		}
		gone[a] = true
		e.freeAtoms = append(e.freeAtoms, a.id)
		delete(e.atoms, key)
		for _, s := range a.pods {
			e.peerIndex.remove(s, peerSelector{s, a})
		}
	}
	forgetNames(e.anyNames)
	e.forgetBodies()
	if len(gone) == 0 {
		return
	}
	for _, g := range e.groups {
		if slices.ContainsFunc(g.atoms, func(a *atom) bool { return gone[a] }) {
			g.atoms = slices.DeleteFunc(slices.Clone(g.atoms), func(a *atom) bool { return gone[a] })
		}
	}
}

// forgetBodies lets go of what rules that are gone did, and of all walks.
func (e *Engine) forgetBodies() {
	live := map[string]*body{}
	for _, p := range e.profiles {
		for _, t := range p.parts {
			for _, r := range t.rules {
				live[r.body.key] = r.body
			}
		}
	}
	e.bodies, e.bodyByID = live, map[uint32]*body{}
	for _, b := range live {
		b.resolved = nil
		e.bodyByID[b.id] = b
	}
	clear(e.walks)
	for _, c := range e.classes {
		c.walks = nil
	}
}

func forgetNames(names map[portName]*nameUse) {
	for n, u := range names {
		if u.refs == 0 {
			delete(names, n)
		}
	}
}

// mergeIdentities strips the identities of what is gone and picks, for each signature
// that is left, the identity with the most members.
func (e *Engine) mergeIdentities() map[*signature]*identity {
	all := e.sortedIdentities()
	slices.SortFunc(all, func(a, b *identity) int {
		return cmp.Or(cmp.Compare(b.members, a.members), cmp.Compare(a.num, b.num))
	})
	for _, i := range all {
		if i.sig != nil {
			e.setSignature(i, e.strip(i.sig))
		}
	}
	winner := map[*signature]*identity{}
	for _, i := range all {
		if i.sig != nil && winner[i.sig] == nil {
			winner[i.sig] = i
			i.sig.primary = i
		}
	}
	return winner
}

// strip is s without the peer groups and names that are gone.
func (e *Engine) strip(s *signature) *signature {
	atoms := slices.DeleteFunc(slices.Clone(s.atoms), func(a *atom) bool { return a.refs == 0 })
	named := slices.DeleteFunc(slices.Clone(s.named), func(n namedPort) bool { return !e.nameRelevant(atoms, n.portName, true) })
	return e.intern(atoms, named)
}
