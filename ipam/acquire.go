package ipam

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// scanLimit bounds the addresses of one range looked at before it counts as full.
const scanLimit = 1 << 20

// Request asks for one address of every pool.
type Request struct {
	Owner
	Pod     string // namespace/name, for people
	NetNS   string
	Payload json.RawMessage
	Pools   []Pool
	// Excludes are never leased.
	Excludes []netip.Prefix
	// Reserved are leased only when asked for in Wanted.
	Reserved []netip.Addr
	// Wanted are addresses to lease instead of the next free one of their pool (the CNI
	// capability "ips"). One that no pool contains is an error.
	Wanted []netip.Addr
	// InUse asks the kernel whether somebody uses an address that has no lease; nil: nobody does.
	InUse func(netip.Addr) bool
}

// Acquire leases one address of every pool, or nothing. It returns an *OwnedError when
// the owner has leases of this boot, a *FullError when a pool is used up and an
// *UnavailableError when a wanted address cannot be had.
func (s *Store) Acquire(ctx context.Context, r Request) ([]Lease, error) {
	var got []Lease
	err := s.update(ctx, func(t *tables) error {
		got = nil
		if err := s.evict(t, r.Owner); err != nil {
			return err
		}
		p := picker{store: s, tables: t, request: r, now: s.o.Now()}
		for _, pool := range r.Pools {
			a, err := p.pick(pool)
			if err != nil {
				return err
			}
			l := Lease{Address: a, Owner: r.Owner, Pod: r.Pod, NetNS: r.NetNS, Boot: s.o.Boot, Since: p.now.UTC(), Payload: r.Payload}
			if err := t.put(l); err != nil {
				return err
			}
			got = append(got, l)
		}
		return p.unused()
	})
	if err != nil {
		return nil, err
	}
	return got, nil
}

// evict refuses an owner that has leases, unless they are from before a reboot: a runtime
// may attach the same container again without a DEL then.
func (s *Store) evict(t *tables, o Owner) error {
	held, err := t.of(o)
	if err != nil || len(held) == 0 {
		return err
	}
	if held[0].Boot == s.o.Boot {
		return &OwnedError{Owner: o, Leases: held}
	}
	_, err = t.drop(o, s.o.Now())
	return err
}

// picker finds addresses for one request.
type picker struct {
	store   *Store
	tables  *tables
	request Request
	now     time.Time
	wanted  []netip.Addr // of request.Wanted, those given
}

func (p *picker) pick(pool Pool) (netip.Addr, error) {
	if a, ok, err := p.asked(pool); ok || err != nil {
		return a, err
	}
	a, err := p.next(pool)
	if err != nil || a.IsValid() {
		return a, err
	}
	if n, err := p.store.reclaim(p.tables, p.now); err != nil || n == 0 {
		return netip.Addr{}, cmp.Or(err, p.full(pool))
	}
	if a, err = p.next(pool); err == nil && !a.IsValid() {
		err = p.full(pool)
	}
	return a, err
}

// next walks the sources in order: never used, released longest ago, what an exclude that
// is gone or a forgotten release left behind the cursor, and last what has not cooled down.
func (p *picker) next(pool Pool) (netip.Addr, error) {
	cooled := func(pool Pool) (netip.Addr, error) { return p.rested(pool, CoolDown) }
	young := func(pool Pool) (netip.Addr, error) { return p.rested(pool, 0) }
	for _, find := range []func(Pool) (netip.Addr, error){p.fresh, cooled, p.scan, young} {
		if a, err := find(pool); err != nil || a.IsValid() {
			return a, err
		}
	}
	return netip.Addr{}, nil
}

// asked gives the wanted address of this pool, if there is one.
func (p *picker) asked(pool Pool) (netip.Addr, bool, error) {
	for _, a := range p.request.Wanted {
		if _, ok := pool.contains(a); !ok || slices.Contains(p.wanted, a) {
			continue
		}
		l, leased, err := p.tables.lease(a)
		switch {
		case err != nil:
			return a, false, err
		case leased:
			return a, false, &UnavailableError{Address: a, Reason: "is leased to " + l.Owner.String()}
		case p.excluded(a):
			return a, false, &UnavailableError{Address: a, Reason: "is in excludes, or the gateway"}
		case p.inUse(a):
			return a, false, &UnavailableError{Address: a, Reason: "is in use on this node without a lease"}
		}
		p.wanted = append(p.wanted, a)
		return a, true, nil
	}
	return netip.Addr{}, false, nil
}

