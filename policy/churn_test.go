package policy_test

import (
	"fmt"
	"testing"

	"github.com/nftcni/nftcni/policy"
	"github.com/nftcni/nftcni/policy/policytest"
)

// TestChurnLeavesNothing lets thousands of different policies come and go: afterwards
// the tables are those of the cluster, with none of what was.
func TestChurnLeavesNothing(t *testing.T) {
	f := newFollower(7, policytest.Options{})
	f.flows = 0
	if err := f.follow(f.e.Replace(f.g.Cluster())); err != nil {
		t.Fatal(err)
	}
	for i := range effort(250, 2500, 2500, 25000) {
		p := networkPolicy("ns0", fmt.Sprintf("churn%d", i), policy.Selector{}, policy.Directions[i%2], policy.Rule{
			Peers: []policy.Peer{{Pods: &policy.PodSelector{Pods: policy.Selector{Requirements: []policy.Requirement{{Key: "app", Op: policy.NotIn, Values: []string{fmt.Sprint(i)}}}}}}},
			Ports: []policy.PortMatch{{Protocol: policy.TCP, First: uint16(i), Last: uint16(2 * i)}, {Protocol: policy.TCP, Name: "http"}},
		})
		if err := f.follow(f.e.Apply(policy.Event{Policy: &p})); err != nil {
			t.Fatal(err)
		}
		if err := f.follow(f.e.Apply(policy.Event{Policy: &p, Delete: true})); err != nil {
			t.Fatal(err)
		}
		if i%50 == 0 {
			if err := f.compare(); err != nil {
				t.Fatalf("after %d policies: %v", i, err)
			}
		}
	}
	if err := f.compare(); err != nil {
		t.Fatal(err)
	}
	f.flows = 300
	for range 10 {
		if err := f.random(f.r.IntN(20)); err != nil {
			t.Fatal(err)
		}
	}
}
