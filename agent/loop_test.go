package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nftcni/nftcni/cni"
	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
)

// memoryTable is a table in memory: it does what nft.Table does to the elements, and
// fails when told to.
type memoryTable struct {
	tables   policy.Tables
	bindings map[nft.Binding]bool
	networks []netip.Prefix
	tunnels  nft.Tunnels
	ports    []nft.HostPort
	toHost   nft.PodToHost
	seq      uint64
	writes   int
	fail     error // of the next Apply, after its first step
	drops    []policy.Op
}

func newMemoryTable() *memoryTable {
	return &memoryTable{tables: policy.Tables{}, bindings: map[nft.Binding]bool{}}
}

func (m *memoryTable) State(context.Context) (nft.State, error) {
	s := nft.State{Tables: maps.Clone(m.tables), PodNetworks: m.networks, Tunnels: m.tunnels, HostPorts: m.ports, PodToHost: m.toHost}
	for b := range m.bindings {
		s.Bindings = append(s.Bindings, b)
	}
	return s, nil
}

func (m *memoryTable) Apply(_ context.Context, c nft.Change) (nft.Receipt, error) {
	for _, b := range c.Unbind {
		b.Comment = ""
		delete(m.bindings, b)
	}
	for i, step := range c.Delta.Steps {
		if i == 1 && m.fail != nil {
			err := m.fail
			m.fail = nil
			return nft.Receipt{}, err
		}
		if err := m.apply(step); err != nil {
			return nft.Receipt{}, err
		}
	}
	for _, b := range c.Bind {
		b.Comment = ""
		m.bindings[b] = true
	}
	if c.PodNetworks != nil {
		m.networks = c.PodNetworks
	}
	if c.Tunnels != nil {
		m.tunnels = *c.Tunnels
	}
	if c.PodToHost != nil {
		m.toHost = *c.PodToHost
	}
	if c.HostPorts != nil {
		m.ports = c.HostPorts
	}
	m.drops = append(m.drops, c.Delta.Drops...)
	m.writes++
	m.seq++
	return nft.Receipt{Seq: m.seq, Generation: uint32(m.seq), Transactions: len(c.Delta.Steps)}, nil
}

func (m *memoryTable) apply(ops []policy.Op) error {
	for _, o := range ops {
		v, found := m.tables[o.Key]
		switch {
		case o.Delete && !found:
			return fmt.Errorf("delete %+v: not there", o.Key)
		case o.Delete:
			delete(m.tables, o.Key)
		case found && v != o.Value:
			return fmt.Errorf("add %+v: there with another value", o.Key)
		default:
			m.tables[o.Key] = o.Value
		}
	}
	return nil
}

func (m *memoryTable) Finish(context.Context, uint64) error {
	drops := m.drops
	m.drops = nil
	return m.apply(drops)
}

func (m *memoryTable) Port() uint32 { return 1 }
func (m *memoryTable) Close() error { return nil }

// startLoop runs a loop over table in a synctest bubble until the test ends.
func startLoop(t *testing.T, table *memoryTable, change func(*loop)) (*loop, context.Context) {
	ctx, cancel := context.WithCancel(t.Context())
	cfg, err := Config{Node: "n1", RunDir: "/run/x", StateDir: "/var/x"}.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	l := newLoop(cfg, slog.New(slog.DiscardHandler), table)
	l.grace = func(context.Context) error { return nil }
	if change != nil {
		change(l)
	}
	done := make(chan struct{})
	go func() { _ = l.run(ctx); close(done) }()
	t.Cleanup(func() { cancel(); <-done })
	return l, ctx
}

func denyAll(ns string) policy.Policy {
	return policy.Policy{
		ID:   policy.PolicyID{Kind: "NetworkPolicy", Name: policy.Name{Namespace: ns, Name: "deny"}},
		Tier: policy.TierNamespaced, Subject: policy.PodSelector{Namespace: ns}, Applies: [2]bool{true, false}, Isolates: true,
	}
}

var shopCluster = &policy.Cluster{
	Namespaces: []policy.Namespace{{Name: "shop"}},
	Pods:       []policy.Pod{{Name: web, UID: "u1", Node: "n1"}},
	Policies:   []policy.Policy{denyAll("shop")},
}

