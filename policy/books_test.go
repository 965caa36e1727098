package policy

import (
	"fmt"
	"maps"
	"slices"
)

// CheckBooks reports what an engine remembers wrongly between changes: counts of uses,
// indices, and numbers that nothing has. Decisions would show most of these only much
// later, or never (what is not forgotten costs memory). tidy: Tidy was called last.
func CheckBooks(e *Engine, tidy bool) error {
	b := &books{e: e}
	b.want(len(e.loose)+len(e.looseClasses) == 0, "%d signatures and %d classes are to be looked at", len(e.loose), len(e.looseClasses))
	for _, c := range e.classes {
		b.want(c.refs > 0, "class %v is remembered", c)
	}
	b.checkInput()
	b.checkRules()
	b.checkNumbers()
	b.checkRows()
	b.checkNets()
	b.checkDone()
	if tidy {
		b.checkTidy()
	}
	return b.err
}

// SetMaxStep bounds the ops of a step, so that small tests have many.
func SetMaxStep(e *Engine, ops int) { e.maxStep = ops }

type books struct {
	e   *Engine
	err error
}

func (b *books) want(ok bool, format string, args ...any) {
	if !ok && b.err == nil {
		b.err = fmt.Errorf("books: "+format, args...)
	}
}

func keysOf[K comparable, V any](m map[K]V) map[K]bool {
	out := map[K]bool{}
	for k := range m {
		out[k] = true
	}
	return out
}

func (b *books) checkInput() {
	e := b.e
	claims := map[string][]*pod{}
	live, locals := map[groupKey]int{}, map[*pod]bool{}
	for _, p := range e.pods {
		if !p.live() {
			b.want(p.group == nil, "%v is in a group", p.Name)
			continue
		}
		g := e.groups[groupKey{p.Namespace, p.Labels}]
		b.want(g != nil && p.group == g && g.pods[p.slot] == p && g.ns == e.namespaces[p.Namespace], "%v has no place", p.Name)
		live[groupKey{p.Namespace, p.Labels}]++
		if e.isLocal(p) {
			locals[p] = true
		}
		for _, a := range p.Addrs {
			if !slices.Contains(claims[a.String()], p) {
				claims[a.String()] = append(claims[a.String()], p)
			}
		}
	}
	localAddresses := 0
	for _, r := range e.addresses {
		c := claims[r.addr.String()]
		b.want(len(c) > 0 || r.id != nil, "%v is remembered", r.addr)
		var owner *pod
		for _, p := range c {
			if owner == nil || p.outranks(owner) {
				owner = p
			}
		}
		b.want(r.owner == owner, "owner of %v", r.addr)
		b.want(len(r.claims) == len(c) && len(c) > 1 || len(c) <= 1 && r.claims == nil, "claims on %v", r.addr)
		isLocal := owner != nil && e.isLocal(owner)
		_, listed := e.locals[r]
		b.want(r.local == isLocal && listed == isLocal, "%v local", r.addr)
		if isLocal {
			localAddresses++
			b.want(r.prof == e.demanded(owner), "profiles of %v", r.addr)
		}
	}
	b.want(len(e.locals) == localAddresses, "local addresses")
	b.want(len(e.groups) == len(live), "groups %d, want %d", len(e.groups), len(live))
	b.checkNamespaces(live, locals)
}

func (b *books) checkNamespaces(live map[groupKey]int, locals map[*pod]bool) {
	e := b.e
	labelled, groups, local := 0, 0, 0
	for name, ns := range e.namespaces {
		b.want(ns.exists || len(ns.groups) > 0 || len(ns.local) > 0, "namespace %s is remembered", name)
		for k, v := range ns.labels.All() {
			_, ok := e.labelled[k+"\x00"+v][ns]
			b.want(ok, "label of %s", name)
			labelled++
		}
		groups += len(ns.groups)
		for p := range ns.local {
			b.want(locals[p], "%v is local", p.Name)
		}
		local += len(ns.local)
		for _, g := range ns.groups {
			b.want(len(g.pods) == live[groupKey{name, g.labels}], "pods of a group of %s", name)
			b.want(slices.Equal(g.atoms, e.match(g)), "peer groups of %s %s", name, g.labels)
		}
	}
	for k, m := range e.labelled {
		b.want(len(m) > 0, "label %q is remembered", k)
		labelled -= len(m)
	}
	b.want(labelled == 0 && groups == len(live) && local == len(locals), "labels %d, groups %d, local pods %d of namespaces", labelled, groups, local)
}

