package policy

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// atom is the canonical, interned peer group of rules: the union of its pod selectors
// and blocks. Two rules with the same peers share one, whatever policy they are in.
type atom struct {
	id         uint32
	key        string
	pods       []*PodSelector
	blocks     []*Block
	refs       int  // rules in force that name it; 0: kept until Tidy
	fresh      bool // made by the change in hand: no profile in use looks at it
	names      map[portName]*nameUse
	identities map[*identity]struct{}
	profiles   map[*profile]struct{}
}

func compareAtom(a, b *atom) int { return cmp.Compare(a.id, b.id) }

// portName is a named port as a rule spells it.
type portName struct {
	name     string
	protocol Protocol
}

// namedPort is what a portName means for one pod.
type namedPort struct {
	portName
	actual Protocol // of the container port
	port   uint16
}

// nameUse counts the egress rules in force that use a name with one peer group.
type nameUse struct {
	refs  int
	fresh bool
}

// peerSelector files an atom under one of its selectors.
type peerSelector struct {
	pods *PodSelector
	atom *atom
}

// part is one policy in one direction.
type part struct {
	seq      uint32 // identifies this content of the policy
	id       PolicyID
	dir      Direction
	tier     Tier
	order    int64
	isolates bool
	source   []Rule
	names    []portName // that source uses
	rules    []rule     // while refs > 0
	refs     int        // profiles
}

func compareParts(a, b *part) int {
	return cmp.Or(cmp.Compare(a.tier, b.tier), cmp.Compare(a.order, b.order), cmp.Compare(a.id.Kind, b.id.Kind),
		cmp.Compare(a.id.Namespace, b.id.Namespace), cmp.Compare(a.id.Name.Name, b.id.Name.Name))
}

// rule is a Rule in force, with its peers and its action interned.
type rule struct {
	peers    *atom // nil: any address
	notPeers *atom // nil: none excluded
	body     *body
}

// activate interns what p's rules name; a rule that matches nothing is left out.
func (e *Engine) activate(p *part) {
	if p.refs++; p.refs > 1 {
		return
	}
	for i := range p.source {
		r := &p.source[i]
		if r.Peers != nil && len(r.Peers) == 0 || r.Ports != nil && len(r.Ports) == 0 {
			continue
		}
		c := rule{peers: e.atom(r.Peers), notPeers: e.atom(r.NotPeers), body: e.body(r)}
		p.rules = append(p.rules, c)
		if p.dir == Egress {
			for _, n := range c.body.names {
				e.useName(c.peers, n)
			}
		}
	}
}

// deactivate is the inverse; atoms and names stay known until Tidy.
func (e *Engine) deactivate(p *part) {
	if p.refs--; p.refs > 0 {
		return
	}
	for _, r := range p.rules {
		for _, a := range [2]*atom{r.peers, r.notPeers} {
			if a != nil {
				a.refs--
			}
		}
		if p.dir == Egress {
			for _, n := range r.body.names {
				e.names(r.peers)[n].refs--
			}
		}
	}
	p.rules = nil
	e.untidy = true
}

// names is where the uses of names by rules with the peers a are counted.
func (e *Engine) names(a *atom) map[portName]*nameUse {
	if a == nil {
		return e.anyNames
	}
	if a.names == nil {
		a.names = map[portName]*nameUse{}
	}
	return a.names
}

func (e *Engine) useName(a *atom, n portName) {
	uses := e.names(a)
	u := uses[n]
	if u == nil {
		u = &nameUse{fresh: true}
		uses[n] = u
		e.freshNames = append(e.freshNames, u)
		for _, p := range e.pods {
			if _, ok := p.resolve(n); ok {
				e.touchPod(p)
			}
		}
	}
	u.refs++
}

// atom interns a list of peers; nil for a list without entries.
func (e *Engine) atom(peers []Peer) *atom {
	if len(peers) == 0 {
		return nil
	}
	keys := make([]string, len(peers))
	for i, p := range peers {
		keys[i] = peerKey(p)
	}
	slices.Sort(keys)
	key := strings.Join(slices.Compact(keys), "\x01")
	a := e.atoms[key]
	if a == nil {
		a = &atom{id: e.atomID(), key: key, fresh: true, identities: map[*identity]struct{}{}, profiles: map[*profile]struct{}{}}
		e.atoms[key] = a
		e.freshAtoms = append(e.freshAtoms, a)
		for _, p := range peers {
			e.addPeer(a, p)
		}
	}
	a.refs++
	return a
}

// atomID returns an unused number for a peer group; those of forgotten ones come back.
func (e *Engine) atomID() uint32 {
	if n := len(e.freeAtoms); n > 0 {
		id := e.freeAtoms[n-1]
		e.freeAtoms = e.freeAtoms[:n-1]
		return id
	}
	e.lastAtom++
	return e.lastAtom
}

