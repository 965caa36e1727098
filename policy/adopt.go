package policy

import (
	"cmp"
	"encoding/binary"
	"maps"
	"slices"
)

// Adopt tells the engine what the kernel holds from a predecessor. It must come before
// the first Replace, which then keeps every number whose content is still right: with
// the same cluster its delta is empty, otherwise it holds the difference, in steps that
// are as exact as those of any other delta.
func (e *Engine) Adopt(kernel Tables) { e.adopted = kernel }

// adoption matches the numbers of an engine that compiled from scratch with a kernel's.
type adoption struct {
	e          *Engine
	kernel     Tables
	spans      map[uint32][]span
	classes    map[string]uint32 // content -> number
	rows       map[uint32]map[uint32]uint32
	identities map[*identity]uint32
	byIdentity map[uint32]*identity
	profiles   map[*profile]uint32

	// The way from the kernel's to the engine's, see transition.go.
	ranges    []rangeValue // of the kernel
	pieces    []netRange
	shifts    []shift
	renamings map[renaming]bool // true: some address is local
	changed   map[renaming]bool // those that change the number
	contents  map[uint32]*class
	crossings []crossing
	left      []uint32 // profiles that some crossing leaves
	opposite  opposition
	targets   map[targetKey]*identity
	sources   map[*identity]uint32 // what those that left profiles do not know come from
}

func (e *Engine) adopt() Delta {
	a := &adoption{
		e: e, kernel: e.adopted, spans: map[uint32][]span{}, classes: map[string]uint32{}, rows: map[uint32]map[uint32]uint32{},
		byIdentity: map[uint32]*identity{}, contents: map[uint32]*class{}, targets: map[targetKey]*identity{}, sources: map[*identity]uint32{},
	}
	e.adopted = nil
	e.settle()
	a.read()
	a.identities = elect(a.identityVotes())
	for i, n := range a.identities {
		a.byIdentity[n] = i
	}
	a.renumberClasses()
	a.profiles = elect(a.profileVotes())
	for p, n := range a.profiles {
		if !a.sameProfile(p, n) {
			delete(a.profiles, p)
		}
	}
	a.findShifts()
	a.chooseProfiles()
	a.renumber()
	a.applyShifts()
	return a.steps()
}

// read gathers the kernel's classes and rows.
func (a *adoption) read() {
	rest := map[uint32]uint32{}
	for k, v := range a.kernel {
		switch k.Map {
		case AccessPort:
			a.spans[k.X] = append(a.spans[k.X], span{k.Protocol, k.First, k.First, uint8(v)})
		case AccessRange:
			a.spans[k.X] = append(a.spans[k.X], span{k.Protocol, k.First, k.Last, uint8(v)})
		case AccessRest:
			rest[k.X] = v
		case Access:
			if a.rows[k.X] == nil {
				a.rows[k.X] = map[uint32]uint32{}
			}
			a.rows[k.X][k.Y] = v
		}
	}
	for _, spans := range a.spans {
		slices.SortFunc(spans, func(x, y span) int {
			return cmp.Or(cmp.Compare(x.protocol, y.protocol), cmp.Compare(x.first, y.first))
		})
	}
	for n, r := range rest {
		key := classKey(uint8(r), a.spans[n])
		if old, ok := a.classes[key]; ok {
			n = min(n, old)
		}
		a.classes[key] = n
	}
}

func classKey(rest uint8, spans []span) string {
	key := []byte{rest}
	for _, s := range spans {
		key = append(key, byte(s.protocol), s.code)
		key = binary.BigEndian.AppendUint16(key, s.first)
		key = binary.BigEndian.AppendUint16(key, s.last)
	}
	return string(key)
}

// vote is how many elements of what have number n in the kernel.
type vote[T comparable] struct {
	what  T
	order uint32
	n     uint32
	count int
}

// elect gives each number to the one that most elements speak for, and one only.
func elect[T comparable](votes map[T]map[uint32]int, order func(T) uint32) map[T]uint32 {
	var all []vote[T]
	for what, ns := range votes {
		for n, count := range ns {
			all = append(all, vote[T]{what, order(what), n, count})
		}
	}
	slices.SortFunc(all, func(x, y vote[T]) int {
		return cmp.Or(cmp.Compare(y.count, x.count), cmp.Compare(x.order, y.order), cmp.Compare(x.n, y.n))
	})
	out, taken := map[T]uint32{}, map[uint32]bool{}
	for _, v := range all {
		if _, ok := out[v.what]; !ok && !taken[v.n] {
			out[v.what], taken[v.n] = v.n, true
		}
	}
	return out
}

