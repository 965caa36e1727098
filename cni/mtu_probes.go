package cni

import (
	"context"
	"errors"
	"net/netip"
	"sync"
)

// probesAtOnce bounds the probes that wait at the same time: a thousand peers that all drop echo
// requests take half a minute, and the first answers do not crowd each other out of a socket.
const probesAtOnce = 32

// A ProbeTarget is an address and the size, in bytes, that should get there in one piece.
type ProbeTarget struct {
	Address netip.Addr
	Want    int
}

// ProbeTargets are the paths of a report, each once: the underlay of every peer that is reached.
func (r Report) ProbeTargets() []ProbeTarget {
	var list []ProbeTarget
	seen := map[ProbeTarget]bool{}
	for _, p := range r.Paths {
		t := ProbeTarget{p.Address, p.LinkMTU}
		if p.Address.IsValid() && p.LinkMTU >= smallProbe && !seen[t] {
			seen[t] = true
			list = append(list, t)
		}
	}
	return list
}

// ProbePaths asks all targets, up to 32 at a time, and returns what is known of them in their
// order. Targets whose probe failed are left out; the error joins the failures, or is ctx's.
func ProbePaths(ctx context.Context, ns int, targets []ProbeTarget) ([]PathProbe, error) {
	found, errs := make([]PathProbe, len(targets)), make([]error, len(targets))
	slots := make(chan struct{}, probesAtOnce)
	var all sync.WaitGroup
	for i, t := range targets {
		slots <- struct{}{}
		all.Go(func() {
			found[i], errs[i] = ProbePath(ctx, ns, t.Address, t.Want)
			<-slots
		})
	}
	all.Wait()
	done := found[:0]
	for i, p := range found {
		if errs[i] == nil {
			done = append(done, p)
		}
	}
	if ctx.Err() != nil {
		return done, ctx.Err()
	}
	return done, errors.Join(errs...)
}
