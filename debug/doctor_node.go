package debug

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/cni"
	"github.com/nftcni/nftcni/nft"
)

// checkConflists: a runtime takes the first file by name.
func checkConflists(dir string) []Finding {
	const name = "CNI configuration"
	entries, err := os.ReadDir(dir)
	if err != nil {
		return []Finding{warn(name, err.Error(), "nftcni install writes one; --cni-conf-dir names another directory")}
	}
	var files []string
	for _, e := range entries {
		if ext := filepath.Ext(e.Name()); ext == ".conflist" || ext == ".conf" || ext == ".json" {
			files = append(files, e.Name())
		}
	}
	if len(files) == 0 {
		return []Finding{broken(name, dir+" holds none: the runtime cannot start pods", "nftcni install, or write a conflist with type nftcni")}
	}
	for i, file := range files {
		types, err := pluginTypes(filepath.Join(dir, file))
		if err != nil {
			return []Finding{broken(name, file+": "+err.Error(), "mend or remove it: some runtimes stop at the first bad file")}
		}
		if !slices.Contains(types, "nftcni") {
			continue
		}
		if i > 0 {
			return []Finding{warn(name, fmt.Sprintf("%s comes before %s: the runtime takes the first by name, which is not nftcni", files[0], file),
				"rename ours so that it sorts first, or remove the other")}
		}
		return []Finding{ok(name, "%s (%s)", file, strings.Join(types, ", "))}
	}
	return []Finding{warn(name, fmt.Sprintf("none of %s names nftcni", strings.Join(files, ", ")),
		"right where another CNI wires pods and nftcni enforces policies only; else nftcni install")}
}

func pluginTypes(path string) ([]string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var c struct {
		Type    string
		Plugins []struct{ Type string }
	}
	if err := json.Unmarshal(b, &c); err != nil {
		return nil, fmt.Errorf("not JSON: %w", err)
	}
	types := []string{c.Type}
	for _, p := range c.Plugins {
		types = append(types, p.Type)
	}
	return slices.DeleteFunc(types, func(t string) bool { return t == "" }), nil
}

// podLinks are the host's ends of pods, by what is wrong with them.
type podLinks struct {
	count       int
	stale, down []string
	up          map[string]int // index by name
}

func newPodLinks(links []netlink.Link, list []cni.Attachment) podLinks {
	known := map[string]bool{}
	for _, a := range list {
		known[a.HostInterface] = true
	}
	p := podLinks{up: map[string]int{}}
	for _, l := range links {
		n := l.Attrs().Name
		if !strings.HasPrefix(n, nft.InterfacePrefix) || len(n) != 15 || l.Type() != "veth" {
			continue
		}
		p.count++
		switch {
		case !known[n]:
			p.stale = append(p.stale, n)
		case !isUp(l):
			p.down = append(p.down, n)
		default:
			p.up[n] = l.Attrs().Index
		}
	}
	return p
}

// isUp: the link is up at both ends. The kernel says so in the operational state too, but up
// to a second later.
func isUp(l netlink.Link) bool { return l.Attrs().RawFlags&unix.IFF_LOWER_UP != 0 }

// checkLinks compares the pods' links and routes with the attachments and the uplink.
func (s *session) checkLinks(ctx context.Context) []Finding {
	const name = "links"
	links, err := netlink.LinkList()
	if err != nil {
		return []Finding{warn(name, err.Error(), "run as root on the node itself")}
	}
	list, errs := cni.Attachments(s.runDir)
	p := newPodLinks(links, list)
	out := []Finding{}
	for _, e := range errs {
		out = append(out, broken(name, e.Error(), "delete the pod; its DEL removes the record"))
	}
	if len(p.stale) > 0 {
		out = append(out, warn(name, plural(len(p.stale), "pod interface")+" without an attachment: "+firstOf(p.stale, 5),
			"the agent removes them while it runs; else delete the pod, or ip link del NAME"))
	}
	if len(p.down) > 0 {
		out = append(out, broken(name, "down: "+firstOf(p.down, 5), "the pod set its eth0 down, or its namespace is going away: restart the pod"))
	}
	out = append(out, checkPodRoutes(name, list, p.up)...)
	if len(out) == 0 {
		out = append(out, ok(name, "%s, all up and attached", plural(p.count, "pod interface")))
	}
	return append(out, checkMTU(ctx, links))
}

