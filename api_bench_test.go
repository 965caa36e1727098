package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// BenchmarkPolicyOnly is what scripts/bench-api runs: policy through a real API server,
// where another CNI wires pods. The two real pods are web, which ten policies of its
// namespace may select, and bare, which none selects.
func BenchmarkPolicyOnly(b *testing.B) {
	dir := os.Getenv("NFTCNI_BENCH_API")
	if dir == "" {
		b.Skip("an API server is needed: run scripts/bench-api")
	}
	fmt.Print(apiBenchHeader)
	for scale := range strings.FieldsSeq(os.Getenv("NFTCNI_BENCH_SCALES")) {
		pods, policies, local, err := parseScale(scale)
		if err != nil {
			b.Fatal(err)
		}
		b.Run(scale, func(b *testing.B) {
			for range b.N {
				n := newAPIBench(b, dir, pods, policies)
				n.local = local
				n.fill()
				n.run(scale)
				n.empty()
			}
		})
	}
}

// parseScale reads PODS/POLICIES or PODS/POLICIES/LOCAL; LOCAL of the pods, 100 unless
// told, are on the agent's node.
func parseScale(scale string) (pods, policies, local int, err error) {
	local = 100
	n, _ := fmt.Sscanf(scale, "%d/%d/%d", &pods, &policies, &local)
	if n < 2 || policies < policiesPerNamespace || local < 2 || pods < local {
		err = fmt.Errorf("scale %q: want PODS/POLICIES or PODS/POLICIES/LOCAL, as 1000/100", scale)
	}
	return pods, policies, local, err
}

// apiClient writes objects as fast as the API server takes them.
type apiClient struct {
	b                *testing.B
	core, networking rest.Interface
}

func newAPIClient(b *testing.B, kubeconfig string) *apiClient {
	b.Helper()
	cfg, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		b.Fatal(err)
	}
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, networkingv1.AddToScheme} {
		if err := add(scheme); err != nil {
			b.Fatal(err)
		}
	}
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
	cfg.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	cfg.ContentType, cfg.QPS, cfg.WarningHandler = runtime.ContentTypeProtobuf, -1, rest.NoWarnings{}
	c := &apiClient{b: b}
	for _, g := range []struct {
		to   *rest.Interface
		path string
		gv   schema.GroupVersion
	}{{&c.core, "/api", corev1.SchemeGroupVersion}, {&c.networking, "/apis", networkingv1.SchemeGroupVersion}} {
		one := rest.CopyConfig(cfg)
		one.APIPath, one.GroupVersion = g.path, &g.gv
		client, err := rest.RESTClientFor(one)
		if err != nil {
			b.Fatal(err)
		}
		*g.to = client
	}
	return c
}

// await waits until the API server takes writes.
func (c *apiClient) await() {
	c.b.Helper()
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	var err error
	for range 600 {
		if err = c.core.Get().AbsPath("/readyz").Do(c.b.Context()).Error(); err == nil {
			return
		}
		<-tick.C
	}
	c.b.Fatalf("the API server is not ready after 2 minutes: %v", err)
}

func (c *apiClient) check(err error) {
	if err != nil {
		c.b.Error(err)
	}
}

func (c *apiClient) create(client rest.Interface, resource, namespace string, o runtime.Object) {
	c.check(client.Post().NamespaceIfScoped(namespace, namespace != "").Resource(resource).Body(o).Do(context.Background()).Error())
}

// ensure creates what the scale before may have left: namespaces need a controller to go.
func (c *apiClient) ensure(resource string, o runtime.Object) {
	if err := c.core.Post().Resource(resource).Body(o).Do(context.Background()).Error(); !apierrors.IsAlreadyExists(err) {
		c.check(err)
	}
}

// createPod is two calls, as the kubelet's status comes by itself.
func (c *apiClient) createPod(p *corev1.Pod) {
	status := p.Status
	c.check(c.core.Post().Namespace(p.Namespace).Resource("pods").Body(p).Do(context.Background()).Into(p))
	p.Status = status
	c.check(c.core.Put().Namespace(p.Namespace).Resource("pods").Name(p.Name).SubResource("status").Body(p).Do(context.Background()).Error())
}

func (c *apiClient) delete(client rest.Interface, resource, namespace, name string) {
	now := int64(0)
	c.check(client.Delete().NamespaceIfScoped(namespace, namespace != "").Resource(resource).Name(name).
		Body(&metav1.DeleteOptions{GracePeriodSeconds: &now}).Do(context.Background()).Error())
}

// label gives a pod another value of the label role: one call, the commonest change of a
// pod that runs.
func (c *apiClient) label(p *corev1.Pod, role string) {
	patch := fmt.Appendf(nil, `{"metadata":{"labels":{"role":%q}}}`, role)
	c.check(c.core.Patch(types.MergePatchType).Namespace(p.Namespace).Resource("pods").Name(p.Name).Body(patch).Do(context.Background()).Error())
}

