package policy_test

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/nftcni/nftcni/policy"
	"github.com/nftcni/nftcni/policy/policytest"
)

// follower applies an engine's deltas to tables of its own, as a kernel would, and
// judges flows in every state in between.
type follower struct {
	e      *policy.Engine
	twin   *policy.Engine // makes the same changes and must give the same deltas; may be nil
	tables policy.Tables
	old    *policy.Cluster
	g      *policytest.Generator
	r      *rand.Rand
	flows  int
	flow   func(*policy.Cluster) policy.Flow // draws one
	// differs is what twins do not agree on.
	differs error
	model   *model // what the engine was told; nil: nobody looks
	stats   map[string]int
}

// newEngine makes engines whose steps are short, half of the time: any bound is right.
func newEngine(seed uint64) *policy.Engine {
	e := policy.NewEngine(policytest.Node(0))
	if seed%2 == 0 {
		policy.SetMaxStep(e, int(2+seed%7))
	}
	return e
}

func newFollower(seed uint64, o policytest.Options) *follower {
	g := policytest.New(seed, o)
	return &follower{
		e: newEngine(seed), tables: policy.Tables{}, old: &policy.Cluster{},
		g: g, r: rand.New(rand.NewPCG(seed, 1)), flows: 150, flow: g.Flow, stats: map[string]int{},
	}
}

// change makes a change of the engine, and of its twin.
func (f *follower) change(make func(*policy.Engine) policy.Delta) policy.Delta {
	d := make(f.e)
	if d.Pause != 0 {
		f.twin = nil // classes of a meet are numbered in no order: twins part
	}
	if f.twin != nil && f.differs == nil {
		if twin := make(f.twin); fmt.Sprint(twin) != fmt.Sprint(d) {
			f.differs = fmt.Errorf("two engines with one history give different deltas:\n%sand\n%s", stepsText(d), stepsText(twin))
		}
	}
	return d
}

// local lists the addresses of the node's pods, which is what the dataplane binds.
func local(c *policy.Cluster) map[netip.Addr]bool {
	m := map[netip.Addr]bool{}
	o := policy.NewOracle(c, policytest.Node(0))
	for _, p := range c.Pods {
		for _, a := range p.Addrs {
			if w := o.Owner(a); w != nil && w.Node == policytest.Node(0) {
				m[a] = true
			}
		}
	}
	return m
}

// follow applies d, whose end is the engine's cluster.
func (f *follower) follow(d policy.Delta) error {
	if f.differs != nil {
		return f.differs
	}
	now := f.e.Cluster()
	if f.model != nil {
		if !sameCluster(f.model.cluster(), now) {
			return errors.New("the engine's cluster is not what it was told")
		}
	}
	states := []policy.Tables{maps.Clone(f.tables)}
	for i, step := range d.Steps {
		if err := f.apply(step); err != nil {
			return fmt.Errorf("step %d: %w", i, err)
		}
		states = append(states, maps.Clone(f.tables))
	}
	if d.Pause >= len(d.Steps) && d.Pause > 0 {
		return fmt.Errorf("a grace period before step %d of %d", d.Pause, len(d.Steps))
	}
	if complete(states[0]) == nil {
		for i, t := range states {
			if err := complete(t); err != nil {
				return fmt.Errorf("after %d steps: %w", i, err)
			}
		}
	}
	if err := f.flowsBetween(d, states, now); err != nil {
		return err
	}
	if err := f.apply(d.Drops); err != nil {
		return fmt.Errorf("drops: %w", err)
	}
	if want := f.e.Tables(); !maps.Equal(want, f.tables) {
		diff := cmp.Diff(want, f.tables, cmp.Comparer(func(a, b netip.Addr) bool { return a == b }))
		return fmt.Errorf("engine's tables (-) and the applied deltas (+) differ:\n%s", diff)
	}
	f.old = now
	return policy.CheckBooks(f.e, false)
}

