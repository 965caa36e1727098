package nft_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
)

func state(t testing.TB, table *nft.Table) nft.State {
	t.Helper()
	s, err := table.State(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// podAddr is the i-th address of 10.0.0.0/8.
func podAddr(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
}

func manyPods(n int) []policy.Op {
	ops := make([]policy.Op, n)
	for i := range ops {
		ops[i] = put(policy.Key{Map: policy.PodID, Addr: podAddr(i)}, policy.IdentityFirst+uint32(i%100))
	}
	return ops
}

// TestKernelReadBack: elements beyond 64 KiB of attribute are all there.
func TestKernelReadBack(t *testing.T) {
	for _, n := range []int{5000, 100_000} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			if os.Getenv("NFTCNI_REEXEC") != "" {
				t.Skip("a user namespace may not force the socket buffers that a batch of this size needs")
			}
			namespace(t)
			table := open(t, nft.Options{})
			ops := manyPods(n)
			for i := range 2000 {
				a := netip.AddrFrom4([4]byte{172, 16, byte(i >> 6), byte(i << 2)})
				ops = append(ops, put(policy.Key{Map: policy.NetID, Addr: a, To: a.Next()}, policy.IdentityFirst+uint32(i)))
			}
			r, err := table.Apply(context.Background(), nft.Change{Delta: policy.Delta{Steps: [][]policy.Op{ops}}})
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%d elements in %v", r.Elements, r.Took)
			got := state(t, table).Tables
			if len(got) != len(ops) {
				t.Errorf("%d elements in the kernel, want %d", len(got), len(ops))
			}
			for _, o := range ops {
				if v, ok := got[o.Key]; !ok || v != o.Value {
					t.Fatalf("%+v: %#x, %v; want %#x", o.Key, v, ok, o.Value)
				}
			}
		})
	}
}

func TestKernelErrorsNameTheElement(t *testing.T) {
	namespace(t)
	table := open(t, nft.Options{})
	ctx := context.Background()
	ops := manyPods(3000)
	ops[1234] = del(policy.Key{Map: policy.PodID, Addr: podAddr(77_777)})
	_, err := table.Apply(ctx, nft.Change{Delta: policy.Delta{Steps: [][]policy.Op{ops}}})
	if err == nil || !nft.ErrMissing(err) || !strings.Contains(err.Error(), "delete pod_id4 10.1.47.209") {
		t.Errorf("deleting what is not there: %v", err)
	}
	if n := len(state(t, table).Tables); n != 0 {
		t.Errorf("%d elements of a failed transaction are in force", n)
	}
	ops[1234] = put(ops[1233].Key, 7)
	_, err = table.Apply(ctx, nft.Change{Delta: policy.Delta{Steps: [][]policy.Op{ops}}})
	if !errors.Is(err, unix.EEXIST) || !strings.Contains(err.Error(), "add pod_id4 10.0.4.209") {
		t.Errorf("adding another value: %v", err)
	}
	apply(t, table, nft.Change{Delta: policy.Delta{Steps: [][]policy.Op{manyPods(3)}}})
	for _, c := range []struct {
		name, message string
		change        nft.Change
	}{
		{"foreign interface", `interface "eth0"`, nft.Change{Bind: []nft.Binding{{Interface: "eth0", Addr: podAddr(1)}}}},
		{"long interface", "at most 15 bytes", nft.Change{Bind: []nft.Binding{{Interface: "nft0123456789abcdef", Addr: podAddr(1)}}}},
		{"masquerading without interface", "needs the pod's interface", nft.Change{Bind: []nft.Binding{{Addr: podAddr(1), Masquerade: true}}}},
		{"no address", "want an IPv4 or IPv6 address", nft.Change{Bind: []nft.Binding{{Interface: "nft0"}}}},
		{"host bits", "without host bits", nft.Change{PodNetworks: []netip.Prefix{netip.MustParsePrefix("10.0.0.1/8")}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := table.Apply(ctx, c.change); err == nil || !strings.Contains(err.Error(), c.message) {
				t.Errorf("error %v, want one with %q", err, c.message)
			}
		})
	}
}