// each runs f for 0 to n-1, 16 at a time.
func each(n int, f func(i int)) {
	var wg sync.WaitGroup
	next := make(chan int)
	for range min(16, n) {
		wg.Go(func() {
			for i := range next {
				f(i)
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	wg.Wait()
}

const policiesPerNamespace = 10

func benchNamespace(i int) string { return fmt.Sprintf("bench-%d", i) }

// benchPod is the i-th fake pod: the first ones are on the agent's node.
func (n *apiBench) benchPod(i int) *corev1.Pod {
	node := fmt.Sprintf("other-%d", i%50)
	if i < n.local-2 { // and the two real ones
		node = benchNode
	}
	return newBenchPod(benchNamespace(i%n.namespaces), fmt.Sprintf("pod-%d", i), node,
		map[string]string{"app": fmt.Sprintf("a%d", i%7), "group": fmt.Sprintf("g%d", i%policiesPerNamespace)},
		netip.AddrFrom4([4]byte{10, 64 + byte(i>>16), byte(i >> 8), byte(i)}))
}

func newBenchPod(namespace, name, node string, labels map[string]string, addrs ...netip.Addr) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: labels}}
	p.Spec = corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Name: "main", Image: "none"}}}
	p.Status.Phase = corev1.PodRunning
	for _, a := range addrs {
		p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: a.String()})
	}
	if len(addrs) > 0 {
		p.Status.PodIP = addrs[0].String()
	}
	return p
}

func selectBy(key, value string) *metav1.LabelSelector {
	return &metav1.LabelSelector{MatchLabels: map[string]string{key: value}}
}

// benchPolicy is the k-th policy of a namespace: two selectors and an ipBlock.
func benchPolicy(namespace string, k int) *networkingv1.NetworkPolicy {
	tcp, port := corev1.ProtocolTCP, intstr.FromInt32(int32(8000+k))
	p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: fmt.Sprintf("policy-%d", k)}}
	p.Spec.PodSelector = *selectBy("group", fmt.Sprintf("g%d", k))
	p.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{
		Ports: []networkingv1.NetworkPolicyPort{{Protocol: &tcp, Port: &port}},
		From: []networkingv1.NetworkPolicyPeer{
			{PodSelector: selectBy("app", fmt.Sprintf("a%d", k%7))},
			{NamespaceSelector: selectBy("team", fmt.Sprintf("t%d", k)), PodSelector: selectBy("app", fmt.Sprintf("a%d", (k+1)%7))},
			{IPBlock: &networkingv1.IPBlock{CIDR: fmt.Sprintf("172.%d.0.0/16", 16+k), Except: []string{fmt.Sprintf("172.%d.1.0/24", 16+k)}}},
		},
	}}
	return p
}

// fill makes the cluster.
func (n *apiBench) fill() {
	began := time.Now()
	for i := range n.namespaces {
		ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: benchNamespace(i), Labels: map[string]string{"team": fmt.Sprintf("t%d", i%10)}}}
		n.api.ensure("namespaces", ns)
	}
	n.api.ensure("nodes", &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: benchNode}})
	each(n.policies, func(i int) {
		ns := benchNamespace(i / policiesPerNamespace)
		n.api.create(n.api.networking, "networkpolicies", ns, benchPolicy(ns, i%policiesPerNamespace))
	})
	each(n.pods-2, func(i int) { n.api.createPod(n.benchPod(i)) })
	n.api.createPod(newBenchPod(benchNamespace(0), "web", benchNode, map[string]string{"group": "g0", "probe": "web"}, webAddr))
	n.api.createPod(newBenchPod(benchNamespace(0), "bare", benchNode, map[string]string{"probe": "bare"}, bareAddr))
	if n.b.Failed() {
		n.b.FailNow()
	}
	n.b.Logf("cluster of %d pods and %d policies made in %v", n.pods, n.policies, time.Since(began).Round(time.Second))
}

// empty removes it, for the next scale.
func (n *apiBench) empty() {
	each(n.namespaces, func(i int) {
		for client, resource := range map[rest.Interface]string{n.api.core: "pods", n.api.networking: "networkpolicies"} {
			now := int64(0)
			n.api.check(client.Delete().Namespace(benchNamespace(i)).Resource(resource).Body(&metav1.DeleteOptions{GracePeriodSeconds: &now}).Do(context.Background()).Error())
		}
	})
}

// startAgent starts the built binary against the API server.
func (n *apiBench) startAgent(args ...string) {
	n.b.Helper()
	config := filepath.Join(n.dir, "agent.yaml")
	text := fmt.Sprintf("node: %s\nnetwork: none\nrunDir: %s\nstateDir: %s\nlogLevel: error\n", benchNode, n.runDir(), filepath.Join(n.dir, "state"))
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		n.b.Fatal(err)
	}
	binary := filepath.Join(filepath.Dir(n.dir), "nftcni")
	n.process = startBenchAgent(n.b, binary, append([]string{"--config", config, "--kubeconfig", filepath.Join(n.dir, "kubeconfig")}, args...)...)
}

func (n *apiBench) runDir() string { return filepath.Join(n.dir, "run") }

func percentiles(d []time.Duration) (p50, most time.Duration) {
	slices.Sort(d)
	return d[len(d)/2], d[len(d)-1]
}

func milliseconds(d []time.Duration) string {
	if len(d) == 0 {
		return "none"
	}
	p50, most := percentiles(d)
	return fmt.Sprintf("%.1f (%.1f)", float64(p50.Microseconds())/1000, float64(most.Microseconds())/1000)
}