// complete says that no element of t names what is not there.
func complete(t policy.Tables) error {
	for k, v := range t {
		named := policy.Key{Map: policy.AccessRest, X: v}
		switch k.Map {
		case policy.IngressProfile, policy.EgressProfile:
			named.Map = policy.AccessOthers
		case policy.Access, policy.AccessOthers:
		default:
			continue
		}
		if _, ok := t[named]; !ok {
			return fmt.Errorf("%+v is %x, and there is no %+v", k, v, named)
		}
	}
	return nil
}

// apply commits ops, each of which must name the value there is.
func (f *follower) apply(ops []policy.Op) error {
	for _, op := range ops {
		if v, ok := f.tables[op.Key]; op.Delete && ok && v != op.Value {
			return fmt.Errorf("delete of %+v, which has %d", op.Element, v)
		}
		if err := f.tables.Apply([]policy.Op{op}); err != nil {
			return err
		}
	}
	return nil
}

func (f *follower) flowsBetween(d policy.Delta, states []policy.Tables, now *policy.Cluster) error {
	before, after := policy.NewOracle(f.old, policytest.Node(0)), policy.NewOracle(now, policytest.Node(0))
	was, is := local(f.old), local(now)
	index := make([]policy.LookupFunc, len(states))
	for i, s := range states {
		index[i] = s.Index()
	}
	for n := range f.flows {
		c := now
		if n%2 == 0 && len(f.old.Pods) > 0 {
			c = f.old
		}
		if len(c.Pods) == 0 {
			return nil
		}
		flow := f.flow(c)
		o, w := before.Evaluate(flow), after.Evaluate(flow)
		if !judged(o) || !judged(w) {
			continue
		}
		if got := policy.DecideWith(index[len(index)-1], flow); got.Allowed != w.Allowed || got.Log != w.Log {
			return fmt.Errorf("%+v after the last step: tables %+v, oracle %+v", flow, got, w)
		}
		if was[flow.Src] != is[flow.Src] || was[flow.Dst] != is[flow.Dst] {
			continue // not bound while the steps are committed
		}
		if o.Allowed && !w.Allowed && !d.Revokes {
			return fmt.Errorf("%+v was allowed and is denied, but the delta does not revoke", flow)
		}
		if o.Allowed == w.Allowed {
			f.stats["same"]++
		} else {
			f.stats["changed"]++
		}
		for range 12 {
			got := policy.DecideWith(f.straddle(index, d.Pause), flow)
			if got.Allowed != o.Allowed && got.Allowed != w.Allowed {
				return fmt.Errorf("%+v in between: tables %+v, old %+v, new %+v\n%s", flow, got, o, w, stepsText(d))
			}
		}
	}
	return nil
}

// straddle looks up like a packet: each lookup at an instant not before the last one's,
// all of them on one side of the grace period.
func (f *follower) straddle(index []policy.LookupFunc, pause int) policy.LookupFunc {
	from, to := 0, len(index)-1
	if pause > 0 {
		if f.r.IntN(2) == 0 {
			to = pause
		} else {
			from = pause
		}
	}
	at := from + f.r.IntN(to-from+1)
	return func(k policy.Key) (uint32, bool) {
		if f.r.IntN(3) == 0 {
			at += f.r.IntN(to - at + 1)
		}
		return index[at](k)
	}
}

func stepsText(d policy.Delta) string {
	var b strings.Builder
	for i, s := range d.Steps {
		fmt.Fprintf(&b, "step %d (pause %v)\n", i, d.Pause == i && i > 0)
		for _, op := range s {
			fmt.Fprintf(&b, "  delete=%v %+v\n", op.Delete, op.Element)
		}
	}
	return b.String()
}

// compare says that the tidied engine equals compiling from scratch.
func (f *follower) compare() error {
	if err := f.follow(f.change((*policy.Engine).Tidy)); err != nil {
		return fmt.Errorf("tidy: %w", err)
	}
	want := policy.Compile(f.e.Cluster(), policytest.Node(0)).Tables
	if want, got := policy.Canonical(want), policy.Canonical(f.tables); want != got {
		diff := cmp.Diff(strings.Split(want, "\n"), strings.Split(got, "\n"))
		return fmt.Errorf("from scratch (-) and incremental (+) differ:\n%s", diff)
	}
	return policy.CheckBooks(f.e, true)
}

