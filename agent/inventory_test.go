package agent

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nftcni/nftcni/cni"
	"github.com/nftcni/nftcni/policy"
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func attachmentOf(ns, pod, uid, hostIf string, addrs ...string) cni.Attachment {
	a := cni.Attachment{ContainerID: "c-" + hostIf, Interface: "eth0", HostInterface: hostIf, Namespace: ns, Pod: pod, UID: uid}
	for _, s := range addrs {
		a.Addresses = append(a.Addresses, addr(s))
	}
	return a
}

func labels(kv ...string) policy.Labels {
	m := map[string]string{}
	for i := 0; i < len(kv); i += 2 {
		m[kv[i]] = kv[i+1]
	}
	return policy.MakeLabels(m)
}

var web = policy.Name{Namespace: "shop", Name: "web"}

func TestInventoryJoin(t *testing.T) {
	listed := policy.Pod{Name: web, UID: "u1", Node: "n1", Labels: labels("app", "web"), Addrs: []netip.Addr{addr("10.0.0.9")}}
	hostPod := listed
	hostPod.HostNetwork = true
	other := listed
	other.Node = "n2"
	tests := []struct {
		name        string
		pod         *policy.Pod
		attachments []cni.Attachment
		want        []policy.Pod
	}{
		{name: "another node's pod passes unchanged", pod: &other, want: []policy.Pod{other}},
		{
			name: "a pod of this node that nobody attached is a peer only", pod: &listed,
			want: []policy.Pod{{Name: web, UID: "u1", Labels: listed.Labels, Addrs: listed.Addrs}},
		},
		{name: "a host network pod is left alone", pod: &hostPod, want: []policy.Pod{hostPod}},
		{
			name: "attached: the kernel's addresses replace the API's", pod: &listed,
			attachments: []cni.Attachment{attachmentOf("shop", "web", "u1", "nft000000000001", "10.0.0.1", "fd00::1")},
			want:        []policy.Pod{{Name: web, UID: "u1", Node: "n1", Labels: listed.Labels, Addrs: []netip.Addr{addr("10.0.0.1"), addr("fd00::1")}, Attached: true}},
		},
		{
			name: "two interfaces add up", pod: &listed,
			attachments: []cni.Attachment{
				attachmentOf("shop", "web", "u1", "nft000000000001", "10.0.0.1"),
				attachmentOf("shop", "web", "", "nft000000000002", "10.1.0.1"),
			},
			want: []policy.Pod{{Name: web, UID: "u1", Node: "n1", Labels: listed.Labels, Addrs: []netip.Addr{addr("10.0.0.1"), addr("10.1.0.1")}, Attached: true}},
		},
		{
			name:        "attached without any object: the labels of the CNI arguments",
			attachments: []cni.Attachment{attachmentOf("shop", "web", "u1", "nft000000000001", "10.0.0.1")},
			want:        []policy.Pod{{Name: web, UID: "u1", Node: "n1", Addrs: []netip.Addr{addr("10.0.0.1")}, Attached: true}},
		},
		{
			name: "the sandbox of an earlier pod of the same name stays a pod of its own", pod: &listed,
			attachments: []cni.Attachment{attachmentOf("shop", "web", "u0", "nft000000000003", "10.0.0.3")},
			want: []policy.Pod{
				{Name: web, UID: "u1", Node: "n1", Labels: listed.Labels},
				{Name: policy.Name{Namespace: "shop", Name: "web@nft000000000003"}, UID: "u0", Node: "n1", Addrs: []netip.Addr{addr("10.0.0.3")}, Attached: true},
			},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			v := newInventory("n1", NetworkRouted)
			if tt.pod != nil {
				v.apply(policy.Event{Pod: tt.pod})
			}
			for _, a := range tt.attachments {
				v.attach(a)
			}
			if diff := cmp.Diff(tt.want, v.cluster().Pods, cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
				cmp.Comparer(func(a, b policy.Labels) bool { return a == b })); diff != "" {
				t.Errorf("cluster().Pods differ (-want +got):\n%s", diff)
			}
		})
	}
}

// The events of any order of changes must lead the engine to what cluster() says.
func TestInventoryEventsReachCluster(t *testing.T) {
	v := newInventory("n1", NetworkRouted)
	seen := map[policy.Name]policy.Pod{}
	follow := func(events []policy.Event) {
		for _, e := range events {
			switch {
			case e.Pod != nil && e.Delete:
				delete(seen, e.Pod.Name)
			case e.Pod != nil:
				seen[e.Pod.Name] = *e.Pod
			}
		}
		want := v.cluster().Pods
		if len(want) != len(seen) {
			t.Fatalf("engine has %d pods, cluster() %d: %v / %v", len(seen), len(want), seen, want)
		}
		for _, p := range want {
			got := seen[p.Name]
			if got.Labels != p.Labels || got.Node != p.Node || got.UID != p.UID || !slices.Equal(got.Addrs, p.Addrs) {
				t.Fatalf("pod %s: engine has %+v, cluster() %+v", p.Name, got, p)
			}
		}
	}
	old := policy.Pod{Name: web, UID: "u1", Node: "n1", Labels: labels("v", "1")}
	next := policy.Pod{Name: web, UID: "u2", Node: "n1", Labels: labels("v", "2")}
	follow(v.attach(attachmentOf("shop", "web", "u1", "nft000000000001", "10.0.0.1")))
	follow(v.apply(policy.Event{Pod: &old}))
	follow(v.apply(policy.Event{Pod: &next})) // same name, new pod: the old sandbox is still there
	if p := seen[policy.Name{Namespace: "shop", Name: "web@nft000000000001"}]; p.Labels != old.Labels {
		t.Errorf("the old sandbox has labels %v, want those of its pod, %v", p.Labels, old.Labels)
	}
	follow(v.attach(attachmentOf("shop", "web", "u2", "nft000000000002", "10.0.0.2")))
	follow(v.detach("nft000000000001"))
	follow(v.apply(policy.Event{Delete: true, Pod: &next})) // deleted before DEL: the sandbox keeps its policy
	if p := seen[web]; p.Labels != next.Labels {
		t.Errorf("after the object went, the sandbox has labels %v, want %v", p.Labels, next.Labels)
	}
	follow(v.detach("nft000000000002"))
	if len(seen) != 0 {
		t.Errorf("pods left: %v", seen)
	}
}

func TestPodNetworks(t *testing.T) {
	v := newInventory("n1", NetworkRouted)
	p := netip.MustParsePrefix
	v.apply(policy.Event{Node: &policy.Node{Name: "n1", PodCIDRs: []netip.Prefix{p("10.244.1.0/24"), p("fd00:1::/64")}}})
	v.apply(policy.Event{Node: &policy.Node{Name: "n2", PodCIDRs: []netip.Prefix{p("10.244.2.0/24")}}})
	a := attachmentOf("shop", "web", "", "nft000000000001", "10.22.0.1")
	a.Pools = []netip.Prefix{p("10.22.0.1/16"), p("10.22.5.0/24")}
	v.attach(a)
	got := v.podNetworks([]netip.Prefix{p("10.244.0.0/16")})
	want := []netip.Prefix{p("10.22.0.0/16"), p("10.244.0.0/16"), p("fd00:1::/64")}
	if !slices.Equal(got, want) {
		t.Errorf("podNetworks() = %v, want %v: disjoint and sorted", got, want)
	}
}
