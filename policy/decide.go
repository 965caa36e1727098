package policy

import (
	"net/netip"
)

// Lookup is one element lookup of an evaluation of the tables.
type Lookup struct {
	Key   Key
	Value uint32
	Found bool
}

// TableDecision is what the tables say about one direction, with the numbers that led
// there and every lookup in order.
type TableDecision struct {
	// Judged is false when the pod on this side has no policy here: the flow passes.
	Judged   bool
	Allowed  bool
	Log      bool
	Profile  uint32
	Identity uint32
	Class    uint32
	Code     uint32 // 0: a lookup missed, which denies
	Lookups  []Lookup
}

// TableVerdict is what the tables say about a flow.
type TableVerdict struct {
	Allowed, Log    bool
	Egress, Ingress TableDecision
}

// LookupFunc finds one element. For NetID the key's Addr is the address and To is
// invalid: the range that holds it is meant. For AccessRange First equals Last: the
// range that holds the port is meant.
type LookupFunc func(Key) (uint32, bool)

// DecideWith evaluates f exactly as the ruleset does, egress first: profile, isolation,
// identity (others, overridden by NetID, overridden by PodID), access or others' class,
// then port, range and rest; a miss denies. What the ruleset exempts before it looks at
// policy is outside: established connections, hairpin, a pod's own node.
func DecideWith(lookup LookupFunc, f Flow) TableVerdict {
	v := TableVerdict{
		Egress:  decideDirection(lookup, Egress, f.Src, f.Dst, f),
		Ingress: decideDirection(lookup, Ingress, f.Dst, f.Src, f),
	}
	v.Allowed = v.Egress.Allowed && v.Ingress.Allowed
	v.Log = v.Egress.Log || v.Ingress.Log
	return v
}

func decideDirection(lookup LookupFunc, dir Direction, self, other netip.Addr, f Flow) TableDecision {
	d := TableDecision{Judged: true, Lookups: make([]Lookup, 0, 8)} // most that there are as a rule
	get := func(k Key) (uint32, bool) {
		v, ok := lookup(k)
		d.Lookups = append(d.Lookups, Lookup{k, v, ok})
		return v, ok
	}
	profiles, isolated := profileMap(dir), isolatedSet(dir)
	var ok bool
	if d.Profile, ok = get(Key{Map: profiles, Addr: self}); !ok {
		if _, member := get(Key{Map: isolated, Addr: self}); !member {
			d.Judged, d.Allowed = false, true
			return d
		}
		// The policy may have come between the two lookups; its profile came first.
		if d.Profile, ok = get(Key{Map: profiles, Addr: self}); !ok {
			return d
		}
	}
	d.Identity = IdentityOthers
	for _, m := range [2]Map{NetID, PodID} {
		if v, ok := get(Key{Map: m, Addr: other}); ok {
			d.Identity = v
		}
	}
	if d.Class, ok = get(Key{Map: Access, X: d.Profile, Y: d.Identity}); !ok {
		if d.Class, ok = get(Key{Map: AccessOthers, X: d.Profile}); !ok {
			return d
		}
	}
	for _, k := range [3]Key{
		{Map: AccessPort, X: d.Class, Protocol: f.Protocol, First: f.Port},
		{Map: AccessRange, X: d.Class, Protocol: f.Protocol, First: f.Port, Last: f.Port},
		{Map: AccessRest, X: d.Class},
	} {
		if d.Code, ok = get(k); ok {
			break
		}
	}
	d.Allowed = d.Code == CodeAllow || d.Code == CodeAllowLog
	d.Log = d.Code == CodeAllowLog || d.Code == CodeDenyLog
	return d
}

func profileMap(dir Direction) Map {
	if dir == Egress {
		return EgressProfile
	}
	return IngressProfile
}

func isolatedSet(dir Direction) Map {
	if dir == Egress {
		return IsolatedEgress
	}
	return IsolatedIngress
}

// Decide evaluates f on t; see DecideWith. It scans t for ranges: for one question.
// For many, keep the LookupFunc of Index.
func (t Tables) Decide(f Flow) TableVerdict { return DecideWith(t.Index(), f) }

// Index returns the LookupFunc of t with its ranges sorted. t must not change meanwhile.
func (t Tables) Index() LookupFunc {
	var nets []rangeValue
	ports := map[Key][]rangeValue16{}
	for k, v := range t {
		switch k.Map {
		case NetID:
			nets = append(nets, rangeValue{k.Addr, k.To, v})
		case AccessRange:
			short := Key{Map: AccessRange, X: k.X, Protocol: k.Protocol}
			ports[short] = append(ports[short], rangeValue16{k.First, k.Last, v})
		}
	}
	sortRanges(nets)
	return func(k Key) (uint32, bool) {
		switch k.Map {
		case NetID:
			return findRange(nets, k.Addr)
		case AccessRange:
			for _, r := range ports[Key{Map: AccessRange, X: k.X, Protocol: k.Protocol}] {
				if r.first <= k.First && k.First <= r.last {
					return r.value, true
				}
			}
			return 0, false
		}
		v, ok := t[k]
		return v, ok
	}
}
