package ipam

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"time"
)

// Owner is whom an address is leased to: one interface of one container in one network
// (CNI specification, section 2: the attachment's key).
type Owner struct {
	Network     string `json:"network"`
	ContainerID string `json:"containerID"`
	Interface   string `json:"interface"`
}

func (o Owner) String() string {
	return fmt.Sprintf("%s/%s in network %s", o.ContainerID, o.Interface, o.Network)
}

func (o Owner) key() []byte {
	return []byte(o.Network + "\x00" + o.ContainerID + "\x00" + o.Interface)
}

// Lease is one address in use.
type Lease struct {
	Address netip.Addr `json:"address"`
	Owner
	Pod   string    `json:"pod,omitempty"`   // namespace/name
	NetNS string    `json:"netns,omitempty"` // path of the pod's network namespace
	Boot  string    `json:"boot"`            // boot ID under which it was taken
	Since time.Time `json:"since"`
	// Payload is the caller's: kept and given back, never looked at. It must be JSON.
	Payload json.RawMessage `json:"payload,omitempty"`
}

// holder names the lease in errors.
func (l Lease) holder() string {
	if l.Pod != "" {
		return fmt.Sprintf("%s (%s)", l.Address, l.Pod)
	}
	return fmt.Sprintf("%s (%s)", l.Address, l.ContainerID)
}

// FullError says that a pool has no address left.
type FullError struct {
	Network string
	Pool    string
	Size    uint64   // addresses between the pool's bounds
	Leased  int      // of them in use
	Blocked int      // of them excluded, reserved, or seen in the kernel without a lease
	Holders []string // up to five leases, longest held first
}

func (e *FullError) Error() string {
	more := ""
	if e.Leased > len(e.Holders) {
		more = fmt.Sprintf(" and %d more", e.Leased-len(e.Holders))
	}
	return fmt.Sprintf("pool %s of network %s is full: %d addresses, %d leased, %d excluded, reserved or found in use; held by %s%s; "+
		"delete pods, add a range, or see nftcni debug ipam",
		e.Pool, e.Network, e.Size, e.Leased, e.Blocked, strings.Join(e.Holders, ", "), more)
}

// OwnedError says that the owner has leases already: a second ADD without a DEL.
type OwnedError struct {
	Owner  Owner
	Leases []Lease
}

func (e *OwnedError) Error() string {
	return fmt.Sprintf("%s holds %s already; DEL must come before another ADD", e.Owner, e.Leases[0].Address)
}

// UnavailableError says why an address that was asked for cannot be had.
type UnavailableError struct {
	Address netip.Addr
	Reason  string
}

func (e *UnavailableError) Error() string {
	return fmt.Sprintf("address %s: %s", e.Address, e.Reason)
}
