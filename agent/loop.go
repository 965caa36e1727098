package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"github.com/nftcni/nftcni/cni"
	"github.com/nftcni/nftcni/k8s"
	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
)

// work is one request to the loop. It may add to the batch and must not block.
type work func(*batch)

// batch is what the requests that were waiting when the loop woke up want, and becomes
// one nft.Change: requests are coalesced only while a transaction is in flight.
type batch struct {
	events  []policy.Event
	replace bool // compare everything with the kernel
	nodes   bool // the list of nodes changed
	reopen  bool // somebody else wrote: check the program too
	bind    []nft.Binding
	unbind  []nft.Binding
	touched map[string]bool // host interfaces bound or unbound
	answers []func(nft.Receipt, error)
	// attached are the attachments that came into force with this batch.
	attached []cni.Attachment
}

// dataplane is the part of nft.Table that the loop drives.
type dataplane interface {
	State(context.Context) (nft.State, error)
	Apply(context.Context, nft.Change) (nft.Receipt, error)
	Finish(ctx context.Context, seq uint64) error
	Port() uint32
	Close() error
}

// loop owns the engine, the table and the inventory.
type loop struct {
	cfg    Config
	log    *slog.Logger
	table  dataplane
	reopen func(context.Context) (dataplane, error)
	grace  func(context.Context) error
	work   chan work
	inv    *inventory
	claims *claims // with NetworkNone
	mesh   *mesh   // nil with NetworkNone
	engine *policy.Engine

	waitForPods bool          // attachments wait until the source lists their pod
	later       []work        // for the next batch
	loaded      bool          // there are objects to enforce: the source's, or the last known ones
	live        bool          // they are the source's
	synced      bool          // and they are in force
	sourceLive  chan struct{} // closed when live
	// sourceVersion counts the changes of the source's objects, savedVersion those in the file.
	sourceVersion, savedVersion uint64
	last                        *lastKnown // until the source is live: for when the table is deleted
	broken                      error      // the last failure to bring the kernel in line
	waiting                     map[policy.Name][]*attachWork
	problems                    []k8s.Problem
	networks                    []netip.Prefix
	heard                       nft.Tunnels
	mapped                      []nft.HostPort
	lastSeq                     uint64
	inGrace                     bool
	tidyDue                     bool
	generation                  uint32 // of the ruleset, with the last commit
	commits                     commitLog
	serving                     func()     // told once, when the first complete state is in force
	publish                     *publisher // nil: nobody to tell
}

func newLoop(cfg Config, log *slog.Logger, t dataplane) *loop {
	return &loop{
		cfg: cfg, log: log, table: t, grace: nft.Grace,
		work:    make(chan work, 1024),
		inv:     newInventory(cfg.Node, cfg.Network),
		claims:  newClaims(cfg.Node),
		waiting: map[policy.Name][]*attachWork{},

		sourceLive: make(chan struct{}),
	}
}

// run serves requests until ctx ends. The rules stay in force afterwards.
func (l *loop) run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case w := <-l.work:
			l.serve(ctx, w)
		}
		for len(l.later) > 0 {
			w := l.later[0]
			l.later = l.later[1:]
			l.serve(ctx, w)
		}
	}
}

// serve runs w and everything else that is waiting as one batch.
func (l *loop) serve(ctx context.Context, w work) {
	b := &batch{touched: map[string]bool{}}
	for w != nil {
		w(b)
		select {
		case w = <-l.work:
		default:
			w = nil
		}
	}
	l.commit(ctx, b)
}

