package policy

import (
	"encoding/binary"
	"slices"
)

// class is an interned function (protocol, port) -> code.
type class struct {
	num     uint32
	key     string
	rest    uint8
	spans   []span // sorted, disjoint, never of code rest, adjacent ones differ
	refs    int
	walks   []string // memo keys that lead here
	written bool
}

// span is a range of ports of one protocol with the same code.
type span struct {
	protocol    Protocol
	first, last uint16
	code        uint8
}

func (c *class) code(p Protocol, port uint16) uint8 {
	for _, s := range c.spans {
		if s.protocol == p && s.first <= port && port <= s.last {
			return s.code
		}
	}
	return c.rest
}

// elements yields the elements that hold c.
func (c *class) elements(yield func(Key, uint32)) {
	for _, s := range c.spans {
		k := Key{Map: AccessRange, X: c.num, Protocol: s.protocol, First: s.first, Last: s.last}
		if s.first == s.last {
			k.Map, k.Last = AccessPort, 0
		}
		yield(k, uint32(s.code))
	}
	yield(Key{Map: AccessRest, X: c.num}, uint32(c.rest))
}

// internClass returns the class with this content, making it when there is none.
func (e *Engine) internClass(rest uint8, spans []span) *class {
	key := classKey(rest, spans)
	c := e.classes[key]
	if c == nil {
		c = &class{num: e.classNumbers.next(), key: key, rest: rest, spans: spans}
		e.classes[c.key] = c
		e.looseClasses = append(e.looseClasses, c)
	}
	return c
}

// walk markers: a tier ends, and denies what it did not decide or does not.
const (
	tierEnds   uint32 = 0
	tierDenies uint32 = 1
	firstBody  uint32 = 2
)

// classify returns the class of the addresses of s for profile p (s nil: of every
// address that no rule names).
func (e *Engine) classify(p *profile, s *signature) *class {
	e.mark(s)
	walk := e.walk[:0]
	start := 0
	for i, t := range p.parts {
		for _, r := range t.rules {
			if r.peers != nil && !e.marked(r.peers) || r.notPeers != nil && e.marked(r.notPeers) {
				continue
			}
			named := p.named
			if p.dir == Egress {
				named = s.ports()
			}
			walk = append(walk, e.resolve(r.body, named).id)
		}
		if i+1 < len(p.parts) && p.parts[i+1].tier == t.tier {
			continue
		}
		walk = e.canonicalTier(walk, start)
		walk = append(walk, p.tierEnd(i))
		start = len(walk)
	}
	e.walk = walk
	return e.walkClass(walk)
}

// tierEnd is the marker for the tier whose last policy is parts[i].
func (p *profile) tierEnd(i int) uint32 {
	for j := i; j >= 0 && p.parts[j].tier == p.parts[i].tier; j-- {
		if p.parts[j].isolates {
			return tierDenies
		}
	}
	return tierEnds
}

// canonicalTier sorts walk[start:] when order cannot matter, for more memo hits.
func (e *Engine) canonicalTier(walk []uint32, start int) []uint32 {
	for _, id := range walk[start:] {
		if !e.bodyByID[id].plain() {
			return walk
		}
	}
	slices.Sort(walk[start:])
	return walk[:start+len(slices.Compact(walk[start:]))]
}

func (e *Engine) mark(s *signature) {
	e.epoch++
	for int(e.lastAtom) >= len(e.marks) {
		e.marks = append(e.marks, 0)
	}
	if s != nil {
		for _, a := range s.atoms {
			e.marks[a.id] = e.epoch
		}
	}
}

func (e *Engine) marked(a *atom) bool { return e.marks[a.id] == e.epoch }

func (e *Engine) walkClass(walk []uint32) *class {
	key := e.walkKey[:0]
	for _, w := range walk {
		key = binary.BigEndian.AppendUint32(key, w)
	}
	e.walkKey = key
	if c := e.walks[string(key)]; c != nil {
		return c
	}
	c := e.buildClass(walk)
	k := string(key)
	c.walks = append(c.walks, k)
	e.walks[k] = c
	return c
}

// buildClass evaluates the walk on every stretch of ports that no rule tells apart.
func (e *Engine) buildClass(walk []uint32) *class {
	cuts := map[Protocol][]uint32{}
	for _, w := range walk {
		if w < firstBody {
			continue
		}
		b := e.bodyByID[w]
		for _, m := range slices.Concat(b.ports, b.notPorts) {
			for _, p := range m.protocols() {
				cuts[p] = append(cuts[p], uint32(m.First), uint32(m.Last)+1)
			}
		}
	}
	rest := e.walkCode(walk, func(m PortMatch) bool { return m.everything() })
	var spans []span
	for _, p := range sortedProtocols(cuts) {
		stretches(cuts[p], func(first, last uint16) {
			code := e.walkCode(walk, func(m PortMatch) bool {
				return m.everything() || slices.Contains(m.protocols(), p) && m.First <= first && last <= m.Last
			})
			spans = appendSpan(spans, span{p, first, last, code}, rest)
		})
	}
	return e.internClass(rest, spans)
}

