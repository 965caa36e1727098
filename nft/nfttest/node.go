// Package nfttest makes nodes, pods and traffic out of network namespaces for kernel tests. Nothing in it knows the
// ruleset: it wires pods as the plugin does, sends real packets and counts what arrives.
package nfttest

import (
	"fmt"
	"hash/fnv"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Main runs the tests in a user namespace of their own when the caller is not root. It is a TestMain.
func Main(m *testing.M) {
	if os.Getuid() == 0 || os.Getenv("NFTCNI_REEXEC") != "" {
		os.Exit(m.Run())
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), "NFTCNI_REEXEC=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
	if err := cmd.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "tests in a user namespace:", err)
		os.Exit(1)
	}
}

// carrier waits until a link passes packets: a veth drops them for a moment after it came up.
func carrier(name string) error {
	deadline := time.Now().Add(10 * time.Second)
	for time.Now().Before(deadline) {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return fmt.Errorf("find link %s: %w", name, err)
		}
		if l.Attrs().OperState == netlink.OperUp {
			return nil
		}
		runtime.Gosched()
	}
	return fmt.Errorf("link %s has no carrier after 10 s", name)
}

// Gateways of every pod, as in design.md.
var (
	gateway4 = net.IPv4(169, 254, 1, 1)
	gateway6 = net.ParseIP("fe80::1")
)

// Host is one network namespace.
type Host struct {
	t    testing.TB
	Name string
	NS   netns.NsHandle
	// Interface is the node's end of the link to this host.
	Interface string
	Addrs     []netip.Addr
	// MAC is the host's own address on its link.
	MAC net.HardwareAddr
}

// Node is a router namespace to which pods and outside hosts are attached.
type Node struct {
	Host
	links int
}

// NewNode makes a node and moves the test's thread into it for good: the thread is never unlocked.
func NewNode(t testing.TB) *Node {
	t.Helper()
	runtime.LockOSThread()
	ns, err := netns.New()
	if err != nil {
		t.Skipf("no network namespace: %v", err)
	}
	n := &Node{Host: Host{t: t, Name: "node", NS: ns}}
	t.Cleanup(func() { _ = ns.Close() })
	for path, value := range map[string]string{
		"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1",
		"net/ipv6/conf/all/accept_dad": "0", "net/ipv6/conf/default/accept_dad": "0",
		"net/ipv4/conf/all/rp_filter": "0", "net/ipv4/conf/default/rp_filter": "0",
	} {
		Sysctl(t, path, value)
	}
	n.must(linkUp("lo"))
	return n
}

// Sysctl writes a value below /proc/sys in the calling thread's namespace.
func Sysctl(t testing.TB, path, value string) {
	t.Helper()
	if err := os.WriteFile("/proc/sys/"+path, []byte(value), 0o644); err != nil {
		t.Fatalf("sysctl: %v", err)
	}
}

func (h *Host) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatalf("%s: %v", h.Name, err)
	}
}

func linkUp(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find link %s: %w", name, err)
	}
	return netlink.LinkSetUp(l)
}

// Do runs f on a thread in the host's namespace. Sockets that f opens stay there and work from any thread.
func (h *Host) Do(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if err := netns.Set(h.NS); err != nil {
			done <- fmt.Errorf("enter namespace of %s: %w", h.Name, err)
			return
		}
		done <- f()
	}()
	return <-done
}

func (n *Node) newHost(name string, addrs []string) *Host {
	h := &Host{t: n.t, Name: name, NS: netns.None()}
	for _, a := range addrs {
		h.Addrs = append(h.Addrs, netip.MustParseAddr(a))
	}
	made := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		ns, err := netns.New()
		h.NS = ns
		made <- err
	}()
	n.must(<-made)
	n.t.Cleanup(func() { _ = h.NS.Close() })
	return h
}

// Pod attaches a pod as the plugin does: a veth without bridge, /32 and /128 addresses, link-local gateways with
// permanent neighbours, a host route to each address.
func (n *Node) Pod(name string, addrs ...string) *Host {
	n.t.Helper()
	sum := fnv.New64a()
	_, _ = sum.Write([]byte(name))
	return n.attach(name, fmt.Sprintf("nft%012x", sum.Sum64()&0xffff_ffff_ffff), addrs)
}

