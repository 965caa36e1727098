package debug

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
)

// Answer is what `debug why` says about one pair of addresses.
type Answer struct {
	Src     string      `json:"src"`
	Dst     string      `json:"dst"`
	Flow    policy.Flow `json:"flow"`
	Allowed bool        `json:"allowed"`
	Egress  Side        `json:"egress"`
	Ingress Side        `json:"ingress"`
	// Agree is false when the kernel's tables decide a direction otherwise.
	Agree bool `json:"agree"`
}

// Side is one direction of an Answer.
type Side struct {
	Oracle  policy.Decision      `json:"oracle"`
	Because string               `json:"because"`
	Kernel  policy.TableDecision `json:"kernel"`
	Agree   bool                 `json:"agree"`
}

func (s *session) whyCommand() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "why SRC DST PROTO/PORT",
		Short: "Say whether SRC may reach DST, and which policy and rule decide",
		Long: "Say whether SRC may reach DST, and which policy and rule decide.\n\n" +
			"SRC and DST are namespace/pod, a pod's name, an address, or world. The verdict is the\n" +
			"oracle's; beside it stands what the kernel's own tables decide for the same flow.\n" +
			"Exit status 2: they disagree.",
		Example: "  nftcni debug why shop/web data/redis TCP/6379\n  nftcni debug why world 10.244.1.7 UDP/53\n  nftcni debug why a b ICMP --all",
		Args:    cobra.ExactArgs(3),
		RunE: func(cmd *cobra.Command, args []string) error {
			answers, err := s.why(cmd.Context(), args)
			if err != nil {
				return err
			}
			if err := s.print(cmd, answers, func(w io.Writer) error { return writeAnswers(w, answers, all) }); err != nil {
				return err
			}
			for _, a := range answers {
				if !a.Agree {
					return &ExitError{Status: ExitDisagree, Err: errors.New("oracle and kernel disagree: the table was changed by hand or there is a bug; nftcni debug status shows the last resync")}
				}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "every rule that was considered")
	return cmd
}

