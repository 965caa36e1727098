package debug

import (
	"cmp"
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
)

// seen is the agent's ring or, without an agent, what the kernel holds itself.
func (s *session) seen(ctx context.Context, query string, notice func(string)) (agent.Flows, error) {
	var got agent.Flows
	err := s.get(ctx, agent.PathFlows+query, &got)
	if !errors.Is(err, errNoAgent) {
		return got, err
	}
	snap, err := s.left(err, notice)
	if err != nil {
		return got, err
	}
	notice("these are the connections that conntrack holds and the pairs that were denied within the last hour, without times")
	return s.kernelFlows(ctx, snap)
}

// kernelFlows are conntrack's connections of this node's pods, and the denied pairs, of
// which the kernel keeps neither protocol nor port.
func (s *session) kernelFlows(ctx context.Context, snap agent.Snapshot) (agent.Flows, error) {
	out := agent.Flows{Flows: []agent.Flow{}, SampledOneIn: 1}
	live, err := liveFlows(ctx)
	if err != nil {
		return out, err
	}
	n := newNames(snap)
	for _, c := range live {
		if n.local(c.flow.Src) || n.local(c.flow.Dst) {
			out.Flows = append(out.Flows, n.flow(c.flow, c.clientPort, c.mark == policy.DeniedMark, protocolShort(c.flow.Protocol)))
		}
	}
	denials, err := readTable(ctx, func(r *nft.Reader) (any, error) { return r.Denials(ctx) })
	if err != nil && !errors.Is(err, nft.ErrNoTable) {
		return out, err
	}
	list, _ := denials.([]nft.Denial)
	for _, d := range list {
		f := n.flow(policy.Flow{Src: d.Src, Dst: d.Dst}, 0, true, "")
		f.Policy, f.Changed = n.drop(d).Policies, false
		out.Flows = append(out.Flows, f)
	}
	slices.SortFunc(out.Flows, func(a, b agent.Flow) int {
		return cmp.Or(cmp.Compare(a.SrcPod, b.SrcPod), cmp.Compare(a.DstPod, b.DstPod), a.Src.Compare(b.Src), a.Dst.Compare(b.Dst), cmp.Compare(a.Verdict, b.Verdict))
	})
	return out, nil
}

// protocolShort is the protocol as agent.Flow writes it: a number where it has no name.
func protocolShort(p policy.Protocol) string {
	return strings.TrimPrefix(protocolName(p), "protocol ")
}

// local: a is of a pod of the node that the names are of.
func (n names) local(a netip.Addr) bool {
	p := n.oracle.Owner(a)
	return p != nil && p.Node == n.node
}

func (n names) flow(f policy.Flow, clientPort uint16, denied bool, protocol string) agent.Flow {
	out := agent.Flow{Verdict: "allowed", Src: netip.AddrPortFrom(f.Src, clientPort), Dst: netip.AddrPortFrom(f.Dst, f.Port), Protocol: protocol}
	if p := n.oracle.Owner(f.Src); p != nil {
		out.SrcPod = p.Name.String()
	}
	if p := n.oracle.Owner(f.Dst); p != nil {
		out.DstPod = p.Name.String()
	}
	if denied {
		out.Verdict = "denied"
	}
	v := n.oracle.Evaluate(f)
	out.Policy, out.Changed = agent.Decider(v), v.Allowed == denied
	return out
}
