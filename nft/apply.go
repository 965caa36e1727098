package nft

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/policy"
)

// pending is what a receipt still owes after its grace period.
type pending struct {
	seq     uint64
	revokes bool
	drops   []policy.Op
}

// Apply commits c and returns at the kernel's acknowledgement of its last transaction: from then on every new packet
// meets the new policy. After an error a prefix of complete transactions is in force; the caller reads State and
// computes anew. Binding what is bound and unbinding what is not are no-ops.
//
// A key that one transaction deletes and adds again may be missed once by a reader on kernels before 6.17. The rules
// look twice, which is exact as long as the key does not change again before that reader is through. Apply sees to
// that: where a step would, it waits for a grace period first. It waits as well between a step that changes profiles
// or isolation and the next one that changes a decision: a packet reads its profiles first, and must not meet what is two
// changes younger (docs/decisions/0006). Binding a new pod never waits for another. The delta's own wishes, Settle and
// Pause, are honoured in any case.
func (t *Table) Apply(ctx context.Context, c Change) (Receipt, error) {
	began := time.Now()
	if err := c.validate(); err != nil {
		return Receipt{}, err
	}
	if t.stale {
		if err := t.load(ctx); err != nil {
			return Receipt{}, fmt.Errorf("read table inet %s after a failed transaction: %w", TableName, err)
		}
	}
	r, err := t.apply(ctx, c)
	if err != nil {
		t.stale = true
		return r, fmt.Errorf("apply change after %d complete transactions: %w", r.Transactions, err)
	}
	if r.Generation, err = t.conn.generation(ctx); err != nil {
		return r, err
	}
	r.Took = time.Since(began)
	return r, nil
}

// validate refuses what would not be a pod's interface or address.
func (c Change) validate() error {
	for _, b := range c.Bind {
		if b.Interface == "" && b.Masquerade {
			return fmt.Errorf("bind %s: masquerading needs the pod's interface", b.Addr)
		}
		if b.Interface != "" && (!strings.HasPrefix(b.Interface, InterfacePrefix) || len(b.Interface) >= unix.IFNAMSIZ) {
			return fmt.Errorf("bind %s: interface %q: want a name of at most 15 bytes that begins with %q", b.Addr, b.Interface, InterfacePrefix)
		}
		if !b.Addr.IsValid() || b.Addr.Is4In6() || b.Addr.Zone() != "" {
			return fmt.Errorf("bind %s: address %q: want an IPv4 or IPv6 address without zone, not mapped", b.Interface, b.Addr)
		}
	}
	for _, p := range c.PodNetworks {
		if p != p.Masked() || !p.IsValid() {
			return fmt.Errorf("pod network %s: want a prefix without host bits", p)
		}
	}
	if c.Tunnels != nil {
		return c.Tunnels.validate()
	}
	return nil
}

func (t *Table) apply(ctx context.Context, c Change) (Receipt, error) {
	var r Receipt
	if err := t.claim(); err != nil {
		return r, err
	}
	unbind, fresh := t.unbinds(c.Unbind), t.fresh(c.Bind)
	revokes := c.Delta.Revokes || len(unbind) > 0 || t.tunnelsNarrow(c.Tunnels)
	steps := c.Delta.Steps
	if len(unbind) > 0 {
		last := len(steps) == 0 && len(t.binds(c.Bind, unbind)) == 0 && !t.networksDiffer(c.PodNetworks) && !t.tunnelsDiffer(c.Tunnels)
		if err := t.commitUnbind(&r, unbind, last); err != nil {
			return r, err
		}
	}
	if c.Delta.Settle && len(t.dropping) > 0 {
		if err := t.graceAndFinish(ctx); err != nil {
			return r, err
		}
	}
	for i, step := range steps {
		if err := t.settle(ctx, step, i > 0 && i == c.Delta.Pause); err != nil {
			return r, err
		}
		if i == len(steps)-1 {
			break
		}
		b := newBatch(t.conn.seq)
		b.step(step)
		if err := t.commit(&r, b); err != nil {
			return r, err
		}
		t.note(step, fresh)
	}
	if err := t.commitLast(&r, c, revokes); err != nil {
		return r, err
	}
	if n := len(steps); n > 0 {
		t.note(steps[n-1], fresh)
	}
	t.seq++
	r.Seq = t.seq
	t.owe(pending{seq: t.seq, revokes: revokes, drops: c.Delta.Drops})
	return r, nil
}

func (t *Table) commit(r *Receipt, b *batch) error {
	if b.empty() {
		return nil
	}
	n := b.n
	if err := t.conn.commit(b); err != nil {
		return err
	}
	r.Transactions++
	r.Elements += n
	return nil
}

// commitUnbind closes the guards, and cuts live connections at once when nothing else follows.
func (t *Table) commitUnbind(r *Receipt, unbind []Binding, last bool) error {
	b := newBatch(t.conn.seq)
	left := t.addressesWithout(unbind)
	for _, u := range unbind {
		b.unbind(u, left[u.Addr])
	}
	epoch := t.epoch
	if last {
		epoch = t.bump(b, true)
	}
	if err := t.commit(r, b); err != nil {
		return err
	}
	for _, u := range unbind {
		delete(t.bound, u.key())
	}
	t.again = t.again || epoch != t.epoch
	t.epoch = epoch
	return nil
}