// checkPodRoutes: a link that was set down has lost its routes, and so have all when
// somebody flushed them.
func checkPodRoutes(name string, list []cni.Attachment, up map[string]int) []Finding {
	routes, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return []Finding{warn(name, "routes: "+err.Error(), "run as root on the node itself")}
	}
	to := map[netip.Addr]int{}
	for _, r := range routes {
		if r.Dst == nil {
			continue
		}
		if ones, bits := r.Dst.Mask.Size(); ones == bits {
			if a, ok := netip.AddrFromSlice(r.Dst.IP); ok {
				to[a.Unmap()] = r.LinkIndex
			}
		}
	}
	var lost []string
	example := ""
	for _, a := range list {
		for _, addr := range a.Addresses {
			if index, isUp := up[a.HostInterface]; isUp && to[addr] != index {
				lost = append(lost, fmt.Sprintf("%s (%s/%s)", addr, a.Namespace, a.Pod))
				example = fmt.Sprintf("ip route replace %s dev %s scope link", addr, a.HostInterface)
			}
		}
	}
	if len(lost) == 0 {
		return nil
	}
	return []Finding{broken(name, "no route to "+firstOf(lost, 5)+": its interface was down, or somebody removed it", "restart the pods, or: "+example)}
}

// checkMTU: a pod's MTU above the uplink's loses big packets where path MTU discovery
// does not work.
func checkMTU(_ context.Context, links []netlink.Link) Finding {
	const name = "MTU"
	uplink := defaultLink(links)
	if uplink == nil {
		return warn(name, "there is no default route to compare with", "nothing to do on a node without an uplink")
	}
	for _, l := range links {
		a := l.Attrs()
		if strings.HasPrefix(a.Name, nft.InterfacePrefix) && len(a.Name) == 15 && a.MTU > uplink.Attrs().MTU {
			return warn(name, fmt.Sprintf("%s has %d, the uplink %s %d", a.Name, a.MTU, uplink.Attrs().Name, uplink.Attrs().MTU),
				fmt.Sprintf("set mtu: %d in the agent's configuration and restart the pods", uplink.Attrs().MTU))
		}
	}
	return ok(name, "uplink %s has %d, no pod has more", uplink.Attrs().Name, uplink.Attrs().MTU)
}

func defaultLink(links []netlink.Link) netlink.Link {
	routes, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil
	}
	for _, r := range routes {
		if r.Dst != nil {
			if ones, _ := r.Dst.Mask.Size(); ones != 0 {
				continue
			}
		}
		for _, l := range links {
			if l.Attrs().Index == r.LinkIndex {
				return l
			}
		}
	}
	return nil
}

// checkKubeProxy tells its mode by what it leaves in the kernel.
func checkKubeProxy(ctx context.Context) Finding {
	const name = "kube-proxy"
	chains, err := nft.TablesWithChain(ctx, nft.Options{}, "KUBE-SERVICES", "services")
	if err != nil {
		return warn(name, err.Error(), "run as root on the node itself")
	}
	ipvs, _ := os.ReadFile("/proc/net/ip_vs") // none: no IPVS
	return kubeProxyFinding(chains, strings.Count(string(ipvs), "\n") > 3)
}

// kubeProxyFinding: chains are those named KUBE-SERVICES or services, as "ip kube-proxy".
func kubeProxyFinding(tables []string, ipvs bool) Finding {
	const name = "kube-proxy"
	var modes []string
	add := func(mode string, seen bool) {
		if seen {
			modes = append(modes, mode)
		}
	}
	add("nftables", slices.ContainsFunc(tables, func(t string) bool { return strings.HasSuffix(t, " kube-proxy") }))
	add("iptables", slices.ContainsFunc(tables, func(t string) bool { return strings.HasSuffix(t, " nat") }))
	add("IPVS", ipvs)
	switch {
	case len(modes) > 1:
		return warn(name, "rules of several modes: "+strings.Join(modes, " and ")+": Services may go to backends that are gone",
			"kube-proxy --cleanup removes the rules of the modes it does not run in; a reboot does too")
	case ipvs:
		return warn(name, "IPVS mode: what pods send to Services passes policies unjudged, only the answers are judged; it is not tested with nftcni",
			"use kube-proxy's nftables mode, the one that is tested (--proxy-mode=nftables)")
	case len(modes) == 0:
		return ok(name, "no rules of it (none runs, another program serves Services, or it uses iptables-legacy)")
	}
	return ok(name, "%s mode", modes[0])
}

// featureFindings says what this kernel lacks.
func featureFindings(list []nft.Feature) []Finding {
	var out []Finding
	for _, f := range list {
		name := "kernel"
		switch {
		case f.Err == nil:
			out = append(out, ok(name, "%s", f.Name))
		case f.Denied:
			out = append(out, warn(name, f.Name+": "+f.State(), "run as root on the node itself"))
		case strings.Contains(f.Name, "persist"):
			out = append(out, warn(name, f.Name+": "+f.State(), "a foreign nft flush ruleset removes the table until the agent mends it, within milliseconds"))
		default:
			out = append(out, broken(name, f.Name+": "+f.State(), "use a kernel with nf_tables, 6.1 or newer"))
		}
	}
	return out
}
