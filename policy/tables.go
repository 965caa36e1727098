package policy

import (
	"fmt"
	"net/netip"
)

// Map names one kind of element of the dataplane's tables. The family of an element
// with an address is the address's.
type Map uint8

// The maps and sets that the engine fills. In nft: pod_id4/6, net_id4/6, ...
const (
	PodID           Map = iota // Addr -> identity
	NetID                      // Addr to To, inclusive, disjoint -> identity
	IngressProfile             // Addr -> profile
	EgressProfile              // Addr -> profile
	IsolatedIngress            // Addr, no value: a local pod whose profile must be found
	IsolatedEgress             // Addr, no value
	Access                     // X profile, Y identity -> class
	AccessOthers               // X profile -> class of every identity not in Access
	AccessPort                 // X class, Protocol, First -> code
	AccessRange                // X class, Protocol, First to Last -> code
	AccessRest                 // X class -> code of whatever port and range did not name
)

// Number ranges. They are disjoint wherever two kinds can meet in one register, and
// profiles and epochs keep the bits 0x4000 and 0x8000 (kube-proxy's marks) clear.
const (
	CodeAllow    uint32 = 1
	CodeDeny     uint32 = 2
	CodeAllowLog uint32 = 3
	CodeDenyLog  uint32 = 4

	IdentityOthers uint32 = 0x0000_ffff // any address without an element; never in a map
	IdentityFirst  uint32 = 0x0001_0000
	IdentityLast   uint32 = 0x3fff_ffff
	ClassFirst     uint32 = 0x4000_0000
	ClassLast      uint32 = 0x7fff_ffff

	IngressProfileFirst uint32 = 0x2000_0001
	IngressProfileLast  uint32 = 0x2fff_3fff
	EgressProfileFirst  uint32 = 0x1000_0001
	EgressProfileLast   uint32 = 0x1fff_3fff
	DeniedMark          uint32 = 0x4000_0000
	EpochFirst          uint32 = 0x8000_0001 // bit 31 set, bits 14 and 15 clear
)

// Key identifies one element. Fields a Map does not use are zero, so that Key is
// comparable and usable as a Go map key.
type Key struct {
	Map         Map
	Protocol    Protocol
	First, Last uint16
	X, Y        uint32
	Addr, To    netip.Addr
}

// Element is a Key with its value. Comment is for people (namespace/pod, policy
// names); it is never part of equality and may be cut by the dataplane.
type Element struct {
	Key
	Value   uint32
	Comment string
}

// Op adds or deletes one element. A changed value is a delete and an add of the same
// key in the same step, delete first.
type Op struct {
	Delete bool
	Element
}

// Delta brings a table from one state to the next without any packet ever being
// judged by something that is neither the old nor the new policy. Set lookups of one
// packet are not a snapshot (each sees the generation of its own instant), so the
// unit of change is a sequence: each of Steps is one transaction, committed in order
// without waiting; when the last one is acknowledged the new policy is in force.
// Drops deletes what nothing points to any more, in a transaction of its own after
// every packet in flight is through (a grace period).
type Delta struct {
	Steps [][]Op
	Drops []Op
	// Revokes: the change may take a permission away, so established connections must
	// be judged again: the epoch is changed with the last step, and again after the
	// grace period.
	Revokes bool
	// Settle: the Drops of all earlier deltas must have been committed (after their
	// grace period) before the first of Steps is: a packet in flight may still hold a
	// profile for which the identities written here have no entries.
	Settle bool
	// Pause is the index of the step before which a grace period must pass, 0 for
	// none. It is set when one change both opens and closes across directions and
	// therefore goes through the meet of the old and the new policy.
	Pause int
}

// Empty reports whether the delta changes nothing.
func (d Delta) Empty() bool { return len(d.Steps) == 0 && len(d.Drops) == 0 && !d.Revokes }

// Tables is the complete content of the engine's maps for one node.
type Tables map[Key]uint32

// Apply changes t as a kernel would: deleting an absent element or adding a present one
// is an error, and t is then unchanged by that op and those after it.
func (t Tables) Apply(ops []Op) error {
	for _, op := range ops {
		_, ok := t[op.Key]
		switch {
		case op.Delete && !ok:
			return fmt.Errorf("delete element %+v: not in the table", op.Key)
		case op.Delete:
			delete(t, op.Key)
		case ok:
			return fmt.Errorf("add element %+v: already in the table", op.Key)
		default:
			t[op.Key] = op.Value
		}
	}
	return nil
}
