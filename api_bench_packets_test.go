package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/cni"
)

const (
	benchNode = "bench"
	benchPort = 9
	// probesBefore are sent before a change, one a millisecond: the grace period of the
	// change before is over then, as it is when changes come one at a time.
	probesBefore = 150
)

// The two real pods, and the one peer that policies name by its own label. Peers send
// from 10.9.0.0/16, all of which the sender's namespace has.
var (
	webAddr   = netip.MustParseAddr("10.8.1.2")
	bareAddr  = netip.MustParseAddr("10.8.1.3")
	extraAddr = netip.MustParseAddr("10.9.255.1")
)

// A datagramFlow is one datagram a millisecond, each from a new port, until it is stopped.
type datagramFlow struct {
	id       uint32
	from, to netip.Addr
	until1st bool // stop when the first one has arrived

	mu   sync.Mutex
	sent []time.Time
	got  []time.Time // by the same index; zero: not yet
	last int         // index of the last that arrived, -1: none
}

// apiBench is one cluster with its agent and its two real pods.
type apiBench struct {
	b                          *testing.B
	api                        *apiClient
	dir                        string
	pods, policies, namespaces int
	local                      int // pods on the agent's node
	process                    *benchAgent
	sources                    int

	mu    sync.Mutex
	flows map[uint32]*datagramFlow
	next  uint32
}

func newAPIBench(b *testing.B, dir string, pods, policies int) *apiBench {
	b.Helper()
	n := &apiBench{b: b, dir: dir, pods: pods, policies: policies, namespaces: max(1, policies/policiesPerNamespace), flows: map[uint32]*datagramFlow{}}
	n.api = newAPIClient(b, filepath.Join(dir, "kubeconfig"))
	n.api.await()
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0); err != nil {
		b.Fatal(err)
	}
	ends := map[string]*endpoint{}
	for i, name := range []string{"real", "send"} {
		if old, err := netlink.LinkByName("veth" + name); err == nil { // of the scale before
			if err := netlink.LinkDel(old); err != nil {
				b.Fatal(err)
			}
		}
		var err error
		if ends[name], err = foreignPod(name, i+1); err != nil {
			b.Fatal(err)
		}
	}
	real, send := ends["real"], ends["send"]
	err := errors.Join(
		inNetNS(real.netns, func() error { return addAddresses("eth0", []netip.Prefix{netip.PrefixFrom(bareAddr, 24)}) }),
		addRoute("vethsend", netip.MustParsePrefix("10.9.0.0/16"), send.addrs[0]),
		inNetNS(send.netns, func() error {
			lo, err := netlink.LinkByName("lo")
			if err != nil {
				return err
			}
			all := &net.IPNet{IP: net.IPv4(10, 9, 0, 0).To4(), Mask: net.CIDRMask(16, 32)}
			return netlink.RouteAdd(&netlink.Route{LinkIndex: lo.Attrs().Index, Dst: all, Type: unix.RTN_LOCAL, Scope: unix.RT_SCOPE_HOST, Table: unix.RT_TABLE_LOCAL})
		}))
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.Context())
	b.Cleanup(cancel)
	n.receive(ctx, real)
	go func() {
		if err := inNetNS(send.netns, func() error { return n.send(ctx) }); err != nil {
			b.Error(err)
		}
	}()
	return n
}

// receive notes what arrives at the real pods.
func (n *apiBench) receive(ctx context.Context, real *endpoint) {
	err := inNetNS(real.netns, func() error {
		c, err := net.ListenUDP("udp4", &net.UDPAddr{Port: benchPort})
		if err != nil {
			return err
		}
		context.AfterFunc(ctx, func() { c.Close() })
		go func() {
			buf := make([]byte, 64)
			for {
				k, _, err := c.ReadFromUDPAddrPort(buf)
				if err != nil {
					return
				}
				at := time.Now()
				n.mu.Lock()
				f := n.flows[binary.BigEndian.Uint32(buf)]
				n.mu.Unlock()
				if k == 8 && f != nil {
					f.mu.Lock()
					f.last = int(binary.BigEndian.Uint32(buf[4:]))
					f.got[f.last] = at
					f.mu.Unlock()
				}
			}
		}()
		return nil
	})
	if err != nil {
		n.b.Fatal(err)
	}
}

// send runs in the sender's namespace until ctx ends.
func (n *apiBench) send(ctx context.Context) error {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		n.mu.Lock()
		var active []*datagramFlow
		for _, f := range n.flows {
			active = append(active, f)
		}
		n.mu.Unlock()
		for _, f := range active {
			if err := f.send(); err != nil {
				return err
			}
		}
	}
}

func (f *datagramFlow) send() error {
	f.mu.Lock()
	if f.until1st && f.last >= 0 {
		f.mu.Unlock()
		return nil
	}
	seq := len(f.sent)
	f.sent, f.got = append(f.sent, time.Now()), append(f.got, time.Time{})
	f.mu.Unlock()
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("probe socket: %w", err)
	}
	defer unix.Close(s)
	if err := unix.Bind(s, &unix.SockaddrInet4{Addr: f.from.As4()}); err != nil {
		return fmt.Errorf("bind probe to %s: %w", f.from, err)
	}
	payload := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, f.id), uint32(seq))
	if err := unix.Sendto(s, payload, 0, &unix.SockaddrInet4{Port: benchPort, Addr: f.to.As4()}); err != nil && !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("send probe: %w", err)
	}
	return nil
}

