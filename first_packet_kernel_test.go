package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/cni"
)

// envStarts is how many pods TestKernelFirstPacket starts: 200 is the proof that
// docs/decisions/0052 records, the default a sample of it.
const envStarts = "NFTCNI_STARTS"

// The servers that every pod sends to, and who may. A starter may send to guarded only (its
// egress policy, and guarded's ingress policy), a stranger to open only.
const (
	guarded = iota
	closed
	open
	servers
)

const (
	starter = iota
	stranger
)

// Who in the pod sent a packet: the container, from its first instruction on, or a process
// that was in the namespace before the CNI call and sends on until the namespace goes.
const (
	byContainer = iota
	byHostile
)

const (
	firstPackets   = 20 // of the container, to each address of each server
	firstPort      = 7000
	backgroundRate = 7000 // packets a second
)

func mayReach(kind, server int) bool {
	return kind == starter && server == guarded || kind == stranger && server == open
}

// packet is what a datagram says of itself.
type packet struct {
	start        uint32
	kind, by, to uint8
}

func (p packet) bytes() []byte {
	return append(binary.BigEndian.AppendUint32(nil, p.start), p.kind, p.by, p.to)
}

// firstNode is the node of the proof.
type firstNode struct {
	*demoNode
	t       *testing.T
	api     *fakeAPI
	targets [servers]*endpoint
	// capabilities are what the runtime asks for every pod that starts.
	capabilities map[string]any
	// backlog is backlogDrops at first, overflown how many of the drops since explain a loss.
	backlog, overflown int

	mu        sync.Mutex
	arrived   map[packet]int // of containers, and allowed
	hostile   int            // allowed packets of the process that was there before
	forbidden map[packet]int
}

// TestKernelFirstPacket starts pods that send from their first instruction on, through the
// real agent and plugin, while addresses come back, objects change and thousands of packets
// a second flow. No packet that policy forbids arrives and none that it allows is lost.
func TestKernelFirstPacket(t *testing.T) {
	inFreshNode(t, func(t *testing.T) { testFirstPacket(t, nil) })
}

// TestKernelFirstPacketLimited is the same with pods whose bandwidth is limited, to more than they
// send: what comes from them takes the way over another device.
func TestKernelFirstPacketLimited(t *testing.T) {
	inFreshNode(t, func(t *testing.T) {
		testFirstPacket(t, map[string]any{"bandwidth": map[string]any{"ingressRate": uint64(1e9), "egressRate": uint64(1e9)}})
	})
}