// uses is what the rules in force use.
type uses struct {
	parts    map[*part]int
	atoms    map[*atom]int
	names    map[*nameUse]int
	profiles map[*atom]map[*profile]bool
}

func (b *books) uses() uses {
	u := uses{map[*part]int{}, map[*atom]int{}, map[*nameUse]int{}, map[*atom]map[*profile]bool{}}
	for _, p := range b.e.profiles {
		for _, t := range p.parts {
			u.parts[t]++
			for _, r := range t.rules {
				for _, a := range [2]*atom{r.peers, r.notPeers} {
					if a != nil && u.profiles[a] == nil {
						u.profiles[a] = map[*profile]bool{}
					}
					if a != nil {
						u.profiles[a][p] = true
					}
				}
			}
		}
	}
	for t := range u.parts {
		for _, r := range t.rules {
			for _, a := range [2]*atom{r.peers, r.notPeers} {
				if a != nil {
					u.atoms[a]++
				}
			}
			for _, n := range r.body.names {
				if t.dir == Egress {
					u.names[b.e.names(r.peers)[n]]++
				}
			}
		}
	}
	return u
}

func (b *books) checkRules() {
	e := b.e
	u := b.uses()
	for t, n := range u.parts {
		live := slices.DeleteFunc(slices.Clone(t.source), func(r Rule) bool { return r.Peers != nil && len(r.Peers) == 0 || r.Ports != nil && len(r.Ports) == 0 })
		b.want(len(t.rules) == len(live), "%v has %d rules in force, want %d", t.id, len(t.rules), len(live))
		b.want(t.refs == n, "%v is in %d profiles, counted %d", t.id, n, t.refs)
		for _, r := range t.rules {
			b.want(e.bodies[r.body.key] == r.body && e.bodyByID[r.body.id] == r.body, "body of a rule of %v", t.id)
		}
	}
	filed := 0
	names := slices.Collect(maps.Values(e.anyNames))
	for key, a := range e.atoms {
		b.want(a.key == key && a.refs == u.atoms[a] && !a.fresh, "peer group %v is used %d times, counted %d", a, u.atoms[a], a.refs)
		b.want(maps.Equal(keysOf(a.profiles), u.profiles[a]) || len(a.profiles)+len(u.profiles[a]) == 0, "profiles that look at %v", a)
		for _, s := range a.pods {
			b.want(slices.Contains(e.peerIndex[bucket(s)], peerSelector{s, a}), "index of %v", a)
			filed++
		}
		for i := range a.identities {
			b.want(slices.Contains(i.sig.peers(), a), "identity of %v", a)
		}
		names = slices.AppendSeq(names, maps.Values(a.names))
	}
	for _, n := range names {
		b.want(n.refs == u.names[n] && !n.fresh, "a name is used %d times, counted %d", u.names[n], n.refs)
	}
	subjects := 0
	for _, l := range e.subjects {
		subjects += len(l)
		b.want(len(l) > 0, "empty bucket")
	}
	for _, p := range e.policies {
		b.want(slices.Contains(e.subjects[bucket(&p.Subject)], p), "index of %v", p.ID)
	}
	for _, l := range e.peerIndex {
		filed -= len(l)
		b.want(len(l) > 0, "empty bucket")
	}
	b.want(subjects == len(e.policies) && filed == 0, "indices of selectors")
	b.want(len(e.atoms)+len(e.freeAtoms) == int(e.lastAtom), "numbers of peer groups: %d used, %d free of %d", len(e.atoms), len(e.freeAtoms), e.lastAtom)
}

