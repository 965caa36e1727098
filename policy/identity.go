package policy

import (
	"cmp"
	"encoding/binary"
	"net/netip"
	"slices"
)

// signature is an interned answer to "what can rules here tell about an address": the
// peer groups that hold it and, for egress rules, the numbers of its named ports. nil
// is the signature of every address that no rule names.
type signature struct {
	key     string
	atoms   []*atom     // sorted by id
	named   []namedPort // sorted by name
	primary *identity   // the identity that addresses with this signature get
	aliases int         // identities with this signature
}

func (s *signature) ports() []namedPort {
	if s == nil {
		return nil
	}
	return s.named
}

func (s *signature) peers() []*atom {
	if s == nil {
		return nil
	}
	return s.atoms
}

// identity is one number in PodID and NetID. Its signature may grow in place by peer
// groups that no profile in use looks at; nil stands for IdentityOthers.
type identity struct {
	num     uint32
	sig     *signature
	rows    map[*profile]*class // where it differs from the profile's others
	members int                 // elements of PodID and NetID
	// prev is, while the change that made this identity is planned, the identity its
	// members come from when profiles in flight must still see that one's classes.
	prev  *identity
	moved bool // prev is meant (it may be nil: others)
}

func (i *identity) number() uint32 {
	if i == nil {
		return IdentityOthers
	}
	return i.num
}

func (i *identity) signature() *signature {
	if i == nil {
		return nil
	}
	return i.sig
}

func compareIdentity(a, b *identity) int { return cmp.Compare(a.number(), b.number()) }

// address is one pod address: who claims it, who owns it, and its elements.
type address struct {
	addr   netip.Addr
	owner  *pod
	claims []*pod    // nil while owner is the only claim
	id     *identity // its element of PodID; nil: none
	local  bool      // the owner is a pod of this node
	prof   [2]*profile
}

// profile is one number in IngressProfile or EgressProfile: an ordered set of policies.
type profile struct {
	num      uint32
	dir      Direction
	key      string
	parts    []*part
	named    []namedPort // ingress: numbers of the pod's ports that the rules name
	others   *class
	rows     map[*identity]*class
	atoms    []*atom
	anyNames []portName // egress: names used by rules without peers
	users    int
	fresh    bool // made by the change in hand
}

// at is the class of the addresses of i; nil p is a pod without policies.
func (p *profile) at(i *identity) *class {
	if c := p.rows[i]; i != nil && c != nil {
		return c
	}
	return p.others
}

// intern returns the signature with these parts (atoms and named sorted, unique).
func (e *Engine) intern(atoms []*atom, named []namedPort) *signature {
	if len(atoms) == 0 && len(named) == 0 {
		return nil
	}
	key := e.sigKey[:0]
	for _, a := range atoms {
		key = binary.BigEndian.AppendUint32(key, a.id)
	}
	for _, n := range named {
		key = binary.BigEndian.AppendUint16(append(key, 0, 0, 0, 0, byte(n.protocol), byte(n.actual)), n.port)
		key = append(append(key, n.name...), 0)
	}
	e.sigKey = key
	s := e.signatures[string(key)]
	if s == nil {
		s = &signature{key: string(key), atoms: slices.Clone(atoms), named: slices.Clone(named)}
		e.signatures[s.key] = s
		e.loose = append(e.loose, s)
	}
	return s
}

// nameRelevant reports whether an egress rule for addresses in atoms uses n.
func (e *Engine) nameRelevant(atoms []*atom, n portName, fresh bool) bool {
	if u := e.anyNames[n]; u != nil && (fresh || !u.fresh) {
		return true
	}
	return slices.ContainsFunc(atoms, func(a *atom) bool {
		u := a.names[n]
		return u != nil && (fresh || !u.fresh)
	})
}

// sign returns the signature of r and that of r's address without its pod. Without
// fresh, peer groups and names that the change in hand introduced do not count.
func (e *Engine) sign(r *address, fresh bool) (full, net *signature) {
	net = e.nets.find(r.addr)
	if !fresh {
		net = e.withoutFresh(net)
	}
	if r.owner == nil {
		return net, net
	}
	g := r.owner.group
	atoms := e.atomBuf[:0]
	for _, a := range g.atoms {
		if fresh || !a.fresh {
			atoms = append(atoms, a)
		}
	}
	if net != nil {
		atoms = append(atoms, net.atoms...)
		slices.SortFunc(atoms, compareAtom)
		atoms = slices.Compact(atoms)
	}
	e.atomBuf = atoms
	return e.intern(atoms, e.relevantPorts(r.owner, atoms, fresh)), net
}