func testFirstPacket(t *testing.T, capabilities map[string]any) {
	n := newFirstNode(t)
	n.capabilities = capabilities
	if err := n.startAgent(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.attachServers()
	n.tryCapabilities()
	starts := n.run()
	if len(n.forbidden) > 0 {
		t.Errorf("packets arrived that policy forbids: %v", n.forbidden)
	}
	for i := range starts {
		if lost := n.lost(uint32(i)); lost > 0 {
			n.explain(lost, fmt.Sprintf("start %d: %d of the container's allowed packets were lost", i, lost))
		}
	}
	t.Logf("%d allowed packets of earlier processes arrived", n.hostile)
	if err := n.close(); err != nil {
		t.Error(err)
	}
}

// TestKernelFirstPacketWithoutTable is the same with an agent that says yes and has no
// table: the proof must see what such a node lets through.
func TestKernelFirstPacketWithoutTable(t *testing.T) { inFreshNode(t, testFirstPacketWithoutTable) }

func testFirstPacketWithoutTable(t *testing.T) {
	n := newFirstNode(t)
	n.startStub()
	n.attachServers()
	n.run()
	if len(n.forbidden) == 0 {
		t.Error("no forbidden packet arrived although nothing forbids any: this test cannot see a leak")
	}
}

func newFirstNode(t *testing.T) *firstNode {
	t.Helper()
	node, err := newDemoNode("demo", outsideEnds())
	if err != nil {
		t.Fatal(err)
	}
	n := &firstNode{demoNode: node, t: t, backlog: backlogDrops(t), api: newFakeAPI(t), arrived: map[packet]int{}, forbidden: map[packet]int{}}
	node.source = []string{"--server", n.api.url}
	n.api.put("nodes", "", "demo", nil, `{"podCIDRs": ["10.244.0.0/28", "fd00:10:244::/124"]}`,
		`{"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}, {"type": "InternalIP", "address": "2001:db8::1"}]}`)
	n.api.put("namespaces", "", "shop", map[string]string{"kubernetes.io/metadata.name": "shop"}, "", "")
	allow := func(key, app string) string {
		return `[{"` + key + `": [{"podSelector": {"matchLabels": {"app": "` + app + `"}}}]}]`
	}
	for name, spec := range map[string]string{
		"guarded": `{"podSelector": {"matchLabels": {"app": "guarded"}}, "policyTypes": ["Ingress"], "ingress": ` + allow("from", "starter") + `}`,
		"closed":  `{"podSelector": {"matchLabels": {"app": "closed"}}, "policyTypes": ["Ingress"], "ingress": ` + allow("from", "nobody") + `}`,
		"starter": `{"podSelector": {"matchLabels": {"app": "starter"}}, "policyTypes": ["Egress"], "egress": ` + allow("to", "guarded") + `}`,
	} {
		n.api.put("networkpolicies", "shop", name, nil, spec, "")
	}
	return n
}

func (n *firstNode) putPod(name, app string) {
	n.api.put("pods", "shop", name, map[string]string{"app": app}, `{"nodeName": "demo", "containers": [{"name": "main"}]}`, `{"phase": "Running"}`)
}

// attachServers starts the servers, which count by what the datagrams say.
func (n *firstNode) attachServers() {
	n.t.Helper()
	for i, name := range []string{guarded: "guarded", closed: "closed", open: "open"} {
		n.putPod(name, name)
		e, err := n.attach(n.t.Context(), n.network, "shop", name)
		if err != nil {
			n.t.Fatal(err)
		}
		n.targets[i] = e
		for _, a := range e.addrs {
			n.serve(i, listenIn(n.t, e, netip.AddrPortFrom(a, firstPort)))
		}
	}
}

func listenIn(t *testing.T, e *endpoint, at netip.AddrPort) *net.UDPConn {
	t.Helper()
	var c *net.UDPConn
	err := inNetNS(e.netns, func() (err error) {
		c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	setReadBuffer(t, c)
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// setReadBuffer makes room for what arrives while this process does not run.
func setReadBuffer(t *testing.T, c *net.UDPConn) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) {
			if unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20) != nil {
				_ = c.SetReadBuffer(4 << 20) // in a user namespace: what the system allows
			}
		})
	}
	if err != nil {
		t.Fatal(err)
	}
}

func (n *firstNode) serve(server int, c *net.UDPConn) {
	go func() {
		buf := make([]byte, 64)
		for {
			k, _, err := c.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			p := packet{binary.BigEndian.Uint32(buf), buf[4], buf[5], buf[6]}
			n.mu.Lock()
			switch {
			case k != 7 || int(p.to) != server || !mayReach(int(p.kind), server):
				n.forbidden[p]++
			case p.by == byContainer:
				n.arrived[p]++
			default:
				n.hostile++
			}
			n.mu.Unlock()
		}
	}()
}

// run starts all pods, four at a time, under churn and background traffic.
func (n *firstNode) run() int {
	n.t.Helper()
	starts, err := strconv.Atoi(cmp.Or(os.Getenv(envStarts), "20"))
	if err != nil {
		n.t.Fatalf("%s: %v", envStarts, err)
	}
	stopTraffic := n.background()
	ctx, stop := context.WithCancel(n.t.Context())
	var churn sync.WaitGroup
	churn.Go(func() { n.churn(ctx) })
	began := time.Now()
	next := make(chan int)
	var workers sync.WaitGroup
	for range 4 {
		workers.Go(func() {
			for i := range next {
				if err := n.start(i); err != nil {
					n.t.Errorf("start %d: %v", i, err)
				}
			}
		})
	}
	for i := range starts {
		next <- i
	}
	close(next)
	workers.Wait()
	took := time.Since(began)
	stop()
	churn.Wait()
	stopTraffic(took)
	n.t.Logf("%d starts in %v", starts, took.Round(time.Millisecond))
	return starts
}

