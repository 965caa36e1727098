package cni

import (
	"strings"
	"testing"
)

func TestKernelMesh(t *testing.T) {
	one, routed, mixed := []int{1, 1, 1}, []int{1, 2, 3}, []int{1, 1, 2}
	tests := []struct {
		name string
		labShape
		mode   MeshMode
		near   string // how node 1 reaches node 2
		far    string // how node 1 reaches node 3
		far6   bool
		podMTU int // of node 1
	}{
		{name: "one link, v4", labShape: labShape{links: one, nodes4: true, pods4: true}, near: "direct", far: "direct", podMTU: 1500},
		{name: "one link, v6", labShape: labShape{links: one, nodes6: true, pods6: true}, near: "direct", far: "direct", podMTU: 1500},
		{name: "one link, dual", labShape: labShape{links: one, nodes4: true, nodes6: true, pods4: true, pods6: true}, near: "direct direct", far: "direct direct", podMTU: 1500},
		{name: "router, v4", labShape: labShape{links: routed, nodes4: true, pods4: true}, near: "vxlan", far: "vxlan", podMTU: 1450},
		{name: "router, v6", labShape: labShape{links: routed, nodes6: true, pods6: true}, near: "vxlan", far: "vxlan", podMTU: 1430},
		{name: "router, dual", labShape: labShape{links: routed, nodes4: true, nodes6: true, pods4: true, pods6: true}, near: "vxlan vxlan", far: "vxlan vxlan", podMTU: 1430},
		{name: "mixed, v4", labShape: labShape{links: mixed, nodes4: true, pods4: true}, near: "direct", far: "vxlan", podMTU: 1450},
		{name: "mixed, dual", labShape: labShape{links: mixed, nodes4: true, nodes6: true, pods4: true, pods6: true}, near: "direct direct", far: "vxlan vxlan", podMTU: 1430},
		{name: "v4 pods over v6 nodes", labShape: labShape{links: mixed, nodes6: true, pods4: true}, near: "vxlan", far: "vxlan", podMTU: 1430},
		{name: "v6 pods over v4 nodes", labShape: labShape{links: one, nodes4: true, pods6: true}, near: "vxlan", far: "vxlan", podMTU: 1450},
		{name: "dual pods over v4 nodes", labShape: labShape{links: mixed, nodes4: true, pods4: true, pods6: true}, near: "direct vxlan", far: "vxlan vxlan", podMTU: 1450},
		{name: "vxlan on one link", labShape: labShape{links: one, nodes4: true, nodes6: true, pods4: true, pods6: true}, mode: MeshVXLAN, near: "vxlan vxlan", far: "vxlan vxlan", podMTU: 1430},
		{name: "direct on one link", labShape: labShape{links: one, nodes4: true, pods4: true}, mode: MeshDirect, near: "direct", far: "direct", podMTU: 1500},
	}
	for _, tt := range tests {
		t.Run(strings.ReplaceAll(tt.name, " ", "_"), func(t *testing.T) {
			l := newLab(t, tt.labShape, MeshConfig{Mode: tt.mode})
			l.set()
			if near, far := l.via(0, 1), l.via(0, 2); near != tt.near || far != tt.far {
				t.Errorf("node 2 via %s, node 3 via %s; want %s and %s", near, far, tt.near, tt.far)
			}
			if got := l.nodes[0].mesh.MTU(); got != tt.podMTU {
				t.Errorf("MTU %d, want %d", got, tt.podMTU)
			}
			l.idle()
			l.talkAll()
		})
	}
}
