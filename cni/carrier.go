package cni

import (
	"context"
	"fmt"
	"time"

	"github.com/vishvananda/netlink"
)

// carrierPoll is the time between two looks at the pod's end, of which newer kernels need one;
// carrierTimeout bounds them.
const (
	carrierPoll    = time.Millisecond
	carrierTimeout = 10 * time.Second
)

// awaitCarrier returns when the pod can send. Its end was set up before the node's end gave
// it a carrier, and until the kernel's link watch has noticed, which takes the RTNL lock that
// other pods' calls hold, it drops whatever the pod sends. Newer kernels notice when they are
// asked (linkwatch_sync_dev in rtnl_getlink).
func (w *wire) awaitCarrier(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, carrierTimeout)
	defer cancel()
	for {
		link, err := w.pod.LinkByIndex(w.inside)
		if err != nil {
			return fmt.Errorf("find %s in the pod: %w", w.name, err)
		}
		if link.Attrs().OperState == netlink.OperUp {
			return nil
		}
		select {
		case <-time.After(carrierPoll):
		case <-ctx.Done():
			return fmt.Errorf("wait for the carrier of %s in the pod: %w", w.name, ctx.Err())
		}
	}
}
