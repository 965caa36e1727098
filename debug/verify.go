package debug

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
)

// Verification is what debug verify found.
type Verification struct {
	// Rules is the first difference between the kernel's chains and rules and this version's: they
	// decide otherwise, whatever the elements say.
	Rules    string `json:"rules,omitempty"`
	Elements int    `json:"elements"` // read back from the kernel
	Want     int    `json:"want"`     // of a compilation from scratch
	// Equal: both tables are the same up to renaming numbers and to what nothing needs.
	Equal      bool     `json:"equal"`
	Flows      int      `json:"flows"` // probed
	Wrong      []string `json:"wrong,omitempty"`
	WrongCount int      `json:"wrongCount"`
	Seed       uint64   `json:"seed"`
	Millis     int64    `json:"millis"`

	have policy.Tables
}

func (s *session) verifyCommand() *cobra.Command {
	var flows int
	var seed uint64
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "Compare the kernel's table with what it should be",
		Long: "Read the kernel's table back, compare its rules with this version's and its elements with a\n" +
			"compilation from scratch, and probe them with random flows of the pods, policies' addresses\n" +
			"and ports against the oracle.\n\n" +
			"Exit status 2: rules are not as they should be, or a flow is decided otherwise than policy says.",
		Example: "  nftcni debug verify\n  nftcni debug verify --flows 100000 --seed 7",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if flows < 0 {
				return fmt.Errorf("flag --flows is %d: it takes 0 or more", flows)
			}
			if seed == 0 {
				seed = rand.Uint64()
			}
			v, err := s.verify(cmd.Context(), flows, seed, noticeTo(cmd))
			if err != nil {
				return err
			}
			if err := s.print(cmd, v, v.write); err != nil {
				return err
			}
			return v.disagreement()
		},
	}
	cmd.Flags().IntVar(&flows, "flows", 0, "how many random flows; 0: as many as 50 ms take, and 2,000 at least")
	cmd.Flags().Uint64Var(&seed, "seed", 0, "of the random flows, to repeat a run; 0: a new one")
	return cmd
}

func (v Verification) disagreement() error {
	switch {
	case v.Rules != "":
		return &ExitError{Status: ExitDisagree, Err: errors.New(rulesDiffer(v.Rules))}
	case v.WrongCount > 0:
		return &ExitError{Status: ExitDisagree, Err: fmt.Errorf("%d of %s decided otherwise than policy says", v.WrongCount, plural(v.Flows, "flow"))}
	}
	return nil
}

// rulesDiffer tells of a difference of the table's rules, and what to do.
func rulesDiffer(difference string) string {
	return "the table's rules are not those of this version (" + difference +
		"): somebody changed them, or the agent is of another version; restart the agent, which replaces the table without a gap"
}

func (s *session) verify(ctx context.Context, flows int, seed uint64, notice func(string)) (Verification, error) {
	began := time.Now()
	snap, err := s.snapshot(ctx, notice)
	if err != nil {
		return Verification{}, err
	}
	v, err := verifySnapshot(ctx, snap)
	if err != nil {
		return v, err
	}
	v.Seed = seed
	v.probe(snap, v.have, flows, rand.New(rand.NewPCG(seed, 0)))
	v.Millis = time.Since(began).Milliseconds()
	return v, nil
}

// verifySnapshot compares the kernel's table with a compilation of the snapshot.
func verifySnapshot(ctx context.Context, snap agent.Snapshot) (Verification, error) {
	var v Verification
	r, err := nft.NewReader(ctx, nft.Options{})
	if err != nil {
		return v, fmt.Errorf("read the kernel's table: %w", err)
	}
	defer func() { _ = r.Close() }()
	if v.Rules, err = r.Differs(ctx); err != nil {
		return v, fmt.Errorf("read the kernel's table: %w", err)
	}
	if v.have, err = r.Tables(ctx); err != nil {
		return v, err
	}
	want := policy.Compile(snap.Cluster, snap.Node).Tables
	v.Elements, v.Want = len(v.have), len(want)
	v.Equal = len(v.have) == len(want) && policy.Canonical(v.have) == policy.Canonical(want)
	return v, nil
}