// addPeer lets a match what p matches: pods that are there, and those to come.
func (e *Engine) addPeer(a *atom, p Peer) {
	if p.Block != nil {
		a.blocks = append(a.blocks, p.Block)
		e.netDirty = true
		return
	}
	a.pods = append(a.pods, p.Pods)
	e.peerIndex.add(p.Pods, peerSelector{p.Pods, a})
	e.eachNamespace(p.Pods, func(ns *namespace) {
		for _, g := range ns.groups {
			if !p.Pods.Pods.Matches(g.labels) {
				continue
			}
			if i, found := slices.BinarySearchFunc(g.atoms, a, compareAtom); !found {
				g.atoms = slices.Insert(g.atoms, i, a)
				e.touchGroup(g)
			}
		}
	})
}

// peerKey writes p so that equal text means the same peers.
func peerKey(p Peer) string {
	var b strings.Builder
	if p.Block != nil {
		except := slices.Clone(p.Block.Except)
		slices.SortFunc(except, func(a, b netip.Prefix) int {
			return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
		})
		fmt.Fprint(&b, "b", p.Block.CIDR, slices.Compact(except))
		return b.String()
	}
	if p.Pods.Namespace != "" {
		b.WriteString("n" + p.Pods.Namespace)
	} else {
		writeSelector(&b, p.Pods.Namespaces)
	}
	b.WriteString("\x02")
	writeSelector(&b, p.Pods.Pods)
	return b.String()
}

func writeSelector(b *strings.Builder, s Selector) {
	parts := make([]string, len(s.Requirements))
	for i, r := range s.Requirements {
		parts[i] = r.Key + "\x04" + strconv.Itoa(int(r.Op)) + strings.Join(r.Values, "\x05")
	}
	slices.Sort(parts)
	for _, p := range slices.Compact(parts) {
		b.WriteString(p + "\x03")
	}
}

// body is what a rule does with the flows of its peers: an action, the ports, and the
// names of ports that only a pod gives numbers to.
type body struct {
	id              uint32
	key             string
	action          Action
	log             bool
	ports, notPorts []PortMatch
	names           []portName
	resolved        map[string]*body // by the numbers of names
}

// plain reports whether the order among such bodies cannot matter.
func (b *body) plain() bool { return b.action == Allow && !b.log }

func (e *Engine) body(r *Rule) *body { return e.internBody(r.Action, r.Log, r.Ports, r.NotPorts) }

func (e *Engine) internBody(action Action, log bool, ports, notPorts []PortMatch) *body {
	if ports == nil {
		ports = []PortMatch{{Last: 65535}}
	}
	key := appendPorts(fmt.Append(nil, action, log), ports)
	key = appendPorts(append(key, 0xff), notPorts)
	if b := e.bodies[string(key)]; b != nil {
		return b
	}
	b := &body{id: e.nextBody, key: string(key), action: action, log: log, ports: ports, notPorts: notPorts}
	for _, m := range slices.Concat(ports, notPorts) {
		if m.Name != "" {
			b.names = append(b.names, portName{m.Name, m.Protocol})
		}
	}
	slices.SortFunc(b.names, comparePortName)
	b.names = slices.Compact(b.names)
	e.bodies[b.key] = b
	e.bodyByID[b.id] = b
	e.nextBody++
	return b
}

func comparePortName(a, b portName) int {
	return cmp.Or(cmp.Compare(a.name, b.name), cmp.Compare(a.protocol, b.protocol))
}

// appendPorts writes ports sorted and without repeats: their order has no meaning.
func appendPorts(key []byte, ports []PortMatch) []byte {
	texts := make([]string, len(ports))
	for i, m := range ports {
		t := []byte{byte(m.Protocol)}
		if m.Name == "" {
			t = binary.BigEndian.AppendUint16(t, m.First)
			t = binary.BigEndian.AppendUint16(t, m.Last)
		}
		texts[i] = string(t) + m.Name
	}
	slices.Sort(texts)
	for _, t := range slices.Compact(texts) {
		key = append(append(key, byte(len(t))), t...)
	}
	return key
}

// resolve returns b with its names replaced by the numbers they have in named; a name
// without a number matches nothing.
func (e *Engine) resolve(b *body, named []namedPort) *body {
	if len(b.names) == 0 {
		return b
	}
	key := make([]byte, 0, 32)
	for _, n := range b.names {
		i := slices.IndexFunc(named, func(p namedPort) bool { return p.portName == n })
		if i >= 0 {
			key = binary.BigEndian.AppendUint16(append(key, byte(named[i].actual)), named[i].port)
		}
		key = append(key, 0xff)
	}
	if r := b.resolved[string(key)]; r != nil {
		return r
	}
	r := e.internBody(b.action, b.log, resolvePorts(b.ports, named), resolvePorts(b.notPorts, named))
	if b.resolved == nil {
		b.resolved = map[string]*body{}
	}
	b.resolved[string(key)] = r
	return r
}

func resolvePorts(ports []PortMatch, named []namedPort) []PortMatch {
	out := []PortMatch{}
	for _, m := range ports {
		if m.Name == "" {
			out = append(out, m)
			continue
		}
		for _, p := range named {
			if p.portName == (portName{m.Name, m.Protocol}) {
				out = append(out, PortMatch{Protocol: p.actual, First: p.port, Last: p.port})
			}
		}
	}
	return out
}
