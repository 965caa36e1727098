package ipam

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// model is what a store should hold: no file, no cursor, no order of release, only who
// has what and since when an address rests.
type model struct {
	t        *rapid.T
	dir      string
	clock    *clock
	boot     int
	store    *Store
	held     map[Owner]modelLease
	released map[netip.Addr]time.Time
	excludes []netip.Prefix
}

type modelLease struct {
	addrs []netip.Addr
	boot  int
	netns string
}

func (m *model) open() {
	s, err := New(Options{Dir: m.dir, Now: m.clock.read, Boot: fmt.Sprint("boot-", m.boot),
		Gone: func(path string) bool { return path == "gone" }})
	if err != nil {
		m.t.Fatal(err)
	}
	m.store = s
}

func (m *model) pools() []Pool {
	return []Pool{{mustRangeOf("10.0.0.0/28"), mustRangeOf("10.0.1.0/29")}, {mustRangeOf("fd00::/123")}}
}

func mustRangeOf(s string) Range {
	r, err := NewRange(netip.MustParsePrefix(s), netip.Addr{}, netip.Addr{}, netip.Addr{})
	if err != nil {
		panic(err)
	}
	return r
}

func (m *model) owner() Owner {
	return owner(rapid.IntRange(0, 24).Draw(m.t, "owner"))
}

func (m *model) holder(a netip.Addr) (Owner, bool) {
	for o, l := range m.held {
		if slices.Contains(l.addrs, a) {
			return o, true
		}
	}
	return Owner{}, false
}

// free are the addresses of a pool that may be given now.
func (m *model) free(p Pool) []netip.Addr {
	var list []netip.Addr
	for _, r := range p {
		for a := r.First; r.Contains(a); a = a.Next() {
			_, taken := m.holder(a)
			if !taken && !slices.ContainsFunc(m.excludes, func(e netip.Prefix) bool { return e.Contains(a) }) {
				list = append(list, a)
			}
		}
	}
	return list
}

func (m *model) release(o Owner) {
	for _, a := range m.held[o].addrs {
		m.released[a] = m.clock.now
	}
	delete(m.held, o)
}

// reclaim does what a full pool does.
func (m *model) reclaim() {
	for o, l := range maps.Clone(m.held) {
		if l.boot != m.boot && l.netns == "gone" {
			m.release(o)
		}
	}
}

func (m *model) Acquire(t *rapid.T) {
	m.t = t
	o := m.owner()
	netns := rapid.SampledFrom([]string{"gone", "alive"}).Draw(t, "netns")
	got, err := m.store.Acquire(t.Context(), Request{Owner: o, NetNS: netns, Pools: m.pools(), Excludes: m.excludes})
	if old, ok := m.held[o]; ok && old.boot == m.boot {
		var owned *OwnedError
		if !errors.As(err, &owned) {
			t.Fatalf("owner has leases of this boot: got %v, %v", got, err)
		}
		return
	} else if ok && err == nil {
		m.release(o)
	}
	if err != nil {
		m.mustBeFull(o, err)
		return
	}
	if slices.ContainsFunc(m.pools(), func(p Pool) bool { return len(m.free(p)) == 0 }) {
		m.reclaim()
	}
	var addrs []netip.Addr
	for i, p := range m.pools() {
		m.mustBeGood(p, got[i].Address)
		addrs = append(addrs, got[i].Address)
	}
	m.held[o] = modelLease{addrs: addrs, boot: m.boot, netns: netns}
	for _, a := range addrs {
		delete(m.released, a)
	}
}

func (m *model) mustBeFull(o Owner, err error) {
	var full *FullError
	if !errors.As(err, &full) {
		m.t.Fatalf("acquire: %v", err)
	}
	after := maps.Clone(m.held)
	delete(after, o)
	for o, l := range after {
		if l.boot != m.boot && l.netns == "gone" {
			delete(after, o)
		}
	}
	saved := m.held
	m.held = after
	defer func() { m.held = saved }()
	if !slices.ContainsFunc(m.pools(), func(p Pool) bool { return len(m.free(p)) == 0 }) {
		m.t.Fatalf("%v, but every pool has a free address", err)
	}
}

