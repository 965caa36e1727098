package agent

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"github.com/florianl/go-nflog/v2"
	"github.com/mdlayher/netlink"
	"github.com/ti-mo/conntrack"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
)

// watchedPerSecond is how many new connections a second are read one by one. Above it
// the kernel is told to drop all but one in n of the events before they cost anything
// here: reading all of 10,000 a second would be more than a twentieth of a core.
const watchedPerSecond = 500

// flowWatch fills the ring: denials from nflog, allowed connections from conntrack.
type flowWatch struct {
	log   *flowLog
	names *namer
	slog  *slog.Logger
	node  string
}

func newFlowWatch(l *loop, log *slog.Logger) *flowWatch {
	return &flowWatch{log: newFlowLog(), names: &namer{loop: l}, slog: log, node: l.cfg.Node}
}

// denials follows the nflog groups of the ruleset until ctx ends. The messages are
// sampled by the ruleset: the denied sets count all.
func (w *flowWatch) denials(ctx context.Context) error {
	for _, group := range []uint16{nft.LogGroupDenied, nft.LogGroupRule} {
		c, err := nflog.Open(&nflog.Config{Group: group, Copymode: nflog.CopyPacket, Bufsize: 128, QThresh: 1})
		if err != nil {
			return fmt.Errorf("open nflog: %w", err)
		}
		defer func() { _ = c.Close() }()
		if err := c.SetOption(netlink.NoENOBUFS, true); err != nil {
			return fmt.Errorf("set up nflog: %w", err)
		}
		rule := group == nft.LogGroupRule
		hook := func(a nflog.Attribute) int { w.denial(a, rule); return 0 }
		failed := func(err error) int {
			var timeout net.Error
			if ctx.Err() == nil && !(errors.As(err, &timeout) && timeout.Timeout()) {
				w.log.lose()
			}
			return 0
		}
		if err := c.RegisterWithErrorFunc(ctx, hook, failed); err != nil {
			return fmt.Errorf("listen to nflog group %d: %w", group, err)
		}
	}
	<-ctx.Done()
	return nil
}

func (w *flowWatch) denial(a nflog.Attribute, rule bool) {
	if a.Payload == nil || rule && (a.Prefix == nil || *a.Prefix != "deny") {
		return // what a policy allows and logs comes from conntrack as well
	}
	f, clientPort := packetFlow(*a.Payload)
	if f.Src.IsValid() {
		w.log.add(rawFlow{at: time.Now(), flow: f, clientPort: clientPort, denied: true})
	}
}

// packetFlow reads the flow and the source port of a packet from its network header on;
// the zero Flow when it is cut short. Extension headers of IPv6 hide the ports.
func packetFlow(b []byte) (f policy.Flow, srcPort uint16) {
	var transport []byte
	switch {
	case len(b) >= 20 && b[0]>>4 == 4 && int(b[0]&15)*4 <= len(b):
		f.Src, f.Dst = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
		f.Protocol, transport = policy.Protocol(b[9]), b[int(b[0]&15)*4:]
	case len(b) >= 40 && b[0]>>4 == 6:
		f.Src, f.Dst = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
		f.Protocol, transport = policy.Protocol(b[6]), b[40:]
	default:
		return f, 0
	}
	switch f.Protocol {
	case policy.ICMP, policy.ICMPv6:
		if len(transport) >= 2 {
			f.Port = uint16(transport[0])<<8 | uint16(transport[1])
		}
	case policy.TCP, policy.UDP, policy.SCTP:
		if len(transport) >= 4 {
			srcPort, f.Port = binary.BigEndian.Uint16(transport), binary.BigEndian.Uint16(transport[2:])
		}
	}
	return f, srcPort
}

// connections follows conntrack's events of new connections until ctx ends: an entry is
// made when the first packet has passed every hook, so these are the allowed ones.
func (w *flowWatch) connections(ctx context.Context) error {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{Groups: 1 << (unix.NFNLGRP_CONNTRACK_NEW - 1)})
	if err != nil {
		return fmt.Errorf("listen to conntrack: %w", err)
	}
	defer func() { _ = c.Close() }()
	_ = c.SetReadBuffer(4 << 20) // a smaller one only loses more events, and they are counted
	stop := context.AfterFunc(ctx, func() { _ = c.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	s := sampler{conn: c, log: w.log, oneIn: 1, from: time.Now()}
	for {
		messages, err := c.Receive()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS):
			w.log.lose()
			s.seen(watchedPerSecond) // whatever was lost, it was too much
			continue
		case err != nil:
			return fmt.Errorf("receive conntrack events: %w", err)
		}
		s.seen(len(messages))
		for _, m := range messages {
			w.connection(m)
		}
	}
}

func (w *flowWatch) connection(m netlink.Message) {
	var e conntrack.Event
	if e.Unmarshal(m) != nil || e.Flow == nil {
		w.log.lose()
		return
	}
	o, r := e.Flow.TupleOrig, e.Flow.TupleReply
	f := rawFlow{at: time.Now(), clientPort: o.Proto.SourcePort, flow: policy.Flow{Src: o.IP.SourceAddress.Unmap(),
		Dst: r.IP.SourceAddress.Unmap(), Protocol: policy.Protocol(o.Proto.Protocol), Port: r.Proto.SourcePort}}
	if f.flow.Protocol == policy.ICMP || f.flow.Protocol == policy.ICMPv6 {
		f.flow.Port, f.clientPort = uint16(o.Proto.ICMPType)<<8|uint16(o.Proto.ICMPCode), o.Proto.ICMPID
	}
	w.log.add(f)
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
