package cni

import (
	"context"

	"github.com/containernetworking/cni/pkg/types"
)

// status says whether an ADD could succeed now: code 50 with the reason when it could not, code 51 when running pods may
// be cut off too (CNI specification 1.1.0, section 4, STATUS).
func (p *Plugin) status(ctx context.Context, c *call) error {
	agent := NewClient(c.conf.RunDir)
	ready, err := agent.Ready(ctx)
	if err != nil {
		return types.NewError(types.ErrPluginNotAvailable, err.Error(), "")
	}
	if !ready.Ready {
		code := types.ErrPluginNotAvailable
		if ready.Limited {
			code = types.ErrLimitedConnectivity
		}
		return types.NewError(code, "the nftcni agent is not ready: "+ready.Reason, "")
	}
	if c.conf.delegated() {
		if _, err := c.delegate().find(); err != nil {
			return types.NewError(types.ErrPluginNotAvailable, err.Error(), "")
		}
		return c.delegate().run(ctx, "STATUS", record{}, p.Stderr)
	}
	if len(c.conf.pools) == 0 && len(ready.PodCIDRs) == 0 {
		return types.NewError(types.ErrPluginNotAvailable,
			"ipam has no subnet and the agent knows no podCIDRs of this node; write ipam.subnet, or set the Node's spec.podCIDRs", "")
	}
	return p.ipamStatus(ctx, c)
}
