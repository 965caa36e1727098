package policy

import (
	"net/netip"
	"reflect"
	"slices"
)

// Engine compiles a cluster for one node and follows its events. Its tables always
// equal compiling from scratch, up to renaming numbers and, until Tidy, up to elements
// that nothing needs any more. It is not safe for concurrent use.
type Engine struct {
	node    string
	maxStep int

	// What there is.
	pods       map[Name]*pod
	namespaces map[string]*namespace
	nodes      map[string]Node
	policies   map[PolicyID]*selected
	labelled   map[string]map[*namespace]struct{} // by key NUL value
	groups     map[groupKey]*group
	addresses  map[netip.Addr]*address
	locals     map[*address]struct{} // owned by pods of this node
	subjects   selectorIndex[*selected]
	lastPart   uint32

	// What rules in force say.
	atoms     map[string]*atom
	lastAtom  uint32
	freeAtoms []uint32
	peerIndex selectorIndex[peerSelector]
	anyNames  map[portName]*nameUse
	bodies    map[string]*body
	bodyByID  map[uint32]*body
	nextBody  uint32
	nets      nets

	// The numbers.
	signatures     map[string]*signature
	identities     map[uint32]*identity
	nameIdentities map[portName]map[*identity]struct{}
	nameProfiles   map[portName]map[*profile]struct{}
	profiles       map[string]*profile
	classes        map[string]*class
	walks          map[string]*class
	covered        map[[2]*class]bool
	identityNumbers, classNumbers,
	ingressNumbers, egressNumbers numbers

	// The change in hand.
	dirty           map[*address]claim
	dirtyPods       map[*pod]struct{}
	netDirty        bool
	freshAtoms      []*atom
	freshNames      []*nameUse
	freshIdentities []*identity
	freshProfiles   []*profile
	newRows         []row
	loose           []*signature
	looseClasses    []*class
	looseIdentities []*identity

	untidy  bool // Tidy has something to do
	retired bool // a profile was dropped since a delta last waited for Drops
	adopted Tables

	// Scratch space.
	marks   []uint64
	epoch   uint64
	walk    []uint32
	walkKey []byte
	sigKey  []byte
	atomBuf []*atom
}

// selected is a policy, which belongs to whoever handed it over too, with its two directions (nil: does not apply).
type selected struct {
	*Policy
	parts [2]*part
}

// claim is who had an address before the change in hand.
type claim struct {
	owner *pod
	local bool
}

// NewEngine returns the engine of node with an empty cluster.
func NewEngine(node string) *Engine {
	e := &Engine{
		node:           node,
		maxStep:        maxStep,
		pods:           map[Name]*pod{},
		namespaces:     map[string]*namespace{},
		nodes:          map[string]Node{},
		policies:       map[PolicyID]*selected{},
		labelled:       map[string]map[*namespace]struct{}{},
		groups:         map[groupKey]*group{},
		addresses:      map[netip.Addr]*address{},
		locals:         map[*address]struct{}{},
		subjects:       selectorIndex[*selected]{},
		atoms:          map[string]*atom{},
		peerIndex:      selectorIndex[peerSelector]{},
		anyNames:       map[portName]*nameUse{},
		bodies:         map[string]*body{},
		bodyByID:       map[uint32]*body{},
		nextBody:       firstBody,
		signatures:     map[string]*signature{},
		identities:     map[uint32]*identity{},
		nameIdentities: map[portName]map[*identity]struct{}{},
		nameProfiles:   map[portName]map[*profile]struct{}{},
		profiles:       map[string]*profile{},
		classes:        map[string]*class{},
		walks:          map[string]*class{},
		covered:        map[[2]*class]bool{},
		dirty:          map[*address]claim{},
		dirtyPods:      map[*pod]struct{}{},
	}
	const marks = 0xc000 // kube-proxy's, see the number ranges in tables.go
	e.identityNumbers = numbers{first: IdentityFirst, last: IdentityLast, used: map[uint32]struct{}{}}
	e.classNumbers = numbers{first: ClassFirst, last: ClassLast, used: map[uint32]struct{}{}}
	e.ingressNumbers = numbers{first: IngressProfileFirst, last: IngressProfileLast, clear: marks, used: map[uint32]struct{}{}}
	e.egressNumbers = numbers{first: EgressProfileFirst, last: EgressProfileLast, clear: marks, used: map[uint32]struct{}{}}
	return e
}

