package debug

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"

	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
)

// Hop is one step of a traced packet.
type Hop struct {
	Packet  string    `json:"packet"`         // the kernel's number, which it gives again to later packets
	Flow    *FlowView `json:"flow,omitempty"` // with the packet's first step
	Src     string    `json:"src,omitempty"`
	Dst     string    `json:"dst,omitempty"`
	In      string    `json:"in,omitempty"`
	Out     string    `json:"out,omitempty"`
	Table   string    `json:"table"` // with its family
	Chain   string    `json:"chain"`
	Rule    string    `json:"rule,omitempty"` // its index in the chain and what is known of it
	Verdict string    `json:"verdict"`
	Meaning string    `json:"meaning,omitempty"` // our own steps in words of policy
	Foreign bool      `json:"foreign,omitempty"` // dropped by a table that is not ours
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
		links: map[uint32]string{}, flows: map[uint32]policy.Flow{}, answer: map[uint32]bool{}, whole: map[uint32]bool{},
		live: func() ([]connection, error) { return liveFlows(cmd.Context()) }}
	var steps atomic.Uint64 // of these packets since the last of them began
	go endWhenQuiet(ctx, cancel, &steps)
	var failed error
	err = nft.Trace(ctx, nft.Options{}, filter,
		func() { noticeTo(cmd)("tracing; try the connection now") },
		func(step nft.TraceStep) {
			hop, wanted := t.step(step)
			if wanted && hop.worthShowing() && failed == nil {
				failed = s.printHop(cmd, cmd.OutOrStdout(), hop)
			}
			switch {
			case failed != nil || t.allDropped():
				cancel()
			case wanted && t.allBegun():
				steps.Add(1)
			}
		})
	if err == nil && failed == nil && t.started == 0 {
		noticeTo(cmd)("no matching packet was seen")
	}
	return errors.Join(err, failed)
}

// endWhenQuiet ends a trace when its packets have all begun and no more is heard of them: no
// step says that it is the last. It looks several times, so that one pause of this process is
// not taken for the end.
func endWhenQuiet(ctx context.Context, end func(), steps *atomic.Uint64) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for before, quiet := uint64(0), 0; quiet < 3; quiet++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if now := steps.Load(); now == 0 || now != before {
			before, quiet = now, 0
		}
	}
	end()
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
