package nft

import (
	"bytes"
	"encoding/binary"
	"slices"

	"golang.org/x/sys/unix"
)

type attribute struct {
	kind uint16
	data []byte
}

// split reads attributes in order, without the flag of nesting, which kernels do not report evenly.
func split(b []byte) []attribute {
	var out []attribute
	for len(b) >= unix.NLA_HDRLEN {
		n := int(binary.NativeEndian.Uint16(b))
		if n < unix.NLA_HDRLEN || n > len(b) {
			return append(out, attribute{kind: 0xffff})
		}
		out = append(out, attribute{binary.NativeEndian.Uint16(b[2:]) &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER), b[unix.NLA_HDRLEN:n]})
		b = b[min((n+3)&^3, len(b)):]
	}
	return out
}

func find(as []attribute, kind uint16) []byte {
	for _, a := range as {
		if a.kind == kind {
			return a.data
		}
	}
	return nil
}

// sameExpressions compares two lists of expressions.
func sameExpressions(want, have []byte) bool {
	w, h := split(want), split(have)
	return slices.EqualFunc(w, h, func(x, y attribute) bool { return sameExpression(x.data, y.data) })
}

func sameExpression(want, have []byte) bool {
	w, h := split(want), split(have)
	name := cString(find(w, unix.NFTA_EXPR_NAME))
	if name != cString(find(h, unix.NFTA_EXPR_NAME)) {
		return false
	}
	if name == "counter" {
		return true
	}
	return sameFields(name, split(find(w, unix.NFTA_EXPR_DATA)), split(find(h, unix.NFTA_EXPR_DATA)))
}

func sameFields(name string, want, have []attribute) bool {
	for _, w := range want {
		h := find(have, w.kind)
		switch {
		case transient(name, w.kind):
		case name == "dynset" && w.kind == unix.NFTA_DYNSET_EXPR:
			if !sameExpression(w.data, h) {
				return false
			}
		case nestedData(name, w.kind):
			if !sameData(w.data, h) {
				return false
			}
		case !bytes.Equal(w.data, h) && (h != nil || !zero(w.data)):
			return false
		}
	}
	for _, h := range have {
		if find(want, h.kind) == nil && !transient(name, h.kind) && !implied(name, h) && !zero(h.data) {
			return false
		}
	}
	return true
}

// transient fields name a set inside the batch that made it.
func transient(name string, kind uint16) bool {
	return name == "lookup" && kind == unix.NFTA_LOOKUP_SET_ID || name == "dynset" && kind == unix.NFTA_DYNSET_SET_ID
}

// implied flags tell what the registers of a destination say already: an address and a port
// (linux/netfilter/nf_nat.h, NF_NAT_RANGE_MAP_IPS and NF_NAT_RANGE_PROTO_SPECIFIED).
func implied(name string, a attribute) bool {
	return name == "nat" && a.kind == unix.NFTA_NAT_FLAGS && beUint32(a.data) == 1|2
}

// nestedData fields hold a value or a verdict in attributes of their own.
func nestedData(name string, kind uint16) bool {
	switch name {
	case "cmp":
		return kind == unix.NFTA_CMP_DATA
	case "bitwise":
		return kind == unix.NFTA_BITWISE_MASK || kind == unix.NFTA_BITWISE_XOR
	case "immediate":
		return kind == unix.NFTA_IMMEDIATE_DATA
	}
	return false
}

func sameData(want, have []byte) bool {
	return slices.EqualFunc(split(want), split(have), func(x, y attribute) bool {
		if x.kind == unix.NFTA_DATA_VERDICT {
			return x.kind == y.kind && slices.EqualFunc(split(x.data), split(y.data), func(x, y attribute) bool {
				return x.kind == y.kind && bytes.Equal(x.data, y.data)
			})
		}
		return x.kind == y.kind && bytes.Equal(x.data, y.data)
	})
}

func zero(b []byte) bool { return !slices.ContainsFunc(b, func(c byte) bool { return c != 0 }) }
