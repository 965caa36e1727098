package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/ipam"
)

// validAttachments reads cni.dev/valid-attachments: a list that is empty means none, and
// so does null, which is how libcni writes one. One that is absent is an error, because
// taking it for empty would remove every pod.
func (c *call) validAttachments() (map[types.GCAttachment]bool, error) {
	if len(c.conf.ValidAttachments) == 0 {
		return nil, wrong("cni.dev/valid-attachments: is missing; GC removes what is not in that list, so it must be there, even if it is empty")
	}
	var list []types.GCAttachment
	if err := json.Unmarshal(c.conf.ValidAttachments, &list); err != nil {
		return nil, wrong("cni.dev/valid-attachments: is no list of {\"containerID\": ..., \"ifname\": ...}: %v", err)
	}
	valid := map[types.GCAttachment]bool{}
	for _, a := range list {
		valid[a] = true
	}
	return valid, nil
}

// gc removes the attachments and leases of this network that the runtime does not know
// any more (CNI specification 1.1.0, section 4, GC). One that another plugin works on
// right now is left alone.
func (p *Plugin) gc(ctx context.Context, c *call) error {
	valid, err := c.validAttachments()
	if err != nil {
		return err
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	stale, err := p.staleRecords(ctx, c, valid)
	if err != nil {
		return err
	}
	agent := NewClient(c.conf.RunDir)
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(stale)) {
		errs = append(errs, p.collect(ctx, c, h, agent, stale[name]))
	}
	if c.conf.delegated() {
		errs = append(errs, c.delegate().run(ctx, "GC", record{}, p.Stderr))
	}
	return errors.Join(errs...)
}

// staleRecords are the attachments of the network that are not valid, by host interface:
// those on record, and those of which only the lease is left.
func (p *Plugin) staleRecords(ctx context.Context, c *call, valid map[types.GCAttachment]bool) (map[string]record, error) {
	stale := map[string]record{}
	keep := func(network, containerID, ifname string) bool {
		return network != c.conf.Name || valid[types.GCAttachment{ContainerID: containerID, IfName: ifname}]
	}
	if !c.conf.delegated() {
		s, err := store(c.conf.RunDir, c.conf.StateDir, p.report)
		if err != nil {
			return nil, wrong("%v", err)
		}
		leases, err := s.Leases(ctx)
		if err != nil {
			return nil, err
		}
		for _, l := range leases {
			if !keep(l.Network, l.ContainerID, l.Interface) {
				r := fromLease(l, c.conf.StateDir)
				stale[r.HostInterface] = r
			}
		}
	}
	list, errs := records(c.conf.RunDir)
	for _, err := range errs {
		p.report(err.Error())
	}
	for _, r := range list {
		if !keep(r.Network, r.ContainerID, r.Interface) {
			stale[r.HostInterface] = r
		}
	}
	return stale, nil
}

func fromLease(l ipam.Lease, stateDir string) record {
	return record{Attachment: Attachment{Network: l.Network, ContainerID: l.ContainerID, Interface: l.Interface, NetNS: l.NetNS,
		HostInterface: HostInterface(l.ContainerID, l.Interface)}, StateDir: stateDir}
}

func (p *Plugin) collect(ctx context.Context, c *call, h *netlink.Handle, agent *Client, r record) error {
	lock, err := tryLockAttachment(c.conf.RunDir, r.HostInterface)
	if errors.Is(err, errBusy) {
		return nil
	}
	if err != nil {
		return err
	}
	defer lock.unlock()
	t := teardown{record: r, runDir: c.conf.RunDir, host: h, report: p.report, done: func(s string) { p.done("gc " + s) },
		detach: func(ctx context.Context) error { return agent.Detach(ctx, detachRequest(r.Attachment)) }}
	return t.run(ctx)
}
