package debug

import (
	"context"
	"fmt"
	"strings"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/cni"
)

// checkMesh tells how the pods of other nodes are reached, and whether the paths carry what they
// should. Without an agent, other nodes or routes of ours there is nothing to tell.
func (s *session) checkMesh(ctx context.Context) []Finding {
	var st agent.MeshStatus
	if s.get(ctx, agent.PathMesh, &st) != nil {
		return nil
	}
	return meshFindings(st)
}

func meshFindings(st agent.MeshStatus) []Finding {
	var out []Finding
	const name = "other nodes"
	switch {
	case len(st.Report.Problems) > 0:
		f := warn(name, fmt.Sprintf("%s, the first: %s", plural(len(st.Report.Problems), "problem"), st.Report.Problems[0]),
			"what each message says; the agent's log has them all")
		if reached(st.Report.Paths) == 0 {
			f.Health = Broken
		}
		out = append(out, f)
	case len(st.Report.Paths) > 0:
		out = append(out, ok(name, "%s: %s", plural(len(st.Report.Paths), "pod network"), describeVia(st.Report.Paths)))
	default:
		return nil
	}
	out = append(out, pathFindings(st)...)
	if st.Rotation.Active {
		out = append(out, ok("WireGuard key", "being rotated: %s yet to move; the old key goes when nothing has come with it for 4 minutes", plural(st.Rotation.Moving, "node")))
	}
	return out
}

func reached(paths []cni.PeerPath) (n int) {
	for _, p := range paths {
		if p.Via != cni.ViaUnreachable {
			n++
		}
	}
	return n
}

func describeVia(paths []cni.PeerPath) string {
	count := map[cni.MeshVia]int{}
	for _, p := range paths {
		count[p.Via]++
	}
	var parts []string
	for _, via := range []cni.MeshVia{cni.ViaDirect, cni.ViaVXLAN, cni.ViaWireGuard, cni.ViaUnreachable} {
		if count[via] > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", count[via], via))
		}
	}
	return strings.Join(parts, ", ")
}

// pathFindings judges what the agent's probes found. A path that answers nothing is not known to be
// small: firewalls drop echo requests.
func pathFindings(st agent.MeshStatus) []Finding {
	const name = "path MTU"
	var silent, fit int // the rest of the report's paths is being asked
	var small []cni.PathProbe
	for _, p := range st.Probes {
		switch {
		case p.TooSmall():
			small = append(small, p)
		case p.Carries == 0:
			silent++
		default:
			fit++
		}
	}
	switch {
	case len(small) > 0:
		p := small[0]
		return []Finding{broken(name, fmt.Sprintf("%s of %s lose large packets; %s carries %d bytes of %d: TLS handshakes hang", plural(len(small), "path"),
			plural(len(st.Probes), "path"), p.Address, p.Carries, p.Want),
			fmt.Sprintf("mend the path, or set mtu: %d in the configuration of every node's agent", podMTU(st.Report, small)))}
	case st.ProbeErr != "":
		return []Finding{warn(name, "not all paths could be probed: "+st.ProbeErr, "ping -M do -s SIZE the other nodes' addresses by hand")}
	case len(st.Probes) == 0:
		return nil // being asked
	case silent > 0:
		return []Finding{warn(name, fmt.Sprintf("%d of %s to other nodes answer no echo request, the rest carry what their links do", silent, plural(silent+fit, "path")), "let ICMP echo requests pass between nodes, or trust the links")}
	}
	return []Finding{ok(name, "%s to other nodes carry what their links do", plural(fit, "path"))}
}

// podMTU is what the worst of the small paths leaves a pod.
func podMTU(r cni.Report, small []cni.PathProbe) int {
	least := 0
	for _, p := range r.Paths {
		for _, s := range small {
			if p.Address == s.Address && p.LinkMTU == s.Want {
				if mtu := p.MTU - (s.Want - s.Carries); least == 0 || mtu < least {
					least = mtu
				}
			}
		}
	}
	return least
}
