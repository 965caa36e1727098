package main

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/nftables"

	"github.com/nftcni/nftcni/deploy"
)

// otherTables are nftables tables that CNI plugins make for themselves.
var otherTables = map[string]string{
	"cni_plugins_masquerade": "the reference plugins", "cni_hostport": "portmap",
	"flannel-ipv4": "flannel", "flannel-ipv6": "flannel", "calico": "Calico",
}

// otherChains are prefixes of chains that CNI plugins make in the tables of iptables.
var otherChains = []struct{ prefix, of string }{
	{"FLANNEL-", "flannel"}, {"cali-", "Calico"}, {"CNI-", "the reference plugins"}, {"CILIUM_", "Cilium"},
	{"WEAVE", "Weave Net"}, {"KUBE-ROUTER-", "kube-router"}, {"KUBE-POD-FW-", "kube-router"}, {"KUBE-NWPLCY-", "kube-router"}, {"ANTREA-", "Antrea"},
}

var familyNames = map[nftables.TableFamily]string{
	nftables.TableFamilyINet: "inet", nftables.TableFamilyIPv4: "ip", nftables.TableFamilyIPv6: "ip6",
	nftables.TableFamilyBridge: "bridge", nftables.TableFamilyARP: "arp", nftables.TableFamilyNetdev: "netdev",
}

// tableTraces are the tables of others, and their chains in those of iptables.
func tableTraces() ([]trace, error) {
	c, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("open netfilter: %w", err)
	}
	tables, err := c.ListTables()
	if err != nil {
		return nil, fmt.Errorf("list tables: %w", err)
	}
	var out []trace
	for _, t := range tables {
		if of, is := otherTables[t.Name]; is {
			name := "table " + familyNames[t.Family] + " " + t.Name
			out = append(out, trace{name + " of " + of, "nft delete " + name})
		}
	}
	chains, err := c.ListChains()
	if err != nil {
		return nil, fmt.Errorf("list chains: %w", err)
	}
	out = append(out, chainTraces(chains)...)
	if b, err := os.ReadFile("/proc/net/ip_tables_names"); err == nil && len(b) > 0 {
		out = append(out, trace{"tables of iptables-legacy: " + strings.Join(strings.Fields(string(b)), ", ") + " (their chains cannot be seen from here)",
			"iptables-legacy-save | grep -v -E 'FLANNEL|cali-|CNI-' | iptables-legacy-restore"})
	}
	return out, nil
}

// chainTraces has a line for each plugin and table.
func chainTraces(chains []*nftables.Chain) []trace {
	type place struct{ table, prefix, of, family string }
	found := map[place][]string{}
	var order []place
	for _, c := range chains {
		for _, o := range otherChains {
			if c.Table == nil || !strings.HasPrefix(c.Name, o.prefix) {
				continue
			}
			family := familyNames[c.Table.Family]
			p := place{family + " " + c.Table.Name, o.prefix, o.of, family}
			if found[p] == nil {
				order = append(order, p)
			}
			found[p] = append(found[p], c.Name)
		}
	}
	var out []trace
	for _, p := range order {
		const most = 4
		names := found[p]
		slices.Sort(names)
		what := fmt.Sprintf("chains of %s in table %s (%d): %s", p.of, p.table, len(names), strings.Join(names[:min(len(names), most)], ", "))
		if len(names) > most {
			what += ", ..."
		}
		command := map[string]string{"ip6": "ip6tables"}[p.family]
		if command == "" {
			command = "iptables"
		}
		out = append(out, trace{what, fmt.Sprintf("%s-save | grep -v '%s' | %s-restore", command, p.prefix, command)})
	}
	return out
}

// hostLocal is where the reference plugin host-local keeps its leases unless told otherwise.
const hostLocal = "/var/lib/cni/networks"

// directoryTraces are directories of others below root.
func directoryTraces(root string, networks []deploy.OtherNetwork) []trace {
	var out []trace
	parents := []string{hostLocal}
	for _, n := range networks {
		if n.DataDir != "" && !slices.Contains(parents, n.DataDir) {
			parents = append(parents, n.DataDir)
		}
	}
	for _, parent := range parents {
		entries, err := os.ReadDir(filepath.Join(root, parent))
		if err != nil {
			continue
		}
		for _, e := range entries {
			if n := countLeases(filepath.Join(root, parent, e.Name())); e.IsDir() && n > 0 {
				dir := filepath.Join(parent, e.Name())
				out = append(out, trace{fmt.Sprintf("%s, leases of host-local: %d addresses, which nftcni gives to nobody until they are removed", dir, n), "rm -r " + dir})
			}
		}
	}
	for _, d := range []struct{ dir, of string }{
		{"/run/flannel", "flannel"}, {"/var/lib/cni/flannel", "flannel"}, {"/var/lib/calico", "Calico"}, {"/run/calico", "Calico"},
		{"/etc/calico", "Calico"}, {"/sys/fs/bpf/cilium", "Cilium"}, {"/run/cilium", "Cilium"}, {"/var/lib/weave", "Weave Net"},
	} {
		if _, err := os.Lstat(filepath.Join(root, d.dir)); err == nil {
			out = append(out, trace{d.dir + " of " + d.of, "rm -r " + d.dir})
		}
	}
	return out
}

// countLeases counts the files of a directory that are named by an address.
func countLeases(dir string) int {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0
	}
	n := 0
	for _, e := range entries {
		if _, err := netip.ParseAddr(e.Name()); err == nil {
			n++
		}
	}
	return n
}
