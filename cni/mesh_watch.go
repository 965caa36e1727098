package cni

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

const (
	// meshPause is between two passes that events cause: the first event is answered at once, a
	// routing daemon that loads its table costs a pass per pause.
	meshPause = 50 * time.Millisecond
	// meshRetry is after a pass that failed for a reason that may send no event.
	meshRetry = 5 * time.Second
	// WireGuard tells nobody about handshakes. While peers move to a new key the mesh looks after
	// 100 ms, and then ever less often, as peers that are down may never move.
	rotationPoll = 100 * time.Millisecond
)

// Run follows the kernel's links, addresses, routes, neighbours and forwarding entries, and repeats
// the last Set when they change: what others remove is back at once, and whether a peer is on a
// link of ours is decided again. changed (may be nil) is called after each pass that wrote
// something, failed, or reports something else than the one before. Without a change in the kernel
// Run does nothing at all. It returns when ctx ends, with its error, or when the kernel cannot be
// followed.
func (m *Mesh) Run(ctx context.Context, changed func(Report, error)) error {
	conn, err := listenMesh(m.cfg.NetNS)
	if err != nil {
		return fmt.Errorf("follow links and routes: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
	events := make(chan struct{}, 1)
	ended := make(chan error, 1)
	go func() { ended <- m.listen(ctx, conn, events) }()
	err = m.follow(ctx, events, ended, changed)
	stop()
	_ = conn.SetReadDeadline(time.Unix(1, 0))
	if err == nil {
		err = <-ended
	}
	return errors.Join(err, conn.Close())
}

func listenMesh(ns int) (*netlink.Conn, error) {
	conn, err := netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{NetNS: ns})
	if err != nil {
		return nil, err
	}
	for _, group := range []uint32{unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE} {
		if err := conn.JoinGroup(group); err != nil {
			return nil, errors.Join(fmt.Errorf("join group %d: %w", group, err), conn.Close())
		}
	}
	return conn, nil
}

// listen turns messages into at most one waiting event.
func (m *Mesh) listen(ctx context.Context, conn *netlink.Conn, events chan<- struct{}) error {
	for {
		msgs, err := conn.Receive()
		switch {
		case ctx.Err() != nil || errors.Is(err, os.ErrDeadlineExceeded):
			return ctx.Err()
		case errors.Is(err, unix.ENOBUFS): // messages were lost: one of them may have mattered
		case err != nil:
			return fmt.Errorf("follow links and routes: %w", err)
		case !slices.ContainsFunc(msgs, m.matters):
			continue
		}
		select {
		case events <- struct{}{}:
		default:
		}
	}
}

// follow runs passes until ctx or listen ends. A nil error means that listen still runs.
func (m *Mesh) follow(ctx context.Context, events <-chan struct{}, ended <-chan error, changed func(Report, error)) error {
	retry := time.NewTimer(0) // what happened before the groups were joined
	defer retry.Stop()
	poll := rotationPoll
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-ended:
			return orDefault(err, context.Canceled)
		case <-events:
			poll = rotationPoll
		case <-m.rotated:
			poll = rotationPoll
		case <-retry.C:
		}
		if m.repeat(ctx, changed) != nil {
			retry.Reset(meshRetry)
		} else if m.Report().Rotating > 0 {
			retry.Reset(poll)
			poll = min(2*poll, meshRetry)
		}
		pause := time.NewTimer(meshPause)
		select {
		case <-ctx.Done():
		case <-pause.C:
		}
		pause.Stop()
	}
}

// repeat runs the last Set again.
func (m *Mesh) repeat(ctx context.Context, changed func(Report, error)) error {
	m.mu.Lock()
	if !m.isSet {
		m.mu.Unlock()
		return nil
	}
	before := m.report
	after, err := m.pass(ctx)
	m.mu.Unlock()
	if changed != nil && (err != nil || after.Writes > 0 || !sameReport(before, after)) {
		changed(after, err)
	}
	return err
}

func sameReport(a, b Report) bool {
	return a.MTU == b.MTU && a.Rotating == b.Rotating && slices.Equal(a.Addrs, b.Addrs) && slices.Equal(a.HostAddrs, b.HostAddrs) &&
		slices.Equal(a.Paths, b.Paths) && slices.Equal(a.Problems, b.Problems)
}

// matters leaves out what a busy node says all the time and no path depends on: neighbours of other
// devices, and the links, addresses and host routes of local pods.
func (m *Mesh) matters(msg netlink.Message) bool {
	switch uint16(msg.Header.Type) {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		return !isPodLink(unix.ByteSliceToString(attribute(msg.Data, unix.SizeofIfInfomsg, unix.IFLA_IFNAME)))
	case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
		return len(msg.Data) >= unix.SizeofNdMsg && m.isTunnel(int(binary.NativeEndian.Uint32(msg.Data[4:])))
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		const scope = 3 // of struct ifaddrmsg
		return len(msg.Data) >= unix.SizeofIfAddrmsg && msg.Data[scope] < unix.RT_SCOPE_LINK
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		return routeMatters(msg.Data)
	}
	return false
}

// routeMatters: struct rtmsg is family, dst_len, src_len, tos, table, protocol, scope, type.
func routeMatters(data []byte) bool {
	if len(data) < unix.SizeofRtMsg {
		return false
	}
	bits, table, protocol := data[1], data[4], data[5]
	host := bits == 32 && data[0] == unix.AF_INET || bits == 128
	switch {
	case table == unix.RT_TABLE_LOCAL: // its address sends an event of its own
		return false
	case protocol == uint8(RouteProtocol):
		return !host
	}
	// Every link has fe80::/64. Other routes of the kernel count although they come with an
	// address: that is announced before its route is there to be found.
	dst := attribute(data, unix.SizeofRtMsg, unix.RTA_DST)
	return len(dst) != 16 || dst[0] != 0xfe || dst[1]&0xc0 != 0x80
}

func (m *Mesh) isTunnel(index int) bool {
	for i := range m.tunnels {
		if index != 0 && int(m.tunnels[i].Load()) == index {
			return true
		}
	}
	return false
}

// attribute returns one attribute behind a fixed header, nil if it is not there.
func attribute(data []byte, header int, kind uint16) []byte {
	if len(data) < header {
		return nil
	}
	ad, err := netlink.NewAttributeDecoder(data[header:])
	if err != nil {
		return nil
	}
	for ad.Next() {
		if ad.Type() == kind {
			return ad.Bytes()
		}
	}
	return nil
}
