package debug

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/policy"
)

// snapshot is the cluster as the agent knows it, or as its snapshot file tells when no
// agent answers; notice is told about the latter.
func (s *session) snapshot(ctx context.Context, notice func(string)) (agent.Snapshot, error) {
	var snap agent.Snapshot
	err := s.get(ctx, agent.PathSnapshot, &snap)
	if !errors.Is(err, errNoAgent) {
		return snap, err
	}
	return s.left(err, notice)
}

// left is the snapshot file, in place of an agent that answered with noAgent.
func (s *session) left(noAgent error, notice func(string)) (agent.Snapshot, error) {
	if s.shared != nil {
		return s.shared.parsed()
	}
	snap, err := agent.ReadSnapshotFile(s.runDir)
	if errors.Is(err, fs.ErrNotExist) {
		return snap, fmt.Errorf("%w; there is no snapshot file of it either (%s)", noAgent, filepath.Join(s.runDir, agent.SnapshotName))
	}
	if err != nil {
		return snap, errors.Join(noAgent, err)
	}
	notice(fromFile(snap))
	return snap, nil
}

// fromFile says that an answer is from the snapshot file.
func fromFile(snap agent.Snapshot) string {
	return fmt.Sprintf("the agent does not answer: this is from its snapshot of %s (%s ago); the kernel's part is of now",
		snap.At.UTC().Format(time.RFC3339), age(time.Since(snap.At)))
}

// age is a duration as people say it: "42s", "3m", "5h", "2d".
func age(d time.Duration) string {
	switch {
	case d < 2*time.Minute:
		return strconv.Itoa(max(0, int(d.Seconds()))) + "s"
	case d < 2*time.Hour:
		return strconv.Itoa(int(d.Minutes())) + "m"
	case d < 48*time.Hour:
		return strconv.Itoa(int(d.Hours())) + "h"
	}
	return strconv.Itoa(int(d.Hours()/24)) + "d"
}

// noticeTo says something on standard error, so that -o json stays parseable.
func noticeTo(cmd *cobra.Command) func(string) {
	return func(text string) { fmt.Fprintln(cmd.ErrOrStderr(), "note: "+text) }
}

// errNoAgent is wrapped by the error of a question that nobody answered.
var errNoAgent = errors.New("no agent answers")

func agentGone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)
}

// completePods offers namespace/pod and world for arguments up to n.
func (s *session) completePods(n int) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, toComplete string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(args) >= n {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		snap, err := s.snapshot(cmd.Context(), func(string) {})
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		out := []cobra.Completion{"world"}
		for _, p := range snap.Cluster.Pods {
			if !p.Finished && strings.HasPrefix(p.Name.String(), toComplete) {
				out = append(out, cobra.CompletionWithDesc(p.Name.String(), join(p.Addrs)))
			}
		}
		slices.Sort(out[1:])
		return out, cobra.ShellCompDirectiveNoFileComp
	}
}

// completePolicies offers "policy" and then namespace/name.
func (s *session) completePolicies(cmd *cobra.Command, args []string, toComplete string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) == 0 {
		return []cobra.Completion{"policy"}, cobra.ShellCompDirectiveNoFileComp
	}
	if len(args) > 1 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return s.policyNames(cmd, "", toComplete)
}

// completeDeleted offers policy/namespace/name.
func (s *session) completeDeleted(cmd *cobra.Command, _ []string, toComplete string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return s.policyNames(cmd, "policy/", toComplete)
}

func (s *session) policyNames(cmd *cobra.Command, prefix, toComplete string) ([]cobra.Completion, cobra.ShellCompDirective) {
	snap, err := s.snapshot(cmd.Context(), func(string) {})
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var out []cobra.Completion
	for _, p := range snap.Cluster.Policies {
		if name := prefix + p.ID.String(); strings.HasPrefix(name, toComplete) {
			out = append(out, name)
		}
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}

// names finds who owns an address, for many questions.
type names struct {
	node   string
	oracle *policy.Oracle
	nodes  map[netip.Addr]string
}

func newNames(snap agent.Snapshot) names {
	n := names{node: snap.Node, oracle: policy.NewOracle(snap.Cluster, snap.Node), nodes: map[netip.Addr]string{}}
	for _, node := range snap.Cluster.Nodes {
		for _, a := range node.Addrs {
			n.nodes[a] = "node " + node.Name
		}
	}
	return n
}

// of is the pod's or node's name, else the address.
func (n names) of(a netip.Addr) string {
	if p := n.oracle.Owner(a); p != nil {
		return p.Name.String()
	}
	if node := n.nodes[a]; node != "" {
		return node
	}
	return a.String()
}
