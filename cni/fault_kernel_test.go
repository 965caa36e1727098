package cni

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
)

func addSteps() []string {
	return []string{"add lease", "add record", "add link", "add pod", "add host", "add attach", "add routes", "add final", "add print", "add result"}
}

func delSteps() []string {
	return []string{"del journal", "del routes", "del detach", "del link", "del lease", "del record"}
}

// reconcile is one pass of the agent.
func (n *node) reconcile() []Attachment {
	n.t.Helper()
	gone, err := Reconcile(context.Background(), ReconcileOptions{RunDir: n.run, StateDir: n.state,
		Detach: func(ctx context.Context, a Attachment) error {
			c := NewClient(n.run)
			return c.Detach(ctx, detachRequest(a))
		}, Report: func(s string) { n.t.Log(s) }})
	if err != nil {
		n.t.Errorf("reconcile: %v", err)
	}
	return gone
}

// killedAt runs one verb of a plugin that kills itself after the step.
func (n *node) killedAt(step string, run func()) {
	n.t.Setenv(envFault, step)
	run()
	if err := os.Unsetenv(envFault); err != nil {
		n.t.Fatal(err)
	}
}

func TestKernelKilledInAdd(t *testing.T) {
	for _, step := range addSteps() {
		for _, how := range []string{"DEL", "agent", "agent after the namespace is gone", "ADD again"} {
			if how == "agent" && step == "add result" {
				continue // that ADD is complete: only the runtime, or the namespace's end, ends it
			}
			t.Run(step+" then "+how, func(t *testing.T) {
				n := newNode(t)
				l := n.list("1.1.0", dualStack)
				other := n.runtime("other", n.pod("other"))
				n.mustAdd(l, other)
				defer n.mustDel(l, other)
				before := n.snapshot()
				rt := n.runtime("a", n.pod("a"))
				n.killedAt(step, func() {
					if _, err := n.add(l, rt); err == nil && step != "add print" && step != "add result" {
						t.Error("the plugin was not killed")
					}
				})
				switch how {
				case "DEL":
					n.mustDel(l, rt)
				case "agent":
					n.reconcile()
				case "agent after the namespace is gone":
					n.kill("a")
					n.settle()
					n.reconcileUntilGone("a")
				case "ADD again":
					if _, err := n.add(l, rt); (err != nil) != (step == "add result") {
						t.Errorf("ADD after a killed one: %v", err)
					}
					n.mustDel(l, rt)
				}
				n.same("the plugin killed after "+step, before)
			})
		}
	}
}

// reconcileUntilGone makes agent passes until the container's link is gone: the kernel
// removes it some time after the namespace was let go.
func (n *node) reconcileUntilGone(id string) {
	for range 200 {
		n.reconcile()
		live, err := LiveLinks(context.Background())
		if err != nil {
			n.t.Fatal(err)
		}
		if _, there := live[HostInterface(id, "eth0")]; !there {
			n.reconcile()
			return
		}
		n.settle()
	}
}

func TestKernelKilledInDel(t *testing.T) {
	for _, step := range delSteps() {
		for _, how := range []string{"DEL", "agent"} {
			t.Run(step+" then "+how, func(t *testing.T) {
				n := newNode(t)
				l := n.list("1.1.0", dualStack)
				before := n.snapshot()
				rt := n.runtime("a", n.pod("a"))
				n.mustAdd(l, rt)
				n.killedAt(step, func() { _ = n.cni.DelNetworkList(context.Background(), l, rt) })
				if how == "DEL" {
					n.mustDel(l, rt)
				} else {
					n.reconcile()
				}
				n.same("the plugin killed after "+step, before)
			})
		}
	}
}

func TestKernelReconcileLeavesTheLiving(t *testing.T) {
	n := newNode(t)
	l := n.list("1.1.0", dualStack)
	rt := n.runtime("a", n.pod("a"))
	n.mustAdd(l, rt)
	before := n.snapshot()
	if gone := n.reconcile(); len(gone) != 0 {
		t.Errorf("reconcile removed %v", gone)
	}
	n.same("reconcile", before)
	// A plugin at work: its lock is held.
	lock, err := lockAttachment(t.Context(), n.run, HostInterface("a", "eth0"))
	if err != nil {
		t.Fatal(err)
	}
	r, err := readRecord(n.run, HostInterface("a", "eth0"))
	if err != nil {
		t.Fatal(err)
	}
	r.Pending = true
	if err := writeRecord(n.run, r); err != nil {
		t.Fatal(err)
	}
	if gone := n.reconcile(); len(gone) != 0 {
		t.Errorf("reconcile removed %v under its plugin", gone)
	}
	r.Pending = false
	if err := writeRecord(n.run, r); err != nil {
		t.Fatal(err)
	}
	lock.unlock()
	// The run directory is lost while the pod lives.
	if err := os.RemoveAll(filepath.Join(n.run, attachmentDir)); err != nil {
		t.Fatal(err)
	}
	n.reconcile()
	n.same("a lost run directory", before)
	if err := n.cni.CheckNetworkList(t.Context(), l, rt); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	n.mustDel(l, rt)
}

