package debug

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
)

// Hop is one step of a traced packet.
type Hop struct {
	Packet   string    `json:"packet"`
	Flow     *FlowView `json:"flow,omitempty"` // with the packet's first step
	Src      string    `json:"src,omitempty"`
	Dst      string    `json:"dst,omitempty"`
	In       string    `json:"in,omitempty"`
	Out      string    `json:"out,omitempty"`
	Table    string    `json:"table"` // with its family
	Chain    string    `json:"chain"`
	Rule     string    `json:"rule,omitempty"` // its index in the chain and what is known of it
	Verdict  string    `json:"verdict"`
	Meaning  string    `json:"meaning,omitempty"` // our own steps in words of policy
	Foreign  bool      `json:"foreign,omitempty"` // dropped by a table that is not ours
	terminal bool
}

type traceFlags struct {
	from, to, port string
	packets        int
	seconds        int
	replies        bool
}

func (s *session) traceCommand() *cobra.Command {
	var fl traceFlags
	cmd := &cobra.Command{
		Use:   "trace [--from POD] [--to POD] [--port PROTO/PORT]",
		Short: "Follow live packets rule by rule through every nftables table",
		Long: "Follow live packets rule by rule through every nftables table of the node, those of other\n" +
			"programs too, and say in words of policy what our own steps mean. Nothing is sent: start it,\n" +
			"then try the connection. At most 20 packets a second are traced.\n\n" +
			"A packet is matched before any DNAT: to see what is sent to a Service, give --from, or the\n" +
			"Service's address with --to. The rules that mark packets live in the table " + nft.TraceTable + ",\n" +
			"which the kernel removes when this command ends, however that happens.",
		Example: "  nftcni debug trace --from shop/web --to data/redis\n  nftcni debug trace --to 10.244.1.7 --port TCP/6379 --packets 1\n  nftcni debug trace --from shop/web -o json",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return s.trace(cmd, fl) },
	}
	f := cmd.Flags()
	f.StringVar(&fl.from, "from", "", "packets from this pod or address")
	f.StringVar(&fl.to, "to", "", "packets to this pod or address")
	f.StringVar(&fl.port, "port", "", "packets of this protocol and destination port, as TCP/80 or ICMP")
	f.BoolVar(&fl.replies, "replies", false, "trace the opposite direction instead: what DST answers")
	f.IntVar(&fl.packets, "packets", 5, "end after this many packets; 0: none")
	f.IntVar(&fl.seconds, "seconds", 60, "end after this many seconds; 0: when interrupted")
	for _, name := range []string{"from", "to"} {
		_ = cmd.RegisterFlagCompletionFunc(name, s.completePods(1))
	}
	return cmd
}

func (s *session) trace(cmd *cobra.Command, fl traceFlags) error {
	snap, err := s.snapshot(cmd.Context(), noticeTo(cmd))
	if err != nil {
		return err
	}
	filter, err := fl.filter(snap.Cluster)
	if err != nil {
		return err
	}
	places, err := nft.Rules(nft.Options{})
	if err != nil {
		return err
	}
	ctx, cancel := boundedContext(cmd.Context(), fl.seconds)
	defer cancel()
	t := tracer{names: newNames(snap), places: places, why: newReasons(snap.Cluster, snap.Node), snap: snap, packets: fl.packets,
		links: map[uint32]string{}, flows: map[uint32]policy.Flow{}, ended: map[uint32]bool{}}
	var failed error
	err = nft.Trace(ctx, nft.Options{}, filter,
		func() { noticeTo(cmd)("tracing; try the connection now") },
		func(step nft.TraceStep) {
			if hop, show := t.step(step); show && failed == nil {
				failed = s.printHop(cmd, cmd.OutOrStdout(), hop)
			}
			if failed != nil || t.enough() {
				cancel()
			}
		})
	if err == nil && failed == nil && len(t.flows) == 0 {
		noticeTo(cmd)("no matching packet was seen")
	}
	return errors.Join(err, failed)
}

// boundedContext ends after seconds, 0 meaning with parent.
func boundedContext(parent context.Context, seconds int) (context.Context, context.CancelFunc) {
	if seconds > 0 {
		return context.WithTimeout(parent, time.Duration(seconds)*time.Second)
	}
	return context.WithCancel(parent)
}

