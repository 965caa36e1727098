package policy

import (
	"crypto/sha256"
	"fmt"
	"hash"
	"slices"
	"strings"
)

// Canonical writes t so that tables that differ only in the choice of numbers for
// identities, profiles and classes give the same text: a class is named by its content,
// an identity and a profile by the addresses that have it (the first one, and a digest
// of all, so that the text stays of the size of t).
func Canonical(t Tables) string {
	keys := make([]Key, 0, len(t))
	for k := range t {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, compareKey)
	n := namer{}
	for _, k := range keys {
		switch k.Map {
		case AccessPort, AccessRange, AccessRest:
			n.add(kindClass, k.X, fmt.Sprintf("%d/%s/%d-%d=%d", k.Map, k.Protocol, k.First, k.Last, t[k]))
		case PodID, NetID:
			n.add(kindIdentity, t[k], fmt.Sprintf("%d/%s-%s", k.Map, k.Addr, k.To))
		case IngressProfile, EgressProfile:
			n.add(kindProfile, t[k], fmt.Sprintf("%d/%s", k.Map, k.Addr))
		}
	}
	lines := make([]string, 0, len(keys))
	for _, k := range keys {
		lines = append(lines, n.line(k, t[k]))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// kind of number; they are named apart because a broken table may mix them up.
type kind uint8

const (
	kindClass kind = iota
	kindIdentity
	kindProfile
)

type kindNumber struct {
	kind   kind
	number uint32
}

// namer names numbers by what has them.
type namer map[kindNumber]*members

type members struct {
	first  string
	digest hash.Hash
}

func (n namer) add(k kind, number uint32, member string) {
	m := n[kindNumber{k, number}]
	if m == nil {
		m = &members{first: member, digest: sha256.New()}
		n[kindNumber{k, number}] = m
	}
	m.digest.Write([]byte(member + "\n"))
}

func (n namer) name(k kind, number uint32) string {
	m := n[kindNumber{k, number}]
	if m == nil {
		return "{}"
	}
	return fmt.Sprintf("{%s.. %.12x}", m.first, m.digest.Sum(nil))
}

func (n namer) line(k Key, v uint32) string {
	switch k.Map {
	case AccessPort, AccessRange, AccessRest:
		return fmt.Sprintf("class %s %d %s %d-%d %d", n.name(kindClass, k.X), k.Map, k.Protocol, k.First, k.Last, v)
	case PodID, NetID:
		return fmt.Sprintf("identity %d %s-%s %s", k.Map, k.Addr, k.To, n.name(kindIdentity, v))
	case IngressProfile, EgressProfile:
		return fmt.Sprintf("profile %d %s %s", k.Map, k.Addr, n.name(kindProfile, v))
	case Access:
		return fmt.Sprintf("access %s %s %s", n.name(kindProfile, k.X), n.name(kindIdentity, k.Y), n.name(kindClass, v))
	case AccessOthers:
		return fmt.Sprintf("others %s %s", n.name(kindProfile, k.X), n.name(kindClass, v))
	}
	return fmt.Sprintf("member %d %s", k.Map, k.Addr)
}
