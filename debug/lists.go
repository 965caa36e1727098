package debug

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/policy"
)

func (s *session) statusCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "status",
		Short:   "Show whether this node enforces, what it holds, and the last change",
		Example: "  nftcni debug status\n  nftcni debug status -o json | jq .lastCommit",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var st agent.Status
			if err := s.get(cmd.Context(), agent.PathStatus, &st); err != nil {
				return err
			}
			return s.print(cmd, st, func(w io.Writer) error { return writeStatus(w, st) })
		},
	}
}

func writeStatus(w io.Writer, st agent.Status) error {
	t := &table{header: []string{"NODE", st.Node}}
	ready := "yes"
	if !st.Ready {
		ready = "no: " + st.Reason
	}
	t.add("ready", ready)
	t.add("network", string(st.Network))
	t.add("generation", strconv.FormatUint(uint64(st.Generation), 10))
	t.add("objects", fmt.Sprintf("%d namespaces, %d pods, %d policies, %d nodes", st.Namespaces, st.Pods, st.Policies, st.Nodes))
	t.add("attachments", fmt.Sprintf("%d, %d waiting for their pod", st.Attachments, st.Waiting))
	t.add("pod networks", join(st.PodNetworks))
	if c := st.LastCommit; c != nil {
		t.add("last change", fmt.Sprintf("%s: %d events, %d elements in %d transactions, %d us (kernel %d us)",
			c.At.Format(time.RFC3339), c.Events, c.Elements, c.Transactions, c.Micros, c.KernelMicros))
		if c.Error != "" {
			t.add("last error", c.Error)
		}
	}
	for _, p := range st.Problems {
		t.add("problem", p.String())
	}
	return t.write(w)
}

func (s *session) podsCommand() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:     "pods",
		Short:   "List the pods of this node with addresses, interface and labels",
		Example: "  nftcni debug pods\n  nftcni debug pods --all -o yaml",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var pods []agent.Pod
			if err := s.get(cmd.Context(), agent.PathPods, &pods); err != nil {
				return err
			}
			t := &table{header: []string{"NAMESPACE", "POD", "ADDRESSES", "INTERFACE", "LABELS", "NOTE"}}
			shown := []agent.Pod{}
			for _, p := range pods {
				if !p.Local && !all {
					continue
				}
				shown = append(shown, p)
				t.add(p.Namespace, p.Pod.Name.Name, join(p.Addrs), orDash(strings.Join(p.Interfaces, ",")), orDash(p.Labels.String()), note(p.Pod))
			}
			return s.print(cmd, shown, t.write)
		},
	}
	cmd.Flags().BoolVarP(&all, "all", "A", false, "pods of other nodes too")
	return cmd
}

func note(p policy.Pod) string {
	switch {
	case p.Finished:
		return "finished: owns no address"
	case p.HostNetwork:
		return "host network: its node's address"
	case len(p.Addrs) == 0:
		return "no address yet"
	}
	return "-"
}

func (s *session) policiesCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "policies",
		Short:   "List the policies with what they select here and when the kernel took them",
		Example: "  nftcni debug policies",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var list []agent.Policy
			if err := s.get(cmd.Context(), agent.PathPolicies, &list); err != nil {
				return err
			}
			t := &table{header: []string{"NAMESPACE", "POLICY", "KIND", "DIRECTIONS", "RULES", "LOCAL PODS", "ENFORCED", "TOOK"}}
			for _, p := range list {
				t.add(orDash(p.ID.Namespace), p.ID.Name.Name, p.ID.Kind, directions(p.Policy),
					fmt.Sprintf("%d in, %d out", len(p.Rules[policy.Ingress]), len(p.Rules[policy.Egress])),
					strconv.Itoa(p.LocalPods), enforced(p), strconv.FormatInt(p.Micros, 10)+" us")
			}
			if list == nil {
				list = []agent.Policy{}
			}
			return s.print(cmd, list, t.write)
		},
	}
}

func directions(p policy.Policy) string {
	var out []string
	for _, d := range policy.Directions {
		if p.Applies[d] {
			out = append(out, d.String())
		}
	}
	return orDash(strings.Join(out, ","))
}

func enforced(p agent.Policy) string {
	if p.EnforcedAt.IsZero() {
		return "no"
	}
	return p.EnforcedAt.Format(time.RFC3339)
}
