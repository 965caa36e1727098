package k8s

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"

	"github.com/google/go-cmp/cmp"

	"github.com/nftcni/nftcni/policy"
)

func schemaGVK(apiVersion, kind string) schema.GroupVersionKind {
	return schema.FromAPIVersionAndKind(apiVersion, kind)
}

func contextBroadcast(r *http.Request, c *sync.Cond) func() bool {
	return context.AfterFunc(r.Context(), c.Broadcast)
}

// decodeEvent reads the protobuf that the client sends.
func decodeEvent(r *http.Request) (corev1.Event, error) {
	var e corev1.Event
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return e, err
	}
	scheme := runtime.NewScheme()
	if err := corev1.AddToScheme(scheme); err != nil {
		return e, err
	}
	if got := r.Header.Get("Content-Type"); got != runtime.ContentTypeProtobuf {
		return e, fmt.Errorf("content type %s", got)
	}
	_, _, err = serializer.NewCodecFactory(scheme).UniversalDeserializer().Decode(body, nil, &e)
	return e, err
}

func (s *mirrorSink) awaitPod(t *testing.T, name string, ok func(p *policy.Pod) bool) {
	t.Helper()
	s.await(t, "pod "+name, func(state map[objectKey]policy.Event, _ []Problem) bool {
		e := state[objectKey{"Pod", "a", name}]
		return e.Pod != nil && ok(e.Pod)
	})
}

// TestClusterFollow: one Replace with everything, then every change; watches that are
// cut, expire or meet a server that is away lose nothing.
func TestClusterFollow(t *testing.T) {
	for _, watchList := range []bool{true, false} {
		t.Run(fmt.Sprintf("watchList=%v", watchList), func(t *testing.T) {
			api := newAPIServer(t, watchList)
			api.put(apiNamespace("a", "x", "z"), apiNode("n1", "10.1.0.0/24"), apiPod("a", "p", "n1", "10.1.0.1", "fd00::1"), apiPolicy("a", "q", 1))
			sink := newMirrorSink()
			start(t, api.source(t), sink)
			sink.awaitObjects(t, "Namespace a", "Node n1", "Pod a/p", "NetworkPolicy a/q")
			if sink.calls != 1 {
				t.Errorf("the first state came in %d calls", sink.calls)
			}
			want := policy.Event{Namespace: &policy.Namespace{Name: "a", Labels: labels("x", "z", "kubernetes.io/metadata.name", "a")}}
			if diff := cmp.Diff(want, sink.state[objectKey{kind: "Namespace", name: "a"}], values); diff != "" {
				t.Errorf("namespace (-want +got):\n%s", diff)
			}

			api.put(apiPod("a", "r", "n1"))
			api.remove("networkpolicies", "a", "q")
			sink.awaitObjects(t, "Namespace a", "Node n1", "Pod a/p", "Pod a/r")
			api.put(apiPod("a", "r", "n1", "10.1.0.2"))
			sink.awaitPod(t, "r", func(p *policy.Pod) bool { return len(p.Addrs) == 1 })

			api.cut()
			api.put(apiPod("a", "s", "n1"))
			sink.awaitObjects(t, "Namespace a", "Node n1", "Pod a/p", "Pod a/r", "Pod a/s")

			api.setDown(true)
			sink.await(t, "the problem", func(_ map[objectKey]policy.Event, problems []Problem) bool {
				return len(problems) == 1 && strings.Contains(problems[0].Message, "does not answer")
			})
			api.remove("pods", "a", "r")
			api.put(apiPod("a", "u", "n1"))
			api.forget()
			api.setDown(false)
			sink.awaitObjects(t, "Namespace a", "Node n1", "Pod a/p", "Pod a/s", "Pod a/u")
			sink.await(t, "no problem", func(_ map[objectKey]policy.Event, problems []Problem) bool { return len(problems) == 0 })
		})
	}
}

// TestClusterDownAtStart: nothing is handed over before everything is known.
func TestClusterDownAtStart(t *testing.T) {
	api := newAPIServer(t, true)
	api.setDown(true)
	api.put(apiNamespace("a"))
	sink := newMirrorSink()
	start(t, api.source(t), sink)
	api.setDown(false)
	sink.awaitObjects(t, "Namespace a")
}

// TestClusterQuiet: an update that changes nothing for policy reaches nobody.
func TestClusterQuiet(t *testing.T) {
	api := newAPIServer(t, true)
	node, pod := apiNode("n1", "10.1.0.0/24"), apiPod("a", "p", "n1", "10.1.0.1")
	api.put(node, pod)
	sink := newMirrorSink()
	start(t, api.source(t), sink)
	sink.awaitObjects(t, "Node n1", "Pod a/p")
	for range 10 {
		node, pod = node.DeepCopy(), pod.DeepCopy()
		node.Status.Conditions = append(node.Status.Conditions, corev1.NodeCondition{Type: "Ready"})
		pod.Status.Message += "x"
		api.put(node, pod)
	}
	api.put(apiPod("a", "last", "n1"), apiNode("last"))
	sink.awaitObjects(t, "Node n1", "Pod a/p", "Pod a/last", "Node last")
	if sink.calls != 3 {
		t.Errorf("%d calls, want 3", sink.calls)
	}
}

