package debug

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/nftcni/nftcni/cni"
	"github.com/nftcni/nftcni/ipam"
)

func (s *session) checkLeases(ctx context.Context) []Finding {
	const name = "leases"
	rows, err := s.leases(ctx)
	if err != nil {
		return []Finding{warn(name, err.Error(), "name the state directory with --state-dir")}
	}
	list, _ := cni.Attachments(s.runDir) // checkLinks tells of records that cannot be read
	ready, err := cni.NewClient(s.runDir).Ready(ctx)
	if err != nil {
		ready.PodCIDRs = nil // without an agent the networks' own ranges are known
	}
	return leaseFindings(name, rows, list, ready.PodCIDRs)
}

// leaseFindings compares leases with attachments, and counts what pools have left.
func leaseFindings(name string, rows []LeaseRow, list []cni.Attachment, podCIDRs []netip.Prefix) []Finding {
	out := leaseDrift(name, rows, list)
	pools := slices.Clone(podCIDRs)
	for _, a := range list {
		pools = append(pools, a.Pools...)
	}
	slices.SortFunc(pools, netip.Prefix.Compare)
	left := ""
	for _, p := range slices.Compact(pools) {
		r, err := ipam.NewRange(p, netip.Addr{}, netip.Addr{}, netip.Addr{})
		if err != nil {
			continue // ADD tells of it
		}
		used := 0
		for _, row := range rows {
			if r.Contains(row.Address) {
				used++
			}
		}
		size := r.Size()
		text := fmt.Sprintf("%d of %d addresses of %s are in use", used, size, p)
		switch remedy := "delete pods, or give the node a larger podCIDR (a network: another range); nftcni debug ipam shows who holds them"; {
		case uint64(used) >= size:
			out = append(out, broken(name, text+": the next pod cannot start", remedy))
		case uint64(used)*100 >= size*90:
			out = append(out, warn(name, text, remedy))
		}
		if p.Addr().Is4() {
			left += "; " + text
		}
	}
	if len(out) == 0 {
		out = append(out, ok(name, "%s, all of living pods%s", plural(len(rows), "address"), left))
	}
	return out
}

// leaseDrift is what leases and attachments say differently.
func leaseDrift(name string, rows []LeaseRow, list []cni.Attachment) []Finding {
	var gone, unattached, unleased, twice []string
	leased, networks := map[netip.Addr]bool{}, map[string]bool{}
	attached := map[netip.Addr]string{}
	for _, a := range list {
		for _, addr := range a.Addresses {
			if other, ok := attached[addr]; ok {
				twice = append(twice, fmt.Sprintf("%s (%s and %s)", addr, other, a.HostInterface))
			}
			attached[addr] = a.HostInterface
		}
	}
	for _, r := range rows {
		leased[r.Address], networks[r.Network] = true, true
		switch {
		case r.NetNSGone:
			gone = append(gone, r.Address.String())
		case attached[r.Address] == "":
			unattached = append(unattached, r.Address.String())
		}
	}
	for _, a := range list {
		for _, addr := range a.Addresses {
			if networks[a.Network] && !leased[addr] { // a network without leases has another IPAM
				unleased = append(unleased, fmt.Sprintf("%s (%s/%s)", addr, a.Namespace, a.Pod))
			}
		}
	}
	return slices.Concat(
		drifted(gone, warn, name, "leased to network namespaces that are gone",
			"the agent releases them within seconds when it runs; else the runtime's CNI GC does (nftcni debug ipam lists them)"),
		drifted(unattached, warn, name, "leased without an attachment of this node",
			"right while a pod is being made, or for another plugin that delegates to nftcni-ipam; else delete the pod (nftcni debug ipam says which)"),
		drifted(unleased, broken, name, "used by pods but not leased, so another pod may get them", "restart these pods"),
		drifted(twice, broken, name, "held by two pods", "restart both pods"))
}

// drifted is the finding about a list of addresses, none for none.
func drifted(list []string, find func(check, found, remedy string) Finding, name, what, remedy string) []Finding {
	if len(list) == 0 {
		return nil
	}
	return []Finding{find(name, plural(len(list), "address")+" "+what+": "+firstOf(list, 5), remedy)}
}

func firstOf(list []string, n int) string {
	if len(list) <= n {
		return strings.Join(list, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(list[:n], ", "), len(list)-n)
}
