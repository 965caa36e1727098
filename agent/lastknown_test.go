package agent

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/nftcni/nftcni/cni"
	"github.com/nftcni/nftcni/policy"
)

// everyField has each field of the model set, nil and empty lists told apart.
func everyField() *policy.Cluster {
	all, none := []policy.Peer(nil), []policy.Peer{}
	rules := []policy.Rule{
		{Action: policy.Deny, Log: true, Peers: all, NotPeers: none, Ports: []policy.PortMatch{{Protocol: policy.SCTP, First: 1, Last: 65535}, {Name: "http", Protocol: policy.TCP}}},
		{Action: policy.Pass, Peers: none, NotPorts: []policy.PortMatch{{}}},
		{Peers: []policy.Peer{
			{Block: &policy.Block{CIDR: netip.MustParsePrefix("10.0.0.0/8"), Except: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}}},
			{Pods: &policy.PodSelector{Namespaces: policy.Selector{Requirements: []policy.Requirement{{Key: "a", Op: policy.DoesNotExist}}}, Pods: policy.Selector{Requirements: []policy.Requirement{{Key: "b", Op: policy.NotIn, Values: []string{"x", "z"}}}}}},
		}},
	}
	p := denyAll("shop")
	p.Generation, p.Order, p.Rules = 3, -4, [2][]policy.Rule{rules, nil}
	return &policy.Cluster{
		Namespaces: []policy.Namespace{{Name: "shop", Labels: labels("x", "z")}, {Name: "empty"}},
		Nodes: []policy.Node{{Name: "n1", Labels: labels("zone", "a"), Addrs: []netip.Addr{addr("192.0.2.1"), addr("fd01::1")},
			PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24"), netip.MustParsePrefix("fd00::/64")}, PublicKey: "0:k"}},
		Policies: []policy.Policy{p},
		Pods: []policy.Pod{
			{Name: web, UID: "u1", Node: "n1", Labels: labels("app", "wéb\"\n"), Addrs: []netip.Addr{addr("10.0.0.1"), addr("fd00::1")},
				Ports: []policy.NamedPort{{Name: "http", Protocol: policy.TCP, Port: 80}}, Created: -7, HostNetwork: true, Finished: true, Attached: true},
			{Name: policy.Name{Namespace: "shop", Name: "db"}},
		},
	}
}

func lastKnownOf(c *policy.Cluster) *lastKnown {
	v := newInventory("n1", NetworkRouted)
	v.load(c)
	return v.lastKnown(time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC))
}

var sameCluster = cmp.Options{
	cmp.Comparer(func(a, b policy.Labels) bool { return a == b }), cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{}),
	cmpopts.SortSlices(func(a, b policy.Namespace) bool { return a.Name < b.Name }),
	cmpopts.SortSlices(func(a, b policy.Pod) bool { return a.Name.String() < b.Name.String() }),
}

func TestLastKnownFile(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "not", "yet", "there")
	if k, err := loadLastKnown(dir); k != nil || err != nil {
		t.Fatalf("no file: %v, %v", k, err)
	}
	for range 2 { // the second replaces the first
		if err := lastKnownOf(everyField()).save(dir); err != nil {
			t.Fatal(err)
		}
	}
	k, err := loadLastKnown(dir)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(everyField(), k.cluster(), sameCluster); diff != "" || k.node != "n1" || !k.at.Equal(time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)) {
		t.Errorf("of %s at %v (-want +got):\n%s", k.node, k.at, diff)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("files left: %v, %v", entries, err)
	}
	if info, err := os.Stat(filepath.Join(dir, lastKnownName)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
}

