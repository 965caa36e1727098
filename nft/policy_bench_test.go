package nft_test

import (
	"context"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
	"github.com/nftcni/nftcni/policy/policytest"
)

// BenchmarkPolicyEvent is a policy that is deleted and created, from the event to the kernel's acknowledgement, at
// 50,000 pods and 10,000 policies: every other policy selects pods of this node. The grace period and the deletion of
// what is left over come after the new policy is in force, and are not in the figure. p50-cpu-us is the thread's CPU time,
// the kernel's part of the commits included.
func BenchmarkPolicyEvent(b *testing.B) {
	namespace(b)
	ctx := context.Background()
	table, err := nft.Open(ctx, nft.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = table.Close() }()
	s := policytest.Shape{Pods: 50000, Policies: 10000, Namespaces: 1000, Local: 250}
	e := policy.NewEngine("here")
	commit := func(d policy.Delta) {
		r, err := table.Apply(ctx, nft.Change{Delta: d})
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := table.Finish(ctx, r.Seq); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
	commit(e.Replace(s.Cluster()))
	runtime.GC()
	var wall, cpu []time.Duration
	b.ResetTimer()
	for i := range b.N {
		p := s.Policy(i / 2 * 7919 % s.Policies)
		if i/2%2 == 0 {
			p = s.Policy(i / 4 % (s.Policies * s.Local / s.Pods))
		}
		ev := policy.Event{Policy: &p, Delete: i%2 == 0}
		began, beganCPU := time.Now(), threadCPU(b)
		r, err := table.Apply(ctx, nft.Change{Delta: e.Apply(ev)})
		if err != nil {
			b.Fatal(err)
		}
		wall, cpu = append(wall, time.Since(began)), append(cpu, threadCPU(b)-beganCPU)
		b.StopTimer()
		if err := table.Finish(ctx, r.Seq); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
	b.StopTimer()
	percentiles(b, wall)
	at := func(p int) float64 { return float64(cpu[len(cpu)*p/100].Nanoseconds()) / 1000 }
	slices.Sort(cpu)
	b.ReportMetric(at(50), "p50-cpu-us")
	b.ReportMetric(at(99), "p99-cpu-us")
}

func threadCPU(b *testing.B) time.Duration {
	b.Helper()
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t); err != nil {
		b.Fatal(err)
	}
	return time.Duration(t.Nano())
}
