package main

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"

	"github.com/nftcni/nftcni/nft"
)

// TestKernelHostPortsOfPods maps ports of a node with the real agent and plugin: who reaches a pod by them, what a
// second pod that wants one hears, and that restarts, foreign hands and DEL leave what they should.
func TestKernelHostPortsOfPods(t *testing.T) { inFreshNode(t, testHostPortsOfPods) }

// portedPod attaches a pod that asks for host ports.
func (n *demoNode) portedPod(t *testing.T, pod, addrs string, mappings ...map[string]any) (*endpoint, error) {
	t.Helper()
	var ranges []string
	e := &endpoint{name: "default/" + pod}
	for _, a := range strings.Fields(addrs) {
		e.addrs = append(e.addrs, netip.MustParseAddr(a))
		ranges = append(ranges, fmt.Sprintf(`[{"subnet": %q, "rangeStart": %q, "rangeEnd": %q}]`, netip.PrefixFrom(e.addrs[len(e.addrs)-1], 24).Masked(), a, a))
	}
	l, err := libcni.NetworkConfFromBytes(fmt.Appendf(nil, `{"cniVersion": "1.1.0", "name": "demo", "plugins": [{"type": "nftcni", "ipMasq": true,
		"stateDir": %q, "capabilities": {"portMappings": true}, "ipam": {"type": "nftcni-ipam", "ranges": [%s]}}]}`, n.path("state"), strings.Join(ranges, ", ")))
	if err != nil {
		t.Fatal(err)
	}
	if e.netns, err = newNetNS(); err != nil {
		t.Fatal(err)
	}
	rt := &libcni.RuntimeConf{ContainerID: "demo-" + pod, NetNS: netnsPath(e.netns), IfName: "eth0",
		Args:           [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "default"}, {"K8S_POD_NAME", pod}},
		CapabilityArgs: map[string]any{"portMappings": mappings}}
	if _, err := n.plugin.AddNetworkList(t.Context(), l, rt); err != nil {
		return nil, err
	}
	n.attached = append(n.attached, attachedPod{l, rt})
	return e, serve(t.Context(), e, []service{{6, 80}, {17, 53}})
}

// hears is what a client is told at an address, "" when it hears nothing for as long as patience.
func (e *endpoint) hears(network, to string, patience time.Duration) string {
	answer := ""
	_ = inNetNS(e.netns, func() error {
		c, err := net.DialTimeout(network, to, patience)
		if err != nil {
			return nil
		}
		defer c.Close()
		answer = answerOf(c, patience)
		return nil
	})
	return answer
}

// answerOf is what c's server says, which a UDP server has to be asked.
func answerOf(c net.Conn, patience time.Duration) string {
	_ = c.SetDeadline(time.Now().Add(patience))
	if _, ok := c.(*net.UDPConn); ok {
		if _, err := c.Write([]byte("?")); err != nil { // that nobody was there when it asked before
			_, _ = c.Write([]byte("?"))
		}
	}
	b := make([]byte, 64)
	n, _ := c.Read(b)
	return string(b[:n])
}

// patienceFor is how long to wait for an answer: where one must come a busy machine has its time.
func patienceFor(want string) time.Duration {
	if want == "" {
		return time.Second
	}
	return 10 * time.Second
}

func (e *endpoint) mustHear(t *testing.T, when, want string, to ...string) {
	t.Helper()
	for _, a := range to {
		network, address, _ := strings.Cut(a, " ")
		if got := e.hears(network, address, patienceFor(want)); got != want {
			t.Errorf("%s: %s at %s heard %q, want %q", when, e.name, a, got, want)
		}
	}
}

