package policy_test

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/nftcni/nftcni/policy"
	"github.com/nftcni/nftcni/policy/policytest"
)

// judged reports whether the tables decide f, and not what the ruleset exempts before.
func judged(v policy.Verdict) bool {
	for _, d := range []policy.Decision{v.Egress, v.Ingress} {
		if d.Reason == policy.SamePod || d.Reason == policy.OwnNode {
			return false
		}
	}
	return true
}

// reasons names what decided f, for the histogram.
func reasons(c *policy.Cluster, v policy.Verdict) []string {
	out := []string{"allowed"}
	if !v.Allowed {
		out[0] = "denied"
	}
	for dir, d := range map[policy.Direction]policy.Decision{policy.Egress: v.Egress, policy.Ingress: v.Ingress} {
		if d.Reason != policy.RuleMatched && d.Reason != policy.Isolated {
			continue
		}
		out = append(out, "by "+dir.String(), d.Reason.String())
		if d.Reason == policy.RuleMatched {
			i := slices.IndexFunc(c.Policies, func(p policy.Policy) bool { return p.ID == d.Policy })
			r := c.Policies[i].Rules[dir][d.Rule]
			if d.Peer >= 0 && r.Peers[d.Peer].Block != nil {
				out = append(out, "ipBlock")
			}
			if d.Port >= 0 && r.Ports[d.Port].Name != "" {
				out = append(out, "named port")
			}
			if d.Port >= 0 && r.Ports[d.Port].Name == "" && r.Ports[d.Port].First != r.Ports[d.Port].Last {
				out = append(out, "endPort")
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func TestTablesEqualOracle(t *testing.T) {
	clusters := effort(60, 500, 2700, 5400) // 250 flows each, with tiers half as many
	for _, tiers := range []bool{false, true} {
		t.Run(fmt.Sprintf("tiers=%v", tiers), func(t *testing.T) {
			n := clusters
			if tiers {
				n /= 2
			}
			histogram, total := map[string]int{}, 0
			looked := []string{"named port", "", "", "", "", "", "", ""} // decide too few flows unless they are looked for
			if tiers {
				looked = []string{"named port", "ipBlock", "endPort", "named port", "", "", "", "rule"}
			}
			for seed := range n {
				g := policytest.New(seed, policytest.Options{Tiers: tiers})
				c := g.Cluster()
				oracle := policy.NewOracle(c, policytest.Node(0))
				lookup := policy.Compile(c, policytest.Node(0)).Tables.Index()
				for asked, tries := 0, 0; asked < 250 && tries < 3000; tries++ {
					f := g.Flow(c)
					want := oracle.Evaluate(f)
					if !judged(want) || want.Egress.Reason <= policy.NotSelected && want.Ingress.Reason <= policy.NotSelected && tries%8 != 0 {
						continue
					}
					why := reasons(c, want)
					if l := looked[asked%len(looked)]; l != "" && tries < 2000 && !slices.Contains(why, l) {
						continue
					}
					asked++
					got := policy.DecideWith(lookup, f)
					if got.Allowed != want.Allowed || got.Log != want.Log {
						t.Fatalf("seed %d: %+v: tables %+v, oracle %+v", seed, f, got, want)
					}
					total++
					for _, r := range why {
						histogram[r]++
					}
				}
			}
			checkHistogram(t, histogram, total)
		})
	}
}

func checkHistogram(t *testing.T, histogram map[string]int, total int) {
	var b strings.Builder
	for _, k := range slices.Sorted(maps.Keys(histogram)) {
		fmt.Fprintf(&b, "\n%-12s %6.1f%%", k, 100*float64(histogram[k])/float64(total))
	}
	t.Logf("%d flows%s", total, b.String())
	for k, share := range map[string]float64{"denied": .25, "ipBlock": .1, "named port": .1, "endPort": .1, "by egress": .1} {
		if float64(histogram[k]) < share*float64(total) {
			t.Errorf("only %d of %d flows are %s, want %.0f%%", histogram[k], total, k, 100*share)
		}
	}
}
