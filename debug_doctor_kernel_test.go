package main

import (
	"archive/tar"
	"compress/gzip"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/nft"
)

// TestKernelDebugDoctor breaks a node in one way after the other.
func TestKernelDebugDoctor(t *testing.T) { inFreshNode(t, testDebugDoctor) }

func testDebugDoctor(t *testing.T) {
	n := newRedisNode(t, false)
	conf := n.path("net.d")
	doctor := func(args ...string) answer {
		return n.debug(t, append([]string{"doctor", "--cni-conf-dir", conf}, args...)...)
	}
	write := func(name, text string) {
		if err := os.MkdirAll(conf, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(conf+"/"+name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("10-nftcni.conflist", `{"plugins": [{"type": "nftcni"}]}`)
	doctor().want(t, 0, "ready, generation", "10-nftcni.conflist (nftcni)", "3 pod interfaces, all up and attached")

	write("05-other.conflist", `{"plugins": [{"type": "bridge"}]}`)
	doctor().want(t, 0, "05-other.conflist comes before 10-nftcni.conflist")

	if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("0"), 0); err != nil {
		t.Fatal(err)
	}
	doctor().want(t, 1, "forwarding IPv4", "broken", "sysctl -w net.ipv4.ip_forward=1", "(--fix does it)", "1 check failed")
	doctor("--fix").want(t, 0, "fixed")
	n.ask(t, n.nodejs, n.redis, true)

	stale := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "nft000000000000"}, PeerName: "stale"}
	if err := netlink.LinkAdd(stale); err != nil {
		t.Fatal(err)
	}
	text, err := exec.CommandContext(t.Context(), "nft", "table ip firewall { chain FORWARD { type filter hook forward priority 0; policy drop; }; }").CombinedOutput()
	if err != nil && !errors.Is(err, exec.ErrNotFound) {
		t.Fatalf("nft: %v: %s", err, text)
	}
	if err == nil {
		doctor().want(t, 1, "ip firewall chain FORWARD has policy drop for forwarded packets and nothing in it accepts any", `nft insert rule ip firewall FORWARD iifname '"nft*"' accept`)
	}
	n.awaitSnapshot(t)
	if err := unix.Kill(n.agentPID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-n.agentEnd
	doctor().want(t, 1, "does not answer", "systemctl start nftcni-agent")
	if err := nft.Delete(t.Context(), nft.Options{}); err != nil {
		t.Fatal(err)
	}
	doctor().want(t, 1, "inet nftcni is missing", "3 checks failed")
	n.debug(t, "why", "php", "redis", "TCP/6379").want(t, 2, "the kernel was not asked: the kernel holds no table inet nftcni here")
}

// TestKernelDebugBundle: what looks like a secret does not leave the node.
func TestKernelDebugBundle(t *testing.T) { inFreshNode(t, testDebugBundle) }

func testDebugBundle(t *testing.T) {
	n := newRedisNode(t, false)
	pod := "apiVersion: v1\nkind: Pod\nmetadata: {name: careless, namespace: shop, labels: {api-token: hunter2hunter2, app: kept}}\n" +
		"spec: {nodeName: demo, containers: [{name: main, image: demo}]}\n"
	if _, err := n.change(t.Context(), func() error { return writeRenamed(n.manifests+"/careless.yaml", []byte(pod)) }); err != nil {
		t.Fatal(err)
	}
	n.debug(t, "pods", "--all").want(t, 0, "hunter2hunter2")
	name := n.path("bundle.tar.gz")
	n.debug(t, "bundle", "--to", name).want(t, 0, "bundle.tar.gz: ")
	n.debug(t, "bundle", "--to", name).want(t, 1, "file exists")
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	var files []string
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, h.Name)
		if strings.HasSuffix(h.Name, ".error") {
			t.Errorf("%s could not be had", h.Name)
		}
		if _, err := io.Copy(&all, r); err != nil {
			t.Fatal(err)
		}
	}
	if strings.Contains(all.String(), "hunter2") || !strings.Contains(all.String(), "kept") || len(files) < 12 {
		t.Errorf("%d files %v: a secret is left, or too much is gone", len(files), files)
	}
}
