package policy_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/nftcni/nftcni/policy"
	"github.com/nftcni/nftcni/policy/policytest"
)

// laggard is a kernel that puts off Drops as long as the contract of Delta lets it, with
// packets that stay in flight over several deltas.
type laggard struct {
	e       *policy.Engine
	kernel  policy.Tables
	owed    []policy.Op
	states  []policy.LookupFunc
	oracles []*policy.Oracle
	r       *rand.Rand
	settled int
	judged  bool // profiles or isolation changed since the last grace period
}

// grace lets every packet in flight end.
func (l *laggard) grace(oracles int) {
	l.states = []policy.LookupFunc{maps.Clone(l.kernel).Index()}
	l.oracles = l.oracles[len(l.oracles)-oracles:]
	l.judged = false
}

// addressed reports whether a step changes an element of an address.
func addressed(s []policy.Op) bool {
	return slices.ContainsFunc(s, func(op policy.Op) bool { return op.Map <= policy.IsolatedEgress })
}

// judges reports whether d changes profiles or isolation of an address that is local in o.
func judges(d policy.Delta, o *policy.Oracle) bool {
	return slices.ContainsFunc(d.Steps, func(s []policy.Op) bool {
		return slices.ContainsFunc(s, func(op policy.Op) bool {
			a := o.Owner(op.Addr)
			return op.Map >= policy.IngressProfile && op.Map <= policy.IsolatedEgress && a != nil && a.Node == policytest.Node(0)
		})
	})
}

func (l *laggard) mustSettle(d policy.Delta) bool {
	owed := map[policy.Key]bool{}
	for _, op := range l.owed {
		owed[op.Key] = true
	}
	for _, s := range d.Steps {
		for _, op := range s {
			if owed[op.Key] {
				return true
			}
		}
	}
	return d.Settle && len(l.owed) > 0
}

func (l *laggard) apply(d policy.Delta) error {
	if l.mustSettle(d) || len(l.oracles) > 6 {
		l.settled++
		if err := l.kernel.Apply(l.owed); err != nil {
			return err
		}
		l.owed = nil
		l.grace(1)
	}
	l.oracles = append(l.oracles, policy.NewOracle(l.e.Cluster(), policytest.Node(0)))
	judged := l.judged
	for i, s := range d.Steps {
		if i > 0 && i == d.Pause || judged && addressed(s) {
			l.grace(2)
			judged = false
		}
		if err := l.kernel.Apply(s); err != nil {
			return err
		}
		l.states = append(l.states, maps.Clone(l.kernel).Index())
	}
	l.owed = append(l.owed, d.Drops...)
	l.judged = l.judged || judges(d, l.oracles[len(l.oracles)-2])
	return nil
}

// judge asks f of packets in flight: each direction must be decided as one of the
// policies that were in force meanwhile demands.
func (l *laggard) judge(f policy.Flow) error {
	egress, ingress := map[bool]bool{}, map[bool]bool{}
	for i, o := range l.oracles {
		v := o.Evaluate(f)
		first := l.oracles[0]
		if !judged(v) || i > 0 && (isLocal(first, f) != isLocal(o, f)) {
			return nil
		}
		egress[v.Egress.Action == policy.Allow] = true
		ingress[v.Ingress.Action == policy.Allow] = true
	}
	at := l.r.IntN(len(l.states))
	got := policy.DecideWith(func(k policy.Key) (uint32, bool) {
		if l.r.IntN(2) == 0 {
			at += l.r.IntN(len(l.states) - at)
		}
		return l.states[at](k)
	}, f)
	if !egress[got.Egress.Allowed] || !ingress[got.Ingress.Allowed] {
		return fmt.Errorf("%+v: tables %+v, policies in force egress %v ingress %v", f, got, egress, ingress)
	}
	return nil
}

func isLocal(o *policy.Oracle, f policy.Flow) [2]bool {
	var out [2]bool
	for i, a := range []*policy.Pod{o.Owner(f.Src), o.Owner(f.Dst)} {
		out[i] = a != nil && a.Node == policytest.Node(0)
	}
	return out
}

func TestPacketsInFlightOverSeveralDeltas(t *testing.T) {
	settled := 0
	for seed := range effort(6, 60, 60, 1000) {
		g := policytest.New(seed, policytest.Options{Tiers: seed%2 == 1})
		l := &laggard{e: policy.NewEngine(policytest.Node(0)), kernel: policy.Tables{}, r: rand.New(rand.NewPCG(seed, 3))}
		l.oracles = []*policy.Oracle{policy.NewOracle(&policy.Cluster{}, "")}
		l.grace(1)
		if err := l.apply(l.e.Replace(g.Cluster())); err != nil {
			t.Fatal(err)
		}
		l.grace(1)
		for i := range 30 {
			d := l.e.Apply(g.Event())
			if l.r.IntN(6) == 0 {
				if err := l.apply(d); err != nil {
					t.Fatalf("seed %d, event %d: %v", seed, i, err)
				}
				d = l.e.Tidy()
			}
			if err := l.apply(d); err != nil {
				t.Fatalf("seed %d, event %d: %v", seed, i, err)
			}
			c := l.e.Cluster()
			for range 150 {
				if len(c.Pods) == 0 {
					break
				}
				if err := l.judge(g.Flow(c)); err != nil {
					t.Fatalf("seed %d, event %d: %v", seed, i, err)
				}
			}
		}
		settled += l.settled
	}
	t.Logf("%d times a delta had to wait for the drops of earlier ones", settled)
}
