package nft

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/policy"
)

// Options of Open. The zero value works: the caller's network namespace, no owner flag.
type Options struct {
	NetNS  int      // file descriptor of a network namespace, open as long as the Table; 0: the caller's
	Owner  bool     // flags owner,persist where the kernel has them (Linux 6.9); ignored with a log line elsewhere
	Socket *os.File // an owning netlink socket handed over by a predecessor (systemd's FD store); nil: dial
	Log    *slog.Logger
	Port   uint32 // Watch: netlink port whose commits are our own (Table.Port); 0: those of this process
}

// Table is the table inet nftcni in one network namespace. It is used by one goroutine.
type Table struct {
	conn   *conn
	reader *Reader
	log    *slog.Logger
	netNS  int
	flags  uint32
	// unclaimed: the flags are wanted, and the table's owner is gone.
	unclaimed bool

	// What the kernel holds, as far as Apply needs it to send differences.
	bound    map[bindingKey]Binding
	networks map[netip.Prefix]bool
	tunnels  map[tunnelKey]bool
	ports    map[hostPortKey]HostPort
	toHost   PodToHost
	epoch    uint32
	again    bool // the second bump of the last epoch is due
	stale    bool // a transaction failed: read the kernel before the next one

	seq      uint64
	pending  []pending
	changed  map[policy.Key]uint64 // keys replaced in place and the receipt, until its grace period is over
	judged   uint64                // the last receipt that changed profiles or isolation, until its grace period is over
	dropping map[policy.Key]bool   // keys in the drops of pending
	replaces bool                  // this kernel never misses a key that one transaction replaces
}

// Binding is a pod's interface and one of its addresses.
type Binding struct {
	Interface  string // host side, beginning with InterfacePrefix; empty where another CNI wires the pod
	Addr       netip.Addr
	Masquerade bool   // what leaves the pod networks from it is masqueraded
	Comment    string // "namespace/pod"
}

type bindingKey struct {
	iface string
	addr  netip.Addr
}

func (b Binding) key() bindingKey { return bindingKey{b.Interface, b.Addr} }

// State is what the kernel holds.
type State struct {
	Tables      policy.Tables
	Bindings    []Binding
	PodNetworks []netip.Prefix
	Tunnels     Tunnels
	HostPorts   []HostPort
	PodToHost   PodToHost
	Epoch       uint32
	Generation  uint32
}

// Change is one update of the table.
type Change struct {
	Unbind      []Binding      // committed first, in a transaction of its own: the guards close before policy goes away
	Delta       policy.Delta   // then its Steps, one transaction each
	Bind        []Binding      // committed together with the last Step
	PodNetworks []netip.Prefix // desired set of not-masqueraded destinations when non-nil
	Tunnels     *Tunnels       // desired ports and nodes when non-nil
	// HostPorts are the desired ports of the node that lead to pods, when non-nil. What goes, goes with Unbind, what
	// comes, comes with Bind; conntrack's entries of what changed are deleted.
	HostPorts []HostPort
	PodToHost *PodToHost // desired when non-nil
}

// Receipt says what Apply did.
type Receipt struct {
	Seq          uint64 // for Finish
	Generation   uint32 // of the kernel after the last transaction
	Took         time.Duration
	Transactions int
	Elements     int
}

// Open dials and creates the table when there is none, with a fresh random epoch. A table whose program (chains, rules,
// types of sets) is ours and unchanged is adopted without writing; any other is replaced in one transaction that
// carries the elements over. A table that another live process owns is an error.
func Open(ctx context.Context, o Options) (*Table, error) {
	c, err := openConn(o)
	if err != nil {
		return nil, err
	}
	t := &Table{conn: c, reader: &Reader{conn: c}, log: cmp.Or(o.Log, slog.New(slog.DiscardHandler)), netNS: o.NetNS, replaces: replacesExactly()}
	switch {
	case o.Owner && kernelFrom(6, 9):
		t.flags = tableOwner | tablePersist
	case o.Owner: // asking for what it cannot give would replace the table at every start
		t.log.Info(noOwnerFlag)
	}
	if err := t.open(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("open table inet %s: %w", TableName, err), c.Close())
	}
	return t, nil
}

func openConn(o Options) (*conn, error) {
	if o.Socket != nil {
		return adopt(o.Socket)
	}
	return dial(o.NetNS)
}

