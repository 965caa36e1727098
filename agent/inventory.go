package agent

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"

	"github.com/nftcni/nftcni/cni"
	"github.com/nftcni/nftcni/policy"
)

const namespaceNameLabel = "kubernetes.io/metadata.name"

// inventory is what the loop knows: the source's objects joined with this node's
// attachments. It belongs to the loop's goroutine.
type inventory struct {
	node       string
	network    Network
	namespaces map[string]*policy.Namespace
	pods       map[policy.Name]*policy.Pod
	nodes      map[string]*policy.Node
	policies   map[policy.PolicyID]*policy.Policy
	attached   map[string]*attachment // by host interface
	byPod      map[policy.Name][]*attachment
	holders    map[netip.Addr]string         // address -> host interface it is bound to
	mapped     map[string]bool               // host interfaces with host ports
	emitted    map[policy.Name][]policy.Name // engine pods made for a name with attachments
	unlabelled unlabelled
}

// attachment is a cni.Attachment with the pod it was last joined with: when the API's
// pod is replaced by one of the same name, the old sandbox keeps its labels until DEL.
type attachment struct {
	cni.Attachment
	joined *policy.Pod
}

func newInventory(node string, network Network) *inventory {
	v := &inventory{node: node, network: network, attached: map[string]*attachment{}, byPod: map[policy.Name][]*attachment{}, holders: map[netip.Addr]string{}, mapped: map[string]bool{}}
	v.clear()
	return v
}

// clear forgets the source's objects and keeps the attachments.
func (v *inventory) clear() {
	v.namespaces = map[string]*policy.Namespace{}
	v.pods = map[policy.Name]*policy.Pod{}
	v.nodes = map[string]*policy.Node{}
	v.policies = map[policy.PolicyID]*policy.Policy{}
	v.emitted = map[policy.Name][]policy.Name{}
	v.unlabelled.told = nil
}

// podName is the name an attachment is joined by. Without CNI_ARGS of Kubernetes it is
// the container's ID in namespace default.
func podName(a cni.Attachment) policy.Name {
	return policy.Name{Namespace: cmp.Or(a.Namespace, "default"), Name: cmp.Or(a.Pod, a.ContainerID)}
}

// apply records one event of the source and returns the engine's events it means.
func (v *inventory) apply(e policy.Event) []policy.Event {
	events := v.applyObject(e)
	if e.Namespace != nil || e.Policy != nil {
		events = append(events, v.isolateUnlabelled()...)
	}
	return events
}

func (v *inventory) applyObject(e policy.Event) []policy.Event {
	switch {
	case e.Namespace != nil:
		put(v.namespaces, e.Namespace.Name, e.Namespace, e.Delete)
		if e.Delete && v.namespaceUsed(e.Namespace.Name) {
			return v.implyNamespace(e.Namespace.Name)
		}
	case e.Node != nil:
		put(v.nodes, e.Node.Name, e.Node, e.Delete)
	case e.Policy != nil:
		put(v.policies, e.Policy.ID, e.Policy, e.Delete)
	case e.Pod != nil:
		put(v.pods, e.Pod.Name, e.Pod, e.Delete)
		return v.podEvents(e.Pod.Name)
	}
	return []policy.Event{e}
}

func put[K comparable, V any](m map[K]*V, k K, v *V, remove bool) {
	if remove {
		delete(m, k)
	} else {
		m[k] = v
	}
}

// attach records a and returns the engine's events.
func (v *inventory) attach(a cni.Attachment) []policy.Event {
	events := v.detach(a.HostInterface)
	n := podName(a)
	at := &attachment{Attachment: a}
	v.attached[a.HostInterface] = at
	v.byPod[n] = append(v.byPod[n], at)
	for _, addr := range a.Addresses {
		v.holders[addr] = a.HostInterface
	}
	if len(a.HostPorts) > 0 {
		v.mapped[a.HostInterface] = true
	}
	if v.namespaces[n.Namespace] == nil {
		events = append(events, v.implyNamespace(n.Namespace)...)
	}
	return append(events, v.podEvents(n)...)
}

// detach forgets the attachment of a host interface and returns the engine's events.
func (v *inventory) detach(hostInterface string) []policy.Event {
	at := v.attached[hostInterface]
	if at == nil {
		return nil
	}
	n := podName(at.Attachment)
	delete(v.attached, hostInterface)
	delete(v.mapped, hostInterface)
	v.unlabelled.set(at, false)
	for _, addr := range at.Addresses {
		delete(v.holders, addr)
	}
	v.byPod[n] = slices.DeleteFunc(v.byPod[n], func(x *attachment) bool { return x == at })
	if len(v.byPod[n]) == 0 {
		delete(v.byPod, n)
	}
	return v.podEvents(n)
}

// implyNamespace makes the engine know a namespace that only an attachment names.
func (v *inventory) implyNamespace(name string) []policy.Event {
	ns := &policy.Namespace{Name: name, Labels: policy.MakeLabels(map[string]string{namespaceNameLabel: name})}
	v.namespaces[name] = ns
	return []policy.Event{{Namespace: ns}}
}

