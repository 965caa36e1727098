package debug

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
)

// Answer is what `debug why` says about one pair of addresses.
type Answer struct {
	Src     string   `json:"src"`
	Dst     string   `json:"dst"`
	Flow    FlowView `json:"flow"`
	Allowed bool     `json:"allowed"`
	Egress  Side     `json:"egress"`
	Ingress Side     `json:"ingress"`
	// Agree is false when the kernel's tables decide a direction otherwise.
	Agree bool `json:"agree"`
	// KernelNote says why the kernel was not asked.
	KernelNote string `json:"kernelNote,omitempty"`
	// Path is how the node would send the packet, and which connections there are.
	Path *Path `json:"path,omitempty"`

	flow policy.Flow
}

// FlowView is a policy.Flow for programs. Port is type<<8 | code for ICMP.
type FlowView struct {
	Src      netip.Addr `json:"src"`
	Dst      netip.Addr `json:"dst"`
	Protocol string     `json:"protocol"`
	Port     uint16     `json:"port,omitempty"`
}

func flowView(f policy.Flow) FlowView {
	return FlowView{f.Src, f.Dst, protocolName(f.Protocol), f.Port}
}

// Side is one direction of an Answer.
type Side struct {
	Verdict string `json:"verdict"` // allow or deny
	Reason  string `json:"reason"`  // policy.Reason
	Because string `json:"because"`
	Policy  string `json:"policy,omitempty"`
	Rule    *int   `json:"rule,omitempty"`
	Peer    *int   `json:"peer,omitempty"`
	// Isolating are the policies that isolate the pod when no rule matched.
	Isolating []string `json:"isolating,omitempty"`
	// Nearest is the rule that almost matched and why it did not, when none did.
	Nearest    string       `json:"nearest,omitempty"`
	Considered []Considered `json:"considered,omitempty"`
	Kernel     *KernelSide  `json:"kernel,omitempty"` // nil: the kernel was not asked
	Agree      bool         `json:"agree"`

	oracle policy.Decision
}

// Considered is one rule of a policy that selects the pod. Rule is -1 for a policy that
// has none in this direction.
type Considered struct {
	Policy string `json:"policy"`
	Rule   int    `json:"rule"`
	Peer   bool   `json:"peerMatches"`
	Port   bool   `json:"portMatches"`
	WhyNot string `json:"whyNot,omitempty"`
}

