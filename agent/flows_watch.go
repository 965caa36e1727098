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

	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
)

// flowWatch fills the ring: denials from nflog, allowed connections from conntrack
// (flows_conntrack.go).
type flowWatch struct {
	log   *flowLog
	names *namer
	slog  *slog.Logger
	node  string
}

func newFlowWatch(l *loop, log *slog.Logger) *flowWatch {
	return &flowWatch{log: newFlowLog(), names: &namer{loop: l}, slog: log, node: l.cfg.Node}
}

// denials follows the nflog groups of the ruleset until ctx ends, and calls listening when
// it has begun. The messages are sampled by the ruleset: the denied sets count all.
func (w *flowWatch) denials(ctx context.Context, listening func()) error {
	known, err := newConnectionLookup()
	if err != nil {
		return err
	}
	defer known.close()
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
		hook := func(a nflog.Attribute) int { w.denial(a, rule, known); return 0 }
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
	listening()
	<-ctx.Done()
	return nil
}

// denial takes a logged packet; known has the connections there are.
func (w *flowWatch) denial(a nflog.Attribute, rule bool, known *connectionLookup) {
	if a.Payload == nil || rule && (a.Prefix == nil || *a.Prefix != "deny") {
		return // what a policy allows and logs comes from conntrack as well
	}
	r := rawFlow{denied: true}
	r.flow, r.clientPort = packetFlow(*a.Payload)
	if !r.flow.Src.IsValid() {
		return
	}
	r.flow, r.clientPort = ofConnection(known, r.flow, r.clientPort)
	r.at = time.Now()
	w.log.add(r)
}

// ofConnection is the connection that a denied packet belongs to: when a change of policy
// cuts one, the next packet may be its server's. A connection that was never allowed is in no
// table, and the packet says what it is. (NFULA_CT would spare the question; kernels
// without CONFIG_NETFILTER_NETLINK_GLUE_CT refuse it.)
func ofConnection(known *connectionLookup, f policy.Flow, sourcePort uint16) (policy.Flow, uint16) {
	if f.Protocol == policy.TCP || f.Protocol == policy.UDP || f.Protocol == policy.SCTP {
		if c, found := known.of(f, sourcePort); found {
			return originalFlow(c)
		}
	}
	return f, sourcePort
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