func TestLastKnownDamage(t *testing.T) {
	var good bytes.Buffer
	if err := lastKnownOf(everyField()).write(&good); err != nil {
		t.Fatal(err)
	}
	text := good.String()
	tests := []struct{ name, content, want string }{
		{"empty", "", "cut off"},
		{"torn in a line", text[:len(text)/2], "cut off"},
		{"torn between lines", text[:strings.LastIndex(text[:len(text)-1], "\n")+1], "cut off"},
		{"a changed letter", strings.Replace(text, "shop", "shoq", 1), "checksum"},
		{"a line lost", strings.Replace(text, strings.SplitAfter(text, "\n")[1], "", 1), "checksum"},
		{"twice", text + text, "content after the end"},
		{"another version", strings.Replace(text, `"version":1`, `"version":9`, 1), "version 9"},
		{"unknown field", `{"version":1,"x":1}` + "\n", "unknown field"},
		{"no JSON", "\x00\xff\n", "line 1"},
		{"nothing but zeros", strings.Repeat("\x00", 4096), "cut off"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			name := filepath.Join(dir, lastKnownName)
			if err := os.WriteFile(name, []byte(tt.content), 0o600); err != nil {
				t.Fatal(err)
			}
			if k, err := loadLastKnown(dir); k != nil || err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), name) {
				t.Errorf("got %v, %v, want an error with %q", k, err, tt.want)
			}
			if b, err := os.ReadFile(name + ".corrupt"); err != nil || string(b) != tt.content {
				t.Errorf("set aside: %q, %v", b, err)
			}
			if k, err := loadLastKnown(dir); k != nil || err != nil {
				t.Errorf("again: %v, %v", k, err)
			}
		})
	}
}

// TestLastKnownInForce: with a silent source the pods of this node are enforced by the
// last known objects, new ones wait, and the source's own state loses nothing.
func TestLastKnownInForce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table, dir := newMemoryTable(), t.TempDir()
		listed := *shopCluster
		listed.Pods = append([]policy.Pod{{Name: policy.Name{Namespace: "shop", Name: "new"}, UID: "u2", Node: "n1"}}, shopCluster.Pods...)
		if err := lastKnownOf(&listed).save(dir); err != nil {
			t.Fatal(err)
		}
		served := 0
		l, ctx := startLoop(t, table, func(l *loop) {
			l.waitForPods, l.cfg.StateDir, l.serving = true, dir, func() { served++ }
			l.inv.attach(attachmentOf("shop", "web", "u1", "nft000000000001", "10.0.0.1"))
		})
		go func() { _ = keepLastKnown(ctx, l, slog.New(slog.DiscardHandler)) }()
		answered := make(chan *cni.Error, 1)
		go func() {
			_, err := l.attach(ctx, attachmentOf("shop", "new", "u2", "nft000000000002", "10.0.0.2"))
			answered <- err
		}()
		synctest.Wait()
		early := 0
		_ = l.do(ctx, func() { early = table.writes }) // the loop's own: it writes next when a timer fires
		if early != 0 {
			t.Fatalf("%d writes before the source had time to answer", early)
		}
		time.Sleep(sourcePatience)
		synctest.Wait()
		if len(table.bindings) != 1 || !table.isolated("10.0.0.1") || served != 0 {
			t.Errorf("bindings %v, isolated %v, served %d times", table.bindings, table.isolated("10.0.0.1"), served)
		}
		if s, err := l.status(ctx); err != nil || !s.Ready || len(s.Problems) != 1 || !strings.Contains(s.Problems[0].Effect, "2026-01-02T03:04:05Z") {
			t.Errorf("status %v, %v: %+v", err, s.Ready, s.Problems)
		}
		select {
		case err := <-answered:
			t.Errorf("a new pod did not wait: %v", err)
		default:
		}
		writes := table.writes
		_ = l.send(ctx, l.replace(&listed, nil))
		synctest.Wait()
		if err := <-answered; err != nil {
			t.Errorf("attach after the source answered: %v", err)
		}
		if !table.isolated("10.0.0.1") || !table.isolated("10.0.0.2") || served != 1 || table.writes != writes+1 {
			t.Errorf("after the source: isolated %v and %v, served %d, %d writes", table.isolated("10.0.0.1"), table.isolated("10.0.0.2"), served, table.writes-writes)
		}
	})
}