// why answers for every family that both ends have.
func (s *session) why(ctx context.Context, args []string) ([]Answer, error) {
	svc, err := parseService(args[2])
	if err != nil {
		return nil, err
	}
	var snap agent.Snapshot
	if err := s.get(ctx, agent.PathSnapshot, &snap); err != nil {
		return nil, err
	}
	src, err := resolve(snap.Cluster, args[0])
	if err != nil {
		return nil, fmt.Errorf("SRC: %w", err)
	}
	dst, err := resolve(snap.Cluster, args[1])
	if err != nil {
		return nil, fmt.Errorf("DST: %w", err)
	}
	reader, err := nft.NewReader(ctx, nft.Options{})
	if err != nil {
		return nil, fmt.Errorf("read the kernel's tables: %w", err)
	}
	defer reader.Close()
	var out []Answer
	for _, a := range src.addrs {
		for _, b := range dst.addrs {
			if a.Is4() != b.Is4() {
				continue
			}
			answer, err := answer(ctx, reader, snap, svc.flow(a, b))
			if err != nil {
				return nil, err
			}
			answer.Src, answer.Dst = src.name, dst.name
			out = append(out, answer)
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%s and %s have no address family in common", src.name, dst.name)
	}
	return out, nil
}

func answer(ctx context.Context, r *nft.Reader, snap agent.Snapshot, f policy.Flow) (Answer, error) {
	v := policy.EvaluateAll(snap.Cluster, snap.Node, f)
	k, err := r.Decide(ctx, f)
	if err != nil {
		return Answer{}, fmt.Errorf("read the kernel's tables: %w", err)
	}
	a := Answer{Flow: f, Allowed: v.Allowed, Egress: side(v.Egress, k.Egress), Ingress: side(v.Ingress, k.Ingress)}
	a.Agree = a.Egress.Agree && a.Ingress.Agree
	return a, nil
}

// side compares one direction. What the ruleset exempts before it looks at policy (the
// pod itself, its own node, another node's pod) has no answer in the tables.
func side(d policy.Decision, k policy.TableDecision) Side {
	s := Side{Oracle: d, Because: because(d), Kernel: k, Agree: true}
	switch d.Reason {
	case policy.SamePod, policy.OwnNode:
	case policy.NotLocal:
		s.Agree = !k.Judged
	default:
		s.Agree = k.Allowed == (d.Action == policy.Allow)
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
		return "isolated by " + join(d.Isolating) + "; no rule matches" + nearest(d)
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

// nearest names the first rule that matched but for one thing.
func nearest(d policy.Decision) string {
	for _, c := range d.Considered {
		switch {
		case c.Rule >= 0 && c.PeerMatched:
			return fmt.Sprintf("; rule %d of %s matches the peer but not the port", c.Rule, c.Policy)
		case c.Rule >= 0 && c.PortMatch:
			return fmt.Sprintf("; rule %d of %s matches the port but not the peer", c.Rule, c.Policy)
		}
	}
	return ""
}

func writeAnswers(w io.Writer, answers []Answer, all bool) error {
	for i, a := range answers {
		if i > 0 {
			fmt.Fprintln(w)
		}
		fmt.Fprintf(w, "%s: %s (%s) -> %s (%s) %s\n\n", verdict(a.Allowed), a.Src, a.Flow.Src, a.Dst, a.Flow.Dst, serviceName(a.Flow))
		t := &table{header: []string{"DIRECTION", "VERDICT", "BECAUSE", "KERNEL"}}
		t.add("egress", a.Egress.Oracle.Action.String(), a.Egress.Because, kernelText(a.Egress))
		t.add("ingress", a.Ingress.Oracle.Action.String(), a.Ingress.Because, kernelText(a.Ingress))
		if err := t.write(w); err != nil {
			return err
		}
		if all {
			if err := writeConsidered(w, a); err != nil {
				return err
			}
		}
	}
	return nil
}

func writeConsidered(w io.Writer, a Answer) error {
	t := &table{header: []string{"CONSIDERED", "POLICY", "RULE", "PEER", "PORT"}}
	for d, side := range map[policy.Direction]Side{policy.Egress: a.Egress, policy.Ingress: a.Ingress} {
		for _, c := range side.Oracle.Considered {
			if c.Rule < 0 {
				t.add(d.String(), c.Policy.String(), "none", "-", "-")
				continue
			}
			t.add(d.String(), c.Policy.String(), strconv.Itoa(c.Rule), matches(c.PeerMatched), matches(c.PortMatch))
		}
	}
	fmt.Fprintln(w)
	return t.write(w)
}

func matches(ok bool) string {
	if ok {
		return "matches"
	}
	return "differs"
}

func verdict(allowed bool) string {
	if allowed {
		return "ALLOWED"
	}
	return "DENIED"
}

func serviceName(f policy.Flow) string {
	switch f.Protocol {
	case policy.ICMP, policy.ICMPv6:
		return fmt.Sprintf("%s type %d code %d", protocolName(f.Protocol), f.Port>>8, f.Port&0xff)
	case policy.TCP, policy.UDP, policy.SCTP:
		return fmt.Sprintf("%s/%d", protocolName(f.Protocol), f.Port)
	}
	return protocolName(f.Protocol)
}

// kernelText names the map that decided in the kernel.
func kernelText(s Side) string {
	k := s.Kernel
	if !k.Judged {
		return "not judged (no profile)"
	}
	found := "missed: denies"
	for _, l := range k.Lookups {
		if l.Found {
			found = mapName(l.Key.Map)
		}
	}
	text := fmt.Sprintf("%s by %s (profile %#x, identity %#x, class %#x)", allowDeny(k.Allowed), found, k.Profile, k.Identity, k.Class)
	if !s.Agree {
		text += "  <- DISAGREES"
	}
	return text
}

func allowDeny(ok bool) string {
	if ok {
		return "allow"
	}
	return "deny"
}

func mapName(m policy.Map) string {
	switch m {
	case policy.AccessPort:
		return "access_port"
	case policy.AccessRange:
		return "access_range"
	case policy.AccessRest:
		return "access_rest"
	case policy.Access:
		return "access"
	case policy.AccessOthers:
		return "access_others"
	}
	return "its profile"
}
