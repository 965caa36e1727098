package main

import (
	"fmt"
	"io"
	"path"
	"slices"

	"github.com/vishvananda/netlink"

	"github.com/nftcni/nftcni/deploy"
)

// others are interfaces by which CNI plugins are known, and what their owner's traces
// besides are called.
var others = []struct {
	name, links, rest string
}{
	{"flannel", "flannel*", "/run/flannel, the kube-flannel DaemonSet, chains FLANNEL-*"},
	{"the bridge plugin", "cni0", "/var/lib/cni/networks"},
	{"Calico", "cali*", "calico-node, chains cali-*, /var/lib/calico"},
	{"Calico", "vxlan*.calico", "calico-node"},
	{"Calico", "tunl0", "module ipip"},
	{"Cilium", "cilium_*", "the cilium DaemonSet, /sys/fs/bpf/cilium"},
	{"Weave Net", "weave", "weave-net"},
	{"kube-router", "kube-bridge", "the kube-router DaemonSet"},
	{"Antrea", "antrea-gw0", "the antrea-agent DaemonSet"},
}

// reportOthers says what of other CNI plugins is still on the node. It is left alone, but for
// bridges (deploy.Layout.ProxyARP): pods that were started with it use it.
func reportOthers(out io.Writer, l deploy.Layout) error {
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("list interfaces: %w", err)
	}
	found := false
	for _, o := range others {
		i := slices.IndexFunc(links, func(l netlink.Link) bool {
			ok, err := path.Match(o.links, l.Attrs().Name)
			return err == nil && ok
		})
		if i < 0 {
			continue
		}
		found = true
		link := links[i].Attrs().Name
		fmt.Fprintf(out, "%-12s %s of %s (and maybe %s)\n", "left alone", link, o.name, o.rest)
		if links[i].Type() != "bridge" {
			continue
		}
		changed, err := l.ProxyARP("/proc/sys", link)
		if err != nil {
			return err
		}
		if changed {
			fmt.Fprintf(out, "%-12s net.ipv4.conf.%s.proxy_arp = 1 (its pods look for new ones behind it; uninstall sets it back)\n", "set", link)
		}
	}
	if found {
		fmt.Fprintln(out, "\nPods that run keep their interfaces and addresses until they are restarted. Remove what is\n"+
			"left alone when the last of them is gone (docs/install.md, Migration).")
	}
	return nil
}
