package nft

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/policy"
)

// ProxyPort is one port of a Service as kube-proxy's rules in the kernel have it.
type ProxyPort struct {
	Service   string // namespace/name
	Port      string // the port's name, mostly empty where there is one
	Protocol  policy.Protocol
	Addrs     []netip.AddrPort // cluster, external and load balancer addresses
	NodePorts []uint16
	Backends  []netip.AddrPort
}

// Names of kube-proxy's nftables mode (pkg/proxy/nftables of Kubernetes 1.29 to 1.36): the
// chains hold all that is asked for here, as "endpoint-ABCDEFGH-shop/web/tcp/http__10.0.0.7/80".
const (
	proxyTable     = "kube-proxy"
	proxyIPs       = "service-ips"
	proxyNodePorts = "service-nodeports"
	proxyEndpoint  = "endpoint-"
	proxyHash      = 8 // characters before the next dash
)

// KubeProxy reads the Services that kube-proxy serves in its nftables mode; none when it
// runs in another mode or not at all.
func KubeProxy(ctx context.Context, o Options) ([]ProxyPort, error) {
	ports := map[string]*ProxyPort{}
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: o.NetNS})
	if err != nil {
		return nil, fmt.Errorf("dial nfnetlink: %w", err)
	}
	defer func() { _ = c.Close() }()
	for _, family := range []uint8{unix.NFPROTO_IPV4, unix.NFPROTO_IPV6} {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if err := proxyBackends(c, family, ports); err != nil {
			return nil, err
		}
		for _, set := range []string{proxyIPs, proxyNodePorts} {
			if err := proxyElements(c, family, set, ports); err != nil {
				return nil, err
			}
		}
	}
	out := make([]ProxyPort, 0, len(ports))
	for _, p := range ports {
		slices.SortFunc(p.Backends, netip.AddrPort.Compare)
		out = append(out, *p)
	}
	slices.SortFunc(out, func(a, b ProxyPort) int {
		return cmp.Or(cmp.Compare(a.Service, b.Service), cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Port, b.Port))
	})
	return out, nil
}

// proxyBackends takes the backends from the names of the chains.
func proxyBackends(c *netlink.Conn, family uint8, ports map[string]*ProxyPort) error {
	replies, err := c.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETCHAIN, Flags: netlink.Request | netlink.Dump},
		Data:   []byte{family, unix.NFNETLINK_V0, 0, 0},
	})
	if err != nil {
		return fmt.Errorf("list chains: %w", err)
	}
	for _, m := range replies {
		attrs, err := attributes(m)
		if err != nil {
			return err
		}
		name, isEndpoint := strings.CutPrefix(cString(attrs[unix.NFTA_CHAIN_NAME]), proxyEndpoint)
		if !isEndpoint || cString(attrs[unix.NFTA_CHAIN_TABLE]) != proxyTable {
			continue
		}
		service, backend, found := strings.Cut(name, "__")
		addr, port, both := strings.Cut(backend, "/")
		if family == unix.NFPROTO_IPV6 {
			addr = strings.ReplaceAll(addr, ".", ":")
		}
		a, err := netip.ParseAddr(addr)
		n, portErr := strconv.ParseUint(port, 10, 16)
		if p := proxyPort(service, ports); p != nil && found && both && err == nil && portErr == nil {
			p.Backends = append(p.Backends, netip.AddrPortFrom(a, uint16(n)))
		}
	}
	return nil
}

// proxyPort finds or makes the port that "HASH-namespace/name/protocol/port" names; nil
// when it names none.
func proxyPort(name string, ports map[string]*ProxyPort) *ProxyPort {
	if len(name) < proxyHash+1 || name[proxyHash] != '-' {
		return nil
	}
	name = name[proxyHash+1:]
	part := strings.Split(name, "/")
	if len(part) != 4 {
		return nil
	}
	protocol, known := map[string]policy.Protocol{"tcp": policy.TCP, "udp": policy.UDP, "sctp": policy.SCTP}[part[2]]
	if !known {
		return nil
	}
	if ports[name] == nil {
		ports[name] = &ProxyPort{Service: part[0] + "/" + part[1], Protocol: protocol, Port: part[3]}
	}
	return ports[name]
}

// proxyElements reads the verdict maps that lead to the Services' chains: address . protocol
// . port, and protocol . port.
func proxyElements(c *netlink.Conn, family uint8, set string, ports map[string]*ProxyPort) error {
	e := netlink.NewAttributeEncoder()
	e.String(unix.NFTA_SET_ELEM_LIST_TABLE, proxyTable)
	e.String(unix.NFTA_SET_ELEM_LIST_SET, set)
	msg, err := nfnetlinkRequest(unix.NFT_MSG_GETSETELEM, netlink.Dump, e)
	if err != nil {
		return fmt.Errorf("encode: %w", err)
	}
	msg.Data[0] = family
	replies, err := c.Execute(msg)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("dump %s of kube-proxy: %w", set, err)
	}
	for _, m := range replies {
		elements, err := decodeElements(m)
		if err != nil {
			return fmt.Errorf("map %s of kube-proxy: %w", set, err)
		}
		for _, x := range elements {
			_, chain, _ := strings.Cut(x.chain, "-") // service-, external- or firewall-
			p := proxyPort(chain, ports)
			if p == nil || len(x.key) < 8 {
				continue
			}
			port := binary.BigEndian.Uint16(x.key[len(x.key)-4:])
			if set == proxyNodePorts {
				p.NodePorts = append(p.NodePorts, port)
			} else if a, ok := netip.AddrFromSlice(x.key[:len(x.key)-8]); ok {
				p.Addrs = append(p.Addrs, netip.AddrPortFrom(a, port))
			}
		}
	}
	return nil
}
