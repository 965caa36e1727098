package policy

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Compiled is the tables of one node with the names of their numbers.
type Compiled struct {
	Tables     Tables
	Comments   map[Key]string
	Profiles   map[uint32]ProfileInfo
	Identities map[uint32]string // what tells the members apart from other addresses
	Classes    map[uint32]string // "allow tcp 80, udp 53; deny the rest"
}

// ProfileInfo describes one profile number.
type ProfileInfo struct {
	Direction Direction
	Policies  []PolicyID // in the order of the walk
	Pods      []Name     // the local pods that have it
}

// Compile compiles c for node from scratch. It is deterministic and independent of the
// order in which c lists its objects.
func Compile(c *Cluster, node string) *Compiled {
	e := NewEngine(node)
	e.Replace(c)
	return e.Compiled()
}

// Tables is the content that the kernel holds once all deltas and their Drops were applied.
func (e *Engine) Tables() Tables {
	t := make(Tables, len(e.addresses))
	e.elements(func(el Element) { t[el.Key] = el.Value })
	return t
}

// Compiled returns the tables with names for people.
func (e *Engine) Compiled() *Compiled {
	c := &Compiled{
		Tables: make(Tables, len(e.addresses)), Comments: map[Key]string{}, Profiles: map[uint32]ProfileInfo{},
		Identities: map[uint32]string{}, Classes: map[uint32]string{},
	}
	e.elements(func(el Element) {
		c.Tables[el.Key] = el.Value
		if el.Comment != "" {
			c.Comments[el.Key] = el.Comment
		}
	})
	for _, p := range e.profiles {
		c.Profiles[p.num], _ = e.Profile(p.num)
	}
	for num, i := range e.identities {
		c.Identities[num] = i.sig.String()
	}
	for _, k := range e.classes {
		c.Classes[k.num] = k.String()
	}
	return c
}

// Profile describes a profile number in use.
func (e *Engine) Profile(num uint32) (ProfileInfo, bool) {
	var info ProfileInfo
	found := false
	for r := range e.locals {
		for _, d := range Directions {
			p := r.prof[d]
			if p == nil || p.num != num {
				continue
			}
			if !found {
				info.Direction = d
				for _, t := range p.parts {
					info.Policies = append(info.Policies, t.id)
				}
			}
			found = true
			info.Pods = append(info.Pods, r.owner.Name)
		}
	}
	slices.SortFunc(info.Pods, func(a, b Name) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	info.Pods = slices.Compact(info.Pods)
	return info, found
}

// elements yields everything the engine has in force.
func (e *Engine) elements(yield func(Element)) {
	for _, r := range e.addresses {
		if r.id != nil {
			yield(Element{Key{Map: PodID, Addr: r.addr}, r.id.num, r.comment()})
		}
		for _, d := range Directions {
			if p := r.prof[d]; p != nil {
				yield(Element{Key{Map: profileMap(d), Addr: r.addr}, p.num, r.comment()})
				yield(Element{Key: Key{Map: isolatedSet(d), Addr: r.addr}, Comment: r.comment()})
			}
		}
	}
	for _, r := range e.nets.ranges {
		yield(Element{Key{Map: NetID, Addr: r.from, To: r.to}, r.id.num, ""})
	}
	for _, p := range e.profiles {
		yield(Element{Key{Map: AccessOthers, X: p.num}, p.others.num, p.comment()})
		for i, c := range p.rows {
			yield(Element{Key{Map: Access, X: p.num, Y: i.num}, c.num, ""})
		}
	}
	for _, c := range e.classes {
		if c.written {
			c.elements(func(k Key, v uint32) { yield(Element{Key: k, Value: v}) })
		}
	}
}

// Cluster returns a sorted snapshot of what the engine knows, for the oracle.
func (e *Engine) Cluster() *Cluster {
	c := &Cluster{}
	for _, ns := range e.namespaces {
		if ns.exists {
			c.Namespaces = append(c.Namespaces, Namespace{ns.name, ns.labels})
		}
	}
	for _, p := range e.pods {
		c.Pods = append(c.Pods, *p.Pod)
	}
	for _, n := range e.nodes {
		c.Nodes = append(c.Nodes, n)
	}
	for _, p := range e.policies {
		c.Policies = append(c.Policies, *p.Policy)
	}
	slices.SortFunc(c.Namespaces, func(a, b Namespace) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortFunc(c.Nodes, func(a, b Node) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortFunc(c.Pods, func(a, b Pod) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name.Name, b.Name.Name))
	})
	slices.SortFunc(c.Policies, func(a, b Policy) int {
		return cmp.Or(cmp.Compare(a.ID.Kind, b.ID.Kind), cmp.Compare(a.ID.Namespace, b.ID.Namespace), cmp.Compare(a.ID.Name.Name, b.ID.Name.Name))
	})
	return c
}

