package main

import (
	"context"
	"testing"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
)

// TestKernelStaticPod boots a node while the API server is away: its static pods start, isolated
// where a policy of their namespace could select them, until their mirrors say what they are.
func TestKernelStaticPod(t *testing.T) { inFreshNode(t, testStaticPod) }

// The MD5 of a static pod's file, by which the kubelet names it.
const (
	dnsUID   = "0123456789abcdef0123456789abcdef"
	proxyUID = "fedcba9876543210fedcba9876543210"
)

func testStaticPod(t *testing.T) {
	n := newFirstNode(t)
	n.ownTable = false
	n.api.put("namespaces", "", "kube-system", map[string]string{"kubernetes.io/metadata.name": "kube-system"}, "", "")
	n.api.put("namespaces", "", "free", map[string]string{"kubernetes.io/metadata.name": "free"}, "", "")
	n.api.put("networkpolicies", "kube-system", "dns", nil, `{"podSelector": {"matchLabels": {"app": "dns"}}, "policyTypes": ["Ingress"]}`, "")
	if err := n.startAgent(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := n.close(); err != nil { // which writes the last known objects
		t.Fatal(err)
	}
	if err := nft.Delete(t.Context(), nft.Options{}); err != nil { // as a reboot does
		t.Fatal(err)
	}
	n.api.setDown(true)
	if err := n.startAgent(t.Context()); err != nil {
		t.Fatalf("without an API server: %v", err)
	}
	static := func(namespace, name, uid string) *endpoint {
		e, err := n.attach(t.Context(), n.network, namespace, name, [2]string{"K8S_POD_UID", uid})
		if err != nil {
			t.Fatal(err)
		}
		if err := serve(t.Context(), e, []service{{policy.TCP, 53}}); err != nil {
			t.Fatal(err)
		}
		return e
	}
	dns, proxy := static("kube-system", "dns-demo", dnsUID), static("free", "proxy-demo", proxyUID)
	world := n.ends["world"]
	if err := serve(t.Context(), world, []service{{policy.TCP, 53}}); err != nil {
		t.Fatal(err)
	}
	n.reach(t, "without an API server", true, [2]*endpoint{dns, proxy}, [2]*endpoint{world, proxy}, [2]*endpoint{n.ends["node"], dns})
	n.reach(t, "without an API server", false, [2]*endpoint{proxy, dns}, [2]*endpoint{world, dns})

	n.api.setDown(false)
	err := n.until(t.Context(), func(ctx context.Context) bool {
		var s agent.Status
		return n.demoNode.agent.Get(ctx, agent.PathStatus, &s) == nil && s.Ready && len(s.Problems) == 0
	})
	if err != nil {
		t.Fatal(err)
	}
	n.reach(t, "before there are mirrors", false, [2]*endpoint{proxy, dns})
	n.api.putMirror("kube-system", "dns-demo", dnsUID, map[string]string{"app": "other"})
	n.awaitReach(t, proxy, dns, true)
	n.api.putMirror("kube-system", "dns-demo", dnsUID, map[string]string{"app": "dns"})
	n.awaitReach(t, proxy, dns, false)
	if err := n.detachAll(t.Context()); err != nil {
		t.Error(err)
	}
	if err := n.close(); err != nil {
		t.Error(err)
	}
}

// reach asks whether the first of each pair reaches the second, over every family.
func (n *firstNode) reach(t *testing.T, when string, want bool, pairs ...[2]*endpoint) {
	t.Helper()
	var probes []*probe
	for _, p := range pairs {
		for _, a := range p[0].families(p[1]) {
			probes = append(probes, &probe{src: p[0], dst: p[1], from: a[0], to: a[1], service: service{policy.TCP, 53}})
		}
	}
	if err := askAll(t.Context(), probes, func(*probe) bool { return want }); err != nil {
		t.Fatal(err)
	}
	for _, p := range probes {
		if p.answered != want {
			t.Errorf("%s: %s: %s", when, p, verdict(p.answered))
		}
	}
}

// awaitReach asks until the answer is the wanted one.
func (n *firstNode) awaitReach(t *testing.T, src, dst *endpoint, want bool) {
	t.Helper()
	pair := src.families(dst)[0]
	err := n.until(t.Context(), func(ctx context.Context) bool {
		p := &probe{src: src, dst: dst, from: pair[0], to: pair[1], service: service{policy.TCP, 53}}
		return askAll(ctx, []*probe{p}, func(*probe) bool { return want }) == nil && p.answered == want
	})
	if err != nil {
		t.Fatalf("%s -> %s never became %s: %v", src.name, dst.name, verdict(want), err)
	}
}
