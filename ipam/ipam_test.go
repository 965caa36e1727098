package ipam

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// clock is a time that tests move by hand.
type clock struct{ now time.Time }

func (c *clock) read() time.Time { return c.now }

func newClock() *clock { return &clock{now: time.Unix(1_800_000_000, 0)} }

func openStore(t testing.TB, o Options) *Store {
	t.Helper()
	if o.Dir == "" {
		o.Dir = t.TempDir()
	}
	if o.Boot == "" {
		o.Boot = "boot-1"
	}
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func mustRange(t testing.TB, subnet, first, last string) Range {
	t.Helper()
	parse := func(s string) netip.Addr {
		if s == "" {
			return netip.Addr{}
		}
		return netip.MustParseAddr(s)
	}
	r, err := NewRange(netip.MustParsePrefix(subnet), parse(first), parse(last), netip.Addr{})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func owner(n int) Owner {
	return Owner{Network: "net", ContainerID: fmt.Sprintf("c%d", n), Interface: "eth0"}
}

func acquire(t testing.TB, s *Store, r Request) []netip.Addr {
	t.Helper()
	got, err := s.Acquire(t.Context(), r)
	if err != nil {
		t.Fatalf("acquire %v: %v", r.Owner, err)
	}
	var list []netip.Addr
	for _, l := range got {
		list = append(list, l.Address)
	}
	return list
}

func TestNewRange(t *testing.T) {
	for _, tt := range []struct {
		name, subnet, first, last, want, err string
		size                                 uint64
	}{
		{name: "v4 leaves out network and broadcast", subnet: "10.0.0.0/29", want: "10.0.0.1-10.0.0.6", size: 6},
		{name: "v4 /31 has both", subnet: "10.0.0.0/31", want: "10.0.0.0-10.0.0.1", size: 2},
		{name: "v4 /32", subnet: "10.0.0.7/32", want: "10.0.0.7-10.0.0.7", size: 1},
		{name: "v6 leaves out the anycast address", subnet: "fd00::/126", want: "fd00::1-fd00::3", size: 3},
		{name: "v6 /64", subnet: "fd00::/64", want: "fd00::1-fd00::ffff:ffff:ffff:ffff", size: 1<<64 - 1},
		{name: "bounds", subnet: "10.0.0.0/24", first: "10.0.0.10", last: "10.0.0.19", want: "10.0.0.10-10.0.0.19", size: 10},
		{name: "host bits", subnet: "10.0.0.1/24", err: "write 10.0.0.0/24"},
		{name: "start elsewhere", subnet: "10.0.0.0/24", first: "10.0.1.1", err: "rangeStart"},
		{name: "end before start", subnet: "10.0.0.0/24", first: "10.0.0.9", last: "10.0.0.8", err: "rangeEnd"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var first, last netip.Addr
			if tt.first != "" {
				first = netip.MustParseAddr(tt.first)
			}
			if tt.last != "" {
				last = netip.MustParseAddr(tt.last)
			}
			r, err := NewRange(netip.MustParsePrefix(tt.subnet), first, last, netip.Addr{})
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Fatalf("got %v, %v; want an error with %q", r, err, tt.err)
				}
				return
			}
			if err != nil || r.String() != tt.want || r.Size() != tt.size {
				t.Errorf("got %v of size %d, %v; want %s of %d", r, r.Size(), err, tt.want, tt.size)
			}
		})
	}
}

func TestAcquireOrder(t *testing.T) {
	c := newClock()
	s := openStore(t, Options{Now: c.read})
	pool := []Pool{{mustRange(t, "10.0.0.0/29", "", "")}}
	for i := 1; i <= 4; i++ {
		if got := acquire(t, s, Request{Owner: owner(i), Pools: pool}); got[0] != netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}) {
			t.Fatalf("lease %d: got %v", i, got)
		}
	}
	for _, n := range []int{3, 1} {
		if _, err := s.Release(t.Context(), owner(n)); err != nil {
			t.Fatal(err)
		}
		c.now = c.now.Add(time.Second)
	}
	var got []string
	for i := 10; i < 14; i++ {
		got = append(got, acquire(t, s, Request{Owner: owner(i), Pools: pool})[0].String())
	}
	want := []string{"10.0.0.5", "10.0.0.6", "10.0.0.3", "10.0.0.1"} // never used first, then by release
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestAcquireCoolDown(t *testing.T) {
	c := newClock()
	s := openStore(t, Options{Now: c.read})
	pool := []Pool{{mustRange(t, "10.0.0.0/29", "", "")}}
	last := []netip.Prefix{netip.MustParsePrefix("10.0.0.1/32")}
	// .1 is passed over while excluded, so it is behind the cursor when the exclude goes.
	for i := 2; i <= 6; i++ {
		acquire(t, s, Request{Owner: owner(i), Pools: pool, Excludes: last})
	}
	if _, err := s.Release(t.Context(), owner(4)); err != nil {
		t.Fatal(err)
	}
	c.now = c.now.Add(CoolDown - time.Second)
	if got := acquire(t, s, Request{Owner: owner(7), Pools: pool}); got[0].String() != "10.0.0.1" {
		t.Errorf("while 10.0.0.4 cools down: got %v, want the free 10.0.0.1", got)
	}
	if got := acquire(t, s, Request{Owner: owner(8), Pools: pool}); got[0].String() != "10.0.0.4" {
		t.Errorf("nothing else is free: got %v, want 10.0.0.4", got)
	}
}

