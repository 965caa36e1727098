package policy

import (
	"cmp"
	"slices"
)

// bucket is the most selective string under which a PodSelector can be filed so that
// every pod it matches looks into that bucket.
func bucket(s *PodSelector) string {
	k, v, eq := equality(s.Pods)
	if s.Namespace != "" {
		if eq {
			return "N" + s.Namespace + "\x00" + k + "\x00" + v
		}
		return "n" + s.Namespace
	}
	if k, v, ok := equality(s.Namespaces); ok {
		return "l" + k + "\x00" + v
	}
	if eq {
		return "p" + k + "\x00" + v
	}
	return ""
}

// equality returns one requirement that demands a single value.
func equality(s Selector) (key, value string, ok bool) {
	for _, r := range s.Requirements {
		if r.Op == In && len(r.Values) == 1 {
			return r.Key, r.Values[0], true
		}
	}
	return "", "", false
}

// selectorIndex files values under the buckets of their selectors.
type selectorIndex[T comparable] map[string][]T

func (x selectorIndex[T]) add(s *PodSelector, v T) {
	b := bucket(s)
	x[b] = append(x[b], v)
}

func (x selectorIndex[T]) remove(s *PodSelector, v T) {
	b := bucket(s)
	i := slices.Index(x[b], v)
	if i < 0 {
		return
	}
	if x[b] = slices.Delete(x[b], i, i+1); len(x[b]) == 0 {
		delete(x, b)
	}
}

// candidates yields everything that may select pods with these labels, each selector's
// value once.
func (x selectorIndex[T]) candidates(ns *namespace, labels Labels, yield func(T)) {
	each := func(b string) {
		for _, v := range x[b] {
			yield(v)
		}
	}
	each("")
	each("n" + ns.name)
	for k, v := range labels.All() {
		each("N" + ns.name + "\x00" + k + "\x00" + v)
		each("p" + k + "\x00" + v)
	}
	for k, v := range ns.labels.All() {
		each("l" + k + "\x00" + v)
	}
}

// namespace is what the engine knows of one namespace: also of one that has no object
// (yet), which then has no labels.
type namespace struct {
	name   string
	exists bool
	labels Labels
	groups []*group
	local  map[*pod]struct{}
}

func (ns *namespace) matches(s *PodSelector) bool {
	if s.Namespace != "" {
		return s.Namespace == ns.name
	}
	return s.Namespaces.Matches(ns.labels)
}

// group is the pods that share namespace and labels; the peer groups that match them
// are computed once for all of them.
type group struct {
	ns     *namespace
	labels Labels
	atoms  []*atom // sorted by id
	pods   []*pod
}

type groupKey struct {
	ns     string
	labels Labels
}

func (g *group) matches(s *PodSelector) bool { return g.ns.matches(s) && s.Pods.Matches(g.labels) }

// pod is a Pod, which belongs to whoever handed it over too, with its place in the indices.
type pod struct {
	*Pod
	group *group // nil when nothing selects it: host network or finished
	slot  int    // in group.pods
}

func (p *pod) live() bool { return !p.HostNetwork && !p.Finished }

// outranks reports whether p's claim to an address beats q's (see Pod.Created).
func (p *pod) outranks(q *pod) bool {
	return cmp.Or(boolDelta(p.Attached)-boolDelta(q.Attached), cmp.Compare(p.Created, q.Created),
		cmp.Compare(p.Namespace, q.Namespace), cmp.Compare(p.Name.Name, q.Name.Name)) > 0
}

// resolve finds the number of a named port of p.
func (p *pod) resolve(k portName) (namedPort, bool) {
	for _, c := range p.Ports {
		if c.Name == k.name && (k.protocol == AnyProtocol || k.protocol == c.Protocol) {
			return namedPort{k, c.Protocol, c.Port}, true
		}
	}
	return namedPort{}, false
}

func (e *Engine) namespace(name string) *namespace {
	ns := e.namespaces[name]
	if ns == nil {
		ns = &namespace{name: name}
		e.namespaces[name] = ns
	}
	return ns
}

// join puts p into its group.
func (e *Engine) join(p *pod) {
	key := groupKey{p.Namespace, p.Labels}
	g := e.groups[key]
	if g == nil {
		g = &group{ns: e.namespace(p.Namespace), labels: p.Labels}
		g.atoms = e.match(g)
		g.ns.groups = append(g.ns.groups, g)
		e.groups[key] = g
	}
	p.group, p.slot = g, len(g.pods)
	g.pods = append(g.pods, p)
}

func (e *Engine) leave(p *pod) {
	g := p.group
	last := len(g.pods) - 1
	g.pods[p.slot] = g.pods[last]
	g.pods[p.slot].slot = p.slot
	g.pods = slices.Delete(g.pods, last, len(g.pods))
	if len(g.pods) == 0 {
		i := slices.Index(g.ns.groups, g)
		g.ns.groups = slices.Delete(g.ns.groups, i, i+1)
		delete(e.groups, groupKey{g.ns.name, g.labels})
		e.forgetNamespace(g.ns)
	}
}

func (e *Engine) forgetNamespace(ns *namespace) {
	if !ns.exists && len(ns.groups) == 0 && len(ns.local) == 0 {
		delete(e.namespaces, ns.name)
	}
}

// match returns the peer groups whose selectors match g, sorted by id.
func (e *Engine) match(g *group) []*atom {
	var out []*atom
	e.peerIndex.candidates(g.ns, g.labels, func(s peerSelector) {
		if g.matches(s.pods) {
			out = append(out, s.atom)
		}
	})
	slices.SortFunc(out, compareAtom)
	return slices.Compact(out)
}

// touchGroup marks every address of g's pods for a fresh look.
func (e *Engine) touchGroup(g *group) {
	for _, p := range g.pods {
		e.touchPod(p)
	}
}

func (e *Engine) touchPod(p *pod) {
	for _, a := range p.Addrs {
		if r := e.addresses[a]; r != nil && r.owner == p {
			e.touch(r)
		}
	}
}

// relabel files ns under its new labels.
func (e *Engine) relabel(ns *namespace, labels Labels) {
	for k, v := range ns.labels.All() {
		b := e.labelled[k+"\x00"+v]
		delete(b, ns)
		if len(b) == 0 {
			delete(e.labelled, k+"\x00"+v)
		}
	}
	ns.labels = labels
	for k, v := range labels.All() {
		key := k + "\x00" + v
		if e.labelled[key] == nil {
			e.labelled[key] = map[*namespace]struct{}{}
		}
		e.labelled[key][ns] = struct{}{}
	}
}

// eachNamespace visits the namespaces that s selects, without a look at the others when
// s names one or demands a value of a label.
func (e *Engine) eachNamespace(s *PodSelector, visit func(*namespace)) {
	if s.Namespace != "" {
		if ns := e.namespaces[s.Namespace]; ns != nil {
			visit(ns)
		}
		return
	}
	if k, v, ok := equality(s.Namespaces); ok {
		for ns := range e.labelled[k+"\x00"+v] {
			if ns.matches(s) {
				visit(ns)
			}
		}
		return
	}
	for _, ns := range e.namespaces {
		if ns.matches(s) {
			visit(ns)
		}
	}
}