// commitLast commits the last step with the bindings, the pod networks and the epoch.
func (t *Table) commitLast(r *Receipt, c Change, revokes bool) error {
	b := newBatch(t.conn.seq)
	if n := len(c.Delta.Steps); n > 0 {
		b.step(c.Delta.Steps[n-1])
	}
	binds := t.binds(c.Bind, nil)
	b.rebind(binds, t.bound)
	add, remove := t.networkChanges(c.PodNetworks)
	b.networks(add, remove)
	open, closed := tunnelChanges(t.tunnels, c.Tunnels)
	b.tunnels(open, closed)
	epoch := t.epoch
	// An unbinding that stood alone has bumped already.
	if revokes && (!b.empty() || c.Delta.Revokes || r.Transactions == 0) {
		epoch = t.bump(b, true)
	}
	if err := t.commit(r, b); err != nil {
		return err
	}
	t.again = t.again || epoch != t.epoch
	t.epoch = epoch
	for _, bind := range binds {
		t.bound[bind.key()] = bind
	}
	for _, p := range remove {
		delete(t.networks, p)
	}
	for _, p := range add {
		t.networks[p] = true
	}
	if c.Tunnels != nil {
		t.tunnels = c.Tunnels.keys()
	}
	return nil
}

// step adds a step: deletes before adds, the changes of one set together.
func (b *batch) step(step []policy.Op) {
	for _, del := range []bool{true, false} {
		bySet := map[string][]policy.Op{}
		var order []string
		for _, o := range step {
			if o.Delete != del {
				continue
			}
			set := ElementSet(o.Key)
			if bySet[set] == nil {
				order = append(order, set)
			}
			bySet[set] = append(bySet[set], o)
		}
		for _, set := range order {
			for _, o := range bySet[set] {
				b.op(o)
			}
		}
	}
}

// settle waits for a grace period when packets in flight may be older than what step assumes: it touches a key that
// they may look up twice over, or one whose deletion is still owed, or it changes decisions while they may hold a profile
// from before the last change. With pause it waits whatever the step changes. Between the steps of one delta nothing
// else needs it: whoever made the delta says where (policy.Delta.Pause).
func (t *Table) settle(ctx context.Context, step []policy.Op, pause bool) error {
	conflict := pause
	for _, o := range step {
		_, changed := t.changed[o.Key]
		conflict = conflict || t.dropping[o.Key] || !t.replaces && changed || t.judged != 0 && t.judged <= t.seq && addressed(o.Map)
	}
	if !conflict {
		return nil
	}
	return t.graceAndFinish(ctx)
}

func (t *Table) graceAndFinish(ctx context.Context) error {
	if err := Grace(ctx); err != nil {
		return err
	}
	clear(t.changed)
	t.judged = 0
	return t.finish(t.seq)
}

// note remembers what a committed step did to keys that packets in flight may have read. Addresses that were not bound
// before have no packets in flight.
func (t *Table) note(step []policy.Op, fresh map[netip.Addr]bool) {
	if t.changed == nil {
		t.changed = map[policy.Key]uint64{}
	}
	for _, o := range step {
		if o.Delete && !t.replaces {
			t.changed[o.Key] = t.seq + 1
		}
		if readFirst(o.Map) && !fresh[o.Addr] {
			t.judged = t.seq + 1
		}
	}
}

// readFirst are the maps a packet reads before those that give the profile its meaning.
func readFirst(m policy.Map) bool {
	switch m {
	case policy.IngressProfile, policy.EgressProfile, policy.IsolatedIngress, policy.IsolatedEgress:
		return true
	}
	return false
}

func (t *Table) owe(p pending) {
	if !p.revokes && len(p.drops) == 0 && len(t.changed) == 0 {
		return
	}
	t.pending = append(t.pending, p)
	if t.dropping == nil {
		t.dropping = map[policy.Key]bool{}
	}
	for _, o := range p.drops {
		t.dropping[o.Key] = true
	}
}

// Finish completes every receipt up to seq, after a Grace that began when receipt seq was there: the second bump of
// the epoch where a change revoked something, and the elements nothing points to any more, in one transaction.
// Nothing owed is a no-op.
func (t *Table) Finish(ctx context.Context, seq uint64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	maps.DeleteFunc(t.changed, func(_ policy.Key, since uint64) bool { return since <= seq })
	if t.judged <= seq {
		t.judged = 0
	}
	if err := t.finish(seq); err != nil {
		t.stale = true
		return fmt.Errorf("finish changes up to %d: %w", seq, err)
	}
	return nil
}

func (t *Table) finish(seq uint64) error {
	b := newBatch(t.conn.seq)
	revokes, done := false, 0
	for _, p := range t.pending {
		if p.seq > seq {
			break
		}
		done++
		revokes = revokes || p.revokes
		b.step(p.drops)
	}
	epoch, again := t.epoch, t.again
	if revokes {
		// A later change may still owe its own second bump.
		again = slices.ContainsFunc(t.pending[done:], func(p pending) bool { return p.revokes })
		epoch = t.bump(b, again)
	}
	if !b.empty() {
		if err := t.conn.commit(b); err != nil {
			t.forgetDrops()
			return err
		}
	}
	for _, p := range t.pending[:done] {
		for _, o := range p.drops {
			delete(t.dropping, o.Key)
		}
	}
	t.pending = slices.Clone(t.pending[done:])
	t.epoch, t.again = epoch, again
	return nil
}

// forgetDrops gives up deletions that cannot be made because somebody else edited the table. What is left of them
// shows in the next State, and the caller's next change drops it. Bumps stay owed.
func (t *Table) forgetDrops() {
	for i := range t.pending {
		t.pending[i].drops = nil
	}
	clear(t.dropping)
}

// ErrMissing reports whether an Apply or Finish failed because an element it wanted to delete was not there, or one
// it wanted to add was there with another value: somebody else edited the table.
func ErrMissing(err error) bool { return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EEXIST) }