// unused refuses a wanted address that lies in no pool, or a second one of one pool.
func (p *picker) unused() error {
	for _, a := range p.request.Wanted {
		if !slices.Contains(p.wanted, a) {
			return &UnavailableError{Address: a, Reason: "is in no range of network " + p.request.Network + ", or its range gave another one already"}
		}
	}
	return nil
}

func (p *picker) excluded(a netip.Addr) bool {
	return slices.ContainsFunc(p.request.Excludes, func(e netip.Prefix) bool { return e.Contains(a) }) ||
		slices.ContainsFunc(p.request.Pools, func(pool Pool) bool {
			return slices.ContainsFunc(pool, func(r Range) bool { return r.Gateway == a })
		})
}

// blocked says whether a is not for whoever comes next.
func (p *picker) blocked(a netip.Addr) bool {
	return p.excluded(a) || slices.Contains(p.request.Reserved, a) || slices.Contains(p.request.Wanted, a)
}

func (p *picker) inUse(a netip.Addr) bool { return p.request.InUse != nil && p.request.InUse(a) }

// fresh gives the lowest address behind the range's cursor.
func (p *picker) fresh(pool Pool) (netip.Addr, error) {
	for _, r := range pool {
		a := r.First
		if b := p.tables.cursorSet.Get([]byte(r.String())); b != nil {
			last, _ := netip.AddrFromSlice(bytes.Clone(b))
			a = last.Next()
		}
		start := a
		for n := 0; n < scanLimit && r.Contains(a); n, a = n+1, a.Next() {
			if p.tables.isLeased(a) || p.tables.isReleased(a) || p.blocked(a) {
				continue
			}
			if !p.inUse(a) {
				return a, p.tables.cursorSet.Put([]byte(r.String()), a.AsSlice())
			}
			if err := p.tables.rest(a, p.now); err != nil {
				return netip.Addr{}, err
			}
		}
		if start != a {
			if err := p.tables.cursorSet.Put([]byte(r.String()), a.Prev().AsSlice()); err != nil {
				return netip.Addr{}, err
			}
		}
	}
	return netip.Addr{}, nil
}

// rested gives the address of the pool released longest ago, and at least age ago.
func (p *picker) rested(pool Pool, age time.Duration) (netip.Addr, error) {
	var used []netip.Addr
	var found netip.Addr
	c := p.tables.order.Cursor()
	for k, _ := c.First(); k != nil && (age == 0 || p.now.Sub(stampOf(k)) >= age); k, _ = c.Next() {
		a, _ := netip.AddrFromSlice(bytes.Clone(k[8:]))
		if _, ok := pool.contains(a); !ok || p.blocked(a) {
			continue
		}
		if !p.inUse(a) {
			found = a
			break
		}
		used = append(used, a)
	}
	for _, a := range used {
		if err := p.tables.rest(a, p.now); err != nil {
			return netip.Addr{}, err
		}
	}
	return found, nil
}

func (p *picker) scan(pool Pool) (netip.Addr, error) {
	for _, r := range pool {
		a := r.First
		for n := 0; n < scanLimit && r.Contains(a); n, a = n+1, a.Next() {
			if !p.tables.isLeased(a) && !p.tables.isReleased(a) && !p.blocked(a) && !p.inUse(a) {
				return a, nil
			}
		}
	}
	return netip.Addr{}, nil
}

func (p *picker) full(pool Pool) error {
	all, err := p.tables.all()
	if err != nil {
		return err
	}
	e := &FullError{Network: p.request.Network, Pool: pool.String(), Size: pool.size()}
	slices.SortFunc(all, func(a, b Lease) int { return a.Since.Compare(b.Since) })
	for _, l := range all {
		if _, ok := pool.contains(l.Address); !ok {
			continue
		}
		if e.Leased++; len(e.Holders) < 5 {
			e.Holders = append(e.Holders, l.holder())
		}
	}
	e.Blocked = int(min(e.Size, 1<<31)) - e.Leased
	if len(e.Holders) == 0 {
		e.Holders = []string{"nobody"}
	}
	return e
}

// reclaim ends the leases from before a reboot whose network namespace is gone.
func (s *Store) reclaim(t *tables, now time.Time) (int, error) {
	all, err := t.all()
	if err != nil {
		return 0, err
	}
	var names []string
	for _, l := range all {
		if l.Boot == s.o.Boot || !s.o.Gone(l.NetNS) {
			continue
		}
		dropped, err := t.drop(l.Owner, now)
		if err != nil {
			return 0, err
		}
		for _, d := range dropped {
			names = append(names, d.holder())
		}
	}
	if len(names) > 0 {
		s.o.Report(fmt.Sprintf("reclaimed leases from before the reboot: %s", strings.Join(names, ", ")))
	}
	return len(names), nil
}
