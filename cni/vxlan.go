package cni

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The mesh's devices. Their names do not begin with "nft": that prefix is of pods' interfaces, and
// what comes from one that is not bound is dropped.
const (
	VXLANDevice4 = "vxnftcni4" // between IPv4 addresses of nodes
	VXLANDevice6 = "vxnftcni6" // between IPv6 addresses of nodes
	// WireGuardPrefix and a digit are the names of the WireGuard devices. There is one, and up to
	// four while keys are being rotated (keyring).
	WireGuardPrefix = "wgnftcni"

	meshDeviceCount = 2 + wireGuardDevices
)

func allMeshDevices() []string {
	list := []string{VXLANDevice4, VXLANDevice6}
	for i := range wireGuardDevices {
		list = append(list, wireGuardDevice(i))
	}
	return list
}

// hwAddr is a MAC address that compares.
type hwAddr [6]byte

func (a hwAddr) String() string { return net.HardwareAddr(a[:]).String() }

// vxlanMAC is the MAC address of the device of the node that has the underlay address a: every node
// computes it from the Node object, nobody has to publish or learn it. It is unicast and locally
// administered; 46 bits of hash make two of 10,000 nodes meet with a chance of less than one in a
// million.
func vxlanMAC(a netip.Addr) hwAddr {
	sum := sha256.Sum256([]byte("nftcni vxlan " + a.String()))
	mac := hwAddr(sum[:6])
	mac[0] = mac[0]&^1 | 2
	return mac
}

// vxlanDevice is the device of an underlay family.
func vxlanDevice(underlay netip.Addr) string {
	if underlay.Is4() {
		return VXLANDevice4
	}
	return VXLANDevice6
}

// A tunnel is a device of the mesh as it should be.
type tunnel struct {
	local netip.Addr // underlay address of this node; invalid for WireGuard
	mtu   int        // 0: not known, an existing device keeps its own
	addrs []netip.Addr
	fdb   map[hwAddr]netip.Addr // MAC of a peer's device to the peer's underlay address
	neigh map[netip.Addr]hwAddr // gateway inside the tunnel to the MAC of the peer's device
}

// newVXLAN describes a device that floods and learns nothing. The source port is the kernel's
// default, a hash of the inner flow over the ephemeral range (RFC 7348, 5). The outer UDP checksum
// stays on over both families: the kernel gets it for free from the inner one (local checksum
// offload), and a receiver whose card has verified it need not sum the inner packet. The checksum
// fault of NAT on VXLAN that made others turn offloads off is mended since Linux 5.8.
func (c *MeshConfig) newVXLAN(name string, t *tunnel) *netlink.Vxlan {
	mac := vxlanMAC(t.local)
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr = name, mac[:]
	attrs.MTU = orDefault(t.mtu, 1280)
	return &netlink.Vxlan{LinkAttrs: attrs, VxlanId: int(c.VNI), Port: int(c.Port), SrcAddr: t.local.AsSlice(), UDPCSum: true}
}

// sameVXLAN tells whether a device has what cannot be changed while it lives.
func (c *MeshConfig) sameVXLAN(l netlink.Link, t *tunnel) bool {
	v, ok := l.(*netlink.Vxlan)
	if !ok {
		return false
	}
	local, _ := netip.AddrFromSlice(v.SrcAddr)
	return v.VxlanId == int(c.VNI) && v.Port == int(c.Port) && local.Unmap() == t.local &&
		!v.Learning && !v.FlowBased && !v.GBP && !v.Proxy && !v.L2miss && !v.L3miss && v.VtepDevIndex == 0 && v.Group == nil
}

func (c *MeshConfig) vxlanError(name string, err error) error {
	switch {
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("create %s: this kernel has no VXLAN: load the module vxlan, or set mesh mode to direct: %w", name, err)
	case errors.Is(err, unix.EEXIST), errors.Is(err, unix.EADDRINUSE):
		return fmt.Errorf("create %s: another program uses UDP port %d or VNI %d on this node: set mesh port or vni on all nodes: %w", name, c.Port, c.VNI, err)
	}
	return fmt.Errorf("create %s: %w", name, err)
}
