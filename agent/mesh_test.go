package agent

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/nftcni/nftcni/cni"
	"github.com/nftcni/nftcni/policy"
)

// memoryRouter is a router without a kernel.
type memoryRouter struct {
	mu       sync.Mutex
	keys     []string // the newest last
	rotation cni.Rotation
	report   cni.Report
	setErr   error
	retired  int
}

func (r *memoryRouter) locked(f func()) { r.mu.Lock(); defer r.mu.Unlock(); f() }

func (r *memoryRouter) Set(context.Context, cni.Peer, []cni.Peer) (rep cni.Report, err error) {
	r.locked(func() { rep, err = r.report, r.setErr })
	return rep, err
}

func (r *memoryRouter) Run(ctx context.Context, _ func(cni.Report, error)) error {
	<-ctx.Done()
	return ctx.Err()
}

func (r *memoryRouter) Report() cni.Report { return r.report }
func (r *memoryRouter) MTU() int           { return r.report.MTU }
func (r *memoryRouter) Close()             {}

func (r *memoryRouter) retirements() (n int) {
	r.locked(func() { n = r.retired })
	return n
}

func (r *memoryRouter) PublicKey() (s string) {
	r.locked(func() { s = strings.Join(r.keys, " ") })
	return s
}

func (r *memoryRouter) RotateKey(context.Context) (string, error) {
	r.locked(func() { r.keys, r.rotation.Active = append(r.keys, "1:new"), true })
	return r.PublicKey(), nil
}

func (r *memoryRouter) RetireKey(context.Context) (string, error) {
	r.locked(func() {
		r.retired++
		r.rotation.Active = false
		if len(r.keys) == 2 {
			r.keys = r.keys[1:]
		}
	})
	return r.PublicKey(), nil
}

func (r *memoryRouter) Rotation() (x cni.Rotation, err error) {
	r.locked(func() { x = r.rotation })
	return x, nil
}

// nodeObject is this node's Node object.
type nodeObject struct {
	mu       sync.Mutex
	key      string
	addrs    []netip.Addr
	writes   int
	failures int // of the next writes
}

func (o *nodeObject) write(f func()) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.writes++; o.failures > 0 {
		o.failures--
		return errors.New("no API server")
	}
	f()
	return nil
}

func (o *nodeObject) list() meshNodes {
	o.mu.Lock()
	defer o.mu.Unlock()
	return meshNodes{[]cni.Peer{{Name: "n1", PublicKey: o.key}, {Name: "n2"}}, o.addrs}
}

func (o *nodeObject) published() (key string, addrs []netip.Addr, writes int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.key, o.addrs, o.writes
}

// startMesh runs a mesh over a router in memory, with the clock of the synctest bubble.
func startMesh(t *testing.T, r *memoryRouter, o *nodeObject, cfg MeshConfig) *mesh {
	t.Helper()
	m := meshWith(r, Config{Node: "n1", Mesh: cfg}, slog.New(slog.DiscardHandler))
	m.publisher.key = func(_ context.Context, key string) error { return o.write(func() { o.key = key }) }
	m.publisher.addrs = func(_ context.Context, a []netip.Addr) error { return o.write(func() { o.addrs = a }) }
	m.probes.ask = func(context.Context, []cni.ProbeTarget) ([]cni.PathProbe, error) { return nil, nil }
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- m.run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	m.offer(o.list())
	synctest.Wait()
	return m
}

