package debug

import (
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/nftcni/nftcni/policy"
)

// Answer is what `debug why` says about one pair of addresses.
type Answer struct {
	Src     string   `json:"src"`
	Dst     string   `json:"dst"`
	Flow    FlowView `json:"flow"`
	Allowed bool     `json:"allowed"` // by both ends, whatever node they are on
	// AllowedHere is what this node lets pass: another node judges its own pods.
	AllowedHere bool `json:"allowedHere"`
	Egress      Side `json:"egress"`
	Ingress     Side `json:"ingress"`
	// Agree is false when the kernel's tables decide a direction otherwise.
	Agree bool `json:"agree"`
	// KernelNote says why the kernel was not asked, or why its elements are not its answer.
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
	// Node is the node that judges this direction when it is not this one: the verdict is
	// what its policies are here, and no kernel was asked.
	Node    string `json:"node,omitempty"`
	Reason  string `json:"reason"` // policy.Reason
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
	Judged bool `json:"judged"`
	// Exempt: the ruleset lets it pass before it looks at these elements.
	Exempt   bool     `json:"exempt,omitempty"`
	Allowed  bool     `json:"allowed"`
	Profile  string   `json:"profile,omitempty"`
	Identity string   `json:"identity,omitempty"`
	Class    string   `json:"class,omitempty"`
	Lookups  []string `json:"lookups"` // in order, as "set element: value" or "set element: none"

	decidedBy string
}

// writeAnswers prints the answers; families about which all is the same stand together.
func writeAnswers(w io.Writer, answers []Answer, all bool) error {
	for i := 0; i < len(answers); {
		body := answerBody(answers[i], all, columnsOf(w))
		n := i + 1
		for n < len(answers) && answerBody(answers[n], all, columnsOf(w)) == body && answers[n].Flow.Protocol == answers[i].Flow.Protocol {
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
func answerBody(a Answer, all bool, columns int) string {
	b := page{columns: columns}
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
	_ = t.write(&b) // a page takes everything
	for i, s := range []Side{a.Egress, a.Ingress} {
		if s.Nearest != "" {
			fmt.Fprintf(&b, "\n%s of %s: %s\n", [2]string{"egress", "ingress"}[i], s.oracle.Pod, s.Nearest)
		}
	}
	if all {
		writeConsidered(&b, a)
	}
	switch {
	case a.KernelNote != "" && kernel:
		fmt.Fprintf(&b, "\nthe kernel may decide otherwise than its elements say: %s\n", a.KernelNote)
	case a.KernelNote != "":
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

func writeConsidered(b *page, a Answer) {
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
	_ = t.write(b) // a page takes everything
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
	if s.Node != "" && s.Agree {
		return "node " + s.Node + " judges"
	}
	if k.Exempt {
		return "exempt: passes before policy is asked"
	}
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
