package nft

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"time"

	"github.com/nftcni/nftcni/policy"
)

// Options of Open. The zero value works: the caller's network namespace, no owner flag.
type Options struct {
	NetNS  int      // file descriptor of a network namespace; 0: the caller's
	Owner  bool     // flags owner,persist where the kernel has them (6.9+); ignored with a log line elsewhere
	Socket *os.File // an owning netlink socket handed over by a predecessor (systemd FD store); nil: dial
	Log    *slog.Logger
}

// Table is the table inet nftcni in one network namespace. It is used by one goroutine.
type Table struct{}

// Binding is a pod's interface and one of its addresses.
type Binding struct {
	Interface  string // host side
	Addr       netip.Addr
	Masquerade bool   // what leaves the pod networks from it is masqueraded
	Comment    string // "namespace/pod"
}

// State is what the kernel holds.
type State struct {
	Tables      policy.Tables
	Bindings    []Binding
	PodNetworks []netip.Prefix
	Epoch       uint32
	Generation  uint32
}

// Change is one update of the table.
type Change struct {
	Unbind      []Binding      // committed first, in a transaction of its own: the guards close before policy goes away
	Delta       policy.Delta   // then its Steps, one transaction each
	Bind        []Binding      // committed together with the last Step
	PodNetworks []netip.Prefix // desired set of not-masqueraded destinations when non-nil
}

// Receipt says what Apply did.
type Receipt struct {
	Seq          uint64 // for Finish
	Generation   uint32 // of the kernel after the last transaction
	Took         time.Duration
	Transactions int
	Elements     int
}

// Foreign is a commit by somebody else that touched our table, or a loss of events.
type Foreign struct {
	Deleted bool   // the table is gone
	Resync  bool   // events were lost (ENOBUFS): the state must be read again
	PID     uint32 // of the committing process
	Comm    string // its command name
}

var errNotYet = errors.New("nft: not implemented yet")

// Open adopts or creates the table.
func Open(ctx context.Context, o Options) (*Table, error) { return nil, errNotYet }

// Close leaves the rules in force.
func (t *Table) Close() error { return errNotYet }

// File returns a duplicate of the owning socket for the FD store.
func (t *Table) File() (*os.File, error) { return nil, errNotYet }

// State reads the table back from the kernel.
func (t *Table) State(ctx context.Context) (State, error) { return State{}, errNotYet }

// Apply commits c and returns at the kernel's acknowledgement.
func (t *Table) Apply(ctx context.Context, c Change) (Receipt, error) { return Receipt{}, errNotYet }

// Finish completes all receipts up to seq after a Grace that began after receipt seq.
func (t *Table) Finish(ctx context.Context, seq uint64) error { return errNotYet }

// Lookup reads one element.
func (t *Table) Lookup(ctx context.Context, k policy.Key) (value uint32, found bool, err error) {
	return 0, false, errNotYet
}

// Generation is the kernel's nf_tables generation.
func (t *Table) Generation(ctx context.Context) (uint32, error) { return 0, errNotYet }

// Grace returns when every packet now in flight is through.
func Grace(ctx context.Context) error { return errNotYet }

// Watch reports foreign commits until ctx ends.
func Watch(ctx context.Context, o Options, report func(Foreign)) error { return errNotYet }

// Program is the constant ruleset as nft text without table flags.
func Program() string { return "" }

// Delete removes the table.
func Delete(ctx context.Context, o Options) error { return errNotYet }
