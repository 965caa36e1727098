package debug

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"

	"github.com/ti-mo/conntrack"
	"github.com/vishvananda/netlink"

	"github.com/nftcni/nftcni/policy"
)

// Path is how this node would send a packet of a flow, and its live connections.
type Path struct {
	Route       string   `json:"route"`
	Interface   string   `json:"interface,omitempty"`
	MTU         int      `json:"mtu,omitempty"`
	Neighbour   string   `json:"neighbour,omitempty"`
	Connections []string `json:"connections,omitempty"`
	Notes       []string `json:"notes,omitempty"` // what could not be found out
}

// pathOf asks the routing table, the neighbour table and conntrack of the namespace the
// command runs in: the node's.
func pathOf(ctx context.Context, f policy.Flow) *Path {
	p := &Path{}
	next := p.route(f.Dst)
	if next.IsValid() {
		p.neighbour(next)
	}
	flows, err := liveFlows(ctx)
	if err != nil {
		p.Notes = append(p.Notes, err.Error())
		return p
	}
	const most = 5
	n := 0
	for _, c := range flows {
		if c.flow != f {
			continue
		}
		if n++; n <= most {
			p.Connections = append(p.Connections, c.String())
		}
	}
	if n > most {
		p.Connections = append(p.Connections, fmt.Sprintf("and %d more", n-most))
	}
	return p
}

// route fills route, interface and MTU and returns the next hop.
func (p *Path) route(dst netip.Addr) netip.Addr {
	routes, err := netlink.RouteGet(dst.AsSlice())
	if err != nil || len(routes) == 0 {
		p.Route = fmt.Sprintf("none: %v", err)
		return netip.Addr{}
	}
	r, next := routes[0], dst
	link, err := netlink.LinkByIndex(r.LinkIndex)
	if err != nil {
		p.Route = fmt.Sprintf("to interface %d, which is gone", r.LinkIndex)
		return netip.Addr{}
	}
	p.Interface, p.MTU = link.Attrs().Name, link.Attrs().MTU
	if r.MTU != 0 {
		p.MTU = r.MTU
	}
	p.Route = "direct"
	if gw, ok := netip.AddrFromSlice(r.Gw); ok {
		next = gw.Unmap()
		p.Route = "via " + next.String()
	}
	if p.Interface == "lo" {
		p.Route = "this node itself"
		return netip.Addr{}
	}
	if !isUp(link) {
		p.Notes = append(p.Notes, "interface "+p.Interface+" is down")
	}
	return next
}

func (p *Path) neighbour(next netip.Addr) {
	link, err := netlink.LinkByName(p.Interface)
	if err != nil {
		return
	}
	family := netlink.FAMILY_V4
	if next.Is6() {
		family = netlink.FAMILY_V6
	}
	list, err := netlink.NeighList(link.Attrs().Index, family)
	if err != nil {
		p.Notes = append(p.Notes, "neighbours: "+err.Error())
		return
	}
	p.Neighbour = "none yet for " + next.String()
	for _, n := range list {
		if n.IP.Equal(net.IP(next.AsSlice())) {
			p.Neighbour = fmt.Sprintf("%s is %s (%s)", next, n.HardwareAddr, neighbourState(n.State))
		}
	}
}

func neighbourState(s int) string {
	for _, st := range []struct {
		bit  int
		name string
	}{{netlink.NUD_PERMANENT, "permanent"}, {netlink.NUD_REACHABLE, "reachable"}, {netlink.NUD_STALE, "stale"},
		{netlink.NUD_DELAY, "delay"}, {netlink.NUD_PROBE, "probe"}, {netlink.NUD_INCOMPLETE, "incomplete"},
		{netlink.NUD_FAILED, "FAILED: it does not answer"}, {netlink.NUD_NOARP, "noarp"}} {
		if s&st.bit != 0 {
			return st.name
		}
	}
	return "state " + strconv.Itoa(s)
}

func (p *Path) write(w io.Writer, to netip.Addr) error {
	if p == nil {
		return nil
	}
	fmt.Fprintln(w)
	t := &table{header: []string{"PATH", "to " + to.String()}}
	t.add("route", p.Route)
	if p.Interface != "" {
		t.add("interface", fmt.Sprintf("%s, MTU %d", p.Interface, p.MTU))
	}
	if p.Neighbour != "" {
		t.add("neighbour", p.Neighbour)
	}
	for _, c := range p.Connections {
		t.add("connection", c)
	}
	if len(p.Connections) == 0 {
		t.add("connection", "none")
	}
	for _, n := range p.Notes {
		t.add("note", n)
	}
	return t.write(w)
}

// connection is one entry of conntrack as the policy question it asks.
type connection struct {
	flow       policy.Flow // client, server after DNAT, server's port
	clientPort uint16
	service    netip.AddrPort // what the client asked for
	mark       uint32
	timeout    uint32 // seconds
	replied    bool
	ended      bool // TCP: both sides have closed
}

func (c connection) String() string {
	text := fmt.Sprintf("from port %d, mark %#x, ends in %ds", c.clientPort, c.mark, c.timeout)
	if c.service.Addr() != c.flow.Dst {
		text += ", asked for " + c.service.String()
	}
	switch {
	case c.ended:
		text += ", closed"
	case !c.replied:
		text += ", no reply yet"
	}
	return text
}

// liveFlows reads conntrack of the caller's network namespace.
func liveFlows(ctx context.Context) ([]connection, error) {
	c, err := conntrack.Dial(nil)
	if err != nil {
		return nil, fmt.Errorf("read connections: %w", err)
	}
	defer func() { _ = c.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer stop()
	list, err := c.Dump(nil)
	if err != nil {
		return nil, fmt.Errorf("read connections: %w", err)
	}
	out := make([]connection, 0, len(list))
	for i := range list {
		out = append(out, connectionOf(&list[i]))
	}
	return out, nil
}

// States of a TCP connection that is over (linux/netfilter/nf_conntrack_tcp.h); the one
// between them is TIME_WAIT.
const (
	tcpLastAck = 6
	tcpClose   = 8
)

// connectionOf reads a conntrack entry. The server's end is that of the reply: what the
// packets really reach after a Service's DNAT.
func connectionOf(f *conntrack.Flow) connection {
	o, r := f.TupleOrig, f.TupleReply
	c := connection{
		flow: policy.Flow{Src: o.IP.SourceAddress.Unmap(), Dst: r.IP.SourceAddress.Unmap(),
			Protocol: policy.Protocol(o.Proto.Protocol), Port: r.Proto.SourcePort},
		clientPort: o.Proto.SourcePort, service: netip.AddrPortFrom(o.IP.DestinationAddress.Unmap(), o.Proto.DestinationPort),
		mark: f.Mark, timeout: f.Timeout, replied: f.Status.SeenReply(),
	}
	if tcp := f.ProtoInfo.TCP; tcp != nil {
		c.ended = tcp.State >= tcpLastAck && tcp.State <= tcpClose
	}
	switch c.flow.Protocol {
	case policy.ICMP, policy.ICMPv6:
		c.flow.Port = uint16(o.Proto.ICMPType)<<8 | uint16(o.Proto.ICMPCode)
		c.clientPort = o.Proto.ICMPID
	case policy.TCP, policy.UDP, policy.SCTP:
	default:
		c.flow.Port = 0
	}
	return c
}
