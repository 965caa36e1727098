package nft_test

import (
	"context"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/nft/nfttest"
	"github.com/nftcni/nftcni/policy"
)

func deny(open ...nft.ProtocolPort) *nft.PodToHost { return &nft.PodToHost{Deny: true, Open: open} }

// TestKernelPodToHost: a closed node answers its pods on open ports only, and nothing else changes.
func TestKernelPodToHost(t *testing.T) {
	needNft(t)
	w := newWorld(t)
	nodes := []string{"198.51.100.1", "2001:db8:1::1"}
	for _, node := range nodes {
		for _, port := range []uint16{53, 22, 10250} {
			w.EchoTCP(addr(node), port)
			w.EchoUDP(addr(node), port)
		}
	}
	dns, kubelet := []nft.ProtocolPort{{Protocol: policy.TCP, Port: 53}, {Protocol: policy.UDP, Port: 53}}, nft.ProtocolPort{Protocol: policy.TCP, Port: 10250}
	live := w.client.Connect(at(nodes[0], 22))
	for _, step := range []struct {
		name         string
		want         *nft.PodToHost
		ssh, kubelet bool
	}{
		{"at first", nil, true, true}, {"deny", deny(dns...), false, false}, {"deny but the kubelet", deny(append(dns, kubelet)...), false, true},
		{"deny again", deny(dns...), false, false}, {"allow", &nft.PodToHost{}, true, true},
	} {
		apply(t, w.table, nft.Change{PodToHost: step.want})
		if step.name != "allow" { // what was lost meanwhile comes again when TCP likes, after a minute perhaps
			want(t, step.name+": a live connection", nfttest.Answers(live), step.ssh)
		}
		for _, node := range nodes {
			for _, c := range []struct {
				what string
				got  bool
				want bool
			}{
				{"dns by udp", w.client.UDP(at(node, 53)), true}, {"dns by tcp", w.client.TCP(at(node, 53)), true},
				{"ssh", w.client.TCP(at(node, 22)), step.ssh}, {"udp 22", w.client.UDP(at(node, 22)), step.ssh},
				{"the kubelet", w.client.TCP(at(node, 10250)), step.kubelet}, {"udp 10250", w.client.UDP(at(node, 10250)), step.ssh},
				{"ping", w.client.Ping(addr(node)), step.ssh},
				{"ssh from outside", w.outside.TCP(at(node, 22)), true},
			} {
				want(t, step.name+": "+c.what+" "+node, c.got, c.want)
			}
		}
		for _, pod := range w.server.Addrs {
			want(t, step.name+": the node's probe", w.Host.TCP(at(pod.String(), 81)), true)
			want(t, step.name+": the node's ping", w.Host.Ping(pod), true)
			want(t, step.name+": pod to pod", w.client.TCP(at(pod.String(), 80)), true)
		}
	}
}

// sendFrame sends an IPv4 packet that the host's own routes would keep to itself.
func sendFrame(from *nfttest.Host, to net.HardwareAddr, packet []byte) error {
	return from.Do(func() error {
		eth0, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		const network = unix.ETH_P_IP>>8 | unix.ETH_P_IP<<8&0xff00
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM, network)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		sa := &unix.SockaddrLinklayer{Protocol: network, Ifindex: eth0.Index, Halen: 6}
		copy(sa.Addr[:], to)
		return unix.Sendto(fd, packet, 0, sa)
	})
}

// TestKernelLoopbackIsTheNodes: with route_localnet on its interface, which host ports need, a pod still does not reach
// the node's loopback.
func TestKernelLoopbackIsTheNodes(t *testing.T) {
	needNft(t)
	w := newWorld(t)
	nfttest.Sysctl(t, "net/ipv4/conf/"+w.client.Interface+"/route_localnet", "1")
	sink := w.Host.Sink(addr("127.0.0.1"), 7000)
	near, err := net.InterfaceByName(w.client.Interface)
	if err != nil {
		t.Fatal(err)
	}
	send := func() {
		t.Helper()
		if err := sendFrame(w.client, near.HardwareAddr, ipv4("10.9.0.2", "127.0.0.1", unix.IPPROTO_UDP, udp(1, 7000))); err != nil {
			t.Fatal(err)
		}
	}
	send()
	eventually(t, "the drop is counted", func() bool { return count(t, "the node's loopback") == 1 })
	runNft(t, "flush", "chain", "inet", "nftcni", "pod_input")
	send()
	eventually(t, "without the chain it arrives", func() bool { return sink.Received.Load() == 1 })
}

