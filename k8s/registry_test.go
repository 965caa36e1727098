package k8s

import (
	"fmt"
	"runtime"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/nftcni/nftcni/policy"
)

// lastSink keeps the first state and nothing else.
type lastSink struct{ cluster *policy.Cluster }

func (s *lastSink) Replace(c *policy.Cluster, _ []Problem) { s.cluster = c }
func (*lastSink) Apply([]policy.Event, []Problem)          {}

func heap() uint64 {
	for range 3 {
		runtime.GC()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// remotePod is as a Deployment makes them: long names, three named ports.
func remotePod(i int) *corev1.Pod {
	p := apiPod(fmt.Sprintf("namespace-%d", i%100), fmt.Sprintf("deployment-name-%d-5d4f8c7b9-%05d", i%1000, i), fmt.Sprintf("node-%d", i%500), fmt.Sprintf("10.%d.%d.%d", i>>16, i>>8&255, i&255))
	p.UID = "01234567-89ab-cdef-0123-456789abcdef"
	p.Labels = map[string]string{"app": fmt.Sprint(i % 1000), "pod-template-hash": fmt.Sprint(i % 1000)}
	for k := range 3 {
		p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Name: fmt.Sprint(k), Ports: []corev1.ContainerPort{{Name: fmt.Sprintf("http%d", k), ContainerPort: int32(8080 + k)}}})
	}
	return p
}

// BenchmarkRemotePods reports the heap that a remote pod costs: what the registry keeps
// of it, and with its policy.Pod in the Sink.
func BenchmarkRemotePods(b *testing.B) {
	const pods = 50_000
	for b.Loop() {
		before := heap()
		sink := &lastSink{}
		r := newRegistry(newDigester("this-node"), sink)
		list := make([]any, pods)
		for i := range list {
			rec, err := r.digester.transform(remotePod(i))
			if err != nil {
				b.Fatal(err)
			}
			list[i] = rec
		}
		for kind := range kindCount {
			items := list
			if kind != kindPod {
				items = nil
			}
			if err := (kindStore{r, kind}).Replace(items, ""); err != nil {
				b.Fatal(err)
			}
		}
		list = nil
		with := heap()
		sink.cluster = nil
		without := heap()
		b.ReportMetric(float64(with-before)/pods, "B/pod")
		b.ReportMetric(float64(without-before)/pods, "B/pod-kept-here")
		runtime.KeepAlive(r)
	}
}