func TestKernelAdoptOrReplace(t *testing.T) {
	needNft(t)
	for _, c := range []struct {
		name   string
		edit   string // by somebody else, while no agent runs
		writes bool
	}{
		{"nothing changed", "", false},
		{"foreign rule", "insert rule inet nftcni forward accept", true},
		{"rule removed", "flush chain inet nftcni from_pod", true},
		{"verdict changed", "delete element inet nftcni verdict { 0:2 }; add element inet nftcni verdict { 0:2 : return }", true},
		{"foreign set", "add set inet nftcni x { type ipv4_addr; }", true},
		{"pod's address not wired any more", "flush set inet nftcni wired4", true},
		{"foreign wired address", "add element inet nftcni wired4 { 1.2.3.4 }", true},
		{"local address gone", "flush set inet nftcni local4", true},
		{"foreign local address", "add element inet nftcni local4 { 1.2.3.4 }", true},
		{"foreign chain", "add chain inet nftcni x", true},
		{"epoch gone", "flush set inet nftcni epoch", true},
		{"table gone", "delete table inet nftcni", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			namespace(t)
			table := open(t, nft.Options{})
			bind := []nft.Binding{{Interface: "nft0", Addr: podAddr(1), Comment: "a/b"}}
			apply(t, table, nft.Change{Delta: policy.Delta{Steps: [][]policy.Op{manyPods(10)}}, Bind: bind})
			before := state(t, table)
			if err := table.Close(); err != nil {
				t.Fatal(err)
			}
			if c.edit != "" {
				nftFile(t, strings.ReplaceAll(c.edit, "; add", "\nadd")+"\n")
			}
			edited := generation(t)
			again := open(t, nft.Options{})
			after := state(t, again)
			if wrote := after.Generation != edited; wrote != c.writes {
				t.Errorf("opening wrote %v, want %v", wrote, c.writes)
			}
			if c.name == "table gone" {
				if after.Epoch == before.Epoch || len(after.Tables) != 0 {
					t.Errorf("a fresh table has epoch %#x and %d elements", after.Epoch, len(after.Tables))
				}
				return
			}
			if len(after.Tables) != 10 || len(after.Bindings) != 1 {
				t.Errorf("elements were lost: %+v", after)
			}
			if c.name != "epoch gone" && after.Epoch != before.Epoch {
				t.Errorf("epoch %#x, was %#x", after.Epoch, before.Epoch)
			}
			if err := again.Close(); err != nil {
				t.Fatal(err)
			}
			third := open(t, nft.Options{})
			if s := state(t, third); s.Generation != after.Generation {
				t.Error("the mended table was not adopted as it is")
			}
		})
	}
}