// TestKernelPodToHostIsState: it is read back, adopted without a write, mended and refused when it is nonsense.
func TestKernelPodToHostIsState(t *testing.T) {
	needNft(t)
	namespace(t)
	table := open(t, nft.Options{})
	to := deny(nft.ProtocolPort{Protocol: policy.UDP, Port: 53}, nft.ProtocolPort{Protocol: policy.TCP, Port: 53})
	apply(t, table, nft.Change{PodToHost: to})
	before := state(t, table)
	if !before.PodToHost.Equal(*to) {
		t.Errorf("read back %+v, want %+v", before.PodToHost, to)
	}
	if again := apply(t, table, nft.Change{PodToHost: to}); again.Transactions != 0 {
		t.Errorf("the same again took %d transactions", again.Transactions)
	}
	_ = table.Close()
	adopted := open(t, nft.Options{})
	if s := state(t, adopted); s.Generation != before.Generation {
		t.Errorf("adopting wrote: generation %d to %d", before.Generation, s.Generation)
	}
	_ = adopted.Close()
	runNft(t, "flush", "chain", "inet", "nftcni", "pod_input")
	mended := open(t, nft.Options{})
	if s := state(t, mended); !s.PodToHost.Equal(*to) {
		t.Errorf("after a mended chain %+v, want %+v", s.PodToHost, to)
	}
	apply(t, mended, nft.Change{PodToHost: &nft.PodToHost{}})
	if s := nftList(t); strings.Contains(s, ". 53") {
		t.Errorf("something is left:\n%s", s)
	}
	bad := deny(nft.ProtocolPort{Protocol: policy.ICMP, Port: 1})
	if _, err := mended.Apply(context.Background(), nft.Change{PodToHost: bad}); err == nil || !strings.Contains(err.Error(), "want tcp, udp or sctp") {
		t.Errorf("ICMP has no ports: %v", err)
	}
}

// TestKernelPodToHostFlips closes and opens the node, and changes its ports, while pods ask its DNS: no question is lost.
func TestKernelPodToHostFlips(t *testing.T) {
	w := newWorld(t)
	dns, more := nft.ProtocolPort{Protocol: policy.UDP, Port: 53}, nft.ProtocolPort{Protocol: policy.TCP, Port: 10250}
	stop := make(chan struct{})
	var tasks sync.WaitGroup
	sinks, sent := map[string]*nfttest.Sink{}, map[string]*int64{}
	for _, node := range []string{"198.51.100.1", "2001:db8:1::1"} {
		n := new(int64)
		sinks[node], sent[node] = w.Host.Sink(addr(node), 53), n
		tasks.Go(func() { *n, _ = w.client.Flood(at(node, 53), 2000, stop) })
	}
	flips := 0
	for began := time.Now(); time.Since(began) < 3*time.Second; flips++ {
		c := nft.Change{PodToHost: &nft.PodToHost{}}
		switch flips % 3 {
		case 0:
			c.PodToHost = deny(dns)
		case 1:
			c.PodToHost = deny(more, dns)
		}
		apply(t, w.table, c)
	}
	close(stop)
	tasks.Wait()
	for node, sink := range sinks {
		if n := sink.Total(); n != *sent[node] || n == 0 {
			t.Errorf("%s: %d of %d questions arrived", node, n, *sent[node])
		}
	}
	t.Logf("%d changes, %d and %d questions", flips, *sent["198.51.100.1"], *sent["2001:db8:1::1"])
}
