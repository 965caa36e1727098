package ipam

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"time"

	bolt "go.etcd.io/bbolt"
)

// The buckets of the file. An address is a key of 4 or 16 bytes.
const (
	bucketLeases   = "leases"   // address -> Lease as JSON
	bucketOwners   = "owners"   // Owner.key -> its addresses, each with a length byte
	bucketReleased = "released" // address -> 8 bytes of time (UnixNano)
	bucketOrder    = "order"    // 8 bytes of time, address -> nothing; its sequence counts
	bucketCursors  = "cursors"  // Range.String -> highest address ever tried
)

// tables is the file inside one transaction.
type tables struct {
	leases, owners, released, order, cursorSet *bolt.Bucket
}

func (t *tables) buckets() map[string]**bolt.Bucket {
	return map[string]**bolt.Bucket{bucketLeases: &t.leases, bucketOwners: &t.owners,
		bucketReleased: &t.released, bucketOrder: &t.order, bucketCursors: &t.cursorSet}
}

func makeTables(tx *bolt.Tx) (*tables, error) {
	t := new(tables)
	for name, into := range t.buckets() {
		b, err := tx.CreateBucketIfNotExists([]byte(name))
		if err != nil {
			return nil, fmt.Errorf("bucket %s: %w", name, err)
		}
		*into = b
	}
	return t, nil
}

// readTables is makeTables for a transaction that may not write. A file of which no
// transaction was ever finished has no tables: then it returns nil.
func readTables(tx *bolt.Tx) (*tables, error) {
	t, missing := new(tables), 0
	for name, into := range t.buckets() {
		if *into = tx.Bucket([]byte(name)); *into == nil {
			missing++
		}
	}
	switch missing {
	case 0:
		return t, nil
	case len(t.buckets()):
		return nil, nil
	default:
		return nil, fmt.Errorf("%d tables are missing", missing)
	}
}

// check reads everything once: it is what a database without fsync owes after a boot.
func (t *tables) check() error {
	count := 0
	err := t.leases.ForEach(func(k, v []byte) error {
		var l Lease
		if err := json.Unmarshal(v, &l); err != nil {
			return fmt.Errorf("lease %x: %w", k, err)
		}
		if !bytes.Equal(k, l.Address.AsSlice()) || !bytes.Contains(t.owners.Get(l.Owner.key()), addrField(l.Address)) {
			return fmt.Errorf("lease %x: is not the one of its key or its owner", k)
		}
		count++
		return nil
	})
	if err != nil {
		return err
	}
	err = t.owners.ForEach(func(k, v []byte) error {
		addrs, err := splitAddrs(v)
		if err != nil {
			return fmt.Errorf("owner %q: %w", k, err)
		}
		count -= len(addrs)
		return nil
	})
	if err == nil && count != 0 {
		err = errors.New("leases and owners differ in number")
	}
	return errors.Join(err, t.checkReleased())
}

