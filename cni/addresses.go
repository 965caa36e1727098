package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"path/filepath"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
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

// delegate is another IPAM plugin and what it was called with (CNI specification,
// section 4): kept with the attachment, so that its address can be given back when the
// runtime never calls DEL.
type delegate struct {
	Type string          `json:"type"`
	Path string          `json:"path"` // CNI_PATH
	Args string          `json:"args,omitempty"`
	Conf json.RawMessage `json:"conf"`
}

func (c *call) delegate() *delegate {
	return &delegate{Type: c.conf.IPAM.Type, Path: c.path, Args: c.rawArgs, Conf: c.conf.raw}
}

func (d *delegate) find() (string, error) {
	path, err := invoke.FindInPath(d.Type, filepath.SplitList(d.Path))
	if err != nil {
		return "", wrong("ipam.type: plugin %s: %v; install it or use %s", d.Type, err, BuiltinIPAM)
	}
	return path, nil
}

func (d *delegate) env(command string, r record) *invoke.Args {
	return &invoke.Args{Command: command, ContainerID: r.ContainerID, NetNS: r.NetNS, IfName: r.Interface,
		Path: d.Path, PluginArgsStr: d.Args}
}

// run calls a command that has no result.
func (d *delegate) run(ctx context.Context, command string, r record, stderr io.Writer) error {
	path, err := d.find()
	if err != nil {
		return err
	}
	if err := invoke.ExecPluginWithoutResult(ctx, path, d.Conf, d.env(command, r), pluginExec(stderr)); err != nil {
		return fmt.Errorf("ipam plugin %s %s: %w", d.Type, command, err)
	}
	return nil
}

// add asks the delegate for addresses.
func (d *delegate) add(ctx context.Context, r record, stderr io.Writer) (allocation, error) {
	path, err := d.find()
	if err != nil {
		return allocation{}, err
	}
	res, err := invoke.ExecPluginWithResult(ctx, path, d.Conf, d.env("ADD", r), pluginExec(stderr))
	if err != nil {
		return allocation{}, fmt.Errorf("ipam plugin %s ADD: %w", d.Type, err)
	}
	got, err := current.NewResultFromResult(res)
	if err != nil {
		return allocation{}, fmt.Errorf("ipam plugin %s: result: %w", d.Type, err)
	}
	return readAllocation(d.Type, got)
}

func readAllocation(plugin string, got *current.Result) (allocation, error) {
	al := allocation{dns: got.DNS}
	for _, ip := range got.IPs {
		a, ok := netip.AddrFromSlice(ip.Address.IP)
		if !ok {
			return al, fmt.Errorf("ipam plugin %s: %q is not an address", plugin, ip.Address.String())
		}
		al.addresses = append(al.addresses, a.Unmap())
		if subnet, ok := prefixOf(ip.Address.IP, ip.Address.Mask); ok {
			al.pools = append(al.pools, subnet)
		}
	}
	if len(al.addresses) == 0 {
		return al, errors.New("ipam plugin " + plugin + ": gave no address")
	}
	for _, r := range got.Routes {
		if dst, ok := prefixOf(r.Dst.IP, r.Dst.Mask); ok {
			al.routes = append(al.routes, dst)
		}
	}
	return al, nil
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

// pluginExec runs plugins without libcni's environment lookups.
func pluginExec(stderr io.Writer) invoke.Exec {
	return &struct {
		*invoke.RawExec
		version.PluginDecoder
	}{RawExec: &invoke.RawExec{Stderr: stderr}}
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
