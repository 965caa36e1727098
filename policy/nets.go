package policy

import (
	"net/netip"
	"slices"
	"sort"
)

// nets is the decomposition of all blocks in force into disjoint ranges.
type nets struct {
	ranges []netRange // sorted
}

// netRange is a range with what its addresses match by being in it.
type netRange struct {
	from, to netip.Addr
	sig      *signature
	id       *identity
}

// find returns the signature that a has by blocks alone.
func (n *nets) find(a netip.Addr) *signature {
	if r := n.at(a); r != nil {
		return r.sig
	}
	return nil
}

func (n *nets) at(a netip.Addr) *netRange {
	i := sort.Search(len(n.ranges), func(i int) bool { return a.Less(n.ranges[i].from) }) - 1
	if i < 0 || n.ranges[i].to.Less(a) {
		return nil
	}
	return &n.ranges[i]
}

// edge is where a block or an except begins (from) or has ended.
type edge struct {
	at    netip.Addr // invalid: behind the last address of its family
	v6    bool
	block int // index
	atom  *atom
	// except: of an except of the block, not of its CIDR.
	except, begins bool
}

// decompose sweeps over the blocks of all atoms: between two neighbouring edges no block
// tells addresses apart. A block holds while it is entered and no except of it is.
func (e *Engine) decompose() []netRange {
	var edges []edge
	var in, except []int // by block
	for _, a := range e.atoms {
		for _, b := range a.blocks {
			edges = appendEdges(edges, b.CIDR, edge{block: len(in), atom: a})
			for _, x := range b.Except {
				edges = appendEdges(edges, x, edge{block: len(in), atom: a, except: true})
			}
			in, except = append(in, 0), append(except, 0)
		}
	}
	slices.SortFunc(edges, compareEdges)
	var out []netRange
	holds := map[*atom]int{}
	for i, x := range edges {
		was := in[x.block] > 0 && except[x.block] == 0
		counts := in
		if x.except {
			counts = except
		}
		counts[x.block] += boolDelta(x.begins)
		if is := in[x.block] > 0 && except[x.block] == 0; is != was {
			if holds[x.atom] += boolDelta(is); holds[x.atom] == 0 {
				delete(holds, x.atom)
			}
		}
		if len(holds) == 0 || compareEdges(x, edges[i+1]) == 0 { // nothing holds at the last one
			continue
		}
		out = append(out, netRange{from: x.at, to: before(edges[i+1], x), sig: e.intern(sortedAtoms(holds), nil)})
	}
	return out
}

func boolDelta(up bool) int {
	if up {
		return 1
	}
	return -1
}

func sortedAtoms(m map[*atom]int) []*atom {
	out := make([]*atom, 0, len(m))
	for a := range m {
		out = append(out, a)
	}
	slices.SortFunc(out, compareAtom)
	return out
}

func appendEdges(edges []edge, p netip.Prefix, x edge) []edge {
	p = p.Masked()
	x.at, x.v6, x.begins = p.Addr(), p.Addr().Is6(), true
	edges = append(edges, x)
	x.at, x.begins = lastAddr(p).Next(), false
	return append(edges, x)
}

func compareEdges(a, b edge) int {
	if a.v6 != b.v6 {
		return boolDelta(a.v6)
	}
	if a.at.IsValid() != b.at.IsValid() {
		return boolDelta(b.at.IsValid())
	}
	return a.at.Compare(b.at)
}

// before is the last address in front of the edge next, which is in x's family or
// behind its end.
func before(next, x edge) netip.Addr {
	if next.at.IsValid() && next.v6 == x.v6 {
		return next.at.Prev()
	}
	return lastAddr(netip.PrefixFrom(x.at, 0).Masked())
}

// cut splits the ranges of fresh where old ones end, so that each piece lies in one old
// range or in none; the piece's id is the old range's.
func cut(fresh, old []netRange) []netRange {
	var out []netRange
	i := 0
	for _, f := range fresh {
		for i < len(old) && old[i].to.Less(f.from) {
			i++
		}
		for j := i; ; j++ {
			if j == len(old) || f.to.Less(old[j].from) {
				out = append(out, netRange{f.from, f.to, f.sig, nil})
				break
			}
			o := old[j]
			if f.from.Less(o.from) {
				out = append(out, netRange{f.from, o.from.Prev(), f.sig, nil})
				f.from = o.from
			}
			if !o.to.Less(f.to) {
				out = append(out, netRange{f.from, f.to, f.sig, o.id})
				break
			}
			out = append(out, netRange{f.from, o.to, f.sig, o.id})
			f.from = o.to.Next()
		}
	}
	return out
}

// join merges neighbours of one identity.
func join(ranges []netRange) []netRange {
	var out []netRange
	for _, r := range ranges {
		if n := len(out) - 1; n >= 0 && out[n].id == r.id && out[n].sig == r.sig && out[n].to.Next() == r.from {
			out[n].to = r.to
			continue
		}
		out = append(out, r)
	}
	return out
}

// diffNets returns the ops from one list of ranges to another, in the order of their
// addresses, deletes first.
func diffNets(old, fresh []netRange) []Op {
	type value struct{ from, to netip.Addr }
	have := map[value]uint32{}
	for _, r := range old {
		have[value{r.from, r.to}] = r.id.num
	}
	var dels, adds []Op
	for _, r := range fresh {
		k := value{r.from, r.to}
		if v, ok := have[k]; ok && v == r.id.num {
			delete(have, k)
			continue
		}
		adds = append(adds, Op{Element: Element{Key: Key{Map: NetID, Addr: r.from, To: r.to}, Value: r.id.num}})
	}
	for _, r := range old {
		if v, ok := have[value{r.from, r.to}]; ok {
			dels = append(dels, Op{Delete: true, Element: Element{Key: Key{Map: NetID, Addr: r.from, To: r.to}, Value: v}})
		}
	}
	return append(dels, adds...)
}
