package cni

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// tunnelEntries are what is in a device's tables.
type tunnelEntries struct {
	fdb   map[hwAddr]netip.Addr
	neigh map[netip.Addr]hwAddr
}

// entries writes what a VXLAN device lacks and returns what it has too much. All entries of our own
// device are ours.
func (w *meshWriter) entries(index int, t *tunnel) tunnelEntries {
	have, err := w.readEntries(index)
	if err != nil {
		w.fail(err)
		return tunnelEntries{}
	}
	for mac, remote := range t.fdb {
		if have.fdb[mac] != remote {
			w.do(fmt.Sprintf("forward %s to %s", mac, remote), func() error { return w.kernel.NeighSet(fdbEntry(index, mac, remote)) })
		}
		delete(have.fdb, mac)
	}
	for gateway, mac := range t.neigh {
		if have.neigh[gateway] != mac {
			w.do(fmt.Sprintf("set neighbour %s", gateway), func() error { return w.kernel.NeighSet(tunnelNeigh(index, gateway, mac)) })
		}
		delete(have.neigh, gateway)
	}
	return have
}

func (w *meshWriter) readEntries(index int) (tunnelEntries, error) {
	e := tunnelEntries{fdb: map[hwAddr]netip.Addr{}, neigh: map[netip.Addr]hwAddr{}}
	for _, fam := range []int{unix.AF_BRIDGE, unix.AF_INET, unix.AF_INET6} {
		list, err := again(func() ([]netlink.Neigh, error) { return w.kernel.NeighList(index, fam) })
		if err != nil {
			return e, fmt.Errorf("list neighbours: %w", err)
		}
		for _, n := range list {
			// The kernel's own entries, for multicast groups, are not permanent.
			mac, ok := hardware(n.HardwareAddr)
			addr, isAddr := netip.AddrFromSlice(n.IP)
			if !ok || !isAddr || n.State&netlink.NUD_PERMANENT == 0 {
				continue
			}
			if fam == unix.AF_BRIDGE {
				e.fdb[mac] = addr.Unmap()
			} else {
				e.neigh[addr.Unmap()] = mac
			}
		}
	}
	return e, nil
}

func (w *meshWriter) dropEntries(index int, stale tunnelEntries) {
	for gateway, mac := range stale.neigh {
		w.do(fmt.Sprintf("remove neighbour %s", gateway), func() error {
			return gone(w.kernel.NeighDel(tunnelNeigh(index, gateway, mac)))
		})
	}
	for mac, remote := range stale.fdb {
		w.do(fmt.Sprintf("stop forwarding %s to %s", mac, remote), func() error {
			return gone(w.kernel.NeighDel(fdbEntry(index, mac, remote)))
		})
	}
}

