package main

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
)

// redisNode is a node with the manifests below: nodejs may reach redis on udp/6379 and
// tcp/6379, php may not.
type redisNode struct {
	*demoNode
	redis, nodejs, php *endpoint
}

const redisPolicy = `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: redis, namespace: shop}
spec:
  podSelector: {matchLabels: {service: redis}}
  ingress:
  - from: [{podSelector: {matchLabels: {service: nodejs}}}]
    ports: [{protocol: TCP, port: 6379}, {protocol: UDP, port: 6379}]
`

func newRedisNode(t *testing.T, ownTable bool) *redisNode {
	t.Helper()
	node, err := newDemoNode("demo", outsideEnds())
	if err != nil {
		t.Fatal(err)
	}
	node.ownTable = ownTable
	nodes, err := os.ReadFile("testdata/scenario/nodes.yaml")
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{"nodes.yaml": string(nodes), "policy.yaml": redisPolicy}
	for _, name := range []string{"redis", "nodejs", "php"} {
		files[name+".yaml"] = fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: %s, namespace: shop, labels: {service: %s}}\n"+
			"spec: {nodeName: demo, containers: [{name: main, image: demo}]}\n", name, name)
	}
	for name, text := range files {
		if err := writeRenamed(filepath.Join(node.manifests, name), []byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	if err := node.startAgent(t.Context()); err != nil {
		t.Fatal(err)
	}
	n := &redisNode{demoNode: node}
	for _, pod := range []struct { // in this order, so that each has the same address in every run
		name string
		end  **endpoint
	}{{"redis", &n.redis}, {"nodejs", &n.nodejs}, {"php", &n.php}} {
		if *pod.end, err = node.attach(t.Context(), node.network, "shop", pod.name); err != nil {
			t.Fatal(err)
		}
	}
	if err := serve(t.Context(), n.redis, []service{{policy.TCP, 6379}}); err != nil {
		t.Fatal(err)
	}
	return n
}

// check asks over both families whether nodejs reaches redis and php does not.
func (n *redisNode) check(t *testing.T, when string) {
	t.Helper()
	var probes []*probe
	for _, src := range []*endpoint{n.nodejs, n.php} {
		for _, pair := range src.families(n.redis) {
			probes = append(probes, &probe{src: src, dst: n.redis, from: pair[0], to: pair[1], service: service{policy.TCP, 6379}})
		}
	}
	allowed := func(p *probe) bool { return p.src == n.nodejs }
	if err := askAll(t.Context(), probes, allowed); err != nil {
		t.Fatal(err)
	}
	for _, p := range probes {
		if p.answered != allowed(p) {
			t.Errorf("%s: %s: %s", when, p, verdict(p.answered))
		}
	}
}

// TestKernelAgentRestart: whatever ends the agent, the rules stay in force; a restart
// with nothing changed writes nothing, so nf_tables' generation stays what it was.
func TestKernelAgentRestart(t *testing.T) { inFreshNode(t, testAgentRestart) }

func testAgentRestart(t *testing.T) {
	// Taking over the ownership of a table whose owner is gone is itself a commit, unless
	// systemd's descriptor store kept the owning socket.
	n := newRedisNode(t, false)
	n.check(t, "at first")
	for _, end := range []struct {
		name string
		stop func() error
	}{
		{"SIGTERM", n.close},
		{"SIGKILL", func() error {
			if err := unix.Kill(n.agentPID, unix.SIGKILL); err != nil {
				return err
			}
			<-n.agentEnd
			return nil
		}},
	} {
		before := generation(t)
		if err := end.stop(); err != nil {
			t.Fatal(err)
		}
		n.check(t, "after "+end.name)
		if err := n.startAgent(t.Context()); err != nil {
			t.Fatal(err)
		}
		if after := generation(t); after != before {
			t.Errorf("after %s and a restart with nothing changed: generation %d, was %d", end.name, after, before)
		}
		n.check(t, "restarted after "+end.name)
	}
	if err := n.close(); err != nil {
		t.Error(err)
	}
	// Without the table the forbidden flow passes: what denied it above was the table.
	if err := nft.Delete(t.Context(), nft.Options{}); err != nil {
		t.Fatal(err)
	}
	pair := n.php.families(n.redis)[0]
	p := &probe{src: n.php, dst: n.redis, from: pair[0], to: pair[1], service: service{policy.TCP, 6379}}
	if err := askAll(t.Context(), []*probe{p}, func(*probe) bool { return true }); err != nil || !p.answered {
		t.Errorf("without the table: %s: answered %v, error %v, want an answer", p, p.answered, err)
	}
}

// TestKernelRewriteInPlace truncates and rewrites a policy file in place again and
// again while a forbidden and an allowed stream run: no forbidden packet may arrive,
// and the allowed stream may not stop.
func TestKernelRewriteInPlace(t *testing.T) { inFreshNode(t, testRewriteInPlace) }

func testRewriteInPlace(t *testing.T) {
	const rewrites = 1000
	n := newRedisNode(t, true)
	sink := newStreamSink(t, n.redis, n.nodejs, n.php)
	allowed, forbidden := newStream(t, n.nodejs, sink), newStream(t, n.php, sink)
	name := filepath.Join(n.manifests, "policy.yaml")
	for i := range rewrites {
		f, err := os.OpenFile(name, os.O_WRONLY|os.O_TRUNC, 0)
		if err != nil {
			t.Fatal(err)
		}
		// Two writes, each a moment at which the file is not what it will be.
		half := len(redisPolicy)*(i%97)/97 + 1
		if _, err := f.WriteString(redisPolicy[:half]); err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteString(redisPolicy[half:]); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		allowed.awaitMore(t)
	}
	if sent, got := forbidden.end(); got > 0 || sent < rewrites {
		t.Errorf("forbidden stream: %d of %d packets arrived, want 0 of at least %d", got, sent, rewrites)
	}
	if sent, got := allowed.end(); got < sent*99/100 {
		t.Errorf("allowed stream: %d of %d packets arrived", got, sent)
	}
	n.check(t, "after the last rewrite")
	if err := n.close(); err != nil {
		t.Error(err)
	}
}

// stream sends a datagram every 200 microseconds and counts those that arrive.
type stream struct {
	from       netip.Addr
	sink       *streamSink
	conn       *net.UDPConn
	sent       atomic.Int64
	stop, done chan struct{}
}

// streamSink counts datagrams by source.
type streamSink struct {
	conn *net.UDPConn
	seen map[netip.Addr]*atomic.Int64
}

// newStreamSink listens on udp/6379 of dst, over IPv4.
func newStreamSink(t *testing.T, dst *endpoint, sources ...*endpoint) *streamSink {
	t.Helper()
	k := &streamSink{seen: make(map[netip.Addr]*atomic.Int64)}
	var at netip.Addr
	for _, src := range sources {
		pair := src.families(dst)[0]
		k.seen[pair[0]], at = new(atomic.Int64), pair[1]
	}
	err := inNetNS(dst.netns, func() (err error) {
		k.conn, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(at, 6379)))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := k.conn.SetReadBuffer(4 << 20); err != nil {
		t.Fatal(err)
	}
	go func() {
		buf := make([]byte, 64)
		for {
			_, from, err := k.conn.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			if n := k.seen[from.Addr().Unmap()]; n != nil {
				n.Add(1)
			}
		}
	}()
	t.Cleanup(func() { k.conn.Close() })
	return k
}

func newStream(t *testing.T, src *endpoint, sink *streamSink) *stream {
	t.Helper()
	s := &stream{sink: sink, stop: make(chan struct{}), done: make(chan struct{})}
	for _, a := range src.addrs {
		if sink.seen[a] != nil {
			s.from = a
		}
	}
	err := inNetNS(src.netns, func() (err error) {
		s.conn, err = net.DialUDP("udp", nil, sink.conn.LocalAddr().(*net.UDPAddr))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	go s.send()
	return s
}

func (s *stream) send() {
	defer close(s.done)
	defer s.conn.Close()
	tick := time.NewTicker(200 * time.Microsecond)
	defer tick.Stop()
	for {
		select {
		case <-s.stop:
			return
		case <-tick.C:
			if _, err := s.conn.Write([]byte("x")); err == nil {
				s.sent.Add(1)
			}
		}
	}
}

// awaitMore waits until more of the stream arrived than has so far.
func (s *stream) awaitMore(t *testing.T) {
	t.Helper()
	seen := s.sink.seen[s.from]
	before := seen.Load()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for seen.Load() == before {
		select {
		case <-tick.C:
		case <-s.done:
			t.Fatal("the stream ended")
		case <-t.Context().Done():
			t.Fatal("the allowed stream stopped")
		}
	}
}

// end stops the sender and returns what it sent and what has arrived.
func (s *stream) end() (sent, seen int64) {
	close(s.stop)
	<-s.done
	return s.sent.Load(), s.sink.seen[s.from].Load()
}

// generation asks nf_tables for its generation number (NFT_MSG_GETGEN).
func generation(t *testing.T) uint32 {
	t.Helper()
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	replies, err := c.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETGEN, Flags: netlink.Request},
		Data:   []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, 0},
	})
	if err != nil || len(replies) != 1 || len(replies[0].Data) < 4 {
		t.Fatalf("get generation: %d replies, %v", len(replies), err)
	}
	attrs, err := netlink.UnmarshalAttributes(replies[0].Data[4:])
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range attrs {
		if a.Type == unix.NFTA_GEN_ID && len(a.Data) == 4 {
			return binary.BigEndian.Uint32(a.Data)
		}
	}
	t.Fatal("no generation in the reply")
	return 0
}
