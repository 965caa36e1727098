package cni

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// codeDiffers is the error code of a CHECK that found the attachment other than ADD left
// it (codes from 100 are a plugin's own).
const codeDiffers uint = 101

// check compares the attachment with what ADD made of it (CNI specification, section 4,
// CHECK) and names every difference.
func (p *Plugin) check(ctx context.Context, c *call) error {
	if c.conf.prevResult == nil {
		return wrong("prevResult: is missing; CHECK compares with the result of ADD")
	}
	r, err := readRecord(c.conf.RunDir, HostInterface(c.containerID, c.ifname))
	if errors.Is(err, fs.ErrNotExist) || err == nil && (r.Pending || r.Deleting) {
		return types.NewError(types.ErrUnknownContainer, fmt.Sprintf(
			"container %s has no interface %s in network %s; delete the pod and make it again", c.containerID, c.ifname, c.conf.Name), "")
	}
	if err != nil {
		return err
	}
	w, err := openWire(c.netns)
	if err != nil {
		return badEnv("CNI_NETNS: %v", err)
	}
	defer w.close()
	k := checking{Plugin: p, call: c, record: r, wire: w}
	for _, part := range []func(context.Context) error{
		k.checkResult, k.checkHostLink, k.checkPodLink, k.checkPodAddresses, k.checkRoutes, k.checkNeighbours, k.checkSysctls, k.checkBandwidth, k.checkLease, k.checkBinding} {
		if err := part(ctx); err != nil {
			return err
		}
	}
	if len(k.found) > 0 {
		return types.NewError(codeDiffers, fmt.Sprintf("container %s interface %s: %s; delete the pod and make it again",
			c.containerID, c.ifname, strings.Join(k.found, "; ")), "")
	}
	return nil
}

// checking collects differences.
type checking struct {
	*Plugin
	*call
	record record
	wire   *wire
	found  []string
}

func (k *checking) differ(format string, args ...any) {
	k.found = append(k.found, fmt.Sprintf(format, args...))
}

// checkResult compares the record with what the runtime kept of ADD's result.
func (k *checking) checkResult(context.Context) error {
	var kept []netip.Addr
	for _, ip := range k.conf.prevResult.IPs {
		if ip.Interface == nil || *ip.Interface < 0 || *ip.Interface >= len(k.conf.prevResult.Interfaces) {
			continue
		}
		in := k.conf.prevResult.Interfaces[*ip.Interface]
		if a, ok := netip.AddrFromSlice(ip.Address.IP); ok && in.Name == k.ifname && in.Sandbox != "" {
			kept = append(kept, a.Unmap())
		}
	}
	for _, a := range k.record.Addresses {
		if !slices.Contains(kept, a) {
			k.differ("address %s is not in prevResult", a)
		}
	}
	for _, a := range kept {
		if !slices.Contains(k.record.Addresses, a) {
			k.differ("address %s of prevResult is not ours", a)
		}
	}
	w := k.wire
	w.hostName, w.name, w.addresses = k.record.HostInterface, k.ifname, k.record.Addresses
	var err, podErr error
	w.hostMAC, err = net.ParseMAC(k.record.HostMAC)
	w.podMAC, podErr = net.ParseMAC(k.record.PodMAC)
	return errors.Join(err, podErr)
}

func (k *checking) checkHostLink(context.Context) (err error) {
	k.wire.hostLink, err = k.compareLink("node", k.wire.host, k.wire.hostName, k.record.HostMAC)
	return err
}

func (k *checking) checkPodLink(context.Context) (err error) {
	k.wire.inside, err = k.compareLink("pod", k.wire.pod, k.wire.name, k.record.PodMAC)
	return err
}

// compareLink returns the link's index, 0 when it is missing.
func (k *checking) compareLink(where string, h *netlink.Handle, name, mac string) (int, error) {
	link, err := h.LinkByName(name)
	if err != nil {
		if err := ignoreNoLink(err); err != nil {
			return 0, fmt.Errorf("find link %s on the %s's side: %w", name, where, err)
		}
		k.differ("link %s is missing on the %s's side", name, where)
		return 0, nil
	}
	at := link.Attrs()
	if at.MTU != k.record.MTU {
		k.differ("MTU of %s is %d, want %d", name, at.MTU, k.record.MTU)
	}
	if at.HardwareAddr.String() != mac {
		k.differ("MAC of %s is %s, want %s", name, at.HardwareAddr, mac)
	}
	if at.Flags&net.FlagUp == 0 {
		k.differ("link %s is down", name)
	}
	return at.Index, nil
}

func (k *checking) checkPodAddresses(context.Context) error {
	if k.wire.inside == 0 {
		return nil
	}
	have, err := again(func() ([]netlink.Addr, error) { return k.wire.pod.AddrList(linkAt(k.wire.inside), unix.AF_UNSPEC) })
	if err != nil {
		return fmt.Errorf("list addresses of %s: %w", k.ifname, err)
	}
	for _, a := range k.record.Addresses {
		if !slices.ContainsFunc(have, func(h netlink.Addr) bool { return h.IPNet.String() == hostNet(a).String() }) {
			k.differ("address %s is missing in the pod", a)
		}
	}
	return nil
}

