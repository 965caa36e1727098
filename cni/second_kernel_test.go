package cni

import (
	"strings"
	"testing"
)

// TestKernelSecondInterface attaches a pod twice, under two interface names.
func TestKernelSecondInterface(t *testing.T) {
	n := newNode(t)
	l := n.list("1.1.0", dualStack)
	first := n.runtime("a", n.pod("a"))
	n.mustAdd(l, first)
	before := n.snapshot()
	second := *first
	second.IfName = "net1"
	_, err := n.add(l, &second)
	if code(err) != 7 || !strings.Contains(err.Error(), "ipam.routes: the pod has a route 0.0.0.0/0 already") {
		t.Errorf("two default routes: %v, want code 7 and ipam.routes", err)
	}
	n.same("an ADD that is refused", before)
	n.mustDel(l, &second)

	routed := n.list("1.1.0", strings.Replace(dualStack, `"ranges"`, `"routes": [{"dst": "198.51.100.0/24"}], "ranges"`, 1))
	n.mustAdd(routed, &second)
	n.mustDel(routed, &second)
	n.same("a second interface with routes of its own", before)

	lo := *first
	lo.IfName = "lo"
	if _, err := n.add(l, &lo); code(err) != 4 || !strings.Contains(err.Error(), "CNI_IFNAME: lo") {
		t.Errorf("CNI_IFNAME=lo: %v, want code 4", err)
	}
	n.mustDel(l, &lo)
	n.mustDel(l, first)
}
