package nft

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/policy"
)

// Table flags (linux/netfilter/nf_tables.h, NFT_TABLE_F_*). Never the first without the second: the table would die
// with the agent. Together they exist from Linux 6.9.
const (
	tableOwner   = 2
	tablePersist = 4
)

const noOwnerFlag = "this kernel has no table flags owner,persist (Linux 6.9): a foreign flush of the ruleset is repaired, not prevented"

// nftaTableOwner is NFTA_TABLE_OWNER, the port of the owning socket.
const nftaTableOwner = 7

type tableInfo struct {
	exists       bool
	flags, owner uint32
}

// ownerFlags reports whether flags that are wanted are missing.
func ownerFlags(want, have uint32) bool { return want&^have != 0 }

func (t *Table) readTable() (tableInfo, error) {
	e := netlink.NewAttributeEncoder()
	e.String(unix.NFTA_TABLE_NAME, TableName)
	m, err := nfnetlinkRequest(unix.NFT_MSG_GETTABLE, 0, e)
	if err != nil {
		return tableInfo{}, fmt.Errorf("encode: %w", err)
	}
	replies, err := t.conn.Execute(m)
	if errors.Is(err, unix.ENOENT) {
		return tableInfo{}, nil
	}
	if errors.Is(err, unix.EPERM) {
		return tableInfo{}, fmt.Errorf("read table: run as root (CAP_NET_ADMIN in this network namespace): %w", err)
	}
	if err != nil {
		return tableInfo{}, fmt.Errorf("read table: %w", err)
	}
	info := tableInfo{exists: true}
	for _, r := range replies {
		attrs, err := attributes(r)
		if err != nil {
			return info, err
		}
		info.flags = beUint32(attrs[unix.NFTA_TABLE_FLAGS])
		info.owner = beUint32(attrs[nftaTableOwner])
	}
	return info, nil
}

// attributes decodes the top level of a nfnetlink message.
func attributes(m netlink.Message) (map[uint16][]byte, error) {
	if len(m.Data) < 4 {
		return nil, errors.New("message of nf_tables is cut short")
	}
	return attributeMap(m.Data[4:])
}

func attributeMap(data []byte) (map[uint16][]byte, error) {
	d, err := netlink.NewAttributeDecoder(data)
	if err != nil {
		return nil, fmt.Errorf("decode attributes: %w", err)
	}
	out := map[uint16][]byte{}
	for d.Next() {
		out[d.Type()] = d.Bytes()
	}
	if err := d.Err(); err != nil {
		return nil, fmt.Errorf("decode attributes: %w", err)
	}
	return out, nil
}

func beUint32(b []byte) uint32 {
	if len(b) != 4 {
		return 0
	}
	return binary.BigEndian.Uint32(b)
}

func cString(b []byte) string { return string(bytes.TrimRight(b, "\x00")) }

// create writes program and state into a namespace that has no table.
func (t *Table) create(p *program, s State) error {
	return t.write(p, s, tableInfo{})
}

// replace does the same where there is one, in one transaction: no packet meets a node without rules.
func (t *Table) replace(p *program, s State, found tableInfo) error {
	if found.flags&tableOwner != 0 && found.owner == 0 {
		b := newBatch(t.conn.seq)
		b.addTable(found.flags)
		if err := t.conn.commit(b); err != nil {
			return fmt.Errorf("claim: %w", err)
		}
	}
	return t.write(p, s, found)
}

func (t *Table) write(p *program, s State, found tableInfo) error {
	if s.Epoch == 0 {
		t.again = false // nothing is live
		var err error
		if s.Epoch, err = firstEpoch(); err != nil {
			return err
		}
	}
	err := t.writeOnce(p, s, found)
	if t.flags != 0 && (errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL)) {
		t.log.Info(noOwnerFlag, "err", err)
		t.flags = 0
		err = t.writeOnce(p, s, found)
	}
	if err != nil {
		return err
	}
	t.remember(s)
	t.epoch = s.Epoch
	t.reader.sets = map[string]bool{}
	for _, set := range p.sets {
		t.reader.sets[set.name] = true
	}
	return nil
}

func (t *Table) writeOnce(p *program, s State, found tableInfo) error {
	b := newBatch(t.conn.seq)
	if found.exists {
		b.deleteTable()
	}
	b.addTable(t.flags)
	if err := b.addProgram(p); err != nil {
		return err
	}
	keys := make([]policy.Key, 0, len(s.Tables))
	for k := range s.Tables {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(x, y policy.Key) int { return bytes.Compare([]byte(ElementSet(x)), []byte(ElementSet(y))) })
	for _, k := range keys {
		b.op(policy.Op{Element: policy.Element{Key: k, Value: s.Tables[k]}})
	}
	for _, bind := range s.Bindings {
		b.bind(bind)
	}
	for _, n := range s.PodNetworks {
		b.network(false, n)
	}
	for k := range s.Tunnels.keys() {
		b.tunnel(false, k)
	}
	b.mapPorts(s.HostPorts, nil)
	plan := planPodToHost(PodToHost{}, &s.PodToHost)
	b.podPorts(plan.before)
	b.podToHost(plan)
	b.addEpoch(s.Epoch, t.again)
	return t.conn.commit(b)
}

// addEpoch makes e the live epoch of a table that has none.
func (b *batch) addEpoch(e uint32, again bool) {
	comment := ""
	if again {
		comment = epochAgain
	}
	b.element(false, "epoch", element{key: rawKey{first: host32(e)}, comment: comment}, fmt.Sprintf("%#x", e))
	for _, nfproto := range []byte{unix.NFPROTO_IPV4, unix.NFPROTO_IPV6} {
		b.element(false, "stamp", element{key: rawKey{first: []byte{nfproto}}, data: host32(e)}, fmt.Sprintf("%#x", e))
	}
}

// removeEpoch is the inverse.
func (b *batch) removeEpoch(e uint32) {
	b.element(true, "epoch", element{key: rawKey{first: host32(e)}}, fmt.Sprintf("%#x", e))
	for _, nfproto := range []byte{unix.NFPROTO_IPV4, unix.NFPROTO_IPV6} {
		b.element(true, "stamp", element{key: rawKey{first: []byte{nfproto}}}, fmt.Sprintf("%#x", e))
	}
}
