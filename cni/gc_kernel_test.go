package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
)

// gcArgs are what a runtime says to GC: these attachments are valid.
func gcArgs(valid ...string) *libcni.GCArgs {
	args := &libcni.GCArgs{}
	for _, id := range valid {
		args.ValidAttachments = append(args.ValidAttachments, types.GCAttachment{ContainerID: id, IfName: "eth0"})
	}
	return args
}

// direct calls the plugin as a runtime with a cache of its own would: libcni deletes what
// its cache knows before it calls GC, and always sends a list.
func (n *node) direct(command, conf string) error {
	c := exec.Command(filepath.Join(n.bin, "nftcni"))
	c.Env = append(os.Environ(), "CNI_COMMAND="+command, "CNI_PATH="+n.bin)
	c.Stdin = strings.NewReader(conf)
	out, err := c.Output()
	if err == nil {
		return nil
	}
	e := new(types.Error)
	if json.Unmarshal(out, e) != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return e
}

func TestKernelGC(t *testing.T) {
	n := newNode(t)
	first := n.chain("first", "1.1.0", n.plugin(dualStack))
	second := n.chain("second", "1.1.0", n.plugin(dualStack))
	empty := n.snapshot()
	a, b, c := n.runtime("a", n.pod("a")), n.runtime("b", n.pod("b")), n.runtime("c", n.pod("c"))
	n.mustAdd(second, c)
	onlyC := n.snapshot()
	n.mustAdd(first, a)
	onlyAC := n.snapshot()
	n.mustAdd(first, b)

	conf := func(valid string) string {
		return fmt.Sprintf(`{"cniVersion": "1.1.0", "name": "first", "runDir": %q, "stateDir": %q, "type": "nftcni" %s}`, n.run, n.state, valid)
	}
	all := n.snapshot()
	if err := n.direct("GC", conf("")); code(err) != 7 || !strings.Contains(err.Error(), "cni.dev/valid-attachments") {
		t.Errorf("GC without a list: got %v, want code 7", err)
	}
	n.same("GC without a list", all)
	if err := n.direct("GC", conf(`, "cni.dev/valid-attachments": [{"containerID": "a", "ifname": "eth0"}]`)); err != nil {
		t.Errorf("GC: %v", err)
	}
	n.same("GC that keeps a", onlyAC)
	if err := n.direct("GC", conf(`, "cni.dev/valid-attachments": []`)); err != nil {
		t.Errorf("GC: %v", err)
	}
	n.same("GC of all of the first network", onlyC)
	if err := n.cni.GCNetworkList(t.Context(), second, gcArgs()); err != nil {
		t.Errorf("GC through libcni: %v", err)
	}
	n.same("GC of all of the second network", empty)
}

func TestKernelParallel(t *testing.T) {
	n := newNode(t)
	l := n.list("1.1.0", dualStack)
	before := n.snapshot()
	const pods = 200
	var rts []*libcni.RuntimeConf
	for i := range pods {
		id := fmt.Sprintf("p%03d", i)
		rts = append(rts, n.runtime(id, n.pod(id)))
	}
	limit := make(chan struct{}, 20)
	var mu sync.Mutex
	seen := map[string]string{}
	each := func(fn func(*libcni.RuntimeConf)) {
		var wg sync.WaitGroup
		for _, rt := range rts {
			wg.Go(func() {
				limit <- struct{}{}
				defer func() { <-limit }()
				fn(rt)
			})
		}
		wg.Wait()
	}
	each(func(rt *libcni.RuntimeConf) {
		res, err := n.add(l, rt)
		if err != nil {
			t.Error(err)
			return
		}
		mu.Lock()
		defer mu.Unlock()
		for _, ip := range res.IPs {
			if other := seen[ip.Address.String()]; other != "" {
				t.Errorf("%s given to %s and %s", ip.Address.String(), other, rt.ContainerID)
			}
			seen[ip.Address.String()] = rt.ContainerID
		}
	})
	if len(seen) != 2*pods {
		t.Errorf("%d addresses for %d pods", len(seen), pods)
	}
	each(func(rt *libcni.RuntimeConf) { n.mustDel(l, rt) })
	n.finishDels()
	n.same("200 ADD and DEL, 20 at a time", before)
}