func generation(t *testing.T) uint32 {
	t.Helper()
	r, err := nft.CurrentGeneration(context.Background(), nft.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestKernelEpochOutlivesCrash: the second bump of a revocation is made by whoever adopts the table.
func TestKernelEpochOutlivesCrash(t *testing.T) {
	namespace(t)
	table := open(t, nft.Options{})
	first := state(t, table).Epoch
	apply(t, table, nft.Change{Delta: policy.Delta{Revokes: true}})
	bumped := state(t, table).Epoch
	if bumped == first {
		t.Error("a revocation left the epoch")
	}
	apply(t, table, nft.Change{Delta: policy.Delta{Steps: [][]policy.Op{manyPods(1)}}})
	if e := state(t, table).Epoch; e != bumped {
		t.Error("a change that only adds changed the epoch")
	}
	_ = table.Close() // before Finish
	adopted := open(t, nft.Options{})
	s := state(t, adopted)
	if s.Epoch == bumped {
		t.Error("nobody made the second bump")
	}
	_ = adopted.Close()
	if e := state(t, open(t, nft.Options{})).Epoch; e != s.Epoch {
		t.Error("the bump was made again")
	}
}

func TestKernelOwner(t *testing.T) {
	needNft(t)
	namespace(t)
	var said strings.Builder
	log := slog.New(slog.NewTextHandler(&said, nil))
	table := open(t, nft.Options{Owner: true, Log: log})
	if strings.Contains(said.String(), "owner,persist") {
		t.Skip("this kernel has no table flags owner,persist (Linux 6.9)")
	}
	apply(t, table, nft.Change{Delta: policy.Delta{Steps: [][]policy.Op{manyPods(1)}}})
	runNft(t, "flush", "ruleset")
	if len(state(t, table).Tables) != 1 {
		t.Error("a foreign flush emptied the owned table")
	}
	if _, err := nft.Open(context.Background(), nft.Options{}); err == nil || !strings.Contains(err.Error(), "another process owns it") {
		t.Errorf("a second owner: %v", err)
	}
	g := state(t, table).Generation
	f, err := table.File()
	if err != nil {
		t.Fatal(err)
	}
	_ = table.Close()
	heir := open(t, nft.Options{Owner: true, Socket: f, Log: log})
	if s := state(t, heir); s.Generation != g || len(s.Tables) != 1 {
		t.Errorf("taking over the socket wrote: generation %d, was %d", s.Generation, g)
	}
	_ = f.Close()
	_ = heir.Close() // now it is an orphan
	orphan := open(t, nft.Options{Owner: true, Log: log})
	if len(state(t, orphan).Tables) != 1 {
		t.Error("the table did not persist")
	}
	apply(t, orphan, nft.Change{Delta: policy.Delta{Steps: [][]policy.Op{{del(policy.Key{Map: policy.PodID, Addr: podAddr(0)})}}}})
	_ = orphan.Close()
	if err := nft.Delete(context.Background(), nft.Options{}); err != nil {
		t.Error(err)
	}
}

func TestKernelWatch(t *testing.T) {
	needNft(t)
	namespace(t)
	ns, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	o := nft.Options{NetNS: int(ns.Fd())}
	table := open(t, o)
	ctx, cancel := context.WithCancel(context.Background())
	events := make(chan nft.Foreign, 16)
	var wg sync.WaitGroup
	var watchErr error
	wg.Go(func() {
		watchErr = nft.Watch(ctx, nft.Options{NetNS: o.NetNS, Port: table.Port()}, func(f nft.Foreign) { events <- f })
	})
	// A commit of somebody else to our table; repeated until the watcher is there.
	eventually(t, "the watcher sees a foreign commit", func() bool {
		runNft(t, "add", "element", "inet", nft.TableName, "local4", "{ 10.0.0.1 }")
		runNft(t, "delete", "element", "inet", nft.TableName, "local4", "{ 10.0.0.1 }")
		return len(events) > 0
	})
	f := <-events
	if f.Comm != "nft" || f.Deleted || f.Resync {
		t.Errorf("event %+v, want a change by nft", f)
	}
	for len(events) > 0 {
		<-events
	}
	apply(t, table, nft.Change{Delta: policy.Delta{Steps: [][]policy.Op{manyPods(3)}, Revokes: true}})
	runNft(t, "add", "table", "ip", "other")
	runNft(t, "delete", "table", "inet", nft.TableName)
	for f = range events {
		if f.Comm != "nft" {
			t.Errorf("own commit reported: %+v", f)
		}
		if f.Deleted {
			break
		}
	}
	cancel()
	wg.Wait()
	if watchErr != nil {
		t.Error(watchErr)
	}
}

// TestKernelConflicts: a key whose drop is still owed can come back at once.
func TestKernelConflicts(t *testing.T) {
	namespace(t)
	table := open(t, nft.Options{})
	k := others(profileWeb)
	apply(t, table, nft.Change{Delta: policy.Delta{Steps: [][]policy.Op{{put(k, 1)}}}})
	r := apply(t, table, nft.Change{Delta: policy.Delta{Drops: []policy.Op{del(k)}}})
	apply(t, table, nft.Change{Delta: policy.Delta{Steps: [][]policy.Op{{put(k, 2)}}}})
	finish(t, table, r)
	if got := state(t, table).Tables; got[k] != 2 {
		t.Errorf("%v, want the second value", got)
	}
	p := ingressOf("10.0.0.1")
	steps := [][]policy.Op{{put(p, 1)}, {del(p), put(p, 2)}, {del(p), put(p, 3)}}
	apply(t, table, nft.Change{Delta: policy.Delta{Steps: steps}})
	if got := state(t, table).Tables; got[p] != 3 {
		t.Errorf("%v, want the third value", got)
	}
}

// TestKernelOwedDrops: what Finish will delete is no longer part of the state, and a foreign edit does not make it
// fail for ever.
func TestKernelOwedDrops(t *testing.T) {
	needNft(t)
	namespace(t)
	table := open(t, nft.Options{})
	k, other := podID("10.0.0.1"), podID("10.0.0.2")
	apply(t, table, nft.Change{Delta: policy.Delta{Steps: [][]policy.Op{{put(k, 1), put(other, 2)}}}})
	r := apply(t, table, nft.Change{Delta: policy.Delta{Drops: []policy.Op{del(k), del(other)}, Revokes: true}})
	if got := state(t, table).Tables; len(got) != 0 {
		t.Errorf("the state holds what is about to be deleted: %v", got)
	}
	runNft(t, "delete", "element", "inet", nft.TableName, "pod_id4", "{ 10.0.0.1 }")
	before := state(t, table).Epoch
	if err := table.Finish(context.Background(), r.Seq); !nft.ErrMissing(err) || !strings.Contains(err.Error(), "pod_id4 10.0.0.1") {
		t.Errorf("Finish after a foreign deletion: %v", err)
	}
	if got := state(t, table).Tables; len(got) != 1 {
		t.Errorf("what is left must show again: %v", got)
	}
	if err := table.Finish(context.Background(), r.Seq); err != nil {
		t.Errorf("Finish for the second time: %v", err)
	}
	if state(t, table).Epoch == before {
		t.Error("the second bump was forgotten")
	}
	r = apply(t, table, nft.Change{Delta: policy.Delta{Drops: []policy.Op{del(other)}}})
	finish(t, table, r)
}
