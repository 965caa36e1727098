package deploy

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func testLayout(t *testing.T) Layout {
	t.Helper()
	l := DefaultLayout()
	l.Root = t.TempDir()
	return l
}

func put(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// tree is every file below root with its content, and every link with its target.
func tree(t *testing.T, root string) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name := strings.TrimPrefix(path, root)
		if d.Type()&os.ModeSymlink != 0 {
			target, err := os.Readlink(path)
			out[name] = "-> " + target
			return err
		}
		b, err := os.ReadFile(path)
		out[name] = string(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func installInto(t *testing.T, l Layout, change func(*Options)) []Step {
	t.Helper()
	o := Options{Layout: l, Executable: strings.NewReader("binary"), Agent: []string{"--kubeconfig", "/etc/nftcni/kubeconfig"}}
	if change != nil {
		change(&o)
	}
	steps, err := Install(o)
	if err != nil {
		t.Fatal(err)
	}
	return steps
}

const flannelList = `{"name":"cbr0","cniVersion":"0.3.1","plugins":[{"type":"flannel"},{"type":"portmap"}]}`

// TestInstallUninstall wants the node afterwards as it was before, byte for byte.
func TestInstallUninstall(t *testing.T) {
	l := testLayout(t)
	put(t, l.in("/etc/cni/net.d/10-flannel.conflist"), flannelList)
	put(t, l.in("/etc/cni/net.d/README.txt"), "not a configuration")
	put(t, l.in("/opt/cni/bin/bridge"), "another plugin")
	put(t, l.in("/etc/sysctl.d/10-other.conf"), "kernel.panic = 10")
	before := tree(t, l.Root)

	steps := installInto(t, l, nil)
	if !slices.Contains(steps, Step{"moved aside", "/etc/cni/net.d/10-flannel.conflist", `network "cbr0", plugins flannel, portmap`}) {
		t.Errorf("steps do not say that flannel's configuration was moved aside: %v", steps)
	}
	during := tree(t, l.Root)
	for name, want := range map[string]string{
		"/opt/cni/bin/nftcni":                                "binary",
		"/opt/cni/bin/nftcni-ipam":                           "-> nftcni",
		"/usr/local/bin/nftcni-agent":                        "-> /opt/cni/bin/nftcni",
		"/etc/cni/net.d/10-flannel.conflist.nftcni-disabled": flannelList,
	} {
		if during[name] != want {
			t.Errorf("%s holds %q, want %q", name, during[name], want)
		}
	}
	if _, there := during["/etc/cni/net.d/00-nftcni.conflist"]; there {
		t.Error("install wrote the network configuration: the agent does, when it can serve")
	}
	if len(Residue(l)) == 0 {
		t.Error("Residue of an installed node is empty")
	}
	if _, _, err := WriteConflist(l.in(l.ConfDir), DefaultPrefix, DefaultConflist()); err != nil {
		t.Fatal(err)
	}
	put(t, l.in("/var/lib/nftcni/leases.db"), "leases")

	if _, err := Uninstall(l); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(before, tree(t, l.Root)); d != "" {
		t.Errorf("files before install and after uninstall (-before +after):\n%s", d)
	}
	if left := Residue(l); len(left) != 0 {
		t.Errorf("Residue after Uninstall = %v", left)
	}
}

// TestInstallAgain wants settings kept and the binary replaced.
func TestInstallAgain(t *testing.T) {
	l := testLayout(t)
	installInto(t, l, nil)
	put(t, l.in(l.Config()), "logLevel: debug\n")
	installInto(t, l, func(o *Options) { o.Executable = strings.NewReader("newer binary") })
	now := tree(t, l.Root)
	if got := now[l.Config()]; got != "logLevel: debug\n" {
		t.Errorf("agent.yaml after the second install: %q, want the administrator's", got)
	}
	if got := now[l.Binary()]; got != "newer binary" {
		t.Errorf("binary after the second install: %q", got)
	}
}

// TestOwnerRewritesDisabled covers a DaemonSet that installs its configuration again after
// ours moved it aside.
func TestOwnerRewritesDisabled(t *testing.T) {
	l := testLayout(t)
	path := l.in("/etc/cni/net.d/10-flannel.conflist")
	put(t, path, flannelList)
	installInto(t, l, nil)
	put(t, path, flannelList+"\n")
	if _, err := Uninstall(l); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"/etc/cni/net.d/10-flannel.conflist":                   flannelList + "\n",
		"/etc/cni/net.d/10-flannel.conflist.nftcni-superseded": flannelList,
	}
	if d := cmp.Diff(want, tree(t, l.Root)); d != "" {
		t.Errorf("files after uninstall (-want +got):\n%s", d)
	}
}

func TestInstallFilesOnly(t *testing.T) {
	l := testLayout(t)
	put(t, l.in("/etc/cni/net.d/10-flannel.conflist"), flannelList)
	installInto(t, l, func(o *Options) { o.FilesOnly = true })
	want := map[string]string{
		"/opt/cni/bin/nftcni": "binary", "/opt/cni/bin/nftcni-ipam": "-> nftcni",
		"/etc/cni/net.d/10-flannel.conflist": flannelList,
	}
	if d := cmp.Diff(want, tree(t, l.Root)); d != "" {
		t.Errorf("files (-want +got):\n%s", d)
	}
}

func TestUninstallUsesRecordedLayout(t *testing.T) {
	l := testLayout(t)
	l.BinDir, l.ConfDir = "/var/lib/rancher/bin", "/var/lib/rancher/net.d"
	installInto(t, l, nil)
	d := DefaultLayout()
	d.Root = l.Root
	got, err := InstalledLayout(d)
	if err != nil || got != l {
		t.Errorf("InstalledLayout = %+v, %v; want %+v", got, err, l)
	}
}

func TestInstallRefuses(t *testing.T) {
	for _, row := range []struct {
		name   string
		change func(*Options)
		want   string
	}{
		{"relative directory", func(o *Options) { o.BinDir = "opt/cni/bin" }, `--cni-bin-dir is "opt/cni/bin": it takes an absolute path`},
		{"prefix", func(o *Options) { o.Prefix = "first-" }, `--cni-conf-prefix is "first-": it takes two digits and a dash`},
	} {
		t.Run(row.name, func(t *testing.T) {
			o := Options{Layout: testLayout(t), Executable: strings.NewReader("binary")}
			row.change(&o)
			_, err := Install(o)
			if err == nil || !strings.Contains(err.Error(), row.want) {
				t.Errorf("error is %v, want %q in it", err, row.want)
			}
			if got := tree(t, o.Root); len(got) != 0 {
				t.Errorf("files were written: %v", got)
			}
		})
	}
}

func TestUnitCommandLine(t *testing.T) {
	l := DefaultLayout()
	o := Options{Layout: l, Agent: []string{"--manifests", "/srv/my pods/100%"}, Prefix: "10-"}
	want := `ExecStart=/opt/cni/bin/nftcni agent --config /etc/nftcni/agent.yaml --manifests "/srv/my pods/100%%" ` +
		"--cni-conf-dir /etc/cni/net.d --conflist /etc/nftcni/nftcni.conflist --cni-conf-prefix 10-\n"
	if got := string(o.unitContent()); !strings.Contains(got, want) || strings.Contains(got, "@CONFDIR@") {
		t.Errorf("unit is\n%s\nwant %s in it", got, want)
	}
}

func TestInstallPolicyOnly(t *testing.T) {
	l := testLayout(t)
	put(t, l.in("/etc/cni/net.d/10-flannel.conflist"), flannelList)
	installInto(t, l, func(o *Options) { o.PolicyOnly = true })
	got := tree(t, l.Root)
	if got["/etc/cni/net.d/10-flannel.conflist"] != flannelList {
		t.Error("the other plugin's configuration was moved")
	}
	if !strings.Contains(got[l.Config()], "\nnetwork: none\n") {
		t.Errorf("agent.yaml does not say network: none:\n%s", got[l.Config()])
	}
	if strings.Contains(got[l.unit()], "--cni-conf-dir") {
		t.Error("the agent would write a network configuration")
	}
}