func sortedProtocols(cuts map[Protocol][]uint32) []Protocol {
	out := make([]Protocol, 0, len(cuts))
	for p := range cuts {
		out = append(out, p)
	}
	slices.Sort(out)
	return out
}

// stretches yields the ranges between neighbouring cuts (the first port of a range, and
// the one behind its last).
func stretches(cuts []uint32, yield func(first, last uint16)) {
	slices.Sort(cuts)
	cuts = slices.Compact(cuts)
	for i := 0; i+1 < len(cuts); i++ {
		yield(uint16(cuts[i]), uint16(cuts[i+1]-1))
	}
}

func appendSpan(spans []span, s span, rest uint8) []span {
	if s.code == rest {
		return spans
	}
	if n := len(spans) - 1; n >= 0 && spans[n].protocol == s.protocol && spans[n].code == s.code && spans[n].last+1 == s.first {
		spans[n].last = s.last
		return spans
	}
	return append(spans, s)
}

// everything reports whether m matches every protocol and port.
func (m PortMatch) everything() bool {
	return m.Protocol == AnyProtocol && m.First == 0 && m.Last == 65535
}

// protocols lists the protocols that m, without a name, restricts to ports.
func (m PortMatch) protocols() []Protocol {
	switch {
	case m.everything():
		return nil
	case m.Protocol == AnyProtocol:
		return []Protocol{TCP, UDP, SCTP}
	}
	return []Protocol{m.Protocol}
}

// walkCode goes through the tiers for one stretch of ports; in says which port matches hold it.
func (e *Engine) walkCode(walk []uint32, in func(PortMatch) bool) uint8 {
	log, passed := false, false
	for _, w := range walk {
		switch {
		case w == tierDenies && !passed:
			return actionCode(Deny, log)
		case w < firstBody:
			passed = false
			continue
		case passed:
			continue
		}
		b := e.bodyByID[w]
		if !slices.ContainsFunc(b.ports, in) || slices.ContainsFunc(b.notPorts, in) {
			continue
		}
		log = log || b.log || b.action == Log
		switch b.action {
		case Pass:
			passed = true
		case Allow, Deny:
			return actionCode(b.action, log)
		}
	}
	return actionCode(Allow, log)
}

func actionCode(a Action, log bool) uint8 {
	code := CodeAllow
	if a == Deny {
		code = CodeDeny
	}
	if log {
		code += CodeAllowLog - CodeAllow
	}
	return uint8(code)
}

func allows(code uint8) bool { return uint32(code) == CodeAllow || uint32(code) == CodeAllowLog }

// pair yields the codes of a and b on every stretch that neither tells apart, and at
// last those of all other protocols (whole false).
func pair(a, b *class, yield func(p Protocol, first, last uint16, ca, cb uint8)) {
	cuts := map[Protocol][]uint32{}
	for _, s := range slices.Concat(a.spans, b.spans) {
		cuts[s.protocol] = append(cuts[s.protocol], uint32(s.first), uint32(s.last)+1)
	}
	for _, p := range sortedProtocols(cuts) {
		stretches(cuts[p], func(first, last uint16) { yield(p, first, last, a.code(p, first), b.code(p, first)) })
	}
}

// covers reports whether b allows everything that a allows.
func (e *Engine) covers(b, a *class) bool {
	if a == b {
		return true
	}
	key := [2]*class{b, a}
	if r, ok := e.covered[key]; ok {
		return r
	}
	r := allows(b.rest) || !allows(a.rest)
	pair(a, b, func(_ Protocol, _, _ uint16, ca, cb uint8) { r = r && (allows(cb) || !allows(ca)) })
	e.covered[key] = r
	return r
}

// meet returns the class that allows what both a and b allow; where they agree it is b.
func (e *Engine) meet(a, b *class) *class {
	both := func(ca, cb uint8) uint8 {
		if allows(cb) && !allows(ca) {
			return ca
		}
		return cb
	}
	rest := both(a.rest, b.rest)
	var spans []span
	pair(a, b, func(p Protocol, first, last uint16, ca, cb uint8) {
		spans = appendSpan(spans, span{p, first, last, both(ca, cb)}, rest)
	})
	return e.internClass(rest, spans)
}
