package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Addresses of the demo's link between the node and the outside host.
var (
	nodePrefixes    = []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24"), netip.MustParsePrefix("2001:db8::1/64")}
	outsidePrefixes = []netip.Prefix{netip.MustParsePrefix("192.0.2.2/24"), netip.MustParsePrefix("2001:db8::2/64")}
)

// newNetNS makes a network namespace without a name: it lives as long as its
// descriptor, this process and the processes in it. Its loopback is up.
func newNetNS() (int, error) {
	self, err := ownNetNS()
	if err != nil {
		return -1, err
	}
	defer unix.Close(self)
	fd := -1
	err = inNetNS(self, func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make network namespace: %w", err)
		}
		if err := linkUp("lo"); err != nil {
			return err
		}
		fd, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		return err
	})
	return fd, err
}

// netnsPath is the path under which another process finds the namespace of fd.
func netnsPath(fd int) string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd) }

func linkUp(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find link %s: %w", name, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set link %s up: %w", name, err)
	}
	return nil
}

// privateRun hides /run of the host behind an empty tmpfs that only this process and
// its children see, so that every file of the node vanishes with them.
func privateRun() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755"); err != nil {
		return fmt.Errorf("mount a tmpfs on /run: %w", err)
	}
	return nil
}

// setUpNode makes the calling process's network namespace a node: forwarding, and an
// uplink to the outside host's namespace, which gets the addresses of outside on its
// loopback and is the node's route to them. Those on the link itself it has anyway.
func setUpNode(outsideNS int, outside []netip.Addr) error {
	outside = slices.DeleteFunc(slices.Clone(outside), func(a netip.Addr) bool {
		return slices.ContainsFunc(outsidePrefixes, func(p netip.Prefix) bool { return p.Contains(a) })
	})
	for _, name := range []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"} {
		if err := os.WriteFile(filepath.Join("/proc/sys", name), []byte("1"), 0); err != nil {
			return fmt.Errorf("turn forwarding on: %w", err)
		}
	}
	if err := linkUp("lo"); err != nil {
		return err
	}
	uplink := &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: "uplink", MTU: 1500}, PeerName: "eth0", PeerNamespace: netlink.NsFd(outsideNS),
	}
	if err := netlink.LinkAdd(uplink); err != nil {
		return fmt.Errorf("make uplink: %w", err)
	}
	if err := errors.Join(noDAD("uplink"), addAddresses("uplink", nodePrefixes)); err != nil {
		return err
	}
	err := inNetNS(outsideNS, func() error {
		if err := errors.Join(noDAD("eth0"), addAddresses("eth0", outsidePrefixes)); err != nil {
			return err
		}
		var own []netip.Prefix
		for _, a := range outside {
			own = append(own, netip.PrefixFrom(a, a.BitLen()))
		}
		if err := addAddresses("lo", own); err != nil {
			return err
		}
		return errors.Join(
			addRoute("eth0", netip.MustParsePrefix("0.0.0.0/0"), nodePrefixes[0].Addr()),
			addRoute("eth0", netip.MustParsePrefix("::/0"), nodePrefixes[1].Addr()))
	})
	if err != nil {
		return fmt.Errorf("set up the outside host: %w", err)
	}
	if err := errors.Join(awaitCarrier("uplink"), inNetNS(outsideNS, func() error { return awaitCarrier("eth0") })); err != nil {
		return err
	}
	for _, a := range outside {
		via := outsidePrefixes[0].Addr()
		if a.Is6() {
			via = outsidePrefixes[1].Addr()
		}
		if err := addRoute("uplink", netip.PrefixFrom(a, a.BitLen()), via); err != nil {
			return err
		}
	}
	return nil
}

// awaitCarrier waits until the kernel has noticed that both ends of a veth are up, which
// it may do up to a second later: before that it does not join IPv6's multicast groups,
// and nobody finds the neighbour.
func awaitCarrier(name string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return fmt.Errorf("find link %s: %w", name, err)
		}
		if link.Attrs().OperState == netlink.OperUp {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("link %s has no carrier: %w", name, ctx.Err())
		}
	}
}

// noDAD turns duplicate address detection off: while a link-local address is tentative,
// which takes a second or two, the node cannot ask for the neighbours of what it forwards.
func noDAD(name string) error {
	if err := os.WriteFile(filepath.Join("/proc/sys/net/ipv6/conf", name, "accept_dad"), []byte("0"), 0); err != nil {
		return fmt.Errorf("turn duplicate address detection off: %w", err)
	}
	return nil
}

// addAddresses adds addresses without duplicate detection, usable at once, and sets
// the link up.
func addAddresses(name string, prefixes []netip.Prefix) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find link %s: %w", name, err)
	}
	for _, p := range prefixes {
		a := &netlink.Addr{IPNet: netlink.NewIPNet(p.Addr().AsSlice())}
		a.Mask = maskOf(p)
		if p.Addr().Is6() {
			a.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(link, a); err != nil {
			return fmt.Errorf("add %s to %s: %w", p, name, err)
		}
	}
	return linkUp(name)
}

func addRoute(name string, dst netip.Prefix, via netip.Addr) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find link %s: %w", name, err)
	}
	to := netlink.NewIPNet(dst.Addr().AsSlice())
	to.Mask = maskOf(dst)
	r := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: to, Gw: via.AsSlice()}
	if err := netlink.RouteAdd(r); err != nil {
		return fmt.Errorf("add route %s via %s: %w", dst, via, err)
	}
	return nil
}

func maskOf(p netip.Prefix) net.IPMask { return net.CIDRMask(p.Bits(), p.Addr().BitLen()) }

func addrsOf(prefixes []netip.Prefix) []netip.Addr {
	addrs := make([]netip.Addr, len(prefixes))
	for i, p := range prefixes {
		addrs[i] = p.Addr()
	}
	return addrs
}

// ownNetNS opens the network namespace of the calling process. It asks for the calling thread's:
// /proc/self is that of the main thread, which inNetNS may have left elsewhere.
func ownNetNS() (int, error) {
	fd, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open own network namespace: %w", err)
	}
	return fd, nil
}
