package nft

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Differs names the first difference between the declarations, chains, rules and constant sets of
// the table and those that this version writes, "" for none: somebody changed them, or another version did. What the
// elements of pods and policies are is no part of it. Rules are counted from 0.
func (r *Reader) Differs(ctx context.Context) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	return r.programDiffers(newProgram())
}

// programDiffers compares the table's chains, rules and sets with p and names the first difference, "" for none.
// Rules are compared expression by expression: the kernel reports what it was sent, plus fields that are zero.
func (r *Reader) programDiffers(p *program) (string, error) {
	sets, err := r.dumpTable(unix.NFT_MSG_GETSET, unix.NFTA_SET_TABLE)
	if err != nil {
		return "", fmt.Errorf("list sets: %w", err)
	}
	if d := setsDiffer(p, sets); d != "" {
		return d, nil
	}
	chains, err := r.dumpTable(unix.NFT_MSG_GETCHAIN, unix.NFTA_CHAIN_TABLE)
	if err != nil {
		return "", fmt.Errorf("list chains: %w", err)
	}
	if d, err := chainsDiffer(p, chains); d != "" || err != nil {
		return d, err
	}
	rules, err := r.dumpTable(unix.NFT_MSG_GETRULE, unix.NFTA_RULE_TABLE)
	if err != nil {
		return "", fmt.Errorf("list rules: %w", err)
	}
	if d, err := rulesDiffer(p, rules); d != "" || err != nil {
		return d, err
	}
	for _, s := range p.sets {
		if len(s.fixed) == 0 {
			continue
		}
		elements, err := r.dump(s.name)
		if err != nil {
			return "", err
		}
		if !sameFixed(s, elements) {
			return "elements of " + s.name, nil
		}
	}
	return "", nil
}

// dumpTable lists objects of one kind. Kernels differ in whether they filter by table: this does.
func (r *Reader) dumpTable(kind netlink.HeaderType, tableAttr uint16) ([]map[uint16][]byte, error) {
	e := netlink.NewAttributeEncoder()
	e.String(tableAttr, TableName)
	m, err := nfnetlinkRequest(kind, netlink.Dump, e)
	if err != nil {
		return nil, fmt.Errorf("encode: %w", err)
	}
	replies, err := r.conn.Execute(m)
	if err != nil {
		return nil, err
	}
	var out []map[uint16][]byte
	for _, reply := range replies {
		attrs, err := attributes(reply)
		if err != nil {
			return nil, err
		}
		if reply.Data[0] == unix.NFPROTO_INET && cString(attrs[tableAttr]) == TableName {
			out = append(out, attrs)
		}
	}
	return out, nil
}

func setsDiffer(p *program, got []map[uint16][]byte) string {
	if len(got) != len(p.sets) {
		return fmt.Sprintf("%d sets, want %d", len(got), len(p.sets))
	}
	for _, attrs := range got {
		name := cString(attrs[unix.NFTA_SET_NAME])
		s := p.set(name)
		if s == nil {
			return "set " + name
		}
		magic, size := s.keyType()
		desc, err := attributeMap(attrs[unix.NFTA_SET_DESC])
		if err != nil {
			return "declaration of set " + name
		}
		want := [6]uint32{s.allFlags(), magic, size, 0, 0, s.size}
		have := [6]uint32{beUint32(attrs[unix.NFTA_SET_FLAGS]), beUint32(attrs[unix.NFTA_SET_KEY_TYPE]), beUint32(attrs[unix.NFTA_SET_KEY_LEN]),
			5: beUint32(desc[unix.NFTA_SET_DESC_SIZE])}
		if s.data != nil {
			want[3], want[4] = s.data.magic, s.data.size
			have[3], have[4] = beUint32(attrs[unix.NFTA_SET_DATA_TYPE]), beUint32(attrs[unix.NFTA_SET_DATA_LEN])
		}
		if want != have || !slices.Equal(attrs[unix.NFTA_SET_USERDATA], setUserData(s)) {
			return "declaration of set " + name
		}
	}
	return ""
}

