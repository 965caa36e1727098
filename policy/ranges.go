package policy

import (
	"net/netip"
	"slices"
	"sort"
)

// rangeValue is one element of NetID.
type rangeValue struct {
	from, to netip.Addr
	value    uint32
}

type rangeValue16 struct {
	first, last uint16
	value       uint32
}

func sortRanges(rs []rangeValue) {
	slices.SortFunc(rs, func(a, b rangeValue) int { return a.from.Compare(b.from) })
}

// findRange finds the value of the range holding a; rs is sorted and disjoint.
func findRange(rs []rangeValue, a netip.Addr) (uint32, bool) {
	i := sort.Search(len(rs), func(i int) bool { return a.Less(rs[i].from) }) - 1
	if i < 0 || rs[i].to.Less(a) || rs[i].from.BitLen() != a.BitLen() {
		return 0, false
	}
	return rs[i].value, true
}

// lastAddr is the greatest address of p.
func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}
