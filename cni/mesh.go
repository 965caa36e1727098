package cni

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// MeshMode is how packets of pods reach the pods of another node.
type MeshMode string

const (
	MeshAuto   MeshMode = "auto"   // MeshDirect where the peer is on a link of ours, MeshVXLAN otherwise
	MeshDirect MeshMode = "direct" // a route through the peer's address, which must be on a link of ours
	MeshVXLAN  MeshMode = "vxlan"  // VXLAN (RFC 7348) to every peer
	MeshNone   MeshMode = "none"   // somebody else routes the pods' networks: nothing is written
)

// MeshEncryption is what protects packets of pods between nodes.
type MeshEncryption string

const (
	EncryptNone      MeshEncryption = "none"
	EncryptWireGuard MeshEncryption = "wireguard" // the kernel's WireGuard, Linux 5.6 and newer
)

// Defaults of MeshConfig. The ports are neither Flannel's, Cilium's or Linux's own 8472, nor 4789
// of IANA, Calico, Antrea and Docker: during a migration both run on one node.
const (
	DefaultVXLANPort     = 4793
	DefaultVNI           = 157
	DefaultWireGuardPort = 4794 // to 4797
)

// kernelTimeout is for one answer of the kernel: without it a lost one would hold the mesh for
// ever.
const kernelTimeout = 10 * time.Second

// Metrics of the mesh's routes. Lower than what network daemons give their own, and another than
// the 0 of the routes to local pods, so that each finds what is its own.
const (
	meshMetric  = 64
	fenceMetric = 1 << 20 // unreachable routes that show when the real one is gone
)

// NodeAddress says which address of this node its peers send to. The first field that is set
// decides, for all families; if none is set, the addresses of the Node object are used
// (status.addresses of type InternalIP).
type NodeAddress struct {
	Addrs     []netip.Addr   // exactly these, at most one per family
	CIDRs     []netip.Prefix // the first address of a link inside one of them; also chooses among a peer's addresses
	Interface string         // the first address of a link whose name matches (path.Match), such as "bond*"
}

// MeshConfig is what does not change while a Mesh lives. The zero value of each field takes its
// default.
type MeshConfig struct {
	Mode          MeshMode // default MeshAuto
	VNI           uint32   // 1 to 16777215, default DefaultVNI; the same on all nodes
	Port          uint16   // UDP, default DefaultVXLANPort; the same on all nodes
	Node          NodeAddress
	Encrypt       MeshEncryption // default EncryptNone
	WireGuardPort uint16         // UDP, this and the next three, default DefaultWireGuardPort; the same on all nodes
	// AllowPlaintext lets traffic to peers without a public key leave unencrypted while encryption
	// is being switched on in a cluster. Without it their pods are unreachable.
	AllowPlaintext bool
	// PodNetworks are those of all pods of the cluster, if known. What of them no Node has (yet) is
	// unreachable instead of leaving through the default route. No node's address may be inside.
	PodNetworks []netip.Prefix
	MTU         int    // of pods, 1280 to 65535; 0 takes it from the paths to the peers
	StateDir    string // holds the private key, default DefaultStateDir
	NetNS       int    // file descriptor of a network namespace; 0: the caller's
	Log         *slog.Logger
}

// Peer is a node as the mesh sees it. Order means nothing, except that the first address of a
// family is used.
type Peer struct {
	Name     string         // of the Node object
	Addrs    []netip.Addr   // status.addresses of type InternalIP
	PodCIDRs []netip.Prefix // spec.podCIDRs
	// PublicKey is what Mesh.PublicKey of the peer returns, or one key in base64 as wg(8) prints
	// it. Empty: not known.
	PublicKey string
}

// Mesh keeps the routes, neighbours and tunnels between this node and its peers as they were last
// asked for. It is safe for concurrent use.
type Mesh struct {
	cfg    MeshConfig
	kernel *netlink.Handle
	wg     *wireGuard // nil without encryption
	// tunnels are the indices of allMeshDevices, 0 where there is none. Run reads them for every
	// event of the kernel, which must not wait for a pass.
	tunnels [meshDeviceCount]atomic.Int32

	rotated chan struct{} // wakes Run when a peer's keys or ours change

	mu     sync.Mutex // guards what follows, and is held over a pass
	self   Peer
	peers  []Peer
	isSet  bool
	report Report
}

// NewMesh checks cfg and opens the kernel's interfaces. With EncryptWireGuard it makes the private
// key and the device, and fails with the remedy where the kernel has none. Routes of an earlier
// process stay in force until the first Set.
func NewMesh(cfg MeshConfig) (*Mesh, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	kernel, err := openMeshKernel(cfg.NetNS)
	if err != nil {
		return nil, fmt.Errorf("open netlink for the mesh: %w", err)
	}
	m := &Mesh{cfg: cfg, kernel: kernel, rotated: make(chan struct{}, 1)}
	if cfg.Encrypt == EncryptWireGuard {
		if m.wg, err = openWireGuard(kernel, cfg); err != nil {
			kernel.Close()
			return nil, err
		}
	}
	return m, nil
}

func openMeshKernel(ns int) (*netlink.Handle, error) {
	open := func() (*netlink.Handle, error) { return netlink.NewHandle(unix.NETLINK_ROUTE) }
	if ns != 0 {
		open = func() (*netlink.Handle, error) { return netlink.NewHandleAt(netns.NsHandle(ns), unix.NETLINK_ROUTE) }
	}
	kernel, err := open()
	if err != nil {
		return nil, err
	}
	if err := kernel.SetSocketTimeout(kernelTimeout); err != nil {
		kernel.Close()
		return nil, err
	}
	return kernel, nil
}