func (t *tables) checkReleased() error {
	n := uint64(0)
	err := t.order.ForEach(func(k, _ []byte) error {
		n++
		if len(k) != 12 && len(k) != 24 {
			return fmt.Errorf("released %x: wrong length", k)
		}
		if !bytes.Equal(t.released.Get(k[8:]), k[:8]) || t.leases.Get(k[8:]) != nil {
			return fmt.Errorf("released %x: is leased, or stands under another time", k)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if n != t.order.Sequence() {
		return fmt.Errorf("released: %d entries, counted %d", n, t.order.Sequence())
	}
	return nil
}

func (t *tables) lease(a netip.Addr) (Lease, bool, error) {
	v := t.leases.Get(a.AsSlice())
	if v == nil {
		return Lease{}, false, nil
	}
	var l Lease
	if err := json.Unmarshal(v, &l); err != nil {
		return Lease{}, false, &corruptError{cause: fmt.Errorf("lease %s: %w", a, err)}
	}
	return l, true, nil
}

func (t *tables) isLeased(a netip.Addr) bool { return t.leases.Get(a.AsSlice()) != nil }

func (t *tables) isReleased(a netip.Addr) bool { return t.released.Get(a.AsSlice()) != nil }

// of returns the leases of an owner, in the order they were taken.
func (t *tables) of(o Owner) ([]Lease, error) {
	addrs, err := splitAddrs(t.owners.Get(o.key()))
	if err != nil {
		return nil, &corruptError{cause: err}
	}
	var list []Lease
	for _, a := range addrs {
		l, ok, err := t.lease(a)
		if err != nil {
			return nil, err
		}
		if !ok {
			return nil, &corruptError{cause: fmt.Errorf("owner %s: lease %s is missing", o, a)}
		}
		list = append(list, l)
	}
	return list, nil
}

func (t *tables) all() ([]Lease, error) {
	var list []Lease
	err := t.leases.ForEach(func(k, v []byte) error {
		var l Lease
		if err := json.Unmarshal(v, &l); err != nil {
			return &corruptError{cause: fmt.Errorf("lease %x: %w", k, err)}
		}
		list = append(list, l)
		return nil
	})
	return list, err
}

// put records a lease. The address must not be leased.
func (t *tables) put(l Lease) error {
	if t.isLeased(l.Address) {
		return fmt.Errorf("lease %s: is leased already", l.Address)
	}
	v, err := json.Marshal(l)
	if err != nil {
		return fmt.Errorf("lease %s: %w", l.Address, err)
	}
	if err := t.forget(l.Address); err != nil {
		return err
	}
	owned := append(bytes.Clone(t.owners.Get(l.Owner.key())), addrField(l.Address)...)
	return errors.Join(t.leases.Put(l.Address.AsSlice(), v), t.owners.Put(l.Owner.key(), owned))
}

// drop ends the leases of one owner and remembers when.
func (t *tables) drop(o Owner, now time.Time) ([]Lease, error) {
	list, err := t.of(o)
	if err != nil || len(list) == 0 {
		return nil, err
	}
	for _, l := range list {
		if err := errors.Join(t.leases.Delete(l.Address.AsSlice()), t.rest(l.Address, now)); err != nil {
			return nil, err
		}
	}
	return list, t.owners.Delete(o.key())
}

// rest puts an address behind all other released ones.
func (t *tables) rest(a netip.Addr, now time.Time) error {
	if err := t.forget(a); err != nil {
		return err
	}
	stamp := binary.BigEndian.AppendUint64(nil, uint64(now.UnixNano()))
	if err := errors.Join(t.released.Put(a.AsSlice(), stamp), t.order.Put(append(stamp, a.AsSlice()...), nil),
		t.order.SetSequence(t.order.Sequence()+1)); err != nil {
		return err
	}
	return t.trim(now)
}

// forget takes an address out of the released ones.
func (t *tables) forget(a netip.Addr) error {
	stamp := t.released.Get(a.AsSlice())
	if stamp == nil {
		return nil
	}
	key := append(bytes.Clone(stamp), a.AsSlice()...)
	return errors.Join(t.released.Delete(a.AsSlice()), t.order.Delete(key), t.order.SetSequence(t.order.Sequence()-1))
}

func (t *tables) trim(now time.Time) error {
	for t.order.Sequence() > keepReleased {
		k, _ := t.order.Cursor().First()
		if k == nil || now.Sub(stampOf(k)) < CoolDown {
			return nil
		}
		a, _ := netip.AddrFromSlice(bytes.Clone(k[8:]))
		if err := t.forget(a); err != nil {
			return err
		}
	}
	return nil
}

func stampOf(k []byte) time.Time { return time.Unix(0, int64(binary.BigEndian.Uint64(k))) }

func addrField(a netip.Addr) []byte {
	b := a.AsSlice()
	return append([]byte{byte(len(b))}, b...)
}

func splitAddrs(b []byte) ([]netip.Addr, error) {
	var list []netip.Addr
	for len(b) > 0 {
		n := int(b[0])
		if n != 4 && n != 16 || len(b) < 1+n {
			return nil, fmt.Errorf("address list %x is cut", b)
		}
		a, _ := netip.AddrFromSlice(bytes.Clone(b[1 : 1+n]))
		list, b = append(list, a), b[1+n:]
	}
	return list, nil
}
