package agent

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
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

// chooses tells whether the configuration, and not the Node object, says where peers send to.
func (c MeshConfig) chooses() bool {
	return len(c.NodeAddresses) > 0 || len(c.NodeCIDRs) > 0 || c.NodeInterface != ""
}

// router is a cni.Mesh.
type router interface {
	Set(ctx context.Context, self cni.Peer, peers []cni.Peer) (cni.Report, error)
	Run(ctx context.Context, changed func(cni.Report, error)) error
	Report() cni.Report
	MTU() int
	PublicKey() string
	RotateKey(ctx context.Context) (string, error)
	RetireKey(ctx context.Context) (string, error)
	Rotation() (cni.Rotation, error)
	Close()
}

// meshNodes is the newest list of nodes.
type meshNodes struct {
	peers     []cni.Peer
	published []netip.Addr // this node's own mesh addresses, as its Node object has them
}

// mesh hands the newest list of nodes to a cni.Mesh, beside the loop: a slow pass over
// routes holds up no pod.
type mesh struct {
	cni       router
	node      string
	nodes     chan meshNodes // capacity 1: the newest list wins
	log       *slog.Logger
	runDir    string
	followMTU bool         // pods' MTU is the mesh's to choose
	mtu       atomic.Int32 // of pods, as last known
	publisher nodePublisher
	retiring  retirement
	probes    pathProbes
	wake      chan struct{} // capacity 1: there may be something to publish
	now       func() time.Time
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
	return meshWith(m, c, log), nil
}

func meshWith(r router, c Config, log *slog.Logger) *mesh {
	return &mesh{cni: r, node: c.Node, nodes: make(chan meshNodes, 1), log: log, runDir: c.RunDir, followMTU: c.MTU == 0,
		publisher: nodePublisher{chooses: c.Mesh.chooses()}, probes: newPathProbes(log), wake: make(chan struct{}, 1), now: time.Now}
}

// offer replaces the waiting list; it never blocks and is called by the loop only.
func (m *mesh) offer(nodes meshNodes) {
	select {
	case <-m.nodes:
	default:
	}
	m.nodes <- nodes
}

// run keeps the kernel's routes as the newest list wants them until ctx ends; they stay.
func (m *mesh) run(ctx context.Context) error {
	defer m.cni.Close()
	defer m.probes.wait()
	done := make(chan error, 1)
	go func() {
		done <- m.cni.Run(ctx, func(r cni.Report, err error) { m.tell(ctx, r, err) })
	}()
	later := time.NewTimer(time.Hour)
	later.Stop()
	for {
		select {
		case nodes := <-m.nodes:
			m.set(ctx, nodes)
		case <-m.wake:
		case <-later.C:
		case err := <-done:
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		if wait := sooner(m.retire(ctx), m.publish(ctx)); wait > 0 {
			later.Reset(wait)
		} else {
			later.Stop()
		}
	}
}

// sooner is the shorter of two waits, where 0 is none.
func sooner(a, b time.Duration) time.Duration {
	if a == 0 || b != 0 && b < a {
		return b
	}
	return a
}

// set applies one list; a failure is repeated by cni.Mesh.Run.
func (m *mesh) set(ctx context.Context, nodes meshNodes) {
	i := slices.IndexFunc(nodes.peers, func(p cni.Peer) bool { return p.Name == m.node })
	self := cni.Peer{Name: m.node}
	if i >= 0 {
		self = nodes.peers[i]
	}
	m.publisher.known(self.PublicKey, nodes.published)
	report, err := m.cni.Set(ctx, self, nodes.peers)
	m.retiring.applied = err == nil && i >= 0
	m.tell(ctx, report, err)
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
	m.probes.start(ctx, r.ProbeTargets())
	m.wakeUp()
}

// wakeUp makes run look for something to publish; it never blocks.
func (m *mesh) wakeUp() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// peers are the nodes as the mesh wants them.
func (v *inventory) peers() meshNodes {
	var out meshNodes
	for _, n := range v.nodes {
		p := cni.Peer{Name: n.Name, Addrs: n.Addrs, PodCIDRs: n.PodCIDRs, PublicKey: n.PublicKey}
		switch {
		case n.Name == v.node:
			out.published = n.MeshAddrs
		case len(n.MeshAddrs) > 0:
			p.Addrs = n.MeshAddrs
		}
		out.peers = append(out.peers, p)
	}
	slices.SortFunc(out.peers, func(a, b cni.Peer) int { return strings.Compare(a.Name, b.Name) })
	return out
}
