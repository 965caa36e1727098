package debug

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"
	"sync"

	"github.com/spf13/cobra"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
)

func (s *session) whyCommand() *cobra.Command {
	var all bool
	var api apiFlags
	cmd := &cobra.Command{
		Use:   "why SRC DST PROTO/PORT",
		Short: "Say whether SRC may reach DST, and which policy and rule decide",
		Long: "Say whether SRC may reach DST, and which policy and rule decide.\n\n" +
			"SRC and DST are namespace/pod, a pod's name, an address, or world; DST may be a DNS name\n" +
			"too, or a Service: svc/namespace/name, name.namespace.svc, or its address. A Service is\n" +
			"answered for each backend that kube-proxy's rules in the kernel (nftables mode) have, or\n" +
			"with --kubeconfig for each that its selector selects, at the port behind it.\n\n" +
			"The verdict is the oracle's; beside it stands what the kernel's own tables decide for the\n" +
			"same flow, read element by element. A pod of another node is judged there; what its\n" +
			"policies say is shown as far as this node knows them. Below are the route, the neighbour\n" +
			"and the live connections between the two.\n\n" +
			"Exit status 2: oracle and kernel disagree.",
		Example: "  nftcni debug why shop/web data/redis TCP/6379\n  nftcni debug why world 10.244.1.7 UDP/53\n" +
			"  nftcni debug why shop/web svc/data/redis TCP/6379\n  nftcni debug why a b ICMP --all\n  nftcni debug why shop/web world TCP/443 -o json | jq '.[].egress.because'",
		Args:              cobra.ExactArgs(3),
		ValidArgsFunction: s.completePods(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			answers, err := s.why(cmd.Context(), args, api, noticeTo(cmd))
			if err != nil {
				return err
			}
			if err := s.print(cmd, answers, func(w io.Writer) error { return writeAnswers(w, answers, all) }); err != nil {
				return err
			}
			return disagreement(answers)
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "every rule that was considered, and why it did not match")
	api.register(cmd.Flags())
	return cmd
}

func disagreement(answers []Answer) error {
	for _, a := range answers {
		if a.KernelNote != "" && a.Egress.Kernel != nil {
			return &ExitError{Status: ExitDisagree, Err: errors.New(a.KernelNote)}
		}
		if !a.Agree && a.Egress.Kernel == nil {
			return &ExitError{Status: ExitDisagree, Err: errors.New(
				"oracle and kernel disagree: policy denies this, and without its table the kernel lets everything pass; start the agent, which makes it")}
		}
		if !a.Agree {
			return &ExitError{Status: ExitDisagree, Err: errors.New(
				"oracle and kernel disagree: the table was changed by hand, the agent is behind, or there is a bug; nftcni debug verify lists what differs")}
		}
	}
	return nil
}

// why answers for every family that both ends have.
func (s *session) why(ctx context.Context, args []string, api apiFlags, notice func(string)) ([]Answer, error) {
	snap, err := s.snapshot(ctx, notice)
	if err != nil {
		return nil, err
	}
	questions, err := newQuestions(ctx, snap.Cluster, args, services{api, kubeProxy, notice})
	if err != nil {
		return nil, err
	}
	ask, done := askKernel(ctx)
	defer done()
	var out []Answer
	for _, q := range questions {
		answers, err := q.answers(ctx, snap, ask)
		if err != nil {
			return nil, err
		}
		out = append(out, answers...)
	}
	blocked := [2]func() []string{
		sync.OnceValue(func() []string { return obstacles(ctx, false) }),
		sync.OnceValue(func() []string { return obstacles(ctx, true) }),
	}
	for i := range out {
		out[i].Path = pathOf(ctx, out[i].flow)
		if six := out[i].flow.Dst.Is6(); out[i].Allowed && six {
			out[i].Path.Notes = append(out[i].Path.Notes, blocked[1]()...)
		} else if out[i].Allowed {
			out[i].Path.Notes = append(out[i].Path.Notes, blocked[0]()...)
		}
	}
	return out, nil
}

func kubeProxy(ctx context.Context) ([]nft.ProxyPort, error) {
	return nft.KubeProxy(ctx, nft.Options{})
}

// question is SRC, DST and PROTO/PORT.
type question struct {
	src, dst endpoint
	service  service
}

func newQuestion(ctx context.Context, c *policy.Cluster, args []string) (question, error) {
	var q question
	var err error
	if q.service, err = parseService(args[2]); err != nil {
		return q, err
	}
	if q.src, err = resolve(c, args[0]); err != nil {
		return q, fmt.Errorf("SRC: %w", err)
	}
	if q.dst, err = resolve(c, args[1]); err == nil {
		return q, nil
	}
	named, dnsErr := resolveDNS(ctx, args[1])
	switch {
	case dnsErr == nil:
		q.dst = named
		return q, nil
	case errors.Is(dnsErr, errNoDNSName):
		return q, fmt.Errorf("DST: %w", err)
	}
	return q, fmt.Errorf("DST: %w, and %w", err, dnsErr)
}

// flows are one for every pair of addresses of one family.
func (q question) flows() []policy.Flow {
	var out []policy.Flow
	for _, a := range q.src.addrs {
		for _, b := range q.dst.addrs {
			if a.Is4() == b.Is4() {
				out = append(out, q.service.flow(a, b))
			}
		}
	}
	return out
}

func (q question) answers(ctx context.Context, snap agent.Snapshot, k kernel) ([]Answer, error) {
	flows := q.flows()
	if len(flows) == 0 {
		return nil, fmt.Errorf("%s and %s have no address family in common", q.src.name, q.dst.name)
	}
	why := newReasons(snap.Cluster, snap.Node)
	var out []Answer
	for _, f := range flows {
		here, everywhere := policy.EvaluateAll(snap.Cluster, snap.Node, f), policy.EvaluateAll(snap.Cluster, "", f)
		a := Answer{Src: q.src.name, Dst: q.dst.name, Flow: flowView(f), Allowed: everywhere.Allowed, AllowedHere: here.Allowed, KernelNote: k.note, flow: f,
			Egress:  why.sideOf(here.Egress, everywhere.Egress, policy.Egress, f.Src, f),
			Ingress: why.sideOf(here.Ingress, everywhere.Ingress, policy.Ingress, f.Dst, f)}
		a.Allowed = a.Egress.Verdict == policy.Allow.String() && a.Ingress.Verdict == policy.Allow.String()
		if k.decide != nil {
			t, err := k.decide(ctx, f)
			if err != nil {
				return nil, fmt.Errorf("read the kernel's tables: %w", err)
			}
			a.Egress.compare(t.Egress)
			a.Ingress.compare(t.Ingress)
		}
		a.Agree = a.Egress.Agree && a.Ingress.Agree && (here.Allowed || !k.open) && !k.differs
		out = append(out, a)
	}
	return out, nil
}

// sideOf is what this node decides, or what the node of the pod at self does.
func (r *reasons) sideOf(here, everywhere policy.Decision, dir policy.Direction, self netip.Addr, f policy.Flow) Side {
	pod := r.oracle.Owner(self)
	if here.Reason != policy.NotLocal || pod == nil || pod.Node == "" {
		return r.side(here, dir, f)
	}
	s := r.side(everywhere, dir, f)
	s.Node = pod.Node
	return s
}

func (r *reasons) side(d policy.Decision, dir policy.Direction, f policy.Flow) Side {
	s := Side{Verdict: d.Action.String(), Reason: d.Reason.String(), Because: because(d), Agree: true, oracle: d}
	switch d.Reason {
	case policy.RuleMatched:
		s.Policy, s.Rule = d.Policy.String(), &d.Rule
		if d.Peer >= 0 {
			s.Peer = &d.Peer
		}
	case policy.Isolated:
		s.Nearest = r.nearest(d, dir, f)
		for _, id := range d.Isolating {
			s.Isolating = append(s.Isolating, id.String())
		}
	}
	for _, c := range d.Considered {
		v := Considered{Policy: c.Policy.String(), Rule: c.Rule, Peer: c.PeerMatched, Port: c.PortMatch}
		if g, ok := r.gap(c, dir, f); ok {
			v.WhyNot = strings.Join(g.text, "; ")
		}
		s.Considered = append(s.Considered, v)
	}
	return s
}

func because(d policy.Decision) string {
	switch d.Reason {
	case policy.NotLocal:
		return "no pod of this node"
	case policy.SamePod:
		return "a pod may always reach itself"
	case policy.OwnNode:
		return "a pod and its own node may always reach each other"
	case policy.NotSelected:
		return "no policy selects " + d.Pod.String()
	case policy.TierEnd:
		return "no rule decides and no policy isolates " + d.Pod.String()
	case policy.Isolated:
		return "isolated by " + join(d.Isolating) + "; no rule matches"
	}
	return "rule " + strconv.Itoa(d.Rule) + " of " + d.Policy.String() + matched(d)
}

func matched(d policy.Decision) string {
	var parts []string
	if d.Peer >= 0 {
		parts = append(parts, "peer "+strconv.Itoa(d.Peer))
	}
	if d.Port >= 0 {
		parts = append(parts, "port "+strconv.Itoa(d.Port))
	}
	if parts == nil {
		return ""
	}
	return " (" + strings.Join(parts, ", ") + ")"
}
