package deploy

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/google/go-cmp/cmp"
)

func TestWriteConflist(t *testing.T) {
	dir := t.TempDir()
	put(t, filepath.Join(dir, "10-flannel.conflist"), flannelList)
	put(t, filepath.Join(dir, "20-my-nftcni.conflist"), "another file, whose name ends like ours")
	write := func(prefix string) bool {
		t.Helper()
		_, changed, err := WriteConflist(dir, prefix, DefaultConflist())
		if err != nil {
			t.Fatal(err)
		}
		return changed
	}
	if !write("10-") || write("10-") {
		t.Error("writing it twice: want changed, then unchanged")
	}
	write("00-")
	want := map[string]string{
		"/00-nftcni.conflist": string(DefaultConflist()), "/10-flannel.conflist": flannelList,
		"/20-my-nftcni.conflist": "another file, whose name ends like ours",
	}
	if d := cmp.Diff(want, tree(t, dir)); d != "" {
		t.Errorf("files (-want +got):\n%s", d)
	}
}

// TestDefaultConflist reads it as a runtime does.
func TestDefaultConflist(t *testing.T) {
	list, err := libcni.NetworkConfFromBytes(DefaultConflist())
	if err != nil {
		t.Fatal(err)
	}
	if list.CNIVersion != "1.1.0" || list.Plugins[0].Network.Type != "nftcni" {
		t.Errorf("libcni chose version %s, plugin %s; want 1.1.0 and nftcni", list.CNIVersion, list.Plugins[0].Network.Type)
	}
	if !strings.Contains(string(Manifest), indent(DefaultConflist(), "    ")) {
		t.Error("the ConfigMap of nftcni.yaml holds another network configuration than files/nftcni.conflist")
	}
}

func indent(b []byte, by string) string {
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return by + strings.Join(lines, "\n"+by) + "\n"
}

func TestConflistErrors(t *testing.T) {
	for _, row := range []struct{ name, prefix, content, want string }{
		{"prefix", "1-", string(DefaultConflist()), `prefix of the network configuration is "1-"`},
		{"prefix that leaves the directory", "../00-", string(DefaultConflist()), "two digits and a dash"},
		{"no JSON", "00-", "plugins:", "is not JSON"},
		{"no name", "00-", `{"cniVersion":"1.0.0","plugins":[{"type":"nftcni"}]}`, "field name is empty"},
		{"no version", "00-", `{"name":"n","plugins":[{"type":"nftcni"}]}`, "field cniVersion is empty"},
		{"another plugin", "00-", flannelList, "no entry of field plugins has type nftcni"},
	} {
		t.Run(row.name, func(t *testing.T) {
			dir := t.TempDir()
			_, _, err := WriteConflist(dir, row.prefix, []byte(row.content))
			if err == nil || !strings.Contains(err.Error(), row.want) {
				t.Errorf("error is %v, want %q in it", err, row.want)
			}
			if got := tree(t, dir); len(got) != 0 {
				t.Errorf("files were written: %v", got)
			}
		})
	}
}

func TestSetForwarding(t *testing.T) {
	proc := t.TempDir()
	set := map[string]string{
		"/net/ipv4/ip_forward": "0\n", "/net/ipv6/conf/all/forwarding": "0\n", "/net/ipv6/conf/all/accept_ra": "1\n",
		"/net/ipv6/conf/eth0/accept_ra": "1\n", "/net/ipv6/conf/eth1/accept_ra": "0\n",
	}
	for name, v := range set {
		put(t, proc+name, v)
	}
	changed, err := SetForwarding(proc)
	if err != nil || len(changed) != 3 {
		t.Errorf("SetForwarding changed %v, %v; want 3 settings", changed, err)
	}
	set["/net/ipv4/ip_forward"], set["/net/ipv6/conf/all/forwarding"], set["/net/ipv6/conf/eth0/accept_ra"] = "1", "1", "2"
	if d := cmp.Diff(set, tree(t, proc)); d != "" {
		t.Errorf("settings (-want +got):\n%s", d)
	}
	if changed, err := SetForwarding(proc); err != nil || len(changed) != 0 {
		t.Errorf("a second time: changed %v, %v; want nothing", changed, err)
	}
}

func TestProxyARP(t *testing.T) {
	l, proc := testLayout(t), t.TempDir()
	before := map[string]string{"/net/ipv4/conf/cni0/proxy_arp": "0", "/net/ipv4/conf/weave/proxy_arp": "1"}
	for name, v := range before {
		put(t, proc+name, v)
	}
	for link, want := range map[string]bool{"cni0": true, "weave": false, "absent": false} {
		if changed, err := l.ProxyARP(proc, link); changed != want || err != nil {
			t.Errorf("ProxyARP(%s) = %v, %v; want %v", link, changed, err, want)
		}
	}
	if got := tree(t, proc)["/net/ipv4/conf/cni0/proxy_arp"]; got != "1" {
		t.Errorf("cni0 has %s, want 1", got)
	}
	if err := l.RestoreProxyARP(proc); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(before, tree(t, proc)); d != "" {
		t.Errorf("settings afterwards (-want +got):\n%s", d)
	}
}