// maxWrong is how many disagreements are listed.
const maxWrong = 20

// Bounds of the probes whose number was not given: so long, but so many on a busy machine too.
const (
	probeBudget = 50 * time.Millisecond
	leastProbes = 2000
)

// probe asks the oracle and the tables about random flows of which one end is local.
func (v *Verification) probe(snap agent.Snapshot, tables policy.Tables, flows int, rnd *rand.Rand) {
	local, all := probeEnds(snap)
	if len(local) == 0 {
		return
	}
	cuts, began := spans(snap.Cluster), time.Now()
	oracle, lookup, names := policy.NewOracle(snap.Cluster, snap.Node), tables.Index(), newNames(snap)
	for v.Flows < cmp.Or(flows, leastProbes) || flows == 0 && time.Since(began) < probeBudget {
		f := randomFlow(local, all, cuts, rnd)
		v.Flows++
		want, got := oracle.Evaluate(f), policy.DecideWith(lookup, f)
		for i, d := range []policy.Decision{want.Egress, want.Ingress} {
			side := Side{oracle: d, Agree: true}
			side.compare([2]policy.TableDecision{got.Egress, got.Ingress}[i])
			if side.Agree {
				continue
			}
			v.WrongCount++
			text := fmt.Sprintf("%s -> %s %s: %s is %s by policy (%s), %s in the kernel", names.of(f.Src), names.of(f.Dst),
				serviceName(f), [2]string{"egress", "ingress"}[i], d.Action, because(d), allowDeny(side.Kernel.Allowed))
			if len(v.Wrong) < maxWrong && !slices.Contains(v.Wrong, text) {
				v.Wrong = append(v.Wrong, text)
			}
		}
	}
	slices.Sort(v.Wrong)
}

// probeEnds are the addresses of this node's pods, and those of all pods, of world and
// of the ipBlocks that policies name.
func probeEnds(snap agent.Snapshot) (local, all []netip.Addr) {
	for _, p := range snap.Cluster.Pods {
		if p.Finished || p.HostNetwork {
			continue
		}
		all = append(all, p.Addrs...)
		if p.Node == snap.Node {
			local = append(local, p.Addrs...)
		}
	}
	for _, w := range outsiders(snap.Cluster) {
		all = append(all, w.addrs...)
	}
	for _, list := range [][]netip.Addr{local, all} { // so that a seed means the same flows in the next run
		slices.SortFunc(list, netip.Addr.Compare)
	}
	return local, all
}

// randomFlow is between a local address and any of its family.
func randomFlow(local, all []netip.Addr, cuts []probeSpan, rnd *rand.Rand) policy.Flow {
	f := policy.Flow{Src: local[rnd.IntN(len(local))]}
	for !f.Dst.IsValid() || f.Dst.Is4() != f.Src.Is4() {
		f.Dst = all[rnd.IntN(len(all))] // it ends: the local address is one of all
	}
	if rnd.IntN(2) == 0 {
		f.Src, f.Dst = f.Dst, f.Src
	}
	s := cuts[rnd.IntN(len(cuts))]
	f.Protocol, f.Port = s.protocol, [2]uint16{s.first, s.last}[rnd.IntN(2)]
	if f.Protocol == policy.ICMP && f.Src.Is6() {
		f.Protocol = policy.ICMPv6
	}
	return f
}

func (v Verification) write(w io.Writer) error {
	t := &table{header: []string{"CHECK", "RESULT"}}
	equal := "equal to a compilation from scratch"
	if !v.Equal {
		equal = fmt.Sprintf("%d elements where a compilation from scratch has %d (elements that nothing needs any more may be left until the agent is idle)", v.Elements, v.Want)
	}
	t.add("rules", cmp.Or(v.Rules, "those of this version"))
	t.add("elements", fmt.Sprintf("%d read, %s", v.Elements, equal))
	t.add("flows", fmt.Sprintf("%d probed with seed %d, %d decided otherwise than policy says", v.Flows, v.Seed, v.WrongCount))
	t.add("took", fmt.Sprintf("%d ms", v.Millis))
	for _, x := range v.Wrong {
		t.add("WRONG", x)
	}
	return t.write(w)
}