// gone takes for success that what is to be removed was removed by somebody else.
func gone(err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

func fdbEntry(index int, mac hwAddr, remote netip.Addr) *netlink.Neigh {
	return &netlink.Neigh{LinkIndex: index, Family: unix.AF_BRIDGE, State: netlink.NUD_PERMANENT | netlink.NUD_NOARP,
		Flags: netlink.NTF_SELF, HardwareAddr: mac[:], IP: remote.AsSlice()}
}

func tunnelNeigh(index int, gateway netip.Addr, mac hwAddr) *netlink.Neigh {
	return &netlink.Neigh{LinkIndex: index, Family: family(gateway), State: netlink.NUD_PERMANENT,
		HardwareAddr: mac[:], IP: gateway.AsSlice()}
}

// routes writes what the main table lacks and removes what is the mesh's and not wanted.
func (w *meshWriter) routes(want map[routeKey]meshRoute) {
	have, err := w.readRoutes(w.view)
	if err != nil {
		w.fail(err)
		return
	}
	left := maps.Clone(have)
	for _, fences := range []bool{true, false} {
		for key, r := range want {
			old, exists := have[key]
			delete(left, key)
			if (exists && old == r) || (key.metric == fenceMetric) != fences {
				continue
			}
			w.do(fmt.Sprintf("route to %s", key.dst), func() error { return w.putRoute(key, r, exists) })
		}
	}
	for _, fences := range []bool{false, true} {
		for key, r := range left {
			if (key.metric == fenceMetric) == fences {
				w.do(fmt.Sprintf("remove route to %s", key.dst), func() error { return w.dropRoute(key, r) })
			}
		}
	}
}

// readRoutes finds the mesh's routes: ours by protocol, and not those to local pods by metric.
func (m *Mesh) readRoutes(v *meshView) (map[routeKey]meshRoute, error) {
	have := map[routeKey]meshRoute{}
	filter := &netlink.Route{Protocol: RouteProtocol, Table: unix.RT_TABLE_MAIN}
	for _, fam := range []int{unix.AF_INET, unix.AF_INET6} {
		list, err := again(func() ([]netlink.Route, error) {
			return m.kernel.RouteListFiltered(fam, filter, netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return nil, fmt.Errorf("list routes: %w", err)
		}
		for _, r := range list {
			if r.Dst == nil || (r.Priority != meshMetric && r.Priority != fenceMetric) {
				continue
			}
			addr, _ := netip.AddrFromSlice(r.Dst.IP)
			bits, _ := r.Dst.Mask.Size()
			found := meshRoute{unreachable: r.Type == unix.RTN_UNREACHABLE}
			if !found.unreachable {
				found.link = v.names[r.LinkIndex]
				found.gateway, found.src = optionalAddr(r.Gw), optionalAddr(r.Src)
			}
			have[routeKey{netip.PrefixFrom(addr.Unmap(), bits), r.Priority}] = found
		}
	}
	return have, nil
}

func optionalAddr(ip []byte) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

// putRoute adds a route, or replaces one that is ours in one step, so that no packet finds neither.
func (w *meshWriter) putRoute(key routeKey, r meshRoute, replace bool) error {
	route := &netlink.Route{Dst: ipNet(key.dst), Priority: key.metric, Protocol: RouteProtocol, Table: unix.RT_TABLE_MAIN, Family: family(key.dst.Addr())}
	if r.unreachable {
		route.Type = unix.RTN_UNREACHABLE
	} else {
		link, ok := w.view.links[r.link]
		if !ok {
			return fmt.Errorf("its link %s is not there: %w", r.link, unix.ENODEV)
		}
		route.LinkIndex = link.Attrs().Index
		if r.src.IsValid() {
			route.Src = r.src.AsSlice()
		}
		route.Scope = netlink.SCOPE_LINK
		if r.gateway.IsValid() {
			route.Gw, route.Flags, route.Scope = r.gateway.AsSlice(), int(netlink.FLAG_ONLINK), netlink.SCOPE_UNIVERSE
		}
	}
	put := w.kernel.RouteAdd
	if replace {
		put = w.kernel.RouteReplace
	}
	err := put(route)
	if errors.Is(err, unix.EINVAL) && r.gateway.Is6() {
		err = w.putBehindHostRoute(route, put)
	}
	if errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("a route of another program has the same destination and metric %d: remove it: %w", key.metric, err)
	}
	return err
}

// putBehindHostRoute puts a route whose gateway is inside its own destination and was reached
// through another link until now: by the route that it replaces, or by a wider one. IPv6 refuses
// such a gateway even where the route says that it is on its link (ip6_route_check_nh_onlink), so
// for that moment a host route says so too. Nobody else sends there: it is the first address of a
// node's network, which no pod has.
func (w *meshWriter) putBehindHostRoute(route *netlink.Route, put func(*netlink.Route) error) error {
	gateway, _ := netip.AddrFromSlice(route.Gw)
	host := *route
	host.Dst, host.Gw, host.Flags, host.Scope = ipNet(netip.PrefixFrom(gateway, gateway.BitLen())), nil, 0, netlink.SCOPE_LINK
	if err := w.kernel.RouteReplace(&host); err != nil {
		return fmt.Errorf("host route to its gateway %s: %w", gateway, err)
	}
	return errors.Join(put(route), gone(w.kernel.RouteDel(&host)))
}

func (w *meshWriter) dropRoute(key routeKey, r meshRoute) error {
	route := &netlink.Route{Dst: ipNet(key.dst), Priority: key.metric, Protocol: RouteProtocol, Table: unix.RT_TABLE_MAIN, Family: family(key.dst.Addr())}
	if r.unreachable {
		route.Type = unix.RTN_UNREACHABLE
	}
	return gone(w.kernel.RouteDel(route))
}
