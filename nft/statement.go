package nft

import (
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// A statement is one part of a rule. It prints itself as nft text and as expressions of the kernel, so that
// what people read and what packets meet cannot drift apart (TestKernelTextAndBytes compares nft's listings).
type statement interface {
	text() string
	exprs(r *ruleContext)
}

// ruleContext collects the expressions of one rule. Like nft it emits the hidden protocol checks that payload
// fields need only once a rule.
type ruleContext struct {
	out        []expr.Any
	l3, l4     byte
	resolve    func(set string) *setSpec
	unresolved []string
}

func (r *ruleContext) add(e ...expr.Any) { r.out = append(r.out, e...) }

// need emits the checks that a field of the given protocols depends on.
func (r *ruleContext) need(l3, l4 byte) {
	if l3 != 0 && r.l3 != l3 {
		r.l3 = l3
		r.add(&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{l3}})
	}
	if l4 != 0 && r.l4 != l4 {
		r.l4 = l4
		r.add(&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{l4}})
	}
}

func (r *ruleContext) set(name string) *setSpec {
	s := r.resolve(name)
	if s == nil {
		r.unresolved = append(r.unresolved, name)
		return &setSpec{}
	}
	return s
}

// A field is something that can be loaded into registers.
type field struct {
	name   string
	size   int  // bytes
	host   bool // byte order of the running machine: nft converts it where a set has intervals
	l3, l4 byte // protocols the field exists in, 0: any
	load   func(reg uint32) expr.Any
}

// A key is a concatenation of fields.
type key []field

func (k key) String() string {
	names := make([]string, len(k))
	for i, f := range k {
		names[i] = f.name
	}
	return strings.Join(names, " . ")
}

// load loads the fields into consecutive registers from 1, each padded to 4 bytes.
func (k key) load(r *ruleContext, interval bool) {
	for _, f := range k {
		r.need(f.l3, f.l4)
	}
	word := 0
	for _, f := range k {
		reg := uint32(unix.NFT_REG32_00 + word)
		if word%4 == 0 {
			reg = uint32(unix.NFT_REG_1 + word/4)
		}
		r.add(f.load(reg))
		if interval && f.host && len(k) > 1 {
			size := uint32(max(f.size, 2))
			r.add(&expr.Byteorder{SourceRegister: reg, DestRegister: reg, Op: expr.ByteorderHton, Len: uint32(f.size), Size: size})
		}
		word += (f.size + 3) / 4
	}
}

// compare matches a field against a constant, optionally under a mask.
type compare struct {
	field field
	not   bool
	value []byte
	mask  []byte
	shown string // the constant in nft's words
}

func (c compare) text() string {
	op := " "
	if c.not {
		op = " != "
	}
	return c.field.name + op + c.shown
}

func (c compare) exprs(r *ruleContext) {
	r.need(c.field.l3, c.field.l4)
	r.add(c.field.load(1))
	op := expr.CmpOpEq
	if c.not {
		op = expr.CmpOpNeq
	}
	if c.mask != nil {
		r.add(&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: uint32(len(c.mask)), Mask: c.mask, Xor: make([]byte, len(c.mask))})
	}
	r.add(&expr.Cmp{Op: op, Register: 1, Data: c.value})
	if c.field.name == metaL4Proto.name {
		r.l4 = c.value[0]
	}
}

// ctBits matches a connection whose state or status has one of the bits of the mask.
type ctBits struct {
	name  string
	key   expr.CtKey
	mask  uint32
	shown string
}

func ctState(mask uint32, shown string) ctBits {
	return ctBits{"ct state", expr.CtKeySTATE, mask, shown}
}

func (c ctBits) text() string { return c.name + " " + c.shown }

func (c ctBits) exprs(r *ruleContext) {
	r.add(&expr.Ct{Key: c.key, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: host32(c.mask), Xor: host32(0)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: host32(0)})
}

// in matches a key that is, or with not is not, a member of a set.
type in struct {
	key key
	not bool
	set string
}

func (m in) text() string {
	if m.not {
		return m.key.String() + " != @" + m.set
	}
	return m.key.String() + " @" + m.set
}

func (m in) exprs(r *ruleContext) {
	m.key.load(r, r.set(m.set).interval())
	r.add(&expr.Lookup{SourceRegister: 1, SetName: m.set, Invert: m.not})
}

// A target is a scratch register of the packet or its connection.
type target struct {
	name  string
	store expr.Any
}

