package nft

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/policy"
)

// ErrNoTable says that the kernel holds no table inet nftcni in the namespace.
var ErrNoTable = errors.New("the kernel holds no table inet " + TableName + " here")

// executor sends one request and collects the answers.
type executor interface {
	Execute(netlink.Message) ([]netlink.Message, error)
	Close() error
}

// Reader looks into the table without ever writing: no lock, no owner, no table made. It
// works beside the agent and without one. It is used by one goroutine.
type Reader struct {
	conn executor
	sets map[string]bool
}

// NewReader opens the table of the caller's network namespace, or that of o.NetNS; the
// other options are ignored. It returns ErrNoTable when there is none.
func NewReader(ctx context.Context, o Options) (*Reader, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: o.NetNS})
	if err != nil {
		return nil, fmt.Errorf("dial nfnetlink: %w", err)
	}
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(deadline); err != nil {
			return nil, errors.Join(fmt.Errorf("set deadline: %w", err), conn.Close())
		}
	}
	r := &Reader{conn: conn}
	if r.sets, err = r.setNames(); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return r, nil
}

// Close ends the reader.
func (r *Reader) Close() error { return r.conn.Close() }

// Decide evaluates f by reading single elements, in the order in which the ruleset looks
// them up. Its Lookups say which elements were found.
func (r *Reader) Decide(ctx context.Context, f policy.Flow) (policy.TableVerdict, error) {
	var failed error
	v := policy.DecideWith(func(k policy.Key) (uint32, bool) {
		value, found, err := r.Lookup(ctx, k)
		if failed == nil {
			failed = err
		}
		return value, found
	}, f)
	return v, failed
}

// Lookup reads one element. For NetID the range that holds k.Addr is meant, for
// AccessRange the one that holds k.First. The value of a set's member is 0.
func (r *Reader) Lookup(ctx context.Context, k policy.Key) (value uint32, found bool, err error) {
	name := ElementSet(k)
	if err := ctx.Err(); err != nil {
		return 0, false, err
	}
	if !r.sets[name] {
		return 0, false, fmt.Errorf("table inet %s has no set %s: it is not this version's", TableName, name)
	}
	msg, err := setElementRequest(name, encodeKey(k).first)
	if err != nil {
		return 0, false, fmt.Errorf("encode element of %s: %w", name, err)
	}
	replies, err := r.conn.Execute(msg)
	if errors.Is(err, unix.ENOENT) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, fmt.Errorf("read element of %s: %w", name, err)
	}
	return lookupReply(replies)
}

func setElementRequest(set string, key []byte) (netlink.Message, error) {
	e := netlink.NewAttributeEncoder()
	e.String(unix.NFTA_SET_ELEM_LIST_TABLE, TableName)
	e.String(unix.NFTA_SET_ELEM_LIST_SET, set)
	e.Nested(unix.NFTA_SET_ELEM_LIST_ELEMENTS, func(e *netlink.AttributeEncoder) error {
		e.Nested(unix.NFTA_LIST_ELEM, func(e *netlink.AttributeEncoder) error {
			e.Nested(unix.NFTA_SET_ELEM_KEY, func(e *netlink.AttributeEncoder) error {
				e.Bytes(unix.NFTA_DATA_VALUE, key)
				return nil
			})
			return nil
		})
		return nil
	})
	return nfnetlinkRequest(unix.NFT_MSG_GETSETELEM, 0, e)
}

// nfnetlinkRequest is a request about the family inet.
func nfnetlinkRequest(kind netlink.HeaderType, flags netlink.HeaderFlags, e *netlink.AttributeEncoder) (netlink.Message, error) {
	attrs, err := e.Encode()
	if err != nil {
		return netlink.Message{}, err
	}
	return netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | kind, Flags: netlink.Request | flags},
		Data:   append([]byte{unix.NFPROTO_INET, unix.NFNETLINK_V0, 0, 0}, attrs...),
	}, nil
}

func lookupReply(replies []netlink.Message) (value uint32, found bool, err error) {
	for _, m := range replies {
		elements, err := decodeElements(m)
		if err != nil {
			return 0, false, err
		}
		for _, e := range elements {
			if len(e.data) >= 4 {
				value = binary.NativeEndian.Uint32(e.data)
			}
			found = true
		}
	}
	return value, found, nil
}