// TestClusterPublishedAddresses: the annotation counts within the node's podCIDRs and
// only until the status has addresses.
func TestClusterPublishedAddresses(t *testing.T) {
	api := newAPIServer(t, true)
	node, pod := apiNode("n1", "10.1.0.0/24"), apiPod("a", "p", "n1")
	pod.CreationTimestamp.Time = pod.CreationTimestamp.AddDate(2000, 0, 0)
	api.put(node, pod)
	sink, source := newMirrorSink(), api.source(t)
	start(t, source, sink)
	sink.awaitPod(t, "p", func(p *policy.Pod) bool { return p.Created > 0 })

	name := policy.Name{Namespace: "a", Name: "p"}
	foreign := addrs("10.1.0.7", "10.2.0.7", "fd00::7")
	must(t, source.PublishAddresses(t.Context(), name, string(pod.UID), foreign))
	sink.awaitPod(t, "p", func(p *policy.Pod) bool {
		return cmp.Equal(p.Addrs, addrs("10.1.0.7"), values) && p.Created < 0 // loses against a reported address
	})
	api.put(apiNode("n1", "10.2.0.0/24", "fd00::/64"))
	sink.awaitPod(t, "p", func(p *policy.Pod) bool {
		return cmp.Equal(p.Addrs, addrs("10.2.0.7", "fd00::7"), values) && p.Created < 0
	})
	api.remove("nodes", "", "n1")
	sink.awaitPod(t, "p", func(p *policy.Pod) bool { return len(p.Addrs) == 0 })

	reported := pod.DeepCopy()
	reported.Annotations = map[string]string{AnnotationAddresses: "10.2.0.7"}
	reported.Status.PodIPs = []corev1.PodIP{{IP: "10.3.0.1"}}
	api.put(reported)
	sink.awaitPod(t, "p", func(p *policy.Pod) bool { return cmp.Equal(p.Addrs, addrs("10.3.0.1"), values) && p.Created > 0 })

	if err := source.PublishAddresses(t.Context(), name, "another", foreign); !errors.Is(err, ErrPodGone) {
		t.Errorf("other UID: got %v, want %v", err, ErrPodGone)
	}
	if err := source.PublishAddresses(t.Context(), policy.Name{Namespace: "a", Name: "none"}, "u", foreign); !errors.Is(err, ErrPodGone) {
		t.Errorf("no pod: got %v, want %v", err, ErrPodGone)
	}
	want := `{"metadata":{"annotations":{"nftcni.io/addresses":"10.1.0.7,10.2.0.7,fd00::7"},"uid":"uid-of-"}}`
	if api.patches[0] != want {
		t.Errorf("patch %s, want %s", api.patches[0], want)
	}
}

// TestClusterPublishedKey: a node's key reaches the others through its own Node object
// and nothing else; what is not a key is not sent.
func TestClusterPublishedKey(t *testing.T) {
	api := newAPIServer(t, true)
	api.put(apiNode("n1", "10.1.0.0/24"), apiNode("n2", "10.2.0.0/24"))
	sink, source := newMirrorSink(), api.source(t)
	start(t, source, sink)
	sink.awaitObjects(t, "Node n1", "Node n2")
	for _, key := range []string{"0:" + publicKey1, "0:" + publicKey1 + " 1:" + publicKey2} {
		must(t, source.PublishNodeKey(t.Context(), key))
		sink.await(t, "the key", func(state map[objectKey]policy.Event, problems []Problem) bool {
			n1, n2 := state[objectKey{kind: "Node", name: "n1"}].Node, state[objectKey{kind: "Node", name: "n2"}].Node
			return n1.PublicKey == key && n2.PublicKey == "" && len(n1.PodCIDRs) == 1 && problems == nil
		})
	}
	if err := source.PublishNodeKey(t.Context(), "secret"); err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("no key: %v", err)
	}
	if want := `{"metadata":{"annotations":{"nftcni.io/wireguard-keys":"0:` + publicKey1 + `"}}}`; len(api.patches) != 2 || api.patches[0] != want {
		t.Errorf("patches %q, want 2, the first %s", api.patches, want)
	}
	api.remove("nodes", "", "n1")
	if err := source.PublishNodeKey(t.Context(), publicKey1); err == nil || !strings.Contains(err.Error(), "node n1") {
		t.Errorf("no Node: %v", err)
	}
	foreign := apiNode("n2", "10.2.0.0/24")
	foreign.Annotations = map[string]string{AnnotationPublicKey: "nonsense"}
	api.put(foreign)
	sink.await(t, "the problem", func(state map[objectKey]policy.Event, problems []Problem) bool {
		n2 := state[objectKey{kind: "Node", name: "n2"}].Node
		return n2.PublicKey == "" && len(n2.PodCIDRs) == 1 && len(problems) == 1 && problems[0].Severity == Refused
	})
}

