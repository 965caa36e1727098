package debug

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/cni"
	"github.com/nftcni/nftcni/nft"
)

// checkTable looks at our own table.
func checkTable(ctx context.Context, agentRuns bool) []Finding {
	const name = "table"
	r, err := nft.NewReader(ctx, nft.Options{})
	if errors.Is(err, nft.ErrNoTable) {
		remedy := "start the agent: it makes the table"
		if agentRuns {
			remedy = "somebody deleted it and the agent has not mended it: see its log, then restart it"
		}
		return []Finding{broken(name, "inet nftcni is missing: no policy is in force", remedy)}
	}
	if err != nil {
		return []Finding{warn(name, err.Error(), "run as root on the node itself")}
	}
	defer func() { _ = r.Close() }()
	sizes, err := r.Sizes(ctx)
	if err != nil {
		return []Finding{broken(name, err.Error(), "restart the agent: it replaces the table without a gap")}
	}
	total := 0
	for _, n := range sizes {
		total += n
	}
	return []Finding{ok(name, "inet nftcni, %s", plural(total, "element"))}
}

// checkForeignChains names what else may drop a pod's packets.
func checkForeignChains() []Finding {
	const name = "other firewalls"
	chains, err := nft.BaseChains(nft.Options{})
	if err != nil {
		return []Finding{warn(name, err.Error(), "run as root on the node itself")}
	}
	var out []Finding
	others := map[string]bool{}
	for _, c := range chains {
		if c.Table == nft.TableName || c.Table == nft.TraceTable {
			continue
		}
		others[nft.FamilyName(c.Family)+" "+c.Table] = true
		forwards := c.Hook == unix.NF_INET_FORWARD && slices.Contains([]uint8{unix.NFPROTO_IPV4, unix.NFPROTO_IPV6, unix.NFPROTO_INET}, c.Family)
		if c.Drops && forwards {
			where := fmt.Sprintf("%s %s chain %s", nft.FamilyName(c.Family), c.Table, c.Name)
			out = append(out, warn(name, where+" drops forwarded packets that none of its rules accepts: an accept of ours does not spare them",
				"have it accept pods' packets, for iptables: iptables -P FORWARD ACCEPT, for Docker: \"ip-forward-no-drop\": true; nftcni debug trace shows whether it does"))
		}
	}
	if len(out) == 0 {
		list := strings.Join(sortedKeys(others), ", ")
		out = append(out, ok(name, "no chain drops forwarded packets by policy (other tables: %s)", orDash(list)))
	}
	return out
}

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

// checkLinks compares the pods' links with the attachments and the uplink.
func (s *session) checkLinks(ctx context.Context) []Finding {
	const name = "links"
	links, err := netlink.LinkList()
	if err != nil {
		return []Finding{warn(name, err.Error(), "run as root on the node itself")}
	}
	list, errs := cni.Attachments(s.runDir)
	known := map[string]bool{}
	for _, a := range list {
		known[a.HostInterface] = true
	}
	var stale, down []string
	own := 0
	for _, l := range links {
		n := l.Attrs().Name
		if !strings.HasPrefix(n, nft.InterfacePrefix) || len(n) != 15 || l.Type() != "veth" {
			continue
		}
		own++
		if !known[n] {
			stale = append(stale, n)
		} else if l.Attrs().OperState != netlink.OperUp {
			down = append(down, n)
		}
	}
	out := []Finding{}
	for _, e := range errs {
		out = append(out, broken(name, e.Error(), "delete the pod; its DEL removes the record"))
	}
	if len(stale) > 0 {
		out = append(out, warn(name, plural(len(stale), "pod interface")+" without an attachment: "+strings.Join(stale, ", "),
			"the agent removes them while it runs; else delete the pod, or ip link del NAME"))
	}
	if len(down) > 0 {
		out = append(out, broken(name, "down: "+strings.Join(down, ", "), "the pod set its eth0 down, or its namespace is going away: restart the pod"))
	}
	if len(out) == 0 {
		out = append(out, ok(name, "%s, all up and attached", plural(own, "pod interface")))
	}
	return append(out, checkMTU(ctx, links))
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

// checkKubeProxy tells its mode by the tables it leaves.
func checkKubeProxy() Finding {
	const name = "kube-proxy"
	chains, err := nft.BaseChains(nft.Options{})
	if err != nil {
		return warn(name, err.Error(), "run as root on the node itself")
	}
	ipvs := false
	if b, err := os.ReadFile("/proc/net/ip_vs"); err == nil {
		ipvs = strings.Count(string(b), "\n") > 3
	}
	for _, c := range chains {
		if c.Table == "kube-proxy" {
			return ok(name, "nftables mode")
		}
	}
	if ipvs {
		return warn(name, "IPVS mode: Service traffic meets no forward hook on its first node before DNAT in the same way; policies judge the pod's address all the same",
			"kube-proxy's nftables mode is the one that is tested (--proxy-mode=nftables)")
	}
	return ok(name, "no nftables or IPVS mode seen (iptables mode, or none: both work)")
}

// checkClock: certificates and leases of the API fail first when the clock is wrong.
func checkClock() Finding {
	const name = "clock"
	var tx unix.Timex
	state, err := unix.Adjtimex(&tx)
	switch {
	case err != nil:
		return warn(name, "its state cannot be read: "+err.Error(), "timedatectl status")
	case time.Now().Year() < 2024:
		return broken(name, "it is "+time.Now().UTC().Format(time.RFC3339)+": certificates will not be valid", "set the clock, start chrony or systemd-timesyncd")
	case state == unix.TIME_ERROR || tx.Status&unix.STA_UNSYNC != 0:
		return warn(name, "not synchronised", "start chrony or systemd-timesyncd; in a virtual machine the host's clock may be enough")
	}
	return ok(name, "synchronised")
}

func checkFeatures(ctx context.Context) []Finding {
	var out []Finding
	for _, f := range nft.Features(ctx) {
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
