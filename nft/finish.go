package nft

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/nftcni/nftcni/policy"
)

// pending is what a receipt still owes after its grace period.
type pending struct {
	seq     uint64
	revokes bool
	drops   []policy.Op
	moved   movedPorts
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
	return t.finish(ctx, t.seq)
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
	if !p.revokes && len(p.drops) == 0 && len(t.changed) == 0 && p.moved.none() {
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
	if err := t.finish(ctx, seq); err != nil {
		t.stale = true
		return fmt.Errorf("finish changes up to %d: %w", seq, err)
	}
	return nil
}

func (t *Table) finish(ctx context.Context, seq uint64) error {
	b := newBatch(t.conn.seq)
	revokes, done := false, 0
	var moved movedPorts
	for _, p := range t.pending {
		if p.seq > seq {
			break
		}
		done++
		revokes = revokes || p.revokes
		b.step(p.drops)
		moved.added, moved.removed = append(moved.added, p.moved.added...), append(moved.removed, p.moved.removed...)
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
	t.forgetFlows(ctx, moved) // those that a packet in flight made too
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
