package cni

import (
	"net/netip"
	"slices"
)

// A meshState is everything the mesh wants the kernel to hold.
type meshState struct {
	tunnels map[string]*tunnel          // by device
	wgPeers map[string]map[wgKey]wgPeer // by device
	routes  map[routeKey]meshRoute
}

// A routeKey is what tells routes of the main table apart (the mesh sets no TOS).
type routeKey struct {
	dst    netip.Prefix
	metric int
}

type meshRoute struct {
	link         string // empty for unreachable
	gateway, src netip.Addr
	unreachable  bool
}

// A meshPlan decides one pass. It writes nothing and depends on nothing but its fields.
type meshPlan struct {
	cfg   *MeshConfig
	view  *meshView
	self  Peer
	addrs pair // of this node
	host  pair // sources of the host's own traffic into tunnels
	state meshState
	rep   Report
	owner map[netip.Prefix]string // pod networks to the node that has them
	keyOf map[wgKey]string        // public keys to the node that has them
}

// planMesh decides what the kernel should hold for self and peers (in the order of their names).
func (c *MeshConfig) planMesh(self Peer, peers []Peer, v *meshView) (*meshState, Report, error) {
	p := &meshPlan{cfg: c, view: v, self: self, owner: map[netip.Prefix]string{}, keyOf: map[wgKey]string{},
		state: meshState{tunnels: map[string]*tunnel{}, wgPeers: map[string]map[wgKey]wgPeer{}, routes: map[routeKey]meshRoute{}}}
	var err error
	if p.addrs, err = c.Node.own(self, v); err != nil && c.Mode != MeshNone {
		return nil, p.rep, err
	}
	p.rep.Addrs = p.addrs.list()
	p.checkOwn()
	p.claimOwn()
	p.fenceAll()
	members := p.claim(peers)
	if c.Mode != MeshNone {
		for _, m := range members {
			p.peer(m)
		}
	}
	p.finishMTU(members)
	return &p.state, p.rep, nil
}

func (p *meshPlan) checkOwn() {
	for _, a := range p.rep.Addrs {
		if _, ok := p.view.has(a); !ok {
			p.rep.problem("", "address %s of this node is on none of its links (%s): set mesh node address, or mend the Node object", a, p.view.describeAddrs())
		}
	}
}

// claimOwn takes this node's pod networks: nobody else may have them, packets to pods that do not
// exist end here instead of going round through the default route, and the first address is the
// host's.
func (p *meshPlan) claimOwn() {
	for _, cidr := range p.self.PodCIDRs {
		cidr = cidr.Masked()
		if reason := unfitPodCIDR(cidr); reason != "" {
			p.rep.problem("", "pod network %s %s: mend spec.podCIDRs of this Node", cidr, reason)
			continue
		}
		p.owner[cidr] = p.self.Name
		if p.cfg.Mode != MeshNone {
			p.fence(cidr)
		}
		p.host.add(cidr.Addr())
	}
	p.rep.HostAddrs = p.host.list()
}

// fenceAll keeps traffic to pods of nodes that are not known (yet) from leaving through the default
// route.
func (p *meshPlan) fenceAll() {
	for _, cidr := range p.cfg.PodNetworks {
		inside := slices.IndexFunc(p.rep.Addrs, cidr.Contains)
		switch {
		case p.cfg.Mode == MeshNone:
		case inside >= 0:
			p.rep.problem("", "pod network %s contains address %s of this node and is not fenced: give the pods a network of their own", cidr, p.rep.Addrs[inside])
		default:
			p.fence(cidr.Masked())
		}
	}
}

// fence adds the route that shows when a better one to cidr does not exist (any more).
func (p *meshPlan) fence(cidr netip.Prefix) {
	p.state.routes[routeKey{cidr, fenceMetric}] = meshRoute{unreachable: true}
}

// device returns the plan's tunnel of a name, made on first use.
func (p *meshPlan) device(name string, local netip.Addr) *tunnel {
	t := p.state.tunnels[name]
	if t == nil {
		t = &tunnel{local: local, addrs: p.host.list(), fdb: map[hwAddr]netip.Addr{}, neigh: map[netip.Addr]hwAddr{}}
		p.state.tunnels[name] = t
	}
	return t
}

