package policy

import (
	"fmt"
	"slices"
	"strings"
)

// Canonical writes t so that tables that differ only in the choice of numbers for
// identities, profiles and classes give the same text: a class is named by its content,
// an identity and a profile by the addresses that have it.
func Canonical(t Tables) string {
	n := namer{class: map[uint32]string{}, identity: map[uint32]string{}, profile: map[uint32]string{}}
	keys := make([]Key, 0, len(t))
	for k := range t {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, compareKey)
	for _, k := range keys {
		switch k.Map {
		case AccessPort, AccessRange, AccessRest:
			n.class[k.X] += fmt.Sprintf("%d/%d/%d-%d=%d,", k.Map, k.Protocol, k.First, k.Last, t[k])
		case PodID, NetID:
			n.identity[t[k]] += fmt.Sprintf("%d/%s-%s,", k.Map, k.Addr, k.To)
		case IngressProfile, EgressProfile:
			n.profile[t[k]] += fmt.Sprintf("%d/%s,", k.Map, k.Addr)
		}
	}
	lines := make([]string, 0, len(keys))
	for _, k := range keys {
		lines = append(lines, n.line(k, t[k]))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// namer names numbers by what has them.
type namer struct{ class, identity, profile map[uint32]string }

func (n namer) line(k Key, v uint32) string {
	switch k.Map {
	case AccessPort, AccessRange, AccessRest:
		return fmt.Sprintf("class %s %d %d %d-%d %d", n.class[k.X], k.Map, k.Protocol, k.First, k.Last, v)
	case PodID, NetID:
		return fmt.Sprintf("identity %d %s-%s is {%s}", k.Map, k.Addr, k.To, n.identity[v])
	case IngressProfile, EgressProfile:
		return fmt.Sprintf("profile %d %s is {%s}", k.Map, k.Addr, n.profile[v])
	case Access:
		return fmt.Sprintf("access {%s} {%s} is {%s}", n.profile[k.X], n.identity[k.Y], n.class[v])
	case AccessOthers:
		return fmt.Sprintf("others {%s} is {%s}", n.profile[k.X], n.class[v])
	}
	return fmt.Sprintf("member %d %s", k.Map, k.Addr)
}
