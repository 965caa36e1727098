package deploy

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// others are network configurations as their projects install them.
func others() map[string]map[string]string {
	return map[string]map[string]string{
		"flannel": {"10-flannel.conflist": `{"name":"cbr0","cniVersion":"0.3.1","plugins":[{"type":"flannel","delegate":{"hairpinMode":true,"isDefaultGateway":true}},` +
			`{"type":"portmap","capabilities":{"portMappings":true}}]}`},
		"Calico": {
			"10-calico.conflist": `{"name":"k8s-pod-network","cniVersion":"0.3.1","plugins":[{"type":"calico","datastore_type":"kubernetes","mtu":0,` +
				`"ipam":{"type":"calico-ipam"},"policy":{"type":"k8s"},"kubernetes":{"kubeconfig":"/etc/cni/net.d/calico-kubeconfig"}},` +
				`{"type":"bandwidth","capabilities":{"bandwidth":true}},{"type":"portmap","snat":true,"capabilities":{"portMappings":true}}]}`,
			"calico-kubeconfig": "apiVersion: v1\nkind: Config\n",
		},
		"bridge as .conf": {"10-bridge.conf": `{"cniVersion":"0.3.1","name":"mynet","type":"bridge","bridge":"br7","isGateway":true,"ipMasq":true,` +
			`"ipam":{"type":"host-local","subnet":"10.22.0.0/16","routes":[{"dst":"0.0.0.0/0"}]}}`},
		"bridge as .conflist": {"10-containerd-net.conflist": `{"cniVersion":"1.0.0","name":"containerd-net","plugins":[{"type":"bridge","bridge":"cni0","isGateway":true,` +
			`"ipam":{"type":"host-local","ranges":[[{"subnet":"10.88.0.0/16"}],[{"subnet":"2001:db8:4860::/64"}]]}},{"type":"portmap","capabilities":{"portMappings":true}}]}`},
		"ptp as .json": {"20-ptp.json": `{"cniVersion":"0.4.0","name":"ptp","type":"ptp","ipam":{"type":"host-local","subnet":"10.1.1.0/24"}}`},
		"Multus before another": {
			"00-multus.conf":           `{"cniVersion":"0.3.1","name":"multus-cni-network","type":"multus","kubeconfig":"/etc/cni/net.d/multus.d/multus.kubeconfig","delegates":[{"type":"flannel"}]}`,
			"10-flannel.conflist":      `{"name":"cbr0","cniVersion":"0.3.1","plugins":[{"type":"flannel"}]}`,
			"multus.d/multus.kubeconf": "apiVersion: v1\n",
		},
		"not JSON": {"50-broken.conf": "{"},
	}
}

// node is a layout with the files of a row.
func node(t *testing.T, files map[string]string) Layout {
	t.Helper()
	l := testLayout(t)
	for name, content := range files {
		put(t, l.in(filepath.Join(l.ConfDir, name)), content)
	}
	return l
}

func isConfiguration(name string) bool {
	return !strings.Contains(name, "/") && (strings.HasSuffix(name, ".conf") || strings.HasSuffix(name, ".conflist") || strings.HasSuffix(name, ".json"))
}

// wantAside wants every configuration of a row aside, complete, and everything else in place.
func wantAside(t *testing.T, l Layout, files map[string]string) {
	t.Helper()
	now := tree(t, l.Root)
	for name, content := range files {
		path := filepath.Join(l.ConfDir, name)
		if isConfiguration(name) {
			if _, there := now[path]; there {
				t.Errorf("%s is still where a runtime reads it", path)
			}
			path += DisabledSuffix
		}
		if now[path] != content {
			t.Errorf("%s holds %q, want %q", path, now[path], content)
		}
	}
}

// TestTakeOver moves what others install aside and puts it back, byte for byte.
func TestTakeOver(t *testing.T) {
	for name, files := range others() {
		t.Run(name, func(t *testing.T) {
			l := node(t, files)
			before := tree(t, l.Root)
			installInto(t, l, nil)
			wantAside(t, l, files)
			installInto(t, l, nil)
			wantAside(t, l, files)
			if _, _, err := WriteConflist(l.in(l.ConfDir), DefaultPrefix, DefaultConflist()); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if _, err := Uninstall(l); err != nil {
					t.Fatal(err)
				}
				if d := cmp.Diff(before, tree(t, l.Root)); d != "" {
					t.Errorf("files before install and after uninstall (-before +after):\n%s", d)
				}
			}
		})
	}
}

