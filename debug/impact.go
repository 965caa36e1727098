package debug

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/spf13/cobra"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
)

// Impact is what a change of objects would do. Nothing of it is applied.
type Impact struct {
	Cut      []CutFlow      `json:"cut"`
	Changes  []AccessChange `json:"changes"`
	Elements ElementDelta   `json:"elements"`
	Notes    []string       `json:"notes,omitempty"`
}

// CutFlow is a live connection of this node that the change would deny.
type CutFlow struct {
	Flow       FlowView `json:"flow"`
	Src        string   `json:"src"`
	Dst        string   `json:"dst"`
	ClientPort uint16   `json:"clientPort,omitempty"`
	Because    string   `json:"because"`
}

// AccessChange is a pair of workloads whose services change.
type AccessChange struct {
	Src    string `json:"src"`
	Dst    string `json:"dst"`
	Before string `json:"before"`
	After  string `json:"after"`
}

// ElementDelta is what this node's table would get: exactly what the agent would send.
type ElementDelta struct {
	Transactions int            `json:"transactions"`
	Added        map[string]int `json:"added"`   // by set
	Deleted      map[string]int `json:"deleted"` // by set
	Revokes      bool           `json:"revokes"` // established connections are judged again
	Ops          []string       `json:"ops"`     // "+ set element value", "- set element"
}

type impactFlags struct {
	files   string
	deletes []string
	ops     bool
}

func (s *session) impactCommand() *cobra.Command {
	var fl impactFlags
	cmd := &cobra.Command{
		Use:   "impact [-f FILE] [--delete policy/NS/NAME]",
		Short: "Say what a change of policies would do, without doing it",
		Long: "Say what a change would do, without doing it: the live connections of this node that\n" +
			"would be cut, the workloads that would gain or lose access, and the elements that the\n" +
			"kernel's table would get. Objects of -f are added to the cluster or replace theirs.\n\n" +
			"Exit status 3: live connections would be cut.",
		Example: "  nftcni debug impact -f new-policy.yaml\n  nftcni debug impact --delete policy/shop/db\n  nftcni debug impact -f ./manifests --ops\n  nftcni debug impact -f new-policy.yaml -o json | jq .cut",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			snap, err := s.snapshot(cmd.Context(), noticeTo(cmd))
			if err != nil {
				return err
			}
			after, err := fl.change(snap.Cluster, noticeTo(cmd))
			if err != nil {
				return err
			}
			im := newImpact(cmd.Context(), snap, after)
			if err := s.print(cmd, im, func(w io.Writer) error { return im.write(w, fl.ops) }); err != nil {
				return err
			}
			if n := len(im.Cut); n > 0 {
				return &ExitError{Status: ExitCuts, Err: fmt.Errorf("%s would be cut", plural(n, "live connection"))}
			}
			return nil
		},
	}
	cmd.Flags().StringVarP(&fl.files, "filename", "f", "", "manifests to apply: a file or a directory")
	cmd.Flags().StringArrayVar(&fl.deletes, "delete", nil, "an object to delete: policy/NAMESPACE/NAME (may be repeated)")
	_ = cmd.RegisterFlagCompletionFunc("delete", s.completeDeleted)
	cmd.Flags().BoolVar(&fl.ops, "ops", false, "list every element")
	return cmd
}

// change returns the cluster after the change.
func (fl impactFlags) change(c *policy.Cluster, notice func(string)) (*policy.Cluster, error) {
	if fl.files == "" && len(fl.deletes) == 0 {
		return nil, fmt.Errorf("say what changes: -f FILE, --delete policy/NAMESPACE/NAME, or both")
	}
	after := *c
	if fl.files != "" {
		changes, err := checkManifestsAsIs(fl.files, notice)
		if err != nil {
			return nil, err
		}
		after = *overlay(c, changes)
	}
	for _, d := range fl.deletes {
		kind, name, _ := strings.Cut(d, "/")
		if kind != "policy" && kind != "networkpolicy" || !strings.Contains(name, "/") {
			return nil, fmt.Errorf("flag --delete is %q: it takes policy/NAMESPACE/NAME", d)
		}
		n := len(after.Policies)
		after.Policies = slices.DeleteFunc(slices.Clone(after.Policies), func(p policy.Policy) bool { return p.ID.String() == name })
		if len(after.Policies) == n {
			return nil, fmt.Errorf("flag --delete: there is no policy %s (nftcni debug policies lists them)", name)
		}
	}
	return &after, nil
}

func newImpact(ctx context.Context, snap agent.Snapshot, after *policy.Cluster) Impact {
	im := Impact{Cut: []CutFlow{}}
	var wg sync.WaitGroup // the two that take long at 10,000 pods; clusters are immutable
	wg.Go(func() { im.Elements = elementDelta(snap, after) })
	im.Changes = accessChanges(snap.Cluster, after)
	wg.Wait()
	live, err := liveFlows(ctx)
	if err != nil {
		im.Notes = append(im.Notes, err.Error())
	}
	im.Cut = append(im.Cut, cutFlows(snap, after, live)...)
	return im
}

