package debug

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/cni"
	"github.com/nftcni/nftcni/ipam"
	"github.com/nftcni/nftcni/nft"
)

// What a kernel test cannot break, or not in a namespace: conntrack's limit, the clock, the
// kernel's features, kube-proxy's modes.
func TestDoctorFindings(t *testing.T) {
	now := time.Date(2026, 11, 21, 6, 0, 0, 0, time.UTC)
	for _, test := range []struct {
		name    string
		finding Finding
		health  Health
		text    string // in found or remedy
	}{
		{"conntrack has room", conntrackFinding(10, 1000, 0), Healthy, "10 of 1000"},
		{"conntrack fills", conntrackFinding(700, 1000, 0), Suspect, "nf_conntrack_max=2000"},
		{"conntrack is full", conntrackFinding(950, 1000, 7), Broken, "7 packets were dropped"},
		{"conntrack was full", conntrackFinding(10, 1000, 7), Suspect, "7 packets were dropped"},
		{"clock", clockFinding(now, false), Healthy, "synchronised"},
		{"clock unsynchronised", clockFinding(now, true), Suspect, "chrony"},
		{"clock of 1970", clockFinding(time.Unix(1000, 0), false), Broken, "set the clock"},
		{"feature", featureFindings([]nft.Feature{{Name: "tables"}})[0], Healthy, "tables"},
		{"feature missing", featureFindings([]nft.Feature{{Name: "tables", Err: errors.New("not here")}})[0], Broken, "6.1 or newer"},
		{"persist missing", featureFindings([]nft.Feature{{Name: "owner,persist", Err: unix.EOPNOTSUPP}})[0], Suspect, "flush ruleset"},
		{"feature unknown", featureFindings([]nft.Feature{{Name: "tables", Err: unix.EPERM, Denied: true}})[0], Suspect, "run as root"},
		{"no kube-proxy", kubeProxyFinding(nil, false), Healthy, "no rules of it"},
		{"kube-proxy, nftables", kubeProxyFinding([]string{"ip kube-proxy", "ip6 kube-proxy"}, false), Healthy, "nftables mode"},
		{"kube-proxy, iptables", kubeProxyFinding([]string{"ip nat"}, false), Healthy, "iptables mode"},
		{"kube-proxy, IPVS", kubeProxyFinding(nil, true), Suspect, "--proxy-mode=nftables"},
		{"kube-proxy, two modes", kubeProxyFinding([]string{"ip nat", "ip kube-proxy"}, false), Suspect, "--cleanup"},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := test.finding
			if f.Health != test.health || !strings.Contains(f.Found+f.Remedy, test.text) {
				t.Errorf("%+v, want %s and %q", f, test.health, test.text)
			}
			if f.Health != Healthy && f.Remedy == "" {
				t.Errorf("%+v has no remedy", f)
			}
		})
	}
}

func TestConntrackDrops(t *testing.T) {
	const stat = "entries  searched found new invalid ignore delete delete_list insert insert_failed drop early_drop\n" +
		"00000003  0 0 0 0 0 0 0 0 1 0000000a 2\n00000003  0 0 0 0 0 0 0 0 1 00000001 2\n"
	for text, want := range map[string]uint64{stat: 11, "": 0, "nothing like it\n1 2\n": 0} {
		if got := conntrackDrops(text); got != want {
			t.Errorf("%q: %d, want %d", text, got, want)
		}
	}
}

// Leases and attachments that disagree, and pools that fill.
func TestLeaseFindings(t *testing.T) {
	addr := netip.MustParseAddr
	pool := netip.MustParsePrefix("10.0.0.0/29") // .1 to .6
	attachment := func(ip string) cni.Attachment {
		return cni.Attachment{Network: "pods", Namespace: "shop", Pod: "web", HostInterface: "nft" + ip, Addresses: []netip.Addr{addr(ip)}}
	}
	lease := func(ip string) LeaseRow {
		return LeaseRow{Lease: ipam.Lease{Address: addr(ip), Owner: ipam.Owner{Network: "pods"}}}
	}
	gone := lease("10.0.0.3")
	gone.NetNSGone = true
	var full []LeaseRow
	var all []cni.Attachment
	for _, ip := range []string{"10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6"} {
		full, all = append(full, lease(ip)), append(all, attachment(ip))
	}
	for _, test := range []struct {
		name        string
		rows        []LeaseRow
		attachments []cni.Attachment
		health      Health
		text        string
	}{
		{"equal", full[:1], all[:1], Healthy, "1 address, all of living pods; 1 of 6 addresses of 10.0.0.0/29 are in use"},
		{"none", nil, nil, Healthy, "0 addresses"},
		{"another IPAM", nil, all[:1], Healthy, "0 addresses"},
		{"namespace gone", []LeaseRow{full[0], gone}, all[:1], Suspect, "1 address leased to network namespaces that are gone: 10.0.0.3"},
		{"no attachment", full[:2], all[:1], Suspect, "leased without an attachment of this node: 10.0.0.2"},
		{"no lease", full[:1], all[:2], Broken, "used by pods but not leased, so another pod may get them: 10.0.0.2 (shop/web)"},
		{"twice", full[:1], []cni.Attachment{all[0], all[0]}, Broken, "held by two pods"},
		{"full", full, all, Broken, "6 of 6 addresses of 10.0.0.0/29 are in use: the next pod cannot start"},
	} {
		t.Run(test.name, func(t *testing.T) {
			list := leaseFindings("leases", test.rows, test.attachments, []netip.Prefix{pool})
			if len(list) != 1 || list[0].Health != test.health || !strings.Contains(list[0].Found, test.text) {
				t.Errorf("%+v, want %s and %q", list, test.health, test.text)
			}
		})
	}
}
