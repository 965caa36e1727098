package agent

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/cni"
)

// pathProbes asks, when a path is first seen, whether it carries what its link promises. What
// does not is found here, and not by a TLS handshake that hangs. A path that answers nothing is asked
// again: its node may still be starting.
type pathProbes struct {
	ask func(ctx context.Context, targets []cni.ProbeTarget) ([]cni.PathProbe, error)
	log *slog.Logger
	// again is the pauses before silent paths are asked again.
	again []time.Duration

	*probed
}

type probed struct {
	mu      sync.Mutex
	paths   map[cni.ProbeTarget]*cni.PathProbe // nil: being asked
	err     string
	running sync.WaitGroup
}

func newPathProbes(log *slog.Logger) pathProbes {
	ask := func(ctx context.Context, targets []cni.ProbeTarget) ([]cni.PathProbe, error) {
		return cni.ProbePaths(ctx, 0, targets)
	}
	return pathProbes{ask, log, []time.Duration{5 * time.Second, 30 * time.Second, 5 * time.Minute}, &probed{paths: map[cni.ProbeTarget]*cni.PathProbe{}}}
}

// start asks about the targets that are new, in the background, and forgets those that are gone.
func (p *pathProbes) start(ctx context.Context, targets []cni.ProbeTarget) {
	p.mu.Lock()
	defer p.mu.Unlock()
	wanted := make(map[cni.ProbeTarget]*cni.PathProbe, len(targets))
	var fresh []cni.ProbeTarget
	for _, t := range targets {
		old, known := p.paths[t]
		wanted[t] = old
		if !known {
			fresh = append(fresh, t)
		}
	}
	p.paths = wanted
	if len(fresh) > 0 && ctx.Err() == nil {
		p.running.Go(func() { p.run(ctx, fresh) })
	}
}

func (p *pathProbes) run(ctx context.Context, targets []cni.ProbeTarget) {
	for i := 0; ; i++ {
		found, err := p.ask(ctx, targets)
		if ctx.Err() != nil {
			return
		}
		p.tell(found, err)
		targets = p.keep(targets, found, err)
		if len(targets) == 0 || i == len(p.again) {
			return
		}
		select {
		case <-time.After(p.again[i]):
		case <-ctx.Done():
			return
		}
	}
}

func (p *pathProbes) tell(found []cni.PathProbe, err error) {
	if err != nil {
		p.log.Warn("the paths to other nodes are not all probed", "err", err)
	}
	for _, f := range found {
		if f.TooSmall() {
			p.log.Warn("the path to a node carries less than its link: set mtu in the agent's configuration, or mend the path",
				"address", f.Address, "link", f.Want, "carries", f.Carries)
		}
	}
}

// keep remembers what was found, and returns the targets that are still paths and have not
// answered.
func (p *pathProbes) keep(targets []cni.ProbeTarget, found []cni.PathProbe, err error) []cni.ProbeTarget {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err = ""; err != nil {
		p.err = probeError(err)
	}
	for _, f := range found {
		t := cni.ProbeTarget{Address: f.Address, Want: f.Want}
		if _, still := p.paths[t]; still {
			p.paths[t] = &f
		}
	}
	return slices.DeleteFunc(slices.Clone(targets), func(t cni.ProbeTarget) bool {
		f, still := p.paths[t]
		return !still || f != nil && f.Carries > 0
	})
}

// probeError is short: a thousand peers fail for one reason.
func probeError(err error) string {
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return "the agent may not send ICMP echoes: give it CAP_NET_RAW"
	}
	text := err.Error()
	return text[:min(len(text), 300)]
}

// results are in the order of the addresses.
func (p *pathProbes) results() ([]cni.PathProbe, string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var list []cni.PathProbe
	for _, f := range p.paths {
		if f != nil {
			list = append(list, *f)
		}
	}
	slices.SortFunc(list, func(a, b cni.PathProbe) int { return a.Address.Compare(b.Address) })
	return list, p.err
}

func (p *pathProbes) wait() { p.running.Wait() }
