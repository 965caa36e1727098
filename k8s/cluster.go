package k8s

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"

	"github.com/nftcni/nftcni/policy"
)

// Cluster is the Source that follows a Kubernetes API server: Namespaces, Nodes, Pods
// and NetworkPolicies of the whole cluster, in protobuf, by WatchList where it is
// served. An object that the API server accepted and that cannot be understood in full
// is in force as far as it can: what cannot be read allows nothing, and a Kubernetes
// Event on the object says so. While the API server is away the last known objects stay
// in force.
//
// A pod's addresses are those of its status; before the kubelet reports them, those of
// AnnotationAddresses that lie in the spec.podCIDRs of its node.
type Cluster struct {
	node     string
	log      *slog.Logger
	clients  clients
	digester digester
	events   chan *corev1.Event

	mu sync.Mutex
	// mirrors of this node's static pods: their policy.Pod.UID is the static pod's,
	// the API knows them by another one.
	mirrors map[policy.Name]mirror
}

type mirror struct{ static, uid string }

// NewCluster reads the configuration; it does not connect. An error says what is
// missing in the kubeconfig or the service account.
func NewCluster(o ClusterOptions) (*Cluster, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	clients, err := connect(o)
	if err != nil {
		return nil, err
	}
	return &Cluster{
		node: o.Node, log: o.Log, clients: clients,
		digester: newDigester(o.Node),
		events:   make(chan *corev1.Event, 256),
		mirrors:  map[policy.Name]mirror{},
	}, nil
}

// Run implements Source. It returns only when ctx is done.
func (c *Cluster) Run(ctx context.Context, sink Sink) error {
	// client-go would log every retry; link logs every change of state instead.
	ctx = klog.NewContext(ctx, logr.Discard())
	r := newRegistry(c.digester, sink)
	r.refused, r.mirrored = c.refused, c.mirrored
	l := &link{log: c.log, changed: r.setOffline}
	var wg sync.WaitGroup
	wg.Go(func() { c.sendEvents(ctx) })
	if c.clients.tokenFile != "" {
		wg.Go(func() { c.keepToken(ctx) })
	}
	for kind := range kindCount {
		resource, client, example := c.resource(kind)
		lw := l.watched(resource, cache.NewFilteredListWatchFromClient(client, resource, metav1.NamespaceAll, func(*metav1.ListOptions) {}))
		logger := logr.Discard()
		reflector := cache.NewReflectorWithOptions(lw, example, kindStore{r, kind}, cache.ReflectorOptions{
			Name:    "nftcni/" + resource,
			Logger:  &logger,
			Backoff: &wait.Backoff{Duration: 200 * time.Millisecond, Factor: 2, Jitter: 0.5, Steps: 10, Cap: 10 * time.Second},
		})
		wg.Go(func() { reflector.RunWithContext(ctx) })
	}
	wg.Wait()
	utilnet.CloseIdleConnectionsFor(c.clients.transport)
	return nil
}

func (c *Cluster) resource(kind int) (name string, client rest.Interface, example runtime.Object) {
	switch kind {
	case kindNamespace:
		return "namespaces", c.clients.core, &corev1.Namespace{}
	case kindNode:
		return "nodes", c.clients.core, &corev1.Node{}
	case kindPod:
		return "pods", c.clients.core, &corev1.Pod{}
	}
	return "networkpolicies", c.clients.networking, &networkingv1.NetworkPolicy{}
}

// A link knows whether the API server answers, and says so once per change.
type link struct {
	log     *slog.Logger
	changed func(*Problem)

	mu   sync.Mutex
	down map[string]error // by resource
}

// watched passes what list and watch return on to note.
func (l *link) watched(resource string, lw *cache.ListWatch) *cache.ListWatch {
	list, open := lw.ListWithContextFunc, lw.WatchFuncWithContext
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			obj, err := list(ctx, o)
			l.note(ctx, resource, err)
			return obj, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			w, err := open(ctx, o)
			// A refused WatchList is followed by an ordinary list, which decides.
			if o.SendInitialEvents == nil || !apierrors.IsInvalid(err) && !apierrors.IsBadRequest(err) {
				l.note(ctx, resource, err)
			}
			return w, err
		},
	}
}

func (l *link) note(ctx context.Context, resource string, err error) {
	if ctx.Err() != nil || apierrors.IsResourceExpired(err) || apierrors.IsGone(err) {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	before := len(l.down)
	if err == nil {
		delete(l.down, resource)
	} else {
		if l.down == nil {
			l.down = map[string]error{}
		}
		l.down[resource] = err
	}
	switch {
	case before == 0 && err != nil:
		l.log.Warn("API server does not answer, the last known objects stay in force", "resource", resource, "err", err)
		l.changed(&Problem{Severity: Warning, Object: resource, Message: fmt.Sprintf("the API server does not answer: %v", err),
			Effect: "the last known objects stay in force", Remedy: remedyFor(err)})
	case before > 0 && len(l.down) == 0:
		l.log.Info("API server answers")
		l.changed(nil)
	}
}

func remedyFor(err error) string {
	switch {
	case apierrors.IsForbidden(err):
		return "let the agent's account get, list and watch pods, namespaces, nodes and networkpolicies (deploy/ has the ClusterRole)"
	case apierrors.IsUnauthorized(err):
		return "renew the agent's credentials"
	}
	return "check the API server's address and that it runs"
}

// PolicyGeneration reads metadata.generation of a NetworkPolicy from the API server. A
// get without resourceVersion is a quorum read (Kubernetes API concepts, "Semantics for
// get and list").
func (c *Cluster) PolicyGeneration(ctx context.Context, name policy.Name) (int64, error) {
	var p networkingv1.NetworkPolicy
	err := c.clients.networking.Get().Namespace(name.Namespace).Resource("networkpolicies").Name(name.Name).Do(ctx).Into(&p)
	if err != nil {
		return 0, fmt.Errorf("read policy %s/%s from the API server: %w", name.Namespace, name.Name, err)
	}
	return p.Generation, nil
}

// Service reads a Service from the API server; the agent itself keeps none.
func (c *Cluster) Service(ctx context.Context, name policy.Name) (*corev1.Service, error) {
	var s corev1.Service
	if err := c.clients.core.Get().Namespace(name.Namespace).Resource("services").Name(name.Name).Do(ctx).Into(&s); err != nil {
		return nil, fmt.Errorf("read service %s/%s from the API server: %w", name.Namespace, name.Name, err)
	}
	return &s, nil
}

// refused queues a Kubernetes Event on an object that cannot be honoured.
func (c *Cluster) refused(kind int, r *record, p Problem) {
	if kind == kindPod || kind == kindPolicy {
		c.Record(kindName(kind), policy.Name{Namespace: r.Namespace, Name: r.Name}, r.uid, "NotHonoured", p.Field+": "+p.Message+"; "+p.Effect)
	}
}

// mirrored notes the mirror pods of this node.
func (c *Cluster) mirrored(pod policy.Name, r *record) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.mirrors, pod)
	if r != nil && r.value.Pod.Node == c.node {
		c.mirrors[pod] = mirror{static: r.value.Pod.UID, uid: r.uid}
	}
}

// apiUID is the metadata.uid of the pod that policy.Pod.UID names.
func (c *Cluster) apiUID(pod policy.Name, uid string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if m, ok := c.mirrors[pod]; ok && m.static == uid {
		return m.uid
	}
	return uid
}