// TestKernelDelRacesAdd has both verbs, and the agent's pass, at work on one attachment.
func TestKernelDelRacesAdd(t *testing.T) {
	n := newNode(t)
	l := n.list("1.1.0", dualStack)
	before := n.snapshot()
	for i := range 20 {
		id := fmt.Sprintf("r%d", i)
		rt := n.runtime(id, n.pod(id))
		var wg sync.WaitGroup
		wg.Go(func() { _, _ = n.add(l, rt) })
		wg.Go(func() { n.mustDel(l, rt) })
		wg.Go(func() { _, _ = Reconcile(context.Background(), ReconcileOptions{RunDir: n.run, StateDir: n.state}) })
		if i%3 == 0 {
			wg.Go(func() { n.kill(id) })
		}
		wg.Wait()
		n.mustDel(l, rt)
		n.kill(id)
	}
	n.finishDels()
	n.same("DEL beside ADD", before)
}

// finishDels is the agent's part of a DEL that it had no time to answer: on a machine under load that takes
// longer than detachTimeout. Nothing but such a DEL may leave a record.
func (n *node) finishDels() {
	n.t.Helper()
	agent := NewClient(n.run)
	detach := func(ctx context.Context, a Attachment) error { return agent.Detach(ctx, detachRequest(a)) }
	var err error
	for range 20 {
		left, errs := records(n.run)
		if len(left) == 0 && err == nil {
			return
		}
		for _, r := range left {
			if !r.Deleting {
				n.t.Errorf("a record is left that nobody looks at: %+v", r)
			}
		}
		_, err = Reconcile(n.t.Context(), ReconcileOptions{RunDir: n.run, StateDir: n.state, Detach: detach})
		err = errors.Join(append(errs, err)...)
	}
	n.t.Errorf("what DELs left is never finished: %v", err)
}

