package nft

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/policy"
)

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
		if err := c.Tunnels.validate(); err != nil {
			return err
		}
	}
	if c.PodToHost != nil {
		if err := c.PodToHost.validate(); err != nil {
			return err
		}
	}
	return validateHostPorts(c.HostPorts)
}

func (t *Table) apply(ctx context.Context, c Change) (Receipt, error) {
	var r Receipt
	if err := t.claim(); err != nil {
		return r, err
	}
	unbind, fresh := t.unbinds(c.Unbind), t.fresh(c.Bind)
	revokes := c.Delta.Revokes || len(unbind) > 0 || t.tunnelsNarrow(c.Tunnels)
	var moved movedPorts
	moved.added, moved.removed = hostPortChanges(t.ports, c.HostPorts)
	toHost := planPodToHost(t.toHost, c.PodToHost)
	if len(unbind)+len(moved.removed) > 0 {
		if err := t.commitUnbind(&r, unbind, moved.removed); err != nil {
			return r, err
		}
	}
	if err := t.commitPodPorts(&r, toHost.before); err != nil {
		return r, err
	}
	if err := t.commitSteps(ctx, &r, c.Delta, fresh); err != nil {
		return r, err
	}
	if err := t.commitLast(&r, c, moved.added, toHost, revokes); err != nil {
		return r, err
	}
	t.forgetFlows(ctx, movedPorts{added: moved.added}) // Finish does the rest: nobody waits for what is gone
	if n := len(c.Delta.Steps); n > 0 {
		t.note(c.Delta.Steps[n-1], fresh)
	}
	if len(toHost.after) > 0 {
		if err := errors.Join(Grace(ctx), t.commitPodPorts(&r, toHost.after)); err != nil {
			return r, err
		}
	}
	if c.PodToHost != nil {
		t.toHost = PodToHost{c.PodToHost.Deny, c.PodToHost.ports()}
	}
	t.seq++
	r.Seq = t.seq
	t.owe(pending{seq: t.seq, revokes: revokes, drops: c.Delta.Drops, moved: moved})
	return r, nil
}

// commitSteps commits all steps but the last, each when the packets in flight allow it; it waits for the last too.
func (t *Table) commitSteps(ctx context.Context, r *Receipt, d policy.Delta, fresh map[netip.Addr]bool) error {
	if d.Settle && len(t.dropping) > 0 {
		if err := t.graceAndFinish(ctx); err != nil {
			return err
		}
	}
	for i, step := range d.Steps {
		if err := t.settle(ctx, step, i > 0 && i == d.Pause); err != nil {
			return err
		}
		if i == len(d.Steps)-1 {
			break
		}
		b := newBatch(t.conn.seq)
		b.step(step)
		if err := t.commit(r, b); err != nil {
			return err
		}
		t.note(step, fresh)
	}
	return nil
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

// commitUnbind takes the node's ports away, closes the guards, and cuts the live connections of what it unbinds at once:
// live packets are not asked for their binding, and what follows may wait.
func (t *Table) commitUnbind(r *Receipt, unbind []Binding, ports []HostPort) error {
	b := newBatch(t.conn.seq)
	kept := maps.Clone(t.ports)
	for _, p := range ports {
		delete(kept, p.key())
	}
	b.unmapPorts(ports, kept)
	left := t.addressesWithout(unbind)
	for _, u := range unbind {
		b.unbind(u, left[u.Addr])
	}
	epoch := t.epoch
	if len(unbind) > 0 {
		epoch = t.bump(b, true)
	}
	if err := t.commit(r, b); err != nil {
		return err
	}
	for _, u := range unbind {
		delete(t.bound, u.key())
	}
	t.ports = kept
	t.again = t.again || epoch != t.epoch
	t.epoch = epoch
	return nil
}

// commitLast commits the last step with the bindings, the node's ports, the pod networks and the epoch.
func (t *Table) commitLast(r *Receipt, c Change, ports []HostPort, toHost podToHostPlan, revokes bool) error {
	b := newBatch(t.conn.seq)
	if n := len(c.Delta.Steps); n > 0 {
		b.step(c.Delta.Steps[n-1])
	}
	binds := t.binds(c.Bind, nil)
	b.rebind(binds, t.bound)
	b.mapPorts(ports, t.ports)
	add, remove := t.networkChanges(c.PodNetworks)
	b.networks(add, remove)
	open, closed := tunnelChanges(t.tunnels, c.Tunnels)
	b.tunnels(open, closed)
	b.podToHost(toHost)
	epoch := t.epoch
	// An unbinding has bumped already; what follows it may revoke more.
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
	for _, p := range ports {
		t.ports[p.key()] = p
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

// ErrMissing reports whether an Apply or Finish failed because an element it wanted to delete was not there, or one
// it wanted to add was there with another value: somebody else edited the table.
func ErrMissing(err error) bool { return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EEXIST) }
