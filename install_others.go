package main

import (
	"fmt"
	"io"
	"maps"
	"net"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/deploy"
)

// otherLinks are interfaces by which CNI plugins are known.
var otherLinks = []struct{ name, links string }{
	{"flannel", "flannel*"},
	{"the bridge plugin", "cni0"},
	{"Calico", "cali*"},
	{"Calico", "vxlan*.calico"},
	{"Calico", "wireguard.cali"},
	{"Calico", "tunl0"},
	{"Cilium", "cilium_*"},
	{"Weave Net", "weave"},
	{"kube-router", "kube-bridge"},
	{"Antrea", "antrea-gw0"},
}

// otherVeths is how plugins name the node's end of a veth, where a pattern would match too much
// (containernetworking/plugins, pkg/ip, RandomVethName; Cilium, pkg/endpoint/connector).
var otherVeths = []struct {
	name  string
	links *regexp.Regexp
}{
	{"a pod of the reference plugins", regexp.MustCompile(`^veth[0-9a-f]{8}$`)},
	{"a pod of Cilium", regexp.MustCompile(`^lxc([0-9a-f]{12,13}|_health)$`)},
}

// trace is something that another CNI plugin has left on the node.
type trace struct{ what, remove string }

// reportOthers says what of other CNI plugins is still on the node, and how to remove it
// later. It is left alone, but for bridges (deploy.Layout.ProxyARP): pods that were started with it use it.
func reportOthers(out io.Writer, l deploy.Layout) error {
	networks := l.OtherNetworks()
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("list interfaces: %w", err)
	}
	owned := linksOfOthers(links, networks)
	traces, err := linkTraces(links, owned)
	if err != nil {
		return err
	}
	tables, err := tableTraces()
	if err != nil {
		return err
	}
	traces = slices.Concat(traces, tables, directoryTraces(l.Root, networks))
	for _, t := range traces {
		fmt.Fprintf(out, "%-12s %s\n%-12s   remove: %s\n", "left alone", t.what, "", t.remove)
	}
	for _, link := range links {
		if _, is := owned[link.Attrs().Index]; is && link.Type() == "bridge" {
			if err := openBridge(out, l, link); err != nil {
				return err
			}
		}
	}
	reportUnseenAddresses(out, networks)
	if len(traces) > 0 {
		fmt.Fprintln(out, "\nPods that run keep their interfaces and addresses until they are restarted. Remove what is\n"+
			"left alone when the last of them is gone, or reboot then: only the directories survive it, and the\n"+
			"old plugin's DaemonSet, which would bring it all back (docs/install.md, Migration).")
	}
	return nil
}

// linksOfOthers says by index whose a link is: by its name, by a configuration that names
// it, or as the port of such a bridge. A bridge that leads out of the node is the
// administrator's, whoever plugs pods into it.
func linksOfOthers(links []netlink.Link, networks []deploy.OtherNetwork) map[int]string {
	owned := map[int]string{}
	for _, link := range links {
		if of := ownerOf(link, networks); of != "" && !(link.Type() == "bridge" && leadsOut(link, links)) {
			owned[link.Attrs().Index] = of
		}
	}
	bridges := maps.Clone(owned)
	for _, link := range links {
		if of, is := bridges[link.Attrs().MasterIndex]; is && link.Type() == "veth" {
			owned[link.Attrs().Index] = "a pod of " + of
		}
	}
	return owned
}

func ownerOf(link netlink.Link, networks []deploy.OtherNetwork) string {
	name := link.Attrs().Name
	for _, n := range networks {
		if n.Bridge == name && link.Type() == "bridge" {
			return "network " + n.Name
		}
	}
	for _, o := range otherVeths {
		if link.Type() == "veth" && o.links.MatchString(name) {
			return o.name
		}
	}
	for _, o := range otherLinks {
		if ok, err := path.Match(o.links, name); err == nil && ok && (name != "tunl0" || link.Attrs().Flags&net.FlagUp != 0) {
			return o.name // tunl0 is in every namespace when its module is loaded; Calico sets it up
		}
	}
	return ""
}

// leadsOut tells bridges with a port that is no pod's.
func leadsOut(bridge netlink.Link, links []netlink.Link) bool {
	return slices.ContainsFunc(links, func(l netlink.Link) bool {
		return l.Attrs().MasterIndex == bridge.Attrs().Index && l.Type() != "veth"
	})
}

// linkTraces names the links with their routes, which go with them, and routes without a link.
func linkTraces(links []netlink.Link, owned map[int]string) ([]trace, error) {
	routes := map[int][]string{}
	var out []trace
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		list, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return nil, fmt.Errorf("list routes: %w", err)
		}
		for _, r := range list {
			if r.Dst == nil || r.Dst.IP.IsLinkLocalUnicast() {
				continue
			}
			routes[r.LinkIndex] = append(routes[r.LinkIndex], r.Dst.String())
			if r.Type == unix.RTN_BLACKHOLE && (r.Protocol == unix.RTPROT_BIRD || r.Protocol == felixProtocol) {
				out = append(out, trace{"route blackhole " + r.Dst.String() + " of Calico", "ip route delete blackhole " + r.Dst.String()})
			}
		}
	}
	for _, link := range links {
		of, is := owned[link.Attrs().Index]
		if !is {
			continue
		}
		what := link.Type() + " " + link.Attrs().Name + " of " + of
		if list := routes[link.Attrs().Index]; len(list) > 0 {
			what += ", with routes " + strings.Join(list, ", ")
		}
		remove := "ip link delete " + link.Attrs().Name
		if link.Attrs().Name == "tunl0" {
			remove = "modprobe -r ipip" // the module's own device cannot be deleted
		}
		out = append(out, trace{what, remove})
	}
	return out, nil
}

// felixProtocol is the protocol of the routes that Calico programs itself (Felix,
// DeviceRouteProtocol).
const felixProtocol = 80

// openBridge lets pods behind a bridge find new ones.
func openBridge(out io.Writer, l deploy.Layout, link netlink.Link) error {
	name := link.Attrs().Name
	changed, err := l.ProxyARP("/proc/sys", name)
	if err != nil {
		return err
	}
	if changed {
		fmt.Fprintf(out, "%-12s net.ipv4.conf.%s.proxy_arp = 1 (its pods look for new ones behind it; uninstall sets it back)\n", "set", name)
	}
	addrs, err := netlink.AddrList(link, unix.AF_INET6)
	if err != nil {
		return fmt.Errorf("list addresses of %s: %w", name, err)
	}
	if slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return a.IP.IsGlobalUnicast() }) {
		fmt.Fprintf(out, "%-12s over IPv6 the pods behind %s do not find new ones in their own network until they are restarted: IPv6 has no proxy_arp for a whole network\n",
			"note", name)
	}
	return nil
}

// reportUnseenAddresses names networks whose addresses neither a route nor host-local's
// directory proves.
func reportUnseenAddresses(out io.Writer, networks []deploy.OtherNetwork) {
	for _, n := range networks {
		if n.Bridge == "" || n.DataDir == "" && (n.IPAM == "" || n.IPAM == "host-local") {
			continue
		}
		from := strings.TrimSpace(n.IPAM + " " + n.DataDir)
		fmt.Fprintf(out, "%-12s addresses of network %s come from %s, where nftcni cannot see them: if its range overlaps this node's, name them in ipam.excludes of nftcni.conflist\n",
			"note", n.Name, from)
	}
}