// String says what addresses with s match: their peer groups and named ports.
func (s *signature) String() string {
	if s == nil {
		return "any other address"
	}
	var parts []string
	for _, a := range s.atoms {
		parts = append(parts, a.String())
	}
	for _, n := range s.named {
		parts = append(parts, fmt.Sprintf("port %s is %s %d", n.name, n.actual, n.port))
	}
	slices.Sort(parts)
	return strings.Join(parts, "; ")
}

func (a *atom) String() string {
	var parts []string
	for _, s := range a.pods {
		parts = append(parts, s.String())
	}
	for _, b := range a.blocks {
		parts = append(parts, b.String())
	}
	slices.Sort(parts)
	return strings.Join(parts, " or ")
}

// String writes b as "10.0.0.0/8 except 10.1.0.0/16".
func (b Block) String() string {
	if len(b.Except) == 0 {
		return b.CIDR.String()
	}
	return b.CIDR.String() + " except " + strings.Trim(fmt.Sprint(b.Except), "[]")
}

// String writes s as "pods app=web in namespaces all".
func (s PodSelector) String() string {
	in := "namespace " + s.Namespace
	if s.Namespace == "" {
		in = "namespaces " + s.Namespaces.String()
	}
	return "pods " + s.Pods.String() + " in " + in
}

// String writes s as kubectl's --selector does, "all" when it matches everything.
func (s Selector) String() string {
	if len(s.Requirements) == 0 {
		return "all"
	}
	parts := make([]string, len(s.Requirements))
	for i, r := range s.Requirements {
		values := strings.Join(r.Values, ",")
		parts[i] = map[Operator]string{
			In: r.Key + " in (" + values + ")", NotIn: r.Key + " notin (" + values + ")", Exists: r.Key, DoesNotExist: "!" + r.Key,
		}[r.Op]
		if r.Op == In && len(r.Values) == 1 {
			parts[i] = r.Key + "=" + values
		}
	}
	return strings.Join(parts, ",")
}

// String names the protocol as Kubernetes and nft do, or gives its number.
func (p Protocol) String() string {
	if s, ok := map[Protocol]string{AnyProtocol: "any", ICMP: "icmp", TCP: "tcp", UDP: "udp", ICMPv6: "icmpv6", SCTP: "sctp"}[p]; ok {
		return s
	}
	return fmt.Sprintf("protocol %d", uint8(p))
}

// String writes c as "allow tcp 80; deny the rest".
func (c *class) String() string {
	var parts []string
	for _, s := range c.spans {
		ports := fmt.Sprintf(" %d-%d", s.first, s.last)
		switch {
		case s.first == s.last:
			ports = fmt.Sprintf(" %d", s.first)
		case s.first == 0 && s.last == 65535:
			ports = ""
		}
		parts = append(parts, codeName(s.code)+" "+s.protocol.String()+ports)
	}
	return strings.Join(append(parts, codeName(c.rest)+" the rest"), "; ")
}

func codeName(code uint8) string {
	return map[uint32]string{CodeAllow: "allow", CodeDeny: "deny", CodeAllowLog: "allow+log", CodeDenyLog: "deny+log"}[uint32(code)]
}
