package agent

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/mdlayher/netlink"
	"github.com/ti-mo/conntrack"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/policy"
)

const (
	// watchedPerSecond is how many new connections a second are read one by one. Above it
	// the kernel is told to drop all but one in n of the events before they cost anything
	// here: reading all of 10,000 a second would be more than a twentieth of a core.
	watchedPerSecond = 500
	// eventsGather is how long events wait after some were read: to wake up for each one
	// costs several times what reading it does.
	eventsGather = 20 * time.Millisecond
	// eventBuffer holds one datagram of events; the kernel's are below 1 KiB each.
	eventBuffer = 32 << 10
)

// connections follows conntrack's events of new connections until ctx ends: an entry is
// made when the first packet has passed every hook, so these are the allowed ones.
// It calls listening when it has begun.
func (w *flowWatch) connections(ctx context.Context, listening func()) error {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{Groups: 1 << (unix.NFNLGRP_CONNTRACK_NEW - 1)})
	if err != nil {
		return fmt.Errorf("listen to conntrack: %w", err)
	}
	defer func() { _ = c.Close() }()
	listening()
	_ = c.SetReadBuffer(4 << 20) // a smaller one only loses more events, and they are counted
	socket, err := c.SyscallConn()
	if err != nil {
		return fmt.Errorf("listen to conntrack: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = c.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	s := sampler{conn: c, log: w.log, oneIn: 1, from: time.Now()}
	buf := make([]byte, eventBuffer)
	gather := time.NewTimer(0)
	defer gather.Stop()
	for {
		select {
		case <-gather.C:
		case <-ctx.Done():
			return nil
		}
		var n int
		var failed error
		err := socket.Read(func(fd uintptr) bool {
			n, failed = w.drain(int(fd), buf)
			return n > 0 || failed != nil
		})
		s.seen(n)
		if ctx.Err() != nil {
			return nil
		}
		if err := errors.Join(err, failed); err != nil {
			return fmt.Errorf("receive conntrack events: %w", err)
		}
		gather.Reset(eventsGather)
	}
}

// drain reads the datagrams that wait in a socket, without blocking, and returns how many
// events they held; at twice watchedPerSecond it stops, so that the sampler sees them.
// Events that the kernel had no room for count as watchedPerSecond: whatever was lost, it
// was too much.
func (w *flowWatch) drain(fd int, buf []byte) (events int, err error) {
	for events < 2*watchedPerSecond {
		n, _, err := unix.Recvfrom(fd, buf, unix.MSG_DONTWAIT|unix.MSG_TRUNC)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return events, nil
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.ENOBUFS), n > len(buf):
			w.log.lose()
			events += watchedPerSecond
		case err != nil:
			return events, err
		default:
			events += w.datagram(buf[:n])
		}
	}
	return events, nil
}

// datagram takes the messages of one datagram (struct nlmsghdr: length, type, flags,
// sequence, port; netlink(7)).
func (w *flowWatch) datagram(b []byte) (messages int) {
	for len(b) >= unix.NLMSG_HDRLEN {
		size := int(binary.NativeEndian.Uint32(b))
		if size < unix.NLMSG_HDRLEN || size > len(b) {
			w.log.lose()
			return messages
		}
		w.connection(netlink.Message{
			Header: netlink.Header{
				Length: uint32(size), Type: netlink.HeaderType(binary.NativeEndian.Uint16(b[4:])),
				Flags: netlink.HeaderFlags(binary.NativeEndian.Uint16(b[6:])),
			},
			Data: b[unix.NLMSG_HDRLEN:size],
		})
		messages++
		b = b[min(len(b), (size+3)&^3):]
	}
	return messages
}

func (w *flowWatch) connection(m netlink.Message) {
	var e conntrack.Event
	if e.Unmarshal(m) != nil || e.Flow == nil {
		w.log.lose()
		return
	}
	r := rawFlow{at: time.Now()}
	r.flow, r.clientPort = originalFlow(e.Flow)
	w.log.add(r)
}

// originalFlow is what policy judges of a connection, and its client's port: after a
// Service's DNAT, before any SNAT. For ICMP the port is the identifier.
func originalFlow(c *conntrack.Flow) (f policy.Flow, clientPort uint16) {
	o, r := c.TupleOrig, c.TupleReply
	f = policy.Flow{Src: o.IP.SourceAddress.Unmap(), Dst: r.IP.SourceAddress.Unmap(), Protocol: policy.Protocol(o.Proto.Protocol), Port: r.Proto.SourcePort}
	if f.Protocol == policy.ICMP || f.Protocol == policy.ICMPv6 {
		f.Port = uint16(o.Proto.ICMPType)<<8 | uint16(o.Proto.ICMPCode)
		return f, o.Proto.ICMPID
	}
	return f, o.Proto.SourcePort
}

// sampler keeps the rate of events that reach this process near watchedPerSecond.
type sampler struct {
	conn  *netlink.Conn
	log   *flowLog
	oneIn uint32
	from  time.Time
	count int
}

// seen counts events and, once a second, sets how many of them are wanted.
func (s *sampler) seen(n int) {
	s.count += n
	age := time.Since(s.from)
	if age < time.Second && s.count < 2*watchedPerSecond {
		return
	}
	rate := float64(s.count) * float64(s.oneIn) / max(age.Seconds(), 0.001)
	s.from, s.count = time.Now(), 0
	want := uint32(1)
	for rate/float64(want) > watchedPerSecond && want < 1<<16 {
		want *= 2
	}
	if want == s.oneIn || s.apply(want) != nil {
		return
	}
	s.oneIn = want
	s.log.sample(want)
}

// apply has the kernel drop all but one in n events, at random, before they are queued.
func (s *sampler) apply(n uint32) error {
	if n == 1 {
		return s.conn.RemoveBPF()
	}
	prog, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadExtension{Num: bpf.ExtRand},
		bpf.JumpIf{Cond: bpf.JumpLessThan, Val: ^uint32(0) / n, SkipTrue: 1},
		bpf.RetConstant{Val: 0},
		bpf.RetConstant{Val: 1 << 18},
	})
	if err != nil {
		return fmt.Errorf("assemble sampling filter: %w", err)
	}
	return s.conn.SetBPF(prog)
}
