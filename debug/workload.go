package debug

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	"github.com/nftcni/nftcni/policy"
)

// workload is the pods of one namespace that no policy can tell apart: same labels, same
// named ports. One of them stands for all.
type workload struct {
	key    string // stable between two versions of a cluster
	name   string
	group  string // namespace, empty for what is outside
	addrs  []netip.Addr
	pods   []policy.Name
	pod    policy.Pod
	isPods bool
}

// Labels that controllers give every pod or every revision, and that policies mean only
// if they name them.
var revisionLabels = []string{"pod-template-hash", "controller-revision-hash", "pod-template-generation",
	"statefulset.kubernetes.io/pod-name", "apps.kubernetes.io/pod-index", "controller-uid", "batch.kubernetes.io/controller-uid",
	"batch.kubernetes.io/job-completion-index"}

// workloads groups the pods of c that have addresses and adds world and the ipBlocks
// that policies name, sorted by group and name.
func workloads(c *policy.Cluster) []workload {
	ignored := ignoredLabels(c)
	byKey := map[string]*workload{}
	for i := range c.Pods {
		p := &c.Pods[i]
		if p.Finished || p.HostNetwork || len(p.Addrs) == 0 {
			continue
		}
		labels := withoutKeys(p.Labels, ignored)
		key := p.Namespace + "\x00" + labels.String() + "\x00" + portsKey(p.Ports)
		w := byKey[key]
		if w == nil {
			w = &workload{key: key, group: p.Namespace, addrs: p.Addrs, pod: *p, isPods: true, name: labelName(labels)}
			byKey[key] = w
		}
		w.pods = append(w.pods, p.Name)
	}
	var out []workload
	for _, w := range byKey {
		out = append(out, *w)
	}
	nameWorkloads(out)
	slices.SortFunc(out, func(a, b workload) int { return cmp.Or(cmp.Compare(a.group, b.group), cmp.Compare(a.name, b.name)) })
	return append(out, outsiders(c)...)
}

func ignoredLabels(c *policy.Cluster) []string {
	named := map[string]bool{}
	note := func(s policy.Selector) {
		for _, q := range s.Requirements {
			named[q.Key] = true
		}
	}
	for _, p := range c.Policies {
		note(p.Subject.Pods)
		for _, d := range policy.Directions {
			for _, r := range p.Rules[d] {
				for _, peer := range slices.Concat(r.Peers, r.NotPeers) {
					if peer.Pods != nil {
						note(peer.Pods.Pods)
					}
				}
			}
		}
	}
	return slices.DeleteFunc(slices.Clone(revisionLabels), func(k string) bool { return named[k] })
}

func withoutKeys(l policy.Labels, keys []string) policy.Labels {
	m := l.Map()
	for _, k := range keys {
		delete(m, k)
	}
	return policy.MakeLabels(m)
}

func portsKey(ports []policy.NamedPort) string {
	var b strings.Builder
	for _, p := range ports {
		b.WriteString(p.Name + "=" + portText(policy.PortMatch{Protocol: p.Protocol, First: p.Port, Last: p.Port}) + ",")
	}
	return b.String()
}

// labelName is how people call a workload.
func labelName(l policy.Labels) string {
	for _, k := range []string{"app.kubernetes.io/name", "app", "k8s-app", "component", "role", "name"} {
		if v, ok := l.Get(k); ok {
			return v
		}
	}
	return orDash(l.String())
}

// nameWorkloads makes names unique within a group: a lone pod is called by its name,
// workloads of one name by all their labels.
func nameWorkloads(list []workload) {
	for i := range list {
		w := &list[i]
		slices.SortFunc(w.pods, func(a, b policy.Name) int { return strings.Compare(a.Name, b.Name) })
		if len(w.pods) == 1 {
			w.name = w.pods[0].Name
		}
		w.name = w.group + "/" + w.name
	}
	count := map[string]int{}
	for _, w := range list {
		count[w.name]++
	}
	for i := range list {
		if w := &list[i]; count[w.name] > 1 {
			w.name = w.group + "/" + w.pods[0].Name
		}
	}
}

// outsiders are world and one address of every ipBlock that a policy names.
func outsiders(c *policy.Cluster) []workload {
	out := []workload{{key: "world", name: "world", addrs: world}}
	seen := map[string]bool{}
	for _, p := range c.Policies {
		for _, d := range policy.Directions {
			for _, r := range p.Rules[d] {
				for _, peer := range slices.Concat(r.Peers, r.NotPeers) {
					if peer.Block == nil || peer.Block.CIDR.Bits() == 0 || seen[blockName(*peer.Block)] {
						continue
					}
					if a := insideOf(*peer.Block); a.IsValid() {
						seen[blockName(*peer.Block)] = true
						out = append(out, workload{key: blockName(*peer.Block), name: blockName(*peer.Block), addrs: []netip.Addr{a}})
					}
				}
			}
		}
	}
	slices.SortFunc(out[1:], func(a, b workload) int { return a.addrs[0].Compare(b.addrs[0]) })
	return out
}

func blockName(b policy.Block) string {
	if len(b.Except) == 0 {
		return b.CIDR.String()
	}
	return b.CIDR.String() + " but " + join(b.Except)
}

// insideOf is the lowest address of a block that none of its exceptions holds.
func insideOf(b policy.Block) netip.Addr {
	a := b.CIDR.Addr()
	if !b.CIDR.IsSingleIP() {
		a = a.Next()
	}
	for range len(b.Except) + 1 {
		i := slices.IndexFunc(b.Except, func(e netip.Prefix) bool { return e.Contains(a) })
		if i < 0 {
			break
		}
		a = lastOf(b.Except[i]).Next()
	}
	if !a.IsValid() || !b.CIDR.Contains(a) || slices.ContainsFunc(b.Except, func(e netip.Prefix) bool { return e.Contains(a) }) {
		return netip.Addr{}
	}
	return a
}

func lastOf(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}