func testHostPortsOfPods(t *testing.T) {
	n, err := newDemoNode("node1", map[string][]netip.Addr{"outside": addrsOf(outsidePrefixes)})
	if err != nil {
		t.Fatal(err)
	}
	if err := n.startAgent(t.Context()); err != nil {
		t.Fatal(err)
	}
	outside, node := n.ends["outside"], n.ends["node"]
	tcp, udp := map[string]any{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}, map[string]any{"hostPort": 8053, "containerPort": 53, "protocol": "udp"}
	web, err := n.portedPod(t, "web", "10.50.0.2 fd50::2", tcp, udp)
	if err != nil {
		t.Fatal(err)
	}
	other, err := n.portedPod(t, "other", "10.50.0.3 fd50::3")
	if err != nil {
		t.Fatal(err)
	}
	all := []string{"tcp 192.0.2.1:8080", "udp 192.0.2.1:8053", "tcp [2001:db8::1]:8080", "udp [2001:db8::1]:8053"}
	reached := func(when string) {
		t.Helper()
		for _, e := range []*endpoint{outside, node, other, web} {
			e.mustHear(t, when, "default/web", all...)
		}
		node.mustHear(t, when, "default/web", "tcp 127.0.0.1:8080", "udp 127.0.0.1:8053")
	}
	reached("attached")
	outside.mustHear(t, "attached", "", "tcp 192.0.2.1:80", "udp 192.0.2.1:53")

	for _, want := range []map[string]any{tcp, {"hostPort": 8080, "containerPort": 1, "hostIP": "192.0.2.1"}} {
		_, err = n.portedPod(t, "rival", "10.50.0.4 fd50::4", want)
		if err == nil || !strings.Contains(err.Error(), "default/rival") || !strings.Contains(err.Error(), "tcp") || !strings.Contains(err.Error(), "is taken by pod default/web") {
			t.Errorf("a second pod with the port: %v", err)
		}
	}
	reached("after a refused ADD")

	n.restartAgent(t)
	reached("after a restart")
	if err := nft.Delete(t.Context(), nft.Options{}); err != nil {
		t.Fatal(err)
	}
	if err := n.until(t.Context(), func(context.Context) bool { return outside.hears("tcp", "192.0.2.1:8080", time.Second) != "" }); err != nil {
		t.Fatalf("after the table was deleted: %v", err)
	}
	reached("after the table was deleted")

	n.onlyFrom(t, "192.0.2.2/32")
	outside.mustHear(t, "policy for outside", "default/web", all[:2]...)
	other.mustHear(t, "policy for outside", "", all...)
	node.mustHear(t, "policy for outside", "default/web", all...)

	if err := n.detachAll(t.Context()); err != nil {
		t.Error(err)
	}
	for _, e := range []*endpoint{outside, node} {
		e.mustHear(t, "after DEL", "", all...)
	}
	r, err := nft.NewReader(t.Context(), nft.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	sizes, err := r.Sizes(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for set, size := range sizes {
		if strings.HasPrefix(set, "host_port") && size > 0 {
			t.Errorf("%d elements are left in %s", size, set)
		}
	}
	if err := n.checkEmpty(); err != nil {
		t.Error(err)
	}
	if err := n.close(); err != nil {
		t.Error(err)
	}
}

// TestKernelHostPortsMove gives a pod's host ports to its successor while clients go on with the sockets they have.
func TestKernelHostPortsMove(t *testing.T) { inFreshNode(t, testHostPortsMove) }

// detach is the DEL of the pod that was attached last.
func (n *demoNode) detach(t *testing.T) {
	t.Helper()
	last := n.attached[len(n.attached)-1]
	n.attached = n.attached[:len(n.attached)-1]
	if err := n.plugin.DelNetworkList(t.Context(), last.network, last.runtime); err != nil {
		t.Fatal(err)
	}
}

func testHostPortsMove(t *testing.T) {
	n, err := newDemoNode("node1", map[string][]netip.Addr{"outside": addrsOf(outsidePrefixes)})
	if err != nil {
		t.Fatal(err)
	}
	if err := n.startAgent(t.Context()); err != nil {
		t.Fatal(err)
	}
	outside, udp := n.ends["outside"], map[string]any{"hostPort": 8053, "containerPort": 53, "protocol": "udp"}
	atOne := map[string]any{"hostPort": 8080, "containerPort": 80, "hostIP": "192.0.2.1"}
	sockets := map[string]net.Conn{}
	for _, to := range []string{"192.0.2.1:8053", "[2001:db8::1]:8053"} {
		if err := inNetNS(outside.netns, func() (err error) { sockets[to], err = net.Dial("udp", to); return err }); err != nil {
			t.Fatal(err)
		}
		defer sockets[to].Close()
	}
	say := func(when, want string) {
		t.Helper()
		for to, c := range sockets {
			if got := answerOf(c, patienceFor(want)); got != want {
				t.Errorf("%s: the socket to %s heard %q, want %q", when, to, got, want)
			}
		}
		outside.mustHear(t, when, want, "tcp 192.0.2.1:8080", "udp 192.0.2.1:8053", "udp [2001:db8::1]:8053")
		outside.mustHear(t, when, "", "tcp [2001:db8::1]:8080")
	}
	for _, pod := range []struct{ name, addrs string }{
		{"first", "10.50.0.2 fd50::2"}, {"second", "10.50.0.3 fd50::3"}, {"first", "10.50.0.2 fd50::2"},
	} {
		if _, err := n.portedPod(t, pod.name, pod.addrs, udp, atOne); err != nil {
			t.Fatal(err)
		}
		say("with "+pod.name, "default/"+pod.name)
		n.detach(t)
		say("without "+pod.name, "")
	}
	if err := n.close(); err != nil {
		t.Error(err)
	}
}

// restartAgent starts another agent, which must find nothing to write.
func (n *demoNode) restartAgent(t *testing.T) {
	t.Helper()
	if err := n.close(); err != nil {
		t.Fatal(err)
	}
	before, err := nft.CurrentGeneration(t.Context(), nft.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := n.startAgent(t.Context()); err != nil {
		t.Fatal(err)
	}
	after, err := nft.CurrentGeneration(t.Context(), nft.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if after != before {
		t.Errorf("a restart wrote: generation %d to %d", before, after)
	}
}

// onlyFrom lets pods of default be reached from one block only.
func (n *demoNode) onlyFrom(t *testing.T, block string) {
	t.Helper()
	policy := fmt.Appendf(nil, `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: only, namespace: default}
spec:
  podSelector: {}
  ingress:
  - from: [{ipBlock: {cidr: %s}}]
`, block)
	if _, err := n.change(t.Context(), func() error { return os.WriteFile(filepath.Join(n.manifests, "only.yaml"), policy, 0o644) }); err != nil {
		t.Fatal(err)
	}
}

// TestKernelPodToHostSetting flips the agent's setting with pods, probes and host ports in place.
func TestKernelPodToHostSetting(t *testing.T) { inFreshNode(t, testPodToHostSetting) }

func testPodToHostSetting(t *testing.T) {
	n, err := newDemoNode("node1", map[string][]netip.Addr{"outside": addrsOf(outsidePrefixes)})
	if err != nil {
		t.Fatal(err)
	}
	if err := n.startAgent(t.Context()); err != nil {
		t.Fatal(err)
	}
	outside, node := n.ends["outside"], n.ends["node"]
	if err := serve(t.Context(), node, []service{{6, 22}, {6, 10250}, {17, 53}, {6, 53}}); err != nil {
		t.Fatal(err)
	}
	web, err := n.portedPod(t, "web", "10.50.0.2 fd50::2", map[string]any{"hostPort": 8080, "containerPort": 80})
	if err != nil {
		t.Fatal(err)
	}
	other, err := n.portedPod(t, "other", "10.50.0.3 fd50::3")
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct{ settings, ssh, kubelet string }{
		{"", "node", "node"}, {"podToHost: deny\n", "", ""}, {"podToHost: deny\npodToHostPorts: [tcp/10250]\n", "", "node"}, {"podToHost: allow\n", "node", "node"},
	} {
		if n.settings = step.settings; step.settings != "" {
			if err := n.close(); err != nil {
				t.Fatal(err)
			}
			if err := n.startAgent(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		when := fmt.Sprintf("with %q", step.settings)
		for _, e := range []*endpoint{web, other} {
			e.mustHear(t, when, step.ssh, "tcp 192.0.2.1:22", "tcp [2001:db8::1]:22")
			e.mustHear(t, when, step.kubelet, "tcp 192.0.2.1:10250", "tcp [2001:db8::1]:10250")
			e.mustHear(t, when, "node", "tcp 192.0.2.1:53", "udp 192.0.2.1:53", "tcp [2001:db8::1]:53", "udp [2001:db8::1]:53")
			e.mustHear(t, when, "default/web", "tcp 192.0.2.1:8080", "tcp [2001:db8::1]:8080", "tcp 10.50.0.2:80", "tcp [fd50::2]:80")
		}
		node.mustHear(t, when, "default/web", "tcp 10.50.0.2:80", "udp 10.50.0.2:53", "tcp [fd50::2]:80", "tcp 127.0.0.1:8080")
		outside.mustHear(t, when, "node", "tcp 192.0.2.1:22", "tcp [2001:db8::1]:22")
	}
	if err := n.close(); err != nil {
		t.Error(err)
	}
}
