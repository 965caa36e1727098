package cni

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/vishvananda/netlink"
)

// teardown undoes an attachment, whole or in part, from its record. It is what DEL, GC, a
// failed ADD and the agent's Reconcile have in common. Every step is a no-op when there
// is nothing left to do, and what fails stays on record for the next one.
type teardown struct {
	record record
	runDir string
	host   *netlink.Handle
	// detach tells the agent; an error that matches ErrNoAgent is fine, because an agent
	// that starts binds only what is on record.
	detach func(context.Context) error
	report func(string)
	done   func(step string)
}

// run returns nil when nothing is left, or when what is left is on record with Deleting
// set, which makes the agent finish it. It must be called with the attachment locked.
func (t teardown) run(ctx context.Context) error {
	name := t.record.HostInterface
	// On record before anything is undone, for the case that we are killed on the way. A
	// run directory that cannot be written does not stop us: it may all work out.
	t.record.Deleting = true
	_ = writeRecord(t.runDir, t.record)
	t.done("journal")
	// Then the routes: from here on nothing reaches the pod, whatever fails below.
	if err := t.delRoutes(); err != nil {
		return t.journal(err)
	}
	t.done("routes")
	detachErr := t.detach(ctx)
	if errors.Is(detachErr, ErrNoAgent) {
		detachErr = nil
	}
	t.done("detach")
	if err := unmakeLink(t.host, name); err != nil {
		return t.journal(err)
	}
	if err := t.unlimit(); err != nil {
		return t.journal(err)
	}
	t.done("link")
	if detachErr != nil {
		// The agent lives and still has the address bound: it must not be leased again
		// before that is undone, which the agent does when it finds the record.
		return t.journal(nil)
	}
	if err := release(ctx, t.runDir, t.record, t.report); err != nil {
		return t.journal(err)
	}
	t.done("lease")
	if err := RemoveAttachment(t.runDir, name); err != nil {
		return err
	}
	t.done("record")
	return nil
}

func (t teardown) delRoutes() error {
	if len(t.record.Addresses) == 0 {
		return nil // never recorded: the routes go with the link
	}
	link, err := t.host.LinkByName(t.record.HostInterface)
	if err != nil {
		if err := ignoreNoLink(err); err != nil {
			return fmt.Errorf("find link %s: %w", t.record.HostInterface, err)
		}
		return nil
	}
	return delHostRoutes(t.host, link.Attrs().Index, t.record.Addresses)
}

// journal makes sure that the agent finds what is left and passes cause on.
func (t teardown) journal(cause error) error {
	if err := writeRecord(t.runDir, t.record); err != nil {
		return errors.Join(cause, err)
	}
	return cause
}

// stub is the record of an attachment that has none: enough to look for what is left.
func (c *call) stub() record {
	r := record{Attachment: Attachment{Network: c.conf.Name, ContainerID: c.containerID, Interface: c.ifname, NetNS: c.netns,
		HostInterface: HostInterface(c.containerID, c.ifname)}, StateDir: c.conf.StateDir}
	if c.conf.delegated() {
		r.Delegate = c.delegate()
	}
	return r
}

// findRecord returns the record of the call's attachment, or its stub when there is none
// or when it cannot be read: a DEL must not fail for ever because of damaged bytes.
func (c *call) findRecord(report func(string)) (record, error) {
	r, err := readRecord(c.conf.RunDir, HostInterface(c.containerID, c.ifname))
	switch {
	case err == nil:
		return r, nil
	case errors.Is(err, fs.ErrNotExist):
		return c.stub(), nil
	case errors.Is(err, fs.ErrPermission):
		return record{}, err
	default:
		report(err.Error())
		return c.stub(), nil
	}
}
