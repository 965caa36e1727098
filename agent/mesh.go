package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/nftcni/nftcni/cni"
)

// MeshConfig is how pods of this node reach those of others; it is used with network
// routed only. Every field has a default (cni.MeshConfig).
type MeshConfig struct {
	// Mode is auto (default), direct, vxlan or none.
	Mode cni.MeshMode `json:"mode,omitempty"`
	// VNI and Port of VXLAN; the same on every node.
	VNI  uint32 `json:"vni,omitempty"`
	Port uint16 `json:"port,omitempty"`
	// Encrypt is none (default) or wireguard.
	Encrypt cni.MeshEncryption `json:"encrypt,omitempty"`
	// AllowPlaintext lets traffic to nodes without a known key leave unencrypted.
	AllowPlaintext bool `json:"allowPlaintext,omitempty"`
	// NodeAddresses, NodeCIDRs and NodeInterface choose the address peers send to;
	// default: the Node object's InternalIP.
	NodeAddresses []netip.Addr   `json:"nodeAddresses,omitempty"`
	NodeCIDRs     []netip.Prefix `json:"nodeCIDRs,omitempty"`
	NodeInterface string         `json:"nodeInterface,omitempty"`
}

// mesh hands the newest list of nodes to a cni.Mesh, beside the loop: a slow pass over
// routes holds up no pod.
type mesh struct {
	cni   *cni.Mesh
	node  string
	nodes chan []cni.Peer // capacity 1: the newest list wins
	log   *slog.Logger
	// publishKey makes this node's public keys known; nil without encryption.
	publishKey func(ctx context.Context, key string) error
	runDir     string
	followMTU  bool         // pods' MTU is the mesh's to choose
	mtu        atomic.Int32 // of pods, as last known
}

func newMesh(c Config, log *slog.Logger) (*mesh, error) {
	if c.Network != NetworkRouted {
		return nil, nil
	}
	m, err := cni.NewMesh(cni.MeshConfig{
		Mode: c.Mesh.Mode, VNI: c.Mesh.VNI, Port: c.Mesh.Port, Encrypt: c.Mesh.Encrypt, AllowPlaintext: c.Mesh.AllowPlaintext,
		Node:        cni.NodeAddress{Addrs: c.Mesh.NodeAddresses, CIDRs: c.Mesh.NodeCIDRs, Interface: c.Mesh.NodeInterface},
		PodNetworks: c.ClusterCIDRs, MTU: c.MTU, StateDir: c.StateDir, Log: log,
	})
	if err != nil {
		return nil, fmt.Errorf("config field mesh: %w", err)
	}
	return &mesh{cni: m, node: c.Node, nodes: make(chan []cni.Peer, 1), log: log, runDir: c.RunDir, followMTU: c.MTU == 0}, nil
}

// offer replaces the waiting list; it never blocks and is called by the loop only.
func (m *mesh) offer(nodes []cni.Peer) {
	select {
	case <-m.nodes:
	default:
	}
	m.nodes <- nodes
}

// run keeps the kernel's routes as the newest list wants them until ctx ends; they stay.
func (m *mesh) run(ctx context.Context) error {
	defer m.cni.Close()
	done := make(chan error, 1)
	go func() {
		done <- m.cni.Run(ctx, func(r cni.Report, err error) { m.tell(ctx, r, err) })
	}()
	for {
		select {
		case nodes := <-m.nodes:
			m.set(ctx, nodes)
		case err := <-done:
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
	}
}

// set applies one list; a failure is repeated by cni.Mesh.Run.
func (m *mesh) set(ctx context.Context, nodes []cni.Peer) {
	i := slices.IndexFunc(nodes, func(p cni.Peer) bool { return p.Name == m.node })
	self := cni.Peer{Name: m.node}
	if i >= 0 {
		self = nodes[i]
	}
	report, err := m.cni.Set(ctx, self, nodes)
	m.tell(ctx, report, err)
	key := m.cni.PublicKey()
	if m.publishKey == nil || key == "" || key == self.PublicKey {
		return
	}
	if err := m.publishKey(ctx, key); err != nil && !errors.Is(err, context.Canceled) {
		m.log.Error("publish the node's public key; trying again", "err", err)
		time.AfterFunc(time.Second, func() {
			select {
			case m.nodes <- nodes:
			default: // a newer list waits
			}
		})
	}
}

func (m *mesh) tell(ctx context.Context, r cni.Report, err error) {
	if err != nil {
		m.log.Error("routes to other nodes", "err", err)
	}
	for _, p := range r.Problems {
		m.log.Warn("routes to other nodes", "peer", p.Peer, "problem", p.Message)
	}
	before := int(m.mtu.Swap(int32(r.MTU)))
	if m.followMTU && before != 0 && r.MTU != 0 && r.MTU != before {
		m.log.Info("the paths' MTU changed: pods follow", "from", before, "to", r.MTU)
		if err := cni.SetPodMTU(ctx, m.runDir, before, r.MTU); err != nil {
			m.log.Error("set the MTU of running pods", "err", err)
		}
	}
	m.log.Debug("routes to other nodes", "writes", r.Writes, "mtu", r.MTU, "paths", len(r.Paths))
}

// peers are the nodes as the mesh wants them.
func (v *inventory) peers() []cni.Peer {
	out := make([]cni.Peer, 0, len(v.nodes))
	for _, n := range v.nodes {
		out = append(out, cni.Peer{Name: n.Name, Addrs: n.Addrs, PodCIDRs: n.PodCIDRs, PublicKey: n.PublicKey})
	}
	slices.SortFunc(out, func(a, b cni.Peer) int { return slices.Compare([]byte(a.Name), []byte(b.Name)) })
	return out
}
