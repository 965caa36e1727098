package cni

import (
	"fmt"
	"net/netip"
	"slices"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// A session is one way to a peer: a key of ours and one of the peer's, on the device of that pair.
type session struct {
	device string
	key    wgKey // of the peer
	port   uint16
	ready  bool // a handshake was made: the peer takes what comes this way
}

// encrypted plans the networks of one peer for WireGuard. False: it has no key, and plaintext is
// allowed.
func (p *meshPlan) encrypted(m member) bool {
	if m.PublicKey == "" && p.cfg.AllowPlaintext {
		return false
	}
	keys, err := p.peerKeys(m)
	endpoint, path, ok := p.endpoint(m)
	switch {
	case m.PublicKey == "":
		p.unreachable(m, "its public key is not known, and nothing leaves for it in the clear: see whether its agent runs with encryption")
	case err != nil:
		p.unreachable(m, "its public key cannot be used: its agent has to publish it again: %v", err)
	case !ok:
		p.unreachable(m, "no address family in common: it has %v, this node %v", m.addrs.list(), p.rep.Addrs)
	default:
		p.sessions(m, p.pairs(keys), endpoint, path)
	}
	return true
}

// peerKeys reads a peer's keys and takes them for it.
func (p *meshPlan) peerKeys(m member) (keyring, error) {
	keys, err := parseKeyring(m.PublicKey)
	if err != nil {
		return keys, err
	}
	for _, key := range keys.list() {
		if slices.Contains(p.view.keys.list(), key) {
			return keys, fmt.Errorf("%s is this node's own", key)
		}
		if other, taken := p.keyOf[key]; taken {
			return keys, fmt.Errorf("%s belongs to node %s already", key, other)
		}
	}
	for _, key := range keys.list() {
		p.keyOf[key] = m.Name
	}
	return keys, nil
}

// pairs lists the sessions there may be, the one with the newest keys first. The device of a pair
// has number 2*own+peer, where each is the parity of a key; the peer sees the same pair the other
// way round.
func (p *meshPlan) pairs(peer keyring) []session {
	var list []session
	for _, own := range p.view.keys.parities() {
		for _, theirs := range peer.parities() {
			s := session{device: wireGuardDevice(2*own + theirs), key: peer.key[theirs], port: p.cfg.WireGuardPort + uint16(2*theirs+own)}
			if d := p.view.wg[s.device]; d != nil {
				s.ready = slices.ContainsFunc(d.Peers, func(w wgtypes.Peer) bool { return w.PublicKey == s.key && !w.LastHandshakeTime.IsZero() })
			}
			list = append(list, s)
		}
	}
	return list
}

// sessions gives every pair its peer entry, so that packets are taken whichever way they come, and
// routes through the newest pair that the peer is known to take.
func (p *meshPlan) sessions(m member, list []session, addr netip.Addr, path meshPath) {
	routed := p.routed(list, m.PodCIDRs[0])
	if routed > 0 {
		p.rep.Rotating++
	}
	overhead := wireGuardOverhead(addr)
	for i, s := range list {
		t := p.device(s.device, netip.Addr{})
		if path.err == nil {
			t.mtu = least(t.mtu, path.mtu-overhead)
		}
		if p.state.wgPeers[s.device] == nil {
			p.state.wgPeers[s.device] = map[wgKey]wgPeer{}
		}
		p.state.wgPeers[s.device][s.key] = wgPeer{netip.AddrPortFrom(addr, s.port), m.PodCIDRs, i < routed}
	}
	device := list[routed].device
	for _, cidr := range m.PodCIDRs {
		p.state.routes[routeKey{cidr, meshMetric}] = meshRoute{link: device, src: p.host[familyIndex(cidr.Addr())]}
		p.fence(cidr) // without the device nothing may take the default route in the clear
		p.through(p.state.tunnels[device], PeerPath{Peer: m.Name, PodCIDR: cidr, Via: ViaWireGuard, Address: addr}, path, overhead)
	}
}

// routed chooses the session to send through: the newest that works, else the one in use, else the
// oldest, which the peer has known for longest.
func (p *meshPlan) routed(list []session, cidr netip.Prefix) int {
	if i := slices.IndexFunc(list, func(s session) bool { return s.ready }); i >= 0 {
		return i
	}
	inUse := p.view.routes[routeKey{cidr, meshMetric}].link
	if i := slices.IndexFunc(list, func(s session) bool { return s.device == inUse }); i >= 0 {
		return i
	}
	return len(list) - 1
}

// endpoint is where a peer is sent to: over IPv4, which costs less, if both have it.
func (p *meshPlan) endpoint(m member) (netip.Addr, meshPath, bool) {
	for i := range p.addrs {
		if p.addrs[i].IsValid() && m.addrs[i].IsValid() {
			path := p.pathTo(m, m.addrs[i])
			return m.addrs[i], path, !path.local
		}
	}
	return netip.Addr{}, meshPath{}, false
}

func (p *meshPlan) unreachable(m member, format string, args ...any) {
	p.rep.problem(m.Name, format, args...)
	for _, cidr := range m.PodCIDRs {
		p.state.routes[routeKey{cidr, meshMetric}] = meshRoute{unreachable: true}
		p.rep.Paths = append(p.rep.Paths, PeerPath{Peer: m.Name, PodCIDR: cidr, Via: ViaUnreachable})
	}
}
