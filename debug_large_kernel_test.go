package main

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/cni"
)

// Objects of the large cluster: 100 namespaces of 100 pods, 20 of each application, a policy for
// each application of a namespace, and newRedisNode's own.
const (
	largeNamespaces = 100
	largePods       = 100 * largeNamespaces
	largeApps       = 5
	largePolicies   = largeApps * largeNamespaces
)

// largeManifests is that cluster, on another node: each application is reached on TCP/5432
// by the next one of its namespace.
func largeManifests() string {
	var b strings.Builder
	for n := range largeNamespaces {
		fmt.Fprintf(&b, "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: ns%d}\n", n)
		for i := range 100 {
			fmt.Fprintf(&b, "---\napiVersion: v1\nkind: Pod\nmetadata: {name: app%d-%d, namespace: ns%d, labels: {app: app%d}}\nspec: {nodeName: other, containers: [{name: c, image: x}]}\n"+
				"status: {phase: Running, podIPs: [{ip: 10.%d.0.%d}]}\n", i%largeApps, i/largeApps, n, i%largeApps, n+1, i+1)
		}
		for a := range largeApps {
			fmt.Fprintf(&b, "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: app%d, namespace: ns%d}\nspec: {podSelector: {matchLabels: {app: app%d}}, "+
				"ingress: [{from: [{podSelector: {matchLabels: {app: app%d}}}], ports: [{protocol: TCP, port: 5432}]}]}\n", a, n, a, (a+1)%largeApps)
		}
	}
	return b.String()
}

// TestKernelDebugLarge: at 10,000 pods every command answers, and none leaves anything out,
// with the agent and without it. How fast is measured by scripts/bench-debug.
func TestKernelDebugLarge(t *testing.T) { inFreshNode(t, testDebugLarge) }

func testDebugLarge(t *testing.T) {
	n := newRedisNode(t, false)
	_, err := n.change(t.Context(), func() error {
		return writeRenamed(filepath.Join(n.manifests, "large.yaml"), []byte(largeManifests()))
	})
	if err != nil {
		t.Fatal(err)
	}
	n.ask(t, n.php, n.redis, false)
	n.checkLarge(t, "with the agent")
	n.awaitSnapshot(t)
	if err := n.demoNode.until(t.Context(), func(context.Context) bool {
		s, err := agent.ReadSnapshotFile(cni.DefaultRunDir)
		return err == nil && len(s.Cluster.Pods) == largePods+3
	}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(n.agentPID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-n.agentEnd
	n.checkLarge(t, "without an agent")
}

func (n *redisNode) checkLarge(t *testing.T, when string) {
	t.Helper()
	count := func(want int, args ...string) {
		t.Helper()
		var list []json.RawMessage
		a := n.debugQuietly(t, append(args, "-o", "json")...)
		if err := json.Unmarshal([]byte(a.stdout), &list); err != nil || len(list) != want || a.status != 0 {
			t.Errorf("%s: debug %v: %d entries, status %d, %v, want %d: %.200s", when, args, len(list), a.status, err, want, a.stderr)
		}
		if lines := strings.Count(n.debugQuietly(t, args...).stdout, "\n"); lines < want {
			t.Errorf("%s: debug %v prints %d lines for %d entries", when, args, lines, want)
		}
	}
	count(largePods+3, "pods", "--all")
	count(3, "pods")
	count(largePolicies+1, "policies")
	count(6, "ipam")
	n.checkLargePicture(t, when)
	for _, q := range []struct {
		status int
		text   string
		args   []string
	}{
		{0, fmt.Sprintf("%d pods", largePods+3), []string{"status"}},
		{0, "ALLOWED", []string{"why", "ns99/app1-19", "ns99/app0-0", "TCP/5432"}},
		{0, "it wants app=app1", []string{"why", "ns42/app3-7", "ns42/app0-0", "TCP/5432", "--all"}},
		{0, "0 decided otherwise", []string{"verify"}},
		{0, "shop/php", []string{"drops"}},
		{0, "shop/php", []string{"flows"}},
		{0, "in force", []string{"wait", "policy", "ns99/app4"}},
		{0, "Live connections that would be cut: 0", []string{"impact", "--delete", "policy/ns99/app4"}},
	} {
		a := n.debugQuietly(t, q.args...)
		if a.status != q.status || !strings.Contains(a.stdout, q.text) {
			t.Errorf("%s: debug %v: status %d, want %d and %q:\n%.2000s%s", when, q.args, a.status, q.status, q.text, a.stdout, a.stderr)
		}
	}
	n.checkLargeBundle(t, when)
	n.checkLargeCompletion(t, when)
}

// checkLargePicture: matrix has every workload and every pair, graph an arrow for each that is
// let through by a policy.
func (n *redisNode) checkLargePicture(t *testing.T, when string) {
	t.Helper()
	var pic struct {
		Workloads []struct{ Pods []string }
		Pairs     []struct{ Services string }
	}
	if err := json.Unmarshal([]byte(n.debugQuietly(t, "matrix", "-o", "json").stdout), &pic); err != nil {
		t.Fatal(err)
	}
	pods, workloads := 0, largePolicies+3+1 // of the large cluster, newRedisNode's, and world
	for _, w := range pic.Workloads {
		pods += len(w.Pods)
	}
	few := 0
	for _, p := range pic.Pairs {
		if p.Services == "TCP/5432" {
			few++
		}
	}
	// A workload of several pods is asked about itself too.
	if pairs := workloads*(workloads-1) + largePolicies; len(pic.Workloads) != workloads || pods != largePods+3 || len(pic.Pairs) != pairs || few != largePolicies {
		t.Errorf("%s: matrix: %d workloads of %d pods, %d pairs, %d on TCP/5432; want %d, %d, %d, %d",
			when, len(pic.Workloads), pods, len(pic.Pairs), few, workloads, largePods+3, pairs, largePolicies)
	}
	if arrows := strings.Count(n.debugQuietly(t, "graph", "--format", "mermaid").stdout, "TCP/5432"); arrows != largePolicies {
		t.Errorf("%s: graph has %d arrows for TCP/5432, want %d", when, arrows, largePolicies)
	}
}

func (n *redisNode) checkLargeBundle(t *testing.T, when string) {
	t.Helper()
	name := n.path("bundle " + when + ".tar.gz")
	n.debugQuietly(t, "bundle", "--to", name).want(t, 0, ".tar.gz")
	var snap agent.Snapshot
	if err := json.Unmarshal(readBundle(t, name)["snapshot.json"], &snap); err != nil || len(snap.Cluster.Pods) != largePods+3 || len(snap.Cluster.Policies) != largePolicies+1 {
		t.Errorf("%s: the snapshot of the bundle is not whole: %v", when, err)
	}
}

// readBundle returns the files of an archive by name.
func readBundle(t *testing.T, name string) map[string][]byte {
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
	files := map[string][]byte{}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		if files[filepath.Base(h.Name)], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
}

func (n *redisNode) checkLargeCompletion(t *testing.T, when string) {
	t.Helper()
	for prefix, want := range map[string]int{"ns99/": 100, "ns1": 1100, "ns": largePods} {
		root := newRootCommand()
		var out strings.Builder
		root.SetOut(&out)
		root.SetErr(new(strings.Builder))
		root.SetArgs([]string{"__completeNoDesc", "debug", "why", prefix})
		if err := root.ExecuteContext(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := strings.Count(out.String(), "\n"+prefix) + strings.Count(out.String()[:len(prefix)], prefix); got != want {
			t.Errorf("%s: completion of %q offers %d pods, want %d", when, prefix, got, want)
		}
	}
}