func (p *meshPlan) peer(m member) {
	if len(m.PodCIDRs) == 0 {
		return // nothing there to reach, for example a Node that has just been created
	}
	if p.cfg.Encrypt == EncryptWireGuard && p.encrypted(m) {
		return
	}
	if len(m.addrs.list()) == 0 {
		p.rep.problem(m.Name, "it has no address that can be used: its Node needs an InternalIP")
		return
	}
	for _, cidr := range m.PodCIDRs {
		p.plain(m, cidr)
	}
}

// plain routes one network without encryption, over the underlay of its own family if both nodes
// have that, and else over the other one in VXLAN.
func (p *meshPlan) plain(m member, cidr netip.Prefix) {
	i := familyIndex(cidr.Addr())
	if p.addrs[i].IsValid() && m.addrs[i].IsValid() {
		path := p.pathTo(m, m.addrs[i])
		switch {
		case path.local:
		case path.onLink && p.cfg.Mode != MeshVXLAN:
			p.direct(m, cidr, path)
		case p.cfg.Mode == MeshDirect:
			p.rep.problem(m.Name, "mode direct, and its address %s is not on a link of this node: set mesh mode to auto", m.addrs[i])
		default:
			p.vxlan(m, cidr, i, path)
		}
		return
	}
	if i = 1 - i; p.cfg.Mode != MeshDirect && p.addrs[i].IsValid() && m.addrs[i].IsValid() {
		if path := p.pathTo(m, m.addrs[i]); !path.local {
			p.vxlan(m, cidr, i, path)
		}
		return
	}
	p.rep.problem(m.Name, "no way to %s: it has addresses %v, this node %v, mesh mode is %s", cidr, m.addrs.list(), p.rep.Addrs, p.cfg.Mode)
}

// pathTo looks up a peer's address and reports what is wrong with the answer.
func (p *meshPlan) pathTo(m member, a netip.Addr) meshPath {
	path := p.view.path(a)
	switch {
	case path.local:
		p.rep.problem(m.Name, "its address %s is one of this node's: two nodes need two addresses", a)
	case path.err != nil:
		p.rep.problem(m.Name, "no route to its address %s: %v", a, path.err)
	case isMeshDevice(path.link):
		p.rep.problem(m.Name, "the route to its address %s leads into the mesh itself through %s", a, path.link)
	}
	return path
}

func (p *meshPlan) direct(m member, cidr netip.Prefix, path meshPath) {
	i := familyIndex(cidr.Addr())
	r := meshRoute{link: path.link, gateway: m.addrs[i]}
	// The kernel refuses a source that it does not have; without one it takes the link's own.
	if _, ok := p.view.has(p.addrs[i]); ok {
		r.src = p.addrs[i]
	}
	p.state.routes[routeKey{cidr, meshMetric}] = r
	p.rep.Paths = append(p.rep.Paths, PeerPath{Peer: m.Name, PodCIDR: cidr, Via: ViaDirect, Address: m.addrs[i],
		Link: path.link, LinkMTU: path.mtu, MTU: path.mtu})
}

// vxlan routes through the device of the underlay i. The gateway is the peer's own address inside
// the tunnel; like this node's it is the first of the network, which no pod gets.
func (p *meshPlan) vxlan(m member, cidr netip.Prefix, i int, path meshPath) {
	name, remote := vxlanDevice(p.addrs[i]), m.addrs[i]
	t := p.device(name, p.addrs[i])
	mac := vxlanMAC(remote)
	if other, taken := t.fdb[mac]; taken && other != remote {
		p.rep.problem(m.Name, "its address %s has the same VXLAN MAC address as %s: give it another address", remote, other)
		return
	}
	t.fdb[mac] = remote
	t.neigh[cidr.Addr()] = mac
	p.state.routes[routeKey{cidr, meshMetric}] = meshRoute{link: name, gateway: cidr.Addr(), src: p.host[familyIndex(cidr.Addr())]}
	p.through(t, PeerPath{Peer: m.Name, PodCIDR: cidr, Via: ViaVXLAN, Address: remote}, path, vxlanOverhead(remote))
}

// through records a path inside a tunnel.
func (p *meshPlan) through(t *tunnel, report PeerPath, path meshPath, overhead int) {
	if path.err == nil {
		report.Link, report.LinkMTU, report.MTU = path.link, path.mtu, path.mtu-overhead
		t.mtu = least(t.mtu, report.MTU)
	}
	p.rep.Paths = append(p.rep.Paths, report)
}