// Apply follows events, in order, and returns one delta for all of them. Events that
// change nothing, repeat or delete what is unknown are harmless. The engine keeps the pods
// and policies it is given: nobody may change them afterwards.
func (e *Engine) Apply(events ...Event) Delta {
	for _, ev := range events {
		e.take(ev)
	}
	return e.settle()
}

// Replace makes c the cluster (the first one, or a resync) and returns the change. Of
// several objects with one name the last counts.
func (e *Engine) Replace(c *Cluster) Delta {
	pods, policies := make(map[Name]struct{}, len(c.Pods)), make(map[PolicyID]struct{}, len(c.Policies))
	namespaces, nodes := map[string]struct{}{}, map[string]struct{}{}
	e.pods, e.addresses, e.policies = roomFor(e.pods, len(c.Pods)), roomFor(e.addresses, len(c.Pods)), roomFor(e.policies, len(c.Policies))
	for i := range c.Namespaces {
		namespaces[c.Namespaces[i].Name] = struct{}{}
		e.takeNamespace(&c.Namespaces[i], false)
	}
	for i := range c.Nodes {
		nodes[c.Nodes[i].Name] = struct{}{}
		e.nodes[c.Nodes[i].Name] = c.Nodes[i]
	}
	for i := range c.Policies {
		policies[c.Policies[i].ID] = struct{}{}
		e.takePolicy(&c.Policies[i], false)
	}
	for i := range c.Pods {
		pods[c.Pods[i].Name] = struct{}{}
		e.takePod(&c.Pods[i], false)
	}
	for name, p := range e.pods {
		if _, ok := pods[name]; !ok {
			e.takePod(p.Pod, true)
		}
	}
	for id, p := range e.policies {
		if _, ok := policies[id]; !ok {
			e.takePolicy(p.Policy, true)
		}
	}
	for name, ns := range e.namespaces {
		if _, ok := namespaces[name]; !ok && ns.exists {
			e.takeNamespace(&Namespace{Name: name}, true)
		}
	}
	for name := range e.nodes {
		if _, ok := nodes[name]; !ok {
			delete(e.nodes, name)
		}
	}
	if e.adopted != nil {
		return e.adopt()
	}
	return e.settle()
}

// roomFor is m when it holds anything, or an empty map for n: one that grew has more room
// to spare.
func roomFor[K comparable, V any](m map[K]V, n int) map[K]V {
	if len(m) == 0 {
		return make(map[K]V, n)
	}
	return m
}

func (e *Engine) take(ev Event) {
	switch {
	case ev.Pod != nil:
		e.takePod(ev.Pod, ev.Delete)
	case ev.Namespace != nil:
		e.takeNamespace(ev.Namespace, ev.Delete)
	case ev.Policy != nil:
		e.takePolicy(ev.Policy, ev.Delete)
	case ev.Node != nil && ev.Delete:
		delete(e.nodes, ev.Node.Name)
	case ev.Node != nil:
		e.nodes[ev.Node.Name] = *ev.Node
	}
}

func (e *Engine) takePod(p *Pod, remove bool) {
	old := e.pods[p.Name]
	if old != nil && !remove && reflect.DeepEqual(old.Pod, p) {
		return
	}
	if old != nil {
		e.dropPod(old)
	}
	if !remove {
		e.addPod(p)
	}
}

func (e *Engine) isLocal(p *pod) bool { return p.Node == e.node && p.live() }

func (e *Engine) addPod(v *Pod) {
	p := &pod{Pod: v}
	e.pods[p.Name] = p
	if !p.live() {
		return
	}
	e.join(p)
	if e.isLocal(p) {
		ns := p.group.ns
		if ns.local == nil {
			ns.local = map[*pod]struct{}{}
		}
		ns.local[p] = struct{}{}
	}
	for _, a := range p.Addrs {
		if !a.IsValid() {
			continue
		}
		r := e.addresses[a]
		if r == nil {
			r = &address{addr: a}
			e.addresses[a] = r
		}
		e.touch(r)
		r.claim(p)
	}
}

