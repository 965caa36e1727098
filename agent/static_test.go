package agent

import (
	"log/slog"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nftcni/nftcni/cni"
	"github.com/nftcni/nftcni/policy"
)

// staticUID is the name of a static pod: the MD5 of its file.
const staticUID = "4f1c2e0d9b8a7f6e5d4c3b2a19087f6e"

var dns = policy.Name{Namespace: "kube-system", Name: "dns-n1"}

func staticAttachment(hostIf string, addrs ...string) cni.Attachment {
	return attachmentOf(dns.Namespace, dns.Name, staticUID, hostIf, addrs...)
}

// systemCluster has a policy of the directions for the pods of kube-system with the label,
// a pod in shop that may be a peer, and whatever else.
func systemCluster(applies [2]bool, more ...policy.Pod) *policy.Cluster {
	p := denyAll("kube-system")
	p.Applies, p.Subject.Pods = applies, policy.Selector{Requirements: []policy.Requirement{{Key: "app", Op: policy.In, Values: []string{"dns"}}}}
	return &policy.Cluster{
		Namespaces: []policy.Namespace{{Name: "kube-system", Labels: labels("kubernetes.io/metadata.name", "kube-system")}, {Name: "shop"}},
		Pods:       append([]policy.Pod{{Name: web, UID: "u1", Node: "n2", Addrs: []netip.Addr{addr("10.9.0.1")}}}, more...),
		Policies:   []policy.Policy{p},
	}
}

// open says in which directions the pod at 10.0.0.1 can speak with the one in shop, by the
// tables and by the evaluator.
func openTo(t *testing.T, l *loop, table *memoryTable) (open [2]bool) {
	t.Helper()
	var c *policy.Cluster
	_ = l.do(t.Context(), func() { c = l.inv.cluster() })
	pod, peer := addr("10.0.0.1"), addr("10.9.0.1")
	for dir, set := range map[policy.Direction]policy.Map{policy.Ingress: policy.IsolatedIngress, policy.Egress: policy.IsolatedEgress} {
		_, isolated := table.tables[policy.Key{Map: set, Addr: pod}]
		open[dir] = !isolated
		f := policy.Flow{Src: pod, Dst: peer, Protocol: policy.TCP, Port: 53}
		if dir == policy.Ingress {
			f.Src, f.Dst = peer, pod
		}
		if v := policy.Evaluate(c, "n1", f); v.Allowed != open[dir] {
			t.Errorf("direction %d: open in the tables %v, evaluated %v (%+v)", dir, open[dir], v.Allowed, v)
		}
	}
	return open
}

