package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"

	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
)

// benchDir holds the programs that BenchmarkKernelCNI runs, built once per machine but
// for our own. There is no network where the benchmark runs.
func benchDir() string { return filepath.Join(os.TempDir(), "nftcni-bench-cni") }

// BenchmarkKernelCNI is the CNI figures of docs/performance-cni.md: cnitool with a plugin that does
// nothing, with ptp + host-local and masquerade with nftables, and with the product and its
// real agent, whose pods a policy selects. All three rows take turns pod by pod, so that
// whatever else the machine does hits them alike; then 20 at a time, row by row.
// -benchtime 100x is 100 pods a row.
func BenchmarkKernelCNI(b *testing.B) {
	if os.Getenv(insideNode) == b.Name() {
		if b.N == 1 {
			return // package testing's trial round: a node can be made once
		}
		if err := privateRun(); err != nil {
			b.Fatal(err)
		}
		benchCNI(b)
		return
	}
	if b.N > 1 {
		return // the inner process did it all in the trial round
	}
	if err := buildForBench(b.Context()); err != nil {
		b.Fatal(err)
	}
	args := append(slices.Clone(os.Args[1:]), "-test.run=^$", "-test.bench=^BenchmarkKernelCNI$")
	cmd := exec.CommandContext(b.Context(), "/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), insideNode+"="+b.Name())
	cmd.SysProcAttr = nodeNamespaces()
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		b.Fatal(err)
	}
}

func buildForBench(ctx context.Context) error {
	if err := os.MkdirAll(benchDir(), 0o755); err != nil {
		return err
	}
	nothing := filepath.Join(benchDir(), "nothing.go")
	source := "package main\n\nimport \"os\"\n\nfunc main() {\n\tif os.Getenv(\"CNI_COMMAND\") == \"ADD\" {\n\t\tos.Stdout.WriteString(`{\"cniVersion\":\"1.0.0\"}`)\n\t}\n}\n"
	if err := os.WriteFile(nothing, []byte(source), 0o644); err != nil {
		return err
	}
	for _, args := range [][]string{
		{"build", "-trimpath", "-ldflags=-s -w", "-o", filepath.Join(benchDir(), "nftcni"), "."},
		{"build", "-o", filepath.Join(benchDir(), "nothing"), nothing},
		{"install", "github.com/containernetworking/cni/cnitool@v1.3.1"},
		{"install", "github.com/containernetworking/plugins/plugins/main/ptp@v1.9.0"},
		{"install", "github.com/containernetworking/plugins/plugins/ipam/host-local@v1.9.0"},
	} {
		c := exec.CommandContext(ctx, "go", args...)
		c.Env = append(os.Environ(), "GOBIN="+benchDir(), "CGO_ENABLED=0")
		if out, err := c.CombinedOutput(); err != nil {
			return fmt.Errorf("%v: %w: %s", c.Args, err, out)
		}
	}
	return nil
}

// benchRow is one chain, run by cnitool.
type benchRow struct {
	*demoNode
	name string
	ours bool
	conf string

	mu                  sync.Mutex
	add, del, gone, cpu []time.Duration
}

// benchPod is one network namespace of a row.
type benchPod struct {
	name, netns string
	link        string // on the node, while it is attached
	addrs       []netip.Addr
}

func benchCNI(b *testing.B) {
	n, err := newDemoNode("demo", outsideEnds())
	if err != nil {
		b.Fatal(err)
	}
	if err := n.useProduct(b.N); err != nil {
		b.Fatal(err)
	}
	if err := n.startAgent(b.Context()); err != nil {
		b.Fatal(err)
	}
	defer n.close()
	rows := n.benchRows()
	b.ResetTimer()
	pods := makeBenchPods(b, rows)
	for i := range b.N { // one after another, the rows in turn
		for _, r := range rows {
			if err := errors.Join(r.runAdd(b.Context(), pods[r][i]), r.runDel(b.Context(), pods[r][i])); err != nil {
				b.Fatal(err)
			}
		}
	}
	for _, r := range rows {
		b.ReportMetric(ms(r.add), r.name+"-add-p50-ms")
		b.ReportMetric(ms(r.cpu), r.name+"-add-cpu-p50-ms")
		b.ReportMetric(ms(r.del), r.name+"-del-returned-p50-ms")
		b.ReportMetric(ms(r.gone), r.name+"-del-gone-p50-ms")
	}
	b.ReportMetric(ms(rows[2].add)/ms(rows[0].add), "times-the-floor")
	b.ReportMetric(ms(rows[1].add)/ms(rows[2].add), "times-faster-than-the-chain")
	for _, r := range rows {
		b.ReportMetric(inParallel(b, pods[r], 20, r.runAdd), r.name+"-add/s-x20")
		b.ReportMetric(inParallel(b, pods[r], 20, r.runDel), r.name+"-del/s-x20")
	}
	b.ReportMetric(0, "ns/op")
}

func ms(times []time.Duration) float64 {
	slices.Sort(times)
	return float64(times[len(times)/2].Microseconds()) / 1000
}

// useProduct puts the product's binary in the place of this one, and n pods and the policy
// that selects them before the agent.
func (n *demoNode) useProduct(pods int) error {
	for _, name := range []string{"nftcni", "nothing", "ptp", "host-local"} {
		link := n.path("bin/" + name)
		if err := errors.Join(os.RemoveAll(link), os.Symlink(filepath.Join(benchDir(), name), link)); err != nil {
			return err
		}
	}
	var text strings.Builder
	text.WriteString(redisPolicy)
	for i := range pods {
		fmt.Fprintf(&text, "---\napiVersion: v1\nkind: Pod\nmetadata: {name: pod-%d, namespace: shop, labels: {service: redis}}\n"+
			"spec: {nodeName: demo, containers: [{name: main, image: demo}]}\n", i)
	}
	nodes, err := os.ReadFile("testdata/scenario/nodes.yaml")
	if err != nil {
		return err
	}
	return errors.Join(writeRenamed(filepath.Join(n.manifests, "nodes.yaml"), nodes),
		writeRenamed(filepath.Join(n.manifests, "pods.yaml"), []byte(text.String())))
}

