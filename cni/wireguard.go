package cni

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

type wgKey = wgtypes.Key

// A wgPeer is one peer as the device should have it.
type wgPeer struct {
	endpoint netip.AddrPort
	allowed  []netip.Prefix // exactly its pod networks
}

// A wireGuard is the device's configuration interface and this node's key.
type wireGuard struct {
	client *wgctrl.Client
	key    wgKey
	port   uint16
	dir    string
	// told is the endpoint this process last gave a peer. The kernel replaces it by the address a peer's
	// packets really come from, and that must not look like a difference.
	told map[wgKey]netip.AddrPort
}

func openWireGuard(kernel *netlink.Handle, cfg MeshConfig) (*wireGuard, error) {
	key, err := loadPrivateKey(cfg.StateDir)
	if err != nil {
		return nil, err
	}
	if err := createWireGuard(kernel); err != nil {
		return nil, err
	}
	client, err := wgClient(cfg.NetNS)
	if err != nil {
		return nil, fmt.Errorf("open the kernel's WireGuard interface: %w", err)
	}
	return &wireGuard{client: client, key: key, port: cfg.WireGuardPort, dir: cfg.StateDir, told: map[wgKey]netip.AddrPort{}}, nil
}

// createWireGuard makes the device if there is none: no question tells so surely whether the kernel can.
func createWireGuard(kernel *netlink.Handle) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = WireGuardDevice
	err := kernel.LinkAdd(&netlink.Wireguard{LinkAttrs: attrs})
	switch {
	case err == nil, errors.Is(err, unix.EEXIST):
		return nil
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("mesh encrypt is wireguard and kernel %s has no WireGuard: load the module wireguard (Linux 5.6 and newer, CONFIG_WIREGUARD), or set mesh encrypt to none: %w", kernelRelease(), err)
	}
	return fmt.Errorf("create %s: %w", WireGuardDevice, err)
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

// encrypted plans the networks of one peer for WireGuard. False: it has no key, and plaintext is allowed.
func (p *meshPlan) encrypted(m member) bool {
	key, err := wgtypes.ParseKey(m.PublicKey)
	if _, taken := p.state.wgPeers[key]; err == nil && taken {
		err = errors.New("another node has it")
	}
	if err == nil && (key == wgKey{} || key == p.view.key) {
		err = errors.New("it is all zero, or this node's own")
	}
	endpoint, path, ok := p.endpoint(m)
	switch {
	case m.PublicKey == "" && p.cfg.AllowPlaintext:
		return false
	case m.PublicKey == "":
		p.unreachable(m, "its public key is not known, and nothing leaves for it in the clear: see whether its agent runs with encryption")
		return true
	case err != nil:
		p.unreachable(m, "its public key cannot be used (%v): its agent has to publish it again", err)
		return true
	case !ok:
		p.unreachable(m, "no address family in common: it has %v, this node %v", m.addrs.list(), p.rep.Addrs)
		return true
	}
	t := p.device(WireGuardDevice, netip.Addr{})
	p.state.wgPeers[key] = wgPeer{endpoint, m.PodCIDRs}
	for _, cidr := range m.PodCIDRs {
		p.state.routes[routeKey{cidr, meshMetric}] = meshRoute{link: WireGuardDevice, src: p.host[familyIndex(cidr.Addr())]}
		p.fence(cidr) // without the device nothing may take the default route in the clear
		p.through(t, PeerPath{Peer: m.Name, PodCIDR: cidr, Via: ViaWireGuard, Address: endpoint.Addr()}, path, wireGuardOverhead(endpoint.Addr()))
	}
	return true
}

// endpoint is where a peer is sent to: over IPv4, which costs less, if both have it.
func (p *meshPlan) endpoint(m member) (netip.AddrPort, meshPath, bool) {
	for i := range p.addrs {
		if p.addrs[i].IsValid() && m.addrs[i].IsValid() {
			path := p.pathTo(m, m.addrs[i])
			return netip.AddrPortFrom(m.addrs[i], p.cfg.WireGuardPort), path, !path.local
		}
	}
	return netip.AddrPort{}, meshPath{}, false
}

func (p *meshPlan) unreachable(m member, format string, args ...any) {
	p.rep.problem(m.Name, format, args...)
	for _, cidr := range m.PodCIDRs {
		p.state.routes[routeKey{cidr, meshMetric}] = meshRoute{unreachable: true}
		p.rep.Paths = append(p.rep.Paths, PeerPath{Peer: m.Name, PodCIDR: cidr, Via: ViaUnreachable})
	}
}

// apply gives the device its key and port and the differences of its peers, in one message if they fit.
func (w *wireGuard) apply(ctx context.Context, want map[wgKey]wgPeer) (writes int, err error) {
	have, err := w.client.Device(WireGuardDevice)
	if err != nil {
		return 0, fmt.Errorf("read %s: %w", WireGuardDevice, err)
	}
	var change wgtypes.Config
	if have.PrivateKey != w.key {
		change.PrivateKey = &w.key
		writes++
	}
	if port := int(w.port); have.ListenPort != port {
		change.ListenPort = &port
		writes++
	}
	change.Peers = w.diff(have.Peers, want)
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	if writes += len(change.Peers); writes > 0 {
		if err := w.client.ConfigureDevice(WireGuardDevice, change); err != nil {
			return 0, fmt.Errorf("configure %s (UDP port %d): %w", WireGuardDevice, w.port, err)
		}
	}
	w.told = make(map[wgKey]netip.AddrPort, len(want))
	for key, p := range want {
		w.told[key] = p.endpoint
	}
	return writes, nil
}

// diff lists removals first: an allowed network belongs to one peer, and moves to whom it was given last.
func (w *wireGuard) diff(have []wgtypes.Peer, want map[wgKey]wgPeer) []wgtypes.PeerConfig {
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
		if exists && sameNets(p.AllowedIPs, want[key].allowed) && w.hasEndpoint(p, want[key].endpoint) {
			continue
		}
		c := wgtypes.PeerConfig{PublicKey: key, ReplaceAllowedIPs: true, Endpoint: net.UDPAddrFromAddrPort(want[key].endpoint)}
		for _, a := range want[key].allowed {
			c.AllowedIPs = append(c.AllowedIPs, *ipNet(a))
		}
		changes = append(changes, c)
	}
	return changes
}

func (w *wireGuard) hasEndpoint(p wgtypes.Peer, want netip.AddrPort) bool {
	if p.Endpoint == nil {
		return false
	}
	have := p.Endpoint.AddrPort()
	return w.told[p.PublicKey] == want || netip.AddrPortFrom(have.Addr().Unmap(), have.Port()) == want
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

// privateKeyFile is in the state directory, base64 like the files of wg(8).
const privateKeyFile = "wireguard.key"

func keyPath(dir string) string { return dir + string(os.PathSeparator) + privateKeyFile }