// TestStaticPodWithoutAPIServer starts a static pod by the last known objects.
func TestStaticPodWithoutAPIServer(t *testing.T) {
	both, ingress, none := [2]bool{true, true}, [2]bool{}, [2]bool{}
	ingress[policy.Ingress] = true
	mirror := func(app string) policy.Pod {
		return policy.Pod{Name: dns, UID: staticUID, Node: "n1", Labels: labels("app", app)}
	}
	for _, tt := range []struct {
		name          string
		known         *policy.Cluster
		before, after [2]bool // open, before and after the mirror app=dns or app=other is listed
		mirror        string
	}{
		{name: "a policy that may select it, and does", known: systemCluster(both), before: [2]bool{false, false}, mirror: "dns", after: [2]bool{false, false}},
		{name: "a policy that may select it, and does not", known: systemCluster(both), before: [2]bool{false, false}, mirror: "other", after: [2]bool{true, true}},
		{name: "a policy of one direction", known: systemCluster(ingress), before: [2]bool{policy.Egress: true}, mirror: "other", after: [2]bool{true, true}},
		{name: "a policy of no direction", known: systemCluster(none), before: [2]bool{true, true}, mirror: "dns", after: [2]bool{true, true}},
		{name: "policies of other namespaces only", known: shopCluster, before: [2]bool{true, true}, mirror: "dns", after: [2]bool{true, true}},
		{name: "the mirror is known from before", known: systemCluster(both, mirror("other")), before: [2]bool{true, true}, mirror: "dns", after: [2]bool{false, false}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				table, dir := newMemoryTable(), t.TempDir()
				if err := lastKnownOf(tt.known).save(dir); err != nil {
					t.Fatal(err)
				}
				l, ctx := startLoop(t, table, func(l *loop) {
					l.waitForPods, l.inv.unlabelled.mirrors, l.cfg.StateDir = true, true, dir
				})
				go func() { _ = keepLastKnown(ctx, l, slog.New(slog.DiscardHandler)) }()
				began := time.Now()
				if _, err := l.attach(ctx, staticAttachment("nft000000000001", "10.0.0.1")); err != nil {
					t.Fatalf("attach: %v", err)
				}
				if time.Since(began) != sourcePatience {
					t.Errorf("attach took %v, want %v, the source's patience", time.Since(began), sourcePatience)
				}
				if err := l.bound(ctx, staticAttachment("nft000000000001", "10.0.0.1")); err != nil {
					t.Errorf("bound: %v", err)
				}
				if got := openTo(t, l, table); got != tt.before || len(table.bindings) != 1 {
					t.Errorf("without labels: open %v, want %v; bindings %v", got, tt.before, table.bindings)
				}
				// The API server is back: first without the mirror, then with it.
				back := *tt.known
				back.Pods = nil
				_ = l.send(ctx, l.replace(&back, nil))
				synctest.Wait()
				if got := openTo(t, l, table); got != tt.before && tt.known.Pods[len(tt.known.Pods)-1].Name != dns {
					t.Errorf("without a mirror: open %v, want %v", got, tt.before)
				}
				m := mirror(tt.mirror)
				_ = l.send(ctx, l.apply([]policy.Event{{Pod: &m}}, nil))
				synctest.Wait()
				if got := openTo(t, l, table); got != tt.after {
					t.Errorf("as %s: open %v, want %v", tt.mirror, got, tt.after)
				}
				_ = l.send(ctx, l.apply([]policy.Event{{Delete: true, Pod: &m}}, nil))
				synctest.Wait()
				if got := openTo(t, l, table); got != tt.after {
					t.Errorf("after the mirror went: open %v, want %v: the labels are known", got, tt.after)
				}
				if err := l.detach(ctx, detachOf("nft000000000001")); err != nil {
					t.Error(err)
				}
				synctest.Wait()
				if len(table.bindings) != 0 || len(l.inv.unlabelled.pods)+len(l.inv.unlabelled.told) != 0 {
					t.Errorf("after DEL: bindings %v, unlabelled %+v", table.bindings, l.inv.unlabelled)
				}
			})
		})
	}
}

func detachOf(hostIf string) cni.DetachRequest {
	return cni.DetachRequest{ContainerID: "c-" + hostIf, Interface: "eth0", HostInterface: hostIf}
}

// TestStaticPodFollowsPolicies changes the policies of the namespace while the labels are unknown.
func TestStaticPodFollowsPolicies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table := newMemoryTable()
		l, ctx := startLoop(t, table, func(l *loop) { l.waitForPods, l.inv.unlabelled.mirrors = true, true })
		c := systemCluster([2]bool{})
		selecting := c.Policies[0]
		selecting.Applies = [2]bool{true, true}
		c.Policies = nil
		_ = l.send(ctx, l.replace(c, nil))
		began := time.Now()
		if _, err := l.attach(ctx, staticAttachment("nft000000000001", "10.0.0.1")); err != nil || time.Since(began) != 10*time.Second {
			t.Fatalf("attach without a mirror: %v after %v, want success after podWait", err, time.Since(began))
		}
		for _, step := range []struct {
			name string
			e    policy.Event
			want [2]bool
		}{
			{"nothing", policy.Event{Namespace: &c.Namespaces[0]}, [2]bool{true, true}},
			{"a policy", policy.Event{Policy: &selecting}, [2]bool{false, false}},
			{"no policy", policy.Event{Delete: true, Policy: &selecting}, [2]bool{true, true}},
		} {
			_ = l.send(ctx, l.apply([]policy.Event{step.e}, nil))
			synctest.Wait()
			if got := openTo(t, l, table); got != step.want {
				t.Errorf("%s: open %v, want %v", step.name, got, step.want)
			}
		}
	})
}

func TestIsStatic(t *testing.T) {
	for _, tt := range []struct {
		name, uid string
		want      bool
	}{
		{"MD5", staticUID, true},
		{"UUID", "4f1c2e0d-9b8a-4f6e-9d4c-3b2a19087f6e", false},
		{"none", "", false},
		{"capitals", "4F1C2E0D9B8A7F6E5D4C3B2A19087F6E", false},
	} {
		if got := isStatic(attachmentOf("kube-system", "dns", tt.uid, "nft000000000001")); got != tt.want {
			t.Errorf("%s: isStatic(%q) = %v, want %v", tt.name, tt.uid, got, tt.want)
		}
	}
}
