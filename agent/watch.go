package agent

import (
	"context"
	"slices"
	"time"

	"github.com/nftcni/nftcni/cni"
	"github.com/nftcni/nftcni/k8s"
	"github.com/nftcni/nftcni/nft"
)

// orphanInterval is how often attachments are compared with the links that exist: a
// runtime without GC calls (containerd) may never tell that a sandbox is gone.
const orphanInterval = 5 * time.Second

// watch heals the table when somebody else changes it. Own commits are told by the
// netlink port of the table's socket, which changes when the table is opened again.
func (l *loop) watch(ctx context.Context) error {
	for ctx.Err() == nil {
		var port uint32
		if err := l.do(ctx, func() { port = l.table.Port() }); err != nil {
			return nil // ctx ended
		}
		until, reopened := context.WithCancel(ctx)
		err := nft.Watch(until, nft.Options{Port: port}, func(f nft.Foreign) {
			l.log.Warn("the table was changed by somebody else: healing it", "pid", f.PID, "comm", f.Comm,
				"deleted", f.Deleted, "eventsLost", f.Resync)
			_ = l.send(ctx, func(b *batch) { b.replace, b.reopen = true, true })
			_ = l.do(ctx, func() {
				if l.table.Port() != port {
					reopened()
				}
			})
		})
		reopened()
		if err != nil {
			return err
		}
	}
	return nil
}

// reconcile removes attachments whose link or network namespace is gone.
func (l *loop) reconcile(ctx context.Context) error {
	if l.cfg.Network != NetworkRouted {
		return nil
	}
	tick := time.NewTicker(orphanInterval)
	defer tick.Stop()
	for {
		gone, err := cni.Reconcile(ctx, cni.ReconcileOptions{
			RunDir: l.cfg.RunDir, StateDir: l.cfg.StateDir, Detach: l.detachOrphan,
			Report: func(what string) { l.log.Info("attachments compared with links", "repaired", what) },
		})
		if err != nil && ctx.Err() == nil {
			l.log.Error("look for orphaned attachments", "err", err)
		}
		for _, a := range gone {
			l.log.Info("attachment orphaned: removed", "pod", podName(a).String(), "interface", a.HostInterface)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// detachOrphan unbinds before the address is given back: nobody else may get it bound.
func (l *loop) detachOrphan(ctx context.Context, a cni.Attachment) error {
	r := cni.DetachRequest{ContainerID: a.ContainerID, Interface: a.Interface, HostInterface: a.HostInterface}
	if err := l.detach(ctx, r); err != nil {
		return err
	}
	return nil
}

// logProblems logs what is new in the source's list of problems.
func (s sink) logProblems(problems []k8s.Problem) {
	for _, p := range problems {
		if !slices.Contains(*s.known, p) {
			s.loop.log.Warn("object not honoured as written", "problem", p.String())
		}
	}
	*s.known = problems
}
