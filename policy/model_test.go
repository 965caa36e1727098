package policy_test

import (
	"cmp"
	"maps"
	"reflect"
	"slices"

	"github.com/nftcni/nftcni/policy"
)

// model is the cluster that a sequence of events leads to, kept by the test itself.
type model struct {
	namespaces map[string]policy.Namespace
	nodes      map[string]policy.Node
	pods       map[policy.Name]policy.Pod
	policies   map[policy.PolicyID]policy.Policy
}

func newModel(c *policy.Cluster) *model {
	m := &model{}
	m.replace(c)
	return m
}

func (m *model) replace(c *policy.Cluster) {
	if m == nil {
		return
	}
	*m = model{map[string]policy.Namespace{}, map[string]policy.Node{}, map[policy.Name]policy.Pod{}, map[policy.PolicyID]policy.Policy{}}
	for i := range c.Namespaces {
		m.take(policy.Event{Namespace: &c.Namespaces[i]})
	}
	for i := range c.Nodes {
		m.take(policy.Event{Node: &c.Nodes[i]})
	}
	for i := range c.Pods {
		m.take(policy.Event{Pod: &c.Pods[i]})
	}
	for i := range c.Policies {
		m.take(policy.Event{Policy: &c.Policies[i]})
	}
}

// take follows ev; a nil model follows nothing, like replace.
func (m *model) take(ev policy.Event) {
	switch {
	case m == nil:
	case ev.Namespace != nil:
		set(m.namespaces, ev.Namespace.Name, *ev.Namespace, ev.Delete)
	case ev.Node != nil:
		set(m.nodes, ev.Node.Name, *ev.Node, ev.Delete)
	case ev.Pod != nil:
		set(m.pods, ev.Pod.Name, *ev.Pod, ev.Delete)
	case ev.Policy != nil:
		set(m.policies, ev.Policy.ID, *ev.Policy, ev.Delete)
	}
}

func set[K comparable, V any](m map[K]V, k K, v V, remove bool) {
	m[k] = v
	if remove {
		delete(m, k)
	}
}

func (m *model) cluster() *policy.Cluster {
	return &policy.Cluster{
		Namespaces: slices.SortedFunc(maps.Values(m.namespaces), func(a, b policy.Namespace) int { return cmp.Compare(a.Name, b.Name) }),
		Pods:       slices.SortedFunc(maps.Values(m.pods), func(a, b policy.Pod) int { return compareNames(a.Name, b.Name) }),
		Nodes:      slices.SortedFunc(maps.Values(m.nodes), func(a, b policy.Node) int { return cmp.Compare(a.Name, b.Name) }),
		Policies: slices.SortedFunc(maps.Values(m.policies), func(a, b policy.Policy) int {
			return cmp.Or(cmp.Compare(a.ID.Kind, b.ID.Kind), compareNames(a.ID.Name, b.ID.Name))
		}),
	}
}

func sameCluster(a, b *policy.Cluster) bool {
	same := len(a.Namespaces) == len(b.Namespaces) && len(a.Pods) == len(b.Pods) && len(a.Nodes) == len(b.Nodes) && len(a.Policies) == len(b.Policies)
	return same && (len(a.Namespaces) == 0 || reflect.DeepEqual(a.Namespaces, b.Namespaces)) && (len(a.Pods) == 0 || reflect.DeepEqual(a.Pods, b.Pods)) &&
		(len(a.Nodes) == 0 || reflect.DeepEqual(a.Nodes, b.Nodes)) && (len(a.Policies) == 0 || reflect.DeepEqual(a.Policies, b.Policies))
}

func compareNames(a, b policy.Name) int {
	return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
}