func (fl traceFlags) filter(c *policy.Cluster) (nft.TraceFilter, error) {
	var f nft.TraceFilter
	if fl.from == "" && fl.to == "" && fl.port == "" {
		return f, fmt.Errorf("say which packets: --from, --to, --port, or several of them")
	}
	for flag, into := range map[string]*endpoint{"from": {}, "to": {}} {
		arg := map[string]string{"from": fl.from, "to": fl.to}[flag]
		if arg == "" || arg == "world" {
			continue
		}
		e, err := resolve(c, arg)
		if err != nil {
			return f, fmt.Errorf("flag --%s: %w", flag, err)
		}
		*into = e
		if (flag == "from") != fl.replies {
			f.Src = e.addrs
		} else {
			f.Dst = e.addrs
		}
	}
	if fl.port == "" {
		return f, nil
	}
	svc, err := parseService(fl.port)
	if err != nil {
		return f, fmt.Errorf("flag --port: %w", err)
	}
	f.Protocol = svc.protocol
	if svc.protocol == policy.TCP || svc.protocol == policy.UDP || svc.protocol == policy.SCTP {
		f.Port = svc.port
	}
	if fl.replies {
		f.Port = 0
	}
	return f, nil
}

// tracer turns the kernel's steps into hops.
type tracer struct {
	snap   agent.Snapshot
	names  names
	why    *reasons
	places map[nft.RuleID]nft.RulePlace
	links  map[uint32]string
	flows  map[uint32]policy.Flow // by packet

	packets int             // how many are wanted; 0: no end
	ended   map[uint32]bool // packets that were dropped, or are out
}

func (t *tracer) enough() bool { return t.packets > 0 && len(t.ended) >= t.packets }

// step returns the hop of a step and whether it is worth showing: not when the packets are
// more than were asked for, nor how a packet was marked.
func (t *tracer) step(s nft.TraceStep) (Hop, bool) {
	if t.packets > 0 && len(t.flows) >= t.packets && t.flows[s.Packet] == (policy.Flow{}) {
		return Hop{}, false
	}
	h := t.hop(s)
	if h.terminal {
		t.ended[s.Packet] = true
	}
	return h, s.Table != nft.TraceTable || h.Flow != nil
}

func (t *tracer) hop(s nft.TraceStep) Hop {
	h := Hop{Packet: strconv.FormatUint(uint64(s.Packet), 16), Table: nft.FamilyName(s.Family) + " " + s.Table, Chain: s.Chain,
		Verdict: s.Verdict, In: t.link(s.InDev), Out: t.link(s.OutDev)}
	if s.Flow.Src.IsValid() {
		if _, known := t.flows[s.Packet]; !known || t.flows[s.Packet].Dst != s.Flow.Dst {
			v := flowView(s.Flow)
			h.Flow, h.Src, h.Dst = &v, t.names.of(s.Flow.Src), t.names.of(s.Flow.Dst)
			t.flows[s.Packet] = s.Flow
		}
	}
	own := s.Table == nft.TableName && nft.FamilyName(s.Family) == "inet"
	switch place, ok := t.places[nft.RuleID{Family: s.Family, Table: s.Table, Chain: s.Chain, Handle: s.Rule}]; {
	case s.Policy:
		h.Rule = "policy of the chain"
	case s.Rule == 0:
		h.Rule = "end of the chain"
	case ok:
		h.Rule = strings.TrimSpace(fmt.Sprintf("%d %s", place.Index, place.Text))
		if place.Comment != "" {
			h.Rule += " (" + place.Comment + ")"
		}
	default:
		h.Rule = fmt.Sprintf("handle %d", s.Rule)
	}
	h.Foreign = s.Verdict == "drop" && !own
	h.terminal = s.Verdict == "drop" || s.Policy && s.Verdict == "accept" && strings.Contains(strings.ToLower(s.Chain), "postrouting")
	if own {
		h.Meaning = t.meaning(s)
	}
	return h
}

// meaning says in words of policy what a step of our own chains is.
func (t *tracer) meaning(s nft.TraceStep) string {
	switch {
	case s.Chain == "forward" && s.Verdict == "accept" && !s.Policy:
		return "a connection that the policy in force has already allowed"
	case s.Chain == "denied" && s.Verdict == "drop":
		return "denied: " + t.verdict(t.flows[s.Packet])
	case s.Verdict == "goto allowed":
		return "allowed: " + t.verdict(t.flows[s.Packet])
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

// verdict is both directions' reasons for the packet's flow.
func (t *tracer) verdict(f policy.Flow) string {
	v := policy.EvaluateAll(t.snap.Cluster, t.snap.Node, f)
	a := Answer{Allowed: v.Allowed, Egress: t.why.side(v.Egress, policy.Egress, f), Ingress: t.why.side(v.Ingress, policy.Ingress, f)}
	if text := decidedBy(a); text != "" {
		return text
	}
	return "no policy selects either end here"
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
	if strings.HasSuffix(h.Table, " "+nft.TraceTable) {
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