// Outside attaches a host beyond an uplink, wired the same way but by an interface that is no pod's. The node's
// addresses on the n-th uplink are 198.51.100.n and 2001:db8:1::n.
func (n *Node) Outside(name string, addrs ...string) *Host {
	n.t.Helper()
	n.links++
	h := n.attach(name, fmt.Sprintf("up%d", n.links), addrs)
	near, err := netlink.LinkByName(h.Interface)
	n.must(err)
	for _, a := range []string{fmt.Sprintf("198.51.100.%d", n.links), fmt.Sprintf("2001:db8:1::%d", n.links)} {
		n.must(netlink.AddrAdd(near, &netlink.Addr{IPNet: single(netip.MustParseAddr(a)), Flags: unix.IFA_F_NODAD}))
	}
	return h
}

func (n *Node) attach(name, iface string, addrs []string) *Host {
	n.t.Helper()
	h := n.newHost(name, addrs)
	h.Interface = iface
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: iface, MTU: 1500}, PeerName: "eth0", PeerNamespace: netlink.NsFd(h.NS)}
	n.must(netlink.LinkAdd(veth))
	near, err := netlink.LinkByName(iface)
	n.must(err)
	var far net.HardwareAddr
	n.must(h.Do(func() error {
		far, err = wirePod(near.Attrs().HardwareAddr, h.Addrs)
		return err
	}))
	h.MAC = far
	n.must(netlink.LinkSetUp(near))
	n.must(carrier(iface))
	n.must(h.Do(func() error { return carrier("eth0") }))
	for _, a := range []*net.IPNet{{IP: gateway4, Mask: net.CIDRMask(32, 32)}, {IP: gateway6, Mask: net.CIDRMask(64, 128)}} {
		n.must(netlink.AddrAdd(near, &netlink.Addr{IPNet: a, Flags: unix.IFA_F_NODAD, Scope: unix.RT_SCOPE_LINK}))
	}
	for _, a := range h.Addrs {
		n.must(netlink.RouteAdd(&netlink.Route{LinkIndex: near.Attrs().Index, Dst: single(a), Scope: netlink.SCOPE_LINK}))
		n.must(netlink.NeighSet(&netlink.Neigh{LinkIndex: near.Attrs().Index, IP: a.AsSlice(), HardwareAddr: far, State: netlink.NUD_PERMANENT}))
	}
	return h
}

func single(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

// wirePod runs in the pod's namespace.
func wirePod(gatewayMAC net.HardwareAddr, addrs []netip.Addr) (net.HardwareAddr, error) {
	for _, path := range []string{"all", "default", "eth0"} {
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+path+"/accept_dad", []byte("0"), 0o644); err != nil {
			return nil, fmt.Errorf("switch DAD off: %w", err)
		}
	}
	if err := linkUp("lo"); err != nil {
		return nil, err
	}
	eth0, err := netlink.LinkByName("eth0")
	if err != nil {
		return nil, fmt.Errorf("find eth0: %w", err)
	}
	if err := netlink.LinkSetUp(eth0); err != nil {
		return nil, fmt.Errorf("eth0 up: %w", err)
	}
	for _, a := range addrs {
		if err := netlink.AddrAdd(eth0, &netlink.Addr{IPNet: single(a), Flags: unix.IFA_F_NODAD}); err != nil {
			return nil, fmt.Errorf("add %s: %w", a, err)
		}
	}
	for _, gw := range []net.IP{gateway4, gateway6} {
		if err := addGateway(eth0, gw, gatewayMAC); err != nil {
			return nil, err
		}
	}
	return eth0.Attrs().HardwareAddr, nil
}

func addGateway(eth0 netlink.Link, gw net.IP, mac net.HardwareAddr) error {
	index := eth0.Attrs().Index
	if err := netlink.NeighSet(&netlink.Neigh{LinkIndex: index, IP: gw, HardwareAddr: mac, State: netlink.NUD_PERMANENT}); err != nil {
		return fmt.Errorf("neighbour %s: %w", gw, err)
	}
	bits := 128
	if gw.To4() != nil {
		bits = 32
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: index, Dst: &net.IPNet{IP: gw.To4(), Mask: net.CIDRMask(32, 32)}, Scope: netlink.SCOPE_LINK}); err != nil {
			return fmt.Errorf("route to %s: %w", gw, err)
		}
	}
	all := &net.IPNet{IP: make(net.IP, bits/8), Mask: net.CIDRMask(0, bits)}
	if err := netlink.RouteAdd(&netlink.Route{LinkIndex: index, Dst: all, Gw: gw, Flags: int(netlink.FLAG_ONLINK)}); err != nil {
		return fmt.Errorf("default route by %s: %w", gw, err)
	}
	return nil
}
