package nft

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Foreign is a commit by somebody else that touched our table, or a loss of events.
type Foreign struct {
	Deleted bool   // the table is gone
	Resync  bool   // events were lost (ENOBUFS): the state must be read again
	PID     uint32 // of the committing process, in the initial PID namespace
	Comm    string // its command name
}

// Watch reports commits that touched our table and are not ours, until ctx ends, and returns nil then. It listens to
// NFNLGRP_NFTABLES on a socket of its own; report is called on Watch's goroutine.
func Watch(ctx context.Context, o Options, report func(Foreign)) error {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: o.NetNS, Groups: 1 << (unix.NFNLGRP_NFTABLES - 1)})
	if err != nil {
		return fmt.Errorf("listen to nf_tables events: %w", err)
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	if raw, err := c.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20) })
	}
	w := watcher{own: o.Port, report: report}
	for {
		messages, err := c.Receive()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS):
			w.touched, w.foreign = false, Foreign{}
			report(Foreign{Resync: true})
			continue
		case err != nil:
			return fmt.Errorf("receive nf_tables events: %w", err)
		}
		for _, m := range messages {
			w.message(m)
		}
	}
}

// watcher collects the events of one commit, which end with NFT_MSG_NEWGEN.
type watcher struct {
	own     uint32
	report  func(Foreign)
	touched bool
	foreign Foreign
}

func (w *watcher) message(m netlink.Message) {
	if m.Header.Type>>8 != unix.NFNL_SUBSYS_NFTABLES || len(m.Data) < 4 {
		return
	}
	attrs, err := attributes(m)
	if err != nil {
		return // an event we cannot read is no reason to stop watching
	}
	if m.Header.Type&0xff == unix.NFT_MSG_NEWGEN {
		w.end(m.Header.PID, attrs)
		return
	}
	// In every object of nf_tables attribute 1 is the table's name.
	if m.Data[0] != unix.NFPROTO_INET || cString(attrs[1]) != TableName {
		return
	}
	w.touched = true
	w.foreign.Deleted = m.Header.Type&0xff == unix.NFT_MSG_DELTABLE ||
		w.foreign.Deleted && m.Header.Type&0xff != unix.NFT_MSG_NEWTABLE
}

func (w *watcher) end(port uint32, attrs map[uint16][]byte) {
	f := w.foreign
	f.PID, f.Comm = beUint32(attrs[unix.NFTA_GEN_PROC_PID]), cString(attrs[unix.NFTA_GEN_PROC_NAME])
	ours := port == w.own && w.own != 0 || w.own == 0 && f.PID == uint32(os.Getpid())
	if w.touched && !ours {
		w.report(f)
	}
	w.touched, w.foreign = false, Foreign{}
}
