package debug

import (
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
)

// tracer turns the kernel's steps into hops.
type tracer struct {
	snap   agent.Snapshot
	names  names
	why    *reasons
	places map[nft.RuleID]nft.RulePlace
	links  map[uint32]string
	live   func() ([]connection, error) // conntrack's connections
	flows  map[uint32]policy.Flow       // by packet, of those that were asked for
	answer map[uint32]bool              // packets that the server of a connection sent
	whole  map[uint32]bool              // packets marked before defragmentation, until they are behind it

	packets          int // how many are wanted; 0: no end
	started, dropped int
}

func (t *tracer) allBegun() bool   { return t.packets > 0 && t.started >= t.packets }
func (t *tracer) allDropped() bool { return t.packets > 0 && t.dropped >= t.packets }

// step returns the hop of a step, and whether its packet is one that was asked for: not when
// there are more of them, and not what another program traces.
func (t *tracer) step(s nft.TraceStep) (Hop, bool) {
	if t.begins(s) {
		delete(t.flows, s.Packet)
		delete(t.answer, s.Packet)
		if !t.allBegun() {
			t.started++
			t.flows[s.Packet] = policy.Flow{}
		}
	}
	if _, wanted := t.flows[s.Packet]; !wanted {
		return Hop{}, false
	}
	if s.Table == nft.TableName && s.Verdict == "goto decide_reply" {
		t.answer[s.Packet] = true
	}
	h := t.hop(s)
	if h.Verdict == "drop" {
		t.dropped++
	}
	return h, true
}

// begins reports whether a step is a packet's first: where it is marked. What came whole is marked again behind
// defragmentation, where a packet that came in fragments begins.
func (t *tracer) begins(s nft.TraceStep) bool {
	if s.Table != nft.TraceTable || s.Rule == 0 {
		return false
	}
	if s.Chain == nft.TraceReassembled {
		again := t.whole[s.Packet]
		delete(t.whole, s.Packet)
		return !again
	}
	t.whole[s.Packet] = s.Chain == "prerouting"
	return true
}

// worthShowing is false for how a packet was marked, but for the step that has its flow.
func (h Hop) worthShowing() bool { return !h.marks() || h.Flow != nil }

func (h Hop) marks() bool { return strings.HasSuffix(h.Table, " "+nft.TraceTable) }

func (t *tracer) hop(s nft.TraceStep) Hop {
	h := Hop{Packet: strconv.FormatUint(uint64(s.Packet), 16), Table: nft.FamilyName(s.Family) + " " + s.Table, Chain: s.Chain,
		Verdict: s.Verdict, In: t.link(s.InDev), Out: t.link(s.OutDev)}
	if s.Flow.Src.IsValid() && t.flows[s.Packet].Dst != s.Flow.Dst {
		v := flowView(s.Flow)
		h.Flow, h.Src, h.Dst = &v, t.names.of(s.Flow.Src), t.names.of(s.Flow.Dst)
		t.flows[s.Packet] = s.Flow
	}
	own := s.Table == nft.TableName && nft.FamilyName(s.Family) == "inet"
	h.Rule = t.rule(s, own)
	h.Foreign = s.Verdict == "drop" && !own
	if own {
		h.Meaning = t.meaning(s)
	}
	return h
}

// rule names the rule of a step by its index in the chain, one of other programs also by the
// handle that deletes it.
func (t *tracer) rule(s nft.TraceStep, own bool) string {
	place, known := t.places[nft.RuleID{Family: s.Family, Table: s.Table, Chain: s.Chain, Handle: s.Rule}]
	switch {
	case s.Policy:
		return "policy of the chain"
	case s.Rule == 0:
		return "end of the chain"
	case !known:
		return fmt.Sprintf("handle %d", s.Rule)
	case own:
		return strings.TrimSpace(fmt.Sprintf("%d %s", place.Index, place.Text))
	case place.Comment != "":
		return fmt.Sprintf("%d (handle %d, %q)", place.Index, s.Rule, place.Comment)
	}
	return fmt.Sprintf("%d (handle %d)", place.Index, s.Rule)
}

