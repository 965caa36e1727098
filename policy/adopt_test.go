package policy_test

import (
	"fmt"
	"maps"
	"net/netip"
	"testing"

	"github.com/nftcni/nftcni/policy"
	"github.com/nftcni/nftcni/policy/policytest"
)

func TestAdopt(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(f *follower, kernel policy.Tables, c *policy.Cluster) *policy.Cluster
		adoption
	}{
		{"same cluster", func(_ *follower, _ policy.Tables, c *policy.Cluster) *policy.Cluster { return c }, adoption{empty: true, exact: true, twins: true}},
		{"events missed", func(f *follower, _ policy.Tables, c *policy.Cluster) *policy.Cluster {
			e := policy.NewEngine(policytest.Node(0))
			e.Replace(c)
			for range 3 {
				e.Apply(f.g.Event())
			}
			return e.Cluster()
		}, adoption{exact: true, twins: true}},
		{"another cluster", func(f *follower, _ policy.Tables, c *policy.Cluster) *policy.Cluster { return f.g.Cluster() }, adoption{exact: true, twins: true}},
		{"drops that were not made", func(f *follower, kernel policy.Tables, _ *policy.Cluster) *policy.Cluster {
			class, identity, profile := policy.ClassFirst, policy.IdentityFirst, policy.EgressProfileFirst
			for k, v := range kernel {
				switch k.Map {
				case policy.AccessRest:
					class = max(class, k.X)
				case policy.PodID:
					identity = max(identity, v)
				case policy.EgressProfile:
					profile = max(profile, v)
				}
			}
			kernel[policy.Key{Map: policy.AccessOthers, X: profile + 1}] = class + 1
			kernel[policy.Key{Map: policy.Access, X: profile + 1, Y: identity + 1}] = class + 1
			kernel[policy.Key{Map: policy.AccessRest, X: class + 1}] = policy.CodeDenyLog
			kernel[policy.Key{Map: policy.AccessRest, X: class + 2}] = policy.CodeAllowLog
			return f.g.Cluster()
		}, adoption{exact: true, twins: true}},
		{"corrupted kernel", func(f *follower, kernel policy.Tables, c *policy.Cluster) *policy.Cluster {
			for k, v := range maps.Clone(kernel) {
				switch f.r.IntN(10) {
				case 0:
					delete(kernel, k)
				case 1:
					if v != 0 {
						kernel[k] = v + 1
					}
				}
			}
			return c
		}, adoption{}},
		{"empty kernel", func(_ *follower, kernel policy.Tables, c *policy.Cluster) *policy.Cluster {
			clear(kernel)
			return c
		}, adoption{twins: true}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for seed := range effort(8, 60, 60, 600) {
				if err := adoptOnce(seed, tc.change, tc.adoption); err != nil {
					t.Fatalf("seed %d: %v", seed, err)
				}
			}
		})
	}
}

