package cni

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// RouteProtocol marks every route that nftcni makes (rtnetlink(7), rtm_protocol): 157 is
// in nobody's /etc/iproute2/rt_protos.
const RouteProtocol netlink.RouteProtocol = 157

// The gateways of every pod. No interface needs to have them: the pod reaches them
// through a permanent neighbour entry for the node's end of its veth.
func gateways() (v4, v6 netip.Addr) {
	return netip.AddrFrom4([4]byte{169, 254, 1, 1}), netip.MustParseAddr("fe80::1")
}

func gatewayOf(a netip.Addr) netip.Addr {
	v4, v6 := gateways()
	if a.Is4() {
		return v4
	}
	return v6
}

// wire is the veth of one attachment, with a netlink socket at each end. Sockets are
// dialled into the pod's namespace, so no thread stays there.
type wire struct {
	host, pod        *netlink.Handle
	podNS            netns.NsHandle
	hostName, name   string
	hostMAC, podMAC  net.HardwareAddr
	addresses        []netip.Addr
	hostLink, inside int  // interface indices, 0 until made
	localnet         bool // the node's loopback reaches the pod
}

// openWire opens both ends. close must be called.
func openWire(netnsPath string) (*wire, error) {
	ns, err := openNetNS(netnsPath)
	if err != nil {
		return nil, err
	}
	w := &wire{podNS: ns}
	if w.host, err = netlink.NewHandle(unix.NETLINK_ROUTE); err == nil {
		w.pod, err = netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	}
	if err != nil {
		w.close()
		return nil, fmt.Errorf("open netlink for %s: %w", netnsPath, err)
	}
	return w, nil
}

func (w *wire) close() {
	for _, h := range []*netlink.Handle{w.host, w.pod} {
		if h != nil {
			h.Close()
		}
	}
	_ = w.podNS.Close()
}

// openNetNS opens a namespace by path and refuses what is none.
func openNetNS(path string) (netns.NsHandle, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return netns.None(), &fs.PathError{Op: "open network namespace", Path: path, Err: err}
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil || int64(st.Type) != unix.NSFS_MAGIC {
		return netns.None(), errors.Join(fmt.Errorf("%s is not a network namespace: %w", path, unix.EINVAL), err, unix.Close(fd))
	}
	return netns.NsHandle(fd), nil
}

func (w *wire) families() (has4, has6 bool) {
	for _, a := range w.addresses {
		has4, has6 = has4 || a.Is4(), has6 || a.Is6()
	}
	return has4, has6
}

// makeLink makes both ends in one request, the pod's directly in its namespace: it is
// never seen on the node under a name that may be taken.
func (w *wire) makeLink(mtu int) error {
	veth := &netlink.Veth{
		LinkAttrs:        netlink.NewLinkAttrs(),
		PeerName:         w.name,
		PeerHardwareAddr: w.podMAC,
		PeerNamespace:    netlink.NsFd(int(w.podNS)),
		PeerMTU:          uint32(mtu),
	}
	veth.Name, veth.MTU, veth.HardwareAddr = w.hostName, mtu, w.hostMAC
	if err := w.host.LinkAdd(veth); err != nil {
		return fmt.Errorf("make veth %s with %s in the pod: %w", w.hostName, w.name, err)
	}
	w.hostLink = veth.Index
	peer, err := w.pod.LinkByName(w.name)
	if err != nil {
		return fmt.Errorf("find %s in the pod: %w", w.name, err)
	}
	w.inside = peer.Attrs().Index
	return nil
}

// unmakeLink removes both ends, and with them their addresses, routes and neighbours.
func unmakeLink(h *netlink.Handle, hostName string) error {
	link, err := h.LinkByName(hostName)
	if err == nil {
		err = h.LinkDel(link)
	}
	if err := ignoreNoLink(err); err != nil {
		return fmt.Errorf("remove link %s: %w", hostName, err)
	}
	return nil
}

func ignoreNoLink(err error) error {
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

func linkAt(index int) netlink.Link {
	return &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: index}}
}