func (e *Engine) relevantPorts(p *pod, atoms []*atom, fresh bool) []namedPort {
	var named []namedPort
	for _, c := range p.Ports {
		for _, protocol := range [2]Protocol{AnyProtocol, c.Protocol} {
			n := portName{c.Name, protocol}
			if !e.nameRelevant(atoms, n, fresh) {
				continue
			}
			if v, ok := p.resolve(n); ok {
				named = append(named, v)
			}
		}
	}
	slices.SortFunc(named, func(a, b namedPort) int { return comparePortName(a.portName, b.portName) })
	return slices.Compact(named)
}

func (e *Engine) withoutFresh(s *signature) *signature {
	if s == nil || !slices.ContainsFunc(s.atoms, func(a *atom) bool { return a.fresh }) {
		return s
	}
	atoms := slices.DeleteFunc(slices.Clone(s.atoms), func(a *atom) bool { return a.fresh })
	return e.intern(atoms, s.named)
}

// newIdentity makes an identity with signature s, and the primary one of s
// unless there is one.
func (e *Engine) newIdentity(s *signature) *identity {
	i := &identity{num: e.identityNumbers.next(), rows: map[*profile]*class{}}
	e.identities[i.num] = i
	e.freshIdentities = append(e.freshIdentities, i)
	e.setSignature(i, s)
	return i
}

// setSignature files i under s.
func (e *Engine) setSignature(i *identity, s *signature) {
	if old := i.sig; old != nil {
		old.aliases--
		if old.primary == i {
			old.primary = nil
		}
		for _, a := range old.atoms {
			delete(a.identities, i)
		}
		for _, n := range old.named {
			delete(e.nameIdentities[n.portName], i)
		}
		e.loose = append(e.loose, old)
	}
	i.sig = s
	if s == nil {
		return
	}
	s.aliases++
	if s.primary == nil {
		s.primary = i
	}
	for _, a := range s.atoms {
		a.identities[i] = struct{}{}
	}
	for _, n := range s.named {
		if e.nameIdentities[n.portName] == nil {
			e.nameIdentities[n.portName] = map[*identity]struct{}{}
		}
		e.nameIdentities[n.portName][i] = struct{}{}
	}
}

// forgetSignatures drops the signatures that nothing has, at the end of a change.
func (e *Engine) forgetSignatures() {
	for _, s := range e.loose {
		if s.aliases == 0 && e.signatures[s.key] == s {
			delete(e.signatures, s.key)
		}
	}
	e.loose = nil
}

// lookers returns the profiles that rules make look at s, in the order of their
// numbers, without those the change in hand made.
func (e *Engine) lookers(s *signature, more ...*identity) []*profile {
	seen := map[*profile]struct{}{}
	for _, a := range s.peers() {
		for p := range a.profiles {
			seen[p] = struct{}{}
		}
	}
	for _, n := range s.ports() {
		for p := range e.nameProfiles[n.portName] {
			seen[p] = struct{}{}
		}
	}
	for _, i := range more {
		if i != nil {
			for p := range i.rows {
				seen[p] = struct{}{}
			}
		}
	}
	out := make([]*profile, 0, len(seen))
	for p := range seen {
		if !p.fresh {
			out = append(out, p)
		}
	}
	slices.SortFunc(out, func(a, b *profile) int { return cmp.Compare(a.num, b.num) })
	return out
}

// watched returns the identities that p's rules can tell from others, by number.
func (e *Engine) watched(p *profile) []*identity {
	seen := map[*identity]struct{}{}
	for _, a := range p.atoms {
		for i := range a.identities {
			seen[i] = struct{}{}
		}
	}
	for _, n := range p.anyNames {
		for i := range e.nameIdentities[n] {
			seen[i] = struct{}{}
		}
	}
	out := make([]*identity, 0, len(seen))
	for i := range seen {
		out = append(out, i)
	}
	slices.SortFunc(out, compareIdentity)
	return out
}

// setRow records that p gives i the class c.
func (e *Engine) setRow(p *profile, i *identity, c *class) {
	if i == nil || c == p.others || p.rows[i] != nil {
		return
	}
	p.rows[i], i.rows[p] = c, c
	c.refs++
	e.newRows = append(e.newRows, row{p, i})
}

type row struct {
	p *profile
	i *identity
}

func (e *Engine) sortedIdentities() []*identity {
	out := make([]*identity, 0, len(e.identities))
	for _, i := range e.identities {
		out = append(out, i)
	}
	slices.SortFunc(out, compareIdentity)
	return out
}