// do runs f in the loop's goroutine and waits for it.
func (l *loop) do(ctx context.Context, f func()) error {
	done := make(chan struct{})
	if err := l.send(ctx, func(*batch) { f(); close(done) }); err != nil {
		return err
	}
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (l *loop) send(ctx context.Context, w work) error {
	select {
	case l.work <- w:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// again puts w into the next batch.
func (l *loop) again(w work) { l.later = append(l.later, w) }

// replace hands over the source's complete state (k8s.Sink).
func (l *loop) replace(c *policy.Cluster, problems []k8s.Problem) work {
	return func(b *batch) {
		l.load(b, c)
		l.problems, l.last = problems, nil
		l.sourceVersion++
		if !l.live {
			l.live = true
			close(l.sourceLive)
		}
		l.admit(b)
	}
}

// load makes c the objects to enforce.
func (l *loop) load(b *batch, c *policy.Cluster) {
	l.inv.load(c)
	b.replace, b.events, b.nodes, l.loaded = true, nil, true, true
	l.claims = newClaims(l.cfg.Node)
	for i := range c.Pods {
		l.claims.set(c.Pods[i].Name, &c.Pods[i])
	}
}

func (l *loop) apply(events []policy.Event, problems []k8s.Problem) work {
	return func(b *batch) {
		l.problems = problems
		l.sourceVersion += uint64(len(events))
		for _, e := range events {
			before := l.inv.boundOf(e)
			b.events = append(b.events, l.inv.apply(e)...)
			after := l.inv.boundOf(e)
			b.rebind(without(after, before), without(before, after))
			l.claim(b, e)
			b.nodes = b.nodes || e.Node != nil
			if e.Pod != nil {
				l.admitPod(b, e.Pod.Name)
			}
		}
	}
}

// commit brings the kernel in line with the inventory and answers the batch.
func (l *loop) commit(ctx context.Context, b *batch) {
	if !b.replace && len(b.events)+len(b.bind)+len(b.unbind)+len(b.answers) == 0 {
		return
	}
	began := time.Now()
	var r nft.Receipt
	var err error
	switch {
	case !l.loaded:
		err = l.beforeLoad(ctx, b)
	case b.replace || l.broken != nil:
		r, err = l.resync(ctx, b.reopen)
	default:
		r, err = l.change(ctx, b)
		if err != nil {
			l.log.Error("apply failed: reading the table back", "err", err)
			r, err = l.resync(ctx, false)
		}
	}
	l.record(began, b, r, err)
	for _, answer := range b.answers {
		answer(r, err)
	}
	if b.nodes && l.mesh != nil {
		l.mesh.offer(l.inv.peers())
	}
	if err == nil && l.publish != nil {
		for _, a := range b.attached {
			if x, ok := l.inv.publication(a); ok {
				l.publish.add(x)
			}
		}
	}
}

// beforeLoad serves a batch while the source has said nothing: only detaching is possible
// then, and the table that a predecessor left stays as it is. If somebody deleted it, a
// new one without bindings closes every pod until the source is known.
func (l *loop) beforeLoad(ctx context.Context, b *batch) error {
	if !b.reopen {
		return nil
	}
	_, err := l.read(ctx, true)
	if k := l.last; k != nil {
		l.again(func(b *batch) { l.restore(ctx, b, k) })
	}
	return err
}

var errNotSynced = errors.New("the agent has not yet seen the complete state of its source")

// change applies the batch as a difference.
func (l *loop) change(ctx context.Context, b *batch) (nft.Receipt, error) {
	c := nft.Change{Unbind: b.unbind, Bind: b.bind, Delta: l.engine.Apply(b.events...)}
	if want := l.inv.podNetworks(l.cfg.notMasqueraded()); !slices.Equal(want, l.networks) {
		c.PodNetworks, l.networks = notNil(want), want
	}
	c.Tunnels, c.HostPorts = l.changedTunnels(), l.changedHostPorts()
	return l.push(ctx, c)
}

func notNil(p []netip.Prefix) []netip.Prefix {
	if p == nil {
		return []netip.Prefix{}
	}
	return p
}

func (l *loop) push(ctx context.Context, c nft.Change) (nft.Receipt, error) {
	if c.Delta.Empty() && len(c.Bind)+len(c.Unbind) == 0 && c.PodNetworks == nil && c.Tunnels == nil && c.HostPorts == nil && c.PodToHost == nil {
		return nft.Receipt{Seq: l.lastSeq, Generation: l.generation}, nil
	}
	r, err := l.table.Apply(ctx, c)
	if err != nil {
		return r, fmt.Errorf("apply %d steps: %w", len(c.Delta.Steps), err)
	}
	l.lastSeq, l.generation = r.Seq, r.Generation
	l.startGrace(ctx)
	return r, nil
}

// resync reads the kernel's table and sends only what differs from the inventory. It is
// how the agent starts (adoption), heals after a foreign change, and recovers.
func (l *loop) resync(ctx context.Context, reopen bool) (nft.Receipt, error) {
	r, err := l.tryResync(ctx, reopen)
	if err != nil {
		l.log.Error("the kernel's table is not what it should be; trying again", "err", err)
		l.broken, l.engine = err, nil
		time.AfterFunc(time.Second, func() { _ = l.send(ctx, func(b *batch) { b.replace = b.replace || l.broken != nil }) })
		return r, err
	}
	l.broken = nil
	if l.live && !l.synced {
		l.synced = true
		if l.serving != nil {
			l.serving()
		}
	}
	return r, nil
}

func (l *loop) tryResync(ctx context.Context, reopen bool) (nft.Receipt, error) {
	state, err := l.read(ctx, reopen)
	if err != nil {
		return nft.Receipt{}, err
	}
	l.generation = state.Generation
	l.engine = policy.NewEngine(l.cfg.Node)
	l.engine.Adopt(state.Tables)
	cluster := l.inv.cluster()
	c := nft.Change{Delta: l.engine.Replace(cluster)}
	l.inv.share(cluster)
	c.Bind, c.Unbind = diffBindings(state.Bindings, l.wantBindings())
	l.networks = l.inv.podNetworks(l.cfg.notMasqueraded())
	if !slices.Equal(l.networks, state.PodNetworks) {
		c.PodNetworks = notNil(l.networks)
	}
	l.heard, l.mapped = state.Tunnels, state.HostPorts
	c.Tunnels, c.HostPorts = l.changedTunnels(), l.changedHostPorts()
	c.PodToHost = l.changedPodToHost(state.PodToHost)
	return l.push(ctx, c)
}

// read returns what the kernel holds. The table is opened again, which checks its rules
// and creates it when it is gone, after somebody else wrote to it or when it is unreadable.
func (l *loop) read(ctx context.Context, reopen bool) (nft.State, error) {
	if !reopen || l.reopen == nil {
		state, err := l.table.State(ctx)
		if err == nil || l.reopen == nil {
			return state, err
		}
		l.log.Warn("table unreadable: opening it again", "err", err)
	}
	_ = l.table.Close()
	table, err := l.reopen(ctx)
	if err != nil {
		return nft.State{}, fmt.Errorf("open table: %w", err)
	}
	l.table, l.lastSeq = table, 0
	state, err := table.State(ctx)
	if err != nil {
		return state, fmt.Errorf("read table: %w", err)
	}
	return state, nil
}

func (l *loop) wantBindings() []nft.Binding {
	if l.cfg.Network == NetworkNone {
		return l.claims.bindings()
	}
	var out []nft.Binding
	for _, a := range l.inv.attached {
		out = append(out, l.inv.bindings(a)...)
	}
	return out
}

func diffBindings(have, want []nft.Binding) (bind, unbind []nft.Binding) {
	key := func(b nft.Binding) nft.Binding { b.Comment = ""; return b }
	left := map[nft.Binding]nft.Binding{}
	for _, b := range have {
		left[key(b)] = b
	}
	for _, b := range want {
		if _, ok := left[key(b)]; ok {
			delete(left, key(b))
		} else {
			bind = append(bind, b)
		}
	}
	for _, b := range left {
		unbind = append(unbind, b)
	}
	return bind, unbind
}

// startGrace lets one grace period run beside the loop; what was applied before it
// began is finished when it ends.
func (l *loop) startGrace(ctx context.Context) {
	if l.inGrace {
		return
	}
	l.inGrace = true
	seq := l.lastSeq
	go func() {
		err := l.grace(ctx)
		_ = l.send(ctx, func(*batch) { l.endGrace(ctx, seq, err) })
	}()
}

func (l *loop) endGrace(ctx context.Context, seq uint64, err error) {
	l.inGrace = false
	if err == nil {
		err = l.table.Finish(ctx, seq)
	}
	if err != nil && ctx.Err() == nil {
		l.log.Error("finish after grace period", "err", err)
		l.broken = err
		_, _ = l.resync(ctx, false)
	}
	if l.lastSeq > seq {
		l.startGrace(ctx)
		return
	}
	l.tidyLater(ctx)
}

// tidyInterval keeps merging classes of addresses, which no packet waits for, rare.
const tidyInterval = 10 * time.Second

// tidyLater lets the engine merge and forget what nothing needs any more, once the
// changes that made it superfluous are a while ago.
func (l *loop) tidyLater(ctx context.Context) {
	if l.tidyDue {
		return
	}
	l.tidyDue = true
	time.AfterFunc(tidyInterval, func() {
		_ = l.send(ctx, func(*batch) { l.tidy(ctx) })
	})
}

func (l *loop) tidy(ctx context.Context) {
	l.tidyDue = false
	if l.engine == nil || l.broken != nil {
		return
	}
	if _, err := l.push(ctx, nft.Change{Delta: l.engine.Tidy()}); err != nil {
		l.log.Error("tidy: reading the table back", "err", err)
		_, _ = l.resync(ctx, false)
	}
}
