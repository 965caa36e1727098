package debug

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/policy"
)

// endpoint is SRC or DST of a question: a name to print and its addresses.
type endpoint struct {
	name  string
	addrs []netip.Addr
}

// Addresses that stand for "world": documentation ranges (RFC 5737, RFC 3849). A policy
// that names them names them on purpose.
var world = []netip.Addr{netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("2001:db8:ffff:ffff::1")}

// resolve reads what the user typed: an address, world, namespace/pod, or a pod's name
// when only one namespace has it.
func resolve(c *policy.Cluster, arg string) (endpoint, error) {
	if arg == "world" {
		return endpoint{name: arg, addrs: world}, nil
	}
	if a, err := netip.ParseAddr(arg); err == nil {
		return endpoint{name: nameOf(c, a.Unmap()), addrs: []netip.Addr{a.Unmap()}}, nil
	}
	var found []*policy.Pod
	for i := range c.Pods {
		if p := &c.Pods[i]; p.Name.String() == arg || p.Name.Name == arg {
			found = append(found, p)
		}
	}
	switch {
	case len(found) == 0:
		return endpoint{}, fmt.Errorf("%q is no pod this node knows, no address, and not world (nftcni debug pods --all lists the pods)", arg)
	case len(found) > 1:
		return endpoint{}, fmt.Errorf("%q is a pod in %d namespaces: write namespace/pod", arg, len(found))
	}
	p := found[0]
	if why := note(*p); len(p.Addrs) == 0 || p.Finished {
		return endpoint{}, fmt.Errorf("pod %s cannot be asked about (%s)", p.Name, why)
	}
	return endpoint{name: p.Name.String(), addrs: p.Addrs}, nil
}

var errNoDNSName = errors.New("not a DNS name")

// resolveDNS asks the resolver of the host for a name's addresses.
func resolveDNS(ctx context.Context, name string) (endpoint, error) {
	if !strings.Contains(name, ".") || strings.Contains(name, "/") {
		return endpoint{}, errNoDNSName
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", name)
	if dns, ok := errors.AsType[*net.DNSError](err); ok && dns.IsNotFound {
		return endpoint{}, errors.New("DNS knows no such host")
	}
	if err != nil {
		return endpoint{}, errors.New("the node's DNS resolver does not answer (/etc/resolv.conf)")
	}
	e := endpoint{name: name}
	for _, a := range addrs {
		e.addrs = append(e.addrs, a.Unmap())
	}
	return e, nil
}

func nameOf(c *policy.Cluster, a netip.Addr) string {
	for i := range c.Pods {
		if p := &c.Pods[i]; !p.Finished && !p.HostNetwork && slices.Contains(p.Addrs, a) {
			return p.Name.String()
		}
	}
	for _, n := range c.Nodes {
		if slices.Contains(n.Addrs, a) {
			return "node " + n.Name
		}
	}
	return a.String()
}

// service is the PROTO/PORT of a question.
type service struct {
	protocol policy.Protocol
	port     uint16
	echo     bool // ICMP without type: the echo request of the flow's family
}

// parseService reads PROTO/PORT: TCP, UDP and SCTP take a port of 1 to 65535, ICMP takes
// nothing (an echo request) or a type, any other protocol is its IANA number.
func parseService(arg string) (service, error) {
	name, number, has := strings.Cut(arg, "/")
	known := map[string]policy.Protocol{"tcp": policy.TCP, "udp": policy.UDP, "sctp": policy.SCTP, "icmp": policy.ICMP, "icmpv6": policy.ICMPv6}
	p, ok := known[strings.ToLower(name)]
	if !ok {
		// A bare number would be taken for a port by whoever writes it.
		n, err := strconv.ParseUint(number, 10, 8)
		if err != nil || !strings.EqualFold(name, "ip") {
			return service{}, fmt.Errorf("%q: it takes TCP/PORT, UDP/PORT, SCTP/PORT, ICMP, ICMP/TYPE, or IP/NUMBER for another protocol", arg)
		}
		return service{protocol: policy.Protocol(n)}, nil
	}
	if p == policy.ICMP || p == policy.ICMPv6 {
		return parseICMP(p, number, has)
	}
	n, err := strconv.ParseUint(number, 10, 16)
	if err != nil || n == 0 {
		return service{}, fmt.Errorf("%q: %s takes a port of 1 to 65535, as in %s/80", arg, name, name)
	}
	return service{protocol: p, port: uint16(n)}, nil
}

func parseICMP(p policy.Protocol, number string, has bool) (service, error) {
	if !has {
		return service{protocol: p, echo: true}, nil
	}
	n, err := strconv.ParseUint(number, 10, 8)
	if err != nil {
		return service{}, fmt.Errorf("ICMP type %q: it takes 0 to 255", number)
	}
	return service{protocol: p, port: uint16(n) << 8}, nil
}

// flow is the question for one pair of addresses of one family.
func (s service) flow(src, dst netip.Addr) policy.Flow {
	f := policy.Flow{Src: src, Dst: dst, Protocol: s.protocol, Port: s.port}
	if s.echo && src.Is4() {
		f.Protocol, f.Port = policy.ICMP, 8<<8
	} else if s.echo {
		f.Protocol, f.Port = policy.ICMPv6, 128<<8
	}
	return f
}

func protocolName(p policy.Protocol) string {
	return cmp.Or(agent.ProtocolName(p), "protocol "+strconv.Itoa(int(p)))
}
