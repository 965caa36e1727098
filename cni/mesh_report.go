package cni

import (
	"fmt"
	"net/netip"
)

// MeshVia is how one network of a peer is reached.
type MeshVia string

const (
	ViaDirect      MeshVia = "direct"
	ViaVXLAN       MeshVia = "vxlan"
	ViaWireGuard   MeshVia = "wireguard"
	ViaUnreachable MeshVia = "unreachable" // fail closed: the peer has no key
)

// PeerPath is how the pods of one network of one peer are reached.
type PeerPath struct {
	Peer    string       `json:"peer"`
	PodCIDR netip.Prefix `json:"podCIDR"`
	Via     MeshVia      `json:"via"`
	Address netip.Addr   `json:"address,omitzero"` // of the peer: the gateway or the tunnel's end
	Link    string       `json:"link,omitempty"`   // the link packets leave through at last, empty if there is no route to Address
	LinkMTU int          `json:"linkMTU,omitempty"`
	MTU     int          `json:"mtu,omitempty"` // for pods: LinkMTU less the tunnel's overhead
}

// MeshProblem is something that keeps a peer, or this node if Peer is empty, from being reached as
// asked for. Message names the remedy.
type MeshProblem struct {
	Peer    string `json:"peer,omitempty"`
	Message string `json:"message"`
}

func (p MeshProblem) String() string {
	if p.Peer == "" {
		return p.Message
	}
	return "node " + p.Peer + ": " + p.Message
}

// Report is what one pass found and did.
type Report struct {
	// Addrs are this node's addresses that peers send to, at most one per family. Where they differ
	// from the Node object's, publish them for the peers.
	Addrs []netip.Addr `json:"addrs,omitempty"`
	// HostAddrs are the sources of this node's own traffic to pods behind a tunnel: the first
	// address of each of its pod networks, which belongs to the node and never to a pod.
	HostAddrs []netip.Addr  `json:"hostAddrs,omitempty"`
	Paths     []PeerPath    `json:"paths,omitempty"`
	Problems  []MeshProblem `json:"problems,omitempty"`
	MTU       int           `json:"mtu,omitempty"` // see Mesh.MTU
	// Rotating counts the peers that are not yet reached with the newest keys of both sides.
	Rotating int `json:"rotating,omitempty"`
	Writes   int `json:"writes"` // changes the pass made in the kernel
}

func (r *Report) problem(peer, format string, args ...any) {
	p := MeshProblem{peer, fmt.Sprintf(format, args...)}
	for i := len(r.Problems) - 1; i >= 0 && r.Problems[i].Peer == peer; i-- {
		if r.Problems[i] == p { // of another network of the same peer
			return
		}
	}
	r.Problems = append(r.Problems, p)
}
