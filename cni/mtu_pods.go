package cni

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// SetPodMTU gives running pods of this node the MTU to (bytes) at both ends of their veth, where
// they have from: what Mesh.MTU said before. Pods with another MTU got it from their network's
// configuration and keep it. Pods that come or go meanwhile are left to their plugin. It goes on
// after an error and returns all.
func SetPodMTU(ctx context.Context, runDir string, from, to int) error {
	list, errs := Attachments(runDir)
	for _, a := range list {
		if err := ctx.Err(); err != nil {
			return errors.Join(append(errs, err)...)
		}
		if err := setAttachmentMTU(runDir, a, from, to); err != nil && !errors.Is(err, errBusy) {
			errs = append(errs, fmt.Errorf("set MTU of %s/%s to %d: %w", a.Namespace, a.Pod, to, err))
		}
	}
	return errors.Join(errs...)
}

func setAttachmentMTU(runDir string, a Attachment, from, to int) error {
	lock, err := tryLockAttachment(runDir, a.HostInterface)
	if err != nil {
		return err
	}
	defer lock.unlock()
	r, err := readRecord(runDir, a.HostInterface)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil || r.Pending || r.Deleting || r.MTU != from {
		return err
	}
	w, err := openWire(r.NetNS)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // Reconcile clears away what is left of it
	}
	if err != nil {
		return err
	}
	defer w.close()
	ends := []struct {
		kernel *netlink.Handle
		name   string
	}{{w.host, r.HostInterface}, {w.pod, r.Interface}}
	if to < from { // the sender first: what the other end no longer takes must not be on its way
		ends[0], ends[1] = ends[1], ends[0]
	}
	for _, end := range ends {
		if err := setLinkMTU(end.kernel, end.name, to); err != nil {
			return err
		}
	}
	r.MTU = to
	return writeRecord(runDir, r)
}

func setLinkMTU(kernel *netlink.Handle, name string, mtu int) error {
	l, err := kernel.LinkByName(name)
	if err == nil {
		err = kernel.LinkSetMTU(l, mtu)
	}
	if errors.Is(err, unix.ENODEV) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}
