package main

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/policy"
)

// TestKernelScenarios sends every flow of every scenario as real packets: the real
// agent on the scenario's manifests, its pods attached by the real plugin with the addresses
// that the scenario gives them, every other address on a host outside.
func TestKernelScenarios(t *testing.T) {
	for _, s := range loadScenarios(t) {
		t.Run(s.name, func(t *testing.T) {
			inFreshNode(t, func(t *testing.T) { s.testPackets(t) })
		})
	}
}

func (s *scenario) testPackets(t *testing.T) {
	questions := s.questions(t)
	if !kernelHasSCTP() {
		n := len(questions)
		questions = slices.DeleteFunc(questions, func(q question) bool { return q.Protocol == policy.SCTP })
		if len(questions) < n {
			t.Logf("this kernel has no SCTP sockets: %d flows of it are not sent", n-len(questions))
		}
	}
	local := s.localPods()
	node, err := newDemoNode(scenarioNode, s.outside(questions, local))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.writeTo(node.manifests); err != nil {
		t.Fatal(err)
	}
	if err := node.startAgent(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := node.close(); err != nil {
			t.Error(err)
		}
	})
	ends := endsByAddr(node)
	for _, p := range local {
		network, err := networkWith(node, p.Addrs)
		if err != nil {
			t.Fatal(err)
		}
		e, err := node.attach(t.Context(), network, p.Namespace, p.Name.Name)
		if err != nil {
			t.Fatal(err)
		}
		if len(e.addrs) != len(p.Addrs) {
			t.Fatalf("attach %s: got addresses %v, want %v", p.Name, e.addrs, p.Addrs)
		}
		for _, a := range e.addrs {
			ends[a] = &endpoint{name: a.String(), netns: e.netns, addrs: []netip.Addr{a}}
		}
	}
	s.ask(t, questions, ends)
	checkWhy(t, node, questions)
	if err := node.detachAll(t.Context()); err != nil {
		t.Error(err)
	}
}

// ask serves what the questions are about, and sends them.
func (s *scenario) ask(t *testing.T, questions []question, ends map[netip.Addr]*endpoint) {
	want := make(map[*probe]question)
	var probes []*probe
	served := make(map[netip.AddrPort][]policy.Protocol)
	for _, q := range questions {
		p := &probe{src: ends[q.Src], dst: ends[q.Dst], from: q.Src, to: q.Dst, service: q.service}
		if p.src == nil || p.dst == nil {
			t.Fatalf("%s: no namespace has %s or %s", q.line, q.Src, q.Dst)
		}
		probes, want[p] = append(probes, p), q
		at := netip.AddrPortFrom(q.Dst, q.service.port)
		if slices.Contains(served[at], q.service.protocol) {
			continue
		}
		served[at] = append(served[at], q.service.protocol)
		if err := serve(t.Context(), p.dst, []service{q.service}); err != nil {
			t.Fatal(err)
		}
	}
	if err := askAll(t.Context(), probes, func(p *probe) bool { return want[p].allow }); err != nil {
		t.Fatal(err)
	}
	for _, p := range probes {
		if q := want[p]; p.answered != q.allow {
			t.Errorf("%s\n%s: packets say %s", q.line, p, verdict(p.answered))
		}
	}
}

// localPods are those that a runtime would have attached to this node.
func (s *scenario) localPods() []policy.Pod {
	return slices.DeleteFunc(slices.Clone(s.cluster.Pods), func(p policy.Pod) bool {
		return p.Node != scenarioNode || p.HostNetwork || p.Finished
	})
}

// outside is every address of the questions that neither the node nor a local pod has.
func (s *scenario) outside(questions []question, local []policy.Pod) map[string][]netip.Addr {
	out := make(map[string][]netip.Addr)
	for _, q := range questions {
		for _, a := range []netip.Addr{q.Src, q.Dst} {
			isPod := slices.ContainsFunc(local, func(p policy.Pod) bool { return slices.Contains(p.Addrs, a) })
			if !isPod && !slices.Contains(addrsOf(nodePrefixes), a) {
				out[a.String()] = []netip.Addr{a}
			}
		}
	}
	return out
}

// endsByAddr gives every address of the node and of the outside host an endpoint.
func endsByAddr(n *demoNode) map[netip.Addr]*endpoint {
	ends := make(map[netip.Addr]*endpoint)
	for _, e := range n.ends {
		for _, a := range e.addrs {
			ends[a] = &endpoint{name: a.String(), netns: e.netns, addrs: []netip.Addr{a}}
		}
	}
	return ends
}

// networkWith is the node's network with ranges that hold exactly these addresses.
func networkWith(n *demoNode, addrs []netip.Addr) (*libcni.NetworkConfigList, error) {
	var ranges []string
	for _, a := range addrs {
		bits := 24
		if a.Is6() {
			bits = 64
		}
		subnet := netip.PrefixFrom(a, bits).Masked()
		ranges = append(ranges, fmt.Sprintf(`[{"subnet": %q, "rangeStart": %q, "rangeEnd": %q}]`, subnet, a, a))
	}
	return libcni.NetworkConfFromBytes(fmt.Appendf(nil, `{"cniVersion": "1.1.0", "name": "demo", "plugins": [
		{"type": "nftcni", "ipMasq": true, "stateDir": %q, "ipam": {"type": "nftcni-ipam", "ranges": [%s]}}]}`,
		n.path("state"), strings.Join(ranges, ", ")))
}

func kernelHasSCTP() bool {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)
	if err == nil {
		unix.Close(fd)
	}
	return !errors.Is(err, unix.EPROTONOSUPPORT)
}