func (a *adoption) identityVotes() (map[*identity]map[uint32]int, func(*identity) uint32) {
	votes := map[*identity]map[uint32]int{}
	cast := func(i *identity, k Key) {
		n, ok := a.kernel[k]
		if i == nil || !ok || !a.e.identityNumbers.valid(n) {
			return
		}
		if votes[i] == nil {
			votes[i] = map[uint32]int{}
		}
		votes[i][n]++
	}
	for _, r := range a.e.addresses {
		cast(r.id, Key{Map: PodID, Addr: r.addr})
	}
	for _, r := range a.e.nets.ranges {
		cast(r.id, Key{Map: NetID, Addr: r.from, To: r.to})
	}
	return votes, func(i *identity) uint32 { return i.num }
}

func (a *adoption) profileVotes() (map[*profile]map[uint32]int, func(*profile) uint32) {
	votes := map[*profile]map[uint32]int{}
	for r := range a.e.locals {
		for _, d := range Directions {
			n, ok := a.kernel[Key{Map: profileMap(d), Addr: r.addr}]
			if p := r.prof[d]; p != nil && ok && a.e.profileNumbers(d).valid(n) {
				if votes[p] == nil {
					votes[p] = map[uint32]int{}
				}
				votes[p][n]++
			}
		}
	}
	return votes, func(p *profile) uint32 { return p.num }
}

// sameProfile reports whether the kernel's profile n decides as p does for all others
// and for every identity whose number is kept.
func (a *adoption) sameProfile(p *profile, n uint32) bool {
	if v, ok := a.kernel[Key{Map: AccessOthers, X: n}]; !ok || v != p.others.num {
		return false
	}
	for i, c := range p.rows {
		if k, ok := a.identities[i]; ok && a.rows[n][k] != c.num {
			return false
		}
	}
	for k := range a.rows[n] {
		if i := a.byIdentity[k]; i != nil && p.rows[i] == nil {
			return false
		}
	}
	return true
}

// renumberClasses gives classes the numbers of the kernel's with the same content.
func (a *adoption) renumberClasses() {
	e := a.e
	e.classNumbers.avoid(func(yield func(uint32)) {
		for k, v := range a.kernel {
			switch k.Map {
			case Access, AccessOthers:
				yield(v)
			case AccessPort, AccessRange, AccessRest:
				yield(k.X)
			}
		}
	})
	all := slices.SortedFunc(maps.Values(e.classes), func(x, y *class) int { return cmp.Compare(x.num, y.num) })
	for _, c := range all {
		n := a.classes[c.key]
		if !e.classNumbers.valid(n) {
			n = e.classNumbers.next()
		}
		c.num = n
	}
}

// renumber does the same for identities and profiles.
func (a *adoption) renumber() {
	e := a.e
	e.identityNumbers.avoid(func(yield func(uint32)) {
		for k, v := range a.kernel {
			switch k.Map {
			case PodID, NetID:
				yield(v)
			case Access:
				yield(k.Y)
			}
		}
	})
	all := e.sortedIdentities()
	e.identities = map[uint32]*identity{}
	for _, i := range all {
		n, ok := a.identities[i]
		if !ok {
			n = e.identityNumbers.next()
		}
		i.num = n
		e.identities[n] = i
	}
	for _, d := range Directions {
		a.renumberProfiles(d)
	}
}

func (a *adoption) renumberProfiles(d Direction) {
	numbers := a.e.profileNumbers(d)
	numbers.avoid(func(yield func(uint32)) {
		for k, v := range a.kernel {
			switch k.Map {
			case IngressProfile, EgressProfile:
				yield(v)
			case Access, AccessOthers:
				yield(k.X)
			}
		}
	})
	all := slices.SortedFunc(maps.Values(a.e.profiles), func(x, y *profile) int { return cmp.Compare(x.num, y.num) })
	for _, p := range all {
		if p.dir != d {
			continue
		}
		n, ok := a.profiles[p]
		if !ok {
			n = numbers.next()
		}
		p.num = n
	}
}

// freeNumbers lets go of the numbers that only the kernel had, once all that the change
// needs are handed out.
func (a *adoption) freeNumbers() {
	e := a.e
	e.classNumbers.keep(func(yield func(uint32)) {
		for _, c := range e.classes {
			yield(c.num)
		}
	})
	e.identityNumbers.keep(func(yield func(uint32)) {
		for n := range e.identities {
			yield(n)
		}
	})
	for _, d := range Directions {
		e.profileNumbers(d).keep(func(yield func(uint32)) {
			for _, p := range e.profiles {
				if p.dir == d {
					yield(p.num)
				}
			}
		})
	}
}

// sortedOps sorts ops, in which deletes are before adds.
func sortedOps(ops []Op) []Op {
	slices.SortStableFunc(ops, func(x, y Op) int { return compareKey(x.Key, y.Key) })
	return ops
}
