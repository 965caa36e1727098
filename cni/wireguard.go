package cni

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

type wgKey = wgtypes.Key

// wireGuardDevices is one for each pair of parities of this node's and a peer's key.
const wireGuardDevices = 4

func wireGuardDevice(i int) string { return WireGuardPrefix + strconv.Itoa(i) }

func isWireGuardDevice(name string) bool { return strings.HasPrefix(name, WireGuardPrefix) }

// A wgPeer is one peer as a device should have it.
type wgPeer struct {
	endpoint  netip.AddrPort
	allowed   []netip.Prefix // exactly its pod networks
	keepalive bool           // make a session although nothing is sent: the route is still on another device
}

// handshakeNow makes the kernel start a session at once, and again until there is one.
const handshakeNow = time.Second

func (p wgPeer) interval() time.Duration {
	if p.keepalive {
		return handshakeNow
	}
	return 0
}

// A wireGuard is the devices' configuration interface and this node's keys.
type wireGuard struct {
	client *wgctrl.Client
	keys   keyring // private
	port   uint16
	ns     int
	// told is the endpoint this process last gave a peer. The kernel replaces it by the address a
	// peer's packets really come from, and that must not look like a difference.
	told map[string]map[wgKey]netip.AddrPort
}

func openWireGuard(kernel *netlink.Handle, cfg MeshConfig) (*wireGuard, error) {
	keys, err := loadPrivateKeys(cfg.StateDir)
	if err != nil {
		return nil, err
	}
	w := &wireGuard{keys: keys, port: cfg.WireGuardPort, ns: cfg.NetNS, told: map[string]map[wgKey]netip.AddrPort{}}
	if err := w.probe(kernel); err != nil {
		return nil, err
	}
	if w.client, err = wgClient(cfg.NetNS); err != nil {
		return nil, fmt.Errorf("open the kernel's WireGuard interface: %w", err)
	}
	return w, nil
}

// probe makes a device unless one is there: no question tells so surely whether the kernel can.
func (w *wireGuard) probe(kernel *netlink.Handle) error {
	for i := range wireGuardDevices {
		if _, err := kernel.LinkByName(wireGuardDevice(i)); err == nil {
			return nil
		}
	}
	return w.create(kernel, wireGuardDevice(3*w.keys.newest))
}

func (w *wireGuard) create(kernel *netlink.Handle, name string) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	err := kernel.LinkAdd(&netlink.Wireguard{LinkAttrs: attrs})
	switch {
	case err == nil:
		return w.looseReversePath(name)
	case errors.Is(err, unix.EEXIST):
		return nil
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("mesh encrypt is wireguard and kernel %s has no WireGuard: load the module wireguard (Linux 5.6 and newer, CONFIG_WIREGUARD), or set mesh encrypt to none: %w", kernelRelease(), err)
	}
	return fmt.Errorf("create %s: %w", name, err)
}

// looseReversePath lets a peer send through one device while we still answer through another.
// Allowed IPs check the source of every packet better than rp_filter does.
func (w *wireGuard) looseReversePath(name string) error {
	write := func() error {
		err := os.WriteFile(filepath.Join("/proc/sys/net/ipv4/conf", name, "rp_filter"), []byte("2"), 0o644)
		if errors.Is(err, fs.ErrNotExist) {
			return nil // no IPv4
		}
		return err
	}
	err := error(nil)
	if w.ns == 0 {
		err = write()
	} else {
		err = inNetNS(netns.NsHandle(w.ns), write)
	}
	if err != nil {
		return fmt.Errorf("loosen rp_filter of %s: %w", name, err)
	}
	return nil
}

func kernelRelease() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "(unknown)"
	}
	return unix.ByteSliceToString(u.Release[:])
}

// wgClient opens the generic netlink socket inside a namespace; wgctrl has no option for that.
func wgClient(ns int) (*wgctrl.Client, error) {
	if ns == 0 {
		return wgctrl.New()
	}
	var client *wgctrl.Client
	err := inNetNS(netns.NsHandle(ns), func() (err error) {
		client, err = wgctrl.New()
		return err
	})
	return client, err
}

func (w *wireGuard) close() { _ = w.client.Close() }

