package k8s

import (
	"cmp"
	"iter"
	"net/netip"
	"slices"

	"github.com/nftcni/nftcni/policy"
)

// snapshot collects the objects of events that delete nothing, sorted by name.
func snapshot(objects iter.Seq[policy.Event]) *policy.Cluster {
	sorted := slices.SortedFunc(objects, compareEvents)
	pods, addrs := 0, 0
	for _, e := range sorted {
		if e.Pod != nil {
			pods, addrs = pods+1, addrs+len(e.Pod.Addrs)
		}
	}
	// One piece of memory of the exact size: many small ones would lie scattered among what
	// decoding left behind, and a slice that grew would keep room to spare.
	c, all := &policy.Cluster{Pods: make([]policy.Pod, 0, pods)}, make([]netip.Addr, 0, addrs)
	for _, e := range sorted {
		switch {
		case e.Namespace != nil:
			c.Namespaces = append(c.Namespaces, *e.Namespace)
		case e.Pod != nil:
			pod, first := *e.Pod, len(all)
			if len(pod.Addrs) > 0 {
				all = append(all, pod.Addrs...)
				pod.Addrs = slices.Clip(all[first:])
			}
			c.Pods = append(c.Pods, pod)
		case e.Node != nil:
			c.Nodes = append(c.Nodes, *e.Node)
		case e.Policy != nil:
			c.Policies = append(c.Policies, *e.Policy)
		}
	}
	return c
}

// deletion is the event that removes what e put there.
func deletion(e policy.Event) policy.Event {
	e.Delete = true
	return e
}

// compareEvents orders: nodes, namespaces, policies, pods that come or change, then
// pods, policies, namespaces, nodes that go; within each by name.
func compareEvents(a, b policy.Event) int {
	ra, na := eventRank(a)
	rb, nb := eventRank(b)
	return cmp.Or(cmp.Compare(ra, rb), cmp.Compare(na.Namespace, nb.Namespace), cmp.Compare(na.Name, nb.Name))
}

func eventRank(e policy.Event) (rank int, name policy.Name) {
	switch {
	case e.Node != nil:
		rank, name = 0, policy.Name{Name: e.Node.Name}
	case e.Namespace != nil:
		rank, name = 1, policy.Name{Name: e.Namespace.Name}
	case e.Policy != nil:
		rank, name = 2, e.Policy.ID.Name
	case e.Pod != nil:
		rank, name = 3, e.Pod.Name
	}
	if e.Delete {
		rank = 7 - rank
	}
	return rank, name
}

// eventKey identifies the event's object.
func eventKey(e policy.Event) objectKey {
	switch {
	case e.Namespace != nil:
		return objectKey{kind: "Namespace", name: e.Namespace.Name}
	case e.Node != nil:
		return objectKey{kind: "Node", name: e.Node.Name}
	case e.Pod != nil:
		return objectKey{"Pod", e.Pod.Namespace, e.Pod.Name.Name}
	}
	return objectKey{KindNetworkPolicy, e.Policy.ID.Namespace, e.Policy.ID.Name.Name}
}