func TestKernelDelWhen(t *testing.T) {
	for _, tt := range []struct {
		name string
		make func(n *node, rt *libcni.RuntimeConf)
		left bool // the agent has something to finish
	}{
		{name: "namespace gone", make: func(n *node, _ *libcni.RuntimeConf) { n.kill("a") }},
		{name: "namespace not named", make: func(_ *node, rt *libcni.RuntimeConf) { rt.NetNS = "" }},
		{name: "agent dead", make: func(n *node, _ *libcni.RuntimeConf) { n.agent.stop(); n.agent.attached = map[string]Attachment{} }},
		{name: "agent refuses", left: true, make: func(n *node, _ *libcni.RuntimeConf) { n.agent.refuse[PathDetach] = &Error{Message: "busy"} }},
		{name: "record damaged", make: func(n *node, _ *libcni.RuntimeConf) {
			_ = os.WriteFile(recordPath(n.run, HostInterface("a", "eth0")), []byte("{"), 0o600)
		}},
		{name: "run directory lost", make: func(n *node, _ *libcni.RuntimeConf) {
			n.agent.attached = map[string]Attachment{}
			_ = os.RemoveAll(n.run)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := newNode(t)
			l := n.list("1.1.0", dualStack)
			before := n.snapshot()
			rt := n.runtime("a", n.pod("a"))
			n.mustAdd(l, rt)
			tt.make(n, rt)
			n.mustDel(l, rt)
			n.mustDel(l, rt)
			if tt.left {
				if list, _ := Attachments(n.run); len(list) != 0 {
					t.Errorf("an agent that starts now would bind %v", list)
				}
				delete(n.agent.refuse, PathDetach)
				if gone := n.reconcile(); len(gone) != 1 {
					t.Errorf("the agent's pass removed %v", gone)
				}
			}
			n.same("DEL", before)
		})
	}
}

func TestKernelDelNeverAdded(t *testing.T) {
	n := newNode(t)
	before := n.snapshot()
	n.mustDel(n.list("1.1.0", dualStack), n.runtime("never", "/nowhere"))
	n.same("DEL of nothing", before)
	if _, err := os.Stat(n.state); err == nil {
		t.Error("DEL of nothing made a state directory")
	}
}

// TestKernelReadOnlyState covers a state directory that refuses writes: mount(2) says no
// where root would ignore file modes.
func TestKernelReadOnlyState(t *testing.T) {
	n := newNode(t)
	l := n.list("1.1.0", dualStack)
	before := n.snapshot()
	rt := n.runtime("a", n.pod("a"))
	n.mustAdd(l, rt)
	if out, err := exec.Command("mount", "--bind", "-o", "ro", n.state, n.state).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v: %s", err, out)
	}
	err := n.cni.DelNetworkList(context.Background(), l, rt)
	if out, err := exec.Command("umount", n.state).CombinedOutput(); err != nil {
		t.Fatalf("umount: %v: %s", err, out)
	}
	if code(err) != 5 || !strings.Contains(err.Error(), "read-only") {
		t.Errorf("DEL: got %v (code %d), want code 5", err, code(err))
	}
	n.mustDel(l, rt)
	n.same("DEL after a refused one", before)
}

func TestKernelDuplicateAdd(t *testing.T) {
	n := newNode(t)
	l := n.list("1.1.0", dualStack)
	rt := n.runtime("a", n.pod("a"))
	n.mustAdd(l, rt)
	before := n.snapshot()
	if _, err := n.add(l, rt); code(err) != 4 {
		t.Errorf("second ADD: got %v (code %d), want code 4", err, code(err))
	}
	n.same("a second ADD", before)
	if err := n.cni.CheckNetworkList(t.Context(), l, rt); err != nil {
		t.Errorf("CHECK after a second ADD: %v", err)
	}
	n.mustDel(l, rt)
	// Another interface of the container's name in the pod: nothing of it is touched.
	taken := n.runtime("b", n.pod("a2"))
	n.mustAdd(l, taken)
	other := n.runtime("c", taken.NetNS)
	before = n.snapshot()
	if _, err := n.add(l, other); code(err) != 4 {
		t.Errorf("taken name: got %v (code %d), want code 4", err, code(err))
	}
	n.same("a taken name", before)
	n.mustDel(l, taken)
}