func (n *demoNode) benchRows() []*benchRow {
	return []*benchRow{
		{demoNode: n, name: "nothing", conf: `{"type": "nothing"}`},
		{demoNode: n, name: "ptp-masq-nft", conf: fmt.Sprintf(`{"type": "ptp", "ipMasq": true, "ipMasqBackend": "nftables",
			"ipam": {"type": "host-local", "subnet": "10.50.0.0/16", "dataDir": %q}}`, n.path("host-local"))},
		{demoNode: n, name: "nftcni", ours: true, conf: fmt.Sprintf(`{"type": "nftcni", "ipMasq": true, "stateDir": %q,
			"ipam": {"ranges": [[{"subnet": "10.22.0.0/16"}], [{"subnet": "fd00:22::/64"}]]}}`, n.path("state"))},
	}
}

func makeBenchPods(b *testing.B, rows []*benchRow) map[*benchRow][]*benchPod {
	b.Helper()
	pods := map[*benchRow][]*benchPod{}
	for _, r := range rows {
		dir := r.path("net.d-" + r.name)
		conf := fmt.Sprintf(`{"cniVersion": "1.0.0", "name": "bench", "plugins": [%s]}`, r.conf)
		if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, "10-bench.conflist"), []byte(conf), 0o644)); err != nil {
			b.Fatal(err)
		}
		for i := range b.N {
			fd, err := newNetNS()
			if err != nil {
				b.Fatal(err)
			}
			pods[r] = append(pods[r], &benchPod{name: fmt.Sprintf("pod-%d", i), netns: netnsPath(fd)})
		}
	}
	return pods
}

// cnitool runs one verb and returns how long it took, and its CPU time with its children's.
func (r *benchRow) cnitool(ctx context.Context, verb string, p *benchPod) (out []byte, took, cpu time.Duration, err error) {
	c := exec.CommandContext(ctx, filepath.Join(benchDir(), "cnitool"), verb, "bench", p.netns)
	c.Env = []string{"PATH=" + os.Getenv("PATH"), "CNI_PATH=" + r.path("bin"), "NETCONFPATH=" + r.path("net.d-"+r.name),
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=" + p.name}
	var stdout, stderr bytes.Buffer
	c.Stdout, c.Stderr = &stdout, &stderr
	began := time.Now()
	err = c.Run()
	took = time.Since(began)
	if err != nil {
		return nil, 0, 0, fmt.Errorf("cnitool %s with %s: %w: %s%s", verb, r.name, err, stdout.Bytes(), stderr.Bytes())
	}
	return stdout.Bytes(), took, c.ProcessState.UserTime() + c.ProcessState.SystemTime(), nil
}

func (r *benchRow) runAdd(ctx context.Context, p *benchPod) error {
	out, took, cpu, err := r.cnitool(ctx, "add", p)
	if err != nil {
		return err
	}
	var result types100.Result
	if err := json.Unmarshal(out, &result); err != nil {
		return fmt.Errorf("result of %s: %w", r.name, err)
	}
	p.addrs, p.link = nil, ""
	for _, i := range result.Interfaces {
		if i.Sandbox == "" {
			p.link = i.Name
		}
	}
	for _, ip := range result.IPs {
		if a, ok := netip.AddrFromSlice(ip.Address.IP); ok {
			p.addrs = append(p.addrs, a.Unmap())
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.add, r.cpu = append(r.add, took), append(r.cpu, cpu)
	return nil
}

func (r *benchRow) runDel(ctx context.Context, p *benchPod) error {
	began := time.Now()
	_, took, _, err := r.cnitool(ctx, "del", p)
	if err != nil {
		return err
	}
	for there := true; there; {
		if there, err = r.left(ctx, p); err != nil {
			return err
		}
	}
	gone := time.Since(began)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.del, r.gone = append(r.del, took), append(r.gone, gone)
	return nil
}

// left says whether the pod's link is there, or an element of our table with its address.
func (r *benchRow) left(ctx context.Context, p *benchPod) (bool, error) {
	if p.link == "" {
		return false, nil
	}
	var missing netlink.LinkNotFoundError
	if _, err := netlink.LinkByName(p.link); !errors.As(err, &missing) {
		return true, err
	}
	if !r.ours {
		return false, nil
	}
	reader, err := nft.NewReader(ctx, nft.Options{})
	if err != nil {
		return false, err
	}
	defer reader.Close()
	for _, a := range p.addrs {
		if _, found, err := reader.Lookup(ctx, policy.Key{Map: policy.PodID, Addr: a}); found || err != nil {
			return true, err
		}
	}
	return false, nil
}

// inParallel returns calls a second of a verb for all pods, limit at a time.
func inParallel(b *testing.B, pods []*benchPod, limit int, verb func(context.Context, *benchPod) error) float64 {
	b.Helper()
	turns := make(chan struct{}, limit)
	var wg sync.WaitGroup
	began := time.Now()
	for _, p := range pods {
		turns <- struct{}{}
		wg.Go(func() {
			defer func() { <-turns }()
			if err := verb(b.Context(), p); err != nil {
				b.Error(err)
			}
		})
	}
	wg.Wait()
	return float64(len(pods)) / time.Since(began).Seconds()
}
