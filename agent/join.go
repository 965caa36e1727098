package agent

import (
	"github.com/nftcni/nftcni/cni"
	"github.com/nftcni/nftcni/policy"
)

// join returns the engine's pods for a name: the current pod with the addresses of its
// attachments, and one for each attachment of an earlier pod of that name.
func (v *inventory) join(n policy.Name) []policy.Pod {
	src := v.pods[n]
	atts, out := v.labelled(n, src)
	var current policy.Pod
	switch {
	case src != nil:
		current = *src
	case len(atts) > 0:
		current = v.unlisted(n, atts[len(atts)-1])
	default:
		return out
	}
	if len(v.byPod[n]) > 0 {
		current.Addrs = nil // only what the kernel holds
	} else if v.foreign(&current) {
		current.Node = "" // a peer by its address, but not ours to enforce on
	}
	for _, at := range atts {
		if stale(at.Attachment, current) {
			out = append(out, v.stalePod(n, at))
			continue
		}
		current.Node, current.Attached = v.node, true
		current.Addrs = append(current.Addrs, at.Addresses...)
	}
	for _, at := range atts {
		if !stale(at.Attachment, current) {
			at.joined = &current
		}
	}
	return append([]policy.Pod{current}, out...)
}

// foreign reports whether another plugin wires a pod of this node (or nobody does yet).
func (v *inventory) foreign(p *policy.Pod) bool {
	return v.network == NetworkRouted && p.Node == v.node && !p.HostNetwork
}

func stale(a cni.Attachment, p policy.Pod) bool { return a.UID != "" && p.UID != "" && a.UID != p.UID }

// unlisted is a pod that the source does not list (yet, any more, or ever).
func (v *inventory) unlisted(n policy.Name, at *attachment) policy.Pod {
	if at.joined != nil && at.joined.Name == n {
		p := *at.joined
		p.Finished = false // its sandbox is still there
		return p
	}
	return policy.Pod{Name: n, UID: at.UID, Node: v.node, Labels: policy.MakeLabels(at.Labels)}
}

func (v *inventory) stalePod(n policy.Name, at *attachment) policy.Pod {
	p := policy.Pod{Labels: policy.MakeLabels(at.Labels)}
	if at.joined != nil {
		p = *at.joined
	}
	p.Name = policy.Name{Namespace: n.Namespace, Name: n.Name + "@" + at.HostInterface}
	p.UID, p.Node, p.Attached, p.Addrs = at.UID, v.node, true, at.Addresses
	at.joined = &p
	return p
}
