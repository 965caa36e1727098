package cni

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// A labNS is an anonymous network namespace that lives as long as its descriptor.
type labNS struct {
	t  testing.TB
	fd netns.NsHandle
	h  *netlink.Handle
}

func newLabNS(t testing.TB) *labNS {
	t.Helper()
	ns := &labNS{t: t}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends here
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			fd, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
			ns.fd = netns.NsHandle(fd)
			return err
		}()
	}()
	ns.must(<-done)
	h, err := netlink.NewHandleAt(ns.fd, unix.NETLINK_ROUTE)
	ns.must(err)
	ns.h = h
	t.Cleanup(func() { h.Close(); _ = ns.fd.Close() })
	ns.up("lo")
	for key, value := range map[string]string{"ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "1", "ipv6/conf/all/accept_dad": "0",
		"ipv6/conf/default/accept_dad": "0", "ipv6/conf/default/dad_transmits": "0", "ipv4/conf/all/rp_filter": "1", "ipv4/conf/default/rp_filter": "1"} {
		ns.sysctl(key, value)
	}
	return ns
}

func (n *labNS) must(err error) {
	n.t.Helper()
	if err != nil {
		n.t.Fatal(err)
	}
}

func (n *labNS) do(fn func() error) {
	n.t.Helper()
	n.must(inNetNS(n.fd, fn))
}

func (n *labNS) sysctl(key, value string) {
	n.t.Helper()
	n.do(func() error { return os.WriteFile("/proc/sys/net/"+key, []byte(value), 0o644) })
}

func (n *labNS) link(name string) netlink.Link {
	n.t.Helper()
	l, err := n.h.LinkByName(name)
	n.must(err)
	return l
}

func (n *labNS) up(name string) { n.t.Helper(); n.must(n.h.LinkSetUp(n.link(name))) }

func (n *labNS) addr(name string, prefixes ...string) {
	n.t.Helper()
	for _, text := range prefixes {
		p := netip.MustParsePrefix(text)
		a := netlink.Addr{IPNet: ipNet(p)}
		if p.Addr().Is6() {
			a.Flags = unix.IFA_F_NODAD
		}
		n.must(n.h.AddrAdd(n.link(name), &a))
	}
}

func (n *labNS) unaddr(name, prefix string) {
	n.t.Helper()
	n.must(n.h.AddrDel(n.link(name), &netlink.Addr{IPNet: ipNet(netip.MustParsePrefix(prefix))}))
}

func (n *labNS) route(dst, via, dev string) {
	n.t.Helper()
	r := netlink.Route{Dst: ipNet(netip.MustParsePrefix(dst)), LinkIndex: n.link(dev).Attrs().Index}
	if via != "" {
		r.Gw = netip.MustParseAddr(via).AsSlice()
	} else {
		r.Scope = netlink.SCOPE_LINK
	}
	n.must(n.h.RouteReplace(&r))
}

// wire connects two namespaces by a veth that is up at both ends.
func (n *labNS) wire(name string, to *labNS, toName string) {
	n.t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	n.must(n.h.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: toName, PeerNamespace: netlink.NsFd(to.fd)}))
	n.up(name)
	to.up(toName)
}

// A labNode is a node with one pod and a mesh.
type labNode struct {
	*labNS
	pod   *labNS
	self  Peer
	pods  []netip.Addr
	mesh  *Mesh
	peers []Peer
	state string
}

// A lab is three nodes on links that a router connects.
type lab struct {
	t      testing.TB
	nodes  []*labNode
	router *labNS
}

// A labShape says on which link each of the nodes is, and which families nodes and pods have.
type labShape struct {
	links        []int
	nodes4       bool
	nodes6       bool
	pods4, pods6 bool
}

func (s labShape) String() string {
	var b strings.Builder
	fmt.Fprint(&b, "links", s.links)
	for _, f := range []struct {
		on   bool
		name string
	}{{s.nodes4, " nodes4"}, {s.nodes6, " nodes6"}, {s.pods4, " pods4"}, {s.pods6, " pods6"}} {
		if f.on {
			b.WriteString(f.name)
		}
	}
	return b.String()
}

