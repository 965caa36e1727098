package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"golang.org/x/sys/unix"
)

// BenchmarkKernelAddDel times ADD and DEL through libcni, one after another and 20 at a
// time: ours, a plugin that does nothing (the floor), and the reference plugins. Run it
// with -benchtime 200x, and with NFTCNI_TEST_PLUGIN naming the product's binary (this test
// binary starts faster than it). Times are medians; rates count a row by its wall time.
// A DEL returns when the link is gone from the kernel, in every row. The reference plugins
// get IPv4 only: with IPv6 they wait for duplicate address detection, 1 s and more an ADD.
func BenchmarkKernelAddDel(b *testing.B) {
	for _, row := range []struct{ name, conf string }{
		{"nothing", `{"type": "nothing"}`},
		{"nftcni", ""},
		{"ptp+host-local", `{"type": "ptp", "ipam": {"type": "host-local", "subnet": "10.50.0.0/16", "dataDir": "DIR/hl"}}`},
		{"ptp+host-local+masq-nftables", `{"type": "ptp", "ipMasq": true, "ipMasqBackend": "nftables", "ipam": {"type": "host-local", "subnet": "10.50.0.0/16", "dataDir": "DIR/hl"}}`},
	} {
		for _, parallel := range []int{1, 20} {
			b.Run(fmt.Sprintf("plugin=%s/parallel=%d", row.name, parallel), func(b *testing.B) {
				n := newNode(b)
				n.benchPlugins()
				conf := row.conf
				if conf == "" {
					conf = n.plugin(`{"ipMasq": true, "ipam": {"type": "nftcni-ipam", "ranges": [[{"subnet": "10.22.0.0/16"}], [{"subnet": "fd00:22::/64"}]]}}`)
				}
				n.bench(b, n.chain("bench", "1.0.0", strings.ReplaceAll(conf, "DIR", n.dir)), parallel)
			})
		}
	}
}

// benchPlugins puts the reference plugins and one that does nothing beside ours.
func (n *node) benchPlugins() {
	n.t.Helper()
	n.installReference()
	nothing := filepath.Join(os.TempDir(), "nftcni-nothing-plugin")
	if _, err := os.Stat(nothing); err != nil {
		src := filepath.Join(n.dir, "nothing.go")
		body := "package main\n\nimport \"os\"\n\nfunc main() {\n\tif os.Getenv(\"CNI_COMMAND\") == \"ADD\" {\n\t\tos.Stdout.WriteString(`{\"cniVersion\":\"1.0.0\"}`)\n\t}\n}\n"
		if err := os.WriteFile(src, []byte(body), 0o600); err != nil {
			n.t.Fatal(err)
		}
		if out, err := exec.Command("go", "build", "-o", nothing, src).CombinedOutput(); err != nil {
			n.t.Fatalf("%v: %s", err, out)
		}
	}
	if err := os.Symlink(nothing, n.bin+"/nothing"); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) bench(b *testing.B, l *libcni.NetworkConfigList, parallel int) {
	var rts []*libcni.RuntimeConf
	for i := range b.N {
		id := fmt.Sprintf("b%05d", i)
		rts = append(rts, n.runtime(id, n.pod(id)))
	}
	each := func(fn func(*libcni.RuntimeConf) error) (median, wall time.Duration) {
		times := make([]time.Duration, len(rts))
		limit := make(chan struct{}, parallel)
		var wg sync.WaitGroup
		began := time.Now()
		for i, rt := range rts {
			limit <- struct{}{}
			wg.Go(func() {
				defer func() { <-limit }()
				start := time.Now()
				if err := fn(rt); err != nil {
					b.Error(err)
				}
				times[i] = time.Since(start)
			})
		}
		wg.Wait()
		wall = time.Since(began)
		slices.Sort(times)
		return times[len(times)/2], wall
	}
	b.ResetTimer()
	before := childCPU(b)
	add, wall := each(func(rt *libcni.RuntimeConf) error { _, err := n.add(l, rt); return err })
	b.ReportMetric(float64(add.Microseconds())/1000, "add-p50-ms")
	b.ReportMetric(float64(b.N)/wall.Seconds(), "add/s")
	b.ReportMetric(float64((childCPU(b)-before).Microseconds())/1000/float64(b.N), "add-cpu-ms")
	del, wall := each(func(rt *libcni.RuntimeConf) error { return n.cni.DelNetworkList(context.Background(), l, rt) })
	b.ReportMetric(float64(del.Microseconds())/1000, "del-p50-ms")
	b.ReportMetric(float64(b.N)/wall.Seconds(), "del/s")
	b.ReportMetric(0, "ns/op")
}

// childCPU is the CPU time of the processes run so far: unlike a wall time it means
// something on a machine that is busy.
func childCPU(b *testing.B) time.Duration {
	b.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_CHILDREN, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkKernelSteps tells where an ADD and a DEL spend their time: microseconds, the
// median of each step, inside one process (so without its start).
func BenchmarkKernelSteps(b *testing.B) {
	n := newNode(b)
	conf := n.list("1.0.0", `{"ipam": {"type": "nftcni-ipam", "ranges": [[{"subnet": "10.22.0.0/16"}], [{"subnet": "fd00:22::/64"}]]}}`)
	var raw map[string]any
	if err := json.Unmarshal(conf.Plugins[0].Bytes, &raw); err != nil {
		b.Fatal(err)
	}
	raw["name"], raw["cniVersion"] = "bench", "1.0.0"
	stdin, err := json.Marshal(raw)
	if err != nil {
		b.Fatal(err)
	}
	times := map[string][]time.Duration{}
	for i := range b.N {
		id := fmt.Sprintf("s%05d", i)
		path := n.pod(id)
		for _, command := range []string{"ADD", "DEL"} {
			env := map[string]string{"CNI_COMMAND": command, "CNI_CONTAINERID": id, "CNI_IFNAME": "eth0", "CNI_NETNS": path, "CNI_PATH": n.bin}
			var out bytes.Buffer
			last := time.Now()
			p := Plugin{Getenv: func(k string) string { return env[k] }, Stdin: bytes.NewReader(stdin), Stdout: &out, Stderr: &out,
				AfterStep: func(step string) {
					times[step] = append(times[step], time.Since(last))
					last = time.Now()
				}}
			if p.Run(b.Context()) != 0 {
				b.Fatal(out.String())
			}
		}
	}
	for step, list := range times {
		slices.Sort(list)
		b.ReportMetric(float64(list[len(list)/2].Microseconds()), strings.ReplaceAll(step, " ", "-")+"-us")
	}
	b.ReportMetric(0, "ns/op")
}
