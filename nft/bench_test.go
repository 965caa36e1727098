package nft_test

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
)

func benchTable(b *testing.B, pods int) *nft.Table {
	b.Helper()
	namespace(b)
	table, err := nft.Open(context.Background(), nft.Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = table.Close() })
	if _, err := table.Apply(context.Background(), nft.Change{Delta: policy.Delta{Steps: [][]policy.Op{manyPods(pods)}}}); err != nil {
		b.Fatal(err)
	}
	return table
}

// BenchmarkApply is one event of a remote pod with so many others there, from delta to the kernel's acknowledgement:
// its address appears or goes. p50-us is the figure of the issue; B/op and allocs/op are ours alone.
func BenchmarkApply(b *testing.B) {
	for _, pods := range []int{1000, 10_000, 100_000} {
		b.Run(fmt.Sprintf("pods=%d", pods), func(b *testing.B) {
			table := benchTable(b, pods)
			k := policy.Key{Map: policy.PodID, Addr: podAddr(pods + 1)}
			var took []time.Duration
			b.ReportAllocs()
			b.ResetTimer()
			for i := range b.N {
				op := put(k, policy.IdentityFirst)
				op.Delete = i%2 == 1
				r, err := table.Apply(context.Background(), nft.Change{Delta: policy.Delta{Steps: [][]policy.Op{{op}}}})
				if err != nil {
					b.Fatal(err)
				}
				took = append(took, r.Took)
			}
			b.StopTimer()
			percentiles(b, took)
		})
	}
}

// BenchmarkAttach is what ADD commits for one local pod: identity, profile and isolation in one step, repointed in a
// second with its binding.
func BenchmarkAttach(b *testing.B) {
	table := benchTable(b, 10_000)
	const a = "10.200.0.1"
	bind := []nft.Binding{{Interface: "nft0123456789ab", Addr: addr(a), Masquerade: true, Comment: "shop/web"}}
	keys := []policy.Key{podID(a), ingressOf(a), egressOf(a), isolated(a)}
	var took []time.Duration
	b.ResetTimer()
	for range b.N {
		var add, remove []policy.Op
		for _, k := range keys {
			add, remove = append(add, put(k, 7)), append(remove, del(k))
		}
		r, err := table.Apply(context.Background(), nft.Change{Delta: policy.Delta{Steps: [][]policy.Op{add}}, Bind: bind})
		if err != nil {
			b.Fatal(err)
		}
		took = append(took, r.Took)
		if _, err := table.Apply(context.Background(), nft.Change{Unbind: bind, Delta: policy.Delta{Steps: [][]policy.Op{remove}}}); err != nil {
			b.Fatal(err)
		}
		if err := table.Finish(context.Background(), r.Seq+1); err != nil {
			b.Fatal(err)
		}
	}
	b.StopTimer()
	percentiles(b, took)
}

// BenchmarkLoad is a table filled in one transaction.
func BenchmarkLoad(b *testing.B) {
	for _, n := range []int{10_000, 100_000} {
		b.Run(fmt.Sprintf("elements=%d", n), func(b *testing.B) {
			table := benchTable(b, 0)
			add := manyPods(n)
			remove := manyPods(n)
			for i := range remove {
				remove[i].Delete = true
			}
			var took []time.Duration
			b.ResetTimer()
			for range b.N {
				r, err := table.Apply(context.Background(), nft.Change{Delta: policy.Delta{Steps: [][]policy.Op{add}}})
				if err != nil {
					b.Fatal(err)
				}
				took = append(took, r.Took)
				b.StopTimer()
				if _, err := table.Apply(context.Background(), nft.Change{Delta: policy.Delta{Steps: [][]policy.Op{remove}}}); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
			b.StopTimer()
			percentiles(b, took)
		})
	}
}

func percentiles(b *testing.B, took []time.Duration) {
	slices.Sort(took)
	at := func(p int) float64 { return float64(took[len(took)*p/100].Nanoseconds()) / 1000 }
	b.ReportMetric(at(50), "p50-us")
	b.ReportMetric(at(99), "p99-us")
}

// BenchmarkHostPort is what a pod's host port adds to a change: coming, and going with the grace period's work left out.
// UDP reads conntrack's table, whose size the run prints.
func BenchmarkHostPort(b *testing.B) {
	for _, p := range []policy.Protocol{policy.TCP, policy.UDP} {
		b.Run(p.String(), func(b *testing.B) {
			table := benchTable(b, 1000)
			port := hostPort(p, "0.0.0.0", 8080, "10.0.0.1", 80)
			var took []time.Duration
			for i := range b.N {
				c := nft.Change{HostPorts: []nft.HostPort{port}}
				if i%2 == 1 {
					c.HostPorts = []nft.HostPort{}
				}
				r, err := table.Apply(context.Background(), c)
				if err != nil {
					b.Fatal(err)
				}
				if i%2 == 0 {
					took = append(took, r.Took)
				}
			}
			b.StopTimer()
			percentiles(b, took)
			if n, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_buckets"); err == nil {
				b.Logf("%s buckets", strings.TrimSpace(string(n)))
			}
		})
	}
}
