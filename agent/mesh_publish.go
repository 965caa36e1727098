package agent

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"time"
)

// Waits between two tries to publish.
const (
	publishFirst = time.Second
	publishMost  = time.Minute
)

// nodePublisher keeps what this node says in its Node object equal to what the mesh has. It belongs
// to mesh.run's goroutine.
type nodePublisher struct {
	// key and addrs write; nil where nobody listens.
	key     func(ctx context.Context, key string) error
	addrs   func(ctx context.Context, addrs []netip.Addr) error
	chooses bool // the configuration chooses the node's addresses

	// What the Node object has, as far as known: what was seen last, or written since.
	hasKey   string
	hasAddrs []netip.Addr
	seen     bool
	wait     time.Duration
}

// known takes what the newest list of nodes has.
func (p *nodePublisher) known(key string, addrs []netip.Addr) {
	p.hasKey, p.hasAddrs, p.seen = key, addrs, true
}

// publish writes what differs, and returns when to try again; 0: nothing is left to do.
func (m *mesh) publish(ctx context.Context) time.Duration {
	p := &m.publisher
	if !p.seen {
		return 0
	}
	var errs []error
	if key := m.cni.PublicKey(); p.key != nil && key != "" && key != p.hasKey {
		err := p.key(ctx, key)
		if err == nil {
			p.hasKey = key
		}
		errs = append(errs, err)
	}
	var want []netip.Addr
	if p.chooses {
		want = m.cni.Report().Addrs
	}
	if p.addrs != nil && !slices.Equal(want, p.hasAddrs) && (!p.chooses || len(want) > 0) {
		err := p.addrs(ctx, want)
		if err == nil {
			p.hasAddrs = want
		}
		errs = append(errs, err)
	}
	err := errors.Join(errs...)
	if err == nil || ctx.Err() != nil {
		p.wait = 0
		return 0
	}
	p.wait = min(max(2*p.wait, publishFirst), publishMost)
	m.log.Error("publish what other nodes need of this one; trying again", "in", p.wait, "err", err)
	return p.wait
}
