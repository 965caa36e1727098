package debug

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/cni"
)

func TestMeshFindings(t *testing.T) {
	a, b := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	paths := []cni.PeerPath{{Peer: "n2", Via: cni.ViaDirect, Address: a, LinkMTU: 1500, MTU: 1500}, {Peer: "n3", Via: cni.ViaVXLAN, Address: b, LinkMTU: 1500, MTU: 1450}}
	problem := []cni.MeshProblem{{Peer: "n3", Message: "no route"}}
	probe := func(carries ...int) (out []cni.PathProbe) {
		for i, n := range carries {
			out = append(out, cni.PathProbe{Address: []netip.Addr{a, b}[i], Want: 1500, Carries: n})
		}
		return out
	}
	for _, tt := range []struct {
		name   string
		status agent.MeshStatus
		want   []string // check health found remedy, parts of each finding
	}{
		{"no other node", agent.MeshStatus{}, nil},
		{"well", agent.MeshStatus{Report: cni.Report{Paths: paths}, Probes: probe(1500, 1500)},
			[]string{"other nodes|ok|1 direct, 1 vxlan", "path MTU|ok|2 paths"}},
		{"a small path", agent.MeshStatus{Report: cni.Report{Paths: paths}, Probes: probe(1500, 1400)},
			[]string{"other nodes|ok|", "path MTU|broken|192.0.2.2 carries 1400 bytes of 1500|mtu: 1350"}},
		{"silent", agent.MeshStatus{Report: cni.Report{Paths: paths}, Probes: probe(1500, 0)},
			[]string{"other nodes|ok|", "path MTU|warning|1 of 2 paths to other nodes answer no echo"}},
		{"no right to probe", agent.MeshStatus{Report: cni.Report{Paths: paths}, ProbeErr: "no right"},
			[]string{"other nodes|ok|", "path MTU|warning|no right"}},
		{"a problem", agent.MeshStatus{Report: cni.Report{Paths: paths, Problems: problem}},
			[]string{"other nodes|warning|node n3: no route"}},
		{"nobody is reached", agent.MeshStatus{Report: cni.Report{Paths: []cni.PeerPath{{Via: cni.ViaUnreachable}}, Problems: problem}},
			[]string{"other nodes|broken|"}},
		{"rotation", agent.MeshStatus{Report: cni.Report{Paths: paths}, Rotation: cni.Rotation{Active: true, Moving: 3}},
			[]string{"other nodes|ok|", "WireGuard key|ok|3 nodes"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := meshFindings(tt.status)
			if len(got) != len(tt.want) {
				t.Fatalf("%d findings, want %d: %+v", len(got), len(tt.want), got)
			}
			for i, f := range got {
				text := strings.Join([]string{f.Check, string(f.Health), f.Found, f.Remedy}, "|")
				for part := range strings.SplitSeq(tt.want[i], "|") {
					if !strings.Contains(text, part) {
						t.Errorf("%s: lacks %q", text, part)
					}
				}
			}
		})
	}
}