// read asks for every device of ours that is there.
func (w *wireGuard) read(v *meshView) (map[string]*wgtypes.Device, error) {
	found := map[string]*wgtypes.Device{}
	for i := range wireGuardDevices {
		name := wireGuardDevice(i)
		if _, ok := v.links[name]; !ok {
			continue
		}
		d, err := w.client.Device(name)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("read %s: %w", name, err)
		}
		if err == nil {
			found[name] = d
		}
	}
	return found, nil
}

// apply gives the devices their keys, ports and the differences of their peers.
func (w *wireGuard) apply(ctx context.Context, have map[string]*wgtypes.Device, want map[string]map[wgKey]wgPeer) (writes int, err error) {
	var errs []error
	for i := range wireGuardDevices {
		name := wireGuardDevice(i)
		if want[name] == nil {
			delete(w.told, name)
			continue
		}
		n, err := w.configure(ctx, i, have[name], want[name])
		writes += n
		errs = append(errs, err)
	}
	return writes, errors.Join(errs...)
}

func (w *wireGuard) configure(ctx context.Context, i int, have *wgtypes.Device, want map[wgKey]wgPeer) (writes int, err error) {
	name := wireGuardDevice(i)
	if have == nil {
		have = &wgtypes.Device{}
	}
	var change wgtypes.Config
	if key := w.keys.key[i/2]; have.PrivateKey != key {
		change.PrivateKey = &key
		writes++
	}
	if port := int(w.port) + i; have.ListenPort != port {
		change.ListenPort = &port
		writes++
	}
	change.Peers = w.diff(name, have.Peers, want)
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	if writes += len(change.Peers); writes > 0 {
		if err := w.client.ConfigureDevice(name, change); err != nil {
			return 0, fmt.Errorf("configure %s (UDP port %d): %w", name, int(w.port)+i, err)
		}
	}
	w.told[name] = make(map[wgKey]netip.AddrPort, len(want))
	for key, p := range want {
		w.told[name][key] = p.endpoint
	}
	return writes, nil
}

// diff lists removals first: an allowed network belongs to one peer, and moves to whom it was given
// last.
func (w *wireGuard) diff(name string, have []wgtypes.Peer, want map[wgKey]wgPeer) []wgtypes.PeerConfig {
	var changes []wgtypes.PeerConfig
	known := make(map[wgKey]wgtypes.Peer, len(have))
	for _, p := range have {
		known[p.PublicKey] = p
		if _, ok := want[p.PublicKey]; !ok {
			changes = append(changes, wgtypes.PeerConfig{PublicKey: p.PublicKey, Remove: true})
		}
	}
	for _, key := range slices.SortedFunc(maps.Keys(want), func(a, b wgKey) int { return slices.Compare(a[:], b[:]) }) {
		p, exists := known[key]
		interval := want[key].interval()
		if exists && sameNets(p.AllowedIPs, want[key].allowed) && w.hasEndpoint(name, p, want[key].endpoint) && p.PersistentKeepaliveInterval == interval {
			continue
		}
		c := wgtypes.PeerConfig{PublicKey: key, ReplaceAllowedIPs: true, PersistentKeepaliveInterval: &interval,
			Endpoint: net.UDPAddrFromAddrPort(want[key].endpoint)}
		for _, a := range want[key].allowed {
			c.AllowedIPs = append(c.AllowedIPs, *ipNet(a))
		}
		changes = append(changes, c)
	}
	return changes
}

func (w *wireGuard) hasEndpoint(name string, p wgtypes.Peer, want netip.AddrPort) bool {
	if p.Endpoint == nil {
		return false
	}
	have := p.Endpoint.AddrPort()
	return w.told[name][p.PublicKey] == want || netip.AddrPortFrom(have.Addr().Unmap(), have.Port()) == want
}

func sameNets(have []net.IPNet, want []netip.Prefix) bool {
	if len(have) != len(want) {
		return false
	}
	for _, n := range have {
		a, _ := netip.AddrFromSlice(n.IP)
		bits, _ := n.Mask.Size()
		if !slices.Contains(want, netip.PrefixFrom(a.Unmap(), bits)) {
			return false
		}
	}
	return true
}