const podLink = "nft0123456789ab" // as the plugin would name it

func newLab(t testing.TB, s labShape, cfg MeshConfig) *lab {
	t.Helper()
	needNode(t)
	l := &lab{t: t, router: newLabNS(t)}
	for _, link := range s.links {
		l.bridge(link, s)
	}
	for i, link := range s.links {
		l.nodes = append(l.nodes, l.node(i+1, link, s, cfg))
	}
	for _, n := range l.nodes {
		for _, peer := range l.nodes {
			n.peers = append(n.peers, peer.self)
		}
	}
	return l
}

func (l *lab) bridge(link int, s labShape) {
	name := fmt.Sprint("br", link)
	if _, err := l.router.h.LinkByName(name); err == nil {
		return
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	l.router.must(l.router.h.LinkAdd(&netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: new(bool)}))
	l.router.up(name)
	if s.nodes4 {
		l.router.addr(name, fmt.Sprintf("192.168.%d.254/24", link))
	}
	if s.nodes6 {
		l.router.addr(name, fmt.Sprintf("fd00:%d::fe/64", link))
	}
}

func (l *lab) node(i, link int, s labShape, cfg MeshConfig) *labNode {
	n := &labNode{labNS: newLabNS(l.t), pod: newLabNS(l.t), self: Peer{Name: fmt.Sprint("n", i)}, state: l.t.TempDir()}
	port := fmt.Sprint("port", i)
	n.wire("eth0", l.router, port)
	l.router.must(l.router.h.LinkSetMaster(l.router.link(port), l.router.link(fmt.Sprint("br", link))))
	if s.nodes4 {
		n.addr("eth0", fmt.Sprintf("192.168.%d.%d/24", link, i))
		n.route("0.0.0.0/0", fmt.Sprintf("192.168.%d.254", link), "eth0")
		n.self.Addrs = append(n.self.Addrs, netip.MustParseAddr(fmt.Sprintf("192.168.%d.%d", link, i)))
	}
	if s.nodes6 {
		n.addr("eth0", fmt.Sprintf("fd00:%d::%d/64", link, i))
		n.route("::/0", fmt.Sprintf("fd00:%d::fe", link), "eth0")
		n.self.Addrs = append(n.self.Addrs, netip.MustParseAddr(fmt.Sprintf("fd00:%d::%d", link, i)))
	}
	n.wire(podLink, n.pod, "eth0")
	n.addr(podLink, "169.254.1.1/32", "fe80::1/64")
	if s.pods4 {
		n.addPod(fmt.Sprintf("10.244.%d.0/24", i), fmt.Sprintf("10.244.%d.7", i), "169.254.1.1", "0.0.0.0/0")
	}
	if s.pods6 {
		n.addPod(fmt.Sprintf("fd01:%d::/64", i), fmt.Sprintf("fd01:%d::7", i), "fe80::1", "::/0")
	}
	cfg.NetNS, cfg.StateDir = int(n.fd), n.state
	m, err := NewMesh(cfg)
	l.router.must(err)
	l.t.Cleanup(m.Close)
	n.mesh, n.self.PublicKey = m, m.PublicKey()
	return n
}

func (n *labNode) addPod(cidr, addr, gateway, world string) {
	n.t.Helper()
	a := netip.MustParseAddr(addr)
	n.pod.addr("eth0", netip.PrefixFrom(a, a.BitLen()).String())
	if a.Is4() {
		n.pod.route(gateway+"/32", "", "eth0")
	}
	n.pod.route(world, gateway, "eth0")
	n.route(netip.PrefixFrom(a, a.BitLen()).String(), "", podLink)
	n.self.PodCIDRs = append(n.self.PodCIDRs, netip.MustParsePrefix(cidr))
	n.pods = append(n.pods, a)
}

func (n *labNode) set() Report {
	n.t.Helper()
	r, err := n.mesh.Set(n.t.Context(), n.self, n.peers)
	n.must(err)
	for _, p := range r.Problems {
		n.t.Errorf("%s: %s", n.self.Name, p)
	}
	return r
}

