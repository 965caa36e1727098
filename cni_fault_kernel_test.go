package main

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/cni"
	"github.com/nftcni/nftcni/nft"
)

// envFault names the step after which the plugin, played by this test binary, kills itself.
const envFault = "NFTCNI_TEST_FAULT"

// agentSettles bounds what the agent may take to clean up after a killed plugin: until
// its next pass (5 s), and 10 s from there.
const agentSettles = 15 * time.Second

// pluginUnderFault is nftcni as the plugin, killed after the step of envFault.
func pluginUnderFault(step string) int {
	p := cni.NewPlugin()
	p.AfterStep = func(done string) {
		if done == step {
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			select {}
		}
	}
	return p.Run(context.Background())
}

func addSteps() []string {
	return []string{"add lease", "add record", "add link", "add pod", "add host", "add attach", "add routes", "add final", "add print", "add result"}
}

func delSteps() []string {
	return []string{"del journal", "del routes", "del detach", "del link", "del lease", "del record"}
}

// faultNode is a node with the real agent, pods that live and policies that select them.
type faultNode struct {
	*redisNode
	t    *testing.T
	pods map[string]*faultPod
}

// faultPod is a pod of a killed plugin: its namespace ends when fd is closed.
type faultPod struct {
	fd      int
	runtime *libcni.RuntimeConf
}

// newFaultNode makes one pod per step, which the agent knows and the policy selects.
func newFaultNode(t *testing.T, steps []string) *faultNode {
	t.Helper()
	n := &faultNode{redisNode: newRedisNode(t, true), t: t, pods: map[string]*faultPod{}}
	t.Cleanup(func() {
		if err := n.close(); err != nil {
			t.Error(err)
		}
	})
	// Under another name than the product's: that one is at work before there are tests (cni/start).
	const plugin = "nftcni-killed"
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, n.path("bin/"+plugin)); err != nil {
		t.Fatal(err)
	}
	network, err := libcni.NetworkConfFromBytes(bytes.Replace(n.networkConfig(), []byte(`"nftcni"`), []byte(`"`+plugin+`"`), 1))
	if err != nil {
		t.Fatal(err)
	}
	n.network = network
	_, err = n.change(t.Context(), func() error {
		var text strings.Builder
		for _, step := range steps {
			fmt.Fprintf(&text, "---\napiVersion: v1\nkind: Pod\nmetadata: {name: %s, namespace: shop, labels: {service: redis}}\n"+
				"spec: {nodeName: demo, containers: [{name: main, image: demo}]}\n", podOf(step))
		}
		return writeRenamed(filepath.Join(n.manifests, "killed.yaml"), []byte(text.String()))
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range steps {
		fd, err := newNetNS()
		if err != nil {
			t.Fatal(err)
		}
		n.pods[step] = &faultPod{fd: fd, runtime: &libcni.RuntimeConf{ContainerID: "demo-shop-" + podOf(step), NetNS: netnsPath(fd), IfName: "eth0",
			Args: [][2]string{{"K8S_POD_NAMESPACE", "shop"}, {"K8S_POD_NAME", podOf(step)}}}}
	}
	return n
}

func podOf(step string) string { return strings.ReplaceAll(step, " ", "-") }

func (n *faultNode) add(step string) error {
	_, err := n.plugin.AddNetworkList(n.t.Context(), n.network, n.pods[step].runtime)
	return err
}

func (n *faultNode) del(step string) error {
	return n.plugin.DelNetworkList(n.t.Context(), n.network, n.pods[step].runtime)
}

// killed runs a verb of a plugin that is killed after the step.
func (n *faultNode) killed(step string, verb func(string) error) {
	n.t.Helper()
	n.t.Setenv(envFault, step)
	err := verb(step)
	if err := os.Unsetenv(envFault); err != nil {
		n.t.Fatal(err)
	}
	if err == nil && step != "add print" && step != "add result" {
		n.t.Errorf("%s: the plugin was not killed", step)
	}
}

// snapshot is the whole node: links, routes, neighbours, records, leases, and every
// element of the table.
func (n *faultNode) snapshot() string {
	n.t.Helper()
	s, err := cni.TakeSnapshot(n.t.Context(), cni.DefaultRunDir, n.path("state"))
	if err != nil {
		n.t.Fatal(err)
	}
	r, err := nft.NewReader(n.t.Context(), nft.Options{})
	if err != nil {
		n.t.Fatal(err)
	}
	defer r.Close()
	tables, err := r.Tables(n.t.Context())
	if err != nil {
		n.t.Fatal(err)
	}
	sizes, err := r.Sizes(n.t.Context())
	if err != nil {
		n.t.Fatal(err)
	}
	var lines []string
	for k, v := range tables {
		lines = append(lines, fmt.Sprintf("element %+v: %d", k, v))
	}
	for _, set := range slices.Sorted(maps.Keys(sizes)) {
		lines = append(lines, fmt.Sprintf("set %s: %d elements", set, sizes[set]))
	}
	slices.Sort(lines)
	return s.String() + strings.Join(lines, "\n")
}

// same waits until the node looks as it did before.
func (n *faultNode) same(what, before string) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), agentSettles)
	defer cancel()
	after := ""
	if err := n.demoNode.until(ctx, func(context.Context) bool { after = n.snapshot(); return after == before }); err != nil {
		n.t.Errorf("%s left something (-before +after):\n%s", what, cmp.Diff(strings.Split(before, "\n"), strings.Split(after, "\n")))
	}
}

// TestKernelKilledPlugin kills the plugin between any two steps of ADD and DEL beside the
// real agent and compares the whole node before and after.
func TestKernelKilledPlugin(t *testing.T) { inFreshNode(t, testKilledPlugin) }

func testKilledPlugin(t *testing.T) {
	adds, dels := addSteps(), delSteps()
	n := newFaultNode(t, slices.Concat(adds, dels))
	before := n.snapshot()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, step := range adds {
		n.killed(step, n.add)
		must(n.del(step))
		n.same("ADD killed after "+step+", then DEL", before)
	}
	for _, step := range dels {
		must(n.add(step))
		n.killed(step, n.del)
		must(n.del(step))
		n.same("DEL killed after "+step+", then DEL", before)
	}
	// Without any DEL: all of them at once, so that one pass of the agent does it.
	for _, step := range dels {
		must(n.add(step))
		n.killed(step, n.del)
	}
	for _, step := range adds {
		n.killed(step, n.add)
	}
	if n.snapshot() == before {
		t.Fatal("the killed plugins left nothing: the agent has nothing to show")
	}
	// The runtime was told of these two: the end of their namespace ends them.
	for _, step := range []string{"add print", "add result"} {
		must(unix.Close(n.pods[step].fd))
	}
	n.same("every killed plugin, then the agent alone", before)
	n.check(t, "afterwards")
}