// cutFlows are the live flows that are allowed before and not after.
func cutFlows(snap agent.Snapshot, after *policy.Cluster, live []connection) []CutFlow {
	names, later := newNames(snap), policy.NewOracle(after, snap.Node)
	why := newReasons(after, snap.Node)
	var out []CutFlow
	for _, c := range live {
		if c.ended || c.mark == policy.DeniedMark || !names.oracle.Evaluate(c.flow).Allowed || later.Evaluate(c.flow).Allowed {
			continue
		}
		v := policy.EvaluateAll(after, snap.Node, c.flow)
		a := Answer{Egress: why.side(v.Egress, policy.Egress, c.flow), Ingress: why.side(v.Ingress, policy.Ingress, c.flow)}
		out = append(out, CutFlow{Flow: flowView(c.flow), Src: names.of(c.flow.Src), Dst: names.of(c.flow.Dst), ClientPort: c.clientPort, Because: decidedBy(a)})
	}
	slices.SortFunc(out, func(a, b CutFlow) int { return cmp.Or(cmp.Compare(a.Src, b.Src), cmp.Compare(a.Dst, b.Dst)) })
	return out
}

// accessChanges compares the pictures of the two clusters, over the workloads and the
// services that either names.
func accessChanges(before, after *policy.Cluster) []AccessChange {
	both := &policy.Cluster{Pods: after.Pods, Policies: slices.Concat(before.Policies, after.Policies)}
	list, cuts := workloads(both), spans(both)
	old, now := newAccess(before, list, cuts), newAccess(after, list, cuts)
	out := []AccessChange{}
	for i, j := range now.indices() {
		was, _ := old.services(i, j)
		if is, _ := now.services(i, j); is != was {
			out = append(out, AccessChange{list[i].name, list[j].name, was, is})
		}
	}
	return out
}

// elementDelta lets the agent's engine go from one cluster to the other.
func elementDelta(snap agent.Snapshot, after *policy.Cluster) ElementDelta {
	e := policy.NewEngine(snap.Node)
	e.Replace(snap.Cluster)
	d := e.Replace(after)
	out := ElementDelta{Transactions: len(d.Steps), Added: map[string]int{}, Deleted: map[string]int{}, Ops: []string{}, Revokes: d.Revokes}
	if len(d.Drops) > 0 {
		out.Transactions++
	}
	for _, op := range slices.Concat(append(slices.Clone(d.Steps), d.Drops)...) {
		set := nft.ElementSet(op.Key)
		if op.Delete {
			out.Deleted[set]++
			out.Ops = append(out.Ops, "- "+set+" "+elementText(op.Key))
			continue
		}
		out.Added[set]++
		out.Ops = append(out.Ops, strings.TrimRight("+ "+set+" "+elementText(op.Key)+" "+valueText(op.Map, op.Value)+"  "+op.Comment, " "))
	}
	return out
}

func (im Impact) write(w io.Writer, ops bool) error {
	fmt.Fprintf(w, "Live connections that would be cut: %d\n", len(im.Cut))
	if len(im.Cut) > 0 {
		t := &table{header: []string{"FROM", "PORT", "TO", "SERVICE", "BECAUSE"}}
		for _, c := range im.Cut {
			t.add(c.Src, strconv.Itoa(int(c.ClientPort)), c.Dst, c.Flow.service(), c.Because)
		}
		if err := t.write(w); err != nil {
			return err
		}
	}
	fmt.Fprintf(w, "\nWorkloads whose access changes: %s\n", plural(len(im.Changes), "pair"))
	if len(im.Changes) > 0 {
		t := &table{header: []string{"FROM", "TO", "BEFORE", "AFTER"}}
		for _, c := range im.Changes {
			t.add(c.Src, c.Dst, c.Before, c.After)
		}
		if err := t.write(w); err != nil {
			return err
		}
	}
	return im.writeElements(w, ops)
}

func (im Impact) writeElements(w io.Writer, ops bool) error {
	e := im.Elements
	fmt.Fprintf(w, "\nThis node's table: %s in %s", plural(len(e.Ops), "element"), plural(e.Transactions, "transaction"))
	if e.Revokes {
		fmt.Fprint(w, "; established connections are judged again")
	}
	fmt.Fprintln(w)
	t := &table{header: []string{"SET", "ADDED", "DELETED"}}
	sets := map[string]bool{}
	for _, m := range []map[string]int{e.Added, e.Deleted} {
		for set := range m {
			sets[set] = true
		}
	}
	for _, set := range sortedKeys(sets) {
		t.add(set, strconv.Itoa(e.Added[set]), strconv.Itoa(e.Deleted[set]))
	}
	if len(t.rows) > 0 {
		if err := t.write(w); err != nil {
			return err
		}
	}
	if ops {
		fmt.Fprintln(w, strings.Join(append([]string{""}, e.Ops...), "\n"))
	}
	for _, n := range im.Notes {
		fmt.Fprintln(w, "note: "+n)
	}
	return nil
}
