package cni

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/ipam"
)

// ReconcileOptions say where to look for what plugins left behind.
type ReconcileOptions struct {
	RunDir, StateDir string
	// Detach, where it is set, unbinds an attachment before its address is given back.
	// Without it the caller unbinds what Reconcile returns.
	Detach func(context.Context, Attachment) error
	// Report is told in one sentence what was repaired; nil: nothing is said.
	Report func(string)
}

// Reconcile removes what belongs to nobody any more: attachments whose network namespace
// is gone, or gone for the runtime (its path is), those of plugins that were killed before
// they finished, those whose DEL left something for us, and leases of which nothing else is
// left; among them the leases of nftcni-ipam, of which only the namespace is known. It returns
// the attachments removed. An attachment that a plugin works on is left alone, and so is
// a link whose record was lost while its pod lives: its record is written again from its
// lease.
func Reconcile(ctx context.Context, o ReconcileOptions) ([]Attachment, error) {
	if o.Report == nil {
		o.Report = func(string) {}
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	r := reconciler{ReconcileOptions: o, host: h}
	list, errs := records(o.RunDir)
	for _, rec := range list {
		errs = append(errs, r.recordLeft(ctx, rec.HostInterface))
	}
	errs = append(errs, r.leasesLeft(ctx, list))
	return r.gone, errors.Join(errs...)
}

type reconciler struct {
	ReconcileOptions
	host *netlink.Handle
	gone []Attachment
}

// recordLeft looks at one record again under its lock.
func (r *reconciler) recordLeft(ctx context.Context, name string) error {
	return r.locked(name, func() error {
		rec, err := readRecord(r.RunDir, name)
		if err != nil {
			return ignoreMissing(err)
		}
		_, err = r.host.LinkByName(name)
		if err == nil && !rec.Pending && !rec.Deleting && !pathGone(rec.NetNS) {
			return nil
		}
		if ignoreNoLink(err) != nil {
			return fmt.Errorf("find link %s: %w", name, err)
		}
		return r.remove(ctx, rec)
	})
}

// locked runs fn with the attachment locked, or not at all when a plugin works on it.
func (r *reconciler) locked(name string, fn func() error) error {
	lock, err := tryLockAttachment(r.RunDir, name)
	if errors.Is(err, errBusy) {
		return nil
	}
	if err != nil {
		return err
	}
	defer lock.unlock()
	return fn()
}

func (r *reconciler) remove(ctx context.Context, rec record) error {
	r.gone = append(r.gone, rec.Attachment)
	t := teardown{record: rec, runDir: r.RunDir, host: r.host, report: r.Report, done: func(string) {},
		detach: func(ctx context.Context) error {
			if r.Detach == nil {
				return nil
			}
			return r.Detach(ctx, rec.Attachment)
		}}
	return t.run(ctx)
}

// leasesLeft looks for leases of ours without a record: of a plugin killed before it
// wrote one, or of a pod that lives while the run directory was lost.
func (r *reconciler) leasesLeft(ctx context.Context, recorded []record) error {
	s, err := store(r.RunDir, r.StateDir, r.Report)
	if err != nil {
		return err
	}
	if err := s.Reclaim(ctx); err != nil {
		return err
	}
	leases, err := s.Leases(ctx)
	if err != nil {
		return err
	}
	known := map[ipam.Owner]bool{}
	for _, rec := range recorded {
		known[rec.owner()] = true
	}
	var errs []error
	for _, l := range leases {
		if l.Network == lostNetwork && !known[l.Owner] {
			known[l.Owner] = true
			errs = append(errs, r.lostLease(ctx, s, l))
		}
		if len(l.Payload) == 0 && l.Network != lostNetwork {
			errs = append(errs, r.servedLease(ctx, s, l))
			continue
		}
		if known[l.Owner] {
			continue
		}
		known[l.Owner] = true
		name := HostInterface(l.ContainerID, l.Interface)
		errs = append(errs, r.locked(name, func() error { return r.leaseLeft(ctx, s, name, l) }))
	}
	return errors.Join(errs...)
}

// lostLease ends a lease that was made from a route when the route's link is gone.
func (r *reconciler) lostLease(ctx context.Context, s *ipam.Store, l ipam.Lease) error {
	_, err := r.host.LinkByName(l.Interface)
	if err == nil {
		return nil
	}
	if err := ignoreNoLink(err); err != nil {
		return fmt.Errorf("find link %s: %w", l.Interface, err)
	}
	_, err = s.Release(ctx, l.Owner)
	return err
}

// servedLease ends a lease that nftcni-ipam made for another plugin when the pod's
// namespace is gone: a runtime that forgot the pod sends no DEL for it.
func (r *reconciler) servedLease(ctx context.Context, s *ipam.Store, l ipam.Lease) error {
	if !pathGone(l.NetNS) {
		return nil
	}
	// Asked again in the transaction: a new sandbox may have the name, and the lease, by now.
	gone, err := s.ReleaseIf(ctx, func(now ipam.Lease) bool { return now.Owner == l.Owner && pathGone(now.NetNS) })
	for _, g := range gone {
		r.Report(fmt.Sprintf("%s, leased to %s by nftcni-ipam: its network namespace %s is gone", g.Address, g.Owner, g.NetNS))
	}
	return err
}

// pathGone says that a runtime has given up the network namespace at path. A namespace in
// /proc goes with a process that may be in another PID namespace than ours, and a directory
// that is not there may be one that we are not shown: both prove nothing.
func pathGone(path string) bool {
	if !filepath.IsAbs(path) || path == "/proc" || strings.HasPrefix(path, "/proc/") {
		return false
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return false
	}
	_, err := os.Stat(filepath.Dir(path))
	return err == nil
}

func (r *reconciler) leaseLeft(ctx context.Context, s *ipam.Store, name string, l ipam.Lease) error {
	held, err := s.Of(ctx, l.Owner)
	if err != nil || len(held) == 0 {
		return err
	}
	if _, err := readRecord(r.RunDir, name); err == nil {
		return nil // written since
	}
	_, err = r.host.LinkByName(name)
	if ignoreNoLink(err) != nil {
		return fmt.Errorf("find link %s: %w", name, err)
	}
	rec, payloadErr := fromPayload(held)
	if err != nil {
		if payloadErr != nil {
			rec = fromLease(l, r.StateDir)
		}
		rec.StateDir = r.StateDir
		return r.remove(ctx, rec) // all of it: the agent may have the address bound still
	}
	if err := payloadErr; err != nil {
		return err
	}
	r.Report(fmt.Sprintf("the record of %s was lost: written again from its lease", name))
	return writeRecord(r.RunDir, rec)
}

// A podRoute is a route to one pod on this node.
type podRoute struct {
	address netip.Addr
	link    string
}

// ourRoutes lists the routes that nftcni made to pods.
func ourRoutes(h *netlink.Handle) ([]podRoute, error) {
	var list []podRoute
	links := map[int]string{}
	for _, fam := range []int{unix.AF_INET, unix.AF_INET6} {
		routes, err := again(func() ([]netlink.Route, error) {
			return h.RouteListFiltered(fam, &netlink.Route{Protocol: RouteProtocol}, netlink.RT_FILTER_PROTOCOL)
		})
		if err != nil {
			return nil, fmt.Errorf("list routes: %w", err)
		}
		for _, r := range routes {
			p, ok := prefixOf(r.Dst.IP, r.Dst.Mask)
			if !ok || !p.IsSingleIP() {
				continue
			}
			if _, known := links[r.LinkIndex]; !known {
				links[r.LinkIndex] = linkName(h, r.LinkIndex)
			}
			if isHostInterface(links[r.LinkIndex]) {
				list = append(list, podRoute{p.Addr(), links[r.LinkIndex]})
			}
		}
	}
	return list, nil
}

func linkName(h *netlink.Handle, index int) string {
	link, err := h.LinkByIndex(index)
	if err != nil {
		return ""
	}
	return link.Attrs().Name
}
