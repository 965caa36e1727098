package debug

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
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
	// Path is how the node would send the packet, and which connections there are.
	Path *Path `json:"path,omitempty"`
	// KernelNote says why the kernel was not asked.
	KernelNote string `json:"kernelNote,omitempty"`
}

// Side is one direction of an Answer.
type Side struct {
	Oracle  policy.Decision `json:"oracle"`
	Because string          `json:"because"`
	// Nearest is the rule that almost matched and why it did not, when none did.
	Nearest string                `json:"nearest,omitempty"`
	Kernel  *policy.TableDecision `json:"kernel,omitempty"` // nil: the kernel was not asked
	Agree   bool                  `json:"agree"`

	gaps []string // why each of Oracle.Considered did not match
}

func (s *session) whyCommand() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "why SRC DST PROTO/PORT",
		Short: "Say whether SRC may reach DST, and which policy and rule decide",
		Long: "Say whether SRC may reach DST, and which policy and rule decide.\n\n" +
			"SRC and DST are namespace/pod, a pod's name, an address, or world; DST may be a DNS\n" +
			"name too. The verdict is the oracle's; beside it stands what the kernel's own tables\n" +
			"decide for the same flow, read element by element. Below are the route, the neighbour\n" +
			"and the live connections between the two.\n\n" +
			"Exit status 2: oracle and kernel disagree.",
		Example: "  nftcni debug why shop/web data/redis TCP/6379\n  nftcni debug why world 10.244.1.7 UDP/53\n" +
			"  nftcni debug why a b ICMP --all\n  nftcni debug why shop/web world TCP/443 -o json | jq '.[].egress.because'",
		Args:              cobra.ExactArgs(3),
		ValidArgsFunction: s.completePods(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			answers, err := s.why(cmd.Context(), args, noticeTo(cmd))
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
	return cmd
}

func disagreement(answers []Answer) error {
	for _, a := range answers {
		if !a.Agree {
			return &ExitError{Status: ExitDisagree, Err: errors.New(
				"oracle and kernel disagree: the table was changed by hand, the agent is behind, or there is a bug; nftcni debug verify lists what differs")}
		}
	}
	return nil
}

// why answers for every family that both ends have.
func (s *session) why(ctx context.Context, args []string, notice func(string)) ([]Answer, error) {
	snap, err := s.snapshot(ctx, notice)
	if err != nil {
		return nil, err
	}
	q, err := newQuestion(ctx, snap.Cluster, args)
	if err != nil {
		return nil, err
	}
	var ask kernel
	reader, err := nft.NewReader(ctx, nft.Options{})
	if err != nil {
		ask.note = err.Error()
	} else {
		defer func() { _ = reader.Close() }()
		ask.decide = reader.Decide
	}
	answers, err := q.answers(ctx, snap, ask)
	for i := range answers {
		answers[i].Path = pathOf(ctx, answers[i].Flow)
	}
	return answers, err
}

// kernel decides flows by the kernel's tables, or says why it cannot.
type kernel struct {
	decide func(context.Context, policy.Flow) (policy.TableVerdict, error)
	note   string
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
	if named, dnsErr := resolveDNS(ctx, args[1]); dnsErr == nil {
		q.dst = named
		return q, nil
	}
	return q, fmt.Errorf("DST: %w", err)
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
		v := policy.EvaluateAll(snap.Cluster, snap.Node, f)
		a := Answer{Src: q.src.name, Dst: q.dst.name, Flow: f, Allowed: v.Allowed, KernelNote: k.note,
			Egress: why.side(v.Egress, policy.Egress, f), Ingress: why.side(v.Ingress, policy.Ingress, f)}
		if k.decide != nil {
			t, err := k.decide(ctx, f)
			if err != nil {
				return nil, fmt.Errorf("read the kernel's tables: %w", err)
			}
			a.Egress.compare(t.Egress)
			a.Ingress.compare(t.Ingress)
		}
		a.Agree = a.Egress.Agree && a.Ingress.Agree
		out = append(out, a)
	}
	return out, nil
}

func (r *reasons) side(d policy.Decision, dir policy.Direction, f policy.Flow) Side {
	s := Side{Oracle: d, Because: because(d), Agree: true}
	if d.Reason == policy.Isolated {
		s.Nearest = r.nearest(d, dir, f)
	}
	for _, c := range d.Considered {
		g, _ := r.gap(c, dir, f)
		s.gaps = append(s.gaps, orDash(strings.Join(g.text, "; ")))
	}
	return s
}

