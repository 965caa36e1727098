package nft

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/policy"
)

// element is one element of any set.
type element struct {
	key     rawKey
	data    []byte
	goes    *verdict
	comment string
}

// element adds or deletes one element. Neighbours for the same set share a message.
func (b *batch) element(del bool, set string, e element, does string) {
	b.named(del, set, e, does, policy.Key{})
}

func (b *batch) named(del bool, set string, e element, does string, k policy.Key) {
	kind := unix.NFT_MSG_NEWSETELEM
	verb := "add "
	if del {
		kind, verb = unix.NFT_MSG_DELSETELEM, "delete "
	}
	if b.message < 0 || b.kind != kind || b.set != set || len(b.buf)-b.message > maxMessage {
		b.change(uint16(kind), createFlag(del), verb+"elements of "+set)
		b.kind, b.set = kind, set
		b.str(unix.NFTA_SET_ELEM_LIST_TABLE, TableName)
		b.str(unix.NFTA_SET_ELEM_LIST_SET, set)
		b.list = b.nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS)
	}
	b.ops[b.seq] = append(b.ops[b.seq], part{len(b.buf) - b.message, verb + set + " " + does, k})
	b.n++
	b.oneElement(del, e, false)
	if e.key.span && e.key.after != nil {
		b.oneElement(del, element{key: rawKey{first: e.key.after}}, true)
	}
}

func createFlag(del bool) uint16 {
	if del {
		return 0
	}
	return unix.NLM_F_CREATE
}

func (b *batch) oneElement(del bool, e element, end bool) {
	elem := b.nest(unix.NFTA_LIST_ELEM)
	if end {
		b.u32(unix.NFTA_SET_ELEM_FLAGS, unix.NFT_SET_ELEM_INTERVAL_END)
	}
	b.value(unix.NFTA_SET_ELEM_KEY, e.key.first)
	if e.key.end != nil {
		b.value(nftaSetElemKeyEnd, e.key.end)
	}
	if !del {
		if e.data != nil {
			b.value(unix.NFTA_SET_ELEM_DATA, e.data)
		}
		if e.goes != nil {
			b.verdictData(*e.goes)
		}
		if e.comment != "" {
			b.attr(unix.NFTA_SET_ELEM_USERDATA, appendUserData(nil, udataComment, append([]byte(e.comment), 0)))
		}
	}
	b.endNest(elem)
}

func (b *batch) value(kind uint16, data []byte) {
	n := b.nest(kind)
	b.attr(unix.NFTA_DATA_VALUE, data)
	b.endNest(n)
}

func (b *batch) verdictData(v verdict) {
	data := b.nest(unix.NFTA_SET_ELEM_DATA)
	code := b.nest(unix.NFTA_DATA_VERDICT)
	b.u32(unix.NFTA_VERDICT_CODE, uint32(int32(v.kind)))
	if v.chain != "" {
		b.str(unix.NFTA_VERDICT_CHAIN, v.chain)
	}
	b.endNest(code)
	b.endNest(data)
}

// op adds one change of the engine.
func (b *batch) op(o policy.Op) {
	e := element{key: encodeKey(o.Key)}
	if !o.Delete {
		e.comment = cleanComment(o.Comment)
		if valued(o.Map) {
			e.data = host32(o.Value)
		}
	}
	b.named(o.Delete, ElementSet(o.Key), e, "", o.Key)
}

// describe names an element for errors.
func describe(k policy.Key) string {
	switch {
	case k.Map == policy.NetID:
		return fmt.Sprintf("%s-%s", k.Addr, k.To)
	case addressed(k.Map):
		return k.Addr.String()
	case k.Map == policy.Access:
		return fmt.Sprintf("%#x . %#x", k.X, k.Y)
	case k.Map == policy.AccessPort:
		return fmt.Sprintf("%#x . %d . %d", k.X, k.Protocol, k.First)
	case k.Map == policy.AccessRange:
		return fmt.Sprintf("%#x . %d . %d-%d", k.X, k.Protocol, k.First, k.Last)
	}
	return fmt.Sprintf("%#x", k.X)
}