// setUpPod gives the pod's end its addresses, neighbours and routes.
func (w *wire) setUpPod(routes []netip.Prefix, sysctls []setting) error {
	_, has6 := w.families()
	if err := inNetNS(w.podNS, func() error { return apply(append(podSettings(w.name, has6), sysctls...)) }); err != nil {
		return err
	}
	link := linkAt(w.inside)
	for _, a := range w.addresses {
		if err := w.pod.AddrAdd(link, podAddress(a)); err != nil {
			return fmt.Errorf("add address %s to %s in the pod: %w", a, w.name, err)
		}
	}
	if err := w.pod.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up in the pod: %w", w.name, err)
	}
	for _, n := range w.podNeighbours() {
		if err := w.pod.NeighSet(&n); err != nil {
			return fmt.Errorf("add neighbour %s in the pod: %w", n.IP, err)
		}
	}
	for _, r := range w.podRoutes(routes) {
		err := w.pod.RouteAdd(&r)
		if errors.Is(err, fs.ErrExist) {
			return wrong("ipam.routes: the pod has a route %s already, of another interface than %s: "+
				"give the second network ipam.routes of its own, such as [{\"dst\": \"198.51.100.0/24\"}]", r.Dst, w.name)
		}
		if err != nil {
			return fmt.Errorf("add route %s in the pod: %w", r.Dst, err)
		}
	}
	return nil
}

func podAddress(a netip.Addr) *netlink.Addr {
	addr := &netlink.Addr{IPNet: hostNet(a)}
	if a.Is6() {
		// The address is ours alone by lease, so duplicate address detection
		// (RFC 4862, 5.4) would only make the pod wait a second.
		addr.Flags = unix.IFA_F_NODAD
	}
	return addr
}

func (w *wire) podNeighbours() []netlink.Neigh {
	var list []netlink.Neigh
	has4, has6 := w.families()
	v4, v6 := gateways()
	for _, g := range []struct {
		gateway netip.Addr
		needed  bool
	}{{v4, has4}, {v6, has6}} {
		if g.needed {
			list = append(list, neighbour(w.inside, g.gateway, w.hostMAC))
		}
	}
	return list
}

func (w *wire) hostNeighbours() []netlink.Neigh {
	var list []netlink.Neigh
	for _, a := range w.addresses {
		list = append(list, neighbour(w.hostLink, a, w.podMAC))
	}
	return list
}

func neighbour(link int, a netip.Addr, mac net.HardwareAddr) netlink.Neigh {
	return netlink.Neigh{LinkIndex: link, Family: family(a), State: netlink.NUD_PERMANENT, IP: a.AsSlice(), HardwareAddr: mac}
}

// podRoutes are routes to the prefixes, or default routes where there are none, of the
// families that the pod has an address of.
func (w *wire) podRoutes(prefixes []netip.Prefix) []netlink.Route {
	if len(prefixes) == 0 {
		prefixes = []netip.Prefix{netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0)}
	}
	has4, has6 := w.families()
	var list []netlink.Route
	for _, p := range prefixes {
		if p.Addr().Is4() && !has4 || p.Addr().Is6() && !has6 {
			continue
		}
		list = append(list, netlink.Route{LinkIndex: w.inside, Dst: ipNet(p), Gw: gatewayOf(p.Addr()).AsSlice(),
			Flags: int(netlink.FLAG_ONLINK), Protocol: RouteProtocol, Family: family(p.Addr())})
	}
	return list
}

// setUpHost prepares the node's end. Its routes come later.
func (w *wire) setUpHost(alias string) error {
	has4, has6 := w.families()
	if err := apply(hostSettings(w.hostName, has4, has6, w.localnet)); err != nil {
		return err
	}
	link := linkAt(w.hostLink)
	if err := w.host.LinkSetAlias(link, alias); err != nil {
		return fmt.Errorf("set alias of %s: %w", w.hostName, err)
	}
	if err := w.host.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", w.hostName, err)
	}
	for _, n := range w.hostNeighbours() {
		if err := w.host.NeighSet(&n); err != nil {
			return fmt.Errorf("add neighbour %s on %s: %w", n.IP, w.hostName, err)
		}
	}
	return nil
}

// addHostRoutes lets packets reach the pod. One that exists belongs to somebody else.
func (w *wire) addHostRoutes() error {
	for _, a := range w.addresses {
		r := hostRoute(w.hostLink, a)
		if err := w.host.RouteAdd(&r); err != nil {
			return fmt.Errorf("add route %s to %s: %w", a, w.hostName, err)
		}
	}
	return nil
}

func hostRoute(link int, a netip.Addr) netlink.Route {
	r := netlink.Route{LinkIndex: link, Dst: hostNet(a), Protocol: RouteProtocol, Family: family(a)}
	if a.Is4() {
		r.Scope = netlink.SCOPE_LINK
	}
	return r
}

func delHostRoutes(h *netlink.Handle, link int, addresses []netip.Addr) error {
	var errs []error
	for _, a := range addresses {
		r := hostRoute(link, a)
		if err := h.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("remove route %s: %w", a, err))
		}
	}
	return errors.Join(errs...)
}

func hostNet(a netip.Addr) *net.IPNet { return ipNet(netip.PrefixFrom(a, a.BitLen())) }

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func family(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}
