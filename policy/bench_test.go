package policy_test

import (
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/policy"
	"github.com/nftcni/nftcni/policy/policytest"
)

var compileShapes = []policytest.Shape{
	{Pods: 1000, Policies: 1000, Namespaces: 100, Local: 250},
	{Pods: 10000, Policies: 10000, Namespaces: 1000, Local: 250},
	{Pods: 100000, Policies: 100000, Namespaces: 10000, Local: 250},
	{Pods: 100000, Policies: 75000, Namespaces: 25000, Local: 250, PerPod: 100},
	{Pods: 100000, Policies: 75000, Namespaces: 25000, Local: 100000},
}

func BenchmarkCompile(b *testing.B) {
	for _, s := range compileShapes {
		b.Run(s.String(), func(b *testing.B) {
			c := s.Cluster()
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			var e *policy.Engine
			cpu := processCPU(b)
			for b.Loop() {
				e = policy.NewEngine("here")
				e.Replace(c)
			}
			b.ReportMetric((processCPU(b)-cpu).Seconds()*1e3/float64(b.N), "cpu-ms/op")
			runtime.GC()
			runtime.ReadMemStats(&after)
			b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/(1<<20), "MB-kept")
			b.ReportMetric(float64(len(e.Tables())), "elements")
			runtime.KeepAlive(c)
		})
	}
}

// BenchmarkEvent measures one event at scale: a remote pod's change of labels, a remote
// pod that comes and goes, a policy that comes and goes.
func BenchmarkEvent(b *testing.B) {
	for _, s := range []policytest.Shape{
		{Pods: 1000, Policies: 200, Namespaces: 100, Local: 50},
		{Pods: 10000, Policies: 2000, Namespaces: 1000, Local: 250},
		{Pods: 50000, Policies: 10000, Namespaces: 1000, Local: 250},
	} {
		for _, k := range eventKinds {
			b.Run(k.name+"/"+s.String(), func(b *testing.B) {
				e := policy.NewEngine("here")
				e.Replace(s.Cluster())
				events := k.events(s)
				ops, i := 0, 0
				runtime.GC()
				runtime.LockOSThread() // threadCPU is that of one thread
				defer runtime.UnlockOSThread()
				var wall, cpu []time.Duration
				for b.Loop() {
					began, beganCPU := time.Now(), threadCPU(b)
					d := e.Apply(events[i%len(events)])
					wall, cpu = append(wall, time.Since(began)), append(cpu, threadCPU(b)-beganCPU)
					for _, step := range d.Steps {
						ops += len(step)
					}
					i++
				}
				b.ReportMetric(float64(ops)/float64(i), "ops/op")
				for unit, d := range map[string][]time.Duration{"us": wall, "cpu-us": cpu} {
					slices.Sort(d)
					b.ReportMetric(float64(d[len(d)/2].Nanoseconds())/1e3, "p50-"+unit)
					b.ReportMetric(float64(d[len(d)*99/100].Nanoseconds())/1e3, "p99-"+unit)
				}
			})
		}
	}
}

var eventKinds = []struct {
	name   string
	events func(policytest.Shape) []policy.Event
}{
	{"remote-any", func(s policytest.Shape) []policy.Event {
		var out []policy.Event
		for i := range 2000 {
			p := s.Pod(s.Local + i*7919%(s.Pods-s.Local))
			q := p
			q.Labels = policy.MakeLabels(map[string]string{"app": "app2", "release": "r2"})
			out = append(out, policy.Event{Pod: &q}, policy.Event{Pod: &p, Delete: true}, policy.Event{Pod: &p})
		}
		return out
	}},
	{"remote-relabel", func(s policytest.Shape) []policy.Event {
		a, b := s.Pod(s.Peer()), s.Pod(s.Peer())
		b.Labels = policy.MakeLabels(map[string]string{"app": "app2", "release": "r2"})
		return []policy.Event{{Pod: &b}, {Pod: &a}}
	}},
	{"remote-come-go", func(s policytest.Shape) []policy.Event {
		a := s.Pod(s.Peer())
		return []policy.Event{{Pod: &a, Delete: true}, {Pod: &a}}
	}},
	{"local-come-go", func(s policytest.Shape) []policy.Event {
		a := s.Pod(1)
		return []policy.Event{{Pod: &a, Delete: true}, {Pod: &a}}
	}},
	{"policy-go-come", func(s policytest.Shape) []policy.Event {
		a := s.Policy(0)
		return []policy.Event{{Policy: &a, Delete: true}, {Policy: &a}}
	}},
	{"policy-any", func(s policytest.Shape) []policy.Event {
		var out []policy.Event
		for i := range 500 {
			p := s.Policy(i * 7919 % s.Policies)
			if i%2 == 0 {
				p = s.Policy(i % (s.Policies * s.Local / s.Pods)) // one that selects pods of this node
			}
			out = append(out, policy.Event{Policy: &p, Delete: true}, policy.Event{Policy: &p})
		}
		return out
	}},
}

