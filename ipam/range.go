package ipam

import (
	"errors"
	"fmt"
	"math"
	"math/bits"
	"net/netip"
	"strings"
)

// Range is the addresses First to Last, both included, of one subnet.
type Range struct {
	Subnet      netip.Prefix
	First, Last netip.Addr
	// Gateway is never leased. It is invalid where there is none, as on a routed veth.
	Gateway netip.Addr
}

// NewRange returns the range of subnet from first to last, where an invalid address
// means the first or last one usable: the network and broadcast address of IPv4 (up to
// /30) and the subnet-router anycast address of IPv6 (RFC 4291, 2.6.1) are left out.
// Errors name the field of the network configuration that is wrong.
func NewRange(subnet netip.Prefix, first, last, gateway netip.Addr) (Range, error) {
	if !subnet.IsValid() || subnet.Addr().Is4In6() || subnet.Addr().Zone() != "" {
		return Range{}, errors.New("subnet: not a prefix such as 10.244.1.0/24")
	}
	if subnet != subnet.Masked() {
		return Range{}, fmt.Errorf("subnet: %s has bits set behind its mask; write %s", subnet, subnet.Masked())
	}
	r := usable(subnet)
	for _, bound := range []struct {
		field string
		value netip.Addr
		into  *netip.Addr
	}{{"rangeStart", first, &r.First}, {"rangeEnd", last, &r.Last}, {"gateway", gateway, &r.Gateway}} {
		if !bound.value.IsValid() {
			continue
		}
		if !subnet.Contains(bound.value) {
			return Range{}, fmt.Errorf("%s: %s is not in subnet %s", bound.field, bound.value, subnet)
		}
		*bound.into = bound.value
	}
	if r.Last.Less(r.First) {
		return Range{}, fmt.Errorf("rangeEnd: %s lies before rangeStart %s", r.Last, r.First)
	}
	return r, nil
}

func usable(subnet netip.Prefix) Range {
	r := Range{Subnet: subnet, First: subnet.Addr(), Last: lastOf(subnet)}
	host := subnet.Addr().BitLen() - subnet.Bits()
	if host >= 2 {
		r.First = r.First.Next()
	}
	if host >= 2 && subnet.Addr().Is4() {
		r.Last = r.Last.Prev()
	}
	return r
}

func lastOf(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// Contains says whether a lies between First and Last.
func (r Range) Contains(a netip.Addr) bool {
	return a.Is4() == r.First.Is4() && !a.Less(r.First) && !r.Last.Less(a)
}

// Size is the number of addresses, at most math.MaxUint64.
func (r Range) Size() uint64 {
	first, last := r.First.As16(), r.Last.As16()
	var hi, lo, borrow uint64
	lo, borrow = bits.Sub64(be64(last[8:]), be64(first[8:]), 0)
	hi, _ = bits.Sub64(be64(last[:8]), be64(first[:8]), borrow)
	if hi != 0 || lo == math.MaxUint64 {
		return math.MaxUint64
	}
	return lo + 1
}

func be64(b []byte) uint64 {
	var v uint64
	for _, c := range b[:8] {
		v = v<<8 | uint64(c)
	}
	return v
}

func (r Range) String() string { return fmt.Sprintf("%s-%s", r.First, r.Last) }

// Pool is the ranges of one family from which an owner gets one address.
type Pool []Range

func (p Pool) contains(a netip.Addr) (Range, bool) {
	for _, r := range p {
		if r.Contains(a) {
			return r, true
		}
	}
	return Range{}, false
}

func (p Pool) size() uint64 {
	var sum uint64
	for _, r := range p {
		n := r.Size()
		if sum+n < sum {
			return math.MaxUint64
		}
		sum += n
	}
	return sum
}

func (p Pool) String() string {
	names := make([]string, len(p))
	for i, r := range p {
		names[i] = r.String()
	}
	return strings.Join(names, ", ")
}
