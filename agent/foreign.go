package agent

import (
	"net/netip"
	"slices"

	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
)

// claims are the addresses of this node's pods where another CNI wires them
// (NetworkNone): what the source says is bound, without an interface.
type claims struct {
	node  string
	pods  map[policy.Name][]netip.Addr
	count map[netip.Addr]int // pods that claim it; a reused address may have two for a moment
}

func newClaims(node string) *claims {
	return &claims{node: node, pods: map[policy.Name][]netip.Addr{}, count: map[netip.Addr]int{}}
}

// set records p, nil meaning that it is gone, and returns what to bind and unbind.
func (c *claims) set(n policy.Name, p *policy.Pod) (bind, unbind []nft.Binding) {
	var want []netip.Addr
	if p != nil && p.Node == c.node && !p.HostNetwork && !p.Finished {
		want = p.Addrs
	}
	have := c.pods[n]
	for _, a := range want {
		if !slices.Contains(have, a) {
			if c.count[a]++; c.count[a] == 1 {
				bind = append(bind, nft.Binding{Addr: a, Comment: n.String()})
			}
		}
	}
	for _, a := range have {
		if !slices.Contains(want, a) {
			if c.count[a]--; c.count[a] == 0 {
				delete(c.count, a)
				unbind = append(unbind, nft.Binding{Addr: a})
			}
		}
	}
	delete(c.pods, n)
	if len(want) > 0 {
		c.pods[n] = slices.Clone(want)
	}
	return bind, unbind
}

// bindings are all that should be bound.
func (c *claims) bindings() []nft.Binding {
	var out []nft.Binding
	seen := map[netip.Addr]bool{}
	for n, addrs := range c.pods {
		for _, a := range addrs {
			if !seen[a] {
				seen[a] = true
				out = append(out, nft.Binding{Addr: a, Comment: n.String()})
			}
		}
	}
	return out
}

// claim adds to the batch what an event means for the bindings of a node that another
// CNI wires.
func (l *loop) claim(b *batch, e policy.Event) {
	if l.cfg.Network != NetworkNone || e.Pod == nil {
		return
	}
	p := e.Pod
	if e.Delete {
		p = nil
	}
	bind, unbind := l.claims.set(e.Pod.Name, p)
	b.rebind(bind, unbind)
}

// rebind adds bindings to the batch; one that is made and undone in it is left out.
func (b *batch) rebind(bind, unbind []nft.Binding) {
	b.bind, b.unbind = balance(b.bind, b.unbind, bind)
	b.unbind, b.bind = balance(b.unbind, b.bind, unbind)
}

// balance adds more to list, unless other holds it: then it is taken from there.
func balance(list, other, more []nft.Binding) (added, left []nft.Binding) {
	for _, x := range more {
		same := func(y nft.Binding) bool { return x.Interface == y.Interface && x.Addr == y.Addr }
		if i := slices.IndexFunc(other, same); i >= 0 {
			other = slices.Delete(other, i, i+1)
			continue
		}
		list = append(list, x)
	}
	return list, other
}

// without are the bindings of a that are not in b.
func without(a, b []nft.Binding) []nft.Binding {
	return slices.DeleteFunc(slices.Clone(a), func(x nft.Binding) bool { return slices.Contains(b, x) })
}
