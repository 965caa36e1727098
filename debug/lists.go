package debug

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/cni"
	"github.com/nftcni/nftcni/policy"
)

// PodRow is one pod as policy sees it.
type PodRow struct {
	Namespace  string            `json:"namespace"`
	Name       string            `json:"name"`
	Node       string            `json:"node,omitempty"`
	Local      bool              `json:"local"`
	Addresses  []netip.Addr      `json:"addresses"`
	Interfaces []string          `json:"interfaces,omitempty"` // host side
	Labels     map[string]string `json:"labels"`
	Note       string            `json:"note,omitempty"`
}

func (s *session) podsCommand() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:     "pods",
		Short:   "List the pods of this node with addresses, interface and labels",
		Example: "  nftcni debug pods\n  nftcni debug pods --all -o yaml",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			pods, err := s.pods(cmd.Context(), all, noticeTo(cmd))
			if err != nil {
				return err
			}
			rows := podRows(pods, all)
			return s.print(cmd, rows, func(w io.Writer) error { return writePods(w, rows) })
		},
	}
	cmd.Flags().BoolVarP(&all, "all", "A", false, "pods of other nodes too")
	return cmd
}

// pods are the agent's, or those of its snapshot file, which knows no interfaces: those
// are in the attachments.
func (s *session) pods(ctx context.Context, all bool, notice func(string)) ([]agent.Pod, error) {
	var pods []agent.Pod
	path := agent.PathPods
	if !all {
		path += "?local=1"
	}
	err := s.get(ctx, path, &pods)
	if !errors.Is(err, errNoAgent) {
		return pods, err
	}
	snap, err := s.left(err, notice)
	if err != nil {
		return nil, err
	}
	interfaces := map[string][]string{}
	list, _ := cni.Attachments(s.runDir) // doctor tells of records that cannot be read
	for _, a := range list {
		pod := a.Namespace + "/" + a.Pod
		interfaces[pod] = append(interfaces[pod], a.HostInterface)
	}
	for _, p := range snap.Cluster.Pods {
		local := p.Node == snap.Node
		one := agent.Pod{Pod: p, Local: local}
		if local {
			one.Interfaces = interfaces[p.Name.String()]
		}
		pods = append(pods, one)
	}
	return pods, nil
}

func podRows(pods []agent.Pod, all bool) []PodRow {
	rows := []PodRow{}
	for _, p := range pods {
		if p.Local || all {
			rows = append(rows, PodRow{Namespace: p.Namespace, Name: p.Pod.Name.Name, Node: p.Node, Local: p.Local,
				Addresses: p.Addrs, Interfaces: p.Interfaces, Labels: p.Labels.Map(), Note: note(p.Pod)})
		}
	}
	slices.SortFunc(rows, func(a, b PodRow) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	return rows
}

func writePods(w io.Writer, rows []PodRow) error {
	if len(rows) == 0 {
		_, err := fmt.Fprintln(w, "This node has no pods (--all lists those of other nodes).")
		return err
	}
	t := &table{header: []string{"NAMESPACE", "POD", "ADDRESSES", "INTERFACE", "LABELS", "NOTE"}}
	for _, r := range rows {
		t.add(r.Namespace, r.Name, join(r.Addresses), orDash(strings.Join(r.Interfaces, ",")), orDash(policy.MakeLabels(r.Labels).String()), orDash(r.Note))
	}
	return t.write(w)
}

// note says why a pod is not judged by its address, "" when it is.
func note(p policy.Pod) string {
	switch {
	case p.Finished:
		return "finished: owns no address"
	case p.HostNetwork:
		return "host network: its node's address"
	case len(p.Addrs) == 0:
		return "no address yet"
	}
	return ""
}

// PolicyRow is one policy and when the kernel took it.
type PolicyRow struct {
	Namespace    string    `json:"namespace,omitempty"`
	Name         string    `json:"name"`
	Kind         string    `json:"kind"`
	Directions   []string  `json:"directions"`
	IngressRules int       `json:"ingressRules"`
	EgressRules  int       `json:"egressRules"`
	LocalPods    int       `json:"localPods"`
	Generation   int64     `json:"generation"`          // in force
	EnforcedAt   time.Time `json:"enforcedAt,omitzero"` // zero: not in force
	Micros       int64     `json:"micros"`              // from the event to the kernel's acknowledgement
}

func (s *session) policiesCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "policies",
		Short:   "List the policies with what they select here and when the kernel took them",
		Example: "  nftcni debug policies\n  nftcni debug policies -o json | jq '.[] | select(.localPods == 0)'",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			rows, err := s.policies(cmd.Context(), noticeTo(cmd))
			if err != nil {
				return err
			}
			return s.print(cmd, rows, func(w io.Writer) error { return writePolicies(w, rows) })
		},
	}
}

// policies are the agent's, or those of its snapshot file.
func (s *session) policies(ctx context.Context, notice func(string)) ([]PolicyRow, error) {
	var list []agent.Policy
	err := s.get(ctx, agent.PathPolicies, &list)
	if errors.Is(err, errNoAgent) {
		var snap agent.Snapshot
		if snap, err = s.left(err, notice); err == nil {
			list = snap.Policies()
		}
	}
	return policyRows(list), err
}

func policyRows(list []agent.Policy) []PolicyRow {
	rows := []PolicyRow{}
	for _, p := range list {
		r := PolicyRow{Namespace: p.ID.Namespace, Name: p.ID.Name.Name, Kind: p.ID.Kind, Directions: []string{}, LocalPods: p.LocalPods,
			IngressRules: len(p.Rules[policy.Ingress]), EgressRules: len(p.Rules[policy.Egress]),
			Generation: p.EnforcedGeneration, EnforcedAt: p.EnforcedAt, Micros: p.Micros}
		for _, d := range policy.Directions {
			if p.Applies[d] {
				r.Directions = append(r.Directions, d.String())
			}
		}
		rows = append(rows, r)
	}
	slices.SortFunc(rows, func(a, b PolicyRow) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Kind, b.Kind))
	})
	return rows
}

func writePolicies(w io.Writer, rows []PolicyRow) error {
	if len(rows) == 0 {
		_, err := fmt.Fprintln(w, "There are no policies: everything is allowed.")
		return err
	}
	t := &table{header: []string{"NAMESPACE", "POLICY", "DIRECTIONS", "RULES", "LOCAL PODS", "GENERATION", "ENFORCED", "TOOK"}}
	for _, r := range rows {
		enforced, took := "no", "-"
		if !r.EnforcedAt.IsZero() {
			enforced, took = r.EnforcedAt.UTC().Format(time.RFC3339), strconv.FormatInt(r.Micros, 10)+" us"
		}
		t.add(orDash(r.Namespace), r.Name, orDash(strings.Join(r.Directions, ",")), fmt.Sprintf("%d in, %d out", r.IngressRules, r.EgressRules),
			strconv.Itoa(r.LocalPods), strconv.FormatInt(r.Generation, 10), enforced, took)
	}
	return t.write(w)
}
