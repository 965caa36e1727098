package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"testing"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/cni"
	"github.com/nftcni/nftcni/policy"
)

// proxyRules are those of kube-proxy 1.36 in nftables mode, reduced to one Service with one
// backend and one without any.
const proxyRules = `table ip kube-proxy {
	chain endpoint-5OJB2KTY-shop/redis/tcp/redis__%[1]s/6379 { meta l4proto tcp dnat to %[1]s:6379; }
	chain service-ULMVA6XW-shop/redis/tcp/redis { goto endpoint-5OJB2KTY-shop/redis/tcp/redis__%[1]s/6379; }
	chain external-ULMVA6XW-shop/redis/tcp/redis { goto service-ULMVA6XW-shop/redis/tcp/redis; }
	chain service-2MJPJ7LA-shop/empty/tcp/ { }
	map service-ips { type ipv4_addr . inet_proto . inet_service : verdict; elements = {
		10.96.0.5 . tcp . 80 : goto service-ULMVA6XW-shop/redis/tcp/redis,
		10.96.0.6 . tcp . 80 : goto service-2MJPJ7LA-shop/empty/tcp/ }; }
	map service-nodeports { type inet_proto . inet_service : verdict; elements = { tcp . 30080 : goto external-ULMVA6XW-shop/redis/tcp/redis }; }
	chain services { ip daddr . meta l4proto . th dport vmap @service-ips; fib daddr type local meta l4proto . th dport vmap @service-nodeports; }
	chain nat-prerouting { type nat hook prerouting priority dstnat; jump services; }
}`

// TestKernelWhyService asks about a Service by name, DNS name, address and node port, with
// packets through the same rules; and about a name that a DNS server knows.
func TestKernelWhyService(t *testing.T) { inFreshNode(t, testWhyService) }

func testWhyService(t *testing.T) {
	n := newRedisNode(t, false)
	n.debug(t, "why", "nodejs", "svc/shop/redis", "TCP/80").want(t, 1, "no rules of kube-proxy in nftables mode", "--kubeconfig")
	var redis4, node4 netip.Addr
	for _, a := range n.redis.addrs {
		if a.Is4() {
			redis4 = a
		}
	}
	cmd := exec.CommandContext(t.Context(), "nft", fmt.Sprintf(proxyRules, redis4))
	if out, err := cmd.CombinedOutput(); errors.Is(err, exec.ErrNotFound) {
		t.Skip("nft is not installed: this test makes kube-proxy's table")
	} else if err != nil {
		t.Fatalf("nft: %v: %s", err, out)
	}
	for _, dst := range []string{"svc/shop/redis", "redis.shop.svc", "redis.shop.svc.cluster.local", "10.96.0.5"} {
		n.debug(t, "why", "nodejs", dst, "TCP/80").want(t, 0, "ALLOWED: shop/nodejs", "shop/redis ("+redis4.String()+") TCP/6379", "is the Service shop/redis, with 1 backend")
		n.debug(t, "why", "php", dst, "TCP/80").want(t, 0, "DENIED: shop/php")
	}
	n.askAt(t, n.nodejs, netip.MustParseAddrPort("10.96.0.5:80"), true)
	n.askAt(t, n.php, netip.MustParseAddrPort("10.96.0.5:80"), false)
	n.debug(t, "why", "nodejs", "10.96.0.5", "TCP/81").want(t, 1, "service shop/redis has no port TCP/81, but TCP/80")
	n.debug(t, "why", "nodejs", "svc/shop/empty", "TCP/80").want(t, 1, "service shop/empty has no ready backend for TCP/80: kube-proxy rejects")
	n.debug(t, "why", "nodejs", "svc/shop/none", "TCP/80").want(t, 1, "have none of this name")
	n.debug(t, "why", "nodejs", "svc/none", "TCP/80").want(t, 1, "svc/NAMESPACE/NAME")

	n.awaitSnapshot(t)
	snap, err := agent.ReadSnapshotFile(cni.DefaultRunDir)
	if err != nil {
		t.Fatal(err)
	}
	for _, node := range snap.Cluster.Nodes {
		for _, a := range node.Addrs {
			if a.Is4() {
				node4 = a
			}
		}
	}
	n.debug(t, "why", "php", node4.String(), "TCP/30080").want(t, 0, "DENIED: shop/php", "is the Service shop/redis")

	serveDNS(t, "db.example.org.", redis4)
	n.debug(t, "why", "nodejs", "db.example.org", "TCP/6379").want(t, 0, "ALLOWED: shop/nodejs", "db.example.org ("+redis4.String()+")")
	n.debug(t, "why", "nodejs", "nothing.example.org", "TCP/6379").want(t, 1, "nothing.example.org", "no such host")
	if err := unix.Kill(n.agentPID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-n.agentEnd
	n.debug(t, "why", "php", "svc/shop/redis", "TCP/80").want(t, 0, "DENIED: shop/php", "the agent does not answer")
}

// askAt connects from a pod and says whether it was answered.
func (n *redisNode) askAt(t *testing.T, src *endpoint, to netip.AddrPort, allowed bool) {
	t.Helper()
	p := &probe{src: src, dst: n.redis, from: src.addrs[0], to: to.Addr(), service: service{policy.TCP, to.Port()}}
	for _, a := range src.addrs {
		if a.Is4() {
			p.from = a
		}
	}
	if err := askAll(t.Context(), []*probe{p}, func(*probe) bool { return allowed }); err != nil {
		t.Fatal(err)
	}
	if p.answered != allowed {
		t.Fatalf("%s: %s", p, verdict(p.answered))
	}
}

// serveDNS is the node's only name server, and knows one name.
func serveDNS(t *testing.T, name string, addr netip.Addr) {
	t.Helper()
	conf := t.TempDir() + "/resolv.conf"
	writeFile(t, conf, "nameserver 127.0.0.1\n")
	if err := unix.Mount(conf, "/etc/resolv.conf", "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	conn, err := net.ListenPacket("udp", "127.0.0.1:53")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	go func() {
		b := make([]byte, 1500)
		for {
			size, from, err := conn.ReadFrom(b)
			if err != nil {
				return // closed
			}
			if reply, err := answerDNS(b[:size], name, addr); err == nil {
				_, _ = conn.WriteTo(reply, from)
			}
		}
	}()
}

func answerDNS(query []byte, name string, addr netip.Addr) ([]byte, error) {
	var m dnsmessage.Message
	if err := m.Unpack(query); err != nil || len(m.Questions) != 1 {
		return nil, errors.Join(err, errors.New("no question"))
	}
	q := m.Questions[0]
	reply := dnsmessage.Message{Header: dnsmessage.Header{ID: m.ID, Response: true, RecursionAvailable: true}, Questions: m.Questions}
	switch {
	case q.Name.String() != name:
		reply.RCode = dnsmessage.RCodeNameError
	case q.Type == dnsmessage.TypeA:
		reply.Answers = []dnsmessage.Resource{{Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class, TTL: 1},
			Body: &dnsmessage.AResource{A: addr.As4()}}}
	}
	return reply.Pack()
}