// TestClusterPublishedMeshAddresses: they reach the others through the node's own Node object, and
// are gone when there are none.
func TestClusterPublishedMeshAddresses(t *testing.T) {
	api := newAPIServer(t, true)
	api.put(apiNode("n1", "10.1.0.0/24"), apiNode("n2", "10.2.0.0/24"))
	sink, source := newMirrorSink(), api.source(t)
	start(t, source, sink)
	sink.awaitObjects(t, "Node n1", "Node n2")
	for _, want := range [][]netip.Addr{addrs("192.0.2.1", "fd00::1"), nil} {
		must(t, source.PublishMeshAddresses(t.Context(), want))
		sink.await(t, "the addresses", func(state map[objectKey]policy.Event, problems []Problem) bool {
			n1, n2 := state[objectKey{kind: "Node", name: "n1"}].Node, state[objectKey{kind: "Node", name: "n2"}].Node
			return slices.Equal(n1.MeshAddrs, want) && n2.MeshAddrs == nil && problems == nil
		})
	}
	if want := `{"metadata":{"annotations":{"nftcni.io/mesh-addresses":null}}}`; len(api.patches) != 2 || api.patches[1] != want {
		t.Errorf("patches %q, want 2, the second %s", api.patches, want)
	}
	if err := source.PublishMeshAddresses(t.Context(), addrs("fe80::1")); err == nil || !strings.Contains(err.Error(), "unicast") {
		t.Errorf("a link-local address: %v", err)
	}
}

// TestPolicyGeneration: read from the server itself, whatever the watch has seen.
func TestPolicyGeneration(t *testing.T) {
	api := newAPIServer(t, true)
	api.put(apiPolicy("a", "q", 7))
	source := api.source(t)
	if got, err := source.PolicyGeneration(t.Context(), policy.Name{Namespace: "a", Name: "q"}); got != 7 || err != nil {
		t.Errorf("got %d, %v", got, err)
	}
	if _, err := source.PolicyGeneration(t.Context(), policy.Name{Namespace: "a", Name: "r"}); err == nil || !strings.Contains(err.Error(), "read policy a/r") {
		t.Errorf("no such policy: %v", err)
	}
}

// TestClusterMirrorPod: a static pod is known by its own UID, and published by its
// mirror's.
func TestClusterMirrorPod(t *testing.T) {
	api := newAPIServer(t, true)
	pod := apiPod("a", "p", "n1")
	pod.UID, pod.Annotations = "mirror", map[string]string{annotationConfigHash: "static", corev1.MirrorPodAnnotationKey: "static"}
	api.put(pod)
	sink, source := newMirrorSink(), api.source(t)
	start(t, source, sink)
	sink.awaitPod(t, "p", func(p *policy.Pod) bool { return p.UID == "static" })
	must(t, source.PublishAddresses(t.Context(), policy.Name{Namespace: "a", Name: "p"}, "static", []netip.Addr{netip.MustParseAddr("10.0.0.1")}))
}

// TestClusterCannotHonour: an object of a newer API is in force in part, and a
// Kubernetes Event on it says so.
func TestClusterCannotHonour(t *testing.T) {
	q, p := apiPolicy("a", "q", 1), apiPod("a", "p", "n1", "10.0.0.300")
	q.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{{}}}}
	for _, tt := range []struct {
		object               metav1.Object
		kind, field, message string
	}{
		{q, "NetworkPolicy", "spec.ingress[0].from[0]", "must specify a peer"},
		{p, "Pod", "status.podIPs[0].ip", "not an IP address"},
	} {
		t.Run(tt.kind, func(t *testing.T) {
			api := newAPIServer(t, true)
			api.put(tt.object)
			sink := newMirrorSink()
			start(t, api.source(t), sink)
			sink.await(t, "the problem", func(_ map[objectKey]policy.Event, problems []Problem) bool {
				return len(problems) == 1 && problems[0].Field == tt.field
			})
			api.mu.Lock()
			for len(api.events) == 0 {
				api.changed.Wait()
			}
			e := api.events[0]
			api.mu.Unlock()
			o := e.InvolvedObject
			if o.Name != tt.object.GetName() || o.Kind != tt.kind || e.Type != "Warning" || !strings.Contains(e.Message, tt.message) || e.Source.Host != "n1" {
				t.Errorf("event %+v", e)
			}
		})
	}
}

func TestNewClusterErrors(t *testing.T) {
	api := newAPIServer(t, true)
	good := api.kubeconfig(t)
	tests := []struct{ name, kubeconfig, want string }{
		{"no kubeconfig outside a pod", "", "give --kubeconfig"},
		{"no such file", "/does/not/exist", "/does/not/exist"},
		{"exec credentials", readKubeconfig(t, good, "{token: secret}", "{exec: {apiVersion: client.authentication.k8s.io/v1, command: aws, interactiveMode: Never}}"), "exec"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := NewCluster(ClusterOptions{Kubeconfig: tt.kubeconfig})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want an error with %q", err, tt.want)
			}
		})
	}
}