func (v *inventory) namespaceUsed(name string) bool {
	for n := range v.byPod {
		if n.Namespace == name {
			return true
		}
	}
	return false
}

// podEvents brings the engine's pods of one name up to date.
func (v *inventory) podEvents(n policy.Name) []policy.Event {
	pods := v.join(n)
	var events []policy.Event
	for i := range pods {
		events = append(events, policy.Event{Pod: &pods[i]})
	}
	old, known := v.emitted[n]
	if !known {
		old = []policy.Name{n}
	}
	for _, name := range old {
		if !slices.ContainsFunc(pods, func(p policy.Pod) bool { return p.Name == name }) {
			events = append([]policy.Event{{Delete: true, Pod: &policy.Pod{Name: name}}}, events...)
		}
	}
	v.remember(n, pods)
	return append(events, v.isolateUnlabelled()...)
}

func (v *inventory) remember(n policy.Name, pods []policy.Pod) {
	delete(v.emitted, n)
	if v.byPod[n] == nil {
		return
	}
	for _, p := range pods {
		v.emitted[n] = append(v.emitted[n], p.Name)
	}
}

// knows reports whether the source lists the pod of an attachment.
func (v *inventory) knows(a cni.Attachment) bool {
	p := v.pods[podName(a)]
	return p != nil && !stale(a, *p)
}

// objects are what a policy.Cluster holds, without copies of it: nobody may change them.
type objects struct {
	namespaces []*policy.Namespace
	pods       []*policy.Pod
	nodes      []*policy.Node
	policies   []*policy.Policy
}

// objects is the engine's whole input.
func (v *inventory) objects() objects {
	o := objects{pods: make([]*policy.Pod, 0, len(v.pods)), policies: make([]*policy.Policy, 0, len(v.policies))}
	o.namespaces = slices.AppendSeq(o.namespaces, maps.Values(v.namespaces))
	o.nodes = slices.AppendSeq(o.nodes, maps.Values(v.nodes))
	o.policies = slices.AppendSeq(o.policies, maps.Values(v.policies))
	joined := func(n policy.Name) {
		pods := v.join(n)
		v.remember(n, pods)
		for i := range pods {
			o.pods = append(o.pods, &pods[i])
		}
	}
	for n, p := range v.pods {
		if v.byPod[n] == nil && !v.foreign(p) {
			o.pods = append(o.pods, p)
		} else {
			joined(n)
		}
	}
	for n := range v.byPod {
		if v.pods[n] == nil {
			joined(n)
		}
	}
	v.isolateUnlabelled()
	for _, i := range v.unlabelled.told {
		o.namespaces, o.policies = append(o.namespaces, i.namespace), append(o.policies, i.policy)
	}
	return o
}

// cluster is objects with a copy of each.
func (v *inventory) cluster() *policy.Cluster {
	o := v.objects()
	return &policy.Cluster{Namespaces: copies(o.namespaces), Pods: copies(o.pods), Nodes: copies(o.nodes), Policies: copies(o.policies)}
}

func copies[T any](list []*T) []T {
	out := make([]T, len(list))
	for i, p := range list {
		out[i] = *p
	}
	return out
}

// share lets the inventory hold the objects of c, which the engine holds, as far as they
// are the source's: one copy of each remote pod and of each policy.
func (v *inventory) share(c *policy.Cluster) {
	for i := range c.Pods {
		n := c.Pods[i].Name
		if p := v.pods[n]; p != nil && v.byPod[n] == nil && !v.foreign(p) {
			v.pods[n] = &c.Pods[i]
		}
	}
	for i := range c.Policies {
		if id := c.Policies[i].ID; v.policies[id] != nil {
			v.policies[id] = &c.Policies[i]
		}
	}
}

// load replaces the source's objects.
func (v *inventory) load(c *policy.Cluster) {
	v.clear()
	v.pods = make(map[policy.Name]*policy.Pod, len(c.Pods)) // one that grew has more room to spare
	v.policies = make(map[policy.PolicyID]*policy.Policy, len(c.Policies))
	for i := range c.Namespaces {
		v.namespaces[c.Namespaces[i].Name] = &c.Namespaces[i]
	}
	for i := range c.Nodes {
		v.nodes[c.Nodes[i].Name] = &c.Nodes[i]
	}
	for i := range c.Policies {
		v.policies[c.Policies[i].ID] = &c.Policies[i]
	}
	for i := range c.Pods {
		v.pods[c.Pods[i].Name] = &c.Pods[i]
	}
	for n := range v.byPod {
		if v.namespaces[n.Namespace] == nil {
			v.implyNamespace(n.Namespace)
		}
	}
}

// ownPodCIDRs are this node's: the configured ones, else Node.spec.podCIDRs.
func (v *inventory) ownPodCIDRs(configured []netip.Prefix) []netip.Prefix {
	if len(configured) > 0 {
		return configured
	}
	if n := v.nodes[v.node]; n != nil {
		return n.PodCIDRs
	}
	return nil
}
