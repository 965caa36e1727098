package cni

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// LiveLink is the node's end of a pod's veth as the kernel has it.
type LiveLink struct {
	Index int
	MTU   int
	Up    bool
	Alias string // "namespace/pod containerID"
}

// LiveLinks returns the pods' links in the caller's network namespace, by name.
func LiveLinks(context.Context) (map[string]LiveLink, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	links, err := again(h.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	live := map[string]LiveLink{}
	for _, l := range links {
		if at := l.Attrs(); isHostInterface(at.Name) {
			live[at.Name] = LiveLink{Index: at.Index, MTU: at.MTU, Up: at.Flags&unix.IFF_UP != 0, Alias: at.Alias}
		}
	}
	return live, nil
}

// Snapshot is everything of the node of the kind that this package writes, one line each, in an order
// and with names that do not depend on when it was made: two are equal exactly when
// nothing of ours was added or left behind in between.
type Snapshot struct{ Links, Routes, Neighbours, Records, Leases []string }

// String prints one line per entry.
func (s Snapshot) String() string {
	var b strings.Builder
	for _, part := range []struct {
		name  string
		lines []string
	}{{"link", s.Links}, {"route", s.Routes}, {"neighbour", s.Neighbours}, {"record", s.Records}, {"lease", s.Leases}} {
		for _, l := range part.lines {
			fmt.Fprintln(&b, part.name, l)
		}
	}
	return b.String()
}

// TakeSnapshot reads the caller's network namespace, runDir and stateDir.
func TakeSnapshot(ctx context.Context, runDir, stateDir string) (Snapshot, error) {
	var s Snapshot
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return s, fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	if err := s.readKernel(h); err != nil {
		return s, err
	}
	if s.Records, err = recordNames(runDir); err != nil {
		return s, err
	}
	st, err := store(runDir, stateDir, func(string) {})
	if err != nil {
		return s, err
	}
	leases, err := st.Leases(ctx)
	if err != nil {
		return s, err
	}
	for _, l := range leases {
		s.Leases = append(s.Leases, fmt.Sprintf("%s %s", l.Address, l.Owner))
	}
	slices.Sort(s.Leases)
	return s, nil
}

func (s *Snapshot) readKernel(h *netlink.Handle) error {
	links, err := again(h.LinkList)
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	names := map[int]string{}
	for _, l := range links {
		at := l.Attrs()
		names[at.Index] = at.Name
		s.Links = append(s.Links, fmt.Sprintf("%s %s %s mtu %d", at.Name, l.Type(), at.HardwareAddr, at.MTU))
	}
	for _, fam := range []int{unix.AF_INET, unix.AF_INET6} {
		routes, err := again(func() ([]netlink.Route, error) {
			return h.RouteListFiltered(fam, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return fmt.Errorf("list routes: %w", err)
		}
		for _, r := range routes {
			if r.Protocol == unix.RTPROT_KERNEL {
				continue // those of link-local addresses come some time after their link
			}
			s.Routes = append(s.Routes, fmt.Sprintf("%v dev %s table %d proto %d type %d", r.Dst, names[r.LinkIndex], r.Table, r.Protocol, r.Type))
		}
		neighs, err := again(func() ([]netlink.Neigh, error) { return h.NeighList(0, fam) })
		if err != nil {
			return fmt.Errorf("list neighbours: %w", err)
		}
		for _, n := range neighs {
			if n.State&netlink.NUD_PERMANENT != 0 {
				s.Neighbours = append(s.Neighbours, fmt.Sprintf("%s dev %s %s", n.IP, names[n.LinkIndex], n.HardwareAddr))
			}
		}
	}
	for _, list := range [][]string{s.Links, s.Routes, s.Neighbours} {
		slices.Sort(list)
	}
	return nil
}