// meaning says in words of policy what a step of our own chains is.
func (t *tracer) meaning(s nft.TraceStep) string {
	switch {
	case s.Chain == "forward" && s.Verdict == "accept" && !s.Policy:
		return "a connection that the policy in force has already allowed"
	case s.Chain == "denied" && s.Verdict == "drop":
		return "denied: " + t.verdict(s.Packet)
	case s.Verdict == "goto allowed":
		return "allowed: " + t.verdict(s.Packet)
	case s.Chain == "from_pod" && s.Verdict == "drop":
		return "the source address is not the pod's: spoofed, or the pod is not attached any more"
	case s.Chain == "to_pod" && s.Verdict == "drop":
		return "the address is not bound to this interface"
	case s.Chain == "host_port" && s.Verdict == "accept":
		return "a port of the node that leads to a pod: hostPort"
	case s.Chain == "pod_input" && s.Verdict == "drop":
		return "the node takes this from none of its pods: its loopback, or podToHost in the agent's configuration"
	case s.Chain == "tunnel" && s.Verdict == "drop":
		return "tunnels hear nodes only"
	case strings.HasPrefix(s.Chain, "stray") && s.Verdict == "drop":
		return "belongs to no live connection, and an end is isolated"
	}
	return ""
}

// verdict is both directions' reasons for the packet's flow. What the server sends is judged
// as its connection is, when it is judged: a change of policy may come between two packets.
func (t *tracer) verdict(packet uint32) string {
	f, of := t.flows[packet], ""
	if t.answer[packet] {
		if c, found := t.connection(f); found {
			f, of = c, fmt.Sprintf("it answers %s -> %s %s; ", t.names.of(c.Src), t.names.of(c.Dst), flowView(c).service())
		}
	}
	v := policy.EvaluateAll(t.snap.Cluster, t.snap.Node, f)
	a := Answer{Allowed: v.Allowed, Egress: t.why.side(v.Egress, policy.Egress, f), Ingress: t.why.side(v.Ingress, policy.Ingress, f)}
	if text := decidedBy(a); text != "" {
		return of + text
	}
	return of + "no policy selects either end here"
}

// connection is what conntrack holds of the connection whose server sent a packet of flow f.
func (t *tracer) connection(f policy.Flow) (policy.Flow, bool) {
	live, err := t.live()
	if err != nil {
		return f, false // the packet's own flow is named
	}
	for _, c := range live {
		if c.flow.Src == f.Dst && c.flow.Dst == f.Src && c.flow.Protocol == f.Protocol && c.clientPort == f.Port {
			return c.flow, true
		}
	}
	return f, false
}

func (t *tracer) link(index uint32) string {
	if index == 0 {
		return ""
	}
	name, ok := t.links[index]
	if !ok {
		name = "interface " + strconv.FormatUint(uint64(index), 10)
		if link, err := net.InterfaceByIndex(int(index)); err == nil {
			name = link.Name
		}
		t.links[index] = name
	}
	return name
}

// printHop prints one hop: a line, or a JSON or YAML document.
func (s *session) printHop(cmd *cobra.Command, w io.Writer, h Hop) error {
	if s.format != "table" {
		return s.printStream(cmd, h)
	}
	if h.Flow != nil {
		if _, err := fmt.Fprintf(w, "packet %s  %s -> %s %s  in %s out %s\n", h.Packet, h.Src, h.Dst, h.Flow.service(), orDash(h.In), orDash(h.Out)); err != nil {
			return err
		}
	}
	if h.marks() {
		return nil
	}
	line := fmt.Sprintf("  %-12s %-14s %-18s %s", h.Table, h.Chain, h.Verdict, h.Rule)
	if h.Foreign {
		line += "   <- DROPPED BY A TABLE THAT IS NOT OURS"
	}
	if h.Meaning != "" {
		line += "\n" + strings.Repeat(" ", 29) + "= " + h.Meaning
	}
	_, err := fmt.Fprintln(w, line)
	return err
}