func (b *books) checkNumbers() {
	e := b.e
	profiles := [2]map[uint32]struct{}{{}, {}}
	users := map[*profile]int{}
	for r := range e.locals {
		for _, p := range r.prof {
			if p != nil {
				users[p]++
			}
		}
	}
	for key, p := range e.profiles {
		profiles[p.dir][p.num] = struct{}{}
		b.want(e.profileNumbers(p.dir).valid(p.num), "%v profile %x", p.dir, p.num)
		b.want(p.key == key && p.users == users[p] && p.users > 0 && !p.fresh, "profile %x has %d users, counted %d", p.num, users[p], p.users)
		for _, n := range p.anyNames {
			_, ok := e.nameProfiles[n][p]
			b.want(ok, "profile %x is not filed under %s", p.num, n.name)
		}
	}
	b.want(len(users) == len(e.profiles), "%d profiles are in use, %d known", len(users), len(e.profiles))
	b.want(maps.Equal(e.ingressNumbers.used, profiles[Ingress]) && maps.Equal(e.egressNumbers.used, profiles[Egress]), "numbers of profiles")
	identities, members, aliases := map[uint32]struct{}{}, map[*identity]int{}, map[*signature]int{}
	for _, r := range e.addresses {
		members[r.id]++
	}
	for _, r := range e.nets.ranges {
		members[r.id]++
	}
	for num, i := range e.identities {
		identities[i.num] = struct{}{}
		b.want(e.identityNumbers.valid(i.num), "identity %x", i.num)
		aliases[i.sig]++
		b.want(num == i.num && members[i] == i.members && i.members > 0, "identity %x has %d members, counted %d", num, members[i], i.members)
		b.want(!i.moved && i.prev == nil, "identity %x is unfinished", num)
		if i.sig == nil {
			continue // its members came to be like all others; Tidy lets them go
		}
		b.want(e.signatures[i.sig.key] == i.sig, "signature of identity %x", num)
		for _, a := range i.sig.atoms {
			_, ok := a.identities[i]
			b.want(ok, "identity %x is not filed under %v", num, a)
		}
		for _, n := range i.sig.named {
			_, ok := e.nameIdentities[n.portName][i]
			b.want(ok, "identity %x is not filed under %s", num, n.name)
		}
	}
	b.want(maps.Equal(e.identityNumbers.used, identities), "numbers of identities")
	for _, s := range e.signatures {
		b.want(s.aliases == aliases[s] && s.aliases > 0, "signature %v has %d identities, counted %d", s, aliases[s], s.aliases)
		b.want(s.primary == nil && (s.aliases == 0 || e.untidy) || s.primary != nil && s.primary.sig == s && e.identities[s.primary.num] == s.primary, "primary identity of %v", s)
	}
}

func (b *books) checkRows() {
	e := b.e
	refs, rows := map[*class]int{}, 0
	for _, p := range e.profiles {
		b.want(p.others == e.classify(p, nil), "others of profile %x", p.num)
		refs[p.others]++
		for i, c := range p.rows {
			refs[c]++
			b.want(i.rows[p] == c && c != p.others && e.identities[i.num] == i, "row of profile %x", p.num)
		}
		for _, i := range e.identities {
			b.want(p.at(i) == e.classify(p, i.sig), "class of profile %x and identity %x", p.num, i.num)
		}
		rows += len(p.rows)
	}
	for _, i := range e.identities {
		rows -= len(i.rows)
	}
	b.want(rows == 0, "rows of identities")
	numbers, walks := map[uint32]struct{}{}, 0
	for key, c := range e.classes {
		if refs[c] == 0 {
			continue // classify above may have made it
		}
		numbers[c.num] = struct{}{}
		b.want(e.classNumbers.valid(c.num), "class %x", c.num)
		b.want(c.key == key && c.refs == refs[c] && c.written, "class %v is used %d times, counted %d", c, refs[c], c.refs)
		for _, w := range c.walks {
			b.want(e.walks[w] == c, "walk of %v", c)
		}
		walks += len(c.walks)
		b.want(shortly(c), "class %v is not written shortly", c)
	}
	b.want(maps.Equal(e.classNumbers.used, numbers) && walks == len(e.walks), "numbers of classes or walks")
	for n, m := range e.nameIdentities {
		for i := range m {
			b.want(slices.ContainsFunc(i.sig.ports(), func(p namedPort) bool { return p.portName == n }), "identity filed under %s", n.name)
		}
	}
	for n, m := range e.nameProfiles {
		for p := range m {
			b.want(slices.Contains(p.anyNames, n) && e.profiles[p.key] == p, "profile filed under %s", n.name)
		}
	}
}