// compare sets the kernel's answer beside the oracle's. What the ruleset exempts before
// it looks at policy (the pod itself, its own node) has no answer in the tables.
func (s *Side) compare(k policy.TableDecision) {
	s.Kernel = &k
	switch s.Oracle.Reason {
	case policy.SamePod, policy.OwnNode:
	case policy.NotLocal:
		s.Agree = !k.Judged
	default:
		s.Agree = k.Allowed == (s.Oracle.Action == policy.Allow)
	}
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

func writeAnswers(w io.Writer, answers []Answer, all bool) error {
	for i, a := range answers {
		if i > 0 {
			fmt.Fprintln(w)
		}
		if err := writeAnswer(w, a, all, true); err != nil {
			return err
		}
		if a.KernelNote != "" {
			fmt.Fprintf(w, "\nthe kernel was not asked: %s\n", a.KernelNote)
		}
		if err := a.Path.write(w); err != nil {
			return err
		}
	}
	return nil
}

// writeExplained is writeAnswers without a node.
func writeExplained(w io.Writer, answers []Answer, all bool) error {
	for i, a := range answers {
		if i > 0 {
			fmt.Fprintln(w)
		}
		if err := writeAnswer(w, a, all, false); err != nil {
			return err
		}
	}
	return nil
}

func writeAnswer(w io.Writer, a Answer, all, kernel bool) error {
	fmt.Fprintf(w, "%s: %s -> %s %s\n\n", verdict(a.Allowed), withAddr(a.Src, a.Flow.Src), withAddr(a.Dst, a.Flow.Dst), serviceName(a.Flow))
	t := &table{header: []string{"DIRECTION", "VERDICT", "BECAUSE"}}
	if kernel {
		t.header = append(t.header, "KERNEL")
	}
	for i, s := range []Side{a.Egress, a.Ingress} {
		row := []string{[2]string{"egress", "ingress"}[i], s.Oracle.Action.String(), s.Because}
		if kernel {
			row = append(row, kernelText(s))
		}
		t.add(row...)
	}
	if err := t.write(w); err != nil {
		return err
	}
	for i, s := range []Side{a.Egress, a.Ingress} {
		if s.Nearest != "" {
			fmt.Fprintf(w, "\n%s of %s: %s\n", [2]string{"egress", "ingress"}[i], s.Oracle.Pod, s.Nearest)
		}
	}
	if all {
		return writeConsidered(w, a)
	}
	return nil
}

// withAddr is "shop/web (10.0.0.7)", or the address alone when it has no name.
func withAddr(name string, a netip.Addr) string {
	if name == a.String() {
		return name
	}
	return fmt.Sprintf("%s (%s)", name, a)
}

func writeConsidered(w io.Writer, a Answer) error {
	t := &table{header: []string{"CONSIDERED", "POLICY", "RULE", "PEER", "PORT", "WHY NOT"}}
	for i, side := range []Side{a.Egress, a.Ingress} {
		dir := [2]policy.Direction{policy.Egress, policy.Ingress}[i]
		for j, c := range side.Oracle.Considered {
			if c.Rule < 0 {
				t.add(dir.String(), c.Policy.String(), "none", "-", "-", "it has no rules: it only isolates")
				continue
			}
			t.add(dir.String(), c.Policy.String(), strconv.Itoa(c.Rule), matches(c.PeerMatched), matches(c.PortMatch), side.gaps[j])
		}
	}
	if len(t.rows) == 0 {
		_, err := fmt.Fprintln(w, "\nNo policy selects either end here.")
		return err
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

// kernelText names the element that decided in the kernel.
func kernelText(s Side) string {
	k := s.Kernel
	if k == nil {
		return "not asked"
	}
	text := "not judged (no profile)"
	if k.Judged {
		found := "a miss"
		if n := len(k.Lookups); n > 0 && k.Lookups[n-1].Found {
			found = nft.ElementSet(k.Lookups[n-1].Key)
		}
		text = fmt.Sprintf("%s by %s (profile %#x, identity %#x, class %#x)", allowDeny(k.Allowed), found, k.Profile, k.Identity, k.Class)
	}
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
