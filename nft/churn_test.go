package nft_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
)

// churnPod is a pod of the churn with what it wants of the table.
type churnPod struct {
	bindings []nft.Binding
	ports    []nft.HostPort
}

// newChurnPod draws a pod: the i-th address of each family, up to four host ports that no pod of taken has.
func newChurnPod(r *rand.Rand, i int, taken []nft.HostPort) churnPod {
	var p churnPod
	a4, a6 := podAddr(i), netip.MustParseAddr(fmt.Sprintf("fd09::%x", i+1))
	for _, a := range []netip.Addr{a4, a6} {
		p.bindings = append(p.bindings, nft.Binding{Interface: fmt.Sprintf("nft%012x", i), Addr: a, Masquerade: r.IntN(2) == 0, Comment: fmt.Sprintf("test/pod%d", i)})
	}
	hosts := []string{"0.0.0.0", "::", "192.0.2.1", "2001:db8::1", "127.0.0.1"}
	for range r.IntN(5) {
		port := hostPort([]policy.Protocol{policy.TCP, policy.UDP, policy.SCTP}[r.IntN(3)], hosts[r.IntN(len(hosts))], uint16(1+r.IntN(12)), "10.0.0.1", uint16(1+r.IntN(4)))
		to := a4
		if port.Addr.Is6() {
			to = a6
		}
		port.To = netip.AddrPortFrom(to, port.To.Port())
		if !slices.ContainsFunc(slices.Concat(taken, p.ports), port.Overlaps) {
			p.ports = append(p.ports, port)
		}
	}
	return p
}

func portsOf(pods map[int]churnPod) []nft.HostPort {
	out := []nft.HostPort{}
	for _, p := range pods {
		out = append(out, p.ports...)
	}
	return out
}

// TestKernelHostPortChurn attaches and detaches pods with host ports 500 times, some in one change, with restarts in
// between: what the kernel holds is what is attached, and in the end nothing.
func TestKernelHostPortChurn(t *testing.T) {
	namespace(t)
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 1))
	table := open(t, nft.Options{})
	pods := map[int]churnPod{}
	for step := range 500 {
		var c nft.Change
		for range 1 + r.IntN(3) {
			i := r.IntN(40)
			if p, there := pods[i]; there {
				c.Unbind = append(c.Unbind, p.bindings...)
				c.Bind = slices.DeleteFunc(c.Bind, func(b nft.Binding) bool { return b.Interface == p.bindings[0].Interface })
				delete(pods, i)
				continue
			}
			pods[i] = newChurnPod(r, i, portsOf(pods))
			c.Bind = append(c.Bind, pods[i].bindings...)
		}
		c.HostPorts = portsOf(pods)
		receipt := apply(t, table, c)
		if r.IntN(10) == 0 {
			finish(t, table, receipt)
		}
		if r.IntN(25) == 0 {
			was := state(t, table).Generation
			_ = table.Close()
			table = open(t, nft.Options{})
			if receipt = apply(t, table, nft.Change{HostPorts: portsOf(pods)}); receipt.Transactions != 0 {
				t.Errorf("seed %d step %d: a restart wrote %d transactions, generation was %d", seed, step, receipt.Transactions, was)
			}
		}
		if step%5 == 0 || step == 499 {
			sameAsChurn(t, fmt.Sprintf("seed %d step %d", seed, step), state(t, table), pods)
		}
	}
	var last nft.Change
	for _, p := range pods {
		last.Unbind = append(last.Unbind, p.bindings...)
	}
	last.HostPorts = []nft.HostPort{}
	finish(t, table, apply(t, table, last))
	reader, err := nft.NewReader(t.Context(), nft.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	sizes, err := reader.Sizes(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{"host_port", "host_port4", "host_port6", "host_port_at4", "host_port_at6", "bound4", "bound6", "local4", "masquerade6"} {
		if n, known := sizes[s]; n != 0 || !known {
			t.Errorf("seed %d: %d elements are left in %s", seed, n, s)
		}
	}
}

func sameAsChurn(t *testing.T, when string, s nft.State, pods map[int]churnPod) {
	t.Helper()
	ports, bindings := map[nft.HostPort]bool{}, map[nft.Binding]bool{}
	for _, p := range pods {
		for _, port := range p.ports {
			ports[port] = true
		}
		for _, b := range p.bindings {
			bindings[b] = true
		}
	}
	gotPorts, gotBindings := map[nft.HostPort]bool{}, map[nft.Binding]bool{}
	for _, p := range s.HostPorts {
		gotPorts[p] = true
	}
	for _, b := range s.Bindings {
		gotBindings[b] = true
	}
	if !maps.Equal(ports, gotPorts) {
		t.Fatalf("%s: host ports %v, want %v", when, s.HostPorts, slices.Collect(maps.Keys(ports)))
	}
	if !maps.Equal(bindings, gotBindings) {
		t.Fatalf("%s: bindings %v, want %v", when, s.Bindings, slices.Collect(maps.Keys(bindings)))
	}
}
