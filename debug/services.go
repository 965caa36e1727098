package debug

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
)

// services is who knows what is behind a Service: an API server where one was named, else
// kube-proxy's rules in the kernel, which is what packets meet.
type services struct {
	api    apiFlags
	proxy  func(context.Context) ([]nft.ProxyPort, error) // nil: nobody
	notice func(string)
}

// serviceNameOf is namespace/name of svc/namespace/name, or of the DNS name that pods use:
// name.namespace.svc, also with the cluster's domain. Such names are not asked of a DNS server: the
// node's own does not know them.
func serviceNameOf(arg string) (string, bool) {
	if name, ok := strings.CutPrefix(arg, "svc/"); ok {
		return name, true
	}
	labels := strings.Split(strings.TrimSuffix(arg, "."), ".")
	if len(labels) >= 3 && labels[2] == "svc" && !slices.Contains(labels, "") {
		return labels[1] + "/" + labels[0], true
	}
	return "", false
}

// newQuestions is newQuestion, or for a Service one question for each backend.
func newQuestions(ctx context.Context, c *policy.Cluster, args []string, s services) ([]question, error) {
	svc, err := parseService(args[2])
	if err != nil {
		return nil, err
	}
	src, err := resolve(c, args[0])
	if err != nil {
		return nil, fmt.Errorf("SRC: %w", err)
	}
	list, isService, err := s.backends(ctx, c, args[1], svc)
	if err != nil {
		return nil, fmt.Errorf("DST: %w", err)
	}
	if !isService {
		q, err := newQuestion(ctx, c, args)
		return []question{q}, err
	}
	var out []question
	for _, b := range list {
		out = append(out, question{src: src, dst: b.endpoint, service: service{protocol: svc.protocol, port: b.port}})
	}
	return out, nil
}

// backends of a Service's name or address; false when arg is none of a Service.
func (s services) backends(ctx context.Context, c *policy.Cluster, arg string, svc service) ([]backend, bool, error) {
	name, named := serviceNameOf(arg)
	addr, addrErr := netip.ParseAddr(arg)
	switch {
	case named && !strings.Contains(name, "/"):
		return nil, true, fmt.Errorf("service %q: it is written svc/NAMESPACE/NAME", name)
	case named && s.api != (apiFlags{}):
		list, err := s.api.backends(ctx, c, name, svc)
		return list, true, err
	case named:
	case addrErr == nil:
		if p := policy.NewOracle(c, "").Owner(addr.Unmap()); p != nil {
			return nil, false, nil
		}
	default:
		return nil, false, nil
	}
	ports, err := s.proxied(ctx)
	if err != nil && named {
		return nil, true, fmt.Errorf("service %s: %w", name, err)
	}
	if !named {
		if name = serviceAt(c, ports, addr.Unmap(), svc); name == "" {
			return nil, false, nil
		}
	}
	list, err := proxyBackends(c, ports, name, addr.Unmap(), svc)
	if err == nil && s.notice != nil {
		s.notice(fmt.Sprintf("%s is the Service %s, with %s by kube-proxy's rules in the kernel", arg, name, plural(len(list), "backend")))
	}
	return list, true, err
}

// errNoProxy: nothing here knows Services.
var errNoProxy = errors.New("the agent keeps no Services, and this node's kernel has no rules of kube-proxy in nftables mode to ask; give --kubeconfig, or ask for a pod behind it")

func (s services) proxied(ctx context.Context) ([]nft.ProxyPort, error) {
	if s.proxy == nil {
		return nil, errNoProxy
	}
	ports, err := s.proxy(ctx)
	if err == nil && len(ports) == 0 {
		err = errNoProxy
	}
	return ports, err
}

// serviceAt is the Service that has an address, or the port of a node's address; "" for none.
func serviceAt(c *policy.Cluster, ports []nft.ProxyPort, addr netip.Addr, svc service) string {
	isNode := slices.ContainsFunc(c.Nodes, func(n policy.Node) bool { return slices.Contains(n.Addrs, addr) })
	for _, p := range ports {
		if slices.ContainsFunc(p.Addrs, func(a netip.AddrPort) bool { return a.Addr() == addr }) ||
			isNode && p.Protocol == svc.protocol && slices.Contains(p.NodePorts, svc.port) {
			return p.Service
		}
	}
	return ""
}

// proxyBackends are what kube-proxy sends to. addr is the address that was asked for, zero
// for any; a Service's addresses of the other family have backends of their own.
func proxyBackends(c *policy.Cluster, ports []nft.ProxyPort, name string, addr netip.Addr, svc service) ([]backend, error) {
	var known []string
	exists := false
	for _, p := range ports {
		if p.Service != name {
			continue
		}
		exists = true
		asked := slices.Contains(p.NodePorts, svc.port)
		for _, a := range p.Addrs {
			asked = asked || a.Port() == svc.port
			known = append(known, fmt.Sprintf("%s/%d", protocolName(p.Protocol), a.Port()))
		}
		if !asked || p.Protocol != svc.protocol {
			continue
		}
		var out []backend
		for _, b := range p.Backends {
			if !addr.IsValid() || addr.Is4() == b.Addr().Is4() {
				out = append(out, backend{endpoint{nameOf(c, b.Addr()), []netip.Addr{b.Addr()}}, b.Port()})
			}
		}
		if len(out) == 0 {
			return nil, fmt.Errorf("service %s has no ready backend for %s/%d: kube-proxy rejects what is sent to it", name, protocolName(svc.protocol), svc.port)
		}
		return out, nil
	}
	if !exists {
		return nil, fmt.Errorf("service %s: kube-proxy's rules in the kernel have none of this name (a headless Service has none: ask for its pods)", name)
	}
	slices.Sort(known)
	return nil, fmt.Errorf("service %s has no port %s/%d, but %s", name, protocolName(svc.protocol), svc.port, orDash(strings.Join(slices.Compact(known), ", ")))
}
