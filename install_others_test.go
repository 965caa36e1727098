package main

import (
	"net"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"github.com/vishvananda/netlink"

	"github.com/nftcni/nftcni/deploy"
)

func TestLinksOfOthers(t *testing.T) {
	attrs := func(index, master int, name string) netlink.LinkAttrs {
		return netlink.LinkAttrs{Index: index, MasterIndex: master, Name: name}
	}
	up := attrs(14, 0, "tunl0")
	up.Flags = net.FlagUp
	links := []netlink.Link{
		&netlink.Device{LinkAttrs: attrs(1, 11, "eth0")},
		&netlink.Bridge{LinkAttrs: attrs(2, 0, "cni0")}, &netlink.Veth{LinkAttrs: attrs(3, 2, "vethabc")}, &netlink.Veth{LinkAttrs: attrs(4, 0, "veth01234567")},
		&netlink.Bridge{LinkAttrs: attrs(5, 0, "docker0")}, &netlink.Veth{LinkAttrs: attrs(6, 5, "veth0123456")},
		&netlink.Bridge{LinkAttrs: attrs(7, 0, "lxcbr0")}, &netlink.Veth{LinkAttrs: attrs(8, 0, "lxc0123456789ab")},
		&netlink.Vxlan{LinkAttrs: attrs(9, 0, "flannel.1")}, &netlink.Bridge{LinkAttrs: attrs(10, 0, "br7")},
		&netlink.Bridge{LinkAttrs: attrs(11, 0, "br-lan")}, &netlink.Veth{LinkAttrs: attrs(12, 0, "nft0123456789ab")},
		&netlink.Iptun{LinkAttrs: attrs(13, 0, "tunl0")}, &netlink.Iptun{LinkAttrs: up}, &netlink.Veth{LinkAttrs: attrs(15, 0, "cali0123456789a")},
	}
	want := map[int]string{
		2: "the bridge plugin", 3: "a pod of the bridge plugin", 4: "a pod of the reference plugins", 8: "a pod of Cilium", 9: "flannel",
		10: "network mine", 14: "Calico", 15: "Calico",
	}
	got := linksOfOthers(links, []deploy.OtherNetwork{{Name: "mine", Bridge: "br7"}, {Name: "lan", Bridge: "br-lan"}})
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("links of others (-want +got):\n%s", d)
	}
}

func TestChainTraces(t *testing.T) {
	filter, nat6 := &nftables.Table{Family: nftables.TableFamilyIPv4, Name: "filter"}, &nftables.Table{Family: nftables.TableFamilyIPv6, Name: "nat"}
	var chains []*nftables.Chain
	for _, name := range []string{"FORWARD", "cali-a", "KUBE-FORWARD", "cali-b", "cali-c", "cali-d", "cali-e"} {
		chains = append(chains, &nftables.Chain{Name: name, Table: filter})
	}
	chains = append(chains, &nftables.Chain{Name: "FLANNEL-POSTRTG", Table: nat6}, &nftables.Chain{Name: "CNI-without-a-table"})
	want := []string{
		"chains of Calico in table ip filter (5): cali-a, cali-b, cali-c, cali-d, ...|iptables-save | grep -v 'cali-' | iptables-restore",
		"chains of flannel in table ip6 nat (1): FLANNEL-POSTRTG|ip6tables-save | grep -v 'FLANNEL-' | ip6tables-restore",
	}
	var got []string
	for _, tr := range chainTraces(chains) {
		got = append(got, tr.what+"|"+tr.remove)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("traces (-want +got):\n%s", d)
	}
}
