package nft

import (
	"encoding/binary"
	"fmt"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/policy"
)

// Why an encoder of our own: google/nftables asks for an acknowledgement per message (20,000 elements in 20,000
// messages take 261 ms, with one acknowledgement 25 ms) and cannot write the byte order of map data, without which
// nft lists numbers swapped. Expressions, whose encoding is the intricate part, come from its expr package.

// maxMessage keeps the length of the attribute around the elements, 16 bits, from wrapping.
const maxMessage = 60_000

// User data types of libnftnl (include/udata.h).
const (
	udataComment      = 0 // of elements, rules, chains and tables
	udataSetKeyOrder  = 0
	udataSetDataOrder = 1
	udataSetComment   = 7
	orderHost         = 1
	orderBig          = 2
)

// nfAccept is NF_ACCEPT of linux/netfilter.h: the policy of every base chain.
const nfAccept = 1

// A batch is one transaction in the making: nfnetlink messages between a begin and an end.
type batch struct {
	buf  []byte
	seq  uint32
	ops  map[uint32][]part // by sequence number: what a message does, for errors
	last int               // offset of the last message that changes something
	n    int               // elements

	// The message of elements that is still open, and its two nested lengths.
	kind, message, list int
	set                 string
}

// A part is what the bytes of a message from offset on do. Elements of the engine are named only when one fails.
type part struct {
	offset int
	does   string
	key    policy.Key
}

func (p part) String() string {
	if p.key == (policy.Key{}) {
		return p.does
	}
	return p.does + describe(p.key)
}

func newBatch(seq uint32) *batch {
	b := &batch{seq: seq, ops: map[uint32][]part{}, message: -1}
	b.header(unix.NFNL_MSG_BATCH_BEGIN, unix.NLM_F_REQUEST, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES, "begin")
	b.endMessage()
	return b
}

func (b *batch) empty() bool { return b.last == 0 && b.message < 0 }

func (b *batch) header(kind uint16, flags uint16, family byte, res uint16, does string) {
	b.message = len(b.buf)
	b.buf = binary.NativeEndian.AppendUint32(b.buf, 0)
	b.buf = binary.NativeEndian.AppendUint16(b.buf, kind)
	b.buf = binary.NativeEndian.AppendUint16(b.buf, flags)
	b.buf = binary.NativeEndian.AppendUint32(b.buf, b.seq)
	b.buf = binary.NativeEndian.AppendUint32(b.buf, 0)
	b.buf = append(b.buf, family, unix.NFNETLINK_V0)
	b.buf = binary.BigEndian.AppendUint16(b.buf, res)
	b.ops[b.seq] = []part{{does: does}}
}

// change begins a message of nf_tables.
func (b *batch) change(kind uint16, flags uint16, does string) {
	b.flush()
	b.header(unix.NFNL_SUBSYS_NFTABLES<<8|kind, unix.NLM_F_REQUEST|flags, unix.NFPROTO_INET, 0, does)
	b.last = b.message
}

func (b *batch) endMessage() {
	binary.NativeEndian.PutUint32(b.buf[b.message:], uint32(len(b.buf)-b.message))
	b.message = -1
	b.seq++
}

// flush closes the open message of elements.
func (b *batch) flush() {
	if b.message < 0 {
		return
	}
	b.endNest(b.list)
	b.endMessage()
}

// bytes closes the transaction: only its last change is acknowledged (acknowledging the end needs Linux 6.10).
func (b *batch) bytes() []byte {
	b.flush()
	flags := binary.NativeEndian.Uint16(b.buf[b.last+6:])
	binary.NativeEndian.PutUint16(b.buf[b.last+6:], flags|unix.NLM_F_ACK)
	b.header(unix.NFNL_MSG_BATCH_END, unix.NLM_F_REQUEST, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES, "commit")
	b.endMessage()
	return b.buf
}

func (b *batch) attr(kind uint16, data []byte) {
	b.buf = binary.NativeEndian.AppendUint16(b.buf, uint16(unix.NLA_HDRLEN+len(data)))
	b.buf = binary.NativeEndian.AppendUint16(b.buf, kind)
	b.buf = append(b.buf, data...)
	b.pad()
}

func (b *batch) pad() {
	for len(b.buf)%4 != 0 {
		b.buf = append(b.buf, 0)
	}
}

func (b *batch) str(kind uint16, s string) { b.attr(kind, append([]byte(s), 0)) }
func (b *batch) u32(kind uint16, v uint32) { b.attr(kind, binary.BigEndian.AppendUint32(nil, v)) }
func (b *batch) nest(kind uint16) (start int) {
	start = len(b.buf)
	b.buf = binary.NativeEndian.AppendUint16(b.buf, 0)
	b.buf = binary.NativeEndian.AppendUint16(b.buf, kind|unix.NLA_F_NESTED)
	return start
}

func (b *batch) endNest(start int) {
	binary.NativeEndian.PutUint16(b.buf[start:], uint16(len(b.buf)-start))
}

func (b *batch) addTable(flags uint32) {
	b.change(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, "add table "+TableName)
	b.str(unix.NFTA_TABLE_NAME, TableName)
	b.u32(unix.NFTA_TABLE_FLAGS, flags)
	b.endMessage()
}

func (b *batch) deleteTable() {
	b.change(unix.NFT_MSG_DELTABLE, 0, "delete table "+TableName)
	b.str(unix.NFTA_TABLE_NAME, TableName)
	b.endMessage()
}

