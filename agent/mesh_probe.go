package agent

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/cni"
)

// pathProbes asks once, when a path is first seen, whether it carries what its link promises. What
// does not is found here, and not by a TLS handshake that hangs.
type pathProbes struct {
	ask func(ctx context.Context, targets []cni.ProbeTarget) ([]cni.PathProbe, error)
	log *slog.Logger

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
	return pathProbes{ask, log, &probed{paths: map[cni.ProbeTarget]*cni.PathProbe{}}}
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
	found, err := p.ask(ctx, targets)
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		p.log.Warn("the paths to other nodes are not all probed", "err", err)
	}
	for _, f := range found {
		if f.TooSmall() {
			p.log.Warn("the path to a node carries less than its link: set mtu in the agent's configuration, or mend the path",
				"address", f.Address, "link", f.Want, "carries", f.Carries)
		}
	}
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