// KernelSide is one direction by the kernel's tables.
type KernelSide struct {
	Judged   bool     `json:"judged"`
	Allowed  bool     `json:"allowed"`
	Profile  string   `json:"profile,omitempty"`
	Identity string   `json:"identity,omitempty"`
	Class    string   `json:"class,omitempty"`
	Lookups  []string `json:"lookups"` // in order, as "set element: value" or "set element: none"

	decidedBy string
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
		answers[i].Path = pathOf(ctx, answers[i].flow)
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
		a := Answer{Src: q.src.name, Dst: q.dst.name, Flow: flowView(f), Allowed: v.Allowed, KernelNote: k.note, flow: f,
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

// compare sets the kernel's answer beside the oracle's. What the ruleset exempts before
// it looks at policy (the pod itself, its own node) has no answer in the tables.
func (s *Side) compare(k policy.TableDecision) {
	s.Kernel = kernelSide(k)
	switch s.oracle.Reason {
	case policy.SamePod, policy.OwnNode:
	case policy.NotLocal:
		s.Agree = !k.Judged
	default:
		s.Agree = k.Allowed == (s.oracle.Action == policy.Allow)
	}
}

func kernelSide(k policy.TableDecision) *KernelSide {
	out := &KernelSide{Judged: k.Judged, Allowed: k.Allowed, decidedBy: "a miss"}
	for name, v := range map[*string]uint32{&out.Profile: k.Profile, &out.Identity: k.Identity, &out.Class: k.Class} {
		if v != 0 {
			*name = fmt.Sprintf("%#x", v)
		}
	}
	for i, l := range k.Lookups {
		value := "none"
		if l.Found {
			value = valueText(l.Key.Map, l.Value)
			if i == len(k.Lookups)-1 {
				out.decidedBy = nft.ElementSet(l.Key)
			}
		}
		out.Lookups = append(out.Lookups, nft.ElementSet(l.Key)+" "+lookupText(l.Key)+": "+value)
	}
	return out
}

// lookupText is elementText of a question: a range's key holds only what is looked for.
func lookupText(k policy.Key) string {
	if k.Map == policy.NetID {
		return k.Addr.String()
	}
	return elementText(k)
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

// writeAnswers prints the answers; families about which all is the same stand together.
func writeAnswers(w io.Writer, answers []Answer, all bool) error {
	for i := 0; i < len(answers); {
		body := answerBody(answers[i], all)
		n := i + 1
		for n < len(answers) && answerBody(answers[n], all) == body && answers[n].Flow.Protocol == answers[i].Flow.Protocol {
			n++
		}
		if i > 0 {
			fmt.Fprintln(w)
		}
		same := answers[i:n]
		var from, to []netip.Addr
		for _, a := range same {
			if !slices.Contains(from, a.Flow.Src) {
				from = append(from, a.Flow.Src)
			}
			if !slices.Contains(to, a.Flow.Dst) {
				to = append(to, a.Flow.Dst)
			}
		}
		fmt.Fprintf(w, "%s: %s -> %s %s\n\n%s", verdict(same[0].Allowed), withAddrs(same[0].Src, from), withAddrs(same[0].Dst, to), serviceName(same[0].flow), body)
		for _, a := range same {
			if err := a.Path.write(w, a.Flow.Dst); err != nil {
				return err
			}
		}
		i = n
	}
	return nil
}

// answerBody is everything of a verdict but the addresses.
func answerBody(a Answer, all bool) string {
	var b strings.Builder
	kernel := a.Egress.Kernel != nil
	t := &table{header: []string{"DIRECTION", "VERDICT", "BECAUSE"}}
	if kernel {
		t.header = append(t.header, "KERNEL")
	}
	for i, s := range []Side{a.Egress, a.Ingress} {
		row := []string{[2]string{"egress", "ingress"}[i], s.Verdict, s.Because}
		if kernel {
			row = append(row, s.kernelText())
		}
		t.add(row...)
	}
	_ = t.write(&b) // a strings.Builder takes everything
	for i, s := range []Side{a.Egress, a.Ingress} {
		if s.Nearest != "" {
			fmt.Fprintf(&b, "\n%s of %s: %s\n", [2]string{"egress", "ingress"}[i], s.oracle.Pod, s.Nearest)
		}
	}
	if all {
		writeConsidered(&b, a)
	}
	if a.KernelNote != "" {
		fmt.Fprintf(&b, "\nthe kernel was not asked: %s\n", a.KernelNote)
	}
	return b.String()
}

// withAddrs is "shop/web (10.0.0.7, fd00::7)", or the address alone when it has no name.
func withAddrs(name string, list []netip.Addr) string {
	if len(list) == 1 && name == list[0].String() {
		return name
	}
	return fmt.Sprintf("%s (%s)", name, strings.ReplaceAll(join(list), ",", ", "))
}

func writeConsidered(b *strings.Builder, a Answer) {
	t := &table{header: []string{"CONSIDERED", "POLICY", "RULE", "PEER", "PORT", "WHY NOT"}}
	for i, side := range []Side{a.Egress, a.Ingress} {
		dir := [2]string{"egress", "ingress"}[i]
		for _, c := range side.Considered {
			if c.Rule < 0 {
				t.add(dir, c.Policy, "none", "-", "-", "it has no rules: it only isolates")
				continue
			}
			t.add(dir, c.Policy, strconv.Itoa(c.Rule), matches(c.Peer), matches(c.Port), orDash(c.WhyNot))
		}
	}
	if len(t.rows) == 0 {
		b.WriteString("\nNo policy selects either end here.\n")
		return
	}
	b.WriteByte('\n')
	_ = t.write(b) // a strings.Builder takes everything
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
func (s Side) kernelText() string {
	k := s.Kernel
	text := "not judged (no profile)"
	if k.Judged {
		text = fmt.Sprintf("%s by %s (profile %s, identity %s, class %s)", allowDeny(k.Allowed), k.decidedBy, orDash(k.Profile), orDash(k.Identity), orDash(k.Class))
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