func chainsDiffer(p *program, got []map[uint16][]byte) (string, error) {
	if len(got) != len(p.chains) {
		return fmt.Sprintf("%d chains, want %d", len(got), len(p.chains)), nil
	}
	for _, attrs := range got {
		name := cString(attrs[unix.NFTA_CHAIN_NAME])
		i := slices.IndexFunc(p.chains, func(c chain) bool { return c.name == name })
		if i < 0 {
			return "chain " + name, nil
		}
		var have hook
		if h, ok := attrs[unix.NFTA_CHAIN_HOOK]; ok {
			in, err := attributeMap(h)
			if err != nil {
				return "", err
			}
			have = hook{kind: cString(attrs[unix.NFTA_CHAIN_TYPE]), number: beUint32(in[unix.NFTA_HOOK_HOOKNUM]), priority: int32(beUint32(in[unix.NFTA_HOOK_PRIORITY]))}
			if beUint32(attrs[unix.NFTA_CHAIN_POLICY]) != nfAccept {
				return "policy of chain " + name, nil
			}
		}
		var want hook
		if h := p.chains[i].hook; h != nil {
			want = hook{kind: h.kind, number: h.number, priority: h.priority}
		}
		if want != have {
			return "hook of chain " + name, nil
		}
	}
	return "", nil
}

func rulesDiffer(p *program, got []map[uint16][]byte) (string, error) {
	byChain := map[string][][]byte{}
	for _, attrs := range got {
		name := cString(attrs[unix.NFTA_RULE_CHAIN])
		byChain[name] = append(byChain[name], attrs[unix.NFTA_RULE_EXPRESSIONS])
	}
	for _, c := range p.chains {
		have := byChain[c.name]
		if len(have) != len(c.rules) {
			return fmt.Sprintf("chain %s has %d rules, want %d", c.name, len(have), len(c.rules)), nil
		}
		for i, r := range c.rules {
			want, err := r.encode(p)
			if err != nil {
				return "", err
			}
			if !sameExpressions(want, have[i]) {
				return fmt.Sprintf("rule %d of chain %s", i, c.name), nil
			}
		}
	}
	return "", nil
}

// sameFixed compares the elements of a constant set, verdicts included.
func sameFixed(s *setSpec, elements []rawElement) bool {
	if len(elements) != len(s.fixed) {
		return false
	}
	for _, f := range s.fixed {
		i := slices.IndexFunc(elements, func(e rawElement) bool { return bytes.Equal(e.key, f.key) })
		if i < 0 {
			return false
		}
		if f.goes != nil && (int32(f.goes.kind) != elements[i].verdict || f.goes.chain != elements[i].chain) {
			return false
		}
	}
	return true
}

// bindingsDiffer looks for what only somebody else's edit leaves behind: an address that is bound but not local or
// not wired, or wired without being bound, or a stamp that is not the epoch.
func (t *Table) bindingsDiffer() (string, error) {
	for _, f := range families() {
		keys := map[string]map[string]bool{}
		for _, set := range []string{"bound", "wired", "local", "self", "masquerade"} {
			elements, err := t.reader.dump(set + f.suffix)
			if err != nil {
				return "", err
			}
			keys[set] = map[string]bool{}
			for _, e := range elements {
				keys[set][string(e.key[max(0, len(e.key)-int(f.addr.size)):])] = true
			}
		}
		if !maps.Equal(keys["local"], keys["self"]) {
			return "local" + f.suffix + " and self" + f.suffix + " hold different addresses", nil
		}
		if !maps.Equal(keys["bound"], keys["wired"]) {
			return "wired" + f.suffix + " is not what is bound", nil
		}
		for k := range keys["bound"] {
			if !keys["local"][k] {
				return "bound" + f.suffix + " has an address that is not local", nil
			}
		}
		for k := range keys["masquerade"] {
			if !keys["bound"][k] {
				return "masquerade" + f.suffix + " has an address that is not bound", nil
			}
		}
	}
	return t.hostPortsDiffer()
}
