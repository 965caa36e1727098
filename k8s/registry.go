package k8s

import (
	"maps"
	"net/netip"
	"slices"
	"sync"

	"k8s.io/client-go/tools/cache"

	"github.com/nftcni/nftcni/policy"
)

// Kinds of API objects, in the order of resources.
const (
	kindNamespace = iota
	kindNode
	kindPod
	kindPolicy
	kindCount
)

// kindName is the kind's name in problems and Events.
func kindName(kind int) string {
	return [kindCount]string{"Namespace", "Node", "Pod", KindNetworkPolicy}[kind]
}

// A registry turns what four reflectors see into one Replace and many Apply. Of an
// object that was handed on it keeps only its name and a digest, to find deletions in
// a new list and to drop updates that change nothing for us (heartbeats, conditions).
type registry struct {
	digester digester
	refused  func(kind int, r *record, p Problem) // told about objects that cannot be honoured
	mirrored func(pod policy.Name, r *record)     // told about mirror pods, nil when gone

	mu       sync.Mutex
	sink     Sink
	synced   [kindCount]bool
	known    [kindCount]map[policy.Name]uint64
	initial  map[objectKey]policy.Event // until everything is synced, then nil
	podCIDRs map[string][]netip.Prefix  // by node
	// claims holds the pods whose addresses are known from the annotation only.
	claims   map[policy.Name]*record
	faulty   map[objectKey][]Problem
	offline  *Problem
	problems []Problem // the sorted list, unless stale
	stale    bool
}

func newRegistry(d digester, sink Sink) *registry {
	r := &registry{
		digester: d, sink: sink,
		refused:  func(int, *record, Problem) {},
		mirrored: func(policy.Name, *record) {},
		initial:  map[objectKey]policy.Event{},
		podCIDRs: map[string][]netip.Prefix{},
		claims:   map[policy.Name]*record{},
		faulty:   map[objectKey][]Problem{},
	}
	for kind := range r.known {
		r.known[kind] = map[policy.Name]uint64{}
	}
	return r
}

// A kindStore is the cache.ReflectorStore of one kind.
type kindStore struct {
	*registry
	kind int
}

var _ cache.TransformingStore = kindStore{}

// Transformer implements cache.TransformingStore: it strips objects of a first list as
// they arrive.
func (s kindStore) Transformer() cache.TransformFunc { return s.digester.transform }

// Add implements cache.ReflectorStore.
func (s kindStore) Add(obj any) error { return s.Update(obj) }

// Resync implements cache.ReflectorStore.
func (s kindStore) Resync() error { return nil }

// Update implements cache.ReflectorStore.
func (s kindStore) Update(obj any) error {
	r, err := s.record(obj)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.deliver(s.upsert(s.kind, r, nil))
	return nil
}

// Delete implements cache.ReflectorStore.
func (s kindStore) Delete(obj any) error {
	r, err := s.record(obj)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.deliver(s.remove(s.kind, policy.Name{Namespace: r.Namespace, Name: r.Name}, nil))
	return nil
}

