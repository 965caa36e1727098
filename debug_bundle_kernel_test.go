package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/cni"
)

// TestKernelBundleSecrets: nothing that a node holds as a secret is in a bundle, with the
// agent and without it.
func TestKernelBundleSecrets(t *testing.T) { inFreshNode(t, testBundleSecrets) }

func testBundleSecrets(t *testing.T) {
	n := newRedisNode(t, false)
	const jwt = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl"
	objects := "apiVersion: v1\nkind: Secret\nmetadata: {name: s, namespace: shop}\nstringData: {password: in-a-secret}\n---\n" +
		"apiVersion: v1\nkind: Pod\nmetadata: {name: careless, namespace: shop, labels: {db-password: in-a-label, app: kept, jwt: " + jwt + "},\n" +
		"  annotations: {note: in-an-annotation}}\n" +
		"spec: {nodeName: demo, containers: [{name: main, image: demo, env: [{name: DB_PASSWORD, value: in-the-environment}], args: [--token=in-an-argument]}]}\n"
	if _, err := n.change(t.Context(), func() error { return writeRenamed(n.manifests+"/careless.yaml", []byte(objects)) }); err != nil {
		t.Fatal(err)
	}
	writeFile(t, n.path("state")+"/wireguard.key", "in-a-key-file")
	writeFile(t, n.manifests+"/kubeconfig.txt", "users: [{user: {token: in-a-kubeconfig, client-key-data: in-key-data}}]")
	n.awaitSnapshot(t)
	n.until(t, "careless", "pods", "--all")
	check := func(name string) {
		t.Helper()
		n.debug(t, "bundle", "--to", n.path(name)).want(t, 0)
		text := bundleText(t, n.path(name))
		if !strings.Contains(text, "shop/careless") && !strings.Contains(text, `"careless"`) || !strings.Contains(text, "kept") {
			t.Error("the pod is not in the bundle: nothing is shown")
		}
		for _, secret := range []string{"in-a-secret", "in-a-label", jwt, "in-an-annotation", "in-the-environment", "in-an-argument", "in-a-key-file", "in-a-kubeconfig", "in-key-data"} {
			if strings.Contains(text, secret) {
				t.Errorf("%s: the bundle holds %q", name, secret)
			}
		}
	}
	check("with-agent.tgz")
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for b := []byte(nil); !bytes.Contains(b, []byte("careless")); <-tick.C { // the test's own deadline ends it
		b, _ = os.ReadFile(filepath.Join(cni.DefaultRunDir, agent.SnapshotName))
	}
	if err := unix.Kill(n.agentPID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-n.agentEnd
	check("without-agent.tgz")
}

func bundleText(t *testing.T, name string) string {
	t.Helper()
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
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return all.String()
		}
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(h.Name, ".error") {
			t.Errorf("%s could not be had", h.Name)
		}
		if _, err := io.Copy(&all, r); err != nil {
			t.Fatal(err)
		}
	}
}
