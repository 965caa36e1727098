package debug

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/nftcni/nftcni/k8s"
	"github.com/nftcni/nftcni/policy"
)

// loadManifests reads a file or a directory and gives its pods addresses, told what is
// wrong with it.
func loadManifests(path string, notice func(string)) (*policy.Cluster, error) {
	c, problems, err := k8s.LoadDir(path)
	if err != nil {
		return nil, err
	}
	for _, p := range problems {
		notice(p.String())
	}
	assignAddresses(c)
	return c, nil
}

// assignAddresses gives pods without addresses one of each family: those of manifests
// have none until a node attaches them. They come from the podCIDRs of the pod's node, or
// the first node's, else from 100.64.0.0/10 and fd00:6440::/64, which no ipBlock of a
// policy means by accident.
func assignAddresses(c *policy.Cluster) {
	taken := map[netip.Addr]bool{}
	for _, p := range c.Pods {
		for _, a := range p.Addrs {
			taken[a] = true
		}
	}
	for i := range c.Pods {
		p := &c.Pods[i]
		if p.Finished || p.HostNetwork || len(p.Addrs) > 0 {
			continue
		}
		for _, pool := range poolsFor(c, p.Node) {
			if a := nextFree(pool, taken); a.IsValid() {
				taken[a] = true
				p.Addrs = append(p.Addrs, a)
			}
		}
	}
}

func poolsFor(c *policy.Cluster, node string) []netip.Prefix {
	for _, n := range c.Nodes {
		if (n.Name == node || node == "") && len(n.PodCIDRs) > 0 {
			return n.PodCIDRs
		}
	}
	return []netip.Prefix{netip.MustParsePrefix("100.64.0.0/10"), netip.MustParsePrefix("fd00:6440::/64")}
}

// nextFree is the lowest address of pool after the first that is not taken; invalid when
// the pool is full.
func nextFree(pool netip.Prefix, taken map[netip.Addr]bool) netip.Addr {
	a := pool.Masked().Addr()
	for pool.Contains(a) {
		if a = a.Next(); !taken[a] && pool.Contains(a) {
			return a
		}
	}
	return netip.Addr{}
}

// overlay is c with the objects of changes added or replaced.
func overlay(c, changes *policy.Cluster) *policy.Cluster {
	return &policy.Cluster{
		Namespaces: replaceBy(c.Namespaces, changes.Namespaces, func(n policy.Namespace) string { return n.Name }),
		Pods:       replaceBy(c.Pods, keepAddresses(c, changes.Pods), func(p policy.Pod) string { return p.Name.String() }),
		Nodes:      replaceBy(c.Nodes, changes.Nodes, func(n policy.Node) string { return n.Name }),
		Policies:   replaceBy(c.Policies, changes.Policies, func(p policy.Policy) policy.PolicyID { return p.ID }),
	}
}

func replaceBy[T any, K comparable](old, changed []T, key func(T) K) []T {
	with := map[K]bool{}
	for _, o := range changed {
		with[key(o)] = true
	}
	out := make([]T, 0, len(old)+len(changed))
	for _, o := range old {
		if !with[key(o)] {
			out = append(out, o)
		}
	}
	return append(out, changed...)
}

// keepAddresses: a pod's manifest says nothing of where it runs and its addresses.
func keepAddresses(c *policy.Cluster, pods []policy.Pod) []policy.Pod {
	out := make([]policy.Pod, 0, len(pods))
	for _, p := range pods {
		for _, old := range c.Pods {
			if old.Name == p.Name {
				p.Addrs, p.Node, p.Attached, p.UID, p.Created = old.Addrs, old.Node, old.Attached, old.UID, old.Created
			}
		}
		out = append(out, p)
	}
	return out
}

// isolatedAddr is the n-th address for a pod that a test makes up: 198.18.0.0/15 and its
// like (RFC 2544, RFC 5180) belong to nobody.
func isolatedAddr(n int) []netip.Addr {
	v4 := binary.BigEndian.AppendUint32(nil, 198<<24|18<<16|uint32(n+1))
	v6 := netip.MustParseAddr("2001:2::").As16()
	binary.BigEndian.PutUint32(v6[12:], uint32(n+1))
	a, _ := netip.AddrFromSlice(v4)
	return []netip.Addr{a, netip.AddrFrom16(v6)}
}

func problemCount(problems []k8s.Problem) (refused int) {
	for _, p := range problems {
		if p.Severity == k8s.Refused {
			refused++
		}
	}
	return refused
}

// describeProblems is "2 objects are not honoured as written".
func describeProblems(refused int) error {
	if refused == 0 {
		return nil
	}
	return fmt.Errorf("%s not in force as written: see the notes above", plural(refused, "object")+map[bool]string{true: " is", false: " are"}[refused == 1])
}