// churn changes what policies select from: peers on another node that have the labels of the
// pods here, and a policy of the same namespace.
func (n *firstNode) churn(ctx context.Context) {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for i := 0; ctx.Err() == nil; i++ {
		name := fmt.Sprintf("far-%d", i%40)
		if i%80 < 40 {
			n.api.put("pods", "shop", name, map[string]string{"app": []string{"starter", "guarded", "nobody"}[i%3]},
				`{"nodeName": "other"}`, fmt.Sprintf(`{"phase": "Running", "podIPs": [{"ip": "10.244.1.%d"}]}`, i%40+1))
		} else {
			n.api.remove("pods", "shop", name)
		}
		if i%20 == 0 {
			n.api.put("networkpolicies", "shop", "other", nil, fmt.Sprintf(
				`{"podSelector": {"matchLabels": {"app": "stranger"}}, "policyTypes": ["Ingress"], "ingress": [{"ports": [{"port": %d}]}]}`, 80+i%3), "")
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

// background sends from one pod to another, one connection that is allowed and one that is
// not. What the function returns ends it and reports.
func (n *firstNode) background() func(time.Duration) {
	n.t.Helper()
	n.putPod("talker", "starter")
	talker, err := n.attach(n.t.Context(), n.network, "shop", "talker")
	if err != nil {
		n.t.Fatal(err)
	}
	var seen, leaked atomic.Int64
	count := func(e *endpoint, into *atomic.Int64) netip.AddrPort {
		at := netip.AddrPortFrom(e.addrs[0], firstPort+1)
		c := listenIn(n.t, e, at)
		go func() {
			buf := make([]byte, 64)
			for {
				if _, _, err := c.ReadFromUDPAddrPort(buf); err != nil {
					return
				}
				into.Add(1)
			}
		}()
		return at
	}
	to, not := count(n.targets[guarded], &seen), count(n.targets[closed], &leaked)
	ctx, stop := context.WithCancel(n.t.Context())
	var sent, refused int64
	var senders sync.WaitGroup
	senders.Go(func() { sent = steady(ctx, n.t, talker, to, backgroundRate) })
	senders.Go(func() { refused = steady(ctx, n.t, talker, not, 500) })
	return func(took time.Duration) {
		n.t.Helper()
		stop()
		senders.Wait()
		n.await(func() bool { return seen.Load() == sent })
		rate := float64(sent) / took.Seconds()
		n.t.Logf("beside them %.0f allowed packets/s flowed (%d, %d lost) and %d forbidden ones (%d arrived)", rate, sent, sent-seen.Load(), refused, leaked.Load())
		n.mu.Lock()
		defer n.mu.Unlock()
		if leaked.Load() > 0 {
			n.forbidden[packet{by: byHostile, to: closed}] += int(leaked.Load())
		}
		if lost := sent - seen.Load(); lost > 0 {
			n.explain(int(lost), fmt.Sprintf("%d of %d packets of a flow that is allowed throughout were lost", lost, sent))
		}
		if os.Getenv(envStarts) != "" && rate < 5000 {
			n.t.Errorf("%.0f packets/s flowed, want 5,000: the machine is too busy for this proof", rate)
		}
	}
}

// explain reports packets that were allowed and lost, unless this machine's queues dropped as many
// before anything looked at them, which an emulated one does.
func (n *firstNode) explain(lost int, what string) {
	n.t.Helper()
	now := backlogDrops(n.t)
	if n.overflown += lost; n.overflown <= now-n.backlog {
		n.t.Logf("%s; the queues of this machine's CPUs dropped %d", what, now-n.backlog)
		return
	}
	out, err := exec.CommandContext(n.t.Context(), n.path("bin/nftcni"), "debug", "--state-dir", n.path("state"), "drops").CombinedOutput()
	n.t.Errorf("%s\n%s %v", what, out, err)
}

// backlogDrops is what the queues between veths dropped since the machine started.
func backlogDrops(t *testing.T) (drops int) {
	t.Helper()
	b, err := os.ReadFile("/proc/net/softnet_stat")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		n, err := strconv.ParseUint(strings.Fields(line)[1], 16, 64)
		if err != nil {
			t.Fatal(err)
		}
		drops += int(n)
	}
	return drops
}

// steady sends at a rate until ctx ends and returns how many packets it sent; what the
// ticker was late for it catches up with, at most 50 at a time.
func steady(ctx context.Context, t *testing.T, from *endpoint, to netip.AddrPort, rate int) (sent int64) {
	var c *net.UDPConn
	err := inNetNS(from.netns, func() (err error) {
		c, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
		return err
	})
	if err != nil {
		t.Error(err)
		return 0
	}
	defer c.Close()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for began := time.Now(); ; {
		select {
		case <-ctx.Done():
			return sent
		case <-tick.C:
		}
		due := int64(time.Since(began).Seconds() * float64(rate))
		for range min(due-sent, 50) {
			if _, err := c.Write([]byte("x")); err == nil {
				sent++
			}
		}
	}
}

// sandbox is the namespace of one start, with the sockets of both who send from it.
type sandbox struct {
	fd      int
	sockets [2][2]int // by whom, family; of the same port for every pod, so that connections come back with addresses
	runtime *libcni.RuntimeConf
}

// tryCapabilities skips where the kernel has not what they need.
func (n *firstNode) tryCapabilities() {
	n.t.Helper()
	network, err := libcni.NetworkConfFromBytes(bytes.Replace(n.networkConfig(), []byte(`"type": "nftcni"`),
		[]byte(`"type": "nftcni", "capabilities": {"bandwidth": true}`), 1))
	if err != nil {
		n.t.Fatal(err)
	}
	n.network = network
	n.putPod("pod-first", "stranger")
	s, err := newSandbox("pod-first")
	if err != nil {
		n.t.Fatal(err)
	}
	defer s.close()
	s.runtime.CapabilityArgs = n.capabilities
	_, err = n.plugin.AddNetworkList(n.t.Context(), n.network, s.runtime)
	var refused *types.Error
	if errors.As(err, &refused) && refused.Code == types.ErrUnsupportedField {
		n.t.Skip(refused.Msg)
	}
	if err := errors.Join(err, n.plugin.DelNetworkList(n.t.Context(), n.network, s.runtime)); err != nil {
		n.t.Fatal(err)
	}
}

func newSandbox(name string) (*sandbox, error) {
	fd, err := newNetNS()
	if err != nil {
		return nil, err
	}
	s := &sandbox{fd: fd, runtime: &libcni.RuntimeConf{ContainerID: "demo-shop-" + name, NetNS: netnsPath(fd), IfName: "eth0",
		Args: [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "shop"}, {"K8S_POD_NAME", name}, {"K8S_POD_UID", apiUID(name)}}}}
	return s, inNetNS(fd, func() error {
		for by := range s.sockets {
			for family, any := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
				sock, err := unix.Socket(familyOf(any), unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
				if err != nil {
					return err
				}
				if any.Is6() {
					err = unix.SetsockoptInt(sock, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
				}
				if err := errors.Join(err, unix.Bind(sock, sockaddr(netip.AddrPortFrom(any, uint16(5000+by))))); err != nil {
					return err
				}
				s.sockets[by][family] = sock
			}
		}
		return nil
	})
}

func (s *sandbox) close() {
	for _, by := range s.sockets {
		for _, fd := range by {
			_ = unix.Close(fd)
		}
	}
	_ = unix.Close(s.fd)
}

// sendAll sends one packet to each address of each server.
func (n *firstNode) sendAll(s *sandbox, start, kind, by int) error {
	var errs []error
	for to, e := range n.targets {
		for _, a := range e.addrs {
			family := 0
			if a.Is6() {
				family = 1
			}
			p := packet{uint32(start), uint8(kind), uint8(by), uint8(to)}
			errs = append(errs, unix.Sendto(s.sockets[by][family], p.bytes(), 0, sockaddr(netip.AddrPortFrom(a, firstPort))))
		}
	}
	return errors.Join(errs...)
}

// start is the life of one pod. The API server lists it before, during or some time after
// the runtime's call, and forgets it before or after DEL.
func (n *firstNode) start(i int) error {
	name, kind := fmt.Sprintf("pod-%012d", i), i%2
	s, err := newSandbox(name)
	if err != nil {
		return err
	}
	defer s.close()
	s.runtime.CapabilityArgs = n.capabilities
	stopHostile := n.sendFromBefore(s, i, kind)
	defer stopHostile()
	list := func() { n.putPod(name, []string{starter: "starter", stranger: "stranger"}[kind]) }
	switch i / 2 % 3 {
	case 0:
		list()
	case 1:
		go list()
	default:
		time.AfterFunc(200*time.Millisecond, list)
	}
	if _, err := n.plugin.AddNetworkList(n.t.Context(), n.network, s.runtime); err != nil {
		return n.withLog(err)
	}
	for range firstPackets { // the first thing that happens after ADD
		if err := n.sendAll(s, i, kind, byContainer); err != nil {
			return fmt.Errorf("send: %w", err)
		}
	}
	n.await(func() bool { return n.lost(uint32(i)) == 0 })
	if i/6%2 == 0 {
		n.api.remove("pods", "shop", name)
	}
	if err := n.plugin.DelNetworkList(n.t.Context(), n.network, s.runtime); err != nil {
		return n.withLog(err)
	}
	n.api.remove("pods", "shop", name)
	return nil
}

// sendFromBefore sends from now on, whether or not there is an interface yet or any more.
func (n *firstNode) sendFromBefore(s *sandbox, start, kind int) (stop func()) {
	ctx, cancel := context.WithCancel(n.t.Context())
	var done sync.WaitGroup
	done.Go(func() {
		tick := time.NewTicker(200 * time.Microsecond)
		defer tick.Stop()
		for ctx.Err() == nil {
			_ = n.sendAll(s, start, kind, byHostile) // no route, or no link any more
			select {
			case <-tick.C:
			case <-ctx.Done():
			}
		}
	})
	return func() { cancel(); done.Wait() }
}

// lost is how many packets of a start's container are allowed and have not arrived.
func (n *firstNode) lost(start uint32) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	p := packet{start: start, kind: uint8(start % 2), by: byContainer}
	lost := 0
	for to, e := range n.targets {
		if mayReach(int(p.kind), to) {
			p.to = uint8(to)
			lost += firstPackets*len(e.addrs) - n.arrived[p]
		}
	}
	return lost
}

// await waits, at most 5 s, for what is true at the latest when nothing is on its way any more.
func (n *firstNode) await(ok func() bool) {
	ctx, cancel := context.WithTimeout(n.t.Context(), 5*time.Second)
	defer cancel()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// startStub answers the plugin as the agent does, and does nothing.
func (n *firstNode) startStub() {
	n.t.Helper()
	ln, err := net.Listen("unix", filepath.Join(cni.DefaultRunDir, cni.SocketName))
	if err != nil {
		n.t.Fatal(err)
	}
	mux := http.NewServeMux()
	answer := func(path string, v any) {
		mux.HandleFunc(path, func(w http.ResponseWriter, _ *http.Request) { _ = json.NewEncoder(w).Encode(v) })
	}
	answer(cni.PathReady, cni.Ready{Ready: true, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/28"), netip.MustParsePrefix("fd00:10:244::/124")}})
	answer(cni.PathAttach, cni.AttachResponse{Generation: 1})
	answer(cni.PathDetach, struct{}{})
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute}
	go func() { _ = srv.Serve(ln) }()
	n.t.Cleanup(func() { _ = srv.Close() })
}