func (e *Engine) dropPod(p *pod) {
	delete(e.pods, p.Name)
	for _, a := range p.Addrs {
		if r := e.addresses[a]; r != nil {
			e.touch(r)
			r.unclaim(p)
		}
	}
	if g := p.group; g != nil {
		delete(g.ns.local, p)
		e.leave(p)
	}
}

// touch marks r for a fresh look and remembers whose it was.
func (e *Engine) touch(r *address) {
	if _, ok := e.dirty[r]; !ok {
		e.dirty[r] = claim{r.owner, r.local}
	}
}

// claim adds p to the claims on r; a pod that lists an address twice claims it once.
func (r *address) claim(p *pod) {
	switch {
	case r.owner == nil:
		r.owner = p
	case r.owner == p || slices.Contains(r.claims, p):
	default:
		if r.claims == nil {
			r.claims = []*pod{r.owner}
		}
		r.claims = append(r.claims, p)
		if p.outranks(r.owner) {
			r.owner = p
		}
	}
}

func (r *address) unclaim(p *pod) {
	i := slices.Index(r.claims, p)
	if i >= 0 {
		r.claims = slices.Delete(r.claims, i, i+1)
	}
	if r.owner == p {
		r.owner = nil
		for _, q := range r.claims {
			if r.owner == nil || q.outranks(r.owner) {
				r.owner = q
			}
		}
	}
	if len(r.claims) <= 1 {
		r.claims = nil
	}
}

func (e *Engine) takeNamespace(n *Namespace, remove bool) {
	if remove && e.namespaces[n.Name] == nil {
		return
	}
	ns := e.namespace(n.Name)
	labels := n.Labels
	if remove {
		labels = Labels{}
	}
	ns.exists = !remove
	if labels != ns.labels {
		e.relabel(ns, labels)
		for _, g := range ns.groups {
			if atoms := e.match(g); !slices.Equal(atoms, g.atoms) {
				g.atoms = atoms
				e.touchGroup(g)
			}
		}
		for p := range ns.local {
			e.dirtyPods[p] = struct{}{}
		}
	}
	e.forgetNamespace(ns)
}

func (e *Engine) takePolicy(p *Policy, remove bool) {
	old := e.policies[p.ID]
	if old == nil && remove {
		return
	}
	var fresh *selected
	if !remove {
		fresh = &selected{Policy: p}
		for _, d := range Directions {
			fresh.parts[d] = e.part(p, d, old)
		}
	}
	if old != nil {
		e.subjects.remove(&old.Subject, old)
		delete(e.policies, p.ID)
		e.reselect(&old.Subject)
	}
	if fresh != nil {
		e.subjects.add(&fresh.Subject, fresh)
		e.policies[p.ID] = fresh
		e.reselect(&fresh.Subject)
	}
}

// part returns p's part of direction d: the old policy's when it means the same.
func (e *Engine) part(p *Policy, d Direction, old *selected) *part {
	if !p.Applies[d] {
		return nil
	}
	if old != nil && old.parts[d] != nil && old.Tier == p.Tier && old.Order == p.Order &&
		old.Isolates == p.Isolates && reflect.DeepEqual(old.Rules[d], p.Rules[d]) {
		return old.parts[d]
	}
	e.lastPart++
	return &part{seq: e.lastPart, id: p.ID, dir: d, tier: p.Tier, order: p.Order, isolates: p.Isolates, source: p.Rules[d], names: portNames(p.Rules[d])}
}

// reselect marks the local pods that s selects.
func (e *Engine) reselect(s *PodSelector) {
	e.eachNamespace(s, func(ns *namespace) {
		for p := range ns.local {
			if s.Pods.Matches(p.Labels) {
				e.dirtyPods[p] = struct{}{}
			}
		}
	})
}