// A key that is rotated is published, and retired when everybody has moved and the old one is
// quiet; the API server is told, and failures are repeated.
func TestMeshKeyRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, o := &memoryRouter{keys: []string{"0:old"}}, &nodeObject{failures: 3}
		m := startMesh(t, r, o, MeshConfig{})
		is := func(when, wantKey string, wantRetired int) (writes int) {
			t.Helper()
			synctest.Wait()
			key, _, writes := o.published()
			if n := r.retirements(); key != wantKey || n != wantRetired {
				t.Fatalf("%s: published %q, retired %d; want %q, %d", when, key, n, wantKey, wantRetired)
			}
			return writes
		}
		time.Sleep(10 * time.Second)
		if writes := is("three failures later", "0:old", 0); writes != 4 {
			t.Fatalf("published in %d writes, want 4", writes)
		}
		m.offer(o.list())
		r.locked(func() { r.rotation = cni.Rotation{Moving: 2} })
		_, _ = r.RotateKey(t.Context())
		m.wakeUp()
		time.Sleep(time.Hour)
		is("peers have not moved", "0:old 1:new", 0)
		r.locked(func() { r.rotation.Moving = 0 })
		for range 100 {
			r.locked(func() { r.rotation.Received += 100 })
			time.Sleep(time.Minute)
		}
		is("somebody still uses the old key", "0:old 1:new", 0)
		time.Sleep(oldKeyQuiet + 2*retireLook)
		writes := is("the old key is quiet", "1:new", 1)
		time.Sleep(time.Hour)
		if n := is("an hour later", "1:new", 1); n != writes {
			t.Errorf("an idle mesh writes: %d, then %d", writes, n)
		}
	})
}

// Without a list of nodes in force nobody knows who is missing: an old key stays.
func TestMeshKeyStaysWithoutNodes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, o := &memoryRouter{keys: []string{"0:old", "1:new"}, rotation: cni.Rotation{Active: true}, setErr: errors.New("no kernel")}, &nodeObject{key: "0:old 1:new"}
		m := startMesh(t, r, o, MeshConfig{})
		if time.Sleep(time.Hour); r.retirements() != 0 {
			t.Fatal("retired although the nodes are not in force")
		}
		r.locked(func() { r.setErr = nil })
		m.offer(o.list())
		if time.Sleep(2 * oldKeyQuiet); r.retirements() != 1 {
			t.Error("a rotation that an earlier process began does not end")
		}
	})
}

func TestMeshPublishesAddresses(t *testing.T) {
	a, b := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	for _, tt := range []struct {
		name       string
		cfg        MeshConfig
		chosen     []netip.Addr
		have, want []netip.Addr
		writes     int
	}{
		{"not configured", MeshConfig{}, []netip.Addr{a}, nil, nil, 0},
		{"configured no longer", MeshConfig{}, []netip.Addr{a}, []netip.Addr{b}, nil, 1},
		{"by pattern", MeshConfig{NodeInterface: "bond*"}, []netip.Addr{a}, nil, []netip.Addr{a}, 1},
		{"by CIDR, changed", MeshConfig{NodeCIDRs: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}}, []netip.Addr{b}, []netip.Addr{a}, []netip.Addr{b}, 1},
		{"explicit, known", MeshConfig{NodeAddresses: []netip.Addr{a}}, []netip.Addr{a}, []netip.Addr{a}, []netip.Addr{a}, 0},
		{"the link is down", MeshConfig{NodeInterface: "bond*"}, nil, []netip.Addr{a}, []netip.Addr{a}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r, o := &memoryRouter{report: cni.Report{Addrs: tt.chosen}}, &nodeObject{addrs: tt.have}
				startMesh(t, r, o, tt.cfg)
				if _, addrs, writes := o.published(); !slices.Equal(addrs, tt.want) || writes != tt.writes {
					t.Errorf("%v after %d writes, want %v after %d", addrs, writes, tt.want, tt.writes)
				}
			})
		})
	}
}

// Peers are reached where they say; this node's own choice does not feed back into itself.
func TestMeshPeerAddresses(t *testing.T) {
	a, b, c, d := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("192.0.2.3"), netip.MustParseAddr("192.0.2.4")
	v := newInventory("n1", NetworkRouted)
	for _, n := range []policy.Node{{Name: "n2", Addrs: []netip.Addr{b}, MeshAddrs: []netip.Addr{d}}, {Name: "n1", Addrs: []netip.Addr{a}, MeshAddrs: []netip.Addr{c}}, {Name: "n3", Addrs: []netip.Addr{c}}} {
		v.apply(policy.Event{Node: &n})
	}
	want := meshNodes{[]cni.Peer{{Name: "n1", Addrs: []netip.Addr{a}}, {Name: "n2", Addrs: []netip.Addr{d}}, {Name: "n3", Addrs: []netip.Addr{c}}}, []netip.Addr{c}}
	if d := cmp.Diff(want, v.peers(), cmp.AllowUnexported(meshNodes{}), cmpopts.EquateComparable(netip.Addr{})); d != "" {
		t.Error(d)
	}
}

