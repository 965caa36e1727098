package agent

import (
	"cmp"
	"context"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"github.com/nftcni/nftcni/policy"
)

// namer names the ends of flows and what decides them, from a cluster that is renewed at
// most once a second: the ring must not make pods wait.
type namer struct {
	mu      sync.Mutex
	loop    *loop
	at      time.Time
	commits uint64
	named   *named
}

// named is one version of the cluster. Deciding a flow walks every policy, and
// connections repeat, so answers are remembered.
type named struct {
	oracle *policy.Oracle
	mu     sync.Mutex
	memo   map[rawFlow]decision // at and clientPort left zero
}

type decision struct {
	by      string
	changed bool
}

const (
	namerAge  = time.Second
	namerMemo = 1 << 14
)

func (n *namer) current(ctx context.Context) (*named, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.named != nil && time.Since(n.at) < namerAge {
		return n.named, nil
	}
	var c *policy.Cluster
	err := n.loop.do(ctx, func() {
		if n.named == nil || n.loop.commits.total != n.commits {
			n.commits, c = n.loop.commits.total, n.loop.inv.cluster()
		}
	})
	if err != nil {
		return nil, err
	}
	if c != nil {
		n.named = &named{oracle: policy.NewOracle(c, n.loop.cfg.Node), memo: map[rawFlow]decision{}}
	}
	n.at = time.Now()
	return n.named, nil
}

// concerns reports whether an end of r is a pod of node.
func (n *named) concerns(node string, r rawFlow) bool {
	for _, a := range []netip.Addr{r.flow.Src, r.flow.Dst} {
		if p := n.oracle.Owner(a); p != nil && p.Node == node {
			return true
		}
	}
	return r.denied
}

// describe is the Flow of r.
func (n *named) describe(r rawFlow, seq uint64) Flow {
	f := Flow{Seq: seq, At: r.at, Verdict: "allowed", Protocol: cmp.Or(ProtocolName(r.flow.Protocol), strconv.Itoa(int(r.flow.Protocol))),
		Src: netip.AddrPortFrom(r.flow.Src, r.clientPort), Dst: netip.AddrPortFrom(r.flow.Dst, r.flow.Port)}
	if p := n.oracle.Owner(r.flow.Src); p != nil {
		f.SrcPod = p.Name.String()
	}
	if p := n.oracle.Owner(r.flow.Dst); p != nil {
		f.DstPod = p.Name.String()
	}
	if r.denied {
		f.Verdict = "denied"
	}
	d := n.decides(r)
	f.Policy, f.Changed = d.by, d.changed
	return f
}

func (n *named) decides(r rawFlow) decision {
	key := rawFlow{flow: r.flow, denied: r.denied}
	n.mu.Lock()
	defer n.mu.Unlock()
	if d, ok := n.memo[key]; ok {
		return d
	}
	if len(n.memo) >= namerMemo {
		clear(n.memo)
	}
	v := n.oracle.Evaluate(r.flow)
	d := decision{by: Decider(v), changed: v.Allowed == r.denied}
	n.memo[key] = d
	return d
}

// Decider names what a verdict rests on: the first direction that denies or, of an allowed
// connection, that a policy decides. "" where none does.
func Decider(v policy.Verdict) string {
	for _, d := range []policy.Decision{v.Egress, v.Ingress} {
		if (d.Action == policy.Allow) != v.Allowed {
			continue
		}
		if text := decider(d); text != "" {
			return text
		}
	}
	return ""
}

// decider names what a decision rests on, "" for none.
func decider(d policy.Decision) string {
	switch d.Reason {
	case policy.RuleMatched:
		return d.Policy.String() + " rule " + strconv.Itoa(d.Rule)
	case policy.Isolated:
		text := ""
		for i, id := range d.Isolating {
			if i > 0 {
				text += ","
			}
			text += id.String()
		}
		return text
	}
	return ""
}