func TestAcquireFull(t *testing.T) {
	s := openStore(t, Options{})
	pool := []Pool{{mustRange(t, "10.0.0.0/30", "", "")}}
	acquire(t, s, Request{Owner: owner(1), Pod: "default/a", Pools: pool})
	acquire(t, s, Request{Owner: owner(2), Pod: "default/b", Pools: pool})
	_, err := s.Acquire(t.Context(), Request{Owner: owner(3), Pools: pool})
	var full *FullError
	if !errors.As(err, &full) || full.Size != 2 || full.Leased != 2 {
		t.Fatalf("got %v, want a FullError of 2", err)
	}
	for _, want := range []string{"10.0.0.1-10.0.0.2", "default/a", "default/b", "network net"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error %q does not name %q", err, want)
		}
	}
}

func TestAcquireSelection(t *testing.T) {
	a := netip.MustParseAddr
	pools := []Pool{
		{mustRange(t, "10.0.0.0/30", "", ""), mustRange(t, "10.0.1.0/30", "", "")},
		{mustRange(t, "fd00::/64", "", "")},
	}
	for _, tt := range []struct {
		name    string
		request Request
		want    string
		err     string
	}{
		{name: "dual stack", want: "[10.0.0.1 fd00::1]"},
		{name: "exclude", request: Request{Excludes: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24")}}, want: "[10.0.1.1 fd00::1]"},
		{name: "reserved", request: Request{Reserved: []netip.Addr{a("10.0.0.1"), a("fd00::1")}}, want: "[10.0.0.2 fd00::2]"},
		{name: "wanted", request: Request{Wanted: []netip.Addr{a("fd00::99")}}, want: "[10.0.0.1 fd00::99]"},
		{name: "wanted may be reserved", request: Request{Wanted: []netip.Addr{a("10.0.1.2")}, Reserved: []netip.Addr{a("10.0.1.2")}}, want: "[10.0.1.2 fd00::1]"},
		{name: "wanted not excluded", request: Request{Wanted: []netip.Addr{a("10.0.1.2")}, Excludes: []netip.Prefix{netip.MustParsePrefix("10.0.1.2/32")}}, err: "excludes"},
		{name: "wanted outside", request: Request{Wanted: []netip.Addr{a("10.9.9.9")}}, err: "in no range"},
		{name: "two wanted of one pool", request: Request{Wanted: []netip.Addr{a("10.0.0.1"), a("10.0.0.2")}}, err: "10.0.0.2"},
		{name: "in use in the kernel", request: Request{InUse: func(x netip.Addr) bool { return x == a("10.0.0.1") }}, want: "[10.0.0.2 fd00::1]"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := openStore(t, Options{})
			tt.request.Owner, tt.request.Pools = owner(1), pools
			got, err := s.Acquire(t.Context(), tt.request)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Fatalf("got %v, want an error with %q", err, tt.err)
				}
				if all, _ := s.Leases(t.Context()); len(all) != 0 {
					t.Errorf("a refused request left %v", all)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var addrs []netip.Addr
			for _, l := range got {
				addrs = append(addrs, l.Address)
			}
			if fmt.Sprint(addrs) != tt.want {
				t.Errorf("got %v, want %s", addrs, tt.want)
			}
		})
	}
}

func TestReboot(t *testing.T) {
	dir := t.TempDir()
	pools := []Pool{{mustRange(t, "10.0.0.0/30", "", "")}}
	before := openStore(t, Options{Dir: dir, Boot: "one"})
	acquire(t, before, Request{Owner: owner(1), NetNS: "/gone", Pools: pools})
	acquire(t, before, Request{Owner: owner(2), NetNS: "/alive", Pools: pools})

	var said []string
	after := openStore(t, Options{Dir: dir, Boot: "two", Gone: func(p string) bool { return p == "/gone" },
		Report: func(s string) { said = append(said, s) }})
	if got := acquire(t, after, Request{Owner: owner(3), Pools: pools}); got[0].String() != "10.0.0.1" {
		t.Errorf("got %v, want the reclaimed 10.0.0.1", got)
	}
	if len(said) != 1 || !strings.Contains(said[0], "10.0.0.1") {
		t.Errorf("reported %q", said)
	}
	if _, err := after.Acquire(t.Context(), Request{Owner: owner(4), Pools: pools}); err == nil {
		t.Error("10.0.0.2's namespace lives, but it was leased again")
	}
	// The same container attached again after the reboot takes the place of its old lease.
	if got := acquire(t, after, Request{Owner: owner(2), Pools: pools}); got[0].String() != "10.0.0.2" {
		t.Errorf("got %v, want 10.0.0.2", got)
	}
	var owned *OwnedError
	if _, err := after.Acquire(t.Context(), Request{Owner: owner(2), Pools: pools}); !errors.As(err, &owned) {
		t.Errorf("second ADD of one boot: got %v, want an OwnedError", err)
	}
}

func TestCorruptFileIsRebuilt(t *testing.T) {
	live := []Lease{{Address: netip.MustParseAddr("10.0.0.1"), Owner: owner(1)}}
	pools := []Pool{{mustRange(t, "10.0.0.0/29", "", "")}}
	for _, tt := range []struct {
		name   string
		damage func(b []byte) []byte
		boot   string
	}{
		{name: "not a database", damage: func([]byte) []byte { return []byte("hello") }},
		{name: "zeroes", damage: func(b []byte) []byte { return make([]byte, len(b)) }},
		{name: "cut to its meta pages", damage: func(b []byte) []byte { return b[:2*4096] }},
		{name: "data pages of ones", boot: "two", damage: func(b []byte) []byte {
			for i := 2 * 4096; i < len(b); i++ {
				b[i] = 0xff
			}
			return b
		}},
		{name: "data pages of ones in the same boot", damage: func(b []byte) []byte {
			for i := 2 * 4096; i < len(b); i++ {
				b[i] = 0xff
			}
			return b
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			acquire(t, openStore(t, Options{Dir: dir}), Request{Owner: owner(1), Pools: pools})
			path := filepath.Join(dir, FileName)
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, tt.damage(b), 0o600); err != nil {
				t.Fatal(err)
			}
			var said string
			s := openStore(t, Options{Dir: dir, Boot: tt.boot, Report: func(m string) { said = m },
				Live: func(context.Context) ([]Lease, error) { return live, nil }})
			if got := acquire(t, s, Request{Owner: owner(2), Pools: pools}); got[0].String() != "10.0.0.2" {
				t.Errorf("got %v, want 10.0.0.2: 10.0.0.1 lives", got)
			}
			if aside, _ := filepath.Glob(path + ".corrupt-*"); len(aside) != 1 || !strings.Contains(said, aside[0]) {
				t.Errorf("set aside %v, reported %q", aside, said)
			}
			if held, err := s.Of(t.Context(), owner(1)); err != nil || len(held) != 1 {
				t.Errorf("the live lease: %v, %v", held, err)
			}
		})
	}
}

