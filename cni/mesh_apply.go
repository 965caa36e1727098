package cni

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// pass compares what is wanted with what the kernel holds and writes the differences. The caller
// holds m.mu.
func (m *Mesh) pass(ctx context.Context) (Report, error) {
	view, err := m.readLinks()
	if err != nil {
		return m.report, err
	}
	want, report, err := m.cfg.planMesh(m.self, m.peers, view)
	if err != nil {
		return m.report, err
	}
	report.Writes, err = m.apply(ctx, view, want)
	m.report = report
	if report.Rotating > 0 && report.Writes > 0 {
		select {
		case m.rotated <- struct{}{}:
		default:
		}
	}
	return report, err
}

// A meshWriter applies one state. It goes on after an error, so that one refused entry does not
// keep the others out, and gives all errors together.
type meshWriter struct {
	*Mesh
	ctx    context.Context
	view   *meshView
	writes int
	errs   []error
}

// do makes one change unless the pass was cancelled.
func (w *meshWriter) do(what string, change func() error) bool {
	err := w.ctx.Err()
	if err == nil {
		w.writes++
		err = change()
	}
	if err != nil {
		w.errs = append(w.errs, fmt.Errorf("%s: %w", what, err))
	}
	return err == nil
}

// apply works from the bottom up: devices and their addresses, then neighbours, then routes into
// them; and takes away from the top down, so that no route ever leads where nothing is.
func (m *Mesh) apply(ctx context.Context, view *meshView, want *meshState) (int, error) {
	w := &meshWriter{Mesh: m, ctx: ctx, view: view}
	for _, name := range allMeshDevices() {
		if t := want.tunnels[name]; t != nil {
			w.device(name, t)
		}
	}
	if m.wg != nil {
		n, err := m.wg.apply(ctx, view.wg, want.wgPeers)
		w.writes += n
		w.fail(err)
	}
	stale := map[string]tunnelEntries{}
	for name, t := range want.tunnels {
		if l, ok := view.links[name]; ok && !isWireGuardDevice(name) {
			stale[name] = w.entries(l.Attrs().Index, t)
		}
	}
	w.routes(want.routes)
	for name, s := range stale {
		w.dropEntries(view.links[name].Attrs().Index, s)
	}
	w.dropDevices(want)
	for i, name := range allMeshDevices() {
		m.tunnels[i].Store(int32(view.index(name)))
	}
	return w.writes, errors.Join(w.errs...)
}

func (w *meshWriter) fail(err error) {
	if err != nil {
		w.errs = append(w.errs, err)
	}
}

// device makes or mends one tunnel device.
func (w *meshWriter) device(name string, t *tunnel) {
	l, exists := w.view.links[name]
	if exists && !isWireGuardDevice(name) && !w.cfg.sameVXLAN(l.Link, t) {
		if !w.do("replace "+name, func() error { return w.kernel.LinkDel(l.Link) }) {
			return
		}
		w.forget(name)
		exists = false
	}
	if !exists && !w.create(name, t) {
		return
	}
	w.mend(name, t)
	w.addresses(w.view.links[name].Link, t.addrs)
}

func (w *meshWriter) forget(name string) {
	delete(w.view.names, w.view.links[name].Attrs().Index)
	delete(w.view.links, name)
}

func (w *meshWriter) create(name string, t *tunnel) bool {
	ok := w.do("mesh", func() error {
		if isWireGuardDevice(name) {
			delete(w.view.wg, name)
			return w.wg.create(w.kernel, name)
		}
		if err := w.kernel.LinkAdd(w.cfg.newVXLAN(name, t)); err != nil {
			return w.cfg.vxlanError(name, err)
		}
		return nil
	})
	if !ok {
		return false
	}
	l, err := w.kernel.LinkByName(name)
	if err != nil {
		w.fail(fmt.Errorf("read %s: %w", name, err))
		return false
	}
	w.view.links[name] = meshLink{Link: l, mtu: l.Attrs().MTU}
	w.view.names[l.Attrs().Index] = name
	return true
}

// mend puts right what can change while the device lives.
func (w *meshWriter) mend(name string, t *tunnel) {
	l := w.view.links[name]
	a := l.Attrs()
	if mac := vxlanMAC(t.local); !isWireGuardDevice(name) && !slices.Equal(a.HardwareAddr, mac[:]) {
		w.do("set address of "+name, func() error { return w.kernel.LinkSetHardwareAddr(l.Link, mac[:]) })
	}
	if t.mtu != 0 && a.MTU != t.mtu {
		w.do(fmt.Sprintf("set MTU of %s to %d", name, t.mtu), func() error { return w.kernel.LinkSetMTU(l.Link, t.mtu) })
	}
	if a.RawFlags&unix.IFF_UP == 0 {
		if !isWireGuardDevice(name) { // no link-local address: nobody speaks to it, and it would only be announced
			w.fail(noLinkLocal(w.kernel, l.Link))
		}
		w.do("set "+name+" up", func() error { return w.kernel.LinkSetUp(l.Link) })
	}
}

// noLinkLocal keeps the kernel from giving the device an address of its own. Without IPv6 there is
// nothing to keep it from.
func noLinkLocal(kernel *netlink.Handle, l netlink.Link) error {
	const addrGenNone = 1 // IN6_ADDR_GEN_MODE_NONE, linux/if_link.h
	if err := kernel.LinkSetIP6AddrGenMode(l, addrGenNone); err != nil && !errors.Is(err, unix.EAFNOSUPPORT) && !errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("set %s to no link-local address: %w", l.Attrs().Name, err)
	}
	return nil
}

// addresses gives a device the host's addresses inside the tunnel. They are on the device and not
// on lo because masquerading takes the address of the device a packet leaves through.
func (w *meshWriter) addresses(l netlink.Link, want []netip.Addr) {
	have, err := again(func() ([]netlink.Addr, error) { return w.kernel.AddrList(l, netlink.FAMILY_ALL) })
	if err != nil {
		w.fail(fmt.Errorf("list addresses of %s: %w", l.Attrs().Name, err))
		return
	}
	found := map[netip.Addr]bool{}
	for _, a := range have {
		addr, _ := netip.AddrFromSlice(a.IP)
		addr = addr.Unmap()
		bits, _ := a.Mask.Size()
		if bits == addr.BitLen() && slices.Contains(want, addr) {
			found[addr] = true
		} else if !addr.IsLinkLocalUnicast() {
			w.do(fmt.Sprintf("remove %s from %s", a.IPNet, l.Attrs().Name), func() error { return w.kernel.AddrDel(l, &a) })
		}
	}
	for _, addr := range want {
		if !found[addr] {
			a := netlink.Addr{IPNet: hostNet(addr)}
			if addr.Is6() {
				a.Flags = unix.IFA_F_NODAD | unix.IFA_F_NOPREFIXROUTE
			}
			w.do(fmt.Sprintf("add %s to %s", addr, l.Attrs().Name), func() error { return w.kernel.AddrReplace(l, &a) })
		}
	}
}

// dropDevices removes the devices that no peer needs.
func (w *meshWriter) dropDevices(want *meshState) {
	for _, name := range allMeshDevices() {
		l, exists := w.view.links[name]
		if !exists || want.tunnels[name] != nil {
			continue
		}
		if w.do("remove "+name, func() error { return gone(w.kernel.LinkDel(l.Link)) }) {
			w.forget(name)
		}
	}
}

func hardware(a net.HardwareAddr) (hwAddr, bool) {
	if len(a) != len(hwAddr{}) {
		return hwAddr{}, false
	}
	return hwAddr(a), true
}