func (c *MeshConfig) complete() error {
	c.Mode = orDefault(c.Mode, MeshAuto)
	c.Encrypt = orDefault(c.Encrypt, EncryptNone)
	c.VNI = orDefault(c.VNI, DefaultVNI)
	c.Port = orDefault(c.Port, DefaultVXLANPort)
	c.WireGuardPort = orDefault(c.WireGuardPort, DefaultWireGuardPort)
	c.StateDir = orDefault(c.StateDir, DefaultStateDir)
	c.Log = orDefault(c.Log, slog.New(slog.DiscardHandler))
	switch c.Mode {
	case MeshAuto, MeshDirect, MeshVXLAN, MeshNone:
	default:
		return fmt.Errorf("mesh mode is %q: it takes auto, direct, vxlan or none", c.Mode)
	}
	switch {
	case c.Encrypt != EncryptNone && c.Encrypt != EncryptWireGuard:
		return fmt.Errorf("mesh encrypt is %q: it takes none or wireguard", c.Encrypt)
	case c.Encrypt == EncryptWireGuard && c.Mode == MeshNone:
		return errors.New("mesh encrypt is wireguard and mode is none: encryption needs the routes that mode none leaves to others; use mode auto")
	case c.VNI >= 1<<24:
		return fmt.Errorf("mesh vni is %d: it takes 1 to 16777215", c.VNI)
	case c.WireGuardPort > 65536-wireGuardDevices:
		return fmt.Errorf("mesh wireguard port is %d: it takes 1 to %d, and the next three ports are used too", c.WireGuardPort, 65536-wireGuardDevices)
	case c.Port >= c.WireGuardPort && c.Port < c.WireGuardPort+wireGuardDevices:
		return fmt.Errorf("mesh port %d is one of the four wireguard ports from %d on: both are UDP, use another", c.Port, c.WireGuardPort)
	case c.MTU != 0 && (c.MTU < 1280 || c.MTU > 65535):
		return fmt.Errorf("mesh mtu is %d: it takes 0 or 1280 to 65535 (IPv6 needs 1280)", c.MTU)
	}
	for _, p := range c.PodNetworks {
		if reason := unfitPodCIDR(p); reason != "" {
			return fmt.Errorf("mesh pod network %s %s", p, reason)
		}
	}
	return c.Node.check()
}

func orDefault[T comparable](v, preset T) T {
	var zero T
	if v == zero {
		return preset
	}
	return v
}

func (n NodeAddress) check() error {
	var v4, v6 int
	for _, a := range n.Addrs {
		if !usableNodeAddr(a) {
			return fmt.Errorf("mesh node address %s: it takes a unicast address that other nodes can reach", a)
		}
		if a.Is4() {
			v4++
		} else {
			v6++
		}
	}
	if v4 > 1 || v6 > 1 {
		return fmt.Errorf("mesh node addresses %v: at most one of each family", n.Addrs)
	}
	for _, p := range n.CIDRs {
		if !p.IsValid() {
			return errors.New("mesh node address cidr: not a prefix such as 10.0.0.0/8")
		}
	}
	if _, err := path.Match(n.Interface, ""); err != nil {
		return fmt.Errorf("mesh node address interface %q: a name or a pattern such as bond*: %w", n.Interface, err)
	}
	return nil
}

// usableNodeAddr: link-local addresses mean nothing without a link, and would differ from node to
// node in who can use them.
func usableNodeAddr(a netip.Addr) bool {
	return a.IsGlobalUnicast() && !a.Is4In6() && a.Zone() == ""
}

// Set makes the kernel hold what self and peers need, and nothing more of ours: peers not named are
// gone when it returns. It writes only differences from what the kernel holds, so the same Set
// again writes nothing. A fault of one peer is in Report.Problems and leaves the others alone; the
// error is of this node or the kernel. Entries of peers that are self (by Name) are ignored.
func (m *Mesh) Set(ctx context.Context, self Peer, peers []Peer) (Report, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.self, m.peers, m.isSet = clonePeer(self), clonePeers(peers), true
	return m.pass(ctx)
}

// MTU is what pods of this node should have: the least of all paths to peers after the overhead of
// their tunnels, or of the node's own link while there are no peers. 0: not known.
func (m *Mesh) MTU() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.report.MTU
}

// Report is that of the last pass.
func (m *Mesh) Report() Report {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.report
}

// PublicKey is for the annotation of this node's Node object; empty without encryption. While a key
// is being rotated it holds two.
func (m *Mesh) PublicKey() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.wg == nil {
		return ""
	}
	return m.wg.keys.public().String()
}

// Cleanup removes every route, neighbour and device that a Mesh made in this namespace, whatever
// its configuration. The private key in StateDir stays.
func (m *Mesh) Cleanup(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.isSet, m.report = false, Report{}
	view, err := m.readLinks()
	if err != nil {
		return err
	}
	_, err = m.apply(ctx, view, &meshState{})
	return err
}

// Close releases sockets. What is in the kernel stays in force.
func (m *Mesh) Close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.kernel.Close()
	if m.wg != nil {
		m.wg.close()
	}
}