func TestKernelNetworkConfigurations(t *testing.T) {
	n := newNode(t)
	b, err := os.ReadFile("testdata/cni-network-configurations.json")
	if err != nil {
		t.Fatal(err)
	}
	n.installReference()
	var confs []map[string]any
	if err := json.Unmarshal(b, &confs); err != nil {
		t.Fatal(err)
	}
	before := n.snapshot()
	for i, conf := range confs {
		name := conf["name"].(string)
		t.Run(name, func(t *testing.T) {
			conf["runDir"], conf["stateDir"] = n.run, n.state
			if in := conf["ipam"].(map[string]any); in["type"] == "host-local" {
				in["dataDir"] = n.dir + "/host-local"
			}
			version := conf["cniVersion"].(string)
			raw, _ := json.Marshal(conf)
			l := n.chain(name, version, string(raw))
			rt := n.runtime(fmt.Sprintf("conf%d", i), n.pod(fmt.Sprintf("conf%d", i)))
			res, err := n.add(l, rt)
			if name == "dhcp-network" {
				if code(err) != 7 || !strings.Contains(err.Error(), "ipam.type: dhcp") || !strings.Contains(err.Error(), "podCIDRs") {
					t.Errorf("got %v, want code 7, the field and the remedy", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := res.IPs[0].Address.String(); !strings.HasPrefix(got, "10.22.0.") || !strings.HasSuffix(got, "/32") {
				t.Errorf("address %s", got)
			}
			if !n.agent.attached[HostInterface(rt.ContainerID, "eth0")].Masquerade {
				t.Error("ipMasq did not reach the agent")
			}
			n.mustDel(l, rt)
			n.same("ADD and DEL", before)
		})
	}
}

func referenceDir() string {
	return filepath.Join(os.TempDir(), "nftcni-reference-plugins-v1.9.0")
}

func referencePlugins() []string {
	return []string{"ipam/host-local", "ipam/static", "main/bridge", "main/ptp"}
}

// installReference builds the reference plugins, once per machine.
func installReference() error {
	for _, p := range referencePlugins() {
		if _, err := os.Stat(filepath.Join(referenceDir(), filepath.Base(p))); err == nil {
			continue
		}
		c := exec.Command("go", "install", "github.com/containernetworking/plugins/plugins/"+p+"@v1.9.0")
		c.Dir, c.Env = os.TempDir(), append(os.Environ(), "GOBIN="+referenceDir(), "GOFLAGS=")
		if out, err := c.CombinedOutput(); err != nil {
			return fmt.Errorf("%v: %w: %s", c.Args, err, out)
		}
	}
	return nil
}

// installReference puts the reference plugins beside ours.
func (n *node) installReference() {
	n.t.Helper()
	for _, p := range referencePlugins() {
		bin := filepath.Join(referenceDir(), filepath.Base(p))
		if _, err := os.Stat(bin); err != nil {
			n.t.Fatalf("reference plugin: %v", err)
		}
		if err := os.Symlink(bin, filepath.Join(n.bin, filepath.Base(p))); err != nil {
			n.t.Fatal(err)
		}
	}
}

func TestKernelDelegation(t *testing.T) {
	for _, tt := range []struct{ name, ipam, want string }{
		{name: "host-local", want: "10.30.0.2/32", ipam: `{"type": "host-local", "ranges": [[{"subnet": "10.30.0.0/24"}], [{"subnet": "fd00:30::/64"}]], "dataDir": "DIR/hl"}`},
		{name: "static", want: "10.31.0.9/32", ipam: `{"type": "static", "addresses": [{"address": "10.31.0.9/24"}], "routes": [{"dst": "0.0.0.0/0", "gw": "10.31.0.1"}]}`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := newNode(t)
			n.installReference()
			before := n.snapshot()
			l := n.list("1.1.0", `{"ipam": `+strings.ReplaceAll(tt.ipam, "DIR", n.dir)+`}`)
			if err := n.cni.GetStatusNetworkList(t.Context(), l); err != nil {
				t.Errorf("STATUS: %v", err)
			}
			rt := n.runtime("a", n.pod("a"))
			res := n.mustAdd(l, rt)
			if got := res.IPs[0].Address.String(); got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
			if err := n.cni.CheckNetworkList(t.Context(), l, rt); err != nil {
				t.Errorf("CHECK: %v", err)
			}
			n.mustDel(l, rt)
			n.same("ADD and DEL", before)
			// An attachment whose namespace is gone without DEL gives its address back too.
			n.mustAdd(l, n.runtime("b", n.pod("b")))
			n.kill("b")
			n.settle()
			n.reconcileUntilGone("b")
			n.same("the end of the namespace", before)
			if left, _ := filepath.Glob(n.dir + "/hl/testnet/*.*.*"); len(left) != 0 {
				t.Errorf("host-local still holds %v", left)
			}
			// GC reaches the delegate.
			if err := n.direct("GC", fmt.Sprintf(`{"cniVersion": "1.1.0", "name": "testnet", "type": "nftcni", "runDir": %q, "stateDir": %q, "ipam": %s, "cni.dev/valid-attachments": []}`,
				n.run, n.state, strings.ReplaceAll(tt.ipam, "DIR", n.dir))); err != nil {
				t.Errorf("GC: %v", err)
			}
		})
	}
	t.Run("missing plugin", func(t *testing.T) {
		n := newNode(t)
		l := n.list("1.1.0", `{"ipam": {"type": "no-such-ipam"}}`)
		if _, err := n.add(l, n.runtime("a", n.pod("a"))); code(err) != 7 || !strings.Contains(err.Error(), "no-such-ipam") {
			t.Errorf("got %v", err)
		}
	})
}

// TestKernelIPAMServesBridge has the reference bridge plugin take addresses from us.
func TestKernelIPAMServesBridge(t *testing.T) {
	n := newNode(t)
	n.installReference()
	for _, version := range []string{"0.3.1", "1.0.0", "1.1.0"} {
		conf := fmt.Sprintf(`{"type": "bridge", "bridge": "cnitest0", "isGateway": true, "ipam": {"type": "nftcni-ipam", "subnet": "10.40.0.0/24",
			"routes": [{"dst": "0.0.0.0/0"}]}, "runDir": %q, "stateDir": %q}`, n.run, n.state)
		l := n.chain("bridged", version, conf)
		a, b := n.runtime("a", n.pod("a")), n.runtime("b", n.pod("b"))
		resA, resB := n.mustAdd(l, a), n.mustAdd(l, b)
		if resA.IPs[0].Gateway.String() != "10.40.0.1" || resA.IPs[0].Address.IP.Equal(resB.IPs[0].Address.IP) {
			t.Errorf("%s: %v and %v", version, resA.IPs, resB.IPs)
		}
		n.talk(a.NetNS, b.NetNS, resB.IPs[0].Address.IP.String())
		if version != "0.3.1" {
			if err := n.cni.CheckNetworkList(t.Context(), l, a); err != nil {
				t.Errorf("CHECK %s: %v", version, err)
			}
		}
		// The agent's pass leaves what it serves to others alone.
		n.reconcile()
		s, err := TakeSnapshot(t.Context(), n.run, n.state)
		if err != nil || len(s.Leases) != 2 {
			t.Errorf("leases %v, %v", s.Leases, err)
		}
		n.mustDel(l, a)
		n.mustDel(l, b)
		if s, err := TakeSnapshot(t.Context(), n.run, n.state); err != nil || len(s.Leases) != 0 {
			t.Errorf("leases after DEL %v, %v", s.Leases, err)
		}
		n.kill("a")
		n.kill("b")
	}
	if out, err := exec.Command("ip", "link", "del", "cnitest0").CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}