func (n *apiBench) start(from, to netip.Addr, until1st bool) *datagramFlow {
	f := &datagramFlow{from: from, to: to, until1st: until1st, last: -1}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.next++
	f.id = n.next
	n.flows[f.id] = f
	return f
}

func (n *apiBench) stop(f *datagramFlow) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.flows, f.id)
}

// until polls, at most 10 s.
func (n *apiBench) until(what string, ok func() bool) {
	n.b.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for range 10000 {
		if ok() {
			return
		}
		<-tick.C
	}
	n.b.Fatalf("%s: not after 10 s", what)
}

func (f *datagramFlow) state() (sent, last int, lastAt time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.last >= 0 {
		lastAt = f.got[f.last]
	}
	return len(f.sent), f.last, lastAt
}

// opened is the time from just before change to the first datagram that arrives, and
// the part of it that the API call took.
func (n *apiBench) opened(f *datagramFlow, change func()) (total, api time.Duration) {
	n.b.Helper()
	n.until("probes before the change", func() bool { sent, _, _ := f.state(); return sent >= probesBefore })
	if _, last, _ := f.state(); last >= 0 {
		n.b.Fatalf("%s to %s is open before the change", f.from, f.to)
	}
	began := time.Now()
	change()
	api = time.Since(began)
	n.until(fmt.Sprintf("%s to %s open", f.from, f.to), func() bool { _, last, _ := f.state(); return last >= 0 })
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, at := range f.got {
		if !at.IsZero() {
			return at.Sub(began), api
		}
	}
	return 0, api
}

// shut is the time from just before change to the first datagram that does not arrive.
func (n *apiBench) shut(f *datagramFlow, change func()) (total, api time.Duration) {
	n.b.Helper()
	earlier, _, _ := f.state()
	n.until("probes before the change", func() bool {
		sent, last, _ := f.state()
		return sent >= earlier+probesBefore && last >= earlier+probesBefore/2
	})
	before, _, _ := f.state()
	began := time.Now()
	change()
	api = time.Since(began)
	n.until(fmt.Sprintf("%s to %s shut", f.from, f.to), func() bool {
		sent, last, at := f.state()
		return sent > before+50 && sent-last > 50 && time.Since(at) > 100*time.Millisecond
	})
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := before; i < f.last; i++ {
		if f.got[i].IsZero() {
			n.b.Errorf("%s to %s: datagram %d was lost before the last one that passed (%d)", f.from, f.to, i, f.last)
		}
	}
	return f.sent[f.last+1].Sub(began), api
}

func (n *apiBench) source() netip.Addr {
	n.sources++
	return netip.AddrFrom4([4]byte{10, 9, byte(n.sources >> 8), byte(n.sources)})
}

// peer is a pod on another node.
func (n *apiBench) peer(a netip.Addr, role string) *corev1.Pod {
	name := "peer-" + strings.ReplaceAll(a.String(), ".", "-")
	return newBenchPod(benchNamespace(0), name, "other-1", map[string]string{"role": role}, a)
}

func probePolicy(name, subject string, roles ...string) *networkingv1.NetworkPolicy {
	p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: benchNamespace(0), Name: name}}
	p.Spec.PodSelector = *selectBy("probe", subject)
	p.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}
	udp, port := corev1.ProtocolUDP, intstr.FromInt32(benchPort)
	for _, role := range roles {
		p.Spec.Ingress = append(p.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{
			From: []networkingv1.NetworkPolicyPeer{{PodSelector: selectBy("role", role)}}, Ports: []networkingv1.NetworkPolicyPort{{Protocol: &udp, Port: &port}}})
	}
	return p
}

// benchAgent is the product's process.
type benchAgent struct {
	cmd   *exec.Cmd
	began time.Time
	ready time.Duration
}

func startBenchAgent(b *testing.B, binary string, args ...string) *benchAgent {
	b.Helper()
	p := &benchAgent{began: time.Now(), cmd: exec.Command(binary, append([]string{"agent"}, args...)...)}
	p.cmd.Stderr = os.Stderr
	if err := p.cmd.Start(); err != nil {
		b.Fatal(err)
	}
	return p
}

// await waits until the agent serves.
func (p *benchAgent) await(b *testing.B, run string) {
	b.Helper()
	client := agent.NewClient(filepath.Join(run, cni.SocketName))
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for range 12000 {
		var s agent.Status
		if client.Get(b.Context(), agent.PathStatus, &s) == nil && s.Ready {
			p.ready = time.Since(p.began)
			return
		}
		<-tick.C
	}
	_ = p.cmd.Process.Kill()
	b.Fatal("the agent is not ready after a minute")
}

func (p *benchAgent) stop() error {
	return errors.Join(p.cmd.Process.Signal(syscall.SIGTERM), p.cmd.Wait())
}

// cpu is what the process has used, user and system, in seconds.
func (p *benchAgent) cpu() float64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		return 0
	}
	_, after, _ := strings.Cut(string(text), ") ")
	fields := strings.Fields(after) // proc(5): utime and stime are fields 14 and 15
	var user, system float64
	_, _ = fmt.Sscan(fields[11]+" "+fields[12], &user, &system)
	return (user + system) / 100
}

// memory is VmRSS and VmHWM in MiB.
func (p *benchAgent) memory() (rss, peak float64) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0, 0
	}
	for line := range strings.Lines(string(text)) {
		_, _ = fmt.Sscanf(line, "VmRSS: %f", &rss)
		_, _ = fmt.Sscanf(line, "VmHWM: %f", &peak)
	}
	return rss / 1024, peak / 1024
}