// Every path is asked about once, again when its MTU changes, and forgotten when it is gone.
func TestMeshProbesPaths(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		at := func(last byte, mtu int) cni.PeerPath {
			return cni.PeerPath{Address: netip.AddrFrom4([4]byte{192, 0, 2, last}), LinkMTU: mtu}
		}
		p := newPathProbes(slog.New(slog.DiscardHandler))
		var asked []cni.ProbeTarget
		p.ask = func(_ context.Context, targets []cni.ProbeTarget) (out []cni.PathProbe, err error) {
			asked = append(asked, targets...)
			for _, t := range targets {
				out = append(out, cni.PathProbe{Address: t.Address, Want: t.Want, Carries: 1400})
			}
			return out, nil
		}
		for _, step := range []struct {
			paths        []cni.PeerPath
			asked, known int
		}{
			{[]cni.PeerPath{at(1, 1500), at(1, 1500), at(2, 1500)}, 2, 2},
			{[]cni.PeerPath{at(1, 1500), at(2, 1500)}, 0, 2},
			{[]cni.PeerPath{at(1, 9000)}, 1, 1},
			{[]cni.PeerPath{{Via: cni.ViaUnreachable}}, 0, 0},
		} {
			asked = nil
			p.start(t.Context(), cni.Report{Paths: step.paths}.ProbeTargets())
			p.wait()
			if found, _ := p.results(); len(asked) != step.asked || len(found) != step.known {
				t.Errorf("%v: asked %d, known %v", step.paths, len(asked), found)
			}
		}
	})
}

// A path that answers nothing is asked again, until it answers, is gone, or has been asked often enough.
func TestMeshProbesSilentPathsAgain(t *testing.T) {
	target := cni.ProbeTarget{Address: netip.MustParseAddr("192.0.2.1"), Want: 1500}
	for _, tt := range []struct {
		name     string
		silent   int // answers before one
		gone     bool
		asked    int
		carries  int
		after    time.Duration
		problems bool
	}{
		{name: "at once", asked: 1, carries: 1500},
		{name: "when its node has started", silent: 1, asked: 2, carries: 1500, after: 5 * time.Second},
		{name: "when an error is over", silent: 2, problems: true, asked: 3, carries: 1500, after: 35 * time.Second},
		{name: "never", silent: 9, asked: 4, after: 335 * time.Second},
		{name: "gone", silent: 9, gone: true, asked: 1, carries: -1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p, asked, began := newPathProbes(slog.New(slog.DiscardHandler)), 0, time.Now()
				p.ask = func(_ context.Context, targets []cni.ProbeTarget) ([]cni.PathProbe, error) {
					asked++
					if tt.gone {
						p.start(t.Context(), nil)
					}
					switch {
					case asked > tt.silent:
						return []cni.PathProbe{{Address: targets[0].Address, Want: targets[0].Want, Carries: 1500}}, nil
					case tt.problems:
						return nil, errors.New("no buffer space")
					}
					return []cni.PathProbe{{Address: targets[0].Address, Want: targets[0].Want}}, nil
				}
				p.start(t.Context(), []cni.ProbeTarget{target})
				p.wait()
				carries := -1
				if found, problem := p.results(); problem != "" {
					t.Error(problem)
				} else if len(found) == 1 {
					carries = found[0].Carries
				}
				if asked != tt.asked || carries != tt.carries || time.Since(began) != tt.after {
					t.Errorf("asked %d times in %v, carries %d; want %d, %v, %d", asked, time.Since(began), carries, tt.asked, tt.after, tt.carries)
				}
			})
		})
	}
}
