package cni

import (
	"net/netip"
)

// Paths of the agent's local HTTP API that the plugin calls. The socket is of mode 0600
// and the agent checks that the peer is root (or its own user).
const (
	PathAttach = "/v1/attach" // POST AttachRequest -> AttachResponse
	PathDetach = "/v1/detach" // POST DetachRequest -> {}
	PathReady  = "/v1/ready"  // GET -> Ready
	// PathBound is what CHECK asks: POST AttachRequest -> {} when the attachment is bound
	// with the same content, else Error with code 3. It changes nothing.
	PathBound = "/v1/bound"
)

// Default places. The run directory is on tmpfs: attachments do not survive a reboot,
// as their links do not.
const (
	DefaultRunDir   = "/run/nftcni"     // agent.sock, attachments/
	DefaultStateDir = "/var/lib/nftcni" // leases
	SocketName      = "agent.sock"
)

// Attachment is one pod interface on this node: what the plugin wired, what the agent
// binds, and what is kept as RunDir/attachments/<HostInterface>.json (written by the
// plugin before it asks the agent, removed by DEL or by the agent when the link is gone).
type Attachment struct {
	Network       string            `json:"network"` // name of the network configuration
	ContainerID   string            `json:"containerID"`
	Interface     string            `json:"interface"` // inside the pod: CNI_IFNAME
	NetNS         string            `json:"netns"`
	HostInterface string            `json:"hostInterface"` // "nft" + 12 hex digits
	Namespace     string            `json:"namespace,omitempty"`
	Pod           string            `json:"pod,omitempty"`
	UID           string            `json:"uid,omitempty"`
	Labels        map[string]string `json:"labels,omitempty"` // args.cni.labels
	Addresses     []netip.Addr      `json:"addresses"`
	Masquerade    bool              `json:"masquerade,omitempty"` // ipMasq
	// Pools are the subnets of the network's own ranges (none when they come from
	// Node.podCIDRs): the agent adds them to the networks that are not masqueraded.
	Pools []netip.Prefix `json:"pools,omitempty"`
	// HostPorts are the node's ports that lead to the pod.
	HostPorts []HostPort `json:"hostPorts,omitempty"`
}

// AttachRequest asks the agent to bind the attachment's addresses to its interface and
// to put every policy that selects the pod in force. The answer comes after the kernel
// acknowledged it. Asking again with the same content is a no-op with the same answer.
type AttachRequest struct{ Attachment }

// AttachResponse says that the pod's policy is in force.
type AttachResponse struct {
	Generation uint32 `json:"generation"` // nf_tables generation after the commit
	Micros     int64  `json:"micros"`     // from request read to kernel acknowledgement
}

// DetachRequest undoes AttachRequest; unknown attachments are not an error.
type DetachRequest struct {
	ContainerID   string `json:"containerID"`
	Interface     string `json:"interface"`
	HostInterface string `json:"hostInterface"`
}

// Ready is the agent's readiness for STATUS, and what ADD needs from the node.
type Ready struct {
	Ready  bool   `json:"ready"`
	Reason string `json:"reason,omitempty"` // when not ready: what is missing and the remedy
	// Limited: the kernel's table is not what it should be, so pods that run may be cut off.
	Limited  bool           `json:"limited,omitempty"`
	PodCIDRs []netip.Prefix `json:"podCIDRs,omitempty"` // this node's spec.podCIDRs, for IPAM without ranges
	MTU      int            `json:"mtu,omitempty"`      // for pods, 0: unknown
}

// Error is the body of every non-200 answer. Code is the CNI error code to report.
type Error struct {
	Code    uint   `json:"code"`
	Message string `json:"message"`
}

func (e *Error) Error() string { return e.Message }