// Replace implements cache.ReflectorStore: list is everything there is.
func (s kindStore) Replace(list []any, _ string) error {
	records := make([]*record, 0, len(list))
	for _, obj := range list {
		r, err := s.record(obj)
		if err != nil {
			return err
		}
		records = append(records, r)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	present := make(map[policy.Name]bool, len(records))
	if len(s.known[s.kind]) == 0 {
		s.known[s.kind] = make(map[policy.Name]uint64, len(records))
	}
	var events []policy.Event
	for _, r := range records {
		present[policy.Name{Namespace: r.Namespace, Name: r.Name}] = true
		events = s.upsert(s.kind, r, events)
	}
	for name := range s.known[s.kind] {
		if !present[name] {
			events = s.remove(s.kind, name, events)
		}
	}
	slices.SortFunc(events, compareEvents)
	s.synced[s.kind] = true
	s.deliver(events)
	return nil
}

func (s kindStore) record(obj any) (*record, error) {
	out, err := s.digester.transform(obj)
	if err != nil {
		return nil, err
	}
	return out.(*record), nil
}

// upsert notes the object and appends the events of what changed.
func (r *registry) upsert(kind int, rec *record, events []policy.Event) []policy.Event {
	name := policy.Name{Namespace: rec.Namespace, Name: rec.Name}
	if old, ok := r.known[kind][name]; ok && old == rec.digest {
		return events
	}
	r.noteFaults(kind, name, rec)
	switch kind {
	case kindPod:
		name = rec.value.Pod.Name // shares its storage with the pod's
		delete(r.claims, name)
		if rec.mirror {
			r.mirrored(name, rec)
		}
		if len(rec.claimed) > 0 && !rec.value.Pod.HostNetwork {
			r.claims[name] = rec
			rec.value = r.withClaim(rec)
		}
	case kindNode:
		n := rec.value.Node
		moved := !slices.Equal(r.podCIDRs[n.Name], n.PodCIDRs)
		r.podCIDRs[n.Name] = n.PodCIDRs
		if moved {
			events = r.claimsOf(n.Name, events)
		}
	}
	r.known[kind][name] = rec.digest
	return append(events, rec.value)
}

func (r *registry) remove(kind int, name policy.Name, events []policy.Event) []policy.Event {
	if _, ok := r.known[kind][name]; !ok {
		return events
	}
	delete(r.known[kind], name)
	r.noteFaults(kind, name, nil)
	e := policy.Event{Delete: true}
	switch kind {
	case kindNamespace:
		e.Namespace = &policy.Namespace{Name: name.Name}
	case kindNode:
		e.Node = &policy.Node{Name: name.Name}
		delete(r.podCIDRs, name.Name)
		events = r.claimsOf(name.Name, events)
	case kindPod:
		e.Pod = &policy.Pod{Name: name}
		delete(r.claims, name)
		r.mirrored(name, nil)
	case kindPolicy:
		e.Policy = &policy.Policy{ID: policy.PolicyID{Kind: KindNetworkPolicy, Name: name}}
	}
	return append(events, e)
}

// claimsOf appends the pods of the node whose published addresses must be judged anew.
func (r *registry) claimsOf(node string, events []policy.Event) []policy.Event {
	for _, rec := range r.claims {
		if rec.value.Pod.Node == node {
			rec.value = r.withClaim(rec)
			events = append(events, rec.value)
		}
	}
	return events
}

// claimPenalty makes a published address lose against one that a kubelet reported: the
// annotation can be written by whoever may change the pod.
const claimPenalty = 1 << 40

// withClaim is the pod with those of its published addresses that its node may give.
func (r *registry) withClaim(rec *record) policy.Event {
	p := *rec.value.Pod
	p.Addrs = nil
	for _, a := range rec.claimed {
		if slices.ContainsFunc(r.podCIDRs[p.Node], func(c netip.Prefix) bool { return c.Contains(a) }) {
			p.Addrs = append(p.Addrs, a)
		}
	}
	if p.Created > 0 {
		p.Created -= claimPenalty
	}
	return policy.Event{Pod: &p}
}

func (r *registry) noteFaults(kind int, name policy.Name, rec *record) {
	key := objectKey{kindName(kind), name.Namespace, name.Name}
	_, had := r.faulty[key]
	delete(r.faulty, key)
	if rec != nil && len(rec.faults) > 0 {
		r.faulty[key] = rec.faults.problems(Problem{Object: key.String()}, "what cannot be read allows nothing")
		for _, p := range r.faulty[key] {
			if p.Severity == Refused {
				r.refused(kind, rec, p)
			}
		}
	}
	_, has := r.faulty[key]
	r.stale = r.stale || had || has
}

func (r *registry) listProblems() []Problem {
	if !r.stale {
		return r.problems
	}
	var all []Problem
	if r.offline != nil {
		all = append(all, *r.offline)
	}
	for _, ps := range r.faulty {
		all = append(all, ps...)
	}
	r.problems, r.stale = sortProblems(all), false
	return r.problems
}

// setOffline says that the API server does not answer (nil: that it does).
func (r *registry) setOffline(p *Problem) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.offline, r.stale = p, true
	if r.initial == nil {
		r.sink.Apply(nil, r.listProblems())
	}
}

// deliver hands the events on, or keeps them until every kind is synced.
func (r *registry) deliver(events []policy.Event) {
	if r.initial == nil {
		if len(events) > 0 {
			r.sink.Apply(events, r.listProblems())
		}
		return
	}
	for _, e := range events {
		key := eventKey(e)
		if e.Delete {
			delete(r.initial, key)
		} else {
			r.initial[key] = e
		}
	}
	if slices.Contains(r.synced[:], false) {
		return
	}
	c := snapshot(maps.Values(r.initial))
	r.initial = nil
	r.sink.Replace(c, r.listProblems())
}
