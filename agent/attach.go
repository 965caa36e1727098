package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/nftcni/nftcni/cni"
	"github.com/nftcni/nftcni/nft"
)

// Error codes of the CNI specification that the plugin reports for the agent.
const (
	codeUnknownContainer uint = 3  // container unknown or does not exist
	codeInvalidRequest   uint = 4  // invalid necessary environment variables
	codeDecode           uint = 6  // failed to decode content
	codeInvalidConfig    uint = 7  // invalid network configuration
	codeTryAgain         uint = 11 // try again later
	codeInternal         uint = 999
)

var hostInterfaceName = regexp.MustCompile(`^nft[0-9a-f]{12}$`)

// attachWork is one attachment on its way into the kernel.
type attachWork struct {
	attachment cni.Attachment
	answer     chan attachAnswer // capacity 1: the loop never waits for the requester
}

type attachAnswer struct {
	receipt nft.Receipt
	err     *cni.Error
}

// attach binds a and puts its pod's policy in force; it answers after the kernel's ACK.
// With an API server it waits, at most cfg.PodWait, until the source lists the pod. A static
// pod is taken without its mirror after that time, and at once while the last known objects
// are in force.
func (l *loop) attach(ctx context.Context, a cni.Attachment) (cni.AttachResponse, *cni.Error) {
	began := time.Now()
	if err := checkAttachment(a); err != nil {
		return cni.AttachResponse{}, &cni.Error{Code: codeInvalidRequest, Message: err.Error()}
	}
	if err := checkLabels(a.Labels); err != nil {
		return cni.AttachResponse{}, &cni.Error{Code: codeInvalidConfig, Message: err.Error()}
	}
	ctx, cancel := context.WithTimeout(ctx, time.Duration(l.cfg.PodWait)+5*time.Second)
	defer cancel()
	w := &attachWork{attachment: a, answer: make(chan attachAnswer, 1)}
	if err := l.send(ctx, func(b *batch) { l.admitOrWait(b, w) }); err != nil {
		return cni.AttachResponse{}, tryAgain("the agent is busy: %v", err)
	}
	wait := time.NewTimer(time.Duration(l.cfg.PodWait))
	defer wait.Stop()
	for {
		select {
		case got := <-w.answer:
			return cni.AttachResponse{Generation: got.receipt.Generation, Micros: time.Since(began).Microseconds()}, got.err
		case <-wait.C:
			_ = l.send(ctx, func(b *batch) { l.waited(b, w) })
		case <-ctx.Done():
			_ = l.send(context.WithoutCancel(ctx), func(*batch) { l.giveUp(w) })
			return cni.AttachResponse{}, tryAgain("attach %s: %v", podName(a), ctx.Err())
		}
	}
}

func tryAgain(format string, args ...any) *cni.Error {
	return &cni.Error{Code: codeTryAgain, Message: fmt.Sprintf(format, args...)}
}

func checkAttachment(a cni.Attachment) error {
	switch {
	case a.ContainerID == "" || a.Interface == "":
		return errors.New("attach: containerID and interface must not be empty")
	case !hostInterfaceName.MatchString(a.HostInterface):
		return fmt.Errorf("attach: hostInterface %q is not nft and 12 hex digits", a.HostInterface)
	case len(a.Addresses) == 0 || len(a.Addresses) > 16:
		return fmt.Errorf("attach %s: %d addresses, want 1 to 16", a.HostInterface, len(a.Addresses))
	}
	for i, addr := range a.Addresses {
		if !usable(addr) || slices.Contains(a.Addresses[:i], addr) {
			return fmt.Errorf("attach %s: %s cannot be a pod's address, or stands twice", a.HostInterface, addr)
		}
	}
	return checkHostPorts(a)
}

// maxLabels bounds what one network configuration may say of a pod.
const maxLabels = 256

// checkLabels holds args.cni.labels to what the API server takes as labels.
func checkLabels(labels map[string]string) error {
	if len(labels) > maxLabels {
		return fmt.Errorf("args.cni.labels: %d labels, want at most %d", len(labels), maxLabels)
	}
	for k, v := range labels {
		if why := slices.Concat(validation.IsQualifiedName(k), validation.IsValidLabelValue(v)); len(why) > 0 {
			return fmt.Errorf("args.cni.labels: %q: %q: %s", k, v, strings.Join(why, "; "))
		}
	}
	return nil
}

