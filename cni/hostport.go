package cni

import (
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
)

// maxPortMappings bounds what one attachment may ask for.
const maxPortMappings = 1 << 12

// HostPort is a port of the node that leads to a port of the pod.
type HostPort struct {
	Protocol string         `json:"protocol"` // tcp, udp or sctp
	Host     netip.AddrPort `json:"host"`     // 0.0.0.0 or ::: every address of the node of that family
	Pod      netip.AddrPort `json:"pod"`      // of the same family
}

// portMapping is one of runtimeConfig.portMappings (CNI conventions, "Dynamic Plugin specific fields").
type portMapping struct {
	HostPort      int    `json:"hostPort"`
	ContainerPort int    `json:"containerPort"`
	Protocol      string `json:"protocol"`
	HostIP        string `json:"hostIP"`
}

// hostPorts are what the runtime asks for, for the pod's first address of each family. Only ADD asks: what cannot be
// mapped must be deletable all the same.
func (c *config) hostPorts(addresses []netip.Addr) ([]HostPort, error) {
	if n := len(c.RuntimeConfig.PortMappings); n > maxPortMappings {
		return nil, wrong("runtimeConfig.portMappings: %d entries, want at most %d", n, maxPortMappings)
	}
	var out []HostPort
	for i, raw := range c.RuntimeConfig.PortMappings {
		var m portMapping
		if err := json.Unmarshal(raw, &m); err != nil {
			return nil, wrong("runtimeConfig.portMappings[%d]: is not {\"hostPort\": 8080, \"containerPort\": 80, \"protocol\": \"tcp\", \"hostIP\": \"\"}: %v", i, err)
		}
		if m.HostPort == 0 {
			continue // kubelets send every port of the container; 0 asks for none
		}
		ports, err := m.resolve(i, addresses)
		if err != nil {
			return nil, err
		}
		for _, p := range ports {
			at := slices.IndexFunc(out, func(q HostPort) bool { return p.Protocol == q.Protocol && p.Host == q.Host })
			switch {
			case at < 0:
				out = append(out, p)
			case out[at].Pod != p.Pod:
				return nil, wrong("runtimeConfig.portMappings[%d]: %s port %s of the node leads to container port %d already; "+
					"give one of them another hostPort", i, p.Protocol, p.Host, out[at].Pod.Port())
			}
		}
	}
	return out, nil
}

// resolve checks one entry and gives it the pod's addresses.
func (m portMapping) resolve(i int, addresses []netip.Addr) ([]HostPort, error) {
	for _, p := range []struct {
		field string
		value int
	}{{"hostPort", m.HostPort}, {"containerPort", m.ContainerPort}} {
		if p.value < 1 || p.value > 65535 {
			return nil, wrong("runtimeConfig.portMappings[%d].%s: %d is not between 1 and 65535", i, p.field, p.value)
		}
	}
	protocol := strings.ToLower(m.Protocol)
	if protocol == "" {
		protocol = "tcp"
	}
	if !slices.Contains([]string{"tcp", "udp", "sctp"}, protocol) {
		return nil, wrong("runtimeConfig.portMappings[%d].protocol: %.20q is not tcp, udp or sctp", i, m.Protocol)
	}
	at, err := m.hostAddresses(i)
	if err != nil {
		return nil, err
	}
	var out []HostPort
	for _, host := range at {
		to := slices.IndexFunc(addresses, func(a netip.Addr) bool { return a.Is4() == host.Is4() })
		if to < 0 {
			continue
		}
		out = append(out, HostPort{Protocol: protocol, Host: netip.AddrPortFrom(host, uint16(m.HostPort)),
			Pod: netip.AddrPortFrom(addresses[to], uint16(m.ContainerPort))})
	}
	if len(out) == 0 {
		return nil, wrong("runtimeConfig.portMappings[%d].hostIP: %s is of a family that the pod has no address of (%v); leave hostIP out, "+
			"or give the network a range of that family", i, m.HostIP, addresses)
	}
	return out, nil
}

// hostAddresses are the node's: every address of both families when nothing is said.
func (m portMapping) hostAddresses(i int) ([]netip.Addr, error) {
	if m.HostIP == "" {
		return []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}, nil
	}
	a, err := netip.ParseAddr(m.HostIP)
	if a = a.Unmap(); err != nil || a.Zone() != "" || a.IsMulticast() {
		return nil, wrong("runtimeConfig.portMappings[%d].hostIP: %.60q is not an address of the node such as 192.0.2.1; leave it out to mean every one", i, m.HostIP)
	}
	if a.Is6() && a.IsLoopback() {
		return nil, wrong("runtimeConfig.portMappings[%d].hostIP: the kernel forwards nothing from ::1; use 127.0.0.1, or leave it out", i)
	}
	return []netip.Addr{a}, nil
}

// fromLoopback reports whether the node reaches the pod by its loopback: 127.0.0.1 leaves by the pod's interface only
// with route_localnet there.
func fromLoopback(ports []HostPort) bool {
	return slices.ContainsFunc(ports, func(p HostPort) bool {
		a := p.Host.Addr()
		return a.Is4() && (a.IsUnspecified() || a.IsLoopback())
	})
}