// assign stores what the key finds in the map, or, without a map, the field itself. A key that is not in
// the map ends the rule.
type assign struct {
	to  target
	key key
	by  string
}

func (a assign) text() string {
	if a.by == "" {
		return a.to.name + " set " + a.key.String()
	}
	return a.to.name + " set " + a.key.String() + " map @" + a.by
}

func (a assign) exprs(r *ruleContext) {
	if a.by == "" {
		a.key.load(r, false)
	} else {
		a.key.load(r, r.set(a.by).interval())
		r.add(&expr.Lookup{SourceRegister: 1, SetName: a.by, DestRegister: 1, IsDestRegSet: true})
	}
	r.add(a.to.store)
}

// constant stores a number.
type constant struct {
	to    target
	value uint32
	shown string
}

func (c constant) text() string { return c.to.name + " set " + c.shown }

func (c constant) exprs(r *ruleContext) {
	r.add(&expr.Immediate{Register: 1, Data: host32(c.value)}, c.to.store)
}

// dispatch ends the rule with the verdict that the verdict map has for the key.
type dispatch struct {
	key key
	by  string
}

func (d dispatch) text() string { return d.key.String() + " vmap @" + d.by }

func (d dispatch) exprs(r *ruleContext) {
	d.key.load(r, false)
	r.add(&expr.Lookup{SourceRegister: 1, SetName: d.by, DestRegister: unix.NFT_REG_VERDICT, IsDestRegSet: true})
}

// update adds the key to a dynamic set, or refreshes it, with a stateful statement of its own. A full set
// ends the rule.
type update struct {
	set   string
	key   key
	state statement
}

func (u update) text() string {
	return "update @" + u.set + " { " + u.key.String() + " " + u.state.text() + " }"
}

func (u update) exprs(r *ruleContext) {
	u.key.load(r, false)
	inner := &ruleContext{resolve: r.resolve}
	u.state.exprs(inner)
	r.add(&expr.Dynset{SrcRegKey: 1, SetName: u.set, Operation: unix.NFT_DYNSET_OP_UPDATE, Exprs: inner.out})
}

// limit passes at most rate packets a second.
type limit struct {
	rate  uint64
	burst uint32
}

func (l limit) text() string {
	return fmt.Sprintf("limit rate %d/second burst %d packets", l.rate, l.burst)
}

func (l limit) exprs(r *ruleContext) {
	r.add(&expr.Limit{Type: expr.LimitTypePkts, Rate: l.rate, Unit: expr.LimitTimeSecond, Burst: l.burst})
}

// logTo hands the packet's headers to an nflog group. The message carries meta mark: the profile.
type logTo struct {
	group   uint16
	prefix  string
	snaplen uint32
}

func (l logTo) text() string {
	if l.prefix == "" {
		return fmt.Sprintf("log group %d snaplen %d", l.group, l.snaplen)
	}
	return fmt.Sprintf("log prefix %q group %d snaplen %d", l.prefix, l.group, l.snaplen)
}

func (l logTo) exprs(r *ruleContext) {
	e := &expr.Log{Key: 1<<unix.NFTA_LOG_GROUP | 1<<unix.NFTA_LOG_SNAPLEN, Group: l.group, Snaplen: l.snaplen}
	if l.prefix != "" {
		e.Key |= 1 << unix.NFTA_LOG_PREFIX
		e.Data = []byte(l.prefix)
	}
	r.add(e)
}

// counter counts packets and bytes. It prints without figures, as in a program that was never loaded.
type counter struct{}

func (counter) text() string         { return "counter" }
func (counter) exprs(r *ruleContext) { r.add(&expr.Counter{}) }

// verdict ends the rule.
type verdict struct {
	kind  expr.VerdictKind
	chain string
}

func (v verdict) text() string {
	switch v.kind {
	case expr.VerdictGoto:
		return "goto " + v.chain
	case expr.VerdictJump:
		return "jump " + v.chain
	case expr.VerdictReturn:
		return "return"
	case expr.VerdictDrop:
		return "drop"
	}
	return "accept"
}

func (v verdict) exprs(r *ruleContext) { r.add(&expr.Verdict{Kind: v.kind, Chain: v.chain}) }

// masquerade gives the packet's connection the address of the interface it leaves by, and a random port.
type masquerade struct{}

func (masquerade) text() string         { return "masquerade fully-random" }
func (masquerade) exprs(r *ruleContext) { r.add(&expr.Masq{FullyRandom: true}) }

func host32(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }
