package cni

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// del removes the attachment. It needs neither the pod's namespace nor the agent, and
// what was never there is gone already (CNI specification, section 4, DEL).
func (p *Plugin) del(ctx context.Context, c *call) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	name := HostInterface(c.containerID, c.ifname)
	// Without a run directory there is no agent, so there can be no ADD to keep out.
	if _, err := os.Stat(c.conf.RunDir); !errors.Is(err, fs.ErrNotExist) {
		lock, err := lockAttachment(ctx, c.conf.RunDir, name)
		if err != nil {
			return err
		}
		defer lock.unlock()
	}
	r, err := c.findRecord(p.report)
	if err != nil {
		return err
	}
	agent := NewClient(c.conf.RunDir)
	t := teardown{record: r, runDir: c.conf.RunDir, host: h, report: p.report, done: func(s string) { p.done("del " + s) },
		detach: func(ctx context.Context) error { return agent.Detach(ctx, detachRequest(r.Attachment)) }}
	return t.run(ctx)
}