func (t *Table) open(ctx context.Context) error {
	p := newProgram()
	found, err := t.readTable()
	if err != nil {
		return err
	}
	if !found.exists {
		return t.create(p, State{})
	}
	if found.owner != 0 && found.owner != t.conn.port {
		return fmt.Errorf("another process owns it (netlink port %d): stop that agent first", found.owner)
	}
	t.reader.sets, err = t.reader.setNames()
	if err != nil && !errors.Is(err, ErrNoTable) {
		return err
	}
	diff, err := t.reader.programDiffers(p)
	if err != nil {
		return err
	}
	if diff == "" {
		if diff, err = t.bindingsDiffer(); err != nil {
			return err
		}
	}
	// The kernel takes the owner flag off a persistent table when its owner's socket closes.
	t.unclaimed = t.flags != 0 && found.flags&tablePersist != 0 && found.owner == 0
	wantsOwner := t.flags != 0 && !t.unclaimed && ownerFlags(t.flags, found.flags)
	if diff == "" && !wantsOwner {
		return t.adoptTable(ctx)
	}
	state, err := t.readState(ctx)
	if err != nil {
		t.log.Warn("elements of the old table cannot be carried over", "err", err)
		state = State{}
	}
	t.log.Info("replace table", "because", cmp.Or(diff, "flags owner,persist"))
	if state.Epoch != 0 {
		if _, t.again, err = t.readEpoch(); err != nil {
			return fmt.Errorf("read the old table's epoch: %w", err)
		}
	}
	if err := t.replace(p, state, found); err != nil {
		return err
	}
	return t.bumpOwed(ctx)
}

// adoptTable takes over a table that is as it should be, without writing. One that lost
// its owner is claimed with the next change: claiming is a transaction too.
func (t *Table) adoptTable(ctx context.Context) error {
	if err := t.load(ctx); err != nil {
		return err
	}
	return t.bumpOwed(ctx)
}

// bumpOwed makes the second bump of a revocation whose maker died between the two.
func (t *Table) bumpOwed(ctx context.Context) error {
	if !t.again {
		return nil
	}
	t.seq++
	t.pending = append(t.pending, pending{seq: t.seq, revokes: true})
	return t.graceAndFinish(ctx)
}

// claim makes this socket the owner of a table whose owner went (Linux 6.9).
func (t *Table) claim() error {
	if !t.unclaimed {
		return nil
	}
	b := newBatch(t.conn.seq)
	b.addTable(t.flags)
	if err := t.conn.commit(b); err != nil {
		return fmt.Errorf("claim table: %w", err)
	}
	t.unclaimed = false
	return nil
}

// Close leaves the rules in force.
func (t *Table) Close() error { return t.conn.Close() }

// File returns a duplicate of the socket that owns the table, for systemd's FD store.
func (t *Table) File() (*os.File, error) {
	fd, err := unix.FcntlInt(uintptr(t.conn.fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("duplicate nfnetlink socket: %w", err)
	}
	return os.NewFile(uintptr(fd), "nftcni-table"), nil
}

// Port is the netlink port of the table's commits, for Options.Port of Watch.
func (t *Table) Port() uint32 { return t.conn.port }

// Lookup reads one element from the kernel. For NetID the range that holds k.Addr is meant, for AccessRange the one
// that holds k.First.
func (t *Table) Lookup(ctx context.Context, k policy.Key) (value uint32, found bool, err error) {
	return t.reader.Lookup(ctx, k)
}

// Decide is the kernel's answer for one flow, by reading its elements only.
func (t *Table) Decide(ctx context.Context, f policy.Flow) (policy.TableVerdict, error) {
	return t.reader.Decide(ctx, f)
}

// Generation is the number of the last nf_tables commit in the namespace, by anybody.
func (t *Table) Generation(ctx context.Context) (uint32, error) { return t.conn.generation(ctx) }

// Delete removes the table with everything in it; that there is none is not an error.
func Delete(ctx context.Context, o Options) error {
	c, err := openConn(o)
	if err != nil {
		return err
	}
	t := &Table{conn: c}
	found, err := t.readTable()
	if err == nil && found.exists {
		b := newBatch(c.seq)
		if found.flags&tableOwner != 0 && found.owner == 0 {
			b.addTable(found.flags)
		}
		b.deleteTable()
		err = c.commit(b)
	}
	if err != nil {
		err = fmt.Errorf("delete table inet %s: %w", TableName, err)
	}
	return errors.Join(err, c.Close())
}

// CurrentGeneration is Generation without a Table.
func CurrentGeneration(ctx context.Context, o Options) (uint32, error) {
	c, err := openConn(o)
	if err != nil {
		return 0, err
	}
	g, err := c.generation(ctx)
	return g, errors.Join(err, c.Close())
}