// TestLastKnownOlderThanTable: what a predecessor wrote into the kernel is newer than
// the file, unless somebody deletes it.
func TestLastKnownOlderThanTable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table, dir := newMemoryTable(), t.TempDir()
		a := attachmentOf("shop", "web", "u1", "nft000000000001", "10.0.0.1")
		for _, b := range bindings(a) {
			b.Comment = ""
			table.bindings[b] = true
		}
		if err := lastKnownOf(shopCluster).save(dir); err != nil {
			t.Fatal(err)
		}
		l, ctx := startLoop(t, table, func(l *loop) {
			l.waitForPods, l.cfg.StateDir = true, dir
			l.inv.attach(a)
			l.reopen = func(context.Context) (dataplane, error) { return table, nil }
		})
		go func() { _ = keepLastKnown(ctx, l, slog.New(slog.DiscardHandler)) }()
		time.Sleep(2 * sourcePatience)
		synctest.Wait()
		if s, err := l.status(ctx); err != nil || table.writes != 0 || s.Ready || len(s.Problems) != 1 {
			t.Errorf("%v: %d writes, ready %v, problems %v", err, table.writes, s.Ready, s.Problems)
		}
		_ = l.send(ctx, func(b *batch) { clear(table.bindings); b.replace, b.reopen = true, true })
		synctest.Wait()
		if len(table.bindings) != 1 || !table.isolated("10.0.0.1") {
			t.Errorf("table deleted: bindings %v, isolated %v", table.bindings, table.isolated("10.0.0.1"))
		}
	})
}

// TestLastKnownKept: the file follows the source, one write for a storm of changes.
func TestLastKnownKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table, dir := newMemoryTable(), t.TempDir()
		l, ctx := startLoop(t, table, func(l *loop) { l.waitForPods, l.cfg.StateDir = true, dir })
		go func() { _ = keepLastKnown(ctx, l, slog.New(slog.DiscardHandler)) }()
		_ = l.send(ctx, l.replace(shopCluster, nil))
		synctest.Wait()
		for i := range 100 {
			_ = l.send(ctx, l.apply([]policy.Event{{Namespace: &policy.Namespace{Name: string(rune('a' + i))}}}, nil))
		}
		synctest.Wait()
		if k, err := loadLastKnown(dir); err != nil || len(k.cluster().Namespaces) != 1 {
			t.Errorf("before the interval: %v, %v", k, err)
		}
		time.Sleep(lastKnownInterval)
		synctest.Wait()
		k, err := loadLastKnown(dir)
		if err != nil || len(k.cluster().Namespaces) != 101 {
			t.Fatalf("after the interval: %v, %v", k, err)
		}
		info, err := os.Stat(filepath.Join(dir, lastKnownName))
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * lastKnownInterval)
		synctest.Wait()
		if again, err := os.Stat(filepath.Join(dir, lastKnownName)); err != nil || !os.SameFile(info, again) {
			t.Errorf("written again without a change: %v", err)
		}
	})
}

// BenchmarkLastKnownSave writes a cluster of 10,000 pods and 1,000 policies.
func BenchmarkLastKnownSave(b *testing.B) {
	c := everyField()
	for i := range 1000 {
		p := c.Policies[0]
		p.ID.Name.Name = fmt.Sprint("policy-", i)
		c.Policies = append(c.Policies, p)
	}
	for i := range 10000 {
		p := c.Pods[0]
		p.Name.Name = fmt.Sprint("pod-", i)
		c.Pods = append(c.Pods, p)
	}
	k, dir := lastKnownOf(c), b.TempDir()
	for b.Loop() {
		if err := k.save(dir); err != nil {
			b.Fatal(err)
		}
	}
}
