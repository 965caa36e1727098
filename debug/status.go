package debug

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nftcni/nftcni/agent"
)

// statusAnswer is the agent's status with the policies.
type statusAnswer struct {
	agent.Status
	PolicyList []PolicyRow `json:"policyList"`
	// SnapshotAt is when the agent that no longer answers wrote this, and Table what the
	// kernel enforces of it now.
	SnapshotAt time.Time `json:"snapshotAt,omitzero"`
	Table      string    `json:"table,omitempty"`
}

func (s *session) statusCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show whether this node enforces, since when, and how long changes take",
		Long: "Show whether this node enforces, what it holds, how long changes took from the event to\n" +
			"the kernel's acknowledgement, and each policy's generation in force. Without an agent it\n" +
			"shows what the last one left, and whether the kernel's table is there.",
		Example: "  nftcni debug status\n  nftcni debug status -o json | jq .lastCommit",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			st, err := s.status(cmd.Context(), noticeTo(cmd))
			if err != nil {
				return err
			}
			return s.print(cmd, st, func(w io.Writer) error { return writeStatus(w, st) })
		},
	}
}

func (s *session) status(ctx context.Context, notice func(string)) (statusAnswer, error) {
	var st statusAnswer
	err := s.get(ctx, agent.PathStatus, &st.Status)
	var list []agent.Policy
	if err == nil {
		err = s.get(ctx, agent.PathPolicies, &list)
	}
	if !errors.Is(err, errNoAgent) {
		st.PolicyList = policyRows(list)
		return st, err
	}
	snap, err := s.left(err, notice)
	if err != nil {
		return st, err
	}
	if snap.Status != nil { // older agents did not write it
		st.Status = *snap.Status
	}
	st.Node, st.SnapshotAt, st.PolicyList = snap.Node, snap.At, policyRows(snap.Policies())
	st.Ready, st.Reason = false, "the agent does not run: no pod can start, no change of policy arrives; start it (systemctl start nftcni-agent)"
	st.Table = tableText(checkTable(ctx, false))
	return st, nil
}

// tableText is the doctor's finding about the table on one line.
func tableText(list []Finding) string {
	f := list[0]
	if f.Health == Healthy {
		return "in force in the kernel: " + f.Found
	}
	return f.Found
}

func writeStatus(w io.Writer, st statusAnswer) error {
	t := &table{header: []string{"NODE", st.Node}}
	ready := "yes"
	if !st.Ready {
		ready = "no: " + st.Reason
	}
	t.add("ready", ready)
	if st.Table != "" {
		t.add("table", st.Table)
	}
	t.add("network", string(st.Network))
	t.add("generation", strconv.FormatUint(uint64(st.Generation), 10))
	t.add("objects", strings.Join([]string{plural(st.Namespaces, "namespace"), plural(st.Pods, "pod"),
		plural(st.Policies, "policy"), plural(st.Nodes, "node")}, ", "))
	t.add("attachments", fmt.Sprintf("%d, %d waiting for their pod", st.Attachments, st.Waiting))
	t.add("pod networks", first(st.PodNetworks, 8))
	if c := st.LastCommit; c != nil {
		t.add("last change", fmt.Sprintf("%s: %s, %s in %s, %d us (kernel %d us)", c.At.UTC().Format(time.RFC3339), plural(c.Events, "event"),
			plural(c.Elements, "element"), plural(c.Transactions, "transaction"), c.Micros, c.KernelMicros))
		if c.Error != "" {
			t.add("last error", c.Error)
		}
	}
	t.add("event to kernel", latencyText(st.EventToKernel))
	t.add("in the kernel", latencyText(st.Kernel))
	for _, p := range st.Problems {
		t.add("problem", p.String())
	}
	if err := t.write(w); err != nil || len(st.PolicyList) == 0 {
		return err
	}
	fmt.Fprintln(w)
	return writePolicies(w, st.PolicyList)
}

// latencyText is percentiles of a histogram, as the bound of the bucket they are in, and
// its bars.
func latencyText(h agent.Histogram) string {
	var total, most uint64
	for _, n := range h.Counts {
		total, most = total+n, max(most, n)
	}
	if total == 0 {
		return "no change yet"
	}
	var bars strings.Builder
	for _, n := range h.Counts {
		level := 0
		if n > 0 {
			level = 1 + int(7*n/max(most, 1))
		}
		bars.WriteRune([]rune(" ▁▂▃▄▅▆▇█")[level])
	}
	return fmt.Sprintf("%d changes, half within %s, 99%% within %s  |%s|", total, boundOf(h, total, 50), boundOf(h, total, 99), bars.String())
}

func boundOf(h agent.Histogram, total uint64, percent uint64) string {
	var sum uint64
	for i, n := range h.Counts {
		sum += n
		if sum*100 >= total*percent && i < len(h.BoundsMicros) {
			return (time.Duration(h.BoundsMicros[i]) * time.Microsecond).String()
		}
	}
	return "more than " + (time.Duration(h.BoundsMicros[len(h.BoundsMicros)-1]) * time.Microsecond).String()
}
