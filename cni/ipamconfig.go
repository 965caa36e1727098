package cni

import (
	"net/netip"
	"regexp"

	"github.com/nftcni/nftcni/ipam"
)

// ipamConf is the "ipam" object. Its ranges are written as host-local writes them.
type ipamConf struct {
	Type string `json:"type"`
	rangeConf
	Ranges   [][]rangeConf `json:"ranges"`
	Excludes []string      `json:"excludes"`
	Reserved []string      `json:"reserved"`
	Routes   []struct {
		Dst string `json:"dst"`
	} `json:"routes"`
}

type rangeConf struct {
	Subnet     string `json:"subnet,omitempty"`
	RangeStart string `json:"rangeStart,omitempty"`
	RangeEnd   string `json:"rangeEnd,omitempty"`
	Gateway    string `json:"gateway,omitempty"`
}

var pluginName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)

func (c *config) checkIPAM() error {
	i := &c.IPAM
	switch {
	case i.Type == "dhcp":
		return wrong("ipam.type: dhcp cannot work here: a pod's routed veth has no link to a DHCP server; " +
			"use nftcni-ipam with a subnet, or leave ipam out to take addresses from the node's podCIDRs")
	case i.Type != "" && !pluginName.MatchString(i.Type):
		return wrong("ipam.type: %q is not a plugin's name", i.Type)
	}
	if err := c.readRoutes(); err != nil {
		return err
	}
	if c.delegated() {
		return nil // its other fields are the delegate's
	}
	if err := c.readPools(); err != nil {
		return err
	}
	for n, s := range i.Excludes {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			a, errAddr := netip.ParseAddr(s)
			if errAddr != nil {
				return wrong("ipam.excludes[%d]: %q is neither a prefix such as 10.244.1.0/28 nor an address", n, s)
			}
			p = netip.PrefixFrom(a, a.BitLen())
		}
		c.excludes = append(c.excludes, p.Masked())
	}
	for n, s := range i.Reserved {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return wrong("ipam.reserved[%d]: %q is not an address; a whole prefix belongs into excludes", n, s)
		}
		c.reserved = append(c.reserved, a)
	}
	return nil
}

// readRoutes reads the destinations. A gateway in a route means nothing on a routed veth:
// everything leaves the pod for its node.
func (c *config) readRoutes() error {
	for n, r := range c.IPAM.Routes {
		p, err := netip.ParsePrefix(r.Dst)
		if err != nil {
			return wrong("ipam.routes[%d].dst: %q is not a prefix such as 0.0.0.0/0", n, r.Dst)
		}
		c.routes = append(c.routes, p.Masked())
	}
	return nil
}

func (c *config) readPools() error {
	sets := c.IPAM.Ranges
	if c.IPAM.Subnet != "" {
		sets = append([][]rangeConf{{c.IPAM.rangeConf}}, sets...)
	} else if c.IPAM.RangeStart != "" || c.IPAM.RangeEnd != "" || c.IPAM.Gateway != "" {
		return wrong("ipam.subnet: is missing, but rangeStart, rangeEnd or gateway is there")
	}
	var seen ipam.Pool
	for n, set := range sets {
		var pool ipam.Pool
		for m, rc := range set {
			r, err := rc.parse()
			if err != nil {
				return wrong("ipam.ranges[%d][%d].%v", n, m, err)
			}
			if len(pool) > 0 && r.First.Is4() != pool[0].First.Is4() {
				return wrong("ipam.ranges[%d]: mixes IPv4 and IPv6; make it two lists, a pod gets one address of each", n)
			}
			for _, other := range seen {
				if other.Contains(r.First) || r.Contains(other.First) {
					return wrong("ipam.ranges[%d][%d]: %s overlaps %s", n, m, r, other)
				}
			}
			pool, seen = append(pool, r), append(seen, r)
		}
		if len(pool) == 0 {
			return wrong("ipam.ranges[%d]: is empty; every list needs a range with a subnet", n)
		}
		c.pools = append(c.pools, pool)
	}
	return nil
}

type fieldError struct{ field, value, want string }

func (e *fieldError) Error() string { return e.field + ": " + e.value + " is not " + e.want }

func (rc rangeConf) parse() (ipam.Range, error) {
	subnet, err := netip.ParsePrefix(rc.Subnet)
	if err != nil {
		return ipam.Range{}, &fieldError{"subnet", `"` + rc.Subnet + `"`, "a prefix such as 10.244.1.0/24"}
	}
	var first, last, gateway netip.Addr
	for _, f := range []struct {
		field, value string
		into         *netip.Addr
	}{{"rangeStart", rc.RangeStart, &first}, {"rangeEnd", rc.RangeEnd, &last}, {"gateway", rc.Gateway, &gateway}} {
		if f.value == "" {
			continue
		}
		if *f.into, err = netip.ParseAddr(f.value); err != nil {
			return ipam.Range{}, &fieldError{f.field, `"` + f.value + `"`, "an address"}
		}
	}
	return ipam.NewRange(subnet, first, last, gateway)
}

// nodePools are the pools of a node: one per family, of all its podCIDRs.
func nodePools(cidrs []netip.Prefix) ([]ipam.Pool, error) {
	var v4, v6 ipam.Pool
	for _, p := range cidrs {
		r, err := ipam.NewRange(p, netip.Addr{}, netip.Addr{}, netip.Addr{})
		if err != nil {
			return nil, wrong("node podCIDRs: %s: %v", p, err)
		}
		if p.Addr().Is4() {
			v4 = append(v4, r)
		} else {
			v6 = append(v6, r)
		}
	}
	var pools []ipam.Pool
	for _, pool := range []ipam.Pool{v4, v6} {
		if len(pool) > 0 {
			pools = append(pools, pool)
		}
	}
	return pools, nil
}

// subnets are the prefixes that pools lease from.
func subnets(pools []ipam.Pool) []netip.Prefix {
	var list []netip.Prefix
	for _, pool := range pools {
		for _, r := range pool {
			list = append(list, r.Subnet)
		}
	}
	return list
}
