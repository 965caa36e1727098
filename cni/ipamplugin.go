package cni

import (
	"context"
	"fmt"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"

	"github.com/nftcni/nftcni/ipam"
)

// served is the owner under which nftcni-ipam leases for another plugin. Its leases are
// never taken for those of a pod of ours: they have no payload.
func (c *call) served() ipam.Owner {
	return ipam.Owner{Network: c.conf.Name, ContainerID: c.containerID, Interface: c.ifname}
}

func (p *Plugin) ipamAdd(ctx context.Context, c *call) error {
	pools := c.conf.pools
	if len(pools) == 0 {
		return wrong("ipam: has no subnet; write ipam.subnet or ipam.ranges")
	}
	for _, pool := range pools {
		for i := range pool {
			if !pool[i].Gateway.IsValid() && pool[i].Subnet.Bits() < pool[i].Subnet.Addr().BitLen()-1 {
				pool[i].Gateway = pool[i].Subnet.Addr().Next() // what bridge and ptp give themselves
			}
		}
	}
	s, err := store(c.conf.RunDir, c.conf.StateDir, p.report)
	if err != nil {
		return wrong("%v", err)
	}
	leases, err := s.Acquire(ctx, ipam.Request{Owner: c.served(), Pod: c.args.podName(), NetNS: c.netns, Pools: pools,
		Excludes: c.conf.excludes, Reserved: c.conf.reserved, Wanted: c.conf.wanted})
	if err != nil {
		return err
	}
	p.done("ipam lease")
	if err := p.printLeases(c, leases, pools); err != nil {
		_, undoErr := s.Release(context.WithoutCancel(ctx), c.served())
		if undoErr != nil {
			p.report(undoErr.Error())
		}
		return err
	}
	return nil
}

func (p *Plugin) printLeases(c *call, leases []ipam.Lease, pools []ipam.Pool) error {
	res := &current.Result{CNIVersion: current.ImplementedSpecVersion, DNS: c.conf.DNS}
	for _, l := range leases {
		for _, pool := range pools {
			for _, r := range pool {
				if !r.Contains(l.Address) {
					continue
				}
				n := ipNet(r.Subnet)
				n.IP = l.Address.AsSlice()
				ip := &current.IPConfig{Address: *n}
				if r.Gateway.IsValid() {
					ip.Gateway = r.Gateway.AsSlice()
				}
				res.IPs = append(res.IPs, ip)
			}
		}
	}
	for _, r := range c.conf.routes {
		res.Routes = append(res.Routes, &types.Route{Dst: *ipNet(r)})
	}
	out, err := res.GetAsVersion(c.conf.CNIVersion)
	if err != nil {
		return fmt.Errorf("convert result to version %s: %w", c.conf.CNIVersion, err)
	}
	if err := out.PrintTo(p.Stdout); err != nil {
		return fmt.Errorf("print result: %w", err)
	}
	return nil
}

func (p *Plugin) ipamDel(ctx context.Context, c *call) error {
	s, err := store(c.conf.RunDir, c.conf.StateDir, p.report)
	if err != nil {
		return wrong("%v", err)
	}
	_, err = s.Release(ctx, c.served())
	return err
}

func (p *Plugin) ipamCheck(ctx context.Context, c *call) error {
	s, err := store(c.conf.RunDir, c.conf.StateDir, p.report)
	if err != nil {
		return wrong("%v", err)
	}
	held, err := s.Of(ctx, c.served())
	if err != nil {
		return err
	}
	if len(held) == 0 {
		return types.NewError(types.ErrUnknownContainer, fmt.Sprintf("no lease for %s; delete the pod and make it again", c.served()), "")
	}
	return nil
}

func (p *Plugin) ipamStatus(ctx context.Context, c *call) error {
	s, err := store(c.conf.RunDir, c.conf.StateDir, p.report)
	if err != nil {
		return wrong("%v", err)
	}
	if _, err := s.Leases(ctx); err != nil {
		return types.NewError(types.ErrPluginNotAvailable, fmt.Sprintf("leases: %v", err), "")
	}
	return nil
}

func (p *Plugin) ipamGC(ctx context.Context, c *call) error {
	valid, err := c.validAttachments()
	if err != nil {
		return err
	}
	s, err := store(c.conf.RunDir, c.conf.StateDir, p.report)
	if err != nil {
		return wrong("%v", err)
	}
	_, err = s.ReleaseIf(ctx, func(l ipam.Lease) bool {
		return l.Network == c.conf.Name && len(l.Payload) == 0 && !valid[types.GCAttachment{ContainerID: l.ContainerID, IfName: l.Interface}]
	})
	return err
}
