package cni

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ifbPrefix is not that of the pods' interfaces, which the table knows by it.
const ifbPrefix = "nfb"

// ifbName is the intermediate device of a pod whose sending is limited.
func ifbName(hostInterface string) string {
	return ifbPrefix + strings.TrimPrefix(hostInterface, hostPrefix)
}

// limitBandwidth puts the limits on the node's side, where a pod with CAP_NET_ADMIN cannot
// reach them. What goes to the pod waits in a tbf on its veth. What comes from the pod is
// redirected, before anything else sees it, to an ifb whose tbf it waits in; from there it
// comes in again as from the veth, so policy and source guard see the interface they know.
func (a *adding) limitBandwidth(context.Context) error {
	b, w := a.conf.RuntimeConfig.Bandwidth, a.wire
	if b.limitsIngress() {
		if err := addTBF(w.host, w.hostLink, makeBucket(b.IngressRate, b.IngressBurst, a.record.MTU)); err != nil {
			return missingPart("ingress", "tbf", "sch_tbf", err, "limit what goes to the pod")
		}
	}
	if !b.limitsEgress() {
		return nil
	}
	ifb, err := makeIFB(w.host, ifbName(w.hostName), a.record.MTU)
	if err != nil {
		return missingPart("egress", "ifb", "ifb", err, "make "+ifbName(w.hostName))
	}
	if err := addTBF(w.host, ifb, makeBucket(b.EgressRate, b.EgressBurst, a.record.MTU)); err != nil {
		return missingPart("egress", "tbf", "sch_tbf", err, "limit what comes from the pod")
	}
	if err := w.host.QdiscAdd(ingressQdisc(w.hostLink)); err != nil {
		return missingPart("egress", "ingress qdisc", "sch_ingress", err, "add ingress qdisc to "+w.hostName)
	}
	if err := w.host.FilterAdd(redirect(w.hostLink, ifb)); err != nil {
		return missingPart("egress", "u32 filter with mirred", "-a cls_u32 act_mirred", err, "redirect "+w.hostName+" to "+ifbName(w.hostName))
	}
	return nil
}

func missingPart(direction, part, module string, err error, doing string) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP) {
		return unsupportedBandwidth(direction, part, module, err)
	}
	return fmt.Errorf("%s: %w", doing, err)
}

// makeIFB makes the device anew: one that is there belongs to an attachment of the same
// key whose record was lost.
func makeIFB(h *netlink.Handle, name string, mtu int) (int, error) {
	ifb := &netlink.Ifb{LinkAttrs: netlink.NewLinkAttrs()}
	ifb.Name, ifb.MTU = name, mtu
	err := h.LinkAdd(ifb)
	if errors.Is(err, fs.ErrExist) {
		if err := unmakeLink(h, name); err != nil {
			return 0, err
		}
		err = h.LinkAdd(ifb)
	}
	if err == nil { // it has nothing to say of its own
		err = ignoreMissing(apply([]setting{{"/proc/sys/net/ipv6/conf/" + name + "/disable_ipv6", "1"}}))
	}
	if err == nil {
		err = h.LinkSetUp(ifb)
	}
	return ifb.Index, err
}

func addTBF(h *netlink.Handle, link int, b bucket) error {
	return h.QdiscAdd(&netlink.Tbf{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: link, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
		Rate:       b.rate, Limit: b.limit, Buffer: b.buffer,
	})
}

func ingressQdisc(link int) *netlink.Ingress {
	return &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: link, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS}}
}

// redirect is a filter that every packet from the pod matches.
func redirect(from, to int) *netlink.U32 {
	return &netlink.U32{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: from, Parent: netlink.MakeHandle(0xffff, 0), Priority: 1, Protocol: unix.ETH_P_ALL},
		Actions:     []netlink.Action{netlink.NewMirredAction(to)},
	}
}

// checkBandwidth compares the limits with the record.
func (k *checking) checkBandwidth(context.Context) error {
	b := k.record.Bandwidth
	if k.wire.hostLink == 0 {
		return nil
	}
	if b.limitsIngress() {
		if err := k.compareTBF(k.wire.hostName, k.wire.hostLink, makeBucket(b.IngressRate, b.IngressBurst, k.record.MTU)); err != nil {
			return err
		}
	}
	if !b.limitsEgress() {
		return nil
	}
	name := ifbName(k.wire.hostName)
	link, err := k.wire.host.LinkByName(name)
	if err != nil {
		if err := ignoreNoLink(err); err != nil {
			return fmt.Errorf("find link %s: %w", name, err)
		}
		k.differ("link %s, which limits what comes from the pod, is missing", name)
		return nil
	}
	if link.Attrs().Flags&unix.IFF_UP == 0 {
		k.differ("link %s, which limits what comes from the pod, is down", name)
	}
	if err := k.compareTBF(name, link.Attrs().Index, makeBucket(b.EgressRate, b.EgressBurst, k.record.MTU)); err != nil {
		return err
	}
	return k.compareRedirect(link.Attrs().Index)
}

func (k *checking) compareTBF(name string, link int, want bucket) error {
	list, err := again(func() ([]netlink.Qdisc, error) { return k.wire.host.QdiscList(linkAt(link)) })
	if err != nil {
		return fmt.Errorf("list qdiscs of %s: %w", name, err)
	}
	for _, q := range list {
		if have, ok := q.(*netlink.Tbf); ok && have.Parent == netlink.HANDLE_ROOT {
			if have.Rate != want.rate || have.Limit != want.limit {
				k.differ("tbf of %s has %d byte/s and limit %d, want %d and %d", name, have.Rate, have.Limit, want.rate, want.limit)
			}
			return nil
		}
	}
	k.differ("tbf of %s is missing", name)
	return nil
}

func (k *checking) compareRedirect(ifb int) error {
	from := k.wire.hostLink
	filters, err := again(func() ([]netlink.Filter, error) {
		return k.wire.host.FilterList(linkAt(from), netlink.MakeHandle(0xffff, 0))
	})
	if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("list filters of %s: %w", k.wire.hostName, err)
	}
	for _, f := range filters {
		u32, ok := f.(*netlink.U32)
		if !ok {
			continue
		}
		for _, action := range u32.Actions {
			if to, ok := action.(*netlink.MirredAction); ok && to.Ifindex == ifb && to.MirredAction == netlink.TCA_EGRESS_REDIR {
				return nil
			}
		}
	}
	k.differ("what comes from the pod is not redirected to %s", ifbName(k.wire.hostName))
	return nil
}

// unlimit removes what limits the pod's sending; the rest went with the veth. A record
// that knows nothing of its attachment may be of one that had a limit.
func (t teardown) unlimit() error {
	if t.record.Bandwidth.limitsEgress() || t.record.HostMAC == "" {
		return unmakeLink(t.host, ifbName(t.record.HostInterface))
	}
	return nil
}

func isIFB(name string) bool {
	digits, ok := strings.CutPrefix(name, ifbPrefix)
	return ok && isHostInterface(hostPrefix+digits)
}

// isPodLink tells the node's ends of pods from its uplinks.
func isPodLink(name string) bool { return isHostInterface(name) || isIFB(name) }
