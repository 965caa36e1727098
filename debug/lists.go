package debug

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nftcni/nftcni/agent"
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
			pods, err := s.pods(cmd, all)
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

// pods are the agent's, or those of its snapshot file, which knows no interfaces.
func (s *session) pods(cmd *cobra.Command, all bool) ([]agent.Pod, error) {
	var pods []agent.Pod
	path := agent.PathPods
	if !all {
		path += "?local=1"
	}
	err := s.get(cmd.Context(), path, &pods)
	if !errors.Is(err, errNoAgent) {
		return pods, err
	}
	snap, err := s.snapshot(cmd.Context(), noticeTo(cmd))
	if err != nil {
		return nil, err
	}
	for _, p := range snap.Cluster.Pods {
		pods = append(pods, agent.Pod{Pod: p, Local: p.Node == snap.Node})
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
			var list []agent.Policy
			if err := s.get(cmd.Context(), agent.PathPolicies, &list); err != nil {
				return err
			}
			rows := policyRows(list)
			return s.print(cmd, rows, func(w io.Writer) error { return writePolicies(w, rows) })
		},
	}
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
