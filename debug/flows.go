package debug

import (
	"cmp"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/policy"
)

type flowFlags struct {
	follow, denied, allowed bool
	pod                     string
	last                    int
}

func (s *session) flowsCommand() *cobra.Command {
	var fl flowFlags
	cmd := &cobra.Command{
		Use:   "flows",
		Short: "List new connections with the pods at both ends, verdict and policy",
		Long: "List new connections with the pods at both ends, the verdict, and the policy that\n" +
			"decides. The agent remembers the last 8,192. Denied packets are listed at most 10 a second\n" +
			"for each source and set of policies (nftcni debug drops counts all); allowed connections are\n" +
			"sampled above 500 a second, and a note says so.",
		Example: "  nftcni debug flows\n  nftcni debug flows -f --denied\n  nftcni debug flows --pod shop/web --last 20\n  nftcni debug flows -f -o json | jq .policy",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if fl.denied && fl.allowed {
				return fmt.Errorf("flags --denied and --allowed exclude each other; without either both are listed")
			}
			if err := checkLast(fl.last); err != nil {
				return err
			}
			return s.flows(cmd, fl)
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&fl.follow, "follow", "f", false, "go on with new connections until interrupted")
	f.BoolVar(&fl.denied, "denied", false, "only denied ones")
	f.BoolVar(&fl.allowed, "allowed", false, "only allowed ones")
	f.StringVar(&fl.pod, "pod", "", "only those of this pod (namespace/name, or name)")
	f.IntVar(&fl.last, "last", 100, "how many past ones")
	_ = cmd.RegisterFlagCompletionFunc("pod", s.completePods(1))
	return cmd
}

func (s *session) flows(cmd *cobra.Command, fl flowFlags) error {
	notice := noticeTo(cmd)
	var got agent.Flows
	var err error
	if fl.follow { // what comes next only an agent can tell
		err = s.get(cmd.Context(), agent.PathFlows+"?limit=8192", &got)
	} else {
		got, err = s.seen(cmd.Context(), "?limit=8192", notice)
	}
	if err != nil {
		return err
	}
	list := newest(fl.keep(got.Flows), fl.last)
	tellSampling(notice, got, 1)
	s.tellUnknown(cmd, fl.pod, len(list))
	if !fl.follow {
		return s.print(cmd, list, func(w io.Writer) error { return writeFlows(w, list, true) })
	}
	header := true
	oneIn := got.SampledOneIn
	for {
		if err := s.printFlows(cmd, list, header); err != nil {
			return err
		}
		header = header && len(list) == 0
		q := url.Values{"after": {strconv.FormatUint(got.Next, 10)}, "limit": {"8192"}, "wait": {"1"}}
		got = agent.Flows{}
		err := s.get(cmd.Context(), agent.PathFlows+"?"+q.Encode(), &got)
		if cmd.Context().Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		tellSampling(notice, got, oneIn)
		oneIn = got.SampledOneIn
		list = fl.keep(got.Flows)
	}
}

// tellUnknown says when nothing is listed because no pod has the name that was asked for;
// one that is gone may still have flows.
func (s *session) tellUnknown(cmd *cobra.Command, pod string, listed int) {
	if pod == "" || listed > 0 {
		return
	}
	snap, err := s.snapshot(cmd.Context(), func(string) {})
	if err != nil || slices.ContainsFunc(snap.Cluster.Pods, func(p policy.Pod) bool { return samePod(p.Name.String(), pod) }) {
		return
	}
	noticeTo(cmd)(fmt.Sprintf("no pod this node knows is called %q now (nftcni debug pods --all lists the pods)", pod))
}

// newest are the last n of a list.
func newest(list []agent.Flow, n int) []agent.Flow { return list[max(0, len(list)-n):] }

func checkLast(last int) error {
	if last < 0 {
		return fmt.Errorf("flag --last is %d: it takes 0 or more", last)
	}
	return nil
}

func tellSampling(notice func(string), got agent.Flows, before uint32) {
	if got.SampledOneIn != before {
		if got.SampledOneIn > 1 {
			notice(fmt.Sprintf("too many new connections to list all: one in %d is", got.SampledOneIn))
		} else {
			notice("all new connections are listed again")
		}
	}
	if got.Missed > 0 {
		notice(fmt.Sprintf("%d connections came too fast to be shown", got.Missed))
	}
}

func (fl flowFlags) keep(list []agent.Flow) []agent.Flow {
	out := []agent.Flow{}
	for _, f := range list {
		ofPod := fl.pod == "" || samePod(f.SrcPod, fl.pod) || samePod(f.DstPod, fl.pod)
		if ofPod && !(fl.denied && f.Verdict != "denied") && !(fl.allowed && f.Verdict != "allowed") {
			out = append(out, f)
		}
	}
	return out
}

// samePod compares namespace/name with that or with a name alone.
func samePod(pod, asked string) bool {
	return pod == asked || len(pod) > len(asked) && pod[len(pod)-len(asked)-1:] == "/"+asked
}

func (s *session) printFlows(cmd *cobra.Command, list []agent.Flow, header bool) error {
	if s.format == "table" {
		if len(list) == 0 {
			return nil
		}
		return writeFlows(onScreen(cmd.OutOrStdout()), list, header)
	}
	for _, f := range list {
		if err := s.printStream(cmd, f); err != nil {
			return err
		}
	}
	return nil
}

// decidedNow is a flow's policy, and how it judges such a flow now where that is not how it
// was judged then.
func decidedNow(f agent.Flow) string {
	if !f.Changed {
		return orDash(f.Policy)
	}
	now := "now denied"
	if f.Verdict == "denied" {
		now = "now allowed"
	}
	if f.Policy != "" {
		now += ": " + f.Policy
	}
	return now
}

func writeFlows(w io.Writer, list []agent.Flow, header bool) error {
	t := &table{header: []string{"TIME (UTC)", "VERDICT", "FROM", "TO", "SERVICE", "POLICY"}}
	if !header {
		t.header = make([]string, len(t.header))
	}
	for _, f := range list {
		at := "-"
		if !f.At.IsZero() {
			at = f.At.UTC().Format("15:04:05.000")
		}
		t.add(at, f.Verdict, cmp.Or(f.SrcPod, f.Src.Addr().String()), cmp.Or(f.DstPod, f.Dst.Addr().String()),
			orDash(FlowView{Protocol: f.Protocol, Port: f.Dst.Port()}.service()), decidedNow(f))
	}
	if len(list) == 0 {
		_, err := fmt.Fprintln(w, "No connection has been seen.")
		return err
	}
	return t.write(w)
}
