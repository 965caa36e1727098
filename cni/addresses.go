package cni

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/ipam"
)

// allocation is what IPAM gave an attachment.
type allocation struct {
	addresses []netip.Addr
	routes    []netip.Prefix
	dns       types.DNS
	pools     []netip.Prefix // subnets of the network's own ranges
}

// store opens the leases of a state directory. A file that is damaged is rebuilt from the
// attachments recorded in runDir and the routes in the kernel.
func store(runDir, stateDir string, report func(string)) (*ipam.Store, error) {
	return ipam.New(ipam.Options{Dir: stateDir, Report: report,
		Live: func(context.Context) ([]ipam.Lease, error) { return liveLeases(runDir, stateDir) }})
}

// lostNetwork is the owner of an address that only a route to a pod's link proves: no CNI
// network can have this name. Its Interface is that link; Reconcile ends it with the link.
const lostNetwork = "(lost)"

// liveLeases are the leases that the records and the kernel prove. A pod's route without
// a readable record keeps its address too.
func liveLeases(runDir, stateDir string) ([]ipam.Lease, error) {
	list, _ := records(runDir)
	var live []ipam.Lease
	known := map[netip.Addr]bool{}
	for _, r := range list {
		if r.Delegate != nil || r.StateDir != stateDir {
			continue
		}
		for _, a := range r.Addresses {
			if known[a] {
				continue
			}
			known[a] = true
			live = append(live, lease(r, a))
		}
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	routes, err := ourRoutes(h)
	if err != nil {
		return nil, err
	}
	for _, r := range routes {
		if a := r.address; !known[a] {
			known[a] = true
			live = append(live, ipam.Lease{Address: a, Owner: ipam.Owner{Network: lostNetwork, ContainerID: lostNetwork, Interface: r.link}})
		}
	}
	return live, nil
}

func lease(r record, a netip.Addr) ipam.Lease {
	pod := podArgs{namespace: r.Namespace, pod: r.Pod}
	return ipam.Lease{Address: a, Owner: r.owner(), Pod: pod.podName(), NetNS: r.NetNS, Payload: payload(r)}
}

// payload is the record as it is kept with the lease, for the case that the run directory
// is lost while its pods live.
func payload(r record) json.RawMessage {
	r.Addresses, r.Pending, r.Deleting, r.Delegate = nil, false, false, nil
	b, err := json.Marshal(r)
	if err != nil {
		return nil // nothing in a record can fail to encode; without it the lease is still right
	}
	return b
}

// acquire leases the addresses of one attachment in our own store.
func (p *Plugin) acquire(ctx context.Context, c *call, r record, pools []ipam.Pool, inUse func(netip.Addr) bool) ([]netip.Addr, error) {
	s, err := store(c.conf.RunDir, c.conf.StateDir, p.report)
	if err != nil {
		return nil, wrong("%v", err)
	}
	leases, err := s.Acquire(ctx, ipam.Request{Owner: r.owner(), Pod: c.args.podName(), NetNS: c.netns, Payload: payload(r), Pools: pools,
		Excludes: c.conf.excludes, Reserved: c.conf.reserved, Wanted: c.conf.wanted, InUse: inUse})
	if err != nil {
		return nil, err
	}
	var list []netip.Addr
	for _, l := range leases {
		list = append(list, l.Address)
	}
	return list, nil
}

// release gives the addresses of an attachment back, to whoever leased them.
func release(ctx context.Context, runDir string, r record, report func(string)) error {
	if r.Delegate != nil {
		return r.Delegate.run(ctx, "DEL", r, io.Discard)
	}
	s, err := store(runDir, r.StateDir, report)
	if err != nil {
		return err
	}
	_, err = s.Release(ctx, r.owner())
	return err
}

func prefixOf(ip []byte, mask []byte) (netip.Prefix, bool) {
	a, ok := netip.AddrFromSlice(ip)
	if !ok {
		return netip.Prefix{}, false
	}
	ones := 0
	for _, b := range mask {
		for ; b&0x80 != 0; b <<= 1 {
			ones++
		}
	}
	p, err := a.Unmap().Prefix(ones)
	return p, err == nil
}

// fromPayload makes the record of an attachment from its leases.
func fromPayload(held []ipam.Lease) (record, error) {
	var r record
	if err := json.Unmarshal(held[0].Payload, &r); err != nil {
		return record{}, fmt.Errorf("lease %s: payload: %w", held[0].Address, err)
	}
	if r.HostInterface != HostInterface(held[0].ContainerID, held[0].Interface) {
		return record{}, fmt.Errorf("lease %s: payload describes %q", held[0].Address, r.HostInterface)
	}
	for _, l := range held {
		r.Addresses = append(r.Addresses, l.Address)
	}
	return r, nil
}