func usable(a netip.Addr) bool {
	return a.IsValid() && a.Zone() == "" && !a.Is4In6() && !a.IsUnspecified() && !a.IsLoopback() && !a.IsMulticast() &&
		!a.IsLinkLocalUnicast() && a != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

// admitOne adds w to the batch.
func (l *loop) admitOne(b *batch, w *attachWork) {
	a := w.attachment
	if old := l.inv.attached[a.HostInterface]; old != nil && sameAttachment(old.Attachment, a) && !b.touched[a.HostInterface] {
		b.answers = append(b.answers, w.done) // asked again: the policy is in force already
		return
	}
	if holder := l.holder(a); holder != "" {
		w.refuse(&cni.Error{Code: codeInternal, Message: fmt.Sprintf(
			"attach %s: an address of it is bound to %s; remove that attachment first (nftcni debug pods)", podName(a), holder)})
		return
	}
	if holder, port := l.inv.portHolder(a); holder != nil {
		w.refusePort(holder, port)
		return
	}
	if b.touched[a.HostInterface] { // bound and unbound in one batch: the later request waits for the next
		l.again(func(b *batch) { l.admitOrWait(b, w) })
		return
	}
	b.touched[a.HostInterface] = true
	b.events = append(b.events, l.inv.attach(a)...)
	b.bind = append(b.bind, l.inv.bindings(l.inv.attached[a.HostInterface])...)
	b.answers = append(b.answers, w.done)
	b.attached = append(b.attached, a)
}

func sameAttachment(a, b cni.Attachment) bool {
	return a.ContainerID == b.ContainerID && a.UID == b.UID && podName(a) == podName(b) && a.Masquerade == b.Masquerade &&
		slices.Equal(a.Addresses, b.Addresses) && slices.Equal(a.HostPorts, b.HostPorts)
}

// holder is the other interface that an address of a is bound to.
func (l *loop) holder(a cni.Attachment) string {
	for _, addr := range a.Addresses {
		if on := l.inv.holders[addr]; on != "" && on != a.HostInterface {
			return on
		}
	}
	return ""
}

func (w *attachWork) refuse(err *cni.Error) { w.answer <- attachAnswer{err: err} }

func (w *attachWork) done(r nft.Receipt, err error) {
	if err != nil {
		w.refuse(tryAgain("attach %s: %v", podName(w.attachment), err))
		return
	}
	w.answer <- attachAnswer{receipt: r}
}

// bound says what is missing when a is not attached, or not as a says.
func (l *loop) bound(ctx context.Context, a cni.Attachment) *cni.Error {
	missing := ""
	err := l.do(ctx, func() {
		old := l.inv.attached[a.HostInterface]
		isReady, why := l.ready()
		switch {
		case !isReady:
			missing = why
		case old == nil:
			missing = "the agent knows no such attachment"
		case !sameAttachment(old.Attachment, a):
			missing = fmt.Sprintf("the agent holds it with addresses %v for container %s", old.Addresses, old.ContainerID)
		}
	})
	if err != nil {
		return tryAgain("check %s: %v", a.HostInterface, err)
	}
	if missing != "" {
		return &cni.Error{Code: codeUnknownContainer, Message: fmt.Sprintf("check %s: not bound: %s", a.HostInterface, missing)}
	}
	return nil
}

// detach unbinds; unknown attachments are no error.
func (l *loop) detach(ctx context.Context, r cni.DetachRequest) *cni.Error {
	answer := make(chan error, 1)
	err := l.send(ctx, func(b *batch) { l.remove(b, r, func(_ nft.Receipt, err error) { answer <- err }) })
	if err == nil {
		select {
		case err = <-answer:
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	if err != nil {
		return tryAgain("detach %s: %v", r.HostInterface, err)
	}
	return nil
}

func (l *loop) remove(b *batch, r cni.DetachRequest, done func(nft.Receipt, error)) {
	l.dropWaiting(r)
	old := l.inv.attached[r.HostInterface]
	switch {
	case old == nil || old.ContainerID != r.ContainerID:
		done(nft.Receipt{}, nil)
	case b.touched[r.HostInterface]:
		l.again(func(b *batch) { l.remove(b, r, done) })
	default:
		b.touched[r.HostInterface] = true
		b.unbind = append(b.unbind, bindings(old.Attachment)...)
		b.events = append(b.events, l.inv.detach(r.HostInterface)...)
		b.answers = append(b.answers, func(r nft.Receipt, err error) {
			if err == nil { // runtimes repeat DEL: only the one that found something is told of
				l.log.Info("detached", "pod", podName(old.Attachment).String(), "interface", old.HostInterface, "container", old.ContainerID)
			}
			done(r, err)
		})
	}
}
