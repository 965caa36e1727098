package nft

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"unicode/utf8"

	"github.com/nftcni/nftcni/policy"
)

// elementMaps are the maps of the engine with the sets that hold them.
func elementMaps() []policy.Map {
	return []policy.Map{
		policy.PodID, policy.NetID, policy.IngressProfile, policy.EgressProfile, policy.IsolatedIngress, policy.IsolatedEgress,
		policy.Access, policy.AccessOthers, policy.AccessPort, policy.AccessRange, policy.AccessRest,
	}
}

// setBase is the name of m's set without the family.
func setBase(m policy.Map) string {
	switch m {
	case policy.PodID:
		return "pod_id"
	case policy.NetID:
		return "net_id"
	case policy.IngressProfile:
		return "ingress_profile"
	case policy.EgressProfile:
		return "egress_profile"
	case policy.IsolatedIngress:
		return "isolated_ingress"
	case policy.IsolatedEgress:
		return "isolated_egress"
	case policy.Access:
		return "access"
	case policy.AccessOthers:
		return "access_others"
	case policy.AccessPort:
		return "access_port"
	case policy.AccessRange:
		return "access_range"
	}
	return "access_rest"
}

// addressed reports whether the elements of m are addresses, in a set for each family.
func addressed(m policy.Map) bool { return m <= policy.IsolatedEgress }

// valued reports whether m is a map; the others are sets.
func valued(m policy.Map) bool { return m != policy.IsolatedIngress && m != policy.IsolatedEgress }

// ElementSet is the name of the set or map that holds k. ICMP and ICMPv6 have a map of their own: what the rules
// read as a port in an ICMP packet is a checksum that the sender chooses.
func ElementSet(k policy.Key) string {
	name := setBase(k.Map)
	switch {
	case addressed(k.Map) && k.Addr.Is4():
		return name + "4"
	case addressed(k.Map):
		return name + "6"
	case isICMP(k):
		return "access_icmp"
	}
	return name
}

func isICMP(k policy.Key) bool {
	return (k.Map == policy.AccessPort || k.Map == policy.AccessRange) && (k.Protocol == policy.ICMP || k.Protocol == policy.ICMPv6)
}

// rawKey is an element's key as the rules load it into registers: addresses and ports in network order, marks and
// classids in the host's (in network order where the set has intervals), every field padded to 32 bits.
type rawKey struct {
	first []byte
	end   []byte // NFTA_SET_ELEM_KEY_END of concatenated ranges
	after []byte // first address past an address range; nil when the range ends with the address space
	span  bool   // first begins a range that a second element ends
}

func encodeKey(k policy.Key) rawKey {
	switch {
	case k.Map == policy.NetID:
		r := rawKey{first: k.Addr.AsSlice(), span: true}
		if next := k.To.Next(); next.IsValid() && next.Is4() == k.Addr.Is4() {
			r.after = next.AsSlice()
		}
		return r
	case addressed(k.Map):
		return rawKey{first: k.Addr.AsSlice()}
	case k.Map == policy.AccessRange:
		return rawKey{first: portKey(binary.BigEndian, k, k.First), end: portKey(binary.BigEndian, k, k.Last)}
	case isICMP(k):
		return rawKey{first: portKey(binary.BigEndian, k, k.First), end: portKey(binary.BigEndian, k, k.First)}
	case k.Map == policy.AccessPort:
		return rawKey{first: portKey(binary.NativeEndian, k, k.First)}
	case k.Map == policy.Access:
		return rawKey{first: append(host32(k.X), host32(k.Y)...)}
	}
	return rawKey{first: host32(k.X)}
}

func portKey(order binary.AppendByteOrder, k policy.Key, port uint16) []byte {
	b := append(order.AppendUint32(nil, k.X), byte(k.Protocol), 0, 0, 0)
	return append(binary.BigEndian.AppendUint16(b, port), 0, 0)
}

// decodeKey is the inverse of encodeKey for an element of m's set; e is its first part.
func decodeKey(m policy.Map, e rawElement) (policy.Key, error) {
	k := policy.Key{Map: m}
	short := func(want int) error {
		return fmt.Errorf("element of %s: key of %d bytes, want %d", setBase(m), len(e.key), want)
	}
	switch {
	case addressed(m):
		var ok bool
		if k.Addr, ok = netip.AddrFromSlice(e.key); !ok {
			return k, short(4)
		}
	case m == policy.AccessPort || m == policy.AccessRange:
		if len(e.key) != 12 {
			return k, short(12)
		}
		k.X, k.Protocol, k.First = binary.NativeEndian.Uint32(e.key), policy.Protocol(e.key[4]), binary.BigEndian.Uint16(e.key[8:])
		if m == policy.AccessRange {
			k.X, k.Last = binary.BigEndian.Uint32(e.key), k.First
			if len(e.keyEnd) == 12 {
				k.Last = binary.BigEndian.Uint16(e.keyEnd[8:])
			}
		}
		if isICMP(k) && k.First == k.Last {
			k.Map, k.Last = policy.AccessPort, 0
		}
	case m == policy.Access:
		if len(e.key) != 8 {
			return k, short(8)
		}
		k.X, k.Y = binary.NativeEndian.Uint32(e.key), binary.NativeEndian.Uint32(e.key[4:])
	default:
		if len(e.key) != 4 {
			return k, short(4)
		}
		k.X = binary.NativeEndian.Uint32(e.key)
	}
	return k, nil
}

// commentMax is what nft takes as a comment, its NUL excluded (libnftnl, NFTNL_UDATA_COMMENT_MAXLEN).
const commentMax = 127

// cleanComment cuts s to what fits and replaces what would break nft's own listing.
func cleanComment(s string) string {
	b := make([]byte, 0, min(len(s), commentMax))
	for _, r := range s {
		if r < ' ' || r == '"' || r == '\\' || r == 0x7f || r == utf8.RuneError {
			r = '?'
		}
		if len(b)+utf8.RuneLen(r) > commentMax {
			break
		}
		b = utf8.AppendRune(b, r)
	}
	return string(b)
}
