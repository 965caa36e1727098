package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/nftcni/nftcni/policy"
)

// TestKernelNetworkNone: beside another CNI the pods of this node are those that the
// source places on it, by the addresses in their status, and policy holds for them
// although no interface of theirs is known.
func TestKernelNetworkNone(t *testing.T) { inFreshNode(t, testNetworkNone) }

// foreignPod wires a pod as the reference plugin ptp does: a veth with a network of its
// own, the gateway at the host's end.
func foreignPod(name string, number int) (*endpoint, error) {
	fd, err := newNetNS()
	if err != nil {
		return nil, err
	}
	host := "veth" + name
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: host, MTU: 1500}, PeerName: "eth0", PeerNamespace: netlink.NsFd(fd)}
	if err := netlink.LinkAdd(veth); err != nil {
		return nil, fmt.Errorf("make veth of %s: %w", name, err)
	}
	prefixes := func(end int) []netip.Prefix {
		return []netip.Prefix{netip.MustParsePrefix(fmt.Sprintf("10.8.%d.%d/24", number, end)), netip.MustParsePrefix(fmt.Sprintf("fd08:%d::%d/64", number, end))}
	}
	if err := errors.Join(noDAD(host), addAddresses(host, prefixes(1))); err != nil {
		return nil, err
	}
	err = inNetNS(fd, func() error {
		return errors.Join(noDAD("eth0"), addAddresses("eth0", prefixes(2)), awaitCarrier("eth0"),
			addRoute("eth0", netip.MustParsePrefix("0.0.0.0/0"), prefixes(1)[0].Addr()),
			addRoute("eth0", netip.MustParsePrefix("::/0"), prefixes(1)[1].Addr()))
	})
	return &endpoint{name: name, netns: fd, addrs: addrsOf(prefixes(2))}, errors.Join(err, awaitCarrier(host))
}

// foreignNode has the pods web, client and stranger of another CNI.
type foreignNode struct {
	*demoNode
	pods map[string]*endpoint
}

func newForeignNode(t *testing.T) *foreignNode {
	t.Helper()
	node, err := newDemoNode("demo", outsideEnds())
	if err != nil {
		t.Fatal(err)
	}
	node.ownTable, node.settings = false, "network: none\n"
	n := &foreignNode{node, map[string]*endpoint{}}
	for i, name := range []string{"web", "client", "stranger"} {
		if n.pods[name], err = foreignPod(name, i+1); err != nil {
			t.Fatal(err)
		}
		n.write(t, name, n.pod(name, name, "Running"))
		if err := serve(t.Context(), n.pods[name], []service{{policy.TCP, 80}, {policy.UDP, 80}}); err != nil {
			t.Fatal(err)
		}
	}
	return n
}

func (n *foreignNode) pod(name, role, phase string) string {
	a := n.pods[name].addrs
	return fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: %s, namespace: shop, labels: {role: %s}}\n"+
		"spec: {nodeName: demo, containers: [{name: main, image: demo}]}\nstatus: {phase: %s, podIPs: [{ip: %q}, {ip: %q}]}\n", name, role, phase, a[0], a[1])
}

func (n *foreignNode) write(t *testing.T, name, text string) {
	t.Helper()
	if err := writeRenamed(filepath.Join(n.manifests, name+".yaml"), []byte(text)); err != nil {
		t.Fatal(err)
	}
}

// probes are all questions that check asks.
func (n *foreignNode) probes() []*probe {
	web := n.pods["web"]
	var all []*probe
	for _, src := range []*endpoint{n.pods["client"], n.pods["stranger"], web, n.ends["node"], n.ends["world"]} {
		for _, pair := range src.families(web) {
			for _, s := range []service{{policy.TCP, 80}, {policy.UDP, 80}} {
				all = append(all, &probe{src: src, dst: web, from: pair[0], to: pair[1], service: s})
			}
		}
	}
	return all
}

// check waits until exactly these reach web: the manifest has to be read first.
func (n *foreignNode) check(t *testing.T, when string, allowed ...string) {
	t.Helper()
	want := func(p *probe) bool { return slices.Contains(allowed, p.src.name) }
	var wrong []string
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); {
		probes := n.probes()
		if err := askAll(t.Context(), probes, want); err != nil {
			t.Fatal(err)
		}
		wrong = nil
		for _, p := range probes {
			if p.answered != want(p) {
				wrong = append(wrong, fmt.Sprintf("%s: %s", p, verdict(p.answered)))
			}
		}
		if len(wrong) == 0 {
			return
		}
	}
	t.Errorf("%s:\n%s", when, strings.Join(wrong, "\n"))
}

func testNetworkNone(t *testing.T) {
	n := newForeignNode(t)
	const allow = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: web, namespace: shop}\n" +
		"spec: {podSelector: {matchLabels: {role: web}}, ingress: [{from: [{podSelector: {matchLabels: {role: client}}}], ports: [{port: 80}, {port: 80, protocol: UDP}]}]}\n"
	n.write(t, "policy", allow)
	if err := n.startAgent(t.Context()); err != nil {
		t.Fatal(err)
	}
	all := []string{"client", "stranger", "web", "node", "world"}
	n.check(t, "policy", "client", "web", "node")
	n.write(t, "stranger", n.pod("stranger", "client", "Running"))
	n.check(t, "another pod with the client's label", "client", "stranger", "web", "node")
	n.write(t, "client", n.pod("client", "client", "Succeeded"))
	n.check(t, "a finished pod's address is nobody's", "stranger", "web", "node")
	n.write(t, "client", n.pod("client", "client", "Running"))
	n.write(t, "stranger", n.pod("stranger", "stranger", "Running"))
	n.check(t, "as at first", "client", "web", "node")

	before := generation(t)
	if err := n.close(); err != nil {
		t.Fatal(err)
	}
	n.check(t, "without the agent", "client", "web", "node")
	if err := n.startAgent(t.Context()); err != nil {
		t.Fatal(err)
	}
	if after := generation(t); after != before {
		t.Errorf("a restart with nothing changed: generation %d, was %d", after, before)
	}
	if err := os.Remove(filepath.Join(n.manifests, "policy.yaml")); err != nil {
		t.Fatal(err)
	}
	n.check(t, "no policy", all...)
	n.write(t, "policy", allow)
	n.check(t, "policy again", "client", "web", "node")
	if err := os.Remove(filepath.Join(n.manifests, "web.yaml")); err != nil {
		t.Fatal(err)
	}
	n.check(t, "a pod that the source does not list is not ours", all...)
	if err := n.close(); err != nil {
		t.Fatal(err)
	}
}