func (m *model) mustBeGood(p Pool, a netip.Addr) {
	free := m.free(p)
	if !slices.Contains(free, a) {
		o, _ := m.holder(a)
		m.t.Fatalf("%s is not free: %v has it", a, o)
	}
	at, rested := m.released[a]
	if !rested {
		return
	}
	for _, other := range free {
		when, used := m.released[other]
		if !used {
			m.t.Fatalf("%s was used before, %s never was", a, other)
		}
		if when.Before(at) {
			m.t.Fatalf("%s was released at %s, %s before at %s", a, at, other, when)
		}
	}
}

func (m *model) Release(t *rapid.T) {
	m.t = t
	o := m.owner()
	gone, err := m.store.Release(t.Context(), o)
	if err != nil || len(gone) != len(m.held[o].addrs) {
		t.Fatalf("release %v: %v, %v; want %v", o, gone, err, m.held[o].addrs)
	}
	m.release(o)
}

func (m *model) Collect(t *rapid.T) {
	m.t = t
	o := m.owner()
	if _, err := m.store.ReleaseIf(t.Context(), func(l Lease) bool { return l.Owner == o }); err != nil {
		t.Fatal(err)
	}
	m.release(o)
}

func (m *model) Wait(t *rapid.T) {
	m.clock.now = m.clock.now.Add(time.Duration(rapid.IntRange(1, 90).Draw(t, "seconds")) * time.Second)
}

func (m *model) Reboot(t *rapid.T) {
	m.t = t
	m.boot++
	m.open()
}

// Kill stops a process in the middle of a transaction: what it wrote is not there.
func (m *model) Kill(t *rapid.T) {
	m.t = t
	o := m.owner()
	killed := errors.New("killed")
	err := m.store.update(t.Context(), func(tb *tables) error {
		if _, err := tb.drop(o, m.clock.now); err != nil {
			return err
		}
		return killed
	})
	if !errors.Is(err, killed) {
		t.Fatal(err)
	}
	m.open()
}

// Check is the invariant: the file holds what the model holds.
func (m *model) Check(t *rapid.T) {
	all, err := m.store.Leases(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, l := range m.held {
		n += len(l.addrs)
	}
	if len(all) != n {
		t.Fatalf("file has %d leases, model %d", len(all), n)
	}
	for _, l := range all {
		if !slices.Contains(m.held[l.Owner].addrs, l.Address) {
			t.Fatalf("file says that %s is %v's, the model does not", l.Address, l.Owner)
		}
	}
}

// TestStateMachine takes 100,000 steps in all, 10,000 with -short, or NFTCNI_IPAM_STEPS.
func TestStateMachine(t *testing.T) {
	steps, _ := strconv.Atoi(os.Getenv("NFTCNI_IPAM_STEPS"))
	if steps == 0 {
		steps = 100_000
		if testing.Short() {
			steps = 10_000
		}
	}
	base, err := os.MkdirTemp("/dev/shm", "ipam") // a disk would only make the reboots slow
	if err != nil {
		base = t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(base) })
	taken := 0
	for taken < steps {
		rapid.Check(t, func(rt *rapid.T) {
			if taken >= steps {
				return
			}
			dir, err := os.MkdirTemp(base, "s")
			if err != nil {
				rt.Fatal(err)
			}
			m := &model{t: rt, dir: dir, clock: newClock(), held: map[Owner]modelLease{}, released: map[netip.Addr]time.Time{}}
			m.open()
			count := func(action func(*rapid.T)) func(*rapid.T) {
				return func(rt *rapid.T) { taken++; action(rt) }
			}
			rt.Repeat(map[string]func(*rapid.T){"acquire": count(m.Acquire), "acquire again": count(m.Acquire), "release": count(m.Release),
				"collect": count(m.Collect), "wait": count(m.Wait), "reboot": count(m.Reboot), "kill": count(m.Kill), "": m.Check})
		})
		if t.Failed() {
			return
		}
	}
	t.Logf("%d steps", taken)
}
