package agent

import (
	"maps"
	"slices"
	"strings"

	"github.com/nftcni/nftcni/cni"
	"github.com/nftcni/nftcni/policy"
)

// A static pod is the kubelet's own, made from a file of the node. Runtimes name it by the
// MD5 of that file, never by a UUID as the API server does; the pod that the API server
// lists for it, its mirror, has that name as an annotation (k8s.Cluster reads it as the
// UID). The kubelet starts a static pod although no mirror can be made, so such a pod does
// not wait for one longer than others wait for theirs: until then its labels are unknown.
func isStatic(a cni.Attachment) bool {
	const digits = 32
	return a.Pod != "" && len(a.UID) == digits && strings.Trim(a.UID, "0123456789abcdef") == ""
}

// unlabelledSuffix ends the name under which the engine knows the static pods of a
// namespace whose labels are unknown: no API object can have such a name, so no policy of
// the namespace grants them anything.
const unlabelledSuffix = "@labels-unknown"

// unlabelled are the static pods of unknown labels. They are isolated in the directions in
// which a policy of their namespace could select them.
type unlabelled struct {
	mirrors bool                       // the source is an API server, where static pods have mirrors
	pods    map[string]map[string]bool // namespace -> host interfaces
	told    map[string]isolation       // namespace -> what the engine was told
}

// isolation is a namespace that exists for the engine only, and its one policy.
type isolation struct {
	namespace *policy.Namespace
	policy    *policy.Policy
}

func (u *unlabelled) set(at *attachment, is bool) {
	ns := podName(at.Attachment).Namespace
	switch {
	case !is:
		delete(u.pods[ns], at.HostInterface)
		if len(u.pods[ns]) == 0 {
			delete(u.pods, ns)
		}
	case u.pods[ns] == nil:
		if u.pods == nil {
			u.pods = map[string]map[string]bool{}
		}
		u.pods[ns] = map[string]bool{at.HostInterface: true}
	default:
		u.pods[ns][at.HostInterface] = true
	}
}

// labelled returns the attachments of a name whose pod is, or was, listed by the source or
// need not be, and the engine's pods of the others.
func (v *inventory) labelled(n policy.Name, src *policy.Pod) (known []*attachment, unknown []policy.Pod) {
	if !v.unlabelled.mirrors {
		return v.byPod[n], nil
	}
	for _, at := range v.byPod[n] {
		is := at.joined == nil && isStatic(at.Attachment) && (src == nil || stale(at.Attachment, *src))
		v.unlabelled.set(at, is)
		if !is {
			known = append(known, at)
			continue
		}
		unknown = append(unknown, policy.Pod{
			Name: policy.Name{Namespace: n.Namespace + unlabelledSuffix, Name: n.Name + "@" + at.HostInterface},
			UID:  at.UID, Node: v.node, Attached: true, Addrs: at.Addresses,
		})
	}
	return known, unknown
}

// isolateUnlabelled brings the engine's isolations up to date.
func (v *inventory) isolateUnlabelled() []policy.Event {
	u := &v.unlabelled
	if len(u.pods)+len(u.told) == 0 {
		return nil
	}
	var events []policy.Event
	now := map[string]isolation{}
	for ns := range u.pods {
		i := v.isolationOf(ns)
		was, known := u.told[ns]
		if !known || was.namespace.Labels != i.namespace.Labels {
			events = append(events, policy.Event{Namespace: i.namespace})
		}
		if !known || was.policy.Applies != i.policy.Applies {
			events = append(events, policy.Event{Policy: i.policy})
		}
		now[ns] = i
	}
	for _, ns := range slices.Sorted(maps.Keys(u.told)) {
		if _, still := now[ns]; !still {
			events = append(events, policy.Event{Delete: true, Policy: u.told[ns].policy}, policy.Event{Delete: true, Namespace: u.told[ns].namespace})
		}
	}
	u.told = now
	return events
}

// isolationOf selects every pod of the engine's namespace, in each direction that a policy
// that may select pods of ns has, and allows nothing.
func (v *inventory) isolationOf(ns string) isolation {
	name := ns + unlabelledSuffix
	i := isolation{namespace: &policy.Namespace{Name: name}, policy: &policy.Policy{
		ID:   policy.PolicyID{Kind: "StaticPods", Name: policy.Name{Namespace: name, Name: "isolated-until-mirrored"}},
		Tier: policy.TierNamespaced, Subject: policy.PodSelector{Namespace: name}, Isolates: true,
	}}
	if known := v.namespaces[ns]; known != nil {
		i.namespace.Labels = known.Labels
	}
	for _, p := range v.policies {
		s := p.Subject
		if s.Namespace == ns || s.Namespace == "" && s.Namespaces.Matches(i.namespace.Labels) {
			for dir, applies := range p.Applies {
				i.policy.Applies[dir] = i.policy.Applies[dir] || applies
			}
		}
	}
	return i
}