// set asks all nodes, and gives the pods the MTU that comes out, as the plugin does.
func (l *lab) set() {
	l.t.Helper()
	for _, n := range l.nodes {
		mtu := n.set().MTU
		n.must(n.h.LinkSetMTU(n.link(podLink), mtu))
		n.pod.must(n.pod.h.LinkSetMTU(n.pod.link("eth0"), mtu))
	}
}

// idle proves that a second pass finds nothing to write.
func (l *lab) idle() {
	l.t.Helper()
	for _, n := range l.nodes {
		if r := n.set(); r.Writes != 0 {
			l.t.Errorf("%s: the same Set again made %d writes", n.self.Name, r.Writes)
		}
	}
}

// via is how node i reaches the pods of peer j, for each of its networks.
func (l *lab) via(i, j int) string {
	var list []string
	for _, p := range l.nodes[i].mesh.Report().Paths {
		if p.Peer == l.nodes[j].self.Name {
			list = append(list, string(p.Via))
		}
	}
	return strings.Join(list, " ")
}

// talkAll sends a large request between all pods and from every node to all remote pods, and wants
// pods to be seen with their own addresses.
func (l *lab) talkAll() {
	l.t.Helper()
	for _, from := range l.nodes {
		for _, to := range l.nodes {
			if from == to {
				continue
			}
			for i, addr := range to.pods {
				if err := exchange(from.pod, to.pod, addr, from.pods[i]); err != nil {
					l.t.Errorf("pod %s to pod %s: %v", from.pods[i], addr, err)
				}
				if err := exchange(from.labNS, to.pod, addr, netip.Addr{}); err != nil {
					l.t.Errorf("host %s to pod %s: %v", from.self.Name, addr, err)
				}
			}
		}
	}
}

const exchangeLimit = 3 * time.Second

// exchange sends bytes over TCP and wants them back, and the client's address as the server sees
// it.
func exchange(from, to *labNS, addr, source netip.Addr) error {
	var ln net.Listener
	if err := inNetNS(to.fd, func() (err error) {
		ln, err = net.Listen("tcp", netip.AddrPortFrom(addr, 7).String())
		return err
	}); err != nil {
		return err
	}
	defer ln.Close()
	go func() {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		seen := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
		_ = c.SetDeadline(time.Now().Add(exchangeLimit))
		_, _ = io.CopyN(c, c, 1<<16)
		_, _ = io.WriteString(c, seen.String())
	}()
	return inNetNS(from.fd, func() error {
		c, err := net.DialTimeout("tcp", ln.Addr().String(), exchangeLimit)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(exchangeLimit))
		sent := bytes.Repeat([]byte("x"), 1<<16)
		go func() { _, _ = c.Write(sent) }()
		got, err := io.ReadAll(c)
		if err != nil || len(got) < len(sent) {
			return fmt.Errorf("%d bytes came back: %w", len(got), err)
		}
		if seen := string(got[len(sent):]); source.IsValid() && seen != source.String() {
			return fmt.Errorf("it is seen as %s, not as %s", seen, source)
		}
		return nil
	})
}

// run starts Run and returns the reports of its passes.
func (n *labNode) run() <-chan Report {
	n.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	reports, done := make(chan Report, 1000), make(chan struct{})
	go func() {
		defer close(done)
		_ = n.mesh.Run(ctx, func(r Report, err error) {
			if err != nil {
				n.t.Logf("%s: %v", n.self.Name, err)
			}
			reports <- r
		})
	}()
	n.t.Cleanup(func() { cancel(); <-done })
	return reports
}

// until waits for a report that holds.
func until(t testing.TB, reports <-chan Report, what string, holds func(Report) bool) {
	t.Helper()
	limit := time.After(10 * time.Second)
	for {
		select {
		case r := <-reports:
			if holds(r) {
				return
			}
		case <-limit:
			t.Fatalf("no pass: %s", what)
		}
	}
}