func (k *checking) checkRoutes(context.Context) error {
	var prefixes []netip.Prefix
	for _, r := range k.conf.prevResult.Routes {
		if p, ok := prefixOf(r.Dst.IP, r.Dst.Mask); ok && slices.Contains(k.gatewaysAsIP(), r.GW.String()) {
			prefixes = append(prefixes, p)
		}
	}
	if k.wire.inside != 0 {
		if err := k.compareRoutes("in the pod", k.wire.pod, k.wire.inside, k.wire.podRoutes(prefixes)); err != nil {
			return err
		}
	}
	if k.wire.hostLink == 0 {
		return nil
	}
	var want []netlink.Route
	for _, a := range k.record.Addresses {
		want = append(want, hostRoute(k.wire.hostLink, a))
	}
	return k.compareRoutes("on the node", k.wire.host, k.wire.hostLink, want)
}

func (k *checking) gatewaysAsIP() []string {
	v4, v6 := gateways()
	return []string{v4.String(), v6.String()}
}

func (k *checking) compareRoutes(where string, h *netlink.Handle, link int, want []netlink.Route) error {
	var have []netlink.Route
	for _, fam := range []int{unix.AF_INET, unix.AF_INET6} {
		list, err := again(func() ([]netlink.Route, error) {
			return h.RouteListFiltered(fam, &netlink.Route{LinkIndex: link}, netlink.RT_FILTER_OIF)
		})
		if err != nil {
			return fmt.Errorf("list routes %s: %w", where, err)
		}
		have = append(have, list...)
	}
	for _, w := range want {
		if !slices.ContainsFunc(have, func(h netlink.Route) bool {
			return h.Dst.String() == w.Dst.String() && h.Gw.Equal(w.Gw) && h.Type == unix.RTN_UNICAST
		}) {
			k.differ("route %s is missing %s", w.Dst, where)
		}
	}
	return nil
}

func (k *checking) checkNeighbours(context.Context) error {
	for _, side := range []struct {
		where string
		h     *netlink.Handle
		link  int
		want  []netlink.Neigh
	}{{"in the pod", k.wire.pod, k.wire.inside, k.wire.podNeighbours()}, {"on the node", k.wire.host, k.wire.hostLink, k.wire.hostNeighbours()}} {
		if side.link == 0 {
			continue
		}
		have, err := again(func() ([]netlink.Neigh, error) { return side.h.NeighList(side.link, unix.AF_UNSPEC) })
		if err != nil {
			return fmt.Errorf("list neighbours %s: %w", side.where, err)
		}
		for _, w := range side.want {
			if !slices.ContainsFunc(have, func(h netlink.Neigh) bool {
				return h.IP.Equal(w.IP) && h.State&netlink.NUD_PERMANENT != 0 && h.HardwareAddr.String() == w.HardwareAddr.String()
			}) {
				k.differ("neighbour %s is missing or changed %s", w.IP, side.where)
			}
		}
	}
	return nil
}

func (k *checking) checkSysctls(context.Context) error {
	has4, has6 := k.wire.families()
	if k.wire.hostLink != 0 {
		bad, err := differing(hostSettings(k.wire.hostName, has4, has6, fromLoopback(k.record.HostPorts)))
		if err != nil {
			return err
		}
		k.found = append(k.found, bad...)
	}
	if k.wire.inside == 0 {
		return nil
	}
	want := podSettings(k.ifname, has6)
	for key, value := range k.conf.Sysctl {
		path, err := sysctlPath(key, k.ifname)
		if err != nil {
			return wrong("sysctl: %v", err)
		}
		want = append(want, setting{path, value})
	}
	return inNetNS(k.wire.podNS, func() error {
		bad, err := differing(want)
		k.found = append(k.found, bad...)
		return err
	})
}

func (k *checking) checkLease(ctx context.Context) error {
	if k.record.Delegate != nil {
		return k.delegate().run(ctx, "CHECK", k.record, k.Stderr)
	}
	s, err := store(k.conf.RunDir, k.record.StateDir, k.report)
	if err != nil {
		return err
	}
	held, err := s.Of(ctx, k.record.owner())
	if err != nil {
		return err
	}
	leased := map[netip.Addr]bool{}
	for _, l := range held {
		leased[l.Address] = true
	}
	for _, a := range k.record.Addresses {
		if !leased[a] {
			k.differ("lease of %s is missing", a)
		}
	}
	return nil
}

// checkBinding asks the agent. One that is too old to be asked is no difference.
func (k *checking) checkBinding(ctx context.Context) error {
	agent := NewClient(k.conf.RunDir)
	err := agent.Bound(ctx, k.record.Attachment)
	var refused *Error
	switch {
	case errors.As(err, &refused) && refused.Code == types.ErrUnknownContainer:
		k.differ("policy: %s", refused.Message)
	case errors.As(err, &refused) && refused.Code == 0 && strings.HasPrefix(refused.Message, "404"):
		k.report("the agent cannot tell whether an attachment is bound: its policy was not checked")
	case errors.Is(err, ErrNoAgent):
		return tryLater("%v", err)
	default:
		return err
	}
	return nil
}