// TestAdoptSmallClusters judges every mixture more closely: few pods, all on this node,
// and another cluster of the same pods.
func TestAdoptSmallClusters(t *testing.T) {
	paused := 0
	for seed := range effort(60, 300, 300, 6000) {
		f := newFollower(seed, policytest.Options{Namespaces: 1, Nodes: 1, Pods: 4, Policies: 3, Tiers: seed%4 == 0})
		f.flows = 0
		if err := f.follow(f.e.Replace(f.g.Cluster())); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		f.flows = 60
		c := f.g.Cluster()
		switch seed % 3 {
		case 1: // some objects alone change
			kept := f.e.Cluster()
			kept.Policies[f.r.IntN(3)] = f.g.Policy(3)
			kept.Pods[f.r.IntN(4)] = c.Pods[0]
			c = kept
		case 2:
			kept := f.e.Cluster()
			kept.Pods = c.Pods
			c = kept
		}
		f.e = newEngine(seed)
		f.e.Adopt(maps.Clone(f.tables))
		d := f.e.Replace(c)
		if d.Pause > 0 {
			paused++
		}
		if err := f.follow(d); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if err := f.compare(); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
	t.Logf("%d deltas through a meet", paused)
	if paused == 0 {
		t.Error("no delta went through a meet")
	}
}

// adoption is what is wanted of one.
type adoption struct {
	empty bool // nothing to do
	exact bool // the kernel holds the old policy, and each step is right
	twins bool // the same numbers each time
}

func adoptOnce(seed uint64, change func(*follower, policy.Tables, *policy.Cluster) *policy.Cluster, want adoption) error {
	f := newFollower(seed, policytest.Options{Tiers: seed%2 == 1})
	f.flows, f.model = 0, newModel(&policy.Cluster{})
	for range 15 {
		if err := f.random(f.r.IntN(20)); err != nil {
			return err
		}
	}
	if want.empty || seed%4 < 2 {
		if err := f.follow(f.change((*policy.Engine).Tidy)); err != nil {
			return err
		}
	}
	c := change(f, f.tables, f.e.Cluster())
	f.model = newModel(c)
	f.e, f.twin = policy.NewEngine(policytest.Node(0)), nil
	if want.twins {
		f.twin = policy.NewEngine(policytest.Node(0))
	}
	d := f.change(func(e *policy.Engine) policy.Delta {
		e.Adopt(maps.Clone(f.tables))
		return e.Replace(c)
	})
	if want.empty && !d.Empty() {
		return fmt.Errorf("delta of an unchanged cluster:\n%sdrops %+v", stepsText(d), d.Drops)
	}
	if want.exact {
		f.flows = 200
	}
	if err := f.follow(d); err != nil {
		return err
	}
	f.flows = 30
	for range 5 {
		if err := f.random(f.r.IntN(20)); err != nil {
			return fmt.Errorf("after adoption: %w", err)
		}
	}
	return f.compare()
}

// TestRangesStayWhenPodsSplit: addresses that kept their elements after a restart share
// an identity with the ranges they are in; a new rule tells most of them from the ranges.
func TestRangesStayWhenPodsSplit(t *testing.T) {
	s := policytest.Shape{Pods: 12, Namespaces: 1, Local: 1}
	selector := func(key, value string) policy.Selector {
		return policy.Selector{Requirements: []policy.Requirement{{Key: key, Values: []string{value}}}}
	}
	c := s.Cluster()
	for i := range c.Pods {
		c.Pods[i].Labels = policy.MakeLabels(map[string]string{"team": "red"})
		c.Pods[i].Node = policytest.Node(1)
	}
	c.Pods[0].Node = policytest.Node(0)
	block := policy.Rule{Peers: []policy.Peer{{Block: &policy.Block{CIDR: netip.MustParsePrefix("10.0.0.0/28")}}}}
	other := policy.Rule{Peers: []policy.Peer{{Block: &policy.Block{CIDR: netip.MustParsePrefix("10.0.0.8/31")}}}}
	red := policy.Rule{Peers: []policy.Peer{{Pods: &policy.PodSelector{Pods: selector("team", "red")}}}}
	named := func(name string, r ...policy.Rule) policy.Policy {
		return networkPolicy("ns0", name, policy.Selector{}, policy.Egress, r...)
	}
	f := newFollower(1, policytest.Options{})
	f.flows = 20
	c.Policies = []policy.Policy{named("a", block), named("b", red)}
	if err := f.follow(f.e.Replace(c)); err != nil {
		t.Fatal(err)
	}
	less := *c
	less.Policies = c.Policies[:1]
	f.e = policy.NewEngine(policytest.Node(0))
	f.e.Adopt(maps.Clone(f.tables))
	if err := f.follow(f.e.Replace(&less)); err != nil {
		t.Fatal(err)
	}
	again, cut := named("b", red), named("c", other)
	for _, ev := range []policy.Event{{Policy: &again}, {Policy: &cut}, {Policy: &again, Delete: true}, {Policy: &cut, Delete: true}} {
		if err := f.follow(f.e.Apply(ev)); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.compare(); err != nil {
		t.Fatal(err)
	}
}
