package k8s

import (
	"fmt"
	"hash/maphash"
	"net/netip"
	"slices"
	"strings"
	"sync"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"

	"github.com/nftcni/nftcni/policy"
)

// A record is what is kept of an API object on its way from the reflector to the Sink.
// The reflector's own buffer of a first list holds records too, so an object is
// stripped as soon as it is decoded. ObjectMeta holds name and namespace only.
type record struct {
	metav1.ObjectMeta
	value  policy.Event
	faults faults
	digest uint64
	uid    string // metadata.uid
	mirror bool   // of a static pod, whose UID is another one
	// claimed are the addresses of AnnotationAddresses, if the status has none yet.
	claimed []netip.Addr
}

// A digester makes records. Digests are of this process only: they are never stored.
type digester struct {
	seed      maphash.Seed
	host      string // this node: the UID of other nodes' pods is left out: only the plugin's calls name it
	ports     *shared[policy.NamedPort]
	selectors *shared[policy.Requirement]
}

func newDigester(node string) digester {
	d := digester{seed: maphash.MakeSeed(), host: node}
	d.ports = newShared(func(p policy.NamedPort) uint64 { return maphash.Comparable(d.seed, p) },
		func(a, b policy.NamedPort) bool { return a == b })
	d.selectors = newShared(func(r policy.Requirement) uint64 {
		return maphash.String(d.seed, r.Key+"\x00"+strings.Join(r.Values, "\x00"))
	},
		func(a, b policy.Requirement) bool { return compareRequirements(a, b) == 0 })
	return d
}

// shared lets equal lists share their storage: the named ports of one template's pods, the
// selectors that many policies have.
type shared[T any] struct {
	hash  func(T) uint64
	equal func(a, b T) bool

	mu    sync.Mutex
	known map[uint64][]T
}

func newShared[T any](hash func(T) uint64, equal func(a, b T) bool) *shared[T] {
	return &shared[T]{hash: hash, equal: equal, known: map[uint64][]T{}}
}

// maxShared bounds the lists that are remembered: at so many, all are forgotten.
const maxShared = 10_000

func (t *shared[T]) share(list []T) []T {
	if len(list) == 0 {
		return nil
	}
	sum := uint64(0)
	for _, x := range list {
		sum = sum*31 + t.hash(x)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if known := t.known[sum]; slices.EqualFunc(known, list, t.equal) {
		return known
	}
	if len(t.known) >= maxShared {
		clear(t.known)
	}
	t.known[sum] = list
	return list
}

// transform implements cache.TransformFunc; it is idempotent.
func (d digester) transform(obj any) (any, error) {
	var r *record
	switch o := obj.(type) {
	case *record, cache.DeletedFinalStateUnknown:
		return o, nil
	case *corev1.Namespace:
		r = d.namespace(o)
	case *corev1.Node:
		r = d.node(o)
	case *corev1.Pod:
		r = d.pod(o)
	case *networkingv1.NetworkPolicy:
		r = d.policy(o)
	default:
		return nil, fmt.Errorf("unexpected object of type %T", obj)
	}
	if len(r.faults) > 0 { // what is refused may be all that changed
		r.digest += maphash.String(d.seed, fmt.Sprint(r.faults))
	}
	return r, nil
}

func newRecord(m *metav1.ObjectMeta) *record {
	return &record{ObjectMeta: metav1.ObjectMeta{Name: m.Name, Namespace: m.Namespace}, uid: string(m.UID)}
}

func (d digester) namespace(o *corev1.Namespace) *record {
	r := newRecord(&o.ObjectMeta)
	ns := convertNamespace(o, &r.faults)
	r.value.Namespace = &ns
	r.digest = maphash.Comparable(d.seed, ns)
	return r
}

func (d digester) node(o *corev1.Node) *record {
	r := newRecord(&o.ObjectMeta)
	n := convertNode(o, &r.faults)
	r.value.Node = &n
	r.digest = maphash.String(d.seed, fmt.Sprint(n))
	return r
}

func (d digester) pod(o *corev1.Pod) *record {
	r := newRecord(&o.ObjectMeta)
	p := convertPod(o, &r.faults)
	p.Ports = d.ports.share(p.Ports)
	staticUID := p.UID
	if d.host != "" && p.Node != d.host {
		p.UID = ""
	}
	r.mirror = staticUID != r.uid
	if len(p.Addrs) == 0 {
		r.claimed = claimedAddrs(o.Annotations[AnnotationAddresses], &r.faults)
	}
	r.value.Pod = &p
	var h maphash.Hash
	h.SetSeed(d.seed)
	for _, s := range []string{r.uid, staticUID, p.Node} {
		maphash.WriteComparable(&h, s)
	}
	maphash.WriteComparable(&h, p.Labels)
	maphash.WriteComparable(&h, [2]bool{p.HostNetwork, p.Finished})
	for _, a := range p.Addrs {
		maphash.WriteComparable(&h, a)
	}
	for _, n := range p.Ports {
		maphash.WriteComparable(&h, n)
	}
	maphash.WriteComparable(&h, len(p.Addrs))
	for _, a := range r.claimed {
		maphash.WriteComparable(&h, a)
	}
	r.digest = h.Sum64()
	return r
}

// policy relies on metadata.generation, which the API server increments with every
// change of the spec.
func (d digester) policy(o *networkingv1.NetworkPolicy) *record {
	r := newRecord(&o.ObjectMeta)
	p := convertPolicy(o, &r.faults)
	d.shareSelectors(&p)
	r.value.Policy = &p
	version := fmt.Sprintf("%s %d", r.uid, o.Generation)
	if o.Generation == 0 {
		version = r.uid + " " + o.ResourceVersion
	}
	r.digest = maphash.String(d.seed, version)
	return r
}

func (d digester) shareSelectors(p *policy.Policy) {
	share := func(s *policy.PodSelector) {
		s.Namespaces.Requirements = d.selectors.share(s.Namespaces.Requirements)
		s.Pods.Requirements = d.selectors.share(s.Pods.Requirements)
	}
	share(&p.Subject)
	for _, rules := range p.Rules {
		for _, r := range rules {
			for _, peer := range r.Peers {
				if peer.Pods != nil {
					share(peer.Pods)
				}
			}
		}
	}
}

// maxClaimed bounds the annotation, which anyone who may change the pod can write.
const maxClaimed = 8

// claimedAddrs parses AnnotationAddresses.
func claimedAddrs(s string, f *faults) []netip.Addr {
	if s == "" {
		return nil
	}
	var out []netip.Addr
	for part := range strings.SplitSeq(s, ",") {
		a, err := netip.ParseAddr(strings.TrimSpace(part))
		if err != nil || a.Zone() != "" || len(out) == maxClaimed {
			f.warn(nil, "leave this annotation to the agent of the pod's node", "annotation %s is ignored: %s is not a list of at most %d addresses", AnnotationAddresses, quote(s), maxClaimed)
			return nil
		}
		out = appendAddr(out, a.Unmap())
	}
	return out
}