func TestCorruptFileStaysWithoutLiveList(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, FileName)
	if err := os.WriteFile(path, []byte("hello"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := openStore(t, Options{Dir: dir, Live: func(context.Context) ([]Lease, error) { return nil, errors.New("no netlink") }})
	_, err := s.Acquire(t.Context(), Request{Owner: owner(1), Pools: []Pool{{mustRange(t, "10.0.0.0/29", "", "")}}})
	if err == nil || !strings.Contains(err.Error(), "no netlink") {
		t.Errorf("got %v", err)
	}
	if b, _ := os.ReadFile(path); string(b) != "hello" {
		t.Errorf("the file is now %q", b)
	}
}

func TestParallelStores(t *testing.T) {
	dir := t.TempDir()
	pools := []Pool{{mustRange(t, "10.0.0.0/24", "", "")}, {mustRange(t, "fd00::/64", "", "")}}
	var wg sync.WaitGroup
	var mu sync.Mutex
	seen := map[netip.Addr]int{}
	for n := range 100 {
		s := openStore(t, Options{Dir: dir})
		wg.Go(func() {
			got, err := s.Acquire(t.Context(), Request{Owner: owner(n), Pools: pools})
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			for _, l := range got {
				seen[l.Address]++
			}
		})
	}
	wg.Wait()
	if len(seen) != 200 {
		t.Errorf("%d different addresses for 100 dual-stack owners", len(seen))
	}
}

func TestReleaseWithoutFile(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "missing")
	s := openStore(t, Options{Dir: dir})
	if gone, err := s.Release(t.Context(), owner(1)); err != nil || len(gone) != 0 {
		t.Errorf("got %v, %v", gone, err)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("releasing nothing made the state directory")
	}
}

func TestLockTimeout(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, Options{Dir: dir})
	held, err := s.lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Leases(ctx); err != nil {
		t.Fatalf("no file yet: %v", err)
	}
	if _, err := s.Acquire(ctx, Request{Owner: owner(1)}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want context.Canceled", err)
	}
}
