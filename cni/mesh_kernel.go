package cni

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// A meshView is what the kernel says before a pass decides anything.
type meshView struct {
	links map[string]meshLink
	names map[int]string // link index to name
	addrs []meshAddr     // of links that are neither ours nor a pod's
	// path answers how this node reaches an address. It asks the kernel once per address and pass.
	path func(netip.Addr) meshPath
	// With encryption: this node's public keys, the devices as they are, and the routes in force.
	keys   keyring
	wg     map[string]*wgtypes.Device
	routes map[routeKey]meshRoute
}

type meshLink struct {
	netlink.Link
	mtu int
	// broadcast: a neighbour there can forward to others what is sent to it. False for loopback and
	// point-to-point links, whose other end takes only what it knows.
	broadcast, loopback bool
}

type meshAddr struct {
	link string
	addr netip.Addr
}

// A meshPath is the kernel's route to an address of a peer.
type meshPath struct {
	link   string
	mtu    int
	onLink bool // the address is a neighbour on link
	local  bool // the address is this node's own
	err    error
}

func isMeshDevice(name string) bool { return slices.Contains(allMeshDevices(), name) }

// index is that of a link, 0 if there is none.
func (v *meshView) index(name string) int {
	if l, ok := v.links[name]; ok {
		return l.Attrs().Index
	}
	return 0
}

// readLinks asks for links and addresses; both are needed whatever is asked of the mesh.
func (m *Mesh) readLinks() (*meshView, error) {
	links, err := again(m.kernel.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	v := &meshView{links: map[string]meshLink{}, names: map[int]string{}}
	for _, l := range links {
		a := l.Attrs()
		if isPodLink(a.Name) {
			continue
		}
		v.names[a.Index] = a.Name
		v.links[a.Name] = meshLink{Link: l, mtu: a.MTU, loopback: a.RawFlags&unix.IFF_LOOPBACK != 0,
			broadcast: a.RawFlags&unix.IFF_BROADCAST != 0 && a.RawFlags&(unix.IFF_POINTOPOINT|unix.IFF_NOARP|unix.IFF_LOOPBACK) == 0}
	}
	addrs, err := again(func() ([]netlink.Addr, error) { return m.kernel.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addrs {
		ip, ok := netip.AddrFromSlice(a.IP)
		if name := v.names[a.LinkIndex]; ok && name != "" && !isMeshDevice(name) {
			v.addrs = append(v.addrs, meshAddr{name, ip.Unmap()})
		}
	}
	v.path = m.pathCache(v)
	if m.wg == nil {
		return v, nil
	}
	v.keys = m.wg.keys.public()
	if v.wg, err = m.wg.read(v); err != nil {
		return nil, err
	}
	v.routes, err = m.readRoutes(v)
	return v, err
}

// again repeats a dump that a concurrent change interrupted: half a list would make the mesh remove
// what is only not in its half.
func again[T any](list func() ([]T, error)) ([]T, error) {
	const tries = 8
	var found []T
	var err error
	for range tries {
		if found, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return found, err
		}
	}
	return nil, err
}

func (m *Mesh) pathCache(v *meshView) func(netip.Addr) meshPath {
	known := map[netip.Addr]meshPath{}
	return func(a netip.Addr) meshPath {
		p, ok := known[a]
		if !ok {
			p = m.lookup(v, a)
			known[a] = p
		}
		return p
	}
}

// lookup asks for the FIB entry itself (RTM_F_FIB_MATCH, Linux 4.13): the resolved route would hide
// whether the destination is a neighbour, pick one of several next hops, and show a path MTU that
// was learned for ten minutes as if it were configured.
func (m *Mesh) lookup(v *meshView, a netip.Addr) meshPath {
	found, err := m.kernel.RouteGetWithOptions(a.AsSlice(), &netlink.RouteGetOptions{FIBMatch: true})
	if err != nil {
		return meshPath{err: err}
	}
	if len(found) == 0 {
		return meshPath{err: unix.ENETUNREACH}
	}
	r := found[0]
	p := meshPath{local: r.Type == unix.RTN_LOCAL}
	hops := r.MultiPath
	if len(hops) == 0 {
		hops = []*netlink.NexthopInfo{{LinkIndex: r.LinkIndex, Gw: r.Gw, Via: r.Via}}
	}
	for _, hop := range hops {
		l := v.links[v.names[hop.LinkIndex]]
		if l.mtu != 0 && (p.mtu == 0 || l.mtu < p.mtu) {
			p.mtu, p.link = l.mtu, v.names[hop.LinkIndex]
		}
	}
	if r.MTU > 0 && r.MTU < p.mtu {
		p.mtu = r.MTU
	}
	bits := 0
	if r.Dst != nil {
		bits, _ = r.Dst.Mask.Size()
	}
	p.onLink = len(hops) == 1 && hops[0].Gw == nil && hops[0].Via == nil && bits > 0 && v.links[p.link].broadcast
	if p.link == "" {
		p.err = fmt.Errorf("its route has no link: %w", unix.ENETUNREACH)
	}
	return p
}

// has tells whether a is an address of this node, and on which link.
func (v *meshView) has(a netip.Addr) (string, bool) {
	i := slices.IndexFunc(v.addrs, func(m meshAddr) bool { return m.addr == a })
	if i < 0 {
		return "", false
	}
	return v.addrs[i].link, true
}