func processCPU(b *testing.B) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// threadCPU leaves out what other processes and the collector's own threads took.
func threadCPU(b *testing.B) time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t); err != nil {
		b.Fatal(err)
	}
	return time.Duration(t.Nano())
}

// BenchmarkHalves is the worst case: all pods are of one class until a policy of one
// local pod tells half of them apart, and again when it is gone and Tidy merges them.
func BenchmarkHalves(b *testing.B) {
	for _, pods := range []int{1000, 10000, 50000} {
		s := policytest.Shape{Pods: pods, Namespaces: 100, Local: 1}
		b.Run(s.String(), func(b *testing.B) {
			c := s.Cluster()
			everyone := policy.Rule{Peers: []policy.Peer{{Pods: &policy.PodSelector{}}}}
			c.Policies = []policy.Policy{networkPolicy("ns0", "everyone", policy.Selector{}, policy.Ingress, everyone)}
			half := networkPolicy("ns0", "half", policy.Selector{}, policy.Egress, policy.Rule{Peers: []policy.Peer{{Pods: &policy.PodSelector{
				Pods: policy.Selector{Requirements: []policy.Requirement{{Key: "app", Op: policy.In, Values: []string{"app0", "app1"}}}},
			}}}})
			e := policy.NewEngine("here")
			e.Replace(c)
			longest, ops := 0, 0
			cpu := processCPU(b)
			for b.Loop() {
				for _, d := range []policy.Delta{e.Apply(policy.Event{Policy: &half}), e.Apply(policy.Event{Policy: &half, Delete: true}), e.Tidy()} {
					ops += opsOf(d)
					for _, step := range d.Steps {
						longest = max(longest, len(step))
					}
				}
			}
			b.ReportMetric((processCPU(b)-cpu).Seconds()*1e3/float64(b.N), "cpu-ms/op")
			b.ReportMetric(float64(ops)/float64(b.N), "ops/op")
			b.ReportMetric(float64(longest), "longest-step")
		})
	}
}

// BenchmarkMemory is what an engine keeps once the cluster it was given is garbage.
// The difference between two sizes is the price of a remote pod.
func BenchmarkMemory(b *testing.B) {
	for _, s := range []policytest.Shape{
		{Pods: 10000, Policies: 10000, Namespaces: 1000, Local: 250},
		{Pods: 50000, Policies: 10000, Namespaces: 1000, Local: 250},
	} {
		b.Run(s.String(), func(b *testing.B) {
			var m runtime.MemStats
			for b.Loop() {
				e := policy.NewEngine("here")
				e.Replace(s.Cluster())
				debug.FreeOSMemory()
				runtime.ReadMemStats(&m)
				b.ReportMetric(float64(m.HeapAlloc)/1024, "heap-KiB")
				b.ReportMetric(float64(m.HeapAlloc)/float64(s.Pods), "heap-B/pod")
				b.ReportMetric(residentKiB(b)/1024, "RSS-MiB")
				runtime.KeepAlive(e)
			}
		})
	}
}

func residentKiB(b *testing.B) float64 {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		b.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "VmRSS:")
	n, err := strconv.ParseFloat(strings.Fields(rest)[0], 64)
	if err != nil {
		b.Fatal(err)
	}
	return n
}
