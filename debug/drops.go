package debug

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
)

// Drop is what one pair of addresses was refused since the agent's table was made, or
// since the entry expired (an hour without a packet).
type Drop struct {
	Direction string     `json:"direction"` // whose policy: egress of Src or ingress of Dst
	Policies  string     `json:"policies"`  // that isolate the pod, or the rule that denies
	Src       string     `json:"src"`
	Dst       string     `json:"dst"`
	SrcAddr   netip.Addr `json:"srcAddress"`
	DstAddr   netip.Addr `json:"dstAddress"`
	Packets   uint64     `json:"packets"`
	Bytes     uint64     `json:"bytes"`
}

type drops struct {
	Counters []Drop       `json:"counters"`
	Last     []agent.Flow `json:"last"`
}

func (s *session) dropsCommand() *cobra.Command {
	var last int
	cmd := &cobra.Command{
		Use:   "drops",
		Short: "Count what policy denied, by policies and pods, and list the last denials",
		Long: "Count what policy denied, by policies and pods, and list the last denials. The counters\n" +
			"are the kernel's and count every packet; an entry expires after an hour without one.",
		Example: "  nftcni debug drops\n  nftcni debug drops --last 10 -o json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkLast(last); err != nil {
				return err
			}
			d, err := s.drops(cmd.Context(), last, noticeTo(cmd))
			if err != nil {
				return err
			}
			return s.print(cmd, d, d.write)
		},
	}
	cmd.Flags().IntVar(&last, "last", 100, "how many of the last denials")
	return cmd
}

func (s *session) drops(ctx context.Context, last int, notice func(string)) (drops, error) {
	d := drops{Counters: []Drop{}, Last: []agent.Flow{}}
	snap, err := s.snapshot(ctx, notice)
	if err != nil {
		return d, err
	}
	r, err := nft.NewReader(ctx, nft.Options{})
	if err != nil {
		return d, fmt.Errorf("read the kernel's table: %w", err)
	}
	defer func() { _ = r.Close() }()
	denials, err := r.Denials(ctx)
	if err != nil {
		return d, err
	}
	n := newNames(snap)
	for _, x := range denials {
		d.Counters = append(d.Counters, n.drop(x))
	}
	slices.SortFunc(d.Counters, func(a, b Drop) int {
		return cmp.Or(cmp.Compare(b.Packets, a.Packets), cmp.Compare(a.Src, b.Src), cmp.Compare(a.Dst, b.Dst), a.SrcAddr.Compare(b.SrcAddr))
	})
	var got agent.Flows
	if s.get(ctx, agent.PathFlows+"?limit=8192", &got) == nil { // without the agent there are the counters
		list := flowFlags{denied: true}.keep(got.Flows)
		d.Last = newest(list, last)
	}
	return d, nil
}

func (n names) drop(x nft.Denial) Drop {
	dir := x.Direction()
	v := n.oracle.Evaluate(policy.Flow{Src: x.Src, Dst: x.Dst})
	decision := v.Ingress
	if dir == policy.Egress {
		decision = v.Egress
	}
	return Drop{Direction: dir.String(), Policies: policiesOf(decision), Src: n.of(x.Src), Dst: n.of(x.Dst),
		SrcAddr: x.Src, DstAddr: x.Dst, Packets: x.Packets, Bytes: x.Bytes}
}

// policiesOf names what denies by a decision: "" where nothing does any more.
func policiesOf(d policy.Decision) string {
	switch d.Reason {
	case policy.Isolated:
		return join(d.Isolating)
	case policy.RuleMatched:
		return d.Policy.String()
	}
	return "(none now: the policy has changed)"
}

func (d drops) write(w io.Writer) error {
	t := &table{header: []string{"PACKETS", "BYTES", "FROM", "TO", "BY", "POLICIES"}}
	for _, x := range d.Counters {
		t.add(strconv.FormatUint(x.Packets, 10), strconv.FormatUint(x.Bytes, 10), x.Src, x.Dst, x.Direction, x.Policies)
	}
	if len(t.rows) == 0 {
		fmt.Fprintln(w, "Nothing has been denied.")
	} else if err := t.write(w); err != nil {
		return err
	}
	if len(d.Last) == 0 {
		return nil
	}
	fmt.Fprintf(w, "\nThe last %s (sampled):\n", plural(len(d.Last), "denial"))
	return writeFlows(w, d.Last, true)
}