func TestEngineFollowsEvents(t *testing.T) {
	runs := effort(3, 50, 100, 3000)
	for _, tiers := range []bool{false, true} {
		t.Run(fmt.Sprintf("tiers=%v", tiers), func(t *testing.T) {
			stats := map[string]int{}
			for seed := range runs {
				f := newFollower(seed, policytest.Options{Tiers: tiers})
				f.stats = stats
				if seed%3 == 1 {
					f.twin = newEngine(seed)
				}
				c := f.g.Cluster()
				f.model = newModel(c)
				if err := f.follow(f.change(func(e *policy.Engine) policy.Delta { return e.Replace(c) })); err != nil {
					t.Fatalf("seed %d, first replace: %v", seed, err)
				}
				for i := range 25 {
					if err := f.random(f.r.IntN(20)); err != nil {
						t.Fatalf("seed %d, event %d: %v", seed, i, err)
					}
				}
				if err := f.compare(); err != nil {
					t.Fatalf("seed %d: %v", seed, err)
				}
			}
			t.Logf("flows judged between states: %v", stats)
		})
	}
}

// TestBooksOverManyEvents makes many changes and judges few flows: what is not counted
// or not looked up again shows in the books at once.
func TestBooksOverManyEvents(t *testing.T) {
	for seed := range effort(40, 100, 100, 2000) {
		f := newFollower(seed, policytest.Options{Tiers: seed%2 == 0, Namespaces: 2, Pods: 8, Policies: 6})
		f.flows, f.model = 4, newModel(&policy.Cluster{})
		if seed%3 == 1 {
			f.twin = newEngine(seed)
		}
		for i := range 40 {
			if err := f.random(f.r.IntN(20)); err != nil {
				t.Fatalf("seed %d, event %d: %v", seed, i, err)
			}
		}
		if err := f.compare(); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
}

// TestSmallClusters judges every mixture more closely: few pods, all on this node, and
// several policies changed at once, so that directions open and close together.
func TestSmallClusters(t *testing.T) {
	paused := 0
	for seed := range effort(30, 200, 200, 6000) {
		f := newFollower(seed, policytest.Options{Namespaces: 1, Nodes: 1, Pods: 4, Policies: 4, Tiers: seed%4 == 0})
		f.flows = 40
		if err := f.follow(f.e.Replace(f.g.Cluster())); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		for i := range 6 {
			var evs []policy.Event
			for n := range 4 {
				p := f.g.Policy(n)
				evs = append(evs, policy.Event{Policy: &p})
			}
			if i%2 == 0 {
				evs = evs[:2*f.r.IntN(3)]
				for n := range 4 {
					p := f.g.Pod(n)
					evs = append(evs, policy.Event{Pod: &p})
				}
			}
			d := f.e.Apply(evs...)
			if d.Pause > 0 {
				paused++
			}
			if err := f.follow(d); err != nil {
				t.Fatalf("seed %d, event %d: %v", seed, i, err)
			}
		}
	}
	t.Logf("%d deltas through a meet", paused)
	if paused == 0 {
		t.Error("no delta went through a meet")
	}
}

// random makes the n-th kind of change.
func (f *follower) random(n int) error {
	switch {
	case n < 15:
		ev := f.g.Event()
		f.model.take(ev)
		d := f.change(func(e *policy.Engine) policy.Delta { return e.Apply(ev) })
		if err := f.follow(d); err != nil {
			return fmt.Errorf("%s: %w", describe(ev), err)
		}
		if again := f.e.Apply(ev); !again.Empty() {
			return fmt.Errorf("%s repeated gives a delta", describe(ev))
		}
		return nil
	case n < 17:
		var evs []policy.Event
		for range 2 + f.r.IntN(4) {
			evs = append(evs, f.g.Event())
			f.model.take(evs[len(evs)-1])
		}
		return f.follow(f.change(func(e *policy.Engine) policy.Delta { return e.Apply(evs...) }))
	case n < 18:
		c := f.g.Cluster()
		f.thin(c)
		f.model.replace(c)
		return f.follow(f.change(func(e *policy.Engine) policy.Delta { return e.Replace(c) }))
	case n < 19:
		if d := f.e.Replace(f.e.Cluster()); !d.Empty() {
			return fmt.Errorf("resync without a change gives a delta")
		}
		return nil
	}
	return f.compare()
}

// thin lets some objects of c vanish.
func (f *follower) thin(c *policy.Cluster) {
	gone := func() bool { return f.r.IntN(5) == 0 }
	c.Namespaces = slices.DeleteFunc(c.Namespaces, func(policy.Namespace) bool { return gone() })
	c.Pods = slices.DeleteFunc(c.Pods, func(policy.Pod) bool { return gone() })
	c.Policies = slices.DeleteFunc(c.Policies, func(policy.Policy) bool { return gone() })
	c.Nodes = slices.DeleteFunc(c.Nodes, func(policy.Node) bool { return gone() })
}

func describe(ev policy.Event) string {
	switch {
	case ev.Pod != nil:
		return fmt.Sprintf("delete=%v pod %+v", ev.Delete, *ev.Pod)
	case ev.Namespace != nil:
		return fmt.Sprintf("delete=%v namespace %+v", ev.Delete, *ev.Namespace)
	case ev.Policy != nil:
		return fmt.Sprintf("delete=%v policy %+v", ev.Delete, *ev.Policy)
	}
	return "node"
}

// TestEngineAnySequence is the state machine: whatever the order of changes, the engine
// equals compiling from scratch.
func TestEngineAnySequence(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		f := newFollower(rapid.Uint64Range(0, 1<<20).Draw(t, "seed"), policytest.Options{Tiers: rapid.Bool().Draw(t, "tiers")})
		f.flows, f.model = 40, newModel(&policy.Cluster{})
		for _, n := range rapid.SliceOfN(rapid.IntRange(0, 19), 0, 30).Draw(t, "changes") {
			if err := f.random(n); err != nil {
				t.Fatal(err)
			}
		}
		if err := f.compare(); err != nil {
			t.Fatal(err)
		}
	})
}