// undo takes one step of Install back, as if it had been killed before.
func undo(t *testing.T, l Layout, s Step) {
	t.Helper()
	var err error
	switch path := l.in(s.Path); s.Did {
	case "moved aside":
		err = os.Rename(path+DisabledSuffix, path)
	default:
		err = os.Remove(path)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestTakeOverKilled has Install killed after each of its steps: no configuration is lost then, another
// run completes it, and uninstall leaves the node as it was.
func TestTakeOverKilled(t *testing.T) {
	for name, files := range others() {
		t.Run(name, func(t *testing.T) {
			steps := installInto(t, node(t, files), nil)
			for left := range len(steps) {
				l := node(t, files)
				before := tree(t, l.Root)
				done := installInto(t, l, nil)
				complete := tree(t, l.Root)
				for i := len(done) - 1; i >= left; i-- {
					undo(t, l, done[i])
				}
				installInto(t, l, nil)
				if d := cmp.Diff(complete, tree(t, l.Root)); d != "" {
					t.Fatalf("killed after %d steps, then run again (-complete +again):\n%s", left, d)
				}
				for i := len(done) - 1; i >= left; i-- {
					undo(t, l, done[i])
				}
				if _, err := Uninstall(l); err != nil {
					t.Fatal(err)
				}
				if d := cmp.Diff(before, tree(t, l.Root)); d != "" {
					t.Fatalf("killed after %d steps, then uninstalled (-before +after):\n%s", left, d)
				}
			}
		})
	}
}

// dying is an executable in whose middle Install is killed.
type dying struct{ sent bool }

var errKilled = errors.New("killed")

func (d *dying) Read(p []byte) (int, error) {
	if d.sent {
		panic(errKilled)
	}
	d.sent = true
	return copy(p, "half of a bin"), nil
}

// TestInstallKilledInFile leaves half a binary behind, under a name of its own.
func TestInstallKilledInFile(t *testing.T) {
	l := node(t, others()["flannel"])
	before := tree(t, l.Root)
	func() {
		defer func() {
			if got := recover(); got != errKilled {
				t.Errorf("recovered %v", got)
			}
		}()
		_, err := Install(Options{Layout: l, Executable: &dying{}})
		t.Errorf("Install was not killed: %v", err)
	}()
	for path, content := range tree(t, l.Root) {
		if strings.HasPrefix(content, "half") && (path == l.Binary() || !strings.HasSuffix(path, ".tmp")) {
			t.Errorf("half a binary at %s", path)
		}
	}
	put(t, l.in("/usr/local/bin/.nftcni.4711.tmp"), "")
	put(t, l.in("/usr/local/bin/.other.4711.tmp"), "not ours")
	before["/usr/local/bin/.other.4711.tmp"] = "not ours"
	installInto(t, l, nil)
	for path := range tree(t, l.Root) {
		if strings.HasSuffix(path, ".tmp") && !strings.Contains(path, "other") {
			t.Errorf("%s is left of the install that was killed", path)
		}
	}
	if _, err := Uninstall(l); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(before, tree(t, l.Root)); d != "" {
		t.Errorf("files (-before +after):\n%s", d)
	}
}

// TestOwnerWritesAgain has an owner that installs its configuration again and again: every
// content that ever stood there is still somewhere.
func TestOwnerWritesAgain(t *testing.T) {
	l := testLayout(t)
	path := l.in("/etc/cni/net.d/10-flannel.conflist")
	contents := []string{flannelList, flannelList, flannelList + "\n", flannelList + "\n\n"}
	for _, c := range contents {
		put(t, path, c)
		installInto(t, l, nil)
	}
	put(t, path, "last")
	if _, err := Uninstall(l); err != nil {
		t.Fatal(err)
	}
	all := []byte{}
	for name, c := range tree(t, l.Root) {
		all = append(all, "\x00"+c+"\x00"...)
		if isConfiguration(filepath.Base(name)) && c != "last" {
			t.Errorf("a runtime reads %s: %q", name, c)
		}
	}
	for _, c := range contents {
		if !bytes.Contains(all, []byte("\x00"+c+"\x00")) {
			t.Errorf("%q is gone", c)
		}
	}
	if left := Residue(l); len(left) != 0 {
		t.Errorf("Residue = %v", left)
	}
}

// TestOtherNetworks reads the same whether they are in place or aside.
func TestOtherNetworks(t *testing.T) {
	for name, want := range map[string]OtherNetwork{
		"flannel":             {Name: "cbr0", Plugin: "flannel", Bridge: "cni0"},
		"Calico":              {Name: "k8s-pod-network", Plugin: "calico", IPAM: "calico-ipam"},
		"bridge as .conf":     {Name: "mynet", Plugin: "bridge", Bridge: "br7", IPAM: "host-local"},
		"bridge as .conflist": {Name: "containerd-net", Plugin: "bridge", Bridge: "cni0", IPAM: "host-local"},
		"ptp as .json":        {Name: "ptp", Plugin: "ptp", IPAM: "host-local"},
	} {
		t.Run(name, func(t *testing.T) {
			l := node(t, others()[name])
			for range 2 {
				if d := cmp.Diff([]OtherNetwork{want}, l.OtherNetworks()); d != "" {
					t.Errorf("networks (-want +got):\n%s", d)
				}
				installInto(t, l, nil)
			}
		})
	}
	if got := node(t, others()["not JSON"]).OtherNetworks(); len(got) != 0 {
		t.Errorf("a file that is not JSON holds %v", got)
	}
}