func (b *batch) addSet(s *setSpec, id uint32) {
	b.change(unix.NFT_MSG_NEWSET, unix.NLM_F_CREATE, "add set "+s.name)
	magic, size := s.keyType()
	b.str(unix.NFTA_SET_TABLE, TableName)
	b.str(unix.NFTA_SET_NAME, s.name)
	b.u32(unix.NFTA_SET_FLAGS, s.allFlags())
	b.u32(unix.NFTA_SET_KEY_TYPE, magic)
	b.u32(unix.NFTA_SET_KEY_LEN, size)
	if s.data != nil {
		b.u32(unix.NFTA_SET_DATA_TYPE, s.data.magic)
		b.u32(unix.NFTA_SET_DATA_LEN, s.data.size)
	}
	b.u32(unix.NFTA_SET_ID, id)
	if s.timeout != 0 {
		b.attr(unix.NFTA_SET_TIMEOUT, binary.BigEndian.AppendUint64(nil, uint64(s.timeout)*1000))
	}
	b.setDescription(s)
	b.attr(unix.NFTA_SET_USERDATA, setUserData(s))
	b.endMessage()
}

func (b *batch) setDescription(s *setSpec) {
	if s.size == 0 && s.allFlags()&setConcat == 0 {
		return
	}
	desc := b.nest(unix.NFTA_SET_DESC)
	if s.size != 0 {
		b.u32(unix.NFTA_SET_DESC_SIZE, s.size)
	}
	if s.allFlags()&setConcat != 0 {
		concat := b.nest(2) // NFTA_SET_DESC_CONCAT
		for _, t := range s.key {
			elem := b.nest(unix.NFTA_LIST_ELEM)
			b.u32(1, t.size) // NFTA_SET_FIELD_LEN
			b.endNest(elem)
		}
		b.endNest(concat)
	}
	b.endNest(desc)
}

// setUserData tells nft the byte orders, without which it prints numbers swapped.
func setUserData(s *setSpec) []byte {
	keyOrder := uint32(orderBig)
	if s.key[0].host && !s.interval() && !s.concat() {
		keyOrder = orderHost
	}
	u := appendUserData(nil, udataSetKeyOrder, host32(keyOrder))
	if s.data != nil && s.data.host {
		u = appendUserData(u, udataSetDataOrder, host32(orderHost))
	}
	if s.comment != "" {
		u = appendUserData(u, udataSetComment, append([]byte(s.comment), 0))
	}
	return u
}

func appendUserData(u []byte, kind byte, data []byte) []byte {
	return append(append(u, kind, byte(len(data))), data...)
}

func (b *batch) addChain(c chain) {
	b.change(unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE, "add chain "+c.name)
	b.str(unix.NFTA_CHAIN_TABLE, TableName)
	b.str(unix.NFTA_CHAIN_NAME, c.name)
	if c.hook != nil {
		hook := b.nest(unix.NFTA_CHAIN_HOOK)
		b.u32(unix.NFTA_HOOK_HOOKNUM, c.hook.number)
		b.u32(unix.NFTA_HOOK_PRIORITY, uint32(c.hook.priority))
		b.endNest(hook)
		b.u32(unix.NFTA_CHAIN_POLICY, nfAccept)
		b.str(unix.NFTA_CHAIN_TYPE, c.hook.kind)
	}
	b.endMessage()
}

func (b *batch) addRule(chain string, expressions []byte, comment string) {
	b.change(unix.NFT_MSG_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_APPEND, "add rule to chain "+chain)
	b.str(unix.NFTA_RULE_TABLE, TableName)
	b.str(unix.NFTA_RULE_CHAIN, chain)
	b.attr(unix.NFTA_RULE_EXPRESSIONS|unix.NLA_F_NESTED, expressions)
	if comment != "" {
		b.attr(unix.NFTA_RULE_USERDATA, appendUserData(nil, udataComment, append([]byte(comment), 0)))
	}
	b.endMessage()
}

// encode gives the rule's expressions as the kernel reads them.
func (r rule) encode(p *program) ([]byte, error) {
	ctx := &ruleContext{resolve: p.set}
	for _, s := range r.statements {
		s.exprs(ctx)
	}
	if len(ctx.unresolved) > 0 {
		return nil, fmt.Errorf("rule names sets that do not exist: %v", ctx.unresolved)
	}
	var b batch
	for _, e := range ctx.out {
		data, err := expr.Marshal(unix.NFPROTO_INET, e)
		if err != nil {
			return nil, fmt.Errorf("encode %T: %w", e, err)
		}
		b.attr(unix.NFTA_LIST_ELEM|unix.NLA_F_NESTED, data)
	}
	return b.buf, nil
}

// addProgram writes chains first, as rules and verdict maps name them, then sets, rules and fixed elements.
func (b *batch) addProgram(p *program) error {
	for i, s := range p.sets {
		b.addSet(s, uint32(i+1))
	}
	for _, c := range p.chains {
		b.addChain(c)
	}
	for _, c := range p.chains {
		for _, r := range c.rules {
			data, err := r.encode(p)
			if err != nil {
				return fmt.Errorf("chain %s: %w", c.name, err)
			}
			b.addRule(c.name, data, r.comment)
		}
	}
	for _, s := range p.sets {
		for _, e := range s.fixed {
			b.element(false, s.name, element{key: rawKey{first: e.key}, data: e.data, goes: e.goes}, e.shown)
		}
	}
	return nil
}