// shortly says that no shorter list of spans means the same.
func shortly(c *class) bool {
	for i, s := range c.spans {
		if s.last < s.first || s.code == c.rest {
			return false
		}
		if i == 0 {
			continue
		}
		if p := c.spans[i-1]; p.protocol > s.protocol || p.protocol == s.protocol && (p.last >= s.first || p.last+1 == s.first && p.code == s.code) {
			return false
		}
	}
	return true
}

func (b *books) checkNets() {
	e := b.e
	for i, r := range e.nets.ranges {
		b.want(r.id != nil && r.id.sig == r.sig && e.identities[r.id.num] == r.id, "identity of %v", r.from)
		b.want(!r.to.Less(r.from), "range %v to %v", r.from, r.to)
		if i > 0 {
			last := e.nets.ranges[i-1]
			b.want(last.to.Less(r.from) && (last.to.Next() != r.from || last.id != r.id), "ranges at %v", r.from)
		}
	}
	for _, r := range e.addresses {
		full, net := e.sign(r, true)
		b.want(r.id != nil || full == net, "%v needs an element", r.addr)
		b.want(r.id == nil || r.id.sig == full, "%v has an identity for %v, it is %v", r.addr, r.id.signature(), full)
	}
}

func (b *books) checkDone() {
	e := b.e
	b.want(len(e.dirty)+len(e.dirtyPods)+len(e.freshAtoms)+len(e.freshNames)+len(e.freshIdentities)+len(e.freshProfiles) == 0, "the change in hand is not over")
	b.want(len(e.newRows)+len(e.looseIdentities) == 0 && !e.netDirty && e.adopted == nil, "the change in hand is not over")
	b.want(len(e.covered) == 0, "%d pairs of classes are remembered", len(e.covered))
	e.forgetSignatures() // checkNets asks for signatures
	e.releaseClasses(func(Key, uint32) {})
}

// checkTidy compares sizes with an engine that started with this cluster.
func (b *books) checkTidy() {
	e, f := b.e, NewEngine(b.e.node)
	f.Replace(e.Cluster())
	f.Tidy()
	b.want(!e.untidy, "untidy after Tidy")
	for _, a := range e.atoms {
		for n, u := range a.names {
			b.want(u.refs > 0, "name %s of %v is remembered", n.name, a)
		}
	}
	for _, i := range e.identities {
		b.want(i.sig != nil, "identity %x tells nothing", i.num)
	}
	for name, n := range map[string][2]int{
		"peer groups": {len(e.atoms), len(f.atoms)}, "signatures": {len(e.signatures), len(f.signatures)}, "identities": {len(e.identities), len(f.identities)},
		"profiles": {len(e.profiles), len(f.profiles)}, "classes": {len(e.classes), len(f.classes)}, "addresses": {len(e.addresses), len(f.addresses)},
		"groups": {len(e.groups), len(f.groups)}, "namespaces": {len(e.namespaces), len(f.namespaces)}, "nodes": {len(e.nodes), len(f.nodes)},
		"names": {len(e.anyNames), len(f.anyNames)}, "ranges": {len(e.nets.ranges), len(f.nets.ranges)},
	} {
		b.want(n[0] == n[1], "%d %s, from scratch %d", n[0], name, n[1])
	}
}
