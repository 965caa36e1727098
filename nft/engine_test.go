package nft_test

import (
	"context"
	"maps"
	"testing"

	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
	"github.com/nftcni/nftcni/policy/policytest"
)

// TestKernelHoldsTheEngine: what the engine says, step by step, is what the kernel holds, and the kernel's elements give the
// oracle's answers.
func TestKernelHoldsTheEngine(t *testing.T) {
	namespace(t)
	ctx := context.Background()
	flows := 0
	for seed := range uint64(6) {
		if err := nft.Delete(ctx, nft.Options{}); err != nil {
			t.Fatal(err)
		}
		table := open(t, nft.Options{})
		g := policytest.New(seed, policytest.Options{Tiers: seed%2 == 1})
		node := policytest.Node(0)
		engine := policy.NewEngine(node)
		for round := range 4 {
			c := g.Cluster()
			r := apply(t, table, nft.Change{Delta: engine.Replace(c)})
			if round%2 == 0 {
				finish(t, table, r)
			}
			got := state(t, table).Tables
			if !maps.Equal(got, engine.Tables()) {
				t.Fatalf("seed %d round %d: kernel and engine differ in %d and %d elements", seed, round, len(got), len(engine.Tables()))
			}
			for range 100 {
				f := g.Flow(c)
				want := policy.Evaluate(c, node, f)
				v, err := table.Decide(ctx, f)
				if err != nil {
					t.Fatal(err)
				}
				if exempt(want) {
					continue
				}
				flows++
				if v.Allowed != want.Allowed {
					t.Errorf("seed %d round %d: %+v: kernel %v, oracle %v", seed, round, f, v.Allowed, want.Allowed)
				}
			}
		}
		_ = table.Close()
	}
	t.Logf("%d flows", flows)
}

// exempt flows never reach the maps: hairpin and a pod's own node.
func exempt(v policy.Verdict) bool {
	for _, d := range []policy.Decision{v.Egress, v.Ingress} {
		if d.Reason == policy.SamePod || d.Reason == policy.OwnNode {
			return true
		}
	}
	return false
}