func (m *memoryTable) isolated(a string) bool {
	_, ok := m.tables[policy.Key{Map: policy.IsolatedIngress, Addr: addr(a)}]
	return ok
}

func TestAttachWaitsForTheSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table := newMemoryTable()
		l, ctx := startLoop(t, table, nil)
		answered := make(chan *cni.Error, 1)
		go func() {
			_, err := l.attach(ctx, attachmentOf("shop", "web", "u1", "nft000000000001", "10.0.0.1"))
			answered <- err
		}()
		synctest.Wait()
		if len(table.bindings) != 0 {
			t.Fatal("bound before the source gave its state")
		}
		_ = l.send(ctx, l.replace(shopCluster, nil))
		if err := <-answered; err != nil {
			t.Fatalf("attach: %v", err)
		}
		if !table.isolated("10.0.0.1") || len(table.bindings) != 1 {
			t.Errorf("attach answered, isolated %v, bindings %v; want the policy in force and one binding", table.isolated("10.0.0.1"), table.bindings)
		}
	})
}

func TestAttachWaitsForItsPod(t *testing.T) {
	tests := []struct {
		name   string
		appear *policy.Pod
		code   uint
	}{
		{name: "the pod appears", appear: &policy.Pod{Name: web, UID: "u2", Node: "n1"}},
		{name: "only a namesake appears", appear: &policy.Pod{Name: web, UID: "u3", Node: "n1"}, code: codeTryAgain},
		{name: "nothing appears", code: codeTryAgain},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l, ctx := startLoop(t, newMemoryTable(), func(l *loop) { l.waitForPods = true })
				_ = l.send(ctx, l.replace(shopCluster, nil))
				began := time.Now()
				if tt.appear != nil {
					time.AfterFunc(time.Second, func() { _ = l.send(ctx, l.apply([]policy.Event{{Pod: tt.appear}}, nil)) })
				}
				_, err := l.attach(ctx, attachmentOf("shop", "web", "u2", "nft000000000001", "10.0.0.1"))
				switch {
				case tt.code == 0 && err != nil:
					t.Errorf("attach: %v", err)
				case tt.code != 0 && (err == nil || err.Code != tt.code):
					t.Errorf("attach: %+v, want code %d", err, tt.code)
				case tt.code == 0 && time.Since(began) != time.Second:
					t.Errorf("attach took %v, want to answer when the pod appears", time.Since(began))
				case tt.code != 0 && time.Since(began) != 10*time.Second:
					t.Errorf("attach gave up after %v, want podWait", time.Since(began))
				}
			})
		})
	}
}

func TestDetach(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table := newMemoryTable()
		var log bytes.Buffer
		l, ctx := startLoop(t, table, func(l *loop) { l.log = slog.New(slog.NewTextHandler(&log, nil)) })
		_ = l.send(ctx, l.replace(shopCluster, nil))
		a := attachmentOf("shop", "web", "u1", "nft000000000001", "10.0.0.1", "fd00::1")
		if _, err := l.attach(ctx, a); err != nil {
			t.Fatalf("attach: %v", err)
		}
		for _, r := range []cni.DetachRequest{
			{ContainerID: "another", Interface: "eth0", HostInterface: a.HostInterface},
			{ContainerID: a.ContainerID, Interface: "eth0", HostInterface: "nft00000000000f"},
		} {
			if err := l.detach(ctx, r); err != nil {
				t.Errorf("detach %+v: %v, want success", r, err)
			}
			if len(table.bindings) != 2 {
				t.Errorf("detach %+v took the bindings of another attachment", r)
			}
		}
		for range 2 { // the second time there is nothing left
			if err := l.detach(ctx, cni.DetachRequest{ContainerID: a.ContainerID, Interface: "eth0", HostInterface: a.HostInterface}); err != nil {
				t.Errorf("detach: %v", err)
			}
		}
		synctest.Wait()
		if len(table.bindings) != 0 || len(table.tables) != 0 {
			t.Errorf("after detach: bindings %v, elements %v", table.bindings, table.tables)
		}
		said := ""
		_ = l.do(ctx, func() { said = log.String() })
		if strings.Count(said, "msg=detached") != 1 {
			t.Errorf("one attachment, logged as:\n%s", said)
		}
	})
}

func TestRestartWritesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table := newMemoryTable()
		l, ctx := startLoop(t, table, nil)
		_ = l.send(ctx, l.replace(shopCluster, nil))
		a := attachmentOf("shop", "web", "u1", "nft000000000001", "10.0.0.1", "fd00::1")
		if _, err := l.attach(ctx, a); err != nil {
			t.Fatalf("attach: %v", err)
		}
		synctest.Wait()
		writes, before := table.writes, maps.Clone(table.tables)
		next, ctx := startLoop(t, table, func(l *loop) { l.inv.attach(a) })
		_ = next.send(ctx, next.replace(shopCluster, nil))
		synctest.Wait()
		if table.writes != writes || !maps.Equal(table.tables, before) {
			t.Errorf("a restart with nothing changed wrote %d changes", table.writes-writes)
		}
	})
}

func TestFailedApplyIsRepaired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table := newMemoryTable()
		l, ctx := startLoop(t, table, nil)
		_ = l.send(ctx, l.replace(&policy.Cluster{Namespaces: shopCluster.Namespaces}, nil))
		if _, err := l.attach(ctx, attachmentOf("shop", "web", "", "nft000000000001", "10.0.0.1")); err != nil {
			t.Fatalf("attach: %v", err)
		}
		table.fail = errors.New("interrupted system call")
		deny := denyAll("shop")
		_ = l.send(ctx, l.apply([]policy.Event{{Policy: &deny}}, nil))
		synctest.Wait()
		if !table.isolated("10.0.0.1") {
			t.Error("the policy is not in force after the repair")
		}
		st, err := l.status(ctx)
		if err != nil || !st.Ready {
			t.Errorf("status: ready %v (%s), %v", st.Ready, st.Reason, err)
		}
	})
}

func TestAttachRefusesAnAddressInUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, ctx := startLoop(t, newMemoryTable(), nil)
		_ = l.send(ctx, l.replace(shopCluster, nil))
		first := attachmentOf("shop", "web", "u1", "nft000000000001", "10.0.0.1")
		second := attachmentOf("shop", "db", "u2", "nft000000000002", "10.0.0.1")
		if _, err := l.attach(ctx, first); err != nil {
			t.Fatalf("attach: %v", err)
		}
		if _, err := l.attach(ctx, second); err == nil {
			t.Error("attach bound one address to two interfaces")
		}
		if _, err := l.attach(ctx, first); err != nil {
			t.Errorf("the same attach again: %v, want a no-op", err)
		}
	})
}

func TestFinishedPodIsClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table := newMemoryTable()
		l, ctx := startLoop(t, table, nil)
		_ = l.send(ctx, l.replace(shopCluster, nil))
		if _, err := l.attach(ctx, attachmentOf("shop", "web", "u1", "nft000000000001", "10.0.0.1")); err != nil {
			t.Fatalf("attach: %v", err)
		}
		done := policy.Pod{Name: web, UID: "u1", Node: "n1", Finished: true}
		_ = l.send(ctx, l.apply([]policy.Event{{Pod: &done}}, nil))
		synctest.Wait()
		if len(table.bindings) != 0 {
			t.Errorf("a finished pod is still bound: %v", table.bindings)
		}
		again := policy.Pod{Name: web, UID: "u1", Node: "n1"}
		_ = l.send(ctx, l.apply([]policy.Event{{Pod: &again}}, nil))
		synctest.Wait()
		if len(table.bindings) != 1 || !table.isolated("10.0.0.1") {
			t.Errorf("a pod that runs again: bindings %v, isolated %v", table.bindings, table.isolated("10.0.0.1"))
		}
	})
}

func TestCheckLabels(t *testing.T) {
	for _, tt := range []struct {
		name, key, value string
		ok               bool
	}{
		{"plain", "app", "web", true}, {"prefixed", "example.com/app", "", true},
		{"two slashes", "app/b/c", "x", false}, {"blank", "app", "z z", false}, {"NUL", "app", "a\x00b", false},
	} {
		if err := checkLabels(map[string]string{tt.key: tt.value}); (err == nil) != tt.ok {
			t.Errorf("%s: checkLabels(%q: %q) = %v, want ok %v", tt.name, tt.key, tt.value, err, tt.ok)
		}
	}
}