// TestOddPods: addresses that are none or listed twice, claims that come and go, and
// changes that mean nothing to policy.
func TestOddPods(t *testing.T) {
	a, b := policytest.Address(1, false), policytest.Address(2, false)
	pod := func(name string, created int64, addrs ...netip.Addr) *policy.Pod {
		return &policy.Pod{Name: policy.Name{Namespace: "ns0", Name: name}, Node: policytest.Node(0), Created: created, Addrs: addrs}
	}
	f := newFollower(1, policytest.Options{})
	f.flows, f.model = 0, newModel(&policy.Cluster{})
	p := networkPolicy("ns0", "p", policy.Selector{}, policy.Ingress, policy.Rule{Peers: []policy.Peer{{Pods: &policy.PodSelector{}}}})
	newer := p
	newer.Generation = 7
	finished := pod("x", 9, a)
	finished.Finished = true
	egress := networkPolicy("ns0", "q", policy.Selector{}, policy.Egress)
	for i, ev := range []policy.Event{
		{Policy: &p}, {Policy: &newer},
		{Pod: pod("x", 1, netip.Addr{}, a, a, b)}, {Policy: &egress},
		{Pod: pod("y", 2, a)}, {Pod: pod("z", 3, a, a)},
		{Pod: pod("y", 2, a), Delete: true}, {Pod: pod("z", 3), Delete: true},
		{Pod: pod("y", 0, a, b)}, {Pod: pod("x", 1, b)}, {Pod: finished}, {Pod: pod("x", 9), Delete: true},
	} {
		f.model.take(ev)
		d := f.e.Apply(ev)
		if ev.Policy == &newer && !d.Empty() {
			t.Error("another generation gives a delta")
		}
		if err := f.follow(d); err != nil {
			t.Fatalf("event %d: %v", i, err)
		}
	}
	if got := f.e.Cluster().Policies[0].Generation; got != 7 {
		t.Errorf("generation %d", got)
	}
	if err := f.compare(); err != nil {
		t.Fatal(err)
	}
}
