package policy

import (
	"encoding/binary"
	"slices"
)

// portNames lists the names that rules use.
func portNames(rules []Rule) []portName {
	var out []portName
	for _, r := range rules {
		for _, m := range slices.Concat(r.Ports, r.NotPorts) {
			if m.Name != "" {
				out = append(out, portName{m.Name, m.Protocol})
			}
		}
	}
	return out
}

// demanded returns the profiles that p's labels and ports demand, nil in a direction in
// which no policy selects it.
func (e *Engine) demanded(p *pod) [2]*profile {
	var parts [2][]*part
	e.subjects.candidates(p.group.ns, p.Labels, func(s *selected) {
		if !p.group.matches(&s.Subject) {
			return
		}
		for _, d := range Directions {
			if s.parts[d] != nil {
				parts[d] = append(parts[d], s.parts[d])
			}
		}
	})
	var out [2]*profile
	for _, d := range Directions {
		if len(parts[d]) == 0 {
			continue
		}
		slices.SortFunc(parts[d], compareParts)
		var named []namedPort
		if d == Ingress {
			named = p.numbers(parts[d])
		}
		out[d] = e.profile(d, parts[d], named)
	}
	return out
}

// numbers resolves the names that the rules of parts use, in their order.
func (p *pod) numbers(parts []*part) []namedPort {
	var out []namedPort
	for _, t := range parts {
		for _, n := range t.names {
			if v, ok := p.resolve(n); ok {
				out = append(out, v)
			}
		}
	}
	return out
}

// profile interns (direction, policies, numbers).
func (e *Engine) profile(d Direction, parts []*part, named []namedPort) *profile {
	key := []byte{byte(d)}
	for _, t := range parts {
		key = binary.BigEndian.AppendUint32(key, t.seq)
	}
	for _, n := range named {
		key = append(append(key, 0, 0, 0, 0, byte(n.protocol), byte(n.actual)), n.name...)
		key = binary.BigEndian.AppendUint16(append(key, 0), n.port)
	}
	if p := e.profiles[string(key)]; p != nil {
		return p
	}
	return e.newProfile(&profile{dir: d, key: string(key), parts: parts, named: named})
}

// newProfile numbers p, puts its policies in force and files it under what it looks at.
// Its rows are computed when the identities of the change are known.
func (e *Engine) newProfile(p *profile) *profile {
	e.numberProfile(p)
	e.profiles[p.key] = p
	for _, t := range p.parts {
		e.activate(t)
		for _, r := range t.rules {
			for _, a := range [2]*atom{r.peers, r.notPeers} {
				if a == nil {
					continue
				}
				if _, ok := a.profiles[p]; !ok {
					a.profiles[p] = struct{}{}
					p.atoms = append(p.atoms, a)
				}
			}
			if p.dir == Egress && r.peers == nil {
				p.anyNames = append(p.anyNames, r.body.names...)
			}
		}
	}
	for _, n := range p.anyNames {
		if e.nameProfiles[n] == nil {
			e.nameProfiles[n] = map[*profile]struct{}{}
		}
		e.nameProfiles[n][p] = struct{}{}
	}
	p.others = e.classify(p, nil)
	p.others.refs++
	return p
}

func (e *Engine) numberProfile(p *profile) {
	p.num, p.fresh, p.rows = e.profileNumbers(p.dir).next(), true, map[*identity]*class{}
	e.freshProfiles = append(e.freshProfiles, p)
}

// clone gives the meaning of p a fresh number and takes it from p.
func (e *Engine) clone(p *profile) *profile {
	return e.newProfile(&profile{dir: p.dir, key: p.key, parts: p.parts, named: p.named})
}

// releaseProfile forgets p and its rows, and yields the elements of those that were written.
func (e *Engine) releaseProfile(p *profile, drop func(Key, uint32)) {
	if e.profiles[p.key] == p {
		delete(e.profiles, p.key)
	}
	drop(Key{Map: AccessOthers, X: p.num}, p.others.num)
	e.unref(p.others)
	for i, c := range p.rows {
		drop(Key{Map: Access, X: p.num, Y: i.num}, c.num)
		delete(i.rows, p)
		e.unref(c)
	}
	for _, a := range p.atoms {
		delete(a.profiles, p)
	}
	for _, n := range p.anyNames {
		delete(e.nameProfiles[n], p)
	}
	for _, t := range p.parts {
		e.deactivate(t)
	}
	p.rows = nil
	e.profileNumbers(p.dir).free(p.num)
}

// releaseIdentity forgets i and its rows, and yields their elements.
func (e *Engine) releaseIdentity(i *identity, drop func(Key, uint32)) {
	for p, c := range i.rows {
		drop(Key{Map: Access, X: p.num, Y: i.num}, c.num)
		delete(p.rows, i)
		e.unref(c)
	}
	i.rows = nil
	e.setSignature(i, nil)
	delete(e.identities, i.num)
	e.identityNumbers.free(i.num)
}

func (e *Engine) unref(c *class) {
	c.refs--
	e.looseClasses = append(e.looseClasses, c)
}

// releaseClasses forgets the classes that nothing names, and yields their elements.
func (e *Engine) releaseClasses(drop func(Key, uint32)) {
	for _, c := range e.looseClasses {
		if c.refs > 0 || e.classes[c.key] != c {
			continue
		}
		if c.written {
			c.elements(drop)
		}
		delete(e.classes, c.key)
		e.classNumbers.free(c.num)
		for _, w := range c.walks {
			delete(e.walks, w)
		}
	}
	e.looseClasses = nil
	e.covered = map[[2]*class]bool{}
}
