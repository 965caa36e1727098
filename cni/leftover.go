package cni

import (
	"errors"
	"fmt"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Leftovers are the links and routes of nftcni in the namespace of h, whatever made them:
// what uninstall removes, and what it must not find afterwards.
type Leftovers struct {
	Links  []netlink.Link
	Routes []netlink.Route
}

// FindLeftovers lists them. Links are pod interfaces, what limits their sending, and tunnels between nodes; routes are
// those of protocol RouteProtocol in every table.
func FindLeftovers(h *netlink.Handle) (Leftovers, error) {
	var l Leftovers
	links, err := again(h.LinkList)
	if err != nil {
		return l, fmt.Errorf("list links: %w", err)
	}
	for _, link := range links {
		if isOurLink(link) {
			l.Links = append(l.Links, link)
		}
	}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		filter := &netlink.Route{Protocol: RouteProtocol, Table: unix.RT_TABLE_UNSPEC}
		routes, err := again(func() ([]netlink.Route, error) {
			return h.RouteListFiltered(family, filter, netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return l, fmt.Errorf("list routes: %w", err)
		}
		l.Routes = append(l.Routes, routes...)
	}
	return l, nil
}

func isOurLink(link netlink.Link) bool {
	name := link.Attrs().Name
	if isIFB(name) && link.Type() == "ifb" {
		return true
	}
	tunnel := link.Type() == "vxlan" || link.Type() == "wireguard"
	return strings.HasPrefix(name, "nft") && (tunnel || len(name) == 15 && strings.Trim(name[3:], "0123456789abcdef") == "")
}

// Remove deletes them; what is gone meanwhile is no error. Pods that still run lose their
// network.
func (l Leftovers) Remove(h *netlink.Handle) error {
	var errs []error
	for _, r := range l.Routes {
		if err := h.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("remove route %s: %w", r.Dst, err))
		}
	}
	for _, link := range l.Links {
		if err := h.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
			errs = append(errs, fmt.Errorf("remove link %s: %w", link.Attrs().Name, err))
		}
	}
	return errors.Join(errs...)
}

// Strings names each for people.
func (l Leftovers) Strings() []string {
	var out []string
	for _, link := range l.Links {
		out = append(out, "link "+link.Attrs().Name)
	}
	for _, r := range l.Routes {
		out = append(out, fmt.Sprintf("route %s table %d", r.Dst, r.Table))
	}
	return out
}