// setNames lists the sets and maps of the table.
func (r *Reader) setNames() (map[string]bool, error) {
	e := netlink.NewAttributeEncoder()
	e.String(unix.NFTA_SET_TABLE, TableName)
	msg, err := nfnetlinkRequest(unix.NFT_MSG_GETSET, netlink.Dump, e)
	if err != nil {
		return nil, fmt.Errorf("encode: %w", err)
	}
	replies, err := r.conn.Execute(msg)
	if errors.Is(err, unix.EPERM) {
		return nil, fmt.Errorf("list sets: run as root (CAP_NET_ADMIN in this network namespace): %w", err)
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("list sets: %w", err)
	}
	names := map[string]bool{}
	for _, m := range replies {
		name, err := setName(m)
		if err != nil {
			return nil, err
		}
		if name != "" {
			names[name] = true
		}
	}
	if len(names) == 0 {
		return nil, ErrNoTable
	}
	return names, nil
}

// setName is the name in a NFT_MSG_NEWSET of our table. Kernels ignore the request's
// table name in dumps of some versions, so it is compared here.
func setName(m netlink.Message) (string, error) {
	if len(m.Data) < 4 || m.Data[0] != unix.NFPROTO_INET {
		return "", nil
	}
	d, err := netlink.NewAttributeDecoder(m.Data[4:])
	if err != nil {
		return "", fmt.Errorf("decode set: %w", err)
	}
	var table, name string
	for d.Next() {
		switch d.Type() {
		case unix.NFTA_SET_TABLE:
			table = d.String()
		case unix.NFTA_SET_NAME:
			name = d.String()
		}
	}
	if err := d.Err(); err != nil {
		return "", fmt.Errorf("decode set: %w", err)
	}
	if table != TableName {
		return "", nil
	}
	return name, nil
}

// maxDumps bounds how often a set is read until two readings agree.
const maxDumps = 10

// dump reads every element of a set, each once; a set that does not exist has none. While the kernel moves a
// hash table into one of another size, a dump of several messages leaves elements out and repeats others, and
// no flag tells: each message counts its way past those that are sent (iter->skip in nft_rhash_walk, Linux 6.1
// to 7.2) through a table whose order has changed since. So a dump that needs several counts once the next
// one finds the same elements.
func (r *Reader) dump(set string) ([]rawElement, error) {
	var before map[string]bool
	for range maxDumps {
		elements, messages, err := r.dumpOnce(set)
		if err != nil {
			return nil, err
		}
		elements, keys := distinct(elements)
		if messages <= 1 || before != nil && maps.Equal(keys, before) {
			return elements, nil
		}
		before = keys
	}
	return nil, fmt.Errorf("dump %s: no two of %d readings held the same elements: it changes faster than it is read", set, maxDumps)
}

// distinct leaves the first of each element, and names them.
func distinct(elements []rawElement) ([]rawElement, map[string]bool) {
	keys := make(map[string]bool, len(elements))
	return slices.DeleteFunc(elements, func(e rawElement) bool {
		k := string(e.key) + string(e.keyEnd) + string(byte(e.flags&unix.NFT_SET_ELEM_INTERVAL_END))
		if keys[k] {
			return true
		}
		keys[k] = true
		return false
	}), keys
}

// dumpOnce reads a set in one go, and says in how many messages it came.
func (r *Reader) dumpOnce(set string) (elements []rawElement, messages int, err error) {
	if !r.sets[set] {
		return nil, 0, nil
	}
	e := netlink.NewAttributeEncoder()
	e.String(unix.NFTA_SET_ELEM_LIST_TABLE, TableName)
	e.String(unix.NFTA_SET_ELEM_LIST_SET, set)
	msg, err := nfnetlinkRequest(unix.NFT_MSG_GETSETELEM, netlink.Dump, e)
	if err != nil {
		return nil, 0, fmt.Errorf("encode: %w", err)
	}
	replies, err := r.conn.Execute(msg)
	if err != nil {
		return nil, 0, fmt.Errorf("dump %s: %w", set, err)
	}
	for _, m := range replies {
		more, err := decodeElements(m)
		if err != nil {
			return nil, 0, fmt.Errorf("set %s: %w", set, err)
		}
		elements = append(elements, more...)
	}
	return elements, len(replies), nil
}
